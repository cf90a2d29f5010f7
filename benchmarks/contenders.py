"""Who competes at what: every job of the table, with a floor, a target, and everybody who can do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import peers
import straight_line
import torch
import torch.nn.functional as F
import written_out
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from workload import Workload
from written_out import Computed

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss
from gradpen.functional import param_grad_sq_norm
from gradpen.penalties import GradPenalty, PenalizedOutput
from gradpen.terms import GroupNorms

# such that a penalty is a good part of the gradient: a wrong one cannot hide in the tolerance of the comparison
INPUT_WEIGHT, PARAM_WEIGHT, BATCH_WEIGHT, OUTPUT_WEIGHT = 30.0, 0.01, 0.3, 3.0
RADIUS = 0.05  # of SAM and of the finite difference that equals it
EVERY = 4
BY_HAND, BETWEEN_SAMPLES = "by hand", "by hand, products between samples"
WITHOUT_AUTOGRAD, BEHIND_A_LOSS = "by hand, without autograd", "by hand, behind a loss"

Step = Callable[[], Tensor]  # returns R, or the norms, without a graph
StepOf = Callable[[Workload, list[GradPenalty]], Step]
Who = Literal["gradpen", "straight line", "peer"]


@dataclass(frozen=True)
class Contender:
    """One way to do a job.

    Attributes:
        name: as in the table.
        who: gradpen's table row has its figure, the straight line is the floor in practice, the others are peers.
        build: everything that is done once; raises `peers.UnsupportedJobError`.
        compiled: building takes long: not for a quick run.
    """

    name: str
    who: Who
    build: Callable[[Workload], Step]
    compiled: bool = False


@dataclass(frozen=True)
class Job:
    """One row of the table.

    Attributes:
        key: in the JSON.
        title: in the table.
        floor: multiplications in units of a plain step's (`workload.floors`).
        target: what gradpen has set itself.
        gradients: whether a step leaves gradients in ``.grad``, to be compared.
        contenders: the straight line first: it is the reference.
    """

    key: str
    title: str
    floor: str
    target: float
    gradients: bool
    contenders: tuple[Contender, ...]


def jobs() -> list[Job]:
    """All rows about penalties and norms."""
    return [
        Job(
            "input",
            "input penalty, exact",
            "input",
            2.35,
            True,
            (
                _straight(lambda work: straight_line.input_step(work, INPUT_WEIGHT)),
                *_written_out(lambda: partial(written_out.penalised, input_weight=INPUT_WEIGHT)),
                *_objectives(lambda: [InputGradPenalty(INPUT_WEIGHT)]),
                Contender("added to a loss, two forward passes", "gradpen", _added_input_penalty),
                _peer("double backprop by hand", lambda w: peers.double_backprop_input_step(w, INPUT_WEIGHT)),
            ),
        ),
        Job(
            "param",
            "param penalty over samples, exact",
            "param",
            1.6,
            True,
            (
                _straight(lambda work: straight_line.param_step(work, PARAM_WEIGHT)),
                *_written_out(lambda: partial(written_out.penalised, param_weight=PARAM_WEIGHT)),
                *_objectives(lambda: [ParamGradPenalty(PARAM_WEIGHT)]),
                Contender("BackPACK, create_graph", "peer", _backpack_param_step),
                Contender("Opacus", "peer", _opacus_param_step),
                _peer("vmap(grad)", lambda work: peers.vmap_param_step(work, PARAM_WEIGHT)),
            ),
        ),
        Job(
            "both",
            "input and param penalty",
            "both",
            2.5,
            True,
            (
                _straight(lambda work: straight_line.both_step(work, INPUT_WEIGHT, PARAM_WEIGHT)),
                *_written_out(
                    lambda: partial(written_out.penalised, input_weight=INPUT_WEIGHT, param_weight=PARAM_WEIGHT)
                ),
                *_objectives(lambda: [InputGradPenalty(INPUT_WEIGHT), ParamGradPenalty(PARAM_WEIGHT)]),
            ),
        ),
        Job(
            "batch",
            "param penalty over the batch, exact",
            "batch",
            2.65,
            True,
            (
                _straight(lambda work: straight_line.batch_step(work, BATCH_WEIGHT)),
                Contender(
                    BETWEEN_SAMPLES,
                    "straight line",
                    lambda work: lambda: straight_line.batch_step(work, BATCH_WEIGHT, between_samples=True),
                ),
                _objective(lambda: [ParamGradPenalty(BATCH_WEIGHT, over="batch")]),
                _peer("double backprop by hand", lambda w: peers.double_backprop_batch_step(w, BATCH_WEIGHT)),
            ),
        ),
        Job(
            "difference",
            "param penalty over the batch, forward difference",
            "difference",
            2.15,
            True,
            (
                _straight(lambda work: straight_line.difference_step(work, RADIUS, RADIUS)),
                _objective(lambda: [_sam_penalty()]),
                _peer("SAM by hand", lambda work: peers.sam_step(work, RADIUS)),
            ),
        ),
        Job(
            "norms",
            "per-sample ‖∇_θ f‖² alone",
            "norms",
            1.0,
            False,
            (
                _straight(straight_line.sample_norms),
                Contender(
                    "param_grad_sq_norm",
                    "gradpen",
                    lambda w: lambda: param_grad_sq_norm(w.model, w.x, w.y, create_graph=False),
                ),
                Contender("BackPACK", "peer", lambda work: peers.BackpackBatchL2(work).norms_and_step),
                Contender("Opacus", "peer", lambda work: peers.OpacusGhostNorms(work).norms_and_step),
                _peer("vmap(grad)", peers.vmap_norms_only),
            ),
        ),
        Job(
            "norms_and_step",
            "per-sample ‖∇_θ f‖² with a training backward",
            "norms_and_step",
            1.12,
            True,
            (
                *_written_out(lambda: written_out.sample_norms),
                *_both_modes(_norms_beside_step),
                Contender("BackPACK", "peer", lambda work: peers.BackpackBatchL2(work).norms_and_step),
                Contender("Opacus", "peer", lambda work: peers.OpacusGhostNorms(work).norms_and_step),
            ),
        ),
        Job(
            "projection",
            "Jacobian of the outputs, one projection",
            "projection",
            2.35,
            True,
            (
                Contender(BY_HAND, "straight line", _straight_projection),
                *_written_out(_projection_written_out),
                Contender("PenalizedLoss", "gradpen", _projected_objective),
                Contender("PenalizedLoss, compiled", "gradpen", _compiled_projected_objective, compiled=True),
                Contender("Jacobian regulariser by hand", "peer", _jacobian_regularizer),
            ),
        ),
        Job(
            "lazy",
            f"input penalty, every_n_steps={EVERY}, average step",
            "lazy",
            1.35,
            True,
            (
                _lazy(_straight(lambda work: straight_line.input_step(work, EVERY * INPUT_WEIGHT))),
                *map(_lazy, _written_out(lambda: partial(written_out.penalised, input_weight=EVERY * INPUT_WEIGHT))),
                *_objectives(lambda: [InputGradPenalty(INPUT_WEIGHT, every_n_steps=EVERY)]),
            ),
        ),
    ]


def objective_step(work: Workload, penalties: list[GradPenalty]) -> Step:
    """One whole step through the public interface."""
    objective = PenalizedLoss(F.cross_entropy, *penalties)
    return _step_of(work, partial(objective, work.model))


def compiled_step(work: Workload, penalties: list[GradPenalty], **options: Any) -> Step:
    """The same, compiled."""
    if torch.__version__ < (2, 8):
        raise peers.UnsupportedJobError("torch 2.8 is the oldest that can compile a penalty")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise peers.UnsupportedJobError("torch.compile finds no C++ compiler") from error
    torch._dynamo.reset()  # what was compiled before has run: a function is compiled a limited number of times
    step = _step_of(work, partial(PenalizedLoss(F.cross_entropy, *penalties).compiled(**options), work.model))
    for _ in range(EVERY):  # steps with and without the penalty
        step()
    for penalty in penalties:
        penalty.num_calls = 0
    return step


def _step_of(work: Workload, loss_of: Callable[[Tensor, Tensor], PenalizedOutput]) -> Step:
    def step() -> Tensor:
        work.model.zero_grad()
        out = loss_of(work.x, work.y)
        out.loss.backward()
        values = [value.detach() for value in out.penalties.values()]
        return values[0] if len(values) == 1 else torch.stack(values)

    return step


def _straight(step: Callable[[Workload], Tensor]) -> Contender:
    return Contender(BY_HAND, "straight line", lambda work: lambda: step(work))


def _written_out(new: Callable[[], Callable[[Workload], Computed]]) -> tuple[Contender, Contender]:
    return (
        Contender(WITHOUT_AUTOGRAD, "straight line", lambda work: written_out.without_autograd(work, new())),
        Contender(BEHIND_A_LOSS, "straight line", lambda work: written_out.behind_a_loss(work, new())),
    )


def _peer(name: str, step: Callable[[Workload], Tensor]) -> Contender:
    return Contender(name, "peer", lambda work: lambda: step(work))


def _objective(penalties: Callable[[], list[GradPenalty]]) -> Contender:
    return Contender("PenalizedLoss", "gradpen", lambda work: objective_step(work, penalties()))


def _objectives(penalties: Callable[[], list[GradPenalty]]) -> tuple[Contender, Contender]:
    return _both_modes(lambda work, step_of: step_of(work, penalties()))


def _both_modes(build: Callable[[Workload, StepOf], Step]) -> tuple[Contender, Contender]:
    return (
        Contender("PenalizedLoss", "gradpen", lambda work: build(work, objective_step)),
        Contender("PenalizedLoss, compiled", "gradpen", lambda work: build(work, compiled_step), compiled=True),
    )


def _added_input_penalty(work: Workload) -> Step:
    penalty = InputGradPenalty(INPUT_WEIGHT)

    def step() -> Tensor:
        work.model.zero_grad()
        term = penalty(work.model, work.x, work.y)
        (F.cross_entropy(work.model(work.x), work.y) + term).backward()
        return term.detach() / INPUT_WEIGHT

    return step


class _SingleNorms(ParamGradPenalty):
    """Keeps what it reduces: the samples' norms, which R needs no more than the sum of."""

    def reduce(self, norms: GroupNorms) -> Tensor:
        self.sq_norms = norms.sq_norms
        return super().reduce(norms)


def _norms_beside_step(work: Workload, step_of: StepOf) -> Step:
    penalty = _SingleNorms(0.0)
    step = step_of(work, [penalty])

    def norms_and_step() -> Tensor:
        step()
        return penalty.sq_norms

    return norms_and_step


def _sam_penalty() -> ParamGradPenalty:
    """The setting in which the penalised gradient is SAM's."""
    return ParamGradPenalty(RADIUS, over="batch", method="finite_difference", squared=False, step=RADIUS)


def _backpack_param_step(work: Workload) -> Step:
    backpack = peers.BackpackBatchL2(work)
    return lambda: backpack.param_step(PARAM_WEIGHT)


def _opacus_param_step(work: Workload) -> Step:
    opacus = peers.OpacusGhostNorms(work)
    opacus.check_differentiable()
    return opacus.norms_and_step


def _straight_projection(work: Workload) -> Step:
    generator = torch.Generator().manual_seed(0)
    return lambda: straight_line.projection_step(work, OUTPUT_WEIGHT, generator)


def _projection_written_out() -> Callable[[Workload], Computed]:
    generator = torch.Generator().manual_seed(0)

    def compute(work: Workload) -> Computed:
        directions = straight_line.scaled_directions(work.y.new_empty(len(work.y), 10, dtype=work.x.dtype), generator)
        return written_out.penalised(work, OUTPUT_WEIGHT, directions=directions)

    return compute


def _projected_objective(work: Workload) -> Step:
    generator = torch.Generator().manual_seed(0)
    return objective_step(
        work, [InputGradPenalty(OUTPUT_WEIGHT, of="output", method="projection", generator=generator)]
    )


def _compiled_projected_objective(work: Workload) -> Step:
    """A graph cannot draw from a generator of its own: it draws what torch's would from the same seed."""
    penalty = InputGradPenalty(OUTPUT_WEIGHT, of="output", method="projection")
    step = compiled_step(work, [penalty], options={"fallback_random": True})
    torch.manual_seed(0)
    return step


def _jacobian_regularizer(work: Workload) -> Step:
    generator = torch.Generator().manual_seed(0)
    return lambda: peers.jacobian_regularizer_step(work, OUTPUT_WEIGHT, generator)


def _lazy(contender: Contender) -> Contender:
    """Its step, and then plain ones until it is its turn again."""

    def build(work: Workload) -> Step:
        penalised, calls = contender.build(work), 0

        def step() -> Tensor:
            nonlocal calls
            calls += 1
            if calls % EVERY == 1:
                return penalised()
            straight_line.plain_step(work)
            return work.x.new_zeros(())

        return step

    return replace(contender, build=build)
