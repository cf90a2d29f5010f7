"""Which squared gradient norm, of which scalar, computed how: validated once, computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradpen import _checks, finite_difference
from gradpen._numerics import safe_sqrt
from gradpen.criteria import Criterion, Scalar, scalar_per_sample
from gradpen.recording import names_of_tensors

ParameterFilter = Sequence[str] | Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class InputTerm:
    """‖∇_x f_i‖² or ‖J_i‖_F²; the fields are the arguments of `input_grad_sq_norm`."""

    of: str | Callable[[Any, Any], Tensor] = "loss"
    method: str = "exact"
    num_projections: int = 1
    scheme: str = "forward"
    step: float = 0.01
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not callable(self.of):
            _checks.check_choice("of", self.of, ("loss", "output"))
        _checks.check_choice("method", self.method, ("exact", "projection", "finite_difference"))
        _checks.check_choice("scheme", self.scheme, finite_difference.SCHEMES)
        _checks.check_positive_int("num_projections", self.num_projections)
        _checks.check_positive("step", self.step)
        if self.method != "projection" and (self.num_projections != 1 or self.generator is not None):
            raise ValueError(
                f'num_projections and generator go with method="projection", got method={self.method!r}: leave them out'
            )
        if self.method == "projection" and self.of != "output":
            raise ValueError(
                'method="projection" estimates the Jacobian of all outputs from random output directions, so it goes '
                f'with of="output", got of={self.of!r}: the gradient of one scalar needs no projection'
            )
        if self.method == "finite_difference" and self.of == "output":
            raise ValueError(
                'method="finite_difference" displaces x along the gradient of one scalar, got of="output": use '
                '"exact" or "projection"'
            )

    def scalar(self, criterion: Criterion, target: Any) -> Scalar:
        """The model's output → f, (B,)."""
        if callable(self.of):
            return Scalar(self.of, partial(scalar_per_sample, self.of), target)
        return criterion.scalar(target)


@dataclass(frozen=True)
class ParamTerm:
    """‖∇_θ f_i‖² or its form over groups; the fields are the arguments of `param_grad_sq_norm`."""

    over: str | int = "sample"
    method: str = "exact"
    scheme: str = "forward"
    step: float = 0.01
    parameters: ParameterFilter | None = None

    def __post_init__(self) -> None:
        if isinstance(self.over, str):
            _checks.check_choice("over", self.over, ("sample", "batch"))
        else:
            _checks.check_positive_int("over", self.over)
        _checks.check_choice("method", self.method, ("exact", "finite_difference"))
        _checks.check_choice("scheme", self.scheme, finite_difference.SCHEMES)
        _checks.check_positive("step", self.step)
        if self.parameters is not None and not callable(self.parameters):
            patterns = [self.parameters] if isinstance(self.parameters, str) else list(self.parameters)
            strangers = [pattern for pattern in patterns if not isinstance(pattern, str)]
            if strangers:
                raise TypeError(
                    "parameters must be a callable (name, parameter) → bool or glob patterns of names such as "
                    f"['*.weight'], got a {type(strangers[0]).__name__} among the patterns"
                )
            object.__setattr__(self, "parameters", patterns)  # an iterator would be empty at the second call

    @property
    def is_batch_difference(self) -> bool:
        """Whether it is the finite difference of the whole batch's gradient."""
        return self.method == "finite_difference" and self.over == "batch"

    def group_size(self, batch_size: int) -> int:
        """Samples whose gradients are averaged before the norm is taken."""
        if self.over == "batch":
            return batch_size
        return 1 if self.over == "sample" else min(int(self.over), batch_size)

    def group_sizes(self, batch_size: int, like: Tensor) -> Tensor | None:
        """How many samples each group holds, the last one what is left: (groups,); None if all hold as many."""
        group_size = self.group_size(batch_size)
        if batch_size % group_size == 0:
            return None
        starts = torch.arange(0, batch_size, group_size, device=like.device)
        return (batch_size - starts).clamp(max=group_size).to(like.dtype)

    def scalar(self, criterion: Criterion, target: Any) -> Scalar:
        """The model's output → f, (B,)."""
        return criterion.scalar(target)


Term = InputTerm | ParamTerm


@dataclass  # no named tuple: torch 2.8 traces no properties of these
class GroupNorms:
    """What a term came to.

    Attributes:
        values: squared norms, or norms, of all groups: (groups,), differentiable. 0-dim: the mean of the squared norms.
        sizes: how many samples are behind each, (groups,); None where all have as many.
        are_squared: whether the values are squared norms.
    """

    values: Tensor
    sizes: Tensor | None = None
    are_squared: bool = True

    @property
    def sq_norms(self) -> Tensor:
        """‖·‖²: (groups,), or their mean."""
        return self.values if self.are_squared else self.values.square()

    @property
    def norms(self) -> Tensor:
        """‖·‖, with derivative 0 at 0: (groups,)."""
        return safe_sqrt(self.values) if self.are_squared else self.values


def select_parameters(model: nn.Module, which: ParameterFilter | None) -> dict[str, nn.Parameter]:
    """Name → parameter for those that require grad and pass the filter.

    Raises:
        ValueError: if there is none.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            f"expected a model with trainable parameters, got {type(model).__name__} with none that requires grad: "
            "the parameter gradient of a frozen or parameter-free model is empty"
        )
    if which is None:
        return trainable
    names = names_of_tensors(model)

    def counts(name: str, p: nn.Parameter) -> bool:
        if callable(which):
            return bool(which(name, p))
        return any(fnmatch(name, pattern) for pattern in which)

    chosen = {
        name: p for name, p in trainable.items() if any(counts(alias, p) for alias in {name, *names.get(id(p), ())})
    }
    if not chosen:
        raise ValueError(f"parameters={which!r} selects none of {', '.join(trainable)}")
    return chosen
