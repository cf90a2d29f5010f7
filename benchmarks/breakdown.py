"""Where a step's time goes: its kernels are recorded once, and called again without Python and autograd around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from measure import CALLS
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

WARM_UP = 9  # steps: gradpen looks for mixed samples in steps 1, 2, 3, 5, 9, …
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_linear_pointwise"}


class Call(NamedTuple):
    """One kernel and what it was given."""

    kernel: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def is_product(self) -> bool:
        """Whether the floor counts it."""
        return self.kernel.overloadpacket.__name__ in PRODUCTS


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # aliases: autograd copies a gradient that it is not alone in referring to
        self.calls.append(Call(func, *tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def recorded(step: Callable[[], object]) -> list[Call]:
    """The kernels of CALLS steps in their order, backward passes included; they keep what the steps' tensors hold."""
    for _ in range(WARM_UP):
        step()
    with _Recorder() as recorder:
        for _ in range(CALLS):
            step()
    return recorder.calls


def replay(calls: list[Call]) -> Callable[[], None]:
    """Calls the same kernels on the same tensors again. What they write is not what the step wrote."""

    @torch.no_grad()
    def again() -> None:
        for kernel, args, kwargs in calls:
            kernel(*args, **kwargs)

    return again
