"""R before the mean: values and parameter gradients against the loop oracles, over the grid."""

from __future__ import annotations

import copy
import functools
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cases
import numpy as np
import pytest
import references as ref
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from gradpen import evaluate_inequality
from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm

BATCHES = [cases.B, 1]
LOOSE = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-10, 1e-10)}


def check(actual, expected, model, tolerance=1e-10, exact_model=None):
    """Values (B,) and the gradient of their mean."""
    ref.assert_close(actual, expected, tolerance)
    gradient = ref.flat_gradient(actual.mean(), model)
    assert ref.relative_error(gradient, ref.flat_gradient(expected.mean(), exact_model or model)) < tolerance


# ---- exact, against the oracles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", [*cases.ARCHITECTURES, *cases.LOSS_CASES], ids=str)
def test_param_norms_of_samples(case, batch):
    model, x, y, criterion = case.problem(batch)
    actual = param_grad_sq_norm(model, x, y, criterion=criterion)
    check(actual, ref.param_grad_sq_norm(model, x, y, case.loss.row), model)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", [*cases.FLOAT_INPUT, *cases.LOSS_CASES], ids=str)
def test_input_norms_of_samples(case, batch):
    model, x, y, criterion = case.problem(batch)
    actual = input_grad_sq_norm(model, x, y, criterion=criterion)
    check(actual, ref.input_grad_sq_norm(model, x, y, case.loss.row), model)


@pytest.mark.parametrize("group", [2, 5, 9])
@pytest.mark.parametrize("case", cases.ARCHITECTURES, ids=str)
def test_param_norms_of_micro_batches(case, group):
    model, x, y, criterion = case.problem()
    actual = param_grad_sq_norm(model, x, y, criterion=criterion, over=group)
    check(actual, ref.param_grad_sq_norm(model, x, y, case.loss.row, group=group), model)


@pytest.mark.parametrize("case", [*cases.ARCHITECTURES, *cases.LOSS_CASES], ids=str)
def test_param_norm_of_the_batch(case):
    model, x, y, criterion = case.problem()
    actual = param_grad_sq_norm(model, x, y, criterion=criterion, over="batch")
    check(actual, ref.param_grad_sq_norm(model, x, y, case.loss.row, group=cases.B), model)


@pytest.mark.parametrize("case", [c for c in cases.FLOAT_INPUT if isinstance(c.draw(1), torch.Tensor)], ids=str)
def test_jacobian_norms(case):
    model, x, _, _ = case.problem(batch=3)
    check(input_grad_sq_norm(model, x, of="output"), ref.output_jacobian_sq_norm(model, x), model)


class AskingForValues(torch.autograd.Function):
    """x², with a backward pass that torch.func.vmap cannot run."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return 2 * x * cotangent if bool((cotangent != 0).any()) else torch.zeros_like(x)


class Square(nn.Module):
    def forward(self, x):
        return AskingForValues.apply(x)


def test_jacobian_norms_output_by_output():
    model, x = nn.Sequential(nn.Linear(4, 5), Square(), nn.Linear(5, 3)).double(), torch.randn(3, 4).double()
    with pytest.warns(UserWarning, match="one output at a time"):
        actual = input_grad_sq_norm(model, x, of="output")
    check(actual, ref.output_jacobian_sq_norm(model, x), model)


@pytest.mark.parametrize("name", ["relu", "gelu", "conv2d", "tokens", "layer_norm", "embedding", "custom_parameter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_result_has_the_precision_of_the_model(name, dtype):
    case = cases.find(name)
    model, x, y, criterion = case.problem(dtype=dtype)
    exact_model, exact_x, *_ = case.problem()
    tolerance, _ = LOOSE[dtype]
    actual = param_grad_sq_norm(model, x, y, criterion=criterion)
    assert actual.dtype == dtype
    exact_model.load_state_dict(model.double().state_dict())
    expected = ref.param_grad_sq_norm(
        exact_model, exact_x.to(dtype).double() if case.float_input else exact_x, y, case.loss.row
    )
    ref.assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("quantity", ["input", "param"])
@pytest.mark.parametrize("case", cases.SMOOTH, ids=str)
def test_float32_gradients_are_close_to_float64(case, quantity):
    single, double = case.problem(dtype=torch.float32), case.problem()
    double.model.load_state_dict(single.model.state_dict())
    function = input_grad_sq_norm if quantity == "input" else param_grad_sq_norm
    actual = function(single.model, single.x, single.y, criterion=single.criterion)
    exact = ref.input_grad_sq_norm if quantity == "input" else ref.param_grad_sq_norm
    expected = exact(double.model, single.x.double(), single.y, case.loss.row)
    assert actual.dtype == torch.float32
    check(actual, expected, single.model, 1e-4, double.model)


# ---- what f is ------------------------------------------------------------------------------------------------------


def test_a_callable_gives_any_scalar_of_a_sample():
    model, x, y, _ = cases.find("tanh").problem()
    margin = input_grad_sq_norm(model, x, y, of=lambda output, target: output[:, 0] - output[:, 1])
    check(margin, ref.input_grad_sq_norm(model, x, y, lambda o, t: o[0] - o[1]), model)


def test_the_callable_sees_the_target():
    model, x, y, _ = cases.find("tanh").problem()
    logit = input_grad_sq_norm(model, x, y, of=lambda output, target: output.gather(1, target[:, None])[:, 0])
    check(logit, ref.input_grad_sq_norm(model, x, y, lambda o, t: o[t]), model)


def test_the_output_may_have_any_rank():
    model, x, _, _ = cases.find("per_position").problem(batch=3)
    check(input_grad_sq_norm(model, x, of="output"), ref.output_jacobian_sq_norm(model, x), model)


def test_only_the_parameters_asked_for_count():
    case = cases.find("conv2d")
    model, x, y, criterion = case.problem()
    for which in (["*.weight"], lambda name, parameter: parameter.dim() > 1):
        actual = param_grad_sq_norm(model, x, y, criterion=criterion, parameters=which)
        chosen = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
        check(actual, ref.param_grad_sq_norm(model, x, y, case.loss.row, parameters=chosen), model)


def test_patterns_select_by_name():
    case = cases.find("three_layers")
    model, x, y, criterion = case.problem()
    actual = param_grad_sq_norm(model, x, y, criterion=criterion, parameters=["0.*", "4.bias"], over=2)
    chosen = [model[0].weight, model[0].bias, model[4].bias]
    check(actual, ref.param_grad_sq_norm(model, x, y, case.loss.row, parameters=chosen, group=2), model)


def test_the_gradient_reaches_what_the_input_was_computed_from():
    case = cases.find("tanh")
    model, x, y, _ = case.problem()
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    for function, oracle in (
        (input_grad_sq_norm, ref.input_grad_sq_norm),
        (param_grad_sq_norm, ref.param_grad_sq_norm),
    ):
        (actual,) = torch.autograd.grad(function(model, x * scale, y).sum(), scale)
        (expected,) = torch.autograd.grad(oracle(model, x * scale, y, case.loss.row).sum(), scale)
        ref.assert_close(actual, expected)


# ---- second derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [input_grad_sq_norm, param_grad_sq_norm])
@pytest.mark.parametrize("case", cases.SMOOTH, ids=str)
def test_gradients_are_those_of_finite_differences(case, function):
    model, x, y, criterion = case.problem(batch=2)
    exact = ref.flat_gradient(function(model, x, y, criterion=criterion).mean(), model)
    numerical = ref.finite_difference_gradient(lambda: function(model, x, y, criterion=criterion).mean(), model)
    assert ref.relative_error(exact, numerical) < 1e-6


@pytest.mark.parametrize("function", [input_grad_sq_norm, param_grad_sq_norm])
@pytest.mark.parametrize("name", ["tanh", "softplus", "tokens_first_other_count", "custom_parameter"])
def test_first_and_second_derivatives_in_the_input(function, name):
    model, x, y, _ = cases.find(name).problem(batch=2)
    x.requires_grad_()
    if name == "tokens_first_other_count":
        model.norm = nn.Identity()
    assert torch.autograd.gradcheck(lambda x: function(model, x, y), x)
    assert torch.autograd.gradgradcheck(lambda x: function(model, x, y), x)


# ---- layouts that look like a batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokens_first", "positions", "reversed_batch"])
def test_a_zero_head_does_not_hide_a_mixed_layout(name):
    case = cases.find(name)
    model, x, y, _ = case.problem()
    trained = copy.deepcopy(model.head.state_dict())
    nn.init.zeros_(model.head.weight)
    param_grad_sq_norm(model, x, y)
    model.head.load_state_dict(trained)
    check(param_grad_sq_norm(model, x, y), ref.param_grad_sq_norm(model, x, y, case.loss.row), model)


@pytest.mark.parametrize("first", [3, cases.B])
def test_one_model_with_batches_of_several_sizes(first):
    case = cases.find("tokens_first")
    model, x, y, _ = case.problem(batch=7)
    for batch in (first, 7, cases.B, 1, 3):
        expected = ref.param_grad_sq_norm(model, x[:batch], y[:batch], case.loss.row)
        check(param_grad_sq_norm(model, x[:batch], y[:batch]), expected, model)


def test_changing_which_parameters_are_frozen():
    case = cases.find("three_layers")
    model, x, y, _ = case.problem()
    for frozen in ((), ("0.weight", "0.bias"), ("4.weight",), ()):
        model.requires_grad_(True)
        cases.freeze(model, *frozen)
        check(param_grad_sq_norm(model, x, y), ref.param_grad_sq_norm(model, x, y, case.loss.row), model)


class Switched(nn.Module):
    """Samples or tokens first, as a flag says; with T == B both look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.head = nn.Linear(4, 4), nn.Linear(4, cases.CLASSES)
        self.tokens_first = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tokens_first:
            return self.head(self.dense(x.transpose(0, 1)).tanh().mean(0))
        return self.head(self.dense(x).tanh().mean(1))


def test_a_model_that_changes_its_layout_between_calls():
    _, x, y, _ = cases.find("tokens_first").problem()
    model = Switched().double()
    for model.tokens_first in (False, True, False):
        check(
            param_grad_sq_norm(model, x, y),
            ref.param_grad_sq_norm(model, x, y, cases.cross_entropy_row),
            model,
        )


class Centred(nn.Module):
    """Subtracts the batch mean."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, cases.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x - x.mean(0)).tanh() + self.dense(x).mean(0)


@pytest.mark.parametrize("function", [input_grad_sq_norm, param_grad_sq_norm])
def test_a_model_that_mixes_samples_is_refused(function):
    _, x, y, _ = cases.find("relu").problem()
    with pytest.raises(RuntimeError, match="mixes the samples"):
        function(Centred().double(), x, y)


def mixing(output, target):
    return F.cross_entropy(output - output.mean(0), target, reduction="none")


@pytest.mark.parametrize("function", [input_grad_sq_norm, param_grad_sq_norm])
@pytest.mark.parametrize("called_before", [False, True])
def test_a_criterion_that_mixes_samples_is_refused(function, called_before):
    model, x, y, _ = cases.find("relu").problem()
    if called_before:
        function(model, x, y)
    with pytest.raises(RuntimeError, match="mixes the samples"):
        function(model, x, y, criterion=mixing)


def rotated(h):
    return torch.cat([h[1:], h[:1]])


BRANCHES = {
    "plain": lambda dense, x: dense(x).tanh(),
    "centred": lambda dense, x: dense(x).tanh() - dense(x).tanh().mean(0),
    "softmax": lambda dense, x: dense(x).softmax(0),
    "shifted": lambda dense, x: rotated(dense(x).tanh()),
    "batch_norm": lambda dense, x: F.batch_norm(dense(x), None, None, training=True),
}


class Branching(nn.Module):
    """Does what it is told at the moment."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.head = nn.Linear(4, 4), nn.Linear(4, cases.CLASSES)
        self.branch = BRANCHES["plain"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.branch(self.dense, x))


QUANTITIES = [
    input_grad_sq_norm,
    param_grad_sq_norm,
    functools.partial(input_grad_sq_norm, of="output"),
    functools.partial(input_grad_sq_norm, method="finite_difference"),
]


@pytest.mark.parametrize("function", QUANTITIES)
@pytest.mark.parametrize("branch", ["centred", "softmax", "shifted", "batch_norm"])
def test_a_model_that_begins_to_mix_samples_is_refused(function, branch):
    model, (_, x, y, _) = Branching().double(), cases.find("relu").problem()
    for _ in range(4):
        function(model, x, y)
    model.branch = lambda dense, x: dense(x).softmax(1)
    function(model, x, y)
    model.branch = BRANCHES[branch]
    with pytest.raises(RuntimeError, match="mixes the samples"):
        function(model, x, y)


def test_a_model_that_begins_to_turn_rows_round():
    model, (_, x, y, _) = Branching().double(), cases.find("relu").problem()
    for shift in (0, 1, 3):

        def turned(dense, x, shift=shift):
            h = dense(torch.cat([x[shift:], x[:shift]])).tanh()
            return torch.cat([h[len(x) - shift :], h[: len(x) - shift]])

        model.branch = turned
        check(param_grad_sq_norm(model, x, y), ref.param_grad_sq_norm(model, x, y, cases.cross_entropy_row), model)


class Configured(nn.Module):
    """A criterion that mixes samples if it is told to."""

    def __init__(self, centre: bool) -> None:
        super().__init__()
        self.centre = centre

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output - output.mean(0) if self.centre else output, target, reduction="none")


CONFIGURED = {
    "module": Configured,
    "method": lambda centre: Configured(centre).forward,
    "partial": lambda centre: functools.partial(lambda o, t, centre: Configured(centre)(o, t), centre=centre),
    "closure": lambda centre: lambda o, t: Configured(centre)(o, t),
}


@pytest.mark.parametrize("function", [input_grad_sq_norm, param_grad_sq_norm])
@pytest.mark.parametrize("kind", CONFIGURED)
def test_a_criterion_of_the_same_code_that_mixes_samples_is_refused(function, kind):
    model, x, y, _ = cases.find("relu").problem()
    for _ in range(4):
        function(model, x, y, criterion=CONFIGURED[kind](False))
    with pytest.raises(RuntimeError, match="mixes the samples"):
        function(model, x, y, criterion=CONFIGURED[kind](True))


@pytest.mark.parametrize("function", QUANTITIES)
def test_a_path_between_samples_that_opens_later_is_found(function):
    model, (_, x, y, _) = Branching().double(), cases.find("relu").problem()
    share = torch.zeros((), dtype=torch.float64)
    model.branch = lambda dense, x: dense(x).tanh() + share * dense(x).tanh().mean(0)
    for _ in range(5):
        function(model, x, y)
    share.fill_(1.0)

    def five_more():
        for _ in range(5):
            function(model, x, y)

    with pytest.raises(RuntimeError, match="mixes the samples"):
        five_more()


@pytest.mark.parametrize("function", QUANTITIES)
def test_a_sample_that_is_not_a_number_spoils_no_other(function):
    model, x, y, _ = cases.find("tanh").problem()
    expected = function(model, x, y)
    x[2, 1] = math.nan
    for fresh in (model, copy.deepcopy(model)):
        for _ in range(3):
            actual = function(fresh, x, y)
            assert actual.isnan().nonzero().flatten().tolist() == [2]
            ref.assert_close(actual[3:], expected[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", QUANTITIES)
def test_a_model_that_casts_inside_is_not_taken_for_one_that_mixes(function, dtype):
    class Casting(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(dtype)).to(x.dtype)

    model, x, y, _ = cases.find("three_layers").problem()
    plain = copy.deepcopy(model.to(dtype)).double()
    actual = function(Casting(*model), x, y)
    ref.assert_close(actual, function(plain, x, y), 0.1 if dtype is torch.bfloat16 else 1e-4)


# ---- dropout and random numbers ---------------------------------------------------------------------------------------


def dropout_net() -> nn.Sequential:
    return cases.mlp(4, 8, 6, 3, activation=lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.5))).double()


def looped(model, x, y, tensors):
    """‖∂f_i/∂tensors‖² sample by sample through one forward pass of the whole batch."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    return torch.stack([ref.sq_norm(ref.gradients(f, tensors)) for f in losses])


@pytest.mark.parametrize("seed", range(3))
def test_dropout_has_one_mask_for_the_whole_call(seed):
    model, (_, x, y, _) = dropout_net(), cases.find("relu").problem()
    x.requires_grad_()
    for function, tensors in ((param_grad_sq_norm, ref.trainable(model)), (input_grad_sq_norm, [x])):
        torch.manual_seed(seed)
        actual = function(model, x, y)
        torch.manual_seed(seed)
        check(actual, looped(model, x, y, tensors), model)


@pytest.mark.parametrize("name", ["relu", "conv2d", "custom_parameter", "tokens_first"])
@pytest.mark.parametrize("options", [{}, {"over": 2}, {"over": "batch"}, {"method": "finite_difference"}], ids=str)
def test_a_model_without_randomness_moves_no_random_stream(name, options):
    model, x, y, criterion = cases.find(name).problem()
    before = torch.get_rng_state()
    param_grad_sq_norm(model, x, y, criterion=criterion, **options)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_dropout_moves_the_random_stream_once(method):
    model, (_, x, y, _) = dropout_net(), cases.find("relu").problem()
    torch.manual_seed(3)
    model(x)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    param_grad_sq_norm(model, x, y, over="batch", method=method)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_parameter_without_closed_form_has_the_same_dropout_mask():
    _, x, y, _ = cases.find("relu").problem()
    model = nn.Sequential(nn.Linear(4, 6), cases.Scale(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    torch.manual_seed(3)
    expected = looped(model, x, y, ref.trainable(model))
    torch.manual_seed(3)
    check(param_grad_sq_norm(model, x, y), expected, model)


# ---- projections ------------------------------------------------------------------------------------------------------


def projection_tolerance(model, x, draws):
    """Five standard errors of mean ‖vᵀJ‖² for Gaussian v, whose variance 2‖JJᵀ‖_F² no usual direction exceeds."""
    jacobians = [torch.autograd.functional.jacobian(model, row[None]).reshape(-1, row.numel()) for row in x]
    return 5 * torch.stack([(2 / draws) ** 0.5 * (j @ j.T).norm() for j in jacobians])


@pytest.mark.parametrize("name", ["tanh", "one_layer", "per_position"])
def test_projections_are_unbiased(name):
    model, x, _, _ = cases.find(name).problem(batch=3)
    actual = input_grad_sq_norm(model, x, of="output", method="projection", num_projections=1000)
    error = (actual - ref.output_jacobian_sq_norm(model, x)).abs()
    assert (error < projection_tolerance(model, x, 1000)).all()
    assert (error > 0).any()


def test_the_gradient_of_a_projection_is_unbiased():
    model, x, _, _ = cases.find("tanh").problem(batch=2)
    exact = ref.flat_gradient(ref.output_jacobian_sq_norm(model, x).mean(), model)
    draws = torch.stack(
        [
            ref.flat_gradient(input_grad_sq_norm(model, x, of="output", method="projection").mean(), model)
            for _ in range(400)
        ]
    )
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= 5 * standard_error + 1e-12).all()


def test_a_generator_repeats_the_projection_and_leaves_the_global_stream():
    model, x, _, _ = cases.find("tanh").problem()
    state = torch.get_rng_state()
    draw = [
        input_grad_sq_norm(model, x, of="output", method="projection", generator=torch.Generator().manual_seed(seed))
        for seed in (4, 4, 5)
    ]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert torch.equal(torch.get_rng_state(), state)


# ---- finite differences -------------------------------------------------------------------------------------------------

ORDERS = [("forward", 1e-5, 1e-3), ("backward", 1e-5, 1e-3), ("central", 1e-3, 1e-4)]


@pytest.mark.parametrize(("scheme", "step", "tolerance"), ORDERS)
@pytest.mark.parametrize("case", cases.SMOOTH, ids=str)
def test_finite_differences_of_the_input(case, scheme, step, tolerance):
    model, x, y, criterion = case.problem()
    options = {"criterion": criterion, "method": "finite_difference", "scheme": scheme, "step": step}
    actual = input_grad_sq_norm(model, x, y, **options)
    expected = ref.input_grad_sq_norm(model, x, y, case.loss.row)
    ref.assert_close(actual, expected)
    assert (
        ref.relative_error(ref.flat_gradient(actual.mean(), model), ref.flat_gradient(expected.mean(), model))
        < tolerance
    )


@pytest.mark.parametrize(("scheme", "step", "tolerance"), ORDERS)
@pytest.mark.parametrize("over", ["batch", 2, "sample"])
@pytest.mark.parametrize("case", cases.SMOOTH, ids=str)
def test_finite_differences_of_the_parameters(case, over, scheme, step, tolerance):
    model, x, y, criterion = case.problem()
    options = {"criterion": criterion, "method": "finite_difference", "scheme": scheme, "step": step}
    actual = param_grad_sq_norm(model, x, y, over=over, **options)
    group = {"batch": cases.B, "sample": 1}.get(over, over)
    expected = ref.param_grad_sq_norm(model, x, y, case.loss.row, group=group)
    ref.assert_close(actual, expected)
    assert (
        ref.relative_error(ref.flat_gradient(actual.mean(), model), ref.flat_gradient(expected.mean(), model))
        < tolerance
    )


@pytest.mark.parametrize("scheme", ["forward", "backward", "central"])
def test_the_difference_converges_with_the_order_of_its_scheme(scheme):
    case = cases.find("tanh")
    model, x, y, _ = case.problem()
    exact = ref.flat_gradient(ref.param_grad_sq_norm(model, x, y, case.loss.row, group=cases.B).sum(), model)
    errors = [
        ref.relative_error(
            ref.flat_gradient(
                param_grad_sq_norm(
                    model, x, y, over="batch", method="finite_difference", scheme=scheme, step=step
                ).sum(),
                model,
            ),
            exact,
        )
        for step in (1e-2, 1e-3)
    ]
    order = math.log10(errors[0] / errors[1])
    assert order == pytest.approx(2 if scheme == "central" else 1, abs=0.1)


def test_finite_differences_follow_the_parameters_asked_for():
    case = cases.find("tanh")
    model, x, y, _ = case.problem()
    actual = param_grad_sq_norm(
        model, x, y, over="batch", method="finite_difference", step=1e-5, parameters=["*.weight"]
    )
    chosen = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
    expected = ref.param_grad_sq_norm(model, x, y, case.loss.row, group=cases.B, parameters=chosen)
    ref.assert_close(actual, expected)
    error = ref.relative_error(ref.flat_gradient(actual.sum(), model), ref.flat_gradient(expected.sum(), model))
    assert error < 1e-3


@pytest.mark.parametrize("name", ["reused", "tied_embedding", "parametrised", "masked", "two_inputs_dict"])
def test_finite_differences_for_shared_parameters_and_several_inputs(name):
    case = cases.find(name)
    model, x, y, _ = case.problem()
    actual = param_grad_sq_norm(model, x, y, over="batch", method="finite_difference", scheme="central", step=1e-4)
    expected = ref.param_grad_sq_norm(model, x, y, case.loss.row, group=cases.B)
    ref.assert_close(actual, expected)
    if name != "masked":  # has kinks
        gradients = (ref.flat_gradient(value.sum(), model) for value in (actual, expected))
        assert ref.relative_error(*gradients) < 1e-4


def test_finite_differences_work_through_a_compiled_module():
    model, x, y, _ = cases.find("tanh").problem()
    compiled = torch.compile(model, backend="aot_eager")
    for function, options in ((param_grad_sq_norm, {"over": "batch"}), (input_grad_sq_norm, {})):
        options = {**options, "method": "finite_difference", "step": 1e-3}
        check(function(compiled, x, y, **options), function(model, x, y, **options), model)


# ---- trouble at zero, precision, hands off ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("function", [input_grad_sq_norm, param_grad_sq_norm])
def test_a_gradient_of_zero_has_a_finite_derivative(function, method):
    model, x, y, _ = cases.find("no_bias").problem()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    value = function(model, x, y, method=method)
    assert torch.equal(value, torch.zeros_like(value))
    assert torch.isfinite(ref.flat_gradient(value.sum(), model)).all()


@pytest.mark.parametrize("function", [input_grad_sq_norm, param_grad_sq_norm])
@pytest.mark.parametrize("name", ["gelu", "conv2d", "layer_norm", "tokens", "custom_parameter", "tied_by_matmul"])
def test_autocast_to_bfloat16_is_finite_and_close(name, function):
    case = cases.find(name)
    model, x, y, criterion = case.problem(dtype=torch.float32)
    expected = function(model, x, y, criterion=criterion)
    with torch.autocast("cpu", torch.bfloat16):
        actual = function(model, x, y, criterion=criterion)
    assert actual.dtype == torch.float32
    assert ref.relative_error(actual, expected) < 0.05
    gradients = [ref.flat_gradient(value.mean(), model) for value in (actual, expected)]
    assert ref.relative_error(*gradients) < 0.1


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("function", [input_grad_sq_norm, param_grad_sq_norm])
def test_nothing_of_the_callers_is_touched(function, method):
    model, x, y, criterion = cases.find("prelu").problem()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    x_before = x.clone()
    function(model, x, y, criterion=criterion, method=method)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert torch.equal(x, x_before) and not x.requires_grad and x.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_batch_norm_in_training_mode_counts_one_batch():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    _, x, y, _ = cases.find("relu").problem()
    for calls, method in enumerate(("exact", "finite_difference"), start=1):
        param_grad_sq_norm(model, x, y, over="batch", method=method)
        assert model[1].num_batches_tracked == calls


class Gated(nn.Module):
    """A recurrent module that vmap knows nothing of."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0].mean(1))


UNMAPPED = {
    "gru": lambda: Gated(nn.GRU),
    "lstm": lambda: Gated(nn.LSTM),
    "rnn": lambda: Gated(nn.RNN),
    "spectral_norm": lambda: nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.Tanh(), cases.Mean(), nn.Linear(5, 3)),
}


@pytest.mark.parametrize("over", ["sample", 2])
@pytest.mark.parametrize("name", UNMAPPED)
def test_what_torch_cannot_map_over_samples_goes_through_a_loop(name, over):
    model, (_, x, y, _) = UNMAPPED[name]().double(), cases.find("tokens").problem()
    twin = copy.deepcopy(model)  # spectral_norm in training mode moves its buffers on every call
    with pytest.warns(UserWarning, match="one sample at a time"):
        actual = param_grad_sq_norm(model, x, y, over=over)
    losses = F.cross_entropy(twin(x), y, reduction="none")
    groups = losses.split(1 if over == "sample" else over)
    expected = torch.stack([ref.sq_norm(ref.gradients(group.mean(), ref.trainable(twin))) for group in groups])
    check(actual, expected, model, exact_model=twin)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_a_loop_refuses_a_model_that_mixes_samples():
    class CentredStates(Gated):
        def forward(self, x):
            h = self.cell(x)[0].mean(1)
            return self.head(h - h.mean(0))

    model, (_, x, y, _) = CentredStates(nn.GRU).double(), cases.find("tokens").problem()
    with pytest.raises(RuntimeError, match="mixes the samples"):
        param_grad_sq_norm(model, x, y)


@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_masks_that_cannot_be_drawn_sample_by_sample(batch_first):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.4, batch_first=batch_first)

        def forward(self, x):
            h = x if batch_first else x.transpose(0, 1)
            return self.layer(h).mean(1 if batch_first else 0)

    model, (_, x, y, _) = cases.WithMathAttention(Encoder()).double(), cases.find("tokens").problem()
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        actual = param_grad_sq_norm(model, x, y)
    told = any("random numbers" in str(warning.message) for warning in seen)
    assert (
        told or torch.__version__ < "2.7"
    )  # torch 2.6 draws the same mask sample by sample where the batch comes first
    torch.set_rng_state(state)
    losses = F.cross_entropy(model(x), y, reduction="none")
    check(actual, torch.stack([ref.sq_norm(ref.gradients(f, ref.trainable(model))) for f in losses]), model)


class Logits(NamedTuple):
    logits: torch.Tensor


@dataclass
class Output:
    logits: torch.Tensor


class Named(nn.Module):
    """Returns an object with a field, as many libraries do."""

    def __init__(self, model: nn.Module, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: torch.Tensor) -> Any:
        return self.kind(logits=self.model(x))


@pytest.mark.filterwarnings("ignore:the gradients of")  # vmap takes no dataclasses, so there is a loop
@pytest.mark.parametrize("kind", [dict, Logits, Output])
@pytest.mark.parametrize("name", ["tanh", "custom_parameter", "conv2d"])
def test_outputs_and_targets_of_any_structure(name, kind):
    model, x, y, _ = cases.find(name).problem()
    scale = torch.rand(cases.B, dtype=torch.float64)

    def criterion(output, target):
        logits = output["logits"] if kind is dict else output.logits
        return target["scale"] * F.cross_entropy(logits, target["label"], reduction="none")

    wrapped, target = Named(model, kind), {"label": y, "scale": scale}
    row = lambda output, target: target[1] * cases.cross_entropy_row(output, target[0])  # noqa: E731
    pairs = list(zip(y, scale, strict=True))
    check(
        param_grad_sq_norm(wrapped, x, target, criterion=criterion),
        ref.param_grad_sq_norm(model, x, pairs, row),
        wrapped,
        exact_model=model,
    )
    check(
        input_grad_sq_norm(wrapped, x, target, criterion=criterion),
        ref.input_grad_sq_norm(model, x, pairs, row),
        wrapped,
        exact_model=model,
    )
    by_difference = param_grad_sq_norm(wrapped, x, target, criterion=criterion, over=2, method="finite_difference")
    ref.assert_close(by_difference, ref.param_grad_sq_norm(model, x, pairs, row, group=2))


def test_finite_differences_work_through_fused_attention():
    mathematical, x, y, _ = cases.find("attention").problem()
    fused = mathematical.model
    for function, options in ((param_grad_sq_norm, {"over": "batch"}), (input_grad_sq_norm, {})):
        options |= {"method": "finite_difference", "scheme": "central", "step": 1e-3}
        actual = function(fused, x, y, **options).sum()
        exact = function(mathematical, x, y, **{"over": "batch"} if "over" in options else {}).sum()
        ref.assert_close(actual, exact, 1e-8)
        gradients = (ref.flat_gradient(value, model) for value, model in ((actual, fused), (exact, mathematical)))
        assert ref.relative_error(*gradients) < 1e-4


@pytest.mark.parametrize(
    "call",
    [
        input_grad_sq_norm,
        param_grad_sq_norm,
        partial(input_grad_sq_norm, of="output"),
        partial(param_grad_sq_norm, over="batch"),
    ],
)
def test_fused_attention_is_refused_where_it_would_be_differentiated_twice(call):
    mathematical, x, y, _ = cases.find("attention").problem()
    with pytest.raises(RuntimeError, match="sdpa_kernel"):
        call(mathematical.model, x, y)
    assert call(mathematical, x, y).requires_grad


@pytest.mark.parametrize("over", ["sample", "batch"])
def test_fused_attention_behind_the_layers_that_are_penalised(over):
    mathematical, x, y, _ = cases.find("attention").problem()
    norms = [
        param_grad_sq_norm(model, x, y, over=over, parameters=["*head.*"])
        for model in (mathematical, mathematical.model)
    ]
    ref.assert_close(*norms)
    gradients = [ref.flat_gradient(norm.sum(), mathematical) for norm in norms]
    assert ref.relative_error(*gradients) < 1e-10


def test_fused_attention_beside_the_way_from_the_input():
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.head = nn.Parameter(torch.randn(1, 1, 5, 4)), nn.Linear(4, 3)

        def forward(self, x):
            attended = F.scaled_dot_product_attention(self.token, self.token, self.token)
            return self.head(x).tanh() + attended[0, 0, :1, :3]

    model, (_, x, y, _) = Beside().double(), cases.find("tanh").problem()
    for options in ({}, {"of": "output"}):
        input_grad_sq_norm(model, x, y, **options).sum().backward()
    ref.assert_close(input_grad_sq_norm(model, x, y), ref.input_grad_sq_norm(model, x, y, cases.cross_entropy_row))


def test_values_of_fused_attention_without_a_graph():
    mathematical, x, y, _ = cases.find("attention").problem()
    for function in (input_grad_sq_norm, param_grad_sq_norm):
        ref.assert_close(function(mathematical.model, x, y, create_graph=False), function(mathematical, x, y))


class Unsteady(nn.Module):
    """Skips its layer now and then, by Python's or NumPy's random stream."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.draw, self.dense, self.head = draw, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.dense(x).tanh() if self.draw() < 0.5 else x)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("stream", "draw"), [(random.seed, random.random), (np.random.seed, np.random.rand)])
def test_a_displaced_pass_draws_the_same_numbers_of_python_and_numpy(stream, draw, seed):
    model, (_, x, y, _) = Unsteady(draw).double(), cases.find("tanh").problem()
    gradients = []
    for options in ({}, {"method": "finite_difference", "step": 1e-6}):
        stream(seed)
        gradients.append(ref.flat_gradient(param_grad_sq_norm(model, x, y, over="batch", **options).sum(), model))
    assert ref.relative_error(*gradients) < 1e-4


def test_random_branches_are_the_same_for_parameters_without_closed_form():
    """Many calls: the first ones are compared with the loss's pass, later ones are trusted."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            h = self.dense(x)
            return (h if random.random() < 0.5 else h.tanh()) * self.scale

    model, (_, x, y, _) = Branching().double(), cases.find("tanh").problem()
    for seed in range(12):
        random.seed(seed)
        f = F.cross_entropy(model(x), y, reduction="none")
        expected = [ref.scalar_sq(value, ref.trainable(model)) for value in f]
        random.seed(seed)
        ref.assert_close(param_grad_sq_norm(model, x, y), torch.tensor(expected, dtype=torch.float64))


def test_a_model_that_begins_to_draw_numbers_is_noticed_at_the_next_look():
    """At uses 1, 2, 4, 8, … it is looked at; from the look that notices on, every pass is repeated."""

    class Later(Unsteady):
        begun = False

        def forward(self, x):
            return super().forward(x) if self.begun else self.head(x)

    model, (_, x, y, _) = Later(random.random).double(), cases.find("tanh").problem()
    for _ in range(3):
        param_grad_sq_norm(model, x, y, over="batch", method="finite_difference")
    model.begun = True
    for seed in range(6):
        gradients = []
        for options in ({"method": "finite_difference", "step": 1e-6}, {}):
            random.seed(seed)
            gradients.append(ref.flat_gradient(param_grad_sq_norm(model, x, y, over="batch", **options).sum(), model))
        assert ref.relative_error(*gradients) < 1e-4


def test_packed_sequences_and_named_tuples_with_constructors_of_their_own():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNN(4, 3, batch_first=True)

        def forward(self, packed):
            return nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0][:, 0]

    model, x, y = Last().double(), torch.randn(3, 5, 4).double(), torch.tensor([0, 1, 2])
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 2]), batch_first=True)
    for options in ({}, {"method": "finite_difference"}):
        actual = param_grad_sq_norm(model, {"packed": packed}, y, over="batch", **options)
        loss = F.cross_entropy(model(packed), y)
        ref.assert_close(actual, torch.tensor([ref.scalar_sq(loss, ref.trainable(model))], dtype=torch.float64))


def test_a_displaced_pass_starts_from_the_buffers_of_the_first():
    def gradient(**options):
        torch.manual_seed(0)
        normed = [spectral_norm(nn.Linear(4, 6)), nn.Tanh(), spectral_norm(nn.Linear(6, 3))]
        model = nn.Sequential(*normed).double()  # in training mode every pass is a step of its power iteration
        _, x, y, _ = cases.find("tanh").problem()
        return ref.flat_gradient(input_grad_sq_norm(model, x, y, **options).sum(), model)

    assert ref.relative_error(gradient(method="finite_difference", step=1e-6), gradient()) < 1e-4


@pytest.mark.parametrize(("function", "options"), [(input_grad_sq_norm, {}), (param_grad_sq_norm, {"over": "batch"})])
def test_a_model_that_changes_its_input_in_place_is_refused(function, options):
    class Shifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(4, 3)

        def forward(self, x):
            return self.dense(x.sub_(0.5))

    _, x, y, _ = cases.find("tanh").problem()
    with pytest.raises(RuntimeError, match="in place"):
        function(Shifting().double(), x, y, method="finite_difference", **options)


def test_rows_are_taken_for_a_finite_difference_only_where_all_tensors_have_them():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x, mask):
            return self.head((mask @ self.dense(x).tanh()).mean(1))

    model, x, y = Mixing().double(), torch.randn(5, 6, 4).double(), torch.randint(3, (5,))
    mask = torch.ones(6, 6).double().tril()
    losses = [F.cross_entropy(model(x[i : i + 1], mask), y[i : i + 1]) for i in range(5)]
    expected = [ref.scalar_sq(loss, ref.trainable(model)) for loss in losses]
    ref.assert_close(param_grad_sq_norm(model, (x, mask), y), torch.tensor(expected, dtype=torch.float64))
    for tensor in (mask, torch.tensor(1.0)):
        with pytest.raises(ValueError, match="count the 5 samples"):
            param_grad_sq_norm(model, (x, tensor * mask), y, over=2, method="finite_difference")


def test_dropout_that_sets_in_later_is_noticed():
    class Ramp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.w, self.head = 0.0, nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3)

        def forward(self, x):
            h = (x @ self.w).tanh().transpose(0, 1).contiguous()  # sample by sample, the masks are others
            return self.head(F.dropout(h, self.p, self.training).transpose(0, 1).mean(1))

    model, x, y = Ramp().double(), torch.randn(5, 6, 4).double(), torch.randint(3, (5,))
    param_grad_sq_norm(model, x, y)
    model.p = 0.5
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="one sample at a time"):
        actual = param_grad_sq_norm(model, x, y)
    torch.manual_seed(0)
    f = F.cross_entropy(model(x), y, reduction="none")
    parameters = ref.trainable(model)
    expected = [ref.sq_norm(torch.autograd.grad(value, parameters, retain_graph=True)) for value in f]
    ref.assert_close(actual, torch.stack(expected))


def test_sparse_gradients_are_displaced():
    _, _, y, _ = cases.find("tanh").problem()
    tokens = torch.randint(7, (len(y), 3), generator=torch.Generator().manual_seed(0))
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)).double()
        param_grad_sq_norm(model, tokens, y, over="batch", method="finite_difference").sum().backward()
        gradients.append(torch.cat([p.grad.to_dense().flatten() for p in model.parameters()]))
    ref.assert_close(*gradients)


class Weighted(NamedTuple):
    """A target with the weight of its sample."""

    classes: torch.Tensor
    weight: torch.Tensor


@pytest.mark.parametrize("options", [{"over": 2}, {"over": 2, "method": "finite_difference"}])
def test_a_target_stays_a_named_tuple(options):
    model, x, y, _ = cases.find("tanh").problem()
    weight = torch.rand(len(y), dtype=torch.float64)

    def criterion(output, target):
        return F.cross_entropy(output, target.classes, reduction="none") * target.weight

    actual = param_grad_sq_norm(model, x, Weighted(y, weight), criterion=criterion, **options)
    pairs = [slice(i, i + 2) for i in range(0, len(y), 2)]
    losses = [criterion(model(x[pair]), Weighted(y[pair], weight[pair])).mean() for pair in pairs]
    ref.assert_close(
        actual, torch.tensor([ref.scalar_sq(loss, ref.trainable(model)) for loss in losses], dtype=torch.float64)
    )
    report = evaluate_inequality(model, x, Weighted(y, weight), criterion=criterion)
    ref.assert_close(report.rhs, param_grad_sq_norm(model, x, Weighted(y, weight), criterion=criterion).detach())


class Checkpointed(nn.Module):
    """The whole net, or all but its head, is run again in the backward pass."""

    def __init__(self, plain: nn.Sequential, segments: int, reentrant: bool) -> None:
        super().__init__()
        self.plain, self.segments, self.reentrant = plain, segments, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.segments == 1:
            return torch.utils.checkpoint.checkpoint(self.plain, x, use_reentrant=self.reentrant)
        return torch.utils.checkpoint.checkpoint_sequential(self.plain, 2, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize(
    ("function", "oracle"),
    [(input_grad_sq_norm, ref.input_grad_sq_norm), (param_grad_sq_norm, ref.param_grad_sq_norm)],
)
def test_checkpointed_activations(function, oracle, segments):
    plain, x, y, _ = cases.find("tanh").problem()
    actual = function(Checkpointed(plain, segments, reentrant=False), x, y)
    check(actual, oracle(plain, x, y, cases.cross_entropy_row), plain)


@pytest.mark.parametrize("over", ["sample", "batch"])
def test_a_reentrant_checkpoint_is_refused_before_it_hides_parameters(over):
    plain, x, y, _ = cases.find("tanh").problem()
    model = nn.Sequential(Checkpointed(plain, 1, reentrant=True), nn.Linear(3, 3)).double()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        param_grad_sq_norm(model, x.requires_grad_(), y, over=over)


class SpectralFilter(nn.Module):
    """Complex parameters: a filter of the Fourier coefficients and a complex dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, dtype=torch.cdouble))
        self.dense = nn.Linear(3, 2, dtype=torch.cdouble)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(torch.fft.rfft(x) * self.filter).abs()


@pytest.mark.parametrize("over", ["sample", 2, "batch"])
def test_complex_parameters_have_a_real_part_and_an_imaginary_part(over):
    model, (_, x, _, _) = SpectralFilter(), cases.find("tanh").problem()
    y = torch.randint(2, (cases.B,))
    actual = param_grad_sq_norm(model, x, y, over=over)
    groups = F.cross_entropy(model(x), y, reduction="none").split({"sample": 1, "batch": cases.B}.get(over, over))
    gradients = [ref.gradients(group.mean(), ref.trainable(model)) for group in groups]
    expected = torch.stack([ref.sq_norm([part for g in row for part in (g.real, g.imag)]) for row in gradients])
    ref.assert_close(actual, expected)
    pulls = (ref.gradients(value.sum(), ref.trainable(model)) for value in (actual, expected))
    for pull, expected_pull in zip(*pulls, strict=True):
        ref.assert_close(torch.view_as_real(pull), torch.view_as_real(expected_pull))
    ref.assert_close(input_grad_sq_norm(model, x, y), ref.input_grad_sq_norm(model, x, y, cases.cross_entropy_row))


class Force(nn.Module):
    """−∇_x of an energy: the weights are used in the forward pass and again in its derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = cases.mlp(4, 5, 1, activation=nn.Tanh)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_a_model_that_differentiates_itself():
    model, (_, x, _, _) = Force().double(), cases.find("tanh").problem()
    y = torch.rand_like(x)
    with pytest.warns(UserWarning, match="one sample at a time"):
        actual = param_grad_sq_norm(model, x, y, criterion=F.mse_loss)
    check(actual, ref.param_grad_sq_norm(model, x, y, cases.squared_error_row), model)
    actual = input_grad_sq_norm(model, x, y, criterion=F.mse_loss)
    check(actual, ref.input_grad_sq_norm(model, x, y, cases.squared_error_row), model)


class Uncertain(nn.Module):
    """A dense net with a log variance that only the criterion uses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cases.mlp(4, 6, 3, activation=nn.Tanh)
        self.log_variance = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def uses_of_parameters_by_the_criterion():
    model, (_, x, _, _) = Uncertain().double(), cases.find("tanh").problem()

    def likelihood(output, target):
        return ((output - target).square() * (-model.log_variance).exp() + model.log_variance).sum(1)

    def decayed(output, target):
        return (output - target).square().sum(1) + 0.1 * model.net[0].weight.square().sum()

    return model, x, torch.rand(cases.B, 3, dtype=torch.float64), {"likelihood": likelihood, "decayed": decayed}


@pytest.mark.filterwarnings("ignore:the gradients of")
@pytest.mark.parametrize("over", ["sample", 2, "batch"])
@pytest.mark.parametrize("name", ["likelihood", "decayed"])
def test_parameters_that_the_criterion_uses(name, over):
    model, x, y, criteria = uses_of_parameters_by_the_criterion()
    row = lambda output, target: criteria[name](output[None], target[None])[0]  # noqa: E731
    group = {"sample": 1, "batch": cases.B}.get(over, over)
    expected = ref.param_grad_sq_norm(model, x, y, row, group=group)
    check(param_grad_sq_norm(model, x, y, criterion=criteria[name], over=over), expected, model)


@pytest.mark.parametrize("name", ["likelihood", "decayed"])
def test_finite_differences_displace_what_the_criterion_finds_in_the_model(name):
    model, x, y, criteria = uses_of_parameters_by_the_criterion()
    options = {"criterion": criteria[name], "over": "batch"}
    found = param_grad_sq_norm(model, x, y, method="finite_difference", scheme="central", step=1e-4, **options)
    exact = param_grad_sq_norm(model, x, y, **options)
    ref.assert_close(found, exact, 1e-12)
    assert ref.relative_error(ref.flat_gradient(found, model), ref.flat_gradient(exact, model)) < 1e-7


def test_finite_differences_say_what_they_cannot_displace():
    model, x, y, _ = uses_of_parameters_by_the_criterion()
    log_variance = model.log_variance

    def likelihood(output, target):
        return ((output - target).square() * (-log_variance).exp() + log_variance).sum(1)

    options = {"criterion": likelihood, "over": "batch", "method": "finite_difference"}
    with pytest.raises(RuntimeError, match=r"criterion.*exact.*parameters="):
        param_grad_sq_norm(model, x, y, **options)
    others = ["net.2.*"]
    assert param_grad_sq_norm(model, x, y, parameters=others, **options) > 0


class Potential(nn.Module):
    """An energy plus its squared force: the forward pass differentiates, and uses every weight once more in doing so."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        energy = self.net(x)
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy + force.square().sum(1, keepdim=True)


@pytest.mark.filterwarnings("ignore:the gradients of")
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_a_potential_with_its_force(autocast):
    model, x, y = Potential(), torch.randn(5, 4), torch.randn(5, 1)
    with torch.autocast("cpu", enabled=autocast):
        actual = param_grad_sq_norm(model, x, y, criterion=F.mse_loss)
    expected = ref.param_grad_sq_norm(model.double(), x.double(), y.double(), F.mse_loss)
    ref.assert_close(actual, expected, 0.05 if autocast else 1e-5)


# ---- values alone ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["sample", "batch", 2])
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("name", ["tanh", "custom_parameter", "conv2d"])
def test_values_without_a_graph(name, over, method):
    model, x, y, criterion = cases.find(name).problem()
    settings = dict(criterion=criterion, over=over, method=method)
    values = param_grad_sq_norm(model, x, y, **settings, create_graph=False)
    assert not values.requires_grad
    ref.assert_close(values, param_grad_sq_norm(model, x, y, **settings))


@pytest.mark.parametrize("settings", [{}, {"of": "output"}, {"method": "finite_difference"}], ids=str)
def test_input_values_without_a_graph(settings):
    model, x, y, criterion = cases.find("tanh").problem()
    values = input_grad_sq_norm(model, x, y, criterion=criterion, **settings, create_graph=False)
    assert not values.requires_grad
    ref.assert_close(values, input_grad_sq_norm(model, x, y, criterion=criterion, **settings))
