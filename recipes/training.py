"""One training run under gradient penalties, from settings to summary: what every recipe shares."""

from __future__ import annotations

import csv
import shutil
import signal
import warnings
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib.util import find_spec
from io import StringIO
from math import ceil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, Timer, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from flags import Settings, UserError, flag
from gradpen import PenalizedLoss
from gradpen.callbacks import InequalityMonitor
from gradpen.penalties import GradPenalty, PenalizedOutput
from images import ImageBatches, Images, Labelled
from models import mlp
from objectives import penalised_loss
from results import Summary, bound_summary, has_diverged, penalty_cost, table, write_results

REFRESH = 20  # steps from one loss on the progress bar to the next; at each, it would cost as much as a step
EARLY_CHECKS = (1, 3, 10, 30, 100)  # steps, as the bound moves most in the first ones
HARMLESS = (  # warnings
    ".*does not have many workers",  # slicing a tensor needs none
    "Checkpoint directory .* exists",
    ".*LeafSpec.* is deprecated",
)
WRITTEN = ("summary.json", "metrics.csv", "bound.csv", "bound.png", "hparams.yaml", "last.ckpt", "tensorboard")
PLACES = ("data_dir", "out", "accelerator", "strategy")  # where a run is made is not what is run


class Classifier(LightningModule):
    """A model, and the objective that it is trained with.

    Args:
        model: maps x to logits.
        objective: called once a step, gives the data loss, the penalties and the logits of one forward pass.
        num_classes: of the logits.
        settings: choose the optimizer and its schedule.
        logs: log every step.
    """

    def __init__(
        self, model: nn.Module, objective: PenalizedLoss, num_classes: int, settings: Settings, *, logs: bool = True
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.settings = settings
        self.logs = logs
        self._penalties: dict[str, Tensor] = {}  # as computed last: a logger may come by on steps without them alone
        parts = ("train", "val", "test", "train_final", "val_final")  # the last two: after training
        self.accuracy = nn.ModuleDict(
            {f"on_{part}": MulticlassAccuracy(num_classes, average="micro") for part in parts}
        )

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One forward pass for the data loss and all penalties."""
        x, y = batch
        out = self.objective(self.model, x, y)
        if self.logs:
            self._accuracy("train").update(out.output.detach(), y)
            self._penalties |= self._computed_penalties(out)
            if self._is_read(batch_idx):
                self._log_step(out.data_loss)
        return out.loss

    def on_train_epoch_start(self) -> None:
        """What is logged goes by this epoch alone, as it does after a resume."""
        self._penalties.clear()

    def _is_read(self, batch_idx: int) -> bool:
        """Whether a logger or the progress bar is to show what this step logs: logging takes as long as a layer."""
        batches = batch_idx + 1
        return (
            (self.global_step + 1) % self.trainer.log_every_n_steps == 0
            or batches % REFRESH == 0
            or batches == self.trainer.num_training_batches
            or self.trainer.should_stop
        )

    def _computed_penalties(self, out: PenalizedOutput) -> dict[str, Tensor]:
        """Those that the step has not left out."""
        penalties = cast("Iterable[GradPenalty]", self.objective.penalties)
        return {p.name: out.penalties[p.name].detach() for p in penalties if (p.num_calls - 1) % p.every_n_steps == 0}

    def _log_step(self, data_loss: Tensor) -> None:
        self.log_dict({f"penalty/{name}": value for name, value in self._penalties.items()})
        self.log("data_loss", data_loss.detach(), prog_bar=True)
        self._log_accuracy("train")  # not in on_train_epoch_end, which is called when the bar has shown the epoch's end

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on the images that choose weights."""
        x, y = batch
        self._accuracy("val").update(self(x), y)
        self._log_accuracy("val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Accuracy of the trained network on the test images (data loader 0), training (1) and validation images (2)."""
        x, y = batch
        part = ("test", "train_final", "val_final")[dataloader_idx]
        self._accuracy(part).update(self(x), y)
        self._log_accuracy(part)

    def configure_optimizers(self) -> Any:
        """AdamW or SGD, with one cycle of the learning rate over the whole run or without a schedule."""
        settings = self.settings
        common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "sgd":
            optimizer = torch.optim.SGD(self.model.parameters(), momentum=settings.momentum, **common)
        else:
            optimizer = torch.optim.AdamW(self.model.parameters(), **common)
        if settings.schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        cycle_momentum = settings.optimizer == "adamw" or settings.momentum > 0
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=settings.lr, total_steps=steps, cycle_momentum=cycle_momentum
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _accuracy(self, part: str) -> MulticlassAccuracy:
        return cast("MulticlassAccuracy", self.accuracy[f"on_{part}"])

    def _log_accuracy(self, part: str) -> None:
        """That of the whole epoch, at its end."""
        metric = self._accuracy(part)
        self.log(f"accuracy/{part}", metric, on_step=False, on_epoch=True, prog_bar=True, add_dataloader_idx=False)


def run(settings: Settings, images: Images) -> Summary:
    """One run on whole images: split them, build the network, train it; returns what summary.json holds."""
    settings = replace(settings, dataset=images.key)
    images = images.split(settings.train_size, settings.val_size, settings.seed)
    seed_everything(settings.seed, verbose=False)
    model = mlp(settings, num_features=images.train.x[0].numel(), num_classes=images.num_classes)
    return train(settings, images, model, penalised_loss(settings))


def train(settings: Settings, images: Images, model: nn.Module, objective: PenalizedLoss) -> Summary:
    """Train, watch the inequality, read the test images once, and write everything under --out.

    Args:
        settings: all flags, default weights filled in.
        images: the splits.
        model: maps images to logits.
        objective: the data loss and the penalties.

    Returns:
        What summary.json holds.
    """
    out = Path(settings.out or f"runs/{images.key}-{settings.penalty}-s{settings.seed}")
    checkpoint = _checkpoint(settings, out)
    timer = Timer()
    trainer = _trainer(settings, images, out, [timer])
    monitor = _monitor(settings, images, trainer.world_size)
    cast("list[Callback]", trainer.callbacks).insert(1, monitor)  # the timer counts its checks
    rank_zero_info(
        f"{images.name}: {len(images.train.y):,} training, {len(images.val.y):,} validation, "
        f"{len(images.test.y):,} test images; results go to {out}"
    )
    classifier = Classifier(model, objective, images.num_classes, settings)
    batches = ImageBatches(images, settings.batch_size, settings.seed)
    if checkpoint is None:
        _clear(out)  # not before the flags have made all of the above
    trainer.loggers = _loggers(out, settings, checkpoint)
    with warnings.catch_warnings():
        for harmless in HARMLESS:
            warnings.filterwarnings("ignore", message=harmless)
        completed = _fit(trainer, classifier, batches, checkpoint, out)
        accuracy = {
            name: round(value, 6)
            for found in trainer.test(classifier, datamodule=batches, verbose=False)
            for name, value in found.items()
        }
    diverged = has_diverged(model, _probe(settings, images), monitor.history, trainer.global_step)
    summary: Summary = {
        **_recorded(settings),
        "dataset": images.key,
        "dataset_name": images.name,
        "completed": completed,
        "epochs_done": trainer.current_epoch,
        "steps": trainer.global_step,
        "train_images": len(images.train.y),
        "test_accuracy": accuracy["accuracy/test"],
        "train_accuracy": accuracy["accuracy/train_final"],
        "val_accuracy": accuracy.get("accuracy/val_final"),
        **bound_summary(monitor.history, diverged),
        "penalty_cost": penalty_cost(trainer, model, objective, *batches.train.rows(slice(settings.batch_size))),
        "seconds": timer.time_elapsed("train"),
        "device": str(trainer.strategy.root_device),
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if trainer.is_global_zero:
        write_results(out, summary, monitor)
        print(table(summary, out))
    return summary


def _checkpoint(settings: Settings, out: Path) -> Path | None:
    """What --resume goes on from.

    Raises:
        UserError: if it is of a run with other flags.
    """
    if not settings.resume:
        return None
    checkpoint = out / "last.ckpt"
    if not checkpoint.exists():
        rank_zero_info(f"no checkpoint under {out}: starting from the beginning")
        return None
    now, before = _recorded(settings), _recorded_before(settings, out)
    other = [name for name, value in now.items() if name not in PLACES and before[name] != value]
    if other:
        raise UserError(
            f"--resume: the run under {out} has {_as_flags(before, other)}, got {_as_flags(now, other)}: "
            "give the flags that it was started with, or another --out"
        )
    return checkpoint


def _recorded_before(settings: Settings, out: Path) -> dict[str, Any]:
    """The flags of the run under `out`, with defaults for those that recipes did not have yet."""
    try:
        return asdict(type(settings)()) | yaml.safe_load((out / "hparams.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, TypeError, yaml.YAMLError) as error:  # not there, no mapping, no YAML
        raise UserError(f"--resume: the flags of the run under {out} cannot be read: {error}") from error


def _as_flags(recorded: dict[str, Any], names: list[str]) -> str:
    return " ".join(f"{flag(name)} {recorded[name]}" for name in names)


def _probe(settings: Settings, images: Images) -> Labelled:
    """A few training images, always the same ones."""
    return images.probe(settings.probe_size, torch.float64 if settings.precision == "64-true" else torch.float32)


def _monitor(settings: Settings, images: Images, processes: int) -> InequalityMonitor:
    """Watches the inequality."""
    steps = settings.epochs * _steps_per_epoch(settings, images, processes)
    return InequalityMonitor(
        every_n_steps=max(10, steps // settings.checks),
        every_n_epochs=settings.epochs,  # the end is part of the schedule, and so of the last epoch's checkpoint
        at=EARLY_CHECKS,
        probe=_probe(settings, images),
        model="model",
        criterion=F.cross_entropy,
    )


def _trainer(settings: Settings, images: Images, out: Path, callbacks: list[Callback]) -> Trainer:
    """Lightning's Trainer, with a progress bar and the last epoch's checkpoint.

    Raises:
        UserError: on devices that are not there.
    """
    bar = RichProgressBar(refresh_rate=REFRESH) if find_spec("rich") else TQDMProgressBar(refresh_rate=REFRESH)
    last = ModelCheckpoint(
        dirpath=out, filename="last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
    )
    try:
        return Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy=settings.strategy,
            precision=settings.precision,  # type: ignore[arg-type]  # one of flags.PRECISIONS
            max_epochs=settings.epochs,
            callbacks=[*callbacks, last, bar],
            logger=False,  # they write, and come later
            log_every_n_steps=min(50, max(1, _steps_per_epoch(settings, images) // 4)),
            deterministic="warn",
            use_distributed_sampler=False,  # the batches are shared out by process already
            num_sanity_val_steps=0,
            limit_val_batches=None if len(images.val.y) else 0,
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        asked = _as_flags(_recorded(settings), ["accelerator", "devices", "strategy", "precision"])
        raise UserError(f"{asked} is refused by Lightning: {error}") from error


def _steps_per_epoch(settings: Settings, images: Images, processes: int = 1) -> int:
    return ceil(len(images.train.y) / (settings.batch_size * processes))


def _fit(trainer: Trainer, classifier: Classifier, batches: ImageBatches, checkpoint: Path | None, out: Path) -> bool:
    """Train; False if Ctrl-C ended it early, in which case what was trained so far is still evaluated."""
    try:
        trainer.fit(classifier, datamodule=batches, ckpt_path=checkpoint)
    except SystemExit:  # Lightning's answer to KeyboardInterrupt
        if not trainer.interrupted or trainer.world_size > 1:
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)
        how = "Go on later with --resume." if (out / "last.ckpt").exists() else "No epoch was finished to go on from."
        rank_zero_info(f"Stopped early. {how}")
    return not trainer.interrupted


def _loggers(out: Path, settings: Settings, checkpoint: Path | None) -> list[Logger]:
    """TensorBoard and metrics.csv; on a resume the rows up to the checkpoint stay."""
    kept = [] if checkpoint is None else _rows_until(out / "metrics.csv", _step_of(checkpoint))
    rows_logger = CSVLogger(out, name="", version="")
    _write_again(rows_logger, kept)
    loggers: list[Logger] = [TensorBoardLogger(out, name="tensorboard", version=""), rows_logger]
    for logger in loggers:
        logger.log_hyperparams(_recorded(settings))
    return loggers


def _recorded(settings: Settings) -> dict[str, Any]:
    """The flags that say what was run."""
    return {name: value for name, value in asdict(settings).items() if name != "resume"}


@rank_zero_only
def _write_again(logger: CSVLogger, rows: list[dict[str, Any]]) -> None:
    """Lightning's logger removes the file that it finds, so its rows are logged once more."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")
        logger.experiment.metrics.extend(rows)
    logger.save()


@rank_zero_only
def _clear(out: Path) -> None:
    """Make the folder, and remove an earlier run's results, so that no file of it stays beside the new ones."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} is no folder, and cannot be made one: {error}") from error
    earlier = [out / name for name in WRITTEN if (out / name).exists()]
    if earlier:
        rank_zero_info(
            f"{out} held an earlier run, which is removed: give another --out to keep one, or --resume to go on"
        )
    for path in earlier:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _step_of(checkpoint: Path) -> int:
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])
    except (EOFError, KeyError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"--resume: {checkpoint} cannot be read ({error!r}): start anew without --resume") from error


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of metrics.csv that the resumed run will not write again; those of a killed run may break off."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        rank_zero_info(f"{path} breaks off in its last line, which is left out")
    rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(StringIO(whole))]
    try:
        return [row for row in rows if int(row["step"]) <= step and "accuracy/test" not in row]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"--resume: {path} cannot be read ({error!r}): remove it, or start anew without --resume"
        ) from error
