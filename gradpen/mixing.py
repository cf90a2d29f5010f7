"""Which rows of a batch belong to one sample each: found out, not assumed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradpen import closed_form
from gradpen._numerics import rounding_tolerance
from gradpen.gradients import SampleGradients, sample_gradients
from gradpen.recording import Recording


def find_mixed_calls(
    model: nn.Module, f: Tensor, scalar: Callable[[Any], Tensor], recording: Recording, gradients: SampleGradients
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
    known = _mixed_calls.setdefault(model, {})
    key = (model.training, len(gradients.inputs), layout, _code_of(scalar))
    if key in known and not _is_ambiguous(
        recording, gradients, batch_size
    ):  # as many positions as samples: they could have changed places
        return known[key]
    check_scalar_rows(f, recording.output)
    factors = _row_factors(f)
    scaled = sample_gradients(
        (f * factors).sum(),
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


def check_unambiguous(recording: Recording, gradients: SampleGradients, batch_size: int) -> None:
    """Where rows cannot be tried out, they are taken for samples only if they cannot be anything else.

    Raises:
        RuntimeError: if there are as many positions as samples.
    """
    if batch_size > 1 and _is_ambiguous(recording, gradients, batch_size):
        raise RuntimeError(
            f"a layer sees as many positions (tokens, pixels) as there are samples, {batch_size}, so it cannot be told "
            "which dimension counts samples: say which part of the module is the model (model=…), or change the batch size"
        )


def _is_ambiguous(recording: Recording, gradients: SampleGradients, batch_size: int) -> bool:
    calls = [recording.calls[index] for index in gradients.deltas]
    return any(batch_size in closed_form.position_shape(call) for call in calls) or any(
        batch_size in gradient.shape[1:-1] for gradient in gradients.inputs
    )


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
