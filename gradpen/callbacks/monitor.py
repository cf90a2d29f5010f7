"""The inequality, watched during training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from os import PathLike
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from gradpen import _checks
from gradpen.callbacks._batch import Getter, find_criterion, find_model, split_batch, to_device
from gradpen.callbacks._lightning import Callback
from gradpen.callbacks._probe import draw_probe
from gradpen.history import Row, flat_metrics, report_rows, write_csv
from gradpen.inequality import evaluate_inequality
from gradpen.isolation import untouched
from gradpen.plotting import plot_history
from gradpen.report import InequalityReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_EVERY_N_STEPS = 200


class InequalityMonitor(Callback):
    r"""Logs both sides of the inequality on a fixed probe batch during training.

    .. math:: \|\nabla_x f\|^2 \sum_t \frac{1 + \|h_t\|^2}{\|W_t\|^2 \|J_t\|^2} \le \|\nabla_\theta f\|^2

    Checks happen before the first step, on schedule, and at the end of training. The network is looked at in eval
    mode and left without a trace: a run with the monitor equals the run without it, bit for bit. Under data-parallel
    strategies every process looks at the whole probe, and the first one logs.

    Logged through the trainer's loggers are ``bound/lhs``, ``bound/rhs``, ``bound/tightness`` (also ``_min`` and
    ``_max``), ``bound/violations``, ``bound/undefined``, ``bound/input_grad_sq_norm``, ``bound/param_grad_sq_norm``,
    ``bound/batch_grad_sq_norm``, ``bound/noise_trace`` and, for every layer, ``bound/<layer>/coefficient``,
    ``…/tightness``, ``…/weight_norm``, ``…/jacobian_norm``, ``…/slack_product`` and so on.

    Args:
        every_n_steps: check every so many optimiser steps; default 200 if no other schedule is given.
        every_n_epochs: check at the end of every so many epochs.
        at: the optimiser steps at which to check, or a callable step → bool.
        num_samples: size of the probe.
        probe: "val" (drawn from the validation set, or the training set if there is none), "train", or a batch (x, y) of
            tensors.
        seed: of the probe's draw.
        inputs: which part of a batch is x: key, index or callable; found if the batch is (x, y) or an ordinary dict.
        targets: which part of a batch is y.
        model: which part of the LightningModule maps x to the output: name, callable or module; default the module itself
            if it defines ``forward``, else its only child with parameters.
        criterion: gives f_i: callable, or name of an attribute; default the module's ``criterion`` or ``loss_fn``,
            else cross entropy for integer targets and the mean squared error for floating-point ones.
        of: as in `gradpen.evaluate_inequality`, like the next four.
        norm: "spectral", "frobenius" or "joint".
        slack: split each layer's slack into its two factors.
        delta: failure probability of one check's upper ends.
        rtol: relative width of the norms' brackets.
        on_violation: "warn", "raise" or "ignore"; judged from the certified end of the brackets.

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
        at: Collection[int] | Callable[[int], bool] | None = None,
        num_samples: int = 128,
        probe: str | tuple[Any, Any] = "val",
        seed: int = 0,
        inputs: Getter = None,
        targets: Getter = None,
        model: str | Callable[[nn.Module], nn.Module] | nn.Module | None = None,
        criterion: str | Callable[..., Any] | None = None,  # YAML can name a class for Any, not for Tensor
        of: str | Callable[[Any, Any], Tensor] = "loss",
        norm: str = "spectral",
        slack: bool = True,
        delta: float = 1e-6,
        rtol: float = 0.05,
        on_violation: str = "warn",
    ) -> None:
        super().__init__()
        if every_n_steps is None and every_n_epochs is None and at is None:
            every_n_steps = DEFAULT_EVERY_N_STEPS
        for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None:
                _checks.check_positive_int(name, value)
        _checks.check_positive_int("num_samples", num_samples)
        _checks.check_choice("on_violation", on_violation, ("warn", "raise", "ignore"))
        if isinstance(probe, str):
            _checks.check_choice("probe", probe, ("val", "train"))
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.at = at
        self.num_samples = num_samples
        self.probe = probe
        self.seed = seed
        self.inputs = inputs
        self.targets = targets
        self.model = model
        self.criterion = criterion
        self.on_violation = on_violation
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
        self._unscheduled_step: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies under which a process does not hold the whole model."""
        strategy = type(trainer.strategy).__name__
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise RuntimeError(
                f"InequalityMonitor needs whole weight matrices, and {strategy} gives every process only a shard of them: "
                'use strategy="ddp" or a single device, or evaluate a checkpoint with gradpen.evaluate_inequality'
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first check, before the first step; on a resumed run only what the schedule says."""
        self._forget_unscheduled()
        self._drawn = None
        resumed = trainer.global_step > 0
        if not resumed:
            self.history.clear()
        started = time.perf_counter()
        report = self._evaluate(trainer, pl_module)
        seconds = time.perf_counter() - started
        rank_zero_info(self._announcement(pl_module, report, seconds))
        if not resumed:
            self._keep(trainer, report)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check if the schedule names this optimiser step; micro-batches that accumulate are no steps."""
        if self._is_due(trainer.global_step) and not self._has_checked(trainer.global_step):
            self._keep(trainer, self._evaluate(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check if the schedule names this epoch."""
        due = self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and not self._has_checked(trainer.global_step):
            self._keep(trainer, self._evaluate(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last check, so that the trained network is on the curve whatever the schedule."""
        if not self._has_checked(trainer.global_step):
            self._keep(trainer, self._evaluate(trainer, pl_module))
            self._unscheduled_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``trainer.validate()``: one check."""
        if trainer.state.fn == "validate":
            self._check_outside_training(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``trainer.test()``: one check of a monitor that has not been through training."""
        if not self.history:
            self._check_outside_training(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The history, so that a resumed run goes on with it."""
        return {"history": [dict(row) for row in self.history], "unscheduled_step": self._unscheduled_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the history back."""
        self.history = [dict(row) for row in state_dict["history"]]
        self._unscheduled_step = state_dict["unscheduled_step"]

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the history as a table, one row per check and layer."""
        write_csv(self.history, path)

    def plot(self, title: str | None = None) -> Figure:
        """One figure: both sides over training, tightness by layer, coefficients relative to the first check."""
        return plot_history(self.history, title)

    def _is_due(self, step: int) -> bool:
        if step == 0:
            return False
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        if self.at is None:
            return False
        return bool(self.at(step)) if callable(self.at) else step in self.at

    def _has_checked(self, step: int) -> bool:
        return any(row["step"] == step for row in reversed(self.history))

    def _forget_unscheduled(self) -> None:
        """A run that goes on after its end: its last check was no part of the schedule."""
        if self._unscheduled_step is not None:
            self.history = [row for row in self.history if row["step"] != self._unscheduled_step]
            self._unscheduled_step = None

    def _check_outside_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn = None
        self._keep(trainer, self._evaluate(trainer, pl_module))

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> InequalityReport:
        with untouched(pl_module):
            x, y = self._probe_of(trainer, pl_module)
            pl_module.eval()
            criterion, _ = find_criterion(pl_module, self.criterion, y)
            return evaluate_inequality(find_model(pl_module, self.model), x, y, criterion=criterion, **self._settings)

    def _probe_of(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Any, Any]:
        """The probe on the module's device, the same throughout a run."""
        if self._drawn is None:
            if isinstance(self.probe, str):
                batch = draw_probe(self._loader(trainer), self.num_samples, self.seed)
                batch = trainer.strategy.batch_to_device(batch, pl_module.device)
                self._drawn = split_batch(batch, self.inputs, self.targets)
            else:
                x, y = self.probe
                self._drawn = to_device(x, pl_module.device), to_device(y, pl_module.device)
        return self._drawn

    def _loader(self, trainer: Trainer) -> Any:
        """The first data loader of the kind asked for."""
        training, validation, test = (
            trainer.train_dataloader,
            trainer.val_dataloaders,
            trainer.test_dataloaders,
        )
        wanted = (training,) if self.probe == "train" else (validation, test, training)
        for loader in wanted:
            while isinstance(loader, (list, tuple, dict)) and loader:
                loader = next(iter(loader.values())) if isinstance(loader, dict) else loader[0]
            if loader:
                return loader
        raise ValueError(f'expected a data loader to draw the probe from (probe="{self.probe}"): give probe=(x, y)')

    def _keep(self, trainer: Trainer, report: InequalityReport) -> None:
        """Remember, log, and judge one check."""
        self.report = report
        rows = report_rows(report, step=trainer.global_step, epoch=trainer.current_epoch)
        self.history += rows
        finite = {name: value for name, value in flat_metrics(rows).items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, step=trainer.global_step)
        if report.violations and self.on_violation != "ignore":
            message = (
                f"the inequality does not hold for {report.violations} of {report.lhs.numel()} samples at step "
                f"{trainer.global_step}, beyond rounding and the norms' brackets: the model has a structure that the layer "
                f"test missed, or this is a bug in gradpen\n{report}"
            )
            if self.on_violation == "raise":
                raise RuntimeError(message)
            rank_zero_warn(message)

    def _announcement(self, pl_module: LightningModule, report: InequalityReport, seconds: float) -> str:
        """What was found, in one block."""
        part = find_model(pl_module, self.model)
        name = next((name for name, module in pl_module.named_modules() if module is part), "") or "the LightningModule"
        y = None if self._drawn is None else self._drawn[1]
        criterion, how = find_criterion(pl_module, self.criterion, y)
        source = self.probe if isinstance(self.probe, str) else "given"
        schedule = [
            *([f"every {self.every_n_steps} steps"] if self.every_n_steps is not None else []),
            *([f"every {self.every_n_epochs} epochs"] if self.every_n_epochs is not None else []),
            *(["at chosen steps"] if self.at is not None else []),
        ]
        lines = [
            "InequalityMonitor",
            f"  model     {name} ({type(part).__name__})",
            f"  f         {report.of}; criterion {_name(criterion)} ({how})",
            f"  in sum    {', '.join(layer.name for layer in report.layers) or 'no layer'}",
            *(f"  left out  {layer.name}: {layer.reason}" for layer in report.excluded),
            f"  probe     {report.lhs.numel()} samples ({source}, seed {self.seed})",
            f"  schedule  {', '.join(schedule)}, before the first step and at the end",
            f"  cost      the first check took {seconds:.2f} s",
        ]
        return "\n".join(lines)


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
