"""Several whole runs as one: a shared machine has slow and noisy quarters of an hour, longer than any row is measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]
ROUNDS = "rounds"  # how many there were, of a row or of each kind of step


class DifferentRunsError(ValueError):
    """Runs of other versions, on another machine, or with other rows."""


def median_of_runs(files: Sequence[Path]) -> Results:
    """The results whose every number is the median of those of the runs; `runs` says how many they were.

    Raises:
        DifferentRunsError: if they have not measured the same.
    """
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    number = sum(run["machine"].get("runs", 1) for run in runs)  # one may be the medians of several itself
    for run in runs:
        run["machine"]["date"] = max(other["machine"]["date"] for other in runs)
        run["machine"]["runs"] = number
    merged: Results = _median(runs, "the results")
    return merged


def _median(values: Sequence[Any], place: str) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise DifferentRunsError(f"expected runs of the same rows, got {values} in {place}")
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise DifferentRunsError(f"expected runs of the same rows, got others in {place}")
        return {key: _median([value[key] for value in values], place if place == ROUNDS else key) for key in first}
    if isinstance(first, list):
        if any(len(value) != len(first) for value in values):
            raise DifferentRunsError(f"expected runs of the same rows, got others in {place}")
        return [_median(several, place) for several in zip(*values, strict=True)]
    if isinstance(first, float):
        return statistics.median(values)
    if isinstance(first, int) and place == ROUNDS:
        return statistics.median_low(values)
    if any(value != first for value in values):
        raise DifferentRunsError(f"expected runs of the same versions, machine and rows, got {values} as {place}")
    return first
