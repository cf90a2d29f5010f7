"""Gradients behind both sides of the inequality, at unit scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradpen import _checks, closed_form, gradients, mixing, param_norms
from gradpen._graph import differentiate, walk_graph
from gradpen._numerics import divide_or_zero, row_sq_norm, total_sq_norm, widest_float
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
    rows = widest_float(cotangent).reshape(f.shape[0], -1)
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
        input_gradients.append(torch.cat([gradient.reshape(batch_size, -1) for gradient in found.inputs], 1))
        deltas.append(found.deltas)
        input_sq_norm = input_sq_norm + scale**2 * row_sq_norm(widest_float(input_gradients[-1]))
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
    """‖∇_θ f_i‖², (B,), and ‖∇_θ mean_i f_i‖², 0-dim, over the parameters of the plan: float64.

    The mean's from products between samples, without a gradient of a weight's size. They cancel where the mean is small, and
    squares of large activations overflow: where the model's own type is not enough for that, in float64.
    """
    used = {index for uses in plan.closed.values() for index, _ in uses}
    deltas = {index: found.deltas[index] for index in used}
    largest = scale.max()
    shares = divide_or_zero(scale, largest)
    of_samples, of_sum = _sample_and_sum(recording, deltas, shares, plan)
    used_once = all(len(uses) == 1 for uses in plan.closed.values())  # else the gradients of one sample may cancel
    if any(delta.dtype != scale.dtype for delta in deltas.values()) and not (
        used_once and _is_reliable(of_samples, of_sum, shares, _factors(recording, deltas))
    ):
        calls = [
            call._replace(input=widest_float(call.checked_input()), input_version=None) if index in used else call
            for index, call in enumerate(recording.calls)
        ]
        deltas = {index: widest_float(delta) for index, delta in deltas.items()}
        of_samples, of_sum = _sample_and_sum(replace(recording, calls=calls), deltas, shares, plan)
    return scale**2 * of_samples, (largest / len(scale)) ** 2 * of_sum


def _factors(recording: Recording, deltas: Mapping[int, Tensor]) -> Tensor:
    """All ‖δ‖² and ‖h‖²: (2 calls, B)."""
    pairs = [(delta, recording.calls[index].checked_input()) for index, delta in deltas.items()]
    return torch.stack([row_sq_norm(rows) for pair in pairs for rows in pair])


def _is_reliable(of_samples: Tensor, of_sum: Tensor, shares: Tensor, factors: Tensor) -> bool:
    """Whether nothing that counts has over- or underflowed, nor cancelled, in float32."""
    least = _TINY * (1 + widest_float(factors.amax(0)))  # what one factor lacks is multiplied by another
    in_range = of_samples.isfinite().all() & (of_samples >= least).all() & (of_sum >= least.max())
    return bool(in_range & (of_sum >= _CANCELLED * (shares * of_samples.sqrt()).sum() ** 2))


_TINY = 1e-30  # squares in float32 that are larger have lost no digits
_CANCELLED = 1e-3  # of (Σ‖∇f_i‖)²: where no less is left of the sum, rounding has not changed its first four digits


def _sample_and_sum(
    recording: Recording, deltas: dict[int, Tensor], shares: Tensor, plan: ParameterPlan
) -> tuple[Tensor, Tensor]:
    """‖∇_θ f_i‖², (B,), and ‖Σ_i share_i ∇_θ f_i‖², 0-dim, for δ without scales: float64, computed in the type of δ."""
    batch_size = len(shares)

    def sq_norms(deltas: dict[int, Tensor], group_size: int) -> Tensor:
        found = gradients.SampleGradients([], deltas)
        sq_norm = param_norms.closed_param_sq_norm(recording, found, plan, batch_size, group_size, shares.device)
        return widest_float(sq_norm.detach())

    shared = {index: delta * shares.to(delta.dtype).unsqueeze(1) for index, delta in deltas.items()}
    return sq_norms(deltas, 1), batch_size**2 * sq_norms(shared, batch_size).sum()


def mean_gradient(
    output: Tensor, direction: Tensor, scale: Tensor, parameters: Mapping[str, Tensor], *, count: int
) -> list[Tensor]:
    """∇_θ of (1/count) Σ_i f_i along one direction, float64, for every parameter; 0 where f does not depend on it."""
    weighted = direction * (scale / count).to(output.dtype).reshape(-1, *[1] * (output.dim() - 1))
    found = zip(parameters.values(), differentiate(output, list(parameters.values()), weighted), strict=True)
    return [widest_float(torch.zeros_like(p) if gradient is None else gradient) for p, gradient in found]
