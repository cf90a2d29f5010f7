"""Each penalty written out by hand for a ReLU MLP with cross entropy: the floor in practice, of no use for anything else.

The gradients δ_t and ∇_x f are formulas here, so autograd differentiates each of them once and computes nothing that is not
needed (`written_out` has the derivatives of the formulas, too). A step leaves ∂(data loss + weight · R)/∂θ in ``.grad`` and
returns R (or the norms).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from workload import Workload


class Forward(NamedTuple):
    """Inputs of the dense layers, ReLU's derivatives behind them, and the logits."""

    h: list[Tensor]
    masks: list[Tensor]
    logits: Tensor


def plain_step(work: Workload) -> Tensor:
    """What all ratios are relative to: forward and backward."""
    work.model.zero_grad()
    loss = F.cross_entropy(work.model(work.x), work.y)
    loss.backward()
    return loss.detach()


def input_step(work: Workload, weight: float) -> Tensor:
    """R_x = mean_i ‖∇_x f_i‖²."""
    work.model.zero_grad()
    forward = _forward(work)
    deltas = _deltas(work, forward, _cotangent(work, forward))
    return _backward(work, forward, weight, _input_penalty(work, deltas))


def param_step(work: Workload, weight: float) -> Tensor:
    """R_θ = mean_i ‖∇_θ f_i‖²."""
    work.model.zero_grad()
    forward = _forward(work)
    deltas = _deltas(work, forward, _cotangent(work, forward))
    return _backward(work, forward, weight, _param_sq_norms(forward, deltas).mean())


def both_step(work: Workload, input_weight: float, param_weight: float) -> Tensor:
    """Both from one chain; returns R_x and R_θ."""
    work.model.zero_grad()
    forward = _forward(work)
    deltas = _deltas(work, forward, _cotangent(work, forward))
    input_penalty, param_penalty = _input_penalty(work, deltas), _param_sq_norms(forward, deltas).mean()
    loss = F.cross_entropy(forward.logits, work.y)
    (loss + input_weight * input_penalty + param_weight * param_penalty).backward()
    return torch.stack([input_penalty.detach(), param_penalty.detach()])


def batch_step(work: Workload, weight: float, *, between_samples: bool = False) -> Tensor:
    """R_θ = ‖∇_θ mean_i f_i‖²: of the gradient itself, or of products between samples in layers where these are smaller."""
    work.model.zero_grad()
    forward = _forward(work)
    deltas = _deltas(work, forward, _cotangent(work, forward) / len(work.x))
    parts = []
    for linear, h, delta in zip(work.linears, forward.h, deltas, strict=True):
        if between_samples and 2 * len(h) * sum(linear.weight.shape) < 3 * linear.weight.numel():
            parts.append(((h @ h.t() + 1) * (delta @ delta.t())).sum())  # + 1: the bias
        else:
            parts += [(delta.t() @ h).square().sum(), delta.sum(0).square().sum()]
    return _backward(work, forward, weight, torch.stack(parts).sum())


def difference_step(work: Workload, weight: float, step: float) -> Tensor:
    """Weight · ‖∇_θ L‖ by a forward difference: (1 − α) ∇L(θ) + α ∇L(θ + step · g/‖g‖), α = weight / step."""
    plain_step(work)
    parameters = list(work.model.parameters())
    here = [_grad(parameter) for parameter in parameters]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(here)))
    moves = torch._foreach_mul(here, step / norm)
    with torch.no_grad():
        torch._foreach_add_(parameters, moves)
    plain_step(work)
    alpha = weight / step
    with torch.no_grad():
        torch._foreach_sub_(parameters, moves)
        if alpha != 1:  # at 1 it is SAM
            torch._foreach_lerp_([_grad(parameter) for parameter in parameters], here, 1 - alpha)
    return norm


@torch.no_grad()
def sample_norms(work: Workload) -> Tensor:
    """‖∇_θ f_i‖² of every sample and nothing else."""
    forward = _forward(work)
    return _param_sq_norms(forward, _deltas(work, forward, _cotangent(work, forward)))


def projection_step(work: Workload, weight: float, generator: torch.Generator) -> Tensor:
    """R = mean_i K ‖J_iᵀ v_i‖² for one random direction v_i of the K outputs."""
    work.model.zero_grad()
    forward = _forward(work)
    deltas = _deltas(work, forward, scaled_directions(forward.logits, generator))
    return _backward(work, forward, weight, _input_penalty(work, deltas))


def scaled_directions(logits: Tensor, generator: torch.Generator) -> Tensor:
    """√K v, v uniform on the unit sphere: (B, K)."""
    normal = torch.randn(logits.shape, generator=generator).to(logits.dtype)
    return normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True) * logits.shape[1] ** 0.5


def _forward(work: Workload) -> Forward:
    h, masks, z = [work.x], [], work.x
    for linear in work.linears[:-1]:
        z = F.linear(h[-1], linear.weight, linear.bias)
        masks.append((z > 0).to(z.dtype))
        h.append(F.relu(z))
    last = work.linears[-1]
    return Forward(h, masks, F.linear(h[-1], last.weight, last.bias))


def _cotangent(work: Workload, forward: Forward) -> Tensor:
    """∂f_i/∂logits = softmax − one-hot."""
    return torch.softmax(forward.logits, 1) - F.one_hot(work.y, forward.logits.shape[1])


def _deltas(work: Workload, forward: Forward, cotangent: Tensor) -> list[Tensor]:
    """δ_t = (W_{t+1}ᵀ δ_{t+1}) · g'(z_t) for every layer, first to last."""
    deltas = [cotangent]
    for linear, mask in zip(reversed(work.linears[1:]), reversed(forward.masks), strict=True):
        deltas.insert(0, (deltas[0] @ linear.weight) * mask)
    return deltas


def _input_penalty(work: Workload, deltas: list[Tensor]) -> Tensor:
    return (deltas[0] @ work.linears[0].weight).square().sum(1).mean()


def _param_sq_norms(forward: Forward, deltas: list[Tensor]) -> Tensor:
    """Σ_t (1 + ‖h_t‖²) ‖δ_t‖²: (B,)."""
    terms = [(1 + h.square().sum(1)) * delta.square().sum(1) for h, delta in zip(forward.h, deltas, strict=True)]
    return torch.stack(terms).sum(0)


def _backward(work: Workload, forward: Forward, weight: float, penalty: Tensor) -> Tensor:
    (F.cross_entropy(forward.logits, work.y) + weight * penalty).backward()
    return penalty.detach()


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
