"""Walks over the autograd graph that lies under a tensor."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

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


def walk_graph(root: Tensor, stop_at: Collection[Any] = ()) -> GraphWalk:
    """Visit the graph under `root` once, not looking behind the nodes in `stop_at`.

    A view or a cast of a parameter counts as often as it is used: autocast casts once for all uses, and the derivative of a
    dense layer, taken inside the model, uses the very transpose that the layer made.
    """
    nodes: set[Any] = set(stop_at)
    leaves: dict[int, Tensor] = {}
    users: dict[Any, list[Any]] = {}  # view or cast → the nodes that use it, as often as they do
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
            kind = type(parent).__name__
            if kind == "AccumulateGrad":
                leaf: Tensor = getattr(parent, "variable")  # absent from the type stubs
                leaves[id(leaf)] = leaf
                leaf_users.append((id(leaf), node))
                nodes.add(parent)
                continue
            if kind in _PASSING_ON:
                users.setdefault(parent, []).append(node)
            pending.append(parent)
    leaf_edges: Counter[int] = Counter()
    for leaf_id, node in leaf_users:
        leaf_edges[leaf_id] += _count_uses(node, users)
    return GraphWalk(nodes, leaves, leaf_edges)


class GraphShape(NamedTuple):
    """What tells graphs apart whose operations, or the dimensions that these run over, differ."""

    key: int
    kinds: frozenset[str]  # names of the nodes' types


def graph_shape(root: Tensor) -> GraphShape:
    """Which operations lie under `root`, how they hang together and over which dimensions they run; sizes do not count."""
    places: dict[Any, int] = {}
    trace: list[Any] = []
    kinds: set[str] = set()
    pending = [] if root.grad_fn is None else [root.grad_fn]
    while pending:
        node = pending.pop()
        if node in places:
            trace.append(places[node])
            continue
        places[node] = len(places)
        kind = type(node)
        kinds.add(kind.__name__)
        parents = [parent for parent, _ in node.next_functions]
        trace.append((kind.__name__, _dimensions(node), *[parent is None for parent in parents]))
        pending += [parent for parent in parents if parent is not None]
    return GraphShape(hash(tuple(trace)), frozenset(kinds))


def _dimensions(node: Any) -> tuple[Any, ...]:
    """What a node remembers of the dimensions it runs over, and which rows it takes if it takes some of dimension 0."""
    kind: Any = type(node)
    values = tuple(getattr(node, name) for name in _dimension_names(kind))
    if kind.__name__ in _TAKING_ROWS and values[0] == 0:
        return values + tuple(getattr(node, name) for name in _TAKING_ROWS[kind.__name__])
    return values


@functools.cache
def _dimension_names(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in _DIMENSION_NAMES if hasattr(kind, name))


_DIMENSION_NAMES = (
    "_saved_dim",
    "_saved_dim0",
    "_saved_dim1",
    "_saved_dim2",
    "_saved_dims",
    "_saved_shifts",
    "_saved_normalized_shape",
    "_saved_training",
)
_TAKING_ROWS = {"SliceBackward0": ("_saved_start", "_saved_end"), "SelectBackward0": ("_saved_index",)}


def reached_around(root: Tensor, parameters: Mapping[str, Tensor], replacements: Sequence[Tensor]) -> list[str]:
    """Names of the parameters that `root` depends on otherwise than through `replacements`, which took their places."""
    leaves = walk_graph(root, stop_at=[tensor.grad_fn for tensor in replacements]).leaves
    return [name for name, parameter in parameters.items() if id(parameter) in leaves]


def _count_uses(node: Any, users: Mapping[Any, Sequence[Any]]) -> int:
    """1 for a node that computes something, for a view or a cast the uses of what it hands on."""
    if node not in users:
        return 1
    return sum(_count_uses(user, users) for user in users[node])


_PASSING_ON = ("ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0")
