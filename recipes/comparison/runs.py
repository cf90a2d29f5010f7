"""One run of a comparison: its settings, what identifies it, and how it is made in a process that makes many."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

import cifar
import mnist
from flags import Settings, UserError, with_default_weights
from gradpen import PenalizedLoss, evaluate_inequality
from gradpen.callbacks import InequalityMonitor
from gradpen.functional import input_grad_sq_norm
from images import Images, Labelled
from models import mlp
from objectives import cost_in_multiplications, penalised_loss
from training import HARMLESS, Classifier, ImageBatches

RECIPES = {"mnist": (mnist.MnistSettings, mnist), "cifar": (cifar.CifarSettings, cifar)}
PLACES = ("data_dir", "out", "resume", "accelerator", "devices", "strategy")  # where it runs is not what is run
RECORD_VERSION = 1
NORMS = ("frobenius", "spectral", "joint")  # from the loosest to the tightest
LADDER_SIZE = 16  # samples on which all three are compared: the first needs whole Jacobians
PROBED = 128  # samples for what costs little
COLLAPSED = 1.2  # times the share of the most frequent class

IN_WORDS = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false", NoneType: "null"}

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is trained, and whether its test images may be looked at.

    Attributes:
        recipe: whose settings and data these are.
        settings: flags of that recipe; those that are not given have its defaults.
        reads_test: runs that choose settings do not.
    """

    recipe: str
    settings: Mapping[str, Any]
    reads_test: bool

    def full_settings(self) -> Settings:
        """All flags.

        Raises:
            UserError: on a setting that the recipe does not have, or a value that it refuses.
        """
        if self.recipe not in RECIPES:
            raise UserError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        kind, module = RECIPES[self.recipe]
        expected = _types(kind)
        unknown = set(self.settings) - set(expected)
        if unknown:
            raise UserError(f"recipes/{self.recipe}.py has no setting {', '.join(sorted(unknown))}")
        for name, value in self.settings.items():
            if isinstance(value, (list, Mapping)) or not _fits(value, expected[name]):
                raise UserError(f"{name} must be {' or '.join(_in_words(expected[name]))}, got {value!r}")
        settings = kind(**self.settings)
        if settings.dataset == "auto":
            raise UserError("a comparison must know its data: give dataset a name, not auto")
        return with_default_weights(settings, module.DEFAULT_WEIGHTS)

    @property
    def key(self) -> str:
        """A hash of everything that decides the result."""
        settings = {
            name: value
            for name, value in vars(self.full_settings()).items()
            if name not in PLACES and value is not None
        }
        described = json.dumps([RECORD_VERSION, self.recipe, settings, self.reads_test], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:20]


@lru_cache
def _types(kind: type[Settings]) -> dict[str, Any]:
    """The type of every flag."""
    return get_type_hints(kind)


@lru_cache(maxsize=None, typed=True)
def _fits(value: Any, kind: Any) -> bool:
    """Whether the command line would take the value for the type, and as it is."""
    if value is None:  # which the parser takes for not given
        return NoneType in get_args(kind)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return bool(parser.parse_object({"value": value})["value"] == value)
    except ArgumentError:
        return False


def _in_words(kind: Any) -> list[str]:
    """What a type takes."""
    if not get_args(kind):
        return [IN_WORDS[kind] if kind in IN_WORDS else str(kind)]
    return [words for one in get_args(kind) for words in _in_words(one)]


def data_name(settings: Mapping[str, Any]) -> str:
    """What the data of some settings is called, without loading it."""
    _, module = RECIPES.get(settings.get("recipe", ""), (None, None))
    dataset = settings.get("dataset", "")
    known = getattr(module, "TORCHVISION", {}).get(dataset)
    return known[0] if known else settings.get("dataset_name") or dataset


class DivergedError(Exception):
    """The loss is no number any more."""


class StopAtDivergence(Callback):
    """Ends a run at the first step whose loss is not finite: nothing after it means anything."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss of this step."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if not bool(loss.isfinite()):
            raise DivergedError


def make(run: Run) -> Record:
    """Train and measure; a failure is recorded with its traceback, and does not stop the others."""
    record: Record = {
        "key": run.key,
        "recipe": run.recipe,
        "settings": {name: value for name, value in run.settings.items() if name not in PLACES},
        "reads_test": run.reads_test,
    }
    try:
        return record | _train(run)
    except Exception:  # whatever went wrong in this run is its result
        return record | failure(traceback.format_exc())


def failure(reason: str) -> Record:
    """What a record says of a run that did not come to an end."""
    return {"status": "failed", "traceback": reason, "result": {}, "history": []}


def _train(run: Run) -> Record:
    settings = run.full_settings()
    images = load(run).split(settings.train_size, settings.val_size, settings.seed)
    seed_everything(settings.seed, verbose=False)
    model = mlp(settings, images.train.x[0].numel(), images.num_classes)
    objective = penalised_loss(settings)
    cost = cost_in_multiplications(model, objective, *images.train.rows(slice(settings.batch_size)))
    ladders: dict[str, dict[str, float] | None] = {"start": ladder(model, images)} if run.reads_test else {}
    started = time.perf_counter()
    monitor, diverged = fit(settings, images, model, objective, watch=run.reads_test)
    seconds = time.perf_counter() - started
    accuracy = {"val": accuracy_of(model, images.val), "train": accuracy_of(model, images.train)}
    if run.reads_test:
        accuracy["test"] = accuracy_of(model, images.test)
        ladders["end"] = None if diverged else ladder(model, images)
    shares = images.train.y.bincount() / len(images.train.y)
    return {
        "status": "diverged" if diverged else "finished",
        "traceback": None,
        "result": {
            "dataset_name": images.name,
            **{f"{part}_accuracy": value for part, value in accuracy.items() if value is not None},
            "collapsed": accuracy["train"] is not None and accuracy["train"] <= COLLAPSED * float(shares.max()),
            "train_images": len(images.train.y),
            "steps": settings.epochs * steps_per_epoch(settings, images),
            "cost": cost,
            "ladder": ladders,
            "geometric_complexity": None if diverged or not run.reads_test else geometric_complexity(model, images),
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        },
        "history": [] if monitor is None else monitor.history,
    }


@lru_cache(maxsize=2)
def _load(recipe: str, data: tuple[tuple[str, Any], ...]) -> Images:
    kind, module = RECIPES[recipe]
    return module.load(kind(**dict(data)))


def load(run: Run) -> Images:
    """The run's data, kept for the next runs of this process."""
    return _load(run.recipe, _data_of(run.full_settings()))


def _data_of(settings: Settings) -> tuple[tuple[str, Any], ...]:
    """The flags that decide what is loaded."""
    names = ("dataset", "data_dir", "dataset_name", "image_side")
    return tuple((name, getattr(settings, name)) for name in names if hasattr(settings, name))


def find_data(runs: Iterable[Run]) -> None:
    """Load and split the data of some runs, once each, and forget it again.

    What has to be downloaded or decoded is so before several processes want it at once.

    Raises:
        UserError: if it is not to be had, or has too few images.
    """
    every = [(run, run.full_settings()) for run in runs]
    splits = {
        (run.recipe, _data_of(settings), settings.train_size, settings.val_size): (run, settings)
        for run, settings in every
    }
    for run, settings in splits.values():
        load(run).split(settings.train_size, settings.val_size, settings.seed)
    _load.cache_clear()


def fit(
    settings: Settings, images: Images, model: nn.Module, objective: PenalizedLoss, *, watch: bool
) -> tuple[InequalityMonitor | None, bool]:
    """Train without files, bars and logs.

    Returns:
        The monitor, if the run is watched; and whether training diverged.
    """
    monitor = check_schedule(settings, images) if watch else None
    model.train()  # Lightning leaves a model as it finds it
    with quiet():
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=settings.epochs,
            callbacks=[StopAtDivergence(), *([monitor] if monitor else [])],
            precision=settings.precision,  # type: ignore[arg-type]  # one of flags.PRECISIONS
            deterministic="warn",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        classifier = Classifier(model, objective, images.num_classes, settings, logs=False)
        try:
            trainer.fit(classifier, datamodule=ImageBatches(images, settings.batch_size, settings.seed))
        except DivergedError:
            return monitor, True
        except SystemExit as stopped:  # Lightning's answer to KeyboardInterrupt
            raise KeyboardInterrupt from stopped
        except RuntimeError:  # what the monitor, or torch, says of logits that are no numbers
            if logits_are_finite(model, images):
                raise
            return monitor, True
    return monitor, not logits_are_finite(model, images)


def logits_are_finite(model: nn.Module, images: Images) -> bool:
    """Whether the network still maps training images to numbers."""
    with torch.no_grad():
        return bool(model(probe(model, images, PROBED).x).isfinite().all())


def probe(model: nn.Module, images: Images, count: int) -> Labelled:
    """A few training images, in the precision that training left the model in."""
    return images.probe(count, next(model.parameters()).dtype)


def check_schedule(settings: Settings, images: Images) -> InequalityMonitor:
    """Looks at the inequality at `checks` steps, spread evenly on a log axis, and after the first epoch."""
    per_epoch = steps_per_epoch(settings, images)
    double = settings.precision.startswith("64")
    steps = np.geomspace(1, settings.epochs * per_epoch, settings.checks).round().astype(int).tolist()
    return InequalityMonitor(
        at={*steps, per_epoch},
        probe=images.probe(settings.probe_size, torch.float64 if double else torch.float32),
        model="model",
        criterion=F.cross_entropy,
        slack=False,
    )


def steps_per_epoch(settings: Settings, images: Images) -> int:
    """The last batch of an epoch may be smaller."""
    return -(-len(images.train.y) // settings.batch_size)


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's notices are about one run; here there are many."""
    names = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for harmless in (*HARMLESS, ".*GPU available but not used.*"):
            warnings.filterwarnings("ignore", message=harmless)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def accuracy_of(model: nn.Module, part: Labelled) -> float | None:
    """Share of images that are classified rightly; None if there are none."""
    if not len(part.y):
        return None
    model.eval()
    with torch.inference_mode():
        dtype = next(model.parameters()).dtype
        logits = torch.cat([model(x.to(dtype)) for x in part.x.split(1000)])
    return float(multiclass_accuracy(logits, part.y, logits.shape[1], average="micro"))


def ladder(model: nn.Module, images: Images) -> dict[str, float]:
    """Mean tightness by norm, on a few samples of the probe."""
    x, y = probe(model, images, LADDER_SIZE)
    model.eval()
    reports = {norm: evaluate_inequality(model, x, y, norm=norm, slack=False) for norm in NORMS}
    return {norm: float(report.tightness.nanmean()) for norm, report in reports.items()}


def geometric_complexity(model: nn.Module, images: Images) -> float:
    """Mean ‖J‖_F² of the outputs over training images."""
    x, y = probe(model, images, PROBED)
    model.eval()
    return float(input_grad_sq_norm(model, x, y, of="output").detach().mean())
