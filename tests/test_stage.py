"""Stages: done once, by anyone; killed processes, full disks and mistakes leave nothing half done."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from troodon import run
from troodon.config import UsageError
from troodon.curate.engines import Here, Processes, Ray, engine
from troodon.curate.stage import Stage, counted, do, perform, seconds, totals


@dataclass(frozen=True)
class Count:
    """Counts to a number, and does as it is told on the way."""

    kill: tuple[int, ...] = ()  # these end their process, the first time
    always: bool = False
    fail: tuple[int, ...] = ()
    lose: int = 0
    slow: float = 0.0
    notes: str = ""  # a folder where it notes what it did

    def __call__(self, unit: int, folder: Path) -> dict:
        time.sleep(self.slow)
        mark = Path(self.notes) / f"{unit}.killed"
        if unit in self.kill and (self.always or not mark.exists()):
            mark.touch()
            (folder / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        if unit in self.fail:
            raise UsageError(f"unit {unit} is a mistake")
        if self.notes:
            with open(Path(self.notes) / "done", "a") as file:
                file.write(f"{unit}\n")
        (folder / "sum.txt").write_text(str(sum(range(unit))))
        return counted(unit, unit - 1 - self.lose, odd=1)


def stage(units: int = 6, **told) -> Stage:
    return Stage("count", Count(**told), list(range(1, units + 1)), "0123")


def hashed(parts: list[Path]) -> str:
    files = [f for part in parts for f in sorted(part.rglob("*")) if f.name != "timings.json"]
    return hashlib.sha256(b"".join(f.relative_to(parts[0].parents[1]).as_posix().encode() + f.read_bytes()
                                   for f in files)).hexdigest()  # fmt: skip


def test_whoever_does_it_the_files_are_the_same(tmp_path):
    expected = hashed(do(stage(), tmp_path / "here", Here()))
    assert hashed(do(stage(), tmp_path / "one", Processes(1))) == expected
    assert hashed(do(stage(), tmp_path / "three", Processes(3))) == expected
    assert totals(do(stage(), tmp_path / "here", Here())) == {"in": 21, "out": 15, "left out": {"odd": 6}}
    assert list(seconds(do(stage(), tmp_path / "here", Here()))) == ["count"]


def test_ray_gives_the_same_files(tmp_path):
    ray = pytest.importorskip("ray")
    expected = hashed(do(stage(), tmp_path / "here", Here()))
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    try:
        assert hashed(do(stage(), tmp_path / "ray", Ray())) == expected
        with pytest.raises(UsageError, match="unit 2 is a mistake"):
            do(stage(fail=(2,)), tmp_path / "wrong", Ray())
    finally:
        ray.shutdown()


def test_what_is_done_is_not_done_again(tmp_path):
    told = stage(notes=str(tmp_path))
    parts = do(told, tmp_path / "home", Here())
    (parts[2] / "counts.json").unlink()
    for file in parts[2].iterdir():
        file.unlink()
    parts[2].rmdir()
    (parts[2].parent / "00002.0a0b0c0d.partial").mkdir()  # left by a kill
    do(told, tmp_path / "home", Here())
    assert (tmp_path / "done").read_text().split() == ["1", "2", "3", "4", "5", "6", "3"]
    assert sorted(p.name for p in parts[0].parent.iterdir()) == [f"{at:05d}" for at in range(6)]
    perform(told, tmp_path / "home", 0)
    assert len((tmp_path / "done").read_text().split()) == 7


def test_a_killed_process_costs_one_unit(tmp_path):
    told = stage(8, kill=(2, 5, 8), notes=str(tmp_path))
    assert hashed(do(told, tmp_path / "killed", Processes(2))) == hashed(do(stage(8), tmp_path / "calm", Here()))
    assert sorted(map(int, (tmp_path / "done").read_text().split())) == list(range(1, 9))
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_a_unit_that_always_kills_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="count: part 1 ended 3 processes: 2"):
        do(stage(kill=(2,), always=True, notes=str(tmp_path)), tmp_path / "home", Processes(2))
    assert len(do(stage(), tmp_path / "home", Here())) == 6


@pytest.mark.parametrize("by", [Here(), Processes(2)])
def test_mistakes_come_back_and_leave_nothing_half_done(tmp_path, by):
    with pytest.raises(UsageError, match="unit 3 is a mistake"):
        do(stage(fail=(3,)), tmp_path, by)
    folder = tmp_path / "count-0123"
    assert "00002" not in {p.name for p in folder.iterdir() if p.suffix != ".partial"}
    with pytest.raises(AssertionError, match=r"count, part \d: 1 of \d are unaccounted for"):
        do(stage(lose=1), tmp_path / "lossy", by)


def test_a_full_disk_fails_the_unit_and_the_next_run_goes_on(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            do(stage(), tmp_path, Here())
    assert list((tmp_path / "count-0123").iterdir()) == []
    assert len(do(stage(), tmp_path, Here())) == 6


PROGRAM = """
import sys
from pathlib import Path
from tests.test_stage import Processes, do, stage
if __name__ == "__main__":
    do(stage(12, slow=0.1, notes=sys.argv[1]), Path(sys.argv[1]) / "home", Processes(2))
"""


def test_a_killed_main_process_leaves_whole_units_and_no_processes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    environment["TROODON_TEST"] = str(tmp_path)
    main = subprocess.Popen([sys.executable, str(program), str(tmp_path)], env=environment)
    folder, until = tmp_path / "home" / "count-0123", time.monotonic() + 30
    while len(list(folder.glob("?????"))) < 3:
        assert time.monotonic() < until
        time.sleep(0.02)
    main.kill()
    main.wait()
    while len(found := _with_environment(f"TROODON_TEST={tmp_path}")):
        assert time.monotonic() < until, found
        time.sleep(0.05)
    done = (tmp_path / "done").read_text().split()
    assert 3 <= len(done) < 12
    parts = do(stage(12, notes=str(tmp_path)), tmp_path / "home", Here())
    assert hashed(parts) == hashed(do(stage(12), tmp_path / "calm", Here()))
    assert all(run.read_json(part / "counts.json")["in"] for part in parts)


def _with_environment(setting: str) -> list[str]:
    """Running processes that were started with this in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if setting.encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


def test_engines_are_named(monkeypatch):
    assert engine("local") == Here()
    assert engine("local", 4) == Processes(4)
    assert engine("ray") == Ray(None)
    assert engine("ray://head:10001") == Ray("ray://head:10001")
    with pytest.raises(UsageError, match="did you mean 'local'"):
        engine("loca")
    with pytest.raises(UsageError, match="workers -1"):
        engine("local", -1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'troodon\[ray\]'"):
        do(stage(), Path("unused"), Ray())
