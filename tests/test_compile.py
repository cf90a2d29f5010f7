"""A compiled objective gives what the eager one gives, or an error that says why not."""

from __future__ import annotations

import copy
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss
from gradpen.penalties import GradPenalty, PenalizedOutput

DOCUMENT = Path(__file__).parent.parent / "docs" / "compile.md"
BATCH = 11  # no width and no number of tokens or pixels in the cases: such a batch is refused
STEPS_CAN_BE_VARIABLES = hasattr(torch._dynamo, "patch_dynamo_config")
needs_compilable_torch = pytest.mark.skipif(not STEPS_CAN_BE_VARIABLES, reason="torch >= 2.8 compiles penalties")
needs_a_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


def one_step(objective: Callable[..., PenalizedOutput], model: nn.Module, x: Any, y: Any) -> list[Tensor]:
    """Everything that a step computes: loss, data loss, penalties, output, gradients."""
    model.zero_grad()
    out = objective(model, x, y)
    out.loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    values = [out.loss, out.data_loss, *out.penalties.values(), out.output]
    return [value.detach() for value in values] + gradients


def assert_same_step(
    objective: PenalizedLoss, model: nn.Module, x: Any, y: Any, tolerance: float = 1e-10, backend: Any = "aot_eager"
) -> None:
    eager = one_step(objective, model, x, y)
    torch.testing.assert_close(
        one_step(compiled(objective, backend), model, x, y), eager, rtol=tolerance, atol=tolerance * 10
    )


def small_mlp(*, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def batch_of(size: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 4, dtype=torch.float64), torch.randint(3, (size,))


def first_output(output: Tensor, target: Tensor) -> Tensor:
    return output[:, 0]


# ---- the same numbers -----------------------------------------------------------------------------------------------


@needs_compilable_torch
@pytest.mark.parametrize(
    "name",
    ["inplace_relu", "conv_stack", "layer_norm_tokens", "embedding_padding", "tied_autoencoder", "two_inputs_dict"],
)
def test_both_penalties_equal_the_eager_ones(name):
    case = cases.find(name)
    model, x, y, criterion = case.problem(BATCH)
    inputs = [InputGradPenalty(0.3)] if case.float_input else []
    assert_same_step(PenalizedLoss(criterion, *inputs, ParamGradPenalty(0.1)), model, x, y)


VARIANTS: dict[str, list[GradPenalty]] = {
    "whole_batch": [ParamGradPenalty(0.1, over="batch"), InputGradPenalty(0.1, of=first_output, target=0.5)],
    "micro_batches": [ParamGradPenalty(0.1, over=4, squared=False, parameters=["0.*"])],
    "finite_difference": [
        ParamGradPenalty(0.1, over="batch", method="finite_difference"),
        InputGradPenalty(0.1, method="finite_difference", scheme="central"),
    ],
    "jacobian": [InputGradPenalty(0.1, of="output")],
}


@needs_compilable_torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_penalty_equals_the_eager_one(variant):
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    objective = PenalizedLoss(criterion, *VARIANTS[variant])
    assert_same_step(objective, small_mlp(), *batch_of())
    assert criterion.reduction == "mean"


@needs_compilable_torch
def test_projection_of_a_single_output_is_exact():
    x, _ = batch_of()
    y = torch.randn(BATCH, 1, dtype=torch.float64)
    exact, estimated = InputGradPenalty(0.1, of="output"), InputGradPenalty(0.1, of="output", method="projection")
    model = small_mlp(outputs=1)
    expected = one_step(PenalizedLoss(F.mse_loss, exact), model, x, y)
    actual = one_step(compiled(PenalizedLoss(F.mse_loss, estimated)), model, x, y)
    torch.testing.assert_close(actual, expected)


@needs_compilable_torch
def test_a_penalty_within_a_compiled_function():
    model, (x, y), penalty = small_mlp(), batch_of(), InputGradPenalty(0.1)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(2 * x), y) + penalty(model, 2 * x, y)

    torch.testing.assert_close(compiled(loss)(x, y), loss(x, y))


class Weighted(NamedTuple):
    classes: Tensor
    weight: Tensor


@needs_compilable_torch
def test_a_target_may_be_a_named_tuple():
    def criterion(output: Tensor, target: Weighted) -> Tensor:
        return F.cross_entropy(output, target.classes, reduction="none") * target.weight

    x, y = batch_of()
    target = Weighted(y, torch.rand(BATCH, dtype=torch.float64))
    assert_same_step(PenalizedLoss(criterion, InputGradPenalty(0.1), ParamGradPenalty(0.1)), small_mlp(), x, target)


@needs_compilable_torch
def test_batches_of_other_sizes():
    model, counter = small_mlp(), CompileCounterWithBackend("aot_eager")
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1), ParamGradPenalty(0.1))
    step = compiled(objective, counter)
    for size in (BATCH, 8, 13, 7):
        x, y = batch_of(size)
        torch.testing.assert_close(one_step(step, model, x, y), one_step(objective, model, x, y))
    assert counter.frame_count <= 3


SIZES = {
    "jacobian": [InputGradPenalty(0.1, of="output")],
    "projection": [InputGradPenalty(0.1, of="output", method="projection")],
}


@needs_compilable_torch
@pytest.mark.parametrize("name", SIZES)
def test_jacobians_of_batches_of_other_sizes(name):
    model, counter = (
        small_mlp(outputs=1),
        CompileCounterWithBackend("aot_eager"),
    )  # one output: every projection is exact
    objective = PenalizedLoss(F.mse_loss, *SIZES[name])
    step = compiled(objective, counter)
    for size in (BATCH, 8, 13):
        x, y = torch.randn(size, 4, dtype=torch.float64), torch.randn(size, 1, dtype=torch.float64)
        torch.testing.assert_close(one_step(step, model, x, y), one_step(objective, model, x, y))
    assert counter.frame_count == 2


class Scaled(nn.Module):
    """Is given a number besides the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small_mlp()

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.layers(scale * x)


@needs_compilable_torch
def test_numbers_in_the_input_may_change():
    model, objective, (x, y) = Scaled().double(), PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1)), batch_of()
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(objective, counter)
    for scale in (0.5, 0.7, 1.5, 2.5):
        given = {"x": x, "scale": scale}
        torch.testing.assert_close(one_step(step, model, given, y), one_step(objective, model, given, y))
    assert counter.frame_count == 2


class SequenceFirst(nn.Module):
    """Lays its tokens out before the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.transpose(0, 1)).tanh().mean(0))


@needs_compilable_torch
def test_a_model_whose_tokens_come_first():
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1), ParamGradPenalty(0.1))
    x, y = torch.randn(BATCH, 5, 4, dtype=torch.float64), torch.randint(3, (BATCH,))
    assert_same_step(objective, SequenceFirst().double(), x, y)


class OfItsClass(nn.Module):
    """Has a reduction that every instance starts with."""

    reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction=self.reduction)


@needs_compilable_torch
def test_a_reduction_that_is_an_attribute_of_the_class():
    criterion = OfItsClass()
    assert_same_step(PenalizedLoss(criterion, ParamGradPenalty(0.1)), small_mlp(), *batch_of())
    assert criterion.reduction == "mean"


PARTIALS = {
    "options": partial(F.cross_entropy, label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
    "per sample": partial(lambda factor, output, target: factor * output.square().sum(1), 0.5),
}


@needs_compilable_torch
@pytest.mark.parametrize("kind", PARTIALS)
def test_a_partial_as_criterion(kind: str):
    objective, model, (x, y) = PenalizedLoss(PARTIALS[kind], InputGradPenalty(0.1)), small_mlp(), batch_of()
    step = compiled(objective)
    torch.testing.assert_close(one_step(step, model, x, y), one_step(objective, model, x, y))
    other = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)  # to be noticed, though it looks like the one before
    objective.criterion = partial(F.cross_entropy, label_smoothing=0.1, weight=other)
    anew = PenalizedLoss(objective.criterion, InputGradPenalty(0.1))  # which has seen no other
    torch.testing.assert_close(one_step(step, model, x, y), one_step(anew, model, x, y))
    torch.testing.assert_close(one_step(objective, model, x, y), one_step(anew, model, x, y))


# ---- what changes after the compilation -----------------------------------------------------------------------------


def tie(model: nn.Sequential, objective: PenalizedLoss) -> None:
    model[2].weight = model[0].weight


def set_criterion(model: nn.Sequential, objective: PenalizedLoss) -> None:
    objective.criterion = nn.CrossEntropyLoss(label_smoothing=0.3)
    objective.penalties[0].criterion = nn.CrossEntropyLoss(label_smoothing=0.2)


def set_reduction(model: nn.Sequential, objective: PenalizedLoss) -> None:
    objective.criterion.reduction = "sum"


@needs_compilable_torch
@pytest.mark.parametrize("change", [tie, set_criterion, set_reduction])
def test_a_change_is_noticed(change):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    objective, (x, y) = PenalizedLoss(nn.CrossEntropyLoss(), ParamGradPenalty(0.1), InputGradPenalty(0.1)), batch_of()
    step = compiled(objective)
    for _ in range(2):  # the second step has a graph of its own
        step(model, x, y)
    change(model, objective)
    torch.testing.assert_close(one_step(step, model, x, y), one_step(objective, model, x, y))


@needs_compilable_torch
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="this torch takes numbers that are attributes for constants")
def test_other_weights_are_no_new_graphs():
    model, (x, y), counter = small_mlp(), batch_of(), CompileCounterWithBackend("aot_eager")
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1), ParamGradPenalty(0.1))
    step = compiled(objective, counter)
    for number in range(12):
        objective.penalties[0].weight = 0.1 * (number + 1)
        torch.testing.assert_close(one_step(step, model, x, y), one_step(objective, model, x, y))
    assert counter.frame_count <= 3


@needs_compilable_torch
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="this torch takes numbers that are attributes for constants")
def test_other_weights_of_a_lazy_penalty_are_no_new_graphs():
    """The steps without the term must not look at the weight: it would be a constant of all later graphs."""
    model, (x, y), counter = small_mlp(), batch_of(), CompileCounterWithBackend("aot_eager")
    traced, eager = (PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1, every_n_steps=2)) for _ in range(2))
    step = compiled(traced, counter)
    for number in range(10):
        traced.penalties[0].weight = eager.penalties[0].weight = 0.1 * (number + 1)
        torch.testing.assert_close(one_step(step, model, x, y), one_step(eager, model, x, y))
    assert counter.frame_count <= 3


class Mixing(nn.Module):
    """Mixes the samples if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head, self.share = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), nn.Linear(5, 3), 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(x)
        return self.head(h + self.share * h.mean(0))


@needs_compilable_torch
def test_every_compilation_looks_at_the_samples():
    model, step = Mixing().double(), compiled(PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1)))
    for size in (BATCH, BATCH, 8):
        step(model, *batch_of(size))
    model.share = 1.0
    with pytest.raises(RuntimeError, match="mixes the samples"):
        step(model, *batch_of())


# ---- the step counter -----------------------------------------------------------------------------------------------


def lazy_objective() -> PenalizedLoss:
    return PenalizedLoss(F.cross_entropy, InputGradPenalty(lambda step: 0.1 / (1 + step), every_n_steps=4))


@needs_compilable_torch
def test_steps_are_no_new_graphs():
    model, (x, y) = small_mlp(), batch_of()
    counter = CompileCounterWithBackend("aot_eager")
    eager, traced = lazy_objective(), lazy_objective()
    step, frames = compiled(traced, counter), []
    for _ in range(12):
        torch.testing.assert_close(one_step(step, model, x, y), one_step(eager, model, x, y))
        frames.append(counter.frame_count)
    assert frames == [1] + [2] * 11  # with the term, and without
    assert traced.state_dict() == eager.state_dict()
    model.eval()
    step(model, x, y)
    assert traced.state_dict() == eager.state_dict()


@needs_compilable_torch
@pytest.mark.parametrize("alone", [False, True], ids=["objective", "penalty"])
def test_steps_of_a_global_variable_are_no_new_graphs(alone: bool):
    """As in a script. To the compiler a number that a global variable leads to is a constant unless it is told otherwise."""
    model, (x, y) = small_mlp(), batch_of()
    names = {"model": model, "objective": lazy_objective(), "cross_entropy": F.cross_entropy}
    names["penalty"] = names["objective"].penalties[0]
    loss = "cross_entropy(model(x), y) + penalty(model, x, y)" if alone else "objective(model, x, y).loss"
    exec(f"def loss_of(x, y): return {loss}", names)
    counter, eager = CompileCounterWithBackend("aot_eager"), lazy_objective()
    loss_of, frames = torch.compile(names["loss_of"], fullgraph=True, backend=counter), []
    for _ in range(12):
        torch.testing.assert_close(loss_of(x, y), eager(model, x, y).loss)
        frames.append(counter.frame_count)
    assert frames == [1] + [2] * 11


def decaying(step: int) -> float:
    """With all kinds of functions that docs/compile.md names."""
    rising = math.sqrt(step) + math.log2(step + 1) + math.floor(step / 4) + math.ceil(step / 4)
    return math.e ** (-0.2 * step) + rising + 2 + math.cos(step) + math.tanh(max(step, 3)) + math.atan(step)


@needs_compilable_torch
def test_schedules_of_functions_that_can_be_traced_are_no_new_graphs():
    model, (x, y), counter = small_mlp(), batch_of(), CompileCounterWithBackend("aot_eager")
    traced, eager = (PenalizedLoss(F.cross_entropy, InputGradPenalty(decaying)) for _ in range(2))
    step = compiled(traced, counter)
    for _ in range(10):
        torch.testing.assert_close(one_step(step, model, x, y), one_step(eager, model, x, y))
    assert counter.frame_count <= 3


@needs_compilable_torch
def test_settings_of_the_compiler_are_put_back():
    def weight(step):
        return 0.1 if step < 2 else -1.0

    with torch.compiler.config.patch(dynamic_sources="L['z']"):
        step = compiled(PenalizedLoss(F.cross_entropy, InputGradPenalty(weight)))
        for _ in range(2):
            step(small_mlp(), *batch_of())
        with pytest.raises(Exception, match=r"weight must be a finite number >= 0, got -1|exception ExceptionVariable"):
            step(small_mlp(), *batch_of())
        assert torch.compiler.config.dynamic_sources == "L['z']"


@pytest.mark.skipif(STEPS_CAN_BE_VARIABLES, reason="this torch compiles penalties")
def test_an_old_torch_is_told_so():
    with pytest.raises(RuntimeError, match=r"from torch 2\.8 on"):
        compiled(PenalizedLoss(F.cross_entropy, InputGradPenalty()))(small_mlp(), *batch_of())
    with pytest.raises(RuntimeError, match=r"from torch 2\.8 on"):
        PenalizedLoss(F.cross_entropy).compiled()


# ---- random numbers, buffers ----------------------------------------------------------------------------------------


@needs_compilable_torch
def test_one_dropout_mask_for_all_quantities():
    weights = 2.0 ** torch.arange(4, dtype=torch.float64)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1, bias=False)).double()
    model[1].weight.data = weights[None]
    x = torch.ones(
        BATCH, 4, dtype=torch.float64
    )  # the output is Σ 2 · 2^k over the entries that stay: it spells the mask
    by_input, by_weight = InputGradPenalty(of=first_output), ParamGradPenalty(criterion=first_output)
    out = compiled(PenalizedLoss(first_output, by_input, by_weight))(model, x, None)
    masks = torch.stack([(out.output[:, 0] / 2).long() // 2**k % 2 for k in range(4)], 1)
    assert 0 < masks.sum() < masks.numel()
    torch.testing.assert_close(out.penalties["input"], (4 * masks * weights.square()).sum(1).mean())
    torch.testing.assert_close(out.penalties["param"], (4.0 * masks).double().sum(1).mean())


@needs_compilable_torch
def test_looking_at_the_model_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    other, (x, y) = copy.deepcopy(model), batch_of()
    state = torch.get_rng_state()
    compiled(PenalizedLoss(F.cross_entropy, ParamGradPenalty(over="batch")))(model, x, y)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    other(x)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


class ChangingItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = small_mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.mul_(2).sub_(0.3))


@needs_compilable_torch
def test_an_input_is_changed_in_place_once():
    model, objective, (x, y) = ChangingItsInput(), PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1)), batch_of()
    copied = x.clone()
    expected = one_step(objective, model, copied, y)
    torch.testing.assert_close(one_step(compiled(objective), model, x, y), expected)
    assert torch.equal(x, copied)


@needs_compilable_torch
def test_what_precedes_the_objective_runs_once():
    model, objective, (x, y) = small_mlp(), PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1)), batch_of()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x -= 1
        return objective(model, x.mul_(3), y).loss

    copied = x.clone()
    expected = loss(copied, y)
    torch.testing.assert_close(compiled(loss)(x, y), expected)
    assert torch.equal(x, copied)


class Remembering(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.activation, self.hidden = nn.Linear(4, 5), nn.Linear(5, 3), activation, None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.activation(self.first(x))
        return self.last(self.hidden)


@needs_compilable_torch
@pytest.mark.parametrize("method", ["finite_difference", "mapped"])
def test_attributes_are_those_of_the_first_pass(method):
    model, (x, y) = Remembering(nn.PReLU() if method == "mapped" else nn.Tanh()).double(), batch_of()
    penalty = ParamGradPenalty(0.1) if method == "mapped" else InputGradPenalty(0.1, method=method)

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none") + model.hidden.square().mean(1)

    objective = PenalizedLoss(F.cross_entropy if method == "mapped" else criterion, penalty)
    assert_same_step(objective, model, x, y)
    hidden = model.hidden.detach()
    model(x)
    torch.testing.assert_close(hidden, model.hidden.detach())


@needs_compilable_torch
def test_a_weight_of_0_keeps_infinities_out():
    model, (x, y) = nn.Sequential(nn.Linear(4, 3)).double(), batch_of()

    def root(output: Tensor, target: Tensor) -> Tensor:
        return output.abs().sqrt().sum(1)

    step = compiled(PenalizedLoss(F.cross_entropy, InputGradPenalty(0.0, of=root)))
    step(model, x, y)
    nn.init.zeros_(model[0].bias)
    x[0] = 0
    out = step(model, x, y)
    assert not out.penalties["input"].isfinite() and out.loss.isfinite()


@needs_compilable_torch
def test_a_step_without_terms_needs_no_gradients():
    model, (x, y) = small_mlp(), batch_of()
    step = compiled(PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1, every_n_steps=2)))
    step(model, x, y)
    with torch.no_grad():
        torch.testing.assert_close(step(model, x, y).loss, F.cross_entropy(model(x), y))


# ---- what cannot be compiled says so --------------------------------------------------------------------------------


class Centred(nn.Module):
    """Mixes the samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class AskingTheCompiler(nn.Module):
    """Calls other layers in a compiled graph than in eager mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight.T + self.layer.bias if torch.compiler.is_dynamo_compiling() else self.layer(x)


class Growing(nn.Module):
    """Its buffer is another one in every forward pass, as that of spectral_norm in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(1.1)
        return x * self.scale


def zero_head(activation: nn.Module | None = None) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), activation or nn.Mish(), nn.Linear(5, 3))
    nn.init.zeros_(model[2].weight)
    return model


def compiled_inside() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].compile(backend="eager")
    return model


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class WithSine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Sine.apply(self.first(x)))


class Broken(nn.Module):
    """Has two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        torch._dynamo.graph_break()
        return self.last(h)


REFUSED = {
    "mixed samples": (lambda: nn.Sequential(nn.Linear(4, 3), Centred()), {}, "mixes the samples"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), {}, "mixes the samples"),
    "a function of Python": (WithSine, {}, "Sine cannot be differentiated twice"),
    "other layers": (AskingTheCompiler, {}, "call the same layers"),
    "no gradient": (zero_head, {}, "gradients other than zero"),
    "compiled inside": (compiled_inside, {}, "Two ways work"),
    "dropout": (
        lambda: nn.Sequential(nn.Dropout(), nn.Linear(4, 3)),
        {"over": "batch", "method": "finite_difference"},
        "second forward pass with the same",
    ),
    "buffers that move": (
        lambda: nn.Sequential(Growing(), nn.Linear(4, 3)),
        {"over": "batch", "method": "finite_difference"},
        "gives another output",
    ),
    "dropout and PReLU": (
        lambda: nn.Sequential(nn.Dropout(), nn.Linear(4, 3), nn.PReLU()),
        {},
        "no closed form for single samples",
    ),
    "sample by sample": (
        lambda: nn.Linear(4, 3),
        {"method": "finite_difference"},
        "runs the model for every group of samples",
    ),
}


@needs_compilable_torch
@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_compiled(reason):
    build, options, message = REFUSED[reason]
    model, (x, y) = build().double(), batch_of()
    with pytest.raises(RuntimeError, match=message):
        compiled(PenalizedLoss(F.cross_entropy, ParamGradPenalty(**options)))(model, x, y)


@needs_compilable_torch
@pytest.mark.parametrize(
    "penalty", [ParamGradPenalty(), ParamGradPenalty(over="batch"), InputGradPenalty(method="finite_difference")]
)
def test_a_graph_that_breaks_within_the_model(penalty):
    with pytest.raises(RuntimeError, match="within one graph"):
        torch.compile(PenalizedLoss(F.cross_entropy, penalty), backend="aot_eager")(Broken().double(), *batch_of())


@needs_compilable_torch
def test_a_finite_difference_of_a_random_criterion():
    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return (output - torch.rand_like(output)).square().sum(1)

    with pytest.raises(RuntimeError, match="the criterion draws random numbers"):
        compiled(PenalizedLoss(noisy, InputGradPenalty(method="finite_difference")))(small_mlp(), *batch_of())


@needs_compilable_torch
def test_as_many_positions_as_samples_are_refused():
    model, x, y, criterion = cases.find("layer_norm_tokens").problem(cases.B)
    with pytest.raises(RuntimeError, match="change the batch size"):
        compiled(PenalizedLoss(criterion, ParamGradPenalty()))(model, x, y)


@needs_compilable_torch
def test_a_generator_is_refused():
    penalty = InputGradPenalty(of="output", method="projection", generator=torch.Generator(torch.get_default_device()))
    with pytest.raises(RuntimeError, match="expected no generator"):
        compiled(penalty)(small_mlp(), *batch_of())


@needs_compilable_torch
def test_rows_of_a_chain_of_dense_layers_need_not_be_tried_out():
    model, (x, y) = zero_head(nn.Tanh()).double(), batch_of()
    assert_same_step(PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1), ParamGradPenalty(0.1)), model, x, y)


@needs_compilable_torch
def test_what_eager_mode_has_seen_is_known():
    model, (x, y) = zero_head().double(), batch_of()
    objective = PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1))
    zero = model[2].weight.detach().clone()
    nn.init.normal_(model[2].weight)
    objective(model, x, y)
    model[2].weight.data = zero
    assert_same_step(objective, model, x, y)


# ---- the documentation ----------------------------------------------------------------------------------------------


@needs_compilable_torch
def test_the_blocks_of_the_documentation_run(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # inductor takes a minute
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, str(DOCUMENT), "exec"), namespace)
    assert namespace["objective"].penalties[0].num_calls == 16


# ---- the real compiler ----------------------------------------------------------------------------------------------


@needs_compilable_torch
@needs_a_compiler
def test_inductor():
    model, (x, y) = small_mlp().float(), batch_of()
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1), ParamGradPenalty(0.1))
    assert_same_step(objective, model, x.float(), y, 1e-5, "inductor")
