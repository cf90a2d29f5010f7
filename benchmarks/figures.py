"""The two figures of the documentation, drawn from the results."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

Results = dict[str, Any]
ROUNDING = 1e-7  # where exact values are drawn on a logarithmic axis
FAMILIES = {
    "gradpen": "gradpen: error of the lower end",
    "straight line": "Lanczos written out",
    "Lanczos": "Lanczos by autograd",
    "power iteration": "power iteration by autograd",
    "explicit": "explicit Jacobians",
}
STYLE = {  # whom a point stands for → label, color, marker, and what the marker is filled with
    "gradpen": ("gradpen", "C0", "o", "C0"),
    "compiled": ("gradpen, compiled", "C0", "o", "white"),
    "straight line": ("written out by hand", "C2", "s", "C2"),
    "peer": ("best peer", "C7", "^", "C7"),
}


def draw_ratios(results: Results) -> Figure:
    """The penalties' costs against their floors: a bar for the floor, points with quartiles for who was measured."""
    rows = [row for row in results["rows"] if row["floor"] is not None and _measured(row)]
    rows = [row for row in rows if row["key"] not in ("recipe", "monitor")]
    figure = Figure(figsize=(8, 0.55 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row["floor"] for row in rows], color="0.88", label="floor: multiplications alone")
    for place, row in zip(places, rows, strict=True):
        axes.plot([row["target"]] * 2, [place - 0.4, place + 0.4], color="C3", label="target" if place == 0 else None)
    for who, (label, color, marker, filling) in STYLE.items():
        points = [(place, entry) for place, row in zip(places, rows, strict=True) for entry in _first(row, who)]
        ratios = [entry["ratio"] for _, entry in points]
        spread = [
            [entry["ratio"] - entry["quartiles"][0] for _, entry in points],
            [entry["quartiles"][1] - entry["ratio"] for _, entry in points],
        ]
        at = [place for place, _ in points]
        axes.errorbar(ratios, at, xerr=spread, fmt=marker, color=color, markerfacecolor=filling, label=label)
    axes.set_yticks(places, [row["title"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("plain steps (median and quartiles)")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def draw_spectral(results: Results) -> Figure:
    """Cost against accuracy of the spectral methods, for both nets."""
    states = results["spectral"]
    figure = Figure(figsize=(5 * len(states), 4), layout="constrained")
    for axes, (state, points) in zip(
        figure.subplots(1, len(states), sharey=True, squeeze=False)[0], states.items(), strict=True
    ):
        for family in dict.fromkeys(point["family"] for point in points):
            members = sorted((point for point in points if point["family"] == family), key=lambda point: point["ratio"])
            if family == "gradpen":
                members = [point for point in members if point["name"] != "evaluate_inequality"]  # ‖W J‖ besides
                widths = [point["width"] for point in members]
                axes.plot(
                    [point["ratio"] for point in members], widths, "o-", color="C0", label="gradpen: bracket's width"
                )
            label = FAMILIES[family]
            errors = [max(point["error"], ROUNDING) for point in members]
            axes.plot([point["ratio"] for point in members], errors, ".--", label=label)
        axes.set(xscale="log", yscale="log", title=state, xlabel="plain steps")
    figure.axes[0].set_ylabel("relative error, worst sample and layer")
    figure.axes[0].legend(fontsize="small")
    return figure


def _measured(row: Results) -> bool:
    return any("ratio" in entry for entry in row["entries"])


def _first(row: Results, who: str) -> list[Results]:
    """The entry that stands for `who`: gradpen's first, and its compiled one; of all others the cheapest."""
    measured = [entry for entry in row["entries"] if "ratio" in entry]
    if who == "compiled":
        return [entry for entry in measured if entry["who"] == "gradpen" and entry["name"].endswith(", compiled")]
    entries = [entry for entry in measured if entry["who"] == who]
    return entries[:1] if who == "gradpen" else sorted(entries, key=lambda entry: entry["ratio"])[:1]
