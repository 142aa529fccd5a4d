"""Stages: any worker computes a unit once; killed processes, full disks and errors leave no partial results."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from troodon import run
from troodon.config import UsageError
from troodon.curate.backends import ProcessPool, RayCluster, SingleProcess, create_backend
from troodon.curate.stage import Stage, run_stage, run_unit, stage_seconds, total_counts, unit_counts


@dataclass(frozen=True)
class Count:
    """Adds up numbers, and fails, kills its process or sleeps on request."""

    kill: tuple[int, ...] = ()  # units that kill their process, the first time
    always: bool = False
    fail: tuple[int, ...] = ()
    lose: int = 0
    slow: float = 0.0
    log: str = ""  # a folder where finished units are logged

    def __call__(self, unit: int, folder: Path) -> dict:
        time.sleep(self.slow)
        mark = Path(self.log) / f"{unit}.killed"
        if unit in self.kill and (self.always or not mark.exists()):
            mark.touch()
            (folder / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        if unit in self.fail:
            raise UsageError(f"unit {unit} is a mistake")
        if self.log:
            with open(Path(self.log) / "done", "a") as file:
                file.write(f"{unit}\n")
        (folder / "sum.txt").write_text(str(sum(range(unit))))
        return unit_counts(unit, unit - 1 - self.lose, odd=1)


def stage(units: int = 6, **behaviour) -> Stage:
    return Stage("count", Count(**behaviour), list(range(1, units + 1)), "0123")


def sha256_of(parts: list[Path]) -> str:
    files = [f for part in parts for f in sorted(part.rglob("*")) if f.name != "timings.json"]
    return hashlib.sha256(b"".join(f.relative_to(parts[0].parents[1]).as_posix().encode() + f.read_bytes()
                                   for f in files)).hexdigest()  # fmt: skip


def test_all_backends_write_the_same_files(tmp_path):
    expected = sha256_of(run_stage(stage(), tmp_path / "here", SingleProcess()))
    assert sha256_of(run_stage(stage(), tmp_path / "one", ProcessPool(1))) == expected
    assert sha256_of(run_stage(stage(), tmp_path / "three", ProcessPool(3))) == expected
    assert total_counts(run_stage(stage(), tmp_path / "here", SingleProcess())) == {
        "in": 21,
        "out": 15,
        "left out": {"odd": 6},
    }
    assert list(stage_seconds(run_stage(stage(), tmp_path / "here", SingleProcess()))) == ["count"]


def test_complete_units_are_not_computed_again(tmp_path):
    logged = stage(log=str(tmp_path))
    parts = run_stage(logged, tmp_path / "home", SingleProcess())
    (parts[2] / "counts.json").unlink()
    for file in parts[2].iterdir():
        file.unlink()
    parts[2].rmdir()
    (parts[2].parent / "00002.0a0b0c0d.partial").mkdir()  # left by a killed process
    run_stage(logged, tmp_path / "home", SingleProcess())
    assert (tmp_path / "done").read_text().split() == ["1", "2", "3", "4", "5", "6", "3"]
    assert sorted(p.name for p in parts[0].parent.iterdir()) == [f"{number:05d}" for number in range(6)]
    run_unit(logged, tmp_path / "home", 0)
    assert len((tmp_path / "done").read_text().split()) == 7


def test_a_killed_process_loses_one_unit(tmp_path):
    logged = stage(8, kill=(2, 5, 8), log=str(tmp_path))
    assert sha256_of(run_stage(logged, tmp_path / "killed", ProcessPool(2))) == sha256_of(
        run_stage(stage(8), tmp_path / "calm", SingleProcess())
    )
    assert sorted(map(int, (tmp_path / "done").read_text().split())) == list(range(1, 9))
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_a_unit_that_always_kills_its_process_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="count: unit 1 has killed 3 processes: 2"):
        run_stage(stage(kill=(2,), always=True, log=str(tmp_path)), tmp_path / "home", ProcessPool(2))
    assert len(run_stage(stage(), tmp_path / "home", SingleProcess())) == 6


@pytest.mark.parametrize("backend", [SingleProcess(), ProcessPool(2)])
def test_errors_are_raised_and_leave_no_partial_unit(tmp_path, backend):
    with pytest.raises(UsageError, match="unit 3 is a mistake"):
        run_stage(stage(fail=(3,)), tmp_path, backend)
    folder = tmp_path / "count-0123"
    assert "00002" not in {p.name for p in folder.iterdir() if p.suffix != ".partial"}
    with pytest.raises(AssertionError, match=r"count, unit \d: 1 of \d are unaccounted for"):
        run_stage(stage(lose=1), tmp_path / "lossy", backend)


def test_a_full_disk_fails_the_unit_and_the_next_run_continues(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            run_stage(stage(), tmp_path, SingleProcess())
    assert list((tmp_path / "count-0123").iterdir()) == []
    assert len(run_stage(stage(), tmp_path, SingleProcess())) == 6


PROGRAM = """
import sys
from pathlib import Path
from tests.test_stage import ProcessPool, run_stage, stage
if __name__ == "__main__":
    run_stage(stage(12, slow=0.1, log=sys.argv[1]), Path(sys.argv[1]) / "home", ProcessPool(2))
"""


def test_a_killed_main_process_leaves_complete_units_and_no_processes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    environment["TROODON_TEST"] = str(tmp_path)
    main = subprocess.Popen([sys.executable, str(program), str(tmp_path)], env=environment)
    folder, deadline = tmp_path / "home" / "count-0123", time.monotonic() + 30
    while len(list(folder.glob("?????"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    main.kill()
    main.wait()
    while len(processes := _processes_with(f"TROODON_TEST={tmp_path}")):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)
    done = (tmp_path / "done").read_text().split()
    assert 3 <= len(done) < 12
    parts = run_stage(stage(12, log=str(tmp_path)), tmp_path / "home", SingleProcess())
    assert sha256_of(parts) == sha256_of(run_stage(stage(12), tmp_path / "calm", SingleProcess()))
    assert all(run.read_json(part / "counts.json")["in"] for part in parts)


def _processes_with(setting: str) -> list[str]:
    """Return the ids of running processes with this setting in their environment."""
    matches = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if setting.encode() in (process / "environ").read_bytes():
                matches.append(process.name)
    return matches


def test_backends_are_created_by_name(monkeypatch):
    assert create_backend("local") == SingleProcess()
    assert create_backend("local", 4) == ProcessPool(4)
    assert create_backend("ray") == RayCluster(None)
    assert create_backend("ray://head:10001") == RayCluster("ray://head:10001")
    with pytest.raises(UsageError, match="did you mean 'local'"):
        create_backend("loca")
    with pytest.raises(UsageError, match="workers -1"):
        create_backend("local", -1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'troodon\[ray\]'"):
        run_stage(stage(), Path("unused"), RayCluster())


@dataclass(frozen=True)
class Placing(Count):
    """Work that holds networks: it must be placed, once in each process, before it computes."""

    processors: int = 0

    def placed(self, processors: int) -> "Placing":
        with open(Path(self.log) / "placed", "a") as file:
            file.write(f"{os.getpid()} {processors}\n")
        return replace(self, processors=processors)

    def __call__(self, unit: int, folder: Path) -> dict:
        if not self.processors:
            raise UsageError("not placed")
        return super().__call__(unit, folder)


def placing(units: int, **behaviour) -> Stage:
    return Stage("count", Placing(**behaviour), list(range(1, units + 1)), "0123")


def test_a_process_places_networks_once(tmp_path):
    expected = sha256_of(run_stage(stage(), tmp_path / "here", SingleProcess()))
    assert sha256_of(run_stage(placing(6, log=str(tmp_path)), tmp_path / "two", ProcessPool(2))) == expected
    lines = (tmp_path / "placed").read_text().splitlines()
    assert len(lines) == len({*lines}) == 2
    assert {line.split()[1] for line in lines} == {str(max(1, (os.cpu_count() or 1) // 2))}


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'troodon[ray]'")
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # made ones, which no test computes on
        ray.init(
            num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=10**8,
            runtime_env={"env_vars": environment},
        )  # fmt: skip
    yield ray
    ray.shutdown()


def test_ray_writes_the_same_files(tmp_path, cluster):
    expected = sha256_of(run_stage(stage(), tmp_path / "here", SingleProcess()))
    assert sha256_of(run_stage(stage(), tmp_path / "ray", RayCluster())) == expected
    with pytest.raises(UsageError, match="unit 2 is a mistake"):
        run_stage(stage(fail=(2,)), tmp_path / "wrong", RayCluster())


def test_actors_that_die_cost_only_their_units(tmp_path, cluster):
    """As where a machine is lost: the units that they had go to others."""
    expected = sha256_of(run_stage(stage(8), tmp_path / "calm", SingleProcess()))
    dying = placing(8, kill=(2, 5), log=str(tmp_path))
    assert sha256_of(run_stage(dying, tmp_path / "killed", RayCluster())) == expected
    assert sorted(map(int, (tmp_path / "done").read_text().split())) == list(range(1, 9))
    assert len((tmp_path / "placed").read_text().splitlines()) == 3  # the first, and after each death
    with pytest.raises(RuntimeError, match="count: unit 1 has killed 3 processes: 2"):
        run_stage(placing(6, kill=(2,), always=True, log=str(tmp_path)), tmp_path / "always", RayCluster())
    with pytest.raises(UsageError, match="unit 3 is a mistake"):
        run_stage(placing(6, fail=(3,), log=str(tmp_path)), tmp_path / "wrong", RayCluster())


@dataclass(frozen=True)
class OnGpu(Placing):
    device: str = "cuda"

    def __call__(self, unit: int, folder: Path) -> dict:
        with open(Path(self.log) / "gpus", "a") as file:
            file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {os.getpid()}\n")
        return super().__call__(unit, folder)


def test_each_gpu_of_a_cluster_has_an_actor(tmp_path, cluster):
    parts = run_stage(Stage("count", OnGpu(log=str(tmp_path), slow=0.3), [1] * 8, "0"), tmp_path / "h", RayCluster())
    assert len(parts) == 8
    pairs = {tuple(line.split()) for line in (tmp_path / "gpus").read_text().splitlines()}
    assert {gpu for gpu, _ in pairs} == {"0", "1"}
    assert len(pairs) == 2  # one process each


def test_an_array_of_slurm_jobs_writes_the_same_files(tmp_path):
    pytest.importorskip("submitit", reason="needs submitit: pip install 'troodon[slurm]'")
    from troodon.slurm import ArrayConfig, SlurmArray

    expected = sha256_of(run_stage(stage(4), tmp_path / "here", SingleProcess()))
    array = SlurmArray(2, ArrayConfig(cluster="local", cpus_per_job=3), poll_s=0.2)
    dying = placing(4, kill=(2,), log=str(tmp_path))
    assert sha256_of(run_stage(dying, tmp_path / "array", array)) == expected
    assert sorted(map(int, (tmp_path / "done").read_text().split())) == [1, 2, 3, 4]
    assert {line.split()[1] for line in (tmp_path / "placed").read_text().splitlines()} == {"3"}
    with pytest.raises(UsageError, match="unit 3 is a mistake"):
        run_stage(placing(4, fail=(3,), log=str(tmp_path)), tmp_path / "wrong", array)
