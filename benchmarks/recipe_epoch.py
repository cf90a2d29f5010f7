"""An epoch of the MNIST recipe beside a bare PyTorch loop that does the same, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

HERE = Path(__file__).parent
EPOCHS = 20  # the recipe's default, and with it the share of the checks
ROUNDS = 9  # epochs that are measured; the trainings are not gone through to their ends
POLL_SECONDS = 0.005
KEEPS_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}  # glibc's allocator


@dataclass(frozen=True)
class Training:
    """A command that replaces a checkpoint at the end of every epoch.

    Attributes:
        command: to run.
        checkpoint: which nothing but the end of an epoch changes.
        environment: variables beside those of this process.
    """

    command: list[str]
    checkpoint: Path
    environment: Mapping[str, str] = field(default_factory=dict)


class Halted:
    """A training that is halted but for single epochs.

    Args:
        training: is started.
        printed: takes what the training prints.

    Raises:
        RuntimeError: by the methods, with what the training printed, if it fails.
    """

    def __init__(self, training: Training, printed: IO[str]) -> None:
        self.training = training
        self.printed = printed
        self.process = subprocess.Popen(
            training.command, env={**os.environ, **training.environment}, stdout=printed, stderr=subprocess.STDOUT
        )

    def first_epoch(self) -> None:
        """Wait for its end; when it began, nobody knows."""
        self._until_saved(None)

    def epoch(self) -> float:
        """Go on to the end of the next epoch; the seconds that it took."""
        before = self.training.checkpoint.stat().st_mtime_ns
        start = time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        self._until_saved(before)
        return time.perf_counter() - start

    def kill(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()

    def _until_saved(self, before: int | None) -> None:
        checkpoint = self.training.checkpoint
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            if self.process.poll() is not None:
                self._expect_success()
                raise RuntimeError(f"{' '.join(self.training.command)} ended before its last epoch: {self._output()}")
            time.sleep(POLL_SECONDS)
        self.process.send_signal(signal.SIGSTOP)

    def _expect_success(self) -> None:
        if self.process.returncode:
            raise RuntimeError(f"{' '.join(self.training.command)} failed: {self._output()}")

    def _output(self) -> str:
        self.printed.seek(0)
        return self.printed.read().strip()


def epochs_in_turn(
    trainings: Mapping[str, Training], rounds: int, advance: Callable[[float], object]
) -> list[dict[str, float]]:
    """Let one training after the other go through one epoch while the others are halted.

    The machine's speed may be another one a minute later, so they are compared epoch by epoch.

    Args:
        trainings: by name.
        rounds: epochs of each of them, after a first one that is not measured.
        advance: called after every round with the share that is done, to show progress.

    Returns:
        Seconds of each training's epochs.

    Raises:
        RuntimeError: with what a training printed, if it fails.
    """
    found = []
    with ExitStack() as stack:
        running = {}
        for name, training in trainings.items():
            printed = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
            running[name] = Halted(training, printed)
            stack.callback(running[name].kill)
            running[name].first_epoch()
        names = list(running)
        for number in range(1, rounds + 1):
            order = names if number % 2 else names[::-1]  # nobody always runs after the same other one
            seconds = {name: running[name].epoch() for name in order}
            found.append({name: seconds[name] for name in names})
            advance(number / rounds)
    return found


def recipe_and_bare_loops(data_dir: Path, folder: Path) -> dict[str, Training]:
    """The recipe as a user runs it; a bare loop; and one whose allocator keeps what is freed.

    Args:
        data_dir: where MNIST/raw is.
        folder: for their files.
    """
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    common = ["--data-dir", str(data_dir), "--epochs", str(EPOCHS)]
    recipe = [sys.executable, str(HERE.parent / "recipes" / "mnist.py"), *common]
    recipe += ["--dataset", "mnist", "--penalty", "none", "--accelerator", "cpu", "--out", str(folder / "recipe")]

    def bare(name: str, environment: Mapping[str, str]) -> Training:
        checkpoint = folder / f"{name}.ckpt"
        command = [sys.executable, str(HERE / "bare_loop.py"), *common, "--out", str(checkpoint)]
        return Training(command, checkpoint, {**threads, **environment})

    return {
        "recipe": Training(recipe, folder / "recipe" / "last.ckpt", threads),
        "bare": bare("bare", {}),
        "bare, keeps memory": bare("keeps", KEEPS_MEMORY),
    }
