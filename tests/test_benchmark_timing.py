"""The benchmarks' clock: ratios within a round, orders by chance, and who counts as slow."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import measure


class Clock:
    """Time that passes in steps only; `log` has the names of those that were called."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def step(self, name, *durations):
        """A step that takes these times, one call after the other, and the last of them from then on."""
        left = list(durations)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.log.append(name)

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    return clock


def test_a_race_takes_the_ratios_within_each_round(clock):
    plain = clock.step("plain", *[1.0] * 8, *[1.0] * 4, *[2.0] * 4, 4.0)
    timings = measure.race(plain, {"twice": clock.step("twice", *[2.0] * 8, *[4.0] * 4, 8.0)}, rounds=3, seconds=1e9)
    assert timings == {"twice": measure.Timing(2.0, (2.0, 2.0), 4.0, 3)}


def test_every_contender_runs_after_every_other_one(clock):
    names = ["a", "b", "c", "d"]
    measure.race(clock.step("plain", 1.0), {name: clock.step(name, 1.0) for name in names}, rounds=60, seconds=1e9)
    turns = clock.log[(2 + len(names)) * measure.CALLS :: measure.CALLS]
    assert len(turns) == 60 * 5
    followed = Counter(pairwise(turns))
    for first in ["plain", *names]:
        for second in {"plain", *names} - {first}:
            assert 5 <= followed[first, second] <= 25  # 15 less what falls between rounds, by chance


def test_slow_contenders_run_in_the_first_rounds(clock):
    steps = {
        "slow": clock.step("slow", 30.0),
        "interrupted": clock.step("interrupted", 0.5, 0.001),
    }
    timings = measure.race(clock.step("plain", 1.0), {"slow": steps["slow"]}, rounds=30, seconds=1e9)
    assert timings["slow"] == measure.Timing(30.0, (30.0, 30.0), 30.0, measure.SLOW_ROUNDS)
    timings = measure.race(clock.step("plain", 0.001), {"interrupted": steps["interrupted"]}, rounds=30, seconds=1e9)
    assert timings["interrupted"].rounds == 30
    timings = measure.race(clock.step("plain", 1.0), {"slow": steps["slow"]}, rounds=30, seconds=1.0)
    assert timings["slow"].rounds == measure.FEWEST_ROUNDS


def test_quartiles_are_those_of_the_ratios():
    timing = measure.summarized([(ratio, 10 * ratio) for ratio in (5.0, 1.0, 4.0, 2.0, 3.0)])
    assert timing == measure.Timing(3.0, (2.0, 4.0), 30.0, 5)
    assert measure.summarized([(2.0, 1.0)]).quartiles == (2.0, 2.0)
