"""Figures from reports and from histories. Needs matplotlib (``pip install "gradpen[recipes]"``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradpen.history import ALL_LAYERS, Row
from gradpen.report import InequalityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    positive = (lhs > 0) & (rhs > 0)
    samples.scatter(rhs[positive], lhs[positive], s=12, alpha=0.7, color="C0", label="one sample")
    if positive.any():
        ends = [float(min(lhs[positive].min(), rhs[positive].min())), float(rhs[positive].max())]
        samples.plot(ends, ends, color="0.4", linewidth=1, linestyle="--", label="equality")
        samples.set(xscale="log", yscale="log")
        samples.legend(frameon=False)
    samples.set(xlabel=_RHS, ylabel=_LHS, title=f"{report.norm} norms, f = {report.of}")
    spread = [layer.tightness[~layer.tightness.isnan()].cpu().numpy() for layer in report.layers]
    if spread:
        layers.boxplot(spread, tick_labels=[layer.name for layer in report.layers], showfliers=False)
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
    """
    if not history:
        raise ValueError("expected at least one check in the history, got none: was the monitor part of a run?")
    names = list(dict.fromkeys(row["layer"] for row in history if row["layer"] != ALL_LAYERS))
    figure, panels = _figure(3 if names else 2, title)
    whole = _series(history, ALL_LAYERS)
    _draw_sides(panels[0], whole)
    _draw_tightness(panels[1], whole)
    for name, colour in zip(names, _colours(len(names)), strict=True):
        rows = _series(history, name)
        steps = [row["step"] for row in rows]
        panels[1].plot(steps, [row["tightness"] for row in rows], color=colour, label=f"layer {name}")
        first = next((row["coefficient"] for row in rows if row["coefficient"] > 0), None)
        if first is not None:
            relative = [row["coefficient"] / first for row in rows]
            panels[2].plot(steps, relative, color=colour, label=f"layer {name}")
            panels[2].set_yscale("log")
    panels[1].set_ylim(bottom=0)  # last: it keeps the top where it is
    if names:
        panels[2].set_title(r"$(1+\|h\|^2)/(\|W\|^2\|J\|^2)$ relative to the first check")
    for axes in panels:
        axes.set_xlabel("optimiser step")
        if axes.lines:
            axes.legend(frameon=False, fontsize="small", ncols=1 + len(axes.lines) // 10)
    return figure


def _draw_sides(axes: Axes, whole: Sequence[Row]) -> None:
    """Both sides, and the gap between them."""
    steps = [row["step"] for row in whole]
    right, left = ([row[side] for row in whole] for side in ("rhs", "lhs"))
    marker = "o" if len(steps) <= 40 else None
    axes.plot(steps, right, color="C3", label=_RHS, marker=marker, markersize=3)
    axes.plot(steps, left, color="C0", label=_LHS, marker=marker, markersize=3)
    axes.fill_between(steps, left, right, color="0.85", zorder=0)
    axes.set_title("both sides, mean over the probe")
    if any(value > 0 for value in (*left, *right)):
        axes.set_yscale("log")


def _draw_tightness(axes: Axes, whole: Sequence[Row]) -> None:
    """The network's tightness, from the loosest sample to the tightest."""
    steps = [row["step"] for row in whole]
    low, high = ([row[end] for row in whole] for end in ("tightness_min", "tightness_max"))
    axes.fill_between(steps, low, high, color="0.92", zorder=0, label="all layers, from sample to sample")
    axes.plot(steps, [row["tightness"] for row in whole], color="black", linewidth=2, label="all layers, mean")
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
