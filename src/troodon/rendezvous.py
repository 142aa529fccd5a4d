"""The folder in which the ranks that `launch.py` starts meet: which of them failed first, and why each failed."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from troodon.run import read_json, write_json

RENDEZVOUS = "TROODON_RENDEZVOUS"  # environment variable of such ranks: the folder's path
SAVING_S = 600.0  # for ranks that were asked to stop: a step and a checkpoint of the largest network fit in


def claim_first_failure() -> None:
    """Record this rank as the first that failed, unless another is recorded."""
    if folder := os.environ.get(RENDEZVOUS):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.symlink(os.environ["RANK"], f"{folder}/first")  # atomic


def report_failure(message: str, traceback: str) -> None:
    """Leave for the launcher why this rank failed."""
    claim_first_failure()
    write_json(Path(os.environ[RENDEZVOUS], f"{os.environ['RANK']}.json"), {"said": message, "trace": traceback})


def first_failure(folder: Path) -> int | None:
    """The rank that failed first; None where no rank has recorded that it failed."""
    first = folder / "first"
    return int(os.readlink(first)) if first.is_symlink() else None


def failure_report(folder: Path, rank: int) -> tuple[str, str] | None:
    """Message and traceback of a rank that failed; None where it could not report."""
    path = folder / f"{rank}.json"
    if not path.exists():
        return None
    report = read_json(path)
    return report["said"], report["trace"]


def stop_with_parent() -> None:
    """Stop this rank by SIGTERM when its launcher ends, even by kill -9: standard input ends then."""

    def watch() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SAVING_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
