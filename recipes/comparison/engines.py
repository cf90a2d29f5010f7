"""Where runs are made: in this process, in several, or on a Ray cluster. Each engine yields records as they come."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch

from comparison.runs import Record, Run, failure, make
from flags import UserError

Started = Callable[[Run], None]
Engine = Callable[[Iterable[Run], Started], Iterator[tuple[Run, Record]]]


def in_this_process(runs: Iterable[Run], started: Started) -> Iterator[tuple[Run, Record]]:
    """One after the other."""
    for run in runs:
        started(run)
        yield run, make(run)


class Processes:
    """Several processes on this machine, which share its cores and make many runs each; a context manager.

    Args:
        jobs: number of processes.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._pool = self._new_pool()

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt:  # nobody waits for what is under way
            for worker in active_children():
                worker.terminate()
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, runs: Iterable[Run], started: Started) -> Iterator[tuple[Run, Record]]:
        """Never more runs are under way than there are processes, so those that are shown as started have."""
        waiting = iter(runs)
        under_way: dict[Future[Record], Run] = {}
        while True:
            while len(under_way) < self.jobs and (run := next(waiting, None)) is not None:
                started(run)
                with ctrl_c_ignored():  # by the worker that this may start, from its first moment on
                    under_way[self._pool.submit(make, run)] = run
            if not under_way:
                return
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            ended = [(under_way.pop(future), _result(future)) for future in done]
            if any(record is None for _, record in ended):  # then all others are lost too
                ended += [(run, None) for run in under_way.values()]
                under_way.clear()
                self._pool.shutdown()
                self._pool = self._new_pool()
            for run, record in ended:
                yield run, record or failure("a worker process died (killed, or out of memory)")

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.jobs, get_context("spawn"), initializer=prepare_worker, initargs=(threads_for(self.jobs),)
        )


def _result(future: Future[Record]) -> Record | None:
    """The record, or None if its process died."""
    try:
        return future.result()
    except BrokenProcessPool:
        return None


@contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    """Here for a moment, and for good by processes that are started meanwhile."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def threads_for(jobs: int) -> int:
    """A fair share of the cores."""
    return max(1, (os.cpu_count() or 1) // jobs)


def prepare_worker(threads: int) -> None:
    """Take a share of the cores, and end with the process that started this one, however that ends."""
    torch.set_num_threads(threads)
    parent = parent_process()
    if parent is not None:
        Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)  # in the middle of a run: nobody would take its record


class Ray:
    """A Ray cluster, or Ray on this machine; a context manager.

    Workers get the recipes from here; gradpen has to be installed where they are, and the data to be there.

    Args:
        jobs: runs at once.
        address: of the cluster, such as "auto" or "ray://head:10001"; None starts Ray on this machine.

    Raises:
        UserError: if Ray is not installed.
    """

    def __init__(self, jobs: int, address: str | None = None) -> None:
        if find_spec("ray") is None:
            raise UserError('--engine ray needs Ray: pip install "gradpen[ray]"')
        import ray

        self.jobs = jobs
        self._ray = ray
        here: dict[str, Any] = {"num_cpus": jobs, "include_dashboard": False} if address is None else {}
        threads = threads_for(jobs) if address is None else 1
        environment = {
            "working_dir": str(Path(__file__).parents[1]),
            "env_vars": {"OMP_NUM_THREADS": str(threads)},
            "excludes": ["__pycache__"],
        }
        ray.init(address, runtime_env=environment, log_to_driver=False, **here)
        self._make = ray.remote(num_cpus=1, max_retries=0)(make)

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def __call__(self, runs: Iterable[Run], started: Started) -> Iterator[tuple[Run, Record]]:
        """Never more runs are handed over than may be under way at once."""
        waiting = iter(runs)
        under_way: dict[Any, Run] = {}
        while True:
            while len(under_way) < self.jobs and (run := next(waiting, None)) is not None:
                started(run)
                under_way[self._make.remote(run)] = run
            if not under_way:
                return
            done, _ = self._ray.wait(list(under_way))
            for reference in done:
                yield under_way.pop(reference), _fetched(self._ray, reference)


def _fetched(ray: Any, reference: Any) -> Record:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return failure(f"Ray lost the run: {error}")
