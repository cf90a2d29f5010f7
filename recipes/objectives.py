"""What is minimised: cross entropy, gradient penalties, and what they cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from flags import Settings, UserError
from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss
from gradpen.penalties import GradPenalty


def penalised_loss(settings: Settings) -> PenalizedLoss:
    """Cross entropy with the penalties that the settings name.

    Raises:
        UserError: if gradpen refuses the combination of flags.
    """
    try:
        return PenalizedLoss(_cross_entropy(settings.label_smoothing), *_penalties(settings))
    except ValueError as error:
        raise UserError(f"--penalty {settings.penalty}: {error}") from error


def _penalties(settings: Settings) -> list[GradPenalty]:
    shared: dict[str, Any] = {"squared": not settings.unsquared, "every_n_steps": settings.every_n_steps}
    penalties: list[GradPenalty] = []
    weight, method = settings.weight, settings.method
    if settings.penalty in ("input", "both"):
        penalties.append(InputGradPenalty(weight or 0.0, of=settings.of, method=method, **shared))
        weight = settings.param_weight
        method = "exact" if method == "projection" else method  # projections are of the output
    if settings.penalty in ("param", "both"):
        penalties.append(ParamGradPenalty(weight or 0.0, over=settings.over, method=method, **shared))
    if settings.sam_radius:
        penalties.append(sam(settings.sam_radius))
    return penalties


def sam(radius: float) -> ParamGradPenalty:
    """Sharpness-aware minimisation, the case weight = step of the penalty on ‖∇_θ L‖: the gradient of θ + radius·g/‖g‖."""
    return ParamGradPenalty(radius, over="batch", method="finite_difference", step=radius, squared=False, name="sam")


def _cross_entropy(label_smoothing: float) -> Callable[..., Tensor]:
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing) if label_smoothing else F.cross_entropy


def cost_in_multiplications(model: nn.Module, objective: PenalizedLoss, x: Tensor, y: Tensor) -> float:
    """Multiplications of forward and backward with the penalties, in units of those without any.

    Counted by torch's own formulas while a copy of the model makes its steps: as many as lazy penalties take to come
    round. gradpen looks at a model again in its 1st, 2nd, 3rd, 5th, 9th, … step; those counted are between these.
    """
    model, objective = copy.deepcopy((model, objective))
    model.train()
    lazy = max(
        (penalty.every_n_steps for penalty in objective.penalties if isinstance(penalty, GradPenalty)), default=1
    )
    plain = PenalizedLoss(objective.criterion)
    for _ in range(5 * lazy):
        objective(model, x, y).loss.backward()
    return _multiplications(model, objective, x, y, lazy) / _multiplications(model, plain, x, y, lazy)


def _multiplications(model: nn.Module, objective: PenalizedLoss, x: Tensor, y: Tensor, steps: int) -> int:
    with CountedMultiplications() as counted:
        for _ in range(steps):
            objective(model, x, y).loss.backward()
    return counted.total


class CountedMultiplications(TorchDispatchMode):
    """Adds up torch's formulas for matrix products and convolutions.

    `torch.utils.flop_counter.FlopCounterMode` does so by module, with hooks that `torch.autograd.grad` within a forward
    pass does not take.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count it if it multiplies."""
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
