"""The sections of the benchmark: each measures, and returns its part of the results as plain numbers."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import growth
import spectral_methods
from agreement import check_agreement
from breakdown import recorded, replay
from contenders import BATCH_WEIGHT, INPUT_WEIGHT, PARAM_WEIGHT, Job, jobs, objective_step
from cuda_steps import cuda_table
from measure import CALLS, Timing, race, seconds_per_call, summarized
from memory import MEGABYTE, peak_bytes, peak_of_fresh_step
from recipe_epoch import ROUNDS, epochs_in_turn, recipe_and_bare_loops
from straight_line import plain_step
from workload import ImageSet, Workload, floors, load_images, synthetic_workload, trained, workload_on

from gradpen import InputGradPenalty, ParamGradPenalty, evaluate_inequality
from gradpen.penalties import GradPenalty

NEVER_AGAIN = 10**9  # after the first call

Results = dict[str, Any]
Advance = Callable[[float], object]  # takes the share of a section that is done


@dataclass(frozen=True)
class Setting:
    """What is measured, and how long.

    Attributes:
        hidden: widths of the hidden layers.
        batch_size: of everything but the growth tables.
        rounds: repetitions of each row,
        seconds: and when to stop before.
        quick: smaller workloads throughout.
        data_dir: where MNIST may lie.
        threads: of torch.
    """

    hidden: tuple[int, ...]
    batch_size: int
    rounds: int
    seconds: float
    quick: bool
    data_dir: Path
    threads: int

    @cached_property
    def images(self) -> ImageSet:
        """Read once."""
        return load_images(self.data_dir)

    @cached_property
    def work(self) -> Workload:
        """The net at initialisation."""
        return workload_on(self.images, self.hidden, self.batch_size)

    @property
    def widths(self) -> list[int]:
        """Of all layers."""
        return [784, *self.hidden, 10]


def penalty_row(job: Job, setting: Setting, advance: Advance) -> Results:
    """One row of the main table: agreement first, then the race."""
    left_out = {contender.name: "left out of the quick run" for contender in job.contenders if contender.compiled}
    errors = check_agreement(job, setting.work, left_out if setting.quick else {})
    able = [contender for contender in job.contenders if not isinstance(errors[contender.name], str)]
    plain = setting.work.copied()
    timings = race(
        lambda: plain_step(plain),
        {contender.name: contender.build(setting.work.copied()) for contender in able},
        rounds=setting.rounds,
        seconds=setting.seconds,
        advance=advance,
    )
    entries = []
    for contender in job.contenders:
        entry: Results = {"name": contender.name, "who": contender.who}
        error = errors[contender.name]
        entry |= {"reason": error} if isinstance(error, str) else {**_numbers(timings[contender.name]), "error": error}
        entries.append(entry)
    return {
        "rows": [_row(job.key, job.title, floors(setting.widths, setting.batch_size)[job.floor], job.target, entries)]
    }


def spectral_rows(setting: Setting, advance: Advance) -> Results:
    """Both rows about `evaluate_inequality`, and the points of the figure."""
    targets = {"at initialisation": 25.0, "after an epoch": 15.0}
    rows, points = [], {}
    for number, (state, work) in enumerate(_states(setting).items()):
        measured = _spectral_points(
            work, setting, lambda share, number=number: advance((number + share) / len(targets))
        )
        points[state] = measured
        shown = [entry for entry in measured if entry["shown"]]
        rows.append(_row(f"check_{number}", f"evaluate_inequality, {state}", None, targets[state], shown))
    return {"rows": rows, "spectral": points}


def _spectral_points(work: Workload, setting: Setting, advance: Advance) -> list[Results]:
    plain = spectral_methods.plain(work.copied())
    seconds_per_call(plain, CALLS)
    exact: list[spectral_methods.Norms] = []
    seconds = seconds_per_call(lambda: exact.append(spectral_methods.exact_norms(work)), 1)  # once: it takes a while
    exact_timing = summarized([(seconds / seconds_per_call(plain, CALLS), seconds)])
    methods = spectral_methods.methods(work, thorough=True)
    found = {method.name: spectral_methods.accuracy(method.name, method.compute(), exact[0]) for method in methods}
    timings = race(
        plain,
        {method.name: method.compute for method in methods},
        rounds=setting.rounds,
        seconds=2 * setting.seconds,
        advance=advance,
    )
    in_table = {method.name for method in spectral_methods.methods(work, thorough=False)}
    points = [
        {
            "name": method.name,
            "who": method.family if method.family in ("gradpen", "straight line") else "peer",
            "family": method.family,
            **_numbers(timings[method.name]),
            **found[method.name]._asdict(),
            "shown": method.name in in_table,
        }
        for method in methods
    ]
    explicit = {"name": "vmap(jacrev) and matrix_norm", "who": "peer", "family": "explicit", **_numbers(exact_timing)}
    return [*points, {**explicit, "error": 0.0, "width": None, "shown": True}]


def monitor_row(setting: Setting, advance: Advance) -> Results:
    """Measured elsewhere, since it takes minutes."""
    reason = "python benchmarks/monitor_overhead.py measures it"
    entry = {"name": "InequalityMonitor", "who": "gradpen", "reason": reason}
    return {"rows": [_row("monitor", "default InequalityMonitor in the MNIST recipe", 1.0, 1.03, [entry])]}


def recipe_row(setting: Setting, advance: Advance) -> Results:
    """The MNIST recipe's epochs against a bare loop's, in turn."""
    entries: list[Results] = [
        {"name": "recipes/mnist.py --penalty none", "who": "gradpen"},
        {"name": "bare PyTorch, MALLOC_TRIM_THRESHOLD_ set", "who": "peer"},
    ]
    if setting.quick or setting.images.name != "MNIST":
        missing = f"not measured: no MNIST/raw in {setting.data_dir.name}/"
        for entry in entries:
            entry["reason"] = "left out of the quick run" if setting.quick else missing
    else:
        with tempfile.TemporaryDirectory() as folder:
            trainings = recipe_and_bare_loops(setting.data_dir, Path(folder))
            rounds = epochs_in_turn(trainings, ROUNDS, advance)
        for entry, name in zip(entries, ("recipe", "bare, keeps memory"), strict=True):
            entry |= _numbers(summarized([(seconds[name] / seconds["bare"], seconds[name]) for seconds in rounds]))
    return {"rows": [_row("recipe", "epoch of the MNIST recipe, in bare PyTorch epochs", 1.0, 1.3, entries)]}


def memory_section(setting: Setting, advance: Advance) -> Results:
    """Peaks of the steps relative to the plain one's, and of a check of wide images."""
    work = setting.work.copied()
    plain = peak_of_fresh_step(work.model, lambda: plain_step(work))
    penalties: dict[str, tuple[float | None, list[GradPenalty]]] = {
        "input": (1.6, [InputGradPenalty(INPUT_WEIGHT)]),
        "param": (1.3, [ParamGradPenalty(PARAM_WEIGHT)]),
        "both": (None, [InputGradPenalty(INPUT_WEIGHT), ParamGradPenalty(PARAM_WEIGHT)]),
        "batch": (None, [ParamGradPenalty(BATCH_WEIGHT, over="batch")]),
    }
    parameters = sum(parameter.nbytes for parameter in work.model.parameters())
    steps = []
    for name, (target, terms) in penalties.items():
        copied = setting.work.copied()
        peak = peak_of_fresh_step(copied.model, objective_step(copied, terms))
        ratio, with_parameters = peak / plain, (peak + parameters) / (plain + parameters)
        steps.append(
            {
                "name": name,
                "target": target,
                "megabytes": peak / MEGABYTE,
                "ratio": ratio,
                "ratio_with_parameters": with_parameters,
            }
        )
    advance(0.3)
    widths, batch_size = ([3072, 64, 64, 64, 10], 32) if setting.quick else ([3072, 512, 512, 512, 10], 512)
    wide = synthetic_workload(widths, batch_size)
    peak = peak_bytes(lambda: evaluate_inequality(wide.model, wide.x, wide.y))
    explicit = batch_size * max(widths[1:-1]) * widths[0] * 4
    check = {"widths": widths, "batch_size": batch_size, "megabytes": peak / MEGABYTE, "target": 400.0}
    return {
        "memory": {
            "plain_megabytes": plain / MEGABYTE,
            "steps": steps,
            "check": {**check, "explicit_jacobian_megabytes": explicit / MEGABYTE},
        }
    }


def growth_section(setting: Setting, advance: Advance) -> Results:
    """Ratios for growing batches, widths, depths and numbers of classes."""
    points = list(growth.points(quick=setting.quick))
    found = []
    for number, point in enumerate(points):
        plain, steps = growth.steps(point)
        timings = race(plain, steps, rounds=max(setting.rounds // 8, 3), seconds=setting.seconds / 4)
        seconds = statistics.median(seconds_per_call(plain, 1) for _ in range(5))
        found.append(
            {
                "series": point.series,
                "value": point.value,
                "plain_seconds": seconds,
                "ratios": {name: timing.ratio for name, timing in timings.items()},
                "quartiles": {name: list(timing.quartiles) for name, timing in timings.items()},
                "rounds": {name: timing.rounds for name, timing in timings.items()},
            }
        )
        advance((number + 1) / len(points))
    return {"growth": found}


def breakdown_section(setting: Setting, advance: Advance) -> Results:
    """What of each step's time its matrix products take, and all its kernels; the rest is Python's and autograd's."""
    plain = setting.work.copied()
    floor_of = floors(setting.widths, setting.batch_size)
    steps: list[tuple[str, float | None, Callable[[], object]]] = [("plain step", 1.0, lambda: plain_step(plain))]
    for job in jobs():
        ours = next(contender for contender in job.contenders if contender.who == "gradpen")
        steps.append((job.title, floor_of[job.floor], ours.build(setting.work.copied())))
    left_out = objective_step(setting.work.copied(), [InputGradPenalty(INPUT_WEIGHT, every_n_steps=NEVER_AGAIN)])
    steps.append(("a step that every_n_steps leaves out", 1.0, left_out))
    for state, work in _states(setting).items():
        check = partial(spectral_methods.bracketed_norms, work, 0.05, slack=False)
        steps.append((f"evaluate_inequality, slack=False, {state}", None, check))
    found = []
    for number, (title, floor, step) in enumerate(steps):
        calls = recorded(step)
        parts = {"products": [call for call in calls if call.is_product], "kernels": calls}
        timings = race(
            lambda: plain_step(plain),
            {"step": step, **{name: replay(part) for name, part in parts.items()}},
            rounds=setting.rounds,
            seconds=setting.seconds / 3,
        )
        alone = {name: timings[name].ratio / CALLS for name in parts}
        found.append({"title": title, "floor": floor, **alone, "step": timings["step"].ratio})
        advance((number + 1) / len(steps))
    return {"breakdown": found}


def _states(setting: Setting) -> dict[str, Workload]:
    """The nets whose inequality is evaluated."""
    return {"at initialisation": setting.work, "after an epoch": trained(setting.work, setting.images)}


def cuda_section(setting: Setting, advance: Advance) -> Results:
    """None without a GPU."""
    options = dict(quick=setting.quick, rounds=setting.rounds, seconds=setting.seconds, advance=advance)
    return {"cuda": cuda_table(setting.work, **options)}


def _penalty_section(job: Job) -> Callable[[Setting, Advance], Results]:
    return lambda setting, advance: penalty_row(job, setting, advance)


SECTIONS: dict[str, Callable[[Setting, Advance], Results]] = {
    **{job.key: _penalty_section(job) for job in jobs()},
    "breakdown": breakdown_section,
    "check": spectral_rows,
    "monitor": monitor_row,
    "recipe": recipe_row,
    "memory": memory_section,
    "growth": growth_section,
    "cuda": cuda_section,
}


def _row(key: str, title: str, floor: float | None, target: float, entries: list[Results]) -> Results:
    return {"key": key, "title": title, "floor": floor, "target": target, "entries": entries}


def _numbers(timing: Timing) -> Results:
    return {
        "ratio": timing.ratio,
        "quartiles": list(timing.quartiles),
        "seconds": timing.seconds,
        "rounds": timing.rounds,
    }
