"""What must not be taken for a batch of samples: other layouts, and models and criteria that mix samples."""

from __future__ import annotations

import copy
import functools
import math

import cases
import pytest
import references as ref
import torch
import torch.nn.functional as F
from torch import nn

from gradpen import evaluate_inequality
from gradpen import mixing as mixing_of_samples
from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm


@pytest.mark.parametrize("name", ["tokens_first", "positions", "reversed_batch"])
def test_a_zero_head_does_not_hide_a_mixed_layout(name):
    case = cases.find(name)
    model, x, y, _ = case.problem()
    trained = copy.deepcopy(model.head.state_dict())
    nn.init.zeros_(model.head.weight)
    param_grad_sq_norm(model, x, y)
    model.head.load_state_dict(trained)
    ref.check(param_grad_sq_norm(model, x, y), ref.param_grad_sq_norm(model, x, y, case.loss.row), model)


@pytest.mark.parametrize("first", [3, cases.B])
def test_one_model_with_batches_of_several_sizes(first):
    case = cases.find("tokens_first")
    model, x, y, _ = case.problem(batch=7)
    for batch in (first, 7, cases.B, 1, 3):
        expected = ref.param_grad_sq_norm(model, x[:batch], y[:batch], case.loss.row)
        ref.check(param_grad_sq_norm(model, x[:batch], y[:batch]), expected, model)


def test_changing_which_parameters_are_frozen():
    case = cases.find("three_layers")
    model, x, y, _ = case.problem()
    for frozen in ((), ("0.weight", "0.bias"), ("4.weight",), ()):
        model.requires_grad_(True)
        cases.freeze(model, *frozen)
        ref.check(param_grad_sq_norm(model, x, y), ref.param_grad_sq_norm(model, x, y, case.loss.row), model)


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
        ref.check(
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


@pytest.mark.parametrize("wrap", [lambda module: module, functools.partial])
@pytest.mark.parametrize("how", ["hook", "pre_hook", "forward"])
def test_a_cross_entropy_that_was_made_to_mix_samples_is_refused_by_the_inequality(how, wrap):
    model, x, y, _ = cases.find("relu").problem()
    criterion = nn.CrossEntropyLoss(reduction="none")
    if how == "hook":
        criterion.register_forward_hook(lambda module, args, values: values - values.mean())
    elif how == "pre_hook":
        criterion.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(0), args[1]))
    else:
        criterion.forward = mixing
    with pytest.raises(RuntimeError, match="mixes the samples"):
        evaluate_inequality(model, x, y, criterion=wrap(criterion))


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
        ref.check(param_grad_sq_norm(model, x, y), ref.param_grad_sq_norm(model, x, y, cases.cross_entropy_row), model)


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


class Normalised(nn.Module):
    """A normalisation of two features, whose gradient is rounding unless `eps` is large; samples may be mixed before it."""

    def __init__(self, mixes: bool = False) -> None:
        super().__init__()
        self.dense, self.norm, self.head = nn.Linear(4, 2), nn.LayerNorm(2), nn.Linear(2, 1)
        self.mixes = mixes
        self.norm.eps = 1e-12
        nn.init.constant_(self.norm.weight, 100.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.dense(x)
        return self.head(self.norm(h + h.mean(0) if self.mixes else h))


@pytest.mark.parametrize("batch", [2, 3, 16])
@pytest.mark.parametrize("seed", range(6))
def test_gradients_that_are_rounding_mix_nothing(seed, batch):
    torch.manual_seed(seed)
    model, x = Normalised(), 3 * torch.randn(batch, 4)
    sq_norms = input_grad_sq_norm(model, x, None, of="output")
    assert sq_norms.isfinite().all() and sq_norms.median() < 1e-3
    param_grad_sq_norm(model, x, torch.zeros(batch, 1), criterion=F.mse_loss)


def test_rounding_hides_no_mixed_samples():
    for seed in range(6):
        torch.manual_seed(seed)
        model, x = Normalised(mixes=True), 3 * torch.randn(16, 4)
        for function in (input_grad_sq_norm, functools.partial(input_grad_sq_norm, method="finite_difference")):
            with pytest.raises(RuntimeError, match="mixes the samples"):
                function(model, x, torch.zeros(16, 1), criterion=F.mse_loss)


SATURATED = {
    "softmax": lambda output, target: (100 * output).softmax(1).square().sum(1),
    "one_feature": lambda output, target: F.cosine_similarity(output[:, :1], torch.ones_like(output[:, :1])),
}


@pytest.mark.parametrize("function", [input_grad_sq_norm, param_grad_sq_norm])
@pytest.mark.parametrize("criterion", SATURATED.values(), ids=SATURATED)
def test_a_criterion_whose_gradient_is_rounding_mixes_nothing(function, criterion):
    for seed in range(20):
        torch.manual_seed(seed)
        model, x, y = cases.mlp(4, 5, 3), 10 * torch.randn(2, 4), torch.randint(3, (2,))
        assert function(model, x, y, criterion=criterion).isfinite().all()


def test_half_precision_hides_no_batch_norm_behind_many_layers():
    """Little of a gradient comes from other samples where there are many, and yet it is more than rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(*cases.mlp(20, 64, 64), nn.ReLU(), *cases.mlp(64, 64, 64), nn.ReLU(), nn.Linear(64, 10))
    layer = model[0]
    layer.register_forward_hook(lambda _, args, out: F.batch_norm(out, None, None, training=True))
    x, y = torch.randn(256, 20), torch.randint(10, (256,))
    with (
        torch.autocast(torch.get_default_device().type, torch.bfloat16),
        pytest.raises(RuntimeError, match="mixes the samples"),
    ):
        input_grad_sq_norm(model, x, y)


@pytest.mark.parametrize("name", ["flattened_tokens", "tokens_first_other_count", "normalised"])
def test_an_answer_is_kept_where_rows_are_no_samples_or_gradients_rounding(monkeypatch, name):
    if name == "normalised":
        torch.manual_seed(0)
        model, x, y = Normalised(), 3 * torch.randn(16, 4), torch.randn(16, 1)
    else:
        model, x, y, _ = cases.find(name).problem()
    criterion = F.mse_loss if name == "normalised" else F.cross_entropy
    for _ in range(3):  # at the fourth call it is good enough
        param_grad_sq_norm(model, x, y, criterion=criterion)

    def tried_out(*args):
        raise AssertionError("the answer is known")

    monkeypatch.setattr(mixing_of_samples, "_try_out", tried_out)
    param_grad_sq_norm(model, x, y, criterion=criterion)


class ScaledByInput(nn.Module):
    """The weight of the first layer depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.head = nn.Linear(4, 5), nn.Linear(5, cases.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.linear(x, self.dense.weight * x.abs().mean(), self.dense.bias).tanh())


@pytest.mark.parametrize("function", QUANTITIES)
def test_a_path_between_samples_through_the_weight_of_the_first_layer_is_found(function):
    model, (_, x, y, _) = ScaledByInput().double(), cases.find("relu").problem()
    with pytest.raises(RuntimeError, match="mixes the samples"):
        function(model, x, y)
    if function is input_grad_sq_norm:
        ref.check(
            function(model, x[:1], y[:1]), ref.input_grad_sq_norm(model, x[:1], y[:1], cases.cross_entropy_row), model
        )


class WithMean(nn.Module):
    """A little of what all samples have in common is added to each."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.dense, self.head, self.share = nn.Linear(8, 16), nn.Linear(16, 3), share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.dense(x).tanh()
        return self.head(h + self.share * h.mean(0))


@pytest.mark.parametrize("batch", [2, 3, 256])
@pytest.mark.parametrize(
    ("share", "dtype", "autocast"),
    [(1e-3, torch.float32, False), (0.1, torch.float32, True), (0.3, torch.float32, True)],
)
def test_a_little_mixing_is_seen(share, dtype, autocast, batch):
    torch.manual_seed(1)
    with torch.device("cpu"):
        model, x, y = WithMean(share), torch.randn(batch, 8), torch.randint(3, (batch,))
    device = torch.get_default_device()
    model, x, y = model.to(device), x.to(device), y.to(device)
    with (
        torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast),
        pytest.raises(RuntimeError, match="mixes the samples"),
    ):
        input_grad_sq_norm(model, x, y)


@pytest.mark.parametrize("batch", [2, 3, 64])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_cancels_between_samples_mixes_nothing(batch, autocast):
    """The largest score of the whole batch, subtracted for the sake of the range."""
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)),
        torch.randn(batch, 8),
        torch.randint(3, (batch,)),
    )

    def shifted(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        scores = (output - output.max()).exp()
        return -(scores.gather(1, target[:, None])[:, 0] / scores.sum(1)).log()

    with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
        actual = input_grad_sq_norm(model, x, y, criterion=shifted)
        ref.assert_close(actual, input_grad_sq_norm(model, x, y), 0.1 if autocast else 1e-4)
