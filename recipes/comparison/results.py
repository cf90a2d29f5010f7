"""The records of a grid as a report reads them: by task, method and seed."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison.grid import Grid, Planned, task_name
from comparison.runs import Record
from gradpen.history import ALL_LAYERS, Row

AMOUNTS = (  # the settings by which a method says how much of it
    "weight", "param_weight", "weight_decay", "dropout", "sam_radius", "label_smoothing", "lr"
)  # fmt: skip
BASELINES = ("weight_decay", "dropout", "sam_radius", "label_smoothing")


class Outcome:
    """A planned run and what came of it."""

    def __init__(self, planned: Planned, record: Record) -> None:
        self.planned = planned
        self.record = record
        self.settings = vars(planned.run.full_settings())
        self.result: dict[str, Any] = record["result"]
        self.history: list[Row] = record["history"]

    @property
    def method(self) -> str:
        """Of the grid."""
        return self.planned.method

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.planned.seed

    @property
    def has_penalty(self) -> bool:
        """Whether gradients were penalised."""
        return self.settings["penalty"] != "none"

    @property
    def is_baseline(self) -> bool:
        """Whether it is one of the usual regularisers instead."""
        return not self.has_penalty and any(self.settings[name] for name in BASELINES)

    @property
    def gap(self) -> float | None:
        """Train − test accuracy."""
        if "test_accuracy" not in self.result:
            return None
        return self.result["train_accuracy"] - self.result["test_accuracy"]

    def rows(self, layer: str = ALL_LAYERS) -> list[Row]:
        """The checks of one layer, in order."""
        return sorted((row for row in self.history if row["layer"] == layer), key=lambda row: int(row["step"]))

    def layers(self) -> list[str]:
        """The layers in the sum."""
        return list(dict.fromkeys(row["layer"] for row in self.history if row["layer"] != ALL_LAYERS))

    def at(self, when: str, name: str, layer: str = ALL_LAYERS) -> float | None:
        """A value at the "start", after the first "epoch" or at the "end", or its geometric mean "from epoch to end".

        None if it was not measured.
        """
        rows = self.rows(layer)
        if not rows or (when.endswith("end") and self.record["status"] != "finished"):
            return None
        first_epoch = self.result["steps"] // self.settings["epochs"]
        match when:
            case "start" | "end":
                return rows[0 if when == "start" else -1][name]
            case "epoch":
                return next((row[name] for row in rows if row["step"] == first_epoch), None)
            case "from epoch to end":
                values = [row[name] for row in rows if row["step"] >= first_epoch]
                return statistics.geometric_mean(values) if values and None not in values and min(values) > 0 else None
        raise ValueError(f"no such time: {when!r}")


class Results:
    """All outcomes of a grid.

    Args:
        grid: what was planned.
        outcomes: what came of it.
    """

    def __init__(self, grid: Grid, outcomes: Iterable[Outcome]) -> None:
        self.grid = grid
        self.all = list(outcomes)
        self.reported = [outcome for outcome in self.all if outcome.planned.stage == "report"]
        self.tasks = list(dict.fromkeys(outcome.planned.task for outcome in self.reported))

    def methods(self, task: str, *, matched: bool = False) -> list[str]:
        """In the grid's order, then the baseline with more epochs if wanted."""
        present = {outcome.method for outcome in self.reported if outcome.planned.task == task}
        planned = [method for method in self.grid.methods if method in present]
        return planned + (sorted(present - set(planned)) if matched else [])

    def of(self, task: str, method: str) -> list[Outcome]:
        """The runs of one method that came to an end, by seed."""
        found = [
            outcome
            for outcome in self.reported
            if (outcome.planned.task, outcome.method) == (task, method) and outcome.result
        ]
        return sorted(found, key=lambda outcome: outcome.seed)

    def sweep(self, question: int) -> list[Outcome]:
        """The runs of the sweeps that answer a question."""
        return [outcome for outcome in self.all if outcome.planned.question == question and outcome.result]

    def failed(self) -> list[Outcome]:
        """The runs that have a traceback in place of a result."""
        return [outcome for outcome in self.all if outcome.record["status"] == "failed"]

    def penalties(self, task: str) -> list[str]:
        """The methods that penalise gradients."""
        return [method for method in self.methods(task) if any(one.has_penalty for one in self.of(task, method))]

    def candidates(self, task: str, method: str) -> list[dict[str, Any]]:
        """What the settings of a method were chosen from."""
        return self.grid.candidates(self.described(task), method) if method in self.grid.methods else []

    def described(self, task: str) -> Mapping[str, Any]:
        """What the grid says of a task."""
        return next(one for one in self.grid.tasks if task_name(self.grid.settings, one) == task)

    def best_baseline(self, task: str) -> str | None:
        """The usual regulariser that is best on validation images, by its best candidate or the mean of its seeds."""
        known = {}
        for method in self.methods(task):
            runs = [one for one in self.all if (one.planned.task, one.method) == (task, method) and one.is_baseline]
            chosen, reported = (
                [
                    one.result["val_accuracy"]
                    for one in runs
                    if one.planned.stage == stage and "val_accuracy" in one.result
                ]
                for stage in ("choose", "report")
            )
            if chosen or reported:
                known[method] = max(chosen) if chosen else statistics.fmean(reported)
        return max(known, key=known.__getitem__, default=None)


def by_seed(outcomes: Sequence[Outcome], name: str) -> dict[int, float]:
    """Seed → a value of the results; without those that do not have it."""
    return {one.seed: one.result[name] for one in outcomes if one.result.get(name) is not None}


def at_by_seed(outcomes: Sequence[Outcome], when: str, name: str, layer: str = ALL_LAYERS) -> dict[int, float]:
    """Seed → a value of the history; without those that do not have it."""
    values = {one.seed: one.at(when, name, layer) for one in outcomes}
    return {seed: value for seed, value in values.items() if value is not None}


def amount(outcome: Outcome, baseline: Outcome | None, candidates: Sequence[Mapping[str, Any]] = ()) -> str:
    """How much of its method a run had: what it sets otherwise than the baseline, and whether more or less was tried."""
    plain = {} if baseline is None else baseline.settings
    said = []
    for name in AMOUNTS:
        value = outcome.settings[name]
        if value and value != plain.get(name):
            tried = {candidate[name] for candidate in candidates if name in candidate} | {value}
            edges = {max(tried): " (largest tried)", min(tried): " (smallest tried)"} if len(tried) > 1 else {}
            said.append(f"{name.replace('_', ' ')} {value:g}{edges.get(value, '')}")
    return ", ".join(said) or "–"


def write_csv(path: Path, outcomes: Sequence[Outcome]) -> None:
    """One row for each run: what was planned, what was set, what came out."""
    rows = [_csv_row(outcome) for outcome in outcomes]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _csv_row(outcome: Outcome) -> dict[str, Any]:
    planned, result = outcome.planned, outcome.result
    simple = {name: value for name, value in result.items() if not isinstance(value, dict)}
    ladders = {
        f"tightness_{norm}_{when}": value
        for when, rungs in result.get("ladder", {}).items()
        for norm, value in (rungs or {}).items()
    }
    last = {
        f"{name}_end": outcome.at("end", name)
        for name in ("lhs", "rhs", "tightness", "input_grad_sq_norm", "param_grad_sq_norm", "batch_grad_sq_norm")
    }
    violations = sum(row["violations"] for row in outcome.rows())
    return {
        "key": outcome.record["key"],
        "stage": planned.stage,
        "question": planned.question or None,
        "task": planned.task,
        "method": planned.method,
        "seed": planned.seed,
        "status": outcome.record["status"],
        **{
            "penalty_method" if name == "method" else name: value
            for name, value in outcome.settings.items()
            if name not in ("out", "data_dir", "resume", "seed")
        },
        **simple,
        "gap": outcome.gap,
        **last,
        "violations": violations,
        **ladders,
    }
