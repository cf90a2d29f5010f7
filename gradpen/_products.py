"""Products of one matrix with many blocks of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn


def times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """u ↦ u M for rows u, (B, m) → (B, n), for many u and one M (m, n), such as the transpose of a weight.

    On the CPU, in float32, Mᵀ is brought into oneDNN's own layout when first needed, a copy, if it is contiguous:
    `torch.mm` rearranges it in every call. The operators that do this are those that compiled models call; where a build of
    torch lacks them, and elsewhere, the product is `torch.mm`.
    """
    transposed = matrix.detach().T
    can_be_laid_out = _can_be_laid_out(transposed)

    @functools.cache
    def laid_out() -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(transposed, None)

    def product(u: Tensor) -> Tensor:
        if not can_be_laid_out or (len(u) < _FEW_ROWS and not laid_out.cache_info().currsize):
            return u @ transposed.T
        return torch.ops.mkldnn._linear_pointwise(u, laid_out(), None, "none", [], "")

    return product


_FEW_ROWS = 16  # products with fewer do not repay the copy


def _can_be_laid_out(weight: Tensor) -> bool:
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.layout == torch.strided
        and weight.is_contiguous()
        and weight.numel() > 0
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
