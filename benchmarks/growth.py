"""How the cost grows with batch, width, depth and classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from contenders import BATCH_WEIGHT, INPUT_WEIGHT, PARAM_WEIGHT, Step, objective_step
from straight_line import plain_step
from workload import Workload, synthetic_workload

from gradpen import InputGradPenalty, ParamGradPenalty, evaluate_inequality


class Point(NamedTuple):
    """One workload of a series."""

    series: str
    value: int
    widths: list[int]
    batch_size: int


def points(*, quick: bool) -> Iterator[Point]:
    """All workloads; in each series one number changes."""
    batches = (8, 16) if quick else (32, 128, 512, 2048, 4096)
    widths = (32, 64) if quick else (128, 512, 1024, 2048, 4096)
    depths = (2, 3) if quick else (2, 4, 8, 16)
    classes = (10, 100) if quick else (10, 100, 1000)
    batch_size, width = (8, 32) if quick else (128, 512)
    for value in batches:
        yield Point("batch", value, [784, width, width, 10], value)
    for value in widths:
        yield Point("width", value, [784, value, value, 10], batch_size)
    for value in depths:
        yield Point("depth", value, [784, *[width] * (value - 1), 10], batch_size)
    for value in classes:
        yield Point("classes", value, [784, width, width, value], batch_size)


def steps(point: Point) -> tuple[Callable[[], object], dict[str, Callable[[], object]]]:
    """The plain step of a workload, and gradpen's."""
    work = synthetic_workload(point.widths, point.batch_size)
    plain, checked = work.copied(), work.copied()

    def penalised(*penalties: InputGradPenalty | ParamGradPenalty) -> Step:
        return objective_step(work.copied(), list(penalties))

    return lambda: plain_step(plain), {
        "input": penalised(InputGradPenalty(INPUT_WEIGHT)),
        "param": penalised(ParamGradPenalty(PARAM_WEIGHT)),
        "both": penalised(InputGradPenalty(INPUT_WEIGHT), ParamGradPenalty(PARAM_WEIGHT)),
        "batch": penalised(ParamGradPenalty(BATCH_WEIGHT, over="batch")),
        "check": lambda: _check(checked),
    }


def _check(work: Workload) -> object:
    return evaluate_inequality(work.model, work.x, work.y)
