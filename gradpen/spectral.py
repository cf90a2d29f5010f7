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
from typing import NamedTuple

import torch
from torch import Tensor

from gradpen._numerics import divide_or_zero, widest_float

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
    largest = torch.linalg.svdvals(widest_float(matrices))[..., 0]
    slack = torch.finfo(matrices.dtype).eps * sum(matrices.shape[-2:])
    return Bracket(largest, largest * (1 + slack))


def exact_bracket(values: Tensor) -> Bracket:
    """A bracket of values that are known."""
    values = widest_float(values)
    return Bracket(values, values)


def lanczos_bracket(
    gram: MatVec,
    start: Tensor,
    *,
    delta: float,
    rtol: float = 0.05,
    max_steps: int = 96,
    reorthogonalize: bool = False,
) -> Bracket:
    """Largest singular value of J_b for every b, from products with A_b = J_b J_bᵀ.

    Args:
        gram: (B, n) → (B, n), row b multiplied by A_b.
        start: (B, n), standard normal entries; a row may be 0 where A_b is known to be (dead units): the number of its
            non-zero entries takes the place of n.
        delta: each upper end fails with probability at most this.
        rtol: a row's bracket is settled, and not narrowed further, once it is no wider than this fraction of its upper
            end; so it does not depend on the rows beside it.
        max_steps: stop after so many products.
        reorthogonalize: keep the whole Krylov basis orthogonal. It costs memory and twice the time; without it the ends move
            by rounding only, since copies of converged Ritz values do no harm to the largest one.

    Returns:
        Bracket of shape (B,).
    """
    dimension = (start != 0).sum(1)
    log_weight = _log_smallest_weight(dimension, delta)
    max_steps = min(max_steps, max(int(dimension.max()), 1))
    q = divide_or_zero(start, torch.linalg.vector_norm(start, dim=1, keepdim=True))
    before = torch.zeros_like(q)
    basis = [q]
    size = beta = q.new_zeros(len(q))
    exhausted = 4 * torch.finfo(start.dtype).eps
    alphas, betas = q.new_zeros(len(q), max_steps), q.new_zeros(len(q), max_steps)
    point = torch.zeros_like(log_weight)
    settled, bracket = torch.zeros_like(log_weight, dtype=torch.bool), exact_bracket(torch.zeros_like(log_weight))
    next_check = 8
    for step in range(max_steps):
        w = gram(q)
        alpha = torch.linalg.vecdot(q, w)
        w = w - alpha.unsqueeze(1) * q - beta.unsqueeze(1) * before
        if reorthogonalize:
            w = _orthogonalized(w, torch.stack(basis, 1))
        beta = torch.linalg.vector_norm(w, dim=1)
        size = torch.maximum(size, alpha.abs() + beta)
        beta = torch.where(
            beta > exhausted * size, beta, 0.0
        )  # what is left is rounding: the Krylov space is exhausted
        alphas[:, step], betas[:, step] = alpha, beta
        before, q = q, divide_or_zero(w, beta.unsqueeze(1))
        if reorthogonalize:
            basis.append(q)
        steps = step + 1
        if steps in (next_check, max_steps):
            new, point = _bracket_of_recurrence(alphas[:, :steps], betas[:, :steps], log_weight, point, start.dtype)
            bracket = Bracket(*(torch.where(settled, old, end) for old, end in zip(bracket, new, strict=True)))
            settled = bracket.width <= rtol
            if bool(settled.all()):
                break
            next_check += max(steps // 4, 2)
    return bracket


def normal_start(shape: tuple[int, int], support: Tensor | None, like: Tensor, seed: int) -> Tensor:
    """Standard normal rows from a generator of their own, 0 outside `support`: (B, n)."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    start = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
    return start if support is None else start * support


def _orthogonalized(w: Tensor, basis: Tensor) -> Tensor:
    """w (B, n) without its components along the basis (B, steps, n): rounding would bring converged directions back."""
    components = torch.bmm(basis, w.unsqueeze(2))
    return torch.baddbmm(w.unsqueeze(2), basis.transpose(1, 2), components, alpha=-1).squeeze(2)


def _log_smallest_weight(dimension: Tensor, delta: float) -> Tensor:
    """log t with P(⟨q, v⟩² <= t) <= δ for q uniform on the sphere in n dimensions: t = (δ B(1/2, (n−1)/2) / 2)²."""
    half = (widest_float(dimension) - 1).clamp(min=1) / 2
    log_beta = math.lgamma(0.5) + torch.lgamma(half) - torch.lgamma(half + 0.5)
    log_weight = 2 * (math.log(delta / 2) + log_beta)
    return torch.where(dimension > 1, log_weight, 0.0)  # in one dimension the weight is 1


def _bracket_of_recurrence(
    alphas: Tensor, betas: Tensor, log_weight: Tensor, point: Tensor, dtype: torch.dtype
) -> tuple[Bracket, Tensor]:
    """From the coefficients (B, k) to the bracket of the largest singular value, √ of that of the eigenvalue.

    `point` is a guess of log((μ − θ)/θ) for the upper end; its value comes back as the next guess.
    """
    alphas, betas = widest_float(alphas), widest_float(betas)
    tridiagonal = torch.diag_embed(alphas)
    tridiagonal.diagonal(1, -2, -1).copy_(betas[:, :-1])
    tridiagonal.diagonal(-1, -2, -1).copy_(betas[:, :-1])
    ritz = torch.linalg.eigvalsh(tridiagonal)[:, -1].clamp(min=0)
    eps = torch.finfo(dtype).eps
    slack = eps * max(4 * alphas.shape[1] ** 0.5, alphas.shape[1])
    point = _christoffel_root(alphas, betas, ritz, log_weight, point, eps)
    upper = ritz * (1 + point.exp())
    return Bracket((ritz * (1 - slack)).sqrt(), (upper * (1 + slack)).sqrt()), point


def _christoffel_root(
    alphas: Tensor, betas: Tensor, ritz: Tensor, log_weight: Tensor, point: Tensor, eps: float
) -> Tensor:
    """log((μ − θ)/θ) of the root of log K(μ) = −log t, not below it, by Newton steps kept inside a bisection.

    A row that has converged rests, so that its root does not depend on the rows beside it.
    """
    ritz = torch.where(ritz > 0, ritz, 1.0)
    low, high = torch.full_like(ritz, math.log(eps) - 2), torch.full_like(ritz, 40.0)
    active = torch.ones_like(ritz, dtype=torch.bool)
    for _ in range(60):
        mu = ritz * (1 + point.exp())
        log_k, slope = _log_christoffel(alphas, betas, mu, eps * ritz)
        excess = log_k + log_weight
        high = torch.where(active & (excess >= 0), point, high)
        low = torch.where(active & (excess < 0), point, low)
        newton = point - excess / (slope * (mu - ritz))
        inside = (newton > low) & (newton < high)
        step = torch.where(inside, newton, (low + high) / 2) - point
        point = torch.where(active, point + step, point)
        active &= step.abs() > _ROOT_TOLERANCE
        if not bool(active.any()):
            break
    return torch.minimum(high, point + 2 * _ROOT_TOLERANCE)  # high is known to be above the root


_ROOT_TOLERANCE = 1e-2  # of log((μ − θ)/θ): a hundredth of the bracket's width


def _log_christoffel(alphas: Tensor, betas: Tensor, mu: Tensor, negligible: Tensor) -> tuple[Tensor, Tensor]:
    """log K(μ) and d log K/dμ beyond the largest Ritz value, by ratios ρ_j = p_j/p_{j−1} that do not overflow."""
    log_ps, dlog_ps = [torch.zeros_like(mu)], [torch.zeros_like(mu)]
    shifted = mu.unsqueeze(1) - alphas
    betas = torch.maximum(betas, negligible.unsqueeze(1))  # an exhausted Krylov space leaves no weight beyond θ
    ratio = shifted[:, 0] / betas[:, 0]
    dratio = 1 / betas[:, 0]
    for j in range(alphas.shape[1]):
        if j > 0:
            before = betas[:, j - 1] / ratio
            ratio, dratio = (
                (shifted[:, j] - before) / betas[:, j],
                (1 + before / ratio * dratio) / betas[:, j],
            )
        log_ps.append(log_ps[-1] + ratio.log())
        dlog_ps.append(dlog_ps[-1] + dratio / ratio)
    log_squares = 2 * torch.stack(log_ps)
    slope = (torch.softmax(log_squares, 0) * torch.stack(dlog_ps)).sum(0) * 2
    return torch.logsumexp(log_squares, 0), slope
