"""Train an MLP on MNIST under a gradient penalty, and watch the inequality while it trains.

    python recipes/mnist.py --penalty param
    python recipes/mnist.py --penalty both --weight 3 --param-weight 0.001 --hidden 256,256 --activation gelu
    python recipes/mnist.py --penalty input --train-size 1000 --val-size 5000 --epochs 100
    python recipes/mnist.py --config runs/mnist-param-s0/hparams.yaml --seed 1 --out runs/again

`python recipes/mnist.py --help` lists every flag; README.md beside this file has measured results.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Literal
from urllib.request import urlopen

import torch
from flags import Settings, UserError, run_recipe, with_default_weights
from images import Images, Labelled
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from results import Summary
from sklearn import datasets
from torchvision.datasets import MNIST
from training import mlp, penalised_loss, train

# Chosen on the last 10,000 training images: see README.md.
DEFAULT_WEIGHTS = {"input": (10.0, None), "param": (0.003, None), "both": (10.0, 0.003)}
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
NETWORK_SECONDS = 5.0


@dataclass(kw_only=True)
class MnistSettings(Settings):
    """Train an MLP on MNIST under a gradient penalty, and watch the inequality while it trains.

    Attributes:
        dataset: mnist; digits (scikit-learn's, 8×8); auto takes MNIST, or the digits where MNIST is not to be had.
    """

    dataset: Literal["auto", "mnist", "digits"] = "auto"


def main(settings: MnistSettings) -> Summary:
    """One run; returns what summary.json holds."""
    settings = with_default_weights(settings, DEFAULT_WEIGHTS)
    images = load(settings.dataset, Path(settings.data_dir))
    settings = replace(settings, dataset=images.key)
    images = images.split(settings.train_size, settings.val_size, settings.seed)
    seed_everything(settings.seed, verbose=False)
    model = mlp(settings, num_features=images.train.x[0].numel(), num_classes=images.num_classes)
    return train(settings, images, model, penalised_loss(settings))


def load(dataset: str, data_dir: Path) -> Images:
    """MNIST from disk or network; the embedded digits if asked for, or if "auto" finds neither.

    Raises:
        UserError: for "mnist" without files and network.
    """
    if dataset == "digits":
        return load_digits()
    try:
        return load_mnist(data_dir)
    except OSError as error:
        if dataset == "mnist":
            raise UserError(
                f"MNIST is not in {data_dir}/MNIST/raw, and downloading it failed ({error}): give --data-dir, or train on "
                "scikit-learn's digits with --dataset digits"
            ) from error
        digits = load_digits()
        rank_zero_warn(
            f"MNIST is not in {data_dir}/MNIST/raw, and downloading it failed ({error}). Using {digits.name} instead: "
            "everything below is about them, not about MNIST."
        )
        return digits


def load_mnist(data_dir: Path) -> Images:
    """MNIST with its usual normalisation, downloaded if it is not in `data_dir`.

    Raises:
        OSError: if it is neither there nor to be downloaded.
    """
    try:
        parts = [MNIST(data_dir, train=train) for train in (True, False)]
    except RuntimeError:  # torchvision's word for files that are not there
        download_mnist(data_dir)
        parts = [MNIST(data_dir, train=train) for train in (True, False)]
    train, test = (Labelled((part.data.float().div(255) - MNIST_MEAN).div(MNIST_STD), part.targets) for part in parts)
    return Images("mnist", "MNIST", 10, train, train.rows(slice(0)), test)


def download_mnist(data_dir: Path) -> None:
    """Fetch the four files, or fail within seconds.

    Raises:
        OSError: if no server answers, or the transfer breaks.
    """
    check_any_answers([mirror + MNIST.resources[0][0] for mirror in MNIST.mirrors], NETWORK_SECONDS)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(4 * NETWORK_SECONDS)  # urllib's own is: for ever
    try:
        MNIST(data_dir, download=True)
    except RuntimeError as error:
        raise OSError(str(error)) from error
    finally:
        socket.setdefaulttimeout(before)


def check_any_answers(urls: Sequence[str], seconds: float) -> None:
    """Ask every server, in threads since name resolution knows no time limit.

    Raises:
        OSError: if none sends anything in time.
    """
    answers: Queue[OSError | None] = Queue()

    def ask(url: str) -> None:
        try:
            with urlopen(url, timeout=seconds):
                answers.put(None)
        except OSError as error:
            answers.put(error)

    for url in urls:
        Thread(target=ask, args=(url,), daemon=True).start()
    deadline = time.monotonic() + seconds
    failures: list[OSError] = []
    while len(failures) < len(urls):
        try:
            failure = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            raise OSError(f"no server answered within {seconds:.0f} s") from None
        if failure is None:
            return
        failures.append(failure)
    raise failures[-1]


def load_digits() -> Images:
    """The digits embedded in scikit-learn; the last fifth is for testing: it was written by other people."""
    bunch = datasets.load_digits()
    x = torch.as_tensor(bunch.images, dtype=torch.float32).div(16)
    y = torch.as_tensor(bunch.target, dtype=torch.int64)
    first = slice(0, len(y) - len(y) // 5)
    train, test = Labelled(x, y).rows(first), Labelled(x, y).rows(slice(first.stop, None))
    mean, std = train.x.mean(), train.x.std()
    train, test = (Labelled((part.x - mean) / std, part.y) for part in (train, test))
    return Images("digits", "scikit-learn digits (8×8, 1,797 images)", 10, train, train.rows(slice(0)), test)


if __name__ == "__main__":
    run_recipe(main, MnistSettings)
