"""∇_x f_i and δ_i of every sample from one recorded forward pass.

One backward pass of Σ_i f_i reaches the inputs and the outputs of all parametric calls at once; since f_i depends on
sample i alone, its rows are the gradients of the single f_i.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradpen import _graph
from gradpen._graph import differentiate
from gradpen._numerics import row_sq_norm, sum_tensors
from gradpen.recording import Recording


class SampleGradients(NamedTuple):
    """Rows of one backward pass of Σ_i f_i."""

    inputs: list[Tensor]  # ∇_x f_i for every floating-point input, shaped like it; [] if not asked for
    deltas: dict[int, Tensor]  # index of the call → ∂f_i/∂output, for every call that f depends on

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.inputs, *self.deltas.values()]


def sample_gradients(
    total: Tensor, recording: Recording, *, inputs: bool, deltas: bool, create_graph: bool = True
) -> SampleGradients:
    """One backward pass for everything that is asked for.

    Args:
        total: Σ_i f_i, 0-dim, with each f_i a function of sample i alone.
        recording: the forward pass that led to it.
        inputs: give ∇_x f_i.
        deltas: give δ_i of the recorded calls.
        create_graph: keep the result differentiable.

    Raises:
        RuntimeError: if f depends on no parameter and no input, or `inputs` and f does not depend on any.
    """
    check_differentiable(total)
    wanted = places_of(recording, inputs=inputs, deltas=deltas)
    if not wanted:
        return SampleGradients([], {})
    with recording.gate.towards_inputs(), behind_hooks(recording) as arrived:
        gradients = differentiate(total, wanted, create_graph=create_graph)
    return gradients_at_places(gradients, recording, arrived, inputs=inputs)


def places_of(recording: Recording, *, inputs: bool, deltas: bool) -> list[Any]:
    """Where in the graph ∇_x f_i and the δ_i arrive."""
    found: list[Any] = [*recording.inputs] if inputs else []
    return found + ([call.output for call in recording.calls] if deltas else [])


@contextlib.contextmanager
def behind_hooks(recording: Recording) -> Iterator[dict[int, Tensor]]:
    """Index of the call → the gradient that its layer gets in a backward pass within the block, if any tensor is hooked.

    On its way to other places torch takes the gradient of a layer's output before the hooks on that, which may change it.
    """
    arrived: dict[int, Tensor] = {}

    def keeping(index: int, place: int) -> Callable[[tuple[Tensor, ...]], None]:
        return lambda gradients: None if gradients[place] is None else arrived.update({index: gradients[place]})

    edges = [call.output for call in recording.calls] if recording.is_hooked else []
    handles = [edge.node.register_prehook(keeping(index, edge.output_nr)) for index, edge in enumerate(edges)]
    try:
        yield arrived
    finally:
        for handle in handles:
            handle.remove()


def gradients_at_places(
    gradients: Sequence[Tensor | None], recording: Recording, arrived: Mapping[int, Tensor], *, inputs: bool
) -> SampleGradients:
    """What a backward pass left at `places_of`, put in order; of the calls those that `arrived`, if they are known."""
    input_count = len(recording.inputs) if inputs else 0
    input_gradients = gradients[:input_count]
    if inputs:
        _used(input_gradients)
    return SampleGradients(
        [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(recording.inputs[:input_count], input_gradients, strict=True)
        ],
        {index: arrived.get(index, d) for index, d in enumerate(gradients[input_count:]) if d is not None},
    )


def input_sq_norm(gradients: Sequence[Tensor]) -> Tensor:
    """‖∇_x f_i‖² over all inputs together: (B,)."""
    return sum_tensors([row_sq_norm(gradient) for gradient in gradients])


def jacobian_sq_norm(output: Tensor, recording: Recording) -> Tensor:
    """‖J_i‖_F² = Σ_k ‖∇_x F_ik‖², one backward pass for all outputs k: (B,)."""
    check_differentiable(output)
    rows = output.reshape(output.shape[0], -1)
    outputs = rows.shape[1]
    basis = torch.eye(outputs, dtype=rows.dtype, device=rows.device).unsqueeze(1).expand(-1, rows.shape[0], -1)
    with recording.gate.towards_inputs():
        try:
            if torch.compiler.is_compiling():  # what is behind `batched` does not know symbolic sizes
                gradients = _graph.differentiate_rows(rows, recording.inputs, basis)
            else:
                gradients = differentiate(rows, recording.inputs, basis, create_graph=True, batched=True)
        except RuntimeError as error:
            if not torch.compiler.is_compiling():  # nor can a warning be traced
                warnings.warn(
                    f"the Jacobian is computed one output at a time, which is slow, because torch {torch.__version__} "
                    f"cannot run the backward pass for all of them at once: {str(error).splitlines()[0]}",
                    stacklevel=2,
                )
            rows_of = [differentiate(rows, recording.inputs, cotangents, create_graph=True) for cotangents in basis]
            return sum_tensors([input_sq_norm(_used(gradients)) for gradients in rows_of])
    return input_sq_norm([gradient.transpose(0, 1) for gradient in _used(gradients)])


def projected_jacobian_sq_norm(
    output: Tensor, recording: Recording, num_projections: int, generator: torch.Generator | None
) -> Tensor:
    """K · mean ‖J_iᵀ v‖² over directions v uniform on the unit sphere of the K outputs: unbiased for ‖J_i‖_F², (B,)."""
    check_differentiable(output)
    rows = output.reshape(output.shape[0], -1)
    estimates = []
    for _ in range(num_projections):
        directions = random_directions(rows, generator)
        with recording.gate.towards_inputs():
            gradients = differentiate(rows, recording.inputs, directions, create_graph=True)
        estimates.append(input_sq_norm(_used(gradients)))
    return torch.stack(estimates).mean(0)


def random_directions(outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """√K v for every sample, v uniform on the unit sphere of the K outputs: shaped as they are, (B, K)."""
    if generator is None:  # torch.randn(generator=…) knows no symbolic sizes, not even with None
        normal = torch.randn(outputs.shape, device=outputs.device, dtype=torch.float32)
    else:
        normal = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=torch.float32)
    return (normal / normal.norm(dim=1, keepdim=True) * outputs.shape[1] ** 0.5).to(outputs.dtype)


def check_differentiable(f: Tensor) -> None:
    """A scalar that nothing trainable leads to has no gradient."""
    if not f.requires_grad:
        raise RuntimeError(
            "the scalar f does not depend on any parameter or input that requires grad, so it has no gradient to "
            "penalise: was the model's output detached, or computed under torch.no_grad()?"
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
