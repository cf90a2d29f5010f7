"""Which samples a monitor looks at, and what it makes of a batch."""

from __future__ import annotations

import logging
import random

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper
from lightning_cases import DATA, Plain
from monitor_cases import Noting, Snapshots, Stream, probe_rows, run, steps
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from gradpen import evaluate_inequality
from gradpen.callbacks import InequalityMonitor
from gradpen.callbacks._batch import find_criterion, find_model
from gradpen.callbacks._probe import draw_probe

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]


class Augmented(Dataset):
    """Noise from three random streams in every sample."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        noise = torch.rand(12) + np.random.rand() + random.random()
        return DATA[index][0] + noise, DATA[index][1]


def test_the_probe_is_the_same_whatever_the_random_streams_say():
    loader = DataLoader(Augmented(), 4, shuffle=True)
    states = []
    drawn = []
    for seed in (0, 1):
        lightning.seed_everything(seed, verbose=False)
        before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
        drawn.append(draw_probe(loader, 10, seed=3))
        assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()) == before
        states.append(before)
    assert states[0] != states[1]
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], draw_probe(loader, 10, seed=4)[0])
    assert len(draw_probe(loader, 100, seed=3)[0]) == 40


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream(), 4), "over Stream: reading from it would move its position.*probe="),
        (DataLoader(DATA, batch_size=None), "batch_size=None"),
        ([DATA[:4]], "got list"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(loader, message):
    with pytest.raises(ValueError, match=message):
        draw_probe(loader, 4, seed=0)


def test_an_endless_training_stream_needs_no_length(tmp_path):
    """Neither to find the probe nor to announce the cost."""
    found = InequalityMonitor(every_n_steps=2, num_samples=8)
    run(Plain(), [found], tmp_path, train=DataLoader(Stream(), 16), max_epochs=1)
    assert steps(found) == [0, 2, 4, 6]


def test_an_endless_training_stream_may_end_by_steps(tmp_path, caplog):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from DATA

    found = InequalityMonitor(every_n_epochs=1, every_n_steps=4, probe=DATA[:8])
    with caplog.at_level(logging.INFO):
        run(Plain(), [found], tmp_path, train=DataLoader(Endless(), 16), max_epochs=-1, max_steps=10)
    assert steps(found) == [0, 4, 8, 10] and "4 in 10 steps" in caplog.text


def shared_out(sampler):
    """What Lightning puts in the place of a sampler of the validation set under DDP."""
    return UnrepeatedDistributedSamplerWrapper(sampler, num_replicas=2, rank=0)


@pytest.mark.parametrize("kind", ["sampler", "batch sampler"])
def test_the_probe_is_drawn_from_what_the_sampler_is_made_for(kind, tmp_path):
    """One data set for both sets, told apart by samplers."""
    rows = DATA.tensors[0].clone()
    rows[:48] = 7
    data, held_out = TensorDataset(rows, DATA.tensors[1]), SubsetRandomSampler(range(48, 96))
    options = {"sampler": held_out, "batch_size": 16} if kind == "sampler" else {}
    options = options or {"batch_sampler": BatchSampler(held_out, 16, drop_last=False)}
    found = InequalityMonitor(num_samples=32)
    train = DataLoader(data, 16, sampler=SubsetRandomSampler(range(48)))
    run(Plain(), [found], tmp_path, train=train, val=DataLoader(data, **options))
    assert not (found._drawn[0] == 7).all(1).any() and len(found._drawn[0]) == 32
    assert not (draw_probe(train, 32, seed=0)[0] != 7).any()


@pytest.mark.parametrize("made", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
@pytest.mark.parametrize("wrap", [lambda sampler: sampler, shared_out], ids=["as it is", "shared out"])
def test_indices_of_a_sampler_come_as_anything(made, wrap):
    sampler = wrap(SubsetRandomSampler(made([5, 7, 9])))
    x, _ = draw_probe(DataLoader(DATA, 2, sampler=sampler), 8, seed=0)
    assert torch.equal(x, DATA.tensors[0][[5, 7, 9]])


def test_data_without_numbered_items_is_refused():
    class Named(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, name):
            return DATA[{"a": 0}[name]]

    with pytest.raises(
        ValueError, match=r"items have the numbers 0, 1, 2.*got KeyError: 0 for item 0 of Named.*probe="
    ):
        draw_probe(DataLoader(Named(), 2), 4, seed=0)


def test_an_empty_validation_set_is_none(tmp_path, caplog):
    found = InequalityMonitor(num_samples=8)
    empty = DataLoader(TensorDataset(*[tensor[:0] for tensor in DATA.tensors]), 16)
    with caplog.at_level(logging.INFO):
        run(Plain(), [found], tmp_path, val=empty)
    assert steps(found) == [0, 12] and "of the training set" in caplog.text


class OfPairs(Plain):
    """A step gets a batch of each of two loaders."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


def test_of_several_training_loaders_the_probe_is_of_each(tmp_path):
    loaders = {"a": DataLoader(DATA, 16), "b": DataLoader(DATA, 4)}
    found = InequalityMonitor(num_samples=8, inputs=lambda b: b["a"][0], targets=lambda b: b["a"][1])
    run(OfPairs(), [found], tmp_path, train=loaders, val=[])
    assert torch.equal(found._drawn[0], DATA[probe_rows(8)][0])


class Augmenting(Plain):
    """Samples are changed while the trainer trains."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] + 3 * (self.trainer.training or self.training), batch[1])


def test_samples_of_the_validation_set_go_through_hooks_as_in_validation(tmp_path):
    for probe, added in (("val", 0), ("train", 3)):
        module, found = Augmenting(), InequalityMonitor(num_samples=8, probe=probe)
        run(module, [found], tmp_path / probe)
        assert torch.equal(found._drawn[0], DATA[probe_rows(8)][0] + added)


class OwnLoaders(Noting):
    """Makes its loaders itself, and draws a random number at it."""

    def train_dataloader(self):
        return {"first": DataLoader(DATA, 16, shuffle=True), "second": [DataLoader(DATA, 16)]}

    def val_dataloader(self):
        return [DataLoader(TensorDataset(DATA.tensors[0] + torch.rand(1), DATA.tensors[1]), 16)]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["first"], batch_idx)


def test_the_probe_is_of_the_validation_set_also_before_the_trainer_asks_for_it(tmp_path, caplog):
    """The loaders that a monitor looks at are not those of the run, whose own are made at the same moment as ever."""
    found, ends = InequalityMonitor(num_samples=8), []
    for callbacks in ([], [found]):
        lightning.seed_everything(0, verbose=False)
        module = OwnLoaders()
        trainer = lightning.Trainer(
            max_epochs=2, callbacks=callbacks, check_val_every_n_epoch=2, num_sanity_val_steps=0, accelerator="cpu",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with caplog.at_level(logging.INFO):
            trainer.fit(module)
        ends.append([module.seen, torch.get_rng_state().tolist(), [p.tolist() for p in module.parameters()]])
    assert ends[0] == ends[1]
    assert "8 samples, of the validation set, seed 0" in caplog.text


def test_the_training_set_can_be_asked_for(tmp_path, caplog):
    other = TensorDataset(DATA.tensors[0] + 100, DATA.tensors[1])
    found, weights = InequalityMonitor(num_samples=8, probe="train"), Snapshots()
    with caplog.at_level(logging.INFO):
        module = Plain()
        run(module, [found, weights], tmp_path, val=DataLoader(other, 16))
    assert "of the training set" in caplog.text
    report = evaluate_inequality(module.net.eval(), *DATA[probe_rows(8)])
    torch.testing.assert_close(found.report.lhs, report.lhs)


class OfDicts(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["image"], batch["label"]), batch_idx)

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("probe", ["val", "given", "pair"])
def test_batches_that_are_dicts(probe, tmp_path):
    items = [{"image": x, "label": y, "weight": 1.0} for x, y in DATA]
    chosen = DATA[probe_rows(8)]
    given = {"val": "val", "given": {"image": chosen[0], "label": chosen[1]}, "pair": chosen}[probe]
    found, module = InequalityMonitor(num_samples=8, probe=given), OfDicts()
    run(module, [found], tmp_path, train=DataLoader(items, 16), val=DataLoader(items, 16), max_epochs=1)
    torch.testing.assert_close(found.report.lhs, evaluate_inequality(module.net.eval(), *chosen).lhs)


class OfTriples(lightning.LightningModule):
    """Nothing that the monitor could find by itself; the batch takes its form in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.objective = nn.CrossEntropyLoss(label_smoothing=0.1)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {"sample": (batch[0] * 2, batch[1]), "rest": 0}

    def training_step(self, batch, batch_idx):
        x, y = batch["sample"]
        return self.objective(self.head(self.body(x)), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


def test_what_cannot_be_found_can_be_said(tmp_path):
    module = OfTriples()
    with pytest.raises(ValueError, match="give inputs="):
        run(module, [InequalityMonitor(num_samples=8)], tmp_path)
    found = InequalityMonitor(
        num_samples=8,
        inputs=lambda batch: batch["sample"][0],
        targets=lambda batch: batch["sample"][1],
        model=lambda module: nn.Sequential(module.body, module.head),
        criterion="objective",
    )
    run(module, [found], tmp_path)
    x, y = DATA[probe_rows(8)]
    report = evaluate_inequality(nn.Sequential(module.body, module.head), x * 2, y, criterion=module.objective)
    torch.testing.assert_close(found.report.lhs, report.lhs)


class OfImages(Plain):
    """What is flattened in its step."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].flatten(1), batch[1]), batch_idx)


def test_an_error_in_a_check_comes_with_what_was_tried(tmp_path, caplog):
    data = TensorDataset(DATA.tensors[0].unflatten(1, (3, 4)), DATA.tensors[1])
    options = {"train": DataLoader(data, 16), "limit_val_batches": 0}
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(OfImages(), [InequalityMonitor(num_samples=8)], tmp_path, **options)
    assert "called net (Sequential) with an input of shape (8, 3, 4)" in caplog.text and "inputs=" in caplog.text
    found = InequalityMonitor(num_samples=8, inputs=lambda batch: batch[0].flatten(1))
    run(OfImages(), [found], tmp_path, **options)
    assert steps(found) == [0, 12]


class OfBatches(Plain):
    """A method that is called as a criterion is, and takes a batch."""

    def loss_fn(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (
            OfBatches,
            {},
            r"expected OfBatches.loss_fn to be a criterion .* got OfBatches.loss_fn\(batch\).* with criterion=",
        ),
        (Plain, {"criterion": "objective"}, "expected criterion='objective' to name an attribute of Plain, got none"),
        (Plain, {"model": "net.7"}, "expected model='net.7' to name a part of Plain"),
    ],
)
def test_what_is_no_criterion_and_no_part_is_refused(make, options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(make(), [InequalityMonitor(num_samples=8, **options)], tmp_path)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8])
def test_classes_may_be_integers_of_any_type(kind, tmp_path):
    class Converting(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], batch[1].long()), batch_idx)

    found, given = (
        InequalityMonitor(num_samples=8),
        InequalityMonitor(num_samples=8, probe=DATA[probe_rows(8)], prefix="as long"),
    )
    train = DataLoader(TensorDataset(DATA.tensors[0], DATA.tensors[1].to(kind)), 16)
    run(Converting(), [found, given], tmp_path, train=train, limit_val_batches=0)
    assert found.history == given.history


class OfTwoClasses(Plain):
    """One output, the logit of the second class."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1))

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self.net(batch[0])[:, 0], (batch[1] > 0).float())


def test_integers_that_are_no_classes_need_a_criterion(tmp_path):
    with pytest.raises(
        ValueError, match=r"cross entropy was chosen, and it says: Target \d is out of bounds.*criterion="
    ):
        run(OfTwoClasses(), [InequalityMonitor(num_samples=8)], tmp_path, limit_val_batches=0)


class Regression(Plain):
    """One output, which is squeezed before it is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0])[:, 0], batch[1])


def test_the_squared_error_of_one_output_is_that_of_its_own_target(tmp_path):
    data = TensorDataset(DATA.tensors[0], DATA.tensors[0].sum(1))
    found, given = (
        InequalityMonitor(every_n_steps=4, num_samples=8, criterion=criterion, prefix=str(index))
        for index, criterion in enumerate((None, lambda output, target: (output[:, 0] - target).square()))
    )
    run(Regression(), [found, given], tmp_path, train=DataLoader(data, 16), limit_val_batches=0)
    assert found.history == given.history


@pytest.mark.parametrize(("outputs", "targets"), [((1,), ()), ((), (1,)), ((2, 1), (2,)), ((2,), (2,))])
def test_a_squared_error_is_that_of_torch_but_for_dimensions_of_size_1(outputs, targets):
    output, target = torch.randn(6, *outputs), torch.randn(6, *targets)
    found, _ = find_criterion(nn.Identity(), None, target)
    expected = (output.reshape(6, -1) - target.reshape(6, -1)).square()
    torch.testing.assert_close(found(output, target, reduction="none").reshape(6, -1), expected)
    torch.testing.assert_close(found(output, target), expected.mean())


class Inside(Plain):
    """The network lies within a module that cannot be called."""

    def __init__(self, holder: nn.Module) -> None:
        super().__init__()
        del self.net
        self.held = holder

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(find_model(self, None)(batch[0]), batch[1])


@pytest.mark.parametrize("make", [Plain, lambda: nn.ModuleDict({"one": Plain().net}), lambda: nn.ModuleList([Plain()])])
def test_the_model_is_found_within_what_cannot_be_called(make, tmp_path):
    monitor = InequalityMonitor(num_samples=8)
    run(Inside(make()), [monitor], tmp_path, limit_val_batches=0)
    assert steps(monitor) == [0, 12] and [layer.name for layer in monitor.report.layers] == ["0", "3"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_what_can_be_called_is_the_model():
    net = nn.Sequential(nn.Linear(3, 2))
    for model in (net, torch.compile(net), torch.jit.script(net)):
        assert find_model(nn.ModuleList([model]), None) is model
    with pytest.raises(ValueError, match=r"expected ModuleList to define forward.x., .* got children \['0', '1'\]"):
        find_model(nn.ModuleList([nn.ModuleList([net, nn.Linear(1, 1)])]), None)
