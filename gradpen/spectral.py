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

from gradpen._numerics import divide_or_zero, number_if_at_hand, widest_float

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
    The host looks at the device for the dimension of the start and the size of the first product, and after 10, 12, …, 18,
    21, 24, 28, 32, 37, … steps for which samples are narrow enough; nothing else in the iteration waits. A sample's bracket
    is that of the first look at which it was narrow enough, so but for rounding it does not depend on the samples beside it.

    Args:
        gram: (B, n) → (B, n), row b multiplied by A_b.
        start: (B, n), standard normal entries; a row may be 0 where A_b is known to be (dead units): the number of its
            non-zero entries takes the place of n.
        delta: each upper end fails with probability at most this; one number or (B,).
        rtol: a sample is done when its bracket is no wider than this fraction of its upper end.
        max_steps: stop after so many products.
        restrict: indices of samples → `gram` for these alone. If given, samples that are done leave the batch.

    Returns:
        Bracket of shape (B,).
    """
    dimension = (start != 0).sum(1)
    log_weight = _log_smallest_weight(dimension, delta)
    max_steps = min(max_steps, max(int(dimension.max()), 1))
    alphas, betas = start.new_zeros(2, max_steps, len(start))
    steps = dimension.clamp(1, max_steps)  # what lies behind them is rounding
    present: Tensor | slice = slice(None)  # the samples that have not left
    q = divide_or_zero(start, torch.linalg.vector_norm(start, dim=1, keepdim=True))
    before, beta, size = torch.zeros_like(q), q.new_zeros(len(q)), q.new_zeros(len(q))
    lowest = widest_float(torch.zeros_like(beta))  # what the largest Ritz value is known to reach
    next_look = _FIRST_LOOK
    product = gram(q)
    factors = unit = _factors_to_unit(product)
    for step in range(1, max_steps + 1):
        product = product if step == 1 else gram(q)
        w, alpha, beta, size = _lanczos_step(product if unit is None else product * unit, q, before, beta, size)
        alphas[step - 1, present], betas[step - 1, present] = alpha, beta
        before, q = q, w
        if step < next_look or step == max_steps:
            continue
        recurrence = _Recurrence.of(alphas[:step, present], betas[:step, present])
        low, _ = recurrence.ritz_between(lowest[present], rtol)
        is_narrow = recurrence.is_narrow(low, log_weight[present], rtol)
        before_now = steps[present] < step  # finished at a look before this one, whose values stay
        lowest[present] = torch.where(before_now, lowest[present], low)
        steps[present] = torch.where(is_narrow & ~before_now, step, steps[present])
        finished = is_narrow | before_now
        number = int(finished.sum())
        if number == len(q):
            break
        if restrict is not None and number >= _WORTH_LEAVING * len(q):
            kept = finished.logical_not().nonzero().squeeze(1)
            present = kept if isinstance(present, slice) else present[kept]
            q, before, beta, size = (tensor[kept] for tensor in (q, before, beta, size))
            gram, unit = restrict(present), None if unit is None else unit[kept]
        next_look = step + max(step // 6, 2)
    recurrence = _Recurrence.of(alphas[:step], betas[:step], steps)
    bracket = _bracket_of_recurrence(recurrence, recurrence.ritz_between(lowest, rtol), log_weight)
    if factors is None:
        return bracket
    root = widest_float(factors.squeeze(1)).sqrt()
    return Bracket(bracket.lower / root, bracket.upper / root)


_FIRST_LOOK = 10
_WORTH_LEAVING = 1 / 8  # a smaller part of the batch is not worth the copies


def normal_start(shape: tuple[int, int], support: Tensor | None, like: Tensor, seed: int) -> Tensor:
    """Standard normal rows from a generator of their own, 0 outside `support`: (B, n)."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    start = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
    return start if support is None else start * support


def _factors_to_unit(product: Tensor) -> Tensor | None:
    """Powers of two that bring rows whose squares would under- or overflow to about 1: (B, 1); None if there are none."""
    largest, info = product.abs().amax(1, keepdim=True), torch.finfo(product.dtype)
    far = (largest > 0) & ((largest < info.tiny**0.25) | (largest > info.max**0.25))
    if not bool(far.any()):
        return None
    exponents = -largest.log2().round().clamp(min=2 - math.log2(info.max))  # of subnormal numbers it would be too large
    return torch.where(far, torch.exp2(exponents), 1.0)


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


def _log_smallest_weight(dimension: Tensor, delta: float | Tensor) -> Tensor:
    """log t with P(⟨q, v⟩² <= t) <= δ for q uniform on the sphere in n dimensions: t = (δ B(1/2, (n−1)/2) / 2)²."""
    half = (widest_float(dimension) - 1).clamp(min=1) / 2
    log_beta = math.lgamma(0.5) + torch.lgamma(half) - torch.lgamma(half + 0.5)
    log_weight = 2 * (torch.as_tensor(delta / 2, dtype=half.dtype, device=half.device).log() + log_beta)
    return torch.where(dimension > 1, log_weight, 0.0)  # in one dimension the weight is 1


class _Recurrence(NamedTuple):
    """The coefficients of every sample, divided by a bound of its largest Ritz value; those behind `steps` do not count."""

    alphas: Tensor  # (k, 1, B)
    betas: Tensor  # (k, 1, B)
    counts: Tensor | None  # (k, 1, B) bool; None if all do
    scale: Tensor  # (B,): Gershgorin's bound
    eps: float
    slack: Tensor  # (B,) or 0-dim: allowance for rounding, relative to an eigenvalue
    lower_slack: Tensor  # (B,): the same for the lower end

    @classmethod
    def of(cls, alphas: Tensor, betas: Tensor, steps: Tensor | None = None) -> _Recurrence:
        """From the coefficients (k, B) and the number (B,) of those that count, None if all do."""
        eps = torch.finfo(alphas.dtype).eps
        alphas, betas = widest_float(alphas), widest_float(betas)
        sizes = alphas.abs() + betas
        sizes[1:] += betas[:-1]
        scale = sizes.amax(0)
        inverse = divide_or_zero(torch.ones_like(scale), scale)
        number = scale.new_full((), len(alphas)) if steps is None else widest_float(steps)
        counts = None
        if steps is not None:
            counts = (torch.arange(len(alphas), device=alphas.device).unsqueeze(1) < steps).unsqueeze(1)
        slack = eps * torch.maximum(8 * number.sqrt(), number)
        alphas, betas = (alphas * inverse).unsqueeze(1), (betas * inverse).unsqueeze(1)
        short = (betas < _ROUNDING * eps) if counts is None else (betas < _ROUNDING * eps) & counts
        lower_slack = slack + (betas * short).amax((0, 1))
        return cls(alphas, betas.clamp(min=eps), counts, scale, eps, slack, lower_slack)

    def _counted(self, rows: Tensor, otherwise: float) -> Tensor:
        """Rows for every coefficient, with another number where it does not count."""
        return rows if self.counts is None else torch.where(self.counts, rows, otherwise)

    def ratios(self, mu: Tensor) -> Tensor:
        """p_j(μ)/p_{j−1}(μ) at (points, B), 1 where j does not count: (k, points, B). They do not overflow, as p_j may."""
        ratios = mu - self.alphas
        if ratios.device.type == "cpu":
            _continue_fractions(ratios.numpy(), self.betas.numpy())
        else:
            _continue_fractions(ratios, self.betas)
        return self._counted(ratios, 1.0)

    def is_beyond(self, mu: Tensor) -> Tensor:
        """Whether μ at (points, B) exceeds the largest Ritz value: every p_j is positive there, and only there."""
        alphas = self._counted(self.alphas, -torch.inf)
        tensors = mu, alphas, self.betas**2
        if mu.device.type == "cpu":  # NumPy needs a fraction of torch's time for so little
            return torch.from_numpy(_least_pivot(np, *[tensor.numpy() for tensor in tensors]) > 0)
        return _least_pivot(torch, *tensors) > 0

    def ritz_between(self, lowest: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
        """Ends of an interval that holds the largest Ritz value θ, not divided by `scale`: (B,), (B,).

        Args:
            lowest: what θ is known to reach, 0 if nothing is known. A few points beyond it are tried, as θ hardly moves from
                one look to the next.
            rtol: of the bracket: a small part of it is what the interval's ends differ by as a rule.
        """
        diagonal = self._counted(self.alphas, 0.0).amax(0).squeeze(0).clamp(min=0)  # no entry exceeds θ
        low = torch.maximum(divide_or_zero(lowest, self.scale), diagonal)
        shares = low.new_tensor([1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 16.0]).unsqueeze(1)
        trials = torch.cat([low.unsqueeze(0), low * (1 + rtol * shares), torch.ones_like(low).unsqueeze(0)])
        low, high = self._around_ritz(trials)
        return low * self.scale, high * self.scale

    def ritz(self, low: Tensor, high: Tensor) -> Tensor:
        """The largest Ritz value θ, from below and down to the rounding of the coefficients: (B,).

        Args:
            low: ends of an interval that holds it, (B,), not divided by `scale`.
            high: the other ends.
        """
        low, high = divide_or_zero(low, self.scale), divide_or_zero(high, self.scale)
        widest = number_if_at_hand((high - low).amax())
        width = 1.0 if isinstance(widest, Tensor) else max(widest, self.eps)
        fractions = torch.linspace(0, 1, 5, dtype=low.dtype, device=low.device).unsqueeze(1)
        for _ in range(math.ceil(math.log(width / self.eps, 4))):  # every round divides the interval by 4
            low, high = self._around_ritz(low + (high - low) * fractions)
        return low

    def _around_ritz(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Between which two of some rising points θ lies, if it does between the first and the last: (B,), (B,)."""
        below = self.is_beyond(points[1:-1]).logical_not().sum(0, keepdim=True)
        return points.gather(0, below).squeeze(0), points.gather(0, below + 1).squeeze(0)

    def is_narrow(self, lowest: Tensor, log_weight: Tensor, rtol: float) -> Tensor:
        """Whether the bracket is no wider than `rtol` if θ reaches `lowest`, not divided by `scale`: (B,) bool."""
        target = (
            divide_or_zero(lowest, self.scale) * (1 - self.lower_slack) / (1 + self.slack) / (1 - min(rtol, 0.99)) ** 2
        )
        log_k = self.log_christoffel(target.unsqueeze(0)).squeeze(0)
        return (log_k >= -log_weight) | (self.scale == 0)

    def log_christoffel(self, mu: Tensor) -> Tensor:
        """log K(μ) at (points, B), −∞ up to the largest Ritz value."""
        ratios = self.ratios(mu)
        beyond = (ratios > 0).all(0)
        logs = torch.where(beyond, ratios, 1.0).log()
        log_squares = self._counted(2 * logs.cumsum(0), -torch.inf)
        log_k = torch.logaddexp(log_squares.logsumexp(0), torch.zeros_like(mu))
        return torch.where(beyond, log_k, -torch.inf)


def _least_pivot(library: Any, mu: Any, alphas: Any, sq_betas: Any) -> Any:
    """The least of d_1 = μ − α_1 and d_j = μ − α_j − β²_{j−1}/d_{j−1}, of the sign of p_j/p_{j−1}; arrays or tensors."""
    with np.errstate(divide="ignore", invalid="ignore"):
        pivot = least = mu - alphas[0]
        for alpha, sq_beta in zip(alphas[1:], sq_betas, strict=False):
            pivot = mu - alpha - sq_beta / pivot
            least = library.minimum(least, pivot)
    return least


def _continue_fractions(numerators: Any, betas: Any) -> None:
    """Write (s_1, s_2, …) over by r_1 = s_1/β_1 and r_j = (s_j − β_{j−1}/r_{j−1})/β_j; arrays or tensors."""
    with np.errstate(divide="ignore", invalid="ignore"):
        numerators[0] /= betas[0]
        for j in range(1, len(numerators)):
            numerators[j] -= betas[j - 1] / numerators[j - 1]
            numerators[j] /= betas[j]


def _bracket_of_recurrence(recurrence: _Recurrence, between: tuple[Tensor, Tensor], log_weight: Tensor) -> Bracket:
    """From the coefficients to the bracket of the largest singular value, √ of that of the eigenvalue: (B,)."""
    ritz = recurrence.ritz(*between)
    upper = ritz * (1 + _christoffel_root(recurrence, ritz, log_weight).exp())
    lower, upper = ritz * (1 - recurrence.lower_slack), upper * (1 + recurrence.slack)
    return Bracket((lower * recurrence.scale).sqrt(), (upper * recurrence.scale).sqrt())


def _christoffel_root(recurrence: _Recurrence, ritz: Tensor, log_weight: Tensor) -> Tensor:
    """log((μ − θ)/θ) where K(μ) = 1/t, or just beyond: Newton steps kept between points that are known to lie on its sides.

    Two points a hundredth of the bracket's width apart are tried at a time: their difference is the slope, and in the end
    the root lies between them. A sample whose root is found rests, so that it does not depend on the samples beside it.
    """
    low = torch.full_like(ritz, math.log(recurrence.eps) - 2)
    # there p_1 = (μ − α_1)/β_1 alone makes K large enough
    high = 2 - log_weight / 2 + divide_or_zero(recurrence.betas[0, 0], ritz).clamp(min=1).log()
    pair = torch.tensor([[0.0], [_ROOT_TOLERANCE]], dtype=ritz.dtype, device=ritz.device)
    point = torch.full_like(ritz, -2.0)
    for _ in range(_ROOT_STEPS):  # seldom more than four
        points = point + pair
        excess = recurrence.log_christoffel(ritz * (1 + points.exp())) + log_weight
        searching = high - low > 2 * _ROOT_TOLERANCE
        low = torch.maximum(low, torch.where(searching & (excess < 0), points, -torch.inf).amax(0))
        high = torch.minimum(high, torch.where(searching & (excess >= 0), points, torch.inf).amin(0))
        if bool((high - low <= 2 * _ROOT_TOLERANCE).all()):
            break
        slope = (excess[1] - excess[0]) / _ROOT_TOLERANCE
        newton = point - excess[0] / slope - _ROOT_TOLERANCE / 2
        point = torch.where((newton > low - _ROOT_TOLERANCE) & (newton < high), newton, (low + high) / 2)
    return high


_ROOT_TOLERANCE = 2e-2
_ROOT_STEPS = 40
