"""A penalty for a module that nobody edited is the penalty written by hand."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import signal
from typing import NamedTuple

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_cases import DATA, ByHand, Plain, fit, state
from torch import nn
from torch.utils.data import DataLoader

from gradpen import InputGradPenalty, ParamGradPenalty
from gradpen._graph import EDGES_KEEP_PYTHON_NODES
from gradpen.callbacks import GradPenaltyCallback

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

X, Y = (tensor[:6] for tensor in DATA.tensors)


def penalties(**options) -> GradPenaltyCallback:
    return GradPenaltyCallback(InputGradPenalty(0.1), ParamGradPenalty(0.01), **options)


class Smooth(lightning.LightningModule):
    """No dropout, plain SGD; `lr` 0 stands still."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Losses(lightning.Callback):
    """The loss of every micro-batch, as the trainer sees it, and what came with the last one."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.extra: dict = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        self.extra = {name: value for name, value in outputs.items() if name != "loss"}


def train(module, *callbacks, batches=None, max_epochs=1, **options) -> lightning.Trainer:
    """Fit on the given batches (default: one) in order."""
    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    trainer.fit(module, DataLoader(batches or [(X, Y)], batch_size=None))
    return trainer


def mixed(precision, scale=2.0**10) -> dict:
    """Autocast on the CPU; with float16 and a gradient scaler, which Lightning offers for CUDA only, by its plugin."""
    if precision == "bf16-mixed":
        return {"precision": precision}
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]}


def loss_of(module, batch):
    returned = module.training_step(batch, 0)
    return returned["loss"] if isinstance(returned, dict) else returned


def rows(batch, index):
    """Sample `index` of a batch as a batch of one, with an input that requires grad, and that input."""
    x = batch[0][index : index + 1]
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    return (x, *(item[index : index + 1] for item in batch[1:])), x


def looped_norms(module, batch) -> tuple[float, float]:
    """mean ‖∇_x f_i‖² and mean ‖∇_θ f_i‖², from training_step on one sample after the other."""
    input_total = param_total = 0.0
    for index in range(len(batch[0])):
        sample, x = rows(batch, index)
        loss = loss_of(module, sample)
        if x.requires_grad:
            input_total += float(torch.autograd.grad(loss, x, retain_graph=True)[0].square().sum())
        grads = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        param_total += sum(float(grad.square().sum()) for grad in grads if grad is not None)
    return input_total / len(batch[0]), param_total / len(batch[0])


# --- the same as by hand -------------------------------------------------------------------------------------------


class TensorLoss(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]


def with_lbfgs(module_class):
    class WithLBFGS(module_class):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)

        def on_train_start(self):
            self.net[2].p = 0.0  # a line search over changing masks minimises nothing

    return WithLBFGS


@pytest.mark.parametrize("module_class", [Plain, TensorLoss])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=["", "accumulate"]
)
def test_it_equals_the_penalty_by_hand_to_the_last_bit(module_class, options, tmp_path):
    by_hand = state(*fit(ByHand, [], tmp_path, **options))
    module, trainer = fit(module_class, [penalties()], tmp_path, **options)
    assert all(torch.equal(a, b) for a, b in zip(by_hand, state(module, trainer), strict=True))
    assert {"penalty/input", "penalty/param", "penalty/share_of_loss"} <= set(trainer.logged_metrics)
    assert "training_step" not in vars(module)


def test_it_equals_the_penalty_by_hand_with_an_optimiser_that_evaluates_the_loss_again(tmp_path):
    by_hand, _ = fit(with_lbfgs(ByHand), [], tmp_path, max_epochs=1)
    module, _ = fit(with_lbfgs(Plain), [penalties()], tmp_path, max_epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(by_hand.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_it_equals_the_penalty_by_hand_under_autocast(precision, tmp_path):
    fitted = [fit(c, k, tmp_path, max_epochs=1, **mixed(precision)) for c, k in ((ByHand, []), (Plain, [penalties()]))]
    assert all(torch.equal(a, b) for a, b in zip(*(state(*run) for run in fitted), strict=True))
    assert {parameter.dtype for parameter in fitted[0][0].parameters()} == {torch.float32}


@pytest.mark.parametrize("scale", [2.0**4, 2.0**12])
def test_the_loss_scale_does_not_reach_the_penalty(scale):
    module = Smooth(0.5)
    plain = Smooth(0.5)
    plain.load_state_dict(module.state_dict())
    logged = train(module, penalties(), **mixed("16-mixed", scale)).callback_metrics
    expected = train(plain, penalties()).callback_metrics
    for name in ("penalty/input", "penalty/param", "penalty/share_of_loss"):
        torch.testing.assert_close(logged[name], expected[name], rtol=0.02, atol=0)
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_micro_batches_equal_the_big_batch():
    big, small, small_batch_penalty = Smooth(0.5), Smooth(0.5), Smooth(0.5)
    for other in (small, small_batch_penalty):
        other.load_state_dict(big.state_dict())
    micro = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    train(big, penalties(), max_epochs=3)
    train(small, penalties(), batches=micro, accumulate_grad_batches=2, max_epochs=3)
    for a, b in zip(big.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_there_is_no_second_forward_pass():
    module, calls = Smooth(), []
    module.net.register_forward_hook(lambda *_: calls.append(1))
    train(module, penalties(), batches=[(X, Y)] * 3)
    assert len(calls) == 3


@pytest.mark.skipif(not EDGES_KEEP_PYTHON_NODES, reason="this torch cannot close the gate in front of the first layer")
def test_the_backward_pass_of_the_loss_computes_no_gradient_of_the_input_for_nobody():
    class Keeping(Smooth):
        def training_step(self, batch, batch_idx):
            self.fed = batch[0]
            return super().training_step(batch, batch_idx)

    module = Keeping()
    train(module, GradPenaltyCallback(InputGradPenalty(0.1)))
    assert module.fed.requires_grad and module.fed.grad is None
    assert all(parameter.grad.any() for parameter in module.parameters())


# --- what the loss is, and what a batch is ------------------------------------------------------------------------------


class Twice(Smooth):
    """One encoder for two views."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.net(x), self.net(0.5 * x + 1)
        return F.cross_entropy(first, y) + (first - second).square().sum(1).mean()


class Flipped(Smooth):
    """The second view holds the samples in another order."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y) + F.cross_entropy(self.net(x.flip(0)), y.flip(0))


class Embedding(Smooth):
    """Forward is for inference; the loss is that of a head behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self(batch[0]).tanh()), batch[1])


class TwoOutputs(Smooth):
    """The second output lies behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        h = self.net(x)
        return {"h": h, "logits": self.head(h)}

    def training_step(self, batch, batch_idx):
        output = self(batch[0])
        return F.cross_entropy(output["logits"], batch[1]) + output["h"].square().sum(1).mean()


class ScaledGradient(Smooth):
    """A hook of its own on what the first layer gives."""

    def training_step(self, batch, batch_idx):
        h = self.net[0](batch[0])
        h.register_hook(lambda gradient: 2 * gradient)
        return F.cross_entropy(self.net[1:](h), batch[1])


class Single(Smooth):
    def training_step(self, batch, batch_idx=0):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("mine", loss)
        return {"loss": loss, "extra": batch[1]}


@pytest.mark.parametrize(
    "module_class", [Smooth, Twice, Embedding, TwoOutputs, ScaledGradient, Single], ids=lambda c: c.__name__
)
def test_values_are_those_of_the_samples_one_by_one(module_class):
    module = module_class()
    module.log = lambda *_: None  # there is no trainer yet
    input_norm, param_norm = looped_norms(module, (X, Y))
    data_loss = loss_of(module, (X, Y)).item()
    del module.log
    losses = Losses()
    logged = train(module, penalties(), losses).callback_metrics
    torch.testing.assert_close(logged["penalty/input"].item(), input_norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(logged["penalty/param"].item(), param_norm, rtol=1e-5, atol=0)
    added = 0.1 * input_norm + 0.01 * param_norm
    assert losses.values == pytest.approx([data_loss + added], rel=1e-5)
    assert logged["penalty/share_of_loss"].item() == pytest.approx(added / (data_loss + added), rel=1e-5)
    assert ("mine" in logged) == (list(losses.extra) == ["extra"]) == (module_class is Single)


def test_rows_that_are_other_samples_are_refused():
    with pytest.raises(RuntimeError, match=r"picked by index|other samples"):
        train(Flipped(), penalties())


class TimeFirst(Smooth):
    """The model takes (time, B, features), as torch's recurrent networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(12, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]).mean(0), batch[1])


class TransposedInside(TimeFirst):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].transpose(0, 1), batch[1]), batch_idx)


@pytest.mark.parametrize("penalty", [InputGradPenalty(0.1), ParamGradPenalty(0.1)], ids=["input", "param"])
def test_an_input_whose_rows_are_times_is_refused(penalty):
    times = torch.stack([X, 2 * X, X + 1, X - 1])
    with pytest.raises(
        ValueError, match=r"shape \(4, 6, 12\), while all else in the batch has 6 rows: let the collate"
    ):
        train(TimeFirst(), GradPenaltyCallback(penalty), batches=[(times, Y)])
    train(TimeFirst(), GradPenaltyCallback(ParamGradPenalty(0.1, over="batch")), batches=[(times, Y)])
    module, batch = TransposedInside(), (times.transpose(0, 1), Y)
    expected, _ = looped_norms(module, batch)
    logged = train(module, GradPenaltyCallback(InputGradPenalty(0.1)), batches=[batch]).callback_metrics
    torch.testing.assert_close(logged["penalty/input"].item(), expected, rtol=1e-5, atol=0)


def test_a_single_sample_is_no_batch():
    with pytest.raises(
        ValueError, match=r"shape \(12,\), while all else in the batch is single numbers: let the data loader"
    ):
        train(Smooth(), GradPenaltyCallback(InputGradPenalty(0.1)), batches=[(X[0], Y[0])])
    assert train(Smooth(), penalties(), batches=[(X[:1], Y[:1])]).callback_metrics["penalty/input"] > 0


class Tokens(Smooth):
    """Integer inputs have no gradient; the parameters do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(20, 3))


TOKENS = (torch.arange(24).reshape(6, 4) % 7, Y)


def test_a_penalty_on_parameters_needs_no_float_input():
    module = Tokens()
    _, expected = looped_norms(module, TOKENS)
    logged = train(module, GradPenaltyCallback(ParamGradPenalty(0.1)), batches=[TOKENS]).callback_metrics
    torch.testing.assert_close(logged["penalty/param"].item(), expected, rtol=1e-5, atol=0)


class SumLoss(Smooth):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")


def test_a_sum_is_said_to_be_one():
    module, losses = SumLoss(), Losses()
    input_norm, param_norm = looped_norms(module, (X, Y))
    data_loss = loss_of(module, (X, Y)).item()
    train(module, penalties(reduction="sum"), losses)
    assert losses.values == pytest.approx([data_loss + 0.1 * input_norm + 0.01 * param_norm], rel=1e-5)


class IgnoresSome(Smooth):
    """Two labels a sample, of which some are left out of the mean."""

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])[:, :2]
        return F.binary_cross_entropy_with_logits(logits[batch[1] >= 0], batch[1][batch[1] >= 0])


def test_f_is_a_samples_share_of_an_uneven_mean():
    module = IgnoresSome()
    labels = torch.tensor([[0.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [0.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    expected = 0.0
    for index in range(6):
        (x, label), leaf = rows((X, labels), index)
        count = int((label >= 0).sum())
        share = module.training_step((x, label), 0) * count / int((labels >= 0).sum())
        expected += float(torch.autograd.grad(6 * share, leaf)[0].square().sum()) / 6
    callback = GradPenaltyCallback(InputGradPenalty(0.1), model="net")
    logged = train(module, callback, batches=[(X, labels)]).callback_metrics
    torch.testing.assert_close(logged["penalty/input"].item(), expected, rtol=1e-5, atol=0)


class WeightDecay(Smooth):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * self.net[0].weight.square().sum()


def test_a_term_of_the_loss_that_is_no_mean_over_samples():
    module = WeightDecay()
    expected, _ = looped_norms(module, (X, Y))
    logged = train(module, GradPenaltyCallback(InputGradPenalty(0.1))).callback_metrics
    torch.testing.assert_close(logged["penalty/input"].item(), expected, rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match=r"net\.0\.weight have no closed form"):
        train(WeightDecay(), penalties())


class OwnPenalty(Smooth):
    """Its loss has a gradient of its own, in which the weights are used once more."""

    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        loss = F.cross_entropy(self.net(x), batch[1])
        (gradient,) = torch.autograd.grad(loss * len(x), x, create_graph=True)
        return loss + 0.1 * gradient.square().sum(1).mean()


def test_a_loss_with_a_gradient_in_it():
    module = OwnPenalty()
    expected, _ = looped_norms(module, (X, Y))
    logged = train(module, GradPenaltyCallback(InputGradPenalty(0.1))).callback_metrics
    torch.testing.assert_close(logged["penalty/input"].item(), expected, rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match="have no closed form"):
        train(OwnPenalty(), GradPenaltyCallback(ParamGradPenalty(0.1)), batches=[(X.clone(), Y)])


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor

    def __getitem__(self, index):
        return (self.x, self.y)[index]


class Opaque:
    """A batch nobody can look into."""

    def __init__(self, x, y) -> None:
        self.items = (x, y)

    def __getitem__(self, index):
        return self.items[index]


class ByKey(Smooth):
    def training_step(self, batch, batch_idx):
        x, y = (batch["image"], batch["label"]) if "image" in batch else batch["left"]
        return F.cross_entropy(self.net(x), y)


@pytest.mark.parametrize(
    ("module_class", "batch", "inputs"),
    [
        (Smooth, [X, Y], None),
        (Smooth, Pair(X, Y), None),
        (Smooth, Sample(X, Y), lambda batch: batch.x),
        (Smooth, (X, Y, "names"), 0),
        (ByKey, {"image": X, "label": Y}, None),
        (ByKey, {"image": X, "label": Y, "features": X}, "image"),
        (ByKey, {"left": (X, Y), "right": (Y, Y)}, lambda batch: batch["left"][0]),
    ],
    ids=["list", "namedtuple", "dataclass", "triple", "dict", "key", "nested"],
)
def test_batches_of_all_kinds(module_class, batch, inputs):
    module = module_class()
    reference = Smooth()
    reference.load_state_dict(module.state_dict())
    input_norm, param_norm = looped_norms(reference, (X, Y))
    logged = train(module, penalties(inputs=inputs), batches=[batch]).callback_metrics
    torch.testing.assert_close(logged["penalty/input"].item(), input_norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(logged["penalty/param"].item(), param_norm, rtol=1e-5, atol=0)
    assert not X.requires_grad


def test_several_penalties_of_one_kind():
    module = Smooth()
    callback = GradPenaltyCallback(
        ParamGradPenalty(0.01),
        ParamGradPenalty(0.01, parameters=["net.*.weight"], name="weights"),
        ParamGradPenalty(0.01, parameters=["net.*.bias"], name="biases"),
        InputGradPenalty(0.1, of="output", name="jacobian"),
        ParamGradPenalty(0.01, over="batch", name="batch"),
        ParamGradPenalty(0.01, over=3, name="threes"),
    )
    logged = train(module, callback).callback_metrics
    both = logged["penalty/weights"] + logged["penalty/biases"]
    torch.testing.assert_close(logged["penalty/param"], both)
    jacobians = torch.autograd.functional.jacobian(lambda x: module.net(x).sum(0), X)
    torch.testing.assert_close(logged["penalty/jacobian"], jacobians.square().sum() / len(X))
    norms = []
    for part in (slice(0, 6), slice(0, 3), slice(3, 6)):
        grads = torch.autograd.grad(loss_of(module, (X[part], Y[part])), list(module.parameters()))
        norms.append(sum(grad.square().sum() for grad in grads))
    torch.testing.assert_close(logged["penalty/batch"], norms[0])
    torch.testing.assert_close(logged["penalty/threes"], (norms[1] + norms[2]) / 2)


# --- steps, schedules, resuming ----------------------------------------------------------------------------------------


class Schedule:
    """A weight that remembers the steps it was asked for."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, step: int) -> float:
        self.steps.append(step)
        return 0.1 * (step + 1)


def test_a_step_is_an_optimiser_step():
    schedule, losses = Schedule(), Losses()
    module = Smooth()
    input_norm, _ = looped_norms(module, (X, Y))
    data_loss = loss_of(module, (X, Y)).item()
    callback = GradPenaltyCallback(InputGradPenalty(schedule, every_n_steps=2))
    train(module, callback, losses, batches=[(X, Y)] * 8, accumulate_grad_batches=2)
    assert schedule.steps == [0, 0, 1, 1, 2, 2, 3, 3]
    factors = torch.tensor([0.1, 0.1, 0, 0, 0.3, 0.3, 0, 0]) * 2  # every second step, with twice the weight
    assert losses.values == pytest.approx((data_loss + factors * input_norm).tolist(), rel=1e-5)


def test_warm_up_is_linear_in_optimiser_steps():
    losses, module = Losses(), Smooth()
    input_norm, _ = looped_norms(module, (X, Y))
    data_loss = loss_of(module, (X, Y)).item()
    train(module, GradPenaltyCallback(InputGradPenalty(0.1), warmup_steps=4), losses, batches=[(X, Y)] * 6)
    ramp = torch.tensor([0.25, 0.5, 0.75, 1, 1, 1])
    assert losses.values == pytest.approx((data_loss + 0.1 * ramp * input_norm).tolist(), rel=1e-5)


def test_a_resumed_run_goes_on_with_the_schedule(tmp_path):
    unbroken, first, second = (Schedule() for _ in range(3))
    whole = fit(Plain, [GradPenaltyCallback(InputGradPenalty(unbroken))], tmp_path / "a")
    checkpoint = ModelCheckpoint(tmp_path / "b", save_last=True)
    fit(Plain, [GradPenaltyCallback(InputGradPenalty(first)), checkpoint], tmp_path / "b", max_epochs=1)
    fit(
        Plain,
        [GradPenaltyCallback(InputGradPenalty(second))],
        tmp_path / "c",
        ckpt_path=tmp_path / "b/last.ckpt",
    )
    assert first.steps + second.steps == unbroken.steps == list(range(whole[1].global_step))


# --- training_step is wrapped for the duration of fit alone -------------------------------------------------------------


class OnlyBatch(Smooth):
    def training_step(self, batch):
        return super().training_step(batch, None)


def passing_on(function):
    @functools.wraps(function)
    def wrapper(self, *args):
        return function(self, *args)

    return wrapper


class Decorated(Smooth):
    @passing_on
    def training_step(self, batch):
        return super().training_step(batch, None)


class DecoratedWithIndex(Smooth):
    @passing_on
    def training_step(self, batch, number):
        assert number == 0
        return super().training_step(batch, None)


@pytest.mark.parametrize("module_class", [OnlyBatch, Decorated, DecoratedWithIndex])
def test_the_signature_stays_what_it_was(module_class):
    train(module_class())
    logged = train(module_class(), penalties()).callback_metrics
    assert logged["penalty/input"] > 0


def test_fit_twice_and_a_step_that_belongs_to_the_instance():
    module, callback, calls = Smooth(), penalties(), []
    original = module.training_step

    def own_step(batch, batch_idx):
        calls.append(batch_idx)
        return original(batch, batch_idx)

    module.training_step = own_step
    trainer = train(module, callback, batches=[(X, Y)] * 2)
    assert module.training_step is own_step
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, DataLoader([(X, Y)] * 2, batch_size=None))
    assert module.training_step is own_step and calls == [0, 1] * 3
    del module.training_step
    train(module, callback)
    assert "training_step" not in vars(module)


class Noting(Smooth):
    """Notes whether somebody wants the gradient of its input."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.batch_size, self.noted = 8, []

    def training_step(self, batch, batch_idx):
        self.noted.append(batch[0].requires_grad)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(DATA, self.batch_size)


@pytest.mark.parametrize(
    "search",
    [
        LearningRateFinder(num_training_steps=4, attr_name="lr", update_attr=True),
        BatchSizeFinder(max_trials=1, steps_per_trial=2),
    ],
    ids=["learning rate", "batch size"],
)
def test_searches_before_training_see_the_loss_that_is_trained(search, tmp_path):
    """Their runs leave callbacks out; memory and learning rates are those of the penalised loss all the same."""
    module = Noting()
    trainer = lightning.Trainer(
        max_steps=2,
        callbacks=[penalties(), search],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module)
    assert len(module.noted) >= 4 and all(module.noted)
    assert "training_step" not in vars(module)


def test_a_step_that_is_wrapped_once_more_is_penalised_once():
    class Wrapping(Smooth):
        def setup(self, stage):
            inner = self.training_step

            @functools.wraps(inner)
            def outer(batch, batch_idx):
                self.calls += 1
                return inner(batch, batch_idx)

            self.calls, self.training_step = 0, outer

    module = Wrapping()
    input_norm, _ = looped_norms(module, (X, Y))
    data_loss, losses = loss_of(module, (X, Y)).item(), Losses()
    train(module, GradPenaltyCallback(InputGradPenalty(0.1)), losses)
    assert losses.values == pytest.approx([data_loss + 0.1 * input_norm], rel=1e-5)
    assert module.calls == 1 and vars(module)["training_step"].__name__ == "training_step"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_made_during_training_leaves_the_original_alone(how):
    class CopyingAndFitting(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                train(Smooth(), how(callback))

    module, callback = Noting(), penalties()
    train(module, callback, CopyingAndFitting(), batches=[(X, Y)] * 3)
    assert module.noted == [True] * 3


class Breaking(Smooth):
    def __init__(self, error) -> None:
        super().__init__(0.1)
        self.error, self.seen = error, []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.__dict__.get("training_step"))
        if batch_idx == 1:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("error", "raised"), [(RuntimeError("broken"), RuntimeError), (KeyboardInterrupt(), SystemExit)]
)
def test_training_step_is_put_back_after_an_error(error, raised):
    module, handler = Breaking(error), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(raised):
            train(module, penalties(), batches=[(X, Y)] * 3)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning lets nothing interrupt its shutdown
    assert len(module.seen) == 2 and all(module.seen)
    assert "training_step" not in vars(module)


# --- errors --------------------------------------------------------------------------------------------------------------


class Manual(Smooth):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Silent(Smooth):
    def training_step(self, batch, batch_idx):
        return None


class Detached(Smooth):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0].detach()), batch[1])


class Fetching(Smooth):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], None)


class CompiledPart(Smooth):
    def __init__(self) -> None:
        super().__init__()
        self.net.compile()


class Normalised(Smooth):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(10))


class InPlace(Smooth):
    def training_step(self, batch, batch_idx):
        batch[0].sub_(0.5)
        return super().training_step(batch, batch_idx)


class Vector(Smooth):
    def training_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Manual, "manual optimisation"),
        (Silent, "return the loss as a scalar tensor, .* got NoneType"),
        (Vector, r"got shape \(6,\)"),
        (Detached, "does not depend on the input"),
        (Fetching, "fetches it by itself"),
        (CompiledPart, "compiled with torch.compile: fit the original module"),
        (lambda: torch.compile(Smooth()), "compiled with torch.compile: fit the original module"),
        (Normalised, "layer 'net.1' .* mixes the samples"),
        (InPlace, "training_step, or the model, changes its input in place"),
    ],
    ids=["manual", "none", "vector", "detached", "fetching", "compiled part", "compiled", "batch norm", "in place"],
)
def test_modules_that_cannot_be_penalised(make, words):
    with pytest.raises(RuntimeError, match=words):
        train(make(), penalties())


class Both(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Autoencoder(Smooth):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 12))

    def training_step(self, batch, batch_idx):
        x, y = batch.values() if isinstance(batch, dict) else batch
        return F.mse_loss(self.net(x), y)


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ((X, Y, Y), ValueError, "got 3 items: give inputs="),
        (TOKENS, TypeError, "floating-point input .* got torch.int64: .* or use ParamGradPenalty"),
        (Opaque(X, Y), ValueError, "expected a batch .x, y. or a dict, got Opaque: give inputs="),
    ],
    ids=["triple", "integers", "opaque"],
)
def test_batches_without_an_input(batch, error, words):
    with pytest.raises(error, match=words):
        train(Smooth(), penalties(), batches=[batch])


@pytest.mark.parametrize("make", [lambda x: (x, x), lambda x: [x, x], lambda x: {"x": x, "y": x}, lambda x: Both(x, x)])
def test_a_target_that_is_the_input_itself_is_no_input(make):
    """An autoencoder: nothing leads to the target."""
    module = Autoencoder()
    train(module, penalties(), batches=[make(X)])
    logged = module.trainer.callback_metrics["penalty/input"]
    x = X.clone().requires_grad_()
    loss = F.mse_loss(module.net(x), X)
    (gradient,) = torch.autograd.grad(loss * len(X), x)
    torch.testing.assert_close(logged, gradient.square().sum(1).mean())


def test_a_validation_step_may_call_training_step(tmp_path):
    class Both(Smooth):
        def validation_step(self, batch, batch_idx):
            self.log("val", self.training_step(batch, batch_idx))

    module, trainer = fit(Both, [penalties()], tmp_path)
    loss = F.cross_entropy(module.net(DATA.tensors[0]), DATA.tensors[1])
    torch.testing.assert_close(trainer.callback_metrics["val"], loss.detach())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_module_that_is_trained_have_its_own_step(how):
    class Copying(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            step = pl_module.training_step
            self.copy = copy.deepcopy(pl_module) if how == "deepcopy" else pickle.loads(pickle.dumps(step)).__self__

    callback, module = Copying(), Smooth()
    train(module, callback, penalties())
    found = callback.copy
    assert found is not module
    found.lr = 0.1
    before = found.net[0].weight.detach().clone()
    train(found)
    assert not torch.equal(found.net[0].weight, before) and "penalty/input" not in found.trainer.callback_metrics


def test_a_batch_that_cannot_be_taken_apart():
    with pytest.raises(TypeError, match=r"tuples, lists, dicts and dataclasses, .* type Opaque"):
        train(Smooth(), penalties(inputs=0), batches=[Opaque(X, Y)])


def test_such_a_batch_has_a_size_all_the_same():
    module = Smooth()
    _, expected = looped_norms(module, (X, Y))
    callback = GradPenaltyCallback(ParamGradPenalty(0.1), inputs=0)
    logged = train(module, callback, batches=[Opaque(X, Y)]).callback_metrics
    torch.testing.assert_close(logged["penalty/param"].item(), expected, rtol=1e-5, atol=0)


def test_two_callbacks_are_one_too_many():
    callbacks = [GradPenaltyCallback(InputGradPenalty(0.1)), GradPenaltyCallback(ParamGradPenalty(0.1))]
    with pytest.raises(RuntimeError, match="expected one GradPenaltyCallback, got several"):
        train(Smooth(), *callbacks)


class StandInForFSDPStrategy(SingleDeviceStrategy):
    """Nothing is sharded here: it has the name that the check goes by."""


def test_a_strategy_that_shards_parameters_is_refused():
    with pytest.raises(RuntimeError, match="sharded parameters of StandInForFSDPStrategy: use strategy="):
        train(Smooth(), penalties(), strategy=StandInForFSDPStrategy())


@pytest.mark.parametrize("inputs", [None, "x"])
@pytest.mark.parametrize("penalty", [ParamGradPenalty(0.1), InputGradPenalty(0.1)], ids=["param", "input"])
def test_a_batch_without_rows_has_no_size(penalty, inputs):
    class FromNothing(Smooth):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(X), Y)

    callback = GradPenaltyCallback(penalty, inputs=inputs)
    with pytest.raises(TypeError, match=r"tensors of shape \(B, …\), got (dict|list): say where the input is"):
        train(FromNothing(), callback, batches=[{"x": torch.tensor(1.0)}])


def test_the_jacobian_is_that_of_one_output():
    with pytest.raises(RuntimeError, match="one call of the model in training_step, got 2"):
        train(Twice(), GradPenaltyCallback(InputGradPenalty(0.1, of="output")))


@pytest.mark.parametrize(
    ("penalty", "words"),
    [
        (
            ParamGradPenalty(1.0, over="batch", method="finite_difference"),
            "second forward pass: call PenalizedLoss in training_step",
        ),
        (InputGradPenalty(1.0, method="finite_difference"), 'or use method="exact"'),
        (
            InputGradPenalty(1.0, of=lambda output, target: output[:, 0]),
            "call PenalizedLoss in training_step, or use of=",
        ),
        (InputGradPenalty(1.0, criterion=F.cross_entropy), "leave criterion out"),
    ],
    ids=["param", "input", "callable", "criterion"],
)
def test_penalties_that_need_more_than_the_loss_are_refused(penalty, words):
    with pytest.raises(ValueError, match=words):
        GradPenaltyCallback(penalty)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ([], {}, ValueError, "at least one penalty"),
        ([nn.Linear(1, 1)], {}, TypeError, "objects, got Linear"),
        ([InputGradPenalty(), InputGradPenalty()], {}, ValueError, "'input' more than once"),
        ([InputGradPenalty()], {"reduction": "none"}, ValueError, "reduction must be one of"),
        ([InputGradPenalty()], {"warmup_steps": -1}, ValueError, "warmup_steps must be an int >= 0, got -1"),
    ],
)
def test_arguments_are_checked(arguments, options, error, words):
    with pytest.raises(error, match=words):
        GradPenaltyCallback(*arguments, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_on_a_gpu(precision, tmp_path):
    fitted = [
        fit(c, k, tmp_path, max_epochs=1, accelerator="gpu", devices=1, precision=precision)
        for c, k in ((ByHand, []), (Plain, [penalties()]))
    ]
    for a, b in zip(fitted[0][0].parameters(), fitted[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert fitted[1][1].callback_metrics["penalty/input"].isfinite()
