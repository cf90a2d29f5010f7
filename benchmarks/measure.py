"""Interleaved timing: every contender once a round, as a ratio to the plain step of the same round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

CALLS = 4  # per measurement: the caches are the contender's own, and a lazy penalty goes round once
SLOW = 20.0  # plain steps; what takes longer is called once a round, and in the first rounds only
SLOW_ROUNDS = 9
FEWEST_ROUNDS = 3  # of everything, however long they take
INTERRUPTION = 1.0  # seconds; a call that takes longer was not merely interrupted


@dataclass(frozen=True)
class Timing:
    """Ratios to the plain step, and seconds of one call.

    Attributes:
        ratio: median over rounds.
        quartiles: of the ratio.
        seconds: median of one call.
        rounds: how many there were.
    """

    ratio: float
    quartiles: tuple[float, float]
    seconds: float
    rounds: int


def race(
    plain: Callable[[], object],
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    advance: Callable[[float], object] = lambda share: None,
) -> dict[str, Timing]:
    """Time all steps in turn, the plain one among them, in another order every round.

    Args:
        plain: what the ratios are relative to.
        steps: name → one call.
        rounds: repetitions; slow steps get SLOW_ROUNDS of them.
        seconds: no round begins after so many, except the first FEWEST_ROUNDS.
        advance: called after every round with the share that is done, to show progress.
    """
    begin = time.perf_counter()
    seconds_per_call(plain, CALLS)
    limit = SLOW * seconds_per_call(plain, CALLS)
    slow = {name for name, step in steps.items() if _takes_longer(step, limit)}
    for name in steps.keys() - slow:
        seconds_per_call(steps[name], CALLS - 1)  # a lazy penalty has gone round once
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    order: list[str | None] = [None, *steps]  # None: the plain step
    shuffled = random.Random(0)
    for round_number in range(rounds):
        taken: dict[str | None, float] = {}
        shuffled.shuffle(order)  # nobody runs after the same other one more often than by chance
        for turn in order:
            if turn is None:
                taken[turn] = seconds_per_call(plain, CALLS)
            elif turn not in slow:
                taken[turn] = seconds_per_call(steps[turn], CALLS)
            elif round_number < SLOW_ROUNDS:
                taken[turn] = seconds_per_call(steps[turn], 1)
        for name, pairs in found.items():
            if name in taken:
                pairs.append((taken[name] / taken[None], taken[name]))
        spent = time.perf_counter() - begin
        advance(max((round_number + 1) / rounds, spent / seconds))
        if spent > seconds and round_number + 1 >= FEWEST_ROUNDS:
            break
    return {name: summarized(pairs) for name, pairs in found.items()}


def summarized(pairs: Sequence[tuple[float, float]]) -> Timing:
    """Medians and quartiles of (ratio, seconds) pairs."""
    ratios = [ratio for ratio, _ in pairs]
    return Timing(
        statistics.median(ratios), _quartiles(ratios), statistics.median(taken for _, taken in pairs), len(pairs)
    )


def seconds_per_call(step: Callable[[], object], calls: int) -> float:
    """Wall seconds of one of several calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def _takes_longer(step: Callable[[], object], limit: float) -> bool:
    """Whether a call takes longer than so many seconds; the first may set something up, or be interrupted."""
    first = seconds_per_call(step, 1)
    return first > limit and (first > INTERRUPTION or seconds_per_call(step, 1) > limit)


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
