"""One thread, one seed, and the grid as fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from gradpen import _layout

torch.set_num_threads(1)

OF_ONE_DEVICE = {  # modules of tests that choose their device themselves, or are none of a device's, and what they share
    *("ddp_run", "lightning_cases", "monitor_cases", "two_processes"),
    *("test_benchmark_timing", "test_benchmarks", "test_compare", "test_history", "test_imports", "test_layout"),
    *("test_lightning_page", "test_memory", "test_monitor", "test_monitor_ddp", "test_monitor_probe"),
    *("test_namespaces_and_cli", "test_penalty_callback", "test_products", "test_readme", "test_recipe_data"),
    *("test_recipes", "test_two_processes"),
}

settings.register_profile("gradpen", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# HYPOTHESIS_PROFILE=thorough (`make thorough`): other networks on every run instead of the same ones
settings.register_profile("thorough", settings.get_profile("gradpen"), derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gradpen"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where tensors are made that name no device, such as cuda; default: the CPU")


def pytest_configure(config: pytest.Config) -> None:
    """Before any module of tests makes a tensor."""
    if device := config.getoption("--device"):
        torch.set_default_device(device)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("--device") and collection_path.stem in OF_ONE_DEVICE else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") not in (None, "cpu"):
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason="of the CPU"))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the default dtype alone."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(params=["by_sample", "by_feature"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How hidden rows lie in memory; what pays for wide layers alone is done for all."""
    if request.param == "by_feature":
        monkeypatch.setattr(_layout, "_SAMPLES", range(1, 10_000))
        monkeypatch.setattr(_layout, "_FEWEST_FEATURES", 1)
        monkeypatch.setattr(_layout, "_FEWEST_THREADS", 1)
    return str(request.param)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes reach no server."""

    def fail(url: str, timeout: float) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("downloads.urlopen", fail)
