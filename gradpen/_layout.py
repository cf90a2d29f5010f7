"""How the rows of a batch lie in memory, and products of rows with weights.

Rows (B, n) may lie *by feature*: as the transpose of a contiguous (n, B), one feature of all samples behind the other. In
h Wᵀ the batch is then the factor on the right, W hᵀ, and the library that multiplies on CPUs has less to rearrange where the
batch is small beside the weight. What is done to every entry by itself takes the same time, provided that all operands lie
the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_SAMPLES = range(64, 257)
_FEWEST_FEATURES = 1024
_FEWEST_THREADS = 2


def pays_by_feature(rows: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the rows between layers, as many as here, are better laid by feature.

    Only weights from one wide layer to another gain, and only where several threads share a product out among them.

    Args:
        rows: the input, (B, n_0).
        weights: of all layers.
    """
    return (
        rows.is_cpu
        and rows.shape[0] in _SAMPLES
        and len(weights) > 2  # the last layer's rows lie as everybody expects them
        and all(weight.shape[0] >= _FEWEST_FEATURES for weight in weights[:-1])
        and torch.get_num_threads() >= _FEWEST_THREADS
    )


def lies_by_feature(rows: Tensor) -> bool:
    """Whether rows (B, n) lie by feature."""
    return rows.stride(0) == 1 and rows.stride(1) != 1


def by_feature(rows: Tensor) -> Tensor:
    """The same rows, by feature."""
    return rows.t().contiguous().t()


def affine(h: Tensor, weight: Tensor, bias: Tensor | None, *, by_feature: bool) -> Tensor:
    """H Wᵀ + b, by feature if asked for, else as torch.nn.functional.linear gives it."""
    if not by_feature:
        return F.linear(h, weight, bias)
    return (weight @ h.t()).t() if bias is None else torch.addmm(bias.unsqueeze(1), weight, h.t()).t()


def times(rows: Tensor, matrix: Tensor, like: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Rows (B, n) times a matrix (n, m), by feature if the rows or others (B, m) are; written over `out` if it is given."""
    if lies_by_feature(rows) or (like is not None and lies_by_feature(like)):
        return torch.mm(matrix.t(), rows.t(), out=None if out is None else out.t()).t()
    return torch.mm(rows, matrix, out=out)


def plus_times(total: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
    """Total (B, m) + rows (B, n) times a matrix (n, m), by feature if the total is."""
    if lies_by_feature(total):
        return torch.addmm(total.t(), matrix.t(), rows.t()).t()
    return torch.addmm(total, rows, matrix)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of all entries of two batches of rows that lie the same way: 0-dim."""
    if lies_by_feature(a):
        a, b = a.t(), b.t()
    return torch.dot(a.flatten(), b.flatten())


def stacked_row_sq_norms(layers: Sequence[Tensor]) -> Tensor:
    """`row_sq_norms` of the rows of several layers, squared together: (layers, B)."""
    if any(lies_by_feature(rows) for rows in layers):
        return torch.stack([row_sq_norms(rows) for rows in layers])
    return torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in layers]).square_()


def mean_row_sq_norm(rows: Tensor) -> Tensor:
    """The mean of `row_sq_norms`: 0-dim."""
    if lies_by_feature(rows):
        return row_sq_norms(rows).mean()
    norms = torch.linalg.vector_norm(rows, dim=1)
    return torch.dot(norms, norms) / norms.shape[0]


def row_sq_norms(rows: Tensor) -> Tensor:
    """‖·‖² of every row in as few passes as the layout allows, not to be differentiated: (B,)."""
    if lies_by_feature(rows):
        return torch.linalg.vecdot(rows, rows)
    return torch.linalg.vector_norm(rows, dim=1).square_()
