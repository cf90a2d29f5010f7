"""R before the mean: values and parameter gradients against the loop oracles, over the grid."""

from __future__ import annotations

import copy
import math

import cases
import pytest
import references as ref
import torch
from torch import nn

from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm

BATCHES = [cases.B, 1]
LOOSE = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-10, 1e-10)}


# ---- exact, against the oracles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", [*cases.ARCHITECTURES, *cases.LOSS_CASES], ids=str)
def test_param_norms_of_samples(case, batch):
    model, x, y, criterion = case.problem(batch)
    actual = param_grad_sq_norm(model, x, y, criterion=criterion)
    ref.check(actual, ref.param_grad_sq_norm(model, x, y, case.loss.row), model)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", [*cases.FLOAT_INPUT, *cases.LOSS_CASES], ids=str)
def test_input_norms_of_samples(case, batch):
    model, x, y, criterion = case.problem(batch)
    actual = input_grad_sq_norm(model, x, y, criterion=criterion)
    ref.check(actual, ref.input_grad_sq_norm(model, x, y, case.loss.row), model)


@pytest.mark.parametrize("group", [2, 5, 9])
@pytest.mark.parametrize("case", cases.ARCHITECTURES, ids=str)
def test_param_norms_of_micro_batches(case, group):
    model, x, y, criterion = case.problem()
    actual = param_grad_sq_norm(model, x, y, criterion=criterion, over=group)
    ref.check(actual, ref.param_grad_sq_norm(model, x, y, case.loss.row, group=group), model)


@pytest.mark.parametrize("case", [*cases.ARCHITECTURES, *cases.LOSS_CASES], ids=str)
def test_param_norm_of_the_batch(case):
    model, x, y, criterion = case.problem()
    actual = param_grad_sq_norm(model, x, y, criterion=criterion, over="batch")
    ref.check(actual, ref.param_grad_sq_norm(model, x, y, case.loss.row, group=cases.B), model)


@pytest.mark.parametrize("case", [c for c in cases.FLOAT_INPUT if isinstance(c.draw(1), torch.Tensor)], ids=str)
def test_jacobian_norms(case):
    model, x, _, _ = case.problem(batch=3)
    ref.check(input_grad_sq_norm(model, x, of="output"), ref.output_jacobian_sq_norm(model, x), model)


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
    ref.check(actual, ref.output_jacobian_sq_norm(model, x), model)


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
    ref.check(actual, expected, single.model, 1e-4, double.model)


# ---- what f is ------------------------------------------------------------------------------------------------------


def test_a_callable_gives_any_scalar_of_a_sample():
    model, x, y, _ = cases.find("tanh").problem()
    margin = input_grad_sq_norm(model, x, y, of=lambda output, target: output[:, 0] - output[:, 1])
    ref.check(margin, ref.input_grad_sq_norm(model, x, y, lambda o, t: o[0] - o[1]), model)


def test_the_callable_sees_the_target():
    model, x, y, _ = cases.find("tanh").problem()
    logit = input_grad_sq_norm(model, x, y, of=lambda output, target: output.gather(1, target[:, None])[:, 0])
    ref.check(logit, ref.input_grad_sq_norm(model, x, y, lambda o, t: o[t]), model)


def test_the_output_may_have_any_rank():
    model, x, _, _ = cases.find("per_position").problem(batch=3)
    ref.check(input_grad_sq_norm(model, x, of="output"), ref.output_jacobian_sq_norm(model, x), model)


def test_only_the_parameters_asked_for_count():
    case = cases.find("conv2d")
    model, x, y, criterion = case.problem()
    for which in (["*.weight"], lambda name, parameter: parameter.dim() > 1):
        actual = param_grad_sq_norm(model, x, y, criterion=criterion, parameters=which)
        chosen = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
        ref.check(actual, ref.param_grad_sq_norm(model, x, y, case.loss.row, parameters=chosen), model)


def test_patterns_select_by_name():
    case = cases.find("three_layers")
    model, x, y, criterion = case.problem()
    actual = param_grad_sq_norm(model, x, y, criterion=criterion, parameters=["0.*", "4.bias"], over=2)
    chosen = [model[0].weight, model[0].bias, model[4].bias]
    ref.check(actual, ref.param_grad_sq_norm(model, x, y, case.loss.row, parameters=chosen, group=2), model)


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


@pytest.mark.parametrize("second", [lambda h: h, torch.sin], ids=["the_same", "of_the_first"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-10), ({"method": "finite_difference", "scheme": "central", "step": 1e-4}, 1e-6)],
    ids=["exact", "difference"],
)
def test_inputs_that_are_functions_of_each_other(options, tolerance, second):
    """∂f/∂x of every input by itself, also where something is trained through them."""
    case = cases.find("two_inputs_tuple")
    model, (image, _, tokens), y, criterion = case.problem()
    encoder = nn.Linear(4, 2).double()
    model.image = nn.Linear(2, 4).double()
    h = encoder(image)
    x = (h, second(h), tokens)
    actual = input_grad_sq_norm(model, x, y, criterion=criterion, **options)
    expected = ref.input_grad_sq_norm(model, x, y, case.loss.row)
    ref.check(actual, expected, nn.ModuleList([encoder, model]), tolerance)


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
        input_grad_sq_norm(
            model,
            x,
            of="output",
            method="projection",
            generator=torch.Generator(torch.get_default_device()).manual_seed(seed),
        )
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
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
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


class Product(nn.Module):
    """Of two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.head((self.left(a) * self.right(b)).tanh())


@pytest.mark.parametrize("options", [{}, {"of": "output"}, {"method": "finite_difference"}])
def test_a_tensor_that_is_given_twice_counts_at_each_place_whether_it_requires_grad_or_not(options):
    model, (_, x, y, _) = Product().double(), cases.find("tanh").problem()
    expected = input_grad_sq_norm(model, (x, x.clone()), y, **options)
    ref.assert_close(input_grad_sq_norm(model, (x, x), y, **options), expected)
    wanted = x.clone().requires_grad_()
    actual = input_grad_sq_norm(model, (wanted, wanted), y, **options)
    ref.assert_close(actual, expected)
    if not options:
        both = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        parts = torch.autograd.grad(input_grad_sq_norm(model, tuple(both), y).sum(), both)
        ref.assert_close(torch.autograd.grad(actual.sum(), wanted)[0], sum(parts))
