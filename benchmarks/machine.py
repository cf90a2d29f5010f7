"""What the numbers depend on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sections import Setting

PACKAGES = ("gradpen", "torch", "lightning", "torchmetrics", "backpack-for-pytorch", "opacus")


def describe_machine(setting: Setting) -> dict[str, Any]:
    """Machine, versions, date, and the size of what is measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "widths": setting.widths,
        "batch_size": setting.batch_size,
        "images": setting.images.name,
        "quick": setting.quick,
    }


def cpu_model() -> str:
    """As the system names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
