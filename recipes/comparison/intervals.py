"""Means over seeds with 95 % t-intervals, plain and paired."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its interval, None where one value gives none."""

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float | None:
        """The lower end."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """The upper end."""
        return None if self.half is None else self.mean + self.half

    def exp(self) -> tuple[float, float | None, float | None]:
        """Geometric mean and the ends of its interval, of an interval of logarithms."""
        ends = (None, None) if self.half is None else (_exp(self.mean - self.half), _exp(self.mean + self.half))
        return _exp(self.mean), *ends


def _exp(logarithm: float) -> float:
    """Its exponential, infinity where that is no number any more."""
    try:
        return math.exp(logarithm)
    except OverflowError:
        return math.inf


def interval(values: Sequence[float]) -> Interval | None:
    """Student's t-interval of a mean; None of no values."""
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, None, 1)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error, len(values))


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval | None:
    """Interval of the differences to a reference, seed by seed; None without common seeds."""
    return interval([value - reference[seed] for seed, value in values.items() if seed in reference])


def paired_ratio(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval | None:
    """Interval of the logarithms of the ratios to a reference, seed by seed; what is not positive is left out."""
    logs = [
        {seed: math.log(value) for seed, value in one.items() if value is not None and value > 0}
        for one in (values, reference)
    ]
    return paired(*logs)
