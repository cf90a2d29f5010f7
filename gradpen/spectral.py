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

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradpen._checks import NotFiniteError
from gradpen._numerics import divide_or_zero, widest_float

MatVec = Callable[[Tensor], Tensor]
Array = np.ndarray[Any, Any]


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
    The host looks at the device for the dimension of the start and the size of the first product, and after 10, 12, …, 24,
    27, 30, 33, 37, … steps for which samples are narrow enough, by the coefficients alone, which it keeps; nothing else in
    the iteration waits. A sample's bracket is that of the first look at which it was narrow enough, so but for rounding it
    does not depend on the samples beside it.

    Args:
        gram: (B, n) → (B, n), row b multiplied by A_b. Rows are 0 wherever the start is and the products are, too.
        start: (B, n), standard normal entries; a row may be 0 where A_b is known to be (dead units): the number of its
            non-zero entries takes the place of n.
        delta: each upper end fails with probability at most this; one number or (B,).
        rtol: a sample is done when its bracket is no wider than this fraction of its upper end.
        max_steps: stop after so many products.
        restrict: indices of samples → `gram` for these alone. If given, samples that are done leave the batch.

    Returns:
        Bracket of shape (B,).
    """
    size = len(start)
    dimension = (start != 0).sum(1).cpu()
    log_weight = _log_smallest_weight(dimension, delta)
    max_steps = min(max_steps, max(int(dimension.max()), 1))
    steps = dimension.clamp(1, max_steps).numpy()  # what lies behind them is rounding
    coefficients = np.zeros((2, max_steps, size))  # α and β
    lowest = np.zeros(size)  # what the largest Ritz value is known to reach
    present = np.arange(size)  # the samples that have not left
    eps = torch.finfo(start.dtype).eps
    q = divide_or_zero(start, torch.linalg.vector_norm(start, dim=1, keepdim=True))
    before, beta, largest = torch.zeros_like(q), q.new_zeros(size), q.new_zeros(size)
    product = gram(q)
    factors = within = _factors_to_unit(gram, q, product)
    if factors is not None:
        product = factors.times(gram, q)
    new: list[Tensor] = []  # α and β of the steps since the last look
    next_look = min(_FIRST_LOOK, max_steps)
    for step in range(1, max_steps + 1):
        if step > 1:
            product = gram(q) if within is None else within.times(gram, q)
        w, alpha, beta, largest = _lanczos_step(product, q, before, beta, largest)
        new += [alpha, beta]
        before, q = q, w
        if step < next_look:
            continue
        taken = torch.stack(new).view(-1, 2, len(q)).cpu().numpy()
        coefficients[:, step - len(taken) : step, present] = taken.swapaxes(0, 1)
        new.clear()
        if step == max_steps:
            break
        recurrence = _Recurrence.of(coefficients[:, :step, present], eps)
        low, _ = recurrence.ritz_between(lowest[present], rtol)
        is_narrow = recurrence.is_narrow(low, log_weight[present], rtol)
        before_now = steps[present] < step  # finished at a look before this one, whose values stay
        lowest[present] = np.where(before_now, lowest[present], low * recurrence.scale)
        steps[present] = np.where(is_narrow & ~before_now, step, steps[present])
        finished = is_narrow | before_now
        if finished.all():
            break
        if restrict is not None and finished.sum() >= _WORTH_LEAVING * len(present):
            kept = torch.from_numpy(np.flatnonzero(~finished)).to(q.device)
            present = present[~finished]
            q, before, beta, largest = (tensor[kept] for tensor in (q, before, beta, largest))
            gram = restrict(torch.from_numpy(present).to(q.device))
            within = None if within is None else _Factors(within.before[kept], within.after[kept])
        next_look = min(step + max(step // _LOOKS, 2), max_steps)
    recurrence = _Recurrence.of(coefficients[:, :step], eps, steps)
    ends = _ends_of_recurrence(recurrence, lowest, log_weight, rtol)
    like = widest_float(start[:0])
    bracket = Bracket(*[torch.from_numpy(end).to(like) for end in ends])
    if factors is None:
        return bracket
    root = factors.root()
    return Bracket(bracket.lower / root, bracket.upper / root)


_FIRST_LOOK = 10
_LOOKS = 8  # the part of all steps so far that are taken until the next one
_WORTH_LEAVING = 1 / 8  # a smaller part of the batch is not worth the copies


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


def _factors_to_unit(gram: MatVec, q: Tensor, product: Tensor) -> _Factors | None:
    """Factors to about 1 for rows of products A_b q whose squares would under- or overflow; None if there are none.

    A small row has perhaps underflowed itself, to 0 or to a few digits, though J_b has not: it is seen from a longer q.

    Raises:
        NotFiniteError: if the products themselves overflow.
    """
    largest, info = product.abs().amax(1, keepdim=True), torch.finfo(product.dtype)
    low, high = info.tiny**0.25, info.max**0.25
    small = (largest < low) & (q != 0).any(1, keepdim=True)
    far = small | ~(largest <= high)
    if not bool(far.any()):
        return None
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


# In eps: rounding makes up a good part of a shorter vector, so that it is not orthogonal to those before it, and the largest
# Ritz value may exceed the eigenvalue by as much as the vector is long
_ROUNDING = 512


def _log_smallest_weight(dimension: Tensor, delta: float | Tensor) -> Array:
    """log t with P(⟨q, v⟩² <= t) <= δ for q uniform on the sphere in n dimensions: t = (δ B(1/2, (n−1)/2) / 2)²."""
    half = (dimension.double() - 1).clamp(min=1) / 2
    log_beta = math.lgamma(0.5) + torch.lgamma(half) - torch.lgamma(half + 0.5)
    log_weight = 2 * (torch.as_tensor(delta / 2, dtype=torch.float64).cpu().log() + log_beta)
    return torch.where(dimension > 1, log_weight, 0.0).numpy()  # in one dimension the weight is 1


class _Recurrence(NamedTuple):
    """The coefficients of every sample on the host, divided by a bound of its largest Ritz value; float64 arrays.

    Those behind `counts` do not count.
    """

    alphas: Array  # (k, B)
    betas: Array  # (k, B)
    counts: Array | None  # (k, B) bool; None if all do
    scale: Array  # (B,): Gershgorin's bound
    eps: float  # of the type that they were computed in
    slack: Array  # (B,) or 0-dim: allowance for rounding, relative to an eigenvalue
    lower_slack: Array  # (B,): the same for the lower end

    @classmethod
    def of(cls, coefficients: Array, eps: float, steps: Array | None = None) -> _Recurrence:
        """From α and β, (2, k, B), and the number (B,) of those that count, None if all do."""
        alphas, betas = coefficients
        sizes = np.abs(alphas) + betas
        sizes[1:] += betas[:-1]
        scale = sizes.max(0)
        inverse = 1 / np.where(scale > 0, scale, np.inf)
        counts = None if steps is None else np.arange(len(alphas))[:, None] < steps
        number = np.float64(len(alphas)) if steps is None else steps.astype(np.float64)
        slack = eps * np.maximum(8 * np.sqrt(number), number)
        alphas, betas = alphas * inverse, betas * inverse
        short = betas < _ROUNDING * eps
        if counts is not None:
            short &= counts
        lower_slack = slack + (betas * short).max(0)
        return cls(alphas, np.maximum(betas, eps), counts, scale, eps, slack, lower_slack)

    def pivots(self, mu: Array) -> Array:
        """d_j = β_j p_j(μ)/p_{j−1}(μ) at (points, B), 1 where j does not count: (k, points, B).

        d_1 = μ − α_1 and d_j = μ − α_j − β²_{j−1}/d_{j−1}. They do not overflow, as p_j may.
        """
        pivots = mu - self.alphas[:, None]
        sq_betas = self.betas**2
        quotient = np.empty_like(mu)
        with np.errstate(divide="ignore", invalid="ignore"):
            for before, pivot, sq_beta in zip(pivots, pivots[1:], sq_betas, strict=False):
                np.divide(sq_beta, before, out=quotient)
                np.subtract(pivot, quotient, out=pivot)
        return pivots if self.counts is None else np.where(self.counts[:, None], pivots, 1.0)

    def is_beyond(self, mu: Array) -> Array:
        """Whether μ at (points, B) exceeds the largest Ritz value: every p_j is positive there, and only there."""
        return np.all(self.pivots(mu) > 0, axis=0)

    def ritz_between(self, lowest: Array, rtol: float) -> tuple[Array, Array]:
        """Ends of an interval that holds the largest Ritz value θ: (B,), (B,), divided by `scale`.

        Args:
            lowest: what θ is known to reach, not divided, 0 if nothing is known. A few points beyond it are tried, as θ
                hardly moves from one look to the next.
            rtol: of the bracket: a small part of it is what the interval's ends differ by as a rule.
        """
        diagonal = self.alphas if self.counts is None else np.where(self.counts, self.alphas, 0.0)  # no entry exceeds θ
        low = np.maximum(self.divided(lowest), diagonal.max(0).clip(min=0))
        return self._around_ritz(np.stack([low, *[low * (1 + rtol * share) for share in _SHARES], np.ones_like(low)]))

    def divided(self, values: Array) -> Array:
        """Values divided by `scale`, 0 where that is 0."""
        return values / np.where(self.scale > 0, self.scale, np.inf)

    def ritz(self, low: Array, high: Array) -> Array:
        """The largest Ritz value θ, from below and down to the rounding of the coefficients: (B,), divided by `scale`.

        Args:
            low: ends of an interval that holds it, (B,), divided by `scale`.
            high: the other ends.
        """
        fractions = np.linspace(0, 1, 5)[:, None]
        widest = max(float((high - low).max(initial=0.0)), self.eps)
        for _ in range(math.ceil(math.log(widest / self.eps, 4))):  # every round divides the interval by 4
            low, high = self._around_ritz(low + (high - low) * fractions)
        return low

    def _around_ritz(self, points: Array) -> tuple[Array, Array]:
        """Between which two of some rising points θ lies, if it does between the first and the last: (B,), (B,)."""
        below = np.logical_not(self.is_beyond(points[1:-1])).sum(0, keepdims=True)
        return np.take_along_axis(points, below, 0)[0], np.take_along_axis(points, below + 1, 0)[0]

    def is_narrow(self, low: Array, log_weight: Array, rtol: float) -> Array:
        """Whether the bracket is no wider than `rtol` if θ reaches `low`, divided by `scale`: (B,) bool."""
        target = low * (1 - self.lower_slack) / (1 + self.slack) / (1 - min(rtol, 0.99)) ** 2
        return (self.log_christoffel(target[None])[0] >= -log_weight) | (self.scale == 0)

    def log_christoffel(self, mu: Array) -> Array:
        """log K(μ) at (points, B), −∞ up to the largest Ritz value."""
        pivots = self.pivots(mu)
        beyond = np.all(pivots > 0, axis=0)
        log_squares = 2 * np.cumsum(np.log(np.where(beyond, pivots, 1.0) / self.betas[:, None]), axis=0)
        if self.counts is not None:
            log_squares = np.where(self.counts[:, None], log_squares, -np.inf)
        largest = log_squares.max(0).clip(min=0)  # p_0 = 1
        log_k = largest + np.log(np.exp(-largest) + np.exp(log_squares - largest).sum(0))
        return np.where(beyond, log_k, -np.inf)


_SHARES = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 16.0)


def _ends_of_recurrence(recurrence: _Recurrence, lowest: Array, log_weight: Array, rtol: float) -> tuple[Array, Array]:
    """From the coefficients to the bracket of the largest singular value, √ of that of the eigenvalue: (B,), (B,)."""
    ritz = recurrence.ritz(*recurrence.ritz_between(lowest, rtol))
    upper = ritz * (1 + np.exp(_christoffel_root(recurrence, ritz, log_weight)))
    lower, upper = ritz * (1 - recurrence.lower_slack), upper * (1 + recurrence.slack)
    return np.sqrt(lower * recurrence.scale), np.sqrt(upper * recurrence.scale)


def _christoffel_root(recurrence: _Recurrence, ritz: Array, log_weight: Array) -> Array:
    """log((μ − θ)/θ) where K(μ) = 1/t, or just beyond: Newton steps kept between points that are known to lie on its sides.

    Two points a hundredth of the bracket's width apart are tried at a time: their difference is the slope, and in the end
    the root lies between them. A sample whose root is found rests, so that it does not depend on the samples beside it.
    """
    low = np.full_like(ritz, math.log(recurrence.eps) - 2)
    # there p_1 = (μ − α_1)/β_1 alone makes K large enough
    first = recurrence.betas[0] / np.where(ritz > 0, ritz, np.inf)
    high = 2 - log_weight / 2 + np.log(first.clip(min=1))
    pair = np.array([[0.0], [_ROOT_TOLERANCE]])
    point = np.full_like(ritz, -2.0)
    for _ in range(_ROOT_STEPS):  # seldom more than four
        points = point + pair
        excess = recurrence.log_christoffel(ritz * (1 + np.exp(points))) + log_weight
        searching = high - low > 2 * _ROOT_TOLERANCE
        low = np.maximum(low, np.where(searching & (excess < 0), points, -np.inf).max(0))
        high = np.minimum(high, np.where(searching & (excess >= 0), points, np.inf).min(0))
        if np.all(high - low <= 2 * _ROOT_TOLERANCE):
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            newton = point - excess[0] * _ROOT_TOLERANCE / (excess[1] - excess[0]) - _ROOT_TOLERANCE / 2
        point = np.where((newton > low - _ROOT_TOLERANCE) & (newton < high), newton, (low + high) / 2)
    return high


_ROOT_TOLERANCE = 2e-2
_ROOT_STEPS = 40
