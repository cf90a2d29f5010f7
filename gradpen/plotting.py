"""Figures from reports and from histories. Needs matplotlib (``pip install "gradpen[recipes]"``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradpen.history import ALL_LAYERS, Row
from gradpen.report import InequalityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["plot_history", "plot_report"]

_LHS, _RHS = r"$\|\nabla_x f\|^2\,\Sigma_t\,c_t$  (left)", r"$\|\nabla_\theta f\|^2$  (right)"


def plot_report(report: InequalityReport, title: str | None = None) -> Figure:
    """Both sides sample by sample, and the tightness of every layer.

    Args:
        report: the result of `gradpen.evaluate_inequality`.
        title: of the figure.

    Returns:
        A matplotlib figure, not attached to pyplot: save it with ``figure.savefig(path)``.

    Example:
        >>> import torch
        >>> from gradpen import evaluate_inequality
        >>> from gradpen.plotting import plot_report
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> report = evaluate_inequality(model, torch.randn(5, 4), torch.randint(3, (5,)))
        >>> figure = plot_report(report)
    """
    figure, (samples, layers) = _figure(2, title)
    lhs, rhs = report.lhs.cpu(), report.rhs.cpu()
    positive = (lhs > 0) & (rhs > 0) & lhs.isfinite() & rhs.isfinite()  # a log axis has no other places
    if positive.any():
        samples.scatter(rhs[positive], lhs[positive], s=12, alpha=0.7, color="C0", label="one sample")
        ends = [float(min(lhs[positive].min(), rhs[positive].min())), float(rhs[positive].max())]
        samples.plot(ends, ends, color="0.4", linewidth=1, linestyle="--", label="equality")
        samples.set(xscale="log", yscale="log")
        for axis in (samples.xaxis, samples.yaxis):
            _name_plainly(axis)
        samples.tick_params(axis="x", which="both", rotation=30 if _is_narrow(samples.xaxis) else 0)
    hidden = int((~positive).sum())
    note = f"{hidden} of {len(lhs)} samples not shown:\na side is 0 or overflowed" if hidden else None
    # above the diagonal, where no sample can be
    entries = samples.get_legend_handles_labels()
    samples.legend(*entries, frameon=False, loc="upper left", title=note, title_fontsize="small", alignment="left")
    samples.set(xlabel=_RHS, ylabel=_LHS, title=f"{report.norm} norms, f = {report.of}")
    spread = [layer.tightness[~layer.tightness.isnan()].cpu().numpy() for layer in report.layers]
    if spread:
        names = [layer.name for layer in report.layers]
        layers.boxplot(spread, tick_labels=names, showfliers=False)
        if sum(map(len, names)) > _LABEL_ROOM:
            layers.tick_params(axis="x", rotation=90, labelsize="small")
            figure.set_figheight(figure.get_figheight() + _LETTER * max(map(len, names)))
    layers.set(ylim=(0, 1), xlabel="layer", ylabel="tightness (left / right)", title="by layer")
    return figure


def plot_history(history: Sequence[Row], title: str | None = None) -> Figure:
    """The bound over training: both sides on a log axis, tightness by layer, coefficients relative to the start.

    Args:
        history: rows of `gradpen.callbacks.InequalityMonitor.history`.
        title: of the figure.

    Returns:
        A matplotlib figure, not attached to pyplot: save it with ``figure.savefig(path)``.

    Raises:
        ValueError: if the history is empty.

    Example:
        >>> import torch
        >>> from gradpen import evaluate_inequality
        >>> from gradpen.history import report_rows
        >>> from gradpen.plotting import plot_history
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(5, 4), torch.randint(3, (5,))
        >>> history = [row for step in (0, 10) for row in report_rows(evaluate_inequality(model, x, y), step=step, epoch=0)]
        >>> figure = plot_history(history)
    """
    if not history:
        raise ValueError("expected at least one check in the history, got none: was the monitor part of a run?")
    names = list(dict.fromkeys(row["layer"] for row in history if row["layer"] != ALL_LAYERS))
    figure, panels = _figure(3 if names else 2, title)
    whole = _series(history, ALL_LAYERS)
    _draw_sides(panels[0], whole)
    _draw_tightness(panels[1], whole)
    named = len(names) <= _MOST_NAMES
    beneath = named and max(map(len, names), default=0) > _LEGEND_ROOM
    lines = []
    for name, colour in zip(names, _colours(len(names)), strict=True):
        rows = _series(history, name)
        label = f"layer {name}" if named and not beneath else "_"
        lines += _draw(panels[1], rows, [row["tightness"] for row in rows], color=colour, label=label)
        first = next((row["coefficient"] for row in rows if 0 < row["coefficient"] < math.inf), None)
        if first is not None:
            _draw(panels[2], rows, [row["coefficient"] / first for row in rows], color=colour, label=label)
            _make_log(panels[2])
    panels[1].set_ylim(bottom=0)  # last: it keeps the top where it is
    if names:
        panels[2].set_title("coefficients $c_t$ relative to the first check")
    if not named:
        _draw_depths(figure, panels[2], names)
    if beneath:
        _name_beneath(figure, lines, names)
    steps = [row["step"] for row in history]
    margin = 0.05 * (max(steps) - min(steps)) or 1.0  # around a single check too, there are whole steps to name
    for axes in panels:
        axes.set(xlabel="optimiser step", xlim=(min(steps) - margin, max(steps) + margin))
        axes.locator_params(axis="x", integer=True)
        _name_plainly(axes.yaxis)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")
    return figure


_LABEL_ROOM = 40  # characters that have room side by side under one panel
_LEGEND_ROOM = 24  # characters of a name that leave a panel room for its lines
_LETTER, _LINE = 0.07, 0.2  # inches that a small letter is wide, and a line of them high
_MOST_NAMES = 10  # layers that a legend names one by one
_FEW_CHECKS = 40  # so many are marked: a line between them is no more than a guide, and a single one has none


def _draw(axes: Axes, rows: Sequence[Row], values: Sequence[float], **style: Any) -> list[Line2D]:
    """A line over the steps of some rows."""
    marker = "o" if len(rows) <= _FEW_CHECKS else None
    return axes.plot([row["step"] for row in rows], values, marker=marker, markersize=3, **style)


def _name_beneath(figure: Figure, lines: Sequence[Line2D], names: Sequence[str]) -> None:
    """One legend under the panels, for names that would cover them."""
    width = _LETTER * (max(map(len, names)) + 12)  # with "layer", a piece of the line and what is between
    columns = max(1, int(figure.get_figwidth() / width))
    figure.set_figheight(figure.get_figheight() + _LINE * math.ceil(len(names) / columns))
    labels = [f"layer {name}" for name in names]
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _make_log(axes: Axes) -> None:
    """A log axis has no place for 0: a gap, where matplotlib would draw a cliff."""
    axes.set_yscale("log", nonpositive="mask")


def _name_plainly(axis: Axis) -> None:
    """Within one power of ten, numbers as they are: not 9.825 × 10⁻¹."""
    if axis.get_scale() == "log" and _is_narrow(axis):
        axis.set_major_formatter("{x:.9g}")
        axis.set_minor_formatter("{x:.9g}")  # a ScalarFormatter would leave out what it says once for all ticks


def _is_narrow(axis: Axis) -> bool:
    low, high = axis.get_view_interval()
    return bool(high < 10 * low)


def _draw_depths(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """A bar that says which colour is which depth."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = ScalarMappable(Normalize(0, 1), ListedColormap(_colours(len(names))))
    bar = figure.colorbar(scale, ax=axes, ticks=[0, 1])
    bar.set_ticklabels([f"layer {names[0]}", f"layer {names[-1]}"])


def _draw_sides(axes: Axes, whole: Sequence[Row]) -> None:
    """Both sides, and the gap between them."""
    right, left = ([row[side] for row in whole] for side in ("rhs", "lhs"))
    _draw(axes, whole, right, color="C3", label=_RHS)
    _draw(axes, whole, left, color="C0", label=_LHS)
    shown = [all(0 < value < math.inf for value in sides) for sides in zip(left, right, strict=True)]
    axes.fill_between([row["step"] for row in whole], left, right, where=shown, color="0.85", zorder=0)
    axes.set_title("both sides, mean over the probe")
    if any(0 < value < math.inf for value in (*left, *right)):
        _make_log(axes)


def _draw_tightness(axes: Axes, whole: Sequence[Row]) -> None:
    """The network's tightness, from the loosest sample to the tightest."""
    steps = [row["step"] for row in whole]
    low, high = ([row[end] for row in whole] for end in ("tightness_min", "tightness_max"))
    axes.fill_between(steps, low, high, color="0.92", zorder=0, label="all layers, from sample to sample")
    _draw(axes, whole, [row["tightness"] for row in whole], color="black", linewidth=2, label="all layers, mean")
    axes.set_title("tightness (left / right)")


def _colours(count: int) -> list[Any]:
    """By depth, and none twice."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.8 * index / max(count - 1, 1)) for index in range(count)]


def _series(history: Sequence[Row], layer: str) -> list[Row]:
    return sorted((row for row in history if row["layer"] == layer), key=lambda row: int(row["step"]))


def _figure(panels: int, title: str | None) -> tuple[Figure, Sequence[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('gradpen.plotting needs matplotlib: pip install matplotlib, or "gradpen[recipes]"') from error
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    axes: Any = figure.subplots(1, panels)
    for panel in axes:
        panel.grid(True, color="0.92")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    return figure, axes
