"""A Ray cluster: units of a stage as tasks, or by actors where the work holds networks.

The cluster receives numbers of units, never pixels; all of its machines see `root` under the same path.

Work with a method `placed(processors)` holds networks. Then one actor for each GPU, or, where none is wanted, for
some processors, lives as long as the stage: it places the networks once, and takes one unit after the other. An actor
on a GPU has two units at a time, so that one reads while the other writes, and the GPU does not wait. All other work,
such as joins, are tasks. An actor that dies, with its process or its machine, costs the units that it had: these go to
others, and a new actor starts in its place.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from troodon import run
from troodon.config import UsageError
from troodon.curate.stage import MAX_DEATHS, Stage, run_unit

CPUS_PER_ACTOR = 4  # where it computes on processors: a network each, and threads that share it
MAX_CPUS_OF_GPU = 16  # that read for one GPU; more would wait for the interpreter's lock
UNITS_ON_GPU = 2  # at a time
PATIENCE_S = 60  # before it says that no actor could start yet


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster: the one at `address`, the one this process is connected to, or a new one on this machine."""

    address: str | None = None
    queued_per_cpu: int = 4  # submitted tasks per processor

    def run(self, stage: Stage, root: Path, pending: Sequence[int]) -> Iterator[int]:
        try:
            import ray
        except ImportError:
            raise UsageError("backend ray: needs the extra: pip install 'troodon[ray]'") from None
        if not ray.is_initialized():
            ray.init(address=self.address, log_to_driver=True, include_dashboard=False)  # what units say is heard
        if hasattr(stage.work, "placed"):
            yield from _Actors(ray, stage, root, deque(pending)).run()
        else:
            yield from self._run_tasks(ray, stage, root, deque(pending))

    def _run_tasks(self, ray: Any, stage: Stage, root: Path, queue: deque[int]) -> Iterator[int]:
        shared_stage, submitted = ray.put(stage), dict[Any, int]()  # sent once per machine, not once per unit
        needs = {"num_cpus": 1} | ({"num_gpus": 1} if _wants_gpu(ray, stage) else {})
        task = ray.remote(_ray_task).options(max_retries=MAX_DEATHS, **needs)
        limit = max(1, int(ray.cluster_resources().get("CPU", 1))) * self.queued_per_cpu
        while queue or submitted:
            while queue and len(submitted) < limit:
                number = queue.popleft()
                submitted[task.remote(shared_stage, str(root.resolve()), number)] = number
            ready, _ = ray.wait(list(submitted), num_returns=1)
            for result in ready:
                try:
                    ray.get(result)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                yield submitted.pop(result)

    def close(self) -> None:
        pass


def _wants_gpu(ray: Any, stage: Stage) -> bool:
    """Whether the work computes on a GPU, and the cluster has some."""
    device = str(getattr(stage.work, "device", None) or "cpu")
    return bool(ray.cluster_resources().get("GPU")) and not device.startswith("cpu")


def _ray_task(stage: Stage, root: str, number: int) -> None:
    run_unit(stage, Path(root), number)


class _Actor:
    """In a process of Ray: a stage whose networks are on their device."""

    def __init__(self, stage: Stage, root: str, processors: int):
        self.stage, self.root, self.processors = stage, Path(root), processors

    def place(self) -> None:
        """Not when the actor starts: an error here is that of a method, which the driver can read."""
        work: Any = self.stage.work
        self.stage = replace(self.stage, work=work.placed(self.processors))

    def run(self, number: int) -> None:
        run_unit(self.stage, self.root, number)


@dataclass
class _Actors:
    """The actors of a stage while it runs, and what each of them does."""

    ray: Any
    stage: Stage
    root: Path
    queue: deque[int]
    jobs: dict[Any, tuple[Any, int | None]] = field(default_factory=dict)  # future: actor, and unit; None: it starts
    needs: dict[Any, dict[str, int]] = field(default_factory=dict)  # processors and GPUs of each living actor
    deaths: Counter[int] = field(default_factory=Counter)  # of actors, by the unit they had

    def run(self) -> Iterator[int]:
        shared = self.ray.put(self.stage)  # sent once per machine
        for needs in self._all_needs()[: len(self.queue)]:
            self._start(shared, needs)
        try:
            while self.queue or any(number is not None for _, number in self.jobs.values()):
                ready, _ = self.ray.wait(list(self.jobs), num_returns=1, timeout=PATIENCE_S)
                if not ready and all(number is None for _, number in self.jobs.values()):
                    run.say(f"{self.stage.name}: no actor has started yet; has Ray free processors or GPUs?")
                for future in ready:
                    actor, number = self.jobs.pop(future)
                    if not self._is_done(future, actor, number, shared):
                        continue
                    if number is not None:
                        yield number
                    self._feed(actor)
        finally:
            for actor in self.needs:
                self.ray.kill(actor)

    def _all_needs(self) -> list[dict[str, int]]:
        """The processors and GPUs of each actor, from those of the machines."""
        found, on_gpu = list[dict[str, int]](), _wants_gpu(self.ray, self.stage)
        for node in self.ray.nodes():
            has = node["Resources"] if node["Alive"] else {}
            cpus, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
            if on_gpu and gpus:
                found += [{"num_cpus": min(MAX_CPUS_OF_GPU, cpus // gpus), "num_gpus": 1}] * gpus
            elif cpus and not on_gpu:
                found += [{"num_cpus": min(CPUS_PER_ACTOR, cpus)}] * max(1, cpus // CPUS_PER_ACTOR)
        return found or [{"num_cpus": 1}]

    def _start(self, shared: Any, needs: dict[str, int]) -> None:
        at_once = UNITS_ON_GPU if "num_gpus" in needs else 1
        options = self.ray.remote(_Actor).options(max_concurrency=at_once, **needs)
        actor = options.remote(shared, str(self.root.resolve()), max(1, needs["num_cpus"]))
        self.needs[actor] = needs
        self.jobs[actor.place.remote()] = actor, None

    def _is_done(self, future: Any, actor: Any, number: int | None, shared: Any) -> bool:
        """Whether a unit is done, or an actor has started; if it has died, another one starts. Raises what a unit
        raised."""
        try:
            self.ray.get(future)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayActorError:
            if number is not None:
                self.queue.appendleft(number)
                self.deaths[number] += 1
                if self.deaths[number] >= MAX_DEATHS:
                    unit = self.stage.units[number]
                    message = f"{self.stage.name}: unit {number} has killed {MAX_DEATHS} processes: {unit}"
                    raise RuntimeError(message) from None
            if actor in self.needs:  # the first of its units that fails
                self._start(shared, self.needs.pop(actor))
            return False
        return True

    def _feed(self, actor: Any) -> None:
        """Give the actor as many units as it takes at a time."""
        if actor not in self.needs:
            return
        at_once = UNITS_ON_GPU if "num_gpus" in self.needs[actor] else 1
        while self.queue and sum(worker == actor for worker, _ in self.jobs.values()) < at_once:
            number = self.queue.popleft()
            self.jobs[actor.run.remote(number)] = actor, number
