"""Gradients, and walks over the autograd graph that lies under a tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

# Before torch 2.7 an edge does not own the node of a Python autograd.Function: where the model drops the output, using the
# edge is a segmentation fault
EDGES_KEEP_PYTHON_NODES = "ownership_token" in GradientEdge._fields


class GraphWalk(NamedTuple):
    """Every node that a backward pass from one tensor can reach, and the leaves behind them."""

    nodes: set[Any]
    leaves: dict[int, Tensor]
    leaf_edges: Counter[int]  # id(leaf) → how many places in the graph use it


def differentiate(
    outputs: Tensor,
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    cotangents: Tensor | None = None,
    *,
    create_graph: bool = False,
    batched: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` that keeps the graph and says None for what `outputs` does not depend on.

    All derivatives that stay in a computation are taken here: a compiled graph has it as one node (`traced`).
    """
    return torch.autograd.grad(
        outputs,
        inputs,
        cotangents,
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )


def edge_of(tensor: Tensor) -> GradientEdge:
    """The place in the graph where the gradient of `tensor` arrives, also after in-place changes of it."""
    return get_gradient_edge(tensor)


def walk_graph(root: Tensor, stop_at: Collection[Any] = ()) -> GraphWalk:
    """Visit the graph under `root` once, not looking behind the nodes in `stop_at`.

    Autocast casts a parameter once and hands the copy to everything that uses it: such a cast counts as often as it is used.
    """
    nodes: set[Any] = set(stop_at)
    leaves: dict[int, Tensor] = {}
    users: Counter[Any] = Counter()  # node → edges that lead to it
    leaf_users: list[tuple[int, Any]] = []  # (id(leaf), node that uses it)
    pending = [] if root.grad_fn is None else [root.grad_fn]
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for parent, _ in node.next_functions:
            if parent is None:
                continue
            users[parent] += 1
            if type(parent).__name__ == "AccumulateGrad":
                leaf: Tensor = getattr(parent, "variable")  # absent from the type stubs
                leaves[id(leaf)] = leaf
                leaf_users.append((id(leaf), node))
                nodes.add(parent)
            else:
                pending.append(parent)
    leaf_edges: Counter[int] = Counter()
    for leaf_id, node in leaf_users:
        is_cast = type(node).__name__ == "ToCopyBackward0"
        leaf_edges[leaf_id] += users[node] if is_cast else 1
    return GraphWalk(nodes, leaves, leaf_edges)
