"""The MNIST recipe's training as a bare PyTorch loop: what the recipe's epochs are compared with.

    python benchmarks/bare_loop.py --data-dir data --epochs 20 --out bare.ckpt

The same network, optimiser, schedule, batches from tensors, accuracy, and a checkpoint at the end of every epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from workload import ImageSet, load_images, mlp

BATCH_SIZE = 128
LR = 1e-3


def train(images: ImageSet, epochs: int, checkpoint: Path) -> None:
    """Train, print the share of images that was classified rightly, and save, epoch by epoch."""
    torch.manual_seed(0)
    model = mlp([784, 512, 512, 10])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    steps = epochs * -(-len(images.y) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps)
    for epoch in range(1, epochs + 1):
        correct = torch.zeros((), dtype=torch.int64)
        for index in torch.randperm(len(images.y)).split(BATCH_SIZE):
            x, y = images.x[index], images.y[index]
            optimizer.zero_grad()
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            optimizer.step()
            schedule.step()
            correct += (logits.detach().argmax(1) == y).sum()
        print(f"epoch {epoch}: {100 * int(correct) / len(images.y):.2f} %")
        unfinished = checkpoint.with_suffix(".part")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, unfinished)
        unfinished.replace(checkpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where MNIST/raw is")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("bare.ckpt"), help="the checkpoint")
    given = parser.parse_args()
    train(load_images(given.data_dir), given.epochs, given.out)
