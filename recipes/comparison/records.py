"""What has been run: one file for each run, there as a whole or not at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

from comparison.runs import Record, Run
from files import PART, finite, written_whole
from flags import UserError

PARTS = {"key", "status", "result", "history"}  # of a record, beside what was set


class Records:
    """The records under one folder. A run is known by the hash of its settings, so none is made twice.

    Args:
        folder: is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = made_folder(folder)
        self._lock = FileLock(folder / ".lock")

    def __enter__(self) -> Records:
        """Keep other sweeps out of the folder: two at once would make the same runs.

        Raises:
            UserError: if one is at it.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another sweep is writing to {self.folder}: wait for it, or give another --out") from None
        for left_behind in self.folder.glob(f"*{PART}"):  # by a sweep that was killed while it wrote
            left_behind.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def get(self, run: Run) -> Record | None:
        """The record of a run that has come to an end, also to a bad one; None if it has not, or failed."""
        record = self.read(run)
        return None if record is None or record["status"] == "failed" else record

    def read(self, run: Run) -> Record | None:
        """The record, of a failure too. One that is damaged counts as missing."""
        path = self._path(run)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            record = None
        if not isinstance(record, dict) or not record.keys() >= PARTS:
            warnings.warn(f"{path} is damaged: its run is made again", stacklevel=2)
            return None
        return record

    def put(self, run: Run, record: Record) -> None:
        """Write a record at once."""
        with written_whole(self._path(run)) as file:
            file.write(as_json(record))

    def _path(self, run: Run) -> Path:
        return self.folder / f"{run.key}.json"


def made_folder(folder: Path) -> Path:
    """A folder, made if it is not there.

    Raises:
        UserError: if it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected a folder that can be written to, got {folder}: {error.strerror}") from error
    return folder


def as_json(record: Record) -> str:
    """A record as it is kept."""
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False)
