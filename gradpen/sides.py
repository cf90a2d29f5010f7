"""Gradients behind both sides of the inequality, at unit scale."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradpen import _checks, closed_form, gradients, mixing, param_norms
from gradpen._graph import differentiate, walk_graph
from gradpen._numerics import (
    at_least_float32,
    divide_or_zero,
    sum_tensors,
    total_sq_norm,
    widest_float,
    widest_row_sq_norm,
)
from gradpen.criteria import as_criterion, scalar_per_sample
from gradpen.param_norms import ParameterPlan
from gradpen.recording import Recording, RngState


class Cotangents(NamedTuple):
    """f_i to first order: Σ_k scale_ik · ⟨direction_k, output⟩ with unit (or zero) directions."""

    directions: list[Tensor]  # each of the output's shape
    scales: list[Tensor]  # each (B,), float64


@dataclass(frozen=True)
class Sides:
    """Gradients behind both sides, for every cotangent direction, of unit scale."""

    input_gradients: list[Tensor]  # (B, d) for each direction
    deltas: list[dict[int, Tensor]]  # call → (B, …) for each direction
    scales: list[Tensor]
    input_sq_norm: Tensor  # (B,), scales included, as are the next two
    param_sq_norm: Tensor  # (B,)
    batch_sq_norm: Tensor  # 0-dim
    mixed: frozenset[int]


def output_cotangents(
    output: Any, y: Any, of: str | Callable[[Any, Any], Tensor], criterion: Callable[..., Tensor]
) -> Cotangents:
    """∂f/∂output, normalised sample by sample, so that tiny losses keep a tightness; or the basis for of="output"."""
    if not isinstance(output, Tensor) or output.dim() == 0:
        raise TypeError(f"expected the model to return one tensor of shape (B, …), got {type(output).__name__}")
    if of == "output":
        _checks.check_not_empty(output)
        outputs = output[0].numel()
        ones = widest_float(output.detach().new_ones(output.shape[0]))
        basis = torch.eye(outputs, dtype=output.dtype, device=output.device).reshape(outputs, 1, *output.shape[1:])
        return Cotangents([unit.expand_as(output) for unit in basis], [ones] * outputs)
    leaf = output.detach().requires_grad_()
    source = of if callable(of) else criterion
    known = None if callable(of) else as_criterion(criterion)
    f = scalar_per_sample(source, leaf, y) if known is None else known.per_sample(leaf, y)
    if not f.requires_grad:
        raise RuntimeError("the scalar f does not depend on the model's output, so it has no gradient")
    if known is None or not known.keeps_rows_apart(leaf):
        mixing.check_scalar_rows(f, leaf)
    (cotangent,) = torch.autograd.grad(f.sum(), leaf)
    cotangent = widest_float(cotangent)
    if known is not None:
        cotangent = known.balanced(cotangent, output.detach())
    rows = cotangent.reshape(f.shape[0], -1)
    scale = rows.abs().amax(1)  # first, so that nothing underflows when it is squared
    scale = scale * torch.linalg.vector_norm(divide_or_zero(rows, scale.unsqueeze(1)), dim=1)
    direction = divide_or_zero(rows, scale.unsqueeze(1)).reshape(output.shape).to(output.dtype)
    return Cotangents([direction], [scale])


def both_sides(
    model: nn.Module,
    x: Any,
    recording: Recording,
    cotangents: Cotangents,
    parameters: Mapping[str, Tensor],
    rng: RngState,
) -> Sides:
    """Differentiate along every direction, and square with the scales put back."""
    output: Tensor = recording.output
    batch_size = output.shape[0]
    input_gradients, deltas = [], []
    zeros = cotangents.scales[0].new_zeros(batch_size)
    input_sq_norm, param_sq_norm, batch_sq_norm = zeros, zeros, zeros.sum()
    mixed: frozenset[int] = frozenset()
    for direction, scale in zip(cotangents.directions, cotangents.scales, strict=True):

        def scalar(output: Tensor, direction: Tensor = direction) -> Tensor:
            return (output * direction).reshape(batch_size, -1).sum(1)

        f = scalar(output)
        walk = walk_graph(f)
        found = gradients.sample_gradients(f.sum(), recording, inputs=True, deltas=True, create_graph=False)
        mixed |= mixing.find_mixed_calls(model, f, scalar, recording, found, walk)  # an output of 0 does not show any
        rows = [gradient.reshape(batch_size, -1) for gradient in found.inputs]
        input_gradients.append(rows[0] if len(rows) == 1 else torch.cat(rows, 1))
        deltas.append(found.deltas)
        input_sq_norm = input_sq_norm + scale**2 * widest_row_sq_norm(input_gradients[-1])
        plan = param_norms.plan_parameters(recording, walk, parameters, mixed, batch_size)
        dense, others = _dense_part(plan, recording, parameters)
        of_samples, of_batch = _dense_sq_norms(recording, found, scale, dense)
        param_sq_norm, batch_sq_norm = param_sq_norm + of_samples, batch_sq_norm + of_batch
        if others:
            sq_norms = param_norms.param_sq_norm(
                model,
                x,
                f,
                scalar,
                recording,
                found,
                others,
                group_size=1,
                rng=rng,
                create_graph=False,
                walk=walk,
                mixed_calls=mixed,
            )
            param_sq_norm = param_sq_norm + scale**2 * widest_float(sq_norms.detach())
            mean = mean_gradient(output, direction, scale, others, count=batch_size)
            batch_sq_norm = batch_sq_norm + total_sq_norm(mean)
    return Sides(input_gradients, deltas, cotangents.scales, input_sq_norm, param_sq_norm, batch_sq_norm, mixed)


def _dense_part(
    plan: ParameterPlan, recording: Recording, parameters: Mapping[str, Tensor]
) -> tuple[ParameterPlan, dict[str, Tensor]]:
    """The parameters of dense layers that see one row a sample, and all others."""
    dense = {
        name: uses
        for name, uses in plan.closed.items()
        if all(closed_form.is_dense_row(recording.calls[index], 1) for index, _ in uses)
    }
    return ParameterPlan(dense, []), {name: p for name, p in parameters.items() if name not in dense}


def _dense_sq_norms(
    recording: Recording, found: gradients.SampleGradients, scale: Tensor, plan: ParameterPlan
) -> tuple[Tensor, Tensor]:
    """‖∇_θ f_i‖², (B,), and ‖∇_θ mean_i f_i‖², 0-dim, over the parameters of the plan: float64."""
    largest = scale.max()
    shares = divide_or_zero(scale, largest)
    layers = _layers_used_once(recording, found, plan)
    of_samples, of_sum = (
        _sq_norms_of_uses(recording, found, plan, shares) if layers is None else _sq_norms_of_layers(layers, shares)
    )
    of_sum = of_sum.clamp(min=0)  # products between samples that cancel altogether leave rounding of either sign
    return scale**2 * of_samples, (largest / len(scale)) ** 2 * of_sum


class _DenseLayer(NamedTuple):
    """What a dense layer saw of a batch, and which of its parameters count."""

    delta: Tensor  # (B, out)
    input: Tensor  # (B, in)
    weight: bool
    bias: bool

    def widest(self) -> _DenseLayer:
        """The same in float64."""
        return self._replace(delta=widest_float(self.delta), input=widest_float(self.input))

    def sq_norm_of_sum(self, shares: Tensor) -> Tensor:
        """‖Σ_i share_i ∇f_i‖², 0-dim: from products between samples if that is cheaper than the gradient of the weight."""
        (size, rows), columns = self.delta.shape, self.input.shape[1]
        if self.weight and size * (rows + columns) < rows * columns:
            products, of_inputs = self.delta @ self.delta.t(), self.input @ self.input.t()
            products = torch.addcmul(products, products, of_inputs) if self.bias else products * of_inputs
            return torch.dot(shares, products @ shares)
        shared = self.delta * shares.unsqueeze(1)
        found = [shared.t() @ self.input] if self.weight else []
        return total_sq_norm([*found, shared.sum(0)] if self.bias else found)


def _layers_used_once(
    recording: Recording, found: gradients.SampleGradients, plan: ParameterPlan
) -> list[_DenseLayer] | None:
    """The layers that the plan's parameters belong to, or None if a parameter is used more than once."""
    roles: dict[int, list[str]] = {}
    for uses in plan.closed.values():
        if len(uses) > 1:
            return None
        index, role = uses[0]
        roles.setdefault(index, []).append(role)
    layers = []
    for index, known in roles.items():
        delta, h = found.deltas[index], recording.calls[index].checked_input().detach()
        layers.append(_DenseLayer(at_least_float32(delta), at_least_float32(h), "weight" in known, "bias" in known))
    return layers


def _sq_norms_of_layers(layers: Sequence[_DenseLayer], shares: Tensor) -> tuple[Tensor, Tensor]:
    """‖∇_θ f_i‖², (B,), and ‖Σ_i share_i ∇_θ f_i‖², 0-dim, for δ without scales: float64.

    The sum's is computed in the type of δ, if that is enough.
    """
    factors = [(widest_row_sq_norm(layer.delta), widest_row_sq_norm(layer.input)) for layer in layers]
    of_samples = torch.zeros_like(shares)
    for layer, (of_delta, of_input) in zip(layers, factors, strict=True):
        of_samples = of_samples + of_delta * (of_input * layer.weight + float(layer.bias))

    def of_sum(layers: Sequence[_DenseLayer]) -> Tensor:
        found = [widest_float(layer.sq_norm_of_sum(shares.to(layer.delta.dtype))) for layer in layers]
        return sum_tensors(found) if found else shares.new_zeros(())

    first = of_sum(layers)
    if all(layer.delta.dtype == shares.dtype for layer in layers):
        return of_samples, first
    if _is_reliable(first, shares * of_samples.sqrt(), torch.stack([*itertools.chain.from_iterable(factors)])):
        return of_samples, first
    return of_samples, of_sum([layer.widest() for layer in layers])


def _is_reliable(of_sum: Tensor, norms: Tensor, factors: Tensor) -> bool:
    """Whether nothing that counts has over- or underflowed in float32, nor cancelled.

    Args:
        of_sum: ‖Σ_i share_i ∇f_i‖², 0-dim.
        norms: share_i ‖∇f_i‖, (B,).
        factors: all ‖δ_i‖² and ‖h_i‖².
    """
    least = torch.maximum(
        _CANCELLED * norms.sum() ** 2, _TINY * (1 + factors.max())
    )  # what one factor lacks, another has
    return bool(of_sum.isfinite() & (of_sum >= least))


_TINY = 1e-30  # squares in float32 that are larger have lost no digits
_CANCELLED = 1e-3  # of (Σ‖∇f_i‖)²: where no less is left of the sum, rounding has not changed its first four digits


def _sq_norms_of_uses(
    recording: Recording, found: gradients.SampleGradients, plan: ParameterPlan, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """`_sq_norms_of_layers` where a layer is used more than once, so that the gradients of one sample may cancel."""
    used = {index for uses in plan.closed.values() for index, _ in uses}
    calls = [
        call._replace(input=widest_float(call.checked_input()), input_version=None) if index in used else call
        for index, call in enumerate(recording.calls)
    ]
    recording = replace(recording, calls=calls)
    batch_size = len(shares)

    def sq_norms(deltas: dict[int, Tensor], group_size: int) -> Tensor:
        rows = gradients.SampleGradients([], deltas)
        return param_norms.closed_param_sq_norm(recording, rows, plan, batch_size, group_size, shares.device).detach()

    deltas = {index: widest_float(found.deltas[index]) for index in used}
    shared = {index: delta * shares.unsqueeze(1) for index, delta in deltas.items()}
    return sq_norms(deltas, 1), batch_size**2 * sq_norms(shared, batch_size).sum()


def mean_gradient(
    output: Tensor, direction: Tensor, scale: Tensor, parameters: Mapping[str, Tensor], *, count: int
) -> list[Tensor]:
    """∇_θ of (1/count) Σ_i f_i along one direction, float64, for every parameter; 0 where f does not depend on it."""
    weighted = direction * (scale / count).to(output.dtype).reshape(-1, *[1] * (output.dim() - 1))
    found = zip(parameters.values(), differentiate(output, list(parameters.values()), weighted), strict=True)
    return [widest_float(torch.zeros_like(p) if gradient is None else gradient) for p, gradient in found]
