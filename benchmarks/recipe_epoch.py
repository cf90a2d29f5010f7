"""An epoch of the MNIST recipe beside a bare PyTorch loop that does the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from workload import ImageSet, mlp

RECIPE = Path(__file__).parents[1] / "recipes" / "mnist.py"
EPOCHS = 20  # the recipe's default, and with it the share of the checks
BATCH_SIZE = 128
LR = 1e-3
POLL_SECONDS = 0.005


class BareLoop:
    """MLP, AdamW, one cycle, accuracy; the data on tensors, as in the recipe."""

    def __init__(self, images: ImageSet) -> None:
        torch.manual_seed(0)
        self.x, self.y = images.x, images.y
        self.model = mlp([784, 512, 512, 10])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)
        steps = EPOCHS * -(-len(self.y) // BATCH_SIZE)
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


def epochs_in_turn(loop: BareLoop, data_dir: Path, advance: Callable[[float], object]) -> list[tuple[float, float]]:
    """Run the recipe as a user does; after every epoch it is halted while the bare loop goes through one.

    The machine's speed may be another one a minute later, so the two are compared epoch by epoch.

    Args:
        loop: takes an epoch for every one of the recipe's.
        data_dir: where MNIST/raw is.
        advance: called after every epoch with the share that is done, to show progress.

    Returns:
        Seconds of the recipe's epochs, from the end of the one before, and of the bare loop's beside them.

    Raises:
        RuntimeError: with what the recipe printed, if it fails.
    """
    pairs = []
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "printed").open("w+", encoding="utf-8") as printed:
        command = [sys.executable, str(RECIPE), "--dataset", "mnist", "--data-dir", str(data_dir)]
        command += ["--penalty", "none", "--accelerator", "cpu", "--epochs", str(EPOCHS), "--out", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        with subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT) as recipe:
            checkpoint = Path(folder) / "last.ckpt"  # written at the end of every epoch
            _wait_for_change(recipe, checkpoint, None)  # the first epoch: there is no end of one before
            for epoch in range(1, EPOCHS):
                if recipe.poll() is not None:
                    break
                before = checkpoint.stat().st_mtime_ns
                recipe.send_signal(signal.SIGSTOP)
                try:
                    bare = _seconds(loop.epoch)
                finally:
                    recipe.send_signal(signal.SIGCONT)
                pairs.append((_seconds(partial(_wait_for_change, recipe, checkpoint, before)), bare))
                advance(epoch / EPOCHS)
        printed.seek(0)
        if recipe.returncode:
            raise RuntimeError(f"{RECIPE.name} failed: {printed.read().strip()}")
    return pairs


def _wait_for_change(process: subprocess.Popen[bytes], path: Path, before: int | None) -> None:
    """Until the file is written anew, or the process has ended."""
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
        time.sleep(POLL_SECONDS)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
