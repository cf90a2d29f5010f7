"""Exact squared gradient norms, sample by sample, from one recorded forward pass.

One backward pass of Σ_i f_i reaches the inputs and the outputs of all parametric calls at once. Since f_i depends on
sample i alone, its rows are ∇_x f_i and δ_i; from (h, δ) the closed forms give ‖∇_θ f_i‖². Parameters that are used in
any other way go through `torch.func`: one forward pass with a copy of these parameters for every sample.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradpen import closed_form
from gradpen._graph import GraphWalk, walk_graph
from gradpen._numerics import full_precision, rounding_tolerance, row_sq_norm, sum_tensors, total_sq_norm
from gradpen.recording import Call, Recording, RngState, call_with, map_leaves, map_tensors, tensors_of

ScalarFn = Callable[[Any], Tensor]  # the model's output → f, (B,)


class SampleGradients(NamedTuple):
    """Rows of one backward pass of Σ_i f_i."""

    inputs: list[Tensor]  # ∇_x f_i for every floating-point input, shaped like it; [] if not asked for
    deltas: dict[int, Tensor]  # index of the call → ∂f_i/∂output, for every call that f depends on


def sample_gradients(
    f: Tensor, recording: Recording, *, inputs: bool, deltas: bool, create_graph: bool = True
) -> SampleGradients:
    """One backward pass for everything that is asked for.

    Args:
        f: one scalar a sample, (B,), with each f_i a function of sample i alone.
        recording: the forward pass that led to f.
        inputs: give ∇_x f_i.
        deltas: give δ_i of the recorded calls.
        create_graph: keep the result differentiable.

    Raises:
        RuntimeError: if f depends on no parameter and no input, or `inputs` and f depends on none.
    """
    _check_differentiable(f)
    wanted: list[Any] = [*recording.inputs] if inputs else []
    wanted += [call.output for call in recording.calls] if deltas else []
    if not wanted:
        return SampleGradients([], {})
    gradients = torch.autograd.grad(f.sum(), wanted, create_graph=create_graph, retain_graph=True, allow_unused=True)
    input_count = len(recording.inputs) if inputs else 0
    input_gradients = gradients[:input_count]
    if inputs:
        _used(input_gradients)
    return SampleGradients(
        [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(recording.inputs, input_gradients, strict=False)
        ],
        {index: delta for index, delta in enumerate(gradients[input_count:]) if delta is not None},
    )


def input_sq_norm(gradients: Sequence[Tensor]) -> Tensor:
    """‖∇_x f_i‖² over all inputs together: (B,)."""
    return sum_tensors([row_sq_norm(gradient) for gradient in gradients])


def jacobian_sq_norm(output: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """‖J_i‖_F² = Σ_k ‖∇_x F_ik‖², one backward pass for all outputs k: (B,)."""
    _check_differentiable(output)
    rows = output.reshape(output.shape[0], -1)
    outputs = rows.shape[1]
    basis = torch.eye(outputs, dtype=rows.dtype, device=rows.device).unsqueeze(1).expand(-1, rows.shape[0], -1)
    gradients = torch.autograd.grad(
        rows, list(inputs), basis, create_graph=True, is_grads_batched=True, allow_unused=True
    )
    return input_sq_norm([gradient.transpose(0, 1) for gradient in _used(gradients)])


def projected_jacobian_sq_norm(
    output: Tensor, inputs: Sequence[Tensor], num_projections: int, generator: torch.Generator | None
) -> Tensor:
    """K · mean ‖J_iᵀ v‖² over directions v uniform on the unit sphere of the K outputs: unbiased for ‖J_i‖_F², (B,)."""
    _check_differentiable(output)
    rows = output.reshape(output.shape[0], -1)
    outputs = rows.shape[1]
    estimates = []
    for _ in range(num_projections):
        normal = torch.randn(rows.shape, generator=generator, device=rows.device, dtype=torch.float32)
        directions = (normal / normal.norm(dim=1, keepdim=True) * outputs**0.5).to(rows.dtype)
        gradients = torch.autograd.grad(rows, list(inputs), directions, create_graph=True, allow_unused=True)
        estimates.append(input_sq_norm(_used(gradients)))
    return torch.stack(estimates).mean(0)


class ParameterPlan(NamedTuple):
    """How each parameter's gradient is had."""

    closed: dict[str, list[tuple[int, str]]]  # name → its uses: (index of the call, "weight" or "bias")
    mapped: list[str]  # names of parameters that need torch.func


def plan_parameters(
    recording: Recording, f: Tensor, parameters: Mapping[str, Tensor], mixed_calls: frozenset[int]
) -> ParameterPlan:
    """Closed form only where it is provably right.

    A parameter has one if every edge that leads to it in the graph of f is a recorded call with one row per sample. A
    weight that is also used elsewhere (tied, parametrised, in a custom operation) has more edges than calls.

    Args:
        recording: the forward pass.
        f: one scalar a sample.
        parameters: name → parameter.
        mixed_calls: calls whose rows are not one sample each (`find_mixed_calls`).
    """
    walk = walk_graph(f)
    uses = _uses_by_parameter(recording.calls, walk)
    plan = ParameterPlan({}, [])
    for name, parameter in parameters.items():
        edges = walk.leaf_edges[id(parameter)]
        if edges == 0:
            continue  # f does not depend on it: its gradient is 0
        found = uses.get(id(parameter), [])
        rows = all(
            index not in mixed_calls and closed_form.has_closed_form(recording.calls[index], f.shape[0])
            for index, _ in found
        )
        if (
            len(found) == edges
            and rows
            and closed_form.combinable([(recording.calls[index], role) for index, role in found])
        ):
            plan.closed[name] = found
        else:
            plan.mapped.append(name)
    return plan


def param_sq_norm(
    model: nn.Module,
    x: Any,
    f: Tensor,
    scalar: ScalarFn,
    recording: Recording,
    gradients: SampleGradients,
    parameters: Mapping[str, Tensor],
    *,
    group_size: int,
    rng: RngState,
    create_graph: bool = True,
) -> Tensor:
    """‖∇_θ mean_{i ∈ group} f_i‖² for every run of `group_size` samples (the last may be shorter): (groups,).

    Args:
        model: the model of the recording.
        x: its input.
        f: one scalar a sample, (B,).
        scalar: the model's output → f.
        recording: the forward pass that led to f.
        gradients: its δ.
        parameters: name → parameter, those whose gradients count.
        group_size: samples per group, at most B.
        rng: the generators' state before the forward pass.
        create_graph: keep the result differentiable.

    Raises:
        RuntimeError: if samples are mixed, or the model draws random numbers that cannot be drawn again.
    """
    batch_size = f.shape[0]
    plan = plan_parameters(recording, f, parameters, find_mixed_calls(model, f, scalar, recording, gradients))
    closed = _closed_sq_norm(recording, gradients, plan, batch_size, group_size, f.device)
    if not plan.mapped:
        return closed
    mapped = {name: parameters[name] for name in plan.mapped}
    return closed + _mapped_sq_norm(model, x, f, scalar, mapped, group_size, rng, create_graph)


def batch_param_sq_norm(f: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = True) -> Tensor:
    """‖∇_θ mean_i f_i‖²: shape (1,)."""
    _check_differentiable(f)
    gradients = torch.autograd.grad(
        f.mean(), list(parameters), create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    found = [gradient for gradient in gradients if gradient is not None]
    return total_sq_norm(found).reshape(1) if found else f.new_zeros(1)


def find_mixed_calls(
    model: nn.Module, f: Tensor, scalar: ScalarFn, recording: Recording, gradients: SampleGradients
) -> frozenset[int]:
    """Calls with a row that more than one sample reaches, found by one more backward pass; errors for the inputs.

    With c_i f_i in place of f_i, a row that belongs to sample i alone is multiplied by c_i. The answer depends on how
    the model lays out its batch and on the code of the scalar, so it is kept for these, and costs nothing from then on.

    Raises:
        RuntimeError: if a gradient shows that f_i depends on the input or the output of other samples than i.
    """
    batch_size = f.shape[0]
    if batch_size == 1:
        return frozenset()
    calls = [recording.calls[index] for index in gradients.deltas]
    layout = tuple(call.input.shape[:1] == (batch_size,) for call in calls)
    ambiguous = any(batch_size in closed_form.position_shape(call) for call in calls)
    ambiguous |= any(batch_size in gradient.shape[1:-1] for gradient in gradients.inputs)
    known = _mixed_calls.setdefault(model, {})
    key = (model.training, len(gradients.inputs), layout, _code_of(scalar))
    if key in known and not ambiguous:  # as many positions as samples: they could have changed places
        return known[key]
    check_scalar_rows(f, recording.output)
    factors = _row_factors(f)
    scaled = sample_gradients(
        f * factors,
        recording,
        inputs=bool(gradients.inputs),
        deltas=bool(gradients.deltas),
        create_graph=False,
    )
    for before, after in zip(gradients.inputs, scaled.inputs, strict=True):
        if not rows_scaled(before, after, factors):
            raise RuntimeError(
                "expected f_i to depend on sample i alone, but its gradient reaches the inputs of other samples: the "
                "model (or the criterion) mixes the samples of a batch (dimension 0), so a gradient penalty of "
                "single samples is not defined"
            )
    mixed = frozenset(
        index for index, delta in gradients.deltas.items() if not rows_scaled(delta, scaled.deltas[index], factors)
    )
    if all(bool(gradient.any()) for gradient in (*gradients.inputs, *gradients.deltas.values())):
        known[key] = mixed  # a gradient that is zero throughout proves nothing about the next batch
    return mixed


_mixed_calls: weakref.WeakKeyDictionary[nn.Module, dict[Any, frozenset[int]]] = weakref.WeakKeyDictionary()


def check_scalar_rows(f: Tensor, output: Any) -> None:
    """f_i must be a function of row i of the output alone.

    Raises:
        RuntimeError: if the criterion mixes the samples.
    """
    if not isinstance(output, Tensor) or not output.requires_grad or output.dim() == 0:
        return
    factors = _row_factors(f)
    (gradient,) = torch.autograd.grad(f.sum(), output, retain_graph=True, allow_unused=True)
    (scaled,) = torch.autograd.grad((f * factors).sum(), output, retain_graph=True, allow_unused=True)
    if gradient is not None and not rows_scaled(gradient, scaled, factors):
        raise RuntimeError(
            "expected f_i to depend on the output of sample i alone, but the criterion mixes the samples of a batch "
            "(dimension 0), so a gradient penalty of single samples is not defined"
        )


def _row_factors(f: Tensor) -> Tensor:
    """Numbers, one a row, of which no two agree: cos 1, cos 2, …"""
    return torch.arange(1, f.shape[0] + 1, device=f.device, dtype=f.dtype).cos()


def _code_of(function: Any) -> Any:
    """What tells functions apart that are made anew for every call, such as lambdas and partials."""
    function = getattr(function, "source", function)
    function = getattr(function, "func", function)
    return getattr(function, "__code__", type(function))


def rows_scaled(before: Tensor, after: Tensor, factors: Tensor) -> bool:
    """Whether every row i of `after` is factors_i times that of `before`, up to rounding."""
    if before.shape[0] != factors.shape[0]:
        return False
    before = before.detach()
    expected = before * factors.reshape(-1, *[1] * (before.dim() - 1)).to(before.dtype)
    return bool((after - expected).norm() <= rounding_tolerance(before) * expected.norm())


def _uses_by_parameter(calls: Sequence[Call], walk: GraphWalk) -> dict[int, list[tuple[int, str]]]:
    """id(parameter) → the calls in the graph of f that use it."""
    uses: dict[int, list[tuple[int, str]]] = {}
    for index, call in enumerate(calls):
        if call.output.node in walk.nodes:
            for role, tensor in (("weight", call.weight), ("bias", call.bias)):
                if tensor is not None and tensor.requires_grad:
                    uses.setdefault(id(tensor), []).append((index, role))
    return uses


def _closed_sq_norm(
    recording: Recording,
    gradients: SampleGradients,
    plan: ParameterPlan,
    batch_size: int,
    group_size: int,
    device: torch.device,
) -> Tensor:
    """‖∇ mean_{i ∈ group} f_i‖² over the parameters with a closed form: (groups,)."""
    whole = batch_size - batch_size % group_size
    parts = []
    for start, stop, size in ((0, whole, group_size), (whole, batch_size, batch_size - whole)):
        if start < stop:
            calls = {index: _rows(recording.calls[index], start, stop) for index in gradients.deltas}
            deltas = {index: _slice(delta, start, stop) for index, delta in gradients.deltas.items()}
            with full_precision(device):
                sq_norms = _plan_sq_norms(calls, deltas, plan, size)
            parts.append(
                sum_tensors(sq_norms) / size**2 if sq_norms else torch.zeros((stop - start) // size, device=device)
            )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _plan_sq_norms(
    calls: Mapping[int, Call], deltas: Mapping[int, Tensor], plan: ParameterPlan, group_size: int
) -> list[Tensor]:
    """‖Σ_{i ∈ group} ∇ f_i‖² of every parameter with a closed form, those of one dense layer together."""
    dense_roles: dict[int, list[str]] = {}
    sq_norms = []
    for uses in plan.closed.values():
        index, role = uses[0]
        if len(uses) == 1 and closed_form.is_dense_row(calls[index], group_size):
            dense_roles.setdefault(index, []).append(role)
            continue
        contributions = [
            closed_form.contribution(calls[index], role, deltas[index], group_size) for index, role in uses
        ]
        sq_norms.append(closed_form.group_sq_norm(contributions))
    for index, roles in dense_roles.items():
        sq_norms.append(closed_form.dense_row_sq_norm(calls[index], roles, deltas[index]))
    return sq_norms


def _slice(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor if start == 0 and stop == tensor.shape[0] else tensor[start:stop]


def _rows(call: Call, start: int, stop: int) -> Call:
    """The call as samples start … stop saw it."""
    if start == 0 and stop == call.input.shape[0]:
        return call
    input = call.checked_input()[start:stop]
    return call._replace(input=input, input_version=input._version)


def _mapped_sq_norm(
    model: nn.Module,
    x: Any,
    f: Tensor,
    scalar: ScalarFn,
    parameters: Mapping[str, Tensor],
    group_size: int,
    rng: RngState,
    create_graph: bool,
) -> Tensor:
    """‖∇ mean_{i ∈ group} f_i‖² by a forward pass in which every group has its own copy of the parameters: (groups,)."""
    batch_size = f.shape[0]
    shapes = [tuple(tensor.shape) for tensor in tensors_of(x)]
    if any(shape[:1] != (batch_size,) for shape in shapes):
        raise ValueError(
            f"expected dimension 0 of every input tensor to count the {batch_size} samples, got shapes {shapes}"
        )
    group_of = torch.arange(batch_size, device=f.device) // group_size
    sizes = torch.bincount(group_of)
    copies = {name: parameter.expand(len(sizes), *parameter.shape) for name, parameter in parameters.items()}
    by_sample = copies if group_size == 1 else {name: copy[group_of] for name, copy in copies.items()}

    def one_sample(copied: dict[str, Tensor], sample: Any) -> Any:
        output = call_with(model, copied, map_tensors(sample, lambda tensor: tensor.unsqueeze(0)))
        return map_tensors(output, lambda tensor: tensor.squeeze(0))

    in_dims = (0, map_leaves(x, lambda leaf: 0 if isinstance(leaf, Tensor) else None))
    try:
        with rng.replayed():
            output = torch.vmap(one_sample, in_dims, randomness="different")(by_sample, x)
    except RuntimeError as error:
        warnings.warn(
            f"the gradients of {', '.join(parameters)} are computed one sample at a time, which is slow, because "
            f"torch.func.vmap cannot run the model: {str(error).splitlines()[0]}",
            stacklevel=2,
        )
        return _looped_sq_norm(f, list(parameters.values()), group_of, create_graph)
    mapped_f = scalar(output)
    _check_same_values(f, mapped_f, list(parameters))
    gradients = torch.autograd.grad(
        (mapped_f / sizes[group_of]).sum(),
        list(copies.values()),
        create_graph=create_graph,
        allow_unused=True,
    )
    return sum_tensors([row_sq_norm(gradient) for gradient in gradients if gradient is not None])


def _looped_sq_norm(f: Tensor, parameters: Sequence[Tensor], group_of: Tensor, create_graph: bool) -> Tensor:
    """‖∇ mean_{i ∈ group} f_i‖² by one backward pass for every group: (groups,)."""
    norms = []
    for group in group_of.unique().tolist():
        gradients = torch.autograd.grad(
            f[group_of == group].mean(),
            parameters,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
        norms.append(total_sq_norm([gradient for gradient in gradients if gradient is not None]))
    return torch.stack(norms)


def _check_same_values(f: Tensor, mapped_f: Tensor, names: list[str]) -> None:
    """The second forward pass must have been the first one, dropout masks and all."""
    tolerance = rounding_tolerance(f)
    if not torch.allclose(f.detach(), mapped_f.detach(), rtol=tolerance, atol=tolerance, equal_nan=True):
        raise RuntimeError(
            f"the gradients of {', '.join(names)} have no closed form, and the forward pass that finds them sample "
            "by sample gave other values than the batch did: either the model mixes the samples of a batch "
            "(dimension 0), or it draws random numbers that cannot be drawn again sample by sample. Exclude these "
            'parameters with parameters=…, or use over="batch"'
        )


def _used(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients with respect to the inputs that matter; an error if none does."""
    used = [gradient for gradient in gradients if gradient is not None]
    if not used:
        raise RuntimeError(
            "the model's output does not depend on the input: its input gradient is identically zero. Was the input "
            "detached, or turned into integers, inside the model?"
        )
    return used


def _check_differentiable(f: Tensor) -> None:
    if not f.requires_grad:
        raise RuntimeError(
            "the scalar f does not depend on any parameter or input that requires grad, so it has no gradient to "
            "penalise: was the model's output detached, or computed under torch.no_grad()?"
        )
