"""Run a grid of trainings, and report what each penalty does to generalisation and to the bound.

    python recipes/compare.py --grid recipes/grids/quick.yaml --jobs 2
    python recipes/compare.py --grid recipes/grids/mnist.yaml --data-dir data --jobs 2 --dry-run
    python recipes/compare.py --grid recipes/grids/mnist.yaml --data-dir data --jobs 8 --engine ray

A sweep that was stopped, by whatever, goes on where it was when it is started again. Under --out it leaves runs/ (one record
for each run), results.csv, report.md, report.html and figures/. What was published goes on too: unpack its records.tar.xz
into runs/ under --out.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from comparison.engines import Engine, Processes, Ray, in_this_process, threads_for
from comparison.estimate import estimates
from comparison.grid import Grid, read_grid
from comparison.records import Records, made_folder
from comparison.report import publish, write_report
from comparison.runs import find_data
from comparison.sweep import run_grid
from flags import CTRL_C, UserError, run_recipe


@dataclass(kw_only=True)
class CompareSettings:
    """Run a grid of trainings, and report what each penalty does to generalisation and to the bound.

    Attributes:
        grid: YAML file: data, methods, seeds. recipes/comparison/grid.py explains it.
        data_dir: where the data is, in place of what the grid says.
        jobs: runs at once; they share the cores.
        engine: processes on this machine, or Ray.
        ray_address: of a Ray cluster. Default: Ray on this machine.
        out: folder for records, tables and figures. Default: runs/compare-<name of the grid file>.
        publish: also put the report, its figures and one archive of all records into this folder.
        dry_run: only say how long it would take.
    """

    grid: str
    data_dir: str | None = None
    jobs: int = 1
    engine: Literal["processes", "ray"] = "processes"
    ray_address: str | None = None
    out: str | None = None
    publish: str | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse what would fail later with a worse message."""
        if self.jobs < 1:
            raise UserError(f"--jobs must be >= 1, got {self.jobs}")
        if self.ray_address is not None and self.engine != "ray":
            raise UserError(f"--ray-address goes with --engine ray, got --engine {self.engine}")


def main(settings: CompareSettings) -> Path | None:
    """The whole comparison; returns the folder with its report."""
    out = Path(settings.out or f"runs/compare-{Path(settings.grid).stem}")
    if settings.publish is not None and Path(settings.publish).resolve() == out.resolve():
        raise UserError(f"--publish must be another folder than --out, got {settings.publish}")
    try:
        return compare(settings, out)
    except KeyboardInterrupt:
        how = f"The records of runs that have ended are kept in {out}, and the same command goes on."
        print(f"Stopped. {how}", file=sys.stderr)
        sys.exit(CTRL_C)


def compare(settings: CompareSettings, out: Path) -> Path | None:
    """Make the runs that are missing, and report them all."""
    overrides: dict[str, Any] = (
        {} if settings.data_dir is None else {"data_dir": str(Path(settings.data_dir).resolve())}
    )
    grid = read_grid(Path(settings.grid), overrides)
    torch.set_num_threads(threads_for(settings.jobs))
    with Records(out / "runs") as records:
        if settings.dry_run or settings.ray_address is None:  # a cluster has the data where it runs
            find_data(planned.run for planned in grid.every_run(records) if records.get(planned.run) is None)
        if settings.dry_run:
            print(how_long(grid, records, settings.jobs))
            return None
        if settings.publish is not None:
            made_folder(Path(settings.publish))
        with engine(settings) as make_runs:
            done = run_grid(grid, records, make_runs)
    write_report(out, grid, done)
    if settings.publish is not None:
        publish(out, Path(settings.publish), done)
    print(f"{out}/: report.html, report.md, results.csv, figures/")
    return out


def engine(settings: CompareSettings) -> AbstractContextManager[Engine]:
    """Where the runs are made."""
    if settings.engine == "ray":
        return Ray(settings.jobs, settings.ray_address)
    return Processes(settings.jobs) if settings.jobs > 1 else nullcontext(in_this_process)


def how_long(grid: Grid, records: Records, jobs: int) -> str:
    """A table of what is still to be run, and for how long."""
    rows = estimates(grid, records)
    width = max(len(row.task) for row in rows)
    lines = [f"{'stage':<8}  {'task':<{width}}  {'runs':>5}  {'made':>5}  {'hours':>7}"]
    lines += [
        f"{row.stage:<8}  {row.task:<{width}}  {row.runs:>5}  {row.made:>5}  {row.seconds / 3600:>7.2f}" for row in rows
    ]
    hours = sum(row.seconds for row in rows) / 3600
    left = sum(row.runs - row.made for row in rows)
    return "\n".join(
        [
            *lines,
            f"{left} runs are left: {hours:.2f} hours one at a time with {threads_for(jobs)} threads each, "
            f"{hours / jobs:.2f} hours with --jobs {jobs} (from steps measured on this machine just now)",
        ]
    )


if __name__ == "__main__":
    run_recipe(main, CompareSettings)
