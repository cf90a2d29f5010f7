r"""The mean of the f_i of a chain of dense layers with its gradient, and finite differences of it.

`finite_difference` says what is computed. Here a forward difference costs two forward and two backward passes of the layers
and one move of the parameters: the gradient at θ is added to that at θ + r u within the products of the latter, and that of
W_1, where x is the same, before the only product. Then G_1 at θ is never formed, if products between samples tell the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradpen._graph import save_rows, saved_rows
from gradpen._layout import dot, row_sq_norms
from gradpen._numerics import divide_or_zero, full_precision, is_at_hand, number_if_at_hand
from gradpen.chain_norms import (
    CANCELLED,
    DataLoss,
    Deltas,
    NormOf,
    as_own,
    deltas_of,
    mean_combinations,
    mean_gradients,
    mean_product,
    nothing_written_over,
    pulled_to_parameters,
    total_norm,
)
from gradpen.dense_chain import DenseChain
from gradpen.known_gradients import derived_once, handed_out


class Difference(NamedTuple):
    """A norm of the gradient of the mean, differentiated by a difference quotient.

    Attributes:
        norm_of: over which parameters.
        scheme: "forward", "backward" or "central".
        step: length r of the displacement.
    """

    norm_of: NormOf
    scheme: str
    step: float

    @property
    def moves(self) -> list[tuple[float, float]]:
        """(signed step, weight of the gradient there) of every displaced gradient in the quotient."""
        match self.scheme:
            case "forward":
                return [(self.step, 1 / self.step)]
            case "backward":
                return [(-self.step, -1 / self.step)]
        return [(self.step, 0.5 / self.step), (-self.step, -0.5 / self.step)]

    @property
    def weight_here(self) -> float:
        """Weight of the gradient at θ."""
        return -sum(weight for _, weight in self.moves)


class _MeanGradient(NamedTuple):
    """∇ mean_i f_i at θ.

    Attributes:
        weights: G_t of every weight, but None for W_1 if `first` stands for it.
        biases: g_t of every bias that there is.
        first: δ_1 and x, (B, n_1) and (B, n_0): x is the same wherever the parameters are, so that G_1 = mean_i δ_i x_iᵀ
            can wait for what is added to it.
    """

    weights: Sequence[Tensor | None]
    biases: Sequence[Tensor | None]
    first: Sequence[Tensor] = ()

    @property
    def leaves(self) -> list[Tensor]:
        """All weights, none of which waits, and then all biases that there are."""
        return [gradient for gradient in (*self.weights, *self.biases) if gradient is not None]


class _FirstLayer(NamedTuple):
    """What a displacement needs of G_1, from products between samples.

    Attributes:
        product: x G_1ᵀ, (B, n_1), what z_1 moves by if W_1 moves by G_1; None if W_1 does not count.
        sq_norm: ‖G_1‖², 0 if W_1 does not count; None if it has to come from G_1 itself.
    """

    product: Tensor | None = None
    sq_norm: float | None = 0.0


def with_known_gradient(
    chain: DenseChain, deltas: Deltas, data_loss: DataLoss, differences: Sequence[Difference]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, data loss, and norms of the gradient of the mean of the f_i, the last two differentiable to first order.

    Args:
        chain: the layers.
        deltas: δ_t of the f_i.
        data_loss: made of the f_i.
        differences: the norms.
    """
    with torch.no_grad():
        firsts = _first_layers(chain, deltas.at[0], differences)
        first_waits = bool(firsts) and all(first is not None and first.sq_norm is not None for first in firsts)
        weights, biases = mean_gradients(chain, deltas, with_first=not first_waits)
        gradient = _MeanGradient(weights, biases, (deltas.at[0], chain.hidden[0]) if first_waits else ())
        norms, displaced = [], []
        for place, (difference, first) in enumerate(zip(differences, firsts, strict=True)):
            norm = _norm(gradient, difference.norm_of, first, data_loss.value)
            norms.append(norm)
            inverse = _reciprocal_or_zero(norm)
            for signed_step, weight in difference.moves:
                moved = _moved(chain, gradient, difference.norm_of, inverse * signed_step, first)
                cotangent = data_loss.cotangent.at(moved.output).value.detach()
                displaced.append(_Displaced(place, weight, moved.hidden, deltas_of(moved, cotangent, ()).at))
    here = [difference.weight_here for difference in differences]
    output, value, *roots = _WithKnownGradient.apply(chain, data_loss, gradient, norms, here, displaced, *chain.leaves)
    return chain.output if output is None else as_own(output), as_own(value), list(roots)


class _Displaced(NamedTuple):
    """What makes up the gradient where the parameters are displaced; they themselves are not kept.

    Attributes:
        place: of the norm in whose quotient it is.
        weight: of its gradient there.
        hidden: h_t, (B, n_{t−1}).
        deltas: δ_t, (B, n_t).
    """

    place: int
    weight: float
    hidden: Sequence[Tensor]
    deltas: Sequence[Tensor]


def _first_layers(chain: DenseChain, delta: Tensor, differences: Sequence[Difference]) -> list[_FirstLayer | None]:
    """For every difference; None where G_1 moves W_1 itself, as all do if z_1 was not kept."""
    if chain.first is None:
        return [None] * len(differences)
    counts = [difference.norm_of.weights[0] for difference in differences]
    counted = _first_layer(chain.hidden[0], delta) if any(counts) else None
    return [counted if it_counts else _FirstLayer() for it_counts in counts]


def _first_layer(x: Tensor, delta: Tensor) -> _FirstLayer | None:
    """From products between samples; None if they cost more than the products with G_1 that they save, or values cancel.

    Whether they cancel the host has to look at: where it would have to wait for a device, ‖G_1‖² is left to G_1.
    """
    (size, columns), rows = x.shape, delta.shape[1]
    saved = 2 if is_at_hand(delta) else 1  # G_1 and x G_1ᵀ, or the latter alone
    if size * (rows + columns) >= saved * rows * columns:
        return None
    products = x @ x.t()
    product = mean_combinations(products, delta)
    if not is_at_hand(delta):
        return _FirstLayer(product, None)
    sq_norm = float(dot(product, delta)) / size
    spread = float(torch.dot(products.diagonal(), row_sq_norms(delta))) / size**2  # what the diagonals alone make up
    if not max(CANCELLED * spread, torch.finfo(delta.dtype).tiny) <= sq_norm < math.inf:
        return None
    return _FirstLayer(product, sq_norm)


def _norm(gradient: _MeanGradient, norm_of: NormOf, first: _FirstLayer | None, like: Tensor) -> Tensor:
    """‖·‖ of the part of the gradient that counts: 0-dim."""
    each = [
        *zip(gradient.weights, norm_of.weights, strict=True),
        *zip(gradient.biases, norm_of.biases, strict=True),
    ]
    norm = total_norm([part for part, counts in each if counts and part is not None], like)
    if first is None or first.sq_norm is None or not gradient.first:  # G_1 is there
        return norm
    return torch.hypot(norm, torch.full_like(norm, math.sqrt(first.sq_norm)))


def _reciprocal_or_zero(norm: Tensor) -> float | Tensor:
    """1/‖·‖, and 0 where nothing is left of it but a number too small to have one."""
    known = number_if_at_hand(norm)
    if isinstance(known, Tensor):
        return divide_or_zero(torch.ones_like(norm), norm)
    return 0.0 if known < torch.finfo(norm.dtype).tiny else 1 / known


def _moved(
    chain: DenseChain, gradient: _MeanGradient, norm_of: NormOf, scale: float | Tensor, first: _FirstLayer | None
) -> DenseChain:
    """The same layers, and the same dropout masks, where the parameters that count are displaced by scale · gradient.

    Where what z_1 moves by is known, W_1 and b_1 stay as they are: nobody asks for them there.
    """
    z = None
    if first is not None and chain.first is not None:
        z = chain.first.clone() if first.product is None else _plus(chain.first, first.product, scale)
        if norm_of.biases[0] and gradient.biases[0] is not None:
            z = _plus(z, gradient.biases[0], scale)
    weights, biases = list(chain.weights), list(chain.biases)
    for t in range(0 if first is None else 1, len(weights)):
        weight_gradient, bias, bias_gradient = gradient.weights[t], biases[t], gradient.biases[t]
        if norm_of.weights[t] and weight_gradient is not None:
            weights[t] = _plus(weights[t], weight_gradient, scale)
        if norm_of.biases[t] and bias is not None and bias_gradient is not None:
            biases[t] = _plus(bias, bias_gradient, scale)
    return chain.with_parameters(weights, biases, z)


def _plus(tensor: Tensor, gradient: Tensor, scale: float | Tensor) -> Tensor:
    """Tensor + scale · gradient."""
    if isinstance(scale, Tensor):
        return torch.addcmul(tensor, gradient, scale)
    return torch.add(tensor, gradient, alpha=scale)


class _WithKnownGradient(torch.autograd.Function):
    """Leaves → output (None if the chain's has a graph of its own), data loss, and norms of the gradient of the mean."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: DenseChain,
        data_loss: DataLoss,
        gradient: _MeanGradient,
        norms: list[Tensor],
        here: list[float],
        displaced: list[_Displaced],
        *leaves: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.leaves, ctx.multiple, ctx.here = leaves, data_loss.multiple, here
        ctx.between = [between.without_tensors() for between in chain.between]
        ctx.displaced = [(place, weight) for place, weight, _, _ in displaced]
        output = None if chain.output.requires_grad else chain.output.detach()
        rows = [*gradient, norms]
        for _, _, hidden, deltas in displaced:
            rows += [hidden, deltas]
        if output is not None:
            rows += chain.rows
        save_rows(ctx, rows)
        return output, data_loss.value.clone(), *[norm.clone() for norm in norms]

    @staticmethod
    def backward(
        ctx: Any, of_output: Tensor | None, of_value: Tensor | None, *of_norms: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rows = saved_rows(ctx)
        gradient = _MeanGradient(*islice(rows, 3))
        if of_output is None and not ctx.here and not torch.is_grad_enabled() and _is_one(of_value, ctx.multiple):
            return (None,) * 6 + tuple(handed_out(gradient.leaves))  # the usual step: that was all
        norms = next(rows)
        displaced = [_Displaced(place, weight, *islice(rows, 2)) for place, weight in ctx.displaced]
        found = None
        with full_precision(ctx.leaves[0].device):
            if of_value is not None or any(of_norm is not None for of_norm in of_norms):
                with torch.no_grad(), nothing_written_over((of_value, *of_norms)) as own:
                    found = _combined(gradient, norms, ctx.here, displaced, ctx.multiple, of_value, of_norms)
                found = handed_out([own(one) for one in found])
                if torch.is_grad_enabled():
                    found = derived_once(found, ctx.leaves)
            if of_output is not None:
                chain = DenseChain.of_rows(rows, ctx.between)
                with nothing_written_over([of_output]) as own:
                    through_output = [own(one) for one in pulled_to_parameters(chain, of_output)]
                found = through_output if found is None else [a + b for a, b in zip(found, through_output, strict=True)]
        return (None,) * 6 + tuple(found or [None] * len(ctx.leaves))


def _is_one(of_value: Tensor | None, multiple: float | Tensor) -> bool:
    """Whether the gradient is wanted as it is, as far as can be seen without waiting for a device."""
    scale = None if of_value is None else number_if_at_hand(of_value)
    return isinstance(scale, float) and isinstance(multiple, float) and scale * multiple == 1


def _combined(
    gradient: _MeanGradient,
    norms: Sequence[Tensor],
    here: Sequence[float],
    displaced: Sequence[_Displaced],
    multiple: float | Tensor,
    of_value: Tensor | None,
    of_norms: Sequence[Tensor | None],
) -> list[Tensor]:
    """Cotangents of the leaves from those of the multiple of the mean and of the norms."""
    wanted = [
        None if of_norm is None else _where_positive(norm, of_norm)
        for of_norm, norm in zip(of_norms, norms, strict=True)
    ]
    scale = 0.0 if of_value is None else number_if_at_hand(of_value) * multiple
    scale += sum(of_norm * weight for of_norm, weight in zip(wanted, here, strict=True) if of_norm is not None)
    there = [(of_norm * one.weight, one) for one in displaced if (of_norm := wanted[one.place]) is not None]
    return _weighted(gradient, scale, there)


def _where_positive(norm: Tensor, of_norm: Tensor) -> float | Tensor | None:
    """The cotangent of a norm; none where it is 0."""
    known = number_if_at_hand(norm)
    if isinstance(known, Tensor):
        return torch.where(known > 0, of_norm, 0.0)
    return number_if_at_hand(of_norm) if known > 0 else None


def _weighted(
    gradient: _MeanGradient, factor: float | Tensor, there: Sequence[tuple[float | Tensor, _Displaced]]
) -> list[Tensor]:
    """factor · gradient + Σ scale · gradient of what is displaced; weights first, then biases."""
    weights, biases = [], []
    for t, (weight, bias) in enumerate(zip(gradient.weights, gradient.biases, strict=True)):
        pairs = [(scale, one.deltas[t], one.hidden[t]) for scale, one in there]
        if weight is None:  # x is the same everywhere: the sum is made before the product
            delta, x = gradient.first
            weights.append(mean_product(_sum_of_rows(delta * factor, pairs), x))
        else:
            weights.append(_plus_products(torch.addmm, weight, factor, pairs))
        if bias is not None:
            ones = bias.new_ones(pairs[0][1].shape[0]) if pairs else bias
            sums = [(scale, delta, ones) for scale, delta, _ in pairs]
            biases.append(_plus_products(torch.addmv, bias, factor, sums))
    return weights + biases


def _sum_of_rows(rows: Tensor, pairs: Sequence[tuple[float | Tensor, Tensor, Tensor]]) -> Tensor:
    for scale, delta, _ in pairs:
        rows = _plus(rows, delta, scale)
    return rows


def _plus_products(
    plus: Callable[..., Tensor],
    known: Tensor,
    factor: float | Tensor,
    pairs: Sequence[tuple[float | Tensor, Tensor, Tensor]],
) -> Tensor:
    """factor · known + Σ scale · mean_i δ_i h_iᵀ, the sum made within the products, for matrices or vectors h."""
    if isinstance(factor, Tensor) or not pairs:
        known, factor = known if isinstance(factor, float) and factor == 1 else known * factor, 1.0
    for scale, delta, h in pairs:
        if isinstance(scale, Tensor):
            delta, scale = delta * scale, 1.0
        known, factor = plus(known, delta.t(), h, beta=factor, alpha=scale / delta.shape[0]), 1.0
    return known
