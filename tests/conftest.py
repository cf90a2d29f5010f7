"""One thread, one seed, and the grid as fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile("gradpen", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# HYPOTHESIS_PROFILE=thorough (`make thorough`): other networks on every run instead of the same ones
settings.register_profile("thorough", settings.get_profile("gradpen"), derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gradpen"))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the default dtype alone."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
