"""Runs of a monitor, and what it found."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_cases import DATA, Plain
from torch.utils.data import DataLoader, IterableDataset

from gradpen.callbacks import InequalityMonitor

PER_EPOCH = 6  # steps


class Noting(Plain):
    """Notes which samples it saw, in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        self.seen += batch[0].sum(1).tolist()
        return super().training_step(batch, batch_idx)


class Snapshots(lightning.Callback):
    """The weights after every optimiser step, and those that training ends with."""

    def __init__(self) -> None:
        self.at: dict[int, list[torch.Tensor]] = {}

    def on_train_start(self, trainer, pl_module):
        self.at[trainer.global_step] = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.on_train_start(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self.on_train_start(trainer, pl_module)


def run(module, callbacks, tmp_path, *, train=None, val=None, ckpt_path=None, **options):
    """One run on the CPU."""
    options = {
        "max_epochs": 2,
        "logger": CSVLogger(tmp_path, name="", version=""),
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    } | options
    trainer = lightning.Trainer(
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"accelerator": "cpu"} | options,
    )
    train = DataLoader(DATA, 16, shuffle=True) if train is None else train
    trainer.fit(module, train, DataLoader(DATA, 16) if val is None else val, ckpt_path=ckpt_path)
    return trainer


def probe_rows(count: int) -> torch.Tensor:
    """Which samples a monitor with seed 0 draws."""
    return torch.randperm(len(DATA), generator=torch.Generator().manual_seed(0))[:count].sort().values


def whole(found: InequalityMonitor) -> list[dict[str, Any]]:
    return [row for row in found.history if row["layer"] == "all"]


def steps(found: InequalityMonitor) -> list[int]:
    return [row["step"] for row in whole(found)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)
