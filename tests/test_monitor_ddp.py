"""Under DDP the monitor says what one process would say, and still changes nothing: one launch for all tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradpen.callbacks._shards import refuse_sharded

SCRIPT = Path(__file__).parent / "ddp_run.py"
SECONDS = 300
PLACE = ("step", "epoch", "layer")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found; the whole process group ends with the test, whatever happens."""
    out = tmp_path_factory.mktemp("ddp")
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent.parent), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)] + [{"output": output}]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("run", ["loss", "output"])
def test_both_processes_run_as_without_the_monitor(ranks, rank, run):
    assert ranks[rank][run]["digest"] == ranks[rank]["alone"]


@pytest.mark.parametrize("run", ["loss", "output"])
def test_values_are_those_of_one_process(ranks, run):
    found, expected = ranks[0][run]["history"], ranks[0][run]["expected"]
    assert len(found) == 4 * 4 and [row["layer"] for row in found[:4]] == ["all", "0", "4", "6"]
    for row, one in zip(found, expected, strict=True):
        values = {name: value for name, value in row.items() if name not in PLACE}
        assert len(values) >= 10
        assert values == pytest.approx({name: one[name] for name in values}, rel=1e-6), row["layer"]


def test_certified_ends_are_those_of_one_process(ranks):
    assert ranks[0]["certified"]["shared"] == pytest.approx(ranks[0]["certified"]["one"], rel=1e-6)


def test_the_gradient_of_the_mean_is_not_a_mean_of_norms(ranks):
    """Half the probe's mean gradient is longer than the whole probe's: a mean over processes would be seen above."""
    whole = [row for row in ranks[0]["loss"]["history"] if row["layer"] == "all"]
    assert all(0 < row["batch_grad_sq_norm"] < row["param_grad_sq_norm"] / 3 for row in whole)


def test_every_process_keeps_the_same_history(ranks):
    assert ranks[0]["loss"]["history"] == ranks[1]["loss"]["history"]


def test_the_processes_see_different_data(ranks):
    assert ranks[0]["alone"]["order of the data"] != ranks[1]["alone"]["order of the data"]


def test_a_failure_on_one_process_ends_all(ranks):
    assert "evaluated on process 1: KeyError: 'only here'" in ranks[0]["one fails"]
    assert ranks[1]["one fails"].startswith("KeyError")


def test_a_layer_that_only_one_share_shows_to_be_bypassed_is_left_out(ranks):
    for rank in ranks[:2]:
        found = rank["shares disagree"]
        assert found["share alone"] == ["first", "last"]
        assert found["shared"] == found["one"] and found["one"][0] == ["last"]


def test_fewer_samples_than_processes_is_an_error(ranks):
    assert "at least one sample for each of 2 processes, got 1" in ranks[0]["too few"]


def test_the_first_process_announces_how_the_probe_is_shared(ranks):
    output = ranks[2]["output"]
    assert output.count("probe     33 samples, of the validation set, seed 0, shared by 2 processes") == 2  # runs


def test_sharded_parameters_are_refused(tmp_path):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = torch.nn.Linear(3, 2)
        refuse_sharded(module)
        sharded = distribute_tensor(module.weight.detach(), init_device_mesh("cpu", (1,)))
        module.weight = torch.nn.Parameter(sharded)
        with pytest.raises(RuntimeError, match=r"whole weight matrices.*'weight'.*strategy=\"ddp\""):
            refuse_sharded(module)
    finally:
        dist.destroy_process_group()
