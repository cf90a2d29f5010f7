"""The metrics are means over all samples, however these came: in batches, processes, or Lightning's loops."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from pathlib import Path

import lightning
import matplotlib
import pytest
import references
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassStatScores
from torchmetrics.utilities.checks import check_forward_full_state_property

from gradpen.functional import param_grad_sq_norm
from gradpen.metrics import GeneralizationGap, GeometricComplexity, InequalityTightness, ParamGradSqNorm

matplotlib.use("Agg")

with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    X, Y = torch.randn(11, 4, dtype=torch.float64), torch.arange(11) % 3
BATCHES = [slice(0, 5), slice(5, 6), slice(6, 11)]


def cross_entropy(row, label):
    return F.cross_entropy(row, label)


def expected_tightness(norm="spectral"):
    sides = references.inequality(MODEL, X, Y, cross_entropy, norm)
    return sides["lhs"] / sides["rhs"]


METRICS = {
    "complexity": (GeometricComplexity, {}, lambda: references.output_jacobian_sq_norm(MODEL, X)),
    "param": (ParamGradSqNorm, {}, lambda: references.param_grad_sq_norm(MODEL, X, Y, cross_entropy)),
    "tightness": (InequalityTightness, {}, expected_tightness),
    "joint": (InequalityTightness, {"norm": "joint"}, lambda: expected_tightness("joint")),
    "squares": (
        ParamGradSqNorm,
        {"criterion": nn.MSELoss()},
        lambda: references.param_grad_sq_norm(MODEL, X, F.one_hot(Y, 3).double(), F.mse_loss),
    ),
}
IDS = pytest.mark.parametrize("name", METRICS)


def make(name: str) -> tuple[Metric, torch.Tensor, torch.Tensor]:
    """A float64 metric, its targets, and one expected value for each sample."""
    metric_class, options, expected = METRICS[name]
    targets = F.one_hot(Y, 3).double() if name == "squares" else Y
    return metric_class(**options).set_dtype(torch.float64), targets, expected().detach()


@IDS
def test_value_over_uneven_batches_is_the_mean_over_samples(name):
    metric, targets, expected = make(name)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan()
    for batch in BATCHES:
        value = metric(MODEL, X[batch], targets[batch])
        torch.testing.assert_close(value, expected[batch].mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(metric.compute(), expected.mean(), rtol=1e-6, atol=0)
    assert metric.num_samples == 11
    metric.reset()
    metric.update(MODEL, X[:5], targets[:5])
    torch.testing.assert_close(metric.compute(), expected[:5].mean(), rtol=1e-6, atol=0)


@IDS
def test_it_works_on_batches_made_in_inference_mode(name):
    metric, targets, expected = make(name)
    with torch.inference_mode():
        x, y = X.clone(), targets.clone()
        assert x.is_inference()
        value = metric(MODEL, x, y)
    torch.testing.assert_close(value.clone(), expected.mean(), rtol=1e-6, atol=0)


@IDS
def test_states_merge_pickle_and_persist(name):
    first, targets, expected = make(name)
    second = first.clone()
    first.update(MODEL, X[:5], targets[:5])
    second.update(MODEL, X[5:], targets[5:])
    first = pickle.loads(pickle.dumps(first))
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), expected.mean(), rtol=1e-6, atol=0)
    assert not first.state_dict()
    first.persistent(True)
    third, _, _ = make(name)
    third.persistent(True)
    third.load_state_dict(first.state_dict())
    third._update_count = 1
    assert torch.equal(third.compute(), first.compute())


@IDS
@pytest.mark.filterwarnings("ignore:std")
def test_its_states_need_no_full_update(name, capsys):
    metric_class, options, _ = METRICS[name]
    _, targets, _ = make(name)
    check_forward_full_state_property(
        metric_class,
        init_args=options,
        input_args={"model": MODEL, "x": X, "y": targets},
        num_update_to_compare=[2],
        reps=1,
    )
    assert "Full state for 2 steps took" in capsys.readouterr().out  # printed if both ways agree
    assert metric_class.full_state_update is False and metric_class.is_differentiable is False
    assert metric_class.higher_is_better is None


@IDS
@pytest.mark.cpu
def test_it_plots(name):
    metric, targets, _ = make(name)
    values = [metric(MODEL, X[batch], targets[batch]) for batch in BATCHES]
    for shown in (None, values):
        figure, axes = metric.plot(shown)
        assert axes.get_figure() is figure
    lower, upper = axes.get_ylim()
    assert lower <= 0 and (upper >= 1 if isinstance(metric, InequalityTightness) else True)
    matplotlib.pyplot.close("all")


def test_states_move():
    metric = GeometricComplexity()
    metric.update(MODEL, X)
    assert metric.compute().dtype == torch.float32
    assert metric.set_dtype(torch.float64).compute().dtype == torch.float64
    assert metric.to("meta").device.type == "meta"


def test_undefined_samples_are_left_out_and_an_unknown_norm_is_refused():
    dead = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1, bias=False)).double()
    dead[0].bias.data.zero_()
    metric = InequalityTightness(criterion=lambda output, target: output[:, 0])
    x = torch.cat([X[:4], torch.zeros(2, 4)])  # at 0 nothing is active, so both sides are 0
    metric.update(dead, x, x)
    assert metric.num_samples == 4 and 0 < metric.compute() <= 1
    with pytest.raises(ValueError, match="norm must be one of"):
        InequalityTightness(norm="nuclear")


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Identity])
@pytest.mark.parametrize("metric", [GeometricComplexity(), ParamGradSqNorm()])
def test_a_sample_that_is_not_a_number_is_not_left_out(metric, activation):
    x = X.clone()
    x[0] = math.nan
    metric.reset()
    metric.update(nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)).double(), x, Y)
    assert metric.num_samples == len(X) and metric.compute().isnan()


@pytest.mark.cpu
def test_attention_by_a_kernel_of_the_models_own_choice():
    class Flash(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                q = self.query(x)[:, None, None, :].expand(-1, 1, 5, 4)
                return self.head(F.scaled_dot_product_attention(q, q, q)[:, 0, 0])

    model = Flash().double()
    collection = MetricCollection([GeometricComplexity(), ParamGradSqNorm()])
    collection.update(model, X, Y)
    assert all(value > 0 for value in collection.compute().values())


@IDS
@pytest.mark.parametrize(
    "compiled", [lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m]
)
def test_a_compiled_module_is_run_eagerly(name, compiled):
    metric, targets, expected = make(name)
    args = (X,) if name == "complexity" else (X, targets)
    metric.update(compiled(copy.deepcopy(MODEL)), *args)
    references.assert_close(metric.compute(), expected.mean(), 1e-9)


def test_the_model_is_left_without_a_trace():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    state, rng = [parameter.clone() for parameter in model.parameters()], torch.get_rng_state()
    collection = MetricCollection([GeometricComplexity(), ParamGradSqNorm(), InequalityTightness()])
    collection.update(model, X, Y)
    assert torch.equal(torch.get_rng_state(), rng) and model.training
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(state, model.parameters(), strict=True))


def test_one_call_serves_a_collection():
    collection = MetricCollection({name: make(name)[0] for name in ("complexity", "param", "tightness", "joint")})
    for batch in BATCHES:
        collection.update(MODEL, X[batch], y=Y[batch])
    for name, value in collection.compute().items():
        torch.testing.assert_close(value, make(name)[2].mean(), rtol=1e-6, atol=0)


def test_metrics_that_agree_on_the_first_batch_are_not_taken_for_one():
    flat = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    nn.init.zeros_(flat[2].weight)  # no input gradient: complexity and tightness are both 0
    collection = MetricCollection([GeometricComplexity(), InequalityTightness()]).set_dtype(torch.float64)
    collection.update(flat, X, Y)
    collection.update(MODEL, X, Y)
    values = collection.compute()
    torch.testing.assert_close(values["GeometricComplexity"], make("complexity")[2].mean() / 2)
    torch.testing.assert_close(values["InequalityTightness"], expected_tightness().mean() / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["norms", "criteria"])
def test_metrics_of_one_class_that_agree_on_the_first_batch_are_not_taken_for_one(kind):
    first, makes = nn.Linear(4, 3).double(), {"spectral": InequalityTightness}
    if kind == "norms":
        nn.init.zeros_(first.weight)  # no input gradient: they are all 0
        makes |= {norm: lambda norm=norm: InequalityTightness(norm=norm) for norm in ("joint", "frobenius")}
    else:
        weights = torch.tensor([1.0, 1.0, 5.0], dtype=torch.float64)
        makes = {"plain": ParamGradSqNorm, "weighted": lambda: ParamGradSqNorm(nn.CrossEntropyLoss(weights))}
    collection = MetricCollection({name: make_one() for name, make_one in makes.items()})
    alone = {name: make_one() for name, make_one in makes.items()}
    for model, y in ((first, Y % 2), (MODEL, Y)):
        collection.update(model, X, y)
        for metric in alone.values():
            metric.update(model, X, y)
    values = {name: metric.compute() for name, metric in alone.items()}
    assert len({float(value) for value in values.values()}) == len(values)
    for name, value in collection.compute().items():
        torch.testing.assert_close(value, values[name])
    metric.persistent(True)
    assert len(metric.state_dict()) - len(metric.criterion.state_dict() if kind == "criteria" else {}) == 2


# --- the gap between two splits -----------------------------------------------------------------------------------------

TRAIN = (torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 1, 1]))
HELD_OUT = (torch.tensor([0, 1, 1, 2]), torch.tensor([2, 0, 1, 1]))


def accuracy_gap() -> GeneralizationGap:
    return GeneralizationGap(MulticlassAccuracy(num_classes=3, average="micro"))


def see(gap: GeneralizationGap) -> GeneralizationGap:
    for half in (slice(0, 1), slice(1, 4)):
        gap.update(*(tensor[half] for tensor in TRAIN), split="train")
        gap.update(*(tensor[half] for tensor in HELD_OUT), split="held_out")
    return gap


def test_the_gap_is_the_difference_of_two_values_over_all_batches():
    gap = see(accuracy_gap())
    assert gap.compute() == 0.75 - 0.25
    gap.update(torch.tensor([1, 1, 1, 1]), torch.tensor([0, 0, 0, 0]), split="train")
    assert gap.compute() == 0.375 - 0.25
    gap.reset()
    assert gap.compute().isnan() and see(gap).compute() == 0.5


def test_the_gap_needs_both_splits():
    gap = GeneralizationGap(BinaryAUROC())  # cannot be computed without data
    assert gap.compute().isnan()
    gap.update(torch.tensor([0.2, 0.8]), torch.tensor([0, 1]), split="train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gap.compute().isnan()
    gap.update(torch.tensor([0.2, 0.8]), torch.tensor([1, 0]), split="held_out")
    assert gap.compute() == 1


def test_forward_accumulates_and_compares_the_latest_batches():
    gap = accuracy_gap()
    assert gap(*HELD_OUT, split="held_out").isnan()
    assert gap(*TRAIN, split="train") == 0.75 - 0.25
    assert gap(torch.tensor([0]), torch.tensor([0]), split="train") == 1 - 0.25
    torch.testing.assert_close(gap.compute(), torch.tensor(0.8 - 0.25))
    gap.reset()
    assert gap(*TRAIN, split="train").isnan()


def test_the_gap_merges_pickles_and_persists():
    first, second = see(accuracy_gap()), see(accuracy_gap())
    second.update(torch.tensor([1, 1, 1, 1]), torch.tensor([0, 0, 0, 0]), split="train")
    empty = accuracy_gap()
    for part in (first, second):
        empty.merge_state(pickle.loads(pickle.dumps(part)))
    empty.train_metric._update_count = empty.held_out_metric._update_count = 4
    torch.testing.assert_close(empty.compute(), torch.tensor(6 / 12 - 0.25))
    with pytest.raises(TypeError, match="expected a GeneralizationGap to merge, got dict"):
        empty.merge_state({})
    assert not first.state_dict()
    first.persistent(True)
    assert {key.split(".")[0] for key in first.state_dict()} == {"train_metric", "held_out_metric", "seen"}
    copy = accuracy_gap()
    copy.persistent(True)
    copy.load_state_dict(first.state_dict())
    assert torch.equal(copy.compute(), first.compute()) and not copy.compute().isnan()


@pytest.mark.parametrize("named", [True, False])
def test_the_gap_takes_what_the_metric_takes(named):
    gap = GeneralizationGap(ParamGradSqNorm().set_dtype(torch.float64))
    for split, rows in (("train", slice(0, 4)), ("held_out", slice(4, 9))):
        batch = (MODEL, X[rows], Y[rows])
        if named:
            gap.update(model=batch[0], x=batch[1], y=batch[2], split=split, other=None)
        else:
            gap.update(*batch, split)
    expected = [param_grad_sq_norm(MODEL, X[rows], Y[rows]).mean() for rows in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(gap.compute(), (expected[0] - expected[1]).detach())
    with pytest.raises(TypeError, match="expected split= to be one of 'train', 'held_out', got none"):
        gap.update(*batch)


@pytest.mark.parametrize("kind", [ParamGradSqNorm, InequalityTightness])
def test_the_criterion_keeps_its_type(kind):
    metric = kind(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))).set_dtype(torch.float64)
    metric.update(nn.Linear(4, 3), X.float(), Y)
    assert metric.compute().dtype == torch.float64 and metric.criterion.weight.dtype == torch.float32


def test_the_gaps_states_move():
    gap = GeneralizationGap(MeanSquaredError())
    gap.set_dtype(torch.float64)
    for split in ("train", "held_out"):
        gap.update(X[:, 0], X[:, 1], split=split)
    assert gap.compute().dtype == torch.float64
    assert gap.to("meta").train_metric.sum_squared_error.device.type == "meta"


def test_smaller_gaps_are_better_whichever_way_the_metric_goes():
    assert accuracy_gap().higher_is_better is False  # 0.9 in training, 0.7 held out: 0.2 should shrink
    assert GeneralizationGap(MeanSquaredError()).higher_is_better is True  # 0.1 and 0.3: −0.2 should rise
    assert GeneralizationGap(ParamGradSqNorm()).higher_is_better is None


def test_gaps_of_several_metrics_in_a_collection():
    collection = MetricCollection({"a": accuracy_gap(), "b": GeneralizationGap(MeanSquaredError())})
    for _ in range(2):
        collection.update(*TRAIN, split="train")
        collection.update(*HELD_OUT, split="held_out")
    values = collection.compute()
    assert values["a"] == 0.5 and values["b"] == 0.25 - (4 + 1 + 1) / 4
    figure, _ = collection["a"].plot()
    assert figure is not None
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("metric", [GeometricComplexity, ParamGradSqNorm, InequalityTightness])
def test_the_model_comes_first(metric):
    with pytest.raises(TypeError, match=r"nn\.Module as model, got Tensor: .*\(model, x, y\)"):
        metric().update(X, MODEL, Y)


def test_errors_of_the_gap():
    with pytest.raises(TypeError, match="expected a torchmetrics Metric, got function"):
        GeneralizationGap(F.mse_loss)
    with pytest.raises(ValueError, match="split must be one of 'train', 'held_out', got 'val'"):
        accuracy_gap().update(*TRAIN, split="val")
    with pytest.raises(TypeError, match="one GeneralizationGap for each of the values"):
        see(GeneralizationGap(OfTwo())).compute()


class OfTwo(MulticlassAccuracy):
    """A metric with a dict for a value."""

    def __init__(self) -> None:
        super().__init__(num_classes=3)

    def compute(self):
        return {"accuracy": super().compute()}


def test_a_metric_with_several_entries():
    gap = see(GeneralizationGap(MulticlassStatScores(num_classes=3, average=None)))
    assert gap.compute().shape == (3, 5)


# --- in Lightning -------------------------------------------------------------------------------------------------------


PAGE = Path(__file__).parent.parent / "docs" / "reference" / "metrics.md"


def module_of_the_documentation() -> lightning.LightningModule:
    """What the page shows, with a network of this test's size that stands still, and a value for every step."""
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    namespace: dict[str, type] = {}
    exec(compile(block, str(PAGE), "exec"), namespace)

    class Watched(namespace["Classifier"]):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
            self.in_training = ParamGradSqNorm()

        def training_step(self, batch, batch_idx):
            self.in_training(self.net, *batch)
            self.log("in_training", self.in_training, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    return Watched()


@pytest.mark.cpu
def test_lightning_logs_the_metric_objects():
    module, x = module_of_the_documentation(), X.float()
    halves = [DataLoader(TensorDataset(x[part], Y[part]), 3) for part in (slice(0, 6), slice(6, 11))]
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, *halves)
    logged = trainer.callback_metrics
    accuracies = [
        MulticlassAccuracy(num_classes=3)(module.net(x[part]), Y[part]) for part in (slice(0, 6), slice(6, 11))
    ]
    torch.testing.assert_close(logged["gap"], accuracies[0] - accuracies[1])
    held_out = module.net, x[6:], Y[6:]
    torch.testing.assert_close(
        logged["GeometricComplexity"], references.output_jacobian_sq_norm(*held_out[:2]).mean().detach()
    )
    expected = references.param_grad_sq_norm(*held_out, cross_entropy).mean().detach()
    torch.testing.assert_close(logged["ParamGradSqNorm"], expected.float())
    seen = references.param_grad_sq_norm(module.net, x[:6], Y[:6], cross_entropy).detach().float()
    torch.testing.assert_close(logged["in_training_epoch"], seen.mean())
    torch.testing.assert_close(logged["in_training_step"], seen[3:].mean())
    sides = references.inequality(*held_out, cross_entropy)
    torch.testing.assert_close(
        logged["InequalityTightness"], (sides["lhs"] / sides["rhs"]).mean().float(), rtol=1e-4, atol=0
    )
