"""Starting the ranks of this machine, as processes that do the same command; torchrun and Slurm may do so instead.

They meet in a folder of their own, where each also leaves what ended it: whoever started them says it, once.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from troodon.run import DOING, RENDEZVOUS, doing, read_json, say, write_json

GRACE_S = 5.0  # for the others to end by themselves when a rank is lost; one that waits for it never would
SAVING_S = 600.0  # for ranks that were asked to stop: a step and a checkpoint of the largest network fit in
TAIL = 100  # lines of a rank that could not say what ended it: where each of its threads was, when it crashed
MISTAKE, STOPPED = 2, 130  # exit codes: the user's mistake; asked to stop, and has saved


class RankLost(RuntimeError):
    """A rank that was started here has failed; the message says which, and of what."""


@dataclass(frozen=True)
class Ended:
    """How a launched job ended: its exit code, and what the rank said that ended it."""

    code: int = 0
    said: str = ""
    trace: str = ""


def launch(words: list[str], ranks: int) -> Ended:
    """Do the command `troodon WORDS` on `ranks` processes of this machine, and wait for them.

    SIGINT and SIGTERM go on to them, once each. When one fails, the others end as well; when this process ends, by
    whatever, so do they. Only rank zero is heard, and of what ended them, only that of the one that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="troodon-") as name, _heard() as asked:
        folder, children = Path(name), []
        theirs, ours = os.pipe()  # what they read ends when we do
        env = os.environ | {RENDEZVOUS: name, DOING: json.dumps(doing), "WORLD_SIZE": str(ranks)}
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        try:
            for number in range(ranks):
                with open(folder / f"{number}.err", "wb") as unheard:
                    children.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "troodon.cli", *words],
                            env=env | {"RANK": str(number), "LOCAL_RANK": str(number)},
                            stdin=theirs,
                            stdout=subprocess.DEVNULL,
                            stderr=unheard if number else None,
                            start_new_session=True,  # else Ctrl-C in a terminal would reach them twice
                        )
                    )
            fallen = _wait(children, asked)
        finally:
            for child in children:
                child.kill()
                child.wait()
            os.close(theirs)
            os.close(ours)
        return _how_it_ended(folder, [child.returncode for child in children], fallen, asked)


def last_words(said: str, trace: str) -> None:
    """Leave what ended this rank to the one who launched it."""
    first_to_fail()
    write_json(Path(os.environ[RENDEZVOUS], f"{os.environ['RANK']}.json"), {"said": said, "trace": trace})


@contextlib.contextmanager
def _heard() -> Iterator[list[int]]:
    """The signals that ask to stop, in a list that grows, in place of what they did before."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda heard, _: asked.append(heard)) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen], asked: list[int]) -> list[int]:
    """Wait until all have ended, passing on what was `asked`; the ranks that ended badly by themselves, in order."""
    fallen: list[int] = []
    passed_on, deadline = 0, math.inf
    while any([child.poll() is None for child in children]):  # a list: each is to be polled
        now = time.monotonic()
        for number in asked[passed_on:]:
            if passed_on and number == signal.SIGINT:  # once more: they stop without saving
                deadline = min(deadline, now + GRACE_S)
            for child in children:
                child.send_signal(number)
            passed_on += 1
        for code in _newly_fallen(children, fallen):
            deadline = min(deadline, now + (SAVING_S if _stopped(code, asked) else GRACE_S))
        if now > deadline:
            for child in children:
                child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                for child in children:
                    child.wait(max(0, deadline + GRACE_S - time.monotonic()))
            return fallen
        time.sleep(0.05)
    _newly_fallen(children, fallen)
    return fallen


def _newly_fallen(children: list[subprocess.Popen], fallen: list[int]) -> list[int]:
    """Exit codes of the ranks that have ended badly and are not yet among the `fallen`, which they then join."""
    new = [n for n, child in enumerate(children) if child.returncode and n not in fallen]
    fallen += new
    return [children[n].returncode for n in new]


def _stopped(code: int, asked: list[int]) -> bool:
    """Whether a rank that ended with `code` did what it was asked to."""
    return code == STOPPED or -code in asked


def _how_it_ended(folder: Path, codes: list[int], fallen: list[int], asked: list[int]) -> Ended:
    if not fallen:  # all is done, or they did not heed being asked twice
        return Ended(STOPPED, "interrupted") if any(codes) else Ended()
    # A rank that a signal killed could not say that it was the first; others may have, for want of it.
    killed = [n for n in fallen if codes[n] < 0 and not _stopped(codes[n], asked)]
    said_first = [int(os.readlink(folder / "first"))] if (folder / "first").is_symlink() else []
    culprit = [*killed, *(n for n in said_first if n in fallen), *fallen][0]
    code, who = codes[culprit], f"rank {culprit} of {len(codes)}"
    words = folder / f"{culprit}.json"
    left = read_json(words) if words.exists() else {}
    if _stopped(code, asked):
        return Ended(STOPPED, **(left or {"said": "interrupted"}))
    if left:
        return Ended(code, left["said"] if code == MISTAKE else f"{who}: {left['said']}", left["trace"])
    if tail := (folder / f"{culprit}.err").read_text(errors="replace").splitlines()[-TAIL:]:
        say("\n".join(tail))
    if code > 0:
        return Ended(1, f"{who} ended with exit code {code}")
    cause = " (often for want of memory)" if -code == signal.SIGKILL else ""
    return Ended(1, f"{who} died of {signal.Signals(-code).name}{cause}; the same command goes on")


def first_to_fail() -> None:
    """Claim to be the first rank that failed, unless another has."""
    if folder := os.environ.get(RENDEZVOUS):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.symlink(os.environ["RANK"], f"{folder}/first")  # made whole or not at all


def end_with_parent() -> None:
    """Stop as if asked to when whoever launched this rank is gone, even by kill -9: standard input ends then."""

    def watch() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SAVING_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
