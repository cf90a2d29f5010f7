"""The six figures of a comparison, from its results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from comparison.grid import BASELINE
from comparison.intervals import interval
from comparison.results import Outcome, Results, by_seed
from comparison.runs import NORMS

COLUMNS = 3
PANEL = (4.6, 3.6)  # inches
SMALL_PANEL = (2.5, 2.3)
LEFT, RIGHT = r"$\|\nabla_x f\|^2\,\Sigma_t\,c_t$  (left side)", r"$\|\nabla_\theta f\|^2$  (right side)"


def accuracy_against_tightness(results: Results) -> Figure:
    """Test accuracy against the tightness of the bound after training: one point a run."""
    figure, panels = _panels(results.tasks)
    for task, axes in panels:
        for method, colour in _colours(results, task):
            points = _points(results.of(task, method), lambda one: one.at("end", "tightness"), _test_accuracy)
            axes.scatter(
                *_columns(points), s=26, color=colour, alpha=0.8, label=method, edgecolor="white", linewidth=0.5
            )
        axes.set(xlabel="tightness after training (left / right)", ylabel="test accuracy (%)")
    _legend(figure, [axes for _, axes in panels])
    return figure


def sides_over_training(results: Results) -> Figure:
    """Both sides over training on a log axis: means over seeds, and the single runs behind them."""

    def draw(axes: Axes, runs: Sequence[Outcome]) -> None:
        for side, colour, label in (("rhs", "C3", RIGHT), ("lhs", "C0", LEFT)):
            for one in runs:
                axes.plot(*_series(one, side), color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(*_mean_series(runs, side), color=colour, label=label)
        _log(axes, "xy")

    return _over_training(results, draw)


def accuracy_by_method(results: Results) -> Figure:
    """Mean test accuracy by method, with the 95 % interval over seeds."""
    figure, panels = _panels(results.tasks)
    for task, axes in panels:
        methods = results.methods(task, matched=True)[::-1]
        colours = dict(_colours(results, task))
        for place, method in enumerate(methods):
            runs = results.of(task, method)
            accuracy = interval([100 * value for value in by_seed(runs, "test_accuracy").values()])
            if accuracy is None:
                continue
            colour = colours.get(method, "0.45")
            axes.errorbar(accuracy.mean, place, xerr=accuracy.half, fmt="o", color=colour, capsize=3, markersize=5)
            single = [100 * value for value in by_seed(runs, "test_accuracy").values()]
            axes.plot(single, [place] * len(single), "|", color=colour, alpha=0.5, markersize=7)
            if method == BASELINE:
                axes.axvline(accuracy.mean, color="0.6", linewidth=1, linestyle="--", zorder=0)
        axes.set(xlabel="test accuracy (%)")
        axes.set_yticks(range(len(methods)), methods)
    figure.set_figheight(max(figure.get_figheight(), 0.35 * _layout(len(panels))[0] * (3 + _most_methods(results))))
    return figure


def gap_against_sides(results: Results) -> Figure:
    """The generalisation gap against each side of the bound after training."""
    figure = _figure(2, len(results.tasks), PANEL)
    grid = figure.subplots(2, len(results.tasks), squeeze=False)
    for column, task in enumerate(results.tasks):
        for axes, side, label in zip(grid[:, column], ("lhs", "rhs"), (LEFT, RIGHT), strict=True):
            for method, colour in _colours(results, task):
                points = _points(
                    results.of(task, method), lambda one, side=side: one.at("end", side), lambda one: _percent(one.gap)
                )
                axes.scatter(
                    *_columns(points), s=26, color=colour, alpha=0.8, label=method, edgecolor="white", linewidth=0.5
                )
            axes.set(xlabel=label, ylabel="train − test (points)")
            _log(axes, "x")
            _dress(axes)
        grid[0, column].set_title(task, fontsize="medium")
    _legend(figure, list(grid.flat))
    return figure


def coefficients_over_training(results: Results) -> Figure:
    """The coefficients of the bound relative to initialisation, layer by layer: means over seeds."""

    def draw(axes: Axes, runs: Sequence[Outcome]) -> None:
        for index, layer in enumerate(runs[0].layers()):
            steps, values = _mean_series(runs, "coefficient", layer, relative=True)
            axes.plot(steps, values, color=f"C{index}", marker="o", markersize=2.5, label=f"layer {layer}")
        axes.axhline(1, color="0.6", linewidth=1, linestyle="--", zorder=0)
        _log(axes, "xy")

    return _over_training(results, draw)


def tightness_ladder(results: Results) -> Figure:
    """Tightness in the three norms, at initialisation and after training: means over seeds."""
    figure, panels = _panels(results.tasks)
    for task, axes in panels:
        for method, colour in _colours(results, task):
            rungs = [one.result["ladder"]["end"] for one in results.of(task, method) if one.result["ladder"].get("end")]
            if rungs:
                axes.plot(NORMS, _mean_rungs(rungs), color=colour, marker="o", markersize=4, label=method)
        starts = [one.result["ladder"]["start"] for one in results.of(task, BASELINE)]
        if starts:
            axes.plot(NORMS, _mean_rungs(starts), color="0.4", linestyle="--", marker="s", label="at initialisation")
        axes.set(ylabel="tightness (left / right)")
        _log(axes, "y")
        axes.margins(x=0.15)
    _legend(figure, [axes for _, axes in panels])
    return figure


FIGURES: dict[str, tuple[Callable[[Results], Figure], str]] = {
    "accuracy-against-tightness": (
        accuracy_against_tightness,
        "Test accuracy against the tightness of the bound after training. One point is one run.",
    ),
    "sides-over-training": (
        sides_over_training,
        "Both sides of the bound over training, means over the probe: thin lines are single runs, thick ones their "
        "geometric means over seeds. Step 0, before training, stands at 1/2.",
    ),
    "accuracy-by-method": (
        accuracy_by_method,
        "Test accuracy by method and training set: means with 95 % t-intervals over seeds; strokes are single runs, the "
        "dashed line is training without any of them.",
    ),
    "gap-against-sides": (
        gap_against_sides,
        "The generalisation gap against each side of the bound after training. One point is one run.",
    ),
    "coefficients-over-training": (
        coefficients_over_training,
        "The coefficients (1+‖h‖²)/(‖W‖²‖J‖²) over training, relative to initialisation, by layer: geometric means over "
        "seeds. The argument that they hardly move would have them on the dashed line. Step 0, before training, stands at "
        "1/2.",
    ),
    "tightness-ladder": (
        tightness_ladder,
        "Tightness after training in the three norms: Frobenius, spectral, and the norm of W J taken jointly.",
    ),
}


def has_data(figure: Figure) -> bool:
    """Whether there is anything to see."""
    return any(math.isfinite(limit) for axes in figure.axes for limit in axes.dataLim.get_points().flat)


def _over_training(results: Results, draw: Callable[[Axes, Sequence[Outcome]], None]) -> Figure:
    """Small panels, a row for each task and a column for each penalty, over the optimiser step."""
    shown = {task: [BASELINE, *results.penalties(task)] for task in results.tasks}
    columns = list(dict.fromkeys(method for methods in shown.values() for method in methods))
    figure = _figure(len(results.tasks), len(columns), SMALL_PANEL)
    grid = figure.subplots(len(results.tasks), len(columns), squeeze=False, sharex="row", sharey="row")
    for row, task in enumerate(results.tasks):
        for column, method in enumerate(columns):
            axes = grid[row, column]
            runs = [one for one in results.of(task, method) if one.history]
            if not runs:
                axes.set_axis_off()
                continue
            draw(axes, runs)
            _dress(axes)
            axes.set_title(method if row == 0 else "", fontsize="medium")
            axes.set_xlabel("optimiser step" if row == len(results.tasks) - 1 else "")
        grid[row, 0].set_ylabel(task, fontsize="small")
    _legend(figure, list(grid.flat))
    return figure


def _figure(rows: int, columns: int, panel: tuple[float, float]) -> Figure:
    return Figure(figsize=(max(panel[0] * columns, 6), panel[1] * rows + 0.6), layout="constrained")


def _layout(panels: int) -> tuple[int, int]:
    """Rows and columns, with as few empty places as there may be."""
    columns = min(panels, 2 if panels == 4 else COLUMNS)
    return -(-panels // columns), columns


def _panels(tasks: Sequence[str]) -> tuple[Figure, list[tuple[str, Axes]]]:
    """One panel for each task."""
    rows, columns = _layout(len(tasks))
    figure = _figure(rows, columns, PANEL)
    grid = figure.subplots(rows, columns, squeeze=False)
    for unused in list(grid.flat)[len(tasks) :]:
        unused.set_axis_off()
    panels = list(zip(tasks, grid.flat, strict=False))
    for task, axes in panels:
        axes.set_title(task, fontsize="medium")
        _dress(axes)
    return figure, panels


def _dress(axes: Axes) -> None:
    axes.grid(True, color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _log(axes: Axes, which: str) -> None:
    """Log axes with plain numbers at 1, 2 and 5 where they span little, and at powers of ten where they span much.

    An axis without positive values stays as it is.
    """
    for letter in which:
        if not math.isfinite(getattr(axes.dataLim, f"minpos{letter}")):
            continue
        axis = {"x": axes.xaxis, "y": axes.yaxis}[letter]
        axes.set(**{f"{letter}scale": "log"})
        low, high = sorted(getattr(axes, f"get_{letter}lim")())
        if high < 100 * low:
            axis.set_major_locator(
                LogLocator(subs=(1, 2, 5) if high > 4 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
            )
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One for all panels, below them."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        columns = max(1, min(len(found), int(figure.get_figwidth() / 1.9)))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _colours(results: Results, task: str) -> list[tuple[str, Any]]:
    """Method → colour, the same in all panels."""
    palette = colormaps["tab20"].colors if len(results.grid.methods) > 10 else colormaps["tab10"].colors  # type: ignore[attr-defined]
    others = [method for method in results.grid.methods if method != BASELINE]
    known = {method: palette[index % len(palette)] for index, method in enumerate(others)} | {BASELINE: "black"}
    return [(method, known[method]) for method in results.methods(task)]


def _most_methods(results: Results) -> int:
    return max((len(results.methods(task, matched=True)) for task in results.tasks), default=0)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _test_accuracy(one: Outcome) -> float | None:
    return _percent(one.result.get("test_accuracy"))


def _points(
    runs: Iterable[Outcome], x: Callable[[Outcome], float | None], y: Callable[[Outcome], float | None]
) -> list[tuple[float, float]]:
    """Those that have both coordinates."""
    pairs = [(x(one), y(one)) for one in runs]
    return [(first, second) for first, second in pairs if first is not None and second is not None]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _series(one: Outcome, name: str, layer: str = "all") -> tuple[list[float], list[float]]:
    """Steps and values; a log axis has no place for step 0, which stands at 1/2."""
    rows = [row for row in one.rows(layer) if row.get(name) is not None and row[name] > 0]
    return [max(row["step"], 0.5) for row in rows], [row[name] for row in rows]


def _mean_series(
    runs: Sequence[Outcome], name: str, layer: str = "all", *, relative: bool = False
) -> tuple[list[float], list[float]]:
    """Geometric mean over runs at the steps that all of them have."""
    tables = []
    for one in runs:
        steps, values = _series(one, name, layer)
        first = values[0] if relative and values else 1.0
        tables.append(dict(zip(steps, (value / first for value in values), strict=True)))
    common = sorted(set.intersection(*(set(table) for table in tables)))
    return common, [statistics.geometric_mean([table[step] for table in tables]) for step in common]


def _mean_rungs(rungs: Sequence[dict[str, float]]) -> list[float]:
    """Not a number where no run has one."""
    known = [[rung[norm] for rung in rungs if rung[norm] is not None] for norm in NORMS]
    return [statistics.fmean(values) if values else math.nan for values in known]
