"""What each of two data-parallel processes finds; `test_two_processes.py` starts them and compares.

``python -m torch.distributed.run --standalone --nproc-per-node 2 tests/two_processes.py FOLDER`` writes one file for each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss
from gradpen.callbacks import GradPenaltyCallback
from gradpen.metrics import GeneralizationGap, GeometricComplexity, InequalityTightness, ParamGradSqNorm

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 5, generator=GENERATOR)
Y = torch.randint(3, (32,), generator=GENERATOR)
OPTIONS = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


class Module(lightning.LightningModule):
    """An MLP that logs the gap of its accuracy as a metric object."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.lr = lr
        self.gap = accuracy_gap()

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.gap.update(logits, batch[1], split="train")
        return F.cross_entropy(logits, batch[1])

    def validation_step(self, batch, batch_idx):
        self.gap.update(self.net(batch[0]), batch[1], split="held_out")
        self.log("gap", self.gap)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class WithUnused(Module):
    """A layer that the loss does not depend on."""

    def __init__(self, lr: float) -> None:
        super().__init__(lr)
        self.unused = nn.Linear(2, 2)


def accuracy_gap() -> GeneralizationGap:
    return GeneralizationGap(MulticlassAccuracy(num_classes=3, average="micro"))


def loader(part: slice, batch_size: int, processes: int) -> DataLoader:
    """This process's share: every second sample, so that a step of both is a step of one with twice the batch size."""
    rank = int(os.environ.get("RANK", 0))
    samples = TensorDataset(X[part], Y[part])
    sampler = DistributedSampler(samples, num_replicas=processes, rank=rank, shuffle=False)
    return DataLoader(samples, batch_size, sampler=sampler)


def train(
    module: Module, penalties: list[Any], batch_size: int, **options: Any
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """The parameters after two epochs, and what was logged last."""
    loaders = [loader(part, batch_size, options["devices"]) for part in (slice(0, 16), slice(16, 32))]
    callback = GradPenaltyCallback(penalties=penalties, sync_dist=True)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], **OPTIONS, **options)
    trainer.fit(module, *loaders)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return [parameter.detach() for parameter in module.parameters()], logged


def sample_penalties() -> list[Any]:
    return [InputGradPenalty(0.1), ParamGradPenalty(0.01)]


def watch(part: slice) -> dict[str, float]:
    """The metrics over some of the samples, of a network that every process makes in the same way."""
    model = Module(0.0).net
    collection = MetricCollection([GeometricComplexity(), ParamGradSqNorm(), InequalityTightness()])
    for start in range(part.start, part.stop, 7):
        rows = slice(start, min(start + 7, part.stop))
        collection.update(model, X[rows], Y[rows])
    return {name: value.item() for name, value in collection.compute().items()}


def gaps(part: slice) -> dict[str, float]:
    """Gaps over some of the samples, one of them of a metric with list states."""
    predictions = (X[:, 0] > 0).long()
    collection = MetricCollection({"accuracy": accuracy_gap(), "auroc": GeneralizationGap(BinaryAUROC())})
    for split, shift in (("train", 0), ("held_out", 1)):
        target = (Y[part] + shift) % 2
        collection["accuracy"].update(predictions[part], target, split=split)
        collection["auroc"].update(X[part, 0].sigmoid(), target, split=split)
    first = {name: value.item() for name, value in collection.compute().items()}
    collection["accuracy"].update(predictions[part], predictions[part], split="train")  # goes on from its own states
    return first | {"later": collection["accuracy"].compute().item()}


def objective_gradients(part: slice, **options: Any) -> list[torch.Tensor]:
    """Of the objective through DistributedDataParallel, in the third step."""
    model = Module(0.0).net
    objective = PenalizedLoss(F.cross_entropy, *sample_penalties())
    wrapped = DistributedDataParallel(model, **options) if options else model
    for _ in range(3):
        model.zero_grad()
        objective(wrapped, X[part], Y[part]).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def static_graph_is_refused() -> bool:
    """Whether the one option of DistributedDataParallel that would leave the gradients as they are is an error."""
    wrapped = DistributedDataParallel(Module(0.0).net, static_graph=True)
    try:
        InputGradPenalty()(wrapped, X, Y)
    except RuntimeError as error:
        return "leave static_graph out" in str(error)
    return False


def main(folder: Path) -> None:
    found: dict[str, Any] = {"trained": train(Module(0.5), sample_penalties(), 4, devices=2, strategy="ddp")}
    unused = "ddp_find_unused_parameters_true"
    batch = [ParamGradPenalty(0.01, over="batch"), InputGradPenalty(0.1)]
    found["batch"] = train(WithUnused(0.0), batch, 8, devices=2, strategy=unused)
    rank = torch.distributed.get_rank()
    part = slice(0, 10) if rank == 0 else slice(10, 32)
    found |= {"watched": watch(part), "gaps": gaps(part)}
    half = slice(0, 16) if rank == 0 else slice(16, 32)
    found["objective"] = [objective_gradients(half, find_unused_parameters=flag) for flag in (False, True)]
    found["refused"] = static_graph_is_refused()
    one_sided = accuracy_gap()
    one_sided.update(Y, Y, split="train")
    if rank == 0:
        one_sided.update(Y, 0 * Y, split="held_out")
    found["one_sided"] = one_sided.compute().item()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    torch.distributed.barrier()  # before torch 2.8 the next line hangs while a thread still lets go of a tensor
    torch.distributed.destroy_process_group()  # or its threads may still run when the process ends
