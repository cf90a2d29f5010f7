"""A fixed batch to look at the network with, drawn without touching anything of the run."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from gradpen.isolation import random_streams_kept
from gradpen.recording import tensors_of


def draw_probe(loader: Any, num_samples: int, seed: int) -> Any:
    """`num_samples` items of the loader's data set, collated as the loader would: a batch.

    The items are read from the data set by index, so neither the loader's position nor a random stream moves. What is
    random in them (augmentation) is drawn from the seed too: a resumed run gets the same probe.

    Raises:
        ValueError: if the loader has no data set that can be indexed, or does not collate samples.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or dataset is None or isinstance(dataset, IterableDataset):
        raise ValueError(
            f"expected a DataLoader over a data set with __getitem__ to draw the probe from, got {type(loader).__name__}"
            f"{'' if dataset is None else f' over {type(dataset).__name__}'}: reading from it would move its position. "
            "Give the samples yourself: probe=(x, y)"
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise ValueError(
            "expected a DataLoader that makes batches of samples to draw the probe from, got one with batch_size=None, "
            "whose data set may hold batches: give the samples yourself, probe=(x, y)"
        )
    count = len(dataset)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:num_samples].sort().values
    with random_streams_kept(seed):
        return loader.collate_fn([dataset[index] for index in chosen.tolist()])


def probe_loader(trainer: Trainer, probe: str) -> tuple[Any, str]:
    """The first data loader of the kind asked for ("val" or "train"), and the name of its data.

    Raises:
        ValueError: if there is none.
    """
    training = (trainer.train_dataloader, "training set")
    held_out = [(_validation_loaders(trainer), "validation set"), (trainer.test_dataloaders, "test set")]
    for loaders, name in [training] if probe == "train" else [*held_out, training]:
        loader = _first(loaders)
        if loader is not None:
            return loader, name
    raise ValueError(f'expected a data loader to draw the probe from (probe="{probe}"), got none: give probe=(x, y)')


def fingerprint(batch: Any) -> str:
    """A digest of the batch's tensors, by which a resumed run knows its probe again."""
    digest = hashlib.sha256()
    for tensor in tensors_of(batch):
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _validation_loaders(trainer: Trainer) -> Any:
    """Also where the trainer has not asked for them yet, as with ``check_val_every_n_epoch=5`` in the first epoch.

    It is still to ask by itself: with or without a monitor its loaders are made at the same moment.
    """
    if trainer.val_dataloaders is None and trainer.training and trainer.enable_validation:
        return trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
    return trainer.val_dataloaders


def _first(loaders: Any) -> Any:
    """The first of a nested collection; None if there is none."""
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.iterables
    if isinstance(loaders, (list, tuple, dict)):
        members = loaders.values() if isinstance(loaders, dict) else loaders
        return next((loader for loader in map(_first, members) if loader is not None), None)
    return loaders
