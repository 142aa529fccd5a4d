"""One command at a time on the folder of an artifact."""

import contextlib
import errno
import functools
import inspect
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

from troodon.config import UsageError
from troodon.run import current_command

P = ParamSpec("P")
R = TypeVar("R")
WAIT_S = 0.5  # for a command that only finds that all is done
_at_work: dict[Path, int] = {}  # folders that this process works on, and the thread that does


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Work on an artifact while no other command does. UsageError that says who is at work on it.

    A file beside the folder is locked, until this process ends in whatever way. On a filesystem without locks it names
    the process at work, which counts while it lives. Of several ranks, the first one locks, or the process that
    launched them. A thread may enter again.
    """
    folder, thread = Path(folder).resolve(), threading.get_ident()
    if _rank() or _at_work.get(folder) == thread:
        yield
        return
    if _at_work.setdefault(folder, thread) != thread:
        raise _busy(folder, _worker())
    path, file = folder.with_name(f".{folder.name}.lock"), None
    try:
        file = _lock(folder, path)
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # before the lock ends: who opens it now sees that it has gone
            file.close()
        del _at_work[folder]


def one_at_a_time(work: Callable[P, R]) -> Callable[P, R]:
    """A function that makes the artifact in its argument `out`, and works on it alone."""
    signature = inspect.signature(work)

    @functools.wraps(work)
    def guarded(*arguments: P.args, **named: P.kwargs) -> R:
        with alone(Path(signature.bind(*arguments, **named).arguments["out"])):
            return work(*arguments, **named)

    return guarded


def _rank() -> int:
    """The rank of this process in its group, which its environment tells or torch, if it is loaded."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def _lock(folder: Path, path: Path) -> IO[str] | None:
    """The locked file, which says who works; None where no file can be written, and so no artifact."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115
        except OSError:
            return None
        other = _other(file)
        if other and (other["host"], other["process"]) == (platform.node(), os.getppid()):  # works through its ranks
            file.close()
            return None
        if other is None and os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            file.seek(0)
            file.truncate()
            file.write(json.dumps(_worker()))
            file.flush()
            return file
        file.close()
        if other is not None and time.monotonic() > deadline:
            raise _busy(folder, other)
        time.sleep(0.02)


def _other(file: IO[str]) -> dict | None:
    """Who else has the lock; None if this process has it now."""
    import fcntl

    locks = True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except OSError as error:
        locks = error.errno in (errno.EACCES, errno.EAGAIN)
    file.seek(0)
    with contextlib.suppress(ValueError):
        other = json.loads(file.read())
        return other if locks or other["host"] != platform.node() or _lives(other["process"]) else None
    return {} if locks else None


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return process != os.getpid()


def _worker() -> dict:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": platform.node(), "process": os.getpid(), "since": since, "command": current_command[:3]}


def _busy(folder: Path, other: dict) -> UsageError:
    who = " ".join(other.get("command", ())) or "another command"
    where = f"process {other['process']} on {other['host']}, since {other['since']}" if other else "just begun"
    return UsageError(f"{folder}: {who} is at work on it ({where}); wait for it, stop it, or choose a new --out")
