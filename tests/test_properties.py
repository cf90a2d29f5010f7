"""Properties over random networks. Hypothesis draws the shape and a seed; torch draws the numbers."""

from __future__ import annotations

import cases
import references as ref
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradpen import evaluate_inequality
from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm

ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.LeakyReLU, nn.Identity, nn.Sigmoid]
NORMS = ["spectral", "frobenius", "joint"]


@st.composite
def networks(draw, dtype=torch.float64):
    """(model, x, y) of a random depth, width, activation and scale."""
    widths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    batch, scale = draw(st.integers(1, 4)), 10.0 ** draw(st.floats(-2, 1))
    activation, bias = draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    model = cases.mlp(*widths, activation=activation, bias=bias).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model, torch.randn(batch, widths[0], dtype=dtype), torch.randint(widths[-1], (batch,))


def squared_errors(network):
    """The same network with a target of another kind: a saturated softmax loses digits in any formula."""
    model, x, _ = network
    return model, x, torch.rand_like(model(x)).detach()


def check_the_inequality(model, x, y, of, norm, slack):
    report = evaluate_inequality(model, x, y, of=of, norm=norm)
    assert report.holds.all() and report.violations == 0
    assert report.undefined == int(report.tightness.isnan().sum())
    defined = report.tightness[~report.tightness.isnan()]
    assert (defined >= 0).all() and (defined <= 1 + slack).all()
    for layer in report.layers:
        assert (layer.lhs <= layer.rhs * (1 + slack)).all()
    assert not torch.cat([report.lhs, report.rhs, *(layer.lhs for layer in report.layers)]).isnan().any()


OF = st.sampled_from(["loss", "output", lambda output, target: output[:, 0]])


@settings(max_examples=1000)
@given(networks(torch.float64), OF, st.sampled_from(NORMS))
def test_the_inequality_holds_in_float64(network, of, norm):
    check_the_inequality(*network, of, norm, slack=1e-9)


@settings(max_examples=1000)
@given(networks(torch.float32), OF, st.sampled_from(NORMS))
def test_the_inequality_holds_in_float32(network, of, norm):
    check_the_inequality(*network, of, norm, slack=1e-3)


@settings(max_examples=100)
@given(networks(), st.sampled_from(NORMS), st.sampled_from(["dense", "krylov"]))
def test_the_left_side_is_that_of_the_loops(network, norm, method):
    model, x, y = squared_errors(network)
    report = evaluate_inequality(model, x, y, criterion=F.mse_loss, norm=norm, method=method)
    expected = ref.inequality(model, x, y, cases.squared_error_row, norm)
    ref.assert_close(report.rhs, expected["rhs"], 1e-9)
    ref.assert_close(report.lhs, expected["lhs"], 1e-5)
    slack = 1 + 1e-6
    assert (report.lhs_lower <= expected["lhs"] * slack).all() and (expected["lhs"] <= report.lhs_upper * slack).all()


@settings(max_examples=60)
@given(networks())
def test_tightness_is_ordered_by_norm(network):
    frobenius, spectral, joint = (
        evaluate_inequality(*network, norm=norm).lhs for norm in ("frobenius", "spectral", "joint")
    )
    assert (frobenius <= spectral * (1 + 1e-9)).all() and (spectral <= joint * (1 + 1e-9)).all()


@settings(max_examples=60)
@given(networks(), st.floats(-20, 20))
def test_rescaling_f_leaves_the_tightness(network, exponent):
    model, x, y = network
    scaled = lambda output, target: -(10.0**exponent) * F.cross_entropy(output, target, reduction="none")  # noqa: E731
    report, expected = evaluate_inequality(model, x, y, criterion=scaled), evaluate_inequality(model, x, y)
    torch.testing.assert_close(report.tightness, expected.tightness, rtol=1e-8, atol=1e-12, equal_nan=True)


@settings(max_examples=60)
@given(networks(), st.randoms(use_true_random=False))
def test_permuting_samples_permutes_the_report(network, random):
    model, x, y = network
    order = random.sample(range(len(x)), len(x))
    report, permuted = evaluate_inequality(model, x, y), evaluate_inequality(model, x[order], y[order])
    for name in ("lhs", "rhs", "input_grad_sq_norm", "tightness"):
        before, after = getattr(report, name)[order], getattr(permuted, name)
        torch.testing.assert_close(
            after, before, rtol=1e-8, atol=1e-12 * float(before.nan_to_num().max()), equal_nan=True
        )


@settings(max_examples=60)
@given(networks())
def test_a_sample_alone_has_what_it_has_in_company(network):
    model, x, y = network
    report = evaluate_inequality(model, x, y)
    alone = evaluate_inequality(model, x[:1], y[:1])
    torch.testing.assert_close(report.lhs[:1], alone.lhs, rtol=1e-8, atol=1e-300)
    torch.testing.assert_close(report.rhs[:1], alone.rhs, rtol=1e-8, atol=1e-300)


@settings(max_examples=60)
@given(networks(), st.integers(1, 5))
def test_penalties_are_those_of_the_loops(network, group):
    model, x, y = squared_errors(network)
    row, options = cases.squared_error_row, {"criterion": F.mse_loss}
    ref.assert_close(input_grad_sq_norm(model, x, y, **options), ref.input_grad_sq_norm(model, x, y, row), 1e-9)
    expected = ref.param_grad_sq_norm(model, x, y, row, group=group)
    ref.assert_close(param_grad_sq_norm(model, x, y, over=group, **options), expected, 1e-9)


@settings(max_examples=60)
@given(networks(), st.integers(2, 4))
def test_averaging_gradients_never_enlarges_them(network, group):
    model, x, y = network
    sample = param_grad_sq_norm(model, x, y).mean()
    batch = param_grad_sq_norm(model, x, y, over="batch")[0]
    assert batch <= sample * (1 + 1e-9)


@settings(max_examples=60)
@given(st.integers(1, 4), st.sampled_from(ACTIVATIONS), st.integers(0, 2**32 - 1), st.sampled_from(NORMS))
def test_chains_of_width_one_are_equalities(depth, activation, seed, norm):
    torch.manual_seed(seed)
    model = cases.mlp(*[1] * (depth + 1), activation=activation).double()
    report = evaluate_inequality(model, torch.randn(3, 1, dtype=torch.float64), of="output", norm=norm)
    on = report.input_grad_sq_norm > 0  # a ReLU that is off leaves 0 <= 1
    torch.testing.assert_close(report.tightness[on], torch.ones_like(report.tightness[on]), rtol=1e-8, atol=0)
    assert (report.tightness[~on] == 0).all()


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from(["spectral", "joint"]), st.booleans())
def test_one_dense_layer_with_one_output_is_an_equality(width, seed, norm, bias):
    torch.manual_seed(seed)
    model = cases.mlp(width, 1, bias=bias).double()
    report = evaluate_inequality(model, torch.randn(3, width, dtype=torch.float64), of="output", norm=norm)
    torch.testing.assert_close(report.tightness, torch.ones(3, dtype=torch.float64), rtol=1e-8, atol=0)
