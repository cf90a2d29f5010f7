"""Both sides of the inequality against explicit loops, which layers are in the sum, and what is 0/0."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace

import cases
import pytest
import references as ref
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from gradpen import evaluate_inequality, inequality
from gradpen.inequality import NotFiniteError
from gradpen.layer_norms import layer_norms
from gradpen.spectral import Bracket

CHAINS = [
    *[case for case in cases.DENSE if case.name not in {"functional"}],
    cases.Case("layer_norm_chain", lambda: cases.after_norm(nn.LayerNorm(4), 4)),
    cases.Case("batch_norm_chain", cases.batch_norm),
    cases.Case("conv_then_dense", lambda: cases.conv(nn.Conv1d(2, 3, 3)), cases.normal(2, 5)),
    cases.Case("custom_parameter_chain", lambda: cases.mlp_with(cases.Scale(4))),
    cases.Case("bottleneck", lambda: cases.mlp(6, 1, 7, 2, activation=nn.Tanh), cases.normal(6)),
    cases.Case("no_activation", lambda: cases.mlp(4, 6, 5, 3, activation=nn.Identity)),
    cases.Case("softmax_between", lambda: cases.mlp(4, 6, 5, 3, activation=lambda: nn.Softmax(1))),
    cases.Case("one_output", lambda: cases.mlp(4, 6, 1), loss=cases.MSE),
    cases.Case("dead_first_layer", lambda: dead(cases.mlp(4, 6, 5, 3), layer=0)),
    cases.Case("zero_weight", lambda: zeroed(cases.mlp(4, 6, 5, 3, activation=nn.Tanh), layer=2)),
]
NORMS = ["spectral", "frobenius", "joint"]


def dead(model, layer):
    """Every unit behind this layer is off."""
    nn.init.constant_(model[layer].bias, -100.0)
    return model


def zeroed(model, layer):
    """A layer with W = 0."""
    nn.init.zeros_(model[layer].weight)
    return model


def margin(output, target):
    return output[:, 0] - output[:, 1]


def compare(report, expected, norm="spectral", tolerance=1e-9):
    """Everything that the oracle knows."""
    ref.assert_close(report.lhs, expected["lhs"], tolerance)
    ref.assert_close(report.rhs, expected["rhs"], tolerance)
    ref.assert_close(report.input_grad_sq_norm, expected["input"], tolerance)
    ref.assert_close(report.param_grad_sq_norm, expected["rhs"], tolerance)
    layers = {layer.name: layer for layer in report.layers}
    for name, terms in expected["layers"].items():
        keys = ["weight_lhs", "weight_rhs", "bias_lhs", "bias_rhs"]
        if all(terms[key] is None for key in keys):
            assert name not in layers
            continue
        keys += ["input_sq_norm"] + ["jacobian_norm", "slack_product", "slack_alignment"] * (norm == "spectral")
        for key in keys:
            actual = getattr(layers[name], key)
            if terms[key] is None and key.startswith("slack"):
                continue
            assert (actual is None) == (terms[key] is None), f"{name}.{key}"
            if actual is not None:
                ref.assert_close(actual, terms[key], 10 * tolerance)
    assert set(layers) <= set(expected["layers"])


# ---- against the loops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_both_sides_of_a_chain(case, norm):
    model, x, y, criterion = case.problem()
    report = evaluate_inequality(model, x, y, criterion=criterion, norm=norm)
    compare(report, ref.inequality(model, x, y, case.loss.row, norm), norm)
    assert report.holds.all() and report.violations == 0


@pytest.mark.parametrize("method", ["auto", "dense", "krylov"])
@pytest.mark.parametrize("norm", ["spectral", "joint"])
@pytest.mark.parametrize("name", ["relu", "three_layers", "layer_norm_chain", "conv_then_dense"])
def test_every_method_finds_the_same_sides(name, norm, method):
    case = next(case for case in CHAINS if case.name == name)
    model, x, y, criterion = case.problem()
    report = evaluate_inequality(model, x, y, criterion=criterion, norm=norm, method=method)
    expected = ref.inequality(model, x, y, case.loss.row, norm)
    ref.assert_close(report.lhs, expected["lhs"], 1e-6)
    slack = 1 + 1e-9
    assert (report.lhs_lower <= expected["lhs"] * slack).all() and (expected["lhs"] <= report.lhs_upper * slack).all()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_brackets_of_a_chain_whose_samples_leave(activation, dtype):
    """Forty samples, of which some leave the iteration before the others; the same ones on every device."""
    widths = [12, 60, 90, 60, 3]
    with torch.device("cpu"):
        modules = [module for n, m in itertools.pairwise(widths) for module in (nn.Linear(n, m), activation())]
        x = torch.randn(40, 12, dtype=dtype) * torch.logspace(-1, 2, 40, dtype=dtype).unsqueeze(1)
        y = torch.randint(3, (40,))
    device = torch.get_default_device()
    model, x, y = nn.Sequential(*modules[:-1]).to(device, dtype), x.to(device), y.to(device)
    found = evaluate_inequality(model, x, y, method="krylov")
    exact = evaluate_inequality(copy.deepcopy(model).double(), x.double(), y, method="dense")
    rounding = 1e-5 if dtype == torch.float32 else 1e-10
    for bracket, layer in zip(found.layers[1:], exact.layers[1:], strict=True):
        assert (bracket.jacobian_norm <= layer.jacobian_norm * (1 + rounding)).all()
        assert (layer.jacobian_norm <= bracket.jacobian_norm_upper * (1 + rounding)).all()
        assert (bracket.jacobian_norm >= 0.95 * bracket.jacobian_norm_upper).all()
        ref.assert_close(bracket.product_norm, layer.product_norm, 0.05)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("norm", NORMS)
def test_small_batches(batch, norm):
    case = cases.find("three_layers")
    model, x, y, criterion = case.problem(batch)
    report = evaluate_inequality(model, x, y, criterion=criterion, norm=norm)
    compare(report, ref.inequality(model, x, y, case.loss.row, norm), norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["relu", "three_layers", "gelu", "frozen_weight", "flattened_image"])
def test_float32(name, norm):
    case = cases.find(name)
    single, double = case.problem(dtype=torch.float32), case.problem()
    double.model.load_state_dict(single.model.state_dict())
    report = evaluate_inequality(single.model, single.x, single.y, norm=norm)
    assert report.lhs.dtype == report.rhs.dtype == report.tightness.dtype == torch.float64
    compare(report, ref.inequality(double.model, single.x.double(), single.y, case.loss.row, norm), norm, 1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["relu", "tanh", "no_bias", "frozen_bias"])
def test_the_sum_over_the_outputs(name, norm):
    model, x, _, _ = cases.find(name).problem()
    compare(
        evaluate_inequality(model, x, of="output", norm=norm),
        ref.inequality(model, x, None, None, norm),
        norm,
    )


@pytest.mark.parametrize("name", ["relu", "tanh", "frozen_weight"])
def test_any_scalar_of_the_output(name):
    model, x, y, _ = cases.find(name).problem()
    expected = ref.inequality(model, x, None, lambda output, target: output[0] - output[1])
    compare(evaluate_inequality(model, x, of=margin), expected)
    compare(evaluate_inequality(model, x, y, of=margin), expected)


@pytest.mark.parametrize("case", [c for c in cases.LOSS_CASES if c.loss in cases.LOSSES], ids=str)
def test_every_kind_of_criterion(case):
    model, x, y, criterion = case.problem()
    report = evaluate_inequality(model, x, y, criterion=criterion)
    compare(report, ref.inequality(model, x, y, case.loss.row))


@pytest.mark.parametrize("case", cases.FLOAT_INPUT, ids=str)
def test_the_right_side_counts_all_parameters_of_any_model(case):
    model, x, y, criterion = case.problem()
    report = evaluate_inequality(model, x, y, criterion=criterion)
    ref.assert_close(report.rhs, ref.param_grad_sq_norm(model, x, y, case.loss.row))
    ref.assert_close(report.input_grad_sq_norm, ref.input_grad_sq_norm(model, x, y, case.loss.row))
    assert report.holds.all() and report.violations == 0
    assert (report.tightness <= 1 + 1e-9).all()


@pytest.mark.parametrize("case", cases.FLOAT_INPUT, ids=str)
def test_batch_gradient_and_noise(case):
    model, x, y, criterion = case.problem()
    report = evaluate_inequality(model, x, y, criterion=criterion)
    batch = ref.param_grad_sq_norm(model, x, y, case.loss.row, group=cases.B)[0]
    ref.assert_close(report.batch_grad_sq_norm, batch)
    ref.assert_close(report.noise_trace, ref.param_grad_sq_norm(model, x, y, case.loss.row).mean() - batch)
    assert report.noise_trace > 0


def test_gradients_that_cancel_in_the_mean():
    """In float32: products between samples would lose a mean that is a thousandth of its terms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(8, 6)
    y = model(x).detach() + torch.randn(8, 1)
    x, y = torch.cat([x, x]), torch.cat([y, 2 * model(x).detach() - y + 1e-3])  # the errors of each pair almost cancel
    single, double = (
        evaluate_inequality(copy.deepcopy(model).to(t), x.to(t), y.to(t), criterion=nn.MSELoss())
        for t in (torch.float32, torch.float64)
    )
    assert double.batch_grad_sq_norm < 1e-5 * double.rhs.mean()
    assert single.batch_grad_sq_norm.item() == pytest.approx(double.batch_grad_sq_norm.item(), rel=1e-3)


@pytest.mark.parametrize("batch", [1, 3, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "without_bias", "frozen_weight", "frozen_bias"])
def test_the_batch_gradient_of_few_and_of_many_samples(kind, dtype, batch):
    """By products between samples where these multiply less than the gradients, which are many samples' way."""
    bias = kind != "without_bias"
    layers = [nn.Linear(20, 30, bias), nn.Tanh(), nn.Linear(30, 24, bias), nn.Tanh(), nn.Linear(24, 16, bias)]
    model = nn.Sequential(*layers).to(dtype)
    if kind.startswith("frozen"):
        getattr(model[2], kind.removeprefix("frozen_")).requires_grad_(False)
    x, y = torch.randn(batch, 20, dtype=dtype), torch.randn(batch, 16, dtype=dtype)
    counted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(F.mse_loss(model(x), y), counted)
    report = evaluate_inequality(model, x, y, criterion=nn.MSELoss())
    expected = sum(gradient.double().square().sum() for gradient in gradients)
    assert report.batch_grad_sq_norm.item() == pytest.approx(expected.item(), rel=1e-5)
    rows = [torch.autograd.grad(F.mse_loss(model(x[i]), y[i]), counted) for i in range(batch)]
    norms = [sum(gradient.double().square().sum() for gradient in row).item() for row in rows]
    assert report.rhs.tolist() == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_that_cancel_altogether_leave_no_negative_square(tied, seed):
    torch.manual_seed(seed)
    first = nn.Linear(20, 20)
    model = nn.Sequential(first, nn.Tanh(), first if tied else nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20)).double()
    x, error = torch.randn(2, 20, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    y = model(x).detach()
    report = evaluate_inequality(model, torch.cat([x, x]), torch.cat([y + error, y - error]), criterion=nn.MSELoss())
    assert 0 <= report.batch_grad_sq_norm < 1e-14 * report.rhs.mean()


# ---- what the report says about itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["three_layers", "tanh", "no_bias", "frozen_weight", "frozen_bias"])
def test_the_parts_add_up(name, norm):
    model, x, y, _ = cases.find(name).problem()
    report = evaluate_inequality(model, x, y, norm=norm)
    ref.assert_close(sum(layer.lhs for layer in report.layers), report.lhs, 1e-12)
    ref.assert_close(sum(layer.rhs for layer in report.layers), report.rhs, 1e-12)
    ref.assert_close(report.lhs / report.rhs, report.tightness, 1e-12)
    for layer in report.layers:
        ref.assert_close(layer.coefficient * report.input_grad_sq_norm, layer.lhs, 1e-12)


@pytest.mark.parametrize("name", ["three_layers", "tanh"])
def test_the_slack_is_the_tightness_of_a_layer(name):
    model, x, y, _ = cases.find(name).problem()
    for layer in evaluate_inequality(model, x, y).layers:
        assert (layer.slack_product >= 1 - 1e-12).all() and (layer.slack_alignment >= 1 - 1e-12).all()
        ref.assert_close(1 / (layer.slack_product * layer.slack_alignment).square(), layer.tightness, 1e-9)
        ref.assert_close(layer.weight_lhs / layer.weight_rhs, layer.tightness, 1e-12)
        ref.assert_close(layer.bias_lhs / layer.bias_rhs, layer.tightness, 1e-12)


def test_slack_may_be_left_out():
    model, x, y, _ = cases.find("three_layers").problem()
    with_slack, without = (evaluate_inequality(model, x, y, slack=slack) for slack in (True, False))
    assert all(layer.slack_product is None and layer.slack_alignment is None for layer in without.layers)
    ref.assert_close(without.lhs, with_slack.lhs, 1e-13)


def test_looser_and_tighter_norms():
    model, x, y, _ = cases.find("four_layers").problem()
    tightness = [evaluate_inequality(model, x, y, norm=norm).tightness for norm in ("frobenius", "spectral", "joint")]
    assert (tightness[0] < tightness[1]).all() and (tightness[1] < tightness[2]).all()


def test_the_report_is_ready_for_json():
    model, x, y, _ = cases.find("no_bias").problem()
    x[0] = 0  # undefined: both sides are 0
    report = evaluate_inequality(model, x, y)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["lhs"] == pytest.approx(report.lhs.tolist())
    assert plain["tightness"][0] is None and plain["undefined"] == 1
    assert [layer["name"] for layer in plain["layers"]] == ["0", "2"]


def test_the_report_reads_like_a_table():
    model, x, y, _ = cases.find("residual").problem()
    text = str(evaluate_inequality(model, x, y))
    for word in ("stem", "head", "inner", "tightness", "violations", "spectral"):
        assert word in text


@pytest.mark.parametrize(
    ("norm", "denominator"),
    [("spectral", "(‖W_t‖²‖J_t‖²)"), ("frobenius", "(‖W_t‖²‖J_t‖²)"), ("joint", "‖W_t J_t‖²")],
)
def test_the_table_names_the_left_side_that_it_shows(norm, denominator):
    model, x, y, _ = cases.find("three_layers").problem()
    left, right, tightness = str(evaluate_inequality(model, x, y, norm=norm)).splitlines()[2:5]
    label, _, _ = left.partition("  ")
    assert label == f"‖∇_x f‖² · Σ_t (1+‖h_t‖²)/{denominator}"
    assert not {line[len(label) + 1] for line in (left, right, tightness)} - {" "}
    assert " " not in {line[len(label) + 2] for line in (left, right, tightness)}  # one column of values


def test_nothing_of_the_report_hangs_on_a_graph():
    model, x, y, _ = cases.find("custom_parameter").problem()
    report = evaluate_inequality(model, x, y)
    tensors = [report.lhs, report.rhs, report.tightness, report.noise_trace, report.batch_grad_sq_norm]
    tensors += [value for layer in report.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert not any(tensor.requires_grad for tensor in tensors)


# ---- equality, 0/0, scale -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["spectral", "joint"])
@pytest.mark.parametrize("method", ["auto", "dense", "krylov"])
def test_equality_for_one_dense_layer_with_one_output(method, norm, bias):
    model, x = nn.Sequential(nn.Linear(7, 1, bias=bias)).double(), torch.randn(4, 7, dtype=torch.float64)
    report = evaluate_inequality(model, x, of="output", norm=norm, method=method)
    ref.assert_close(report.tightness, torch.ones(4), 1e-9)
    assert report.holds.all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_equality_for_a_chain_of_width_one(depth, norm):
    model = cases.mlp(*[1] * (depth + 1), activation=nn.Tanh).double()
    report = evaluate_inequality(model, torch.randn(4, 1, dtype=torch.float64), of="output", norm=norm)
    ref.assert_close(report.tightness, torch.ones(4), 1e-9)


def test_a_dead_network_has_a_left_side_of_zero():
    model, x, y, _ = cases.find("three_layers").problem()
    report = evaluate_inequality(dead(model, 0), x, y)
    assert report.lhs.tolist() == report.tightness.tolist() == [0.0] * 5
    assert (report.rhs > 0).all() and report.holds.all()
    assert report.undefined == report.violations == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["dense", "krylov"])
def test_undefined_samples_are_counted_and_spoil_no_other(norm, method):
    model, x, y, _ = cases.find("no_bias").problem()
    expected = evaluate_inequality(model, x[1:], y[1:], norm=norm, method=method)
    x[0] = 0
    report = evaluate_inequality(model, x, y, norm=norm, method=method)
    assert report.undefined == 1 and report.tightness[0].isnan()
    assert report.lhs[0] == report.rhs[0] == 0 and report.holds.all()
    ref.assert_close(report.tightness[1:], expected.tightness, 1e-6)
    for layer in report.layers:
        assert torch.isfinite(layer.lhs).all() and torch.isfinite(layer.rhs).all()


def test_a_scalar_that_ignores_some_samples():
    model, x, y, _ = cases.find("tanh").problem()
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    report = evaluate_inequality(model, x, y, of=lambda output, target: output[:, 0] * keep)
    expected = evaluate_inequality(model, x, y, of=lambda output, target: output[:, 0])
    assert report.undefined == 2 and report.tightness.isnan().tolist() == [False, True, False, True, False]
    ref.assert_close(report.tightness[keep.bool()], expected.tightness[keep.bool()], 1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e25])
def test_rescaling_the_loss_in_float32_leaves_the_tightness(scale):
    model, x, y, _ = cases.find("three_layers").problem(dtype=torch.float32)
    scaled = lambda output, target: scale * F.cross_entropy(output, target, reduction="none")  # noqa: E731
    report, expected = evaluate_inequality(model, x, y, criterion=scaled), evaluate_inequality(model, x, y)
    ref.assert_close(report.tightness, expected.tightness, 1e-5)
    ref.assert_close(report.rhs, scale**2 * expected.rhs, 1e-5)
    assert report.undefined == report.violations == 0


@pytest.mark.parametrize("prepare", [lambda model: model, lambda model: dead(model, 0)])  # inf <= inf, and inf · 0
def test_what_overflows_is_undefined_and_no_violation(prepare):
    model, x, _, _ = cases.find("relu").problem()
    scale = torch.tensor([1.0, 1e200, 1.0, 1e200, 1.0], dtype=torch.float64)
    report = evaluate_inequality(prepare(model), x, scale, of=lambda o, t: o[:, 0] * t)
    assert report.tightness.isnan().nonzero().flatten().tolist() == [1, 3]
    assert report.undefined == 2 and report.violations == 0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_inputs_whose_squares_overflow_in_float32(scale):
    torch.manual_seed(0)
    model, (_, x, y, _) = cases.mlp(4, 8, 6, 3), cases.find("three_layers").problem()
    with torch.no_grad():
        for parameter in list(model.parameters())[1::2]:
            parameter.zero_()  # no biases: everything scales with x
    x = (scale * x).float()
    options = {"of": lambda output, target: output[:, 0]}
    report = evaluate_inequality(model, x, y, **options)
    expected = evaluate_inequality(model.double(), x.double(), y, **options)
    assert report.rhs.isfinite().all()
    ref.assert_close(report.rhs, expected.rhs, 1e-4)
    ref.assert_close(report.tightness, expected.tightness, 1e-4)


def test_an_all_but_certain_sample_still_has_a_tightness():
    model, x, y, _ = cases.find("three_layers").problem(dtype=torch.float32)
    with torch.no_grad():
        model[-1].bias.copy_(50.0 * F.one_hot(y[0], 3))
    report = evaluate_inequality(model, x, y)
    assert report.rhs[0] < 1e-12
    assert 0 < report.tightness[0] <= 1 + 1e-5


def log_odds(output, target):
    """Against the target: cross entropy is its softplus, which changes no tightness."""
    of_target = F.one_hot(target, output.shape[1]).bool()
    return output.masked_fill(of_target, -torch.inf).logsumexp(1) - output[of_target]


@pytest.mark.parametrize("margin", [0.0, 12.0, 18.0, 80.0])  # of the last, p − 1 is 0 in float64 too
@pytest.mark.parametrize(
    "criterion", [F.cross_entropy, nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]))], ids=["function", "weighted"]
)
@pytest.mark.parametrize("of", ["classes", "probabilities", "positions"])
def test_a_certain_sample_has_the_tightness_of_its_log_odds(of, criterion, margin):
    model, x, y, _ = cases.find("three_layers").problem(dtype=torch.float32)
    y = torch.zeros_like(y)
    with torch.no_grad():
        model[-1].bias.copy_(margin * F.one_hot(y[0], 3))
    given = {"classes": y, "probabilities": F.one_hot(y, 3).float(), "positions": y.unsqueeze(1)}[of]
    shaped = nn.Sequential(model, nn.Unflatten(1, (3, 1))) if of == "positions" else model
    found = evaluate_inequality(shaped, x, given, criterion=criterion)
    expected = evaluate_inequality(model.double(), x.double(), y, of=log_odds)
    ref.assert_close(found.tightness, expected.tightness, 1e-4)


# ---- which layers are in the sum ------------------------------------------------------------------------------------------

IN_THE_SUM = {
    "relu": (["0", "2"], []),
    "inplace_relu": (["0", "2"], []),
    "frozen_weight": (["0", "2"], []),
    "residual": (["stem", "head"], ["inner"]),
    "reused": (["head"], ["shared"]),
    "reused_in_two_kinds": (["head"], ["shared"]),
    "tied_autoencoder": ([], ["encoder"]),
    "tied_by_matmul": ([], ["encoder"]),
    "tokens": (["4"], ["0", "2"]),
    "tokens_as_batch": (["4"], ["0", "2"]),
    "tokens_first": ([], ["dense", "norm", "head"]),
    "flattened_tokens": (["head"], ["dense"]),
    "reversed_batch": (["head"], ["dense"]),
    "conv2d": (["3"], ["0"]),
    "conv2d_pointwise": (["3"], ["0"]),
    "layer_norm": (["0", "4"], ["1"]),
    "parametrised": (["2"], ["0"]),
    "custom_parameter": (["0", "2"], ["1.scale"]),
    "prelu": (["0", "2"], ["1.weight"]),
    "positions": (["head"], ["encode", "table"]),
    "recurrent": (["head"], ["cell.weight_ih"]),
    "two_ranks_of_one_weight": (["head"], ["dense"]),
    "two_inputs_dict": (["head"], ["image", "vector", "table"]),
    "unused_parameter": (["head"], ["idle"]),
    "attention": (["model.head"], ["model.attention.in_proj_weight"]),
}


@pytest.mark.parametrize("name", IN_THE_SUM)
def test_only_layers_that_cut_the_graph_are_in_the_sum(name):
    included, left_out = IN_THE_SUM[name]
    model, x, y, criterion = cases.find(name).problem()
    report = evaluate_inequality(model, x, y, criterion=criterion)
    assert [layer.name for layer in report.layers] == included
    excluded = {entry.name: entry.reason for entry in report.excluded}
    for layer in left_out:
        assert any(key == layer or key.startswith(layer + ".") for key in excluded), f"{layer} not in {excluded}"
    assert all(excluded.values())
    assert not set(excluded) & set(included)


REASONS = {
    "residual": ("inner", "around"),
    "reused": ("shared", "more than once"),
    "tied_autoencoder": ("encoder", "more than once"),
    "tokens": ("0", "one row per sample"),
    "conv2d": ("0", "convolution"),
    "parametrised": ("0", "other parameters"),
    "unused_parameter": ("idle", "does not depend"),
    "broadcast_bias": ("w", "broadcast bias"),
    "vector_weight": ("v", "vector"),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_the_right_one(name):
    layer, words = REASONS[name]
    model, x, y, criterion = cases.find(name).problem()
    reasons = [e.reason for e in evaluate_inequality(model, x, y, criterion=criterion).excluded if layer in e.name]
    assert any(words in reason for reason in reasons), reasons


def test_the_pointwise_convolution_of_the_counterexample():
    """f = z_1 − z_2 on x = (1, 1): ∇_θ f = 0 while ∇_x f ≠ 0."""
    conv, x = nn.Conv1d(1, 1, 1).double(), torch.ones(1, 1, 2, dtype=torch.float64)
    report = evaluate_inequality(conv, x, of=lambda output, target: output[:, 0, 0] - output[:, 0, 1])
    assert report.input_grad_sq_norm > 0 and report.rhs == 0
    assert report.layers == [] and len(report.excluded) == 1
    assert report.lhs == 0 and report.undefined == 1 and report.holds.all()


class OneBiasForAll(nn.Module):
    """A dense layer whose bias is one parameter, the same for all its units."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), requires_grad=not frozen)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.shift.expand(2))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_computed_bias_has_no_term_of_its_own(frozen):
    model, x = OneBiasForAll(frozen).double(), torch.ones(3, 2, dtype=torch.float64)
    report = evaluate_inequality(model, x, of=lambda o, t: o[:, 0] - o[:, 1])  # ∂f/∂shift = 1 − 1
    assert report.holds.all() and (report.lhs <= report.rhs).all()
    assert [layer.bias_lhs for layer in report.layers] == ([] if frozen else [None])
    assert (report.rhs == 0).all() == frozen


def test_tied_weights_whose_gradients_cancel():
    """f = w x − w x is 0 in w, but each use alone has a gradient."""

    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(3, 1)
            self.other = nn.Linear(3, 1)

        def forward(self, x):
            return self.dense(x) - F.linear(2 * x, self.dense.weight) + 0 * self.other(x)

    report = evaluate_inequality(Difference().double(), torch.randn(4, 3, dtype=torch.float64), of="output")
    assert report.layers == [] or [layer.name for layer in report.layers] == ["other"]
    assert report.holds.all()


def test_a_residual_block_that_is_off_on_these_samples():
    """The stem's influence goes round the inner layer only where the inner layer is on."""
    model, x, y, _ = cases.find("residual").problem()
    nn.init.zeros_(model.inner.weight)
    report = evaluate_inequality(model, x, y)
    assert [layer.name for layer in report.layers] == ["stem", "head"] and report.holds.all()


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "joint"])
def test_a_layer_fed_by_a_parameter_where_all_units_are_dead(norm):
    """∇_x f = 0 lets any layer pass the identity; x has to lead to it."""

    class Fed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
            self.other, self.constant = nn.Linear(4, 3), nn.Parameter(torch.randn(1, 4))
            nn.init.constant_(self.first.bias, -100.0)

        def forward(self, x):
            return self.head(self.first(x).relu()) + self.other(self.constant.expand(len(x), -1))

    report = evaluate_inequality(
        Fed().double(), torch.randn(5, 4).double(), torch.zeros(5, dtype=torch.long), norm=norm
    )
    assert [layer.name for layer in report.layers] == ["first", "head"] and (report.lhs == 0).all()
    assert {entry.name: entry.reason for entry in report.excluded}["other"] == "its input does not depend on x"


def test_one_sample_that_goes_round_a_layer_is_enough():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.first(x).tanh()) + (x[:, :3] * (x[:, 3:] > 1)).sin()

    x = torch.randn(5, 4, dtype=torch.float64).clamp(max=0.5)
    model, y = Gated().double(), torch.zeros(5, dtype=torch.long)
    assert [layer.name for layer in evaluate_inequality(model, x, y).layers] == ["first", "head"]
    x[2, 3] = 2
    report = evaluate_inequality(model, x, y)
    assert report.layers == [] and {entry.name for entry in report.excluded} == {"first", "head"}


def test_a_layer_that_sees_only_part_of_the_input_is_left_out():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep, self.middle, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.cat([self.middle(self.deep(x[:, :2]).tanh()).tanh(), x[:, 2:]], 1))

    report = evaluate_inequality(Wide().double(), torch.randn(5, 4, dtype=torch.float64), of="output")
    assert [layer.name for layer in report.layers] == ["head"] and report.holds.all()


def test_a_detached_input_takes_no_part():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.unseen, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.head((self.seen(x) * self.unseen(x.detach())).tanh())

    report = evaluate_inequality(Half().double(), torch.randn(5, 4, dtype=torch.float64), of="output")
    assert "unseen" not in [layer.name for layer in report.layers]
    assert report.holds.all() and (report.tightness <= 1).all()


@pytest.mark.parametrize(
    "name", ["residual", "reused", "conv2d", "tokens", "layer_norm", "attention", "two_inputs_tuple"]
)
def test_the_left_side_of_a_model_that_is_no_chain(name):
    """The head's term, from its own Jacobian by the loop."""
    case = cases.find(name)
    model, x, y, criterion = case.problem()
    report = evaluate_inequality(model, x, y, criterion=criterion)
    head = model.get_submodule(report.layers[-1].name)
    captured = []
    handle = head.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    norms = []
    for i in range(cases.B):
        row = ref.one_row(x, i)
        ref.call(model, row)
        h = captured[-1][0]
        jacobian = torch.stack([torch.cat([g.flatten() for g in ref.gradients(e, ref.float_tensors(row))]) for e in h])
        norms.append(ref.spectral_norm(jacobian))
    handle.remove()
    expected = torch.tensor(norms, dtype=torch.float64)
    ref.assert_close(report.layers[-1].jacobian_norm, expected, 1e-8)
    bottom = (expected * ref.spectral_norm(head.weight)).square()
    ref.assert_close(report.layers[-1].bias_lhs, report.input_grad_sq_norm / bottom, 1e-8)


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm])
def test_a_parametrised_weight_has_no_term_of_its_own(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    _, x, y, _ = cases.find("relu").problem()
    report = evaluate_inequality(model, x, y)
    assert "0" not in [layer.name for layer in report.layers if layer.weight_lhs is not None]
    assert report.holds.all()


class Turned(nn.Module):
    """A layer that sees the samples in another order, an output that is 0, and a layer that is always off."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.turned, self.head = nn.Linear(5, 20), nn.Linear(20, 20), nn.Linear(20, 3)
        self.off = nn.Linear(5, 3)
        nn.init.zeros_(self.head.weight[-1:].detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.turned(self.stem(x).relu().flip(0)).flip(0).relu()
        return self.head(h) + 0 * self.off(x)


def test_rows_in_another_order_are_seen_though_the_last_output_is_zero():
    model, x = Turned().double(), torch.randn(4, 5, dtype=torch.float64)
    x[1] *= 20
    report = evaluate_inequality(model, x, of="output")
    assert [layer.name for layer in report.layers] == ["stem", "head"]
    reasons = {entry.name: entry.reason for entry in report.excluded}
    assert reasons["turned"] == "its rows are not one for every sample"
    assert report.holds.all() and (report.tightness <= 1).all()


@pytest.mark.parametrize("of", ["loss", "output", margin])
def test_an_empty_batch_is_refused(of):
    model, x, y, _ = cases.find("relu").problem()
    with pytest.raises(ValueError, match="expected at least one sample"):
        evaluate_inequality(model, x[:0], y[:0], of=of)


class TwoWeights(nn.Module):
    """One module, two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.up).tanh(), self.down)


@pytest.mark.parametrize("inner", [True, False])
def test_layers_of_one_module_have_names_of_their_own(inner):
    prefix, model = ("0.", nn.Sequential(TwoWeights(), nn.Linear(3, 3))) if inner else ("", TwoWeights())
    report = evaluate_inequality(model, torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    assert [layer.name for layer in report.layers] == [f"{prefix}up", f"{prefix}down", *["1"] * inner]


class WithAutocast(nn.Module):
    """A model that switches autocast on by itself, for all layers or for the first one."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.first, self.head, self.whole = nn.Linear(5, 20), nn.Linear(20, 3), whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            h = self.first(x).relu()
            if self.whole:
                return self.head(h)
        return self.head(h.float())


@pytest.mark.parametrize("whole", [True, False])
def test_autocast_within_the_model_is_refused(whole):
    model, x, y = WithAutocast(whole), torch.randn(4, 5), torch.randint(3, (4,))
    with pytest.raises(ValueError, match=r"'first.weight' to compute in torch.float32.*bfloat16.*autocast"):
        evaluate_inequality(model, x, y)


class Stepped(nn.Module):
    """A step function between a dense layer and what comes before: J = 0, and no derivative of J either."""

    def __init__(self, before: nn.Module | None, width: int) -> None:
        super().__init__()
        self.before, self.head = before or nn.Identity(), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.before(x).flatten(1).round())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["auto", "krylov"])
@pytest.mark.parametrize("before", [None, lambda: nn.Conv1d(2, 4, 3)])
def test_a_step_function_has_a_jacobian_of_zero(before, method, norm):
    model = Stepped(before and before(), 20).double()
    x, y = torch.randn(4, 2, 7 if before else 10, dtype=torch.float64), torch.randint(3, (4,))
    report = evaluate_inequality(model, x, y, norm=norm, method=method)
    assert [layer.name for layer in report.layers] == ["head"] and report.holds.all()
    assert (report.lhs == 0).all() and (report.lhs_lower == 0).all() and (report.rhs > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_dropout_in_training_mode_holds_for_its_mask(seed):
    torch.manual_seed(seed)
    model = cases.mlp(4, 8, 6, 3, activation=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5))).double()
    _, x, y, _ = cases.find("relu").problem()
    report = evaluate_inequality(model, x, y)
    assert len(report.layers) == 3 and report.holds.all()
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    state = torch.get_rng_state()
    report = evaluate_inequality(model, x, y)
    torch.set_rng_state(state)
    losses = F.cross_entropy(model(x), y, reduction="none")
    expected = torch.stack([ref.sq_norm(ref.gradients(f, [x])) for f in losses])
    ref.assert_close(report.input_grad_sq_norm, expected)


# ---- Krylov brackets at sizes where they are not exact --------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["spectral", "joint"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_krylov_brackets_hold_the_exact_left_side(activation, norm):
    model = cases.mlp(90, 80, 70, 10, activation=activation).double()
    x, y = torch.randn(3, 90, dtype=torch.float64), torch.randint(10, (3,))
    krylov, dense = (evaluate_inequality(model, x, y, norm=norm, method=method) for method in ("krylov", "dense"))
    assert (krylov.lhs_lower <= dense.lhs).all() and (dense.lhs <= krylov.lhs_upper * (1 + 1e-9)).all()
    assert ref.relative_error(krylov.lhs, dense.lhs) < 1e-2
    assert (krylov.lhs_lower >= 0.75 * krylov.lhs_upper).all()
    assert (krylov.lhs_lower < krylov.lhs_upper).all()
    assert krylov.holds.all()


def test_a_chain_with_a_link_that_is_none_is_multiplied_out_around_it():
    """Elementwise, then a normalisation of the sample, then elementwise again: each J by its own way, all exact."""
    model = nn.Sequential(
        *[
            nn.Linear(20, 18),
            nn.ReLU(),
            nn.Linear(18, 19),
            nn.LayerNorm(19),
            nn.Linear(19, 18),
            nn.Tanh(),
            nn.Linear(18, 3),
        ]
    ).double()
    x, y = torch.randn(4, 20, dtype=torch.float64), torch.randint(3, (4,))
    krylov, dense = (evaluate_inequality(model, x, y, method=method, rtol=1e-3) for method in ("krylov", "dense"))
    assert len(dense.layers) == 4
    for found, exact in zip(krylov.layers, dense.layers, strict=True):
        ref.assert_close(found.jacobian_norm, exact.jacobian_norm, 1e-3)
        assert (exact.jacobian_norm <= found.jacobian_norm_upper * (1 + 1e-9)).all()


def test_a_bracket_never_calls_rounding_a_violation():
    model = cases.mlp(64, 1, activation=nn.Identity)
    x = torch.randn(50, 64)
    for method in ("dense", "krylov"):
        report = evaluate_inequality(model, x, of="output", method=method)
        assert report.violations == 0 and math.isclose(report.tightness.mean(), 1, rel_tol=1e-5)


class HookedNode(nn.Module):
    """A hook on a node of the graph, which cannot be seen there, makes the gradient a hundred times larger."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        if h.grad_fn is not None:
            h.grad_fn.register_hook(lambda inputs, _: tuple(100 * gradient for gradient in inputs))
        return self.third(torch.relu(self.second(h)))


def test_a_hook_on_a_node_is_no_violation():
    """What it does to gradients, it does to the products with J."""
    model, x, y = HookedNode(), torch.randn(8, 4), torch.randint(3, (8,))
    report = evaluate_inequality(model, x, y)
    assert report.holds.all() and len(report.layers) == 3
    weight, h = model.first.weight.detach(), model.first(x).detach()
    expected = 100 * torch.linalg.matrix_norm((h > 0).unsqueeze(2) * weight, 2)
    ref.assert_close(report.layers[1].jacobian_norm, expected.double(), 1e-5)


def test_wide_layers_that_are_done_before_narrow_ones():
    torch.manual_seed(0)
    model = cases.mlp(80, 60, 120, 3).double()
    with torch.no_grad():
        model[2].weight += 20 * torch.randn(120, 1) @ torch.randn(1, 60)  # nearly of rank one
    x, y = torch.randn(9, 80, dtype=torch.float64), torch.randint(3, (9,))
    report = evaluate_inequality(model, x, y, method="krylov", rtol=1e-4)
    for layer, prefix in zip(report.layers[1:], (model[:2], model[:4]), strict=True):
        exact = torch.stack([torch.linalg.matrix_norm(torch.autograd.functional.jacobian(prefix, row), 2) for row in x])
        ref.assert_close(layer.jacobian_norm, exact, 1e-4)
        assert (exact <= layer.jacobian_norm_upper * (1 + 1e-12)).all()


class Times(nn.Module):
    """Its factor times x."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def saturated(factor):
    return nn.Sequential(nn.Linear(4, 3), Times(factor), nn.Softmax(1), nn.Linear(3, 1))


def normalised():
    model = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    nn.init.constant_(model[1].weight, 100.0)
    return model


@pytest.mark.parametrize("method", ["dense", "krylov"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("build", [lambda: saturated(10.0), lambda: saturated(30.0), normalised])
def test_rounding_is_no_violation(build, norm, method):
    """Terms cancel in the backward pass, so that products with J are rounding: of one vector so, of its parts otherwise."""
    counts = []
    for seed, dtype in itertools.product(range(8), (torch.float32, torch.float64)):
        torch.manual_seed(seed)
        model, x = build().to(dtype), 3 * torch.randn(16, 4, dtype=dtype)
        report = evaluate_inequality(model, x, None, of="output", norm=norm, method=method)
        assert report.holds.all() and (report.tightness <= 1 + 1e-3).all()
        counts.append(sum(int((layer.coefficient == 0).sum()) for layer in report.layers[1:]))
    assert len(report.layers) > 1 and sum(counts) < 16 * len(counts)  # what can be told, is


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_norms_that_are_too_small_are_a_violation(monkeypatch, norm, factor):
    """Rounding excuses nothing else: not what is wrong beside it."""

    def too_small(*args):
        zero = torch.zeros((), dtype=torch.float64)
        return [
            replace(found, denominator=Bracket(zero, found.denominator.upper / 100)) for found in layer_norms(*args)
        ]

    monkeypatch.setattr(inequality, "layer_norms", too_small)
    torch.manual_seed(0)
    model, x = saturated(factor), 0.3 * torch.randn(16, 4)
    report = evaluate_inequality(model, x, None, of="output", norm=norm)
    assert report.violations > 2


def test_rounding_takes_no_terms_from_samples_whose_left_side_is_not_too_large(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1), nn.Linear(3, 3)), torch.randn(16, 4)
    median = evaluate_inequality(model, x, torch.zeros(16).long()).tightness.median()

    def smaller(*args):
        return [
            replace(found, denominator=Bracket(*[end * median.sqrt() for end in found.denominator]))
            for found in layer_norms(*args)
        ]

    monkeypatch.setattr(inequality, "layer_norms", smaller)
    monkeypatch.setattr(inequality, "is_rounding", lambda *_: torch.zeros(16, dtype=torch.bool))
    before = evaluate_inequality(model, x, torch.zeros(16).long()).tightness
    monkeypatch.setattr(inequality, "is_rounding", lambda *_: torch.ones(16, dtype=torch.bool))
    after = evaluate_inequality(model, x, torch.zeros(16).long()).tightness
    too_large = before > 1.001
    assert 4 < too_large.sum() < 12
    assert torch.equal(after, torch.where(too_large, 0, before))


def test_layers_out_of_range():
    torch.manual_seed(0)
    model, x, y = cases.mlp(30, 40, 40, 3), torch.randn(4, 30), torch.randint(3, (4,))
    scaled(model, 1e10)
    with pytest.raises(NotFiniteError, match="float64"):
        evaluate_inequality(model, x, y, method="krylov")
    report = evaluate_inequality(scaled(model.double(), 1e50), x.double(), y)  # ‖∇_x f‖² itself overflows
    assert report.lhs.isinf().any() and report.holds.all()
    scaled(model, 1e40)
    with pytest.raises(NotFiniteError, match="exceed: see whether"):
        evaluate_inequality(model, x.double() * 1e-10, y, method="krylov")


@pytest.mark.parametrize("norm", ["spectral", "joint"])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-22])
def test_small_jacobians_do_not_underflow_when_they_are_squared(scale, norm):
    """Many sigmoids, or a small weight, in float32: ‖J‖ is far above the smallest number there, and ‖J‖² far below."""
    torch.manual_seed(0)
    depth = 24 if scale == 1 else 0
    model = cases.mlp(6, *[20] * (depth + 2), 3, activation=nn.Sigmoid)
    with torch.no_grad():
        model[0].weight *= scale
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    krylov = evaluate_inequality(model, x, y, norm=norm, method="krylov")
    exact = evaluate_inequality(copy.deepcopy(model).double(), x.double(), y, norm=norm, method="dense")
    assert (exact.lhs > 0).all() and len(krylov.layers) == len(exact.layers)
    assert (krylov.lhs_lower <= exact.lhs * (1 + 1e-3)).all() and (exact.lhs <= krylov.lhs_upper * (1 + 1e-3)).all()


def scaled(model, factor):
    with torch.no_grad():
        for weight in (model[0].weight, model[2].weight, model[4].weight):
            weight *= factor
    return model


class Difference(nn.Module):
    """Two uses of each layer, whose gradients cancel but for a part of the size of `step`."""

    def __init__(self, step):
        super().__init__()
        self.first, self.last, self.step = nn.Linear(20, 64), nn.Linear(64, 5), step

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return (self.last(h * (1 + self.step)) - self.last(h)) / self.step


class Scaled(nn.Module):
    """A dense layer between two factors."""

    def __init__(self, before, behind):
        super().__init__()
        self.dense, self.before, self.behind = nn.Linear(20, 8, bias=False), before, behind

    def forward(self, x):
        return self.dense(x * self.before) * self.behind


@pytest.mark.parametrize(
    "build",
    [lambda: Difference(1e-2), lambda: Scaled(1e15, 1e-22), lambda: Scaled(1e-21, 1e10)],
)
def test_gradients_in_float32_are_squared_in_float64_where_they_have_to_be(build):
    """One use of a weight cancels another's, or ‖δ‖² underflows though its product with ‖h‖² does not."""
    torch.manual_seed(0)
    model, x = build(), torch.randn(16, 20)
    found = evaluate_inequality(model, x, of=margin)
    exact = evaluate_inequality(copy.deepcopy(model).double(), x.double(), of=margin)
    torch.testing.assert_close(found.rhs, exact.rhs, rtol=1e-4, atol=0)
