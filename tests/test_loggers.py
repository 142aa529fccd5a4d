"""Records elsewhere: what is written can be read there, a resumed run continues it, and a failure ends nothing."""

import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from troodon.config import UsageError
from troodon.learn import loggers
from troodon.learn.loggers import Loggers, check, open_loggers

RECORDS = [
    {"step": 0, "loss": 4.5, "lr": 1e-3, "note": "words", "good": True},
    {"event": "not finite", "message": "words"},
    {"step": 1, "loss": 4.25, "lr": 2e-3},
]


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "first").mkdir()
    return tmp_path / "first"


def test_a_missing_package_is_reported_before_anything_is_written(run, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    for refuse in (check, lambda names: open_loggers(names, run, {})):
        with pytest.raises(UsageError, match=r"log_to wandb: not installed; pip install 'troodon\[wandb\]'"):
            refuse(("wandb",))
    assert not list(run.iterdir())


def test_only_numbers_of_steps_are_written():
    written = []
    log = Loggers({"a": (lambda step, numbers: written.append((step, numbers)), lambda: written.append("closed"))})
    for record in [*RECORDS, {"step": 2}]:
        log.write(record)
    log.close()
    assert written == [(0, {"loss": 4.5, "lr": 1e-3}), (1, {"loss": 4.25, "lr": 2e-3}), "closed"]


def test_a_failing_logger_is_reported_once_and_skipped(run, monkeypatch, capsys):
    def failing(*_):
        raise OSError("no space\nleft")

    written = []
    fine = (lambda step, numbers: written.append(step), lambda: None)
    log = Loggers({"wandb": (failing, failing), "tensorboard": fine, "trackio": (lambda *_: None, failing)})
    for step in range(3):
        log.write({"step": step, "loss": 1.0})
    assert written == [0, 1, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert "log_to wandb: OSError: no space left; no more goes there" in line
    log.close()
    log.close()
    assert capsys.readouterr().err.count("log_to trackio: OSError") == 1

    monkeypatch.setattr(loggers, "check", lambda names: None)
    monkeypatch.setattr(loggers, "_wandb", failing)
    open_loggers(("wandb",), run, {}).write({"step": 0, "loss": 1.0})
    assert "log_to wandb: OSError" in capsys.readouterr().err


def test_tensorboard(run):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'troodon[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_loggers(("tensorboard",), run, {})
    for record in RECORDS:
        log.write(record)
    log.close()
    log = open_loggers(("tensorboard",), run, {}, first_step=1)  # resumed: step 1 is written again
    log.write({"step": 1, "loss": 4.0})
    log.close()
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 4.5), (1, 4.0)]
    assert [e.step for e in events.Scalars("lr")] == [0]


SCRIPT = """
import sys
from pathlib import Path
from troodon.learn.loggers import open_loggers

log = open_loggers((sys.argv[1],), Path(sys.argv[2]), {"batch": 8, "vit": {"dim": 32}})
assert sys.argv[1] in log.open_ones
log.write({"step": int(sys.argv[3]), "loss": 1.5 + int(sys.argv[3])})
log.write({"event": "not finite", "message": "words"})
log.close()
"""


def log_two_steps(name: str, run: Path, monkeypatch) -> None:
    """Log a step to `name`, as a process of its own, and another as a run that was resumed."""
    # Their own warnings are theirs, and their processes outlive a test: so not in this one.
    pytest.importorskip(name, reason=f"needs {name}: pip install 'troodon[{name}]'", exc_type=ImportError)
    monkeypatch.setenv("HOME", str(run))
    for step in range(2):
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), name, str(run), str(step)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "log_to" not in done.stderr


@pytest.mark.slow
def test_wandb(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_two_steps("wandb", run, monkeypatch)
    name = (run / "logged-as").read_text()
    stored = list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert [p.name for p in stored] == [f"run-{name}.wandb"] * 2  # two parts of one run
    for part, value in zip(sorted(stored), (b"1.5", b"2.5"), strict=True):
        assert value in part.read_bytes()


@pytest.mark.slow
def test_trackio(run, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(run / "trackio"))
    log_two_steps("trackio", run, monkeypatch)
    (stored,) = (run / "trackio").glob("troodon*.db")
    with sqlite3.connect(stored) as database:
        rows = database.execute("select run_name, step, cast(metrics as text) from metrics order by step").fetchall()
    database.close()
    assert len({row[0] for row in rows}) == 1
    assert [(step, "loss" in metrics) for _, step, metrics in rows] == [(0, True), (1, True)]
