"""Largest singular values as brackets [lower, upper].

A norm that stands in a denominator must not be underestimated, and Krylov methods approach a singular value from below.
So every value comes with an upper end: exact (up to rounding) for the dense path, and for the Lanczos path one that
holds with stated probability over the random start.

The upper end. Let A = J Jᵀ (n × n), q a start uniform on the unit sphere, and p_0, p_1, … the orthonormal polynomials of the
Lanczos recurrence started at q:

    p_0 = 1,   β_{j+1} p_{j+1}(μ) = (μ − α_{j+1}) p_j(μ) − β_j p_{j−1}(μ).

An eigenvalue μ of A carries the weight ⟨q, v⟩² of q in its eigenvector v, at most the Christoffel number 1/K(μ), with
K(μ) = Σ_{j=0..k} p_j(μ)². For a uniform start the weight is Beta(1/2, (n−1)/2) distributed, so it is below
t = (δ B(1/2, (n−1)/2) / 2)² with probability at most δ. K increases beyond the largest Ritz value: the root of K(μ) = 1/t is
above the largest eigenvalue with probability 1 − δ, whatever the spectrum.

Source: van Dorsselaer, Hochstenbach and van der Vorst, "Computing probabilistic bounds for extreme eigenvalues of symmetric
matrices with the Lanczos method" (SIMAX 2000); Hochstenbach, "Probabilistic upper bounds for the matrix two-norm" (J. Sci.
Comput. 2013).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradpen._checks import NotFiniteError
from gradpen._numerics import divide_or_zero, widest_float
from gradpen.recurrence import Array, BracketSearch

MatVec = Callable[[Tensor], Tensor]


class Bracket(NamedTuple):
    """lower <= largest singular value <= upper, of any shape, float64 where the device has it."""

    lower: Tensor
    upper: Tensor

    @property
    def width(self) -> Tensor:
        """(upper − lower) / upper, 0 for 0."""
        return divide_or_zero(self.upper - self.lower, self.upper)


def dense_bracket(matrices: Tensor) -> Bracket:
    """Largest singular values of explicit matrices (…, m, n), both ends equal up to rounding: (…)."""
    slack = torch.finfo(matrices.dtype).eps * sum(matrices.shape[-2:])
    scale = widest_float(matrices.abs().amax((-2, -1), keepdim=True))  # so that squares stay in range
    rows = divide_or_zero(widest_float(matrices), scale)
    rows = rows if rows.shape[-2] <= rows.shape[-1] else rows.mT
    largest = torch.linalg.eigvalsh(rows @ rows.mT)[..., -1].clamp(min=0).sqrt() * scale[..., 0, 0]
    return Bracket(largest, largest * (1 + slack))


def exact_bracket(values: Tensor) -> Bracket:
    """A bracket of values that are known."""
    values = widest_float(values)
    return Bracket(values, values)


def lanczos_bracket(
    gram: MatVec,
    start: Tensor,
    *,
    delta: float | Tensor,
    rtol: float = 0.05,
    max_steps: int = 96,
    restrict: Callable[[Tensor], MatVec] | None = None,
) -> Bracket:
    """Largest singular value of J_b for every b, from products with A_b = J_b J_bᵀ.

    The plain three-term recurrence: no basis is kept, and copies of converged Ritz values do no harm to the largest one.
    The host looks at the device for the dimension of the start and the size of the first product, and now and then for the
    coefficients, which alone tell which samples are narrow enough; nothing else in the iteration waits.

    Args:
        gram: (B, n) → (B, n), row b multiplied by A_b. Rows are 0 wherever the start is and the products are, too.
        start: (B, n), standard normal entries; a row may be 0 where A_b is known to be (dead units): the number of its
            non-zero entries takes the place of n.
        delta: each upper end fails with probability at most this; one number or (B,).
        rtol: a sample is done when its bracket is no wider than this fraction of its upper end.
        max_steps: stop after so many products.
        restrict: indices of samples, on the CPU → `gram` for these alone. If given, samples that are done leave the batch.

    Returns:
        Bracket of shape (B,).
    """
    size = len(start)
    dimension = (start != 0).sum(1).cpu()
    log_weight = _log_smallest_weight(dimension, delta)
    max_steps = min(max_steps, max(int(dimension.max()), 1))
    eps, may_leave = torch.finfo(start.dtype).eps, restrict is not None
    search = BracketSearch(dimension.numpy(), log_weight, rtol, max_steps, eps, may_leave=may_leave)
    length = torch.linalg.vector_norm(start, dim=1, keepdim=True)
    q = start * divide_or_zero(torch.ones_like(length), length)
    before, beta, largest = torch.zeros_like(q), q.new_zeros(size), q.new_zeros(size)
    product = gram(q)
    factors = within = _factors_to_unit(gram, q, product, length > 0)
    if factors is not None:
        product = factors.times(gram, q)
    new: list[Tensor] = []  # α and β of the steps since the last look
    for step in range(1, max_steps + 1):
        if step > 1:
            product = gram(q) if within is None else within.times(gram, q)
        w, alpha, beta, largest = _lanczos_step(product, q, before, beta, largest)
        new += [alpha, beta]
        before, q = q, w
        if step < search.next_look:
            continue
        going_on = search.look(torch.stack(new).view(-1, 2, len(q)).cpu().numpy())
        new.clear()
        if search.is_over:
            break
        if restrict is not None and not going_on.all():
            kept = torch.from_numpy(np.flatnonzero(going_on)).to(q.device, non_blocking=True)
            q, before, beta, largest = (tensor.index_select(0, kept) for tensor in (q, before, beta, largest))
            gram = restrict(torch.from_numpy(search.present))
            within = None if within is None else _Factors(within.before[kept], within.after[kept])
    like = widest_float(start[:0])
    ends = [torch.from_numpy(end).to(like.dtype) for end in search.ends()]
    bracket = Bracket(*[end.to(like.device, non_blocking=True) for end in ends])
    if factors is None:
        return bracket
    root = factors.root()
    return Bracket(bracket.lower / root, bracket.upper / root)


def normal_start(shape: tuple[int, int], support: Tensor | None, like: Tensor, seed: int) -> Tensor:
    """Standard normal rows from a generator of their own, 0 outside `support`: (B, n)."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    start = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
    return start if support is None else start * support


class _Factors(NamedTuple):
    """Powers of two, (B, 1) each, that keep products with A_b within the range of their type."""

    before: Tensor  # what a vector is multiplied by
    after: Tensor  # what the product is

    def times(self, gram: MatVec, q: Tensor) -> Tensor:
        """A_b q, times both factors."""
        return gram(q * self.before) * self.after

    def root(self) -> Tensor:
        """What the singular values are multiplied by: (B,)."""
        return widest_float(self.before.squeeze(1)).sqrt() * widest_float(self.after.squeeze(1)).sqrt()


def _factors_to_unit(gram: MatVec, q: Tensor, product: Tensor, is_unit: Tensor) -> _Factors | None:
    """Factors to about 1 for rows of products A_b q whose squares would under- or overflow; None if there are none.

    Rows of q have length 1 if `is_unit`, (B, 1), or else 0.

    A small row has perhaps underflowed itself, to 0 or to a few digits, though J_b has not: it is seen from a longer q.

    Raises:
        NotFiniteError: if the products themselves overflow.
    """
    largest, info = product.abs().amax(1, keepdim=True), torch.finfo(product.dtype)
    low, high = info.tiny**0.25, info.max**0.25
    if bool((torch.where(is_unit, largest, 1.0).amin() >= low) & (largest.amax() <= high)):
        return None
    small = (largest < low) & is_unit
    far = small | ~(largest <= high)
    # σ^(−3/2) for A q of size σ²: between J and Jᵀ the vectors are as far above 1 as they are below it afterwards
    exponents = (-0.75 * largest.log2()).round().clamp(max=math.floor(0.875 * math.log2(info.max)))
    before = torch.where(small, torch.exp2(exponents), 1.0)
    largest = gram(q * before).abs().amax(1, keepdim=True)
    if not bool(largest.isfinite().all()):
        wider = "" if product.dtype == torch.float64 else "evaluate a copy of the model in float64, or "
        raise NotFiniteError(
            f"expected products with Jacobians and weights within the range of {product.dtype}, which some exceed: {wider}"
            "see whether the training has diverged"
        )
    exponents = -largest.log2().round().clamp(min=2 - math.log2(info.max))  # of subnormal numbers it would be too large
    return _Factors(before, torch.where(far, torch.exp2(exponents), 1.0))


def _lanczos_step(
    product: Tensor, q: Tensor, before: Tensor, beta: Tensor, size: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next vector, from A q, then α, β, and the size of the operator as seen so far."""
    alpha = torch.linalg.vecdot(q, product)
    w = torch.addcmul(product, q, alpha.unsqueeze(1), value=-1).addcmul_(before, beta.unsqueeze(1), value=-1)
    beta = torch.linalg.vector_norm(w, dim=1)
    size = torch.maximum(size, alpha.abs() + beta)
    exhausted = beta <= 4 * torch.finfo(q.dtype).eps * size  # what is left is rounding, and the next vector 0
    w = w.div_(beta.masked_fill(exhausted, torch.inf).unsqueeze(1))
    return w, alpha, beta.masked_fill(exhausted, 0.0), size


def _log_smallest_weight(dimension: Tensor, delta: float | Tensor) -> Array:
    """log t with P(⟨q, v⟩² <= t) <= δ for q uniform on the sphere in n dimensions: t = (δ B(1/2, (n−1)/2) / 2)²."""
    log_beta = np.fromiter(map(_log_beta, dimension.tolist()), np.float64, len(dimension))
    deltas = delta.cpu().double().numpy() if isinstance(delta, Tensor) else delta
    log_weight = 2 * (np.log(deltas / 2) + log_beta)
    return np.where(dimension.numpy() > 1, log_weight, 0.0)  # in one dimension the weight is 1


@functools.cache
def _log_beta(dimension: int) -> float:
    """log B(1/2, (n−1)/2)."""
    half = max(dimension - 1, 1) / 2
    return math.lgamma(0.5) + math.lgamma(half) - math.lgamma(half + 0.5)
