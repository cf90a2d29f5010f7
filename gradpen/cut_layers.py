"""The dense layers that cut the graph between x and f, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradpen._graph import walk_graph
from gradpen._numerics import rounding_tolerance, sum_tensors, widest_row_sq_norm
from gradpen.dense_chain import DenseChain
from gradpen.recording import Call, Recording
from gradpen.report import ExcludedLayer
from gradpen.sides import Sides


@dataclass(frozen=True)
class CutLayer:
    """A dense layer in the sum."""

    name: str
    index: int
    call: Call
    weight: Tensor
    counts_weight: bool
    counts_bias: bool
    delta_sq_norms: Tensor  # (B,): ‖δ‖², scales included


def layers_in_sum(
    model: nn.Module,
    recording: Recording,
    sides: Sides,
    parameters: Mapping[str, Tensor],
    chain: DenseChain | None = None,
) -> tuple[list[CutLayer], list[ExcludedLayer]]:
    """The dense layers that cut the graph between x and f, and the reason for every other parameter's absence.

    Every layer of a chain that leads from x to the output cuts it; of all others it is found out.

    Raises:
        ValueError: if one of them computes in half precision.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    walk = walk_graph(recording.output)
    layers: list[CutLayer] = []
    excluded: dict[str, str] = {}
    reasons = {
        index: _reason_to_exclude(recording.calls[index], index, names, recording, sides, walk.leaf_edges)
        for index in sides.deltas[0]
    }
    in_chain = set() if chain is None else set(map(id, chain.weights))  # a weight of two calls has a reason already
    candidates = [
        index
        for index, reason in reasons.items()
        if reason is None and id(recording.calls[index].weight) not in in_chain
    ]
    for index in candidates:
        _check_precision(recording.calls[index], sides.deltas[0][index].dtype, names)
    if not _cut_graph(candidates, recording, sides):
        for index in candidates:
            if not _cut_graph([index], recording, sides):
                reasons[index] = "part of x's influence on f goes around it: ∇_x f is not (W J)ᵀ δ"
    layer_names = _layer_names(recording, list(reasons), names)
    for index, reason in reasons.items():
        call, name = recording.calls[index], layer_names[index]
        if reason is not None:
            excluded.setdefault(name, reason)
            continue
        assert call.weight is not None
        delta_sq_norms = sum_tensors(
            [
                scale**2 * widest_row_sq_norm(delta[index])
                for scale, delta in zip(sides.scales, sides.deltas, strict=True)
            ]
        )
        layers.append(
            CutLayer(
                name=name,
                index=index,
                call=call,
                weight=call.weight.detach(),
                counts_weight=call.weight.requires_grad,
                counts_bias=call.bias is not None and call.bias.requires_grad and id(call.bias) in names,
                delta_sq_norms=delta_sq_norms,
            )
        )
    seen = {id(p) for index in sides.deltas[0] for p in recording.calls[index][2:4]}
    for name, parameter in parameters.items():
        if id(parameter) not in seen:
            used = walk.leaf_edges[id(parameter)] > 0
            excluded[name] = "it is no weight or bias of a dense layer" if used else "the output does not depend on it"
    return layers, [ExcludedLayer(name, reason) for name, reason in excluded.items()]


def _layer_names(recording: Recording, indices: Sequence[int], names: Mapping[int, str]) -> dict[int, str]:
    """Call → name of the module that has its weight, or of the weight itself if the module has weights of several layers."""
    owners = {}
    for index in indices:
        call = recording.calls[index]
        known = [names[id(p)] for p in (call.weight, call.bias) if p is not None and id(p) in names]
        owners[index] = known[0] if known else f"{call.op} call {index}"
    modules = Counter(owner.rpartition(".")[0] for owner in set(owners.values()))
    return {
        index: owner if modules[owner.rpartition(".")[0]] > 1 else owner.rpartition(".")[0] or owner
        for index, owner in owners.items()
    }


def _reason_to_exclude(
    call: Call,
    index: int,
    names: Mapping[int, str],
    recording: Recording,
    sides: Sides,
    edges: Mapping[int, int],
) -> str | None:
    """Why a call is not in the sum, or None if it is, provided that it cuts the graph."""
    if call.op == "conv":
        return "a convolution applies its weight at many positions, whose gradients can cancel"
    if call.op != "linear":
        unknown = (
            "this embedding, F.linear with a vector or a broadcast bias, or layer with a weight of a type of its own,"
        )
        return f"{call.op or unknown} is no dense layer"
    assert call.weight is not None
    if call.input.dim() != 2:
        return f"its input has shape {tuple(call.input.shape)}, and only (B, n), one row per sample, is counted"
    if index in sides.mixed or call.input.shape[0] != recording.output.shape[0]:
        return "its rows are not one for every sample"
    if id(call.weight) not in names:
        return "its weight is computed from other parameters"
    trainable = [p for p in (call.weight, call.bias) if p is not None and p.requires_grad and id(p) in names]
    if not trainable:
        return "its weight and bias are frozen (or the bias is computed), so it has no term on either side"
    if any(edges[id(p)] > 1 for p in trainable):
        return "its weight or bias is used more than once, so their gradients are sums in which terms can cancel"
    return None if _depends_on(call.input, recording.inputs) else "its input does not depend on x"


def _depends_on(tensor: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether there is a path from an input to the tensor in the graph. That gradients vanish (dead units) shows nothing."""
    if any(tensor is one for one in inputs):
        return True
    walk = walk_graph(tensor)
    return any(id(one) in walk.leaves or one.grad_fn in walk.nodes for one in inputs)


def _check_precision(call: Call, dtype: torch.dtype, names: Mapping[int, str]) -> None:
    """Autocast within the model, which nobody can switch off from outside, computes a layer in half precision.

    Raises:
        ValueError: if it does.
    """
    assert call.weight is not None
    if dtype != call.weight.dtype:
        raise ValueError(
            f"expected the layer of {names[id(call.weight)]!r} to compute in {call.weight.dtype}, as its weight is, but its "
            f"output is {dtype}: norms in a denominator need the precision. Does the model's forward switch autocast on? "
            "Let it take an argument that leaves it off"
        )


def _cut_graph(indices: Sequence[int], recording: Recording, sides: Sides) -> bool:
    """The identity ∇_x f = (W_t J_t)ᵀ δ_t, for every sample, direction and call, by one backward pass for all calls.

    Each call counts with a factor of its own, so that what two of them lack does not cancel.
    """
    if not indices:
        return True
    inputs = [recording.calls[index].checked_input() for index in indices]
    factors = [1 + 1 / number for number in range(1, len(indices) + 1)]
    for expected, deltas in zip(sides.input_gradients, sides.deltas, strict=True):
        cotangents = [
            factor * deltas[index] @ _weight_of(recording.calls[index])
            for factor, index in zip(factors, indices, strict=True)
        ]
        parts = torch.autograd.grad(inputs, recording.inputs, cotangents, retain_graph=True, allow_unused=True)
        through_layers = torch.cat(
            [
                (torch.zeros_like(tensor) if part is None else part).reshape(len(expected), -1)
                for tensor, part in zip(recording.inputs, parts, strict=True)
            ],
            1,
        )
        error = torch.linalg.vector_norm(through_layers - sum(factors) * expected, dim=1)
        allowed = rounding_tolerance(expected) * torch.linalg.vector_norm(expected, dim=1)
        if bool((error > allowed).any()):
            return False
    return True


def cotangents_of_input(layer: CutLayer, sides: Sides) -> list[Tensor]:
    """W_tᵀ δ_t, what ∇_x f is J_tᵀ times of: (B, n) for every direction."""
    return [deltas[layer.index] @ layer.weight for deltas in sides.deltas]


def _weight_of(call: Call) -> Tensor:
    assert call.weight is not None
    return call.weight.detach()
