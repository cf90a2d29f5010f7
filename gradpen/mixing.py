"""Which rows of a batch belong to one sample each: found out, not assumed."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradpen import closed_form
from gradpen._graph import GraphWalk, walk_graph
from gradpen._numerics import rounding_tolerance
from gradpen.gradients import SampleGradients, sample_gradients
from gradpen.recording import Recording


def find_mixed_calls(
    model: nn.Module,
    f: Tensor,
    scalar: Callable[[Any], Tensor],
    recording: Recording,
    gradients: SampleGradients,
    walk: GraphWalk | None = None,
) -> frozenset[int]:
    """Calls with a row that more than one sample reaches, found by one more backward pass; errors for the inputs.

    With c_i f_i in place of f_i, a row that belongs to sample i alone is multiplied by c_i. The answer depends on the
    operations in the graph of f and on how the model lays out its batch. It is kept for these, and looked at again after 1,
    2, 4, 8, … uses: a path that was multiplied by 0 may have opened. `walk` is that of the graph of f, if it is known.

    Raises:
        RuntimeError: if a gradient shows that f_i depends on the input or the output of other samples than i.
    """
    if f.shape[0] == 1:
        return frozenset()
    walk = walk or walk_graph(f)
    key = _key(model, f, scalar, recording, gradients, walk)
    known = _recall(model, key, f, recording, gradients, walk)
    return _try_out(model, key, f, recording, gradients) if known is None else known


def check_inputs_unmixed(
    model: nn.Module,
    f: Tensor,
    scalar: Callable[[Any], Tensor],
    recording: Recording,
    walk: GraphWalk | None = None,
) -> None:
    """`find_mixed_calls` for the inputs alone, without a backward pass if the answer is known.

    Raises:
        RuntimeError: if f_i depends on the input or the output of other samples than i.
    """
    if f.shape[0] == 1:
        return
    shaped = SampleGradients(recording.inputs, {})
    walk = walk or walk_graph(f)
    key = _key(model, f, scalar, recording, shaped, walk)
    if _recall(model, key, f, recording, shaped, walk) is None:
        found = sample_gradients(f.sum(), recording, inputs=True, deltas=False, create_graph=False)
        _try_out(model, key, f, recording, found)


@dataclass
class _Verdict:
    mixed: frozenset[int]
    uses: int = 0


_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[_Key, _Verdict]] = weakref.WeakKeyDictionary()
_MAX_VERDICTS = 256  # a model may build another graph on every call


def _recall(
    model: nn.Module, key: _Key, f: Tensor, recording: Recording, gradients: SampleGradients, walk: GraphWalk
) -> frozenset[int] | None:
    """What was found for this key, or None if it is to be found out (again)."""
    verdict = _verdicts.get(model, {}).get(key)
    if verdict is None or is_ambiguous(walk.kinds, recording, gradients, f.shape[0]):
        return None
    verdict.uses += 1
    return None if verdict.uses.bit_count() == 1 else verdict.mixed


def _try_out(
    model: nn.Module, key: _Key, f: Tensor, recording: Recording, gradients: SampleGradients
) -> frozenset[int]:
    """Scale the f_i apart, see which rows follow, and remember it."""
    check_scalar_rows(f, recording.output)
    factors, tolerance = _row_factors(f), _tolerance(f, recording, gradients)

    def tensors_of(f: Tensor) -> list[Tensor]:
        found = sample_gradients(
            f.sum(), recording, inputs=bool(gradients.inputs), deltas=bool(gradients.deltas), create_graph=False
        )
        return [*found.inputs, *[found.deltas[index] for index in gradients.deltas]]

    changed = [
        not _follows(before, after, factors, tolerance)
        for before, after in zip(gradients.tensors, tensors_of(f * factors), strict=True)
    ]
    if any(changed):
        changed = _reached_by_others(f, tensors_of, gradients.tensors, changed, tolerance)
    if any(changed[: len(gradients.inputs)]):
        raise RuntimeError(
            "expected f_i to depend on sample i alone, but its gradient reaches the inputs of other samples: the "
            "model (or the criterion) mixes the samples of a batch (dimension 0), so a gradient penalty of "
            "single samples is not defined"
        )
    mixed = frozenset(
        index for index, one in zip(gradients.deltas, changed[len(gradients.inputs) :], strict=True) if one
    )
    known = _verdicts.setdefault(model, {})
    before_this = known.get(key, _Verdict(frozenset()))
    mixed |= before_this.mixed
    if all(_tells(gradient) for gradient in gradients.tensors):
        if len(known) >= _MAX_VERDICTS:
            known.clear()
        known[key] = _Verdict(mixed, before_this.uses)
    return mixed


def _reached_by_others(
    f: Tensor,
    gradients_of: Callable[[Tensor], Sequence[Tensor]],
    gradients: Sequence[Tensor],
    suspects: Sequence[bool],
    tolerance: float,
) -> list[bool]:
    """Which of the suspected gradients have a row i that is other than 0 though f_i is left out.

    Where terms cancel (in a saturated softmax, a normalisation of two features) a gradient is rounding, which follows no
    factor but 0. The f_i are left out by the binary digits of i, one of which tells any two of them apart.
    """
    rows = [before.shape[0] == f.shape[0] for before in gradients]
    found = [suspected and not of_samples for suspected, of_samples in zip(suspects, rows, strict=True)]
    places = torch.arange(f.shape[0], device=f.device)
    for digit, value in itertools.product(range((f.shape[0] - 1).bit_length()), (0, 1)):
        if found == list(suspects):
            break
        left_out = (places >> digit) % 2 == value
        for index, (before, after) in enumerate(zip(gradients, gradients_of(f * ~left_out), strict=True)):
            if suspects[index] and not found[index]:
                found[index] = _finite_norm(after[left_out]) > tolerance / _LESS_IN_PART * _finite_norm(before)
    return found


_LESS_IN_PART = 16  # what some of the f_i are to some of the rows is less than what all are to all


def _finite_norm(gradient: Tensor) -> float:
    """The norm without NaN and infinities."""
    gradient = gradient.detach()
    return float(torch.where(gradient.isfinite(), gradient, 0).norm())


def _tells(gradient: Tensor) -> bool:
    """Whether a gradient proves anything about the next batch: zeros and NaN do not."""
    return bool(gradient.any() & gradient.isfinite().all())


def _tolerance(f: Tensor, recording: Recording, gradients: SampleGradients) -> float:
    """What rounding alone does not reach in the narrowest type of the model: it may cast inside."""
    tensors = [f, *gradients.inputs, *gradients.deltas.values(), *[call.input for call in recording.calls]]
    return max(rounding_tolerance(tensor) for tensor in tensors if tensor.is_floating_point())


class _Key(NamedTuple):
    """What the answer depends on."""

    graph: int  # `GraphWalk.shape`
    training: bool
    inputs: int
    layout: tuple[bool, ...]  # for every call: whether dimension 0 of its input has the batch's size
    code: Any


def _key(
    model: nn.Module,
    f: Tensor,
    scalar: Callable[[Any], Tensor],
    recording: Recording,
    gradients: SampleGradients,
    walk: GraphWalk,
) -> _Key:
    layout = tuple(recording.calls[index].input.shape[:1] == f.shape[:1] for index in gradients.deltas)
    return _Key(walk.shape, model.training, len(gradients.inputs), layout, code_of(scalar))


def find_mixed_calls_for_good(
    model: nn.Module, f: Tensor, scalar: Callable[[Any], Tensor], recording: Recording, gradients: SampleGradients
) -> frozenset[int]:
    """`find_mixed_calls` for a caller who will not ask again for the next batch.

    Raises:
        RuntimeError: as `find_mixed_calls`, and if this batch does not settle it for the next ones.
    """
    if f.shape[0] == 1:
        return frozenset()
    walk = walk_graph(f)
    check_unambiguous(walk, recording, gradients, f.shape[0])
    key = _key(model, f, scalar, recording, gradients, walk)
    mixed = _try_out(model, key, f, recording, gradients)  # an older verdict would hold for this batch, not for all
    if key not in _verdicts.get(model, {}):
        raise RuntimeError(
            "expected gradients other than zero, from which can be seen that f_i depends on sample i alone, but for this "
            "batch some layer's are zero throughout: call the objective once without torch.compile on a batch whose are not"
        )
    return mixed


def check_unambiguous(walk: GraphWalk, recording: Recording, gradients: SampleGradients, batch_size: int) -> None:
    """Where rows cannot be tried out, they are taken for samples only if they cannot be anything else.

    Raises:
        RuntimeError: if there are as many positions as samples, or rows are picked by index.
    """
    if batch_size > 1 and is_ambiguous(walk.kinds, recording, gradients, batch_size):
        raise RuntimeError(
            f"a layer sees as many positions (tokens, pixels) as there are samples, {batch_size}, or rows that were picked "
            "by index, so it cannot be told which dimension counts samples: say which part of the module is the model "
            "(model=…), or change the batch size"
        )


def is_ambiguous(kinds: Collection[str], recording: Recording, gradients: SampleGradients, batch_size: int) -> bool:
    """Whether the next batch may be laid out otherwise though all shapes agree."""
    calls = [recording.calls[index] for index in gradients.deltas]
    led_by_samples = [call for call in calls if call.input.shape[:1] == (batch_size,)]  # no other has a closed form
    return (
        any(batch_size in closed_form.position_shape(call) for call in led_by_samples)
        or any(batch_size in gradient.shape[1:-1] for gradient in gradients.inputs)
        or any(kind.startswith(_REORDERING) for kind in kinds)
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

    def gradients_of(f: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(f.sum(), output, retain_graph=True, allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    factors, tolerance = _row_factors(f), max(rounding_tolerance(f), rounding_tolerance(output))
    gradients = gradients_of(f)
    changed = [
        not _follows(before, after, factors, tolerance)
        for before, after in zip(gradients, gradients_of(f * factors), strict=True)
    ]
    if any(changed) and any(_reached_by_others(f, gradients_of, gradients, changed, tolerance)):
        raise RuntimeError(
            "expected f_i to depend on the output of sample i alone, but the criterion mixes the samples of a batch "
            "(dimension 0), so a gradient penalty of single samples is not defined"
        )


def _row_factors(f: Tensor) -> Tensor:
    """±1, ±1/2, ±1/4 or ±1/8 for each row, or 0 for about half of them, in no order that a layout could have.

    Products with them are exact, so that rows follow them in every precision, that of TF32, say.
    """
    numbers = torch.arange(1, f.shape[0] + 1, device=f.device, dtype=torch.float32)  # half precision cannot count them
    sizes = torch.exp2((1.5 * (2**0.5 * numbers).cos() - 1.5).round())
    return (sizes.copysign(numbers.cos()) * (numbers.square().cos() > 0)).to(f.dtype)


def code_of(function: Any) -> Any:
    """What tells functions apart that are made anew for every call, such as lambdas and partials."""
    function = getattr(function, "source", function)
    function = getattr(function, "func", function)
    return getattr(function, "__code__", type(function))


def _follows(before: Tensor, after: Tensor, factors: Tensor, tolerance: float) -> bool:
    """Whether every row i of `after` is factors_i times that of `before`; NaN and infinities aside.

    Where nothing cancels it is, exactly, or but for the order of a sum: most of what rounding could do would be too much.
    """
    if before.shape[0] != factors.shape[0]:
        return False
    of_row = factors.reshape(-1, *[1] * (before.dim() - 1)).to(before.dtype)
    expected = before.detach() * of_row
    finite = expected.isfinite() & after.isfinite()
    expected, error = torch.where(finite, expected, 0), torch.where(finite, after - expected, 0)
    return bool(error.norm() <= tolerance / _LESS_IN_PART * expected.norm())
