"""What a run comes to: its summary, a table to read, and the files under --out."""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from files import finite
from gradpen import PenalizedLoss
from gradpen.callbacks import InequalityMonitor
from gradpen.history import Row
from gradpen.inequality import NotFiniteError, evaluate_inequality
from images import Labelled

Summary = dict[str, Any]
REPETITIONS = 15
OF_LAST_CHECK = ("tightness", "tightness_min", "tightness_max", "input_grad_sq_norm", "param_grad_sq_norm")


def has_diverged(model: nn.Module, probe: Labelled, history: Sequence[Row], step: int) -> bool:
    """Whether outputs or gradients on the probe are no numbers at the end; a check is kept only if they are."""
    if history and history[-1]["step"] == step:
        return False
    model.eval()
    try:
        evaluate_inequality(model, *probe, slack=False)
    except NotFiniteError:
        return True
    return False


def bound_summary(history: Sequence[Row], diverged: bool) -> Summary:
    """The last check's tightness and norms (means over the probe), and the violations of all checks.

    `checked_at` is its step: a run that was stopped early has gone on since. Without a check, and of a run that diverged
    after the last one, tightness and norms are None.
    """
    whole = [row for row in history if row["layer"] == "all"]
    last = [] if diverged or not whole else [row for row in history if row["step"] == whole[-1]["step"]]
    at_end: Row = whole[-1] if last else {}
    return {
        "diverged": diverged,
        **{name: at_end.get(name) for name in OF_LAST_CHECK},
        "checked_at": at_end.get("step"),
        "tightness_by_layer": {row["layer"]: row["tightness"] for row in last if row["layer"] != "all"},
        "checks_made": len(whole),
        "violations": sum(row["violations"] for row in whole),
        "undefined": sum(row["undefined"] for row in whole),
    }


def penalty_cost(trainer: Trainer, model: nn.Module, objective: PenalizedLoss, x: Tensor, y: Tensor) -> float:
    """Time of forward and backward with the penalties, in units of forward and backward without them.

    The median of REPETITIONS measurements of each, taken in turn on a copy of the trained model.
    """
    model, objective = copy.deepcopy((model, objective))
    model.to(x.device).train()
    precision = trainer.precision_plugin
    x = precision.convert_input(x)

    def plain() -> None:
        model.zero_grad()
        with precision.forward_context():
            loss = F.cross_entropy(model(x), y)
        loss.backward()

    def penalised() -> None:
        model.zero_grad()
        with precision.forward_context():
            loss = objective(model, x, y).loss
        loss.backward()

    timers = [
        Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads()) for step in (plain, penalised)
    ]
    seconds = [[timer.timeit(1).median for timer in timers] for _ in range(REPETITIONS)]
    return statistics.median(row[1] for row in seconds) / statistics.median(row[0] for row in seconds)


def title(summary: Summary) -> str:
    """One line that says what was trained on what."""
    weights = {
        "none": "no penalty",
        "input": f"input penalty {summary['weight']:g}",
        "param": f"param penalty {summary['weight']:g}",
        "both": f"input penalty {summary['weight']:g}, param penalty {summary['param_weight'] or 0:g}",
    }
    baselines = [
        f"{name.replace('_', ' ')} {summary[name]:g}"
        for name in ("sam_radius", "weight_decay", "dropout", "label_smoothing")
        if summary[name]
    ]
    trained_with = ", ".join([weights[summary["penalty"]], *baselines])
    return f"{summary['dataset_name']}: {trained_with}, seed {summary['seed']}"


def table(summary: Summary, out: Path) -> str:
    """The results, to be printed."""
    gap = summary["train_accuracy"] - summary["test_accuracy"]
    epochs = f"{summary['epochs_done']} epoch{'' if summary['epochs_done'] == 1 else 's'}"
    done = "" if summary["completed"] else f" (stopped early, of {summary['epochs']})"
    figure = ", bound.png" if summary["checks_made"] else ""
    rows = [
        ("data", summary["dataset_name"]),
        *([("diverged", "the trained network's outputs or gradients are no numbers")] if summary["diverged"] else []),
        ("test accuracy", f"{summary['test_accuracy']:.2%}"),
        *([("validation accuracy", f"{summary['val_accuracy']:.2%}")] if summary["val_accuracy"] is not None else []),
        ("train − test gap", f"{100 * gap:.2f} points (train {summary['train_accuracy']:.2%})"),
        ("tightness of the bound", _tightness(summary)),
        *((f"  layer {name}", _three_digits(value)) for name, value in summary["tightness_by_layer"].items()),
        ("violations", f"{summary['violations']} in {summary['checks_made']} checks"),
        ("penalty's cost", f"{summary['penalty_cost']:.2f} × a plain forward and backward pass"),
        ("training time", f"{summary['seconds']:.1f} s for {epochs}{done}, checks included"),
        ("written to", f"{out}/: summary.json, metrics.csv, bound.csv{figure}"),
    ]
    width = max(len(name) for name, _ in rows)
    heading = title(summary)
    return "\n".join(["", heading, "-" * len(heading), *(f"{name:<{width}}  {value}" for name, value in rows)])


def _tightness(summary: Summary) -> str:
    if summary["tightness"] is None:
        return "no check at the end"
    mean, low, high = (_three_digits(summary[name]) for name in ("tightness", "tightness_min", "tightness_max"))
    later = summary["steps"] - summary["checked_at"]
    return f"{mean} (from {low} to {high}{f', {later} steps before the end' if later else ''})"


def _three_digits(tightness: float) -> str:
    return "undefined" if math.isnan(tightness) else f"{tightness:.3f}"


def write_results(out: Path, summary: Summary, monitor: InequalityMonitor) -> None:
    """Write summary.json, bound.csv, and bound.png if there was a check."""
    out.mkdir(parents=True, exist_ok=True)
    monitor.to_csv(out / "bound.csv")
    if monitor.history:
        monitor.plot(title(summary)).savefig(out / "bound.png", dpi=150)
    described = json.dumps(finite(summary), indent=2, ensure_ascii=False, allow_nan=False)
    (out / "summary.json").write_text(described + "\n", encoding="utf-8")
