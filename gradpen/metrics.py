"""Torchmetrics: what gradpen measures, accumulated over batches and processes.

Every metric of samples is a pair of pure functions, ``_…_update`` (batch → sum and number) and ``_…_compute`` (sum
and number → mean), in a shell that keeps the states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from gradpen import _checks
from gradpen.criteria import as_criterion
from gradpen.evaluation import evaluate_terms
from gradpen.functional import param_grad_sq_norm
from gradpen.inequality import evaluate_inequality
from gradpen.isolation import outside_inference, untouched
from gradpen.layer_norms import NORMS
from gradpen.terms import InputTerm

__all__ = ["GeneralizationGap", "GeometricComplexity", "InequalityTightness", "ParamGradSqNorm"]

SPLITS = ("train", "held_out")
_APART = "apart"  # name of a state that says nothing


class _SampleMean(Metric):
    """Mean over samples of a quantity that has one value per sample, NaN where it is undefined."""

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    plot_lower_bound = 0.0

    num_samples: Tensor

    def __init__(self, quantity: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sum_name = f"sum_{quantity}"
        self.add_state(self._sum_name, torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("num_samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # A MetricCollection takes metrics for one, for good, whose states agree after the first batch, such as those of two
        # norms on a network that starts from a head of zeros; NaN equals nothing
        self.add_state(_APART, torch.tensor(torch.nan), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Mean over the samples seen so far; NaN if there is none."""
        return _sample_mean_compute(getattr(self, self._sum_name), self.num_samples)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or a list of them."""
        return self._plot(val, ax)

    def persistent(self, mode: bool = False) -> None:
        """Whether what was seen is part of ``state_dict``."""
        super().persistent(mode)
        self._persistent[_APART] = False

    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Convert the states; a criterion's weights keep the type of the models that it goes with."""
        criterion = self._modules.pop("criterion", None)
        try:
            return super().set_dtype(dst_type)
        finally:
            if criterion is not None:
                self._modules["criterion"] = criterion

    def _add(self, batch_sum: Tensor, batch_samples: Tensor) -> None:
        before = getattr(self, self._sum_name)
        setattr(self, self._sum_name, before + batch_sum.to(before))
        self.num_samples = self.num_samples + batch_samples.to(self.num_samples)


class GeometricComplexity(_SampleMean):
    r"""Mean squared Frobenius norm of the Jacobian of the outputs: the Dirichlet energy of the network on the data.

    .. math:: \frac1N \sum_i \|\nabla_x F(x_i)\|_F^2

    ``update(model, x)`` takes a module and inputs of shape (B, …) and leaves the module without a trace.

    Args:
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        RuntimeError: in ``update``, as `gradpen.functional.input_grad_sq_norm`.

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

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("jacobian_sq_norm", **kwargs)

    def update(self, model: nn.Module, x: Any, y: Any = None) -> None:
        """Add the samples of one batch; y is not looked at, but a MetricCollection passes it."""
        self._add(*_geometric_complexity_update(model, x))


class ParamGradSqNorm(_SampleMean):
    r"""Mean over samples of the squared norm of the parameter gradient.

    .. math:: \frac1N \sum_i \|\nabla_\theta f_i\|^2

    ``update(model, x, y)`` takes a module, inputs and targets of shape (B, …) and leaves the module without a trace.

    Args:
        criterion: gives f_i, as in `gradpen.functional.param_grad_sq_norm`.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        RuntimeError: in ``update``, as `gradpen.functional.param_grad_sq_norm`.

    Example:
        >>> import torch
        >>> from gradpen.metrics import ParamGradSqNorm
        >>> metric = ParamGradSqNorm()
        >>> metric.update(torch.nn.Linear(4, 3), torch.randn(5, 4), torch.randint(3, (5,)))
        >>> bool(metric.compute() > 0)
        True
    """

    def __init__(self, criterion: Callable[..., Tensor] = F.cross_entropy, **kwargs: Any) -> None:
        super().__init__("param_grad_sq_norm", **kwargs)
        self.criterion = criterion

    def update(self, model: nn.Module, x: Any, y: Any) -> None:
        """Add the samples of one batch."""
        self._add(*_param_grad_sq_norm_update(model, x, y, self.criterion))


class InequalityTightness(_SampleMean):
    r"""Mean over samples of left side / right side of the inequality, in [0, 1]; samples with 0/0 are left out.

    .. math:: \frac1N \sum_i \frac{\|\nabla_x f_i\|^2 \sum_t (1+\|h_t\|^2)/(\|W_t\|^2\|J_t\|^2)}{\|\nabla_\theta f_i\|^2}

    ``update(model, x, y)`` takes a module, inputs and targets of shape (B, …) and leaves the module without a trace.

    Args:
        criterion: gives f_i, as in `gradpen.evaluate_inequality`.
        norm: "spectral", "frobenius" or "joint".
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: on an unknown norm, and in ``update`` as `gradpen.evaluate_inequality`.

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
        super().__init__("tightness", **kwargs)
        _checks.check_choice("norm", norm, NORMS)
        self.criterion = criterion
        self.norm = norm

    def update(self, model: nn.Module, x: Any, y: Any) -> None:
        """Add the samples of one batch."""
        self._add(*_inequality_tightness_update(model, x, y, self.criterion, self.norm))


class GeneralizationGap(WrapperMetric):
    """A metric on the training data minus the same metric on held-out data.

    Each of the two keeps its own states, synchronises them over processes and takes its own options
    (``dist_sync_on_step``, ``process_group`` …), which are those of the metric given.

    ``forward`` accumulates like ``update`` and returns the gap between the latest batches of the two splits, NaN until
    both have been seen; ``compute`` is NaN on a process that has not seen both.

    Args:
        metric: any torchmetrics metric whose value is a tensor; it is cloned twice.

    Raises:
        TypeError: if `metric` is not a ``torchmetrics.Metric``, or its value is not a tensor.

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

    # No state of its own: a MetricCollection would take two gaps for one as long as they have seen as many batches.

    is_differentiable = False
    full_state_update = False

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        if not isinstance(metric, Metric):
            raise TypeError(f"expected a torchmetrics Metric, got {type(metric).__name__}")
        self.train_metric = metric.clone()
        self.held_out_metric = metric.clone()
        self._seen: set[str] = set()
        self._is_saved = False
        self._latest: dict[str, Any] = {}  # value of the last batch by split

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """A smaller gap is better: the opposite of the metric, since of two losses the training loss is the smaller."""
        better = self.train_metric.higher_is_better
        return None if better is None else not better

    def update(self, *args: Any, split: str | None = None, **kwargs: Any) -> None:
        """Add one batch of the training or of the held-out data: ``split="train"`` or ``"held_out"``.

        Args:
            *args: what the metric takes, such as predictions and targets; the last one is `split` if that is not named.
            split: which data the batch is of.
            **kwargs: what the metric takes by name.
        """
        args, split = _split_of(args, split)
        metric = self._metric_of(split)
        metric.update(*args, **metric._filter_kwargs(**kwargs))
        self._seen.add(split)

    def compute(self) -> Tensor:
        """Training value − held-out value; NaN on a process that has not seen both."""
        seen = self._seen == set(SPLITS)
        if not seen and not torch.distributed.is_initialized():  # the other processes wait for this one to synchronise
            return torch.tensor(torch.nan, device=self.device)
        gap = _generalization_gap_compute(*[metric.compute() for metric in self._metrics])
        return gap if seen else torch.full_like(gap, torch.nan)

    def forward(self, *args: Any, split: str | None = None, **kwargs: Any) -> Tensor:
        """Add one batch, as `update` does, and the gap between the latest batches of the two splits."""
        args, split = _split_of(args, split)
        metric = self._metric_of(split)
        value = metric(*args, **metric._filter_kwargs(**kwargs))
        self._seen.add(split)
        self._latest[split] = value
        gap = _generalization_gap_compute(*[self._latest.get(name, value * torch.nan) for name in SPLITS])
        self._forward_cache = gap  # type: ignore[assignment]  # where Lightning finds the value of a step
        return gap

    def reset(self) -> None:
        """Forget both."""
        super().reset()
        self._seen, self._latest = set(), {}
        for metric in self._metrics:
            metric.reset()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another gap has seen.

        Raises:
            TypeError: if it is not a `GeneralizationGap`: the states of two metrics do not fit into one dict.
        """
        if not isinstance(incoming_state, GeneralizationGap):
            raise TypeError(f"expected a GeneralizationGap to merge, got {type(incoming_state).__name__}")
        for metric, other in zip(self._metrics, incoming_state._metrics, strict=True):
            metric.merge_state(other)
        self._seen |= incoming_state._seen

    def persistent(self, mode: bool = False) -> None:
        """Whether the states of both are part of ``state_dict``."""
        self._is_saved = mode
        for metric in self._metrics:
            metric.persistent(mode)

    def state_dict(  # type: ignore[override]  # torch's older signature
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The states of both, if they are persistent, and which of them have seen anything."""
        found: dict[str, Any] = super().state_dict(destination, prefix, keep_vars)
        if self._is_saved:
            found[prefix + "seen"] = torch.tensor([split in self._seen for split in SPLITS])
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        seen = state_dict.pop(prefix + "seen", None)
        if seen is not None:
            self._seen = {split for split, is_seen in zip(SPLITS, seen.tolist(), strict=True) if is_seen}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def set_dtype(self, dst_type: str | torch.dtype) -> GeneralizationGap:
        """Convert the states of both."""
        for metric in self._metrics:
            metric.set_dtype(dst_type)
        return self

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or a list of them."""
        return self._plot(val, ax)

    @property
    def _metrics(self) -> list[Metric]:
        return [self._metric_of(split) for split in SPLITS]

    def _metric_of(self, split: str) -> Metric:
        _checks.check_choice("split", split, SPLITS)
        return self.train_metric if split == "train" else self.held_out_metric


def _split_of(args: tuple[Any, ...], split: str | None) -> tuple[tuple[Any, ...], str]:
    if split is None:
        if not args or not isinstance(args[-1], str):
            raise TypeError(f"expected split= to be one of {', '.join(map(repr, SPLITS))}, got none")
        args, split = args[:-1], args[-1]
    return args, split


def _geometric_complexity_update(model: nn.Module, x: Any) -> tuple[Tensor, Tensor]:
    """Sum of ‖∇_x F(x_i)‖_F² over a batch, and B."""
    _checks.check_model(model)
    asked = [(InputTerm(of="output"), as_criterion(F.cross_entropy))]  # the criterion is not looked at
    with untouched(model):
        found = evaluate_terms(model, outside_inference(x), None, asked, create_graph=False)
    output = found.output.detach()
    is_number = output.isfinite().reshape(len(output), -1).all(1)  # the gradient of a NaN may be a number
    values = found.norms[0].sq_norms.where(is_number, torch.nan)
    return values.sum(), torch.tensor(len(values), device=values.device)


def _param_grad_sq_norm_update(
    model: nn.Module, x: Any, y: Any, criterion: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Sum of ‖∇_θ f_i‖² over a batch, and B."""
    _checks.check_model(model)
    with untouched(model):
        x, y = outside_inference(x), outside_inference(y)
        values = param_grad_sq_norm(model, x, y, criterion=criterion, create_graph=False)
    return values.sum(), torch.tensor(len(values), device=values.device)


def _inequality_tightness_update(
    model: nn.Module, x: Any, y: Any, criterion: Callable[..., Tensor], norm: str
) -> tuple[Tensor, Tensor]:
    """Sum of the tightness of a batch's samples where it is defined, and their number."""
    values = evaluate_inequality(model, x, y, criterion=criterion, norm=norm, slack=False).tightness.detach()
    return values.nansum(), (~values.isnan()).sum()


def _sample_mean_compute(total: Tensor, num_samples: Tensor) -> Tensor:
    """Mean from a sum and a number; NaN for none."""
    return total / num_samples


def _generalization_gap_compute(train: Any, held_out: Any) -> Tensor:
    """Training value − held-out value."""
    if not (isinstance(train, Tensor) and isinstance(held_out, Tensor)):
        raise TypeError(
            f"expected a metric whose value is a tensor, got {type(train).__name__}: take one GeneralizationGap for each "
            "of the values, in a MetricCollection"
        )
    return train - held_out
