"""Train an MLP on CIFAR-10, CIFAR-100 or any tree of images under a gradient penalty, and watch the inequality.

    python recipes/cifar.py --penalty input
    python recipes/cifar.py --dataset cifar100 --penalty param --weight 0.001
    python recipes/cifar.py --dataset folder --data-dir photos --image-side 32 --penalty input --weight 1
    python recipes/cifar.py --dataset folder --data-dir data/cifar10-jpeg --dataset-name "CIFAR-10 (JPEG copy)"

`python recipes/cifar.py --help` lists every flag. Without data and network, it trains on synthetic shapes, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from downloads import load_or_embedded, train_and_test
from flags import Settings, UserError, run_recipe, with_default_weights
from folders import load_folder
from images import Images, Labelled, normalised
from results import Summary
from synthetic import load_synthetic
from training import run

DEFAULT_WEIGHTS = {"input": (1.0, None), "param": (0.001, None), "both": (1.0, 0.001)}
TORCHVISION: dict[str, tuple[str, type[CIFAR10], int]] = {  # name, class, number of classes
    "cifar10": ("CIFAR-10", CIFAR10, 10),
    "cifar100": ("CIFAR-100", CIFAR100, 100),
}


@dataclass(kw_only=True)
class CifarSettings(Settings):
    """Train an MLP on CIFAR-10, CIFAR-100 or any tree of images under a gradient penalty, and watch the inequality.

    Attributes:
        dataset: cifar10; cifar100; folder (the images of DATA_DIR/{train,test}/<class>/*); synthetic (shapes drawn by
            formulas); auto takes CIFAR-10, or the synthetic shapes where CIFAR-10 is not to be had.
        dataset_name: what tables and figures call a folder. Default: the folder's name.
        image_side: scale the images of a folder to so many pixels each way. Default: they have one size already.
    """

    dataset: Literal["auto", "cifar10", "cifar100", "folder", "synthetic"] = "auto"
    dataset_name: str | None = None
    image_side: int | None = None

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        super().__post_init__()
        if self.dataset != "folder" and (self.dataset_name or self.image_side):
            raise UserError(f"--dataset-name and --image-side go with --dataset folder, got --dataset {self.dataset}")
        if self.image_side is not None and self.image_side < 1:
            raise UserError(f"--image-side must be >= 1, got {self.image_side}")


def main(settings: CifarSettings) -> Summary:
    """One run; returns what summary.json holds."""
    return run(with_default_weights(settings, DEFAULT_WEIGHTS), load(settings))


def load(settings: CifarSettings) -> Images:
    """The data set that the settings name; for "auto" CIFAR-10, or the synthetic shapes where it is not to be had.

    Raises:
        UserError: for a data set without files and network, or a folder that is no tree of images.
    """
    data_dir = Path(settings.data_dir)
    if settings.dataset == "synthetic":
        return load_synthetic()
    if settings.dataset == "folder":
        return load_folder(data_dir, settings.dataset_name or data_dir.resolve().name, settings.image_side)
    key = "cifar10" if settings.dataset == "auto" else settings.dataset
    name, kind, _ = TORCHVISION[key]
    place = data_dir / kind.base_folder
    return load_or_embedded(
        settings.dataset, name, place, partial(load_torchvision, key, data_dir), load_synthetic, "--dataset synthetic"
    )


def load_torchvision(key: str, data_dir: Path) -> Images:
    """CIFAR-10 or CIFAR-100, normalised channel by channel, downloaded if it is not in `data_dir`.

    Raises:
        OSError: if it is neither there nor to be downloaded.
    """
    name, kind, num_classes = TORCHVISION[key]
    train, test = (
        Labelled(torch.from_numpy(part.data).permute(0, 3, 1, 2).float().div(255), torch.tensor(part.targets))
        for part in train_and_test(kind, data_dir, [kind.url])
    )
    return Images(key, name, num_classes, *normalised(train, test))


if __name__ == "__main__":
    run_recipe(main, CifarSettings)
