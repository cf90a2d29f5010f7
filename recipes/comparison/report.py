"""results.csv, report.md, report.html and the figures of a comparison."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterable
from pathlib import Path

import markdown
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from comparison.answers import Table, answers
from comparison.figures import FIGURES
from comparison.grid import Grid
from comparison.results import Outcome, Results, write_csv
from comparison.sweep import Done

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


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Write every figure; returns its path relative to the report, and its caption."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    drawn = {}
    for name, (figure, caption) in FIGURES.items():
        if results.tasks:
            figure(results).savefig(folder / f"{name}.png", dpi=DPI)
            drawn[f"{folder.name}/{name}.png"] = caption
    return drawn


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
    rows = [
        ("data", "; ".join(names)),
        ("runs", f"{len(unique)} ended, of them {diverged} diverged and "
                 f"{sum(one.result['collapsed'] for one in unique)} collapsed; {len(results.failed())} failed"),
        ("training time", f"{sum(one.result['seconds'] for one in unique) / 3600:.2f} hours, one run after the other"),
        ("machine", "; ".join(machines)),
        ("torch", "; ".join(torches)),
        ("seeds", f"{results.grid.choose_seed} chooses, {', '.join(map(str, results.grid.seeds))} are reported"),
    ]  # fmt: skip
    return Table(("", ""), rows)


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
