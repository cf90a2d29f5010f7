"""Which rows of a batch belong to one sample each: found out, not assumed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradpen import closed_form
from gradpen._graph import walk_graph
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
    known, key = _mixed_calls.setdefault(model, {}), _key(model, scalar, recording, gradients, batch_size)
    if key in known and not is_ambiguous(f, recording, gradients, batch_size):
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


def check_inputs_unmixed(model: nn.Module, f: Tensor, scalar: Callable[[Any], Tensor], recording: Recording) -> None:
    """`find_mixed_calls` for the inputs alone, without a backward pass if the answer is known.

    Raises:
        RuntimeError: if f_i depends on the input or the output of other samples than i.
    """
    shaped = SampleGradients(recording.inputs, {})
    known = _key(model, scalar, recording, shaped, len(f)) in _mixed_calls.get(model, {})
    if not known or is_ambiguous(f, recording, shaped, len(f)):
        found = sample_gradients(f.sum(), recording, inputs=True, deltas=False, create_graph=False)
        find_mixed_calls(model, f, scalar, recording, found)


def _key(
    model: nn.Module,
    scalar: Callable[[Any], Tensor],
    recording: Recording,
    gradients: SampleGradients,
    batch_size: int,
) -> Any:
    layout = tuple(recording.calls[index].input.shape[:1] == (batch_size,) for index in gradients.deltas)
    return model.training, len(gradients.inputs), layout, code_of(scalar)


def find_mixed_calls_for_good(
    model: nn.Module, f: Tensor, scalar: Callable[[Any], Tensor], recording: Recording, gradients: SampleGradients
) -> frozenset[int]:
    """`find_mixed_calls` for a caller who will not ask again for the next batch.

    Raises:
        RuntimeError: as `find_mixed_calls`, and if this batch does not settle it for the next ones.
    """
    batch_size = f.shape[0]
    check_unambiguous(f, recording, gradients, batch_size)
    mixed = find_mixed_calls(model, f, scalar, recording, gradients)
    if batch_size > 1 and _key(model, scalar, recording, gradients, batch_size) not in _mixed_calls[model]:
        raise RuntimeError(
            "expected gradients other than zero, from which can be seen that f_i depends on sample i alone, but for this "
            "batch some layer's are zero throughout: call the objective once without torch.compile on a batch whose are not"
        )
    return mixed


def check_unambiguous(root: Tensor, recording: Recording, gradients: SampleGradients, batch_size: int) -> None:
    """Where rows cannot be tried out, they are taken for samples only if they cannot be anything else.

    Raises:
        RuntimeError: if there are as many positions as samples, or rows are picked by index.
    """
    if batch_size > 1 and is_ambiguous(root, recording, gradients, batch_size):
        raise RuntimeError(
            f"a layer sees as many positions (tokens, pixels) as there are samples, {batch_size}, or rows that were picked "
            "by index, so it cannot be told which dimension counts samples: say which part of the module is the model "
            "(model=…), or change the batch size"
        )


def is_ambiguous(root: Tensor, recording: Recording, gradients: SampleGradients, batch_size: int) -> bool:
    """Whether the next batch may be laid out otherwise though all shapes agree."""
    calls = [recording.calls[index] for index in gradients.deltas]
    return (
        any(batch_size in closed_form.position_shape(call) for call in calls)
        or any(batch_size in gradient.shape[1:-1] for gradient in gradients.inputs)
        or any(type(node).__name__.startswith(_REORDERING) for node in walk_graph(root).nodes)
    )


# nodes of the graph that can move rows from batch to batch
_REORDERING = ("Index", "Gather", "Flip", "Roll", "Scatter", "Sort", "Take", "MaskedS")


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


def code_of(function: Any) -> Any:
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
