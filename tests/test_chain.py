"""Dense layers with elementwise functions between them: formulas in place of autograd, which is the oracle here.

That the numbers are right is tested with those of all other models (test_functional, test_penalties).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import cases
import pytest
import references as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import spectral_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss, chain_mean, chain_norms, chain_terms, evaluation
from gradpen._layout import lies_by_feature
from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm
from gradpen.module_chain import run_chain

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="this torch cannot tell what is saved"
)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "softplus": lambda: nn.Softplus(2.0),
    "elu": lambda: nn.ELU(0.7),
    "selu": nn.SELU,
    "identity": nn.Identity,
}
PENALTIES: dict[str, Callable[[], list]] = {
    "input": lambda: [InputGradPenalty(0.3)],
    "param": lambda: [ParamGradPenalty(0.3)],
    "both": lambda: [InputGradPenalty(0.3), ParamGradPenalty(0.2)],
    "batch": lambda: [ParamGradPenalty(0.3, over="batch")],
    "three": lambda: [
        InputGradPenalty(0.3),
        ParamGradPenalty(0.3, over="batch", parameters=["*.bias", "1.*"]),
        ParamGradPenalty(0.1, name="some", parameters=["*.bias", "4.weight"]),
    ],
    "biases": lambda: [ParamGradPenalty(0.1, over="batch", parameters=["7.*"]), InputGradPenalty(0.1)],
    "two scalars": lambda: [
        InputGradPenalty(0.3),
        ParamGradPenalty(0.2, criterion=nn.CrossEntropyLoss(reduction="sum")),
    ],
    "smoothed": lambda: [InputGradPenalty(0.3, criterion=nn.CrossEntropyLoss(label_smoothing=0.2))],
    "logit": lambda: [InputGradPenalty(0.3, of=lambda output, target: output[:, 1])],
    "projection": lambda: [
        InputGradPenalty(0.1, of="output", method="projection", num_projections=2),
        ParamGradPenalty(),
    ],
    "not squared": lambda: [InputGradPenalty(0.1, squared=False), ParamGradPenalty(0.1, squared=False)],
    "measured": lambda: [
        InputGradPenalty(0.0),
        ParamGradPenalty(0.0),
        ParamGradPenalty(0.0, over="batch", name="batch"),
    ],
    "measured difference": lambda: [ParamGradPenalty(0.0, over="batch", method="finite_difference")],
    "forward difference": lambda: [ParamGradPenalty(0.1, over="batch", method="finite_difference")],
    "difference in biases": lambda: [
        ParamGradPenalty(0.1, over="batch", method="finite_difference", parameters=["*.bias"])
    ],
    "difference in the first layer": lambda: [
        ParamGradPenalty(0.1, over="batch", method="finite_difference", scheme="central", parameters=["1.*"])
    ],
    "differences here and there": lambda: [
        ParamGradPenalty(0.1, over="batch", method="finite_difference", parameters=["7.*"], name="behind"),
        ParamGradPenalty(0.1, over="batch", method="finite_difference", parameters=["1.weight", "4.*"]),
    ],
    "differences": lambda: [
        ParamGradPenalty(0.1, over="batch", method="finite_difference", scheme="central", parameters=["*.weight"]),
        ParamGradPenalty(0.2, over="batch", method="finite_difference", scheme="backward", squared=False, name="root"),
    ],
}


def layers(activation: Callable[[], nn.Module] = nn.Tanh, dropout: float = 0.0, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(6, 5, bias=bias),
        activation(),
        nn.Dropout(dropout),
        nn.Linear(5, 7),
        activation(),
        nn.Dropout(dropout),
        nn.Linear(7, 3),
    ).double()


class Written(nn.Sequential):
    """The same with a forward of its own, so that it has to be run to see what it is."""

    def forward(self, x):
        for module in self:
            x = module(x)
        return x


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 2, 3, dtype=torch.float64), torch.randint(3, (size,))


@dataclass
class Looked:
    """What `chain_terms.evaluate` came to, call by call."""

    found: list[bool] = field(default_factory=list)


@pytest.fixture
def looked(monkeypatch):
    record, evaluate = Looked(), chain_terms.evaluate

    def recorded(*args, **kwargs):
        found = evaluate(*args, **kwargs)
        record.found.append(found is not None)
        return found

    monkeypatch.setattr(chain_terms, "evaluate", recorded)
    return record


def by_autograd(monkeypatch) -> None:
    """From now on no model is a chain."""
    monkeypatch.setattr(evaluation, "run_chain", lambda *_, **__: None)
    monkeypatch.setattr(chain_terms, "chain_of", lambda *_: None)


def second_derivatives(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """∇ of a combination of the entries of ∇loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    total = sum((g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).reshape(g.shape)).sum() for g in gradients)
    found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def everything(model: nn.Module, x: Tensor, y: Tensor, penalties: list, criterion=F.cross_entropy) -> list[Tensor]:
    """Output, losses, values of the penalties, gradients, and derivatives of these where there are any."""
    torch.manual_seed(1)
    model.zero_grad()
    out = PenalizedLoss(criterion, *penalties)(model, x, y)
    first_order = any(getattr(p.term, "method", "") == "finite_difference" or p.weight == 0 for p in penalties)
    second = [] if first_order else second_derivatives(out.loss, model)
    out.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    values = [out.output, out.loss, out.data_loss, *out.penalties.values()]
    return [tensor.detach() for tensor in [*values, *gradients, *second, torch.rand(1)]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.usefixtures("layout")
def test_formulas_and_autograd_agree(name, activation, looked, monkeypatch):
    for kind, dropout, bias in ((nn.Sequential, 0.0, False), (nn.Sequential, 0.4, True), (Written, 0.4, True)):
        model, (x, y) = kind(*layers(ACTIVATIONS[activation], dropout, bias)), batch()
        looked.found.clear()
        by_formulas = everything(model, x, y, PENALTIES[name]())
        # SELU is no activation that is known beforehand, and a graph does not say how a model would act elsewhere
        displaces = "difference" in name and "measured" not in name
        assert looked.found == [not displaces or (kind is nn.Sequential and activation != "selu")]
        with monkeypatch.context() as context:
            by_autograd(context)
            expected = everything(model, x, y, PENALTIES[name]())
        for a, b in zip(by_formulas, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class InOneKernel(nn.Module):
    """Dropout as it is on a GPU."""

    def __init__(self, p: float, drops: bool) -> None:
        super().__init__()
        self.p, self.drops = p, drops

    def forward(self, x):
        return torch.native_dropout(x, self.p, self.drops)[0]


@pytest.mark.parametrize(("p", "drops"), [(0.4, True), (0.4, False), (0.0, True), (1.0, True)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("name", ["both", "batch", "measured"])
def test_dropout_in_one_kernel(name, activation, p, drops, looked, monkeypatch):
    model, (x, y) = Written(*layers(ACTIVATIONS[activation])), batch()
    model[3], model[6] = InOneKernel(p, drops), InOneKernel(p, drops)
    by_formulas = everything(model, x, y, PENALTIES[name]())
    assert looked.found == [True]
    by_autograd(monkeypatch)
    for a, b in zip(by_formulas, everything(model, x, y, PENALTIES[name]()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["both", "measured", "forward difference"])
def test_dropout_rests_in_eval_mode(name, looked, monkeypatch):
    model, (x, y) = layers(dropout=0.4).eval(), batch()
    by_formulas = everything(model, x, y, PENALTIES[name]())
    assert all(looked.found)
    by_autograd(monkeypatch)
    for a, b in zip(by_formulas, everything(model, x, y, PENALTIES[name]()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["both", "batch", "measured", "forward difference"])
def test_one_layer_one_sample(name, size, looked, monkeypatch):
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double(), batch(size)
    by_formulas = everything(model, x, y, PENALTIES[name]())
    assert all(looked.found)
    by_autograd(monkeypatch)
    for a, b in zip(by_formulas, everything(model, x, y, PENALTIES[name]()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "criterion",
    [F.mse_loss, nn.MSELoss(reduction="sum"), lambda o, t: (o - t).abs().sum(1), nn.SmoothL1Loss(), F.cross_entropy],
    ids=["mse", "mse_sum", "callable", "smooth_l1", "probabilities"],
)
@pytest.mark.parametrize("name", ["both", "batch", "measured", "forward difference"])
def test_other_criteria(name, criterion, looked, monkeypatch):
    model, (x, _) = layers(), batch()
    y = torch.rand(4, 3, dtype=torch.float64)
    by_formulas = everything(model, x, y, PENALTIES[name](), criterion)
    assert all(looked.found)
    by_autograd(monkeypatch)
    for a, b in zip(by_formulas, everything(model, x, y, PENALTIES[name](), criterion), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---- wide layers: rows that lie by feature ------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("samples", "width", "expected"), [(64, 1024, True), (256, 1030, True), (63, 1024, False), (64, 1023, False)]
)
@pytest.mark.cpu
def test_hidden_rows_lie_by_feature_where_layers_are_wide(samples, width, expected):
    model = nn.Sequential(
        nn.Linear(5, width), nn.ReLU(), nn.Dropout(), nn.Linear(width, 1024), nn.Tanh(), nn.Linear(1024, 3)
    )
    chain = run_chain(model, torch.randn(samples, 5), keep_first=True)
    assert [lies_by_feature(h) for h in chain.hidden] == [False, expected, expected]
    assert lies_by_feature(chain.between[0].factor) == lies_by_feature(chain.first) == expected
    assert chain.output.is_contiguous()
    torch.set_num_threads(1)
    assert not lies_by_feature(run_chain(model, torch.randn(samples, 5)).hidden[1])


def test_one_wide_layer_gains_nothing(two_threads):
    model = nn.Sequential(nn.Linear(5, 1024), nn.ReLU(), nn.Linear(1024, 3))
    assert not lies_by_feature(run_chain(model, torch.randn(64, 5)).hidden[1])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ["both", "batch", "measured", "forward difference"])
def test_wide_layers(name, looked, monkeypatch):
    model = nn.Sequential(nn.Linear(20, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 3)).double()
    x, y = torch.randn(64, 20, dtype=torch.float64), torch.randint(3, (64,))
    objective = PenalizedLoss(F.cross_entropy, *PENALTIES[name]())
    found = step(objective, model, x, y)
    assert looked.found == [True]
    torch.testing.assert_close(found[0], model(x), rtol=1e-12, atol=1e-12)
    by_autograd(monkeypatch)
    for a, b in zip(found, step(objective, model, x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def step(objective: PenalizedLoss, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Output, penalties and gradients."""
    model.zero_grad()
    out = objective(model, x, y)
    out.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    return [tensor.detach() for tensor in (out.output, *out.penalties.values(), *gradients)]


# ---- few samples, wide layers: products between samples ------------------------------------------------------------


def wide(activation: Callable[[], nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    """The layers' weights are larger than anything that four samples have to do with each other."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(6, 40, bias=bias),
        activation(),
        nn.Dropout(0.2),
        nn.Linear(40, 30),
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(30, 3),
    ).double()


class Products(TorchDispatchMode):
    """How many products of shape (B, B) there are for four samples."""

    def __init__(self) -> None:
        super().__init__()
        self.between_samples = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.between_samples += func is torch.ops.aten.mm.default and found.shape == (4, 4)
        return found


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    "name",
    [
        *["batch", "three", "biases", "measured", "forward difference", "differences", "difference in biases"],
        *["difference in the first layer", "differences here and there"],
    ],
)
@pytest.mark.usefixtures("layout")
def test_products_between_samples(name, bias, activation, looked, monkeypatch):
    (x, y), model = batch(), wide(ACTIVATIONS[activation], bias)
    with Products() as products:
        by_formulas = everything(model, x, y, PENALTIES[name]())
    if x.is_cpu:  # elsewhere the host would have to wait for the numbers that tell whether they pay
        assert products.between_samples >= {"batch": 5, "biases": 0, "difference in biases": 0}.get(name, 1)
    assert all(looked.found)
    by_autograd(monkeypatch)
    for a, b in zip(by_formulas, everything(model, x, y, PENALTIES[name]()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["batch", "forward difference", "differences", "differences here and there"])
def test_products_where_the_host_cannot_look(name, looked, monkeypatch):
    (x, y), model = batch(), wide()
    with monkeypatch.context() as patch, Products() as products:
        for module in (chain_mean, chain_norms):
            patch.setattr(module, "is_at_hand", lambda _: False)
        by_formulas = everything(model, x, y, PENALTIES[name]())
    assert products.between_samples == (name != "batch")
    assert all(looked.found)
    by_autograd(monkeypatch)
    for a, b in zip(by_formulas, everything(model, x, y, PENALTIES[name]()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_products_between_samples_in_float32():
    (x, y), model = batch(), wide().eval()
    single = copy.deepcopy(model).float()
    for over in ("batch", "sample"):
        found = param_grad_sq_norm(single, x.float(), y, over=over, create_graph=False)
        torch.testing.assert_close(found.double(), param_grad_sq_norm(model, x, y, over=over), rtol=1e-5, atol=0)


def cancelling(share: float) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Two samples with nearly opposite gradients: products between them would leave no digit of what remains."""
    model = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    x = torch.randn(1, 50, dtype=torch.float64).expand(2, 50).contiguous()
    return model, x, torch.tensor([1.0, share - 1.0], dtype=torch.float64)


def first_output(output: Tensor, target: Tensor) -> Tensor:
    return output[:, 0] * target


@pytest.mark.parametrize("share", [1e-2, 1e-5])
def test_gradients_that_cancel(share):
    model, x, y = cancelling(share)
    criterion = first_output
    exact = param_grad_sq_norm(model, x, y, over="batch", criterion=criterion).item()
    found = param_grad_sq_norm(
        model.float(), x.float(), y.float(), over="batch", criterion=criterion, create_graph=False
    )
    assert found.item() == pytest.approx(exact, rel=1e-3 if share == 1e-2 else 0.05)


@pytest.mark.parametrize("share", [0.9, 1e-2, 1e-5])
@pytest.mark.usefixtures("layout")
def test_gradients_that_cancel_in_a_difference(share):
    penalty = ParamGradPenalty(0.01, over="batch", method="finite_difference", squared=False, step=0.1)
    model, x, y = cancelling(share)
    exact = everything(model, x, y, [penalty], first_output)
    found = everything(model.float(), x.float(), y.float(), [penalty], first_output)
    *_, norm = found[:4]
    assert norm.item() == pytest.approx(exact[3].item(), rel=1e-3 if share > 1e-3 else 0.05)
    for a, b in zip(found[4:-1], exact[4:-1], strict=True):
        assert (a - b).norm() <= (1e-3 if share > 1e-3 else 0.1) * b.norm()


def test_products_between_samples_that_overflow():
    """x · x does, in float32, but not the gradient δ xᵀ, as δ is small."""
    model, x = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 2)), torch.rand(1, 50)
    options = {"over": "batch", "method": "finite_difference", "squared": False}
    penalty = ParamGradPenalty(0.1, parameters=["0.weight"], **options)

    def tiny(output: Tensor, target: Tensor) -> Tensor:
        return output[:, 0] * 1e-20

    found = PenalizedLoss(tiny, penalty)(model, 1e20 * x, x).penalties["param"]
    expected = PenalizedLoss(tiny, penalty)(model.double(), 1e20 * x.double(), x).penalties["param"]
    assert expected > 0
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


# ---- the data loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_data_loss_is_the_criterion_s(reduction):
    (x, y), model = batch(5), layers()
    y[1] = -100
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    out = PenalizedLoss(criterion, InputGradPenalty(0.1))(model, x, y)
    expected = criterion(model(x), y)
    assert torch.equal(out.data_loss, expected)
    for a, b in zip(grads(out.data_loss, model, retain_graph=True), grads(expected, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    found = second_derivatives(out.data_loss, model)
    for a, b in zip(found, second_derivatives(criterion(model(x), y), model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_nothing_but_ignored_targets_leaves_no_gradient_of_the_data_loss():
    (x, _), model = batch(), layers()
    out = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1))(model, x, torch.full((4,), -100))
    assert out.data_loss.isnan()
    assert all(gradient.eq(0).all() for gradient in grads(out.data_loss, model))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_the_criterion_run(register):
    (x, y), model, criterion = batch(), layers(), nn.CrossEntropyLoss()
    ran = []
    getattr(criterion, register)(lambda *_: ran.append(True))
    PenalizedLoss(criterion, InputGradPenalty(0.1))(model, x, y).loss.backward()
    assert ran


def test_another_reduction_after_the_objective_was_made():
    (x, y), model, criterion = batch(), layers(), nn.CrossEntropyLoss()
    objective = PenalizedLoss(criterion, InputGradPenalty(0.1))
    criterion.reduction = "sum"
    assert torch.equal(objective(model, x, y).data_loss, criterion(model(x), y))


@pytest.mark.parametrize("name", ["measured", "forward difference"])
def test_more_losses_on_the_output_of_a_known_gradient(name, monkeypatch):
    (x, y), model = batch(), layers()

    def compute() -> list[Tensor]:
        out = PenalizedLoss(F.cross_entropy, *PENALTIES[name]())(model, x, y)
        return [
            *grads(out.output.square().sum(), model, retain_graph=True),
            *second_derivatives(out.output.square().sum(), model),
            *grads(out.loss + out.output.square().sum(), model),
        ]

    same_as_by_autograd(monkeypatch, compute)


@pytest.mark.parametrize("name", ["both", "measured", "forward difference"])
def test_hooks_on_the_outcome_run_only_if_there_is_a_gradient(name):
    (x, y), model, seen = batch(), layers(), []
    out = PenalizedLoss(F.cross_entropy, *PENALTIES[name]())(model, x, y)
    out.output.register_hook(lambda gradient: seen.append(("output", gradient.shape)))
    out.data_loss.register_hook(lambda gradient: seen.append(("data loss", gradient.shape)))
    if name != "measured":
        sum(out.penalties.values()).backward(retain_graph=True)
    assert not seen
    out.loss.backward(retain_graph=True)
    assert seen == [("data loss", ())]
    out.output.sum().backward()
    assert seen[1:] == [("output", (4, 3))]


@pytest.mark.parametrize("name", ["both", "measured", "forward difference"])
def test_the_outcome_can_be_changed_in_place(name):
    (x, y), model = batch(), layers()
    out = PenalizedLoss(F.cross_entropy, *PENALTIES[name]())(model, x, y)
    expected = grads(2 * out.data_loss + 3 * out.output.sum(), model, retain_graph=True)
    found = grads(out.data_loss.mul_(2) + out.output.mul_(3).sum(), model)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_tensor_in_the_place_of_a_parameter_does_not_count(name, monkeypatch):
    (x, y), model = batch(), layers()
    other = getattr(model[4], name).detach().clone().requires_grad_()
    delattr(model[4], name)
    setattr(model[4], name, other)
    same_as_by_autograd(monkeypatch, lambda: [param_grad_sq_norm(model, x, y)])


def test_hooks_on_all_modules_run_on_the_criterion():
    (x, y), model, criterion = batch(), layers(), nn.CrossEntropyLoss()
    objective = PenalizedLoss(criterion, InputGradPenalty(0.1))
    plain = objective(model, x, y)

    def doubled(module, args, output):
        return 2 * output if module is criterion else None

    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        hooked = objective(model, x, y)
    finally:
        handle.remove()
    torch.testing.assert_close(hooked.data_loss, 2 * plain.data_loss)


def test_rows_that_do_not_count_may_overflow():
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e-20)
    penalty = ParamGradPenalty(parameters=["*bias"])
    out = PenalizedLoss(F.cross_entropy, penalty)(model, 1e20 * torch.randn(5, 40), torch.randint(3, (5,)))
    found = torch.autograd.grad(out.penalties["param"], list(model.parameters()), create_graph=True, allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in found if gradient is not None)


def test_a_difference_where_the_gradient_is_0():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    penalty = ParamGradPenalty(over="batch", method="finite_difference", squared=False)
    out = PenalizedLoss(F.cross_entropy, penalty)(model, torch.randn(2, 3), torch.full((2,), -100))
    assert out.penalties["param"] == 0
    assert all(gradient.eq(0).all() for gradient in grads(out.penalties["param"], model))


@pytest.mark.parametrize("name", ["both", "batch", "measured", "forward difference"])
def test_ignored_targets(name, looked, monkeypatch):
    model, (x, y) = layers(), batch(5)
    y[[1, 4]] = -100
    by_formulas = everything(model, x, y, PENALTIES[name]())
    assert all(looked.found)
    by_autograd(monkeypatch)
    for a, b in zip(by_formulas, everything(model, x, y, PENALTIES[name]()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_dead_units_and_saturated_samples():
    model, (x, y) = layers(nn.ReLU).float(), batch()
    nn.init.constant_(model[1].bias, -1e3)  # all units of the first layer are dead
    out = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1), ParamGradPenalty(0.1))(model, x.float(), y)
    out.loss.backward()
    assert out.penalties["input"] == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- which models are chains ----------------------------------------------------------------------------------------


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.flatten(1))))


class WithModifiedInput(ByHand):
    def forward(self, x):
        return super().forward(2 * x)


class Residual(ByHand):
    def forward(self, x):
        return super().forward(x) + x.flatten(1)[:, :3]


class Detaching(ByHand):
    def forward(self, x):
        return self.last(torch.tanh(self.first(x.flatten(1))).detach())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.layer(torch.tanh(self.layer(x.flatten(1)))))


class Transposed(ByHand):
    """Rows of x are features."""

    def forward(self, x):
        return super().forward(x.flatten(1).t().reshape(6, 6))


class Hooked(ByHand):
    def forward(self, x):
        h = torch.tanh(self.first(x.flatten(1)))
        h.register_hook(lambda gradient: self.seen.append(gradient))
        return self.last(h)


def frozen(model: nn.Module, name: str) -> nn.Module:
    model.get_parameter(name).requires_grad_(False)
    return model


def with_hook(model: nn.Module) -> nn.Module:
    model.first.register_full_backward_hook(lambda *_: None)
    return model


NO_CHAINS = {
    "modified_input": WithModifiedInput,
    "residual": Residual,
    "detaching": Detaching,
    "twice": Twice,
    "frozen_weight": lambda: frozen(ByHand(), "first.weight"),
    "frozen_bias": lambda: frozen(ByHand(), "last.bias"),
    "spectral_norm": lambda: nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(6, 3))).eval(),
    "layer_norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
    "softmax": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.Softmax(1)),
    "tokens": lambda: nn.Sequential(nn.Linear(3, 3), cases.Mean()),
    "backward_hook": lambda: with_hook(ByHand()),
}


def test_a_forward_of_ones_own(looked):
    model, (x, y) = ByHand().double(), batch()
    ref.assert_close(input_grad_sq_norm(model, x, y), ref.input_grad_sq_norm(model, x, y, cases.cross_entropy_row))
    ref.assert_close(param_grad_sq_norm(model, x, y), ref.param_grad_sq_norm(model, x, y, cases.cross_entropy_row))
    assert looked.found == [True, True]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_module_within():
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), torch.jit.script(nn.Tanh()), nn.Linear(4, 3)), batch()
    values = input_grad_sq_norm(model.double(), x, y)
    ref.assert_close(values, ref.input_grad_sq_norm(model, x, y, cases.cross_entropy_row))


@pytest.mark.parametrize("name", NO_CHAINS)
def test_what_is_no_chain(name, looked):
    torch.manual_seed(0)
    model, (x, y) = NO_CHAINS[name]().double(), batch()
    if name != "detaching":
        values = input_grad_sq_norm(model, x, y)
        ref.assert_close(values, ref.input_grad_sq_norm(model, x, y, cases.cross_entropy_row))
        assert not any(looked.found)
    if name not in ("modified_input", "detaching"):  # which are no obstacles to parameters
        looked.found.clear()
        ref.assert_close(param_grad_sq_norm(model, x, y), ref.param_grad_sq_norm(model, x, y, cases.cross_entropy_row))
        assert not any(looked.found)


def test_rows_that_are_no_samples():
    x, y = torch.randn(6, 6, dtype=torch.float64), torch.randint(3, (6,))
    with pytest.raises(RuntimeError, match="mixes the samples"):
        input_grad_sq_norm(Transposed().double(), x, y)


def test_a_criterion_that_mixes_samples():
    model, (x, y) = layers(), batch()
    with pytest.raises(RuntimeError, match="mixes the samples"):
        PenalizedLoss(lambda o, t: F.cross_entropy(o - o.mean(0), t, reduction="none"), ParamGradPenalty())(model, x, y)


def test_a_criterion_with_parameters_of_its_own(looked):
    model, (x, y) = layers(), batch()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    out = PenalizedLoss(lambda o, t: F.cross_entropy(scale * o, t, reduction="none"), InputGradPenalty())(model, x, y)
    out.loss.backward()
    assert looked.found == [False]
    assert scale.grad is not None and scale.grad != 0


def test_an_input_that_is_differentiated_too(looked):
    model, (x, y) = layers(), batch()
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: input_grad_sq_norm(model, x, y), x)
    assert not looked.found


def test_hooks_within_the_model_run(looked):
    model, (x, y) = Hooked().double(), batch()
    model.seen = []
    PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1))(model, x, y).loss.backward()
    assert model.seen and not looked.found


def test_hooks_on_parameters_see_the_whole_gradient_once(looked):
    model, (x, y) = layers(), batch()
    seen = []
    model[1].weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1), ParamGradPenalty(0.1))(model, x, y).loss.backward()
    assert looked.found == [True] and len(seen) == 1
    assert torch.equal(seen[0], model[1].weight.grad)


def test_autocast_is_left_to_autograd(looked):
    model, (x, y) = layers().float(), batch()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        param_grad_sq_norm(model, x.float(), y)
    assert not looked.found


@pytest.mark.parametrize("name", ["both", "forward difference"])
def test_a_backward_pass_under_autocast_keeps_the_precision_of_the_forward_pass(name):
    model, (x, y) = layers().float(), batch()
    loss = PenalizedLoss(F.cross_entropy, *PENALTIES[name]())(model, x.float(), y).loss
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def grads(loss: Tensor, model: nn.Module, **options) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], **options))


def same_as_by_autograd(monkeypatch, compute: Callable[[], list[Tensor]]) -> None:
    """What `compute` gives, and the numbers that are drawn after it, with and without formulas."""
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append([*compute(), torch.rand(1)])
        by_autograd(monkeypatch)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def noisy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.dropout(output, 0.5), target, reduction="none")


@pytest.mark.parametrize("name", ["both", "forward difference"])
def test_a_criterion_that_draws_random_numbers(name, looked, monkeypatch):
    model, (x, y) = layers(), batch()
    same_as_by_autograd(monkeypatch, lambda: grads(PenalizedLoss(noisy, *PENALTIES[name]())(model, x, y).loss, model))
    assert looked.found == [True]


def test_second_derivatives_see_the_same_random_numbers():
    model, (x, y) = layers(), batch()
    loss = PenalizedLoss(noisy, InputGradPenalty(0.1))(model, x, y).loss
    first = grads(loss, model, retain_graph=True)
    for a, b in zip(first, grads(loss, model, create_graph=True), strict=True):
        torch.testing.assert_close(a, b)


def test_a_criterion_that_draws_and_has_parameters(monkeypatch):
    model, (x, y) = layers(dropout=0.4), batch()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    objective = PenalizedLoss(lambda o, t: noisy(scale * o, t), *PENALTIES["forward difference"]())
    same_as_by_autograd(monkeypatch, lambda: grads(objective(model, x, y).loss, model))


class Gated(ByHand):
    """A mask that the parameters decide about."""

    def forward(self, x):
        z = self.first(x.flatten(1))
        return self.last(z * (z > 0))


@pytest.mark.parametrize("name", ["both", "forward difference"])
def test_masks_that_depend_on_the_parameters(name, looked, monkeypatch):
    model, (x, y) = Gated().double(), batch()
    penalties = [ParamGradPenalty(0.1, over="batch", method="finite_difference", step=0.5)]
    penalties = penalties if "difference" in name else PENALTIES[name]()
    same_as_by_autograd(monkeypatch, lambda: grads(PenalizedLoss(F.cross_entropy, *penalties)(model, x, y).loss, model))
    assert looked.found == ["difference" not in name]


@pytest.mark.parametrize("kind", [nn.Sequential, Written])
def test_a_bias_that_is_broadcast(kind, looked, monkeypatch):
    model, (x, y) = kind(*layers()), batch()
    model[1].bias = nn.Parameter(torch.ones(1, dtype=torch.float64))
    same_as_by_autograd(
        monkeypatch, lambda: [param_grad_sq_norm(model, x, y), param_grad_sq_norm(model, x, y, over="batch")]
    )
    assert not looked.found


def test_targets_of_eight_bits():
    model, x = nn.Linear(6, 200), torch.randn(4, 6)
    y = torch.tensor([156, 156, 3, 4], dtype=torch.uint8)  # 156 is -100 in eight bits
    expected = ref.flat_gradient(F.cross_entropy(model(x), y), model)
    torch.testing.assert_close(
        ref.flat_gradient(PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.0))(model, x, y).loss, model), expected
    )


def test_a_class_that_somebody_has_patched(monkeypatch):
    model, (x, y) = layers(), batch()
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 3 * original(self, x))
    out = PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1))(model, x, y)
    torch.testing.assert_close(out.data_loss, F.cross_entropy(model(x), y))


def test_forward_mode_goes_through():
    model, (x, y) = layers(), batch()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        out = PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.1, over="batch"))(model, dual, y)
        tangents = [forward_ad.unpack_dual(loss).tangent for loss in (out.data_loss, F.cross_entropy(model(dual), y))]
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("kind", [nn.Sequential, Written])
@pytest.mark.parametrize(
    "penalty",
    [
        ParamGradPenalty(),
        InputGradPenalty(),
        ParamGradPenalty(over="batch"),
        InputGradPenalty(of="output"),
        InputGradPenalty(of="output", method="projection"),
    ],
)
def test_an_empty_batch(penalty, kind):
    model, (x, y) = kind(*layers()), batch()
    with pytest.raises(ValueError, match="at least one sample"):
        penalty(model, x[:0], y[:0])


@pytest.mark.parametrize("name", ["sample", "batch"])
def test_none_of_the_parameters_is_in_the_chain(name, looked):
    model, (x, y) = Written(*layers()), batch()
    model.head = nn.Linear(2, 2).double()
    model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(model)[:-1]), x)
    assert not param_grad_sq_norm(model, x, y, over=name, parameters=["head.*"]).any()
    measured = ParamGradPenalty(0.1, over="batch", method="finite_difference", parameters=["head.*"])
    out = PenalizedLoss(F.cross_entropy, measured)(model, x, y)
    out.loss.backward()
    assert out.penalties["param"] == 0
    assert looked.found[0]


def test_a_criterion_that_works_in_place(monkeypatch):
    model, (x, y) = layers(), batch()
    same_as_by_autograd(monkeypatch, lambda: [input_grad_sq_norm(model, x, y, of=lambda o, t: o.mul_(2)[:, 0])])


def test_an_output_that_is_changed_before_the_backward_pass():
    model, (x, y) = layers(), batch()
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1))
    expected = grads(objective(model, x, y).loss, model)
    out = objective(model, x, y)
    out.output.detach().zero_()
    assert all(torch.equal(a, b) for a, b in zip(grads(out.loss, model), expected, strict=True))


# ---- a model that was a chain when it was last seen -----------------------------------------------------------------


def no_longer(model: nn.Sequential, how: str) -> nn.Sequential:
    match how:
        case "frozen":
            model[4].weight.requires_grad_(False)
        case "another layer":
            model.insert(2, nn.LayerNorm(5).double())
        case "a hook":
            model[1].register_forward_hook(lambda module, args, output: 2 * output)
        case "another activation":
            model[2] = nn.Mish()
        case "another forward":
            model[1].forward = lambda x: F.linear(x, model[1].weight).tanh() + model[1].bias
    return model


@pytest.mark.parametrize("how", ["frozen", "another layer", "a hook", "another activation", "another forward"])
@pytest.mark.parametrize("name", ["both", "batch", "forward difference", "measured"])
def test_it_is_found_out_that_a_model_is_no_chain_any_more(name, how, looked, monkeypatch):
    model, (x, y) = layers(dropout=0.4), batch()
    fresh = no_longer(copy.deepcopy(model), how)
    for _ in range(2):
        everything(model, x, y, PENALTIES[name]())
    assert looked.found == [True, True]
    after = everything(no_longer(model, how), x, y, PENALTIES[name]())
    assert len(looked.found) == 2
    by_autograd(monkeypatch)
    for a, b in zip(after, everything(fresh, x, y, PENALTIES[name]()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_for_a_criterion_with_parameters_a_model_is_not_run_in_vain_again():
    model, (x, y) = layers(dropout=0.4), batch()
    counted = PassesOfDropout()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    objective = PenalizedLoss(lambda o, t: F.cross_entropy(scale * o, t, reduction="none"), InputGradPenalty())
    passes = []
    for _ in range(3):
        with counted:
            objective(model, x, y)
        passes.append(counted.taken())
    assert passes == [2, 1, 1]


class PassesOfDropout(TorchFunctionMode):
    """How often the two layers of dropout have been at work."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is F.dropout
        return func(*args, **(kwargs or {}))

    def taken(self) -> int:
        calls, self.calls = self.calls, 0
        return calls // 2


# ---- the graph ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["both", "batch", "forward difference", "measured"])
def test_backward_twice(name):
    model, (x, y) = layers(), batch()
    loss = PenalizedLoss(F.cross_entropy, *PENALTIES[name]())(model, x, y).loss
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("name", ["both", "batch", "measured", "forward difference"])
def test_several_cotangents_at_once(name):
    """`is_grads_batched`, as `torch.autograd.functional.jacobian(vectorize=True)` asks for it."""
    (x, y), model = batch(), wide(nn.GELU).eval()
    parameters = list(model.parameters())
    out = PenalizedLoss(F.cross_entropy, *PENALTIES[name]())(model, x, y)
    losses = torch.stack([out.loss, out.data_loss + out.output.sum()])
    found = torch.autograd.grad(losses, parameters, torch.eye(2).double(), is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    for a, b in zip(found, map(torch.stack, zip(*one_by_one, strict=True)), strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["both", "batch"])
def test_parameters_that_are_changed_before_the_backward_pass(name):
    model, (x, y) = layers(), batch()
    loss = PenalizedLoss(F.cross_entropy, *PENALTIES[name]())(model, x, y).loss
    with torch.no_grad():
        model[4].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_each_penalty_by_itself():
    model, (x, y) = layers(), batch()
    out = PenalizedLoss(F.cross_entropy, *PENALTIES["both"]())(model, x, y)
    for name, penalty in (("input", InputGradPenalty()), ("param", ParamGradPenalty())):
        expected = ref.flat_gradient(penalty(model, x, y), model)
        found = torch.cat(
            [g.flatten() for g in torch.autograd.grad(out.penalties[name], list(model.parameters()), retain_graph=True)]
        )
        torch.testing.assert_close(found, expected)


def test_a_difference_cannot_be_derived_twice():
    model, (x, y) = layers(), batch()
    loss = PenalizedLoss(F.cross_entropy, *PENALTIES["forward difference"]())(model, x, y).loss
    (gradient,) = torch.autograd.grad(loss, model[1].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of this loss is not there"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", [nn.Sequential, Written])
def test_saved_tensors_that_go_through_hooks(kind, looked):
    model, (x, y) = kind(*layers()), batch()
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1))
    expected = ref.flat_gradient(objective(model, x, y).loss, model)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(model, x, y).loss
    assert packed
    torch.testing.assert_close(ref.flat_gradient(loss, model), expected)
    assert len(looked.found) == (2 if kind is nn.Sequential else 1)  # what is put away is not fetched to be looked at


def test_hooks_on_a_penalty_run_only_if_it_is_differentiated():
    model, x, y, criterion = cases.find("tanh").problem(5)
    out = PenalizedLoss(criterion, InputGradPenalty(0.1))(model, x, y)
    seen = []
    out.penalties["input"].register_hook(seen.append)
    out.data_loss.backward(retain_graph=True)
    assert not seen
    out.loss.backward()
    assert len(seen) == 1


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_gradients_within_vmap(weight):
    model, x, y, criterion = cases.find("tanh").problem(5)
    parameters = list(model.parameters())
    loss = PenalizedLoss(criterion, InputGradPenalty(weight), ParamGradPenalty(weight))(model, x, y).loss
    scales = torch.tensor([1.0, 3.0], dtype=x.dtype)
    found = torch.func.vmap(lambda scale: torch.autograd.grad(loss, parameters, scale, retain_graph=True))(scales)
    for together, alone in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(together, torch.stack([alone, 3 * alone]))


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("name", ["input", "param", "both"])
def test_what_is_saved_is_written_over_in_the_last_pass_alone(name):
    model, (x, y) = layers(), batch()
    objective = PenalizedLoss(F.cross_entropy, *PENALTIES[name]())
    loss = objective(model, x, y).loss
    gradients = [grads(loss, model, retain_graph=retained) for retained in (True, True, False)]
    assert all(torch.equal(*pair) for other in gradients[1:] for pair in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("name", ["input", "param", "both"])
def test_what_somebody_else_keeps_is_not_written_over(name):
    model, (x, y) = layers(), batch()
    objective = PenalizedLoss(F.cross_entropy, *PENALTIES[name]())
    packed = []

    def pack(tensor):
        packed.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(model, x, y).loss
    loss.backward()
    assert packed and all(torch.equal(*pair) for pair in packed)
