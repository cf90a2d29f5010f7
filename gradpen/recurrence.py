"""What the coefficients of Lanczos recurrences tell of the largest eigenvalues, on the host.

The coefficients α_j and β_j give the largest Ritz value θ, which lies below the eigenvalue, and beyond it the Christoffel
function K, whose root of K(μ) = 1/t lies above the eigenvalue with stated probability (see `gradpen.spectral`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class BracketSearch:
    """Brackets of the largest eigenvalues of many samples, from coefficients as they come.

    After 4, 6, 8, 11, 14, … steps, but hardly before K can be large enough, θ gives each sample a target, where the upper
    end may be at most. The sample is done as soon as K is large enough there: at that step, or one before the next target,
    which then takes a few numbers a step. So, but for rounding, a bracket depends neither on the samples beside it nor on
    when the host looks.

    Attributes:
        steps: after how many steps each sample is done, as far as is known, or else the most that it can take: (B,).
        present: the samples that have not left.
        next_look: after how many steps to call `look`: by the growth of K, enough samples are done then to leave.
        is_over: whether all are done.
    """

    def __init__(
        self, dimension: Array, log_weight: Array, rtol: float, max_steps: int, eps: float, *, may_leave: bool
    ) -> None:
        """Before the first step.

        Args:
            dimension: (B,), what lies behind so many steps is rounding.
            log_weight: (B,), log t.
            rtol: a bracket is narrow enough if it is no wider than this fraction of its upper end.
            max_steps: the most that are taken.
            eps: of the type that the coefficients are computed in.
            may_leave: whether samples that are done may leave.
        """
        size, slack = len(dimension), _rounding_slack(np.float64(max_steps), eps)
        self.steps = dimension.clip(1, max_steps)
        self._coefficients = np.zeros((2, max_steps, size))
        self._enough, self._eps, self._may_leave = -log_weight, eps, may_leave  # what log K has to reach
        rtol = min(rtol, 0.99)
        self._cell_width = math.log1p(max(rtol / _CELLS, 1e-8))
        self._cells = np.full(size, -np.inf)  # θ lies in these, or beyond
        self._target_by_ritz = (1 - slack) / (1 + slack) / (1 - rtol) ** 2
        self._at_target = np.zeros((4, size))  # the target, and there d_j, log p_j² and K / p_j², as in `_Recurrence`
        self._growth = np.ones(size)  # of log K, by a step
        self._lacking = np.zeros(size)  # how many more steps are needed if it goes on growing so
        growth = _GROWTH + 2 * math.acosh(2 / (1 - rtol) ** 2 - 1)
        anchors = np.array([] if rtol <= eps else _ANCHORS)
        anchors = anchors[anchors <= max_steps]
        place = np.searchsorted(anchors, self._enough / growth)
        self._first = np.append(anchors, max_steps + 1)[place]  # of them for each sample: (B,)
        self._anchors = [int(step) for step in anchors if step >= self._first.min(initial=max_steps)]
        self._looked, self.next_look = 0, self._anchors[0] if self._anchors else max_steps
        self.present, self.is_over = np.arange(size), False

    def look(self, taken: Array) -> Array:
        """See who is done after `next_look` steps.

        Args:
            taken: α and β of the steps since the last look for all that are `present`, (steps, 2, samples).

        Returns:
            Which of these go on: bool. The others are done, and leave; nobody does if too few are for that to be worth it.
        """
        step, present = self.next_look, self.present
        self._coefficients[:, step - len(taken) : step, present] = taken.swapaxes(0, 1)
        if self._anchors:
            self._follow(present[self.steps[present] > self._looked], self._looked, step)
        done = self.steps[present] <= step
        self.is_over = bool(done.all())
        going_on = ~done | (done.sum() < self._worth_leaving(len(present)))
        self.present = present[going_on]
        if not self.is_over:
            lacking = np.minimum(np.maximum(self._lacking, self._first - step), self.steps - step)
            lacking = np.sort(lacking[present[~done]])
            needed = self._worth_leaving(len(self.present)) - (len(self.present) - len(lacking))
            ahead = min(lacking[min(needed, len(lacking)) - 1], 2 * step)
            ahead = math.ceil(ahead - _EARLY * max(ahead - _NEAR, 0))
            self._looked, self.next_look = step, min(step + max(ahead, _LOOK_AFTER), self._coefficients.shape[1])
        return going_on

    def _worth_leaving(self, present: int) -> int:
        """How many have to be done: fewer do not repay the copies."""
        return min(max(present // 4, len(self.steps) // 8), present) if self._may_leave else present

    def ends(self) -> tuple[Array, Array]:
        """Both ends of the brackets of the largest singular values, √ of those of the eigenvalues: (B,), (B,).

        The upper end is the target itself where K is hardly larger there than it has to be.
        """
        recurrence = _Recurrence.of(self._coefficients[:, : self.next_look], self._eps, self.steps)
        target, _, log_square, total = self._at_target
        cells = recurrence.cells(self._cells, self._cell_width)
        ritz = recurrence.ritz(*(recurrence.point(end, self._cell_width) for end in (cells, cells + 1)))
        upper = target / np.where(recurrence.scale > 0, recurrence.scale, np.inf)
        spare = np.where(total > 0, log_square + np.log(total.clip(min=1)) - self._enough, -np.inf)
        apart = np.flatnonzero(((spare < 0) | (spare > _SPARE)) & (recurrence.scale > 0))
        if len(apart):
            root = _christoffel_root(recurrence.restricted(apart), ritz[apart], -self._enough[apart])
            upper[apart] = ritz[apart] * (1 + np.exp(root))
        lower, upper = ritz * (1 - recurrence.lower_slack), upper * (1 + recurrence.slack)
        return np.sqrt(lower * recurrence.scale), np.sqrt(upper * recurrence.scale)

    def _follow(self, samples: Array, start: int, stop: int) -> None:
        """Steps `start` + 1 to `stop` of samples that are not done after `start`."""
        samples = samples[self._first[samples] <= stop]
        anchors = [step for step in self._anchors if start < step <= stop and len(samples)]
        if not anchors:
            self._advance(samples, start, stop)
            return
        first, last = anchors[0], anchors[-1]
        begun = self._first[samples] <= start
        samples = np.concatenate([samples[~begun], self._advance(samples[begun], start, first - 1)])
        able = self.steps[samples] >= last
        ended, samples = samples[~able], samples[able]
        cells = self._cells[samples]
        log_k_before = self._set_targets(samples, last) if len(samples) else self._enough[:0]
        if last > first:
            # whoever has too small a K a step before, at this target, was not done before: the earlier ones were no larger
            doubtful = (log_k_before >= self._enough[samples]) & (self._first[samples] < last)
            self._cells[samples[doubtful]] = cells[doubtful]
            back = np.concatenate([ended, samples[doubtful]])
            self._follow(back, first - 1, last - 1)
            open_again = back[self.steps[back] >= last]
            if len(open_again):
                self._set_targets(open_again, last)
            samples = np.concatenate([samples[~doubtful], open_again])
        self._advance(self._closed(samples, last), last, stop)

    def _advance(self, samples: Array, start: int, stop: int) -> Array:
        """From `start` to `stop` at the same targets: who is not done then."""
        for step in range(start + 1, stop + 1):
            if not len(samples):
                break
            target, pivot, log_square, total = self._at_target[:, samples]
            alpha, beta = self._coefficients[:, step - 1, samples]
            floor = self._eps * target
            pivot = target - alpha - np.maximum(self._coefficients[1, step - 2, samples], floor) ** 2 / pivot
            beyond = (pivot > 0) & (log_square > -np.inf)
            ratio = np.where(beyond, pivot / np.maximum(beta, floor), 1.0)  # of a power of β the sum would overflow
            log_square = np.where(beyond, log_square + 2 * np.log(ratio), -np.inf)
            self._at_target[1:, samples] = np.where(beyond, pivot, 1.0), log_square, 1 + total / ratio**2
            samples = self._closed(samples, step)
        return samples

    def _set_targets(self, samples: Array, step: int) -> Array:
        """Targets from θ after `step`, and everything at them: log K a step before."""
        recurrence = _Recurrence.of(self._coefficients[:, :step, samples], self._eps)
        cells = recurrence.cells(self._cells[samples], self._cell_width)
        low = recurrence.point(cells, self._cell_width) * (1 - (recurrence.lower_slack - recurrence.slack))
        target = low * self._target_by_ritz
        pivot, log_square, total, log_k_before, growth = recurrence.christoffel_factors(target)
        log_square = np.where(recurrence.scale > 0, log_square, np.inf)
        self._cells[samples], self._growth[samples] = cells, growth.clip(min=_LEAST_GROWTH)
        self._at_target[:, samples] = target * recurrence.scale, pivot * recurrence.scale, log_square, total
        return np.where(recurrence.scale > 0, log_k_before, np.inf)

    def _closed(self, samples: Array, step: int) -> Array:
        """Note who is done, now that everything is at `step`: the others."""
        log_k = self._at_target[2, samples] + np.log(self._at_target[3, samples])
        self._lacking[samples] = (self._enough[samples] - log_k) / self._growth[samples]
        self.steps[samples[log_k >= self._enough[samples]]] = step
        return samples[self.steps[samples] > step]


_ANCHORS = [4, 6, 8, 11, 14, 18, 23, 29, 36, 45, 56, 70, 88]
_GROWTH = (
    2.2  # of log K by a step, beside that of Chebyshev polynomials on [0, θ]: a few samples are done a step earlier
)
_NEAR, _EARLY = 4, 0.3  # of the steps beyond so many that seem to be needed, so much are not: K grows faster later on
_LOOK_AFTER = 2  # steps at least: a look takes as long as a step of a small net
_LEAST_GROWTH = 0.1  # of log K: no sample is given up
_SPARE = 30.0  # in log K: what may be left of it at the target
_CELLS = 20  # rtol in widths of a cell: θ is sought in cells (1 + width)^i, the same at every look

# In eps: rounding makes up a good part of a shorter vector, so that it is not orthogonal to those before it, and the largest
# Ritz value may exceed the eigenvalue by as much as the vector is long
_ROUNDING = 512


def _rounding_slack(steps: Any, eps: float) -> Any:
    """Allowance for rounding in so many steps, relative to an eigenvalue."""
    return eps * np.maximum(8 * np.sqrt(steps), steps)


class _Recurrence(NamedTuple):
    """The coefficients of samples, divided by a bound of the largest Ritz value θ; float64 arrays.

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
        slack = _rounding_slack(number, eps)
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
        """Whether μ at (points, B) exceeds θ: every p_j is positive there, and only there."""
        return np.all(self.pivots(mu) > 0, axis=0)

    def point(self, cells: Array, width: float) -> Array:
        """Where cells begin, e^(width · cell), divided by `scale`, 0 where that is 0."""
        return np.exp(width * cells) / np.where(self.scale > 0, self.scale, np.inf)

    def cells(self, known: Array, width: float) -> Array:
        """The cells that θ lies in, in whole numbers: (B,).

        Args:
            known: cells that θ lies in or beyond, −∞ if none are known.
            width: of a cell, in log θ.
        """
        size = np.where(self.scale > 0, self.scale, 1.0)
        low = np.maximum(known, np.floor(np.log(self._least_ritz().clip(min=self.eps) * size) / width))
        high = np.where(self.scale > 0, np.maximum(np.floor(np.log(size) / width), low) + 1, low)
        points = low + np.where(np.isfinite(known), _AHEAD, np.ceil((high - low) * _INTERIOR))
        part, sought = self, np.arange(len(low))
        while True:
            beyond = part.is_beyond(part.point(points, width)) | (points >= high[sought])
            low[sought] = np.maximum(low[sought], np.where(beyond, -np.inf, points).max(0))
            high[sought] = np.minimum(high[sought], np.where(beyond, points, np.inf).min(0))
            is_open = high[sought] - low[sought] > 1
            if not is_open.any():
                return low
            part, sought = part.restricted(is_open), sought[is_open]
            points = low[sought] + np.ceil((high[sought] - low[sought]) * _INTERIOR)

    def _least_ritz(self) -> Array:
        """What θ reaches: every entry of the diagonal, and the quotient of the vector that Toeplitz matrices have: (B,)."""
        if self.counts is not None:
            return np.where(self.counts, self.alphas, 0.0).max(0)
        alphas = self.alphas
        sine = np.sin(np.arange(1, len(alphas) + 1) * np.pi / (len(alphas) + 1))
        quotient = (sine**2 @ alphas + 2 * (sine[:-1] * sine[1:]) @ self.betas[:-1]) / (sine**2).sum()
        return np.maximum(alphas.max(0), quotient)

    def restricted(self, samples: Array) -> _Recurrence:
        """That of some of the samples, given by a mask or their places."""
        counts = None if self.counts is None else self.counts[:, samples]
        return self._replace(
            alphas=self.alphas[:, samples],
            betas=self.betas[:, samples],
            counts=counts,
            scale=self.scale[samples],
            slack=self.slack if self.counts is None else self.slack[samples],
            lower_slack=self.lower_slack[samples],
        )

    def ritz(self, low: Array, high: Array) -> Array:
        """θ from below, closer than rounding has moved the coefficients: (B,), divided by `scale`.

        Args:
            low: ends of an interval that holds it, (B,), divided by `scale`.
            high: the other ends.
        """
        accuracy = 8 * self.eps
        widest = max(float((high - low).max(initial=0.0)), accuracy)
        for _ in range(math.ceil(math.log(widest / accuracy, len(_EIGHTHS) - 1))):
            points = low + (high - low) * _EIGHTHS
            below = np.logical_not(self.is_beyond(points[1:-1])).sum(0, keepdims=True)
            low, high = (np.take_along_axis(points, end, 0)[0] for end in (below, below + 1))
        return low

    def christoffel_factors(self, mu: Array) -> tuple[Array, Array, Array, Array, Array]:
        """d_k, log p_k² (−∞ up to θ), K / p_k², log K a step before and its growth by each of the last, at μ: (B,) each.

        All coefficients count.
        """
        pivots = self.pivots(mu[None])[:, 0]
        beyond = np.all(pivots > 0, axis=0)
        ratios = np.where(beyond, pivots, 1.0) / self.betas  # p_j / p_{j−1}
        total, before = np.ones_like(mu), np.zeros_like(mu)
        for inverse in ratios**-2.0:
            np.multiply(total, inverse, out=before)
            np.add(before, 1.0, out=total)
        with np.errstate(over="ignore"):
            log_tail, log_head = (2 * np.log(part.prod(0)) for part in (ratios[-_LAST:], ratios[:-_LAST]))
        log_square = np.where(beyond, log_head + log_tail, -np.inf)
        log_k_before = log_square + np.log(before)  # of K / p_k² − 1, behind β = 0, rounding would leave nothing
        return np.where(beyond, pivots[-1], 1.0), log_square, total, log_k_before, log_tail / min(_LAST, len(ratios))

    def log_christoffel(self, mu: Array) -> Array:
        """log K(μ) at (points, B), −∞ up to θ."""
        pivots = self.pivots(mu)
        beyond = np.all(pivots > 0, axis=0)
        log_squares = 2 * np.cumsum(np.log(np.where(beyond, pivots, 1.0) / self.betas[:, None]), axis=0)
        if self.counts is not None:
            log_squares = np.where(self.counts[:, None], log_squares, -np.inf)
        largest = log_squares.max(0).clip(min=0)  # p_0 = 1
        log_k = largest + np.log(np.exp(-largest) + np.exp(log_squares - largest).sum(0))
        return np.where(beyond, log_k, -np.inf)


_EIGHTHS = np.arange(9)[:, None] / 8
_INTERIOR = _EIGHTHS[1:-1]
_AHEAD = np.array([1.0, 2, 3, 4, 8, 16, 32])[:, None]  # as many: θ hardly moves from one look to the next
_LAST = 4  # so many steps tell how fast log K grows


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
