"""Bad input gets an error that names what came and what to do."""

from __future__ import annotations

import math

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss, evaluate_inequality
from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm

X, Y = torch.linspace(-2, 2, 20).reshape(5, 4).sin(), torch.tensor([0, 1, 2, 1, 0])
BOTH = [input_grad_sq_norm, param_grad_sq_norm]


def model() -> nn.Module:
    return cases.mlp(4, 6, 3)


class OwnMean(nn.Module):
    """A reduction that only its author knows."""

    reduction = "mean_over_valid"

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square().mean()


CONSTRUCTORS = [
    (lambda: InputGradPenalty(-0.1), ValueError, r"weight.*>= 0.*-0\.1"),
    (lambda: ParamGradPenalty(-0.1), ValueError, r"weight.*>= 0.*-0\.1"),
    (lambda: InputGradPenalty(math.nan), ValueError, "weight.*nan"),
    (lambda: InputGradPenalty(math.inf), ValueError, "weight.*inf"),
    (lambda: InputGradPenalty("0.1"), TypeError, "weight.*'0.1'"),
    (lambda: InputGradPenalty(of="losses"), ValueError, "of.*'loss'.*'output'.*'losses'"),
    (lambda: InputGradPenalty(method="exactly"), ValueError, "method.*'exact'.*'exactly'"),
    (lambda: InputGradPenalty(method="projection"), ValueError, "projection.*output"),
    (
        lambda: InputGradPenalty(of="output", method="finite_difference"),
        ValueError,
        "finite_difference.*output",
    ),
    (
        lambda: InputGradPenalty(of="output", method="projection", num_projections=0),
        ValueError,
        "num_projections.*0",
    ),
    (
        lambda: InputGradPenalty(method="finite_difference", scheme="upwind"),
        ValueError,
        "scheme.*'forward'.*'upwind'",
    ),
    (lambda: InputGradPenalty(method="finite_difference", step=0.0), ValueError, "step.*> 0.*0"),
    (lambda: ParamGradPenalty(method="finite_difference", step=-1.0), ValueError, "step.*> 0.*-1"),
    (lambda: ParamGradPenalty(method="projection"), ValueError, "method.*'projection'"),
    (lambda: ParamGradPenalty(over="samples"), ValueError, "over.*'sample'.*'batch'.*'samples'"),
    (lambda: ParamGradPenalty(over=0), ValueError, "over.*>= 1.*0"),
    (lambda: ParamGradPenalty(over=-3), ValueError, "over.*-3"),
    (lambda: ParamGradPenalty(over=2.0), (ValueError, TypeError), r"over.*2\.0"),
    (lambda: ParamGradPenalty(over=True), (ValueError, TypeError), "over.*True"),
    (lambda: InputGradPenalty(every_n_steps=0), ValueError, "every_n_steps.*>= 1.*0"),
    (lambda: InputGradPenalty(every_n_steps=1.5), TypeError, r"every_n_steps.*1\.5"),
    (lambda: InputGradPenalty(target=-1.0), ValueError, "target.*-1"),
    (lambda: InputGradPenalty(target=math.inf), ValueError, "target.*inf"),
    (lambda: InputGradPenalty(target="1"), ValueError, "target.*'1'"),
    (lambda: ParamGradPenalty(parameters=list(model().parameters())), TypeError, r"\*\.weight.*Parameter"),
    (lambda: InputGradPenalty(one_sided=True), ValueError, "one_sided.*target"),
    (lambda: InputGradPenalty(target=1.0, squared=False), ValueError, "target.*squared=False"),
    (lambda: InputGradPenalty(num_projections=2), ValueError, "num_projections.*projection.*'exact'"),
    (lambda: InputGradPenalty(of="output", generator=torch.Generator()), ValueError, "generator.*projection.*'exact'"),
    (lambda: InputGradPenalty(criterion="mse"), TypeError, "criterion.*'mse'"),
    (lambda: InputGradPenalty(criterion=OwnMean()), ValueError, "OwnMean.*mean.*got 'mean_over_valid'"),
    (lambda: InputGradPenalty(criterion=nn.MSELoss), TypeError, r"class MSELoss.*MSELoss\(\)"),
    (lambda: PenalizedLoss(InputGradPenalty()), TypeError, "criterion.*first.*InputGradPenalty"),
    (lambda: PenalizedLoss("mse"), TypeError, "criterion.*'mse'"),
    (lambda: PenalizedLoss(F.mse_loss, InputGradPenalty(), InputGradPenalty()), ValueError, "'input'.*name="),
    (lambda: PenalizedLoss(F.mse_loss, 0.1), TypeError, "InputGradPenalty.*float"),
]


@pytest.mark.parametrize(("construct", "kind", "words"), CONSTRUCTORS)
def test_constructors_refuse(construct, kind, words):
    with pytest.raises(kind, match=words):
        construct()


CALLS = [
    (lambda f: f(model(), X, Y[:4]), ValueError, r"batch size.*\(5, 3\).*\(4,\)"),
    (
        lambda f: f(model(), X, Y, criterion=lambda o, t: F.cross_entropy(o, t)),
        ValueError,
        "one scalar per sample",
    ),
    (lambda f: f(model(), X, Y, criterion=lambda o, t: o), ValueError, r"one scalar per sample.*\(5, 3\)"),
    (lambda f: f(model(), X, Y, criterion=lambda o, t: None), ValueError, "one scalar per sample.*None"),
    (lambda f: f(model(), X, Y, criterion="mse"), TypeError, "criterion.*'mse'"),
    (lambda f: f(lambda x: x, X, Y), TypeError, "nn.Module.*function"),
    (lambda f: f(X, model(), Y), TypeError, "nn.Module.*Tensor"),
    (lambda f: f(model(), X, Y, method="exactly"), ValueError, "method.*'exactly'"),
    (
        lambda f: f(nn.Sequential(model(), Sum()), X, Y, criterion=lambda o, t: o),
        ValueError,
        "row per sample",
    ),
]


class Sum(nn.Module):
    """A loss already: 0-dim."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


class Detached(nn.Sequential):
    """Cuts its own graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(("call", "kind", "words"), CALLS)
def test_calls_refuse(function, call, kind, words):
    with pytest.raises(kind, match=words):
        call(function)


@pytest.mark.parametrize(
    "call", [InputGradPenalty(), ParamGradPenalty(every_n_steps=2), PenalizedLoss(F.cross_entropy, InputGradPenalty())]
)
def test_a_penalty_wants_the_model_not_its_output(call):
    for _ in range(2):
        with pytest.raises(TypeError, match=r"nn\.Module.*Tensor.*\(model, x, y\)"):
            call(model()(X), Y)


@pytest.mark.parametrize("function", [*BOTH, evaluate_inequality])
def test_batch_norm_in_training_mode_is_named(function):
    norm = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4)), nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match=r"'1\.0' \(BatchNorm1d.*training mode.*eval"):
        function(norm, X, Y)
    function(norm.eval(), X, Y)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("function", [*BOTH, evaluate_inequality])
def test_batch_norm_without_running_statistics_is_not_sent_into_eval_mode(function, mode):
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).train(mode)
    with pytest.raises(
        RuntimeError, match=r"'1' \(BatchNorm1d without running statistics\).*: replace it by GroupNorm"
    ):
        function(norm, X, Y)


def test_of_batch_norm_the_inequality_names_no_penalty():
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match=r"eval mode, or replace it by GroupNorm or LayerNorm$"):
        evaluate_inequality(norm, X, Y)


def test_batch_norm_is_refused_for_micro_batches_and_welcome_over_the_batch():
    norm = cases.batch_norm().train()
    with pytest.raises(RuntimeError, match="BatchNorm1d"):
        param_grad_sq_norm(norm, X, Y, over=2)
    assert param_grad_sq_norm(norm, X, Y, over="batch") > 0


@pytest.mark.parametrize("function", [*BOTH, evaluate_inequality])
def test_a_detached_output_is_explained(function):
    with pytest.raises(RuntimeError, match="detached"):
        function(Detached(nn.Linear(4, 3)), X, Y)


@pytest.mark.parametrize("function", [input_grad_sq_norm, evaluate_inequality])
@pytest.mark.parametrize("x", [torch.zeros(5, 4, dtype=torch.long), (torch.ones(5, 4, dtype=torch.int32),)])
def test_integer_inputs_are_refused_by_dtype(function, x):
    with pytest.raises((TypeError, ValueError), match=r"float.*torch\.int"):
        function(cases.embed(nn.Embedding(3, 4)), x, Y)


@pytest.mark.parametrize("function", [param_grad_sq_norm, evaluate_inequality, ParamGradPenalty()])
def test_a_frozen_model_has_no_parameter_gradient(function):
    with pytest.raises(ValueError, match=r"trainable parameters.*Sequential"):
        function(model().requires_grad_(False), X, Y)


def test_a_frozen_model_has_an_input_gradient():
    assert (input_grad_sq_norm(nn.Linear(4, 3).requires_grad_(False), X, Y) > 0).all()


@pytest.mark.parametrize("which", [["no.such.*"], lambda name, parameter: False])
def test_a_filter_that_selects_nothing(which):
    with pytest.raises(ValueError, match=r"parameters=.*none of 0\.weight"):
        param_grad_sq_norm(model(), X, Y, parameters=which)


@pytest.mark.parametrize(
    "call",
    [*BOTH, InputGradPenalty(), ParamGradPenalty(), PenalizedLoss(F.cross_entropy, ParamGradPenalty())],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(call, mode):
    with mode(), pytest.raises(RuntimeError, match=f"{mode.__name__}.*enable_grad"):
        call(model(), X, Y)


@pytest.mark.parametrize(
    "call",
    [
        *BOTH,
        InputGradPenalty(of="output", method="projection"),
        PenalizedLoss(F.cross_entropy, ParamGradPenalty(over="batch")),
    ],
)
@pytest.mark.parametrize("place", ["whole", "inner", "in_place"])
def test_compiled_modules_are_refused_with_two_ways_out(call, place):
    compiled = model()
    if place == "whole":
        compiled = torch.compile(compiled, backend="eager")
    elif place == "inner":
        compiled[0] = torch.compile(compiled[0], backend="eager")
    else:
        compiled.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"torch\.compile.*uncompiled.*finite_difference"):
        call(compiled, X, Y)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"of": "logits"}, "of.*'logits'"),
        ({"norm": "nuclear"}, "norm.*'spectral'.*'nuclear'"),
        ({"method": "power"}, "method.*'krylov'.*'power'"),
        ({"delta": 0.0}, r"delta.*0\.0"),
        ({"delta": 1.5}, r"delta.*1\.5"),
    ],
)
def test_the_inequality_refuses_unknown_options(options, words):
    with pytest.raises(ValueError, match=words):
        evaluate_inequality(model(), X, Y, **options)


def test_the_inequality_wants_full_precision():
    with pytest.raises(ValueError, match=r"float32.*bfloat16.*float\(\)"):
        evaluate_inequality(model().bfloat16(), X.bfloat16(), Y)


def test_the_inequality_wants_one_precision():
    mixed = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3).double())
    with pytest.raises(ValueError, match=r"float32 in '0\..*float64 in '1\..*double\(\)"):
        evaluate_inequality(mixed, X, Y)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_inequality_wants_finite_outputs(value):
    x = X.clone()
    x[2, 1] = value
    with pytest.raises(ValueError, match=r"finite.*1 of 5 samples.*sample 2"):
        evaluate_inequality(model(), x, Y)


def test_an_input_of_the_wrong_size_is_named():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(4, 3)

        def forward(self, x, shift):
            return self.dense(x) + shift

    with pytest.raises(ValueError, match=r"\(3,\)"):
        input_grad_sq_norm(Broadcast(), (X, torch.randn(3)), Y)


def test_a_missing_target_is_the_criterions_error():
    with pytest.raises((TypeError, ValueError)):
        input_grad_sq_norm(model(), X)


@pytest.mark.parametrize("target", [3, 40, -1, -7])
@pytest.mark.parametrize(
    "penalty",
    [
        InputGradPenalty(),
        ParamGradPenalty(),
        ParamGradPenalty(over="batch"),
        ParamGradPenalty(over="batch", method="finite_difference"),
    ],
)
@pytest.mark.cpu
def test_a_target_that_is_no_class_is_refused_before_anything_is_written(penalty, target):
    """The kernel of the derivative writes wherever a target points, into the row of another sample or beyond the tensor."""
    wrong = Y.clone()
    wrong[2] = target
    with pytest.raises(IndexError, match=f"{target} is out of bounds"):
        penalty(model(), X, wrong)
    with pytest.raises(IndexError, match=f"{target} is out of bounds"):
        PenalizedLoss(F.cross_entropy, penalty)(model(), X, wrong)
    with pytest.raises(IndexError, match=f"{target} is out of bounds"):
        param_grad_sq_norm(model(), X, wrong, create_graph=False)


def test_complex_numbers_are_sent_on():
    with pytest.raises(TypeError, match="view_as_real"):
        InputGradPenalty()(model(), X.to(torch.complex64), Y)
    spectrum = nn.Sequential(nn.Linear(4, 3), nn.Identity())
    spectrum.forward = lambda x: torch.fft.fft(x)
    with pytest.raises(TypeError, match=r"complex64.*view_as_real"):
        input_grad_sq_norm(spectrum, X, of="output")


def test_without_penalties_nothing_needs_autograd():
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(every_n_steps=2))
    objective(model(), X, Y)
    with torch.no_grad():
        assert objective(model(), X, Y).loss > 0
        assert PenalizedLoss(F.cross_entropy)(model(), X, Y).loss > 0
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        objective(model(), X, Y)
