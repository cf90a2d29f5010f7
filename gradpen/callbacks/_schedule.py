"""When to check."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from gradpen import _checks


@dataclass(frozen=True)
class Schedule:
    """Which optimiser steps, and the ends of which epochs.

    Attributes:
        every_n_steps: every so many optimiser steps.
        every_n_epochs: the end of every so many epochs.
        at: these optimiser steps, or a callable step → bool.

    Raises:
        ValueError: if a period is no positive int, or a step no int >= 0.
    """

    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    at: Iterable[int] | Callable[[int], bool] | None = None

    def __post_init__(self) -> None:
        """Refuse what would never, or always, be due."""
        for name in ("every_n_steps", "every_n_epochs"):
            if getattr(self, name) is not None:
                _checks.check_positive_int(name, getattr(self, name))
        if self.at is None or callable(self.at):
            return
        if not isinstance(self.at, Iterable):
            raise ValueError(
                f"at must name optimiser steps, such as [0, 10], or be a callable step → bool, got {self.at!r}"
            )
        if not isinstance(self.at, Collection):  # an iterator, which can be read once
            object.__setattr__(self, "at", tuple(self.at))
        wrong = [step for step in self.at if isinstance(step, bool) or not isinstance(step, int) or step < 0]
        if wrong:
            raise ValueError(f"at must name optimiser steps, ints >= 0, or be a callable step → bool, got {wrong[0]!r}")

    def names_any(self, steps: range) -> bool:
        """Whether a check is due after one of these optimiser steps."""
        return any(self._names(step) for step in steps)

    def names_epoch(self, epoch: int) -> bool:
        """Whether a check is due at the end of the epoch with this index."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0

    def count(self, start: int, end: int, steps_per_epoch: int | None) -> int | None:
        """How many steps it names after `start`, the end included; None if only a callable knows.

        `steps_per_epoch` is None if an epoch does not end.
        """
        if callable(self.at):
            return None
        steps = {end, *(self.at or ())}
        if self.every_n_steps is not None:
            steps.update(range(0, end + 1, self.every_n_steps))
        if self.every_n_epochs is not None and steps_per_epoch is not None:
            steps.update(range(0, end + 1, self.every_n_epochs * steps_per_epoch))
        return sum(start < step <= end for step in steps)

    def __str__(self) -> str:
        """In words."""
        parts = []
        if self.every_n_steps is not None:
            parts.append("every step" if self.every_n_steps == 1 else f"every {self.every_n_steps} steps")
        if self.every_n_epochs is not None:
            parts.append("every epoch" if self.every_n_epochs == 1 else f"every {self.every_n_epochs} epochs")
        if callable(self.at):
            parts.append(f"the steps that {getattr(self.at, '__name__', type(self.at).__name__)} names")
        elif self.at:
            parts.append(f"the steps {_shortened(sorted(self.at))}")
        return ", ".join([*parts, "before the first step and at the end"])

    def _names(self, step: int) -> bool:
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        if self.at is None:
            return False
        return bool(self.at(step)) if callable(self.at) else step in self.at


def _shortened(steps: list[int], most: int = 8) -> str:
    shown = ", ".join(map(str, steps[:most]))
    return shown if len(steps) <= most else f"{shown}, … ({len(steps)} of them)"
