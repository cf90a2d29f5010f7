"""What watching the inequality costs: training as in the MNIST recipe, with and without a monitor.

    python benchmarks/monitor_overhead.py --data-dir data
    python benchmarks/monitor_overhead.py --data-dir data --epochs 1 --repetitions 5

All variants are trained in turn, again and again, in one process and with one thread. Printed are the medians' ratios to
the run without a monitor, in time and in CPU time (which other programs on the machine disturb less); what a check takes
by itself; and what that makes of the recipe's whole run of 20 epochs.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import Profiler
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import MNIST

from gradpen.callbacks import InequalityMonitor

RECIPE_EPOCHS, BATCH_SIZE = 20, 128


class Classifier(LightningModule):
    """The recipe's network, optimiser, schedule and logs."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [part for pair in pairwise((784, 512, 512)) for part in (nn.Linear(*pair), nn.ReLU())]
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        output = self.net(x)
        loss = F.cross_entropy(output, y)
        self.log("loss", loss, prog_bar=True)
        self.accuracy.update(output.detach(), y)
        self.log("accuracy/train", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


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


def monitors(data: TensorDataset, steps: int) -> dict[str, Callable[[], InequalityMonitor | None]]:
    """The variants, made afresh for every run."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))

    def probe(size: int) -> tuple[Tensor, Tensor]:
        return data[order[:size]]

    return {
        "none": lambda: None,
        "economy": lambda: InequalityMonitor.economy(probe=probe(32)),
        "business (default)": lambda: InequalityMonitor.business(probe=probe(64)),
        "as in the recipe": lambda: InequalityMonitor(steps // 30, at=(1, 3, 10, 30, 100), probe=probe(64)),
        "full": lambda: InequalityMonitor.full(probe=probe(256)),
    }


def train(data: TensorDataset, epochs: int, monitor: InequalityMonitor | None) -> Run:
    """One run, timed."""
    seed_everything(0, verbose=False)
    times = HookTimes()
    batches = BatchSampler(RandomSampler(data), BATCH_SIZE, drop_last=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[] if monitor is None else [monitor],
            logger=CSVLogger(folder),
            profiler=times,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        started, cpu_started = time.perf_counter(), time.process_time()
        trainer.fit(Classifier(), DataLoader(data, sampler=batches, batch_size=None))
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
    flags = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    images = MNIST(flags.data_dir)
    data = TensorDataset((images.data.float() / 255 - 0.1307) / 0.3081, images.targets)
    per_epoch = math.ceil(len(data) / BATCH_SIZE)
    variants = monitors(data, RECIPE_EPOCHS * per_epoch)
    runs: dict[str, list[Run]] = {name: [] for name in variants}
    train(TensorDataset(*data[: 20 * BATCH_SIZE]), 1, None)  # what a first run sets up is nobody's cost
    for repetition in range(flags.repetitions):
        for name in list(variants)[:: -1 if repetition % 2 else 1]:  # nobody always comes first
            runs[name].append(train(data, flags.epochs, variants[name]()))
    steps = flags.epochs * per_epoch
    plain = statistics.median(run.cpu_seconds for run in runs["none"])
    print(
        f"MNIST, MLP 784-512-512-10, {flags.epochs} epochs of {per_epoch} steps, medians of {flags.repetitions} runs,"
    )
    print(f"one thread; a step without monitor takes {1000 * plain / steps:.2f} ms of CPU time\n")
    header = ("monitor", "checks", "time", "CPU time", "ms/check", f"checks in {RECIPE_EPOCHS} epochs", "CPU time then")
    found = [header, *rows(runs, variants, steps, per_epoch)]
    widths = [max(len(row[column]) for row in found) for column in range(len(header))]
    for row in found:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
