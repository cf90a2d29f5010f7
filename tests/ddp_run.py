"""Two processes, for test_monitor_ddp.py: runs with and without the monitor, and what one process says of the same weights.

`python ddp_run.py OUT` writes OUT/rank0.json and OUT/rank1.json.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradpen import evaluate_inequality
from gradpen.callbacks import InequalityMonitor
from gradpen.callbacks._shards import evaluate_shared
from gradpen.history import report_rows
from gradpen.isolation import untouched

torch.set_num_threads(1)
FEATURES, CLASSES, PROBE = 12, 4, 33  # samples that two processes cannot share out equally
GENERATOR = torch.Generator().manual_seed(0)
DATA = TensorDataset(torch.randn(96, FEATURES, generator=GENERATOR), torch.randint(CLASSES, (96,), generator=GENERATOR))


class Classifier(lightning.LightningModule):
    """Hidden layers wide enough for Krylov brackets, masks to draw, running statistics to keep, and the data it saw."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(FEATURES, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.3), nn.Linear(40, 24), nn.Tanh()]
        self.net = nn.Sequential(*hidden, nn.Linear(24, CLASSES))
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        self.seen += x.sum(1).tolist()
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class WeightsAtChecks(lightning.Callback):
    """Copies of the first process's network, made after the monitor's checks."""

    def __init__(self) -> None:
        self.at: dict[int, nn.Module] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Classifier) -> None:
        self.at[0] = copy.deepcopy(pl_module.net)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Classifier, *_: Any) -> None:
        self.at[trainer.global_step] = copy.deepcopy(pl_module.net)


def fit(callbacks: list[lightning.Callback], out: Path) -> tuple[Classifier, lightning.Trainer]:
    lightning.seed_everything(0, verbose=False)
    module = Classifier()
    trainer = lightning.Trainer(
        strategy="ddp",
        devices=2,
        accelerator="cpu",
        max_epochs=2,
        callbacks=callbacks,
        logger=lightning.pytorch.loggers.CSVLogger(out, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, DataLoader(DATA, 8, shuffle=True), DataLoader(DATA, 16))
    return module, trainer


def digest(module: Classifier, trainer: lightning.Trainer) -> dict[str, str]:
    """All that the monitor must leave alone."""
    states = {
        "weights and buffers": module.state_dict(),
        "optimiser": trainer.optimizers[0].state_dict()["state"],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "order of the data": module.seen,
    }
    return {name: hashlib.sha256(_bytes(state)).hexdigest() for name, state in states.items()}


def _bytes(state: Any) -> bytes:
    if isinstance(state, dict):
        return b"".join(repr(key).encode() + _bytes(value) for key, value in state.items())
    return state.numpy().tobytes() if isinstance(state, torch.Tensor) else repr(state).encode()


def one_process(net: nn.Module, batch: Any, step: int, **settings: Any) -> list[dict[str, Any]]:
    """The rows of a check by a single process."""
    report = evaluate_inequality(net.eval(), *batch, slack=True, **settings)
    return report_rows(report, step=step, epoch=0)


def watched(out: Path, of: str = "loss") -> dict[str, Any]:
    """What the monitor logged, and what one process finds on the same weights."""
    monitor = InequalityMonitor(every_n_steps=4, num_samples=PROBE, slack=True, of=of)
    weights = WeightsAtChecks()
    module, trainer = fit([monitor, weights], out)
    chosen = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:PROBE].sort().values
    expected = []
    for step in sorted({row["step"] for row in monitor.history}):
        expected += one_process(weights.at[step], DATA[chosen], step, of=of)
    return {"digest": digest(module, trainer), "history": monitor.history, "expected": expected}


class Bypass(nn.Module):
    """The first layer does not cut the graph, which only rows with a positive first feature show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 10), nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh() + x[:, :10] * (x[:, :1] > 0))


def where_shares_disagree() -> dict[str, Any]:
    """The layers in the sum, and the left sides, when only the second process sees the bypass."""
    torch.manual_seed(0)  # the same network on both
    model, x = Bypass(), DATA.tensors[0][:16].clone()
    x[:, 0] = x[:, 0].abs() * torch.tensor([-1.0] * 8 + [1.0] * 8)
    found = {}
    with untouched(model):
        for name, evaluate in {"shared": evaluate_shared, "one": evaluate_inequality}.items():
            report = evaluate(model, x, DATA.tensors[1][:16], criterion=F.cross_entropy, of="loss", delta=1e-6)
            found[name] = [[layer.name for layer in report.layers], report.lhs.tolist()]
    found["share alone"] = [layer.name for layer in evaluate_inequality(model, x[:8], DATA.tensors[1][:8]).layers]
    return found


def certified_ends() -> dict[str, list[float]]:
    """The certified left sides, which move with the failure probability that a sample's brackets are given."""
    torch.manual_seed(0)  # the same network on both, and wide enough for a bracket to be settled by its width
    net = nn.Sequential(nn.Linear(120, 60), nn.Tanh(), nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, CLASSES)).double()
    x, y = torch.randn(PROBE, 120).double(), DATA.tensors[1][:PROBE]
    found = {}
    for name, evaluate in {"shared": evaluate_shared, "one": evaluate_inequality}.items():
        with untouched(net):
            report = evaluate(net, x, y, criterion=F.cross_entropy, of="loss", delta=1e-6)
        found[name] = report.lhs_lower.tolist()
    return found


def failing(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if dist.get_rank() == 1:
        raise KeyError("only here")
    return output.sum(1)


def error_of(monitor: InequalityMonitor, out: Path) -> str:
    """What a run with this monitor raises."""
    try:
        fit([monitor], out)
    except (RuntimeError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(out: Path) -> None:
    results: dict[str, Any] = {"alone": digest(*fit([], out / "alone"))}
    results["loss"] = watched(out / "watched")
    results["output"] = watched(out / "output", of="output")
    results["one fails"] = error_of(InequalityMonitor(num_samples=PROBE, of=failing), out / "failing")
    results["certified"] = certified_ends()
    results["shares disagree"] = where_shares_disagree()
    results["too few"] = error_of(InequalityMonitor(num_samples=1), out / "few")
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
