"""The recipes end to end, on the digits embedded in scikit-learn; on MNIST itself where it lies beside the checkout."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

for needed in ("jsonargparse", "matplotlib", "sklearn", "tensorboard", "torchvision"):
    pytest.importorskip(needed, reason='the recipes need pip install "gradpen[recipes]"')

import downloads
import flags
import images
import mnist
import models
import objectives
import training

ROOT = Path(__file__).parents[1]
SMALL = ("--dataset", "digits", "--hidden", "32,16", "--epochs", "2", "--accelerator", "cpu")
FILES = ("summary.json", "metrics.csv", "bound.csv", "bound.png", "hparams.yaml", "last.ckpt")
KEYS = {"dataset", "penalty", "weight", "seed", "epochs", "test_accuracy", "train_accuracy", "tightness", "violations"}
MNIST_DIR = next(
    (folder for folder in (ROOT / "data", ROOT.parent / "shared" / "data") if (folder / "MNIST" / "raw").is_dir()), None
)

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Runs recipes/mnist.py in this process: run("--penalty", "param", out="a") → summary."""

    def run_recipe(*args: str, out: str = "run", small: tuple[str, ...] = SMALL) -> dict[str, Any]:
        return mnist.main(flags.parse_flags(mnist.MnistSettings, [*small, "--out", str(tmp_path / out), *args]))

    yield run_recipe
    torch.use_deterministic_algorithms(False)  # the trainer has set it


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run tells while it goes on."""
    lines: list[str] = []
    monkeypatch.setattr(training, "rank_zero_info", lines.append)
    return lines


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_clock(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name not in ("seconds", "penalty_cost", "out")}


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["none", "input", "param", "both"])
def test_a_run_ends_with_every_result(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture, penalty: str) -> None:
    summary = run("--penalty", penalty)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary.keys() >= KEYS | {"seconds"}
    assert (summary["dataset"], summary["penalty"], summary["epochs"]) == ("digits", penalty, 2)
    assert summary["violations"] == 0
    assert 0 < summary["tightness"] <= 1
    assert not summary["diverged"]
    assert 0.1 < summary["test_accuracy"] <= 1
    assert 0.1 < summary["train_accuracy"] <= 1
    for name in FILES:
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    bound = rows(tmp_path / "run" / "bound.csv")
    assert {row["layer"] for row in bound} == {"all", "dense1", "dense2", "dense3"}
    assert (summary["checks"], summary["checks_made"]) == (30, sum(row["layer"] == "all" for row in bound))
    assert all(0 < float(row["lhs"]) <= float(row["rhs"]) < math.inf for row in bound if row["layer"] == "all")
    logged = set(rows(tmp_path / "run" / "metrics.csv")[0])
    names = {"none": [], "both": ["input", "param"]}.get(penalty, [penalty])
    assert logged >= {"data_loss", "accuracy/train", "bound/lhs", "bound/dense1/tightness"}
    assert {name for name in logged if name.startswith("penalty/")} == {f"penalty/{name}" for name in names}
    printed = capsys.readouterr().out
    assert "scikit-learn digits (8×8, 1,797 images)" in printed
    for line in ("test accuracy", "train − test gap", "tightness", "layer dense2", "violations", "penalty's cost"):
        assert line in printed


def test_equal_seeds_give_equal_runs(run: Run, tmp_path: Path) -> None:
    same = [run("--penalty", "both", "--dropout", "0.1", out=out) for out in ("a", "b")]
    other = run("--penalty", "both", "--dropout", "0.1", "--seed", "1", out="c")
    assert without_clock(same[0]) == without_clock(same[1])
    assert rows(tmp_path / "a" / "metrics.csv") == rows(tmp_path / "b" / "metrics.csv")
    assert other["tightness"] != same[0]["tightness"]


def test_a_stopped_run_has_results_and_resumes_to_the_same_end(
    run: Run, tmp_path: Path, said: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = run("--penalty", "param", out="unbroken")
    set_epoch = images.EpochBatches.set_epoch

    def press_ctrl_c(self: images.EpochBatches, epoch: int) -> None:
        if epoch == 1 and self.shuffle_seed is not None:  # the second training epoch
            raise KeyboardInterrupt
        set_epoch(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(images.EpochBatches, "set_epoch", press_ctrl_c)
        stopped = run("--penalty", "param", out="stopped")
    assert said[-1] == "Stopped early. Go on later with --resume."
    assert not stopped["completed"]
    assert stopped["epochs_done"] == 1
    assert (stopped["checked_at"], stopped["steps"]) == (10, 12)
    printed = capsys.readouterr().out
    assert ", 2 steps before the end)" in printed
    assert "for 1 epoch (stopped early, of 2), checks included" in printed
    assert (tmp_path / "stopped" / "bound.png").exists()
    resumed = run("--penalty", "param", "--resume", out="stopped")
    assert without_clock(resumed) == without_clock(unbroken)
    assert resumed["checked_at"] == resumed["steps"]
    printed = capsys.readouterr().out
    assert "before the end" not in printed
    assert "for 2 epochs, checks included" in printed
    for name in ("bound.csv", "metrics.csv"):
        assert rows(tmp_path / "stopped" / name) == rows(tmp_path / "unbroken" / name)


def test_a_validation_split_is_reported(run: Run) -> None:
    summary = run("--val-size", "200", "--train-size", "1000", "--epochs", "1")
    assert summary["train_images"] == 1000
    assert 0 < summary["val_accuracy"] <= 1


TINY = ("--dataset", "digits", "--hidden", "8", "--epochs", "1", "--probe-size", "4", "--accelerator", "cpu")


@pytest.mark.parametrize("kind", ["RichProgressBar", "TQDMProgressBar"])
def test_the_bar_shows_the_epoch_that_has_ended(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    shown = []

    class Bar(getattr(training, kind)):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            shown.append(self.get_metrics(trainer, pl_module))

    monkeypatch.setattr(training, kind, Bar)
    monkeypatch.setattr(training, "find_spec", lambda name: kind == "RichProgressBar")
    run("--epochs", "2", "--val-size", "100", small=TINY)
    for name in ("accuracy/train", "accuracy/val"):
        written = [float(row[name]) for row in rows(tmp_path / "run" / "metrics.csv") if row[name]]
        assert [float(bar[name]) for bar in shown] == pytest.approx(written)


@pytest.mark.parametrize(("every", "before_the_first"), [(2, set()), (5, {19})])
def test_rows_have_the_lazy_penalties_that_the_epoch_computed_last(
    run: Run, tmp_path: Path, every: int, before_the_first: set[int]
) -> None:
    """Every 4th step is logged, and no 4th one is among those that compute every second penalty."""
    run("--penalty", "both", "--every-n-steps", str(every), "--batch-size", "85", "--epochs", "2", small=TINY)
    logged = {int(row["step"]): row for row in rows(tmp_path / "run" / "metrics.csv") if row["data_loss"]}
    assert list(logged) == [3, 7, 11, 15, 19, 23, 27, 31]
    for name in ("penalty/input", "penalty/param"):
        assert {step for step, row in logged.items() if not row[name]} == before_the_first
        assert all(float(row[name]) > 0 for step, row in logged.items() if step not in before_the_first)


def test_a_run_stopped_in_its_first_epoch_cannot_be_resumed(
    run: Run, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Classifier, "training_step", press_ctrl_c)
    assert not run(small=TINY)["completed"]
    assert said[-1] == "Stopped early. No epoch was finished to go on from."


def test_a_run_says_that_it_removes_an_earlier_one(run: Run, tmp_path: Path, said: list[str]) -> None:
    """Whoever forgets --resume loses a checkpoint: not without a word."""
    run(small=TINY)
    assert not any("earlier run" in line for line in said)
    run("--seed", "1", small=TINY)
    (line,) = [line for line in said if "earlier run" in line]
    assert line.startswith(f"{tmp_path / 'run'} held an earlier run, which is removed")
    run("--seed", "1", "--resume", small=TINY)
    assert len([line for line in said if "earlier run" in line]) == 1


def test_a_finished_run_resumes_to_the_same_summary(run: Run) -> None:
    odd = ("--val-size", "100", "--checks", "1", "--batch-size", "100")  # 14 steps: the last check is at the end alone
    finished = run(*odd, small=TINY)
    assert finished["val_accuracy"] is not None
    assert without_clock(run(*odd, "--resume", small=TINY)) == without_clock(finished)


def test_a_run_is_not_resumed_with_other_flags(run: Run, tmp_path: Path) -> None:
    run("--penalty", "input", "--weight", "0.1", small=TINY)
    before = contents(tmp_path)
    for args, message in (
        (
            ("--weight", "1000", "--seed", "7"),
            r"has --weight 0.1 --seed 0, got --weight 1000.0 --seed 7: give the flags",
        ),
        (("--weight", "0.1", "--epochs", "5"), r"has --epochs 1, got --epochs 5"),
    ):
        with pytest.raises(flags.UserError, match=message):
            run("--penalty", "input", *args, "--resume", small=TINY)
    assert contents(tmp_path) == before
    elsewhere = ("--data-dir", str(tmp_path), "--accelerator", "auto")  # the same run
    assert run("--penalty", "input", "--weight", "0.1", *elsewhere, "--resume", small=TINY)["epochs_done"] == 1


def test_flags_that_a_recorded_run_did_not_have_had_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text("dropout: 0.5")
    (tmp_path / "last.ckpt").touch()
    assert training._checkpoint(parse("--dropout", "0.5", "--resume"), tmp_path) == tmp_path / "last.ckpt"
    with pytest.raises(flags.UserError, match=r"has --hidden 512,512, got --hidden 8"):
        training._checkpoint(parse("--dropout", "0.5", "--hidden", "8", "--resume"), tmp_path)
    (tmp_path / "hparams.yaml").unlink()
    with pytest.raises(flags.UserError, match=r"the flags of the run under .* cannot be read"):
        training._checkpoint(parse("--resume"), tmp_path)


def test_a_resume_without_checkpoint_says_so(run: Run, tmp_path: Path, said: list[str]) -> None:
    run("--resume", small=TINY)
    assert said[0] == f"no checkpoint under {tmp_path / 'run'}: starting from the beginning"


@pytest.mark.parametrize("damage", [b"", b"no checkpoint", b"PK", pickle.dumps({}, protocol=2)])
def test_a_damaged_checkpoint_is_named(run: Run, tmp_path: Path, damage: bytes) -> None:
    run(small=TINY)
    (tmp_path / "run" / "last.ckpt").write_bytes(damage)
    with pytest.raises(flags.UserError, match=r"last.ckpt cannot be read .*: start anew without --resume"):
        run("--resume", small=TINY)


@pytest.mark.parametrize("end", ["in the header", "in a row", "after a row"])
def test_rows_that_a_killed_run_has_not_written_whole_are_left_out(tmp_path: Path, said: list[str], end: str) -> None:
    path = tmp_path / "metrics.csv"
    text = {
        "in the header": "data_lo",
        "in a row": "data_loss,step\n0.5,10\n0.4,2",
        "after a row": "data_loss,step\n0.5,10\n",
    }
    path.write_text(text[end], encoding="utf-8")
    assert training._rows_until(path, 20) == ([] if end == "in the header" else [{"data_loss": "0.5", "step": "10"}])
    assert len(said) == (end != "after a row")


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    for text in ("data_loss\n0.5\n", "data_loss,step\n0.5,\x00\x01\n"):
        (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
        with pytest.raises(flags.UserError, match=r"metrics.csv cannot be read .*: remove it, or start anew"):
            training._rows_until(tmp_path / "metrics.csv", 20)


def test_a_mistaken_flag_leaves_the_earlier_run_as_it_was(run: Run, tmp_path: Path) -> None:
    run(small=TINY)
    before = contents(tmp_path)
    for args, message in (
        (("--strategy", "foo"), r"--strategy foo .* is refused by Lightning: .* invalid strategy name"),
        (("--devices", "0"), r"--devices 0 .* is refused by Lightning"),
    ):
        with pytest.raises(flags.UserError, match=message):
            run(*args, small=TINY)
    assert contents(tmp_path) == before


def test_out_must_be_a_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(flags.UserError, match=r"--out .*run is no folder, and cannot be made one"):
        run(small=TINY)


@pytest.mark.filterwarnings("ignore:no check of the inequality")
def test_a_run_that_diverged_says_so(run: Run, capsys: pytest.CaptureFixture) -> None:
    summary = run("--optimizer", "sgd", "--lr", "1e30", small=TINY)
    assert summary["diverged"]
    assert (summary["tightness"], summary["input_grad_sq_norm"], summary["tightness_by_layer"]) == (None, None, {})
    assert summary["checks_made"] == 1  # before the first step
    printed = capsys.readouterr().out
    assert "diverged" in printed
    assert "no check at the end" in printed


def test_a_run_whose_units_are_dead_has_a_summary(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "mlp", lambda *args, **sizes: models.mlp(*args, **sizes).apply(nothing_alive))
    summary = run("--lr", "0", small=TINY)
    assert not summary["diverged"]
    assert "undefined" in capsys.readouterr().out

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "run" / "summary.json").read_text(encoding="utf-8")
    assert None in json.loads(text, parse_constant=refuse)["tightness_by_layer"].values()


def nothing_alive(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.constant_(parameter, -1.0 if parameter.dim() == 1 else 0.0)


@pytest.mark.filterwarnings("ignore:no check of the inequality")
def test_a_run_without_any_check_has_results(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "mlp", lambda *args, **sizes: models.mlp(*args, **sizes).apply(no_numbers))
    summary = run(small=TINY)
    assert (summary["diverged"], summary["checks_made"], summary["violations"]) == (True, 0, 0)
    assert not (tmp_path / "run" / "bound.png").exists()


def no_numbers(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.constant_(parameter, math.nan)


def test_variants_run(run: Run) -> None:
    summary = run(
        *("--penalty", "input", "--of", "output", "--method", "projection", "--weight", "0.01"),
        *("--activation", "tanh", "--precision", "64-true", "--epochs", "1", "--hidden", "16"),
    )
    assert summary["violations"] == 0
    assert list(summary["tightness_by_layer"]) == ["dense1", "dense2"]


def test_the_command_line_falls_back_to_the_digits(tmp_path: Path) -> None:
    """The real thing, in a process of its own; the data folder is a file, so nothing can be read or downloaded."""
    (tmp_path / "data").write_text("not a folder")
    command = [sys.executable, str(ROOT / "recipes" / "mnist.py"), "--penalty=param", "--hidden", "16", "--epochs", "1"]
    dashed = ["--train-size", "300", "--batch-size=64", "--data-dir", "data", "--accelerator", "cpu"]
    done = subprocess.run(
        [*command, *dashed],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Using scikit-learn digits (8×8, 1,797 images) instead" in done.stderr
    assert "not about MNIST" in done.stderr
    assert "scikit-learn digits (8×8, 1,797 images): param penalty" in done.stdout
    summary = json.loads((tmp_path / "runs" / "digits-param-s0" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["dataset"], summary["train_images"], summary["batch_size"]) == ("digits", 300, 64)


@pytest.mark.data
@pytest.mark.skipif(MNIST_DIR is None, reason="MNIST is neither in data/ nor in ../shared/data")
def test_a_run_on_mnist(run: Run) -> None:
    small = ("--train-size", "1000", "--epochs", "3", "--hidden", "64", "--accelerator", "cpu")
    summary = run("--penalty", "param", "--data-dir", str(MNIST_DIR), small=small)
    assert (summary["dataset"], summary["dataset_name"]) == ("mnist", "MNIST")
    assert summary["test_accuracy"] > 0.5
    assert summary["violations"] == 0


# ---- flags and data -------------------------------------------------------------------------------------------------


def parse(*args: str) -> mnist.MnistSettings:
    return flags.parse_flags(mnist.MnistSettings, args)


@pytest.mark.parametrize("spelling", ["--train-size=50", "--train_size=50"])
def test_flags_are_taken_with_dashes_and_underscores(spelling: str) -> None:
    assert parse(spelling).train_size == 50


def test_print_config_writes_what_config_reads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ("--penalty=both", "--weight=0.3", "--param-weight=0.01", "--hidden", "512,512", "--over", "4", "--resume")
    with pytest.raises(SystemExit):
        parse(*given, "--print_config")
    file = tmp_path / "settings.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse("--config", str(file)) == parse(*given)
    assert parse("--config", str(file), "--batch-size", "7").batch_size == 7


def test_the_written_hparams_are_a_config(run: Run, tmp_path: Path) -> None:
    summary = run("--penalty", "input", "--epochs", "1")
    again = parse("--config", str(tmp_path / "run" / "hparams.yaml"))
    assert (again.weight, again.dataset, again.widths()) == (summary["weight"], "digits", [32, 16])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--hidden", "512,x"), "--hidden must be widths >= 1 separated by commas, such as 512,512, got '512,x'"),
        (("--epochs", "0"), "--epochs must be >= 1, got 0"),
        (("--param-weight", "1"), "--param-weight is the second weight of --penalty both, got --penalty none"),
        (("--weight", "1"), "--weight 1.0 needs a penalty"),
        (("--penalty", "param", "--over", "batch"), "--over batch has no default weight: give --weight"),
        (("--dataset", "digits", "--train-size", "5000"), "has 1,438 training images"),
        (("--lr", "-1"), "--lr must be >= 0, got -1.0"),
        (("--dropout", "1.5"), "--dropout must be from 0 to 1, got 1.5"),
        (("--label-smoothing", "2"), "--label-smoothing must be from 0 to 1, got 2.0"),
        (("--seed", "-1"), "--seed must be from 0 to 4294967295, got -1"),
        (
            ("--strategy", "ddp_spawn"),
            "--strategy ddp_spawn: the checks and logs of a run are lost with processes that",
        ),
        (("--strategy", "fsdp"), "--strategy fsdp: the bound needs whole weights"),
        (("--precision", "foo"), "--precision must be one of 32-true, 64-true, 16-mixed, bf16-mixed, got foo"),
        (
            ("--of", "output"),
            "--of is for --penalty input or both, got --penalty none: give one of these, or leave --of out",
        ),
        (("--method", "projection"), "--method is for --penalty input or param or both, got --penalty none"),
        (("--over", "batch"), "--over is for --penalty param or both, got --penalty none"),
        (("--unsquared",), "--unsquared is for --penalty input or param or both, got --penalty none"),
        (("--every-n-steps", "3"), "--every-n-steps is for --penalty input or param or both, got --penalty none"),
        (("--penalty", "input", "--weight", "1", "--over", "4"), "--over is for --penalty param or both"),
        (("--penalty", "param", "--weight", "1", "--of", "output"), "--of is for --penalty input or both"),
    ],
)
def test_mistakes_are_named(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(flags.UserError, match=message.replace("(", r"\(")):
        mnist.main(parse(*args))


def refused() -> None:
    raise flags.UserError("--lr is too high")


def unwritable() -> None:
    Path("/proc/nope").mkdir()


def interrupted() -> None:
    raise KeyboardInterrupt


def interrupted_in_lightning() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def interrupted_with_a_line_of_its_own() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit("Stopped by hand.")


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (refused, "error: --lr is too high", ""),
        (unwritable, "error: [Errno 2] No such file or directory: '/proc/nope'", ""),
        (interrupted, 130, "Stopped. With --resume, the same command goes on"),
        (interrupted_in_lightning, 130, "Stopped. With --resume, the same command goes on"),
        (interrupted_with_a_line_of_its_own, "Stopped by hand.", ""),
        (sys.exit, None, ""),
    ],
)
def test_recipes_end_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, end: Callable[[], None], code: object, line: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist.py"])
    with pytest.raises(SystemExit) as exit_:
        flags.run_recipe(lambda settings: end(), mnist.MnistSettings)
    assert exit_.value.code == code
    assert capsys.readouterr().err.startswith(line)


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist.py"])
    with pytest.raises(ZeroDivisionError):
        flags.run_recipe(lambda settings: 1 / 0, mnist.MnistSettings)


def test_mnist_without_files_and_network_is_an_error(no_network: None, tmp_path: Path) -> None:
    with pytest.raises(flags.UserError, match=r"MNIST is not in .* downloading it failed .*Name or service not known"):
        mnist.load(parse("--dataset", "mnist", "--data-dir", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_auto_without_files_and_network_is_the_digits(no_network: None, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Using scikit-learn digits \(8×8, 1,797 images\) instead"):
        found = mnist.load(parse("--data-dir", str(tmp_path)))
    assert found.key == "digits"
    assert len(found.train.y) + len(found.test.y) == 1797


def test_a_network_that_hangs_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    end_of_test = Event()

    def hang(url: str, timeout: float) -> nullcontext[None]:
        end_of_test.wait()
        return nullcontext()

    monkeypatch.setattr(downloads, "urlopen", hang)
    with pytest.raises(OSError, match="no server answered within"):
        downloads.check_any_answers(["a", "b"], seconds=0.05)
    end_of_test.set()


def test_one_server_that_answers_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(url: str, timeout: float) -> nullcontext[None]:
        if url == "down":
            raise OSError("down")
        return nullcontext()

    monkeypatch.setattr(downloads, "urlopen", answer)
    downloads.check_any_answers(["down", "up"], seconds=60)


def test_splits_do_not_overlap() -> None:
    digits = mnist.load_digits()
    split = digits.split(train_size=300, val_size=100, seed=0)
    assert torch.equal(split.val.x, digits.train.x[-100:])
    rest = {tuple(row.tolist()) for row in digits.train.x[:-100].flatten(1)}
    assert all(tuple(row.tolist()) in rest for row in split.train.x.flatten(1))
    assert len(split.train.y) == 300
    assert not torch.equal(split.train.y, digits.split(train_size=300, val_size=100, seed=1).train.y)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_cover_the_data_whatever_the_number_of_processes(world_size: int) -> None:
    def indices(epoch: int, shuffle_seed: int | None) -> list[list[int]]:
        shares = []
        for rank in range(world_size):
            batches = images.EpochBatches(100, 8, shuffle_seed=shuffle_seed, rank=rank, world_size=world_size)
            batches.set_epoch(epoch)
            drawn = list(batches)
            assert len(drawn) == len(batches)
            shares.append(torch.cat(drawn).tolist())
        return shares

    in_order, shuffled = indices(0, None), indices(0, 7)
    assert sorted(chain(*in_order)) == list(range(100))
    assert len({len(share) for share in shuffled}) == 1  # processes train in step
    assert len(set(chain(*shuffled))) == 100 // world_size * world_size
    assert shuffled == indices(0, 7) != indices(1, 7)


def test_as_many_checks_as_asked_for_whatever_the_number_of_processes() -> None:
    settings = parse("--epochs", "100", "--batch-size", "32", "--checks", "20")
    digits = mnist.load_digits().split(None, 0, seed=0)
    every = [training._monitor(settings, digits, processes).schedule.every_n_steps for processes in (1, 2)]
    assert every == [100 * 45 // 20, 100 * 23 // 20]


def test_the_objective_has_the_penalties_of_the_flags() -> None:
    settings = flags.with_default_weights(parse("--penalty", "both", "--param-weight", "0.5"), mnist.DEFAULT_WEIGHTS)
    penalties = {penalty.name: penalty.weight for penalty in objectives.penalised_loss(settings).penalties}
    assert penalties == {"input": mnist.DEFAULT_WEIGHTS["both"][0], "param": 0.5}


def test_every_variant_of_the_penalties_has_a_flag() -> None:
    variant = ("--of", "output", "--method", "projection", "--over", "batch", "--unsquared", "--every-n-steps", "4")
    weights = ("--penalty", "both", "--weight", "1", "--param-weight", "2", "--sam-radius", "0.05")
    first, second, sam = objectives.penalised_loss(parse(*variant, *weights)).penalties
    assert (first.term.of, first.term.method, first.weight, first.squared) == ("output", "projection", 1.0, False)
    assert (second.term.over, second.term.method, second.weight) == ("batch", "exact", 2.0)
    assert first.every_n_steps == second.every_n_steps == 4
    assert (sam.weight, sam.term.step, sam.squared, sam.every_n_steps) == (0.05, 0.05, False, 1)  # weight = step: SAM


def test_variants_that_do_not_go_together_are_named() -> None:
    with pytest.raises(flags.UserError, match="--penalty param: method must be one of 'exact', 'finite_difference'"):
        objectives.penalised_loss(parse("--penalty", "param", "--method", "projection", "--weight", "1"))


def test_labels_are_smoothed_in_the_objective() -> None:
    logits, y = torch.randn(6, 4), torch.randint(4, (6,))
    objective = objectives.penalised_loss(parse("--label-smoothing", "0.2"))
    loss = objective(torch.nn.Identity(), logits.requires_grad_(), y).data_loss
    target = 0.8 * torch.nn.functional.one_hot(y, 4) + 0.2 / 4
    assert torch.allclose(loss, -(target * logits.log_softmax(1)).sum(1).mean())
