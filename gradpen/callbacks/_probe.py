"""A fixed batch to look at the network with, drawn without touching anything of the run."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from gradpen.isolation import random_streams_kept


def draw_probe(loader: Any, num_samples: int, seed: int) -> Any:
    """`num_samples` items of the loader's data set, collated as the loader would: a batch.

    The items are read from the data set by index (chosen by a generator of its own), so neither the loader's position
    nor a random stream moves.

    Raises:
        ValueError: if the loader has no data set that can be indexed.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or dataset is None or isinstance(dataset, IterableDataset):
        raise ValueError(
            f"expected a DataLoader over a data set with __getitem__ to draw the probe from, got {type(loader).__name__}"
            f"{'' if dataset is None else f' over {type(dataset).__name__}'}: reading from it would move its position. "
            "Give the samples yourself: probe=(x, y)"
        )
    count = len(dataset)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:num_samples].sort().values
    with random_streams_kept():
        return loader.collate_fn([dataset[index] for index in chosen.tolist()])
