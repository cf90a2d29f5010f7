"""Steps on a GPU: plain, penalised, and both compiled into CUDA graphs, in turn with the plain step in eager mode.

And a check of the inequality, which has no compiled form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import straight_line
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, DisagreementError, check_close, described, flat_gradient, relative_error
from contenders import BATCH_WEIGHT, INPUT_WEIGHT, PARAM_WEIGHT
from machine import cpu_model
from measure import race
from torch import Tensor, nn
from workload import Workload, synthetic_workload

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss, evaluate_inequality
from gradpen.penalties import GradPenalty

STEPS = 20  # before the host waits for the device
WARM_UP = 6  # compiled for the first call and again for later ones; both are run, recorded and replayed

WIDE, WIDE_BATCH = [3072, 4096, 4096, 4096, 10], 1024  # whose products keep a GPU busy

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def cuda_table(
    work: Workload, *, quick: bool, rounds: int, seconds: float, advance: Callable[[float], object]
) -> dict[str, Any] | None:
    """What `step_table` finds for this and, unless `quick`, a wide net, and the device; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    works = [work] if quick else [work, synthetic_workload(WIDE, WIDE_BATCH)]
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "nets": [],
    }
    for number, one in enumerate(works, start=1):
        steps = step_table(one, "cuda", rounds=rounds, seconds=seconds)
        widths = [one.linears[0].in_features, *[linear.out_features for linear in one.linears]]
        found["nets"].append({"widths": widths, "batch_size": len(one.x), "steps": steps})
        advance(number / len(works))
    return found


def step_table(work: Workload, device: str, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """For each kind of step its name, and the numbers of "eager" and "compiled" mode, or the reason why there are none.

    Raises:
        DisagreementError: if a step's gradient is not that of the straight-line code.
    """
    work = replace(work.copied(), x=work.x.to(device), y=work.y.to(device))
    work.model.to(device)
    plain = _waited_for(_step(work.copied(), _plain_loss), device)
    table = []
    for name, reference in _references().items():
        torch._dynamo.reset()  # nobody's guards are behind another one's
        steps, reasons = _checked_steps(name, reference, work)
        timings = race(
            plain, {mode: _waited_for(step, device) for mode, step in steps.items()}, rounds=rounds, seconds=seconds
        )
        found = {mode: {**asdict(timing), "seconds": timing.seconds / STEPS} for mode, timing in timings.items()}
        table.append({"name": name, **found, **reasons})
    check = _checked_inequality(work)
    plain = _waited_for(_step(work.copied(), _plain_loss), device, number=1)
    timing = race(plain, {"eager": _waited_for(check, device, number=1)}, rounds=rounds, seconds=seconds)["eager"]
    table.append({"name": "check", "eager": asdict(timing), "compiled": {"reason": "not compiled"}})
    return table


def _checked_inequality(work: Workload) -> Callable[[], object]:
    """`evaluate_inequality` without the slack, when its sides are those in float64 and its bracket has a point in common."""

    def check(of: Workload = work) -> Any:
        return evaluate_inequality(of.model, of.x, of.y, slack=False)

    found, expected = check(), check(work.in_float64())
    sides = [[report.rhs, report.input_grad_sq_norm] for report in (found, expected)]
    gradients = []
    for of in (work.copied(), work.in_float64()):
        straight_line.plain_step(of)
        gradients.append(flat_gradient(of.model))
    tolerance = _allowed(relative_error(*gradients))
    check_close("check", *sides, tolerance)
    apart = [(a.lhs_lower > (1 + tolerance) * b.lhs_upper).any() for a, b in ((found, expected), (expected, found))]
    if any(apart):
        raise DisagreementError("check: the brackets have no point in common with those in float64")
    return check


def _checked_steps(
    name: str, reference: Callable[[Workload], Tensor], work: Workload
) -> tuple[dict[str, Callable[[], None]], dict[str, dict[str, str]]]:
    """Mode → a step that is warm and right; and mode → why there is none."""
    expected, by_hand = work.in_float64(), work.copied()
    reference(expected)
    reference(by_hand)
    tolerance = _allowed(relative_error(flat_gradient(by_hand.model), flat_gradient(expected.model)))
    steps, reasons = {}, {}
    for mode in ("eager", "compiled"):
        contender = work.copied()
        step = _step(contender, _loss(name, compiled=mode == "compiled"))
        try:
            for _ in range(WARM_UP):
                step()
        except Exception as error:  # whatever the compiler raises belongs into the table
            if mode == "eager":
                raise
            reasons[mode] = {"reason": described(error)}
            continue
        check_close(f"{name}, {mode}", [flat_gradient(contender.model)], [flat_gradient(expected.model)], tolerance)
        steps[mode] = step
    return steps, reasons


def _allowed(of_float32: float) -> float:
    """Where float32 alone moves the code by hand so far: of a million units some are off in one type and on in the other."""
    return max(TOLERANCE, 4 * of_float32)


def _references() -> dict[str, Callable[[Workload], Tensor]]:
    """Kind of step → the same as straight-line code."""
    return {
        "plain": straight_line.plain_step,
        "input": lambda work: straight_line.input_step(work, INPUT_WEIGHT),
        "param": lambda work: straight_line.param_step(work, PARAM_WEIGHT),
        "both": lambda work: straight_line.both_step(work, INPUT_WEIGHT, PARAM_WEIGHT),
        "batch": lambda work: straight_line.batch_step(work, BATCH_WEIGHT),
    }


def _loss(name: str, *, compiled: bool) -> Loss:
    """The loss that is differentiated, compiled into CUDA graphs or not."""
    penalties: list[GradPenalty] = []
    if name in ("input", "both"):
        penalties.append(InputGradPenalty(INPUT_WEIGHT))
    if name in ("param", "both"):
        penalties.append(ParamGradPenalty(PARAM_WEIGHT))
    if name == "batch":
        penalties.append(ParamGradPenalty(BATCH_WEIGHT, over="batch"))
    objective: Any = PenalizedLoss(F.cross_entropy, *penalties) if penalties else _plain_loss
    if compiled and penalties:
        objective = _in_graphs(objective.compiled(mode="reduce-overhead"))
    elif compiled:
        objective = _in_graphs(torch.compile(objective, fullgraph=True, mode="reduce-overhead"))
    return (lambda model, x, y: objective(model, x, y).loss) if penalties else objective


def _in_graphs(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step left in the graphs' memory may be overwritten
        return compiled(*args)

    return call


def _plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _step(work: Workload, loss: Loss) -> Callable[[], None]:
    def step() -> None:
        work.model.zero_grad()
        loss(work.model, work.x, work.y).backward()

    return step


def _waited_for(step: Callable[[], object], device: str, number: int = STEPS) -> Callable[[], None]:
    """So many steps, and all their work done."""

    def steps() -> None:
        for _ in range(number):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return steps
