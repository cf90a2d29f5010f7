"""results.csv, report.md, report.html and the figures of a comparison, and what of it is published."""

from __future__ import annotations

import base64
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import markdown
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from comparison.answers import Table, answers
from comparison.figures import FIGURES, has_data
from comparison.grid import Grid, task_name
from comparison.records import as_json
from comparison.results import Outcome, Results, write_csv
from comparison.runs import PLACES
from comparison.sweep import Done

# of the settings: said elsewhere
NOT_TRAINING = ("recipe", "dataset", "dataset_name", "epochs", "checks", "probe_size")
TEMPLATES = Path(__file__).parent / "templates"
DPI = 150


def write_report(out: Path, grid: Grid, done: Iterable[Done]) -> None:
    """Write everything that a comparison comes to.

    Args:
        out: folder; what an earlier report left there is replaced.
        grid: what was planned.
        done: what came of it.
    """
    results = Results(grid, [Outcome(one.planned, one.record) for one in done])
    write_csv(out / "results.csv", results.all)
    drawn = draw(results, out / "figures")
    text = as_markdown(results, drawn)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(as_page(grid.name, text, out), encoding="utf-8")


def publish(out: Path, folder: Path, done: Iterable[Done]) -> None:
    """Put a written report into a folder that can be shown to others, with the records behind it in one archive.

    Args:
        out: where `write_report` wrote.
        folder: what an earlier report left there is replaced.
        done: the runs of the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "results.csv"):
        shutil.copy(out / name, folder / name)
    drawn = _without_figures(folder / "figures")
    for name in FIGURES:
        if (out / "figures" / f"{name}.png").exists():
            shutil.copy(out / "figures" / f"{name}.png", drawn)
    records = {one.record["key"]: one.record for one in done}
    with tarfile.open(folder / "records.tar.xz", "w:xz") as archive:
        for key, record in sorted(records.items()):
            text = as_json(record).encode()
            entry = tarfile.TarInfo(f"{key}.json")  # without times and owners: equal records make equal archives
            entry.size = len(text)
            archive.addfile(entry, BytesIO(text))


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Write every figure that shows something; returns its path relative to the report, and its caption."""
    _without_figures(folder)
    drawn = {}
    for name, (make, caption) in FIGURES.items():
        figure = make(results) if results.tasks else None
        if figure is not None and has_data(figure):
            figure.savefig(folder / f"{name}.png", dpi=DPI)
            drawn[f"{folder.name}/{name}.png"] = caption
    return drawn


def _without_figures(folder: Path) -> Path:
    """The folder, made if it is not there, without an earlier report's figures; whatever else is in it stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    return folder


def as_markdown(results: Results, drawn: dict[str, str]) -> str:
    """The report: what was run, the seven answers, the figures, and what failed."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["table"] = as_table
    return environment.get_template("report.md").render(
        grid=results.grid,
        facts=facts(results),
        answers=answers(results),
        figures=drawn,
        failed=results.failed(),
    )


def facts(results: Results) -> Table:
    """What was run, on what, for how long."""
    finished = [one for one in results.all if one.result]
    unique = {one.record["key"]: one for one in finished}.values()
    names = sorted({one.result["dataset_name"] for one in finished})
    machines = sorted({f"{one.result['machine']}, threads of a run: {one.result['threads']}" for one in finished})
    torches = sorted({one.result["torch"] for one in finished})
    diverged = sum(one.record["status"] == "diverged" for one in unique)
    rows: list[Sequence[str]] = [
        ("data", "; ".join(names)),
        ("runs", f"{len(unique)} ended, of them {diverged} diverged and "
                 f"{sum(one.result['collapsed'] for one in unique)} collapsed; {len(results.failed())} failed"),
        ("training time", f"{sum(one.result['seconds'] for one in unique) / 3600:.2f} hours, one run after the other"),
        ("machine", "; ".join(machines)),
        ("torch", "; ".join(torches)),
        ("training", "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in results.grid.settings.items()
                               if name not in (*PLACES, *NOT_TRAINING))),
        ("epochs", "; ".join(_epochs(results.grid, task) for task in results.grid.tasks)),
        ("seeds", f"{results.grid.choose_seed} chooses, {', '.join(map(str, results.grid.seeds))} are reported"),
    ]  # fmt: skip
    return Table(("", ""), rows)


def _epochs(grid: Grid, task: Mapping[str, Any]) -> str:
    """How long runs of a task take, and those by which its settings are chosen."""
    chosen = {**grid.settings, **task}.get("epochs", "the recipe's")
    reported = task.get("report", {}).get("epochs", chosen)
    said = f"{task_name(grid.settings, task)}: {reported}"
    return said if reported == chosen else f"{said} ({chosen} where settings are chosen)"


def as_table(table: Table) -> str:
    """A table in Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def as_page(title: str, text: str, folder: Path) -> str:
    """The report as one page that needs no other file: figures are embedded."""
    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    for path in sorted((folder / "figures").glob("*.png")):
        embedded = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="figures/{path.name}"', f'src="data:image/png;base64,{embedded}"')
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=True)
    return environment.get_template("report.html").render(title=title, body=body)
