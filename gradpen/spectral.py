"""Largest singular values as brackets [lower, upper].

A norm that stands in a denominator must not be underestimated, and Krylov methods approach a singular value from below.
So every value comes with an upper end: exact (up to rounding) for the dense path, and for the Lanczos path one that
holds with stated probability over the random start.

The upper end. Let A = J Jᵀ (n × n), q a start uniform on the unit sphere, and p_0, p_1, … the orthonormal polynomials of the
Lanczos recurrence started at q:

    p_0 = 1,   β_{j+1} p_{j+1}(μ) = (μ − α_{j+1}) p_j(μ) − β_j p_{j−1}(μ).

An eigenvalue μ of A carries the weight ⟨q, v⟩² of q in its eigenvector v, which is at most the Christoffel number 1/K(μ) with
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
) -> Bracket:
    """Largest singular value of J_b for every b, from products with A_b = J_b J_bᵀ.

    Args:
        gram: (B, n) → (B, n), row b multiplied by A_b.
        start: (B, n), standard normal entries; a row may be 0 where A_b is known to be (dead units): the number of its
            non-zero entries takes the place of n.
        delta: each upper end fails with probability at most this.
        rtol: stop when no bracket is wider than this fraction of its upper end.
        max_steps: stop after so many products.

    Returns:
        Bracket of shape (B,).
    """
    dimension = (start != 0).sum(1)
    log_weight = _log_smallest_weight(dimension, delta)
    q = divide_or_zero(start, torch.linalg.vector_norm(start, dim=1, keepdim=True))
    basis = [q]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    previous, beta = torch.zeros_like(q), q.new_zeros(q.shape[0])
    next_check = 8
    largest_dimension = int(dimension.max()) if dimension.numel() else 0
    while True:
        w = gram(q) - beta.unsqueeze(1) * previous
        alpha = torch.linalg.vecdot(q, w)
        w = w - alpha.unsqueeze(1) * q
        w = _orthogonalized(w, basis)
        beta = torch.linalg.vector_norm(w, dim=1)
        alphas.append(alpha)
        betas.append(beta)
        previous, q = q, divide_or_zero(w, beta.unsqueeze(1))
        basis.append(q)
        steps = len(alphas)
        last = steps >= min(max_steps, largest_dimension)
        if steps == next_check or last:
            bracket = _bracket_of_recurrence(
                torch.stack(alphas, 1), torch.stack(betas, 1), log_weight, start.dtype
            )
            if last or bool((bracket.width <= rtol).all()):
                return bracket
            next_check += 4


def normal_start(shape: tuple[int, int], support: Tensor | None, like: Tensor, seed: int) -> Tensor:
    """Standard normal rows from a generator of their own, 0 outside `support`: (B, n)."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    start = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
    return start if support is None else start * support


def _orthogonalized(w: Tensor, basis: list[Tensor]) -> Tensor:
    """w without its components along the basis, row by row: rounding would bring converged directions back."""
    stacked = torch.stack(basis, 1)  # (B, steps, n)
    return w - (stacked.transpose(1, 2) @ (stacked @ w.unsqueeze(2))).squeeze(2)


def _log_smallest_weight(dimension: Tensor, delta: float) -> Tensor:
    """log t with P(⟨q, v⟩² <= t) <= δ for q uniform on the sphere in n dimensions: t = (δ B(1/2, (n−1)/2) / 2)²."""
    half = (widest_float(dimension) - 1).clamp(min=1) / 2
    log_beta = math.lgamma(0.5) + torch.lgamma(half) - torch.lgamma(half + 0.5)
    log_weight = 2 * (math.log(delta / 2) + log_beta)
    return torch.where(dimension > 1, log_weight, 0.0)  # in one dimension the weight is 1


def _bracket_of_recurrence(alphas: Tensor, betas: Tensor, log_weight: Tensor, dtype: torch.dtype) -> Bracket:
    """From the coefficients (B, k) to the bracket of the largest singular value: √ of that of the eigenvalue."""
    alphas, betas = widest_float(alphas), widest_float(betas)
    tridiagonal = torch.diag_embed(alphas)
    if alphas.shape[1] > 1:
        off = torch.diag_embed(betas[:, :-1], 1)
        tridiagonal = tridiagonal + off + off.transpose(1, 2)
    ritz = torch.linalg.eigvalsh(tridiagonal)[:, -1].clamp(min=0)
    eps = torch.finfo(dtype).eps
    slack = 4 * eps * alphas.shape[1] ** 0.5
    upper = _christoffel_root(alphas, betas, ritz, log_weight, eps)
    return Bracket((ritz * (1 - slack)).sqrt(), (upper * (1 + slack)).sqrt())


def _christoffel_root(alphas: Tensor, betas: Tensor, ritz: Tensor, log_weight: Tensor, eps: float) -> Tensor:
    """The μ >= θ with log K(μ) = −log t, found on a log scale of (μ − θ)/θ by bisection-safeguarded Newton steps."""
    safe_ritz = torch.where(ritz > 0, ritz, 1.0)
    low = torch.full_like(ritz, math.log(eps) - 2)  # log((μ − θ)/θ)
    high = torch.full_like(ritz, 40.0)
    point = torch.zeros_like(ritz)
    for _ in range(60):
        mu = safe_ritz * (1 + point.exp())
        log_k, slope = _log_christoffel(alphas, betas, mu, eps * safe_ritz)
        excess = log_k + log_weight
        above = excess >= 0
        high, low = torch.where(above, point, high), torch.where(above, low, point)
        newton = point - excess / (slope * safe_ritz * point.exp())
        inside = (newton > low) & (newton < high) & newton.isfinite()
        point, moved = torch.where(inside, newton, (low + high) / 2), point
        if bool(((point - moved).abs() <= 1e-3).all()):
            break
    # the end where K is above 1/t is the safe one; Newton's last point is within 1e-3 of the root on the log scale
    margin = torch.minimum(high, point + 2e-3)
    return torch.where(ritz > 0, safe_ritz * (1 + margin.exp()), 0.0)


def _log_christoffel(alphas: Tensor, betas: Tensor, mu: Tensor, negligible: Tensor) -> tuple[Tensor, Tensor]:
    """log K(μ) and d log K/dμ beyond the largest Ritz value, by ratios ρ_j = p_j/p_{j−1} that do not overflow."""
    log_p, dlog_p = torch.zeros_like(mu), torch.zeros_like(mu)
    logs, dlogs = [log_p], [dlog_p]
    previous = torch.full_like(mu, math.inf)  # p_{−1} = 0
    dprevious = torch.zeros_like(mu)
    beta_before = torch.zeros_like(mu)
    for j in range(alphas.shape[1]):
        beta = torch.maximum(betas[:, j], negligible)  # an exhausted Krylov space leaves no weight beyond θ
        ratio = ((mu - alphas[:, j]) - beta_before / previous) / beta
        dratio = (1 + beta_before * dprevious / previous.square()) / beta
        ratio = ratio.clamp(min=torch.finfo(mu.dtype).tiny)
        log_p, dlog_p = log_p + ratio.log(), dlog_p + dratio / ratio
        logs.append(log_p)
        dlogs.append(dlog_p)
        previous, dprevious, beta_before = ratio, dratio, beta
    log_squares = 2 * torch.stack(logs)
    log_k = torch.logsumexp(log_squares, 0)
    return log_k, (torch.softmax(log_squares, 0) * 2 * torch.stack(dlogs)).sum(0)
