"""A training run as a Slurm job: one task for each device, queued again until the run is finished.

submitit writes the batch script, starts the tasks and keeps their output in `<out>-logs`. Each task does the command
of the run as one rank of it. Before the job's time is up, or when it is preempted, the run saves and the job goes back
into the queue, from where it goes on. `scancel` ends it for good, also with everything saved.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from troodon.config import UsageError, nearest, within
from troodon.run import DOING, doing, say

NOTICE_S = 600  # before the time is up: a step and a checkpoint of the largest network fit in
ROUNDS = 1000  # times that a job may be queued again; not meant to be reached


@dataclass(frozen=True)
class SlurmConfig:
    """The job, where a run is to be one."""

    nodes: int = 0
    """Machines; 0 trains here, not on Slurm."""
    gpus_per_node: int = 8
    cpus_per_gpu: int = 8
    hours: float = 72
    """Time limit; a run that needs longer saves, and is queued again."""
    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    cluster: str | None = None
    """slurm, or local to try it here; found out if left out."""

    def __post_init__(self) -> None:
        within(self, "slurm.", 0, None, "nodes")
        within(self, "slurm.", 1, None, "gpus_per_node", "cpus_per_gpu")
        within(self, "slurm.", 1 / 60, None, "hours")
        if self.cluster not in (None, "slurm", "local"):
            raise nearest("slurm.cluster", self.cluster, ("slurm", "local"))


def logs(out: str | Path) -> Path:
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


def submit(words: list[str], out: str | Path, config: SlurmConfig) -> str:
    """Queue the command `troodon WORDS`; returns the job's id, and says where it writes and how to watch it."""
    import submitit

    minutes = max(1, round(60 * config.hours))
    notice_s = min(NOTICE_S, 15 * minutes)  # of a short job, no more than a quarter
    executor = submitit.AutoExecutor(
        logs(out), cluster=config.cluster, slurm_max_num_timeout=ROUNDS, local_max_num_timeout=ROUNDS
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
        slurm_srun_args=["--kill-on-bad-exit=1"],  # ranks that wait for a lost one would wait for ever
        slurm_additional_parameters={"requeue": True},
    )
    job = executor.submit(Task(words, doing))
    log = logs(out) / f"{job.job_id}_0_log.err"
    say(f"  job {job.job_id}: {config.nodes} x {config.gpus_per_node} tasks, writing to {logs(out)}")
    watch = [f"tail -F {shlex.quote(str(log))}"]
    if executor.cluster == "slurm":
        watch += [f"squeue -j {job.job_id}", f"scancel {job.job_id}"]
    say("next:" + "".join(f"\n  {command}" for command in watch))
    return str(job.job_id)


class Task:
    """What one rank of the job does. Slurm starts it again, as it was, when the job comes back from the queue."""

    def __init__(self, words: list[str], recorded: list[str]):
        self.words, self.recorded = list(words), list(recorded)

    def __call__(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        from troodon import cli

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ[DOING] = json.dumps(self.recorded)
        told_to_go: list[int] = []  # by Slurm, to come back

        def stop(number: int, _: Any) -> None:
            told_to_go.append(number)
            signal.raise_signal(signal.SIGTERM)

        queue_again = signal.getsignal(signal.SIGUSR2)  # submitit's: on the first rank; ends the process
        signal.signal(signal.SIGUSR2, stop)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until training listens for it
        code = cli.run(self.words)
        if code == cli.INTERRUPTED and (told_to_go or preempted()):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first rank may end the others now
            if callable(queue_again):
                queue_again(signal.SIGUSR2, None)
        elif code:
            sys.exit(code)

    def checkpoint(self) -> Any:
        """The job that goes back into the queue: the same; the run's folder knows where to go on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def preempted() -> bool:
    """Whether Slurm is taking this job's place away; not so where the user cancelled it."""
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True, timeout=60
        ).stdout
    except (KeyError, OSError, subprocess.TimeoutExpired):
        return False
    when = re.search(r"\bPreemptTime=(\S+)", shown)
    return when is not None and when[1] != "None" and "JobState=CANCELLED" not in shown
