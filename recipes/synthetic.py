"""Ten classes of small colour images, drawn by formulas: for machines without data and network.

A class is a shape (disc, square, triangle, cross, ring) with a texture (stripes or checks). Place, size, rotation,
colours, the texture's scale and the noise are random and say nothing about the class, so a network that remembers its
training images does worse on new ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from images import Images, Labelled, normalised

SIDE = 32
SHAPES = ("disc", "square", "triangle", "cross", "ring")
TEXTURES = ("stripes", "checks")
TRAIN, TEST = 8_000, 2_000
NOISE = 0.08
CHUNK = 1_000  # images drawn at once


def load_synthetic(seed: int = 0) -> Images:
    """The set, the same for everyone."""
    generator = torch.Generator().manual_seed(seed)
    chunks = [draw(CHUNK, generator) for _ in range((TRAIN + TEST) // CHUNK)]
    x, y = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    whole = Labelled(x, y)
    parts = normalised(whole.rows(slice(TRAIN)), whole.rows(slice(TRAIN, None)))
    return Images(
        "synthetic", f"synthetic shapes (32×32, {TRAIN + TEST:,} images)", len(SHAPES) * len(TEXTURES), *parts
    )


def draw(count: int, generator: torch.Generator) -> Labelled:
    """Images (count, 3, 32, 32) with values in about [0, 1], and their classes."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    y = torch.randint(len(SHAPES) * len(TEXTURES), (count,), generator=generator)
    radius = uniform(9, 13, 1, 1)
    centre = uniform(-3, 3, 2)
    across, down = _turned(centre, uniform(-0.5, 0.5))
    shape = torch.stack([f(across / radius, down / radius) for f in DISTANCES])[y % len(SHAPES), torch.arange(count)]
    texture = _textures(count, uniform(-0.4, 0.4), uniform(0.8, 1.2, 1, 1), uniform(0, 2 * math.pi, 2))
    pattern = texture[y // len(SHAPES), torch.arange(count)]
    inside = torch.sigmoid(-6 * shape * radius / 4).unsqueeze(1)  # soft edges
    light, dark = uniform(0.5, 1, 3, 1, 1), uniform(0.2, 0.7, 3, 1, 1)
    ground = uniform(0, 0.6, 3, 1, 1)
    figure = torch.lerp(dark, light, pattern.unsqueeze(1))
    slope = uniform(-0.2, 0.2, 3, 1, 1) * _grid()[0] / SIDE
    image = torch.lerp(ground + slope, figure, inside)
    image += NOISE * torch.randn(image.shape, generator=generator)
    return Labelled(image, y)


def _disc(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.85


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.75


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(-v, (math.sqrt(3) * u.abs() + v) / 2) - 0.55


def _cross(u: Tensor, v: Tensor) -> Tensor:
    longer, shorter = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    return torch.maximum(longer - 1.0, shorter - 0.33)


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.75).abs() - 0.25


DISTANCES = (_disc, _square, _triangle, _cross, _ring)  # in the order of SHAPES: negative inside


def _grid() -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels, 0 in the middle: (32, 32) each."""
    line = torch.arange(SIDE) - (SIDE - 1) / 2
    down, across = torch.meshgrid(line, line, indexing="ij")
    return across, down


def _turned(centre: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels' coordinates from `centre` (N, 2), turned by `angle` (N,): (N, 32, 32) each."""
    across, down = (line - place.reshape(-1, 1, 1) for line, place in zip(_grid(), centre.unbind(1), strict=True))
    cos, sin = angle.cos().reshape(-1, 1, 1), angle.sin().reshape(-1, 1, 1)
    return cos * across + sin * down, cos * down - sin * across


def _textures(count: int, angle: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    """Stripes and checks of one direction and scale, values in [0, 1]: (2, N, 32, 32)."""
    across, down = _turned(torch.zeros(count, 2), angle)
    first = torch.sin(frequency * across + phase[:, :1, None])
    second = torch.sin(frequency * down + phase[:, 1:, None])
    return torch.stack([first, (first * second).sign() * (first * second).abs().sqrt()]).mul(1.5).tanh().add(1).div(2)
