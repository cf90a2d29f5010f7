r"""The mean of the f_i of a chain of dense layers with its gradient, and finite differences of it.

`finite_difference` says what is computed. Here a difference costs two forward and two backward passes of the layers and one
move of the parameters: the gradient at θ is added to that at θ + r u within the products of the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradpen._graph import save_rows, saved_rows
from gradpen._numerics import divide_or_zero, full_precision, number_if_at_hand, sum_tensors
from gradpen.chain_norms import (
    DataLoss,
    Deltas,
    NormOf,
    as_own,
    deltas_of,
    mean_gradients,
    mean_of_products,
    nothing_written_over,
    pulled_to_parameters,
    total_norm,
)
from gradpen.dense_chain import DenseChain
from gradpen.finite_difference import derived_once


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
        gradients = mean_gradients(chain, deltas)
        norms = [total_norm(_counted(gradients, difference.norm_of), data_loss.value) for difference in differences]
        displaced = []
        for place, (difference, norm) in enumerate(zip(differences, norms, strict=True)):
            inverse = _reciprocal_or_zero(norm)
            first = _of_first(chain, deltas, gradients, difference.norm_of)
            for signed_step, weight in difference.moves:
                moved = _moved(chain, gradients, difference.norm_of, inverse * signed_step, first)
                cotangent = data_loss.cotangent.at(moved.output).value.detach()
                displaced.append(_Displaced(place, weight, moved, cotangent))
    here = [difference.weight_here for difference in differences]
    output, value, *roots = _WithKnownGradient.apply(
        chain, data_loss.value, data_loss.multiple, gradients, norms, here, displaced, *chain.leaves
    )
    return chain.output if output is None else as_own(output), as_own(value), list(roots)


class _Displaced(NamedTuple):
    """The layers with displaced parameters.

    Attributes:
        place: of the norm in whose quotient it is.
        weight: of its gradient there.
        chain: the layers.
        cotangent: ∂f_i/∂output.
    """

    place: int
    weight: float
    chain: DenseChain
    cotangent: Tensor


Gradients = tuple[Sequence[Tensor], Sequence[Tensor | None]]  # of weights and biases


def _counted(gradients: Gradients, norm_of: NormOf) -> list[Tensor]:
    weights, biases = gradients
    each = [*zip(weights, norm_of.weights, strict=True), *zip(biases, norm_of.biases, strict=True)]
    return [gradient for gradient, counts in each if counts and gradient is not None]


def _reciprocal_or_zero(norm: Tensor) -> float | Tensor:
    """1/‖·‖, and 0 where nothing is left of it but a number too small to have one."""
    known = number_if_at_hand(norm)
    if isinstance(known, Tensor):
        return divide_or_zero(torch.ones_like(norm), norm)
    return 0.0 if known < torch.finfo(norm.dtype).tiny else 1 / known


def _of_first(chain: DenseChain, deltas: Deltas, gradients: Gradients, norm_of: NormOf) -> Tensor | None:
    """x G_1ᵀ + g_1, what z_1 moves by if the parameters move by the gradient, if products between samples cost less."""
    x, delta = chain.hidden[0], deltas.at[0]
    (size, columns), rows = x.shape, delta.shape[1]
    if chain.first is None or not norm_of.weights[0] or size * (rows + columns) >= rows * columns:
        return None
    of_weight = mean_of_products(x, delta)
    bias = gradients[1][0]
    return of_weight if bias is None or not norm_of.biases[0] else of_weight + bias


def _moved(
    chain: DenseChain, gradients: Gradients, norm_of: NormOf, scale: float | Tensor, of_first: Tensor | None
) -> DenseChain:
    """The same layers, and the same dropout masks, where the parameters that count are displaced by scale · gradient.

    Where what z_1 moves by is known, W_1 and b_1 stay as they are: nobody asks for them there.
    """
    first = None if of_first is None or chain.first is None else _plus(chain.first, of_first, scale)
    which = range(len(chain.weights)) if first is None else range(1, len(chain.weights))
    weights, biases = list(chain.weights), list(chain.biases)
    for t in which:
        if norm_of.weights[t]:
            weights[t] = _plus(weights[t], gradients[0][t], scale)
        bias, gradient = biases[t], gradients[1][t]
        if norm_of.biases[t] and bias is not None and gradient is not None:
            biases[t] = _plus(bias, gradient, scale)
    return chain.with_parameters(weights, biases, first)


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
        value: Tensor,
        multiple: float | Tensor,
        gradients: Gradients,
        norms: list[Tensor],
        here: list[float],
        displaced: list[_Displaced],
        *leaves: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.leaves, ctx.multiple, ctx.here = leaves, multiple, here
        ctx.between = [between.without_tensors() for between in chain.between]  # the same wherever the parameters are
        ctx.displaced = [(place, weight) for place, weight, _, _ in displaced]
        output = None if chain.output.requires_grad else chain.output.detach()
        rows = [*gradients, norms, [cotangent for *_, cotangent in displaced]]
        for moved in [moved for _, _, moved, _ in displaced]:
            rows += moved.rows
        if output is not None:
            rows += chain.rows
        save_rows(ctx, rows)
        return output, value.clone(), *[norm.clone() for norm in norms]

    @staticmethod
    def backward(
        ctx: Any, of_output: Tensor | None, of_value: Tensor | None, *of_norms: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rows = saved_rows(ctx)
        weights, biases, norms, cotangents = islice(rows, 4)
        displaced = [
            _Displaced(place, weight, DenseChain.of_rows(rows, ctx.between), cotangent)
            for (place, weight), cotangent in zip(ctx.displaced, cotangents, strict=True)
        ]
        found = None
        with full_precision(weights[0].device):
            if of_value is not None or any(of_norm is not None for of_norm in of_norms):
                with torch.no_grad(), nothing_written_over((of_value, *of_norms)) as own:
                    found = _combined((weights, biases), norms, ctx.here, displaced, ctx.multiple, of_value, of_norms)
                found = [own(gradient) for gradient in found]
                if torch.is_grad_enabled():
                    found = derived_once(found, ctx.leaves)
            if of_output is not None:
                chain = DenseChain.of_rows(rows, ctx.between)
                with nothing_written_over([of_output]) as own:
                    through_output = [own(gradient) for gradient in pulled_to_parameters(chain, of_output)]
                found = through_output if found is None else [a + b for a, b in zip(found, through_output, strict=True)]
        return (None,) * 7 + tuple(found or [None] * len(ctx.leaves))


def _combined(
    gradients: Gradients,
    norms: Sequence[Tensor],
    here: Sequence[float],
    displaced: Sequence[_Displaced],
    multiple: float | Tensor,
    of_value: Tensor | None,
    of_norms: Sequence[Tensor | None],
) -> list[Tensor]:
    """Cotangents of the leaves from those of the multiple of the mean and of the norms."""
    of_norms = [
        None if of_norm is None else _where_positive(norm, of_norm)
        for of_norm, norm in zip(of_norms, norms, strict=True)
    ]
    scales = [] if of_value is None else [of_value * multiple]
    scales += [of_norm * weight for of_norm, weight in zip(of_norms, here, strict=True) if of_norm is not None]
    there = [
        (chain, cotangent * (of_norm * weight))
        for place, weight, chain, cotangent in displaced
        if (of_norm := of_norms[place]) is not None
    ]
    return _weighted(gradients, sum_tensors(scales or [torch.zeros_like(norms[0])]), there)


def _where_positive(norm: Tensor, of_norm: Tensor) -> Tensor | None:
    """The cotangent of a norm; none where it is 0."""
    known = number_if_at_hand(norm)
    if isinstance(known, Tensor):
        return torch.where(known > 0, of_norm, 0.0)
    return of_norm if known > 0 else None


def _weighted(gradients: Gradients, scale: Tensor, there: Sequence[tuple[DenseChain, Tensor]]) -> list[Tensor]:
    """scale · gradients + Σ ∇ mean_i f_i of other chains, whose ∂f_i/∂output are given; weights first, then biases."""
    weights, biases = gradients
    known = [*weights, *[bias for bias in biases if bias is not None]]
    factor = number_if_at_hand(scale)
    if not there:
        return known if isinstance(factor, float) and factor == 1 else [gradient * factor for gradient in known]
    if isinstance(factor, Tensor):
        known, factor = [gradient * factor for gradient in known], 1.0
    found = known
    for place, (chain, cotangent) in enumerate(there):
        found = _plus_mean_gradients(found, factor if place == 0 else 1.0, chain, cotangent)
    return found


def _plus_mean_gradients(total: Sequence[Tensor], factor: float, chain: DenseChain, cotangent: Tensor) -> list[Tensor]:
    """factor · total + ∇ mean_i f_i, weights first, then biases; the sum is made within the products."""
    deltas = deltas_of(chain, cotangent, ()).at
    scale = 1 / cotangent.shape[0]
    n = len(deltas)
    weights = [
        torch.addmm(gradient, delta.t(), h, beta=factor, alpha=scale)
        for gradient, delta, h in zip(total[:n], deltas, chain.hidden, strict=True)
    ]
    with_bias = [delta for delta, bias in zip(deltas, chain.biases, strict=True) if bias is not None]
    ones = cotangent.new_ones(cotangent.shape[0])
    return weights + [
        torch.addmv(gradient, delta.t(), ones, beta=factor, alpha=scale)
        for gradient, delta in zip(total[n:], with_bias, strict=True)
    ]
