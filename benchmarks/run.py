"""Every cost that the documentation speaks of, measured side by side with the peers.

    python benchmarks/run.py                    everything, under ten minutes on two cores
    python benchmarks/run.py --quick            the same rows on a smaller net, under a minute: to see that it works
    python benchmarks/run.py --publish          and write the documentation's table and figures
    python benchmarks/run.py --only input,param some of the rows
    python benchmarks/run.py --of a.json b.json the medians of whole runs that --out has kept, instead of a new one
    python benchmarks/run.py --cuda gpu.json    and with the table of another machine, where `--only cuda` found a GPU

First all contenders must compute the same numbers. Times are medians of interleaved repetitions, as ratios to the plain
step of the same repetition.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import figures
import sections
import tables
import torch
from machine import describe_machine
from medians import median_of_runs
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sections import Results, Setting

HERE = Path(__file__).parent
PUBLISHED = HERE / "results" / "published.json"
LATEST = HERE / "results" / "latest.json"
DOCS = HERE.parent / "docs"
DOCS_TABLE = DOCS / "_generated" / "performance.md"
SHOWN = {"rows", "breakdown", "spectral", "memory", "growth", "cuda"}  # by the documentation


@dataclass(frozen=True)
class Size:
    """How large, and how often."""

    hidden: tuple[int, ...]
    batch_size: int
    rounds: int
    seconds: float  # per row


FULL = Size((512, 512), 128, 60, 10.0)
QUICK = Size((64, 64), 32, 5, 2.0)


def measure_all(
    setting: Setting, only: set[str], progress: Progress, results: Results, save: Callable[[Results], object]
) -> None:
    """Run every section, or those whose key is in `only`, and add to the results; they are saved after each of them."""
    chosen = {name: section for name, section in sections.SECTIONS.items() if not only or name in only}
    whole = progress.add_task("benchmarks", total=len(chosen))
    for name, section in chosen.items():
        start = time.perf_counter()
        task = progress.add_task(name, total=1.0)
        found = section(setting, lambda share, task=task: progress.update(task, completed=min(share, 1.0)))
        for key, value in found.items():
            results.setdefault(key, []).extend(value) if isinstance(value, list) else results.update({key: value})
        progress.remove_task(task)
        progress.console.print(f"{name}: {time.perf_counter() - start:.0f} s")
        progress.advance(whole)
        save(results)


def publish(results: Results) -> None:
    """Write what the documentation shows: the table and both figures, and the numbers behind them."""
    _write_json(PUBLISHED, results)
    DOCS_TABLE.parent.mkdir(exist_ok=True)
    DOCS_TABLE.write_text(tables.as_markdown(results), encoding="utf-8")
    figures.draw_ratios(results).savefig(DOCS / "_static" / "bench-ratios.png", dpi=150)
    figures.draw_spectral(results).savefig(DOCS / "_static" / "bench-spectral.png", dpi=150)


def main(arguments: list[str] | None = None) -> Results:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller net and few repetitions")
    parser.add_argument("--publish", action="store_true", help="write docs/ and results/published.json")
    parser.add_argument("--only", default="", help=f"some of {','.join(sections.SECTIONS)}")
    threads = min(2, torch.get_num_threads())
    parser.add_argument("--threads", type=int, default=threads, help=f"of torch; default {threads}")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where MNIST/raw is")
    parser.add_argument("--out", type=Path, default=LATEST, help="the JSON")
    parser.add_argument("--of", type=Path, nargs="+", default=[], help="JSON of whole runs, to be made one of")
    parser.add_argument("--cuda", type=Path, help="JSON of a run on a machine with a GPU, whose table is shown")
    given = parser.parse_args(arguments)
    only = {name for name in given.only.split(",") if name}
    if unknown := only - sections.SECTIONS.keys():
        parser.error(f"--only expects some of {', '.join(sections.SECTIONS)}, got {', '.join(sorted(unknown))}")
    if given.publish and (given.quick or only):
        parser.error("--publish expects a whole run: leave out --quick and --only")
    if given.of and (given.quick or only):
        parser.error("--of expects runs that have been measured: leave out --quick and --only")
    cuda = {} if given.cuda is None else _cuda_table(given.cuda, parser)
    console = Console(width=None if sys.stdout.isatty() else 160)  # tables in files need not fit 80 columns
    if given.of:
        try:
            results = median_of_runs(given.of)
        except (OSError, ValueError) as error:
            parser.error(f"--of: {error}")
        if given.publish and (results["machine"]["quick"] or not results.keys() >= SHOWN):
            parser.error("--publish expects whole runs: --of names one of --quick or --only")
        results |= cuda
        _write_json(given.out, results)
        console.print(Markdown(tables.as_markdown(results)))
    else:
        results = _measured(given, only, console)
        results |= cuda
        _write_json(given.out, results)
    if given.publish:
        publish(results)
    console.print(
        f"written to {given.out}" + (f", {PUBLISHED.relative_to(HERE.parent)} and docs/" if given.publish else "")
    )
    return results


def _cuda_table(file: Path, parser: argparse.ArgumentParser) -> Results:
    try:
        table = json.loads(file.read_text(encoding="utf-8")).get("cuda")
    except (OSError, ValueError) as error:
        parser.error(f"--cuda: {error}")
    if table is None:
        parser.error(f"--cuda: {file} has no table of a GPU: run `--only cuda` where there is one")
    return {"cuda": table}


def _measured(given: argparse.Namespace, only: set[str], console: Console) -> Results:
    size = QUICK if given.quick else FULL
    setting = Setting(
        hidden=size.hidden,
        batch_size=size.batch_size,
        rounds=size.rounds,
        seconds=size.seconds,
        quick=given.quick,
        data_dir=given.data_dir,
        threads=given.threads,
    )
    torch.set_num_threads(given.threads)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, refresh_per_second=1)  # its thread takes turns with what is timed
    results: Results = {"machine": describe_machine(setting)}
    try:
        with progress, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # BackPACK and Opacus
            measure_all(setting, only, progress, results, partial(_write_json, given.out))
    finally:  # what was measured before an error is shown, too
        console.print(Markdown(tables.as_markdown(results)))
    return results


def _write_json(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
