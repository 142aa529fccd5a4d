"""A run as a Slurm job: what is submitted, when a job is queued again, and one that really is."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_launch import SHARED, images, records  # noqa: F401  images is a fixture
from troodon import cli, run, slurm, verbs
from troodon.config import UsageError, from_yaml, to_yaml
from troodon.learn import checkpoint
from troodon.learn.config import PretrainConfig
from troodon.slurm import RankTask, SlurmConfig, check, preempted

pytest.importorskip("submitit", reason="needs submitit: pip install 'troodon[slurm]'")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`programs(name=lines)`: commands that print these lines, before others on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def make(**outputs: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, lines in outputs.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho '{lines}'\n")
            (tmp_path / "bin" / name).chmod(0o755)

    return make


def test_the_submitted_job(images, tmp_path, programs, capsys):  # noqa: F811
    programs(srun="", sbatch="Submitted batch job 42")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "runs" / "first"
    recipe.write_text(to_yaml(replace(SHARED, batch=32)))
    words = ["pretrain", str(recipe), "--data", str(images), "--out", f"{out}/", "--slurm.nodes", "2"]
    words += ["--slurm.partition", "gpus", "--slurm.hours", "1.5", "--seed", "3"]
    assert cli.run(words) == 0
    out_text, watch = capsys.readouterr()
    assert out_text == "42\n"
    assert f"tail -F {out}-logs/42_0_log.err\n  squeue -j 42\n  scancel 42" in watch
    assert not out.exists()

    script = Path(f"{out}-logs", "42_submission.sh").read_text().splitlines()
    for line in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=8", "time=90", "partition=gpus",
                 "signal=USR2@600", "requeue", "job-name=troodon-first"):  # fmt: skip
        assert f"#SBATCH --{line}" in script
    assert not any("account" in line or "constraint" in line for line in script)
    assert any("--kill-on-bad-exit=1" in line for line in script)

    recipe.unlink()  # what the recipe says later is not what the job does
    task = pickle.loads(Path(f"{out}-logs", "42_submitted.pkl").read_bytes()).function
    assert task.command == ["troodon", *words]
    settings, *places = task.work.args
    assert from_yaml(PretrainConfig(), Path(settings)) == replace(SHARED, batch=32, seed=3)
    assert places == [[str(images)], f"{out}/", None]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"nodes": 1}, "slurm: no srun here; .* --slurm.cluster local"),
        ({"nodes": 2, "cluster": "local"}, "slurm.nodes 2: this machine is one"),
        ({"nodes": 1, "cluster": "local", "gpus_per_node": 3}, "batch 8 does not divide over 3 devices: set batch 9"),
        ({"nodes": -1}, "slurm.nodes -1"),
        ({"nodes": 1, "hours": 0}, "slurm.hours 0"),
        ({"nodes": 1, "cluster": "slrum"}, "did you mean 'slurm'"),
    ],
)
def test_mistakes_are_reported_before_anything_is_queued(images, tmp_path, monkeypatch, config, message):  # noqa: F811
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=message):
        verbs.submit(SHARED, images, tmp_path / "run", SlurmConfig(**config))
    assert not list(tmp_path.glob("run*"))


def test_a_missing_submitit_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match=r"pip install 'troodon\[slurm\]'"):
        check(SlurmConfig(nodes=1))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("JobId=7 JobState=RUNNING PreemptTime=2026-01-01T00:00:00", True),
        ("JobId=7 JobState=RUNNING PreemptTime=None", False),
        ("JobId=7 JobState=CANCELLED PreemptTime=2026-01-01T00:00:00", False),
        ("slurm_load_jobs error: Invalid job id specified", False),
    ],
)
def test_preemption_is_distinguished_from_cancellation(programs, monkeypatch, output, expected):
    programs(scontrol=output)
    assert not preempted()  # not a job
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert preempted() is expected


@pytest.fixture
def requeued(monkeypatch):
    """A task of a local job, and a list of the signals that would have queued it again."""
    place = {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "LOCAL_NTASKS": "2", "LOCAL_JOB_NUM_NODES": "1",
             "LOCAL_NODEID": "0", "LOCAL_GLOBALID": "1", "LOCAL_LOCALID": "1"}  # fmt: skip
    for name, value in place.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back at the end
        del os.environ[name]
    numbers: list[int] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, lambda number, _: numbers.append(number))
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_task_runs_as_a_rank(requeued, monkeypatch):
    monkeypatch.setattr(slurm, "current_command", commands := [])
    environment = {}
    RankTask(lambda: environment.update(os.environ), "troodon pretrain", ["troodon", "pretrain", "y"])()
    assert commands == ["troodon", "pretrain", "y"]
    assert [environment[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["1", "2", "1"]
    assert environment["MASTER_ADDR"]
    assert int(environment["MASTER_PORT"]) > 1023
    assert requeued == []


@pytest.mark.parametrize("received", [signal.SIGUSR2, signal.SIGTERM, None])
def test_only_jobs_that_slurm_stopped_are_requeued(requeued, capsys, received):
    def work() -> None:
        if received is None:
            raise OSError("disk full")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(received)
        raise run.Interrupted("stopped after 3 of 6 steps; everything is saved")

    task = RankTask(work, "troodon pretrain", [])
    if received == signal.SIGUSR2:
        task()
        assert requeued == [signal.SIGUSR2]
        assert task.checkpoint().function is task
    else:
        with pytest.raises(SystemExit) as stop:
            task()
        assert stop.value.code == (1 if received is None else 130)
        assert requeued == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "troodon pretrain: " + (
        "OSError: disk full (--debug shows where)"
        if received is None
        else "stopped after 3 of 6 steps; everything is saved; the same command goes on"
    )


def test_the_code_that_asks_for_another_start_survives_a_crash_at_the_end(requeued, monkeypatch):
    """Torch's threads may abort a process that ends as usual; the controller would take that for a failed job."""

    def work() -> None:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGUSR2)
        raise run.Interrupted("stopped after 3 of 6 steps; everything is saved")

    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    signal.signal(signal.SIGUSR2, lambda number, _: sys.exit(144))
    RankTask(work, "troodon pretrain", [])()
    signal.signal(signal.SIGUSR2, lambda number, _: sys.exit(-1))
    RankTask(work, "troodon pretrain", [])()
    assert ended == [144, 255]


@pytest.mark.slow
def test_a_job_that_runs_out_of_time_is_requeued_and_finishes(images, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    controllers = []

    class RecordedPopen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            controllers.append(self)

    monkeypatch.setattr(subprocess, "Popen", RecordedPopen)
    run = tmp_path / "run"
    config = replace(SHARED, steps=60, checkpoint_every=1000)
    job = verbs.submit(config, images, run, SlurmConfig(nodes=1, gpus_per_node=2, hours=1, cluster="local"))
    log = Path(f"{run}-logs", f"{job}_0_log.out")
    (controller,) = controllers
    try:
        while controller.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.01)
        tasks = subprocess.run(["pgrep", "-P", job], capture_output=True, text=True, check=True).stdout.split()
        assert len(tasks) == 2
        for task in tasks:
            os.kill(int(task), signal.SIGUSR2)
        assert controller.wait(120) == 0
    finally:
        controller.terminate()
    assert "Requeued job" in log.read_text(), log.with_suffix(".err").read_text()
    assert "going on at step" in log.with_suffix(".err").read_text()
    assert [r["step"] for r in records(run)] == list(range(60))
    assert checkpoint.finished(run)[-1].name == "000060"
