"""Models of other kinds: recurrent, checkpointed, complex, fused attention, outputs of any structure, derivatives inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cases
import pytest
import references as ref
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss, evaluate_inequality
from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm


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
def test_what_torch_cannot_map_over_samples_goes_through_a_loop(name, over, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # whose recurrent layers are differentiated only once
    model, (_, x, y, _) = UNMAPPED[name]().double(), cases.find("tokens").problem()
    twin = copy.deepcopy(model)  # spectral_norm in training mode moves its buffers on every call
    with pytest.warns(UserWarning, match="one sample at a time"):
        actual = param_grad_sq_norm(model, x, y, over=over)
    losses = F.cross_entropy(twin(x), y, reduction="none")
    groups = losses.split(1 if over == "sample" else over)
    expected = torch.stack([ref.sq_norm(ref.gradients(group.mean(), ref.trainable(twin))) for group in groups])
    ref.check(actual, expected, model, exact_model=twin)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_a_loop_refuses_a_model_that_mixes_samples():
    class CentredStates(Gated):
        def forward(self, x):
            h = self.cell(x)[0].mean(1)
            return self.head(h - h.mean(0))

    model, (_, x, y, _) = CentredStates(nn.GRU).double(), cases.find("tokens").problem()
    with pytest.raises(RuntimeError, match="mixes the samples"):
        param_grad_sq_norm(model, x, y)


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
    ref.check(
        param_grad_sq_norm(wrapped, x, target, criterion=criterion),
        ref.param_grad_sq_norm(model, x, pairs, row),
        wrapped,
        exact_model=model,
    )
    ref.check(
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
@pytest.mark.cpu
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


def test_packed_sequences_and_named_tuples_with_constructors_of_their_own():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNN(4, 3, batch_first=True)

        def forward(self, packed):
            return nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0][:, 0]

    model, x, y = Last().double(), torch.randn(3, 5, 4).double(), torch.tensor([0, 1, 2])
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 4, 2], batch_first=True)
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


@pytest.mark.parametrize("options", [{}, {"of": "output"}, {"method": "finite_difference"}])
def test_an_input_that_is_trained_is_not_changed_in_place_either(options):
    _, x, y, _ = cases.find("tanh").problem()
    scale = torch.ones((), dtype=x.dtype, requires_grad=True)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).double()
    with pytest.raises(RuntimeError, match="in place"):
        input_grad_sq_norm(model, x * scale, y, **options)


def test_sparse_gradients_are_displaced():
    _, _, y, _ = cases.find("tanh").problem()
    tokens = torch.randint(7, (len(y), 3), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)).double()
        param_grad_sq_norm(model, tokens, y, over="batch", method="finite_difference").sum().backward()
        gradients.append(torch.cat([p.grad.to_dense().flatten() for p in model.parameters()]))
    ref.assert_close(*gradients)


@pytest.mark.parametrize("over", ["batch", 2])
def test_displaced_rows_are_not_shortened(over):
    torch.manual_seed(0)
    tokens, y = torch.randint(7, (5, 3)), torch.randint(3, (5,))
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)).double()
    exact = param_grad_sq_norm(model, tokens, y, over=over).mean()
    difference = param_grad_sq_norm(
        model, tokens, y, over=over, method="finite_difference", scheme="central", step=1e-4
    )
    gradient = ref.flat_gradient(exact, model)
    assert ref.relative_error(ref.flat_gradient(difference.mean(), model), gradient) < 1e-6
    assert model[0].max_norm == 1.0


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
    ref.check(actual, oracle(plain, x, y, cases.cross_entropy_row), plain)


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
    ref.check(actual, ref.param_grad_sq_norm(model, x, y, cases.squared_error_row), model)
    actual = input_grad_sq_norm(model, x, y, criterion=F.mse_loss)
    ref.check(actual, ref.input_grad_sq_norm(model, x, y, cases.squared_error_row), model)


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
    ref.check(param_grad_sq_norm(model, x, y, criterion=criteria[name], over=over), expected, model)


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
    with torch.autocast(torch.get_default_device().type, enabled=autocast):
        actual = param_grad_sq_norm(model, x, y, criterion=F.mse_loss)
    expected = ref.param_grad_sq_norm(model.double(), x.double(), y.double(), F.mse_loss)
    ref.assert_close(actual, expected, 0.05 if autocast else 1e-5)


class ScaledGradients(nn.Module):
    """A hook on the output of a layer, behind another or the last: gradients on the way back are smaller there."""

    def __init__(self, of_last: bool = False) -> None:
        super().__init__()
        self.of_last = of_last
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        z = self.second(self.first(x).tanh())
        output = self.third(z.tanh())
        hooked = output if self.of_last else z
        if hooked.requires_grad:
            hooked.register_hook(lambda gradient: gradient / 3)
        return output


@pytest.mark.parametrize("over", ["sample", 2])
def test_a_hook_that_changes_the_gradient_of_a_layers_output(over):
    model, (_, x, y, _) = ScaledGradients().double(), cases.find("tanh").problem()
    expected = ref.param_grad_sq_norm(model, x, y, cases.cross_entropy_row, group=1 if over == "sample" else over)
    ref.check(param_grad_sq_norm(model, x, y, over=over), expected, model)
    if over == "sample":
        report = evaluate_inequality(model, x, y)
        ref.assert_close(report.rhs, expected)
        assert report.holds.all() and len(report.layers) == 3


@pytest.mark.parametrize("of_last", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_a_hook_on_a_layers_output_and_an_objective(weight, of_last):
    model, (_, x, y, _) = ScaledGradients(of_last).double(), cases.find("tanh").problem()
    out = PenalizedLoss(F.cross_entropy, InputGradPenalty(weight), ParamGradPenalty(weight))(model, x, y)
    for name, oracle in (("input", ref.input_grad_sq_norm), ("param", ref.param_grad_sq_norm)):
        expected = oracle(model, x, y, cases.cross_entropy_row).mean()
        if weight:
            ref.check(out.penalties[name], expected, model)
        else:
            ref.assert_close(out.penalties[name], expected)


class Squashed(torch.Tensor):
    """A weight that layers squash before they use it, as quantised training rounds it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return super().__torch_function__(func, types, args, kwargs)
        x, weight, bias = args
        weight = weight.as_subclass(torch.Tensor)
        return F.linear(x, weight.tanh(), bias)


@pytest.mark.filterwarnings("ignore:the gradients of")
@pytest.mark.parametrize("layer", [0, 2])
def test_a_weight_of_a_type_that_layers_use_in_another_way(layer):
    model, (_, x, y, _) = cases.mlp(4, 5, 5, 3, activation=nn.Tanh).double(), cases.find("tanh").problem()
    model[layer].weight = nn.Parameter(model[layer].weight.detach().as_subclass(Squashed))
    for function, oracle in (
        (input_grad_sq_norm, ref.input_grad_sq_norm),
        (param_grad_sq_norm, ref.param_grad_sq_norm),
    ):
        ref.check(function(model, x, y), oracle(model, x, y, cases.cross_entropy_row), model)
    report = evaluate_inequality(model, x, y)
    ref.assert_close(report.rhs, ref.param_grad_sq_norm(model, x, y, cases.cross_entropy_row))
    assert report.holds.all() and "type of its own" in report.excluded[0].reason


class Generated(nn.Module):
    """Another layer makes the weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.maker, self.head = nn.Parameter(torch.randn(1, 2)), nn.Linear(2, 20), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(F.linear(x, self.maker(self.code).view(5, 4)).tanh())


@pytest.mark.parametrize("batch", [1, 5])
def test_a_layer_that_makes_the_weight_of_the_first(batch):
    model, (_, x, y, _) = Generated().double(), cases.find("tanh").problem(batch=batch)
    out = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1), ParamGradPenalty(0.1))(model, x, y)
    for name, oracle in (("input", ref.input_grad_sq_norm), ("param", ref.param_grad_sq_norm)):
        ref.check(out.penalties[name], oracle(model, x, y, cases.cross_entropy_row).mean(), model)
    ref.assert_close(evaluate_inequality(model, x, y).rhs, ref.param_grad_sq_norm(model, x, y, cases.cross_entropy_row))
