"""An epoch of the MNIST recipe beside a bare PyTorch loop that does the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from workload import ImageSet, mlp

RECIPE = Path(__file__).parents[1] / "recipes" / "mnist.py"
EPOCHS = 20  # the recipe's default, and with it the share of the checks
BATCH_SIZE = 128
LR = 1e-3


class BareLoop:
    """MLP, AdamW, one cycle, accuracy; the data on tensors, as in the recipe."""

    def __init__(self, images: ImageSet, epochs: int) -> None:
        torch.manual_seed(0)
        self.x, self.y = images.x, images.y
        self.model = mlp([784, 512, 512, 10])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)
        steps = epochs * -(-len(self.y) // BATCH_SIZE)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=LR, total_steps=steps)

    def epoch(self) -> float:
        """Train on all images once; the share that was classified rightly."""
        correct = torch.zeros((), dtype=torch.int64)
        for index in torch.randperm(len(self.y)).split(BATCH_SIZE):
            x, y = self.x[index], self.y[index]
            self.optimizer.zero_grad()
            logits = self.model(x)
            F.cross_entropy(logits, y).backward()
            self.optimizer.step()
            self.schedule.step()
            correct += (logits.detach().argmax(1) == y).sum()
        return float(correct) / len(self.y)


def bare_epochs(loop: BareLoop, count: int) -> list[float]:
    """Seconds of each of the next epochs."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        loop.epoch()
        seconds.append(time.perf_counter() - start)
    return seconds


def recipe_epochs(data_dir: Path, epochs: int, threads: int) -> tuple[list[float], float]:
    """Run the recipe as a user does.

    Returns:
        Seconds from the end of each epoch to the end of the next, and of the whole training.

    Raises:
        RuntimeError: with what the recipe printed, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RECIPE), "--dataset", "mnist", "--data-dir", str(data_dir)]
        command += ["--penalty", "none", "--accelerator", "cpu", "--epochs", str(epochs), "--out", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{RECIPE.name} failed: {done.stderr.strip()}")
        events = EventAccumulator(str(Path(folder) / "tensorboard"))
        events.Reload()
        ends = [scalar.wall_time for scalar in events.Scalars("accuracy/train")]
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
    return [end - start for start, end in pairwise(ends)], float(summary["seconds"])
