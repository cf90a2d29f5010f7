"""Once a model is known, no penalty makes the host wait for the device.

A fake tensor has no values: asking for one (``bool``, ``.item()``, ``nonzero``, ``bincount``, a boolean mask, …) raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cases
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss
from gradpen.penalties import GradPenalty
from gradpen.recording import map_tensors

BATCH = 11  # no number of positions: where one is, the layout of every batch is verified

PENALTIES: dict[str, Callable[[], list[GradPenalty]]] = {
    "both": lambda: [InputGradPenalty(0.1), ParamGradPenalty(0.1)],
    "norms": lambda: [InputGradPenalty(0.1, target=1.0, one_sided=True), ParamGradPenalty(0.1, squared=False)],
    "batch": lambda: [ParamGradPenalty(0.1, over="batch")],
    "micro_batches": lambda: [ParamGradPenalty(0.1, over=4)],
    "finite_difference": lambda: [
        InputGradPenalty(0.1, method="finite_difference"),
        ParamGradPenalty(0.1, over="batch", method="finite_difference", scheme="central"),
    ],
    "jacobian": lambda: [
        InputGradPenalty(0.1, of="output"),
        InputGradPenalty(0.1, of="output", method="projection", name="projection"),
    ],
}
MODELS = ["relu", "conv_stack", "layer_norm_tokens", "prelu", "class_token", "two_inputs_dict"]
GRID = [
    *[("both", model) for model in MODELS],
    *[(penalties, "relu") for penalties in PENALTIES if penalties != "both"],
]
GRID += [("micro_batches", "prelu")]


def step(objective: PenalizedLoss, model: nn.Module, x: Any, y: Any) -> None:
    objective(model, x, y).loss.backward()


def get_to_know(objective: PenalizedLoss, model: nn.Module, x: Any, y: Any) -> None:
    """The layout of the batch is tried out on the calls 1, 2, 3, 5, 9, …: the next one is the fourth."""
    for _ in range(3):
        step(objective, model, x, y)


@contextmanager
def without_values(model: nn.Module) -> Iterator[FakeTensorMode]:
    """The very module with fake tensors in it."""
    mode = FakeTensorMode()
    real = [
        (table, name, tensor)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    try:
        for table, name, tensor in real:
            table[name] = mode.from_tensor(tensor)
        with mode:
            yield mode
    finally:
        for table, name, tensor in real:
            table[name] = tensor


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def fake(mode: FakeTensorMode, x: Any) -> Any:
    return map_tensors(x, mode.from_tensor)


@pytest.mark.parametrize(("penalties", "name"), GRID)
def test_a_known_model_is_not_asked_for_values(penalties, name):
    can_tell_what_is_saved = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    if not can_tell_what_is_saved and name == "relu" and penalties in ("both", "norms"):
        pytest.skip("this torch goes another way with fake tensors, on which the model is not known yet")
    model, x, y, criterion = cases.find(name).problem(BATCH)
    objective = PenalizedLoss(criterion, *PENALTIES[penalties]())
    get_to_know(objective, model, x, y)
    with without_values(model) as mode:
        step(objective, model, fake(mode, x), fake(mode, y))


def test_the_first_call_looks():
    model, x, y, criterion = cases.find("layer_norm").problem(
        BATCH
    )  # in a chain of dense layers it has nothing to look for
    with without_values(model) as mode, pytest.raises(DataDependentOutputException):
        step(PenalizedLoss(criterion, InputGradPenalty()), model, fake(mode, x), fake(mode, y))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("penalties", "name"), GRID)
def test_a_known_model_does_not_synchronise(penalties, name):
    model, x, y, criterion = cases.find(name).problem(BATCH)
    model, x, y = model.cuda(), map_tensors(x, torch.Tensor.cuda), y.cuda()
    objective = PenalizedLoss(criterion, *PENALTIES[penalties]())
    get_to_know(objective, model, x, y)
    with waiting_is_an_error():
        step(objective, model, x, y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_step_does_not_synchronise():
    model, x, y, criterion = cases.find("tanh").problem(BATCH, torch.float32)
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    objective = torch.compile(PenalizedLoss(criterion, InputGradPenalty(0.1), ParamGradPenalty(0.1)), fullgraph=True)
    for _ in range(3):  # the counter of steps becomes a variable of the graph on the second
        get_to_know(objective, model, x, y)
    with waiting_is_an_error():
        step(objective, model, x, y)
