"""From results to Markdown: what the command prints and the documentation includes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Results = dict[str, Any]
WHO = {"gradpen": "gradpen", "straight line": "written out by hand", "peer": "peers"}


def as_markdown(results: Results) -> str:
    """All tables that the results have numbers for."""
    parts = [_machine(results["machine"])]
    if "rows" in results:
        parts.append(_main_table(results["rows"]))
    if "breakdown" in results:
        parts.append(_breakdown_table(results["breakdown"]))
    if "spectral" in results:
        parts += [_spectral_table(state, points) for state, points in results["spectral"].items()]
    if "memory" in results:
        parts.append(_memory(results["memory"]))
    if "growth" in results:
        parts += _growth_tables(results["growth"])
    if "cuda" in results:
        parts.append(_cuda(results["cuda"]))
    return "\n\n".join(parts) + "\n"


def _machine(machine: Results) -> str:
    versions = ", ".join(f"{name} {version or '(not installed)'}" for name, version in machine["versions"].items())
    widths = "-".join(map(str, machine["widths"]))
    runs = f" Medians of {machine['runs']} whole runs." if machine.get("runs", 1) > 1 else ""
    quick = " A quick run: a small net and few repetitions, so the figures say little." if machine["quick"] else ""
    return (
        f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['capability']}, Python {machine['python']}, {versions}. ReLU MLP {widths}, batch "
        f"{machine['batch_size']}, float32, {machine['images']}.{runs}{quick}"
    )


def _main_table(rows: list[Results]) -> str:
    lines = []
    for row in rows:
        groups = [[entry for entry in row["entries"] if entry["who"] == who] for who in WHO]
        cells = [
            _entries(group, named=who != "straight line" or len(group) > 1)
            for who, group in zip(WHO, groups, strict=True)
        ]
        lines.append([row["title"], _floor(row["floor"]), f"≤ {row['target']:g}", *cells])
    return "**Costs in plain steps** (median, and the quartiles)\n\n" + table(
        ["work", "floor", "target", *WHO.values()], lines
    )


def _floor(floor: float | None) -> str:
    return "–" if floor is None else f"{floor:.2f}"


def _entries(entries: list[Results], *, named: bool) -> str:
    return "; ".join(f"{entry['name']}: {_figure(entry)}" if named else _figure(entry) for entry in entries) or "–"


def _figure(entry: Results) -> str:
    """A ratio with its spread, or why there is none."""
    if "reason" in entry:
        return str(entry["reason"])
    low, high = entry["quartiles"]
    number = f"**{ratio(entry['ratio'])}**" if entry["who"] == "gradpen" else ratio(entry["ratio"])
    return f"{number} ({ratio(low)} … {ratio(high)})" if entry["rounds"] > 1 else f"{number} (once)"


def _breakdown_table(steps: list[Results]) -> str:
    lines = [
        [step["title"], _floor(step["floor"]), *(ratio(step[part]) for part in ("products", "kernels", "step"))]
        for step in steps
    ]
    return (
        "**Where gradpen's time goes**, in plain steps: the matrix products and all kernels of the step called again, "
        "without Python and autograd around them\n\n"
        + table(["work", "floor", "matrix products alone", "all kernels alone", "the step"], lines)
    )


def _spectral_table(state: str, points: list[Results]) -> str:
    lines = [
        [
            point["name"],
            ratio(point["ratio"]),
            f"{100 * point['error']:.2g} %" if point["error"] else "–",
            "none" if point["width"] is None else f"{100 * point['width']:.2g} %",
        ]
        for point in points
    ]
    return f"**Spectral norms of all hidden layers, {state}** (the worst sample and layer)\n\n" + table(
        ["method", "plain steps", "lower end below the truth by", "bracket's width"], lines
    )


def _memory(memory: Results) -> str:
    lines = [
        [
            step["name"],
            "–" if step["target"] is None else f"≤ {step['target']:g}",
            f"{step['ratio']:.2f}",
            f"{step['ratio_with_parameters']:.2f}",
            f"{step['megabytes']:.1f} MB",
        ]
        for step in memory["steps"]
    ]
    check = memory["check"]
    widths = "-".join(map(str, check["widths"]))
    return (
        f"**Peak memory in units of the plain step's** ({memory['plain_megabytes']:.1f} MB above the parameters)\n\n"
        + table(["penalty", "target", "ratio", "ratio, parameters included", "peak"], lines)
        + f"\n\nA check of {check['batch_size']} samples on {widths} peaks at {check['megabytes']:.0f} MB above model and "
        f"batch (target ≤ {check['target']:g} MB); one layer's explicit Jacobians would take "
        f"{check['explicit_jacobian_megabytes']:,.0f} MB."
    )


def _growth_tables(points: list[Results]) -> list[str]:
    found = []
    for series in dict.fromkeys(point["series"] for point in points):
        members = [point for point in points if point["series"] == series]
        names = list(members[0]["ratios"])
        lines = [
            [
                f"{point['value']:,}",
                f"{1e3 * point['plain_seconds']:.3g} ms",
                *(_with_quartiles(point, name) for name in names),
            ]
            for point in members
        ]
        found.append(
            f"**Cost against {series}**, in plain steps of the same size\n\n" + table([series, "plain", *names], lines)
        )
    return found


def _with_quartiles(point: Results, name: str) -> str:
    """A ratio, and its spread if the results have it: older ones do not."""
    spread = "quartiles" in point and f" ({' … '.join(ratio(quartile) for quartile in point['quartiles'][name])})"
    return ratio(point["ratios"][name]) + (spread or "")


def _cuda(cuda: Results | None) -> str:
    heading = '**Microseconds a step on a GPU**, eager and compiled with `mode="reduce-overhead"`'
    if cuda is None:
        return heading + "\n\nnot measured"
    parts = [
        f"{heading}; in plain steps in eager mode (median, and the quartiles)",
        f"{cuda['device']}, CUDA {cuda['cuda']}, torch {cuda['torch']}, {cuda['cpu']}",
    ]
    for net in cuda["nets"]:
        lines = [
            [step["name"], *[_microseconds(step[mode]) for mode in ("eager", "compiled")]] for step in net["steps"]
        ]
        parts.append(f"{'-'.join(map(str, net['widths']))}, batch {net['batch_size']:,}")
        parts.append(table(["step", "eager", "compiled"], lines))
    return "\n\n".join(parts)


def _microseconds(entry: Results) -> str:
    """A step's time and what it is in plain steps, or why there is none."""
    if "reason" in entry:
        return str(entry["reason"])
    low, high = entry["quartiles"]
    return f"{1e6 * entry['seconds']:,.0f} µs; {ratio(entry['ratio'])} ({ratio(low)} … {ratio(high)})"


def ratio(value: float) -> str:
    """Three digits, and no more than two behind the point."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
