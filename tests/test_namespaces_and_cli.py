"""Both callbacks serve the users of ``lightning`` and of ``pytorch_lightning``, in Python and from YAML."""

from __future__ import annotations

import importlib
import math
import re
import runpy
import sys
import textwrap
from pathlib import Path

import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradpen import InputGradPenalty, ParamGradPenalty
from gradpen.callbacks import GradPenaltyCallback, InequalityMonitor, _lightning

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore:::pytorch_lightning"),
]

NAMESPACES = ["lightning.pytorch", "pytorch_lightning"]
PAGE = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
[PROGRAM] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
CONFIG, FRAGMENT = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


def fitted(namespace: str):
    """A run with both callbacks, under the trainer of one of the packages."""
    pl = importlib.import_module(namespace)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("mine", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    module, monitor = Module(), InequalityMonitor(every_n_steps=2, num_samples=8)
    penalty = GradPenaltyCallback(InputGradPenalty(0.1), ParamGradPenalty(0.01))
    assert isinstance(monitor, pl.Callback) and isinstance(penalty, pl.Callback)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[monitor, penalty],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    x = torch.randn(24, 5)
    trainer.fit(module, DataLoader(TensorDataset(x, x.argmax(1) % 3), 8))
    return module, trainer, monitor


def test_both_packages_train_the_same_network():
    (module, trainer, monitor), (other, other_trainer, other_monitor) = map(fitted, NAMESPACES)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    names = {"mine", "penalty/input", "penalty/param", "penalty/share_of_loss"}
    metrics = set(trainer.callback_metrics)
    assert metrics == set(other_trainer.callback_metrics)
    assert {name for name in metrics if not name.startswith("bound/")} == names and "bound/tightness" in metrics
    assert monitor.history == other_monitor.history and len(monitor.history) == 4 * 3
    assert "training_step" not in vars(module) and "training_step" not in vars(other)


def test_one_package_is_enough(monkeypatch):
    base = Path(_lightning.__file__)
    package = base.parent.parent
    assert [p for p in package.rglob("*.py") if "pytorch_lightning import" in p.read_text(encoding="utf-8")] == [base]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)  # importing it now raises ModuleNotFoundError
    assert runpy.run_path(str(base))["Callback"] is lightning.pytorch.Callback


def run_program(namespace: str, arguments: list[str], folder: Path, monkeypatch):
    """The program of the page, as a command line runs it: the `LightningCLI`."""
    path = folder / "train.py"
    path.write_text(PROGRAM.replace("lightning.pytorch", namespace), encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return runpy.run_path(str(path), run_name="__main__")["cli"]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_both_callbacks_from_the_yaml_file_of_the_documentation(namespace, tmp_path, monkeypatch):
    (tmp_path / "penalised.yaml").write_text(CONFIG, encoding="utf-8")
    arguments = ["fit", "--config", "penalised.yaml", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    cli = run_program(namespace, [*arguments, *quiet], tmp_path, monkeypatch)
    monitor, penalty = (
        next(callback for callback in cli.trainer.callbacks if isinstance(callback, kind))
        for kind in (InequalityMonitor, GradPenaltyCallback)
    )
    assert cli.trainer.global_step == 30
    assert [row["step"] for row in monitor.history if row["layer"] == "all"] == [0, 20, 30]
    assert all(row["violations"] == 0 for row in monitor.history if row["layer"] == "all")
    assert [(type(p), p.weight) for p in penalty.penalties] == [(InputGradPenalty, 0.1), (ParamGradPenalty, 0.01)]
    assert penalty.warmup_steps == 30
    logged = cli.trainer.callback_metrics
    assert logged["penalty/input"] > 0 and logged["penalty/param"] > 0 and 0 < logged["penalty/share_of_loss"] < 1


@pytest.mark.filterwarnings(r"error:[\s\S]*Unable to serialize")  # the saved configuration would lack the argument
def test_every_kind_of_argument_can_be_written_in_yaml(tmp_path, monkeypatch):
    callbacks = "trainer:\n  callbacks:\n" + textwrap.indent(FRAGMENT, "    ")
    (tmp_path / "callbacks.yaml").write_text(callbacks, encoding="utf-8")
    arguments = ["fit", "--config", "callbacks.yaml", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    cli = run_program("lightning.pytorch", arguments, tmp_path, monkeypatch)
    monitor = next(c for c in cli.trainer.callbacks if isinstance(c, InequalityMonitor))
    penalty = next(c for c in cli.trainer.callbacks if isinstance(c, GradPenaltyCallback))
    assert (
        monitor.schedule.at == [0, 10, 100, 1000] and monitor.inputs == penalty.inputs == 0 and monitor.model == "net"
    )
    assert isinstance(monitor.criterion, nn.CrossEntropyLoss)
    jacobian, weights = penalty.penalties
    assert jacobian.weight is math.log1p and jacobian.term.method == "projection" and jacobian.name == "jacobian"
    assert weights.term.over == 16 and weights.term.parameters == ["net.*.weight"] and weights.every_n_steps == 4
    assert penalty.sync_dist and cli.trainer.callback_metrics["penalty/param"] > 0
