"""The example of docs/lightning.md runs as it stands, and what the page shows of it is what comes out."""

from __future__ import annotations

import csv
import logging
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "lightning.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLE, *OTHERS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_example_is_short_and_the_only_code():
    assert len(EXAMPLE.splitlines()) <= 40 and not OTHERS


@pytest.mark.filterwarnings("ignore")
def test_the_example_runs(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    with caplog.at_level(logging.INFO):
        exec(compile(EXAMPLE, str(PAGE), "exec"), namespace)
    (shown,) = re.findall(r"```text\n(InequalityMonitor\n.*?)\s*```", TEXT, flags=re.DOTALL)
    (said,) = [record.message for record in caplog.records if record.message.startswith("InequalityMonitor\n")]
    seconds = re.compile(r"[\d.e-]+ s\b")
    assert seconds.sub("… s", said) == seconds.sub("… s", shown)
    assert (tmp_path / "bound.png").stat().st_size > 10_000
    with (tmp_path / "bound.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table if row["layer"] == "all"] == list(range(0, 241, 20))
    assert all(row["violations"] in ("0", "") for row in table)
    assert "penalty/input" in namespace["trainer"].callback_metrics
