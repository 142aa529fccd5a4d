"""Who does the units of a stage: this process, other processes of this machine, or a Ray cluster.

None of them is part of the result. A process that dies takes one unit with it, which is done again by a new one. In a
unit that has ended TRIES processes the image that does it is found and left out, named; if none is to blame, the stage
ends. A Ray cluster is fed numbers of units, never pixels; placement,
retries, lost nodes and GPUs are Ray's, and all of its machines see `home` under the same path.
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
from troodon.curate.stage import Engine, Stage, perform

TRIES = 3
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # read when a process starts


def engine(name: str, workers: int = 0) -> Engine:
    """The engine "local" with so many processes (0: this one), or "ray", or a cluster's address, ray://host:port."""
    if workers < 0:
        raise UsageError(f"workers {workers}: must be 0 or more; 0 is this process alone")
    if name == "local":
        return Processes(workers) if workers else Here()
    if name == "ray" or name.startswith("ray://"):
        return Ray(None if name == "ray" else name)
    raise nearest("engine", name, ("local", "ray", "ray://HOST:PORT"))


@dataclass(frozen=True)
class Here:
    """This process does one unit after the other; their images are decoded by threads."""

    def run(self, stage: Stage, home: Path, waiting: Sequence[int]) -> Iterator[int]:
        for at in waiting:
            perform(stage, home, at)
            yield at

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Processes:
    """Spawned processes, each of which does one unit at a time; they stay for the next stage, and end with this one."""

    count: int
    workers: list["_Worker"] = field(default_factory=list, compare=False, repr=False)

    def run(self, stage: Stage, home: Path, waiting: Sequence[int]) -> Iterator[int]:
        queue, deaths = deque(waiting), Counter[int]()
        while len(self.workers) < min(self.count, len(waiting)):
            self.workers.append(_Worker(self.count))
        try:
            for worker in self.workers[: len(waiting)]:
                worker.give(stage, home, queue.popleft())
            while busy := {worker.ours: worker for worker in self.workers if worker.at is not None}:
                for ready in wait(list(busy)):
                    worker = busy[ready]  # type: ignore[index]
                    at, said = worker.hear()
                    if isinstance(said, Exception):
                        raise said
                    if said is None:  # it died
                        deaths[at] += 1
                        if deaths[at] >= TRIES:
                            stage, deaths[at] = _without_culprit(stage, home, at), 0
                        queue.appendleft(at)
                        self.workers.remove(worker)
                        self.workers.append(worker := _Worker(self.count))
                    else:
                        yield at
                    if queue:
                        worker.give(stage, home, queue.popleft())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes, whatever they do."""
        for worker in self.workers:
            worker.end()
        self.workers.clear()


def _without_culprit(stage: Stage, home: Path, at: int) -> Stage:
    """The stage, avoiding the one row of a unit (first, last) that ends whoever works on it, found by halving.

    RuntimeError, naming the unit, where the stage's work cannot avoid rows, or where no single row is to blame.
    """
    unit, avoiding = stage.units[at], getattr(stage.work, "avoiding", None)
    if avoiding is not None:
        low, high = unit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _deadly(stage, home, (low, middle)) else (middle, high)
        if _deadly(stage, home, (low, high)):
            run.say(f"{stage.name}: image {low} ended {TRIES} processes, and is left out")
            return replace(stage, work=avoiding(low))
    raise RuntimeError(f"{stage.name}: part {at} ended {TRIES} processes: {unit}")


def _deadly(stage: Stage, home: Path, unit: tuple[int, int]) -> bool:
    """Whether a process dies of these rows."""
    probe = Stage(f"{stage.name}-probe", stage.work, [unit], fingerprint(stage.fingerprint, unit))
    worker = _Worker(1)
    try:
        worker.give(probe, home, 0)
        return worker.hear()[1] is None
    finally:
        worker.end()
        shutil.rmtree(probe.folder(home, 0).parent, ignore_errors=True)


class _Worker:
    """A process, our end of its pipe, the stage it knows and the unit that it does."""

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")  # a fork may hang where threads hold locks
        self.ours, theirs = context.Pipe()
        self.stage: Stage | None = None
        self.at: int | None = None
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        each = str(max(1, (os.cpu_count() or 1) // count))
        with _environment({name: os.environ.get(name, each) for name in THREADS}):
            self.process.start()
        theirs.close()

    def give(self, stage: Stage, home: Path, at: int) -> None:
        self.at = at
        with contextlib.suppress(OSError):  # it is dead, which hear() will find
            if stage is not self.stage:
                self.ours.send((stage, home))
                self.stage = stage
            self.ours.send(at)

    def hear(self) -> tuple[int, Any]:
        """The unit it had, and True, the error it raised, or None if it died."""
        at, self.at = self.at, None
        assert at is not None
        try:
            return at, self.ours.recv()
        except (EOFError, OSError):
            return at, None

    def end(self) -> None:
        self.ours.close()
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()


def _serve(theirs: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the process that asked for this one
    with contextlib.suppress(EOFError, OSError):  # which is gone
        stage, home = theirs.recv()
        while True:
            while isinstance(at := theirs.recv(), tuple):
                stage, home = at
            try:
                perform(stage, home, at)
                answer: Any = True
            except Exception as error:
                answer = error
            theirs.send(answer)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@dataclass(frozen=True)
class Ray:
    """A Ray cluster: the one at `address`, the one this process already speaks to, or one on this machine."""

    address: str | None = None
    ahead: int = 4  # units that wait for each processor

    def run(self, stage: Stage, home: Path, waiting: Sequence[int]) -> Iterator[int]:
        try:
            import ray
        except ImportError:
            raise UsageError("engine ray: needs the extra: pip install 'troodon[ray]'") from None
        if not ray.is_initialized():
            ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
        shared = ray.put(stage)  # once for each machine, not for each unit
        gpus = {"num_gpus": 1} if ray.cluster_resources().get("GPU") and getattr(stage.work, "gpu", False) else {}
        task = ray.remote(_remote).options(max_retries=TRIES, **gpus)
        queue, pending = deque(waiting), dict[Any, int]()
        most = max(1, int(ray.cluster_resources().get("CPU", 1))) * self.ahead
        while queue or pending:
            while queue and len(pending) < most:
                at = queue.popleft()
                pending[task.remote(shared, str(home.resolve()), at)] = at
            ready, _ = ray.wait(list(pending), num_returns=1)
            for one in ready:
                try:
                    ray.get(one)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                yield pending.pop(one)

    def close(self) -> None:
        pass


def _remote(stage: Stage, home: str, at: int) -> None:
    perform(stage, Path(home), at)
