"""Train an MLP on MNIST under a gradient penalty, and watch the inequality while it trains.

    python recipes/mnist.py --penalty param
    python recipes/mnist.py --penalty both --weight 3 --param-weight 0.001 --hidden 256,256 --activation gelu
    python recipes/mnist.py --penalty input --train-size 1000 --val-size 5000 --epochs 100
    python recipes/mnist.py --config runs/mnist-param-s0/hparams.yaml --seed 1 --out runs/again

`python recipes/mnist.py --help` lists every flag; README.md beside this file has measured results.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from sklearn import datasets
from torchvision.datasets import KMNIST, MNIST, FashionMNIST

from downloads import load_or_embedded, train_and_test
from flags import Settings, run_recipe, with_default_weights
from images import Images, Labelled, normalised
from results import Summary
from training import run

# Held-out accuracies of these and of other weights are in README.md.
DEFAULT_WEIGHTS = {"input": (10.0, None), "param": (0.003, None), "both": (10.0, 0.003)}
TORCHVISION: dict[str, tuple[str, type[MNIST], tuple[float, float]]] = {  # name, class, (mean, std) of its pixels
    "mnist": ("MNIST", MNIST, (0.1307, 0.3081)),
    "fashion": ("Fashion-MNIST", FashionMNIST, (0.2860, 0.3530)),
    "kmnist": ("KMNIST", KMNIST, (0.1918, 0.3483)),
}


@dataclass(kw_only=True)
class MnistSettings(Settings):
    """Train an MLP on MNIST under a gradient penalty, and watch the inequality while it trains.

    Attributes:
        dataset: mnist; fashion (Fashion-MNIST); kmnist; digits (scikit-learn's, 8×8); auto takes MNIST, or the digits where
            MNIST is not to be had.
    """

    dataset: Literal["auto", "mnist", "fashion", "kmnist", "digits"] = "auto"


def main(settings: MnistSettings) -> Summary:
    """One run; returns what summary.json holds."""
    return run(with_default_weights(settings, DEFAULT_WEIGHTS), load(settings))


def load(settings: MnistSettings) -> Images:
    """The data set that the settings name; for "auto" MNIST, or the embedded digits where it is not to be had.

    Raises:
        UserError: for a data set without files and network.
    """
    if settings.dataset == "digits":
        return load_digits()
    key = "mnist" if settings.dataset == "auto" else settings.dataset
    name, kind, _ = TORCHVISION[key]
    data_dir = Path(settings.data_dir)
    place = data_dir / kind.__name__ / "raw"
    return load_or_embedded(
        settings.dataset, name, place, partial(load_torchvision, key, data_dir), load_digits, "--dataset digits"
    )


def load_torchvision(key: str, data_dir: Path) -> Images:
    """MNIST or a set in its format, normalised, downloaded if it is not in `data_dir`.

    Raises:
        OSError: if it is neither there nor to be downloaded.
    """
    name, kind, (mean, std) = TORCHVISION[key]
    parts = train_and_test(kind, data_dir, [mirror + kind.resources[0][0] for mirror in kind.mirrors])
    train, test = (Labelled((part.data.float().div(255) - mean).div(std), part.targets) for part in parts)
    return Images(key, name, 10, train, train.rows(slice(0)), test)


def load_digits() -> Images:
    """The digits embedded in scikit-learn; the last fifth is for testing: it was written by other people."""
    bunch = datasets.load_digits()
    x = torch.as_tensor(bunch.images, dtype=torch.float32).div(16)
    y = torch.as_tensor(bunch.target, dtype=torch.int64)
    first = slice(0, len(y) - len(y) // 5)
    train, test = Labelled(x, y).rows(first), Labelled(x, y).rows(slice(first.stop, None))
    return Images("digits", "scikit-learn digits (8×8, 1,797 images)", 10, *normalised(train, test))


if __name__ == "__main__":
    run_recipe(main, MnistSettings)
