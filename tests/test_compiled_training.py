"""`compiled()`, the objective for training loops: its loss alone can be differentiated, perhaps beforehand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_compile import batch_of, compiled, needs_a_compiler, needs_compilable_torch, one_step, small_mlp
from test_compile import fresh_compiler as fresh_compiler
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss
from gradpen.penalties import GradPenalty

pytestmark = needs_compilable_torch


FOR_TRAINING: dict[str, Callable[[], list[GradPenalty]]] = {
    "lazy": lambda: [InputGradPenalty(0.3, every_n_steps=3)],
    "two_lazy": lambda: [InputGradPenalty(0.3, every_n_steps=2), ParamGradPenalty(0.1, every_n_steps=3)],
    "any_schedule": lambda: [ParamGradPenalty(lambda step: math.exp(-step) + 1 + math.sin(step))],
    "none": list,
}
GRAPHS = {"lazy": 1, "two_lazy": 3, "any_schedule": 2, "none": 0}


@pytest.mark.parametrize("name", FOR_TRAINING)
def test_compiled_for_training(name):
    (model, (x, y)), counter = (small_mlp(), batch_of()), CompileCounterWithBackend("aot_eager")
    eager, traced = (PenalizedLoss(F.cross_entropy, *FOR_TRAINING[name]()) for _ in range(2))
    step = traced.compiled(backend=counter)
    for _ in range(8):
        torch.testing.assert_close(one_step(step, model, x, y), one_step(eager, model, x, y), rtol=1e-10, atol=1e-11)
        out = step(model, x, y)
        eager(model, x, y)
        assert out.loss.requires_grad
        assert not any(value.requires_grad for value in (out.data_loss, out.output, *out.penalties.values()))
        assert counter.frame_count <= GRAPHS[name]
    assert counter.frame_count == GRAPHS[name]
    assert traced.state_dict() == eager.state_dict()
    model.eval()
    torch.testing.assert_close(step(model, x, y).loss, eager(model, x, y).loss)
    assert traced.state_dict() == eager.state_dict()


def test_weights_that_are_set_anew_are_no_new_graphs_in_training():
    """Ints as well: to a graph of one's own each of these is another constant."""
    (model, (x, y)), counter = (small_mlp(), batch_of()), CompileCounterWithBackend("aot_eager")
    eager, traced = (PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1)) for _ in range(2))
    step = traced.compiled(backend=counter)
    for weight in (0.1, 0.2, 3, 4, 5, 0.6):
        eager.penalties[0].weight = traced.penalties[0].weight = weight
        torch.testing.assert_close(one_step(step, model, x, y), one_step(eager, model, x, y))
    assert counter.frame_count == 2


@needs_a_compiler
@pytest.mark.parametrize("for_training", [True, False])
def test_a_compiled_loss_is_a_tensor_of_its_own(for_training):
    """Inductor drops copies, and then `loss /= n` changes the data loss."""
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.0, every_n_steps=2))
    step = objective.compiled() if for_training else compiled(objective, "inductor")
    model, (x, y) = small_mlp().float(), batch_of()
    for _ in range(2):
        out = step(model, x.float(), y)
        out.loss.backward()
        loss, expected = out.loss.detach(), out.data_loss.detach().clone()
        loss /= 4
        assert torch.equal(out.data_loss, expected)


def test_another_criterion_is_noticed_in_training():
    model, (x, y) = small_mlp(), batch_of()
    objective = PenalizedLoss(nn.CrossEntropyLoss(), InputGradPenalty(0.3, every_n_steps=2))
    step, eager = objective.compiled(backend="aot_eager"), copy.deepcopy(objective)
    for smoothing in (0.0, 0.0, 0.3, 0.3):
        objective.criterion.label_smoothing = eager.criterion.label_smoothing = smoothing
        torch.testing.assert_close(one_step(step, model, x, y), one_step(eager, model, x, y))


def test_graphs_are_whole_unless_said_otherwise():
    class Breaks(nn.Sequential):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    with pytest.raises(Exception, match="graph_break"):
        PenalizedLoss(F.cross_entropy, InputGradPenalty()).compiled(backend="aot_eager")(
            Breaks(*small_mlp()), *batch_of()
        )


# ---- gradients at once ----------------------------------------------------------------------------------------------


class Passes:
    """A backend that counts what it compiles: graphs that are called forward, and their backward passes."""

    def __init__(self) -> None:
        self.forward = self.backward = 0
        self.backend = aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)

    def _forward(self, graph: Any, _: Any) -> Any:
        self.forward += 1
        return make_boxed_func(graph.forward)

    def _backward(self, graph: Any, _: Any) -> Any:
        self.backward += 1
        return make_boxed_func(graph.forward)


class Learned(InputGradPenalty):
    """R times a number that is learned with the model."""

    def __init__(self) -> None:
        super().__init__(0.3)
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def reduce(self, norms: Any) -> Tensor:
        return super().reduce(norms) * self.scale


class LearnedTarget(InputGradPenalty):
    """(‖·‖ − target)² with a target that is learned with the model."""

    def __init__(self) -> None:
        super().__init__(0.3, target=0.5)
        self.target = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))


def reduced_by_another_function() -> InputGradPenalty:
    """Of the penalty, not of its class."""
    penalty = InputGradPenalty(0.3, target=0.5)
    mean = penalty.reduce
    penalty.reduce = lambda norms: mean(norms) * TEMPERATURE
    return penalty


def learned_classes(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(output * TEMPERATURE, target, reduction=reduction)


TEMPERATURE = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)


def frozen_first_layer() -> nn.Sequential:
    model = small_mlp()
    model[0].requires_grad_(False)
    return model


AT_ONCE: dict[str, Callable[[], tuple[PenalizedLoss, nn.Module]]] = {
    "input": lambda: (PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3)), small_mlp()),
    "both": lambda: (PenalizedLoss(nn.CrossEntropyLoss(), InputGradPenalty(0.3), ParamGradPenalty(0.1)), small_mlp()),
    "sum": lambda: (
        PenalizedLoss(nn.CrossEntropyLoss(reduction="sum"), ParamGradPenalty(0.1, criterion=F.cross_entropy)),
        small_mlp(),
    ),
    "target": lambda: (PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3, target=0.5)), small_mlp()),
    "batch": lambda: (PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1, over="batch")), small_mlp()),
    "difference": lambda: (
        PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1, over="batch", method="finite_difference")),
        small_mlp(),
    ),
    "measured": lambda: (PenalizedLoss(F.cross_entropy, InputGradPenalty(0.0), ParamGradPenalty(0.0)), small_mlp()),
    "frozen": lambda: (PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1)), frozen_first_layer()),
}
LATER: dict[str, Callable[[], tuple[PenalizedLoss, nn.Module]]] = {
    "another_criterion": lambda: (PenalizedLoss(learned_classes, InputGradPenalty(0.3)), small_mlp()),
    "another_data_loss": lambda: (
        PenalizedLoss(learned_classes, InputGradPenalty(0.3, criterion=F.cross_entropy)),
        small_mlp(),
    ),
    "own_reduce": lambda: (PenalizedLoss(F.cross_entropy, Learned()), small_mlp()),
    "learned_target": lambda: (PenalizedLoss(F.cross_entropy, LearnedTarget()), small_mlp()),
    "another_reduce": lambda: (PenalizedLoss(F.cross_entropy, reduced_by_another_function()), small_mlp()),
    "no_chain": lambda: (
        PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3)),
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double(),
    ),
    "evaluated": lambda: (PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3)), small_mlp().eval()),
}


@pytest.mark.parametrize("name", [*AT_ONCE, *LATER])
def test_gradients_are_computed_with_the_loss_or_later(name):
    """Everything that the loss depends on gets its gradient, known to gradpen or not."""
    passes = Passes()
    objective, model = {**AT_ONCE, **LATER}[name]()
    x, y = batch_of()
    step = objective.compiled(backend=passes.backend)
    TEMPERATURE.grad = None
    expected = one_step(objective, model, x, y)
    others = [*objective.parameters(), TEMPERATURE]
    expected += [leaf.grad for leaf in others if leaf.grad is not None]
    for leaf in others:
        leaf.grad = None
    actual = one_step(step, model, x, y)
    actual += [leaf.grad for leaf in others if leaf.grad is not None]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    assert (passes.forward, passes.backward) == (1, 0 if name in AT_ONCE else 1)
    assert [p.grad is None for p in model.parameters()] == [not p.requires_grad for p in model.parameters()]


def test_an_input_that_requires_grad_gets_its_gradient():
    (x, y), model, objective = batch_of(), small_mlp(), PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(objective(model, x, y).loss, x)
    (actual,) = torch.autograd.grad(objective.compiled(backend="aot_eager")(model, x, y).loss, x)
    torch.testing.assert_close(actual, expected)


@pytest.fixture
def trained():
    """Eager and compiled objective, model, batch."""
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3))
    return objective, objective.compiled(backend="aot_eager"), small_mlp(), batch_of()


def test_a_loss_that_is_scaled(trained):
    """As with gradient accumulation: two batches, each with a part of the loss, added up in .grad."""
    eager, step, model, (x, y) = trained
    found = []
    for objective in (eager, step):
        model.zero_grad()
        for rows in (slice(0, 6), slice(5, 11)):
            (objective(model, x[rows], y[rows]).loss / 2).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_the_gradients_of_one_step_are_not_those_of_the_next(trained):
    _, step, model, (x, y) = trained
    step(model, x, y).loss.backward()
    first = [p.grad for p in model.parameters()]
    kept = [gradient.clone() for gradient in first]
    model.zero_grad(set_to_none=True)
    step(model, 2 * x, y).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert not any(torch.equal(p.grad, b) for p, b in zip(model.parameters(), kept, strict=True))


def test_two_backward_passes(trained):
    eager, step, model, (x, y) = trained
    expected = torch.autograd.grad(eager(model, x, y).loss, list(model.parameters()))
    loss = step(model, x, y).loss
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [4 * gradient for gradient in expected])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_some_of_the_gradients_and_batches_of_them(trained):
    eager, step, model, (x, y) = trained
    expected = torch.autograd.grad(eager(model, x, y).loss, model[2].weight)
    torch.testing.assert_close(torch.autograd.grad(step(model, x, y).loss, model[2].weight), expected)
    scales = torch.tensor([1.0, -2.0], dtype=torch.float64)
    batched = torch.autograd.grad(step(model, x, y).loss, model[2].weight, scales, is_grads_batched=True)
    torch.testing.assert_close(batched[0], scales.reshape(2, 1, 1) * expected[0])


@pytest.mark.parametrize("fullgraph", [True, False])
def test_within_a_compiled_function(trained, fullgraph):
    eager, step, model, (x, y) = trained
    within = torch.compile(lambda *args: step(*args), backend="aot_eager", fullgraph=fullgraph)
    torch.testing.assert_close(one_step(within, model, x, y), one_step(eager, model, x, y))


def test_a_backward_pass_that_is_compiled(trained):
    eager, step, model, (x, y) = trained
    expected = one_step(eager, model, x, y)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.testing.assert_close(one_step(step, model, x, y), expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_detection_of_anomalies(trained):
    eager, step, model, (x, y) = trained
    expected = one_step(eager, model, x, y)
    with torch.autograd.detect_anomaly():
        torch.testing.assert_close(one_step(step, model, x, y), expected)
        with pytest.raises(RuntimeError, match="returned nan values"):
            step(model, x * math.nan, y).loss.backward()


@pytest.mark.parametrize("kind", ["compiled", "measured", "measured_without_a_chain"])
def test_gradients_are_not_those_of_the_next_backward_pass(kind):
    """Whoever gets them may write to them, also if the graph is kept."""
    (x, y), model = batch_of(), small_mlp()
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3 if kind == "compiled" else 0.0))
    if kind == "measured_without_a_chain":
        model.append(nn.LayerNorm(3)).double()
    step = objective.compiled(backend="aot_eager") if kind == "compiled" else objective
    loss = step(model, x, y).loss
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    torch._foreach_zero_(first)
    torch.testing.assert_close(list(torch.autograd.grad(loss, list(model.parameters()))), kept)


def test_second_derivatives_are_not_zeros(trained):
    _, step, model, (x, y) = trained
    (gradient,) = torch.autograd.grad(step(model, x, y).loss, model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of this loss is not there"):
        gradient.square().sum().backward()


def test_hooks_on_parameters_see_the_gradients(trained):
    eager, step, model, (x, y) = trained
    expected = one_step(eager, model, x, y)
    seen: dict[str, Tensor] = {}

    def twice(gradient: Tensor) -> Tensor:
        seen["before"] = gradient.clone()
        return 2 * gradient

    def after(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen["after"] = parameter.grad.clone()

    model[0].weight.register_hook(twice)
    model[2].weight.register_post_accumulate_grad_hook(after)
    one_step(step, model, x, y)
    torch.testing.assert_close([seen["before"], seen["after"]], [expected[4], expected[6]])
    torch.testing.assert_close(model[0].weight.grad, 2 * expected[4])


def test_a_layer_that_is_frozen_later(trained):
    eager, step, model, (x, y) = trained
    one_step(step, model, x, y)
    model[0].requires_grad_(False)
    torch.testing.assert_close(one_step(step, model, x, y), one_step(eager, model, x, y))


def test_without_a_backward_pass_nothing_stays(trained):
    _, step, model, (x, y) = trained
    step(model, x, y)
    assert all(p.grad is None for p in model.parameters())
