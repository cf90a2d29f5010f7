"""Reports over training as tidy rows: one for every check and layer."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

from gradpen.report import InequalityReport, LayerTerms, mean_defined, ratio_or_nan

Row = dict[str, Any]

ALL_LAYERS = "all"  # the row of the whole network
BY_LAYER = ("none", "summary", "all")
_SUMMARY = ("tightness", "coefficient")


def report_rows(report: InequalityReport, *, step: int, epoch: int, by_layer: str = "all") -> list[Row]:
    """One row for the network (layer "all") and one for every layer in the sum; means over the samples.

    A layer that is called "all" itself has "layer all" in its row.

    Args:
        report: one evaluation.
        step: optimiser steps done so far.
        epoch: index of the running epoch.
        by_layer: "all", "summary" (tightness and coefficient) or "none" (no rows of layers).
    """
    where = {"step": step, "epoch": epoch}
    rows = [{**where, "layer": ALL_LAYERS, **network_values(report)}]
    if by_layer != "none":
        for layer in report.layers:
            values = layer_values(layer)
            kept = values if by_layer == "all" else {name: values[name] for name in _SUMMARY}
            name = f"layer {layer.name}" if layer.name == ALL_LAYERS else layer.name
            rows.append({**where, "layer": name, **kept})
    return rows


def network_values(report: InequalityReport) -> dict[str, float]:
    """Means over the samples of what concerns the whole network."""
    tightness = report.tightness
    defined = tightness[~tightness.isnan()]
    return {
        "lhs": float(report.lhs.mean()),
        "rhs": float(report.rhs.mean()),
        "tightness": mean_defined(tightness),
        "tightness_min": float(defined.min()) if defined.numel() else float("nan"),
        "tightness_max": float(defined.max()) if defined.numel() else float("nan"),
        "violations": report.violations,
        "undefined": report.undefined,
        "input_grad_sq_norm": float(report.input_grad_sq_norm.mean()),
        "param_grad_sq_norm": float(report.param_grad_sq_norm.mean()),
        "batch_grad_sq_norm": float(report.batch_grad_sq_norm),
        "noise_trace": float(report.noise_trace),
    }


def layer_values(layer: LayerTerms) -> dict[str, float]:
    """Means over the samples of what concerns one layer; what was not computed is left out."""
    values = {
        "tightness": layer.tightness,
        "coefficient": layer.coefficient,
        "input_norm": layer.input_sq_norm.sqrt(),
        "weight_norm": layer.weight_norm,
        "jacobian_norm": layer.jacobian_norm,
        "product_norm": layer.product_norm,
        "slack_product": layer.slack_product,
        "slack_alignment": layer.slack_alignment,
    }
    if layer.weight_lhs is not None and layer.weight_rhs is not None:
        values["weight_tightness"] = ratio_or_nan(layer.weight_lhs, layer.weight_rhs)
    if layer.bias_lhs is not None and layer.bias_rhs is not None:
        values["bias_tightness"] = ratio_or_nan(layer.bias_lhs, layer.bias_rhs)
    return {name: mean_defined(value) for name, value in values.items() if value is not None}


def flat_metrics(rows: Iterable[Row], prefix: str = "bound") -> dict[str, float]:
    """The rows of one check as ``bound/lhs``, …, ``bound/<layer>/coefficient``, … for a logger."""
    metrics: dict[str, float] = {}
    for row in rows:
        path = prefix if row["layer"] == ALL_LAYERS else f"{prefix}/{row['layer']}"
        metrics |= {
            f"{path}/{name}": float(value) for name, value in row.items() if name not in ("step", "epoch", "layer")
        }
    return metrics


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Write tidy rows with one header; a value that a row does not have stays empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
