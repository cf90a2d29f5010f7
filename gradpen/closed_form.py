"""Squared norms of per-sample parameter gradients from layer inputs h and output gradients δ.

For a dense layer z = W h + b the gradient of sample i is ∂f_i/∂W = δ_i h_iᵀ and ∂f_i/∂b = δ_i, so that

    ‖∇_W f_i‖² = ‖δ_i‖² ‖h_i‖²,   ‖∇_b f_i‖² = ‖δ_i‖²

and nothing of W's shape is ever formed. A layer applied at P positions of a sample (tokens, pixels, the samples of a
micro-batch, or simply called P times) sums over them, and the cross terms between positions count:

    ‖Σ_p δ_p h_pᵀ‖² = Σ_{p,q} (δ_p·δ_q)(h_p·h_q)

A *group* below is the set of samples whose gradients are added up before the norm is taken: one sample, or a
micro-batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradpen._numerics import at_least_float32, row_sq_norm, sum_tensors
from gradpen.recording import Call


class Outer(NamedTuple):
    """A group's gradient as a sum of outer products Σ_p δ_p h_pᵀ, one matrix for each block of output channels."""

    delta: Tensor  # (groups, blocks, positions, out)
    input: Tensor  # (groups, blocks, positions, in)


class Rows(NamedTuple):
    """A group's gradient of a table as rows δ_p added at index_p."""

    delta: Tensor  # (groups, positions, width)
    lookup: Tensor  # (groups, positions): which row


class Dense(NamedTuple):
    """A group's gradient itself."""

    value: Tensor  # (groups, *parameter.shape)


Contribution = Outer | Rows | Dense


def has_closed_form(call: Call, batch_size: int) -> bool:
    """Whether the call is of a kind known here and dimension 0 of what it saw has the batch's size."""
    if call.weight is not None and call.weight.is_complex():  # the products below do not conjugate
        return False
    leading = call.input.dim() > 0 and call.input.shape[0] == batch_size and call.output_shape[0] == batch_size
    match call.op:
        case "linear" | "embedding" | "group_norm":
            return leading
        case "conv":
            return leading and call.weight is not None and call.input.dim() == call.weight.dim()
        case "layer_norm":
            return leading and call.input.dim() > len(call.options["normalized_shape"])
    return False


def position_shape(call: Call) -> tuple[int, ...]:
    """Sizes of the dimensions of the input that count neither samples nor features."""
    match call.op:
        case "conv" | "group_norm":
            return tuple(call.input.shape[2:])
        case "embedding":
            return tuple(call.input.shape[1:])
    return tuple(call.input.shape[1:-1])


def contribution(call: Call, role: str, delta: Tensor, group_size: int) -> Contribution:
    """What one call adds to the gradient of its weight or bias, group by group.

    Args:
        call: a call for which `has_closed_form`.
        role: "weight" or "bias".
        delta: ∂f/∂output, as the call's output (B, …).
        group_size: samples per group; divides B.
    """
    delta = at_least_float32(delta)
    if role == "bias":
        return Dense(_grouped_sum(_bias_terms(call, delta), group_size))
    h = call.checked_input()
    match call.op:
        case "linear":
            return Outer(_grouped_positions(delta, group_size), _grouped_positions(at_least_float32(h), group_size))
        case "conv":
            return _conv_weight(call, at_least_float32(h), delta, group_size)
        case "embedding":
            return _embedding_weight(call, h, delta, group_size)
        case "layer_norm":
            shape = call.options["normalized_shape"]
            normalized = F.layer_norm(at_least_float32(h), shape, eps=call.options["eps"])
            terms = (delta * normalized).reshape(delta.shape[0], -1, *shape)
            return Dense(_grouped_sum(terms.sum(1), group_size))
        case "group_norm":
            normalized = F.group_norm(at_least_float32(h), call.options["num_groups"], eps=call.options["eps"])
            terms = (delta * normalized).reshape(*delta.shape[:2], -1)
            return Dense(_grouped_sum(terms.sum(2), group_size))
    raise AssertionError(f"no closed form for {call.op}")


def is_dense_row(call: Call, group_size: int) -> bool:
    """Whether the call is a dense layer with one row per group: the case of `dense_row_sq_norm`."""
    return call.op == "linear" and group_size == 1 and call.input.dim() == 2


def dense_row_sq_norm(call: Call, roles: Collection[str], delta: Tensor) -> Tensor:
    """(1 + ‖h_i‖²)‖δ_i‖², without the 1 or the ‖h_i‖² where the bias or the weight does not count: (B,)."""
    delta_sq_norm = row_sq_norm(delta)
    if "weight" not in roles:
        return delta_sq_norm
    input_sq_norm = row_sq_norm(call.checked_input())
    return (1.0 + input_sq_norm if "bias" in roles else input_sq_norm) * delta_sq_norm


def combinable(calls: Sequence[tuple[Call, str]]) -> bool:
    """Whether the contributions of several uses of one parameter add up within one closed form."""
    kinds = {(call.op, call.options.get("groups")) if role == "weight" else role for call, role in calls}
    return len(kinds) == 1


def group_sq_norm(contributions: Sequence[Contribution]) -> Tensor:
    """‖Σ contributions‖² for every group: (groups,)."""
    first = contributions[0]
    if isinstance(first, Dense):
        return row_sq_norm(sum_tensors([c.value for c in contributions if isinstance(c, Dense)]))
    if isinstance(first, Rows):
        rows = [c for c in contributions if isinstance(c, Rows)]
        return _rows_sq_norm(_joined([c.delta for c in rows], 1), _joined([c.lookup for c in rows], 1))
    outers = [c for c in contributions if isinstance(c, Outer)]
    return _outer_sq_norm(_joined([c.delta for c in outers], 2), _joined([c.input for c in outers], 2))


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _outer_sq_norm(delta: Tensor, h: Tensor) -> Tensor:
    """‖Σ_p δ_p h_pᵀ‖², summed over blocks, by whichever of two ways multiplies less: (groups,)."""
    positions, out, width = delta.shape[2], delta.shape[3], h.shape[3]
    if positions == 1:
        return (delta.square().sum((2, 3)) * h.square().sum((2, 3))).sum(1)
    if positions * (out + width) < out * width:  # Gram matrices between positions
        products = (delta @ delta.transpose(2, 3)) * (h @ h.transpose(2, 3))
        return products.sum((1, 2, 3))
    return (delta.transpose(2, 3) @ h).square().sum((1, 2, 3))


def _rows_sq_norm(delta: Tensor, index: Tensor) -> Tensor:
    """Rows that were looked up twice add before they are squared: Σ_{p,q: index_p = index_q} δ_p·δ_q."""
    same = index.unsqueeze(2) == index.unsqueeze(1)
    return ((delta @ delta.transpose(1, 2)) * same).sum((1, 2))


def _grouped_positions(tensor: Tensor, group_size: int) -> Tensor:
    """(B, …, n) → (groups, 1 block, positions, n)."""
    return tensor.reshape(tensor.shape[0] // group_size, 1, -1, tensor.shape[-1])


def _grouped_sum(terms: Tensor, group_size: int) -> Tensor:
    """(B, …) → (groups, …): add the samples of a group."""
    if group_size == 1:
        return terms
    return terms.reshape(-1, group_size, *terms.shape[1:]).sum(1)


def _bias_terms(call: Call, delta: Tensor) -> Tensor:
    """Per-sample gradient of the bias: δ summed over positions."""
    if call.op in ("conv", "group_norm"):
        return delta.reshape(*delta.shape[:2], -1).sum(2)
    shape = call.options["normalized_shape"] if call.op == "layer_norm" else delta.shape[-1:]
    return delta.reshape(delta.shape[0], -1, *shape).sum(1)


def _embedding_weight(call: Call, index: Tensor, delta: Tensor, group_size: int) -> Rows:
    groups = index.shape[0] // group_size
    delta = delta.reshape(groups, -1, delta.shape[-1])
    index = index.reshape(groups, -1)
    padding_idx = call.options["padding_idx"]
    if padding_idx is not None:  # the padding row gets no gradient
        padding_idx = padding_idx % call.weight.shape[0] if call.weight is not None else padding_idx
        delta = delta * (index != padding_idx).unsqueeze(2)
    return Rows(delta, index)


def _conv_weight(call: Call, h: Tensor, delta: Tensor, group_size: int) -> Outer:
    """A convolution is a dense layer at every output pixel, applied to the unfolded patch."""
    assert call.weight is not None
    kernel = call.weight.shape[2:]
    rank = len(kernel)
    stride, dilation = _per_axis(call.options["stride"], rank), _per_axis(call.options["dilation"], rank)
    h = F.pad(h, _padding(call.options["padding"], kernel, dilation))
    if rank == 1:  # unfold is two-dimensional
        h, kernel = h.unsqueeze(2), torch.Size((1, *kernel))
        stride, dilation = (1, *stride), (1, *dilation)
    patches = F.unfold(h, tuple(kernel), dilation=dilation, stride=stride)  # (B, in/block · blocks · kernel, pixels)
    blocks, groups = call.options["groups"], h.shape[0] // group_size

    def by_block(tensor: Tensor) -> Tensor:  # (B, blocks · n, pixels) → (groups, blocks, samples · pixels, n)
        split = tensor.reshape(groups, group_size, blocks, tensor.shape[1] // blocks, -1)
        return split.permute(0, 2, 1, 4, 3).flatten(2, 3)

    return Outer(by_block(delta.flatten(2)), by_block(patches))


def _per_axis(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def _padding(padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """The argument of F.pad: (before, after) for every axis, last axis first."""
    rank = len(kernel)
    if padding == "same":  # an odd total puts the extra zero behind
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    elif padding == "valid":
        pairs = [(0, 0)] * rank
    else:
        assert not isinstance(padding, str)
        pairs = [(p, p) for p in _per_axis(padding, rank)]
    return [amount for pair in reversed(pairs) for amount in pair]
