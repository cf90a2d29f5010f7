"""The grid file: which methods are compared on which data, and the runs that this takes.

name: MNIST
settings: {recipe: mnist, dataset: mnist, val_size: 10000}   # of all runs: flags of the recipe
tasks:                                                        # data sets, sizes, epochs
  - {train_size: 1000, epochs: 100}                           # name: "{data}, longer", where two would be called alike
  - {train_size: 5000, only: [none, input], methods: {input: {weight: [0.3, 1]}}}   # candidates of its own
methods:                                                      # a list holds the candidates of the first stage
  none: {}
  input: {penalty: input, weight: [1, 3, 10]}
  input, every 4th step: {like: input, every_n_steps: 4}      # with what was chosen for the other
choose_seed: 0
seeds: [1, 2, 3, 4, 5]
matched_compute: largest                                      # none | largest | each; a task may have its own
sweeps:                                                       # every case with every seed, nothing is chosen
  - {question: 5, settings: {epochs: 5}, vary: {init: [default, he]}, seeds: [1, 2]}
  - {question: 6, settings: {optimizer: sgd}, cases: [{lr: 0.1, epochs: 10}, {lr: 0.2, epochs: 5}], seeds: [1]}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from comparison.records import Records
from comparison.runs import Run, data_name
from flags import UserError

BASELINE = "none"
MATCHED = ("none", "largest", "each")

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Planned:
    """A run, and where it stands in the grid.

    Attributes:
        run: what is trained.
        stage: "choose", "report" or "sweep".
        task: of the grid; in a sweep its question.
        method: of the grid; in a sweep its case.
        seed: of the run.
        question: that a sweep answers; 0 outside of sweeps.
    """

    run: Run
    stage: str
    task: str
    method: str
    seed: int
    question: int = 0


@dataclass(frozen=True)
class Sweep:
    """Runs that answer a question by themselves."""

    question: int
    seeds: Sequence[int]
    settings: Values = field(default_factory=dict)
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    cases: Sequence[Values] = ({},)

    def all_cases(self) -> list[dict[str, Any]]:
        """The listed cases, each with every combination of what varies."""
        combinations = [dict(zip(self.vary, chosen, strict=True)) for chosen in product(*self.vary.values())]
        return [{**case, **combination} for case in self.cases for combination in combinations]


@dataclass(frozen=True)
class Grid:
    """A grid file; see the module's docstring."""

    name: str
    tasks: Sequence[Values]
    methods: Mapping[str, Values]
    seeds: Sequence[int]
    settings: Values = field(default_factory=dict)
    choose_seed: int = 0
    matched_compute: str = "largest"
    sweeps: Sequence[Sweep] = ()

    def __post_init__(self) -> None:
        """Refuse a grid that could not be run to its end."""
        if BASELINE not in self.methods:
            raise UserError(f"expected a method named {BASELINE}, which all others are compared with, got "
                            f"{', '.join(self.methods)}")  # fmt: skip
        for matched in (self.matched_compute, *(task.get("matched_compute", "none") for task in self.tasks)):
            if matched not in MATCHED:
                raise UserError(f"matched_compute must be one of {', '.join(MATCHED)}, got {matched!r}")
        if self.choose_seed in self.seeds:
            raise UserError(f"choose_seed {self.choose_seed} must not be among the seeds that are reported, got "
                            f"{list(self.seeds)}")  # fmt: skip
        for name, method in self.methods.items():
            model = method.get("like")
            if model is not None and "like" in self.methods.get(model, {"like": None}):
                raise UserError(f"method {name!r} is like {model!r}, which must be a method that is not like another")
        names = [task_name(self.settings, task) for task in self.tasks]
        if len(set(names)) < len(names):
            raise UserError(f"tasks must have different names, got {'; '.join(names)}: give each a name")
        for task in self.tasks:
            unknown = set(task.get("only", [BASELINE])) - set(self.methods)
            if unknown or BASELINE not in self.methods_of(task):
                raise UserError(f"only must name methods of the grid, {BASELINE} among them, got {task['only']}")
            if any("like" in self.methods.get(name, {}) for name in task.get("methods", {})):
                raise UserError(f"methods of a task must not be like another, got {', '.join(task['methods'])}")
            if not task.get("methods", {}).keys() <= set(self.methods_of(task)):
                raise UserError(
                    f"methods of a task must be some that are compared on it, got {', '.join(task['methods'])}"
                )
            for name in self.methods_of(task):
                if self.methods[name].get("like", name) not in self.methods_of(task):
                    raise UserError(f"method {name!r} is like {self.methods[name]['like']!r}, which only must name too")
        for planned in self.every_run():
            planned.run.full_settings()

    def every_run(self, records: Records | None = None) -> Iterator[Planned]:
        """All runs but those of matched compute, with what the records choose so far, or the first candidate."""
        yield from self.choosing()
        for task in self.tasks:
            for method in self.methods_of(task):
                chosen = None if records is None else self.chosen(task, method, records)
                yield from self.reporting(task, method, chosen or self.candidates(task, method)[0])
        yield from self.sweeping()

    def methods_of(self, task: Values) -> list[str]:
        """What is compared on a task: all methods, or those that it names."""
        return [method for method in self.methods if method in task.get("only", self.methods)]

    # -- first stage --------------------------------------------------------------------------------------------------

    def candidates(self, task: Values, method: str) -> list[dict[str, Any]]:
        """Every combination of the values that a task and a method list."""
        model = self.methods[method].get("like", method)
        merged = {**self.settings, **task, **self.methods[model], **task.get("methods", {}).get(model, {})}
        listed = {name: value for name, value in merged.items() if isinstance(value, list) and name not in NOT_FLAGS}
        own = {name: value for name, value in self.methods[method].items() if name != "like"} if model != method else {}
        return [{**merged, **dict(zip(listed, chosen, strict=True)), **own} for chosen in product(*listed.values())]

    def is_chosen(self, task: Values, method: str) -> bool:
        """Whether the method has candidates of its own."""
        return "like" not in self.methods[method] and len(self.candidates(task, method)) > 1

    def choosing(self) -> Iterator[Planned]:
        """The runs of one seed by which settings are chosen; they never see the test images."""
        for task in self.tasks:
            for method in self.methods_of(task):
                if self.is_chosen(task, method):
                    for settings in self.candidates(task, method):
                        yield _planned(settings, self.choose_seed, "choose", task_name(self.settings, task), method)

    def chosen(self, task: Values, method: str, records: Records) -> dict[str, Any] | None:
        """The candidate with the best accuracy on the validation images; None if every run of it failed.

        Raises:
            UserError: if there are candidates but no validation images.
        """
        model = self.methods[method].get("like", method)
        if not self.is_chosen(task, model):
            return self.candidates(task, method)[0]
        best, best_accuracy = None, -1.0
        pairs = zip(self.candidates(task, model), self.candidates(task, method), strict=True)
        for candidate, settings in pairs:
            record = records.get(_planned(candidate, self.choose_seed, "choose", "", "").run)
            if record is None:
                continue
            if "val_accuracy" not in record["result"]:
                raise UserError(f"method {model!r} has candidates to choose from: give val_size in the settings")
            if record["result"]["val_accuracy"] > best_accuracy:
                best, best_accuracy = settings, record["result"]["val_accuracy"]
        return best

    # -- second stage -------------------------------------------------------------------------------------------------

    def reporting(self, task: Values, method: str, settings: Values) -> Iterator[Planned]:
        """The chosen settings with fresh seeds."""
        settings = {**settings, **task.get("report", {})}
        for seed in self.seeds:
            yield _planned(settings, seed, "report", task_name(self.settings, task), method)

    def matching(self, task: Values, costs: Mapping[str, float], settings: Values) -> Iterator[Planned]:
        """The plain baseline with as many times the epochs as the penalties cost."""
        for factor in sorted(set(self.factors(costs, task).values())):
            longer = {**settings, "epochs": math.ceil(factor * settings["epochs"])}
            for seed in self.seeds:
                yield _planned(longer, seed, "report", task_name(self.settings, task), matched_name(factor))

    def factors(self, costs: Mapping[str, float], task: Values) -> dict[str, float]:
        """Method → how many times the epochs the plain baseline gets: its cost, rounded up to halves.

        A twentieth too little counts as enough. With "largest" every method is compared with a plain baseline that was given
        as much as the dearest of them.
        """
        rounded = {name: math.ceil(2 * cost - 0.1) / 2 for name, cost in costs.items() if cost > 1.05}
        matched = task.get("matched_compute", self.matched_compute)
        if matched == "none" or not rounded:
            return {}
        return rounded if matched == "each" else dict.fromkeys(rounded, max(rounded.values()))

    # -- sweeps -------------------------------------------------------------------------------------------------------

    def sweeping(self) -> Iterator[Planned]:
        """Every case of every sweep with every seed."""
        for number, sweep in enumerate(self.sweeps, start=1):
            for case in sweep.all_cases():
                settings = {**self.settings, **sweep.settings, **case}
                name = ", ".join(f"{name} {value}" for name, value in case.items())
                for seed in sweep.seeds:
                    yield _planned(settings, seed, "sweep", f"sweep {number}", name, sweep.question)


NOT_FLAGS = ("recipe", "name", "report", "only", "methods", "matched_compute")


def _planned(settings: Values, seed: int, stage: str, task: str, method: str, question: int = 0) -> Planned:
    flags = {name: value for name, value in settings.items() if name not in NOT_FLAGS}
    run = Run(str(settings.get("recipe")), {**flags, "seed": seed}, reads_test=stage != "choose")
    return Planned(run, stage, task, method, seed, question)


def task_name(settings: Values, task: Values) -> str:
    """What a task is called: its name, in which {data} stands for the data's, or the data and how many images of it."""
    merged = {**settings, **task, **task.get("report", {})}
    size = f"{merged['train_size']:,}" if merged.get("train_size") else "all"
    return str(task.get("name", f"{{data}}, {size} images")).replace("{data}", data_name(merged))


def matched_name(factor: float) -> str:
    """What the plain baseline with more epochs is called."""
    return f"{BASELINE}, {factor:g} × epochs"


def read_grid(path: Path, overrides: Values | None = None) -> Grid:
    """A grid from its file.

    Args:
        path: of the YAML file.
        overrides: settings of all runs that take the place of the file's, such as data_dir.

    Raises:
        UserError: if it cannot be read, or is no grid.
    """
    described = _read(path)
    given = _fields(Grid, described, str(path))
    given["sweeps"] = [Sweep(**_fields(Sweep, sweep, f"a sweep of {path}")) for sweep in given.get("sweeps", [])]
    given["settings"] = {**given.get("settings", {}), **(overrides or {})}
    return Grid(**given)


def _read(path: Path) -> Any:
    """A YAML file, with what it extends put in."""
    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--grid {path} cannot be read: {error}") from error
    if not isinstance(described, dict) or "extends" not in described:
        return described
    base = _read(path.parent / described.pop("extends"))
    return {**base, **described, "settings": {**base.get("settings", {}), **described.get("settings", {})}}


def _fields(kind: Callable[..., Any], described: Any, what: str) -> dict[str, Any]:
    """The keyword arguments of a dataclass, or an error that names what is missing or too much."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(described, dict) or not described.keys() <= known.keys():
        came = ", ".join(map(str, described)) if isinstance(described, dict) else type(described).__name__
        raise UserError(f"{what} may have {', '.join(known)}, got {came}")
    needed = [name for name in ("name", "question", "tasks", "methods", "seeds") if name in known]
    missing = [name for name in needed if name not in described]
    if missing:
        raise UserError(f"{what} lacks {', '.join(missing)}")
    return dict(described)
