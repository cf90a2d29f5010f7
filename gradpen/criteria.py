"""From a criterion to f: one scalar a sample."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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

    @property
    def sums_samples(self) -> bool:
        """Whether the data loss is known to be a multiple of Σ_i f_i, so that one gradient gives the other."""
        if self.reduction in (None, "none"):
            return True
        function = self.source.func if isinstance(self.source, partial) else self.source
        return self.reduction in ("mean", "sum") and (function in _SUMS or type(function) in _SUMS)

    def data_loss(self, output: Any, target: Any) -> Tensor:
        """The loss one trains on, 0-dim: exactly ``source(output, target)`` wherever that is a scalar."""
        _checks.check_batch_sizes(output, target)
        if self.reduction in (None, "none"):
            return self.per_sample(output, target).mean()
        return self.source(output, target)

    def per_sample(self, output: Any, target: Any) -> Tensor:
        """f of shape (B,): a "none" result (B, …) averaged, or for "sum" summed, over everything but the batch."""
        if self.reduction is None:
            return scalar_per_sample(self.source, output, target)
        _checks.check_batch_sizes(output, target)
        if isinstance(self.source, nn.Module):
            unreduced = copy.copy(self.source)  # shares parameters and buffers, leaves the user's module alone
            setattr(unreduced, "reduction", "none")  # modules declare no attributes
            values = unreduced(output, target)
        else:
            values = self.source(output, target, reduction="none")
        if values.dim() == 0 or (isinstance(output, Tensor) and values.shape[0] != output.shape[0]):
            raise ValueError(
                f'expected one row per sample from {_name(self.source)} with reduction="none", got shape '
                f"{tuple(values.shape)}"
            )
        rows = values.reshape(values.shape[0], -1)
        return rows.sum(1) if self.reduction == "sum" else rows.mean(1)


# What torch documents as Σ_i f_i over a number. Not so the CTC loss: its mean divides each f_i by another length.
_SUMS = frozenset(
    {
        *(F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
        *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits),
        *(nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss),
        *(nn.BCELoss, nn.BCEWithLogitsLoss),
    }
)


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

    def __call__(self, output: Any) -> Tensor:
        """f of shape (B,)."""
        return self.function(output, self.target)


def as_criterion(criterion: Callable[..., Tensor] | Criterion) -> Criterion:
    """Find out how a criterion is asked for one value per sample.

    A module or function with a ``reduction`` argument is asked for ``"none"``; any other callable has to return one
    value per sample by itself.

    Raises:
        TypeError: if `criterion` is not callable.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if not callable(criterion):
        raise TypeError(f"expected a callable criterion such as F.cross_entropy, got {criterion!r}")
    if isinstance(criterion, nn.Module):
        reduction = getattr(criterion, "reduction", None)
        return Criterion(criterion, reduction if isinstance(reduction, str) else None)
    try:
        parameter = inspect.signature(criterion).parameters.get("reduction")
    except (TypeError, ValueError):  # a builtin without a signature has no reduction to ask for
        parameter = None
    if parameter is None:
        return Criterion(criterion, None)
    return Criterion(criterion, parameter.default if isinstance(parameter.default, str) else "mean")


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


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
