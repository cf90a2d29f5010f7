"""From a grid to records: two stages, every run made once, one display over all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from comparison.engines import Engine
from comparison.grid import BASELINE, Grid, Planned, task_name
from comparison.records import Records
from comparison.runs import Record, Run

STAGES = ("choosing settings", "fresh seeds", "matched compute")


@dataclass(frozen=True)
class Done:
    """A planned run and its record."""

    planned: Planned
    record: Record


def run_grid(grid: Grid, records: Records, engine: Engine) -> list[Done]:
    """Make every run that has no record yet, and return them all.

    Settings are chosen by one seed on the validation images; the chosen ones, and the sweeps, get fresh seeds; and then
    the plain baseline gets as much compute as the penalties took.
    """
    with Display() as display:
        choosing = make_missing(list(grid.choosing()), STAGES[0], records, engine, display)
        reported = make_missing(reporting(grid, records), STAGES[1], records, engine, display)
        matched = make_missing(matching(grid, reported), STAGES[2], records, engine, display)
    return [*choosing, *reported, *matched]


def reporting(grid: Grid, records: Records) -> list[Planned]:
    """The second stage: the chosen settings and the sweeps. A method whose every candidate failed is left out."""
    planned = []
    for task in grid.tasks:
        for method in grid.methods_of(task):
            settings = grid.chosen(task, method, records)
            if settings is not None:
                planned += grid.reporting(task, method, settings)
    return [*planned, *grid.sweeping()]


def matching(grid: Grid, reported: Iterable[Done]) -> list[Planned]:
    """The plain baseline with more epochs, now that it is known what the methods cost."""
    planned = []
    measured = [done for done in reported if done.planned.stage == "report" and done.record["result"]]
    for task in grid.tasks:
        mine = [done for done in measured if done.planned.task == task_name(grid.settings, task)]
        costs = {done.planned.method: done.record["result"]["cost"] for done in mine}
        plain = [done.planned.run for done in mine if done.planned.method == BASELINE]
        if plain:
            planned += grid.matching(task, costs, {"recipe": plain[0].recipe, **plain[0].settings})
    return planned


def make_missing(planned: list[Planned], stage: str, records: Records, engine: Engine, display: Display) -> list[Done]:
    """Make the runs that have no record, each once however often it is planned."""
    called = names(planned)
    runs = {one.run.key: one.run for one in planned}
    missing = [run for run in runs.values() if records.get(run) is None]
    display.begin(stage, total=len(runs), done=len(runs) - len(missing))

    def started(run: Run) -> None:
        display.started(called[run.key])

    for run, record in engine(missing, started):
        records.put(run, record)
        display.ended(called[run.key], record)
    made = {key: records.read(run) for key, run in runs.items()}
    return [Done(one, record) for one in planned if (record := made[one.run.key]) is not None]


def names(planned: Iterable[Planned]) -> dict[str, str]:
    """What each run is called while it is made: task, method and seed, and of candidates what tells them apart."""
    alike: dict[tuple[str, str, int], dict[str, Run]] = {}
    for one in planned:
        alike.setdefault((one.task, one.method, one.seed), {})[one.run.key] = one.run
    called = {}
    for (task, method, seed), runs in alike.items():
        flags = dict.fromkeys(name for run in runs.values() for name in run.settings)
        varied = [name for name in flags if len({str(run.settings.get(name)) for run in runs.values()}) > 1]
        for key, run in runs.items():
            what = ", ".join([method, *(f"{name.replace('_', ' ')} {run.settings.get(name)}" for name in varied)])
            called[key] = f"{task} · {what} · seed {seed}"
    return called


class Display:
    """One bar for each stage, one line for each run that is under way, and one that stays for each that has ended."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def begin(self, stage: str, total: int, done: int) -> None:
        """A stage: so many runs belong to it, and so many have been made before."""
        self.bar = self.progress.add_task(stage, total=total, completed=done)

    def started(self, name: str) -> None:
        """A run is under way."""
        self.progress.add_task(f"  {name}", total=None)

    def ended(self, name: str, record: Record) -> None:
        """A run is over."""
        line = next((task for task in self.progress.tasks if task.description == f"  {name}"), None)
        if line is not None:
            self.progress.remove_task(line.id)
        self.progress.advance(self.bar)
        ended = f"{name}: {outcome(record)}"
        self.progress.console.print(ended, highlight=False, markup=False, soft_wrap=True)  # a log has no width


def outcome(record: Record) -> str:
    """One run's end in a few words."""
    if record["status"] == "failed":
        return f"failed: {record['traceback'].strip().splitlines()[-1]}"
    result = record["result"]
    part = "test" if record["reads_test"] else "val"
    words = [f"{part} accuracy {result.get(f'{part}_accuracy', float('nan')):.2%}", f"{result['seconds']:.0f} s"]
    return ", ".join([*words, *(["diverged"] if record["status"] == "diverged" else [])])
