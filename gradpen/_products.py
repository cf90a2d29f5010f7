"""Products of one matrix with many blocks of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """u ↦ u M for rows u, (B, m) → (B, n), for many u and one M (m, n), such as the transpose of a weight.

    On the CPU, in float32, M is copied into oneDNN's own layout when first needed: `torch.mm` rearranges it in every
    call. The operators that do this are those that compiled models call; where a build of torch lacks them, and
    elsewhere, the product is `torch.mm`.
    """
    matrix = matrix.detach()
    return _LaidOut(matrix) if _can_be_laid_out(matrix) else lambda u: u @ matrix


class _LaidOut:
    """u ↦ u M. M itself is let go once there is a copy."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix: Tensor | None = matrix
        self._copy: Tensor | None = None

    def __call__(self, u: Tensor) -> Tensor:
        if self._matrix is not None:
            if len(u) < _FEW_ROWS:
                return u @ self._matrix
            self._copy = torch.ops.mkldnn._reorder_linear_weight(self._matrix.T.contiguous(), None)
            self._matrix = None
        product: Tensor = torch.ops.mkldnn._linear_pointwise(u, self._copy, None, "none", [], "")
        return product


_FEW_ROWS = 16  # products with fewer do not repay the copy


def _can_be_laid_out(matrix: Tensor) -> bool:
    return (
        type(matrix) in (Tensor, nn.Parameter)
        and matrix.is_cpu
        and matrix.dtype == torch.float32
        and matrix.layout == torch.strided
        and matrix.numel() > 0
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
