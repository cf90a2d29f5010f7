"""Jacobians with a weight as one more sample, and what the look at coefficients does not change."""

from __future__ import annotations

import itertools

import cases
import numpy as np
import pytest
import torch
from torch import nn

from gradpen import evaluate_inequality, layer_norms
from gradpen.jacobians import JacobianOperator, autograd_jacobian
from gradpen.recurrence import BracketSearch
from gradpen.spectral import lanczos_bracket

B, D, N, M = 5, 6, 8, 7


def prefix(kind):
    """J' (B, N × D) as an operator and explicitly."""
    if kind == "identity":
        return JacobianOperator.identity(torch.zeros(B, N, dtype=torch.float64)), torch.eye(N).expand(B, N, N).double()
    x = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(N, D, dtype=torch.float64)
    if kind == "dense":
        diagonal = torch.rand(B, N, dtype=torch.float64)
        operator = JacobianOperator.identity(x.detach()).linked(weight, diagonal)
        return operator, diagonal.unsqueeze(2) * weight
    h = torch.tanh(x @ weight.T)
    return autograd_jacobian(h, [x]), (1 - h.detach() ** 2).unsqueeze(2) * weight


@pytest.mark.parametrize("is_mask", [True, False])
@pytest.mark.parametrize("kind", ["identity", "dense", "autograd"])
def test_a_weight_is_one_more_sample_of_what_it_leads_to(kind, is_mask):
    before, jacobians = prefix(kind)
    weight = torch.randn(M, N, dtype=torch.float64)
    diagonal = (torch.rand(B, M) < 0.6).double() if is_mask else torch.randn(B, M, dtype=torch.float64)
    operator = before.linked(weight, diagonal, is_mask=is_mask).last.with_weight()
    assert len(operator.template) == B + 1
    grams = [J @ J.T for J in (*(diagonal.unsqueeze(2) * (weight @ jacobians)), weight)]
    rows = torch.cat([diagonal, torch.ones(1, M, dtype=torch.float64)])
    for samples in ([0, 1, 2, 3, 4, 5], [1, 3], [2, 5], [5], [0]):
        part = operator.restricted(torch.tensor(samples))
        u = torch.randn(len(samples), M, dtype=torch.float64) * (rows[samples] != 0)
        expected = torch.stack([grams[sample] @ row for sample, row in zip(samples, u, strict=True)])
        torch.testing.assert_close(part.gram(u), expected)
        if part.gram_within is not None:
            torch.testing.assert_close(part.gram_within(u, torch.empty_like(u)), expected)
        if len(samples) == B + 1:
            squares = torch.stack([(v**2).sum() for v in part.vjp(u)])
            torch.testing.assert_close(squares, (u * expected).sum(1))


@pytest.mark.parametrize("frozen", [None, 0, 2, 4])
def test_every_weight_has_its_own_norm_wherever_it_is_a_sample(frozen, monkeypatch):
    """Also where the layer between two in the sum is frozen, so that a weight does not lead to the next one's input."""
    swept = []
    original = layer_norms._iterated_norms
    monkeypatch.setattr(
        layer_norms, "_iterated_norms", lambda operators, *args: swept.append(operators) or original(operators, *args)
    )
    model = cases.mlp(20, 90, 100, 80, 70, 3, activation=nn.ReLU).double()
    if frozen is not None:
        model[frozen].requires_grad_(False)
    x, y = torch.randn(9, 20, dtype=torch.float64), torch.randint(3, (9,))
    report = evaluate_inequality(model, x, y, slack=False)
    assert report.layers and report.holds.all()
    for layer in report.layers:
        exact = torch.linalg.matrix_norm(model.get_submodule(layer.name).weight.detach(), 2)
        assert 0.95 * exact <= layer.weight_norm <= exact * (1 + 1e-9)
    sizes = sorted(len(operator.template) for operator in swept[0])
    assert sizes.count(10) == {None: 3, 0: 3, 2: 2, 4: 1}[frozen]  # nine samples and a weight


def coefficients(batch=40, size=60, steps=50):
    """α and β of Lanczos recurrences: (steps, 2, batch)."""
    generator = np.random.default_rng(0)
    eigenvalues = generator.random((batch, size)) ** generator.uniform(0.1, 12, (batch, 1))
    q = generator.normal(size=(batch, size))
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    before, beta, rows = np.zeros_like(q), np.zeros(batch), []
    for _ in range(steps):
        w = eigenvalues * q
        alpha = (q * w).sum(1)
        w = w - alpha[:, None] * q - beta[:, None] * before
        beta = np.linalg.norm(w, axis=1)
        rows.append((alpha, beta))
        before, q = q, w / beta[:, None]
    return np.array(rows)


def search_of(taken, looks=None, may_leave=True, log_weight=-30.0, rtol=0.05):
    batch = taken.shape[2]
    log_weight = np.broadcast_to(log_weight, batch)
    search = BracketSearch(np.full(batch, 60), log_weight, rtol, len(taken), 2.2e-16, may_leave=may_leave)
    last, looked = 0, []
    while not search.is_over:
        if looks is not None:
            search.next_look = next(step for step in (*looks, len(taken)) if step > last)
        looked.append((search.next_look, len(search.present)))
        search.look(taken[last : search.next_look][..., search.present])
        last = looked[-1][0]
    return search, looked


@pytest.mark.parametrize("may_leave", [True, False])
@pytest.mark.parametrize("looks", [None, range(1, 50), [10, 22, 45], [11, 12, 35], [49], [21, 22, 23]])
def test_brackets_do_not_depend_on_when_the_host_looks(looks, may_leave):
    taken = coefficients()
    (expected, _), (found, _) = search_of(taken, range(10, 50)), search_of(taken, looks, may_leave)
    assert 10 <= expected.steps.min() < 13 and expected.steps.max() > 20
    assert (found.steps == expected.steps).all()
    for end, other in zip(found.ends(), expected.ends(), strict=True):
        np.testing.assert_allclose(end, other, rtol=1e-12)


@pytest.mark.parametrize("rtol", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("looks", [None, range(1, 50), [4, 13, 30], [9, 12, 35], [49], [21, 22, 23]])
def test_samples_with_more_to_prove_get_their_first_target_later(looks, rtol):
    taken, log_weight = coefficients(), -np.linspace(5, 60, coefficients().shape[2])
    (expected, _), (found, _) = (
        search_of(taken, looks, log_weight=log_weight, rtol=rtol) for looks in (range(1, 50), looks)
    )
    assert (found.steps == expected.steps).all()
    assert expected.steps.min() <= 8 < expected.steps.max()
    for n in range(0, len(log_weight), 5):  # nor do the others matter
        (alone, _) = search_of(taken[..., n : n + 1], log_weight=log_weight[n], rtol=rtol)
        assert alone.steps == expected.steps[n]
        np.testing.assert_allclose([*alone.ends()], [end[n : n + 1] for end in expected.ends()], rtol=1e-12)
    for end, other in zip(found.ends(), expected.ends(), strict=True):
        np.testing.assert_allclose(end, other, rtol=1e-12)


def test_the_growth_of_k_tells_when_to_look():
    """Nobody waits long; without leaving, few looks are enough, and with it enough samples leave at once."""
    taken = coefficients(batch=64)
    search, looked = search_of(taken, may_leave=False)
    assert len(looked) <= 6 and {count for _, count in looked} == {64}
    assert looked[-1][0] <= search.steps.max() + 2
    search, looked = search_of(taken)
    counts = [count for _, count in looked]
    assert all(before - after == 0 or before - after >= 8 for before, after in itertools.pairwise(counts))
    assert counts[-1] <= 16
    for step, count in looked[1:]:
        assert (search.steps >= step - 3).sum() >= count / 2


@pytest.mark.parametrize("looks", [[13], [20], [31], [49], [12, 25]])
def test_exhausted_recurrences_do_not_depend_on_when_the_host_looks(looks):
    """Behind β = 0 nearly all of K is its last term."""
    taken = coefficients(batch=3)
    for sample, length in enumerate([2, 6, 9]):
        taken[length - 1, 1, sample] = taken[length:, :, sample] = 0
    taken[..., 2] = 0
    (expected, _), (found, _) = search_of(taken, range(10, 50)), search_of(taken, looks)
    assert (found.steps == expected.steps).all() and (found.steps == 11).all()
    for end, other in zip(found.ends(), expected.ends(), strict=True):
        np.testing.assert_allclose(end, other, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimension", [9, 10, 12, 13, 20])
def test_brackets_do_not_depend_on_the_dimensions_beside_them(dimension, dtype):
    """Nor where the last step that a sample can take is one that gives targets."""
    eigenvalues = torch.linspace(0.01, 1, 60, dtype=dtype) ** torch.linspace(0.2, 2, 41).unsqueeze(1)
    eigenvalues[:40, :dimension] = torch.linspace(0.01, 1, dimension) ** torch.linspace(0.2, 2, 40).unsqueeze(1)
    start = torch.randn(41, 60, dtype=dtype, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    start[:40, dimension:] = 0
    for rtol, delta in itertools.product((0.01, 0.05), (1e-6, 1e-12)):
        together = lanczos_bracket(lambda u: u * eigenvalues, start, delta=delta, rtol=rtol)
        alone = lanczos_bracket(lambda u: u * eigenvalues[:40], start[:40], delta=delta, rtol=rtol)
        for end, other in zip(together, alone, strict=True):
            torch.testing.assert_close(end[:40], other, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0)
