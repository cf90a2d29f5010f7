"""The monitor says what `evaluate_inequality` says, when it should, where it should, and changes nothing."""

from __future__ import annotations

import csv
import dataclasses
import logging
import math
import random
import socket
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning_cases import DATA, Plain
from monitor_cases import PER_EPOCH, Noting, Snapshots, Stream, probe_rows, run, steps, whole
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from gradpen import evaluate_inequality
from gradpen.callbacks import InequalityMonitor, monitor
from gradpen.callbacks._schedule import Schedule
from gradpen.history import network_values

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]

LAYERS = {"0", "3"}
NETWORK_NAMES = {
    "lhs", "rhs", "tightness", "tightness_min", "tightness_max", "violations", "undefined", "input_grad_sq_norm",
    "param_grad_sq_norm", "batch_grad_sq_norm", "noise_trace",
}  # fmt: skip
LAYER_NAMES = {
    "coefficient", "weight_norm", "jacobian_norm", "input_norm", "tightness", "weight_tightness", "bias_tightness",
    "slack_product", "slack_alignment",
}  # fmt: skip


class Compiled(Noting):
    """The submodule is compiled, as people do it in ``__init__``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class Carrying(Noting):
    """State of its own kinds: an attribute that is set anew, a list, a metric, and logs from within ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.carry: torch.Tensor | None = None
        self.calls: list[bool] = []
        self.activity = MeanMetric()

    def forward(self, x):
        h = self.net[0](x)
        h = h if self.carry is None else h + 0.1 * self.carry
        self.carry = h.detach().mean(0)
        self.calls.append(self.training)
        self.activity.update(self.carry)
        self.log("carry", self.carry.mean())
        self.log_dict({"activity": self.activity}, on_step=False, on_epoch=True)
        return self.net[1:](h)

    def training_step(self, batch, batch_idx):
        self.seen += batch[0].sum(1).tolist()
        return F.cross_entropy(self(batch[0]), batch[1])


class PowerCutError(Exception):
    """Nothing after it is written."""


class KillAt(lightning.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise PowerCutError


class ResumableLoader:
    """Batches of an epoch's own order; it knows its place, so that a run goes on in the middle of an epoch."""

    def __init__(self) -> None:
        self.epoch = self.place = 0
        self.sampler = self  # whom Lightning tells the epoch

    def __len__(self) -> int:
        return PER_EPOCH

    def __iter__(self):
        order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(self.epoch)).split(16)
        while self.place < PER_EPOCH:
            self.place += 1
            yield DATA[order[self.place - 1]]

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.place = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


def traces(module_class, callbacks, tmp_path, loader_options=None, compiled=False, **options):
    """All that a monitor must leave alone, after a run from one seed."""
    lightning.seed_everything(0, verbose=False)
    module = module_class()
    trainer = run(
        torch.compile(module, backend="eager") if compiled else module,
        callbacks,
        tmp_path,
        train=DataLoader(DATA, 16, shuffle=True, **(loader_options or {})),
        **options,
    )
    return {
        "weights": [value.tolist() for value in module.state_dict().values()],
        "optimiser": [
            [v.tolist() for v in state.values()] for state in trainer.optimizers[0].state_dict()["state"].values()
        ],
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "order": module.seen,
        "attributes": [getattr(module, "calls", None), str(getattr(module, "carry", None))],
        "metrics": {n: float(value) for n, value in trainer.callback_metrics.items() if not n.startswith("bound/")},
        "modes": [child.training for child in module.modules()],
        "hooks": [len(child._forward_hooks) for child in module.modules()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
    }


def ema() -> Callback:
    if not hasattr(lightning.pytorch.callbacks, "EMAWeightAveraging"):
        pytest.skip("lightning has it from 2.6 on")
    return lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.5)


CASES: dict[str, dict[str, Any]] = {
    "dropout": {},
    "accumulation_and_clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "accumulation_scheduled": {"more": lambda: [GradientAccumulationScheduler({0: 1, 1: 3})]},
    "workers": {"loader_options": {"num_workers": 1}},
    "persistent_workers": {"loader_options": {"num_workers": 2, "persistent_workers": True}},
    "bf16": {"precision": "bf16-mixed"},
    "fp16_and_scaler": {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
    "double": {"precision": "64-true"},
    "swa": {"more": lambda: [StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1)]},
    "ema": {"more": lambda: [ema()]},
    "compiled_submodule": {"module_class": Compiled},
    "compiled_lightning_module": {"compiled": True},
    "validation_within_epochs": {"val_check_interval": 2},
    "no_validation_yet": {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_it_says_what_the_evaluation_says_and_changes_nothing(case, tmp_path):
    if case == "compiled_lightning_module" and lightning.__version__.startswith("2.4."):
        pytest.skip("lightning 2.4 cannot be compiled where it logs, with a monitor or without")
    options = {"module_class": Noting, **CASES[case]}
    more, plugins = options.pop("more", list), options.pop("plugins", list)
    alone = traces(callbacks=more(), plugins=plugins(), tmp_path=tmp_path / "alone", **options)
    found, weights = InequalityMonitor(every_n_steps=5, at=[1], num_samples=16), Snapshots()
    callbacks = [*more(), found, weights]
    watched = traces(callbacks=callbacks, plugins=plugins(), tmp_path=tmp_path / "watched", **options)
    for name, value in alone.items():
        assert watched[name] == value, name
    last = 8 if case == "accumulation_scheduled" else 6 if "accumulation" in case else 12
    assert steps(found) == [step for step in (0, 1, 5, 10) if step < last] + [last]
    x, y = DATA[probe_rows(16)]
    for row in whole(found):
        net = Plain().net.eval().to(weights.at[0][0].dtype)
        for parameter, value in zip(net.parameters(), weights.at[row["step"]], strict=True):
            parameter.data = value
        expected = network_values(evaluate_inequality(net, x.to(value.dtype), y))
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6), row["step"]


def test_averaged_weights_are_seen_at_an_end_that_is_not_on_the_schedule_and_in_validation(tmp_path):
    def averaged(found, module):
        return torch.equal(found.report.lhs, evaluate_inequality(module.net.eval(), *DATA[probe_rows(8)]).lhs)

    by_step = InequalityMonitor(every_n_steps=5, num_samples=8)
    by_epoch = InequalityMonitor(every_n_epochs=1, num_samples=8, prefix="by epoch")
    module = Plain()
    trainer = run(module, [ema(), by_step, by_epoch], tmp_path)
    assert steps(by_step) == [0, 5, 10, 12] and steps(by_epoch) == [0, 6, 12]
    assert averaged(by_step, module) and not averaged(by_epoch, module)
    trainer.validate(module, DataLoader(DATA, 16), verbose=False)
    assert averaged(by_epoch, module)


def test_state_that_is_neither_weight_nor_buffer_is_put_back(tmp_path):
    alone = traces(Carrying, [], tmp_path / "alone")
    watched = traces(Carrying, [InequalityMonitor(every_n_steps=1, num_samples=16)], tmp_path / "watched")
    assert alone == watched
    assert len(alone["attributes"][0]) == 12


class Merging(nn.Linear):
    """Adds a product of thin matrices to its weight in eval mode, as LoRA does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.thin, self.flat = nn.Parameter(torch.randn(outputs, 2)), nn.Parameter(torch.randn(2, inputs))
        self.is_merged = False

    def train(self, mode=True):
        if self.is_merged == mode:
            self.weight.data += (self.thin @ self.flat).data * (-1 if mode else 1)
            self.is_merged = not mode
        return super().train(mode)

    def forward(self, x):
        return F.linear(x, self.weight if self.is_merged else self.weight + self.thin @ self.flat, self.bias)


class OfMerging(Noting):
    def __init__(self) -> None:
        super().__init__()
        self.net[0] = Merging(12, 10)


def test_what_a_module_does_in_eval_is_not_done(tmp_path):
    options = {"limit_val_batches": 0}
    alone = traces(OfMerging, [], tmp_path / "alone", **options)
    assert traces(OfMerging, [InequalityMonitor(num_samples=16)], tmp_path / "watched", **options) == alone


class Scripted(Noting):
    """Its masks are drawn by what torch.jit has made, which holds the train/eval flag outside of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = torch.jit.script(self.net[2])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_module_goes_on_in_train_mode(tmp_path):
    alone = traces(Scripted, [], tmp_path / "alone")
    assert traces(Scripted, [InequalityMonitor(every_n_steps=5, num_samples=16)], tmp_path / "watched") == alone
    assert all(alone["modes"])


class OfFactory(Plain):
    """A forward pass that makes a tensor of the default type."""

    def forward(self, x):
        return self.net(x @ torch.eye(12))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_the_trainers_precision_is_that_of_a_check(tmp_path):
    found = InequalityMonitor(num_samples=16)
    run(OfFactory(), [found], tmp_path, precision="64-true")
    assert steps(found) == [0, 12]


class Outside(Plain):
    """The network is no part of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = [self.net]
        del self.net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.nets[0](batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.Adam(self.nets[0].parameters(), 1e-2)


def test_a_network_outside_of_the_module_is_looked_at_in_eval_mode(tmp_path):
    module, found = Outside(), InequalityMonitor(num_samples=16, model=lambda module: module.nets[0])
    run(module, [found], tmp_path)
    assert all(part.training for part in module.nets[0].modules())
    x, y = DATA[probe_rows(16)]
    torch.testing.assert_close(found.report.lhs, evaluate_inequality(module.nets[0].eval(), x, y).lhs)


def test_all_names_are_kept_for_every_layer(tmp_path):
    found = InequalityMonitor(every_n_steps=5, num_samples=16, slack=True)
    run(Plain(), [found], tmp_path)
    for row in found.history:
        assert set(row) >= (NETWORK_NAMES if row["layer"] == "all" else LAYER_NAMES)
    assert {row["layer"] for row in found.history} == {"all", *LAYERS}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_on_a_gpu(precision, tmp_path):
    found = InequalityMonitor(every_n_steps=5, num_samples=16)
    run(Plain(), [found], tmp_path, accelerator="gpu", devices=1, precision=precision)
    assert steps(found) == [0, 5, 10, 12]
    assert all(row["violations"] == 0 and 0 < row["lhs"] <= row["rhs"] for row in whole(found))


# --- schedule


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every_n_steps": 5}, [0, 5, 10, 12]),
        ({"every_n_epochs": 1}, [0, 6, 12]),
        ({"every_n_epochs": 2, "at": [0, 1, 7, 100]}, [0, 1, 7, 12]),
        ({"at": lambda step: step in (3, 4)}, [0, 3, 4, 12]),
        ({"every_n_steps": 4, "every_n_epochs": 1}, [0, 4, 6, 8, 12]),
        ({}, [0, 12]),
    ],
)
def test_schedules(options, expected, tmp_path):
    found = InequalityMonitor(num_samples=8, **options)
    run(Plain(), [found], tmp_path, logger=False)
    assert steps(found) == expected
    counted = found.schedule.count(0, 2 * PER_EPOCH, PER_EPOCH)
    assert counted == (None if callable(options.get("at")) else len(expected) - 1)


def test_two_optimiser_steps_in_one_batch_skip_no_check(tmp_path):
    class Twice(Plain):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                self.optimizers().zero_grad()
                self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
                self.optimizers().step()

    found = InequalityMonitor(at=[3, 8], num_samples=8)
    run(Twice(), [found], tmp_path, max_epochs=1)
    assert steps(found) == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be an int >= 1, got 0"),
        ({"every_n_epochs": 1.5}, TypeError, "every_n_epochs must be an int"),
        ({"at": [3, -1]}, ValueError, "at must name optimiser steps, ints >= 0, .* got -1"),
        ({"at": [0.5]}, ValueError, r"got 0\.5"),
        ({"num_samples": 0}, ValueError, "num_samples must be"),
        ({"norm": "nuclear"}, ValueError, "norm must be one of 'spectral'"),
        ({"of": "los"}, ValueError, "of must be one of 'loss', 'output'"),
        ({"delta": 2}, ValueError, "delta must be a probability"),
        ({"rtol": -1}, ValueError, "rtol must be a finite number > 0"),
        ({"by_layer": True}, ValueError, "by_layer must be one of 'none', 'summary', 'all'"),
        ({"on_violation": "print"}, ValueError, "on_violation must be one of"),
        ({"probe": "test"}, ValueError, "probe must be one of 'val', 'train'"),
    ],
)
def test_unknown_options_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        InequalityMonitor(**options)


def test_steps_may_come_from_an_iterator():
    found = InequalityMonitor(at=(step for step in (2, 4)))
    assert found.schedule.names_any(range(2, 3)) and found.schedule.names_any(range(4, 5))


@pytest.mark.parametrize("probe", [DATA, DATA.tensors[0], (*DATA.tensors, 1), None])
def test_a_probe_that_is_no_pair_is_refused_at_once(probe):
    with pytest.raises(ValueError, match=r"probe must be .* a pair .x, y., or a dict .* got (Tensor|3 items|NoneType)"):
        InequalityMonitor(probe=probe)


def test_schedules_say_what_they_are():
    assert str(Schedule(every_n_steps=1)) == "every step, before the first step and at the end"
    assert str(Schedule(every_n_epochs=2, at=range(20))).startswith(
        "every 2 epochs, the steps 0, 1, 2, 3, 4, 5, 6, 7, … (20 of them), before"
    )


# --- presets


def test_presets_differ_in_schedule_probe_norms_and_detail(tmp_path):
    found = {name: getattr(InequalityMonitor, name)() for name in ("economy", "business", "full")}
    for name, one in found.items():
        run(Plain(), [one], tmp_path / name, max_epochs=1, logger=False)
    assert len({str(one.schedule) for one in found.values()}) == 3
    assert [one.num_samples for one in found.values()] == [32, 64, 256]
    assert found["economy"].report.norm == "joint" and found["full"].report.norm == "spectral"
    keys = {name: set(one.history[-1]) - {"step", "epoch", "layer"} for name, one in found.items()}
    assert keys["economy"] == {"tightness", "coefficient"}
    assert keys["full"] - keys["business"] == {"product_norm", "slack_product", "slack_alignment"}
    assert keys["business"] >= LAYER_NAMES - {"slack_product", "slack_alignment"}


def test_every_choice_of_a_preset_is_an_argument():
    changed = InequalityMonitor.economy(at=[3], num_samples=7, by_layer="none")
    assert (changed.schedule, changed.num_samples, changed.by_layer) == (Schedule(at=[3]), 7, "none")
    assert InequalityMonitor.full(every_n_epochs=1).schedule == Schedule(every_n_epochs=1)
    assert vars(InequalityMonitor.business()) == vars(InequalityMonitor())


def test_detail_by_layer_can_be_left_out(tmp_path):
    found = InequalityMonitor(num_samples=8, by_layer="none")
    run(Plain(), [found], tmp_path)
    assert {row["layer"] for row in found.history} == {"all"}
    assert len(found.plot().axes) == 2


# --- logs


def test_tensorboard_and_csv_get_every_value_at_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = InequalityMonitor(every_n_steps=5, num_samples=16, slack=True)
    loggers = [TensorBoardLogger(tmp_path, name="tb", version=""), CSVLogger(tmp_path, name="csv", version="")]
    run(Plain(), [found], tmp_path, logger=loggers)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    with (tmp_path / "csv/metrics.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["bound/lhs"]]
    names = [f"bound/{name}" for name in NETWORK_NAMES] + [f"bound/{t}/{name}" for t in LAYERS for name in LAYER_NAMES]
    for name in names:
        layer = name.split("/")[1] if name.count("/") == 2 else "all"
        rows = [row for row in found.history if row["layer"] == layer]
        expected = {row["step"]: row[name.split("/")[-1]] for row in rows}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(expected, rel=1e-6)
        assert {int(row["step"]): float(row[name]) for row in table} == pytest.approx(expected, rel=1e-6)


def test_other_callbacks_go_by_the_latest_check(tmp_path):
    found = InequalityMonitor(every_n_epochs=1, num_samples=16)
    best = ModelCheckpoint(tmp_path, monitor="bound/tightness", mode="max", save_top_k=1)
    stopping = EarlyStopping("bound/rhs", mode="max", patience=2)  # which falls, so that it stops
    trainer = run(Plain(), [found, best, stopping], tmp_path, max_epochs=9)
    by_step = {row["step"]: row["tightness"] for row in whole(found)}
    at_ends = {step: value for step, value in by_step.items() if step > 0}
    assert float(best.best_model_score) == pytest.approx(max(at_ends.values()))
    assert f"step={max(at_ends, key=lambda step: at_ends[step])}" in best.best_model_path
    assert trainer.current_epoch == stopping.stopped_epoch + 1 < 9
    assert float(trainer.callback_metrics["bound/rhs"]) == pytest.approx(whole(found)[-1]["rhs"])


def test_other_callbacks_know_a_check_as_soon_as_a_run_is_resumed(tmp_path):
    class Reading(Callback):
        def on_train_batch_start(self, trainer, *_):
            self.seen = float(trainer.callback_metrics["bound/rhs"])

    checkpoints, reading = ModelCheckpoint(tmp_path), Reading()
    found = InequalityMonitor(every_n_epochs=2, num_samples=16)
    run(Plain(), [found, checkpoints], tmp_path, max_epochs=2)
    resumed = InequalityMonitor(every_n_epochs=2, num_samples=16)
    run(Plain(), [resumed, reading], tmp_path, max_epochs=3, ckpt_path=checkpoints.best_model_path)
    assert reading.seen == pytest.approx(whole(found)[-1]["rhs"])


def test_weights_and_biases_offline_gets_every_value_and_calls_nobody(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("WANDB_SILENT", "WANDB_DISABLE_GIT", "WANDB_DISABLE_CODE"):
            monkeypatch.setenv(name, "true")
        found = InequalityMonitor(every_n_steps=5, num_samples=16, slack=True)
        logger = WandbLogger(offline=True, save_dir=str(tmp_path), project="bound")
        try:
            run(Plain(), [found], tmp_path, logger=logger)
            summary = dict(logger.experiment.summary)
        finally:
            wandb.teardown()
        with pytest.raises(BlockingIOError):
            server.accept()
    for row in found.history[-3:]:
        path = "bound" if row["layer"] == "all" else f"bound/{row['layer']}"
        for name in NETWORK_NAMES if row["layer"] == "all" else LAYER_NAMES:
            assert summary[f"{path}/{name}"] == pytest.approx(row[name], rel=1e-6)
    assert summary["trainer/global_step"] == 12
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


class Diverging(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        return loss * (float("inf") if self.global_step == 3 else 1.0)


def test_a_run_that_diverges_goes_on_and_the_monitor_says_so(tmp_path):
    found = InequalityMonitor(every_n_steps=2, num_samples=16)
    with pytest.warns(UserWarning, match="no check of the inequality after step 4: expected finite outputs"):
        trainer = run(Diverging(), [found], tmp_path)
    assert trainer.global_step == 12
    assert [row["step"] for row in found.history if row["layer"] == "all"] == [0, 2]


def test_two_monitors_are_told_apart_by_their_prefixes(tmp_path):
    train, val = (
        InequalityMonitor(every_n_steps=6, num_samples=8, probe=probe, prefix=f"{probe}/bound")
        for probe in ("train", "val")
    )
    shifted = TensorDataset(DATA.tensors[0] * 2, DATA.tensors[1])
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = run(Plain(), [train, val, checkpoint], tmp_path, val=DataLoader(shifted, 16))
    assert train.history[0]["lhs"] != val.history[0]["lhs"]
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "train/bound/lhs" in header and "val/bound/lhs" in header
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert [saved[one.state_key]["history"] == one.history for one in (train, val)] == [True, True]
    assert trainer.global_step == 12


def test_the_history_is_a_table(tmp_path):
    found = InequalityMonitor(every_n_steps=5, num_samples=16, slack=True)
    run(Plain(), [found], tmp_path)
    found.to_csv(tmp_path / "bound.csv")
    with (tmp_path / "bound.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(int(row["step"]), row["layer"]) for row in table] == [
        (step, layer) for step in (0, 5, 10, 12) for layer in ("all", "0", "3")
    ]
    for row, kept in zip(table, found.history, strict=True):
        assert {name for name, value in row.items() if value} == set(kept)
        assert float(row["tightness"]) == kept["tightness"]


def test_nothing_undefined_reaches_a_logger(tmp_path):
    """A constant network has no tightness at all."""

    class Constant(Plain):
        def __init__(self):
            super().__init__()
            self.net[3].weight.data.zero_()
            self.criterion = lambda output, target: 0 * output.sum(1)

    logged = []
    logger = CSVLogger(tmp_path)
    logger.log_metrics = lambda metrics, step=None: logged.append(metrics)
    found = InequalityMonitor(num_samples=8)
    run(Constant(), [found], tmp_path, logger=logger)
    first = whole(found)[0]
    assert first["undefined"] == 8 and math.isnan(first["tightness"])
    checks = [metrics for metrics in logged if "bound/lhs" in metrics]
    assert checks and all(math.isfinite(value) for metrics in checks for value in metrics.values())
    assert "bound/tightness" not in checks[0] and checks[0]["bound/undefined"] == 8
    found.plot()


# --- violations


def fake(lower: float):
    """`evaluate_inequality` with a left side of which the certified end is `lower` times the right side."""

    def evaluate(*args, **kwargs):
        report = evaluate_inequality(*args, **kwargs)
        low = report.rhs * lower
        return dataclasses.replace(report, lhs=report.rhs * 2, lhs_lower=low, holds=low <= report.rhs)

    return evaluate


def test_violations_are_judged_from_the_certified_end(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "evaluate_inequality", fake(lower=0.9))
    found = InequalityMonitor(num_samples=8, on_violation="raise")
    run(Plain(), [found], tmp_path)
    assert whole(found)[0]["lhs"] > whole(found)[0]["rhs"] and whole(found)[0]["violations"] == 0


def test_violations_raise_warn_or_are_only_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "evaluate_inequality", fake(lower=1.1))
    expected = "does not hold for 8 of 8 samples at step 0"
    with pytest.raises(RuntimeError, match=expected):
        run(Plain(), [InequalityMonitor(num_samples=8, on_violation="raise")], tmp_path)
    with pytest.warns(UserWarning, match=expected):
        run(Plain(), [InequalityMonitor(num_samples=8)], tmp_path)
    found = InequalityMonitor(num_samples=8, on_violation="ignore")
    run(Plain(), [found], tmp_path)
    assert [row["violations"] for row in whole(found)] == [8, 8]


# --- resume

WAYS_TO_SAVE: dict[str, dict[str, Any]] = {
    "within_an_epoch": {"every_n_train_steps": 3},
    "after_validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "after_an_epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
}


class Undropped(Plain):
    """Lightning's checkpoints hold no random state, so a resumed run draws other masks."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2].p = 0.0


@pytest.mark.parametrize("way", WAYS_TO_SAVE)
@pytest.mark.parametrize("killed_at", [8, 11])
def test_a_killed_and_resumed_run_has_the_history_of_an_unbroken_one(way, killed_at, tmp_path):
    def monitored():
        lightning.seed_everything(0, verbose=False)
        return InequalityMonitor(every_n_steps=5, every_n_epochs=1, at=[1, 3], num_samples=16), Undropped()

    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **WAYS_TO_SAVE[way])
    unbroken, module = monitored()
    run(module, [unbroken], tmp_path / "a", train=ResumableLoader(), max_epochs=3)
    broken, module = monitored()
    with pytest.raises(PowerCutError):
        run(module, [broken, saving, KillAt(killed_at)], tmp_path / "b", train=ResumableLoader(), max_epochs=3)
    saved = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    resumed, module = monitored()
    run(module, [resumed], tmp_path / "c", train=ResumableLoader(), max_epochs=3, ckpt_path=saved)
    assert steps(unbroken) == [0, 1, 3, 5, 6, 10, 12, 15, 18]
    assert resumed.history == unbroken.history


def test_a_run_that_goes_on_after_its_end_forgets_the_check_at_the_end(tmp_path):
    unbroken, first, second = (InequalityMonitor(every_n_steps=4, num_samples=16) for _ in range(3))
    for found, epochs, ckpt_path in ((unbroken, 2, None), (first, 1, None), (second, 2, tmp_path / "end.ckpt")):
        lightning.seed_everything(0, verbose=False)
        trainer = run(Undropped(), [found], tmp_path, train=ResumableLoader(), max_epochs=epochs, ckpt_path=ckpt_path)
        if found is first:
            trainer.save_checkpoint(tmp_path / "end.ckpt")  # holds the check of step 6 too
    assert steps(first) == [0, 4, 6] and steps(second) == steps(unbroken) == [0, 4, 8, 12]
    assert second.history == unbroken.history


def test_a_monitor_added_on_resuming_starts_its_curve_there(tmp_path):
    trainer = run(Plain(), [], tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    found = InequalityMonitor(every_n_steps=5, num_samples=16)
    run(Plain(), [found], tmp_path, ckpt_path=tmp_path / "without.ckpt")
    assert steps(found) == [6, 10, 12]


def test_a_check_that_the_checkpoint_came_before_is_made_up_for(tmp_path):
    class Saving(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "before.ckpt")

    found, resumed = (InequalityMonitor(every_n_steps=4, num_samples=16) for _ in range(2))
    lightning.seed_everything(0, verbose=False)
    run(Undropped(), [Saving(), found], tmp_path, train=ResumableLoader())
    run(Undropped(), [resumed], tmp_path, train=ResumableLoader(), ckpt_path=tmp_path / "before.ckpt")
    assert resumed.history == found.history


def test_another_probe_after_a_resume_is_told(tmp_path):
    trainer = run(Plain(), [InequalityMonitor(num_samples=16)], tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    other = DataLoader(TensorDataset(DATA.tensors[0] + 1e-3, DATA.tensors[1]), 16)
    with pytest.warns(UserWarning, match="the probe is not the one of the checks that the checkpoint brings along"):
        run(Plain(), [InequalityMonitor(num_samples=16)], tmp_path, val=other, ckpt_path=tmp_path / "end.ckpt")


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_checkpoint_that_is_only_looked_at_leaves_the_history(stage, tmp_path):
    found = InequalityMonitor(every_n_steps=2, num_samples=8)
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = run(Plain(), [found, saved], tmp_path)
    before = [dict(row) for row in found.history]
    getattr(trainer, stage)(Plain(), DataLoader(DATA, 16), ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    assert found.history == before and steps(found)[-1] == 12


def test_the_last_check_belongs_to_the_last_epoch(tmp_path):
    found = InequalityMonitor(every_n_steps=5, num_samples=8)
    run(Plain(), [found], tmp_path)
    assert [(row["step"], row["epoch"]) for row in whole(found)] == [(0, 0), (5, 0), (10, 1), (12, 1)]


def test_a_second_fit_starts_afresh(tmp_path):
    found = InequalityMonitor(num_samples=16)
    run(Plain(), [found], tmp_path)
    run(Plain(), [found], tmp_path, max_epochs=1)
    assert steps(found) == [0, 6]


# --- outside training


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validate_and_test_run_in_inference_mode(stage, tmp_path):
    found, module = InequalityMonitor(num_samples=16), Plain()
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = lightning.Trainer(callbacks=[found], logger=logger, enable_progress_bar=False, accelerator="cpu")
    for _ in range(2):
        getattr(trainer, stage)(module, DataLoader(DATA, 16), verbose=False)
    assert steps(found) == [0] and len(found.history) == 3 and found.report.holds.all()
    report = evaluate_inequality(module.net.eval(), *DATA[probe_rows(16)])
    torch.testing.assert_close(found.report.lhs, report.lhs)
    logger.save()
    assert "bound/lhs" in (tmp_path / "metrics.csv").read_text()


def test_checks_outside_training_do_not_mix_with_the_curve(tmp_path):
    found, module = InequalityMonitor(num_samples=16), Plain()
    trainer = run(module, [found], tmp_path)
    before, report = list(found.history), found.report
    trainer.test(module, DataLoader(DATA, 16), verbose=False)
    assert found.report is report  # nobody asked for more
    module.net[0].weight.data.mul_(2)  # as if another checkpoint had been loaded
    state = found.state_dict()
    trainer.validate(module, DataLoader(TensorDataset(*DATA[:50]), 16), verbose=False)
    assert found.history == before and not torch.equal(found.report.lhs, report.lhs)
    assert found.state_dict() == state


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard_parameters_are_refused(strategy):
    trainer: Any = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(RuntimeError, match=rf"{strategy.__name__} gives every process only a shard.*strategy=\"ddp\""):
        InequalityMonitor().setup(trainer, Plain(), "fit")


# --- what it says


def test_the_announcement_says_what_was_found(tmp_path, caplog):
    class Residual(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(20, 3))

    found = InequalityMonitor(every_n_steps=1, every_n_epochs=1, num_samples=16)
    with caplog.at_level(logging.INFO):
        run(Residual(), [found], tmp_path, max_epochs=4)
    (block,) = [record.message for record in caplog.records if record.message.startswith("InequalityMonitor\n")]
    lines = {line[2:12].strip(): line[12:] for line in block.splitlines()[1:]}
    assert lines["model"] == "net (Sequential)"
    assert lines["f"] == "loss: cross_entropy (integer targets)"
    assert lines["in sum"] == "3"
    assert lines["left out"] == "1: a convolution applies its weight at many positions, whose gradients can cancel"
    assert lines["norms"] == "spectral"
    assert lines["probe"] == "16 samples, of the validation set, seed 0"
    assert lines["schedule"] == "every step, every epoch, before the first step and at the end"
    seconds, total = (float(lines["cost"].split(before)[1].split(" s")[0]) for before in ("took ", "about "))
    assert "25 in 24 steps take" in lines["cost"] and total == pytest.approx(25 * seconds, rel=0.1)
    (share,) = [record.message for record in caplog.records if "of this run" in record.message]
    assert "25 checks will take about" in share and 0 < float(share.split("about ")[1].split("%")[0]) < 100
    assert len(steps(found)) == 25


def test_the_cost_is_announced_only_as_far_as_it_is_known(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(Plain(), [InequalityMonitor(at=lambda step: step == 3, num_samples=8)], tmp_path)
        run(Plain(), [InequalityMonitor(num_samples=8)], tmp_path, train=DataLoader(Stream(), 16))
    assert "how many there will be in 12 steps only the callable knows" in caplog.text
    assert "how many steps there will be is not known" in caplog.text


def test_no_number_of_steps_is_announced_under_manual_optimisation(tmp_path, caplog):
    """Two optimisers make two steps a batch: of 24, 12 were announced, and half of the checks."""

    class Manual(Plain):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[layer].parameters(), 0.1) for layer in (0, 3)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx)["loss"])
                optimizer.step()

    found = InequalityMonitor(every_n_steps=2, num_samples=8)
    with caplog.at_level(logging.INFO):
        run(Manual(), [found], tmp_path)
    assert steps(found) == list(range(0, 25, 2))
    assert "how many steps there will be is not known" in caplog.text
    assert "of this run" not in caplog.text


# --- the figure


def test_the_figure_has_three_panels_with_their_curves(tmp_path):
    found = InequalityMonitor(every_n_steps=5, num_samples=16)
    run(Plain(), [found], tmp_path)
    sides, tightness, coefficients = found.plot("a run").axes
    assert sides.get_yscale() == coefficients.get_yscale() == "log"
    drawn = {line.get_label(): list(line.get_ydata()) for line in sides.lines}
    assert list(drawn.values()) == [[row["rhs"] for row in whole(found)], [row["lhs"] for row in whole(found)]]
    assert [line.get_label() for line in tightness.lines] == ["all layers, mean", "layer 0", "layer 3"]
    for line in coefficients.lines:
        assert line.get_ydata()[0] == 1.0 and len(line.get_ydata()) == 4
    assert list(sides.lines[0].get_xdata()) == [0, 5, 10, 12]


def test_an_empty_history_has_no_figure():
    with pytest.raises(ValueError, match="was the monitor part of a run"):
        InequalityMonitor().plot()
