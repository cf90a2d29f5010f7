"""float32 on a GPU, also where products may be made in TF32, against float64 on the CPU."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import cases
import pytest
import references as ref
import torch
from test_inequality import CHAINS
from torch import Tensor, nn

from gradpen import (
    InputGradPenalty,
    ParamGradPenalty,
    PenalizedLoss,
    evaluate_inequality,
    layer_norms,
    mixing,
    spectral,
)
from gradpen.recording import map_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BATCH = 11
LARGEST_ERROR = {"highest": 1e-4, "high": 3e-2}  # of a gradient; TF32 has 10 bits
NEAR_A_KINK = "masked"  # 6e-5 from where its ReLU is bent, which TF32 sees on the other side


@pytest.fixture(params=LARGEST_ERROR)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """How float32 is multiplied, in dense layers and in convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(request.param)
    torch.backends.cudnn.allow_tf32 = request.param == "high"
    yield request.param
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def on_gpu(model: nn.Module, x: Any, y: Tensor, criterion: Any) -> tuple[nn.Module, Any, Tensor, Any]:
    """Copies in float32."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to("cuda", torch.float32 if tensor.is_floating_point() else None)

    criterion = copy.deepcopy(criterion).to("cuda", torch.float32) if isinstance(criterion, nn.Module) else criterion
    return copy.deepcopy(model).to("cuda", torch.float32), map_tensors(x, moved), moved(y), criterion


def gradient_of_objective(model: nn.Module, x: Any, y: Tensor, criterion: Any, has_input: bool) -> Tensor:
    penalties = [ParamGradPenalty(0.3), ParamGradPenalty(0.3, over="batch", name="batch")]
    penalties += [InputGradPenalty(0.3)] if has_input else []
    objective = PenalizedLoss(criterion, *penalties)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one sample at a time.*")
        objective(model, x, y).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double().cpu()


@pytest.mark.parametrize("case", [case for case in cases.ARCHITECTURES if case.loss.name == "cross_entropy"], ids=str)
def test_penalties(case, precision):
    if precision == "high" and case.name == NEAR_A_KINK:
        pytest.skip("a ReLU's sign is another in TF32")
    problem = case.problem(BATCH)
    expected = gradient_of_objective(*problem, case.float_input)
    actual = gradient_of_objective(*on_gpu(*problem), case.float_input)
    assert ref.relative_error(actual, expected) < LARGEST_ERROR[precision]


@pytest.mark.parametrize("precision", ["high"], indirect=True)
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("name", ["relu", "conv_stack", "layer_norm_tokens", "tanh"])
def test_rows_follow_their_factors_in_tf32(name, monkeypatch):
    def fails(*args: Any) -> None:
        raise AssertionError("rows that are multiplied by a power of two are not")

    monkeypatch.setattr(mixing, "_reached_by_others", fails)
    gradient_of_objective(*on_gpu(*cases.find(name).problem(BATCH)), True)


@pytest.mark.parametrize("name", ["relu", "three_layers", "layer_norm_chain", "conv_then_dense"])
@pytest.mark.parametrize("method", ["dense", "krylov"])
@pytest.mark.parametrize("norm", ["spectral", "joint"])
def test_inequality(name, method, norm, precision):
    """TF32 would move what the two sides have in common by 1e-3."""
    problem = next(case for case in CHAINS if case.name == name).problem(BATCH)
    options = dict(criterion=problem.criterion, norm=norm, method=method)
    expected = evaluate_inequality(*problem[:3], **options)
    actual = evaluate_inequality(*on_gpu(*problem)[:3], **options)
    for side in ("rhs", "lhs", "input_grad_sq_norm"):
        ref.assert_close(getattr(actual, side).cpu(), getattr(expected, side), 1e-5)
    assert actual.holds.all()
    assert torch.get_float32_matmul_precision() == precision


def test_recurrent_layers_before_a_dense_one_are_differentiated_twice():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRU(4, 20, batch_first=True), nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0].mean(1))

    model, x, y = Gated().cuda(), torch.randn(7, 5, 4, device="cuda"), torch.randint(3, (7,), device="cuda")
    report = evaluate_inequality(model, x, y)
    expected = evaluate_inequality(copy.deepcopy(model).cpu(), x.cpu(), y.cpu())
    ref.assert_close(report.lhs.cpu(), expected.lhs, 1e-4)
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers] != []
    assert torch.backends.cudnn.enabled


def test_the_host_looks_at_an_iteration_only_now_and_then(monkeypatch):
    """Between two looks nothing waits, however many steps there are."""
    torch.manual_seed(0)
    widths = (50, 80, 90, 70, 3)
    modules = [module for n, m in itertools.pairwise(widths) for module in (nn.Linear(n, m), nn.ReLU())]
    model = nn.Sequential(*modules[:-1]).cuda()
    x, y = torch.randn(40, 50, device="cuda"), torch.randint(3, (40,), device="cuda")
    looks, steps = [], []
    look, step = spectral.BracketSearch.look, spectral._lanczos_step
    monkeypatch.setattr(spectral.BracketSearch, "look", lambda *args: looks.append(1) or look(*args))
    monkeypatch.setattr(spectral, "_lanczos_step", lambda *args: steps.append(1) or step(*args))
    evaluate_inequality(model, x, y, method="krylov", slack=False)  # warm
    looks.clear(), steps.clear()
    waits: list[str] = []
    sweeps: list[int] = []

    def bracket(*args: Any, **kwargs: Any) -> Any:
        sweeps.append(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return lanczos(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                found = [warning for warning in caught if str(warning.message).startswith("called a synchronizing")]
                waits.extend(f"{warning.filename}:{warning.lineno}" for warning in found)

    lanczos = spectral.lanczos_bracket
    monkeypatch.setattr(spectral, "lanczos_bracket", bracket)
    evaluate_inequality(model, x, y, method="krylov", slack=False)
    assert 0 < len(looks) < len(steps)
    # the dimension, the first product, and whether one with W Wᵀ has underflowed; the coefficients
    assert len(waits) <= 3 * len(sweeps) + len(looks), waits


def test_the_budget_is_what_the_device_has():
    assert layer_norms.default_budget(torch.device("cpu")) < layer_norms.default_budget(torch.device("cuda"))
    model = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3)).cuda()
    x, y = torch.randn(64, 20, device="cuda"), torch.randint(3, (64,), device="cuda")
    whole, parts = (evaluate_inequality(model, x, y, memory_budget=size) for size in (None, 2**20))
    ref.assert_close(whole.lhs_lower, parts.lhs_lower, 1e-5)
