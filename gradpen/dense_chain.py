"""Models that are dense layers with elementwise functions between them, read from the graph of their output.

The graph says what a model computed, however it is written: as nn.Sequential, as a module with a forward of its own, or in
functions. Where anything else is found, or anything that this file does not know, the model is no chain of dense layers, and
its gradients are left to autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from gradpen._graph import VIEW_NODES
from gradpen._layout import affine, lies_by_feature

aten = torch.ops.aten
_threshold_backward, _threshold_backward_into = aten.threshold_backward.default, aten.threshold_backward.grad_input


@dataclass(frozen=True)
class Kind:
    """An elementwise function g as autograd knows it.

    Attributes:
        saved: attribute of its node that holds a tensor: "_saved_result" (g(z)) or "_saved_self" (z).
        options: attributes that hold its other arguments, as `value` takes them.
        value: (z, *options) → g(z).
        backward: (cotangent, saved tensor, *options) → cotangent ⊙ g'(z), which autograd can differentiate.
        backward_into: the same, written over the cotangent.
        value_into: the value, written over z, if it is the result that is saved.
        piecewise_linear: g'' = 0 wherever it exists.
        is_mask: g' is 0 or 1, so that to multiply by it once more changes nothing.
        in_backward: the same function for the backward pass, if it is another.
    """

    saved: str
    options: tuple[str, ...]
    value: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    backward_into: Callable[..., Tensor] | None = None
    value_into: Callable[..., Tensor] | None = None
    piecewise_linear: bool = False
    is_mask: bool = False
    in_backward: Kind | None = None


def _relu_backward(cotangent: Tensor, result: Tensor) -> Tensor:
    return _threshold_backward(cotangent, result, 0)


def _relu_backward_into(cotangent: Tensor, result: Tensor) -> Tensor:
    return _threshold_backward_into(cotangent, result, 0, grad_input=cotangent)


def _leaky_relu_backward(cotangent: Tensor, z: Tensor, slope: float) -> Tensor:
    return aten.leaky_relu_backward(cotangent, z, slope, False)


def _gelu(z: Tensor, approximate: str) -> Tensor:
    return F.gelu(z, approximate=approximate)


def _gelu_backward(cotangent: Tensor, z: Tensor, approximate: str) -> Tensor:
    return aten.gelu_backward(cotangent, z, approximate=approximate)


def _silu_backward(cotangent: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return aten.silu_backward(cotangent, z)
    sigmoid = z.sigmoid()  # torch has no derivative of its kernel
    return cotangent * sigmoid * (1 + z * (1 - sigmoid))


def _elu(z: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    return aten.elu(z, alpha, scale, input_scale)


def _elu_backward(cotangent: Tensor, z: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    return aten.elu_backward(cotangent, alpha, scale, input_scale, False, z)


KINDS: dict[str, Kind] = {  # by the name of the node
    "ReluBackward0": Kind(
        *("_saved_result", (), F.relu, _relu_backward, _relu_backward_into, torch.relu_),
        piecewise_linear=True,
        is_mask=True,
    ),
    "LeakyReluBackward0": Kind(
        "_saved_self", ("_saved_negative_slope",), F.leaky_relu, _leaky_relu_backward, piecewise_linear=True
    ),
    "TanhBackward0": Kind("_saved_result", (), torch.tanh, aten.tanh_backward, value_into=torch.tanh_),
    "SigmoidBackward0": Kind("_saved_result", (), torch.sigmoid, aten.sigmoid_backward, value_into=torch.sigmoid_),
    "GeluBackward0": Kind("_saved_self", ("_saved_approximate",), _gelu, _gelu_backward),
    "SiluBackward0": Kind("_saved_self", (), F.silu, _silu_backward),
    "SoftplusBackward0": Kind("_saved_self", ("_saved_beta", "_saved_threshold"), F.softplus, aten.softplus_backward),
    "EluBackward0": Kind("_saved_self", ("_saved_alpha", "_saved_scale", "_saved_input_scale"), _elu, _elu_backward),
}


def may_overwrite() -> bool:
    """Whether a tensor that is not needed any more may be written over: nobody differentiates or batches the operation."""
    return not torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None


class Elementwise(NamedTuple):
    """h = factor ⊙ g(z): what lies between two dense layers, or nothing at all."""

    kind: Kind | None = None  # None: g(z) = z
    options: tuple[Any, ...] = ()
    saved: Tensor | None = None  # `Kind.saved`, (B, n)
    factor: Tensor | None = None  # a constant such as a mask of dropout, that can be broadcast to (B, n)

    def without_tensors(self) -> Elementwise:
        """The function without what it saved, for the backward pass."""
        return Elementwise(self.kind and (self.kind.in_backward or self.kind), self.options)

    @property
    def is_curved(self) -> bool:
        """Whether g'' is other than 0 anywhere."""
        return self.kind is not None and not self.kind.piecewise_linear

    @property
    def is_mask(self) -> bool:
        """Whether `pull` changes nothing in what it has given."""
        return self.kind is not None and self.kind.is_mask and self.factor is None

    def at(self, z: Tensor) -> tuple[Tensor, Elementwise]:
        """h at another z, and the same function there."""
        if self.kind is None:
            return z if self.factor is None else z * self.factor, self
        return self._with(self.kind.value(z, *self.options), z)

    def at_own(self, z: Tensor) -> tuple[Tensor, Elementwise]:
        """`at` a z that nobody else has or wants: its memory is used again where that can be."""
        if self.kind is None or self.kind.value_into is None or not may_overwrite():
            return self.at(z)
        return self._with(self.kind.value_into(z, *self.options), z)

    def _with(self, result: Tensor, z: Tensor) -> tuple[Tensor, Elementwise]:
        """h and the same function where g(z) is `result`."""
        there = Elementwise(self.kind, self.options, result if self._saves_result else z, self.factor)
        return result if self.factor is None else result * self.factor, there

    def pull(self, cotangent: Tensor, of_saved: Tensor | None = None) -> Tensor:
        """The cotangent of z from that of h, and from that of the saved tensor if there is one."""
        if self.factor is not None:
            cotangent = cotangent * self.factor
        if of_saved is not None and self._saves_result:
            cotangent, of_saved = cotangent + of_saved, None
        if self.kind is not None:
            cotangent = self.kind.backward(cotangent, self.saved, *self.options)
        return cotangent if of_saved is None else cotangent + of_saved

    def pull_into(self, cotangent: Tensor, of_saved: Tensor | None = None) -> Tensor:
        """`pull` of a cotangent that nobody else has or wants: its memory is used again where that can be."""
        plain = self.factor is None and of_saved is None
        if plain and may_overwrite() and self.kind is not None and self.kind.backward_into is not None:
            return self.kind.backward_into(cotangent, self.saved, *self.options)
        return self.pull(cotangent, of_saved)

    def of_saved(self, cotangent: Tensor, pulled_cotangent: Tensor) -> Tensor:
        """The cotangent of the saved tensor from that of ``pull(cotangent)``: here g'' comes in."""
        assert self.kind is not None
        assert self.saved is not None
        create_graph = torch.is_grad_enabled()
        scaled = cotangent if self.factor is None else cotangent * self.factor
        with torch.enable_grad():  # an alias: `cotangent`, too, may depend on what was saved
            saved = self.saved.view_as(self.saved) if create_graph else self.saved.detach().requires_grad_()
            pulled = self.kind.backward(scaled, saved, *self.options)
            (found,) = torch.autograd.grad(pulled, saved, pulled_cotangent, create_graph=create_graph)
        return found

    @property
    def _saves_result(self) -> bool:
        return self.kind is not None and self.kind.saved == "_saved_result"


class DenseChain(NamedTuple):
    """A model as a list of dense layers, t = 1 … n.

    Attributes:
        weights: W_t, (n_t, n_{t−1}), leaves.
        biases: b_t, (n_t,), leaves, or None.
        hidden: h_t, (B, n_{t−1}); h_1 is the input.
        between: what makes h_{t+1} of z_t, for t < n.
        output: z_n, (B, n_n), with the model's graph if there is one.
        first: z_1, (B, n_1), if it was kept.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    hidden: tuple[Tensor, ...]
    between: tuple[Elementwise, ...]
    output: Tensor
    first: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """All weights and then all biases."""
        return [leaf for leaf in (*self.weights, *self.biases) if leaf is not None]

    @property
    def rows(self) -> list[Sequence[Tensor | None]]:
        """All tensors but the output, which others may change."""
        saved, factors = [between.saved for between in self.between], [between.factor for between in self.between]
        return [self.weights, self.biases, self.hidden, saved, factors]

    @classmethod
    def of_rows(cls, rows: Iterator[Any], like: Sequence[Elementwise]) -> DenseChain:
        """From `rows` and the same functions elsewhere; the output is empty."""
        weights, biases, hidden, saved, factors = itertools.islice(rows, 5)
        between = [Elementwise(one.kind, one.options, *at) for one, *at in zip(like, saved, factors, strict=True)]
        return cls(weights, biases, hidden, tuple(between), hidden[0].new_empty(0))

    def with_parameters(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], first: Tensor | None = None
    ) -> DenseChain:
        """The same layers on the same input with other weights and biases; factors stay as they are.

        Args:
            weights: of all layers.
            biases: of all layers.
            first: z_1 of these, if it is known; W_1 is not looked at then.
        """
        by_feature = [*[lies_by_feature(h) for h in self.hidden[1:]], False]
        z = affine(self.hidden[0], weights[0], biases[0], by_feature=by_feature[0]) if first is None else first
        hidden, between = [self.hidden[0]], []
        for t, elementwise in enumerate(self.between, start=1):
            h, there = elementwise.at_own(z)
            hidden.append(h)
            between.append(there)
            z = affine(h if by_feature[t] else h.contiguous(), weights[t], biases[t], by_feature=by_feature[t])
        return DenseChain(tuple(weights), tuple(biases), tuple(hidden), tuple(between), z)


def read_chain(output: Any, entry: Tensor | None) -> DenseChain | None:
    """The dense layers that an output was computed by, or None if anything else took part.

    Args:
        output: of a model, with its graph.
        entry: the input, if a gradient with respect to it is wanted: an alias that requires grad, (B, …). The first dense
            layer is then to be given this input, flattened or not.
    """
    if not _is_plain(output):
        return None
    weights, biases, hidden, between = [], [], [], []
    node = output.grad_fn
    while True:
        layer = _read_dense(node)
        if layer is None:
            return None
        weight, bias, h, behind = layer
        weights.append(weight)
        biases.append(bias)
        hidden.append(h)
        if behind is None or _leads_to(behind, entry):
            break
        elementwise, node = _read_elementwise(behind)
        if node is None:
            return None
        between.append(elementwise)
    chain = DenseChain(
        tuple(reversed(weights)), tuple(reversed(biases)), tuple(reversed(hidden)), tuple(reversed(between)), output
    )
    return chain if _fits_together(chain, entry) and (entry is None) == (behind is None) else None


def _is_plain(output: Any) -> bool:
    return (
        isinstance(output, Tensor)
        and _is_of_torch(output)
        and output.dim() == 2
        and output.dtype in (torch.float32, torch.float64)
        and output.grad_fn is not None
        and not output._backward_hooks
        and not output.retains_grad
        and is_ordinary_call(output.device)
    )


def is_ordinary_call(device: torch.device) -> bool:
    """Outside of autocast, which casts in products, and of what knows no nodes of one's own: torch.func, forward mode."""
    return (
        not torch.is_autocast_enabled(device.type)
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def are_layers(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Trainable leaves of one type, float32 or float64, none of them twice, each in the shape of a dense layer's."""
    dtype = weights[0].dtype
    if dtype not in (torch.float32, torch.float64):
        return False
    seen = set()
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2 or not (bias is None or bias.shape == weight.shape[:1]):
            return False
        for leaf in (weight,) if bias is None else (weight, bias):
            if not (_is_of_torch(leaf) and leaf.is_leaf and leaf.requires_grad and leaf.dtype == dtype):
                return False
            if id(leaf) in seen:
                return False
            seen.add(id(leaf))
    return True


def _is_of_torch(tensor: Tensor) -> bool:
    """Not of a subclass with a mind of its own, such as the pieces of a tensor that other processes hold, too."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return True
    module = type(tensor).__module__
    return module == "torch" or (module.startswith("torch.") and not module.startswith("torch.distributed"))


def _read_dense(node: Any) -> tuple[Tensor, Tensor | None, Tensor, Any] | None:
    """Weight, bias, input, and the node behind the input, of z = h Wᵀ + b."""
    kind, behind = type(node).__name__, [parent for parent, _ in node.next_functions]
    if kind == "AddmmBackward0" and (node._saved_alpha, node._saved_beta) == (1, 1):
        (bias, before, transposed), saved = behind, "_saved_mat1"
    elif kind == "MmBackward0":
        (before, transposed), bias, saved = behind, _NO_BIAS, "_saved_self"
    elif kind == "_EntryLinearBackward":
        (before, weight, bias), saved = (*behind, _NO_BIAS)[:3], None
    else:
        return None
    if kind != "_EntryLinearBackward":
        weight = transposed.next_functions[0][0] if type(transposed).__name__ == "TBackward0" else None
    if not _is_leaf(weight) or not (bias is _NO_BIAS or _is_leaf(bias)):  # a frozen one has no node
        return None
    h = node.saved_tensors[0] if saved is None else _saved(node, saved)
    if h is None or h._backward_hooks or h.retains_grad:
        return None
    return weight.variable, None if bias is _NO_BIAS else bias.variable, h, before


_NO_BIAS = object()


def _read_elementwise(node: Any) -> tuple[Elementwise, Any]:
    """What lies between a dense layer and the one before it, and that one's node; None for what is not known."""
    found = Elementwise()
    if type(node).__name__ == "MulBackward0":
        behind = [parent for parent, _ in node.next_functions]
        if None not in behind:
            return found, None
        factor = _saved(node, "_saved_other" if behind[1] is None else "_saved_self")
        if factor is None:
            return found, None
        found, node = found._replace(factor=factor), behind[0] or behind[1]
    elif type(node).__name__ == "NativeDropoutBackward0":  # one kernel: on a GPU
        if (mask := _saved(node, "_saved_result1")) is None:
            return found, None
        with torch.no_grad():  # what the node makes of ones; it tells p, but not whether anything is dropped at all
            factor = node(torch.ones_like(mask, dtype=node._input_metadata[0].dtype))
        found, node = found._replace(factor=factor), node.next_functions[0][0]
    kind = KINDS.get(type(node).__name__)
    if kind is not None:
        saved = _saved(node, kind.saved)
        if saved is None or saved._backward_hooks:
            return found, None
        options = tuple([getattr(node, name) for name in kind.options])
        found, node = found._replace(kind=kind, options=options, saved=saved), node.next_functions[0][0]
    return found, node


def _saved(node: Any, name: str) -> Tensor | None:
    """A tensor that a node has kept; None if it was put away, or changed in place, of which autograd will say more."""
    raw = getattr(node, f"_raw{name}")
    if getattr(raw, "unpack_hook", None) is not None:  # a checkpoint or offloading, for which there is a reason
        return None
    try:
        return getattr(node, name)
    except RuntimeError:
        return None


def _is_leaf(node: Any) -> bool:
    return type(node).__name__ == "AccumulateGrad"


def _leads_to(node: Any, entry: Tensor | None) -> bool:
    """Whether nothing but views lies between a layer's input and the model's."""
    while type(node).__name__ in VIEW_NODES:
        node = node.next_functions[0][0]
    return entry is not None and _is_leaf(node) and node.variable is entry


def _fits_together(chain: DenseChain, entry: Tensor | None) -> bool:
    """Nothing broadcast, no leaf used twice, one row a sample."""
    rows = chain.output.shape[0]
    return (
        are_layers(chain.weights, chain.biases)
        and all(h.layout == torch.strided and len(h) == rows for h in chain.hidden)
        and all(
            between.factor is None or h.shape[1] == len(weight)
            for weight, between, h in zip(chain.weights, chain.between, chain.hidden[1:], strict=False)
        )
        and (entry is None or entry.shape[:1] == (rows,))
    )
