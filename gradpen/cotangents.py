"""∂f_i/∂output, and how it depends on the output: what the formulas for a chain of dense layers begin with."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gradpen._graph import differentiate
from gradpen._numerics import number_if_at_hand
from gradpen.criteria import IGNORED, Scalar
from gradpen.recording import RngState

_nll_loss, _nll_loss_backward = torch.ops.aten.nll_loss_forward.default, torch.ops.aten.nll_loss_backward.default


class Cotangent(Protocol):
    """∂f_i/∂output at an output (B, K)."""

    @property
    def value(self) -> Tensor:
        """(B, K)."""

    def pull(self, of_value: Tensor) -> Tensor | None:
        """The cotangent of the output from that of `value`; None if this does not depend on the output."""

    def at(self, output: Tensor) -> Cotangent:
        """The same at another output. Where gradients are on, `value` and `pull` can be differentiated."""


class OfScalar(Cotangent, Protocol):
    """That of an f which is known."""

    @property
    def f(self) -> Tensor:
        """(B,)."""

    def at(self, output: Tensor) -> OfScalar:
        """The same at another output. Where gradients are on, `value` and `pull` can be differentiated."""


def cotangent_of(function: Scalar, output: Tensor) -> ByAutograd | OfCrossEntropy:
    """∂f_i/∂output at an output without a graph."""
    if function.is_cross_entropy_at(output):
        return OfCrossEntropy(function, output)
    return ByAutograd(function, output.detach().requires_grad_())


class ByAutograd:
    """Of any f.

    Attributes:
        f: (B,).
        output: what it depends on.
    """

    def __init__(self, function: Scalar, output: Tensor, rng: RngState | None = None) -> None:
        self.output = output
        self._function = function
        self._rng = RngState.capture(torch_alone=True) if rng is None else rng
        with torch.enable_grad():
            self.f = function(output.clone())  # which it may change in place

    @cached_property
    def value(self) -> Tensor:
        """∂f_i/∂output."""
        with torch.enable_grad():
            (value,) = differentiate(self.f, [self.output], torch.ones_like(self.f), create_graph=True)
        return torch.zeros_like(self.output) if value is None else value

    def pull(self, of_value: Tensor) -> Tensor | None:
        """The cotangent of the output from that of `value`."""
        if not self.value.requires_grad:
            return None
        (found,) = differentiate(self.value, [self.output], of_value, create_graph=torch.is_grad_enabled())
        return found

    def at(self, output: Tensor) -> OfScalar:
        """At another output, with the same random numbers."""
        if not torch.is_grad_enabled():
            output = output.detach().requires_grad_()
        with self._rng.replayed():
            return ByAutograd(self._function, output, self._rng)


class OfCrossEntropy:
    """Of the cross entropy of one class a sample: softmax − one-hot, by the kernels that autograd takes for it.

    Attributes:
        value: ∂f_i/∂output; 0 for targets that are ignored.
    """

    def __init__(self, function: Scalar, output: Tensor) -> None:
        self._function = function
        with torch.no_grad():
            self._log_softmax = torch.log_softmax(output, 1)
            # the loss looks whether all targets are classes; its derivative writes wherever they point
            self._mean_and_count = self._loss(_MEAN)
            _, count = self._mean_and_count
            self._minus_one_hot = _nll_loss_backward(  # that of count times the mean
                count, self._log_softmax, function.target, None, _MEAN, IGNORED, count
            )
            self.value = torch._log_softmax_backward_data(self._minus_one_hot, self._log_softmax, 1, output.dtype)

    @cached_property
    def f(self) -> Tensor:
        """(B,)."""
        return self._loss(_UNREDUCED)[0]

    def data_loss(self, reduction: str | None) -> tuple[Tensor, float | Tensor]:
        """What the criterion gives, 0-dim, and the multiple that it is of mean_i f_i."""
        size = self._log_softmax.shape[0]
        if reduction in (None, "none"):
            return self.f.mean(), 1.0
        if reduction == "sum":
            return self._loss(_SUM)[0], float(size)
        loss, count = self._mean_and_count
        known = number_if_at_hand(count)
        return loss, size / (max(known, 1.0) if isinstance(known, float) else known.clamp(min=1))

    def _loss(self, reduction: int) -> tuple[Tensor, Tensor]:
        """The loss, and how many targets are not ignored."""
        return _nll_loss(self._log_softmax, self._function.target, None, reduction, IGNORED)

    def is_of(self, function: Scalar) -> bool:
        """Whether it is that of this f."""
        return function.source is self._function.source and function.target is self._function.target

    def pull(self, of_value: Tensor) -> Tensor:
        """The cotangent of the output from that of `value`."""
        softmax = self.value - self._minus_one_hot  # 0 where the target is ignored
        return torch._softmax_backward_data(of_value, softmax, 1, of_value.dtype)

    def at(self, output: Tensor) -> OfScalar:
        """At another output."""
        return ByAutograd(self._function, output) if torch.is_grad_enabled() else cotangent_of(self._function, output)


class Constant:
    """Directions that depend on nothing.

    Attributes:
        value: (B, K).
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def pull(self, of_value: Tensor) -> None:
        """There is nothing to pull back to."""

    def at(self, output: Tensor) -> Constant:
        """The same wherever."""
        return self


_UNREDUCED, _MEAN, _SUM = 0, 1, 2  # torch's numbers of reduction="none", "mean" and "sum"
