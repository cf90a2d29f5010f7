"""How long a grid takes: steps of this machine, measured, times the steps that are planned."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from comparison.grid import BASELINE, Grid, Planned, task_name
from comparison.records import Records
from comparison.runs import Run, fit, ladder, load, probe, steps_per_epoch
from flags import Settings
from gradpen import evaluate_inequality
from images import Images, Labelled
from models import mlp
from objectives import cost_in_multiplications, penalised_loss

BATCHES = 30  # of the short fit that is timed


@dataclass(frozen=True)
class StepTimes:
    """Seconds on this machine.

    Attributes:
        step: of a plain optimiser step, Lightning's share included.
        check: of one look at the inequality.
        ladder: of one comparison of the three norms.
    """

    step: float
    check: float
    ladder: float


@dataclass(frozen=True)
class Estimate:
    """Of one stage and task."""

    stage: str
    task: str
    runs: int
    made: int  # already
    seconds: float  # of those that are not, one at a time


def estimates(grid: Grid, records: Records) -> list[Estimate]:
    """What is still to be done, by stage and task; where nothing is chosen yet, as if the first candidate were."""
    measured: dict[Any, StepTimes] = {}
    costs: dict[Any, float] = {}
    groups: dict[tuple[str, str], dict[str, tuple[Run, bool, float]]] = {}
    for planned in _with_matching(grid, records, costs):
        run = planned.run
        made = records.get(run) is not None
        seconds = 0.0 if made else seconds_of(run, _step_times(run, measured), _cost(run, costs))
        groups.setdefault((planned.stage, planned.task), {})[run.key] = (run, made, seconds)
    return [
        Estimate(stage, task, len(runs), sum(made for _, made, _ in runs.values()), sum(s for *_, s in runs.values()))
        for (stage, task), runs in groups.items()
    ]


def seconds_of(run: Run, times: StepTimes, cost: float) -> float:
    """One run: its steps, and what it is looked at."""
    settings = run.full_settings()
    images = load(run)
    count = settings.train_size or len(images.train.y) - settings.val_size
    steps = settings.epochs * -(-count // settings.batch_size)
    looks = (settings.checks + 2) * times.check + 2 * times.ladder if run.reads_test else 0.0
    return steps * times.step * cost + looks


def _with_matching(grid: Grid, records: Records, costs: dict[Any, float]) -> Iterable[Planned]:
    yield from grid.every_run(records)
    for task in grid.tasks:
        of_methods = {}
        for method in grid.methods_of(task):
            first = next(iter(grid.reporting(task, method, grid.candidates(task, method)[0])))
            of_methods[method] = _cost(first.run, costs)
        plain = {**grid.candidates(task, BASELINE)[0], **task.get("report", {})}
        for planned in grid.matching(task, of_methods, plain):
            yield replace(planned, stage="matched", task=task_name(grid.settings, task))


def _cost(run: Run, known: dict[Any, float]) -> float:
    """Multiplications of a step in units of a plain one, counted once for every kind of step."""
    settings = run.full_settings()
    kind = (_shape(run), *(getattr(settings, name) for name in ("penalty", "method", "of", "over", "every_n_steps")),
            settings.sam_radius > 0)  # fmt: skip
    if kind not in known:
        images = load(run)
        model = mlp(settings, images.train.x[0].numel(), images.num_classes)
        batch = images.train.rows(slice(settings.batch_size))
        known[kind] = cost_in_multiplications(model, penalised_loss(settings), *batch)
    return known[kind]


def _shape(run: Run) -> Any:
    settings = run.full_settings()
    images = load(run)
    return (
        tuple(images.train.x[0].shape),
        settings.hidden,
        settings.activation,
        settings.batch_size,
        settings.dropout > 0,
    )


def _step_times(run: Run, known: dict[Any, StepTimes]) -> StepTimes:
    """Measured once for every shape of network and batch."""
    settings = run.full_settings()
    kind = (*_shape(run), settings.probe_size)
    if kind not in known:
        known[kind] = measure(settings, load(run))
    return known[kind]


def measure(settings: Settings, images: Images) -> StepTimes:
    """Time a short plain fit on noise of the right shape, after one to warm up, and one look at each kind of norms."""
    count = BATCHES * settings.batch_size
    noise = Labelled(torch.randn(count, *images.train.x.shape[1:]), torch.randint(images.num_classes, (count,)))
    images = replace(images, train=noise, val=noise.rows(slice(0)), test=noise.rows(slice(0)))
    plain = replace(settings, penalty="none", weight=0.0, param_weight=None, sam_radius=0.0, epochs=1, lr=1e-4)
    model = mlp(plain, noise.x[0].numel(), images.num_classes)
    objective = penalised_loss(plain)
    seconds = [_timed(lambda: fit(plain, images, model, objective, watch=False)) for _ in range(2)]
    x, y = probe(model, images, settings.probe_size)
    model.eval()
    return StepTimes(
        step=seconds[1] / steps_per_epoch(plain, images),
        check=_timed(lambda: evaluate_inequality(model, x, y, slack=False)),
        ladder=_timed(lambda: ladder(model, images)),
    )


def _timed(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
