"""A fixed batch to look at the network with, drawn without touching anything of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Sized
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset

from gradpen.isolation import random_streams_kept
from gradpen.recording import tensors_of

VALIDATION_SET = "validation set"


def draw_probe(loaders: Any, num_samples: int, seed: int) -> Any:
    """`num_samples` items of the loader's data set, collated as the loader would: a batch; of several loaders, one of each.

    The items are read from the data set by index, so neither the loader's position nor a random stream moves. What is
    random in them (augmentation) is drawn from the seed too: a resumed run gets the same probe. A sampler that is made for
    some indices of the data set, as torch's SubsetRandomSampler is, says which there are to draw from.

    Raises:
        ValueError: if a loader has no data set that can be indexed, or does not collate samples.
    """
    if not all(isinstance(leaf, DataLoader) for leaf in tree_leaves(loaders)):
        return _drawn(loaders, num_samples, seed)
    return tree_map(lambda loader: _drawn(loader, num_samples, seed), loaders)


def _drawn(loader: Any, num_samples: int, seed: int) -> Any:
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
    indices = _indices_of(loader)
    count = len(dataset) if indices is None else len(indices)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:num_samples].sort().values.tolist()
    chosen = chosen if indices is None else [indices[position] for position in chosen]
    with random_streams_kept(seed):
        return loader.collate_fn([_item(dataset, int(index)) for index in chosen])


def _indices_of(loader: DataLoader[Any]) -> Any:
    """Which items the loader's sampler is made for; None if it says nothing of that."""
    for holder in (loader, loader.batch_sampler):
        sampler = getattr(holder, "sampler", None)
        # Lightning puts it into another one, which shares it out among processes
        sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
        indices = getattr(sampler, "indices", None)
        if hasattr(indices, "__getitem__") and hasattr(indices, "__len__"):  # a list, an array, a tensor
            return indices
    return None


def _item(dataset: Any, index: int) -> Any:
    try:
        return dataset[index]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"expected a data set whose items have the numbers 0, 1, 2, … to draw the probe from, got "
            f"{type(error).__name__}: {error} for item {index} of {type(dataset).__name__}: give the samples yourself, "
            "probe=(x, y)"
        ) from error


def probe_loader(trainer: Trainer, probe: str) -> tuple[Any, str]:
    """The first data loader of the kind asked for ("val" or "train") that is not empty, and the name of its data.

    Where every training step gets a batch of each of several loaders, these are given as they are arranged there.

    Raises:
        ValueError: if there is none.
    """
    held_out = [(_validation_loaders(trainer), VALIDATION_SET), (trainer.test_dataloaders, "test set")]
    for loaders, name in [] if probe == "train" else held_out:
        loader = _first(loaders)
        if loader is not None:
            return loader, name
    combined = trainer.fit_loop._combined_loader
    one_of_each = combined is not None and combined._mode != "sequential"
    training = trainer.train_dataloader if one_of_each else _first(trainer.train_dataloader)
    if training is not None:
        return training, "training set"
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
    return None if _is_empty(loaders) else loaders


def _is_empty(loader: Any) -> bool:
    dataset = getattr(loader, "dataset", None)
    return isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) and len(dataset) == 0
