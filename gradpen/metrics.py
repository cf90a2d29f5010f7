"""Torchmetrics: what gradpen measures, accumulated over batches and processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from gradpen import _checks
from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm
from gradpen.inequality import evaluate_inequality
from gradpen.isolation import untouched

__all__ = ["GeneralizationGap", "GeometricComplexity", "InequalityTightness", "ParamGradSqNorm"]


class _SampleMean(Metric):
    """Mean over samples of a value that has one entry per sample, NaN where it is undefined."""

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Mean over the samples seen so far; NaN if there is none."""
        return _mean_compute(self.total, self.count)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or a list of them."""
        return self._plot(val, ax)

    def _accumulate(self, values: Tensor) -> None:
        total, count = _mean_update(values)
        self.total = self.total + total.to(self.total)
        self.count = self.count + count


class GeometricComplexity(_SampleMean):
    r"""Mean squared Frobenius norm of the Jacobian of the outputs: the Dirichlet energy of the network on the data.

    .. math:: \frac1N \sum_i \|\nabla_x F(x_i)\|_F^2

    ``update(model, x)`` takes a module and inputs of shape (B, …) and leaves the module without a trace.

    Example:
        >>> import torch
        >>> from gradpen.metrics import GeometricComplexity
        >>> model = torch.nn.Linear(4, 3)
        >>> metric = GeometricComplexity()
        >>> metric.update(model, torch.randn(5, 4))
        >>> torch.allclose(metric.compute(), model.weight.square().sum())
        True

    Source:
        Dherin, Munn, Rosca and Barrett, "Why neural networks find simple solutions: the many regularizers of geometric
        complexity" (2022, arXiv 2209.13083).
    """

    def update(self, model: nn.Module, x: Any) -> None:
        """Add the samples of one batch."""
        with untouched(model):
            self._accumulate(input_grad_sq_norm(model, x, of="output").detach())


class ParamGradSqNorm(_SampleMean):
    r"""Mean over samples of the squared norm of the parameter gradient.

    .. math:: \frac1N \sum_i \|\nabla_\theta f_i\|^2

    ``update(model, x, y)`` takes a module, inputs and targets of shape (B, …) and leaves the module without a trace.

    Args:
        criterion: gives f_i, as in `gradpen.functional.param_grad_sq_norm`.
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from gradpen.metrics import ParamGradSqNorm
        >>> metric = ParamGradSqNorm()
        >>> metric.update(torch.nn.Linear(4, 3), torch.randn(5, 4), torch.randint(3, (5,)))
        >>> bool(metric.compute() > 0)
        True
    """

    def __init__(self, criterion: Callable[..., Tensor] = F.cross_entropy, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.criterion = criterion

    def update(self, model: nn.Module, x: Any, y: Any) -> None:
        """Add the samples of one batch."""
        with untouched(model):
            self._accumulate(param_grad_sq_norm(model, x, y, criterion=self.criterion).detach())


class InequalityTightness(_SampleMean):
    r"""Mean over samples of left side / right side of the inequality, in [0, 1]; samples with 0/0 are left out.

    .. math:: \frac1N \sum_i \frac{\|\nabla_x f_i\|^2 \sum_t (1+\|h_t\|^2)/(\|W_t\|^2\|J_t\|^2)}{\|\nabla_\theta f_i\|^2}

    ``update(model, x, y)`` takes a module, inputs and targets of shape (B, …) and leaves the module without a trace.

    Args:
        criterion: gives f_i, as in `gradpen.evaluate_inequality`.
        norm: "spectral", "frobenius" or "joint".
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from gradpen.metrics import InequalityTightness
        >>> metric = InequalityTightness()
        >>> metric.update(torch.nn.Linear(4, 3), torch.randn(5, 4), torch.randint(3, (5,)))
        >>> 0 < float(metric.compute()) <= 1
        True
    """

    plot_upper_bound = 1.0

    def __init__(
        self, criterion: Callable[..., Tensor] = F.cross_entropy, norm: str = "spectral", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.criterion = criterion
        self.norm = norm

    def update(self, model: nn.Module, x: Any, y: Any) -> None:
        """Add the samples of one batch."""
        report = evaluate_inequality(model, x, y, criterion=self.criterion, norm=self.norm, slack=False)
        self._accumulate(report.tightness)


class GeneralizationGap(Metric):
    """A metric on the training data minus the same metric on held-out data.

    Args:
        metric: any torchmetrics metric; it is cloned twice.
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> from gradpen.metrics import GeneralizationGap
        >>> gap = GeneralizationGap(MulticlassAccuracy(num_classes=2, average="micro"))
        >>> gap.update(torch.tensor([0, 1]), torch.tensor([0, 1]), split="train")
        >>> gap.update(torch.tensor([0, 1]), torch.tensor([1, 1]), split="held_out")
        >>> gap.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, metric: Metric, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(metric, Metric):
            raise TypeError(f"expected a torchmetrics Metric, got {type(metric).__name__}")
        self.train_metric = metric.clone()
        self.held_out_metric = metric.clone()

    def update(self, preds: Tensor, target: Tensor, split: str) -> None:
        """Add one batch of the training or of the held-out data: ``split="train"`` or ``"held_out"``."""
        _checks.check_choice("split", split, ("train", "held_out"))
        (self.train_metric if split == "train" else self.held_out_metric).update(preds, target)

    def compute(self) -> Tensor:
        """Training value − held-out value."""
        return self.train_metric.compute() - self.held_out_metric.compute()

    def reset(self) -> None:
        """Forget both."""
        super().reset()
        self.train_metric.reset()
        self.held_out_metric.reset()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or a list of them."""
        return self._plot(val, ax)


def _mean_update(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the entries that are defined."""
    return values.nansum(), (~values.isnan()).sum()


def _mean_compute(total: Tensor, count: Tensor) -> Tensor:
    """Mean from a sum and a number; NaN for none."""
    return total / count
