"""The README's Python blocks run, one after the other, as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_three_shapes_of_use_are_there():
    text = "\n".join(BLOCKS)
    assert len(BLOCKS) >= 4
    for name in (
        "InputGradPenalty",
        "PenalizedLoss",
        "evaluate_inequality",
        "InequalityMonitor",
        "GradPenaltyCallback",
    ):
        assert name in text


@pytest.mark.filterwarnings("ignore")
def test_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), namespace)
    report = namespace["report"]
    assert bool(report.holds.all()) and len(report.layers) == 2
    assert namespace["monitor"].history and (tmp_path / "bound.png").stat().st_size > 10_000
