"""The inequality, watched during training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from gradpen import _checks
from gradpen.callbacks import _shards
from gradpen.callbacks._announcement import Cost, announcement, describe_part, function_name
from gradpen.callbacks._batch import INTEGER_TARGETS, Getter, find_criterion, find_model, split_batch
from gradpen.callbacks._lightning import Callback
from gradpen.callbacks._probe import VALIDATION_SET, draw_probe, fingerprint, probe_loader
from gradpen.callbacks._schedule import Schedule
from gradpen.history import BY_LAYER, Row, flat_metrics, report_rows, write_csv
from gradpen.inequality import NotFiniteError, check_options, evaluate_inequality
from gradpen.isolation import random_streams_kept, state_kept, untouched
from gradpen.plotting import plot_history
from gradpen.recording import tensors_of
from gradpen.report import InequalityReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_EVERY_N_STEPS = 500
_ECONOMY = {"every_n_epochs": 1, "num_samples": 32, "norm": "joint", "slack": False, "by_layer": "summary"}
_FULL = {"every_n_steps": 100, "num_samples": 256, "norm": "spectral", "slack": True, "rtol": 0.02, "by_layer": "all"}
_SCHEDULES = ("every_n_steps", "every_n_epochs", "at")


class InequalityMonitor(Callback):
    r"""Logs both sides of the inequality on a fixed probe batch during training.

    .. math:: \|\nabla_x f\|^2 \sum_t \frac{1 + \|h_t\|^2}{\|W_t\|^2 \|J_t\|^2} \le \|\nabla_\theta f\|^2

    Checks happen before the first step, on schedule, and at the end of training. The network is looked at in eval
    mode and left without a trace: a run with the monitor equals the run without it, bit for bit. Under data-parallel
    strategies the processes share the samples of the probe out among them, and the first one logs.

    Logged through the trainer's loggers are ``bound/lhs``, ``bound/rhs``, ``bound/tightness`` (also ``_min`` and
    ``_max``), ``bound/violations``, ``bound/undefined``, ``bound/input_grad_sq_norm``, ``bound/param_grad_sq_norm``,
    ``bound/batch_grad_sq_norm``, ``bound/noise_trace`` and, for every layer, ``bound/<layer>/coefficient``,
    ``…/tightness``, ``…/weight_tightness``, ``…/bias_tightness``, ``…/input_norm`` (mean ‖h‖), ``…/weight_norm``,
    ``…/jacobian_norm`` (mean ‖J‖; with ``norm="joint"`` ``…/product_norm``, mean ‖W J‖, in place of these two) and, with
    ``slack=True``, all three norms, ``…/slack_product`` and ``…/slack_alignment``.

    `economy`, `business` and `full` are monitors of three costs; `business` is the default.

    Args:
        every_n_steps: check every so many optimiser steps; default 500 if no other schedule is given.
        every_n_epochs: check at the end of every so many epochs.
        at: the optimiser steps at which to check, or a callable step → bool.
        num_samples: size of the probe.
        probe: "val" (drawn from the validation set, or the training set if there is none), "train", a pair (x, y), or a
            dict such as the data loaders give.
        seed: of the probe's draw, and of what is random in its samples.
        inputs: which part of a batch is x: key, index or callable; found if the batch is (x, y) or an ordinary dict.
        targets: which part of a batch is y.
        model: which part of the LightningModule maps x to the output: name, callable or module; default the module itself
            if it defines ``forward``, else its only child with parameters.
        criterion: gives f_i: callable, or name of an attribute; default the module's ``criterion`` or ``loss_fn``,
            else cross entropy for integer targets and the mean squared error for floating-point ones.
        of: as in `gradpen.evaluate_inequality`, like the next four.
        norm: "spectral", "frobenius" or "joint".
        slack: split each layer's slack into its two factors; half as dear again.
        delta: failure probability of one check's upper ends.
        rtol: relative width of the norms' brackets.
        by_layer: which values of single layers are kept and logged: "all", "summary" (tightness and coefficient) or
            "none".
        on_violation: "warn", "raise" or "ignore"; judged from the certified end of the brackets.
        prefix: of the logged names, and what tells several monitors of one run apart.

    Attributes:
        history: tidy rows (dicts), one per check and layer; layer "all" is the network.
        report: the last `InequalityReport`.

    Raises:
        ValueError: on an unknown option, or at the start of training if the parts cannot be found.
        RuntimeError: on a violation with ``on_violation="raise"``, or under a strategy that shards parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from gradpen.callbacks import InequalityMonitor
        >>> trainer = Trainer(callbacks=[InequalityMonitor(every_n_steps=200)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        every_n_epochs: int | None = None,
        at: Iterable[int] | Callable[[int], bool] | None = None,
        num_samples: int = 64,
        probe: str | tuple[Any, Any] | Mapping[str, Any] = "val",
        seed: int = 0,
        inputs: Getter = None,
        targets: Getter = None,
        model: str | Callable[[nn.Module], nn.Module] | nn.Module | None = None,
        criterion: str | Callable[..., Any] | None = None,  # YAML can name a class for Any, not for Tensor
        of: str | Callable[[Any, Any], Tensor] = "loss",
        norm: str = "spectral",
        slack: bool = False,
        delta: float = 1e-6,
        rtol: float = 0.05,
        by_layer: str = "all",
        on_violation: str = "warn",
        prefix: str = "bound",
    ) -> None:
        super().__init__()
        if every_n_steps is None and every_n_epochs is None and at is None:
            every_n_steps = DEFAULT_EVERY_N_STEPS
        self.schedule = Schedule(every_n_steps, every_n_epochs, at)
        _checks.check_positive_int("num_samples", num_samples)
        check_options(of, norm, delta, rtol)
        _checks.check_choice("by_layer", by_layer, BY_LAYER)
        _checks.check_choice("on_violation", on_violation, ("warn", "raise", "ignore"))
        _check_probe(probe)
        self.num_samples = num_samples
        self.probe = probe
        self.seed = seed
        self.inputs = inputs
        self.targets = targets
        self.model = model
        self.criterion = criterion
        self.by_layer = by_layer
        self.on_violation = on_violation
        self.prefix = prefix
        self.history: list[Row] = []
        self.report: InequalityReport | None = None
        self._settings: dict[str, Any] = {
            "of": of,
            "norm": norm,
            "slack": slack,
            "delta": delta,
            "rtol": rtol,
        }
        self._drawn: tuple[Any, Any] | None = None
        self._drawn_from = ""
        self._fingerprint: str | None = None
        self._trained = False  # the history is that of training
        self._unscheduled_step: int | None = None
        self._seen_step = 0
        self._epoch = 0  # that the last batch belonged to
        self._stage: str | None = None
        self._cost: Cost | None = None

    @classmethod
    def economy(cls, **changes: Any) -> InequalityMonitor:
        """One check an epoch on 32 samples, joint norms, tightness and coefficients by layer.

        Args:
            **changes: arguments of the constructor; a schedule takes the place of the preset's.

        Example:
            >>> from gradpen.callbacks import InequalityMonitor
            >>> print(InequalityMonitor.economy().schedule)
            every epoch, before the first step and at the end
        """
        return cls(**_changed(_ECONOMY, changes))

    @classmethod
    def business(cls, **changes: Any) -> InequalityMonitor:
        """The default: every 500 steps on 64 samples, spectral norms, all of every layer but the factors of its slack.

        Args:
            **changes: arguments of the constructor.

        Example:
            >>> from gradpen.callbacks import InequalityMonitor
            >>> print(InequalityMonitor.business(at=[10, 100]).schedule)
            the steps 10, 100, before the first step and at the end
        """
        return cls(**changes)

    @classmethod
    def full(cls, **changes: Any) -> InequalityMonitor:
        """Every 100 steps on 256 samples, spectral norms in narrower brackets, and both factors of every layer's slack.

        Args:
            **changes: arguments of the constructor; a schedule takes the place of the preset's.

        Example:
            >>> from gradpen.callbacks import InequalityMonitor
            >>> InequalityMonitor.full(every_n_epochs=1).num_samples
            256
        """
        return cls(**_changed(_FULL, changes))

    @property
    def state_key(self) -> str:
        """Several monitors of one run are told apart by their prefixes."""
        return self._generate_state_key(prefix=self.prefix)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies under which a process does not hold the whole model."""
        self._stage = stage
        strategy = type(trainer.strategy).__name__
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise _shards.sharded_error(strategy)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first check, before the first step; on a resumed run it is only measured, and kept if it is due."""
        self._forget_unscheduled()
        self._drawn = None
        step = trainer.global_step
        if step == 0:
            self.history = []  # the earlier run's may be in somebody's hands
            self._fingerprint = None
        self._trained, self._seen_step, self._epoch = True, step, trainer.current_epoch
        evaluated = self._evaluate(trainer, pl_module)
        self._compare_with_earlier(fingerprint(self._drawn))
        if evaluated is None:
            return
        report, seconds = evaluated
        self._cost = Cost(trainer, self.schedule, seconds)
        rank_zero_info(self._announcement(pl_module, report, self._cost))
        missed = self.schedule.names_any(range(step, step + 1)) and not self._has_checked(step)
        if not self.history or missed:
            self._keep(trainer, report)
        else:
            self._tell_callbacks(trainer, flat_metrics(self._rows(trainer, report), self.prefix))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check if the schedule names an optimiser step of this batch, or the epoch that it ends.

        The end of an epoch is seen here, and not in ``on_train_epoch_end``: validation may write a checkpoint before that.
        """
        new_steps = range(self._seen_step + 1, trainer.global_step + 1)  # none while gradients accumulate
        self._seen_step, self._epoch = trainer.global_step, trainer.current_epoch
        ends_epoch = trainer.is_last_batch and self.schedule.names_epoch(trainer.current_epoch)
        if self.schedule.names_any(new_steps) or ends_epoch:
            self._check(trainer, pl_module)
        share = None if self._cost is None else self._cost.share_line(trainer.global_step)
        if share is not None:
            rank_zero_info(share)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check if the schedule names this epoch and its last batch was not known as such."""
        if self.schedule.names_epoch(trainer.current_epoch):
            self._check(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last check, so that the trained network is on the curve whatever the schedule."""
        if self._check(trainer, pl_module):
            self._unscheduled_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``trainer.validate()``: one check."""
        if trainer.state.fn == "validate":
            self._check_outside_training(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``trainer.test()``: one check of a monitor that has not been through training."""
        if not self._trained:
            self._check_outside_training(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The history, so that a resumed run goes on with it, and what its probe is known by."""
        return {
            "history": [dict(row) for row in self.history],
            "unscheduled_step": self._unscheduled_step,
            "probe": self._fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the history back; not if that of a training is there and a checkpoint is only validated or tested."""
        if self._trained and self._stage not in (None, "fit"):
            return
        self.history = [dict(row) for row in state_dict["history"]]
        self._unscheduled_step = state_dict["unscheduled_step"]
        self._fingerprint = state_dict["probe"]
        self._trained = True

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the history as a table, one row per check and layer."""
        write_csv(self.history, path)

    def plot(self, title: str | None = None) -> Figure:
        """One figure: both sides over training, tightness by layer, coefficients relative to the first check."""
        return plot_history(self.history, title)

    def _has_checked(self, step: int) -> bool:
        return any(row["step"] == step for row in reversed(self.history))

    def _forget_unscheduled(self) -> None:
        """A run that goes on after its end: its last check was no part of the schedule."""
        if self._unscheduled_step is not None:
            self.history = [row for row in self.history if row["step"] != self._unscheduled_step]
            self._unscheduled_step = None

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Evaluate and keep, unless that has been done after this step; whether there is a new check."""
        if self._has_checked(trainer.global_step):
            return False
        evaluated = self._evaluate(trainer, pl_module)
        if evaluated is None:
            return False
        report, seconds = evaluated
        if self._cost is not None:
            self._cost.add_check(seconds)
        self._keep(trainer, report)
        return True

    def _check_outside_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and report; a history of training stays what it is."""
        self._drawn = None
        evaluated = self._evaluate(trainer, pl_module)
        if evaluated is None:
            return
        report, _ = evaluated
        rows = self._rows(trainer, report)
        if not self._trained:
            self.history = rows
        self._publish(trainer, report, rows)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> tuple[InequalityReport, float] | None:
        """The report, and the seconds that it took; None, and a warning, if the network has diverged."""
        try:
            return self._evaluate_finite(trainer, pl_module)
        except NotFiniteError as error:  # a run that diverges is no reason to end it
            rank_zero_warn(f"no check of the inequality after step {trainer.global_step}: {error}")
            return None

    def _evaluate_finite(self, trainer: Trainer, pl_module: LightningModule) -> tuple[InequalityReport, float]:
        _shards.refuse_sharded(pl_module)
        with trainer.precision_plugin.forward_context(), untouched(pl_module), ExitStack() as stack:
            x, y = self._probe_of(trainer, pl_module)
            started = time.perf_counter()
            part = find_model(pl_module, self.model)
            stack.enter_context(state_kept(part))  # which need not lie within the module
            _in_eval_mode(pl_module, part)
            _without_records(pl_module)
            criterion, how = find_criterion(pl_module, self.criterion, y)
            if how == INTEGER_TARGETS:
                y = y.long()  # the one type that classes have everywhere
            evaluate: Callable[..., InequalityReport] = evaluate_inequality
            if _shards.num_processes() > 1:
                _shards.take_buffers_of_first_process(pl_module)
                evaluate = _shards.evaluate_shared
            try:
                report = evaluate(part, x, y, criterion=criterion, **self._settings)
            except NotFiniteError:
                raise
            except Exception as error:  # the input may be flattened in training_step, and much else
                rank_zero_info(_what_was_tried(pl_module, part, x))
                if not isinstance(error, IndexError) or how != INTEGER_TARGETS:
                    raise
                raise ValueError(
                    "expected integer targets to be classes with one output each, for which cross entropy was chosen, "
                    f"and it says: {error} Say what the loss is: criterion=…"
                ) from error
            float(report.lhs.sum())  # waits for the device
            return report, time.perf_counter() - started

    def _probe_of(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Any, Any]:
        """The probe on the module's device, the same throughout a run and after a resume."""
        if self._drawn is None:
            if isinstance(self.probe, str):
                loader, self._drawn_from = probe_loader(trainer, self.probe)
                batch = draw_probe(loader, self.num_samples, self.seed)
                with random_streams_kept(self.seed), _validating(trainer, pl_module, self._drawn_from):
                    batch = _as_for_a_step(trainer, pl_module, batch)
            else:
                self._drawn_from = "given"
                batch = move_data_to_device(trainer.precision_plugin.convert_input(self.probe), pl_module.device)
            # a pair is (x, y), whatever the loaders' batches look like
            pair = not isinstance(self.probe, (str, Mapping))
            self._drawn = tuple(batch) if pair else split_batch(batch, self.inputs, self.targets)
        return self._drawn

    def _compare_with_earlier(self, digest: str) -> None:
        """Say so if the run that is resumed looked at other samples."""
        if self._fingerprint not in (None, digest):
            rank_zero_warn(
                "the probe is not the one of the checks that the checkpoint brings along: the data set, its order or its "
                "transforms have changed, and so the curves have a seam here. Give the samples yourself, probe=(x, y), or "
                "go on without the old history"
            )
        self._fingerprint = digest

    def _rows(self, trainer: Trainer, report: InequalityReport) -> list[Row]:
        epoch = self._epoch if trainer.state.fn == "fit" else trainer.current_epoch  # which has moved on at the end
        return report_rows(report, step=trainer.global_step, epoch=epoch, by_layer=self.by_layer)

    def _keep(self, trainer: Trainer, report: InequalityReport) -> None:
        """Remember and publish one check."""
        rows = self._rows(trainer, report)
        self.history += rows
        self._publish(trainer, report, rows)

    def _publish(self, trainer: Trainer, report: InequalityReport, rows: list[Row]) -> None:
        """Log one check, and judge it."""
        self.report = report
        metrics = flat_metrics(rows, self.prefix)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, step=trainer.global_step)
        self._tell_callbacks(trainer, metrics)
        if report.violations and self.on_violation != "ignore":
            message = (
                f"the inequality does not hold for {report.violations} of {report.lhs.numel()} samples at step "
                f"{trainer.global_step}, beyond rounding and the norms' brackets: the model has a structure that the layer "
                f"test missed, or this is a bug in gradpen\n{report}"
            )
            if self.on_violation == "raise":
                raise RuntimeError(message)
            rank_zero_warn(message)

    def _tell_callbacks(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Put the latest check where checkpoints, early stopping and schedulers look for what they go by."""
        trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in metrics.items()})

    def _announcement(self, pl_module: LightningModule, report: InequalityReport, cost: Cost) -> str:
        """What was found, in one block."""
        y = None if self._drawn is None else self._drawn[1]
        criterion, how = find_criterion(pl_module, self.criterion, y)
        scalar = f"loss: {function_name(criterion)} ({how})" if report.of == "loss" else report.of
        drawn = self._drawn_from if self._drawn_from == "given" else f"of the {self._drawn_from}, seed {self.seed}"
        processes = _shards.num_processes()
        shared = f", shared by {processes} processes" if processes > 1 else ""
        return announcement(
            part=describe_part(pl_module, find_model(pl_module, self.model)),
            scalar=scalar,
            probe=f"{report.lhs.numel()} samples, {drawn}{shared}",
            schedule=self.schedule,
            cost=cost,
            report=report,
        )


def _check_probe(probe: Any) -> None:
    if isinstance(probe, str):
        _checks.check_choice("probe", probe, ("val", "train"))
    elif not isinstance(probe, Mapping) and not (isinstance(probe, (tuple, list)) and len(probe) == 2):
        came = f"{len(probe)} items" if isinstance(probe, (tuple, list)) else type(probe).__name__
        raise ValueError(
            f'probe must be "val", "train", a pair (x, y), or a dict such as the data loaders give, got {came}'
        )


def _in_eval_mode(*modules: nn.Module) -> None:
    """By the flags alone: what a module of its own kind does in ``eval()``, it would not undo when the flag is put back."""
    for module in modules:
        for part in module.modules():
            part.training = False


def _what_was_tried(pl_module: LightningModule, part: nn.Module, x: Any) -> str:
    """Said beside an error, which may be torch's own."""
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(x))
    return (
        f"InequalityMonitor: the check that failed called {describe_part(pl_module, part)} with an input of shape {shapes}. "
        "If training_step does something else, say so with model=, inputs=, targets= and criterion="
    )


def _without_records(pl_module: LightningModule) -> None:
    """What ``forward`` logs, and the metrics that it feeds, know nothing of a check. All this is put back after it."""
    vars(pl_module)["log"] = _ignored  # which log_dict calls, too
    for metric in (module for module in pl_module.modules() if isinstance(module, Metric)):
        for name in metric._defaults:
            state = getattr(metric, name)
            setattr(metric, name, state.clone() if isinstance(state, Tensor) else list(state))


def _ignored(*_: Any, **__: Any) -> None:
    """Takes the place of a function that leaves a trace."""


@contextmanager
def _validating(trainer: Trainer, pl_module: LightningModule, drawn_from: str) -> Iterator[None]:
    """Samples of the validation set go through hooks as they do in validation, also while the trainer is training."""
    stage, training = trainer.state.stage, pl_module.training
    if drawn_from == VALIDATION_SET and trainer.training:
        trainer.validating, pl_module.training = True, False
    try:
        yield
    finally:
        trainer.state.stage, pl_module.training = stage, training


def _as_for_a_step(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """What the trainer does to a batch before it hands it to a step: precision, transfer to the device, and its hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, pl_module.device, dataloader_idx=0)


def _changed(preset: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A preset with some arguments changed; a schedule is changed as a whole."""
    replaced = _SCHEDULES if any(name in changes for name in _SCHEDULES) else ()
    return {name: value for name, value in preset.items() if name not in replaced} | dict(changes)
