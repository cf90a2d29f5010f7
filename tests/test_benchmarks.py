"""The benchmarks: all contenders compute the same numbers, and the quick run has every row."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gradpen import ParamGradPenalty

for needed in ("matplotlib", "rich", "sklearn", "tensorboard", "torchvision"):
    pytest.importorskip(needed, reason='the benchmarks need pip install "gradpen[bench]"')

import agreement
import breakdown
import contenders
import cuda_steps
import figures
import measure
import medians
import memory
import peers
import recipe_epoch
import run
import spectral_methods
import straight_line
import tables
import workload
import written_out

JOBS = contenders.jobs()
NOT_FOR_ALL = ("BackPACK", "Opacus")  # may not be installed
if torch.__version__ < (2, 8):
    NOT_FOR_ALL += ("PenalizedLoss, compiled",)


@pytest.fixture
def work():
    return workload.synthetic_workload([20, 16, 12, 10], batch_size=8)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.key)
def test_contenders_agree(job, work, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # no kernels: they take long
    monkeypatch.setattr(contenders, "get_cpp_compiler", lambda: "none is needed")
    errors = agreement.check_agreement(job, work)
    assert list(errors) == [contender.name for contender in job.contenders]
    for name, error in errors.items():
        assert isinstance(error, float) or name.startswith(NOT_FOR_ALL)


def against(job, who, build):
    """A job in which somebody of that kind competes with the straight line alone."""
    return replace(job, contenders=(job.contenders[0], contenders.Contender("cheat", who, build)))


@pytest.mark.parametrize("wrong", ["value", "gradient", "shape", "later", "nan"])
def test_a_wrong_contender_is_found_out(work, wrong):
    def build(work):
        calls = 0

        def step():
            nonlocal calls
            calls += 1
            cheats = wrong == "gradient" or (wrong == "later" and calls == measure.CALLS)
            penalty = straight_line.input_step(work, contenders.INPUT_WEIGHT * (1.01 if cheats else 1))
            if wrong == "nan":
                work.model[0].weight.grad[0, 0] = math.nan
            return penalty.unsqueeze(0) if wrong == "shape" else penalty * (1.001 if wrong == "value" else 1)

        return step

    with pytest.raises(agreement.DisagreementError, match="cheat"):
        agreement.check_agreement(against(JOBS[0], "peer", build), work)


@pytest.mark.parametrize("message", ["no such operator\nand more", ""])
def test_a_peer_that_fails_is_a_row_that_says_so(work, message):
    def build(work):
        raise NotImplementedError(message)

    errors = agreement.check_agreement(against(JOBS[0], "peer", build), work)
    assert errors["cheat"] == "fails: NotImplementedError" + (": no such operator" if message else "")
    with pytest.raises(NotImplementedError):
        agreement.check_agreement(against(JOBS[0], "gradpen", build), work)


def test_a_wrong_penalty_cannot_hide_behind_the_data_loss(tmp_path):
    """On the benchmark's own net a penalty is a good part of each job's gradient."""
    work = workload.workload_on(workload.load_images(tmp_path), run.FULL.hidden, run.FULL.batch_size).in_float64()
    straight_line.plain_step(work)
    plain = agreement.flat_gradient(work.model)
    for job in JOBS:
        if job.gradients and job.key != "norms_and_step":
            job.contenders[0].build(work)()
            gradient = agreement.flat_gradient(work.model)
            assert torch.linalg.vector_norm(gradient - plain) > 0.1 * torch.linalg.vector_norm(gradient), job.key


def test_peers_by_hand_form_no_gradient_of_the_images(work):
    """∂(loss + penalty)/∂x is one more product, and nobody needs it."""
    steps = {
        3 + 3 + 6 + 5: lambda: peers.double_backprop_input_step(work, 0.1),  # forward, ∇_x, and their derivatives
        3 + 3 + 5 + 5: lambda: peers.jacobian_regularizer_step(work, 0.1, torch.Generator()),  # of constant directions
    }
    for products, step in steps.items():
        assert sum(call.is_product for call in breakdown.recorded(step)) == breakdown.CALLS * products


def test_a_bracket_that_misses_is_found_out(work):
    exact = spectral_methods.exact_norms(work)
    norms = spectral_methods.bracketed_norms(work, 0.05, slack=False)
    assert spectral_methods.accuracy("bracket", norms, exact).error < 0.05
    for missing in (
        norms._replace(lower=exact.lower * 1.01),
        norms._replace(lower=exact.lower * 0.8, upper=exact.lower * 0.99),
        norms._replace(lower=exact.lower * math.nan),
        norms._replace(upper=exact.lower * math.nan),
    ):
        with pytest.raises(agreement.DisagreementError):
            spectral_methods.accuracy("bracket", missing, exact)


def test_the_floors_of_the_documentation():
    for batch_size, batch, difference in ((128, 1.78, 1.60), (4096, 2.5, 2.0)):
        floors = workload.floors([784, 512, 512, 10], batch_size)
        documented = {"input": 2.25, "param": 1.5, "both": 2.25, "batch": batch, "difference": difference}
        assert {name: round(floors[name], 2) for name in documented} == documented


def test_peak_memory_counts_what_lives_at_one_time():
    def step():
        first = torch.ones(250_000)  # 1 MB
        second = first + 1
        del first
        return second + 1

    assert memory.peak_bytes(step) == pytest.approx(2e6, rel=0.01)


def test_recording_makes_autograd_copy_no_gradients(work):
    calls = breakdown.recorded(contenders.objective_step(work.copied(), [ParamGradPenalty(0.1)]))
    assert not [call for call in calls if call.kernel is torch.ops.aten.copy_.default]


def test_recorded_kernels_are_those_of_the_step(work):
    def step():
        work.model.zero_grad()
        F.cross_entropy(work.model(work.x), work.y).backward()

    calls = breakdown.recorded(step)
    products = [call for call in calls if call.is_product]
    assert len(products) == breakdown.CALLS * 8  # three layers: forward, by weights, and by inputs but the first
    with breakdown._Recorder() as again:
        breakdown.replay(calls)()
    assert [call.kernel for call in again.calls if call.is_product] == [call.kernel for call in products]


def fake_training(folder, name, epochs, ending=""):
    """Saves a checkpoint for every epoch, which takes 50 ms, and notes when it was at work."""
    checkpoint, notes = folder / f"{name}.ckpt", folder / f"{name}.notes"
    script = f"""
import os, time
for epoch in range({epochs}):
    for _ in range(10):
        time.sleep(0.005)
        with open({str(notes)!r}, "a") as notes:
            notes.write(f"{{time.monotonic()}}\\n")
    with open({str(checkpoint)!r} + ".part", "w") as part:
        part.write(str(epoch))
    os.replace({str(checkpoint)!r} + ".part", {str(checkpoint)!r})
{ending}
"""
    return recipe_epoch.Training([sys.executable, "-c", script], checkpoint), notes


def test_trainings_take_turns(tmp_path):
    """None is at work between two epochs of its own while another one goes through an epoch."""
    trainings, notes = {}, {}
    for name in ("one", "two", "three"):
        trainings[name], notes[name] = fake_training(tmp_path, name, epochs=5)
    shares = []
    rounds = recipe_epoch.epochs_in_turn(trainings, 3, shares.append)
    assert shares == [1 / 3, 2 / 3, 1]
    assert [list(seconds) for seconds in rounds] == [["one", "two", "three"]] * 3
    assert all(value > 0.04 for seconds in rounds for value in seconds.values())
    work = {name: [float(line) for line in path.read_text().splitlines()] for name, path in notes.items()}
    assert all(len(times) >= 40 for times in work.values())
    owners = [name for _, name in sorted((time, name) for name, times in work.items() for time in times)]
    changes = sum(first != second for first, second in pairwise(owners))
    assert changes <= 3 * 3 + 3 * 2 + 3  # epochs in turn; a few notes more before a halt takes effect


@pytest.mark.parametrize(("epochs", "ending"), [(0, "raise OSError('no disk')"), (2, "raise OSError('no disk')")])
def test_a_training_that_fails_says_why(tmp_path, epochs, ending):
    training, _ = fake_training(tmp_path, "failing", epochs, ending)
    with pytest.raises(RuntimeError, match="no disk"):
        recipe_epoch.epochs_in_turn({"failing": training}, 2, lambda share: None)


def test_a_training_that_ends_too_early_is_an_error(tmp_path):
    training, _ = fake_training(tmp_path, "short", epochs=2, ending="print('done')")
    with pytest.raises(RuntimeError, match=r"(?s)before its last epoch: done"):
        recipe_epoch.epochs_in_turn({"short": training}, 4, lambda share: None)


def test_the_quick_run_has_every_row(tmp_path):
    threads = torch.get_num_threads()
    out = tmp_path / "quick.json"
    try:
        run.main(["--quick", "--threads", "1", "--data-dir", str(tmp_path), "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    results = json.loads(out.read_text(encoding="utf-8"))
    keys = [job.key for job in JOBS] + ["check_0", "check_1", "monitor", "recipe"]
    assert [row["key"] for row in results["rows"]] == keys
    for row in results["rows"]:
        assert all("reason" in entry or entry["ratio"] > 0 for entry in row["entries"])
        assert any(entry["who"] == "gradpen" for entry in row["entries"])
    assert all(point["quartiles"].keys() == point["ratios"].keys() for point in results["growth"])
    assert {point["series"] for point in results["growth"]} == {"batch", "width", "depth", "classes"}
    assert [step["name"] for step in results["memory"]["steps"]] == ["input", "param", "both", "batch"]
    # the plain step; one without the penalty; the check before and after training
    assert len(results["breakdown"]) == 1 + len(JOBS) + 1 + 2
    assert (results["cuda"] is None) == (not torch.cuda.is_available())
    assert results["machine"]["versions"]["gradpen"]
    assert results["machine"]["quick"] and results["machine"]["images"].startswith("scikit-learn")
    tables_shown = sum(line.startswith("| --- |") for line in tables.as_markdown(results).splitlines())
    assert tables_shown == 3 + 2 + 4 + (results["cuda"] is not None)  # rows, breakdown, memory; spectral; growth; GPU


def test_the_documentation_shows_the_published_numbers():
    results = json.loads(run.PUBLISHED.read_text(encoding="utf-8"))
    assert run.DOCS_TABLE.read_text(encoding="utf-8") == tables.as_markdown(results)


@pytest.fixture
def without_compiler(monkeypatch):
    """Nothing is compiled, and no GPU is waited for."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)


def cuda_figures(work):
    steps = cuda_steps.step_table(work, "cpu", rounds=2, seconds=1.0)
    nets = [{"widths": [784, 12, 10], "batch_size": 8, "steps": steps}]
    cuda = {"device": "X", "cuda": "13", "torch": "2", "cpu": "Y", "nets": nets}
    return steps, tables.as_markdown({"machine": machine_of_nobody(), "cuda": cuda})


def machine_of_nobody():
    keys = ("date", "cpu", "cores", "threads", "capability", "python", "batch_size", "images")
    return {**dict.fromkeys(keys, ""), "versions": {}, "widths": [], "quick": False}


@pytest.mark.usefixtures("without_compiler")
def test_steps_of_a_gpu_are_measured_beside_the_plain_one(work):
    steps, shown = cuda_figures(work)
    assert [step["name"] for step in steps] == ["plain", "input", "param", "both", "batch", "check"]
    assert all(step["eager"]["ratio"] > 0 for step in steps)
    assert all(step["compiled"]["ratio"] > 0 for step in steps[:-1])
    assert shown.count(" µs; ") == 11 and "784-12-10, batch 8" in shown


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("message", ["no compiler\nat all", ""])
def test_what_does_not_compile_says_so(work, monkeypatch, message):
    def fails(*args, **kwargs):
        raise AssertionError(message)

    monkeypatch.setattr(torch, "compile", lambda function, **_: fails)
    steps, shown = cuda_figures(work)
    reasons = {step["compiled"]["reason"] for step in steps[:-1]}
    assert reasons == {"AssertionError" + (": no compiler" if message else "")}
    assert shown.count("AssertionError") == 5


@pytest.mark.usefixtures("without_compiler")
def test_a_compiler_that_computes_something_else_is_found_out(work, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: 1.01 * function(*args))
    with pytest.raises(agreement.DisagreementError, match="plain, compiled"):
        cuda_figures(work)


def test_an_error_loses_nothing_that_was_measured(tmp_path, monkeypatch, capsys):
    def fails(setting, advance):
        raise OSError("no disk")

    kept = {name: run.sections.SECTIONS[name] for name in ("lazy", "monitor")}
    monkeypatch.setattr(run.sections, "SECTIONS", {**kept, "recipe": fails})
    out, threads = tmp_path / "part.json", torch.get_num_threads()
    try:
        with pytest.raises(OSError, match="no disk"):
            run.main(["--quick", "--threads", "1", "--data-dir", str(tmp_path), "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["key"] for row in rows] == list(kept)
    assert "every_n_steps=4" in capsys.readouterr().out


@pytest.mark.parametrize("missing", [None, "peer", "straight line"])
def test_figures_are_drawn_of_whoever_was_measured(missing):
    results = json.loads(run.PUBLISHED.read_text(encoding="utf-8"))
    for row in results["rows"]:
        for entry in row["entries"]:
            if entry["who"] == missing:
                entry.pop("ratio", None)
    (axes,) = figures.draw_ratios(results).axes
    shown = [collection for collection in axes.collections if collection.get_segments()]
    assert len(shown) == (4 if missing is None else 3)
    titles = [label.get_text() for label in axes.get_yticklabels()]
    assert titles == [job.title for job in JOBS]
    assert [axes.get_title() for axes in figures.draw_spectral(results).axes] == list(results["spectral"])


def test_publishing_a_part_is_refused(capsys):
    whole = ["--of", "a.json"]
    for flags in (
        *(["--publish", "--quick"], ["--publish", "--only", "input"], ["--only", "nothing"]),
        *([*whole, "--quick"], [*whole, "--only", "input"]),
    ):
        with pytest.raises(SystemExit):
            run.main(flags)
        assert "expects" in capsys.readouterr().err


def run_of(folder: Path, name: str, *, torch_version: str = "2.15.0", rounds: Any = 40, **figures: Any) -> Path:
    """A file as --out writes it, with what is to be merged and little else."""
    entries = [
        {"name": "PenalizedLoss", "who": "gradpen", "rounds": rounds, **figures},
        {"name": "Opacus", "who": "peer", "reason": "its norms carry no graph"},
    ]
    machine = {"date": "2026-01-02", "quick": False, "versions": {"torch": torch_version}}
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"machine": machine, "rows": [{"title": "input penalty", "entries": entries}]}))
    return file


def test_several_runs_come_to_their_medians(tmp_path):
    ratios = {"a": 4.0, "b": 2.5, "c": 2.25}
    files = [
        run_of(tmp_path, name, ratio=ratio, quartiles=[ratio - 1, ratio + 1], rounds={"input": int(10 * ratio)})
        for name, ratio in ratios.items()
    ]
    results = medians.median_of_runs(files)
    ours, peer = results["rows"][0]["entries"]
    assert (ours["ratio"], ours["quartiles"], ours["rounds"]) == (2.5, [1.5, 3.5], {"input": 25})
    assert peer["reason"] == "its norms carry no graph"
    assert results["machine"]["runs"] == 3
    merged = tmp_path / "merged.json"
    merged.write_text(json.dumps(results))
    assert medians.median_of_runs([merged])["machine"]["runs"] == 3


def test_the_table_of_a_gpu_may_come_from_another_machine(tmp_path, capsys):
    nets = [{"widths": [784, 10], "batch_size": 8, "steps": []}]
    table = {"device": "X", "cuda": "13", "torch": "2", "cpu": "Y", "nets": nets}
    gpu, out = tmp_path / "gpu.json", tmp_path / "out.json"
    gpu.write_text(json.dumps({"machine": machine_of_nobody(), "cuda": table}))
    published = run.main(["--of", str(run.PUBLISHED), "--cuda", str(gpu), "--out", str(out)])
    assert json.loads(out.read_text())["cuda"] == published["cuda"] == table
    before = json.loads(run.PUBLISHED.read_text(encoding="utf-8"))
    assert {**published, "cuda": None} == {**before, "cuda": None}
    gpu.write_text(json.dumps({"machine": machine_of_nobody(), "cuda": None}))
    for file, message in ((gpu, "no table of a GPU"), (tmp_path / "nothing.json", "nothing.json")):
        with pytest.raises(SystemExit):
            run.main(["--of", str(run.PUBLISHED), "--cuda", str(file), "--out", str(out)])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"torch_version": "2.14.0", "ratio": 2.0}, {"seconds": 2.0}, {"ratio": 2}])
def test_runs_of_other_versions_and_rows_are_not_merged(tmp_path, other):
    files = [run_of(tmp_path, "a", ratio=2.0), run_of(tmp_path, "b", **other)]
    with pytest.raises(medians.DifferentRunsError, match="expected runs of the same"):
        medians.median_of_runs(files)


def test_publishing_a_part_of_runs_is_refused(tmp_path, capsys):
    part = run_of(tmp_path, "a", ratio=2.0)
    for file in (part, tmp_path / "nothing.json"):
        with pytest.raises(SystemExit):
            run.main(["--publish", "--out", str(tmp_path / "out.json"), "--of", str(file)])
    errors = capsys.readouterr().err
    assert "expects whole runs" in errors and "nothing.json" in errors
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("setting", [written_out.without_autograd, written_out.behind_a_loss])
def test_the_code_by_hand_copies_no_gradient(setting, work):
    computed = []

    def compute(work):
        step = written_out.sample_norms(work)
        computed.extend(gradient.data_ptr() for gradient in step.gradients)
        return step

    setting(work, compute)()
    assert computed == [parameter.grad.data_ptr() for parameter in work.model.parameters()]
