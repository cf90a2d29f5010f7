"""The penalties as losses: reduction, weights, schedules, state, and the objective with its one forward pass."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import cases
import pytest
import references as ref
import torch
import torch.nn.functional as F
from torch import nn

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss, chain_terms, cotangents
from gradpen.functional import input_grad_sq_norm, param_grad_sq_norm

ROW = cases.cross_entropy_row


class Counting(nn.Module):
    """Counts its forward passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen = SimpleNamespace(calls=0)  # attributes of the module are put back after a second pass

    @property
    def calls(self) -> int:
        return self.seen.calls

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        self.seen.calls += 1
        return self.model(*args, **kwargs)


@pytest.fixture
def problem():
    return cases.find("tanh").problem()


def norms_of(problem, penalty):
    """‖·‖² by the oracle for either penalty."""
    model, x, y, _ = problem
    oracle = ref.input_grad_sq_norm if isinstance(penalty, InputGradPenalty) else ref.param_grad_sq_norm
    return oracle(model, x, y, ROW)


# ---- the data loss ------------------------------------------------------------------------------------------------------

ONE_BACKWARD_PASS = [InputGradPenalty(0.0), ParamGradPenalty(0.0, over="batch", method="finite_difference")]


@pytest.mark.parametrize("penalty", ONE_BACKWARD_PASS)
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss])
def test_a_mean_that_is_divided_by_weights(penalty, loss):
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    target, criterion = torch.randn(5, 3), partial(loss, weight=5 * torch.rand(5, 3))
    expected = ref.flat_gradient(criterion(model(x), target), model)
    out = PenalizedLoss(criterion, penalty)(model, x, target)
    assert out.data_loss == criterion(model(x), target)
    ref.assert_close(ref.flat_gradient(out.loss, model), expected, 1e-6)


@pytest.mark.parametrize("penalty", [*ONE_BACKWARD_PASS, ParamGradPenalty(0.0, over="batch"), ParamGradPenalty(0.1)])
def test_hooks_on_parameters_run_once(penalty):
    _, x, y, _ = cases.find("tanh").problem()
    (plain, *_), (hooked, *_) = (cases.find("tanh").problem() for _ in range(2))
    seen = []
    for parameter in hooked.parameters():
        parameter.register_hook(lambda gradient: seen.append(gradient) or gradient / 2)
    outs = [PenalizedLoss(F.cross_entropy, penalty)(model, x, y) for model in (plain, hooked)]
    ref.assert_close(*[out.penalties[penalty.name] for out in outs])
    for out in outs:
        out.loss.backward()
    assert len(seen) == len(list(hooked.parameters()))
    for a, b in zip(plain.parameters(), hooked.parameters(), strict=True):
        ref.assert_close(b.grad, a.grad / 2)


# ---- the reductions -----------------------------------------------------------------------------------------------------

REDUCTIONS = [
    (InputGradPenalty(0.3), lambda n: n.square().mean()),
    (ParamGradPenalty(0.3), lambda n: n.square().mean()),
    (InputGradPenalty(0.3, squared=False), lambda n: n.mean()),
    (ParamGradPenalty(0.3, squared=False), lambda n: n.mean()),
    (InputGradPenalty(0.3, target=0.2), lambda n: (n - 0.2).square().mean()),
    (InputGradPenalty(0.3, target=0.2, one_sided=True), lambda n: (n - 0.2).relu().square().mean()),
    (InputGradPenalty(0.3, target=0.0), lambda n: n.square().mean()),
]


@pytest.mark.parametrize(("penalty", "reduce"), REDUCTIONS)
def test_reductions(problem, penalty, reduce):
    expected = 0.3 * reduce(norms_of(problem, penalty).sqrt())
    actual = penalty(problem.model, problem.x, problem.y)
    assert actual.shape == ()
    ref.assert_close(actual, expected)
    gradients = (ref.flat_gradient(value, problem.model) for value in (actual, expected))
    assert ref.relative_error(*gradients) < 1e-10


def test_the_target_lies_between_the_norms_of_the_fixture(problem):
    norms = norms_of(problem, InputGradPenalty()).sqrt()
    assert norms.min() < 0.2 < norms.max()


@pytest.mark.parametrize(("over", "group"), [("sample", 1), (2, 2), (3, 3), (5, 5), (8, 8), ("batch", 5)])
@pytest.mark.parametrize("squared", [True, False])
def test_a_short_last_micro_batch_counts_by_its_samples(problem, over, group, squared):
    model, x, y, _ = problem
    norms = ref.param_grad_sq_norm(model, x, y, ROW, group=group)
    sizes = torch.tensor([min(group, 5 - start) for start in range(0, 5, group)], dtype=torch.float64)
    expected = ((norms if squared else norms.sqrt()) * sizes).sum() / 5
    ref.assert_close(ParamGradPenalty(over=over, squared=squared)(model, x, y), expected)


@pytest.mark.parametrize(
    "penalty",
    [InputGradPenalty(squared=False), ParamGradPenalty(squared=False), InputGradPenalty(target=1.0)],
)
def test_norms_are_zero_safe(penalty):
    model, x, y, _ = cases.find("no_bias").problem()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    value = penalty(model, x, y)
    assert value.item() == (1.0 if getattr(penalty, "target", None) else 0.0)
    assert torch.isfinite(ref.flat_gradient(value, model)).all()


def test_options_reach_the_computation(problem):
    model, x, y, _ = problem
    margin = lambda output, target: output[:, 0] - output[:, 1]  # noqa: E731
    for penalty, expected in [
        (InputGradPenalty(2.0, of="output"), input_grad_sq_norm(model, x, of="output")),
        (InputGradPenalty(2.0, of=margin), input_grad_sq_norm(model, x, y, of=margin)),
        (ParamGradPenalty(2.0, parameters=["0.*"]), param_grad_sq_norm(model, x, y, parameters=["0.*"])),
        (ParamGradPenalty(2.0, over="batch"), param_grad_sq_norm(model, x, y, over="batch")),
    ]:
        ref.assert_close(penalty(model, x, y), 2 * expected.mean(), 1e-13)


def test_own_criterion(problem):
    model, x, _, _ = problem
    y = torch.randn(5, 3, dtype=torch.float64)
    expected = ref.input_grad_sq_norm(model, x, y, cases.squared_error_row).mean()
    ref.assert_close(InputGradPenalty(criterion=F.mse_loss)(model, x, y), expected)
    ref.assert_close(InputGradPenalty(criterion=nn.MSELoss())(model, x, y), expected)


def test_several_inputs_and_integers_pass_through():
    for name in ("two_inputs_tuple", "two_inputs_dict"):
        case = cases.find(name)
        model, x, y, _ = case.problem()
        expected = ref.input_grad_sq_norm(model, x, y, ROW).mean()
        ref.assert_close(InputGradPenalty()(model, x, y), expected)


# ---- the objective ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.LOSS_CASES, ids=str)
def test_the_objective_adds_up(case):
    model, x, y, criterion = case.problem()
    expected_data = criterion(model(x), y).mean()  # of a scalar, unless it does not reduce by itself
    out = PenalizedLoss(criterion, InputGradPenalty(0.1), ParamGradPenalty(0.01))(model, x, y)
    assert torch.equal(out.output, model(x))
    ref.assert_close(out.data_loss, expected_data, 0.0 if y.is_cpu and case.loss.name != "mse_none" else 1e-15)
    r_input = ref.input_grad_sq_norm(model, x, y, case.loss.row).mean()
    r_param = ref.param_grad_sq_norm(model, x, y, case.loss.row).mean()
    ref.assert_close(out.penalties["input"], r_input)
    ref.assert_close(out.penalties["param"], r_param)
    expected = expected_data + 0.1 * r_input + 0.01 * r_param
    ref.assert_close(out.loss, expected)
    gradients = (ref.flat_gradient(value, model) for value in (out.loss, expected))
    assert ref.relative_error(*gradients) < 1e-10


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in cases.FLOAT_INPUT
        if c.name
        in {
            "relu",
            "conv2d",
            "tokens_first",
            "custom_parameter",
            "tied_by_matmul",
            "residual",
            "layer_norm_tokens",
            "two_inputs_dict",
            "attention",
            "positions",
        }
    ],
    ids=str,
)
def test_the_objective_over_architectures(case):
    model, x, y, criterion = case.problem()
    out = PenalizedLoss(criterion, ParamGradPenalty(0.5, over=2), InputGradPenalty(2.0))(model, x, y)
    r_param = (ref.param_grad_sq_norm(model, x, y, case.loss.row, group=2) * torch.tensor([2, 2, 1])).sum() / 5
    expected = out.data_loss + 0.5 * r_param + 2.0 * ref.input_grad_sq_norm(model, x, y, case.loss.row).mean()
    ref.assert_close(out.loss, expected)
    gradients = (ref.flat_gradient(value, model) for value in (out.loss, expected))
    assert ref.relative_error(*gradients) < 1e-10


@pytest.mark.parametrize(
    "penalties",
    [
        [],
        [InputGradPenalty()],
        [ParamGradPenalty()],
        [InputGradPenalty(), ParamGradPenalty(), ParamGradPenalty(over="batch", name="batch")],
        [InputGradPenalty(of="output"), InputGradPenalty(of="output", method="projection", name="projected")],
        [ParamGradPenalty(over=2), InputGradPenalty(of=lambda output, target: output[:, 0], name="logit")],
    ],
)
def test_one_forward_pass_for_everything(problem, penalties):
    model = Counting(problem.model)
    PenalizedLoss(F.cross_entropy, *penalties)(model, problem.x, problem.y).loss.backward()
    assert model.calls == 1


def test_finite_differences_add_one_forward_pass():
    problem = cases.find("layer_norm").problem()
    for scheme, passes in (("forward", 2), ("backward", 2), ("central", 3)):
        model = Counting(problem.model)
        penalty = ParamGradPenalty(over="batch", method="finite_difference", scheme=scheme)
        PenalizedLoss(F.cross_entropy, penalty)(model, problem.x, problem.y)
        assert model.calls == passes


def test_the_objective_without_penalties_is_the_criterion(problem):
    model, x, y, _ = problem
    out = PenalizedLoss(F.cross_entropy)(model, x, y)
    assert torch.equal(out.loss, F.cross_entropy(model(x), y))
    assert out.penalties == {}


def test_penalties_have_names(problem):
    objective = PenalizedLoss(
        F.cross_entropy, ParamGradPenalty(0.1), ParamGradPenalty(0.2, over="batch", name="implicit")
    )
    out = objective(*problem[:3])
    assert set(out.penalties) == {"param", "implicit"}
    ref.assert_close(out.loss, out.data_loss + 0.1 * out.penalties["param"] + 0.2 * out.penalties["implicit"], 1e-13)


def test_a_weight_of_zero_reports_but_does_not_pull(problem):
    model, x, y, _ = problem
    out = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.0))(model, x, y)
    assert out.penalties["input"] > 0
    expected = ref.flat_gradient(F.cross_entropy(model(x), y), model)
    assert ref.relative_error(ref.flat_gradient(out.loss, model), expected) < 1e-14


def infinite(output, target):
    return output[:, 0] * torch.inf


def test_what_does_not_count_may_be_infinite(problem):
    model, x, y, _ = problem
    penalties = [InputGradPenalty(0.0, of=infinite, name="infinite"), InputGradPenalty(0.1)]
    for chosen in (penalties, penalties[:1]):
        out = PenalizedLoss(F.cross_entropy, *chosen)(model, x, y)
        assert not out.penalties["infinite"].isfinite()
        assert out.loss.isfinite()
        assert ref.flat_gradient(out.loss, model).isfinite().all()


def test_a_penalty_of_weight_zero_runs_nothing(problem):
    model, x, y, _ = problem
    counting = Counting(model)
    penalty = InputGradPenalty(lambda step: 0.5 * step)
    assert penalty(counting, x, y) == 0
    assert counting.calls == 0
    assert penalty(counting, x, y) > 0
    assert counting.calls == 1


@pytest.mark.parametrize("penalties", [[], [ParamGradPenalty(0.0)], [InputGradPenalty(every_n_steps=2)]])
def test_the_loss_may_be_changed_in_place(problem, penalties):
    model, x, y, _ = problem
    objective = PenalizedLoss(F.cross_entropy, *penalties)
    objective(model, x, y)
    out = objective(model, x, y)
    expected = out.data_loss.item()
    out.loss.div_(4)  # micro-batches
    assert out.data_loss.item() == expected
    assert out.loss.item() == pytest.approx(expected / 4)


def test_the_criterion_of_the_objective_is_the_penaltys_unless_it_has_its_own(problem):
    model, x, _, _ = problem
    y = torch.rand(5, 3, dtype=torch.float64)
    out = PenalizedLoss(F.mse_loss, InputGradPenalty(), InputGradPenalty(criterion=F.cross_entropy, name="other"))(
        model, x, y
    )
    ref.assert_close(out.penalties["input"], ref.input_grad_sq_norm(model, x, y, cases.squared_error_row).mean())
    soft = lambda o, t: -(t * o.log_softmax(0)).sum()  # noqa: E731
    ref.assert_close(out.penalties["other"], ref.input_grad_sq_norm(model, x, y, soft).mean())


def test_a_criterion_may_be_changed(problem):
    model, x, _, _ = problem
    y = torch.rand(5, 3, dtype=torch.float64)
    criterion = nn.MSELoss()
    objective, penalty = PenalizedLoss(criterion, ParamGradPenalty(0.0)), InputGradPenalty(criterion=nn.MSELoss())
    objective(model, x, y)
    penalty(model, x, y)
    criterion.reduction = "sum"
    out = objective(model, x, y)
    expected = F.mse_loss(model(x), y, reduction="sum")
    assert torch.equal(out.loss, expected)
    gradients = [ref.flat_gradient(loss, model) for loss in (out.loss, expected)]
    assert ref.relative_error(*gradients) < 1e-13
    objective.criterion, penalty.criterion = nn.L1Loss(), nn.L1Loss()
    assert torch.equal(objective(model, x, y).loss, F.l1_loss(model(x), y))
    ref.assert_close(penalty(model, x, y), InputGradPenalty(criterion=F.l1_loss)(model, x, y), 1e-13)
    penalty.criterion = None
    assert penalty(model, x, problem[2]) > 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("make", [InputGradPenalty, ParamGradPenalty, lambda: ParamGradPenalty(0.0)])
@pytest.mark.parametrize("backward", [True, False])
def test_nothing_of_a_step_waits_for_the_garbage_collector(make, reduction, backward):
    model, x, y = cases.mlp(4, 6, 3), torch.randn(5, 4), torch.randint(3, (5,))
    objective = PenalizedLoss(nn.CrossEntropyLoss(reduction=reduction), make())
    made = []

    def weakly(function, output):
        made.append(weakref.ref(cotangent := cotangents.OfCrossEntropy(function, output)))
        return cotangent

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chain_terms, "cotangent_of", weakly)
            out = objective(model, x, y)
            if backward:
                out.loss.backward()
            del out
        assert len(made) == 1
        assert made[0]() is None
    finally:
        gc.enable()


def test_a_compiled_criterion_keeps_its_reduction(problem):
    model, x, y, _ = problem
    criterion = nn.CrossEntropyLoss()
    out = PenalizedLoss(torch.compile(criterion, backend="eager"), InputGradPenalty(0.1))(model, x, y)
    assert criterion.reduction == "mean"
    ref.assert_close(out.loss, PenalizedLoss(criterion, InputGradPenalty(0.1))(model, x, y).loss, 1e-13)


@pytest.mark.parametrize("pattern", [["second.*"], ["first.*"], lambda name, _: name.startswith("second")])
def test_a_tied_parameter_is_found_under_all_its_names(pattern):
    model = nn.Module()
    model.first, model.second = nn.Linear(4, 4), nn.Linear(4, 4)
    model.second.weight = model.first.weight
    model.forward = lambda x: model.second(model.first(x).tanh())
    x, y = torch.randn(5, 4), torch.randint(4, (5,))
    found = param_grad_sq_norm(model, x, y, over="batch", parameters=pattern)
    (part,) = {"first", "second"} - {"first" if pattern == ["first.*"] else "second"}
    left_out = param_grad_sq_norm(model, x, y, over="batch", parameters=[f"{part}.bias"])
    ref.assert_close(found + left_out, param_grad_sq_norm(model, x, y, over="batch"), 1e-5)


def test_one_dropout_mask_for_data_loss_and_penalties(problem):
    model = cases.mlp(4, 8, 3, activation=lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.5))).double()
    torch.manual_seed(5)
    x = problem.x.clone().requires_grad_()
    losses = F.cross_entropy(model(x), problem.y, reduction="none")
    parameters = ref.trainable(model)
    r_param = torch.stack([ref.sq_norm(ref.gradients(f, parameters)) for f in losses]).mean()
    r_input = torch.stack([ref.sq_norm(ref.gradients(f, [x])) for f in losses]).mean()
    torch.manual_seed(5)
    out = PenalizedLoss(F.cross_entropy, InputGradPenalty(), ParamGradPenalty())(model, problem.x, problem.y)
    ref.assert_close(out.data_loss, losses.mean(), 1e-13)
    ref.assert_close(out.penalties["input"], r_input)
    ref.assert_close(out.penalties["param"], r_param)


# ---- training ---------------------------------------------------------------------------------------------------------


def test_a_penalty_that_alone_reaches_a_parameter_trains_it(problem):
    model, x, y, _ = problem
    first_logit = lambda output, target: output[:, 0]  # noqa: E731
    objective = PenalizedLoss(first_logit, InputGradPenalty(of=lambda output, target: output[:, 1]))
    objective(model, x, y).loss.backward()
    expected = torch.autograd.grad(
        ref.input_grad_sq_norm(model, x, y, lambda o, t: o[1]).mean(), model[-1].weight, retain_graph=True
    )[0]
    ref.assert_close(model[-1].weight.grad[1], expected[1])
    assert expected[1].abs().min() > 0
    assert not model[-1].weight.grad[2].any()


@pytest.mark.parametrize(
    "penalty",
    [
        InputGradPenalty(),
        ParamGradPenalty(),
        ParamGradPenalty(over="batch"),
        InputGradPenalty(of="output"),
        ParamGradPenalty(over="batch", method="finite_difference"),
        InputGradPenalty(method="finite_difference"),
    ],
)
def test_descending_a_penalty_lowers_it(problem, penalty):
    model, x, y, _ = problem
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = penalty(model, x, y)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


@pytest.mark.parametrize("step", [0.05, 0.7])
@pytest.mark.parametrize("name", ["tanh", "relu", "conv2d", "tied_embedding", "two_inputs_tuple", "custom_parameter"])
def test_sam_is_a_special_case(name, step):
    model, x, y, criterion = cases.find(name).problem()
    penalty = ParamGradPenalty(step, over="batch", method="finite_difference", squared=False, step=step)
    out = PenalizedLoss(criterion, penalty)(model, x, y)
    expected = ref.sam_gradient(model, lambda m: criterion(ref.call(m, x), y), step)
    assert ref.relative_error(ref.flat_gradient(out.loss, model), expected) < 1e-12


def test_weight_over_step_interpolates_between_the_plain_gradient_and_sam(problem):
    model, x, y, _ = problem
    loss = lambda m: F.cross_entropy(m(x), y)  # noqa: E731
    penalty = ParamGradPenalty(0.03, over="batch", method="finite_difference", squared=False, step=0.1)
    actual = ref.flat_gradient(PenalizedLoss(F.cross_entropy, penalty)(model, x, y).loss, model)
    expected = 0.7 * ref.flat_gradient(loss(model), model) + 0.3 * ref.sam_gradient(model, loss, 0.1)
    assert ref.relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize(
    ("scheme", "ahead", "here", "behind"),
    [
        ("forward", 1, 0, 0),
        ("backward", 0, 2, -1),
        ("central", 0.5, 1, -0.5),
    ],
)
def test_schemes_are_combinations_of_three_gradients(problem, scheme, ahead, here, behind):
    """∇L + r ∇D with r D = L(θ+) − L(θ), L(θ) − L(θ−) or half of L(θ+) − L(θ−)."""
    model, x, y, _ = problem
    loss = lambda m: F.cross_entropy(m(x), y)  # noqa: E731
    penalty = ParamGradPenalty(0.3, over="batch", method="finite_difference", scheme=scheme, squared=False, step=0.3)
    actual = ref.flat_gradient(PenalizedLoss(F.cross_entropy, penalty)(model, x, y).loss, model)
    expected = sum(
        factor * ref.sam_gradient(model, loss, radius) for factor, radius in ((ahead, 0.3), (here, 0.0), (behind, -0.3))
    )
    assert ref.relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_objective_under_autocast(dtype):
    model, x, y, criterion = cases.find("gelu").problem(dtype=torch.float32)
    objective = PenalizedLoss(criterion, InputGradPenalty(0.1), ParamGradPenalty(0.1))
    expected = objective(model, x, y)
    with torch.autocast(torch.get_default_device().type, dtype, enabled=dtype == torch.bfloat16):
        out = objective(model, x, y)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert ref.relative_error(out.loss, expected.loss) < 0.02
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# ---- one backward pass where nothing is differentiated twice ------------------------------------------------------------


def weighted(output, target):
    return F.cross_entropy(output, target, reduction="none") * torch.arange(1.0, len(target) + 1, dtype=output.dtype)


CRITERIA = [
    F.cross_entropy,
    nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), label_smoothing=0.1),
    nn.CrossEntropyLoss(ignore_index=1),
    nn.CrossEntropyLoss(reduction="sum"),
    weighted,
    F.nll_loss,  # not known to be a multiple of the mean: a backward pass of its own
]
FIRST_ORDER = [
    ParamGradPenalty(0.0),
    ParamGradPenalty(0.0, over=2),
    ParamGradPenalty(0.0, over="batch"),
    InputGradPenalty(0.0),
    InputGradPenalty(0.0, of="output"),
    ParamGradPenalty(0.7, over="batch", method="finite_difference"),
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: getattr(criterion, "__name__", str(criterion)))
@pytest.mark.parametrize("penalty", FIRST_ORDER, ids=lambda penalty: str(penalty.term))
def test_the_gradient_that_is_kept_is_that_of_the_data_loss(problem, criterion, penalty):
    model, x, y, _ = problem
    separate = type(penalty)(**{**settings_of(penalty), "criterion": criterion})
    as_one_trains = lambda: criterion(model(x), y).mean()  # noqa: E731
    out = PenalizedLoss(criterion, penalty)(model, x, y)
    expected = ref.flat_gradient(as_one_trains() + separate(model, x, y), model)
    assert ref.relative_error(ref.flat_gradient(out.loss, model), expected) < 1e-12
    ref.assert_close(out.data_loss, as_one_trains())
    ref.assert_close(
        out.penalties[penalty.name], type(penalty)(**{**settings_of(separate), "weight": 1.0})(model, x, y)
    )


def settings_of(penalty):
    return {**vars(penalty.term), "weight": penalty.weight, "criterion": penalty.criterion}


class CountedBackward(torch.autograd.Function):
    """The identity; counts how often a gradient comes back."""

    calls = 0

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        CountedBackward.calls += 1
        return gradient


class Counted(nn.Module):
    def forward(self, tensor):
        return CountedBackward.apply(tensor)


@pytest.mark.parametrize(
    ("penalties", "passes"),
    [
        ([ParamGradPenalty(0.0)], 1),
        ([ParamGradPenalty(0.0), InputGradPenalty(0.0)], 1),
        ([ParamGradPenalty(0.1, over="batch", method="finite_difference")], 2),  # one at θ, one at the displaced θ
    ],
)
def test_measuring_takes_no_backward_pass_of_its_own(problem, penalties, passes):
    model = nn.Sequential(problem.model, Counted())
    objective = PenalizedLoss(F.cross_entropy, *penalties)
    for _ in range(3):  # how the model lays out its batch is found out, and looked at again after 1 and 2 uses
        objective(model, problem.x, problem.y)
    CountedBackward.calls = 0
    objective(model, problem.x, problem.y).loss.backward()
    assert CountedBackward.calls == passes


def test_what_is_only_measured_has_no_graph(problem):
    model, x, y, _ = problem
    out = PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.0), InputGradPenalty(0.0))(model, x, y)
    assert not any(value.requires_grad for value in out.penalties.values())
    mixed = PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.0), InputGradPenalty(0.1))(model, x, y)
    assert all(value.requires_grad for value in mixed.penalties.values())


def test_a_kept_gradient_does_not_pass_for_a_constant(problem):
    model, x, y, _ = problem
    out = PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.0))(model, x, y)
    (gradient,) = torch.autograd.grad(out.loss, model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_a_kept_gradient_is_handed_out_as_often_as_asked(problem):
    model, x, y, _ = problem
    once = ref.flat_gradient(F.cross_entropy(model(x), y), model)
    loss = PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.0))(model, x, y).loss
    model.zero_grad()
    for times in (1, 2):
        loss.backward(retain_graph=True)
        assert ref.relative_error(torch.cat([p.grad.flatten() for p in model.parameters()]), times * once) < 1e-12
        for parameter in model.parameters():  # as clipping does: what is kept must not feel it
            parameter.grad.mul_(1.0)
    (3 * loss).backward()
    assert ref.relative_error(torch.cat([p.grad.flatten() for p in model.parameters()]), 5 * once) < 1e-12


def test_the_gradient_behind_an_input_that_is_trained(problem):
    """x computed from something trainable: the backward pass goes on from it."""
    model, x, y, _ = problem
    scale = torch.ones((), dtype=x.dtype, requires_grad=True)
    out = PenalizedLoss(F.cross_entropy, ParamGradPenalty(0.0))(model, x * scale, y)
    (actual,) = torch.autograd.grad(out.loss, scale)
    (expected,) = torch.autograd.grad(F.cross_entropy(model(x * scale), y), scale)
    ref.assert_close(actual, expected)


class TiedHead(nn.Module):
    """From rows of a table, and a second input, to scores of every row of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.dense = nn.Linear(4, 4)

    def forward(self, rows, others):
        return F.linear(self.dense(rows).tanh() * others, self.table.weight)


@pytest.mark.parametrize("second", [torch.sin, torch.zeros_like], ids=["of_the_first", "of_nothing"])
@pytest.mark.parametrize(
    "penalty",
    [
        ParamGradPenalty(0.0, parameters="dense.*"),
        InputGradPenalty(0.0, method="finite_difference"),
        ParamGradPenalty(1e-14, over="batch", method="finite_difference", parameters="dense.*"),
    ],
    ids=["exact", "input_difference", "param_difference"],
)
def test_the_gradient_behind_inputs_that_the_model_knows_otherwise(penalty, second):
    """x computed from a parameter of the model, and from other parts of x: nothing is handed over twice."""
    torch.manual_seed(0)
    model = TiedHead().double()
    tokens, y = torch.randint(7, (5,)), torch.randint(7, (5,))
    rows = model.table(tokens)
    x = (rows, 1 + second(rows))
    expected = ref.flat_gradient(F.cross_entropy(model(*x), y), model)
    out = PenalizedLoss(F.cross_entropy, penalty)(model, x, y)
    assert ref.relative_error(ref.flat_gradient(out.loss, model), expected) < 1e-10


# ---- schedules and state --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["alone", "objective"])
def weighted(request, problem):
    """Calls a penalty, alone or within an objective, and returns weight × R in units of R."""
    model, x, y, _ = problem

    def call(penalty):
        r = norms_of(problem, penalty).mean()
        if request.param == "alone":
            return (penalty(model, x, y) / r).item()
        out = PenalizedLoss(F.cross_entropy, penalty)(model, x, y)
        return ((out.loss - out.data_loss) / r).item()

    return call


@pytest.mark.parametrize("kind", [InputGradPenalty, ParamGradPenalty])
def test_lazy_steps_carry_n_times_the_weight(problem, weighted, kind):
    penalty = kind(0.5, every_n_steps=3)
    factors = [weighted(penalty) for _ in range(7)]
    assert factors == pytest.approx([1.5, 0, 0, 1.5, 0, 0, 1.5])


def test_calls_in_eval_mode_are_always_computed_and_not_counted(problem, weighted):
    penalty = InputGradPenalty(0.5, every_n_steps=2)
    factors = []
    for training in (True, False, False, True, False, True):
        problem.model.train(training)
        factors.append(weighted(penalty))
    assert factors == pytest.approx([1.0, 0.5, 0.5, 0, 0.5, 1.0])


def test_a_skipped_step_runs_nothing_and_is_differentiable(problem):
    model, x, y, _ = problem
    model = Counting(model)
    penalty = ParamGradPenalty(every_n_steps=2)
    penalty(model, x, y)
    calls = model.calls
    zero = penalty(model, x, y)
    assert model.calls == calls
    assert zero.shape == () and zero.item() == 0
    (F.cross_entropy(model(x), y) + zero).backward()


def test_a_skipped_step_of_the_objective_is_the_data_loss(problem):
    model, x, y, _ = problem
    objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(every_n_steps=2))
    objective(model, x, y)
    out = objective(model, x, y)
    assert torch.equal(out.loss, out.data_loss)
    assert out.loss.requires_grad


def test_the_weight_may_follow_the_step(weighted):
    steps = []

    def weight(step):
        steps.append(step)
        return 0.1 * (step + 1)

    penalty = ParamGradPenalty(weight)
    assert [weighted(penalty) for _ in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert steps == [0, 1, 2, 3]


def test_a_schedule_and_lazy_steps_together(weighted):
    penalty = InputGradPenalty(lambda step: 1.0 if step < 3 else 10.0, every_n_steps=2)
    assert [weighted(penalty) for _ in range(5)] == pytest.approx([2, 0, 2, 0, 20])


@pytest.mark.parametrize("wrong", [-1.0, math.nan])
def test_a_schedule_that_returns_no_weight_is_refused(problem, wrong):
    with pytest.raises(ValueError, match="weight"):
        InputGradPenalty(lambda step: wrong)(problem.model, problem.x, problem.y)


@pytest.mark.parametrize("kind", [InputGradPenalty, ParamGradPenalty])
def test_the_step_counter_survives_a_resume(problem, weighted, kind):
    first, second = kind(every_n_steps=3), kind(every_n_steps=3)
    for _ in range(2):
        weighted(first)
    second.load_state_dict(first.state_dict())
    assert [weighted(second) for _ in range(3)] == pytest.approx([0, 3, 0])


def test_the_objective_carries_the_state_of_its_penalties(problem, tmp_path):
    model, x, y, _ = problem
    first, second = (PenalizedLoss(F.cross_entropy, InputGradPenalty(every_n_steps=2)) for _ in range(2))
    first(model, x, y)
    torch.save(first.state_dict(), tmp_path / "objective.pt")
    second.load_state_dict(torch.load(tmp_path / "objective.pt"))
    assert second(model, x, y).penalties["input"] == 0


def test_a_deep_copy_counts_for_itself(problem, weighted):
    penalty = InputGradPenalty(every_n_steps=2)
    weighted(penalty)
    twin = copy.deepcopy(penalty)
    assert weighted(twin) == 0
    assert weighted(penalty) == 0
    assert weighted(twin) == pytest.approx(2)


def test_penalties_have_no_parameters_and_print_their_settings():
    penalty = ParamGradPenalty(0.25, over=16, every_n_steps=4)
    assert list(penalty.parameters()) == []
    assert "0.25" in repr(penalty) and "16" in repr(penalty) and "every_n_steps=4" in repr(penalty)


def test_what_a_penalty_prints_makes_it_again():
    for penalty in (
        InputGradPenalty(0.1, target=1.0, one_sided=True, every_n_steps=2, name="lipschitz"),
        InputGradPenalty(of="output", method="projection", num_projections=3, squared=False),
        ParamGradPenalty(0.2, over=4, method="finite_difference", scheme="central", step=0.1, parameters=["*.weight"]),
    ):
        again = eval(repr(penalty))
        assert repr(again) == repr(penalty) and again.term == penalty.term
        assert getattr(again, "target", None) == getattr(penalty, "target", None)


@dataclass
class Power:
    """A criterion that has no hash."""

    exponent: int

    def __call__(self, output, target):
        return (output - target).pow(self.exponent).sum(1)


def test_a_dataclass_as_criterion(problem):
    model, x, y, _ = problem
    y, criterion = torch.rand_like(model(x)), Power(4)
    out = PenalizedLoss(criterion, InputGradPenalty(), InputGradPenalty(of=Power(2), name="of"))(model, x, y)
    row = lambda power: lambda output, target: (output - target).pow(power).sum()  # noqa: E731
    ref.assert_close(out.penalties["input"], ref.input_grad_sq_norm(model, x, y, row(4)).mean())
    ref.assert_close(out.penalties["of"], ref.input_grad_sq_norm(model, x, y, row(2)).mean())


def test_patterns_from_an_iterator_last(problem):
    model, x, y, _ = problem
    penalty = ParamGradPenalty(parameters=(pattern for pattern in ["*.weight"]))
    assert penalty(model, x, y) == penalty(model, x, y)


# ---- hands off ----------------------------------------------------------------------------------------------------------


def test_the_callers_tensors_are_left_alone(problem):
    model, x, y, _ = problem
    before = x.clone()
    PenalizedLoss(F.cross_entropy, InputGradPenalty(), ParamGradPenalty())(model, x, y).loss.backward()
    assert torch.equal(x, before) and not x.requires_grad and x.grad is None


def test_batch_norm_statistics_move_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    _, x, y, _ = cases.find("relu").problem()
    plain = copy.deepcopy(model)
    plain(x)
    for method in ("exact", "finite_difference"):
        trained = copy.deepcopy(model)
        PenalizedLoss(F.cross_entropy, ParamGradPenalty(over="batch", method=method))(trained, x, y)
        assert all(torch.equal(a, b) for a, b in zip(trained.buffers(), plain.buffers(), strict=True))


def test_a_reduction_of_ones_own_is_given_the_single_norms():
    class Largest(InputGradPenalty):
        def reduce(self, norms):
            return norms.sq_norms.max()

    model, x, y, criterion = cases.find("tanh").problem(5)
    found = PenalizedLoss(criterion, Largest(0.1))(model, x, y).penalties["input"]
    torch.testing.assert_close(found, input_grad_sq_norm(model, x, y, criterion=criterion).max())
