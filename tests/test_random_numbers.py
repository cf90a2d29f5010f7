"""Random numbers: every pass of a call draws the same ones, and the streams move as by one pass."""

from __future__ import annotations

import random
import warnings

import cases
import numpy as np
import pytest
import references as ref
import torch
import torch.nn.functional as F
from torch import nn

from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm


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
        ref.check(actual, looped(model, x, y, tensors), model)


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
    ref.check(param_grad_sq_norm(model, x, y), expected, model)


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
    torch.manual_seed(2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        actual = param_grad_sq_norm(model, x, y)
    told = any("random numbers" in str(warning.message) for warning in seen)
    assert (
        told or torch.__version__ < "2.7"
    )  # torch 2.6 draws the same mask sample by sample where the batch comes first
    torch.manual_seed(2)
    losses = F.cross_entropy(model(x), y, reduction="none")
    ref.check(actual, torch.stack([ref.sq_norm(ref.gradients(f, ref.trainable(model))) for f in losses]), model)


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
