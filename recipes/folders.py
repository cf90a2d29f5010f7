"""Any tree of images DIR/{train,test}/<class>/* as tensors: decoded once, then read from a cache."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torch import Tensor
from torchvision.datasets import ImageFolder

from files import written_whole
from flags import UserError
from images import Images, Labelled, normalised

PARTS = ("train", "test")
CACHE_VERSION = 1


class Tree(NamedTuple):
    """The files of both parts, in a fixed order, and their classes."""

    classes: list[str]
    samples: dict[str, list[tuple[str, int]]]  # part → (path, class)


def load_folder(root: Path, name: str, image_side: int | None) -> Images:
    """The images of a tree, in colour.

    Args:
        root: holds train/<class>/* and test/<class>/*.
        name: for titles and tables.
        image_side: scale every image to so many pixels each way; default: all have one size already.

    Raises:
        UserError: if the tree is not there or its two parts do not go together, or on an image that cannot be read.
    """
    tree = read_tree(root)
    pixels = decoded(tree, root, image_side)
    parts = []
    for part in PARTS:
        y = torch.tensor([label for _, label in tree.samples[part]])
        # A tree is sorted by class: mixed once, so that the last images, which are held out, are of all classes.
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        parts.append(Labelled(pixels[part][order].float().div(255), y[order]))
    train, test = parts
    return Images("folder", name, len(tree.classes), *normalised(train, test))


def read_tree(root: Path) -> Tree:
    """Every image file of the tree, with its class.

    Raises:
        UserError: if there is no such tree, the parts have different classes, or there is one class alone.
    """
    try:
        found = {part: ImageFolder(str(root / part)) for part in PARTS}
    except FileNotFoundError as error:  # torchvision's word for a missing folder and for an empty class
        raise UserError(
            f"--dataset folder expects {root}/train/<class>/* and {root}/test/<class>/*: {error}"
        ) from error
    if found["train"].classes != found["test"].classes:
        differing = sorted(set(found["train"].classes) ^ set(found["test"].classes))
        raise UserError(
            f"expected the same classes in {root}/train and {root}/test, got only in one of them: {', '.join(differing)}"
        )
    if len(found["train"].classes) < 2:
        raise UserError(f"expected two classes or more in {root}/train, got only {found['train'].classes[0]}")
    return Tree(found["train"].classes, {part: found[part].samples for part in PARTS})


def decoded(tree: Tree, root: Path, image_side: int | None) -> dict[str, Tensor]:
    """Both parts' pixels, (N, 3, height, width) of bytes, from the cache if the files are those that it was made of."""
    cache = cache_folder() / f"{fingerprint(tree, root, image_side)}.pt"
    try:
        return torch.load(cache, weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        warnings.warn(f"{cache} cannot be read ({error}): the images are decoded again", stacklevel=2)
    files = [path for part in PARTS for path, _ in tree.samples[part]]
    images = [decode(path, image_side) for path in track(files, f"Decoding {len(files):,} images")]
    odd = next((path for path, image in zip(files, images, strict=True) if image.shape != images[0].shape), None)
    if odd is not None:
        raise UserError(
            f"expected images of one size, got {files[0]} and {odd} of different ones: scale them with --image-side 32"
        )
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    counts = [len(tree.samples[part]) for part in PARTS]
    whole = {part: rows.clone() for part, rows in zip(PARTS, pixels.split(counts), strict=True)}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(cache, "wb") as file:
            torch.save(whole, file)
    except (OSError, RuntimeError) as error:  # the latter is torch's word for a full disk
        warnings.warn(f"{cache} cannot be written ({error}): next time, the images are decoded again", stacklevel=2)
    return whole


def decode(path: str, image_side: int | None) -> np.ndarray:
    """One image in colour: bytes of shape (height, width, 3).

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            colour = image.convert("RGB")
            return np.asarray(colour if image_side is None else colour.resize((image_side, image_side)))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def fingerprint(tree: Tree, root: Path, image_side: int | None) -> str:
    """Of names, sizes and times of all files: another tree, or a changed one, has another."""
    files = []
    for part in PARTS:
        for path, _ in tree.samples[part]:
            status = os.stat(path)
            files.append((os.path.relpath(path, root), status.st_size, status.st_mtime_ns))
    described = json.dumps([CACHE_VERSION, str(root.resolve()), image_side, files])
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """Outside the tree, which may be read-only."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradpen"
