"""What a second forward pass must not do to a model, and what it must see: checkpoints, ties, torch.func, attributes."""

from __future__ import annotations

import copy
from collections import deque

import cases
import pytest
import references as ref
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss, evaluate_inequality
from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm

ROW = cases.cross_entropy_row


class Checkpointed(nn.Module):
    """Runs its middle again in every backward pass."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.middle = nn.Sequential(nn.Linear(5, 5), activation)
        self.checkpointed = True

    def forward(self, x):
        h = self.first(x).tanh()
        h = checkpoint(self.middle, h, use_reentrant=False) if self.checkpointed else self.middle(h)
        return self.last(h)


@pytest.mark.filterwarnings("ignore:the gradients of")
@pytest.mark.parametrize(
    "options", [{"over": "batch", "method": "finite_difference"}, {"method": "finite_difference"}, {}]
)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.PReLU])
def test_checkpoints(activation, options):
    model, (_, x, y, _) = Checkpointed(activation()).double(), cases.find("tanh").problem()
    found = param_grad_sq_norm(model, x, y, **options)
    gradient = ref.flat_gradient(found.sum(), model)
    model.checkpointed = False
    expected = param_grad_sq_norm(model, x, y, **options)
    ref.assert_close(found, expected, 1e-12)
    assert ref.relative_error(gradient, ref.flat_gradient(expected.sum(), model)) < 1e-12


class TwoNames(nn.Module):
    """A module that is found in two places, beside a weight that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.BatchNorm1d(4))
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.encoder[0].weight
        self.net = nn.Sequential(self.encoder, self.tied, nn.Tanh(), self.encoder[1], nn.Linear(4, 3))

    def forward(self, x):
        return self.net(x)


@pytest.mark.filterwarnings("ignore:the gradients of")
@pytest.mark.parametrize(
    "options", [{"over": "batch", "method": "finite_difference", "step": 1e-4}, {"over": "sample"}]
)
def test_modules_with_two_names_stay_as_they_are(options):
    model, (_, x, y, _) = TwoNames().double().eval(), cases.find("tanh").problem()

    def state():
        return {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}

    before = state()
    found = param_grad_sq_norm(model, x, y, **options)
    assert state() == before
    evaluate_inequality(model, x, y)
    assert state() == before
    expected = ref.param_grad_sq_norm(model, x, y, ROW, group=cases.B if options["over"] == "batch" else 1)
    ref.assert_close(found, expected, 1e-10)
    gradient, reference = (ref.flat_gradient(q.sum(), model) for q in (found, expected))
    assert ref.relative_error(gradient, reference) < (1e-3 if "step" in options else 1e-10)
    assert state() == before


@pytest.mark.filterwarnings("ignore:the gradients of")
@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("over", ["sample", 2, "batch"])
def test_parameters_that_are_functions_of_others(over, number):
    """As after a step of an inner loop: the norms lead on to what the parameters were computed from."""
    model, x, y, _ = cases.find("tanh").problem()
    which = [name for name, _ in model.named_parameters()][:number]

    class Asked(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, question):
            return question(self.model)

    def norms(**options):
        given = {f"model.{name}": p.sin() if name in which else p for name, p in model.named_parameters()}
        return torch.func.functional_call(
            Asked(), given, (lambda m: param_grad_sq_norm(m, x, y, over=over, **options),)
        )

    found = norms()
    gradient = ref.flat_gradient(found.sum(), model)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            if name in which:
                p.sin_()
    expected = param_grad_sq_norm(moved, x, y, over=over)
    ref.assert_close(found, expected, 1e-12)
    parts = torch.autograd.grad(expected.sum(), list(moved.parameters()))
    through = [
        part * p.cos() if name in which else part
        for part, (name, p) in zip(parts, model.named_parameters(), strict=True)
    ]
    assert ref.relative_error(gradient, torch.cat([part.flatten() for part in through])) < 1e-12
    with pytest.raises(RuntimeError, match=r"leaves of the graph.*exact"):
        norms(method="finite_difference")


class Listing(nn.Module):
    """Names its parameters itself, as wrappers do, and counts one that torch does not find."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.others = nn.Linear(4, 3), [nn.Linear(4, 4)]

    def named_parameters(self, prefix="", recurse=True):
        yield from super().named_parameters(prefix, recurse)
        yield "hidden.weight", self.others[0].weight

    def forward(self, x):
        return self.layer(self.others[0](x).tanh())


@pytest.mark.parametrize("pattern", [["hidden.*"], ["layer.*"]])
def test_a_model_may_name_its_parameters_itself(pattern):
    model, (_, x, y, _) = Listing().double(), cases.find("tanh").problem()
    model.others[0].double()
    found = param_grad_sq_norm(model, x, y, over="batch", parameters=pattern)
    which = [model.others[0].weight] if pattern == ["hidden.*"] else list(model.layer.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), which)
    ref.assert_close(found, sum(g.square().sum() for g in gradients).reshape(1), 1e-12)


class Leaving(nn.Module):
    """Keeps what its forward pass came by, as mixtures of experts keep their balance loss."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.last = nn.Linear(4, 8), activation, nn.Linear(8, 3)
        self.seen, self.latest = [], deque(maxlen=2)

    def forward(self, x):
        h = self.activation(self.first(x))
        self.balance = h.square().mean(1)
        self.seen.append(self.balance)
        self.latest.append(self.balance)
        return self.last(h)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.PReLU])
@pytest.mark.parametrize(
    "penalty",
    [
        ParamGradPenalty(0.1),
        ParamGradPenalty(0.1, over="batch", method="finite_difference", step=0.1),
        InputGradPenalty(0.1, method="finite_difference", step=0.1),
    ],
)
def test_what_a_model_leaves_behind_is_that_of_the_first_pass(activation, penalty):
    model, (_, x, y, _) = Leaving(activation()).double(), cases.find("tanh").problem()
    PenalizedLoss(F.cross_entropy, penalty)(model, x, y)
    left, seen = model.balance, list(model.seen)
    assert len(seen) == 1
    assert seen[0] is left
    assert [one is left for one in model.latest] == [True]
    model(x)
    torch.testing.assert_close(left, model.balance)


@pytest.mark.filterwarnings("ignore:the gradients of")
@pytest.mark.parametrize("activation", [nn.Tanh, nn.PReLU])
@pytest.mark.parametrize(
    ("norms", "options"),
    [
        (input_grad_sq_norm, {}),
        (param_grad_sq_norm, {"over": "batch"}),
        (param_grad_sq_norm, {"over": 2}),
        (param_grad_sq_norm, {"over": "sample"}),
    ],
)
def test_criteria_may_read_what_a_model_leaves(norms, options, activation):
    model, (_, x, y, _) = Leaving(activation()).double(), cases.find("tanh").problem()

    def criterion(output, target):
        return F.cross_entropy(output, target, reduction="none") + 3 * model.balance[: len(output)]

    found = norms(model, x, y, criterion=criterion, method="finite_difference", scheme="central", step=1e-4, **options)
    model.seen.clear()
    exact = norms(model, x, y, criterion=criterion, **options)
    ref.assert_close(found, exact, 1e-10)
    gradients = [ref.flat_gradient(q.sum(), model) for q in (found, exact)]
    assert ref.relative_error(*gradients) < 1e-6


def test_a_criterion_that_reads_a_mixture_of_samples_is_refused():
    model, (_, x, y, _) = Leaving(nn.PReLU()).double(), cases.find("tanh").problem()

    def criterion(output, target):
        return F.cross_entropy(output, target, reduction="none") + model.balance.mean()

    with pytest.raises(RuntimeError, match="mixes the samples"):
        param_grad_sq_norm(model, x, y, criterion=criterion)


@pytest.mark.filterwarnings("ignore:the gradients of")
def test_functions_of_other_parameters_that_the_criterion_uses():
    model, x, y, _ = cases.find("tanh").problem()
    sizes = [p.numel() for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    parts = {
        f"model.{name}": part.reshape(p.shape)
        for (name, p), part in zip(model.named_parameters(), flat.split(sizes), strict=True)
    }

    def decayed(output, target):
        decay = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(output, target, reduction="none") + 0.5 * decay

    class Asked(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return param_grad_sq_norm(self.model, x, y, criterion=decayed)

    found = torch.func.functional_call(Asked(), parts, ())
    ref.assert_close(found, param_grad_sq_norm(model, x, y, criterion=decayed), 1e-12)


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_what_is_only_measured_is_not_displaced(scheme):
    model, (_, x, y, _) = Leaving(nn.PReLU()).double(), cases.find("tanh").problem()
    model.first.register_forward_hook(lambda *_: passes.append(1))
    passes = []
    for penalty in (
        ParamGradPenalty(0.0, over="batch", method="finite_difference", scheme=scheme),
        InputGradPenalty(0.0, method="finite_difference", scheme=scheme),
    ):
        passes.clear()
        out = PenalizedLoss(F.cross_entropy, penalty)(model, x, y)
        assert len(passes) == 1
        assert next(iter(out.penalties.values())) > 0


@pytest.mark.parametrize("scheme", ["forward", "backward", "central"])
def test_batched_cotangents_of_differences(scheme):
    model, (_, x, y, _) = Leaving(nn.PReLU()).double(), cases.find("tanh").problem()
    value = param_grad_sq_norm(model, x, y, over="batch", method="finite_difference", scheme=scheme)[0]
    parameters = list(model.parameters())
    expected = torch.autograd.grad(value, parameters, retain_graph=True)
    found = torch.autograd.grad(
        torch.stack([value, 2 * value]), parameters, torch.eye(2, dtype=x.dtype), is_grads_batched=True
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, torch.stack([b, 2 * b]))
