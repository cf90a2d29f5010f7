"""‖J_t‖₂ of every hidden layer and sample: how much each method costs, and how far from the truth it ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from agreement import DisagreementError
from straight_line import plain_step
from torch import Tensor
from torch.func import jacrev, vmap
from workload import Workload

from gradpen import evaluate_inequality

ROUNDING = 1e-4  # relative: what float32 may move a converged singular value by

Prefix = Callable[[Tensor], Tensor]  # x → h_t
MatVec = Callable[[Tensor], Tensor]


class Norms(NamedTuple):
    """(hidden layers, B); `upper` where a method has one."""

    lower: Tensor
    upper: Tensor | None = None


class Method(NamedTuple):
    """A way to ‖J_t‖₂."""

    name: str
    family: str  # points that one line of the figure joins
    compute: Callable[[], Norms]


def prefixes(work: Workload) -> list[Prefix]:
    """x → h_t for the inputs of the second, third, … dense layer."""
    return [work.model[: 2 * t] for t in range(1, len(work.linears))]


# ---- methods -------------------------------------------------------------------------------------------------------


def exact_norms(work: Workload) -> Norms:
    """Explicit Jacobians and their largest singular values."""
    with torch.no_grad():
        return Norms(torch.stack([torch.linalg.matrix_norm(vmap(jacrev(p))(work.x), 2) for p in prefixes(work)]))


def bracketed_norms(work: Workload, rtol: float, *, slack: bool) -> Norms:
    """Brackets of gradpen, everything else of the report included."""
    report = evaluate_inequality(work.model, work.x, work.y, rtol=rtol, slack=slack)
    hidden = report.layers[1:]
    assert all(layer.jacobian_norm is not None and layer.jacobian_norm_upper is not None for layer in hidden)
    lower, upper = zip(*[(layer.jacobian_norm, layer.jacobian_norm_upper) for layer in hidden], strict=True)
    return Norms(torch.stack(lower), torch.stack(upper))


def lanczos_norms(work: Workload, steps: int) -> Norms:
    """Lanczos on J Jᵀ with products by autograd, no bracket."""
    return Norms(torch.stack([lanczos(gram, start, steps) for gram, start in _grams(work)]))


def power_norms(work: Workload, steps: int) -> Norms:
    """Power iteration on J Jᵀ with products by autograd, no bracket."""
    norms = []
    for gram, q in _grams(work):
        for _ in range(steps):
            w = gram(q)
            size = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            q = w / size
        norms.append(size.squeeze(1).sqrt())
    return Norms(torch.stack(norms))


@torch.no_grad()
def straight_line_norms(work: Workload, steps: int) -> Norms:
    """Lanczos alone for a ReLU chain, written out: W_1 W_1ᵀ is formed once and the input width never enters again."""
    h, first = work.x, work.linears[0].weight
    shared = first @ first.T

    def gram(u: Tensor) -> Tensor:  # of W_1
        return u @ shared

    norms = []
    for linear, following in zip(work.linears[:-1], work.linears[1:], strict=True):
        h = F.relu(F.linear(h, linear.weight, linear.bias))
        gram = _masked(gram, (h > 0).to(h.dtype))
        norms.append(lanczos(gram, _start(h), steps))
        gram = _times_weight(gram, following.weight)
    return Norms(torch.stack(norms))


def lanczos(gram: MatVec, start: Tensor, steps: int) -> Tensor:
    """√ of the largest Ritz value after so many steps of the three-term recurrence: (B,)."""
    q = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    before, beta = torch.zeros_like(q), q.new_zeros(len(q))
    alphas, betas = [], []
    for _ in range(steps):
        w = gram(q)
        alphas.append(torch.linalg.vecdot(q, w))
        w = w - alphas[-1].unsqueeze(1) * q - beta.unsqueeze(1) * before
        beta = torch.linalg.vector_norm(w, dim=1)
        betas.append(beta)
        before, q = q, w / beta.unsqueeze(1)
    off_diagonal = torch.stack(betas[:-1], 1).double()
    tridiagonal = torch.diag_embed(torch.stack(alphas, 1).double())
    tridiagonal = tridiagonal + torch.diag_embed(off_diagonal, 1) + torch.diag_embed(off_diagonal, -1)
    return torch.linalg.eigvalsh(tridiagonal)[:, -1].sqrt()


def _grams(work: Workload) -> list[tuple[MatVec, Tensor]]:
    """u ↦ J_t J_tᵀ u by autograd, and a start, for every hidden layer; Jᵀ is linear, so its derivative is J."""
    grams = []
    for prefix in prefixes(work):
        x = work.x.detach().requires_grad_()
        h = prefix(x)
        probe = torch.zeros_like(h, requires_grad=True)
        (image,) = torch.autograd.grad(h, x, probe, create_graph=True)
        grams.append((partial(_autograd_gram, x, h, probe, image), _start(h)))
    return grams


def _autograd_gram(x: Tensor, h: Tensor, probe: Tensor, image: Tensor, u: Tensor) -> Tensor:
    (pulled,) = torch.autograd.grad(h, x, u, retain_graph=True)
    (pushed,) = torch.autograd.grad(image, probe, pulled, retain_graph=True)
    return pushed


def _start(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=like.dtype)


def _masked(gram: MatVec, mask: Tensor) -> MatVec:
    return lambda u: mask * gram(mask * u)


def _times_weight(gram: MatVec, weight: Tensor) -> MatVec:
    return lambda u: gram(u @ weight) @ weight.T


# ---- who is measured -----------------------------------------------------------------------------------------------


def methods(work: Workload, *, thorough: bool) -> list[Method]:
    """What the table and the figure show, except `exact_norms`, which takes a minute.

    Args:
        work: the net and the batch.
        thorough: all points of the figure, not only the table's.
    """
    found = [
        Method("evaluate_inequality", "gradpen", lambda: bracketed_norms(work, 0.05, slack=True)),
        Method("evaluate_inequality, slack=False", "gradpen", lambda: bracketed_norms(work, 0.05, slack=False)),
        Method("Lanczos written out, 20 steps", "straight line", lambda: straight_line_norms(work, 20)),
        Method("Lanczos by autograd, 20 steps", "Lanczos", lambda: lanczos_norms(work, 20)),
        Method("power iteration by autograd, 20 steps", "power iteration", lambda: power_norms(work, 20)),
    ]
    if thorough:
        found += [
            Method(
                f"evaluate_inequality, slack=False, rtol={rtol:g}",
                "gradpen",
                lambda rtol=rtol: bracketed_norms(work, rtol, slack=False),
            )
            for rtol in (0.3, 0.1, 0.02, 0.01)
        ]
        for steps in (5, 10, 40):
            found += [
                Method(
                    f"Lanczos by autograd, {steps} steps",
                    "Lanczos",
                    lambda steps=steps: lanczos_norms(work, steps),
                ),
                Method(
                    f"power iteration by autograd, {steps} steps",
                    "power iteration",
                    lambda steps=steps: power_norms(work, steps),
                ),
            ]
    return found


class Accuracy(NamedTuple):
    """Relative distances, the worst over samples and layers."""

    error: float  # of the lower end from the truth
    width: float | None  # of the bracket


def accuracy(name: str, norms: Norms, exact: Norms) -> Accuracy:
    """How far a method ends from the explicit singular values.

    Raises:
        DisagreementError: if a lower end is too large, or a bracket does not hold the truth.
    """
    truth, lower = exact.lower.double(), norms.lower.double()
    if not bool((lower <= truth * (1 + ROUNDING)).all()):  # a NaN is not, either
        raise DisagreementError(f"{name} is above the largest singular value, or NaN")
    error = float(((truth - lower) / truth).clamp(min=0).max())
    if norms.upper is None:
        return Accuracy(error, None)
    upper = norms.upper.double()
    if not bool((upper >= truth * (1 - ROUNDING)).all()):
        raise DisagreementError(f"{name}: an upper end is below the largest singular value, or NaN")
    return Accuracy(error, float(((upper - lower) / upper).max()))


def plain(work: Workload) -> Callable[[], Tensor]:
    """The unit of cost."""
    return lambda: plain_step(work)
