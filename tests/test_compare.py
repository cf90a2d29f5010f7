"""Grids, records, engines and reports; sweeps of tiny networks on scikit-learn's digits."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

for needed in ("jsonargparse", "markdown", "matplotlib", "rich", "scipy", "sklearn", "torchvision"):
    pytest.importorskip(needed, reason='the recipes need pip install "gradpen[recipes]"')

from scipy import stats

import compare
import files
import models
import objectives
from comparison import engines, estimate, figures, grid, intervals, records, report, results, runs, sweep
from flags import UserError

ROOT = Path(__file__).parents[1]
TINY = {
    "name": "Tiny",
    "settings": {
        "recipe": "mnist", "dataset": "digits", "hidden": "8", "val_size": 200, "batch_size": 50,
        "checks": 2, "probe_size": 8,
    },
    "tasks": [{"name": "digits, 100", "train_size": 100, "epochs": 2}],
    "methods": {
        "none": {},
        "input": {"penalty": "input", "weight": [0.01, 0.1]},
        "input, every 2nd step": {"like": "input", "every_n_steps": 2},
        "param": {"penalty": "param", "weight": 0.001},
        "dropout": {"dropout": 0.1},
    },
    "seeds": [1, 2],
    "sweeps": [
        {"question": 5, "settings": {"epochs": 1}, "vary": {"init": ["default", "orthogonal"]}, "seeds": [1]},
        {
            "question": 6,
            "settings": {"optimizer": "sgd", "schedule": "constant"},
            "cases": [{"lr": 0.01, "epochs": 2}, {"lr": 0.02, "epochs": 1}],
            "seeds": [1],
        },
    ],
}  # fmt: skip
CLOCK = ("seconds", "threads")  # what another machine, or process, has otherwise


def tiny(**changes: Any) -> grid.Grid:
    described = {**TINY, **changes}
    return grid.Grid(**{**described, "sweeps": [grid.Sweep(**one) for one in described["sweeps"]]})


def tiny_run(**changes: Any) -> runs.Run:
    settings = {name: value for name, value in TINY["settings"].items() if name != "recipe"}
    return runs.Run("mnist", {**settings, "train_size": 100, "epochs": 1, **changes}, reads_test=True)


def without_clock(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "result": {name: value for name, value in record["result"].items() if name not in CLOCK}}


def written(folder: Path) -> dict[str, dict[str, Any]]:
    """Key → record, of the finished files alone."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}


def make_all(described: grid.Grid, folder: Path, engine: engines.Engine = engines.in_this_process) -> list[sweep.Done]:
    with records.Records(folder) as found:
        return sweep.run_grid(described, found, engine)


@pytest.fixture(autouse=True)
def nondeterminism_allowed() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)  # the trainer has set it


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[sweep.Done]]:
    """One whole sweep, which many tests read."""
    out = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    done = make_all(tiny(), out / "runs")
    report.write_report(out, tiny(), done)
    return out, done


def unpacked(published: Path, out: Path) -> None:
    """Where a sweep finds the records that were published."""
    with tarfile.open(published / "records.tar.xz") as archive:
        archive.extractall(out / "runs", filter="data")


# ---- a whole sweep --------------------------------------------------------------------------------------------------


def test_a_sweep_has_both_stages_and_matched_compute(unbroken: tuple[Path, list[sweep.Done]]) -> None:
    _, done = unbroken
    stages = [one.planned.stage for one in done]
    assert {stage: stages.count(stage) for stage in stages} == {"choose": 2, "report": 5 * 2 + 2, "sweep": 4}
    assert all(one.record["status"] == "finished" for one in done)
    for one in done:
        assert ("test_accuracy" in one.record["result"]) == (one.planned.stage != "choose")
    longer = [one for one in done if one.planned.method.endswith("× epochs")]
    F, F1 = 64 * 8 + 8 * 10, 64 * 8
    factor = math.ceil(2 * (6 * F - F1) / (3 * F - F1)) / 2  # of the input penalty, which costs most
    assert {one.planned.run.settings["epochs"] for one in longer} == {math.ceil(2 * factor)}
    assert {one.planned.method for one in longer} == {f"none, {factor:g} × epochs"}


def test_the_better_candidate_on_the_validation_images_is_chosen(unbroken: tuple[Path, list[sweep.Done]]) -> None:
    out, done = unbroken
    choosing = {
        one.planned.run.settings["weight"]: one.record["result"]["val_accuracy"]
        for one in done
        if one.planned.stage == "choose"
    }
    best = max(choosing, key=choosing.__getitem__)
    for method in ("input", "input, every 2nd step"):
        chosen = tiny().chosen(TINY["tasks"][0], method, records.Records(out / "runs"))
        assert chosen is not None
        assert chosen["weight"] == best
    reported = [one for one in done if one.planned.method.startswith("input") and one.planned.stage == "report"]
    assert {one.planned.run.settings["weight"] for one in reported} == {best}
    assert {one.planned.run.settings.get("every_n_steps", 1) for one in reported} == {1, 2}


def test_candidates_are_told_apart_while_they_run() -> None:
    described = tiny(sweeps=[])
    choosing = sweep.names(list(described.choosing()))
    assert list(choosing.values()) == [f"digits, 100 · input, weight {weight} · seed 0" for weight in (0.01, 0.1)]
    task = described.tasks[0]
    reporting = sweep.names(list(described.reporting(task, "param", described.candidates(task, "param")[0])))
    assert list(reporting.values()) == ["digits, 100 · param · seed 1", "digits, 100 · param · seed 2"]


def test_nothing_is_run_twice(unbroken: tuple[Path, list[sweep.Done]]) -> None:
    def refuse(missing: Iterable[runs.Run], started: engines.Started) -> Iterator[tuple[runs.Run, runs.Record]]:
        assert not list(missing)
        return iter(())

    out, done = unbroken
    again = make_all(tiny(), out / "runs", refuse)
    assert [without_clock(one.record) for one in again] == [without_clock(one.record) for one in done]


def test_records_hold_the_bound_over_training(unbroken: tuple[Path, list[sweep.Done]]) -> None:
    _, done = unbroken
    record = next(one.record for one in done if one.planned.stage == "report")
    whole = [row for row in record["history"] if row["layer"] == "all"]
    assert [row["step"] for row in whole] == [
        0,
        1,
        2,
        4,
    ]  # before training, the log schedule with the first epoch, the end
    assert all(0 < row["lhs"] <= row["rhs"] for row in whole)
    for rungs in record["result"]["ladder"].values():
        assert 0 < rungs["frobenius"] < rungs["spectral"] <= rungs["joint"] * 1.001 <= 1.01


def test_values_are_read_at_their_times() -> None:
    planned = next(iter(tiny().reporting(tiny().tasks[0], "none", tiny().candidates(tiny().tasks[0], "none")[0])))
    steps = {0: 5.0, 1: 7.0, 2: 2.0, 4: 8.0}  # an epoch has two
    history = [{"layer": "all", "step": step, "lhs": value, "rhs": 0.0} for step, value in steps.items()]
    record = {"status": "finished", "result": {"steps": 4}, "history": history}
    one = results.Outcome(planned, record)
    times = ("start", "epoch", "end", "from epoch to end")
    assert [one.at(when, "lhs") for when in times] == pytest.approx([5, 2, 8, 4])
    assert one.at("from epoch to end", "rhs") is None  # a geometric mean of zeros says nothing
    diverged = results.Outcome(planned, {**record, "status": "diverged"})
    assert [diverged.at(when, "lhs") for when in times] == [5, 2, None, None]


def test_the_report_has_everything(unbroken: tuple[Path, list[sweep.Done]]) -> None:
    out, done = unbroken
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(done)
    assert all(
        float(row["gap"]) == float(row["train_accuracy"]) - float(row["test_accuracy"]) for row in rows if row["gap"]
    )
    text = (out / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (\d)\. ", text, re.M) == list("1234567")
    assert "not measured" not in text.lower()
    assert "nan" not in text.replace("no penalty", "")
    assert "scikit-learn digits (8×8, 1,797 images)" in text
    for name in report.FIGURES:
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](figures/{name}.png)" in text
    page = (out / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == len(report.FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_table_of_runs_has_the_grid_s_methods(unbroken: tuple[Path, list[sweep.Done]]) -> None:
    out, done = unbroken
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [one.planned.method for one in done]
    assert {row["penalty_method"] for row in rows} == {"exact"}


def test_the_epochs_of_a_report_are_those_of_its_tasks() -> None:
    described = tiny(
        settings={**TINY["settings"], "epochs": 7}, tasks=[{"name": "few", "train_size": 100, "epochs": 2}]
    )
    facts = dict(report.facts(results.Results(described, [])).rows)
    assert facts["epochs"] == "few: 2"
    assert "7" not in facts["training"]


def test_captions_say_where_step_0_stands(unbroken: tuple[Path, list[sweep.Done]]) -> None:
    text = (unbroken[0] / "report.md").read_text(encoding="utf-8")
    said = re.findall(r"\*Figure .*Step 0, before training, stands at 1/2\.\*", text)
    assert len(said) == 2  # both figures over training


def test_what_was_published_goes_on(
    unbroken: tuple[Path, list[sweep.Done]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = unbroken
    report.publish(out, tmp_path / "published", done)
    unpacked(tmp_path / "published", tmp_path / "out")
    assert written(tmp_path / "out" / "runs") == written(out / "runs")
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**TINY, "methods": {**TINY["methods"], "SAM": {"sam_radius": 0.05}}}))
    made = []
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(engines, "make", lambda run: made.append(run) or runs.make(run))
    compare.main(compare.CompareSettings(grid=str(file), out=str(tmp_path / "out")))
    assert [run.settings["sam_radius"] for run in made] == [0.05, 0.05]


def test_figures_that_are_not_the_report_s_stay(
    unbroken: tuple[Path, list[sweep.Done]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: path.write_bytes(b"new"))
    out, published = tmp_path / "out", tmp_path / "paper"
    for folder in (out, published):
        (folder / "figures").mkdir(parents=True)
        (folder / "figures" / "my own.png").write_bytes(b"mine")
        (folder / "figures" / "tightness-ladder.png").write_bytes(b"old")
    _, done = unbroken
    report.write_report(out, tiny(), done)
    report.publish(out, published, done)
    for folder in (out, published):
        kept = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
        assert kept == {"my own.png": b"mine", **{f"{name}.png": b"new" for name in report.FIGURES}}
    report.write_report(out, tiny(), [])
    report.publish(out, published, [])
    for folder in (out, published):
        assert [path.name for path in (folder / "figures").iterdir()] == ["my own.png"]  # nothing of the earlier report


@pytest.mark.parametrize("published", sorted(ROOT.glob("docs/comparison/*/")), ids=lambda path: path.name)
def test_the_published_reports_are_those_of_their_records(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *arguments, **options: None)  # which takes long
    unpacked(published, tmp_path)
    whole = compare.CompareSettings(grid=str(ROOT / "recipes" / "grids" / f"{published.name}.yaml"), out=str(tmp_path))
    monkeypatch.setattr(runs, "load", lambda run: pytest.fail(f"no record of {run}"))
    compare.main(whole)
    for name in ("report.md", "results.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (published / name).read_text(encoding="utf-8")
    assert not any(
        place in record["settings"] for record in written(tmp_path / "runs").values() for place in runs.PLACES
    )


@pytest.mark.parametrize("page", ["README.md", "recipes/README.md", "docs/comparison.md"])
def test_pages_quote_the_published_reports(page: str) -> None:
    reported = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/comparison/*/report.md"))
    quoted = re.findall(r"[+−]?\d+\.\d\d ± \d+\.\d\d", (ROOT / page).read_text(encoding="utf-8"))
    assert len(quoted) > 20
    assert not [one for one in quoted if one.replace("−", "-") not in reported]


def test_the_report_pairs_by_seed(unbroken: tuple[Path, list[sweep.Done]]) -> None:
    out, done = unbroken
    accuracy = {
        (one.planned.method, one.planned.seed): 100 * one.record["result"]["test_accuracy"]
        for one in done
        if one.planned.stage == "report"
    }
    differences = [accuracy["dropout", seed] - accuracy["none", seed] for seed in (1, 2)]
    text = (out / "report.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| dropout | dropout 0.1"))
    cell = row.split(" | ")[5]
    assert float(cell.split(" ± ")[0]) == pytest.approx(sum(differences) / 2, abs=0.006)


def test_the_best_baseline_is_sought_among_all_of_them() -> None:
    methods = {"none": {}, "dropout": {"dropout": [0.1, 0.3]}, "weight decay": {"weight_decay": 0.1}}
    described = tiny(methods={**methods, "SAM": {"sam_radius": 0.05}}, sweeps=[])
    accuracy = {
        ("dropout", 0): 0.90, ("weight decay", 1): 0.92, ("weight decay", 2): 0.94, ("SAM", 1): 0.98, ("SAM", 2): 0.80,
    }  # fmt: skip
    outcomes = [
        results.Outcome(one, {"result": {"val_accuracy": accuracy.get((one.method, one.seed), 0.5)}, "history": []})
        for one in described.every_run()
    ]
    (task,) = results.Results(described, outcomes).tasks
    assert results.Results(described, outcomes).best_baseline(task) == "weight decay"  # by its mean over seeds
    chosen = [one for one in outcomes if one.method in ("none", "dropout")]
    assert results.Results(described, chosen).best_baseline(task) == "dropout"
    assert results.Results(described, outcomes[2:4]).best_baseline(task) is None  # none alone


def test_what_a_grid_lacks_is_not_measured(tmp_path: Path) -> None:
    done = make_all(tiny(methods={"none": {}}, sweeps=[], seeds=[1]), tmp_path / "runs")
    report.write_report(tmp_path, tiny(methods={"none": {}}, sweeps=[], seeds=[1]), done)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.count("Not measured: this grid has no runs for it.") == 4  # questions 3, 5, 6 and 7
    assert "(one seed)" in text


# ---- bad ends -------------------------------------------------------------------------------------------------------


def test_a_failing_run_is_recorded_and_does_not_stop_the_others(tmp_path: Path) -> None:
    refused = {"penalty": "input", "of": "output", "method": "finite_difference", "weight": 1.0}
    described = tiny(methods={"none": {}, "refused": refused}, sweeps=[], seeds=[1])
    done = make_all(described, tmp_path / "runs")
    assert {one.planned.method: one.record["status"] for one in done} == {"none": "finished", "refused": "failed"}
    failed = next(one.record for one in done if one.record["status"] == "failed")
    assert "finite_difference" in failed["traceback"]
    report.write_report(tmp_path, described, done)
    assert failed["traceback"].strip().splitlines()[-1] in (tmp_path / "report.md").read_text(encoding="utf-8")
    tried: list[runs.Run] = []

    def note(missing: Iterable[runs.Run], started: engines.Started) -> Iterator[tuple[runs.Run, runs.Record]]:
        tried.extend(missing)
        return iter(())

    make_all(described, tmp_path / "runs", note)
    assert [run.settings["penalty"] for run in tried] == ["input"]  # once more, in case the cause is gone


def test_divergence_and_collapse_are_results(tmp_path: Path) -> None:
    methods = {
        "none": {},
        "too fast": {"optimizer": "sgd", "lr": 1e12},
        "too strong": {"penalty": "param", "weight": 1e4, "lr": 0.1},
    }
    tasks = [{"train_size": 100, "epochs": 10, "lr": 0.03}]
    described = tiny(methods=methods, tasks=tasks, sweeps=[], seeds=[1], matched_compute="none")
    done = make_all(described, tmp_path / "runs")
    of = {one.planned.method: one.record for one in done}
    assert of["too fast"]["status"] == "diverged"
    assert of["too fast"]["result"]["geometric_complexity"] is None
    assert of["too strong"]["status"] == "finished"
    assert of["too strong"]["result"]["collapsed"]
    assert not of["none"]["result"]["collapsed"]
    report.write_report(tmp_path, described, done)
    assert "1 diverged" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_grid_whose_every_run_fails_has_a_report(tmp_path: Path) -> None:
    def fail(missing: Iterable[runs.Run], started: engines.Started) -> Iterator[tuple[runs.Run, runs.Record]]:
        for run in missing:
            yield run, {"key": run.key, **runs.failure("gone wrong")}

    described = tiny()
    report.write_report(tmp_path, described, make_all(described, tmp_path / "runs", fail))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "No run has ended, so there is nothing to draw." in text
    assert text.count("gone wrong") == 2 + 3 * 2 + 4  # candidates, what needs no choice, sweeps
    assert not list((tmp_path / "figures").iterdir())


def test_a_grid_whose_every_run_diverges_has_a_report(tmp_path: Path) -> None:
    settings = {**TINY["settings"], "optimizer": "sgd", "lr": 1e30}
    described = tiny(settings=settings, methods={"none": {}}, sweeps=[], seeds=[1])
    report.write_report(tmp_path, described, make_all(described, tmp_path / "runs"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "1 ended, of them 1 diverged" in text
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"accuracy-by-method.png", "sides-over-training.png"} <= drawn
    assert not {"accuracy-against-tightness.png", "gap-against-sides.png"} & drawn  # nothing is known of the end
    assert set(re.findall(r"\(figures/(.*)\)", text)) == drawn


def test_a_norm_without_a_tightness_is_not_drawn() -> None:
    assert math.isnan(figures._mean_rungs([{"frobenius": None, "spectral": 0.5, "joint": 0.6}])[0])


def test_a_worker_that_dies_is_a_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        """Loses the first run, and with it the one beside it."""

        broken = 2

        def submit(self, function: Callable[..., Any], run: runs.Run) -> Future[runs.Record]:
            future: Future[runs.Record] = Future()
            if Pool.broken:
                Pool.broken -= 1
                future.set_exception(BrokenProcessPool("gone"))
            else:
                future.set_result({"status": "finished"})
            return future

        def shutdown(self, **_: Any) -> None: ...

    monkeypatch.setattr(engines.Processes, "_new_pool", lambda self: Pool())
    four = [runs.Run("mnist", {"dataset": "digits", "seed": seed}, True) for seed in range(4)]
    with engines.Processes(2) as engine:
        ended = list(engine(four, lambda run: None))
    assert sorted(run.settings["seed"] for run, _ in ended) == [0, 1, 2, 3]
    assert [record["status"] for _, record in ended].count("failed") == 2
    assert "worker process died" in next(record["traceback"] for _, record in ended if record["status"] == "failed")


class Interrupted:
    """A pool that Ctrl-C stops at the first run."""

    def submit(self, function: Callable[..., Any], run: runs.Run) -> Future[runs.Record]:
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as a worker that is started here inherits
        raise KeyboardInterrupt

    def shutdown(self, **_: Any) -> None: ...


def test_ctrl_c_ends_a_sweep_and_its_workers_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Worker:
        running = True

        def terminate(self) -> None:
            self.running = False

    workers, handler = [Worker(), Worker()], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(engines.Processes, "_new_pool", lambda self: Interrupted())
    monkeypatch.setattr(engines, "active_children", lambda: workers)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    with pytest.raises(SystemExit, match=r"^130$"):
        compare.main(compare.CompareSettings(grid=str(file), jobs=2, out=str(tmp_path / "out")))
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"Stopped\. The records .* are kept in .*, and the same command goes on\.", lines[-1])
    assert not any(worker.running for worker in workers)
    assert signal.getsignal(signal.SIGINT) == handler


def test_the_end_of_a_run_is_one_line_of_a_log(capsys: pytest.CaptureFixture) -> None:
    """Piped output was broken after 80 characters, in the middle of a result."""
    record = {"status": "ended", "reads_test": True, "result": {"test_accuracy": 0.5, "seconds": 12.0}}
    name = "synthetic shapes, 2,000 images · input, every 4th step, label smoothing 0.1 · seed 3"
    with sweep.Display() as display:
        display.begin("reported", total=1, done=0)
        display.ended(name, record)
    assert f"{name}: test accuracy 50.00%, 12 s" in capsys.readouterr().err.splitlines()


def test_ctrl_c_in_a_run_is_no_result_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise SystemExit(1)  # what Lightning makes of it

    monkeypatch.setattr(runs.Trainer, "fit", interrupted)
    run = next(one.run for one in tiny().every_run())
    with pytest.raises(KeyboardInterrupt):
        runs.make(run)


def test_a_killed_sweep_goes_on_to_the_same_end(unbroken: tuple[Path, list[sweep.Done]], tmp_path: Path) -> None:
    """SIGKILL at a random moment; two worker processes, which must not outlive their parent."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    command = [sys.executable, str(ROOT / "recipes" / "compare.py"), "--grid", str(file), "--jobs", "2", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    enough = random.Random().randint(1, 8)  # a new moment every time
    ended = (line for line in process.stdout if "accuracy" in line)
    assert len(list(islice(ended, enough))) == enough, "the sweep ended before it was killed"
    process.kill()
    process.communicate(timeout=300)  # to the end of what the workers write: until the last of them is gone
    assert process.returncode == -signal.SIGKILL
    before = written(tmp_path / "out" / "runs")
    resumed: list[str] = []

    def in_this_process(
        missing: Iterable[runs.Run], started: engines.Started
    ) -> Iterator[tuple[runs.Run, runs.Record]]:
        for run in missing:
            resumed.append(run.key)
            yield run, runs.make(run)

    make_all(tiny(), tmp_path / "out" / "runs", in_this_process)
    after = written(tmp_path / "out" / "runs")
    assert enough <= len(before) < len(after)
    assert sorted(resumed) == sorted(set(after) - set(before))
    expected = written(unbroken[0] / "runs")
    assert {key: without_clock(one) for key, one in after.items()} == {
        key: without_clock(one) for key, one in expected.items()
    }


@pytest.mark.parametrize("text", ["", '{"status": "fin', "{}", "[]", "\xff"])
def test_a_damaged_record_is_named_and_made_again(text: str, tmp_path: Path) -> None:
    run = next(one.run for one in tiny().every_run())
    (tmp_path / f"{run.key}.json").write_text(text, encoding="latin-1")
    found = records.Records(tmp_path)
    with pytest.warns(UserWarning, match=rf"{run.key}.json is damaged: its run is made again"):
        assert found.get(run) is None


def test_what_a_killed_sweep_was_writing_is_removed(tmp_path: Path) -> None:
    (tmp_path / "0a1b.json.7f.part").write_text('{"status"')
    with records.Records(tmp_path):
        assert not list(tmp_path.glob("*.part"))


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        records.Records(tmp_path),
        pytest.raises(UserError, match="another sweep is writing"),
        records.Records(tmp_path),
    ):
        pass


# ---- Ray ------------------------------------------------------------------------------------------------------------


def test_ray_gives_the_same_records(unbroken: tuple[Path, list[sweep.Done]], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='--engine ray needs pip install "gradpen[ray]"')
    described = tiny(methods={"none": {}}, sweeps=[])
    with engines.Ray(jobs=2) as engine:
        make_all(described, tmp_path, engine)
    made, expected = written(tmp_path), written(unbroken[0] / "runs")
    assert len(made) == 2
    assert {key: without_clock(one) for key, one in made.items()} == {key: without_clock(expected[key]) for key in made}


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape('pip install "gradpen[ray]"')):
        engines.Ray(jobs=2)


# ---- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_grids_in_the_repository_are_whole(path: Path) -> None:
    described = grid.read_grid(path)
    planned = list(described.every_run())
    assert {one.stage for one in planned} >= {"report"}
    assert len({one.run.key for one in planned if one.stage == "report"}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"input": {"penalty": "input"}}}, "expected a method named none"),
        ({"seeds": [0, 1]}, "choose_seed 0 must not be among the seeds"),
        ({"matched_compute": "some"}, "matched_compute must be one of none, largest, each, got 'some'"),
        ({"tasks": [{"matched_compute": "some"}]}, "matched_compute must be one of none, largest, each, got 'some'"),
        ({"methods": {"none": {}, "a": {"like": "b"}}}, "which must be a method that is not like another"),
        ({"methods": {"none": {"wait": 1}}}, r"recipes/mnist.py has no setting wait"),
        ({"tasks": [{"train_size": 5}, {"train_size": 5, "epochs": 2}]}, "tasks must have different names"),
        ({"tasks": [{"train_size": 5, "only": ["input"]}]}, r"only must name methods of the grid, none among them"),
        (
            {"tasks": [{"train_size": 5, "only": ["none", "input, every 2nd step"]}]},
            "'input, every 2nd step' is like 'input', which only must name too",
        ),
        ({"tasks": [{"methods": {"input, every 2nd step": {}}}]}, "methods of a task must not be like another"),
        ({"tasks": [{"methods": {"inptu": {}}}]}, "methods of a task must be some that are compared on it, got inptu"),
        ({"settings": {"recipe": "mnist"}}, "give dataset a name, not auto"),
        ({"settings": {"recipe": "imagenet"}}, "recipe must be one of mnist, cifar"),
        ({"seeds": [1, 1]}, r"seeds must be different, .*, got \[1, 1\]"),
        ({"seeds": 3}, "seeds must be a list that is not empty, got 3"),
        ({"seeds": []}, r"seeds must be a list that is not empty, got \[\]"),
        ({"seeds": [1, "a"]}, "seeds must be whole numbers >= 0, got 'a'"),
        ({"choose_seed": "a"}, "choose_seed must be whole numbers >= 0, got 'a'"),
        ({"tasks": None}, "tasks must be a list that is not empty, got None"),
        ({"tasks": [{"train_size": [5, 6]}]}, r"train_size of a task must be one value, got \[5, 6\]"),
        ({"tasks": [{"only": "none"}]}, "only of a task must be a list that is not empty, got 'none'"),
        ({"tasks": [{"report": 3}]}, "report of a task must be names with values"),
        ({"methods": {"none": None}}, "method none must be names with values, such as .*, got None"),
        ({"methods": {"none": {}, "a": {"like": ["b"]}}}, r"'a' is like \['b'\], which must be a method"),
        ({"methods": {"none": {}, "a": {"penalty": "input", "weight": []}}}, "weight of method a must be a list"),
        ({"methods": {"none": {}, "a": {"penalty": "inpt"}}}, "a: penalty must be none or input or .*, got 'inpt'"),
        ({"methods": {"none": {}, "a": {"lr": "1e-3"}}}, "a: lr must be a number, got '1e-3'"),
        ({"methods": {"none": {}, "a": {"lr": None}}}, "a: lr must be a number, got None"),
        ({"methods": {"none": {}, "a": {"hidden": 16}}}, "a: hidden must be text in quotes, got 16"),
        ({"methods": {"none": {}, "a": {"hidden": [[16]]}}}, r"a: hidden must be text in quotes, got \[16\]"),
        ({"methods": {"none": {}, "a": {"activation": "foo"}}}, "a: activation must be relu or gelu or"),
        ({"methods": {"none": {}, "a": {"over": "all"}}}, "a: over must be a whole number or sample or batch"),
        ({"tasks": [{"train_size": "5"}]}, "train_size must be a whole number or null, got '5'"),
        ({"tasks": [{"dataset": "foo"}]}, "dataset must be auto or mnist or fashion or kmnist or digits, got 'foo'"),
        ({"sweeps": [{"question": 4, "seeds": [1]}]}, "question of a sweep must be 5 or 6, got 4"),
        ({"sweeps": [{"question": 5, "seeds": [1, 1]}]}, "seeds of a sweep must be different"),
        ({"sweeps": [{"question": 5, "seeds": [1], "vary": {"init": "he"}}]}, "init in vary of a sweep must be a list"),
        ({"sweeps": [{"question": 5, "seeds": [1], "cases": []}]}, "cases of a sweep must be a list that is not empty"),
        ({"sweeps": [{"question": 6, "seeds": [1], "cases": [{"lr": 0.1}, {"lr": 0.1}]}]}, "which would count twice"),
        ({"sweeps": [{"question": 6, "seeds": [1]}] * 2}, "which would count twice"),
        (
            {
                "sweeps": [
                    {"question": 5, "seeds": [seed], "settings": {"activation": activation}, "vary": {"init": ["he"]}}
                    for seed, activation in enumerate(("relu", "tanh"))
                ]
            },
            "sweep 2, init he, seed 1: another sweep of question 5 has a case of this name with other settings",
        ),
        (
            {"sweeps": [{"question": 6, "seeds": [1], "vary": {"seed": [3, 4]}}]},
            r"vary of a sweep may have no seed, got \[3, 4\]",
        ),
        ({"methods": {"none": {}, "a": {"seed": 7}}}, "method a may have no seed, got 7: give seeds"),
    ],
)
def test_mistakes_in_a_grid_are_named_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_unknown_parts_of_a_grid_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({**TINY, "repetitions": 3}))
    with pytest.raises(UserError, match="may have name, tasks, methods"):
        grid.read_grid(file)
    file.write_text("name: x\n")
    with pytest.raises(UserError, match="lacks tasks, methods, seeds"):
        grid.read_grid(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: grid.yaml", "extends must name another grid file, got 'grid.yaml'"),
        ("extends: other.yaml", "extends must name another grid file, got 'grid.yaml' in .*other.yaml"),
        ("extends: [tiny.yaml]", r"extends must name another grid file, got \['tiny.yaml'\]"),
        ("extends: tiny.yaml\nsettings: 3", "settings must be names with values, such as .*, got 3"),
        ("extends: tiny.yaml\nsweeps: 3", "sweeps must be a list, got 3"),
        ("extends: tiny.yaml\nrepetitions: 3", "sweeps, extends, got"),
        ("- a", "grid.yaml must be names with values"),
        ("\xff", "grid.yaml cannot be read"),
    ],
)
def test_mistakes_in_a_grid_file_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "other.yaml").write_text("extends: grid.yaml")
    (tmp_path / "grid.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        grid.read_grid(tmp_path / "grid.yaml")


def test_numbers_in_a_grid_file_are_those_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "grid.yaml").write_text(
        "extends: tiny.yaml\nsettings: {lr: 1e-2}\ntasks: [{weight_decay: [1e-1, +1.5E1]}]"
    )
    described = grid.read_grid(tmp_path / "grid.yaml")
    settings = [one.run.full_settings() for one in described.choosing()]
    assert {one.lr for one in settings} == {0.01}
    assert {one.weight_decay for one in settings} == {0.1, 15.0}


def test_the_parts_of_a_grid_are_explained() -> None:
    parts = [field.name for kind in (grid.Grid, grid.Sweep) for field in fields(kind)]
    assert not [
        name for name in [*parts, *grid.NOT_FLAGS, "like", "extends"] if f"{name}: " not in (grid.__doc__ or "")
    ]


def test_candidates_need_validation_images() -> None:
    settings = {**TINY["settings"], "val_size": 0}
    methods = {"none": {}, "input": {"penalty": "input", "weight": [0.1, 1.0]}}
    with pytest.raises(UserError, match="give val_size"):
        tiny(settings=settings, methods=methods, sweeps=[])


@pytest.mark.parametrize(
    ("matched", "expected"),
    [
        ("each", {"input": 2.5, "param": 1.5}),
        ("largest", {"input": 2.5, "param": 2.5}),
        ("none", {}),
    ],
)
def test_the_plain_baseline_gets_at_least_the_compute(matched: str, expected: dict[str, float]) -> None:
    costs = {"none": 1.0, "weight decay": 1.02, "input": 2.25, "param": 1.5}
    assert tiny(matched_compute=matched).factors(costs, {}) == expected
    assert tiny(matched_compute="each").factors(costs, {"matched_compute": matched}) == expected


def test_the_plain_baseline_gets_more_epochs_than_the_recipe_s() -> None:
    described = tiny(tasks=[{"train_size": 5}], sweeps=[])
    plain = described.candidates(described.tasks[0], "none")[0]
    planned = list(described.matching(described.tasks[0], {"input": 2.25}, plain))
    assert [one.run.settings["epochs"] for one in planned] == [50, 50]


def test_two_tasks_on_the_same_images_are_told_apart_by_name() -> None:
    tasks = [{"train_size": 5}, {"name": "{data}, longer", "train_size": 5, "epochs": 9}]
    assert {one.task for one in tiny(tasks=tasks, sweeps=[]).every_run()} == {"digits, 5 images", "digits, longer"}


def test_a_task_may_have_candidates_of_its_own() -> None:
    described = tiny(
        tasks=[{"train_size": 5}, {"train_size": 6, "methods": {"input": {"weight": [7, 8, 9]}}}], sweeps=[]
    )
    weights = [[one["weight"] for one in described.candidates(task, "input")] for task in described.tasks]
    assert weights == [[0.01, 0.1], [7, 8, 9]]
    like = [one["weight"] for one in described.candidates(described.tasks[1], "input, every 2nd step")]
    assert like == [7, 8, 9]


def test_what_is_reported_may_train_on_the_validation_images_too() -> None:
    described = tiny(tasks=[{"train_size": 1000, "report": {"train_size": 1400, "val_size": 0}}])
    planned = list(described.every_run())
    for stage, expected in (("choose", (1000, 200)), ("report", (1400, 0))):
        settings = [one.run.settings for one in planned if one.stage == stage]
        assert {(one["train_size"], one["val_size"]) for one in settings} == {expected}
    assert {one.task for one in planned if one.stage != "sweep"} == {"digits, 1,400 images"}


def test_a_task_may_compare_some_methods_only() -> None:
    described = tiny(tasks=[{"train_size": 50}, {"train_size": 100, "only": ["none", "param"]}], sweeps=[])
    methods = {one.method for one in described.every_run() if one.task == "digits, 100 images"}
    assert methods == {"none", "param"}


def test_a_run_is_known_by_what_decides_its_result() -> None:
    run = runs.Run("mnist", {"dataset": "digits", "seed": 1}, True)
    assert (
        run.key == runs.Run("mnist", {"seed": 1, "epochs": 20, "dataset": "digits", "data_dir": "elsewhere"}, True).key
    )
    assert run.key != replace(run, settings={**run.settings, "seed": 2}).key
    assert run.key != replace(run, settings={**run.settings, "epochs": 21}).key
    assert run.key != replace(run, reads_test=False).key


def test_records_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.Run("mnist", {"dataset": "digits"}, True)
    found = records.Records(tmp_path)
    whole = {"key": run.key, "status": "finished", "result": {"loss": None}, "history": []}
    found.put(run, {**whole, "result": {"loss": float("nan")}})
    assert found.get(run) == whole

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        found.put(run, {**whole, "result": {}})
    assert not list(tmp_path.glob("*.part"))
    assert found.get(run) == whole


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_the_cost_is_that_of_the_formulas() -> None:
    """F multiplications in a forward pass, F₁ of them in the first layer; a plain step has 3F − F₁.

    Eight samples are so few that the gradient norm over the batch comes from products between them.
    """
    widths = [36, 16, 16, 10]
    products = [a * b for a, b in pairwise(widths)]
    F, F1 = sum(products), products[0]
    settings = runs.Run("mnist", {"dataset": "digits", "hidden": "16,16"}, True).full_settings()
    model = models.mlp(settings, 36, 10)
    x, y = torch.randn(8, 36), torch.randint(10, (8,))

    def cost(**changes: Any) -> float:
        objective = objectives.penalised_loss(replace(settings, **changes))
        return objectives.cost_in_multiplications(model, objective, x, y) * (3 * F - F1)

    assert cost() == 3 * F - F1
    assert cost(penalty="input", weight=1.0) == pytest.approx(6 * F - F1, rel=0.02)
    assert cost(penalty="param", weight=1.0) == pytest.approx(6 * F - 4 * F1, rel=0.02)
    between_samples = 8 * (36 + 16) + 2 * 8 * (16 + 16) + 2 * 8 * (16 + 10)
    assert cost(penalty="param", weight=1.0, over="batch") == pytest.approx(6 * F - 4 * F1 + between_samples, rel=0.02)
    saved = 2 * 36 * 16 - 8 * (36 + 16)  # the displaced first layer and its gradient, by products between samples
    assert cost(sam_radius=0.1) == pytest.approx(2 * (3 * F - F1) - saved, rel=0.02)
    lazy = cost(penalty="input", weight=1.0, every_n_steps=4)
    assert lazy == pytest.approx(3 * F - F1 + (cost(penalty="input", weight=1.0) - 3 * F + F1) / 4, rel=0.02)


def test_intervals_are_student_s() -> None:
    values, reference = {1: 93.1, 2: 92.8, 3: 93.9, 4: 93.0}, {1: 90.2, 2: 90.9, 3: 91.0, 5: 80.0}
    found = intervals.paired(values, reference)
    oracle = stats.ttest_rel([93.1, 92.8, 93.9], [90.2, 90.9, 91.0]).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high, found.count) == (pytest.approx(oracle.low), pytest.approx(oracle.high), 3)
    assert intervals.interval([1.0]) == intervals.Interval(1.0, None, 1)
    assert intervals.interval([]) is None
    ratio = intervals.paired_ratio({1: 2.0, 2: 8.0, 3: 0.0}, {1: 1.0, 2: 1.0, 3: 1.0})
    assert ratio is not None
    assert ratio.exp()[0] == pytest.approx(4.0)
    assert intervals.Interval(0.0, 1000.0, 2).exp() == (1.0, 0.0, math.inf)


@pytest.mark.parametrize("scheme", ["he", "xavier", "orthogonal"])
def test_initialisations_have_the_activation_s_gain(scheme: str) -> None:
    settings = runs.Run("mnist", {"dataset": "digits", "hidden": "400", "init": scheme}, True).full_settings()
    weight = models.mlp(settings, 300, 10).get_submodule("dense1").weight.detach()
    gain, fan_in, fan_out = 2**0.5, 300, 400
    if scheme == "orthogonal":
        assert torch.allclose(weight.T @ weight, gain**2 * torch.eye(300), atol=1e-4)
    std = {
        "he": gain / fan_in**0.5,
        "xavier": gain * (2 / (fan_in + fan_out)) ** 0.5,
        "orthogonal": gain / fan_out**0.5,
    }
    assert float(weight.std()) == pytest.approx(std[scheme], rel=0.02)


def test_an_activation_without_a_gain_is_named() -> None:
    settings = runs.Run("mnist", {"dataset": "digits", "init": "he", "activation": "gelu"}, True).full_settings()
    with pytest.raises(UserError, match=r"torch knows for relu, tanh: got --activation gelu"):
        models.mlp(settings, 4, 2)


# ---- the command line -----------------------------------------------------------------------------------------------


def test_a_dry_run_estimates_what_is_left(
    unbroken: tuple[Path, list[sweep.Done]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    times = estimate.StepTimes(step=3600.0, check=0.0, ladder=3600.0)
    monkeypatch.setattr(estimate, "measure", lambda settings, images: times)
    compare.main(compare.CompareSettings(grid=str(file), out=str(tmp_path / "out"), dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("18 runs are left")
    assert not written(tmp_path / "out" / "runs")
    sweeps = next(line for line in lines if "sweep 1" in line)
    steps = -(-(1438 - 200) // 50)  # one epoch of all digits but those that are held out
    assert sweeps.split()[-3:] == ["2", "0", f"{2 * (steps + 2):.2f}"]  # two runs with two ladders each
    compare.main(compare.CompareSettings(grid=str(file), out=str(unbroken[0]), dry_run=True))
    assert "0 runs are left: 0.00 hours" in capsys.readouterr().out


def test_matched_compute_is_estimated_with_the_epochs_that_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = estimate.StepTimes(step=1.0, check=0.0, ladder=0.0)
    monkeypatch.setattr(estimate, "measure", lambda settings, images: times)
    methods = {"none": {}, "input": {"penalty": "input", "weight": 0.1}}
    tasks = [{"train_size": 100, "epochs": 1, "report": {"epochs": 4}}]
    with records.Records(tmp_path) as found:
        described = tiny(methods=methods, tasks=tasks, sweeps=[], seeds=[1])
        matched = estimate.estimates(described, found)[-1]
    assert matched.stage == "matched"
    assert matched.seconds == 2 * 4 * 2.5  # steps an epoch, epochs, and how many times as many


def test_data_that_is_not_there_stops_a_sweep_before_it_starts(
    no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**TINY, "settings": {**TINY["settings"], "dataset": "kmnist"}}))
    with pytest.raises(UserError, match="KMNIST is not in"):
        compare.main(compare.CompareSettings(grid=str(file), data_dir=str(tmp_path), jobs=2, out=str(tmp_path / "out")))
    assert not written(tmp_path / "out" / "runs")


@pytest.mark.parametrize("dry_run", [True, False])
def test_more_images_than_there_are_stop_a_sweep_before_it_starts(
    dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**TINY, "tasks": [{"train_size": 3000}]}))
    with pytest.raises(UserError, match=r"has 1,438 training images: .* got 3000 and 200"):
        compare.main(compare.CompareSettings(grid=str(file), dry_run=dry_run, out=str(tmp_path / "out")))
    assert not written(tmp_path / "out" / "runs")


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_step_times_are_measured(precision: str) -> None:
    run = tiny_run(precision=precision)
    times = estimate.measure(run.full_settings(), runs.load(run))
    assert min(times.step, times.check, times.ladder) > 0


def test_runs_in_double_precision_are_measured_in_it() -> None:
    record = runs.make(tiny_run(precision="64-true"))
    assert record["status"] == "finished", record["traceback"]
    joint = record["result"]["ladder"]["end"]["joint"]
    assert joint != float(torch.tensor(joint))  # no number of float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"publish": "out"}, "--publish must be another folder than --out, got out"),
        ({"out": "file"}, "expected a folder that can be written to, got file"),
        ({"publish": "file"}, "expected a folder that can be written to, got file"),
    ],
)
def test_folders_that_cannot_be_are_named_before_anything_runs(
    changes: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(compare, "run_grid", lambda *_: pytest.fail("started"))
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.raises(UserError, match=message):
        compare.main(compare.CompareSettings(**{"grid": "tiny.yaml", "out": "out", **changes}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"jobs": 0}, "--jobs must be >= 1, got 0"), ({"ray_address": "auto"}, "--ray-address goes with --engine ray")],
)
def test_mistakes_in_flags_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare.CompareSettings(grid="x.yaml", **settings)
