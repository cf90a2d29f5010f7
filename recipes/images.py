"""Images as tensors: splits, and batches that are sliced from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from flags import UserError


class Labelled(NamedTuple):
    """Images (N, …) and their classes (N,)."""

    x: Tensor
    y: Tensor

    def rows(self, index: Tensor | slice) -> Labelled:
        """Some of them."""
        return Labelled(self.x[index], self.y[index])

    def to(self, device: torch.device) -> Labelled:
        """All of them, on another device."""
        return Labelled(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Images:
    """One data set, split."""

    key: str  # "mnist": as in --dataset and summary.json
    name: str  # "MNIST": as in titles and tables
    num_classes: int
    train: Labelled
    val: Labelled  # may be empty; chooses weights
    test: Labelled  # read once, at the end

    def split(self, train_size: int | None, val_size: int, seed: int) -> Images:
        """Hold out the last training images for validation, and draw `train_size` of the others.

        Raises:
            UserError: if there are not that many.
        """
        available = len(self.train.y) - val_size
        wanted = available if train_size is None else train_size
        if not 0 < wanted <= available:
            raise UserError(
                f"{self.name} has {len(self.train.y):,} training images: expected --train-size and --val-size to fit in, "
                f"with at least one image to train on, got {train_size} and {val_size}"
            )
        chosen: Tensor | slice = slice(0, available)
        if wanted < available:
            chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]
        return replace(self, train=self.train.rows(chosen), val=self.train.rows(slice(available, None)))

    def probe(self, count: int, dtype: torch.dtype) -> Labelled:
        """A few training images, always the same ones: the inequality is watched on them."""
        order = torch.randperm(len(self.train.y), generator=torch.Generator().manual_seed(0))
        x, y = self.train.rows(order[:count])
        return Labelled(x.to(dtype), y)


def normalised(train: Labelled, test: Labelled) -> tuple[Labelled, Labelled, Labelled]:
    """Training, (no) validation and test images with mean 0 and variance 1 over the training pixels, channel by channel.

    A channel that is the same everywhere becomes 0.

    Args:
        train: images (N, height, width) or (N, channels, height, width).
        test: likewise.
    """
    over = (0, -2, -1) if train.x.dim() == 4 else (0, 1, 2)
    mean, std = train.x.mean(over, keepdim=True), train.x.std(over, keepdim=True)
    std = std.masked_fill(train.x.amin(over, keepdim=True) == train.x.amax(over, keepdim=True), 1)
    train, test = (Labelled((part.x - mean) / std, part.y) for part in (train, test))
    return train, train.rows(slice(0)), test


class EpochBatches(Sampler[Tensor]):
    """The indices of one epoch's batches, a tensor each; under several processes, this one's share of them.

    Args:
        count: number of samples.
        batch_size: per process.
        shuffle_seed: a new order for every epoch, from this seed and the epoch alone; None keeps the order, and every
            sample is in exactly one process's share.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self, count: int, batch_size: int, *, shuffle_seed: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch, also the first one after a resume."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._share().split(self.batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self._places()) / self.batch_size)

    def _places(self) -> range:
        """This process's places in the epoch's order; when training all have equally many, as they step together."""
        shuffled = self.shuffle_seed is not None
        end = self.count // self.world_size * self.world_size if shuffled else self.count
        return range(self.rank, end, self.world_size)

    def _share(self) -> Tensor:
        places = self._places()
        order = torch.arange(self.count)
        if self.shuffle_seed is not None:
            seed = self.shuffle_seed * 1_000_003 + self.epoch
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        return order[places.start : places.stop : places.step]


class ImageBatches(LightningDataModule):
    """Batches of `Images`, which lie on the trainer's device as whole tensors.

    Args:
        images: what to slice.
        batch_size: per process.
        seed: of the shuffles.
    """

    def __init__(self, images: Images, batch_size: int, seed: int) -> None:
        super().__init__()
        self.images = images
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Move everything once; after this a batch costs one indexing operation."""
        device = self._running().strategy.root_device
        self.train, self.val, self.test = (
            part.to(device) for part in (self.images.train, self.images.val, self.images.test)
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled."""
        return self._loader(self.train, shuffle_seed=self.seed)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """In order; nothing if no image is held out."""
        return [self._loader(self.val)] if len(self.val.y) else []

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """The test images, the training images (the gap between the two is a result), and those held out, if any."""
        held_out = [self._loader(self.val)] if len(self.val.y) else []
        return [self._loader(self.test), self._loader(self.train), *held_out]

    def _loader(self, part: Labelled, shuffle_seed: int | None = None) -> DataLoader[Any]:
        trainer = self._running()
        batches = EpochBatches(
            len(part.y),
            self.batch_size if shuffle_seed is not None else max(self.batch_size, 1000),
            shuffle_seed=shuffle_seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return DataLoader(TensorDataset(*part), sampler=batches, batch_size=None)

    def _running(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("expected to be used by a Trainer, got none: pass this to trainer.fit(datamodule=…)")
        return self.trainer
