"""A penalty for a module that nobody edited is the penalty written by hand."""

from __future__ import annotations

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning_cases import ByHand, Plain, fit, state

from gradpen import InputGradPenalty, ParamGradPenalty
from gradpen.callbacks import GradPenaltyCallback

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def penalties() -> GradPenaltyCallback:
    return GradPenaltyCallback(InputGradPenalty(0.1), ParamGradPenalty(0.01))


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
