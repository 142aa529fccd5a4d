"""A training run as a Slurm job: one task for each device, queued again until the run is finished.

submitit writes the batch script, starts the tasks and keeps their output in `<out>-logs`. Each task trains as one rank
of the run. Before the time limit, or when the job is preempted, the run saves and the job goes back into the queue, to
go on from there. `scancel` ends it for good, also with everything saved.

The stages of curation, and `embed`, run as arrays of jobs, each of which computes some units.
"""

import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from troodon import launch
from troodon.config import UsageError, nearest, within
from troodon.run import current_command, say, write_bytes

if TYPE_CHECKING:
    from troodon.curate.stage import Backend, Stage

NOTICE_S = 600  # before the time limit: a step and a checkpoint of the largest network fit in
ATTEMPTS = 3  # arrays in which a unit may be lost
REQUEUES = 1000  # times that a job may be queued again; not meant to be reached


@dataclass(frozen=True)
class SlurmConfig:
    """The Slurm job of a run."""

    nodes: int = 0
    """Machines; 0 trains on this one, without Slurm."""
    gpus_per_node: int = 8
    cpus_per_gpu: int = 8
    hours: float = 72
    """Time limit; a run that needs longer saves, and is queued again."""
    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    cluster: str | None = None
    """slurm, or local to try it on this machine; detected by default."""

    def __post_init__(self) -> None:
        within(self, "slurm.", 0, None, "nodes")
        within(self, "slurm.", 1, None, "gpus_per_node", "cpus_per_gpu")
        within(self, "slurm.", 1 / 60, None, "hours")
        if self.cluster not in (None, "slurm", "local"):
            raise nearest("slurm.cluster", self.cluster, ("slurm", "local"))


def logs_folder(out: str | Path) -> Path:
    """Where the tasks of the run in `out` write."""
    return Path(f"{Path(out)}-logs")


def check(config: SlurmConfig) -> None:
    """UsageError for a job that could not be submitted."""
    try:
        import submitit
    except ImportError:
        raise UsageError("slurm: submitit is not installed; pip install 'troodon[slurm]'") from None
    if config.cluster != "local" and submitit.AutoExecutor.which() != "slurm":
        raise UsageError(
            "slurm: no srun here; submit from a machine of the cluster, or try it by --slurm.cluster local"
        )
    if config.cluster == "local" and config.nodes > 1:
        raise UsageError(f"slurm.nodes {config.nodes}: this machine is one; set it to 1, or slurm.cluster to slurm")


def submit(work: Callable[[], object], prog: str, out: str | Path, config: SlurmConfig) -> str:
    """Queue `work`, which must be picklable, once for each device; returns the job's id and prints how to watch it.

    The run is in `out`; `prog` starts the line that reports an error.
    """
    import submitit

    minutes = max(1, round(60 * config.hours))
    notice_s = min(NOTICE_S, 15 * minutes)  # at most a quarter of a short job
    executor = submitit.AutoExecutor(
        logs_folder(out), cluster=config.cluster, slurm_max_num_timeout=REQUEUES, local_max_num_timeout=REQUEUES
    )
    executor.update_parameters(
        name=f"troodon-{Path(out).name}",
        nodes=config.nodes,
        tasks_per_node=config.gpus_per_node,
        gpus_per_node=config.gpus_per_node,
        cpus_per_task=config.cpus_per_gpu,
        timeout_min=minutes,
        slurm_partition=config.partition,
        slurm_account=config.account,
        slurm_constraint=config.constraint,
        slurm_signal_delay_s=notice_s,
        slurm_srun_args=["--kill-on-bad-exit=1"],  # ranks that wait for a failed one would wait for ever
        slurm_additional_parameters={"requeue": True},
    )
    job = executor.submit(RankTask(work, prog, list(current_command)))
    log = logs_folder(out) / f"{job.job_id}_0_log.err"
    say(f"  job {job.job_id}: {config.nodes} x {config.gpus_per_node} tasks, writing to {logs_folder(out)}")
    watch = [f"tail -F {shlex.quote(str(log))}"]
    if executor.cluster == "slurm":
        watch += [f"squeue -j {job.job_id}", f"scancel {job.job_id}"]
    say("next:" + "".join(f"\n  {command}" for command in watch))
    return str(job.job_id)


@dataclass(frozen=True)
class RankTask:
    """What one rank of the job does. Slurm starts it again, unchanged, when the job comes back from the queue."""

    work: Callable[[], object]
    prog: str
    command: list[str]  # the words that manifests record

    def __call__(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        current_command[:] = self.command
        requeue_signals: list[int] = []  # from Slurm: stop, and go back into the queue

        def stop(number: int, _: Any) -> None:
            requeue_signals.append(number)
            signal.raise_signal(signal.SIGTERM)

        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler: on the first rank; ends the process
        signal.signal(signal.SIGUSR2, stop)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until training handles it
        code = launch.run_command(self.work, self.prog)
        if code == launch.INTERRUPTED and (requeue_signals or preempted()):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first rank may end the others now
            if callable(requeue):
                try:
                    requeue(signal.SIGUSR2, None)
                except SystemExit as end:  # all is saved; a thread that crashes at the usual end loses the code
                    _end_now(end.code)
        elif code:
            sys.exit(code)

    def checkpoint(self) -> Any:
        """The job that goes back into the queue: the same one; the run's folder records where to go on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def preempted() -> bool:
    """Whether Slurm preempts this job; False where the user cancelled it."""
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True, timeout=60
        ).stdout
    except (KeyError, OSError, subprocess.TimeoutExpired):
        return False
    when = re.search(r"\bPreemptTime=(\S+)", shown)
    return when is not None and when[1] != "None" and "JobState=CANCELLED" not in shown


@dataclass(frozen=True)
class ArrayConfig:
    """The Slurm array of each stage, for --backend slurm; --workers is how many jobs it has."""

    gpus_per_job: int = 0
    """GPUs of each job: 1 where networks and comparisons of vectors are to compute on one."""
    cpus_per_job: int = 8
    hours: float = 24
    """Time limit of a job; what it has not done by then is queued again."""
    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    cluster: str | None = None
    """slurm, or local to try it on this machine; detected by default."""

    def __post_init__(self) -> None:
        within(self, "slurm.", 0, 1, "gpus_per_job")
        within(self, "slurm.", 1, None, "cpus_per_job")
        within(self, "slurm.", 1 / 60, None, "hours")
        if self.cluster not in (None, "slurm", "local"):
            raise nearest("slurm.cluster", self.cluster, ("slurm", "local"))


NO_ARRAY = ArrayConfig()


@dataclass(frozen=True)
class UnitsTask:
    """What one job of an array does: units of a stage, which it loads from a file. Returns a mistake of the user's.

    Slurm starts it again, unchanged, when its time is over: units that are complete are not computed again.
    """

    stage: Path
    root: Path
    numbers: list[int]
    processors: int

    def __call__(self) -> str | None:
        from troodon.curate.stage import run_unit

        stage = pickle.loads(self.stage.read_bytes())
        try:
            if hasattr(stage.work, "placed"):
                stage = replace(stage, work=stage.work.placed(self.processors))
            for number in self.numbers:
                run_unit(stage, self.root, number)
        except UsageError as error:
            return str(error)
        return None

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class SlurmArray:
    """A backend of stages (curate/stage.py): each is an array of `jobs` jobs, which share its units.

    All machines see `root` under the same path. Units of a job that was lost are queued again; where a unit is missing
    after three arrays, the stage fails. Ended by Ctrl-C, it cancels its jobs.
    """

    jobs: int
    config: ArrayConfig = NO_ARRAY
    poll_s: float = 5.0

    def run(self, stage: "Stage", root: Path, pending: Sequence[int]) -> Iterator[int]:
        missing, folder = list(pending), root.resolve() / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / f"{stage.name}-{stage.fingerprint}.pkl"
        write_bytes(saved, pickle.dumps(stage))
        for _ in range(ATTEMPTS):
            jobs = self._submit(stage, saved, root.resolve(), folder, missing)
            try:
                while True:
                    is_over = all(job.done() for job in jobs)
                    done = [number for number in missing if stage.folder(root, number).is_dir()]
                    missing = [number for number in missing if number not in set(done)]
                    yield from done
                    if is_over:
                        break
                    time.sleep(self.poll_s)
            finally:
                for job in jobs:
                    if not job.done():
                        job.cancel()
            for job in jobs:
                if job.exception() is None and (mistake := job.result()):
                    raise UsageError(mistake)
            if not missing:
                saved.unlink(missing_ok=True)
                return
            say(f"{stage.name}: {len(missing)} units are missing after an array of jobs, which wrote to {folder}")
        lost = next((str(error) for job in jobs if (error := job.exception())), "no job failed")
        raise RuntimeError(f"{stage.name}: units {missing[:5]} are missing after {ATTEMPTS} arrays of jobs: {lost}")

    def _submit(self, stage: "Stage", saved: Path, root: Path, folder: Path, numbers: list[int]) -> list[Any]:
        """Queue the units in shares of about the same size, as one array."""
        import submitit

        c, shares = self.config, min(self.jobs, len(numbers))
        executor = submitit.AutoExecutor(
            folder, cluster=c.cluster, slurm_max_num_timeout=REQUEUES, local_max_num_timeout=REQUEUES
        )
        executor.update_parameters(
            name=f"troodon-{stage.name}",
            cpus_per_task=c.cpus_per_job,
            gpus_per_node=c.gpus_per_job,
            timeout_min=max(1, round(60 * c.hours)),
            slurm_partition=c.partition,
            slurm_account=c.account,
            slurm_constraint=c.constraint,
            slurm_array_parallelism=shares,
            slurm_additional_parameters={"requeue": True},
        )
        tasks = [UnitsTask(saved, root, numbers[first::shares], c.cpus_per_job) for first in range(shares)]
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
        say(f"{stage.name}: {len(numbers)} units in {shares} jobs of Slurm, {jobs[0].job_id} and so on, in {folder}")
        return jobs

    def close(self) -> None:
        pass


def open_backend(name: str, workers: int, config: ArrayConfig = NO_ARRAY) -> "Backend":
    """The backend of this name (curate/backends.py); "slurm" is an array of `workers` jobs for each stage.

    UsageError for a name that is none, for what Slurm could not run, and for settings of an array without one.
    """
    from troodon.curate.backends import create_backend

    if name != "slurm":
        if config != NO_ARRAY:
            raise UsageError(f"slurm: settings of an array of jobs; they need --backend slurm, and it is {name}")
        return create_backend(name, workers)
    if workers < 1:
        raise UsageError(f"workers {workers}: of the backend slurm, the jobs of an array; 1 or more")
    check(SlurmConfig(cluster=config.cluster))
    return SlurmArray(workers, config)


def _end_now(code: Any) -> None:
    """End this process with a code, without what libraries do when Python ends."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 0xFF if isinstance(code, int) else 1)
