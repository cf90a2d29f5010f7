"""Gradients, and walks over the autograd graph that lies under a tensor."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, KeysView, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

# Before torch 2.7 an edge does not own the node of a Python autograd.Function: where the model drops the output, using the
# edge is a segmentation fault
EDGES_KEEP_PYTHON_NODES = "ownership_token" in GradientEdge._fields

# nodes that change a tensor's shape and neither its entries nor their order
VIEW_NODES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "AliasBackward0")


@dataclass(frozen=True)
class GraphWalk:
    """Every node that a backward pass from one tensor can reach, and the leaves behind them.

    Attributes:
        parents: node → the nodes behind it, None where there is nothing to differentiate; in the order of the visits.
        leaves: id → leaf.
        leaf_edges: id(leaf) → how many places in the graph use it.
    """

    parents: dict[Any, tuple[Any, ...]]
    leaves: dict[int, Tensor]
    leaf_edges: Counter[int]

    @property
    def nodes(self) -> KeysView[Any]:
        """The nodes that were visited, and those that were not looked behind."""
        return self.parents.keys()

    @cached_property
    def kinds(self) -> frozenset[str]:
        """Names of the nodes' types."""
        return frozenset({type(node).__name__ for node in self.parents})

    def leads_through(self, kind: str, places: Iterable[Tensor]) -> bool:
        """Whether a node of a type whose name begins with `kind` lies between the root and one of the places."""
        return self.leads_through_any([node for node in self.parents if type(node).__name__.startswith(kind)], places)

    def leads_through_any(self, nodes: Collection[Any], places: Iterable[Tensor]) -> bool:
        """Whether one of the nodes lies between the root and one of the places."""
        pending = list(nodes)
        if not pending:
            return False
        wanted = {edge_of(tensor).node for tensor in places if tensor.requires_grad}
        seen = set(pending)
        while pending:
            for parent in self.parents.get(pending.pop(), ()):
                if parent in wanted:
                    return True
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    pending.append(parent)
        return False

    @cached_property
    def shape(self) -> int:
        """Which operations there are, how they hang together and over which dimensions they run; sizes do not count."""
        places = {node: place for place, node in enumerate(self.parents)}
        return hash(
            tuple(
                (type(node).__name__, _dimensions(node), *[places.get(parent) for parent in parents])
                for node, parents in self.parents.items()
            )
        )


def differentiate(
    outputs: Tensor,
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    cotangents: Tensor | None = None,
    *,
    create_graph: bool = False,
    batched: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` that keeps the graph and says None for what `outputs` does not depend on.

    Hooks on leaves do not run: they are meant for the gradients that training accumulates, which may be these, handed over
    later. All derivatives that stay in a computation are taken here: a compiled graph has it as one node (`traced`).
    """
    hooked = [
        (tensor, tensor._backward_hooks)
        for tensor in inputs
        if isinstance(tensor, Tensor) and tensor.is_leaf and tensor._backward_hooks
    ]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    grad = functools.partial(
        torch.autograd.grad,
        outputs,
        inputs,
        cotangents,
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )
    try:
        with _asked_for_several_passes():
            try:
                return grad()
            except RuntimeError as error:
                if "donated buffers" not in str(error):
                    raise
                if runs_only_once(outputs):
                    raise RuntimeError(
                        "a penalty differentiates the model's output before the loss is differentiated, and torch.compile "
                        "has made a backward pass for this module that can run only once: set "
                        "torch._functorch.config.donated_buffer = False, and torch.compiler.config.cache_key_tag to a word "
                        "of yours, before the module is called for the first time"
                    ) from error
            return grad()
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def compiled_for_several_passes() -> AbstractContextManager[object]:
    """Within the block torch.compile makes graphs that can be differentiated more than once.

    Otherwise the backward pass of a compiled module may write over what its forward pass has kept.
    """
    # a backward pass that is compiled later, by the loss perhaps, may be a cached one
    return _compiler_told({"donated_buffer": False, "force_non_lazy_backward_lowering": True})


def _asked_for_several_passes() -> AbstractContextManager[object]:
    """Within the block torch refuses what can be differentiated only once, whatever it was told since it has made that."""
    return _compiler_told({"donated_buffer": True})


def _compiler_told(wanted: Mapping[str, bool]) -> AbstractContextManager[object]:
    """Options of the compiler, those that this torch has, and cached graphs apart from those that others have compiled.

    The key of a cached graph does not say whether the graph writes over what it is given.
    """
    if torch.compiler.is_compiling() or "torch._functorch.aot_autograd" not in sys.modules:  # torch.compile imports it
        return nullcontext()
    config: Any = importlib.import_module("torch._functorch.config")
    return _patched(config, {name: value for name, value in wanted.items() if hasattr(config, name)})


@contextmanager
def _patched(config: Any, options: dict[str, bool]) -> Iterator[None]:
    keys: Any = importlib.import_module("torch.compiler.config")  # no attribute of torch.compiler before it is imported
    tag = keys.cache_key_tag.removesuffix(_CACHE_TAG) + _CACHE_TAG
    with config.patch(options), keys.patch(cache_key_tag=tag):
        yield


_CACHE_TAG = "-gradpen-several-passes"


def runs_only_once(outputs: Tensor) -> bool:
    """Whether a compiled backward pass under `outputs` writes over what it is given.

    Torch refuses to repeat those made by `compiled_for_several_passes`, too, unless it is told that they do not.
    """
    only_once = False
    for node in walk_graph(outputs).nodes:
        compiled: Any = getattr(getattr(type(node), "_forward_cls", None), "metadata", None)
        if getattr(compiled, "bw_donated_idxs", None):
            only_once = True
        elif hasattr(compiled, "bw_donated_idxs"):
            compiled.bw_donated_idxs = []
    return only_once


def differentiate_rows(outputs: Tensor, inputs: Sequence[Tensor], cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """`differentiate` for all of `cotangents` (K, *outputs.shape) at once, in what knows symbolic sizes: (K, …) each."""
    used: list[int] = []

    def one_row(cotangent: Tensor) -> tuple[Tensor, ...]:
        found = differentiate(outputs, inputs, cotangent, create_graph=True)
        used[:] = [index for index, gradient in enumerate(found) if gradient is not None]
        return tuple(gradient for gradient in found if gradient is not None)

    found = torch.vmap(one_row)(cotangents)
    gradients = dict(zip(used, found, strict=True))
    return tuple(gradients.get(index) for index in range(len(inputs)))


Row = Sequence[Any]  # of tensors, or None: something for every layer, say


def save_rows(ctx: Any, rows: Sequence[Row]) -> None:
    """`ctx.save_for_backward` for rows of tensors.

    Autograd lets go of them after the backward pass, and sees if they were changed before it.
    """
    ctx.lengths = list(map(len, rows))
    ctx.save_for_backward(*itertools.chain.from_iterable(rows))


def saved_rows(ctx: Any) -> Iterator[tuple[Any, ...]]:
    """What `save_rows` was given, row by row."""
    tensors = iter(ctx.saved_tensors)
    return (tuple(itertools.islice(tensors, length)) for length in ctx.lengths)


def check_derivable_twice(walk: GraphWalk, places: Iterable[Tensor]) -> None:
    """Fused attention kernels have a first derivative only, and PyTorch says so in terms of the kernel.

    Args:
        walk: that of the graph of what is penalised.
        places: what the penalised gradient is taken with respect to: kernels that do not lie in between do no harm.
    """
    if walk.leads_through("ScaledDotProduct", places):
        raise RuntimeError(
            'method="exact" differentiates a gradient, and the fused kernel that scaled_dot_product_attention has chosen '
            "cannot be differentiated twice. Two ways work: run the model within `with torch.nn.attention.sdpa_kernel("
            'torch.nn.attention.SDPBackend.MATH):`, or use method="finite_difference", which needs first derivatives only'
        )


def edge_of(tensor: Tensor) -> GradientEdge:
    """The place in the graph where the gradient of `tensor` arrives, also after in-place changes of it."""
    return get_gradient_edge(tensor)


def walk_graph(root: Tensor, stop_at: Collection[Any] = ()) -> GraphWalk:
    """Visit the graph under `root` once, not looking behind the nodes in `stop_at`.

    A view or a cast of a parameter counts as often as it is used: autocast casts once for all uses, and the derivative of a
    dense layer, taken inside the model, uses the very transpose that the layer made.
    """
    parents: dict[Any, tuple[Any, ...]] = dict.fromkeys(stop_at, ())
    leaves: dict[int, Tensor] = {}
    users: dict[Any, list[Any]] = {}  # view or cast → the nodes that use it, as often as they do
    leaf_users: list[tuple[int, Any]] = []  # (id(leaf), node that uses it)
    pending = [] if root.grad_fn is None else [root.grad_fn]
    while pending:
        node = pending.pop()
        if node in parents:
            continue
        parents[node] = tuple([parent for parent, _ in node.next_functions])
        for parent in parents[node]:
            if parent is None:
                continue
            kind = type(parent).__name__
            if kind == "AccumulateGrad":
                leaf: Tensor = getattr(parent, "variable")  # absent from the type stubs
                leaves[id(leaf)] = leaf
                leaf_users.append((id(leaf), node))
                parents[parent] = ()
                continue
            if kind in _PASSING_ON:
                users.setdefault(parent, []).append(node)
            pending.append(parent)
    leaf_edges: Counter[int] = Counter()
    for leaf_id, node in leaf_users:
        leaf_edges[leaf_id] += _count_uses(node, users)
    return GraphWalk(parents, leaves, leaf_edges)


def _dimensions(node: Any) -> tuple[Any, ...]:
    """What a node remembers of the dimensions it runs over, and which rows it takes if it takes some of dimension 0."""
    kind: Any = type(node)
    names = _dimension_names(kind)
    if not names:
        return ()
    values = tuple([getattr(node, name) for name in names])
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
    walk = walk_graph(root, stop_at=[tensor.grad_fn for tensor in replacements])
    return [
        name
        for name, parameter in parameters.items()
        if id(parameter) in walk.leaves or (parameter.grad_fn is not None and parameter.grad_fn in walk.nodes)
    ]


def _count_uses(node: Any, users: Mapping[Any, Sequence[Any]]) -> int:
    """1 for a node that computes something, for a view or a cast the uses of what it hands on."""
    if node not in users:
        return 1
    return sum(_count_uses(user, users) for user in users[node])


_PASSING_ON = ("ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0")
