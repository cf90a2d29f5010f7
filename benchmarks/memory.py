"""Peak memory, from the allocator's own events as torch's profiler records them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MEGABYTE = 1e6


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that was allocated at one time during a call, above what was allocated before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    allocations = [event["args"] for event in events if event.get("name") == "[memory]"]
    cpu = [entry for entry in allocations if entry["Device Type"] == 0]
    if not cpu:
        raise RuntimeError("expected torch's profiler to record allocations on the CPU, got none")
    before = cpu[0]["Total Allocated"] - cpu[0]["Bytes"]
    return int(max(entry["Total Allocated"] for entry in cpu) - before)


def peak_of_fresh_step(model: torch.nn.Module, step: Callable[[], object]) -> int:
    """`peak_bytes` of a training step whose gradients are not there yet, once everything else has been set up."""
    step()
    model.zero_grad()
    return peak_bytes(step)
