"""Before anything is timed: all contenders compute the same numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from contenders import Contender, Job
from measure import CALLS
from peers import UnsupportedJobError
from torch import Tensor, nn
from workload import Workload

TOLERANCE = 1e-4  # relative error against double precision: a few hundred roundings of float32


class DisagreementError(AssertionError):
    """Two contenders computed different things, so their times mean nothing."""


def check_agreement(job: Job, work: Workload, left_out: Mapping[str, str] | None = None) -> dict[str, float | str]:
    """Relative errors of the values and gradients of CALLS steps against the straight-line code in float64.

    Args:
        job: whose contenders are compared.
        work: the net and the batch.
        left_out: contender → why it is not asked.

    Returns:
        contender → the larger of the two errors, or why it cannot do the job.

    Raises:
        DisagreementError: naming the contender.
    """
    expected = _results(job, job.contenders[0], work.in_float64())
    errors: dict[str, float | str] = {}
    for contender in job.contenders:
        if left_out and contender.name in left_out:
            errors[contender.name] = left_out[contender.name]
            continue
        try:
            found = _results(job, contender, work.copied())
        except UnsupportedJobError as reason:
            errors[contender.name] = str(reason)
            continue
        except Exception as failure:
            if contender.who != "peer":
                raise
            errors[contender.name] = f"fails: {described(failure)}"  # of these versions of it and of torch
            continue
        errors[contender.name] = check_close(f"{job.title}: {contender.name}", found, expected)
    return errors


def check_close(who: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = TOLERANCE) -> float:
    """The largest of the relative errors.

    Raises:
        DisagreementError: if one is above the tolerance, or NaN.
    """
    errors = [relative_error(value, reference) for value, reference in zip(found, expected, strict=True)]
    for error in errors:
        if not error <= tolerance:  # max() could lose a NaN
            raise DisagreementError(f"{who} is off by {error:.1e}, allowed is {tolerance:.0e}")
    return max(errors)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖; infinite between tensors of different shapes."""
    if value.shape != expected.shape:
        return math.inf
    difference = torch.linalg.vector_norm(value.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def described(error: Exception) -> str:
    """The error's type, and the first line of what it says, if anything."""
    message = str(error).strip()
    return f"{type(error).__name__}: {message.splitlines()[0]}" if message else type(error).__name__


def _results(job: Job, contender: Contender, work: Workload) -> list[Tensor]:
    """What CALLS calls return, and the gradients that they leave behind."""
    step = contender.build(work)
    values, gradients = [], []
    for _ in range(CALLS):  # a lazy penalty has gone round once, and what one step leaves behind has met the next
        values.append(step())
        if job.gradients:
            gradients.append(flat_gradient(work.model).clone())
    return [torch.stack(values), *([torch.stack(gradients)] if gradients else [])]


def flat_gradient(model: nn.Module) -> Tensor:
    """All parameters' gradients in one vector."""
    return torch.cat([p.grad.detach().flatten() for p in model.parameters() if p.grad is not None])
