"""What watching the inequality costs: the MNIST recipe's training with and without a monitor.

    python benchmarks/monitor_overhead.py --data-dir data
    python benchmarks/monitor_overhead.py --data-dir data --epochs 1 --repetitions 5

All variants are trained in turn, again and again, in one process and with one thread. Printed are the medians' ratios to
the run without a monitor, in time and in CPU time (which other programs on the machine disturb less); what a check takes
by itself; and what that makes of the recipe's whole run of 20 epochs.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import Profiler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

from images import ImageBatches, Images
from mnist import MnistSettings, load_mnist
from training import Classifier, _monitor, mlp, penalised_loss

from gradpen.callbacks import InequalityMonitor

RECIPE_EPOCHS = 20


@dataclass
class HookTimes(Profiler):
    """CPU seconds inside the monitor's hooks."""

    seconds: float = 0.0
    started: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def start(self, action_name: str) -> None:
        self.started[action_name] = time.process_time()

    def stop(self, action_name: str) -> None:
        if "InequalityMonitor" in action_name:
            self.seconds += time.process_time() - self.started[action_name]


@dataclass(frozen=True)
class Run:
    """One training run."""

    seconds: float
    cpu_seconds: float
    monitor_seconds: float  # CPU
    checks: int


def monitors(settings: MnistSettings, images: Images) -> dict[str, Callable[[], InequalityMonitor | None]]:
    """The variants, made afresh for every run."""
    recipe = MnistSettings(**{**vars(settings), "epochs": RECIPE_EPOCHS})
    options = {"model": "model", "criterion": F.cross_entropy, "probe": tuple(images.probe(256, torch.float32))}

    def preset(name: str) -> Callable[[], InequalityMonitor]:
        size = {"economy": 32, "business": 64, "full": 256}[name]
        x, y = options["probe"]
        return lambda: getattr(InequalityMonitor, name)(**options | {"probe": (x[:size], y[:size])})

    return {
        "none": lambda: None,
        "economy": preset("economy"),
        "business (default)": preset("business"),
        "the recipe's own": lambda: _monitor(recipe, images),
        "full": preset("full"),
    }


def train(settings: MnistSettings, images: Images, monitor: InequalityMonitor | None) -> Run:
    """What the recipe does, without progress bar and checkpoints."""
    seed_everything(settings.seed, verbose=False)
    model = mlp(settings, images.train.x[0].numel(), images.num_classes)
    classifier = Classifier(model, penalised_loss(settings), images.num_classes, settings.lr, settings.weight_decay)
    times = HookTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=settings.epochs,
            callbacks=[] if monitor is None else [monitor],
            logger=CSVLogger(folder),
            profiler=times,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        started, cpu_started = time.perf_counter(), time.process_time()
        trainer.fit(classifier, datamodule=ImageBatches(images, settings.batch_size, settings.seed))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    checks = 0 if monitor is None else len({row["step"] for row in monitor.history})
    return Run(seconds, cpu_seconds, times.seconds, checks)


def rows(
    runs: dict[str, list[Run]], variants: dict[str, Callable[[], InequalityMonitor | None]], steps: int, per_epoch: int
) -> list[tuple[str, ...]]:
    """One line of the table for every variant."""
    plain = {name: statistics.median(getattr(run, name) for run in runs["none"]) for name in ("seconds", "cpu_seconds")}
    total = RECIPE_EPOCHS * per_epoch
    table = []
    for name, found in runs.items():
        seconds, cpu_seconds = (statistics.median(getattr(run, key) for run in found) for key in plain)
        cells = [
            name,
            str(found[0].checks),
            f"{seconds / plain['seconds']:.3f}",
            f"{cpu_seconds / plain['cpu_seconds']:.3f}",
        ]
        monitor = variants[name]()
        if monitor is None:
            cells += ["", "", ""]
        else:
            check = statistics.median(run.monitor_seconds / run.checks for run in found)
            checks = 1 + (monitor.schedule.count(0, total, per_epoch) or 0)
            whole = 1 + checks * check / (total * plain["cpu_seconds"] / steps)
            cells += [f"{1000 * check:.0f}", str(checks), f"{whole:.3f}"]
        table.append(tuple(cells))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", default="data", help="where MNIST lies")
    parser.add_argument("--epochs", type=int, default=2, help="of each run")
    parser.add_argument("--repetitions", type=int, default=3, help="of each variant, taken in turn")
    parser.add_argument(
        "--penalty", default="none", choices=("none", "input", "param"), help="that the run is trained with"
    )
    parser.add_argument("--weight", type=float, default=None, help="of the penalty")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    settings = MnistSettings(epochs=flags.epochs, penalty=flags.penalty, weight=flags.weight)
    images = load_mnist(Path(flags.data_dir))
    per_epoch = -(-len(images.train.y) // settings.batch_size)
    variants = monitors(settings, images)
    runs: dict[str, list[Run]] = {name: [] for name in variants}
    for _ in range(flags.repetitions):
        for name, monitor in variants.items():
            runs[name].append(train(settings, images, monitor()))
    steps = flags.epochs * per_epoch
    plain = statistics.median(run.cpu_seconds for run in runs["none"])
    print(
        f"MNIST, MLP of {settings.hidden}, penalty {flags.penalty}, {flags.epochs} epochs of {per_epoch} steps; medians of"
    )
    print(
        f"{flags.repetitions} runs; one thread; a step without monitor takes {1000 * plain / steps:.2f} ms of CPU time\n"
    )
    header = ("monitor", "checks", "time", "CPU time", "ms/check", f"checks in {RECIPE_EPOCHS} epochs", "CPU time then")
    found = [header, *rows(runs, variants, steps, per_epoch)]
    widths = [max(len(row[column]) for row in found) for column in range(len(header))]
    for row in found:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
