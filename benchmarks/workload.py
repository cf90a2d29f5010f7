"""What is timed: a ReLU MLP, a batch of images, and the multiplications that a step cannot do without."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.datasets import MNIST


class ImageSet(NamedTuple):
    """Training images, flattened to 784 features, and where they come from."""

    name: str
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Workload:
    """A model, a batch, and nothing that changes between two steps.

    Attributes:
        model: nn.Sequential of Linear and ReLU.
        x: (B, features).
        y: (B,) classes.
    """

    model: nn.Sequential
    x: Tensor
    y: Tensor

    def copied(self) -> Workload:
        """The same batch with a model of its own, so that contenders do not share gradients or hooks."""
        return replace(self, model=copy.deepcopy(self.model))

    def in_float64(self) -> Workload:
        """The same in double precision: the reference that everything is compared with."""
        return replace(self, model=copy.deepcopy(self.model).double(), x=self.x.double())

    @property
    def linears(self) -> list[nn.Linear]:
        """The dense layers, from input to output."""
        return [layer for layer in self.model if isinstance(layer, nn.Linear)]


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def load_images(data_dir: Path) -> ImageSet:
    """MNIST if it lies in `data_dir`, else scikit-learn's digits enlarged to its size; nothing is downloaded."""
    try:
        mnist = MNIST(data_dir, train=True, download=False)
    except RuntimeError:
        digits = load_digits()
        small = torch.as_tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)
        x = F.interpolate(small, size=(28, 28), mode="bilinear")
        name, y = "scikit-learn digits, enlarged to 28×28", torch.as_tensor(digits.target, dtype=torch.int64)
    else:
        name, x, y = "MNIST", mnist.data.float().div(255), mnist.targets
    return ImageSet(name, ((x - x.mean()) / x.std()).flatten(1), y)


def workload_on(images: ImageSet, hidden: Sequence[int], batch_size: int) -> Workload:
    """An untrained MLP 784-hidden-10 on the first images."""
    torch.manual_seed(0)
    return Workload(mlp([784, *hidden, 10]), images.x[:batch_size], images.y[:batch_size])


def synthetic_workload(widths: Sequence[int], batch_size: int) -> Workload:
    """Random images for widths and batches that no data set has."""
    torch.manual_seed(0)
    return Workload(mlp(widths), torch.randn(batch_size, widths[0]), torch.randint(widths[-1], (batch_size,)))


def trained(workload: Workload, images: ImageSet, batch_size: int = 128) -> Workload:
    """The same after one epoch of Adam on all images."""
    workload = workload.copied()
    optimizer = torch.optim.Adam(workload.model.parameters(), lr=1e-3)
    order = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(0))
    for index in order.split(batch_size):
        optimizer.zero_grad()
        F.cross_entropy(workload.model(images.x[index]), images.y[index]).backward()
        optimizer.step()
    return workload


def floors(widths: Sequence[int], batch_size: int) -> dict[str, float]:
    """Multiplications of each kind of step in units of a plain one (docs/mathematics.md, "What the penalties cost")."""
    layers = list(pairwise(widths))
    products = [fan_in * fan_out for fan_in, fan_out in layers]
    whole, first = sum(products), products[0]
    plain = 3 * whole - first
    between_samples = [batch_size * (fan_in + fan_out) for fan_in, fan_out in layers]
    batch_norm = [
        min(3 * product, 2 * between) for product, between in zip(products[1:], between_samples[1:], strict=True)
    ]
    steps = {
        "input": 6 * whole - first,
        "param": 6 * whole - 4 * first,
        "both": 6 * whole - first,
        "batch": 6 * whole - 4 * first + min(2 * first, between_samples[0]) + sum(batch_norm),
        "difference": 2 * plain - 2 * first + min(2 * first, between_samples[0]),
        "norms": 2 * whole - first,
        "norms_and_step": plain,
        "projection": 6 * whole - first,
    }
    return {name: multiplications / plain for name, multiplications in steps.items()} | {
        "lazy": (steps["input"] + 3 * plain) / (4 * plain)
    }
