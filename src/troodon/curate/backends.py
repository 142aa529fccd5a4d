"""Backends: compute the units of a stage in this process, in other processes of this machine, or on a Ray cluster.

The backend does not change the result. If a worker process dies, a new one computes its unit again. If a unit has
killed MAX_DEATHS processes, the image that kills them is searched for, named and excluded; if no single image is the
cause, the stage fails. clusters.py has the Ray cluster.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from troodon import run
from troodon.config import UsageError, fingerprint, nearest
from troodon.curate.clusters import RayCluster
from troodon.curate.stage import MAX_DEATHS, Backend, Stage, run_unit

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # read when a process starts


def create_backend(name: str, workers: int = 0) -> Backend:
    """Create the backend "local" with `workers` processes (0: this process only), "ray", or a cluster's address,
    ray://host:port. Raises UsageError for any other name."""
    if workers < 0:
        raise UsageError(f"workers {workers}: must be 0 or more; 0 is this process alone")
    if name == "local":
        return ProcessPool(workers) if workers else SingleProcess()
    if name == "ray" or name.startswith("ray://"):
        return RayCluster(None if name == "ray" else name)
    raise nearest("backend", name, ("local", "ray", "ray://HOST:PORT"))


@dataclass(frozen=True)
class SingleProcess:
    """Computes one unit after the other in this process. Threads decode the images."""

    def run(self, stage: Stage, root: Path, pending: Sequence[int]) -> Iterator[int]:
        for number in pending:
            run_unit(stage, root, number)
            yield number

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class ProcessPool:
    """Spawned processes that compute one unit at a time. They are reused by later stages and end with this process."""

    count: int
    workers: list["_Worker"] = field(default_factory=list, compare=False, repr=False)

    def run(self, stage: Stage, root: Path, pending: Sequence[int]) -> Iterator[int]:
        queue, deaths = deque(pending), Counter[int]()
        while len(self.workers) < min(self.count, len(pending)):
            self.workers.append(_Worker(self.count, len(self.workers)))
        try:
            for worker in self.workers[: len(pending)]:
                worker.assign(stage, root, queue.popleft())
            while busy := {worker.connection: worker for worker in self.workers if worker.unit is not None}:
                for connection in wait(list(busy)):
                    worker = busy[connection]  # type: ignore[index]
                    number, reply = worker.receive()
                    if isinstance(reply, Exception):
                        raise reply
                    if reply is None:  # the process has died
                        deaths[number] += 1
                        if deaths[number] >= MAX_DEATHS:
                            stage, deaths[number] = _exclude_fatal_row(stage, root, number), 0
                        queue.appendleft(number)
                        self.workers.remove(worker)
                        self.workers.append(worker := _Worker(self.count, worker.number))
                    else:
                        yield number
                    if queue:
                        worker.assign(stage, root, queue.popleft())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Terminate the processes, even if they are busy."""
        for worker in self.workers:
            worker.stop()
        self.workers.clear()


def _exclude_fatal_row(stage: Stage, root: Path, number: int) -> Stage:
    """Find the one row of a unit (first, last) that kills its worker, by bisection; return the stage without that row.

    Raises RuntimeError, which names the unit, if the work cannot exclude rows or if no single row is the cause.
    """
    unit, excluding = stage.units[number], getattr(stage.work, "excluding", None)
    if excluding is not None:
        low, high = unit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _kills_worker(stage, root, (low, middle)) else (middle, high)
        if _kills_worker(stage, root, (low, high)):
            run.say(f"{stage.name}: image {low} has killed {MAX_DEATHS} processes and is excluded")
            return replace(stage, work=excluding(low))
    raise RuntimeError(f"{stage.name}: unit {number} has killed {MAX_DEATHS} processes: {unit}")


def _kills_worker(stage: Stage, root: Path, unit: tuple[int, int]) -> bool:
    """Test whether these rows kill a process."""
    probe = Stage(f"{stage.name}-probe", stage.work, [unit], fingerprint(stage.fingerprint, unit))
    worker = _Worker(1)
    try:
        worker.assign(probe, root, 0)
        return worker.receive()[1] is None
    finally:
        worker.stop()
        shutil.rmtree(probe.folder(root, 0).parent, ignore_errors=True)


class _Worker:
    """A process, the connection to it, the stage that was sent to it, and the number of its current unit."""

    def __init__(self, count: int, number: int = 0):
        self.number = number  # among the workers of this machine, which take its devices in turn
        context = multiprocessing.get_context("spawn")  # fork can deadlock if threads hold locks
        self.connection, child_connection = context.Pipe()
        self.stage: Stage | None = None
        self.unit: int | None = None
        threads = max(1, (os.cpu_count() or 1) // count)
        arguments = child_connection, threads
        self.process: BaseProcess = context.Process(target=_worker_main, args=arguments, daemon=True)
        variables = {name: os.environ.get(name, str(threads)) for name in THREAD_VARIABLES}
        with _environment(variables | {"LOCAL_RANK": str(number)}):
            self.process.start()
        child_connection.close()

    def assign(self, stage: Stage, root: Path, number: int) -> None:
        self.unit = number
        with contextlib.suppress(OSError):  # the process is dead, which receive() reports
            if stage is not self.stage:
                self.connection.send((stage, root))
                self.stage = stage
            self.connection.send(number)

    def receive(self) -> tuple[int, Any]:
        """Return the number of its unit, and True, the error it raised, or None if the process has died."""
        number, self.unit = self.unit, None
        assert number is not None
        try:
            return number, self.connection.recv()
        except (EOFError, OSError):
            return number, None

    def stop(self) -> None:
        self.connection.close()
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()


def _worker_main(connection: Connection, processors: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles it
    with contextlib.suppress(EOFError, OSError):  # the main process has ended
        stage, root = connection.recv()
        is_placed = False
        while True:
            while isinstance(message := connection.recv(), tuple):
                (stage, root), is_placed = message, False
            try:
                if not is_placed and hasattr(stage.work, "placed"):
                    stage = replace(stage, work=stage.work.placed(processors))
                is_placed = True
                run_unit(stage, root, message)
                reply: Any = True
            except Exception as error:
                reply = error
            connection.send(reply)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
