"""Gradients of the penalised loss as formulas, for a ReLU MLP with cross entropy: there is nothing left to differentiate.

The same arithmetic in two settings: gradients put into ``.grad``, and gradients that come of ``loss.backward()``, as they do
with anything that one adds to a training loop. The loss itself is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from workload import Workload


class Computed(NamedTuple):
    """What a step comes to.

    Attributes:
        found: R, 0-dim, or both of them (2,), or the norms (B,).
        gradients: ∂(data loss + weight · R)/∂θ, in the order of the model's parameters.
    """

    found: Tensor
    gradients: list[Tensor]


def without_autograd(work: Workload, compute: Callable[[Workload], Computed]) -> Callable[[], Tensor]:
    """A step that puts the gradients into ``.grad``."""
    parameters = list(work.model.parameters())

    def step() -> Tensor:
        work.model.zero_grad()
        found, gradients = compute(work)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return found

    return step


def behind_a_loss(work: Workload, compute: Callable[[Workload], Computed]) -> Callable[[], Tensor]:
    """A step that differentiates a loss: one node of the graph, which knows the gradients and hands them out."""
    parameters = list(work.model.parameters())

    def step() -> Tensor:
        work.model.zero_grad()
        found, gradients = compute(work)
        loss = _WithGradients.apply(found.mean(), gradients, *parameters)
        del gradients  # autograd would copy what somebody else refers to
        loss.backward()
        return found

    return step


class _WithGradients(torch.autograd.Function):
    """A number whose gradients are known, if its cotangent is 1."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.saved_tensors


@torch.no_grad()
def penalised(
    work: Workload, input_weight: float = 0.0, param_weight: float = 0.0, directions: Tensor | None = None
) -> Computed:
    """R_x or R_θ, or both if both have a weight; R_x of the outputs along given directions (B, K), constants."""
    linears = work.linears
    h, logits = _forward(work)
    softmax = torch.softmax(logits, 1)
    cotangent = softmax - F.one_hot(work.y, logits.shape[1])
    deltas = _deltas(work, h, cotangent if directions is None else directions)
    size, last = len(work.x), len(linears) - 1
    weight_grads: list[Tensor | None] = [None] * (last + 1)
    found: list[Tensor] = []
    of_delta: Tensor | None = None  # its cotangent, first layer to last
    if input_weight:
        gradient = deltas[0] @ linears[0].weight
        found.append(torch.linalg.vector_norm(gradient, dim=1).square().mean())
        weight_grads[0] = (deltas[0] * (2 * input_weight / size)).t() @ gradient
        of_delta = (gradient @ linears[0].weight.t()).mul_(2 * input_weight / size)
    if param_weight:
        sizes, squares = _sizes_and_squares(h, deltas)
        found.append((sizes * squares).sum() / size)
        scaled_sizes = sizes.mul_(2 * param_weight / size).unsqueeze(2).unbind()
        scaled_squares = squares.mul_(2 * param_weight / size).unsqueeze(2).unbind()
    for t, delta in enumerate(deltas):
        if param_weight:
            of_delta = delta * scaled_sizes[t] if of_delta is None else of_delta.addcmul_(delta, scaled_sizes[t])
        assert of_delta is not None
        if t < last:
            pulled = _masked(of_delta, h[t + 1])
            weight_grads[t + 1] = deltas[t + 1].t() @ pulled
            of_delta = pulled @ linears[t + 1].weight.t()
    delta = cotangent / size
    if directions is None:  # the softmax depends on the outputs
        delta += softmax * (of_delta - torch.linalg.vecdot(softmax, of_delta).unsqueeze(1))
    gradients: list[Tensor] = []
    for t in range(last, -1, -1):
        known = weight_grads[t]
        gradients += [delta.sum(0), delta.t() @ h[t] if known is None else known.addmm_(delta.t(), h[t])]
        if t > 0:
            pushed = delta @ linears[t].weight
            delta = _masked(pushed.addcmul_(h[t], scaled_squares[t]) if param_weight else pushed, h[t])
    return Computed(torch.stack(found) if len(found) > 1 else found[0], gradients[::-1])


@torch.no_grad()
def sample_norms(work: Workload) -> Computed:
    """‖∇_θ f_i‖² of every sample beside a training step."""
    h, logits = _forward(work)
    deltas = _deltas(work, h, torch.softmax(logits, 1) - F.one_hot(work.y, logits.shape[1]))
    sizes, squares = _sizes_and_squares(h, deltas)
    gradients: list[Tensor] = []
    for inputs, delta in zip(h, deltas, strict=True):
        delta /= len(inputs)
        gradients += [delta.t() @ inputs, delta.sum(0)]
    return Computed((sizes * squares).sum(0), gradients)


def _forward(work: Workload) -> tuple[list[Tensor], Tensor]:
    """Inputs of the dense layers, ReLU written over what it is applied to, and the logits."""
    *hidden, last = work.linears
    h = [work.x]
    for linear in hidden:
        h.append(F.linear(h[-1], linear.weight, linear.bias).relu_())
    return h, F.linear(h[-1], last.weight, last.bias)


def _deltas(work: Workload, h: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """δ_t = (W_{t+1}ᵀ δ_{t+1}) · g'(z_t) for every layer, first to last."""
    deltas = [cotangent]
    for linear, following in zip(reversed(work.linears[1:]), reversed(h[1:]), strict=True):
        deltas.insert(0, _masked(deltas[0] @ linear.weight, following))
    return deltas


def _sizes_and_squares(h: list[Tensor], deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """1 + ‖h_t‖² and ‖δ_t‖² of all layers: (n, B) each."""
    norms = torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in (*h, *deltas)]).square_()
    return norms[: len(h)].add_(1), norms[len(h) :]


def _masked(cotangent: Tensor, h: Tensor) -> Tensor:
    """ReLU's derivative, written over the cotangent."""
    return torch.ops.aten.threshold_backward.grad_input(cotangent, h, 0, grad_input=cotangent)
