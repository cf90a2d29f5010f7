r"""Squared gradient norms of a chain of dense layers, and their derivatives, as formulas.

With δ_t = ∂f/∂z_t, where h_{t+1} = g_t(z_t) and z_t = W_t h_t + b_t for t = 1 … n, and ∂f/∂z_n given,

    δ_t = g_t'(z_t) ⊙ (W_{t+1}ᵀ δ_{t+1}),     ∇_x f = W_1ᵀ δ_1,     ∇_{W_t} f = δ_t h_tᵀ,     ∇_{b_t} f = δ_t.

The derivatives of squared norms of these are formulas, too: cotangents of the δ_t run forward through the layers and leave
cotangents of W_t, h_t and z_t, which join the backward pass of the loss. Output and squared norms are one node of the graph,
so that every gradient of a weight is one tensor from the beginning, to which the products of the loss are added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradpen._graph import save_rows, saved_rows
from gradpen._layout import (
    dot,
    lies_by_feature,
    mean_row_sq_norm,
    plus_times,
    row_sq_norms,
    stacked_row_sq_norms,
    times,
)
from gradpen._numerics import (
    full_precision,
    is_at_hand,
    is_batched,
    number_if_at_hand,
    row_sq_norm,
    total_sq_norm,
)
from gradpen.cotangents import Cotangent, OfScalar
from gradpen.dense_chain import DenseChain, may_overwrite
from gradpen.recording import saved_tensors_are_hooked

Row = tuple[Tensor | None, ...]  # something for every layer


class NormOf(NamedTuple):
    """Which squared norm, over which of the parameters.

    Attributes:
        what: "input" for ‖∇_x f_i‖², "sample" for ‖∇_θ f_i‖², "batch" for ‖∇_θ mean_i f_i‖².
        weights: whether W_t is part of θ, for every layer.
        biases: whether b_t is part of θ.
        as_mean: its mean over the samples.
    """

    what: str
    weights: tuple[bool, ...] = ()
    biases: tuple[bool, ...] = ()
    as_mean: bool = False


class Deltas(NamedTuple):
    """What a backward pass through the layers leaves.

    Attributes:
        at: δ_t, (B, n_t).
        before: W_{t+1}ᵀ δ_{t+1}, (B, n_t), for t < n where the elementwise function is curved; else None.
        entry: ∇_x f, (B, n_0), if asked for.
    """

    at: tuple[Tensor, ...]
    before: Row
    entry: Tensor | None


# --- values --------------------------------------------------------------------------------------------------------


def deltas_of(chain: DenseChain, cotangent: Tensor, norms: Sequence[NormOf]) -> Deltas:
    """δ_t of every layer from ∂f_i/∂output, (B, n_n), and ∇_x f if one of the norms is that of it."""
    at: list[Tensor] = [cotangent]
    before: list[Tensor | None] = []
    links = zip(chain.weights[1:], chain.between, chain.hidden[1:], strict=True)
    for weight, between, h in reversed(list(links)):
        pushed = times(at[-1], weight, like=h)
        before.append(pushed if between.is_curved else None)
        at.append(between.pull(pushed) if between.is_curved else between.pull_into(pushed))
    entry = times(at[-1], chain.weights[0]) if any(norm.what == "input" for norm in norms) else None
    return Deltas(tuple(reversed(at)), tuple(reversed(before)), entry)


def sq_norms(chain: DenseChain, deltas: Deltas, norms: Sequence[NormOf]) -> list[Tensor]:
    """The squared norms that are asked for: (B,), or (1,) for "batch", or 0-dim."""
    return [_sq_norm(chain, deltas, norm, _factors(chain, deltas, norm)) for norm in norms]


def mean_gradients(
    chain: DenseChain, deltas: Deltas, *, with_first: bool = True
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """∇ mean_i f_i of every weight, of W_1 only if asked for, and of every bias that there is."""
    pairs = zip(deltas.at, chain.hidden, strict=True)
    weights = [mean_product(delta, h) if with_first or t > 0 else None for t, (delta, h) in enumerate(pairs)]
    return weights, _mean_rows(deltas.at, [bias is not None for bias in chain.biases])


def _mean_rows(deltas: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """mean_i δ_i of every layer where it is wanted, as products, which is quicker."""
    size = deltas[0].shape[0]
    shares = deltas[0].new_full((size,), 1 / size)
    return [torch.mv(delta.t(), shares) if is_wanted else None for delta, is_wanted in zip(deltas, wanted, strict=True)]


def mean_product(delta: Tensor, h: Tensor) -> Tensor:
    """mean_i δ_i h_iᵀ."""
    return product_of_rows(delta, h, 1 / h.shape[0])


def product_of_rows(delta: Tensor, h: Tensor, scale: float) -> Tensor:
    """Scale · δᵀ h, scaled within the product."""
    return torch.addmm(delta.new_empty(1), delta.t(), h, beta=0, alpha=scale)  # nothing is read of the first


def mean_of_products(a: Tensor, b: Tensor) -> Tensor:
    """mean_j (a_i · a_j) b_j for every sample i, without the gradient mean_j b_j a_jᵀ: as b."""
    return mean_combinations(a @ a.t(), b)


def mean_combinations(products: Tensor, b: Tensor) -> Tensor:
    """mean_j products_ij b_j for every sample i: as b."""
    if lies_by_feature(b):
        return torch.addmm(b.new_empty(1), b.t(), products, beta=0, alpha=1 / b.shape[0]).t()
    return torch.addmm(b.new_empty(1), products, b, beta=0, alpha=1 / b.shape[0])


def _factors(chain: DenseChain, deltas: Deltas, norm: NormOf) -> tuple[Row, ...]:
    """What the squared norm is made of: no rows of tensors, one, or three. None or 0 where nothing counts.

    For single samples 1 + ‖h_t‖² of all layers, and ‖δ_t‖²: (2, n, B). For the batch the gradients G_t of W_t and g_t of
    b_t, and where that is cheaper h_t G_tᵀ, (B, n_t), instead of G_t.
    """
    if norm.what == "sample":
        return ((_sizes_and_squares(chain, deltas, norm),),)
    if norm.what == "batch":
        weights, products = [], []
        for t, (delta, h) in enumerate(zip(deltas.at, chain.hidden, strict=True)):
            by_products = norm.weights[t] and _by_products(delta, h, t)
            weights.append(mean_product(delta, h) if norm.weights[t] and not by_products else None)
            products.append(mean_of_products(h, delta) if by_products else None)
        return tuple(weights), tuple(_mean_rows(deltas.at, norm.biases)), tuple(products)
    return ()


_NUMBER_OF_FACTORS = {"input": 0, "sample": 1, "batch": 3}


def _by_products(delta: Tensor, h: Tensor, t: int) -> bool:
    """Whether products between samples, h_i · h_j and δ_i · δ_j, cost less than those with G_t and G_t itself.

    Values may cancel in them, and the host has to look whether they do (`_batch_sq_norm`): so it must not wait for a device.
    """
    if torch.is_grad_enabled() or not is_at_hand(delta):
        return False
    (size, rows), columns = delta.shape, h.shape[1]
    between_samples, with_weight = (2, 3) if t > 0 else (1, 2)  # nobody asks for the cotangent of h_1
    return between_samples * size * (rows + columns) < with_weight * rows * columns


def _sizes_and_squares(chain: DenseChain, deltas: Deltas, norm: NormOf) -> Tensor:
    """1 + ‖h_t‖², or what of it belongs to a weight or a bias that counts, and ‖δ_t‖²: (2, n, B)."""
    if all(norm.weights) and all(norm.biases) and not torch.is_grad_enabled():
        rows = [*chain.hidden, *deltas.at]
        sizes_and_squares = stacked_row_sq_norms(rows).view(2, len(rows) // 2, -1)
        sizes_and_squares[0].add_(1)
        return sizes_and_squares
    nothing = deltas.at[0].new_zeros(deltas.at[0].shape[0])
    sizes, squares = [], []
    for h, delta, weight, bias in zip(chain.hidden, deltas.at, norm.weights, norm.biases, strict=True):
        size = _row_sq_norm(h) if weight else nothing
        sizes.append(size + 1 if bias else size)
        squares.append(_row_sq_norm(delta) if weight or bias else nothing)
    return torch.stack([torch.stack(sizes), torch.stack(squares)])


def _row_sq_norm(tensor: Tensor) -> Tensor:
    """`row_sq_norm`, in one kernel where no second derivative is wanted: the norm has none at 0."""
    return row_sq_norm(tensor) if torch.is_grad_enabled() else row_sq_norms(tensor)


def _only(row: Sequence[Tensor | None], wanted: Sequence[bool]) -> Row:
    return tuple([tensor if is_wanted else None for tensor, is_wanted in zip(row, wanted, strict=True)])


def _sq_norm(chain: DenseChain, deltas: Deltas, norm: NormOf, factors: Sequence[Any]) -> Tensor:
    if norm.what == "input":
        assert deltas.entry is not None
        if norm.as_mean and not torch.is_grad_enabled():
            return mean_row_sq_norm(deltas.entry)
        rows = _row_sq_norm(deltas.entry)
        return rows.mean() if norm.as_mean else rows
    if norm.what == "batch":
        sq_norm = _batch_sq_norm(chain, deltas, norm, factors)
        return sq_norm if norm.as_mean else sq_norm.reshape(1)
    ((sizes_and_squares,),) = factors
    sizes, squares = sizes_and_squares
    if norm.as_mean:
        return torch.dot(sizes.reshape(-1), squares.reshape(-1)) / sizes.shape[1]
    total: Tensor = (sizes * squares).sum(0)
    return total


def _batch_sq_norm(chain: DenseChain, deltas: Deltas, norm: NormOf, factors: Sequence[Row]) -> Tensor:
    """‖∇_θ mean_i f_i‖², 0-dim."""
    *gradients, products = factors
    found = [gradient for row in gradients for gradient in row if gradient is not None]
    if torch.is_grad_enabled():
        return total_sq_norm(found) if found else deltas.at[0].new_zeros(())
    sq_norm = total_norm(found, deltas.at[0]).square()
    if all(product is None for product in products):
        return sq_norm
    spread = torch.zeros_like(sq_norm)  # what the diagonals h_i · h_i and δ_i · δ_i alone make up
    for product, delta, h in zip(products, deltas.at, chain.hidden, strict=True):
        if product is not None:  # ‖G‖² = ⟨h Gᵀ, δ⟩/B
            sq_norm = sq_norm + dot(product, delta) / h.shape[0]
            spread = spread + torch.dot(_row_sq_norm(h), _row_sq_norm(delta)) / h.shape[0] ** 2
    if bool(sq_norm < CANCELLED * spread):
        weights, biases = mean_gradients(chain, deltas)
        counted = [*_only(weights, norm.weights), *_only(biases, norm.biases)]
        return total_norm([gradient for gradient in counted if gradient is not None], sq_norm).square()
    return sq_norm


CANCELLED = 1e-2  # below this part of the diagonals' share, products between samples have lost two digits and more


def total_norm(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """‖·‖ of all entries of all tensors together, which may be none: 0-dim, not to be differentiated."""
    if not tensors:
        return like.new_zeros(())
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]))


# --- derivatives ---------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Norms of the gradients of one f."""

    cotangent: Cotangent
    norms: tuple[NormOf, ...]


class DataLoss(NamedTuple):
    """A loss whose gradient is known.

    Attributes:
        value: 0-dim.
        cotangent: ∂f_i/∂output.
        multiple: of mean_i f_i, that the loss is.
    """

    value: Tensor
    cotangent: OfScalar
    multiple: float | Tensor


class _MultipleOfMean(NamedTuple):
    """A `DataLoss` without its value."""

    cotangent: OfScalar
    multiple: float | Tensor


class Differentiable(NamedTuple):
    """Functions of the parameters."""

    output: Tensor
    data_loss: Tensor | None
    sq_norms: list[Sequence[Tensor]]  # for each f


def output_with_graph(chain: DenseChain) -> Tensor:
    """The output as a function of the parameters."""
    return chain.output if chain.output.requires_grad else differentiable(chain, []).output


def differentiable(
    chain: DenseChain, measured: Sequence[Measured], data_loss: DataLoss | None = None
) -> Differentiable:
    """The output, for each f its squared norms, and the data loss if there is one: one node of the graph."""
    output, value, *found = _Chain.apply(chain, measured, data_loss, *chain.leaves)
    remaining = iter([as_own(one) if one.dim() == 0 else one for one in found])  # the others are reduced before use
    output, value = as_own(output), None if value is None else as_own(value)
    return Differentiable(output, value, [list(islice(remaining, len(norms))) for _, norms in measured])


def as_own(output: Tensor) -> Tensor:
    """An output of a node that has several, as a tensor whose hooks run only if there is a gradient for it."""
    return output.view_as(output)


def pulled_to_parameters(chain: DenseChain, delta: Tensor) -> list[Tensor]:
    """Cotangents of the `leaves` from that of the output."""
    if torch.is_grad_enabled():
        chain = chain.with_parameters(chain.weights, chain.biases)
    weights, biases = _sweep_backward(chain, delta, _Gathered.empty(len(chain.weights)))
    return [cotangent for cotangent in (*weights, *biases) if cotangent is not None]


class _Chain(torch.autograd.Function):
    """Leaves → output, data loss and squared norms."""

    @staticmethod
    def forward(
        ctx: Any, chain: DenseChain, measured: Sequence[Measured], data_loss: DataLoss | None, *leaves: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.measured = measured
        ctx.data_loss = None if data_loss is None else _MultipleOfMean(data_loss.cotangent, data_loss.multiple)
        ctx.between = [between.without_tensors() for between in chain.between]
        rows: list[Sequence[Any]] = chain.rows
        found = []
        for cotangent, norms in measured:
            deltas = deltas_of(chain, cotangent.value, norms)
            factors = [_factors(chain, deltas, norm) for norm in norms]
            rows += [deltas.at, deltas.before, (deltas.entry,), *itertools.chain.from_iterable(factors)]
            found += [
                _sq_norm(chain, deltas, norm, its_factors) for norm, its_factors in zip(norms, factors, strict=True)
            ]
        save_rows(ctx, rows)
        ctx.is_hooked = saved_tensors_are_hooked()
        value = None if data_loss is None else data_loss.value.clone()  # what this node refers to must not refer to it
        return chain.output.detach(), value, *found

    @staticmethod
    def backward(
        ctx: Any, of_output: Tensor | None, of_data_loss: Tensor | None, *of_norms: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rows = saved_rows(ctx)
        chain = DenseChain.of_rows(rows, ctx.between)
        kept = [(_deltas_of_rows(rows), [_factors_of_rows(rows, norm) for norm in norms]) for _, norms in ctx.measured]
        with full_precision(chain.hidden[0].device), nothing_written_over((of_output, of_data_loss, *of_norms)) as own:
            deltas = _deltas_of_data_loss(ctx, kept, (of_output, *of_norms))
            if deltas is not None and of_data_loss is not None:
                weights, biases = _scaled_gradients(chain, deltas, _share(chain, of_data_loss, ctx.data_loss.multiple))
            else:
                if torch.is_grad_enabled():  # create_graph=True: what was saved must not pass for constants
                    chain = chain.with_parameters(chain.weights, chain.biases)
                delta = of_output
                if of_data_loss is not None:
                    delta = _add(delta, _of_output(chain, of_data_loss, ctx.data_loss))
                spare = kept[0][0].at if kept and may_overwrite() and _is_last_pass(ctx) else ()
                weights, biases = _backward(chain, zip(ctx.measured, kept, strict=True), delta, iter(of_norms), spare)
        there = [grad for grad, bias in zip(biases, chain.biases, strict=True) if bias is not None]
        return None, None, None, *[None if grad is None else own(grad) for grad in (*weights, *there)]


def _is_last_pass(ctx: Any) -> bool:
    """Whether autograd lets go of what was saved after this backward pass, and nobody else has it."""
    if torch.compiler.is_compiling():  # memory is the compiler's business
        return False
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return not ctx.is_hooked and keeps_graph is not None and not keeps_graph()


@contextmanager
def nothing_written_over(cotangents: Iterable[Tensor | None]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Where cotangents are batched, torch has no rule for writing over tensors: then as if a graph were wanted.

    What is found is to be given to the function in the end, which takes off a graph that nobody wants.
    """
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    if torch.is_grad_enabled() or not (in_transform or any(one is not None and is_batched(one) for one in cotangents)):
        yield lambda found: found
        return
    with torch.enable_grad():
        yield torch.no_grad()(Tensor.clone)  # there is no rule for `detach` either


def _deltas_of_rows(rows: Iterator[Any]) -> Deltas:
    at, before, (entry,) = islice(rows, 3)
    return Deltas(at, before, entry)


def _factors_of_rows(rows: Iterator[Any], norm: NormOf) -> tuple[Row, ...]:
    return tuple(islice(rows, _NUMBER_OF_FACTORS[norm.what]))


def _deltas_of_data_loss(
    ctx: Any, kept: Sequence[tuple[Deltas, list[Any]]], others: Iterable[Tensor | None]
) -> Deltas | None:
    """δ_t of the f_i that the data loss is made of, if they are known and no cotangents of others come to them."""
    if ctx.data_loss is None or torch.is_grad_enabled() or any(one is not None for one in others):
        return None
    pairs = zip(ctx.measured, kept, strict=True)
    return next((deltas for (cotangent, _), (deltas, _) in pairs if cotangent is ctx.data_loss.cotangent), None)


def _scaled_gradients(chain: DenseChain, deltas: Deltas, scale: float | Tensor) -> tuple[Row, Row]:
    """Scale · Σ_i ∇f_i of every weight and of every bias that there is."""
    weights = [_add_product(None, delta, h, scale) for delta, h in zip(deltas.at, chain.hidden, strict=True)]
    sums = zip(deltas.at, chain.biases, strict=True)
    return tuple(weights), tuple([None if bias is None else delta.sum(0) * scale for delta, bias in sums])


def _share(chain: DenseChain, of_data_loss: Tensor, multiple: float | Tensor) -> float | Tensor:
    """The cotangent of every f_i from that of the data loss."""
    share = multiple / chain.hidden[0].shape[0]
    return (of_data_loss if torch.is_grad_enabled() else number_if_at_hand(of_data_loss)) * share


def _of_output(chain: DenseChain, of_data_loss: Tensor, made_of: _MultipleOfMean) -> Tensor:
    """The cotangent of the output from that of the data loss."""
    cotangent = made_of.cotangent.at(chain.output) if torch.is_grad_enabled() else made_of.cotangent
    return cotangent.value * _share(chain, of_data_loss, made_of.multiple)


def _backward(
    chain: DenseChain,
    measured: Iterable[tuple[Measured, tuple[Deltas, list[Any]]]],
    delta: Tensor | None,
    of_norms: Iterator[Tensor | None],
    spare: Sequence[Tensor],
) -> tuple[Row, Row]:
    """Cotangents of the weights and of the biases from those of the output and of the squared norms.

    Spare δ_t may be written over when the cotangents of the norms have been found.
    """
    gathered = _Gathered.empty(len(chain.weights))
    for (cotangent, norms), (deltas, factors) in measured:
        if torch.is_grad_enabled():
            cotangent = cotangent.at(chain.output)
            deltas = deltas_of(chain, cotangent.value, norms)
            factors = [_factors(chain, deltas, norm) for norm in norms]
        each = zip(norms, islice(of_norms, len(norms)), factors, strict=True)
        wanted = [_Wanted(norm, of_norm, its_factors) for norm, of_norm, its_factors in each if of_norm is not None]
        of_cotangent = _sweep_forward(chain, deltas, wanted, gathered)
        if of_cotangent is not None:
            delta = _add(delta, cotangent.pull(of_cotangent))
    return _sweep_backward(chain, delta, gathered, spare)


class _Wanted(NamedTuple):
    """A squared norm that the loss depends on."""

    norm: NormOf
    of_norm: Tensor  # its cotangent: (B,), (1,) or 0-dim
    factors: Sequence[Any]


class _Gathered(NamedTuple):
    """Cotangents, by layer, that do not come by way of the output."""

    weights: list[Tensor | None]
    hidden: list[Tensor | None]
    scales: list[Tensor | None]  # (B, 1): what h_t is to be multiplied by for more of its cotangent
    saved: list[Tensor | None]  # of what the elementwise functions saved

    @classmethod
    def empty(cls, n: int) -> _Gathered:
        return cls([None] * n, [None] * n, [None] * n, [None] * n)


def _sweep_forward(chain: DenseChain, deltas: Deltas, wanted: Sequence[_Wanted], gathered: _Gathered) -> Tensor | None:
    """From the cotangents of squared norms to that of ∂f_i/∂output; adds to `gathered` what it meets on the way."""
    of_delta = None
    over_batch, over_samples = [], []
    n = len(chain.weights)
    for norm, of_norm, factors in wanted:
        scale = _scale(norm, of_norm, chain.hidden[0].shape[0])
        if norm.what == "input":
            assert deltas.entry is not None
            gathered.weights[0] = _add_product(gathered.weights[0], deltas.at[0], deltas.entry, scale)
            of_delta = _add_scaled(of_delta, times(deltas.entry, chain.weights[0].t()), scale)
        elif norm.what == "batch":
            over_batch.append((norm, scale, factors))
        else:
            ((sizes_and_squares,),) = factors
            by_rows = scale.t() if isinstance(scale, Tensor) else scale
            scales = (sizes_and_squares * by_rows).view(2 * n, -1, 1).unbind()
            over_samples.append((norm, scales[:n], scales[n:]))
    for t, (delta, h) in enumerate(zip(deltas.at, chain.hidden, strict=True)):
        is_multiple = of_delta is None and not over_batch  # of δ_t, when the norms over samples have been added
        for norm, sizes, squares in over_samples:  # (1 + ‖h_t‖²) ‖δ_t‖²
            if norm.weights[t] or norm.biases[t]:
                of_delta = _add_scaled(of_delta, delta, sizes[t])
            if norm.weights[t] and t > 0:
                gathered.scales[t] = _add(gathered.scales[t], squares[t])
        for norm, scale, factors in over_batch:
            which = [row[t] for row in factors]
            of_delta, of_h = _through_batch_norm(of_delta, delta, h, scale, *which, with_h=t > 0 and norm.weights[t])
            gathered.hidden[t] = _add(gathered.hidden[t], of_h)
        if of_delta is None or t == n - 1:
            continue
        between = chain.between[t]
        if between.is_curved:
            before = deltas.before[t]
            assert before is not None
            gathered.saved[t] = _add(gathered.saved[t], between.of_saved(before, of_delta))
        of_pushed = of_delta if is_multiple and between.is_mask else between.pull_into(of_delta)
        gathered.weights[t + 1] = _add_product(gathered.weights[t + 1], deltas.at[t + 1], of_pushed)
        of_delta = times(of_pushed, chain.weights[t + 1].t())
    return of_delta


def _scale(norm: NormOf, of_norm: Tensor, size: int) -> float | Tensor:
    """The factor of every square's derivative: a number, 0-dim, or (B, 1)."""
    if norm.as_mean:
        return (of_norm if torch.is_grad_enabled() else number_if_at_hand(of_norm)) * (2 / size)
    twice = 2 * of_norm.unsqueeze(1)
    return twice / size if norm.what == "batch" else twice


def _sweep_backward(
    chain: DenseChain, delta: Tensor | None, gathered: _Gathered, spare: Sequence[Tensor] = ()
) -> tuple[Row, Row]:
    """From the cotangent of the output to those of weights and biases; uses up what was gathered, and spare δ_t."""
    n = len(chain.weights)
    weights: list[Tensor | None] = [None] * n
    biases: list[Tensor | None] = [None] * n
    for t in reversed(range(n)):
        weights[t] = _add_product(gathered.weights[t], delta, chain.hidden[t])
        if delta is not None and chain.biases[t] is not None:
            biases[t] = delta.sum(0)
        if t > 0:
            out = spare[t - 1] if spare else None
            pushed = _push(gathered.hidden[t], delta, chain.weights[t], like=chain.hidden[t], out=out)
            scale = gathered.scales[t]
            if scale is not None:
                pushed = _add_scaled(pushed, chain.hidden[t], scale)
            of_saved = gathered.saved[t - 1]
            if pushed is None and of_saved is not None:
                pushed = torch.zeros_like(of_saved)
            delta = None if pushed is None else chain.between[t - 1].pull_into(pushed, of_saved)
    return tuple(weights), tuple(biases)


def _through_batch_norm(
    of_delta: Tensor | None,
    delta: Tensor,
    h: Tensor,
    scale: float | Tensor,
    weight_gradient: Tensor | None,
    bias_gradient: Tensor | None,
    product: Tensor | None,
    *,
    with_h: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Cotangents of δ_t, added to what there is, and of h_t from that of ‖G_t‖² + ‖g_t‖², which is `scale` · B/2.

    Either G_t is given or the product h_t G_tᵀ, or neither if W_t does not count.
    """
    if weight_gradient is None and product is None:
        return _add(
            of_delta, None if bias_gradient is None else (bias_gradient * scale).expand(delta.shape).contiguous()
        ), None
    if product is not None:
        to_delta = product if bias_gradient is None else product + bias_gradient
        to_h = mean_of_products(delta, h) if with_h else None
    else:
        assert weight_gradient is not None
        transposed = weight_gradient.t()
        to_delta = times(h, transposed, like=delta)
        to_delta = to_delta if bias_gradient is None else to_delta + bias_gradient
        to_h = times(delta, weight_gradient, like=h) if with_h else None
    return _add_scaled(of_delta, to_delta, scale), None if to_h is None else to_h * scale


def _add(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more


def _add_scaled(total: Tensor | None, more: Tensor, scale: float | Tensor) -> Tensor:
    """Total + more · scale, written over the total."""
    if total is None:
        return more * scale
    if isinstance(scale, float):
        return total.add_(more, alpha=scale) if may_overwrite() else torch.add(total, more, alpha=scale)
    return total.addcmul_(more, scale) if may_overwrite() else torch.addcmul(total, more, scale)


def _add_product(total: Tensor | None, delta: Tensor | None, h: Tensor, scale: float | Tensor = 1.0) -> Tensor | None:
    """Total + scale · δᵀ h, written over the total."""
    if delta is None:
        return total
    if isinstance(scale, Tensor):
        delta, scale = delta * scale, 1.0
    if total is None:
        return delta.t() @ h if scale == 1 else product_of_rows(delta, h, scale)
    out = total if may_overwrite() else None  # in the form that torch.utils.flop_counter knows
    return torch.addmm(total, delta.t(), h, alpha=scale, out=out)


def _push(
    total: Tensor | None, delta: Tensor | None, weight: Tensor, like: Tensor, out: Tensor | None
) -> Tensor | None:
    """Total + δ W."""
    if total is None or delta is None:
        return total if delta is None else times(delta, weight, like, out)
    return plus_times(total, delta, weight)
