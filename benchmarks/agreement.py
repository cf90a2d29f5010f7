"""Before anything is timed: all contenders compute the same numbers."""

from __future__ import annotations

import torch
from contenders import Contender, Job
from peers import UnsupportedJobError
from torch import Tensor, nn
from workload import Workload

TOLERANCE = 1e-4  # relative error against double precision: a few hundred roundings of float32


class DisagreementError(AssertionError):
    """Two contenders computed different things, so their times mean nothing."""


def check_agreement(job: Job, work: Workload) -> dict[str, float | str]:
    """Relative errors of values and gradients against the straight-line code in float64.

    Returns:
        contender → the larger of the two errors, or why it cannot do the job.

    Raises:
        DisagreementError: naming the contender.
    """
    expected, expected_gradient = _result(job, job.contenders[0], work.in_float64())
    errors: dict[str, float | str] = {}
    for contender in job.contenders:
        try:
            value, gradient = _result(job, contender, work.copied())
        except UnsupportedJobError as reason:
            errors[contender.name] = str(reason)
            continue
        reference = expected if value.shape == expected.shape else expected.mean()
        error = relative_error(value, reference)
        if job.gradients:
            error = max(error, relative_error(gradient, expected_gradient))
        if not error <= TOLERANCE:
            raise DisagreementError(f"{job.title}: {contender.name} is off by {error:.1e}, allowed is {TOLERANCE:.0e}")
        errors[contender.name] = error
    return errors


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖."""
    difference = torch.linalg.vector_norm(value.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def _result(job: Job, contender: Contender, work: Workload) -> tuple[Tensor, Tensor]:
    """What the first call returns, and the gradients that it leaves behind."""
    value = contender.build(work)()
    return value, _flat_gradient(work.model) if job.gradients else value


def _flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.detach().flatten() for p in model.parameters() if p.grad is not None])
