"""What the monitor says at the start of training: what it found by itself, and what it will cost."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from gradpen.callbacks._schedule import Schedule
from gradpen.report import InequalityReport

TIMED_STEPS = 20  # before the checks' share of the run is told


class Cost:
    """What the checks cost: in seconds at once, as a share of the run when some steps have been timed.

    Args:
        trainer: at the start of training.
        schedule: of the checks.
        seconds: of the first one.
    """

    def __init__(self, trainer: Trainer, schedule: Schedule, seconds: float) -> None:
        self.start = trainer.global_step
        self.end = _last_step(trainer)
        self.seconds = seconds  # of the last check
        self.checks: int | None = None
        if self.end is not None:
            ahead = schedule.count(self.start, self.end, _steps_per_epoch(trainer))
            self.checks = None if ahead is None else ahead + 1  # the first one is done
        self._spent = 0.0  # in checks, since the clock runs
        self._clock: float | None = time.perf_counter()

    def add_check(self, seconds: float) -> None:
        """A check took so long."""
        self.seconds = seconds
        self._spent += seconds

    def __str__(self) -> str:
        """The line of the announcement."""
        first = f"the first check took {self.seconds:.2g} s"
        if self.end is None:
            return f"{first}; how many steps there will be is not known"
        steps = f"{self.end - self.start:,} steps"
        if self.checks is None:
            return f"{first}; how many there will be in {steps} only the callable knows"
        return f"{first}; {self.checks} in {steps} take about {self.checks * self.seconds:.2g} s"

    def share_line(self, step: int) -> str | None:
        """The checks' share of the run, once, when enough steps have been timed."""
        done = step - self.start
        if self._clock is None or done < TIMED_STEPS:
            return None
        step_seconds = (time.perf_counter() - self._clock - self._spent) / done
        self._clock = None
        if self.end is None or self.checks is None:
            return None
        in_checks, in_steps = self.checks * self.seconds, (self.end - self.start) * step_seconds
        return (
            f"InequalityMonitor: a step takes {step_seconds:.2g} s and a check {self.seconds:.2g} s, so "
            f"{self.checks} checks will take about {in_checks / (in_checks + in_steps):.1%} of this run"
        )


def announcement(
    *,
    part: str,
    scalar: str,
    probe: str,
    schedule: Schedule,
    cost: Cost,
    report: InequalityReport,
) -> str:
    """What was found, in one block."""
    lines = [
        "InequalityMonitor",
        f"  model     {part}",
        f"  f         {scalar}",
        f"  in sum    {', '.join(layer.name for layer in report.layers) or 'no layer: the left side is 0'}",
        *(f"  left out  {layer.name}: {layer.reason}" for layer in report.excluded),
        f"  norms     {report.norm}",
        f"  probe     {probe}",
        f"  schedule  {schedule}",
        f"  cost      {cost}",
    ]
    return "\n".join(lines)


def describe_part(pl_module: nn.Module, part: nn.Module) -> str:
    """Name and type of the part of a LightningModule that maps x to the output."""
    name = next((name for name, module in pl_module.named_modules() if module is part), "")
    if part is pl_module:
        return f"the whole {type(part).__name__}"
    return f"{name or 'a module outside the LightningModule'} ({type(part).__name__})"


def function_name(function: Any) -> str:
    """What a function, or a module that is called, is known by."""
    return str(getattr(function, "__name__", type(function).__name__))


def _last_step(trainer: Trainer) -> int | None:
    """The optimiser step at which training will end; None if it is not known."""
    if not trainer.lightning_module.automatic_optimization:  # a batch may make any number of steps
        return None
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes from epoch to epoch
        return None
    return int(steps) if math.isfinite(steps) and steps > 0 else None


def _steps_per_epoch(trainer: Trainer) -> int | None:
    """None if nobody knows how long an epoch is: a stream."""
    steps = trainer.num_training_batches / trainer.accumulate_grad_batches
    return max(1, math.ceil(steps)) if math.isfinite(steps) else None
