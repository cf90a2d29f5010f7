"""From a criterion to f: one scalar a sample."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpen import _checks


@dataclass(frozen=True)
class Criterion:
    """A criterion taken apart into the scalar one trains on and its terms f_i.

    Attributes:
        source: what the user gave: (output, target) → loss.
        reduction: its own ``reduction``, or None if it has no such argument and returns (B,) by itself.
    """

    source: Callable[..., Tensor]
    reduction: str | None

    @cached_property
    def follows_mean(self) -> bool:
        """Whether the data loss is known to be a multiple of mean_i f_i, so that one gradient gives the other."""
        return self.reduction in (None, "none") or (
            self.reduction in ("mean", "sum") and self._is(_MEANS | _WEIGHTED_MEANS)
        )

    def renewed(self, source: Callable[..., Tensor]) -> Criterion:
        """What `source` is taken apart into now: this, unless it is another criterion or has another reduction by now."""
        same = _are_same(source, self.source)
        if same and isinstance(source, nn.Module):
            same = _reduction_of(source) == self.reduction
        return self if same else as_criterion(source)

    @property
    def _divides_by_weights(self) -> bool:
        """Whether its mean is divided by a sum of weights, not by the number of entries."""
        weight = self.source.keywords.get("weight") if isinstance(self.source, partial) else None
        return self._is(_WEIGHTED_MEANS) or (weight is not None and self._is(_MEANS_BY_WEIGHT))

    @property
    def _is_plain_cross_entropy(self) -> bool:
        """Whether it is F.cross_entropy without weights or smoothing, as torch calls it unless told otherwise."""
        source = self.source
        return source is F.cross_entropy or (
            type(source) is nn.CrossEntropyLoss
            and (source.weight, source.label_smoothing, source.ignore_index) == (None, 0.0, IGNORED)
            and source.reduction == self.reduction
            and not self._is_hooked
        )

    @property
    def _is_hooked(self) -> bool:
        """Whether anything is done when it is called beside what its class says."""
        function = self._function
        return isinstance(function, nn.Module) and (_checks.is_changed(function) or _checks.has_global_hooks())

    @property
    def _function(self) -> Callable[..., Tensor]:
        return self.source.func if isinstance(self.source, partial) else self.source

    def over_mean(self, data_loss: Tensor, mean: Tensor, batch_size: int, target: Any) -> float | Tensor:
        """The multiple that ``data_loss`` is of mean_i f_i, a constant to be multiplied by, if `follows_mean`."""
        if self.reduction == "sum":
            return float(batch_size)
        if self.source is F.cross_entropy and isinstance(target, Tensor) and target.dtype == torch.int64:
            return target.numel() / (target != IGNORED).sum().clamp(min=1).to(data_loss.dtype)
        if self._divides_by_weights:  # all f_i >= 0, so nothing cancels
            ratio = torch.where(mean > 0, data_loss / torch.where(mean > 0, mean, 1.0), 1.0).detach()
            without_weights = (ratio - 1).abs() <= 8 * torch.finfo(ratio.dtype).eps
            return torch.where(without_weights, 1.0, ratio)
        return 1.0

    def _is(self, known: frozenset[Any]) -> bool:
        function = self._function
        return type(function) in known or any(function is one for one in known)  # it may have no hash

    def keeps_rows_apart(self, output: Tensor) -> bool:
        """Whether f_i is known to depend on row i of the output alone: elementwise losses may broadcast rows of others."""
        return output.dim() >= 2 and self._is(_WEIGHTED_MEANS) and not self._is_hooked

    def balanced(self, cotangent: Tensor, output: Tensor) -> Tensor:
        """∂f/∂output of every sample with what rounding takes from it: (B, …), like `cotangent`.

        Cross entropy does not change if all scores of a sample rise alike, so its derivatives add up to 0. Where a class is
        all but certain, that of its score is p − 1, of which p = 1 leaves nothing; the others know it.
        """
        if output.dim() < 2 or not self._is(_WEIGHTED_MEANS) or self._is_hooked:
            return cotangent
        surest = output.argmax(1, keepdim=True)
        return cotangent.scatter(1, surest, -cotangent.scatter(1, surest, 0.0).sum(1, keepdim=True))

    def scalar(self, target: Any) -> Scalar:
        """The f_i as a function of the model's output."""
        return Scalar(self.source, self.per_sample, target)

    def data_loss(self, output: Any, target: Any) -> Tensor:
        """The loss one trains on, 0-dim: exactly ``source(output, target)`` wherever that is a scalar."""
        _checks.check_batch_sizes(output, target)
        if self.reduction in (None, "none"):
            return self.per_sample(output, target).mean()
        return self.source(output, target)

    def per_sample(self, output: Any, target: Any) -> Tensor:
        """f of shape (B,): a "none" result (B, …) averaged over everything but the batch, or summed (`_SUMMED`)."""
        if self.reduction is None:
            return scalar_per_sample(self.source, output, target)
        _checks.check_batch_sizes(output, target)
        if isinstance(self.source, nn.Module):
            values = _unreduced(self.source, output, target)
        else:
            values = self.source(output, target, reduction="none")
        if values.dim() == 0 or (isinstance(output, Tensor) and values.shape[0] != output.shape[0]):
            raise ValueError(
                f'expected one row per sample from {_name(self.source)} with reduction="none", got shape '
                f"{tuple(values.shape)}"
            )
        if values.dim() == 1:
            return values
        rows = values.reshape(values.shape[0], -1)
        return rows.sum(1) if self.reduction in _SUMMED else rows.mean(1)


IGNORED = -100  # the target that F.cross_entropy leaves out unless told otherwise
_SUMMED = ("sum", "batchmean")  # both add up the entries of a sample; "batchmean" then averages over the samples


# Losses whose mean is that of the f_i. Not so the CTC loss, which divides each f_i by another length.
_MEANS: frozenset[Any] = frozenset(
    {
        *(
            F.mse_loss,
            F.l1_loss,
            F.smooth_l1_loss,
            F.huber_loss,
            F.binary_cross_entropy,
            F.binary_cross_entropy_with_logits,
        ),
        *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss),
    }
)
# Those of them whose mean is divided by the sum of the weights, if there are weights of the entries.
_MEANS_BY_WEIGHT: frozenset[Any] = frozenset({F.mse_loss, F.l1_loss})
# Losses whose mean is divided by the weights of the classes, or by the number of targets that are not ignored.
_WEIGHTED_MEANS: frozenset[Any] = frozenset({F.cross_entropy, nn.CrossEntropyLoss})


def _unreduced(module: nn.Module, output: Any, target: Any) -> Tensor:
    """What a criterion returns with ``reduction="none"``; set and put back under torch.compile, which traces no copies."""
    if not torch.compiler.is_compiling():
        original = getattr(module, "_orig_mod", module)  # torch.compile's wrapper hands its attributes on to it
        unreduced = copy.copy(original)  # shares parameters and buffers, leaves the user's module alone
        setattr(unreduced, "reduction", "none")  # modules declare no attributes
        return cast(Tensor, unreduced(output, target))
    reduction = getattr(module, "reduction")
    setattr(module, "reduction", "none")
    try:
        return cast(Tensor, module(output, target))
    finally:
        setattr(module, "reduction", reduction)


@dataclass(frozen=True)
class Scalar:
    """f as a function of the model's output alone, the target being known.

    Attributes:
        source: the user's function behind it.
        function: (output, target) → (B,).
        target: what it is given.
    """

    source: Callable[..., Tensor]
    function: Callable[[Any, Any], Tensor]
    target: Any

    def is_cross_entropy(self) -> bool:
        """Whether f_i is F.cross_entropy of one class a sample, without weights or smoothing."""
        criterion, target = getattr(self.function, "__self__", None), self.target
        return (
            isinstance(criterion, Criterion)
            and criterion._is_plain_cross_entropy
            and isinstance(target, Tensor)
            and target.dtype == torch.int64
            and target.dim() == 1
        )

    def is_cross_entropy_at(self, output: Tensor) -> bool:
        """Whether it is, and the output has one row of scores for every target."""
        return self.is_cross_entropy() and output.dim() == 2 and 0 < output.shape[0] == self.target.shape[0]

    def __call__(self, output: Any) -> Tensor:
        """f of shape (B,)."""
        return self.function(output, self.target)


def as_criterion(criterion: Callable[..., Tensor] | Criterion) -> Criterion:
    """Find out how a criterion is asked for one value per sample.

    A module or function with a ``reduction`` argument is asked for ``"none"``; any other callable has to return one
    value per sample by itself.

    Raises:
        TypeError: if `criterion` is not callable.
        ValueError: if it has a reduction of another name than torch's, which could be anything.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if not callable(criterion):
        raise TypeError(f"expected a callable criterion such as F.cross_entropy, got {criterion!r}")
    if isinstance(criterion, type):
        raise TypeError(f"expected a criterion, got the class {criterion.__name__}: make one, {criterion.__name__}()")
    reduction = _reduction_of(criterion)
    if reduction not in (None, "none", "mean", *_SUMMED):
        raise ValueError(
            f'expected the reduction of {_name(criterion)} to be "none", "mean", "sum" or "batchmean", got {reduction!r}: '
            "gradpen has to know what f_i of a single sample is. Give a callable that returns one value per sample"
        )
    return Criterion(criterion, reduction)


def scalar_per_sample(function: Callable[..., Tensor], output: Any, target: Any) -> Tensor:
    """Call `function`, which must return one value per sample, and see that it does: (B,)."""
    _checks.check_batch_sizes(output, target)
    values = function(output, target)
    batch_size = output.shape[0] if isinstance(output, Tensor) else None
    if not isinstance(values, Tensor) or values.dim() != 1 or batch_size not in (None, values.shape[0]):
        came = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"expected {_name(function)} to return one scalar per sample, shape ({batch_size or 'B'},), got {came}: "
            "penalties need the value of every sample. Give a criterion with a `reduction` argument "
            '(F.cross_entropy, nn.MSELoss(), …), which is asked for "none", or a callable that does not reduce over '
            "the batch"
        )
    return values


def _are_same(one: Any, other: Any) -> bool:
    """Whether they are one object; to torch.compile a partial that is read from two places is two, of the same parts."""
    if type(one) is not partial or type(other) is not partial:
        return one is other
    pairs = [(one.func, other.func), *zip(one.args, other.args, strict=False)]
    pairs += [(value, other.keywords.get(name)) for name, value in one.keywords.items()]
    return (
        len(one.args) == len(other.args)
        and one.keywords.keys() == other.keywords.keys()
        and all(_are_same(a, b) for a, b in pairs)
    )


def _reduction_of(criterion: Callable[..., Tensor]) -> str | None:
    """The value of a module's attribute or of a function's argument ``reduction``; None if it has none."""
    if isinstance(criterion, nn.Module):
        reduction = getattr(criterion, "reduction", None)
        return reduction if isinstance(reduction, str) else None
    try:
        parameter = inspect.signature(criterion).parameters.get("reduction")
    except (TypeError, ValueError):  # a builtin without a signature has no reduction to ask for
        return None
    if parameter is None:
        return None
    return parameter.default if isinstance(parameter.default, str) else "mean"


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
