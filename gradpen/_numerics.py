"""Squared norms and roots that stay finite, also in their derivatives."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Upcast half precision, so that squares are accumulated in float32 at least; of a complex number both parts count."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def widest_float(tensor: Tensor) -> Tensor:
    """Cast to float64 where the device has it: squares of tiny numbers do not underflow there."""
    return tensor.to(widest_dtype(tensor.device))


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: it would run the products behind a norm in half precision."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def rounding_tolerance(tensor: Tensor) -> float:
    """√eps of the narrowest type that took part in computing `tensor`: what rounding alone does not reach."""
    dtype = tensor.dtype
    if torch.is_autocast_enabled(tensor.device.type):
        dtype = torch.get_autocast_dtype(tensor.device.type)
    return float(torch.finfo(dtype).eps ** 0.5)


def kernel_tolerance(tensor: Tensor) -> float:
    """`rounding_tolerance` if the same products may have been made by different kernels, on a GPU perhaps in TF32."""
    tolerance = rounding_tolerance(tensor)
    if tensor.is_cuda and tensor.dtype == torch.float32 and _tf32_is_allowed():
        return max(tolerance, _TF32_EPS**0.5)
    return tolerance


_TF32_EPS = 2**-10


def _tf32_is_allowed() -> bool:
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9; its older flags cannot always be read
        settings = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        return any(setting.fp32_precision == "tf32" for setting in settings)
    return bool(backends.cuda.matmul.allow_tf32 or backends.cudnn.allow_tf32)


def row_sq_norm(tensor: Tensor) -> Tensor:
    """Σ over everything but dimension 0 of the squares: (B, …) → (B,)."""
    rows = at_least_float32(tensor)
    if rows.dim() != 2:
        rows = rows.reshape(tensor.shape[0], -1)
    return (rows * rows).sum(1)


def widest_row_sq_norm(tensor: Tensor) -> Tensor:
    """`row_sq_norm` in float64 where the device has it, in one kernel, not to be differentiated: (B, …) → (B,)."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[0], -1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=widest_dtype(tensor.device)).square_()


def is_at_hand(tensor: Tensor) -> bool:
    """Whether the host can look at a tensor's entries without waiting for another device."""
    if torch.compiler.is_compiling():  # there are no entries yet
        return False
    if type(tensor) is not Tensor or not tensor.is_cpu:  # subclasses may have no entries at all
        return False
    return not is_batched(tensor) and torch._C._functorch.peek_interpreter_stack() is None


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several at once: in ``torch.autograd.grad(…, is_grads_batched=True)``."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))


def number_if_at_hand(scalar: Tensor) -> float | Tensor:
    """A 0-dim tensor's number if that `is_at_hand`."""
    return float(scalar) if is_at_hand(scalar) else scalar


def sum_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of one shape, at least one."""
    return functools.reduce(torch.add, tensors)


def total_sq_norm(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖² of all entries of all tensors together: 0-dim."""
    return torch.stack([at_least_float32(tensor).square().sum() for tensor in tensors]).sum()


def safe_sqrt(squared: Tensor) -> Tensor:
    """√ with derivative 0 (instead of inf, and NaN behind it) at 0: the double-where."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0."""
    nonzero = denominator != 0
    return torch.where(nonzero, numerator / torch.where(nonzero, denominator, 1.0), 0.0)
