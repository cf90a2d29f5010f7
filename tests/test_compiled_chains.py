"""A compiled chain of dense layers has the formulas of eager mode, and no more products than these."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_compile import (
    BATCH,
    assert_same_step,
    compiled,
    needs_compilable_torch,
    one_step,
)
from test_compile import fresh_compiler as fresh_compiler
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss
from gradpen.penalties import GradPenalty

pytestmark = needs_compilable_torch
WIDTHS = (4, 6, 5, 3)


def chain(activation: Callable[[], nn.Module] = nn.Tanh, widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, (rows, columns) in enumerate(pairwise(widths)):
        layers += [nn.Linear(rows, columns, bias=number != 1), activation()]
    return nn.Sequential(*layers[:-1]).double()


def batch_of(size: int = BATCH, classes: int = WIDTHS[-1]) -> tuple[Tensor, Tensor]:
    return torch.randn(size, WIDTHS[0], dtype=torch.float64), torch.randint(classes, (size,))


class Products:
    """A backend that keeps the graphs, whose products can be counted and whose saved tensors can be looked at."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []
        self.backend = aot_autograd(
            fw_compiler=self._keep,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    def _keep(self, graph: Any, _: Any) -> Any:
        self.graphs.append(graph)
        return make_boxed_func(graph.forward)

    def count(self) -> int:
        nodes = [node for graph in self.graphs for node in graph.graph.nodes if node.op == "call_function"]
        return sum(node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for node in nodes)

    def saved_types(self) -> set[torch.dtype]:
        (returned,) = self.graphs[0].graph.find_nodes(op="output")
        values = [node.meta["val"] for node in returned.args[0] if node is not None]
        return {value.dtype for value in values if isinstance(value, Tensor)}  # the step counter is a number


PENALTIES: dict[str, Callable[[], list[GradPenalty]]] = {
    "input": lambda: [InputGradPenalty(0.3)],
    "param": lambda: [ParamGradPenalty(0.1, parameters=["*.weight"])],
    "norms": lambda: [ParamGradPenalty(0.1, squared=False), InputGradPenalty(0.2, squared=False)],
    "norms_and_targets": lambda: [ParamGradPenalty(0.1, squared=False), InputGradPenalty(0.2, target=0.3)],
    "batch": lambda: [ParamGradPenalty(0.1, over="batch"), InputGradPenalty(0.2)],
    "difference": lambda: [ParamGradPenalty(0.1, over="batch", method="finite_difference", scheme="central")],
    "measured": lambda: [ParamGradPenalty(0.0), InputGradPenalty(0.0)],
    "measured_difference": lambda: [ParamGradPenalty(0.0, over="batch", method="finite_difference")],
}


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        *itertools.product(PENALTIES, [nn.GELU]),
        *itertools.product(["input", "param", "batch", "difference"], [nn.ReLU]),
    ],
)
def test_equal_to_eager(name, activation):
    assert_same_step(PenalizedLoss(F.cross_entropy, *PENALTIES[name]()), chain(activation), *batch_of())


ACTIVATIONS = [nn.LeakyReLU, partial(nn.LeakyReLU, -0.3), nn.SiLU, nn.Softplus, nn.ELU, nn.Sigmoid, nn.Identity]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation(activation):
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3), ParamGradPenalty(0.1))
    assert_same_step(objective, chain(activation), *batch_of())


CRITERIA: dict[str, Callable[..., Tensor]] = {
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "none": nn.CrossEntropyLoss(reduction="none"),
    "another": nn.CrossEntropyLoss(label_smoothing=0.2),
}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
def test_data_losses(criterion):
    x, y = batch_of()
    y[::3] = -100
    penalties = [InputGradPenalty(0.3, criterion=F.cross_entropy), ParamGradPenalty(0.1, criterion=F.cross_entropy)]
    assert_same_step(PenalizedLoss(criterion, *penalties), chain(), x, y)


def test_projection():
    one_class = chain(widths=(4, 6, 1))  # of one output every projection is exact
    x, y = batch_of(classes=1)
    exact = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3, of="output"))
    estimated = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3, of="output", method="projection"))
    expected = one_step(exact, one_class, x, y)
    torch.testing.assert_close(one_step(compiled(estimated), one_class, x, y), expected)


@pytest.mark.parametrize("name", ["batch", "difference"])
def test_other_batch_sizes_are_one_more_graph(name):
    model, counter = chain(), CompileCounterWithBackend("aot_eager")
    objective = PenalizedLoss(F.cross_entropy, *PENALTIES[name]())
    step = compiled(objective, counter)
    for size in (BATCH, 8, 13, 7):
        x, y = batch_of(size)
        torch.testing.assert_close(one_step(step, model, x, y), one_step(objective, model, x, y))
    assert counter.frame_count == 2


PRODUCTS = {"none": 8, "measured": 8, "param": 14, "both": 17}  # of three layers


@pytest.mark.parametrize("name", PRODUCTS)
def test_number_of_products(name):
    penalties = {
        "none": [],
        "measured": [ParamGradPenalty(0.0)],
        "param": [ParamGradPenalty(0.1)],
        "both": [InputGradPenalty(0.1), ParamGradPenalty(0.1)],
    }
    objective, model, products = PenalizedLoss(F.cross_entropy, *penalties[name]), chain(nn.ReLU), Products()

    def loss_of(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = objective(model, x, y)
        return out.loss, out.penalties

    x, y = batch_of()
    loss, _ = compiled(loss_of, products.backend)(x, y)
    loss.backward()
    assert products.count() == PRODUCTS[name]
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    objective(model, x, y).loss.backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in model.parameters()])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_no_masks_are_saved(activation):
    products, objective = Products(), PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1), ParamGradPenalty(0.1))
    assert_same_step(objective, chain(activation), *batch_of(), backend=products.backend)
    assert torch.float64 in products.saved_types()
    assert torch.bool not in products.saved_types()


def test_measuring_needs_no_finite_values():
    model, (x, y) = chain(nn.ReLU), batch_of()
    with torch.no_grad():
        model[0].weight.mul_(1e200)  # squares overflow
    out = compiled(PenalizedLoss(F.cross_entropy, InputGradPenalty(0.0)))(model, x, y)
    assert torch.isinf(out.penalties["input"]) and not out.penalties["input"].requires_grad
    assert torch.isfinite(out.loss)


class OfScores(nn.Module):
    """Written out, and with layers that a penalty is not to count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(2, 2)
        self.free = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.first(x.flatten(1))), self.last.weight, self.free)


def test_a_module_of_its_own():
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3), ParamGradPenalty(0.1))
    x, y = batch_of()
    assert_same_step(objective, OfScores().double(), x.view(BATCH, 2, 2), y)


class WithAuxiliaryHead(nn.Module):
    """Calls another layer besides, whose output leads elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.last, self.seen = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(6, 3), None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.head(x + 1)
        return self.last(self.first(x).tanh())


class WithoutCalls(nn.Module):
    """Writes its first layer as a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x @ self.first.weight.t()).tanh())


@pytest.mark.parametrize("build", [WithAuxiliaryHead, WithoutCalls])
def test_layers_and_calls_need_not_be_the_same(build):
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3), ParamGradPenalty(0.1))
    assert_same_step(objective, build().double(), *batch_of())


def test_a_frozen_head_besides():
    model = WithAuxiliaryHead().double()
    model.head.requires_grad_(False)
    assert_same_step(PenalizedLoss(F.cross_entropy, InputGradPenalty(0.3)), model, *batch_of())


def test_a_projection_needs_no_target():
    penalty = InputGradPenalty(0.3, of="output", method="projection")
    model, (x, _) = chain(widths=(4, 6, 1)), batch_of()  # of one output every projection is exact
    torch.testing.assert_close(compiled(penalty)(model, x), penalty(model, x))


def test_the_data_loss_is_called_once_and_as_it_is():
    calls = []

    def mean_alone(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        calls.append(reduction)
        return F.cross_entropy(output, target, label_smoothing=0.1)

    objective = PenalizedLoss(mean_alone, InputGradPenalty(0.3, criterion=F.cross_entropy))
    compiled(objective)(chain(), *batch_of())
    assert calls == ["mean"]


def change_smoothing(model: nn.Sequential, objective: PenalizedLoss) -> None:
    objective.criterion.label_smoothing = 0.3


def change_slope(model: nn.Sequential, objective: PenalizedLoss) -> None:
    model[1].negative_slope = 0.4


def change_layer(model: nn.Sequential, objective: PenalizedLoss) -> None:
    model[1] = nn.Tanh()


def freeze(model: nn.Sequential, objective: PenalizedLoss) -> None:
    model[0].weight.requires_grad_(False)


def take_norms(model: nn.Sequential, objective: PenalizedLoss) -> None:
    for penalty in objective.penalties:
        penalty.squared = False


def test_changes_are_noticed():
    model, (x, y) = chain(nn.LeakyReLU), batch_of()
    objective = PenalizedLoss(nn.CrossEntropyLoss(), ParamGradPenalty(0.1), InputGradPenalty(0.1))
    step = compiled(objective)
    for _ in range(2):
        before = one_step(step, model, x, y)
    for change in (change_smoothing, change_slope, change_layer, freeze, take_norms):
        change(model, objective)
        after = one_step(step, model, x, y)
        torch.testing.assert_close(after, one_step(objective, model, x, y))
        assert not torch.allclose(after[0], before[0]) or change is freeze
        before = after


def test_gradients_of_an_input_that_requires_grad():
    model, (x, y) = chain(), batch_of()
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1), ParamGradPenalty(0.1))
    found = []
    for step in (objective, compiled(objective)):
        there = x.clone().requires_grad_()
        step(model, there, y).loss.backward()
        found.append(there.grad)
    torch.testing.assert_close(found[1], found[0])


def test_what_is_added_to_the_output_counts():
    model, (x, y) = chain(), batch_of()
    for penalties in ([ParamGradPenalty(0.1)], [ParamGradPenalty(0.0)], PENALTIES["difference"]()):
        objective = PenalizedLoss(F.cross_entropy, *penalties)
        found = []
        for step in (objective, compiled(objective)):
            out = step(model, x, y)
            loss = out.loss + out.output.square().sum() + 3 * out.data_loss
            found.append(torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(found[1], found[0])
