"""Reports as rows, and figures of them."""

from __future__ import annotations

from collections import OrderedDict

import cases
import numpy as np
import pytest
import torch
from torch import nn

from gradpen import evaluate_inequality
from gradpen.history import flat_metrics, report_rows
from gradpen.plotting import plot_history, plot_report


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 4), torch.randint(3, (size,))


def test_a_single_check_is_seen():
    rows = report_rows(evaluate_inequality(cases.mlp(4, 6, 3), *batch_of(5)), step=5, epoch=0)
    for axes in plot_history(rows).axes:
        assert axes.lines
        assert all(line.get_marker() == "o" for line in axes.lines)


@pytest.mark.parametrize("steps", [(0,), (5,), (0, 1), (0, 10, 40)])
def test_all_panels_have_the_same_whole_steps(steps):
    """A single check, and a panel with nothing to show, had axes from -0.04 to 0.04."""
    report = evaluate_inequality(cases.mlp(4, 6, 3), *batch_of(5))
    rows = [row for step in steps for row in report_rows(report, step=step, epoch=0)]
    for row in rows:
        row |= {"coefficient": float("inf")} if "coefficient" in row else {}
    panels = plot_history(rows).axes
    assert len({axes.get_xlim() for axes in panels}) == 1
    assert all(axes.get_xlim()[0] < steps[0] and steps[-1] < axes.get_xlim()[1] for axes in panels)
    assert all(float(tick).is_integer() for axes in panels for tick in axes.get_xticks())


def test_many_layers_are_told_apart_by_a_bar():
    model = nn.Sequential(*[module for _ in range(12) for module in (nn.Linear(4, 4), nn.Tanh())])
    rows = report_rows(evaluate_inequality(model, *batch_of(5)), step=5, epoch=0)
    *panels, bar = plot_history(rows).axes
    assert [label.get_text() for label in bar.get_yticklabels()] == ["layer 0", "layer 22"]
    assert [len(axes.lines) for axes in panels] == [2, 13, 12]
    assert all(len(axes.get_legend_handles_labels()[0]) <= 2 for axes in panels)


def test_a_layer_may_be_called_as_the_whole_is():
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 6), act=nn.Tanh(), all=nn.Linear(6, 3)))
    report = evaluate_inequality(model, *batch_of(5))
    rows = report_rows(report, step=0, epoch=0)
    assert [row["layer"] for row in rows] == ["all", "first", "layer all"]
    assert flat_metrics(rows)["bound/tightness"] == pytest.approx(float(report.tightness.mean()))
    plot_history(rows)


def test_samples_that_a_log_axis_cannot_show_are_counted():
    model = cases.mlp(4, 6, 3, bias=False)
    x, y = batch_of(5)
    shown = plot_report(evaluate_inequality(model, x, y)).axes[0]
    x[1] = 0
    partly = plot_report(evaluate_inequality(model, x, y)).axes[0]
    nn.init.zeros_(model[2].weight)
    empty = plot_report(evaluate_inequality(model, x, y)).axes[0]
    legends = [axes.get_legend() for axes in (shown, partly, empty)]
    assert [legend.get_title().get_text()[:21] for legend in legends] == [
        "",
        "1 of 5 samples not sh",
        "5 of 5 samples not sh",
    ]
    assert [len(legend.get_texts()) for legend in legends] == [2, 2, 0]


def test_the_count_of_samples_that_are_not_shown_covers_none():
    """It stood in the lower right corner, where the loosest samples are."""
    model = cases.mlp(4, 6, 3)
    with torch.no_grad():
        model[2].weight.mul_(2e25)  # some of the right sides overflow then
    figure = plot_report(evaluate_inequality(model, *batch_of(200)))
    figure.draw_without_rendering()
    samples = figure.axes[0]
    points = samples.transData.transform(samples.collections[0].get_offsets())
    places = [samples.get_legend().get_window_extent(), *(text.get_window_extent() for text in samples.texts)]
    assert not any(place.contains(*point) for place in places for point in points)


def test_what_overflows_is_left_out_of_the_figure():
    model = cases.mlp(4, 1).double()
    report = evaluate_inequality(model, 1e160 * torch.randn(5, 4, dtype=torch.float64), of="output")
    assert report.rhs.isinf().all()
    figure = plot_report(report)
    figure.draw_without_rendering()
    assert "5 of 5" in figure.axes[0].get_legend().get_title().get_text()


def test_what_overflowed_in_a_check_is_left_out_of_the_curves():
    report = evaluate_inequality(cases.mlp(4, 6, 3), *batch_of(5))
    overflowed, *later = (report_rows(report, step=step, epoch=0) for step in (0, 5, 10))
    for row in overflowed:
        row |= {name: float("inf") for name in ("lhs", "rhs", "coefficient") if name in row}
    figure = plot_history(overflowed)  # alone
    figure.draw_without_rendering()
    figure = plot_history([*overflowed, *later[0], *later[1]])
    figure.draw_without_rendering()
    assert [list(line.get_ydata()) for line in figure.axes[2].lines] == [[float("inf"), 1, 1]] * 2


def test_sides_that_vanish_leave_a_gap():
    """Instead of a line straight down to the bottom of the log axis."""
    report = evaluate_inequality(cases.mlp(4, 6, 3), *batch_of(5))
    rows = [row for step in range(4) for row in report_rows(report, step=step, epoch=0)]
    for row in rows:
        if row["step"] == 2:
            row |= {name: 0.0 for name in ("lhs", "rhs", "coefficient") if name in row}
    sides, _, coefficients = plot_history(rows).axes
    for line in (*sides.lines, *coefficients.lines):
        drawn = line.get_transform().transform(line.get_xydata())
        assert [bool(value) for value in np.isfinite(drawn[:, 1])] == [True, True, False, True]
    assert all(np.isfinite(path.vertices).all() for path in sides.collections[0].get_paths())
    assert min(vertex[1] for path in sides.collections[0].get_paths() for vertex in path.vertices) > 0


def test_the_coefficients_of_all_norms_have_one_name():
    """They are other fractions with norm="joint"."""
    rows = report_rows(evaluate_inequality(cases.mlp(4, 6, 3), *batch_of(5), norm="joint"), step=0, epoch=0)
    assert "W" not in plot_history(rows).axes[2].get_title()


@pytest.mark.parametrize("depth", [2, 14])
def test_many_names_of_layers_stand_upright(depth):
    model = nn.Sequential(*[module for _ in range(depth) for module in (nn.Linear(4, 4), nn.Tanh())])
    report = evaluate_inequality(nn.Sequential(OrderedDict(encoder=model)), *batch_of(5))
    labels = plot_report(report).axes[1].get_xticklabels()
    assert {label.get_rotation() for label in labels} == {90 if depth == 14 else 0}


@pytest.mark.parametrize("depth", [3, 8])
def test_long_names_of_layers_leave_the_panels_their_room(depth):
    """A legend covered the curves, and names under the boxes took more than half of the figure."""
    model = nn.Sequential(*[module for _ in range(depth) for module in (nn.Linear(4, 4), nn.Tanh())])
    named = nn.Sequential(OrderedDict(encoder_of_the_images_that_are_left=model))
    report = evaluate_inequality(named, *batch_of(5))
    history, by_sample = plot_history(report_rows(report, step=5, epoch=0)), plot_report(report)
    for figure in (history, by_sample):
        figure.draw_without_rendering()
        assert all(axes.get_window_extent().height > 0.6 * 4 * figure.dpi for axes in figure.axes)
    (beneath,) = history.legends
    assert [text.get_text() for text in beneath.get_texts()] == [f"layer {layer.name}" for layer in report.layers]
    place = beneath.get_window_extent()
    assert 0 <= place.x0 < place.x1 <= history.bbox.width
    assert not any(place.overlaps(axes.get_tightbbox()) for axes in history.axes)
    assert [len(axes.get_legend().get_texts()) if axes.get_legend() else 0 for axes in history.axes] == [2, 2, 0]


@pytest.mark.parametrize("factor", [0.98, 1 + 1e-6])
def test_log_axes_within_one_power_of_ten_have_plain_numbers(factor):
    """They were 9.825 × 10⁻¹ and the like, and under the samples of a report they ran into each other."""
    rows = report_rows(evaluate_inequality(cases.mlp(4, 6, 3), *batch_of(5)), step=0, epoch=0)
    scaled = ("lhs", "rhs", "coefficient")
    rows = [row | {name: 1e-7 for name in scaled if name in row} for row in rows]
    later = [row | {"step": 5} | {name: factor * row[name] for name in scaled if name in row} for row in rows]
    history = plot_history([*rows, *later])
    tight = cases.mlp(4, 3)
    nn.init.orthogonal_(tight[0].weight)
    x = torch.tensor([[1.0], [1.5]]) * torch.randn(4)
    report = plot_report(evaluate_inequality(tight, x, torch.tensor([0, 0])))
    for figure, axis in (
        (history, history.axes[0].yaxis),
        (history, history.axes[2].yaxis),
        (report, report.axes[0].yaxis),
        (report, report.axes[0].xaxis),
    ):
        figure.draw_without_rendering()
        assert axis.get_scale() == "log"
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        named = [(tick.get_loc(), tick.label1.get_text()) for tick in ticks if tick.label1.get_text()]
        assert len(named) > 1
        assert all(
            float(name.replace("\N{MINUS SIGN}", "-")) == pytest.approx(place, rel=1e-8) for place, name in named
        )
    turned = report.axes[0].get_xticklabels(which="both")
    assert {label.get_rotation() for label in turned} == {30}
