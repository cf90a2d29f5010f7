"""Peak memory, counted from the allocator's own events: the same on every machine."""

from __future__ import annotations

import itertools
from functools import partial

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss, evaluate_inequality
from gradpen._graph import EDGES_KEEP_PYTHON_NODES
from gradpen.layer_norms import default_budget

MB = 10**6


def peak_bytes(function):
    """The most that tensors made by `function` took up at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def test_the_count_is_that_of_the_tensors():
    def function():
        first = torch.ones(1000, 1000)  # 4 MB
        del first
        return torch.ones(1000, 1000) + torch.ones(1000, 1000)  # three of them

    assert peak_bytes(function) == pytest.approx(12 * MB, rel=0.01)


def test_a_check_of_512_samples_takes_less_than_400_megabytes():
    """Explicit Jacobians would take 3.2 GB a layer."""
    model = cases.mlp(3072, 512, 512, 512, 10, activation=nn.ReLU)
    x, y = torch.randn(512, 3072), torch.randint(10, (512,))
    assert peak_bytes(lambda: evaluate_inequality(model, x, y)) <= 400 * MB


@pytest.mark.parametrize("method", ["dense", "krylov"])
def test_a_smaller_budget_changes_the_peak_and_not_the_result(method):
    model = cases.mlp(20, 100, 100, 10, activation=nn.ReLU)
    x, y = torch.randn(64, 20), torch.randint(10, (64,))
    check = partial(evaluate_inequality, model, x, y, method=method)
    large, small = (check(memory_budget=size) for size in (2**26, 2**16))
    peaks = [peak_bytes(partial(check, memory_budget=size)) for size in (2**26, 2**16)]
    assert peaks[1] < 0.7 * peaks[0]
    torch.testing.assert_close(small.lhs, large.lhs, rtol=1e-2, atol=0)
    assert (small.lhs_lower <= large.lhs * (1 + 1e-6)).all() and (large.lhs_lower <= small.lhs * (1 + 1e-6)).all()


def test_one_sample_at_a_time_is_enough():
    model = cases.mlp(5, 7, 6, 3, activation=nn.ReLU).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))
    for method in ("dense", "krylov"):
        single, whole = (evaluate_inequality(model, x, y, method=method, memory_budget=size) for size in (1, 2**26))
        torch.testing.assert_close(single.lhs, whole.lhs, rtol=1e-6, atol=0)


def test_a_prefix_without_parts_is_taken_in_parts_where_jacobians_are_explicit():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 36, 12), nn.Tanh(), nn.Linear(12, 3)
    )
    x, y = torch.randn(32, 1, 8, 8), torch.randint(3, (32,))
    whole, parts = (evaluate_inequality(model, x, y, method="dense", memory_budget=size) for size in (2**26, 2**15))
    assert len(whole.layers) == 2
    torch.testing.assert_close(parts.lhs, whole.lhs, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "budget"),
    [(2**34, 0, 0, 2**30), (2**30, 0, 0, 2**28), (2**20, 2**31, 2**30, 2**28 + 2**18), (2**20, 0, 0, 2**26)],
    ids=["plenty", "a quarter", "cached by torch", "hardly any"],
)
def test_the_budget_on_a_gpu_is_a_quarter_of_what_is_free(free, reserved, allocated, budget, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**36))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    assert default_budget(torch.device("cuda")) == budget
    assert default_budget(torch.device("cpu")) == 2**26


@pytest.mark.skipif(not EDGES_KEEP_PYTHON_NODES, reason="this torch computes a gradient of the input for nobody")
@pytest.mark.parametrize(
    ("penalty", "most"), [(InputGradPenalty(0.1), 1.6), (ParamGradPenalty(0.01), 1.3)], ids=["input", "param"]
)
def test_the_peak_of_a_penalised_step_against_the_plain_one(penalty, most):
    """Gradients of the weights are added to in place, and what was saved is written over once it has served."""
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        most *= 1.1  # this torch cannot tell whether somebody else has what was saved
    model = cases.mlp(784, 512, 512, 10, activation=nn.ReLU)
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    objective = PenalizedLoss(F.cross_entropy, penalty)

    def peak(loss):
        model.zero_grad()  # before the count, or freeing old gradients would be credited to the step
        return peak_bytes(lambda: loss().backward())

    peak(lambda: objective(model, x, y).loss)  # what is found out about a model once is no part of a step
    plain, penalised = peak(lambda: F.cross_entropy(model(x), y)), peak(lambda: objective(model, x, y).loss)
    assert plain > 2.5 * MB  # the gradients alone
    assert penalised <= most * plain
