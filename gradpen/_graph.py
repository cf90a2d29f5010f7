"""Walks over the autograd graph that lies under a tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class GraphWalk(NamedTuple):
    """Every node that a backward pass from one tensor can reach, and the leaves behind them."""

    nodes: set[Any]
    leaves: dict[int, Tensor]
    leaf_edges: Counter[int]  # id(leaf) → how many places in the graph use it


def edge_of(tensor: Tensor) -> GradientEdge:
    """The place in the graph where the gradient of `tensor` arrives, also after in-place changes of it."""
    return get_gradient_edge(tensor)


def saved_tensors_are_hooked() -> bool:
    """Whether ``torch.autograd.graph.saved_tensors_hooks`` are at work, as within activation checkpointing."""
    if torch.compiler.is_compiling():
        return False
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None  # before torch 2.8 there is no telling: they may be


def walk_graph(root: Tensor, stop_at: Collection[Any] = ()) -> GraphWalk:
    """Visit the graph under `root` once, not looking behind the nodes in `stop_at`.

    A cast or transposed parameter counts as often as it is used: autocast hands one cast to everything, and a model that
    differentiates itself uses the transposed weight of its forward pass again.
    """
    nodes: set[Any] = set(stop_at)
    leaves: dict[int, Tensor] = {}
    users: dict[Any, list[Any]] = {}  # node → the nodes with an edge to it, one entry an edge
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
            users.setdefault(parent, []).append(node)
            if type(parent).__name__ == "AccumulateGrad":
                leaf: Tensor = getattr(parent, "variable")  # absent from the type stubs
                leaves[id(leaf)] = leaf
                leaf_users.append((id(leaf), node))
                nodes.add(parent)
            else:
                pending.append(parent)
    leaf_edges: Counter[int] = Counter()
    for leaf_id, node in leaf_users:
        leaf_edges[leaf_id] += _uses(node, users)
    return GraphWalk(nodes, leaves, leaf_edges)


def _uses(node: Any, users: Mapping[Any, Sequence[Any]]) -> int:
    """1, or for a node that only hands its input on, the uses of that."""
    if type(node).__name__ not in ("ToCopyBackward0", "TBackward0"):
        return 1
    return sum(_uses(user, users) for user in users.get(node, ()))
