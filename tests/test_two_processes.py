"""Two data-parallel processes against one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import two_processes as script

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo"),
]

WHOLE = slice(0, 32)


def run_both(folder: Path) -> list[dict]:
    """What each process found."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*launcher, script.__file__, str(folder)],
        env=environment,
        cwd=Path(script.__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends the processes, which have sessions of their own
        pytest.fail(f"the processes hang:\n{process.communicate()[0][-4000:]}")
    assert process.returncode == 0, output[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def penalties_of_samples_equal_those_of_one_process_with_the_whole_batch(found):
    parameters, logged = script.train(script.Module(0.5), script.sample_penalties(), 8, devices=1)
    unpenalised = script.Module(0.5)
    for rank in range(2):
        other, other_logged = found[rank]["trained"]
        for a, b in zip(parameters, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for name in ("penalty/input", "penalty/param", "gap"):
            assert other_logged[name] == pytest.approx(logged[name], rel=1e-5)
        share = other_logged["penalty/share_of_loss"]  # a mean of ratios, which is not the ratio of the means
        assert share == pytest.approx(logged["penalty/share_of_loss"], rel=0.05)
    assert any((a - b).abs().max() > 0.01 for a, b in zip(parameters, unpenalised.parameters(), strict=True))


def the_batch_penalty_is_the_mean_over_processes(found):
    module = script.WithUnused(0.0)
    used = list(module.net.parameters())
    norms = []
    for rows in (slice(0, 16, 2), slice(1, 16, 2), slice(0, 16)):  # the sampler deals the samples out in turn
        loss = F.cross_entropy(module.net(script.X[rows]), script.Y[rows])
        norms.append(float(sum(grad.square().sum() for grad in torch.autograd.grad(loss, used))))
    for rank in range(2):
        logged = found[rank]["batch"][1]
        assert logged["penalty/param"] == pytest.approx((norms[0] + norms[1]) / 2, rel=1e-5)
        assert abs(logged["penalty/param"] - norms[2]) > 0.01 * norms[2]


def metrics_of_both_processes_are_those_of_all_samples(found):
    expected = script.watch(WHOLE)
    for rank in range(2):
        assert found[rank]["watched"] == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def gaps_of_both_processes_are_those_of_all_samples(found):
    expected = script.gaps(WHOLE)
    assert expected["accuracy"] != expected["later"]
    for rank in range(2):
        assert found[rank]["gaps"] == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def a_process_that_has_seen_one_split_holds_nobody_up(found):
    right = float((script.Y == 0).float().mean())
    assert found[0]["one_sided"] == pytest.approx(1 - right)
    assert math.isnan(found[1]["one_sided"])


def the_objective_has_the_gradients_of_one_process_with_the_whole_batch(found):
    expected = script.objective_gradients(WHOLE)
    for rank in range(2):
        assert found[rank]["refused"]
        for gradients in found[rank]["objective"]:
            for a, b in zip(gradients, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_two_processes_against_one(tmp_path):
    """One test, since the workers of a parallel test run would each start the processes for their share of several."""
    found = run_both(tmp_path)
    penalties_of_samples_equal_those_of_one_process_with_the_whole_batch(found)
    the_batch_penalty_is_the_mean_over_processes(found)
    the_objective_has_the_gradients_of_one_process_with_the_whole_batch(found)
    metrics_of_both_processes_are_those_of_all_samples(found)
    gaps_of_both_processes_are_those_of_all_samples(found)
    a_process_that_has_seen_one_split_holds_nobody_up(found)
