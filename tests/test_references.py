"""The oracles against facts that one can compute by hand."""

from __future__ import annotations

import cases
import pytest
import references as ref
import torch
from torch import nn

FLOAT64 = {"dtype": torch.float64}


def first_output(output: torch.Tensor, target: object) -> torch.Tensor:
    return output[0]


@pytest.mark.parametrize("loss", [*cases.LOSSES, *cases.POSITION_LOSSES], ids=lambda loss: loss.name)
def test_the_row_of_a_loss_is_torchs_unreduced_loss(loss):
    positions = loss in cases.POSITION_LOSSES
    output = torch.randn(4, 3, 2, **FLOAT64) if positions else torch.randn(4, 3, **FLOAT64)
    target = torch.rand_like(output)
    if loss.target != "like_output":
        target = torch.randint(3, (4, 2) if positions else (4,))
    rows = torch.stack([loss.row(output[i], target[i]) for i in range(4)])
    criterion = loss.criterion
    if isinstance(criterion, nn.Module):
        settings = {"weight": criterion.weight} if getattr(criterion, "weight", None) is not None else {}
        settings |= {"label_smoothing": criterion.label_smoothing} if hasattr(criterion, "label_smoothing") else {}
        unreduced = type(criterion)(reduction="none", **settings)(output, target)
        expected = unreduced.reshape(4, -1)
        expected = expected.sum(1) if criterion.reduction in ("sum", "batchmean") else expected.mean(1)
    elif loss.name == "own_without_reduction":
        expected = criterion(output, target)
    else:
        expected = criterion(output, target, reduction="none").reshape(4, -1).mean(1)
    ref.assert_close(rows, expected, 1e-13)


def test_one_dense_layer_with_one_output():
    model = nn.Sequential(nn.Linear(3, 1)).double()
    x = torch.randn(4, 3, **FLOAT64)
    weight_sq = model[0].weight.square().sum()
    ref.assert_close(ref.input_grad_sq_norm(model, x, None, first_output), weight_sq.expand(4), 1e-14)
    ref.assert_close(ref.param_grad_sq_norm(model, x, None, first_output), 1 + x.square().sum(1), 1e-14)
    ref.assert_close(ref.output_jacobian_sq_norm(model, x), weight_sq.expand(4), 1e-14)


def test_squared_error_of_one_dense_layer():
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(4, 3, **FLOAT64), torch.randn(4, 1, **FLOAT64)
    residual_sq = (model(x) - y).square()[:, 0]
    expected = 4 * residual_sq * model.weight.square().sum()
    ref.assert_close(ref.input_grad_sq_norm(model, x, y, cases.squared_error_row), expected, 1e-13)
    expected = 4 * residual_sq * (1 + x.square().sum(1))
    ref.assert_close(ref.param_grad_sq_norm(model, x, y, cases.squared_error_row), expected, 1e-13)


def test_micro_batches_average_before_squaring():
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]], **FLOAT64)
    groups = ref.param_grad_sq_norm(model, x, None, first_output, group=2)
    assert groups.tolist() == [0.5, 25.0]
    whole = ref.param_grad_sq_norm(model, x, None, first_output, group=3)
    assert whole.tolist() == pytest.approx([(16 + 25) / 9], rel=1e-14)


@pytest.mark.parametrize("name", ["tanh", "layer_norm", "conv2d"])
def test_gradients_of_the_oracles_are_those_of_finite_differences(name):
    model, x, y, _ = cases.find(name).problem(batch=2)
    row = cases.find(name).loss.row
    for oracle in (ref.input_grad_sq_norm, ref.param_grad_sq_norm):
        exact = ref.flat_gradient(oracle(model, x, y, row).mean(), model)
        numerical = ref.finite_difference_gradient(lambda o=oracle: o(model, x, y, row).mean(), model)
        assert ref.relative_error(exact, numerical) < 1e-6


@pytest.mark.parametrize("norm", ["spectral", "joint"])  # ‖I‖_F² = 3
def test_equality_for_one_dense_layer_with_one_output(norm):
    model, x = nn.Sequential(nn.Linear(3, 1)).double(), torch.randn(4, 3, **FLOAT64)
    sides = ref.inequality(model, x, None, first_output, norm)
    ref.assert_close(sides["lhs"], sides["rhs"], 1e-13)


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "joint"])
def test_equality_for_a_chain_of_width_one(norm):
    model, x = cases.mlp(1, 1, 1, 1, activation=nn.Tanh).double(), torch.randn(4, 1, **FLOAT64)
    sides = ref.inequality(model, x, None, first_output, norm)
    ref.assert_close(sides["lhs"], sides["rhs"], 1e-12)


def test_the_inequality_of_a_diagonal_net_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        model[1].weight.copy_(torch.tensor([[1.0, 3.0]]))
    sides = ref.inequality(model, torch.tensor([[1.0, 1.0]], **FLOAT64), None, first_output)
    # ∇_x f = (2, 3); layer 0: ‖h‖² = 2, ‖W‖ = 2, ‖J‖ = 1, δ = (1, 3); layer 1: h = (2, 1), ‖W‖² = 10, ‖J‖ = 2
    assert sides["layers"]["0"]["weight_lhs"].item() == pytest.approx(13 * 2 / 4)
    assert sides["layers"]["0"]["weight_rhs"].item() == pytest.approx(10 * 2)
    assert sides["layers"]["1"]["weight_lhs"].item() == pytest.approx(13 * 5 / (10 * 4))
    assert sides["layers"]["1"]["weight_rhs"].item() == pytest.approx(5)
    assert sides["rhs"].item() == pytest.approx(25)


def test_sam_climbs_along_the_normalised_gradient():
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    gradient = ref.sam_gradient(model, lambda m: 0.5 * m.weight.square().sum(), radius=1.0)
    torch.testing.assert_close(gradient, torch.tensor([3.6, 4.8], **FLOAT64))
    assert model.weight.tolist() == [[3.0, 4.0]]


def test_every_case_is_the_same_on_every_call_and_has_a_gradient():
    for case in cases.ARCHITECTURES:
        first, second = case.problem(), case.problem()
        value = ref.param_grad_sq_norm(first.model, first.x, first.y, case.loss.row)
        assert torch.equal(value, ref.param_grad_sq_norm(second.model, second.x, second.y, case.loss.row)), case
        assert (value > 0).all(), case
