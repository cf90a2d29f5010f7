"""Evaluating the inequality leaves the model, the data and the random streams exactly as they were."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from gradpen import evaluate_inequality
from gradpen.metrics import ParamGradSqNorm

HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
]


class Noisy(nn.Module):
    """Draws from every random stream, changes a buffer, replaces another one, makes new ones, turns its own flag round."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.train(not self.training)
        self.in_place += 1
        self.replaced = self.replaced + torch.rand(2) + np.random.rand() + random.random()
        self.absent = torch.ones(2)
        self.register_buffer("late", torch.ones(2))
        return x * (1 + 0 * torch.rand_like(x))


def failing(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    torch.rand(3), np.random.rand(3), random.random()
    raise KeyError("midway")


def snapshot(model: nn.Module, *tensors: torch.Tensor) -> dict[str, Any]:
    """Everything that must not change, in a form that compares with ==."""
    numpy_state = np.random.get_state()
    return {
        "training": [module.training for module in model.modules()],
        "parameters": [(n, id(p), p.requires_grad, p._version, p.tolist()) for n, p in model.named_parameters()],
        "grad": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "buffers": [(n, id(b), b.dtype, b.requires_grad, b.tolist()) for n, b in model.named_buffers()],
        "hooks": [(hook, list(getattr(m, hook))) for m in model.modules() for hook in HOOKS],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "tensors": [(id(t), t.requires_grad, t.grad is None, t._version, t.tolist()) for t in tensors],
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
        "python": random.getstate(),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(torch.get_default_device().type),
        ),
        "dtype": torch.get_default_dtype(),
    }


MODELS = {
    "mlp": lambda: cases.mlp(4, 6, 3),
    "inplace": lambda: cases.find("inplace_relu").build(),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)),
    "batch_norm_eval": cases.batch_norm,
    "batch_norm_train": lambda: cases.batch_norm().train(),  # refused, and just as clean
    "spectral_norm": lambda: nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)),
    "noisy": lambda: nn.Sequential(nn.Linear(4, 6), Noisy(), nn.Linear(6, 3)),
    "mapped": lambda: cases.mlp_with(cases.Scale(4)),
    "partly_frozen": lambda: cases.freeze(cases.mlp(4, 6, 3), "0.weight", "2.bias"),
    "frozen": lambda: cases.mlp(4, 6, 3).requires_grad_(False),  # refused
    "attention": cases.Attention,  # fused, were it not evaluated by the operations that have second derivatives
    "gradients_there": lambda: with_gradients(cases.mlp(4, 6, 3)),
    "modes_mixed": lambda: nn.Sequential(nn.Linear(4, 6).eval(), nn.Dropout(0.5), nn.Linear(6, 3).eval()),
}


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def data(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 5, 4) if name == "attention" else torch.randn(5, 4), torch.randint(3, (5,))


@pytest.mark.parametrize(
    "options",
    [{}, {"criterion": failing}, {"of": "output", "method": "krylov"}, {"norm": "joint"}],
    ids=["loss", "criterion_raises", "output_krylov", "joint"],
)
@pytest.mark.parametrize("name", MODELS)
def test_no_trace(name, options):
    model, (x, y) = MODELS[name](), data(name)
    before = snapshot(model, x, y)
    with contextlib.suppress(KeyError, RuntimeError, ValueError):  # also a refusal leaves no trace
        evaluate_inequality(model, x, y, **options)
    after = snapshot(model, x, y)
    for key, value in before.items():
        assert after[key] == value, key


@pytest.mark.parametrize(
    "name",
    ["mlp", "inplace", "dropout", "noisy", "mapped", "spectral_norm", "batch_norm_eval", "modes_mixed", "attention"],
)
def test_these_models_are_evaluated_not_refused(name):
    model, (x, y) = MODELS[name](), data(name)
    report = evaluate_inequality(model, x, y)
    assert report.holds.all() and report.rhs.shape == (5,) and len(report.layers) >= 1


@pytest.mark.parametrize("name", ["mlp", "dropout", "batch_norm_eval", "spectral_norm", "mapped"])
def test_within_inference_mode(name):
    model, (x, y) = MODELS[name](), data(name)
    model.eval()
    expected = evaluate_inequality(model, x, y)
    before = snapshot(model)
    with torch.inference_mode():
        inside = x * 1, y * 1
        report = evaluate_inequality(model, *inside)
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert snapshot(model) == before
    assert torch.equal(report.lhs, expected.lhs) and torch.equal(report.rhs, expected.rhs)


def test_within_inference_mode_when_the_criterion_raises():
    model, (x, y) = MODELS["noisy"](), data("noisy")
    before = snapshot(model)
    with torch.inference_mode():
        with pytest.raises(KeyError, match="midway"):
            evaluate_inequality(model, x, y, criterion=failing)
        assert torch.is_inference_mode_enabled()
    assert snapshot(model) == before


def test_under_no_grad_and_autocast():
    model, (x, y) = MODELS["mlp"](), data("mlp")
    expected = evaluate_inequality(model, x, y)
    with torch.no_grad(), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        report = evaluate_inequality(model, x, y)
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled(torch.get_default_device().type)
    assert torch.equal(report.lhs, expected.lhs) and torch.equal(report.rhs, expected.rhs)


def value_or_none(look: Callable[[], object]) -> object:
    """None where torch refuses to tell, which it does of the older settings once a newer one was made."""
    try:
        return look()
    except RuntimeError:
        return None


def float32_settings() -> tuple[dict[str, object], dict[str, object]]:
    """How products of float32 may be rounded: by the newer settings, if torch has them, and by the older ones."""
    backends: Any = torch.backends
    newer = {}
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        places = (
            backends.cuda.matmul,
            backends.cudnn.conv,
            backends.cudnn.rnn,
            backends.mkldnn.matmul,
            backends.mkldnn.conv,
        )
        newer = {str(n): place.fp32_precision for n, place in enumerate(places)}
    older = {
        "matmul": value_or_none(torch.get_float32_matmul_precision),
        "cuda": value_or_none(lambda: backends.cuda.matmul.allow_tf32),
        "cudnn": value_or_none(lambda: backends.cudnn.allow_tf32),
    }
    return newer, older


FLOAT32_SETTINGS = [
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
]


def check_float32_settings() -> None:
    seen = []
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.register_forward_hook(lambda *_: seen.append(float32_settings()))
    for setting in FLOAT32_SETTINGS:
        if "fp32" in setting and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            continue
        exec(setting)
        before = float32_settings()
        evaluate_inequality(model, torch.randn(5, 3), torch.randint(2, (5,)))
        assert float32_settings() == before, (setting, before, float32_settings())
        newer, older = seen.pop()
        assert not {"tf32", "bf16"} & set(newer.values()), (setting, newer)
        assert newer or older == {"matmul": "highest", "cuda": False, "cudnn": False}, (setting, older)


def test_products_of_float32_are_not_rounded_meanwhile():
    """In a process of its own: some of these settings cannot be taken back."""
    script = "import test_no_trace; test_no_trace.check_float32_settings()"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent)


def test_a_compiled_model_is_evaluated_as_the_original():
    model, (x, y) = MODELS["mlp"](), data("mlp")
    expected = evaluate_inequality(model, x, y)
    report = evaluate_inequality(torch.compile(model, backend="eager"), x, y)
    assert torch.equal(report.lhs, expected.lhs)


def test_an_embedding_keeps_rows_that_its_forward_pass_shortens():
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.1), nn.Flatten(), nn.Linear(12, 3))
    x = torch.randint(7, (5, 3))
    before = model[0].weight.detach().clone()
    metric = ParamGradSqNorm()
    metric.update(model, x, torch.randint(3, (5,)))
    assert torch.equal(model[0].weight, before) and metric.compute() > 0


class Centred(nn.Module):
    """Two buffers that the first forward pass makes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mean is None:
            self.mean = x.detach().mean(0)
            self.register_buffer("width", x.detach().std(0), persistent=False)
        return (x - self.mean) / self.width


def test_buffers_that_the_first_pass_makes_are_made_by_that_of_their_owner():
    centred, (x, y) = Centred(), data("mlp")
    evaluate_inequality(nn.Sequential(centred, nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), x, y)
    assert centred.mean is None and not hasattr(centred, "width") and not centred._non_persistent_buffers_set
    torch.testing.assert_close(centred(2 * x).mean(0), torch.zeros(4))


class Averaging(nn.Module):
    """A running mean in an attribute that is no buffer, and that another module has too."""

    def __init__(self, mean: torch.Tensor) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.mean.lerp_(x.detach().mean(0), 0.5)


def test_tensors_that_are_no_buffers_are_as_they_were():
    mean, (x, y) = torch.zeros(4), data("mlp")
    model = nn.Sequential(Averaging(mean), Averaging(mean), nn.Linear(4, 3))
    report = evaluate_inequality(model, x, y)
    assert all(part.mean is mean for part in model[:2]) and not mean.any()
    first = x - x.mean(0) / 2
    torch.testing.assert_close(
        report.layers[0].input_sq_norm,
        (first - mean.lerp(x.mean(0), 0.5).lerp(first.mean(0), 0.5)).square().sum(1).double(),
    )


class Counting(nn.Module):
    """Attributes that torch.jit holds, once it is scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last = 0, torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = x.sum()
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_module_has_its_attributes_again():
    counting = torch.jit.script(Counting())
    last, (x, y) = counting.last, data("mlp")
    evaluate_inequality(nn.Sequential(nn.Linear(4, 6), counting, nn.Linear(6, 3)), x, y)
    assert counting.calls == 0 and counting.last is last


class Drawing(nn.Module):
    """Noise from random generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.torch, self.python = torch.Generator(torch.get_default_device()).manual_seed(0), random.Random(0)
        self.numpy, self.older_numpy = np.random.default_rng(0), np.random.RandomState(0)

    def draw(self) -> float:
        drawn = torch.rand((), generator=self.torch).item(), self.python.random(), self.numpy.random()
        return sum(drawn) + self.older_numpy.rand()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.draw()


def test_random_generators_of_a_module_stand_where_they_stood():
    drawing, (x, y) = Drawing(), data("mlp")
    evaluate_inequality(nn.Sequential(nn.Linear(4, 6), drawing, nn.Linear(6, 3)), x, y)
    assert drawing.draw() == Drawing().draw()


def test_hooks_on_parameters_do_not_run():
    model, (x, y) = MODELS["mapped"](), data("mapped")
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: pytest.fail("a hook ran"))
    evaluate_inequality(model, x, y)
    assert all(len(parameter._backward_hooks) == 1 for parameter in model.parameters())


def test_hooks_of_the_users_stay_and_run():
    model, (x, y) = MODELS["mlp"](), data("mlp")
    seen = []
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    evaluate_inequality(model, x, y)
    assert seen and list(model[0]._forward_hooks) == [handle.id]


def train(evaluate: bool) -> tuple[list[list[float]], torch.Tensor]:
    """A few steps with dropout and momentum; the parameters, and the next random number."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        x, y = torch.randn(8, 4), torch.randint(3, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if evaluate:
            model.eval()
            evaluate_inequality(model, x, y)
            model.train()
            with pytest.raises(RuntimeError, match="BatchNorm"):
                evaluate_inequality(model, x, y)
        optimizer.step()
    return [value.tolist() for value in model.state_dict().values()], torch.rand(3)


def test_a_run_with_the_evaluation_equals_the_run_without_it_bit_for_bit():
    (with_it, draw_with), (without, draw_without) = train(True), train(False)
    assert with_it == without and torch.equal(draw_with, draw_without)


def test_between_forward_and_backward():
    model, (x, y) = MODELS["noisy"](), data("noisy")
    torch.manual_seed(0)
    loss = nn.functional.cross_entropy(model(x), y)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    evaluate_inequality(model, x, y)
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


class SharedStep(nn.Module):
    """One buffer of two modules, changed in place by one and read by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.first.register_buffer("step", torch.zeros(()))
        self.last.register_buffer("step", self.first.step)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first.step += 1
        return self.last(self.first(x).tanh()) * self.last.step


def test_a_buffer_that_modules_share_stays_shared():
    model, x = SharedStep(), torch.randn(5, 4)
    report = evaluate_inequality(model, x, None, of="output")
    assert model.first.step is model.last.step and model.first.step == 0
    model.first.step.fill_(1)
    once = nn.Sequential(model.first, nn.Tanh(), model.last)
    torch.testing.assert_close(report.rhs, evaluate_inequality(once, x, None, of="output").rhs)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_model_gets_its_buffers_back():
    model, x = torch.jit.script(cases.batch_norm()), torch.randn(5, 4)
    before = snapshot_of_buffers(model)
    evaluate_inequality(model, x, None, of="output")
    assert before and snapshot_of_buffers(model) == before


def snapshot_of_buffers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, buffer.tolist()) for name, buffer in model.named_buffers()]
