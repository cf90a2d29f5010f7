"""Finite differences through modules that torch.compile has made: all that goes through these."""

from __future__ import annotations

import importlib.util
import shutil

import cases
import pytest
import references as ref
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss
from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm

QUANTITIES = [(param_grad_sq_norm, {"over": "batch"}), (param_grad_sq_norm, {"over": 2}), (input_grad_sq_norm, {})]
ACTIVATIONS = [nn.ReLU, nn.Tanh]  # their derivatives save different things


@pytest.fixture(autouse=True)
def nothing_was_compiled():
    """Neither in this process nor, in the cache, by an earlier one."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def problem(activation):
    _, x, y, _ = cases.find("tanh").problem()
    model = cases.mlp(4, 8, 6, 3, activation=activation).double()
    return model, torch.compile(model, backend="aot_eager"), x, y


def gradient(value, model):
    """By one backward pass that keeps no graph, as in training."""
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(model.parameters()))])


def check(found, expected, model):
    """Values, and the gradient of their mean."""
    ref.assert_close(found, expected)
    ref.assert_close(gradient(found.mean(), model), gradient(expected.mean(), model))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("function", "options"), QUANTITIES)
def test_norms_and_their_gradients(function, options, activation):
    model, compiled, x, y = problem(activation)
    for _ in range(3):
        norms = [function(m, x, y, method="finite_difference", step=1e-3, **options) for m in (compiled, model)]
        check(*norms, model)


@pytest.mark.parametrize(
    "penalty",
    [
        lambda: ParamGradPenalty(0.1, over="batch", method="finite_difference"),
        lambda: ParamGradPenalty(0.1, over=4, method="finite_difference"),
        lambda: InputGradPenalty(0.1, method="finite_difference"),
    ],
)
@pytest.mark.parametrize(
    ("activation", "apart"), zip(ACTIVATIONS, [False, True], strict=True), ids=["in one objective", "added to a loss"]
)
def test_training_steps(penalty, activation, apart):
    """Smaller batches come and go, and the model is run without a penalty in between."""
    model, compiled, x, y = problem(activation)
    term = penalty()
    objective = PenalizedLoss(F.cross_entropy, term)
    for size in (len(y), len(y), 5, len(y)):
        gradients = []
        for one in (compiled, model):
            rows = x[:size], y[:size]
            loss = F.cross_entropy(one(rows[0]), rows[1]) + term(one, *rows) if apart else objective(one, *rows).loss
            gradients.append(gradient(loss, model))
            with torch.no_grad():
                one(x)
        ref.assert_close(*gradients)


@pytest.mark.parametrize(
    ("activation", "donated"), [(ACTIVATIONS[0], True), (ACTIVATIONS[1], True), (ACTIVATIONS[1], False)]
)
@pytest.mark.parametrize(("function", "options"), QUANTITIES)
def test_a_module_that_was_trained_before(function, options, activation, donated):
    """Its backward pass may be one that writes over what it needs, unless torch was told not to make such."""
    model, compiled, x, y = problem(activation)
    expected, found, said = function(model, x, y, method="finite_difference", **options), None, ""
    with torch._functorch.config.patch(donated_buffer=donated):
        F.cross_entropy(compiled(x), y).backward()
        try:
            found = function(compiled, x, y, method="finite_difference", **options)
        except RuntimeError as error:
            said = str(error)
    if found is None:
        assert donated and "torch._functorch.config.donated_buffer = False" in said
    else:
        check(found, expected, model)


@pytest.mark.parametrize(("function", "options"), QUANTITIES)
def test_modules_are_compiled_whole_and_once(function, options):
    _, compiled, x, y = problem(nn.ReLU)
    counters.clear()
    graphs = []
    for _ in range(9):
        function(compiled, x, y, method="finite_difference", **options).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"] and not counters["unimplemented"]
    assert graphs[0] <= 6 and graphs[2] == graphs[-1]  # at θ and displaced, for one size of a batch and for others


@pytest.mark.skipif(
    shutil.which("g++") is None or importlib.util.find_spec("setuptools") is None,
    reason="torch.compile's own backend needs a C++ compiler, and older ones setuptools",
)
def test_cached_backward_passes_that_run_only_once_are_not_taken(tmp_path, monkeypatch):
    """An earlier training, of this process or of another, leaves them in a cache whose keys do not tell."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, _, x, y = problem(nn.ReLU)
    for trained_before in (True, False):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="inductor")
        if trained_before:
            F.cross_entropy(compiled(x.requires_grad_()), y).backward()
    norms = [input_grad_sq_norm(one, x, y, method="finite_difference") for one in (compiled, model)]
    check(*norms, model)


def test_what_torch_is_told_too_late_does_not_count():
    """It would write over what the second pass needs, and say nothing."""
    _, compiled, x, y = problem(nn.ReLU)
    F.cross_entropy(compiled(x.requires_grad_()), y).backward()
    with (
        torch._functorch.config.patch(donated_buffer=False),
        pytest.raises(RuntimeError, match="before the module is called for the first time"),
    ):
        input_grad_sq_norm(compiled, x, y, method="finite_difference")


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_a_loss_that_is_differentiated_twice(scheme):
    """Displaced passes are differentiated first by the loss."""
    model, compiled, x, y = problem(nn.GELU)
    for one in (compiled, model):
        loss = input_grad_sq_norm(one, x, y, method="finite_difference", scheme=scheme).mean()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        if one is compiled:
            found = gradients
    for ours, theirs in zip(found, gradients, strict=True):
        ref.assert_close(ours, theirs)
