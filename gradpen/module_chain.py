"""Models that are known to be chains of dense layers before they run: torch's own modules one behind the other.

The forward pass of such a model needs no graph and no modules. It is the quickest way to a chain; all other models are run
as they are, and `dense_chain` reads from the graph what they did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpen._checks import has_global_hooks, is_changed
from gradpen._layout import affine, by_feature, pays_by_feature
from gradpen.dense_chain import KINDS, DenseChain, Elementwise, are_layers, is_ordinary_call

# how a module's function is called in the graph, and its other arguments
ACTIVATIONS: dict[type[nn.Module], tuple[str, Callable[[Any], tuple[Any, ...]]]] = {
    nn.ReLU: ("ReluBackward0", lambda _: ()),
    nn.LeakyReLU: ("LeakyReluBackward0", lambda module: (module.negative_slope,)),
    nn.Tanh: ("TanhBackward0", lambda _: ()),
    nn.Sigmoid: ("SigmoidBackward0", lambda _: ()),
    nn.GELU: ("GeluBackward0", lambda module: (module.approximate,)),
    nn.SiLU: ("SiluBackward0", lambda _: ()),
    nn.Softplus: ("SoftplusBackward0", lambda module: (module.beta, module.threshold)),
    nn.ELU: ("EluBackward0", lambda module: (module.alpha, 1.0, 1.0)),
}
_FORWARDS: dict[Any, Any] = {  # as torch wrote them, whoever may have changed them since
    kind: getattr(kind, "forward")
    for kind in (*ACTIVATIONS, nn.Sequential, nn.Flatten, nn.Identity, nn.Linear, nn.Dropout)
}


class _Between(NamedTuple):
    """What lies between two dense layers."""

    function: Elementwise = Elementwise()
    dropout: float = 0.0  # the probability of 0

    @property
    def is_nothing(self) -> bool:
        return self == _NOTHING


def run_chain(model: nn.Module, x: Any, *, keep_first: bool = False) -> DenseChain | None:
    """The forward pass without a graph, or None, and nothing has happened, if it is not evident that the model is a chain.

    It is evident of nested nn.Sequential of nn.Linear, activations and dropout, perhaps behind nn.Flatten, with nothing in
    it frozen, hooked, patched, compiled or used twice.

    Args:
        model: any module.
        x: what it is given.
        keep_first: keep z_1, of which a pass with other parameters can be made at less cost.
    """
    is_plain = type(x) is Tensor and x.layout == torch.strided and not x.requires_grad and not x.is_inference()
    if not is_plain or x.dim() < 2:
        return None
    if not is_ordinary_call(x.device) or has_global_hooks():
        return None
    plan = _plan(model, is_flat=x.dim() == 2)
    if plan is None:
        return None
    weights, biases, between = plan
    if not are_layers(weights, biases) or weights[0].dtype != x.dtype:
        return None
    with torch.no_grad():
        return _run(x if x.dim() == 2 else x.flatten(1), weights, biases, between, keep_first)


def _plan(model: nn.Module, *, is_flat: bool) -> tuple[list[Tensor], list[Tensor | None], list[_Between]] | None:
    """Weights, biases, and what follows each layer but the last; None unless all modules do what torch wrote, no more."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    between: list[_Between] = []
    behind = _NOTHING  # the last dense layer so far
    pending: list[Any] = [model]
    while pending:
        module = pending.pop()
        kind = type(module)
        if kind not in _FORWARDS or kind.forward is not _FORWARDS[kind] or is_changed(module):
            return None
        if kind is nn.Sequential:
            pending += reversed(module._modules.values())
        elif kind is nn.Linear:
            weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
            if weight is None or not vars(module).keys().isdisjoint(("weight", "bias")):
                return None  # somebody has put other tensors in their place
            if weights:
                between.append(behind)
            weights.append(weight)
            biases.append(bias)
            behind = _NOTHING
        elif kind is nn.Flatten and not weights and (module.start_dim, module.end_dim) == (1, -1):
            is_flat = True
        elif kind is nn.Dropout and weights and behind.dropout == 0:
            behind = behind._replace(dropout=module.p if module.training else 0.0)
        elif kind in ACTIVATIONS and weights and behind.is_nothing:
            name, options = ACTIVATIONS[kind]
            behind = _Between(Elementwise(KINDS[name], options(module)))
        elif kind is not nn.Identity:
            return None
    return (weights, biases, between) if weights and is_flat and behind.is_nothing else None


_NOTHING = _Between()


def _run(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    between: Sequence[_Between],
    keep_first: bool,
) -> DenseChain:
    hidden: list[Tensor] = [h]
    done: list[Elementwise] = []
    lies = pays_by_feature(h, weights)
    z = affine(h, weights[0], biases[0], by_feature=lies)
    first = z if keep_first else None
    for t, (elementwise, dropout) in enumerate(between, start=1):
        if dropout > 0:
            factor = F.dropout(z.new_ones(z.shape), dropout)  # the model's own mask, which is drawn row by row
            elementwise = elementwise._replace(factor=by_feature(factor) if lies else factor)
        h, elementwise = elementwise.at(z) if z is first else elementwise.at_own(z)
        done.append(elementwise)
        hidden.append(h)
        is_last = t == len(between)
        z = affine(h.contiguous() if is_last else h, weights[t], biases[t], by_feature=lies and not is_last)
    return DenseChain(tuple(weights), tuple(biases), tuple(hidden), tuple(done), z, first)
