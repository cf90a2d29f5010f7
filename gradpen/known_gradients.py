"""Numbers whose gradients have been computed already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gradpen._numerics import is_at_hand


def with_gradients(value: Tensor, gradients: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    """`value` as a function of the sources, whose gradients are these.

    A backward pass hands them out, times its cotangent; then they belong to whoever got them, and no copy is made unless the
    graph is kept.

    Args:
        value: 0-dim, without a graph.
        gradients: ∂value/∂source, which nobody else writes to.
        sources: tensors that require grad.
    """
    return cast(Tensor, _Known.apply(value, gradients, *sources))


class _Known(torch.autograd.Function):
    """A constant that hands known gradients to its sources."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)  # autograd lets go of them after the backward pass, so that they need no copy
        ctx.sources = sources
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if not is_at_hand(grad_output) or grad_output != 1:
            scaled = [gradient * grad_output for gradient in ctx.saved_tensors]
        else:
            scaled = handed_out(ctx.saved_tensors)
        if torch.is_grad_enabled():  # create_graph=True: the gradients must not pass for constants
            scaled = derived_once(scaled, ctx.sources)
        return None, None, *scaled


def handed_out(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Saved gradients within a backward pass, for whoever asks: their own copies if another pass may ask again."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return [gradient.clone() for gradient in gradients]
    return list(gradients)


def derived_once(gradients: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
    """Known gradients with respect to `sources`, as functions of them whose derivatives nobody knows: asking is an error."""
    return [_DerivedOnce.apply(gradient, source) for gradient, source in zip(gradients, sources, strict=True)]


class _DerivedOnce(torch.autograd.Function):
    """A known gradient with respect to `source`, whose own derivative is not known."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the second derivative of this loss is not there: its gradient was computed together with the penalty. Call the "
            'objective without compiled(), use method="exact" with a weight > 0, or compute what is to be differentiated '
            "twice apart from the penalties"
        )
