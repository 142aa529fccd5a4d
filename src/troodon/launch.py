"""Run a command as one process or as several ranks of this machine, and turn what ends it into an exit code.

torchrun and Slurm may start the ranks instead. Those started here meet in a folder (`rendezvous.py`), where each that
fails leaves the reason; only the first failure is reported, once, by the process that started them.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from troodon.config import UsageError
from troodon.rendezvous import RENDEZVOUS, SAVING_S, failure_report, first_failure, report_failure
from troodon.run import COMMAND, Interrupted, current_command, draw, full_disk, say

# Exit codes: done, failed, a mistake of the user, stopped on request with everything saved.
DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
BEGAN = "TROODON_BEGAN"  # environment variable of ranks that are started here: when their command began
GRACE_S = 5.0  # for the others to end by themselves when a rank fails; one that waits for it never would
TAIL = 100  # last lines shown of a rank that could not report: after a crash, the stack of each of its threads


class RankFailed(RuntimeError):
    """A rank that was started here has failed; the message says which, and why."""


@dataclass(frozen=True)
class LaunchResult:
    """How a launched command ended: its exit code, and message and traceback of the rank that failed first."""

    code: int = 0
    message: str = ""
    traceback: str = ""


def run_command(work: Callable[[], object], prog: str, debug: bool = False) -> int:
    """Call `work` and return the exit code. An error becomes one line, which starts with `prog`.

    A rank reports its error to the process that launched it. `debug` also prints the traceback.
    """
    try:
        work()
        return DONE
    except SystemExit as stop:  # --help of a verb
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader of the results has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, Exception) as error:
        code, message = describe_error(error)
        draw("")
        if RENDEZVOUS in os.environ:
            report_failure(message, traceback.format_exc())
            return code
        if debug:
            traceback.print_exc()
        say(f"{prog}: {message}{'; the same command goes on' if code == INTERRUPTED else ''}")
        return code


def describe_error(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for an error."""
    if isinstance(error, UsageError):
        return MISTAKE, str(error)
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return INTERRUPTED, str(error) or "interrupted"
    if isinstance(error, RankFailed):
        return FAILED, str(error)
    if full := full_disk(error):
        return FAILED, f"{full}; make room and give the same command again, or choose another --out"
    misplaced = FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError | PermissionError
    if isinstance(error, misplaced) and error.filename:
        return MISTAKE, f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    message = " ".join(str(error).split()) or "no reason given"
    return FAILED, f"{type(error).__name__}: {message} (--debug shows where)"


def raise_failure(result: LaunchResult) -> None:
    """Raise what ended the first rank that failed: UsageError, Interrupted or RankFailed; nothing if all is done."""
    if result.code:
        kinds = {MISTAKE: UsageError, INTERRUPTED: Interrupted}
        error = kinds.get(result.code, RankFailed)(result.message)
        error.add_note(result.traceback)
        raise error


def launch(words: list[str], ranks: int, began: float | None = None) -> LaunchResult:
    """Run the command `troodon WORDS` as `ranks` processes of this machine, and wait for them.

    SIGINT and SIGTERM are passed on to them, once each. When one rank fails, the others are ended; when this process
    ends, in whatever way, they end as well. Only rank zero prints; of the errors, only that of the first failure is
    returned. `began` is when the command began (see `began_at`).
    """
    with tempfile.TemporaryDirectory(prefix="troodon-") as name, _catch_signals() as signals:
        folder, children = Path(name), []
        read_end, write_end = os.pipe()  # the children's standard input, which ends when this process does
        env = os.environ | {RENDEZVOUS: name, COMMAND: json.dumps(current_command), "WORLD_SIZE": str(ranks)}
        env[BEGAN] = str(time.monotonic() if began is None else began)
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        try:
            for rank in range(ranks):
                with open(folder / f"{rank}.err", "wb") as errors:
                    children.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "troodon.cli", *words],
                            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                            stdin=read_end,
                            stdout=subprocess.DEVNULL,
                            stderr=errors if rank else None,
                            start_new_session=True,  # else Ctrl-C in a terminal would reach them twice
                        )
                    )
            failed = _wait(children, signals)
        finally:
            for child in children:
                child.kill()
                child.wait()
            os.close(read_end)
            os.close(write_end)
        return _result(folder, [child.returncode for child in children], failed, signals)


def began_at() -> float:
    """When the command that calls this began, by `time.monotonic`: now, or as the process says that launched it."""
    return float(os.environ.get(BEGAN) or time.monotonic())


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, in place of what they did before."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda caught, _: signals.append(caught)) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen], signals: list[int]) -> list[int]:
    """Wait until all have ended, and pass `signals` on; returns the ranks that failed by themselves, in order."""
    failed: list[int] = []
    passed_on, deadline = 0, math.inf
    while any([child.poll() is None for child in children]):  # a list: each is to be polled
        now = time.monotonic()
        for number in signals[passed_on:]:
            if passed_on and number == signal.SIGINT:  # the second Ctrl-C: they stop without saving
                deadline = min(deadline, now + GRACE_S)
            for child in children:
                child.send_signal(number)
            passed_on += 1
        for code in _newly_failed(children, failed):
            deadline = min(deadline, now + (SAVING_S if _stopped(code, signals) else GRACE_S))
        if now > deadline:
            for child in children:
                child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                for child in children:
                    child.wait(max(0, deadline + GRACE_S - time.monotonic()))
            return failed
        time.sleep(0.05)
    _newly_failed(children, failed)
    return failed


def _newly_failed(children: list[subprocess.Popen], failed: list[int]) -> list[int]:
    """Exit codes of the ranks that have failed since the last call; the ranks are added to `failed`."""
    new = [rank for rank, child in enumerate(children) if child.returncode and rank not in failed]
    failed += new
    return [children[rank].returncode for rank in new]


def _stopped(code: int, signals: list[int]) -> bool:
    """Whether a rank that ended with `code` was asked to stop, and did."""
    return code == INTERRUPTED or -code in signals


def _result(folder: Path, codes: list[int], failed: list[int], signals: list[int]) -> LaunchResult:
    if not failed:  # all is done, or they did not stop after being asked twice
        return LaunchResult(INTERRUPTED, "interrupted") if any(codes) else LaunchResult()
    # A rank that a signal killed could not record itself as the first; others may have, since they wait for it.
    killed = [rank for rank in failed if codes[rank] < 0 and not _stopped(codes[rank], signals)]
    first = first_failure(folder)
    culprit = [*killed, *(rank for rank in failed if rank == first), *failed][0]
    code, name = codes[culprit], f"rank {culprit} of {len(codes)}"
    report = failure_report(folder, culprit)
    if _stopped(code, signals):
        return LaunchResult(INTERRUPTED, *(report or ("interrupted",)))
    if report:
        message, trace = report
        return LaunchResult(code, message if code == MISTAKE else f"{name}: {message}", trace)
    if tail := (folder / f"{culprit}.err").read_text(errors="replace").splitlines()[-TAIL:]:
        say("\n".join(tail))
    if code > 0:
        return LaunchResult(FAILED, f"{name} ended with exit code {code}")
    cause = " (often for want of memory)" if -code == signal.SIGKILL else ""
    return LaunchResult(FAILED, f"{name} died of {signal.Signals(-code).name}{cause}; the same command goes on")
