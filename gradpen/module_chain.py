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
from torch.nn.modules import module as torch_module

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

    activation: nn.Module | None = None
    dropout: nn.Dropout | None = None


def run_chain(model: nn.Module, x: Any) -> DenseChain | None:
    """The forward pass without a graph, or None, and nothing has happened, if it is not evident that the model is a chain.

    It is evident of nested nn.Sequential of nn.Linear, activations and dropout, perhaps behind nn.Flatten, with nothing in
    it frozen, hooked, patched, compiled or used twice.
    """
    is_plain = type(x) is Tensor and x.layout == torch.strided and not x.requires_grad and not x.is_inference()
    if not is_plain or x.dim() < 2:
        return None
    if not is_ordinary_call(x.device) or any(_GLOBAL_HOOKS):
        return None
    modules = _plain_modules(model)
    plan = None if modules is None else _plan(modules, x)
    if plan is None:
        return None
    layers, between = plan
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if not are_layers(weights, biases) or weights[0].dtype != x.dtype:
        return None
    with torch.no_grad():
        return _run(x if x.dim() == 2 else x.flatten(1), weights, biases, between)


_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def _plain_modules(model: nn.Module) -> list[Any] | None:
    """The modules that compute something, in their order, if all of them do what torch wrote and nothing else."""
    pending: list[Any] = [model]
    found: list[Any] = []
    while pending:
        module = pending.pop()
        kind = type(module)
        if kind.forward is not _FORWARDS.get(kind) or _is_changed(module):
            return None
        if kind is nn.Sequential:
            pending += reversed(list(module._modules.values()))
        else:
            found.append(module)
    return found


def _is_changed(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or module._compiled_call_impl is not None
    )


def _plan(modules: Sequence[Any], x: Tensor) -> tuple[list[nn.Linear], list[_Between]] | None:
    """The dense layers, and what follows each of them but the last; None if that is anything else."""
    layers: list[nn.Linear] = []
    between: list[_Between] = []
    behind = _Between()  # the last dense layer so far
    flat = x.dim() == 2
    for module in modules:
        kind = type(module)
        if kind is nn.Linear:
            if layers:
                between.append(behind)
            layers.append(module)
            behind = _Between()
        elif kind is nn.Flatten and not layers and (module.start_dim, module.end_dim) == (1, -1):
            flat = True
        elif kind is nn.Dropout and layers and behind.dropout is None:
            behind = behind._replace(dropout=module)
        elif kind in ACTIVATIONS and layers and behind == _Between():
            behind = _Between(activation=module)
        elif kind is not nn.Identity:
            return None
    return (layers, between) if layers and flat and behind == _Between() else None


def _run(
    h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], between: Sequence[_Between]
) -> DenseChain:
    hidden: list[Tensor] = []
    done: list[Elementwise] = []
    for weight, bias, (activation, dropout) in zip(weights, biases, (*between, _Between()), strict=True):
        hidden.append(h)
        z = F.linear(h, weight, bias)
        if len(hidden) == len(weights):
            break
        elementwise = Elementwise()
        if activation is not None:
            name, options = ACTIVATIONS[type(activation)]
            elementwise = Elementwise(KINDS[name], options(activation))
        if dropout is not None and dropout.training and dropout.p > 0:
            elementwise = elementwise._replace(factor=F.dropout(torch.ones_like(z), dropout.p))  # the model's own mask
        h, elementwise = elementwise.at(z)
        done.append(elementwise)
    return DenseChain(tuple(weights), tuple(biases), tuple(hidden), tuple(done), z)
