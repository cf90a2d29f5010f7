"""Exact squared norms of parameter gradients, by sample, by group, or of the whole batch.

From the layers' inputs h and output gradients δ the closed forms give ‖∇_θ f_i‖². Parameters that are used in any other way
go through `torch.func`: one forward pass with a copy of these parameters for every sample.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gradpen import closed_form, mixing
from gradpen._graph import GraphWalk, differentiate, reached_around, walk_graph
from gradpen._numerics import (
    full_precision,
    kernel_tolerance,
    rounding_tolerance,
    row_sq_norm,
    sum_tensors,
    total_sq_norm,
)
from gradpen.gradients import SampleGradients, check_differentiable
from gradpen.mixing import find_mixed_calls
from gradpen.recording import Call, Recording, RngState, call_with, map_leaves, map_tensors, tensors_of

ScalarFn = Callable[[Any], Tensor]  # the model's output → f, (B,)


class ParameterPlan(NamedTuple):
    """How each parameter's gradient is had."""

    closed: dict[str, list[tuple[int, str]]]  # name → its uses: (index of the call, "weight" or "bias")
    mapped: list[str]  # names of parameters that need torch.func


def plan_parameters(
    recording: Recording,
    walk: GraphWalk,
    parameters: Mapping[str, Tensor],
    mixed_calls: frozenset[int],
    batch_size: int,
) -> ParameterPlan:
    """Closed form only where it is provably right.

    A parameter has one if every edge that leads to it in the graph of f is a recorded call with one row per sample. A
    weight that is also used elsewhere (tied, parametrised, in a custom operation) has more edges than calls.

    Args:
        recording: the forward pass.
        walk: the graph of f, or of Σ_i f_i.
        parameters: name → parameter.
        mixed_calls: calls whose rows are not one sample each (`find_mixed_calls`).
        batch_size: B.

    Raises:
        RuntimeError: if a reentrant checkpoint hides parameters.
    """
    _check_nothing_hidden(walk)
    uses = _uses_by_parameter(recording.calls, walk)
    plan = ParameterPlan({}, [])
    for name, parameter in parameters.items():
        edges = walk.leaf_edges[id(parameter)]
        if not parameter.is_leaf and parameter.grad_fn in walk.nodes:
            plan.mapped.append(name)  # a function of others, put in its place by torch.func.functional_call
            continue
        if edges == 0:
            continue  # f does not depend on it: its gradient is 0
        found = uses.get(id(parameter), [])
        rows = all(
            index not in mixed_calls and closed_form.has_closed_form(recording.calls[index], batch_size)
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
    walk: GraphWalk | None = None,
    mixed_calls: frozenset[int] | None = None,
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
        walk: that of the graph of f, if it is known.
        mixed_calls: calls whose rows are not one sample each, if they are known.

    Raises:
        RuntimeError: if samples are mixed.
    """
    batch_size = f.shape[0]
    walk = walk or walk_graph(f)
    if mixed_calls is None:
        mixed_calls = find_mixed_calls(model, f, scalar, recording, gradients, walk)
    plan = plan_parameters(recording, walk, parameters, mixed_calls, batch_size)
    closed = closed_param_sq_norm(recording, gradients, plan, batch_size, group_size, f.device)
    if not plan.mapped:
        return closed
    mapped = {name: parameters[name] for name in plan.mapped}
    settled = not mixing.is_ambiguous(walk.kinds, recording, gradients, batch_size)
    return closed + _mapped_sq_norm(model, x, f, scalar, mapped, group_size, rng, create_graph, settled, walk)


def closed_loss_sq_norm(
    total: Tensor,
    recording: Recording,
    gradients: SampleGradients,
    parameters: Mapping[str, Tensor],
    mixed_calls: frozenset[int],
    batch_size: int,
    group_size: int,
) -> Tensor:
    """`param_sq_norm` where only Σ_i f_i is known, so that every parameter must have a closed form: (groups,).

    Raises:
        RuntimeError: naming the parameters that have none.
    """
    plan = plan_parameters(recording, walk_graph(total), parameters, mixed_calls, batch_size)
    if plan.mapped:
        raise RuntimeError(
            f"the gradients of {', '.join(plan.mapped)} have no closed form for single samples, and a loss that is already "
            'averaged does not give them: leave them out with parameters=…, use over="batch", or call PenalizedLoss in '
            "training_step, which runs the model sample by sample for them"
        )
    return closed_param_sq_norm(recording, gradients, plan, batch_size, group_size, total.device)


def batch_param_sq_norm(
    f: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = True, walk: GraphWalk | None = None
) -> Tensor:
    """‖∇_θ mean_i f_i‖²: shape (1,). `walk` is that of the graph of f, if it is known."""
    check_differentiable(f)
    if not torch.compiler.is_compiling():
        _check_nothing_hidden(walk or walk_graph(f))
    gradients = differentiate(f.mean(), list(parameters), create_graph=create_graph)
    found = [gradient for gradient in gradients if gradient is not None]
    return total_sq_norm(found).reshape(1) if found else f.new_zeros(1)


def _check_nothing_hidden(walk: GraphWalk) -> None:
    """What a reentrant checkpoint holds is no part of the graph: its gradients would count as 0."""
    if "CheckpointFunctionBackward" in walk.kinds:
        raise RuntimeError(
            "expected parameters that torch.autograd.grad can reach, but torch.utils.checkpoint.checkpoint(…, "
            "use_reentrant=True) hides those that it was called on: pass use_reentrant=False"
        )


def closed_param_sq_norm(
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
            calls = {
                index: _rows(recording.gate.without_aliases(recording.calls[index]), start, stop)
                for index in gradients.deltas
            }
            deltas = {index: _slice(delta, start, stop) for index, delta in gradients.deltas.items()}
            with full_precision(device):
                sq_norms = _plan_sq_norms(calls, deltas, plan, size)
            total = sum_tensors(sq_norms) if sq_norms else torch.zeros((stop - start) // size, device=device)
            parts.append(total if size == 1 else total / size**2)
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
    version = None if call.input_version is None else input._version
    return Call(call.op, input, call.weight, call.bias, call.options, call.output, call.output_shape, version)


def _uses_by_parameter(calls: Sequence[Call], walk: GraphWalk) -> dict[int, list[tuple[int, str]]]:
    """id(parameter) → the calls in the graph of f that use it."""
    uses: dict[int, list[tuple[int, str]]] = {}
    for index, call in enumerate(calls):
        if call.output.node in walk.nodes:
            for role, tensor in (("weight", call.weight), ("bias", call.bias)):
                if tensor is not None and tensor.requires_grad:
                    uses.setdefault(id(tensor), []).append((index, role))
    return uses


def _mapped_sq_norm(
    model: nn.Module,
    x: Any,
    f: Tensor,
    scalar: ScalarFn,
    parameters: Mapping[str, Tensor],
    group_size: int,
    rng: RngState,
    create_graph: bool,
    settled: bool,
    walk: GraphWalk,
) -> Tensor:
    """‖∇ mean_{i ∈ group} f_i‖² of parameters without a closed form, by torch.func.vmap or else in a loop: (groups,)."""
    batch_size = f.shape[0]
    check_rows(x, batch_size)
    key = (walk.shape, model.training, tuple(parameters), group_size, tuple(_shapes(x)), mixing.code_of(scalar))
    try:
        with _inference_kernels_off():
            mapped = run_mapped(model, x, scalar, parameters, batch_size, group_size, rng.replayed)
            known = settled and key in _same_values.get(model, ())
            obstacle = find_obstacle(f, mapped, parameters, same_values=known)
            if not obstacle:
                sq_norm = mapped.sq_norm(create_graph)  # may fail, too: checkpoints run the model again
                _same_values.setdefault(model, set()).add(key)
                return sq_norm
    except (RuntimeError, ValueError) as error:  # ValueError: outputs of a type that vmap does not know
        obstacle = f"torch.func.vmap cannot run the model: {_first_line(error)}"
    check_rows_apart(model, x, batch_size, scalar, list(parameters), rng)
    warnings.warn(
        f"the gradients of {', '.join(parameters)} are computed one sample at a time, which is slow, because {obstacle}",
        stacklevel=2,
    )
    return _looped_sq_norm(f, list(parameters.values()), group_size, create_graph)


# models whose second forward pass has been compared with the first: comparing makes the host wait for the device
_same_values: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


class Mapped(NamedTuple):
    """A forward pass in which every group of samples has its own copy of some parameters."""

    f: Tensor  # (B,)
    copies: list[Tensor]  # (groups, *parameter.shape)
    group_size: int

    def sq_norm(self, create_graph: bool = True) -> Tensor:
        """‖∇ mean_{i ∈ group} f_i‖²: (groups,)."""
        batch_size = self.f.shape[0]
        before = torch.arange(batch_size, device=self.f.device) // self.group_size * self.group_size
        sizes = (batch_size - before).clamp(max=self.group_size)
        gradients = differentiate((self.f / sizes).sum(), self.copies, create_graph=create_graph)
        return sum_tensors([row_sq_norm(gradient) for gradient in gradients if gradient is not None])


def run_mapped(
    model: nn.Module,
    x: Any,
    scalar: ScalarFn,
    parameters: Mapping[str, Tensor],
    batch_size: int,
    group_size: int,
    replay: Callable[[], contextlib.AbstractContextManager[None]],
) -> Mapped:
    """Run the model sample by sample, all at once, within a context in which the same random numbers are drawn again.

    Raises:
        RuntimeError, ValueError: if torch.func.vmap cannot run the model.
    """
    groups = -(-batch_size // group_size)
    copies = {name: parameter.expand(groups, *parameter.shape) for name, parameter in parameters.items()}
    by_sample = copies
    if group_size > 1:
        by_sample = {name: copy.repeat_interleave(group_size, 0)[:batch_size] for name, copy in copies.items()}

    def one_sample(copied: dict[str, Tensor], sample: Any) -> Any:
        output = call_with(model, copied, map_tensors(sample, lambda tensor: tensor.unsqueeze(0)))
        return tree_map_only(Tensor, lambda tensor: tensor.squeeze(0), output)

    in_dims = (0, map_leaves(x, lambda leaf: 0 if isinstance(leaf, Tensor) else None))
    with replay(), _PaddingOutside():
        output = torch.vmap(one_sample, in_dims, randomness="different")(by_sample, x)
    return Mapped(scalar(output), list(copies.values()), group_size)


class _PaddingOutside(TorchFunctionMode):
    """F.embedding and torch.embedding with a padding row in operations that torch.vmap differentiates rightly.

    It lays the samples' tables one behind the other and numbers their rows anew, all but `padding_idx`, so that from the
    second sample on the padding row would get a gradient.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.embedding:
            return _embedding(*args, **(kwargs or {}))
        if func is torch.embedding:
            return _torch_embedding(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _torch_embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any, **kwargs: Any) -> Tensor:
    found = torch.embedding(weight, indices, -1, *args, **kwargs)
    return found if padding_idx < 0 else torch.where((indices == padding_idx).unsqueeze(-1), found.detach(), found)


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    found = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return found
    is_padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(is_padding, found.detach(), found)


def check_rows(x: Any, batch_size: int) -> None:
    """A model can be run sample by sample if every tensor that it is given has a row for each.

    Raises:
        ValueError: if one has not.
    """
    if any(shape[:1] != (batch_size,) for shape in _shapes(x)):
        raise ValueError(
            "the model has to be run sample by sample, so dimension 0 of every tensor that is given to it (or to the "
            f"criterion) is expected to count the {batch_size} samples, got shapes {_shapes(x)}"
        )


def _shapes(x: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_of(x)]


def find_obstacle(f: Tensor, mapped: Mapped, parameters: Mapping[str, Tensor], *, same_values: bool) -> str:
    """Why the forward pass by samples is not that of the batch; "" if it is; `same_values`: f is known to agree."""
    around = reached_around(mapped.f, parameters, mapped.copies)
    if around:
        return f"the criterion, or what is no part of the model, uses {', '.join(around)}"
    tolerance = kernel_tolerance(f)
    if not same_values and not torch.allclose(
        f.detach(), mapped.f.detach(), rtol=tolerance, atol=tolerance, equal_nan=True
    ):
        return "the model draws random numbers (a dropout mask, say) that are others when it runs sample by sample"
    return ""


def check_rows_apart(
    model: nn.Module, x: Any, batch_size: int, scalar: ScalarFn, names: Sequence[str], rng: RngState
) -> None:
    """Replace every other sample by its neighbour: the f_i of those that stay must stay."""
    odd = torch.arange(batch_size) % 2 == 1

    def f_with_neighbours_at(replaced: Tensor) -> Tensor:
        rows = torch.arange(batch_size) - replaced.long()
        with rng.replayed():
            replaced_x = map_tensors(x, lambda tensor: tensor[rows.to(tensor.device)])
            f: Tensor = call_with(model, {}, replaced_x, then=scalar)
            return f.detach()

    expected = f_with_neighbours_at(torch.zeros_like(odd))
    tolerance = rounding_tolerance(expected)
    for replaced in (odd, ~odd):
        kept = (~replaced).to(expected.device)
        came = f_with_neighbours_at(replaced)
        if not torch.allclose(came[kept], expected[kept], rtol=tolerance, atol=tolerance, equal_nan=True):
            raise RuntimeError(
                "expected f_i to depend on sample i alone, but it changes with other samples: the model mixes the samples "
                "of a batch (dimension 0), or its random numbers depend on them, so the gradients of "
                f"{', '.join(names)} for single samples are not defined: exclude these parameters with parameters=…, or "
                'use over="batch"'
            )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@contextlib.contextmanager
def _inference_kernels_off() -> Iterator[None]:
    """Under vmap nothing seems to require grad, and transformer layers in eval mode take kernels without derivatives."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _looped_sq_norm(f: Tensor, parameters: Sequence[Tensor], group_size: int, create_graph: bool) -> Tensor:
    """‖∇ mean_{i ∈ group} f_i‖² by one backward pass for every group: (groups,)."""
    norms = []
    for group in f.split(group_size):
        gradients = differentiate(group.mean(), parameters, create_graph=create_graph)
        norms.append(total_sq_norm([gradient for gradient in gradients if gradient is not None]))
    return torch.stack(norms)
