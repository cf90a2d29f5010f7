"""Where the recipes' images come from: torchvision, folders, formulas."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

for needed in ("jsonargparse", "rich", "sklearn", "torchvision"):
    pytest.importorskip(needed, reason='the recipes need pip install "gradpen[recipes]"')

from PIL import Image

import cifar
import flags
import folders
import images
import mnist
import synthetic
import training

CLASSES = ("cat", "dog")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gradpen"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Five training and two test images of each class, 4×6 pixels; the first value of an image tells which it is."""
    for part, count in (("train", 5), ("test", 2)):
        for number, name in enumerate(CLASSES):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.full((4, 6, 3), 100 * number + 10 * index, np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "photos"


def parse(*args: str) -> cifar.CifarSettings:
    return flags.parse_flags(cifar.CifarSettings, args)


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_s_images_keep_their_classes(tree: Path) -> None:
    found = cifar.load(parse("--dataset", "folder", "--data-dir", str(tree)))
    assert (found.key, found.name, found.num_classes) == ("folder", "photos", 2)
    assert found.train.x.shape == (10, 3, 4, 6)
    assert found.test.x.shape == (4, 3, 4, 6)
    assert torch.equal(found.train.x[:, 0, 0, 0] > found.train.x.mean(), found.train.y == 1)
    assert found.train.x.mean().abs() < 1e-5
    assert set(found.train.y[-4:].tolist()) == {0, 1}  # mixed: the last ones are held out


def test_a_folder_is_named_by_the_flag(tree: Path) -> None:
    settings = parse("--dataset", "folder", "--data-dir", str(tree), "--dataset-name", "Photos (JPEG copy)")
    assert cifar.load(settings).name == "Photos (JPEG copy)"


def test_images_are_decoded_once(tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = folders.load_folder(tree, "photos", None)
    assert len(list(cache.iterdir())) == 1

    def refuse(path: str, image_side: int | None) -> None:
        raise AssertionError(f"{path} was decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "decode", refuse)
        assert torch.equal(folders.load_folder(tree, "photos", None).train.x, first.train.x)
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tree / "train" / "cat" / "new.png")
        with pytest.raises(AssertionError, match="was decoded again"):  # another tree, another cache
            folders.load_folder(tree, "photos", None)
    assert len(folders.load_folder(tree, "photos", None).train.y) == 11


def test_a_damaged_cache_is_made_again(tree: Path, cache: Path) -> None:
    first = folders.load_folder(tree, "photos", None)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="the images are decoded again"):
        again = folders.load_folder(tree, "photos", None)
    assert torch.equal(again.train.x, first.train.x)
    assert torch.equal(folders.load_folder(tree, "photos", None).train.x, first.train.x)


def test_a_broken_write_leaves_no_cache(tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(tensors: dict[str, Tensor], file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(folders.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        folders.load_folder(tree, "photos", None)
    assert not list(cache.iterdir())


def test_images_are_decoded_where_no_cache_can_be_written(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cannot be written .*: next time, the images are decoded again"):
        assert len(folders.load_folder(tree, "photos", None).train.y) == 10


def test_a_channel_that_is_the_same_everywhere_is_0() -> None:
    x = torch.rand(50, 3, 4, 4)
    x[:, 2] = 0.1
    train, _, test = images.normalised(*[images.Labelled(x, torch.zeros(50))] * 2)
    assert torch.allclose(train.x.std((0, 2, 3)), torch.tensor([1.0, 1.0, 0.0]), atol=1e-6)
    assert torch.allclose(test.x[:, 2], torch.zeros(()), atol=1e-6)


def test_images_are_scaled(tree: Path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tree / "train" / "cat" / "large.png")
    with pytest.raises(flags.UserError, match=r"images of one size, got .* and .*large.png .*--image-side 32"):
        folders.load_folder(tree, "photos", None)
    assert folders.load_folder(tree, "photos", 5).train.x.shape == (11, 3, 5, 5)


def test_mistakes_in_a_tree_are_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(flags.UserError, match=r"expects .*/train/<class>/\* and .*/test/<class>/\*"):
        folders.load_folder(tmp_path / "nowhere", "photos", None)
    (tree / "train" / "cat" / "0.png").write_text("no image")
    with pytest.raises(flags.UserError, match=r"0.png cannot be read as an image"):
        folders.load_folder(tree, "photos", None)
    for part in ("train", "test"):
        (tree / part / "dog").rename(tree / f"{part}-dog")
    with pytest.raises(flags.UserError, match=r"two classes or more in .*train, got only cat"):
        folders.load_folder(tree, "photos", None)
    for part in ("train", "test"):
        (tree / f"{part}-dog").rename(tree / part / "dog")
    (tree / "test" / "dog").rename(tree / "test" / "wolf")
    with pytest.raises(flags.UserError, match=r"the same classes .* only in one of them: dog, wolf"):
        folders.load_folder(tree, "photos", None)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--dataset-name", "Photos"), "--dataset-name and --image-side go with --dataset folder, got --dataset auto"),
        (("--dataset", "folder", "--image-side", "0"), "--image-side must be >= 1, got 0"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(flags.UserError, match=message):
        parse(*args)


# ---- torchvision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_normalised_channel_by_channel(monkeypatch: pytest.MonkeyPatch, key: str, classes: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    pixels[..., 1] //= 4
    part = SimpleNamespace(data=pixels, targets=list(range(20)))
    monkeypatch.setattr(cifar, "train_and_test", lambda kind, data_dir, urls: [part, part])
    found = cifar.load(parse("--dataset", key))
    assert (found.key, found.num_classes, len(found.val.y)) == (key, classes, 0)
    over = (0, 2, 3)
    assert torch.allclose(found.train.x.mean(over), torch.zeros(3), atol=1e-5)
    assert torch.allclose(found.train.x.std(over), torch.ones(3), atol=1e-5)
    red = torch.from_numpy(pixels[0, :, :, 0]).double()
    assert torch.corrcoef(torch.stack([found.train.x[0, 0].double().flatten(), red.flatten()]))[0, 1] > 0.999


def test_cifar_without_files_and_network(no_network: None, tmp_path: Path) -> None:
    with pytest.raises(flags.UserError, match=r"CIFAR-100 is not in .*cifar-100-python, .*--dataset synthetic"):
        cifar.load(parse("--dataset", "cifar100", "--data-dir", str(tmp_path)))
    with pytest.warns(UserWarning, match=r"CIFAR-10 is not in .* Using synthetic shapes .* not about CIFAR-10"):
        assert cifar.load(parse("--data-dir", str(tmp_path))).key == "synthetic"


@pytest.mark.parametrize(("key", "name"), [("fashion", "Fashion-MNIST"), ("kmnist", "KMNIST")])
def test_other_sets_in_the_format_of_mnist(no_network: None, tmp_path: Path, key: str, name: str) -> None:
    settings = flags.parse_flags(mnist.MnistSettings, ["--dataset", key, "--data-dir", str(tmp_path)])
    with pytest.raises(flags.UserError, match=rf"{name} is not in .*{name.replace('-', '')}/raw"):
        mnist.load(settings)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\1\0\0\0\5", b"no numbers"])
def test_damaged_files_are_named(no_network: None, tmp_path: Path, content: bytes) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)
    for dataset in ("mnist", "auto"):
        settings = flags.parse_flags(mnist.MnistSettings, ["--dataset", dataset, "--data-dir", str(tmp_path)])
        with pytest.raises(flags.UserError, match=rf"the files of MNIST in {tmp_path} are damaged .*: remove them"):
            mnist.load(settings)


# ---- synthetic shapes -----------------------------------------------------------------------------------------------


def test_synthetic_images_come_from_the_seed() -> None:
    first, again, other = (synthetic.draw(50, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.x, other.x)
    assert first.x.shape == (50, 3, 32, 32)
    assert set(synthetic.draw(200, torch.Generator().manual_seed(0)).y.tolist()) == set(range(10))


def test_memorising_synthetic_images_does_not_pay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(synthetic, "TRAIN", 1000)
    monkeypatch.setattr(synthetic, "TEST", 1000)
    small = ("--dataset", "synthetic", "--hidden", "64", "--epochs", "20", "--checks", "1", "--probe-size", "4")
    summary = cifar.main(parse(*small, "--out", str(tmp_path / "run"), "--accelerator", "cpu"))
    torch.use_deterministic_algorithms(False)
    assert summary["dataset_name"] == "synthetic shapes (32×32, 2,000 images)"
    assert summary["train_accuracy"] > 0.9
    assert 0.25 < summary["test_accuracy"] < summary["train_accuracy"] - 0.2
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["dataset"] == "synthetic"


# ---- what is minimised, and by what ---------------------------------------------------------------------------------


def test_optimizers_follow_the_flags() -> None:
    model = torch.nn.Linear(2, 2)

    def configured(*args: str) -> Any:
        settings = parse("--dataset", "synthetic", *args)
        classifier = training.Classifier(model, None, 2, settings)  # type: ignore[arg-type]
        classifier._trainer = SimpleNamespace(estimated_stepping_batches=10)  # type: ignore[assignment]
        return classifier.configure_optimizers()

    plain = configured("--optimizer", "sgd", "--lr", "0.3", "--momentum", "0.5", "--schedule", "constant")
    assert isinstance(plain, torch.optim.SGD)
    assert (plain.defaults["lr"], plain.defaults["momentum"]) == (0.3, 0.5)
    cycled = configured("--optimizer", "sgd")
    assert isinstance(cycled["lr_scheduler"]["scheduler"], torch.optim.lr_scheduler.OneCycleLR)
    assert isinstance(configured("--weight-decay", "0.2")["optimizer"], torch.optim.AdamW)


def test_momentum_without_sgd_is_refused() -> None:
    with pytest.raises(flags.UserError, match=r"--momentum 0\.9 is SGD's, got --optimizer adamw"):
        parse("--momentum", "0.9")


def test_splits_hold_out_the_last_images() -> None:
    x = torch.arange(10.0).reshape(10, 1, 1)
    whole = images.Labelled(x, torch.arange(10))
    split = images.Images("k", "n", 10, whole, whole.rows(slice(0)), whole).split(4, 3, seed=0)
    assert split.val.y.tolist() == [7, 8, 9]
    assert len(split.train.y) == 4
    assert set(split.train.y.tolist()) <= set(range(7))
