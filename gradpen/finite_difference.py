"""‖∇f‖² as a scalar whose gradient needs first derivatives only.

With g = ∇L (detached), u = g/‖g‖ and a step r,

    D = (L(θ + r u) − L(θ)) / r,      ∇D = (∇L(θ + r u) − ∇L(θ)) / r  →  ∇‖∇L‖   as r → 0,

so ‖g‖ + (D − D.detach()) has the value ‖g‖ exactly and D's gradient; its square has 2‖g‖ ∇D → ∇‖∇L‖². Across ReLU kinks
the difference quotient does not converge to the exact penalty's gradient: it is another regulariser there
(Karakida, Takase, Hayase and Osawa 2023, arXiv 2210.02720).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradpen._graph import GraphWalk, differentiate, edge_of, reached_around, walk_graph
from gradpen._numerics import divide_or_zero, row_sq_norm, total_sq_norm
from gradpen.known_gradients import with_gradients
from gradpen.recording import call_with, float_tensors, map_floats

SCHEMES = ("forward", "backward", "central")

ScalarFn = Callable[[Any], Tensor]  # the model's output → f, (B,)
Replay = Callable[[], contextlib.AbstractContextManager[None]]  # `RngState.replayed`


class KnownGradient(NamedTuple):
    """A scalar whose gradient is known already, so that no later backward pass computes it again."""

    loss: Tensor  # 0-dim, of the same value and gradient
    gradient_of: dict[int, Tensor]  # id(leaf) → ∂loss/∂leaf
    along: list[Tensor | None]  # gradients at other places of the graph, from the same backward pass

    def of(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name → ∂loss/∂parameter, for those that the loss depends on."""
        return {name: self.gradient_of[id(p)] for name, p in parameters.items() if id(p) in self.gradient_of}


def input_norm(
    model: nn.Module,
    x: Any,
    f: Tensor,
    scalar: ScalarFn,
    inputs: Sequence[Tensor],
    *,
    scheme: str,
    step: float,
    replay: Replay,
    buffers: Mapping[str, Tensor] | None = None,
    create_graph: bool = True,
) -> Tensor:
    """‖∇_x f_i‖, differentiable to first order: (B,).

    Args:
        model: the model.
        x: the input that `inputs` are the floating-point tensors of.
        f: one scalar a sample, (B,), of the forward pass from `inputs`.
        scalar: the model's output → f.
        inputs: tensors that f was computed from, requiring grad.
        scheme: "forward", "backward" or "central".
        step: length r of the displacement of every sample.
        replay: a context in which the random numbers of the forward pass that gave f are drawn again.
        buffers: the model's before that pass, if not as they are now.
        create_graph: make it differentiable; the value needs no displacement.
    """
    gradients = differentiate(f.sum(), list(inputs))
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True)]
    norm = torch.stack([row_sq_norm(gradient) for gradient in found]).sum(0).sqrt()
    if not create_graph:
        return norm
    directions = [divide_or_zero(g, norm.reshape(-1, *[1] * (g.dim() - 1)).to(g.dtype)) for g in found]

    def displaced(signed_step: float) -> Tensor:
        given = float_tensors(x)  # as the user gave them: no gradient flows where none was asked for
        moved = iter([tensor + signed_step * u for tensor, u in zip(given, directions, strict=True)])
        with replay():
            value: Tensor = call_with(model, {}, map_floats(x, lambda _: next(moved)), buffers, scalar)
            return value

    return _norm_with_gradient(norm, _difference_quotient(displaced, f, scheme, step))


def param_norm(
    model: nn.Module,
    x: Any,
    loss: Tensor,
    gradients: Mapping[str, Tensor],
    scalar: ScalarFn,
    parameters: Mapping[str, Tensor],
    *,
    scheme: str,
    step: float,
    replay: Replay,
    buffers: Mapping[str, Tensor] | None = None,
    create_graph: bool = True,
) -> Tensor:
    """‖∇_θ L‖ for L = mean_i f_i, differentiable to first order: 0-dim.

    Args:
        model: the model.
        x: its input.
        loss: L at θ, whose gradient in θ may be a known one (`with_known_gradient`).
        gradients: name → ∂L/∂θ, for the parameters that L depends on.
        scalar: the model's output → f.
        parameters: name → parameter, those that the norm is taken over.
        scheme: "forward", "backward" or "central".
        step: length r of the displacement, so that ε = r/‖∇_θ L‖.
        replay: a context in which the random numbers of the forward pass that gave L are drawn again.
        buffers: the model's before that pass, if not as they are now.
        create_graph: make it differentiable; the value needs no displacement.

    Raises:
        RuntimeError: if L depends on a parameter that the model's forward pass is not alone to use.
    """
    if not gradients:
        return loss.new_zeros(())
    norm = total_sq_norm(list(gradients.values())).sqrt()
    if not create_graph:
        return norm
    inverse = divide_or_zero(torch.ones_like(norm), norm)

    def displaced(signed_step: float) -> Tensor:
        moved = {
            name: torch.addcmul(parameters[name], _dense(gradient), (signed_step * inverse).to(gradient.dtype))
            for name, gradient in gradients.items()
        }

        def derived(output: Any) -> Tensor:  # while the parameters are displaced: checkpoints run the model again
            value = scalar(output).mean()
            _check_displaced(reached_around(value, parameters, list(moved.values())))
            return with_known_gradient(value, x).loss

        with replay():
            if torch.compiler.is_compiling():
                return scalar(call_with(model, moved, x, buffers)).mean()
            found: Tensor = call_with(model, moved, x, buffers, derived)
            return found

    return _norm_with_gradient(norm, _difference_quotient(displaced, loss, scheme, step))


def _dense(gradient: Tensor) -> Tensor:
    """nn.Embedding(sparse=True) has sparse gradients."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _difference_quotient(displaced: Callable[[float], Tensor], here: Tensor, scheme: str, step: float) -> Tensor:
    match scheme:
        case "forward":
            return (displaced(step) - here) / step
        case "backward":
            return (here - displaced(-step)) / step
    return (displaced(step) - displaced(-step)) / (2 * step)


def _check_displaced(around: Sequence[str]) -> None:
    """A finite difference is that of the whole f only if f sees nothing but the displaced parameters."""
    if around:
        raise RuntimeError(
            f"expected {', '.join(around)} to be used by the modules of the model alone, but the criterion, or what is no "
            'part of the model, uses them too, and a finite difference cannot displace them there: use method="exact", '
            "which counts every use, or leave them out with parameters=…"
        )


def _norm_with_gradient(norm: Tensor, quotient: Tensor) -> Tensor:
    """The value of the first, the gradient of the second; no gradient where the norm is 0."""
    quotient = torch.where(norm > 0, quotient, 0.0)
    return norm + (quotient - quotient.detach())


def with_known_gradient(
    loss: Tensor, x: Any, along: Sequence[Any] = (), walk: GraphWalk | None = None
) -> KnownGradient:
    """`loss` with its gradient computed now.

    Args:
        loss: 0-dim, with its graph.
        x: what the model was given; where it requires grad, the graph behind it is left to the later backward pass, unless
            the loss depends on what is behind it in other ways, too.
        along: other places of the graph at which the gradient is wanted; leaves among them get none of it later.
        walk: that of the graph of `loss`, or of what it is the mean of, if it is known.
    """
    boundary = [tensor for tensor in float_tensors(x) if tensor.requires_grad]
    not_later = {id(place) for place in along}
    behind = [tensor.grad_fn for tensor in boundary if tensor.grad_fn is not None]
    if behind:
        beside = walk_graph(loss, stop_at=behind)
        if _are_functions_of_others(boundary, beside):  # whose gradients, computed now, have gone through x already
            boundary, walk = [], walk_graph(loss)
        else:
            walk = beside
    elif walk is None:
        walk = walk_graph(loss)
    leaves = [leaf for leaf in walk.leaves.values() if id(leaf) not in not_later]
    sources = list({id(tensor): tensor for tensor in (*leaves, *boundary)}.values())
    places: list[Any] = [*sources, *along]
    gradients = differentiate(loss, places)
    used = [(source, g) for source, g in zip(sources, gradients, strict=False) if g is not None]
    replayed = with_gradients(loss.detach(), [g for _, g in used], [source for source, _ in used])
    return KnownGradient(replayed, {id(source): g for source, g in used}, list(gradients[len(sources) :]))


def _are_functions_of_others(boundary: Sequence[Tensor], beside: GraphWalk) -> bool:
    """Whether one of the tensors was computed from another, or from a leaf that the loss depends on beside them."""
    nodes = {edge_of(tensor).node for tensor in boundary}
    return any(
        not beside.leaves.keys().isdisjoint(behind.leaves) or nodes & (behind.nodes - {tensor.grad_fn})
        for tensor in boundary
        for behind in [walk_graph(tensor)]
    )
