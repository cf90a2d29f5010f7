"""A LightningModule that nobody edits, and one run of it."""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

GENERATOR = torch.Generator().manual_seed(0)
DATA = TensorDataset(torch.randn(96, 12, generator=GENERATOR), torch.randint(3, (96,), generator=GENERATOR))


class Plain(lightning.LightningModule):
    """What somebody else wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Dropout(0.3), nn.Linear(10, 3))

    def training_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1])}

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def sq_norm(rows):
    """‖·‖² of every row, in float32 whatever autocast made of the layers."""
    rows = rows.float()
    return (rows * rows).sum(1)


class ByHand(Plain):
    """The same with both penalties written out."""

    def training_step(self, batch, batch_idx):
        x, y = batch[0].detach().requires_grad_(), batch[1]
        first, activation, dropout, last = self.net
        z1 = first(x)
        h = dropout(activation(z1))
        z2 = last(h)
        loss = F.cross_entropy(z2, y)
        g, d1, d2 = torch.autograd.grad(loss * len(x), [x, z1, z2], create_graph=True)
        r_x = sq_norm(g).sum() / len(x)
        r_1 = (1 + sq_norm(x)) * sq_norm(d1)
        r_2 = (1 + sq_norm(h)) * sq_norm(d2)
        return loss + 0.1 * r_x + 0.01 * ((r_1 + r_2).sum() / len(x))


def fit(module_class, callbacks, tmp_path, *, max_epochs=2, ckpt_path=None, **options):
    lightning.seed_everything(0, verbose=False)
    module = module_class()
    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=lightning.pytorch.loggers.CSVLogger(tmp_path),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"accelerator": "cpu", **options},
    )
    trainer.fit(module, DataLoader(DATA, 16, shuffle=True), DataLoader(DATA, 16), ckpt_path=ckpt_path)
    return module, trainer


def state(module, trainer):
    optimizer = trainer.optimizers[0].state_dict()["state"]
    tensors = [*module.parameters(), *(v["exp_avg_sq"] for v in optimizer.values()), torch.get_rng_state()]
    return [tensor.detach().clone() for tensor in tensors]
