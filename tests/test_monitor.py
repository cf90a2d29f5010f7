"""The monitor says what `evaluate_inequality` says, when it should, and changes nothing."""

from __future__ import annotations

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_cases import DATA, Plain, fit, state
from torch.utils.data import DataLoader

from gradpen import evaluate_inequality
from gradpen.callbacks import InequalityMonitor

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=["", "accumulate"]
)
def test_the_monitor_changes_nothing_bit_for_bit(tmp_path, options):
    alone = state(*fit(Plain, [], tmp_path, **options))
    watched = state(*fit(Plain, [InequalityMonitor(every_n_steps=2, num_samples=16)], tmp_path, **options))
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))


def test_the_monitor_checks_on_schedule_and_logs(tmp_path):
    monitor = InequalityMonitor(every_n_steps=5, num_samples=16)
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
