"""The callbacks change what they say they change, and nothing else."""

from __future__ import annotations

import warnings

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradpen import InputGradPenalty, ParamGradPenalty, evaluate_inequality
from gradpen.callbacks import GradPenaltyCallback, InequalityMonitor

torch.manual_seed(0)
DATA = TensorDataset(torch.randn(96, 12), torch.randint(3, (96,)))
warnings.filterwarnings("ignore", module="lightning")


class Plain(lightning.LightningModule):
    """What somebody else wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Dropout(0.3), nn.Linear(10, 3))

    def training_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1])}

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class ByHand(Plain):
    """The same with both penalties written out."""

    def training_step(self, batch, batch_idx):
        x, y = batch[0].detach().requires_grad_(), batch[1]
        first, activation, dropout, last = self.net
        z1 = first(x)
        h = dropout(activation(z1))
        z2 = last(h)
        loss = F.cross_entropy(z2, y)
        g, d1, d2 = torch.autograd.grad(loss * len(x), [x, z1, z2], create_graph=True)
        r_x = (g * g).sum(1).sum() / len(x)
        r_1 = (1 + (x * x).sum(1)) * (d1 * d1).sum(1)
        r_2 = (1 + (h * h).sum(1)) * (d2 * d2).sum(1)
        return loss + 0.1 * r_x + 0.01 * ((r_1 + r_2).sum() / len(x))


def penalties() -> GradPenaltyCallback:
    return GradPenaltyCallback(InputGradPenalty(0.1), ParamGradPenalty(0.01))


def fit(module_class, callbacks, tmp_path, *, max_epochs=2, ckpt_path=None, **options):
    lightning.seed_everything(0, verbose=False)
    module = module_class()
    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=lightning.pytorch.loggers.CSVLogger(tmp_path),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(module, DataLoader(DATA, 16, shuffle=True), DataLoader(DATA, 16), ckpt_path=ckpt_path)
    return module, trainer


def state(module, trainer):
    optimizer = trainer.optimizers[0].state_dict()["state"]
    tensors = [*module.parameters(), *(v["exp_avg_sq"] for v in optimizer.values()), torch.get_rng_state()]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=["", "accumulate"]
)
def test_the_monitor_changes_nothing_bit_for_bit(tmp_path, options):
    alone = state(*fit(Plain, [], tmp_path, **options))
    watched = state(*fit(Plain, [InequalityMonitor(every_n_steps=2, num_samples=16)], tmp_path, **options))
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))


def test_the_monitor_checks_on_schedule_and_logs(tmp_path):
    monitor = InequalityMonitor(every_n_steps=5, num_samples=16, slack=False)
    module, trainer = fit(Plain, [monitor], tmp_path)
    assert [row["step"] for row in monitor.history if row["layer"] == "all"] == [0, 5, 10, 12]
    assert {row["layer"] for row in monitor.history} == {"all", "0", "3"}
    assert all(row["violations"] == 0 and row["lhs"] <= row["rhs"] for row in monitor.history if row["layer"] == "all")
    trainer.logger.save()
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"bound/lhs", "bound/rhs", "bound/tightness", "bound/violations", "bound/3/coefficient"} <= set(header)
    module.eval()
    chosen = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:16].sort().values
    report = evaluate_inequality(module.net, *DATA[chosen])
    torch.testing.assert_close(monitor.report.lhs, report.lhs)


def test_a_resumed_run_has_the_history_of_an_unbroken_one(tmp_path):
    unbroken, first, second = (InequalityMonitor(every_n_steps=5, num_samples=16) for _ in range(3))
    fit(Plain, [unbroken], tmp_path / "a")
    fit(Plain, [first, ModelCheckpoint(tmp_path / "b", save_last=True)], tmp_path / "b", max_epochs=1)
    fit(Plain, [second], tmp_path / "c", ckpt_path=tmp_path / "b/last.ckpt")
    assert [(r["step"], r["layer"]) for r in second.history] == [(r["step"], r["layer"]) for r in unbroken.history]
    assert second.history[:6] == unbroken.history[:6]


def test_validate_and_test_run_in_inference_mode(tmp_path):
    monitor = InequalityMonitor(num_samples=16)
    module, trainer = (
        Plain(),
        lightning.Trainer(callbacks=[monitor], logger=False, enable_progress_bar=False, accelerator="cpu"),
    )
    trainer.validate(module, DataLoader(DATA, 16), verbose=False)
    assert len(monitor.history) == 3 and monitor.report.holds.all()


def test_the_penalty_callback_equals_the_penalty_by_hand_to_the_last_bit(tmp_path):
    by_hand = state(*fit(ByHand, [], tmp_path))
    module, trainer = fit(Plain, [penalties()], tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(by_hand, state(module, trainer), strict=True))
    assert {"penalty/input", "penalty/param", "penalty/share_of_loss"} <= set(trainer.logged_metrics)
    assert "training_step" not in vars(module)


def test_one_forward_pass_and_training_step_put_back_after_an_exception(tmp_path):
    calls = []

    class Failing(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("broken")
            calls.append(batch_idx)
            return super().training_step(batch, batch_idx)["loss"]

    seen = []

    class Keep(lightning.Callback):
        def on_exception(self, trainer, pl_module, exception):
            seen.append(pl_module)

    with pytest.raises(RuntimeError, match="broken"):
        fit(Failing, [penalties(), Keep()], tmp_path)
    assert calls == [0, 1] and "training_step" not in vars(seen[0])


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Silent(Plain):
    def training_step(self, batch, batch_idx):
        return None


class Detached(Plain):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0].detach()), batch[1])


@pytest.mark.parametrize(
    ("module_class", "words"),
    [(Manual, "manual optimisation"), (Silent, "return the loss"), (Detached, "does not depend on the input")],
)
def test_errors_of_the_penalty_callback(module_class, words, tmp_path):
    with pytest.raises(RuntimeError, match=words):
        fit(module_class, [penalties()], tmp_path)


def test_a_penalty_that_needs_a_second_pass_is_refused():
    with pytest.raises(ValueError, match="second forward pass"):
        GradPenaltyCallback(ParamGradPenalty(1.0, over="batch", method="finite_difference"))
