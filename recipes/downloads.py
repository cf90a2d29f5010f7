"""Data sets of torchvision: from disk, or downloaded within a time limit."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any
from urllib.request import urlopen

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from flags import UserError
from images import Images

NETWORK_SECONDS = 5.0


def load_or_embedded(
    wanted: str, name: str, place: Path, load: Callable[[], Images], embedded: Callable[[], Images], otherwise: str
) -> Images:
    """The data set, or for "auto" the embedded one where it is not to be had: said plainly.

    Args:
        wanted: what --dataset says.
        name: of the data set.
        place: where its files are looked for.
        load: raises OSError if they are neither there nor to be downloaded.
        embedded: what "auto" takes instead.
        otherwise: the flag that asks for it.

    Raises:
        UserError: if the data set itself was asked for, and is not to be had.
    """
    try:
        return load()
    except OSError as error:
        missing = f"{name} is not in {place}, and downloading it failed ({error})"
        if wanted != "auto":
            raise UserError(f"{missing}: give --data-dir, or train on the embedded images with {otherwise}") from error
        instead = embedded()
        rank_zero_warn(f"{missing}. Using {instead.name} instead: everything below is about them, not about {name}.")
        return instead


def train_and_test(kind: Any, data_dir: Path, urls: Sequence[str]) -> list[Any]:
    """Both parts of a torchvision data set, downloaded if they are not in `data_dir`.

    Args:
        kind: a class of torchvision.datasets with the arguments train and download.
        data_dir: its root.
        urls: of one file on each server that has it.

    Raises:
        OSError: if no server answers, or the transfer breaks.
        UserError: if the files are damaged.
    """
    try:
        return _read(kind, data_dir)
    except FileNotFoundError:
        download(kind, data_dir, urls)
        return _read(kind, data_dir)


def _read(kind: Any, data_dir: Path) -> list[Any]:
    """Both parts from disk.

    Raises:
        FileNotFoundError: if they are not there.
        UserError: if they cannot be understood.
    """
    try:
        return [kind(data_dir, train=train) for train in (True, False)]
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # all of them torchvision's words for it
        if "not found" in str(error):
            raise FileNotFoundError(str(error)) from error
        raise UserError(
            f"the files of {kind.__name__} in {data_dir} are damaged ({error!r}): remove them, and they are downloaded again"
        ) from error


def download(kind: Any, data_dir: Path, urls: Sequence[str]) -> None:
    """Fetch the files, or fail within seconds.

    Raises:
        OSError: if no server answers, or the transfer breaks.
    """
    check_any_answers(urls, NETWORK_SECONDS)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(4 * NETWORK_SECONDS)  # urllib's own is: for ever
    try:
        kind(data_dir, download=True)
    except RuntimeError as error:
        raise OSError(str(error)) from error
    finally:
        socket.setdefaulttimeout(before)


def check_any_answers(urls: Sequence[str], seconds: float) -> None:
    """Ask every server, in threads since name resolution knows no time limit.

    Raises:
        OSError: if none sends anything in time.
    """
    answers: Queue[OSError | None] = Queue()

    def ask(url: str) -> None:
        try:
            with urlopen(url, timeout=seconds):
                answers.put(None)
        except OSError as error:
            answers.put(error)

    for url in urls:
        Thread(target=ask, args=(url,), daemon=True).start()
    deadline = time.monotonic() + seconds
    failures: list[OSError] = []
    while len(failures) < len(urls):
        try:
            failure = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            raise OSError(f"no server answered within {seconds:.0f} s") from None
        if failure is None:
            return
        failures.append(failure)
    raise failures[-1]
