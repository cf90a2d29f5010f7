"""The grid file: which methods are compared on which data, and the runs that this takes.

extends: mnist.yaml                                           # another grid: what follows takes the place of its parts;
                                                              # of its settings, those of the same name
name: MNIST
settings: {recipe: mnist, dataset: mnist, val_size: 10000}   # of all runs: flags of the recipe
tasks:                                                        # data sets, sizes, epochs
  - {train_size: 1000, epochs: 100}                           # name: "{data}, longer", where two would be called alike
  - {train_size: 5000, only: [none, input], methods: {input: {weight: [0.3, 1]}}}   # candidates of its own
  - {train_size: 50000, epochs: 4, report: {train_size: 60000, val_size: 0, epochs: 20}}   # other settings with fresh seeds
methods:                                                      # a list holds the candidates of the first stage
  none: {}
  input: {penalty: input, weight: [1, 3, 10]}
  input, every 4th step: {like: input, every_n_steps: 4}      # with what was chosen for the other
choose_seed: 0
seeds: [1, 2, 3, 4, 5]
matched_compute: largest                                      # none | largest | each; a task may have its own
sweeps:                                                       # for questions 5 and 6: all cases, nothing is chosen
  - {question: 5, settings: {epochs: 5}, vary: {init: [default, he]}, seeds: [1, 2]}
  - {question: 6, settings: {optimizer: sgd}, cases: [{lr: 0.1, epochs: 10}, {lr: 0.2, epochs: 5}], seeds: [1]}
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from comparison import shapes
from comparison.records import Records
from comparison.runs import Run, data_name
from flags import UserError

BASELINE = "none"
MATCHED = ("none", "largest", "each")
SWEPT = (5, 6)  # the questions that sweeps answer
ONE_VALUE = ("recipe", "dataset", "train_size")  # of a task: it is named by them

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

    def __post_init__(self) -> None:
        """Refuse what would be reported nowhere, and other shapes."""
        if self.question not in SWEPT:
            raise UserError(f"question of a sweep must be {' or '.join(map(str, SWEPT))}, got {self.question!r}: the others "
                            "are answered by tasks and methods")  # fmt: skip
        shapes.seeds("seeds of a sweep", self.seeds)
        _check_no_seed("settings of a sweep", shapes.mapping("settings of a sweep", self.settings))
        _check_no_seed("vary of a sweep", shapes.mapping("vary of a sweep", self.vary))
        for name, values in self.vary.items():
            shapes.items(f"{name} in vary of a sweep", values)
        for case in shapes.mappings("cases of a sweep", self.cases):
            _check_no_seed("a case of a sweep", case)

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
        self._check_shapes()
        self._check_names()
        self._check_runs()

    def _check_shapes(self) -> None:
        """Lists where lists are expected, and names with values elsewhere."""
        shapes.mapping("settings", self.settings)
        shapes.seeds("seeds", self.seeds)
        shapes.seeds("choose_seed", [self.choose_seed])
        _check_candidates("settings", self.settings)
        _check_methods("methods", self.methods)
        for task in shapes.mappings("tasks", self.tasks):
            shapes.items("only of a task", task.get("only", [BASELINE]))
            _check_candidates("a task", task)
            _check_methods("methods of a task", task.get("methods", {}))
            report = shapes.mapping("report of a task", task.get("report", {}))
            _check_no_seed("report of a task", report)
            merged = {**self.settings, **task, **report}
            for name in ONE_VALUE:
                if isinstance(merged.get(name), (list, Mapping)):
                    raise UserError(f"{name} of a task must be one value, got {merged[name]}: write a task for each")

    def _check_names(self) -> None:
        """Methods and tasks that are spoken of must exist, and be told apart."""
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
            if model is not None and (model not in list(self.methods) or "like" in self.methods[model]):
                raise UserError(f"method {name!r} is like {model!r}, which must be a method that is not like another")
        names = [task_name(self.settings, task) for task in self.tasks]
        if len(set(names)) < len(names):
            raise UserError(f"tasks must have different names, got {'; '.join(names)}: give each a name")
        for task in self.tasks:
            unknown = [method for method in task.get("only", []) if method not in list(self.methods)]
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

    def _check_runs(self) -> None:
        """Every run must have settings that its recipe takes, and count once, beside others of its case alone."""
        swept: set[tuple[int, str]] = set()
        cases: dict[tuple[int, str], str] = {}
        for planned in self.every_run():
            where = f"{planned.task}, {planned.method or 'its only case'}"
            try:
                settings = planned.run.full_settings()
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            if planned.stage == "choose" and not settings.val_size:
                raise UserError(f"{where}: there are candidates to choose from, give val_size in the settings")
            if planned.stage != "sweep":
                continue
            where = f"{where}, seed {planned.seed}"
            if (planned.question, planned.run.key) in swept:
                raise UserError(f"{where}: another case is the same run, which would count twice")
            swept.add((planned.question, planned.run.key))
            case = replace(planned.run, settings={**planned.run.settings, "seed": 0}).key
            if cases.setdefault((planned.question, planned.method), case) != case:
                raise UserError(
                    f"{where}: another sweep of question {planned.question} has a case of this name with other settings, "
                    "write what differs into vary or cases"
                )

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
        """The candidate with the best accuracy on the validation images; None if every run of it failed."""
        model = self.methods[method].get("like", method)
        if not self.is_chosen(task, model):
            return self.candidates(task, method)[0]
        best, best_accuracy = None, -1.0
        pairs = zip(self.candidates(task, model), self.candidates(task, method), strict=True)
        for candidate, settings in pairs:
            record = records.get(_planned(candidate, self.choose_seed, "choose", "", "").run)
            if record is not None and record["result"]["val_accuracy"] > best_accuracy:
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
        epochs = _planned(settings, self.choose_seed, "report", "", "").run.full_settings().epochs
        for factor in sorted(set(self.factors(costs, task).values())):
            longer = {**settings, "epochs": math.ceil(factor * epochs)}
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


def _check_methods(what: str, methods: Any) -> None:
    for name, method in shapes.mapping(what, methods).items():
        _check_candidates(f"method {name}", shapes.mapping(f"method {name}", method))


def _check_candidates(what: str, settings: Values) -> None:
    _check_no_seed(what, settings)
    for name, value in settings.items():
        if isinstance(value, list) and name not in NOT_FLAGS:
            shapes.items(f"{name} of {what}", value)


def _check_no_seed(what: str, settings: Values) -> None:
    if "seed" in settings:
        raise UserError(f"{what} may have no seed, got {settings['seed']}: give seeds of the grid or of a sweep")


def _planned(settings: Values, seed: int, stage: str, task: str, method: str, question: int = 0) -> Planned:
    flags = {name: value for name, value in settings.items() if name not in NOT_FLAGS}
    run = Run(str(settings.get("recipe")), {**flags, "seed": seed}, reads_test=stage != "choose")
    return Planned(run, stage, task, method, seed, question)


def task_name(settings: Values, task: Values) -> str:
    """What a task is called: its name, in which {data} stands for the data's, or the data and how many images of it."""
    merged = {**settings, **task, **task.get("report", {})}
    count = merged.get("train_size")
    size = f"{count:,}" if isinstance(count, int) else count or "all"
    return str(task.get("name", f"{{data}}, {size} images")).replace("{data}", str(data_name(merged)))


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
    sweeps = shapes.items("sweeps", given.get("sweeps", []), least=0)
    given["sweeps"] = [Sweep(**_fields(Sweep, sweep, f"a sweep of {path}")) for sweep in sweeps]
    given["settings"] = {**shapes.mapping("settings", given.get("settings", {})), **(overrides or {})}
    return Grid(**given)


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, like the command line; to YAML 1.1 it is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read(path: Path, extending: Sequence[Path] = ()) -> dict[str, Any]:
    """A YAML file, with what it extends put in."""
    try:
        described = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--grid {path} cannot be read: {error}") from error
    described = dict(shapes.mapping(str(path), described))
    if "extends" not in described:
        return described
    name, chain = described.pop("extends"), [*extending, path.resolve()]
    if not isinstance(name, str) or (path.parent / name).resolve() in chain:
        raise UserError(f"extends must name another grid file, got {name!r} in {path}")
    base = _read(path.parent / name, chain)
    settings = [shapes.mapping("settings", one.get("settings", {})) for one in (base, described)]
    return {**base, **described, "settings": {**settings[0], **settings[1]}}


def _fields(kind: Callable[..., Any], described: Any, what: str) -> dict[str, Any]:
    """The keyword arguments of a dataclass, or an error that names what is missing or too much."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(described, dict) or not described.keys() <= known.keys():
        allowed = [*known, *(["extends"] if kind is Grid else [])]
        came = ", ".join(map(str, described)) if isinstance(described, dict) else type(described).__name__
        raise UserError(f"{what} may have {', '.join(allowed)}, got {came}")
    needed = [name for name in ("name", "question", "tasks", "methods", "seeds") if name in known]
    missing = [name for name in needed if name not in described]
    if missing:
        raise UserError(f"{what} lacks {', '.join(missing)}")
    return dict(described)
