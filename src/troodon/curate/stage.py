"""Stages: pure functions of immutable partitions, whose results lie in files.

A stage is work to be done on units. Each unit's result is a folder, made under another name, flushed and renamed; the
folder of all of them is named by the fingerprint of what went in. So a unit is done or not, may be done twice, by
anyone and anywhere, and gives the same bytes; whoever comes again does what is missing. An engine decides who does it:

    <home>/<stage>-<fingerprint>/00000/     whatever the stage writes, and
        counts.json     "in", "out", and "left out" by reason: they balance, or the unit fails
        timings.json    seconds; the only file that two runs do not share
"""

import functools
import hashlib
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from troodon import run

Counts = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """`work(unit, folder)` fills a folder and returns its counts; it reads files and what it was made with, only."""

    name: str
    work: Callable[[Any, Path], Counts]
    units: Sequence[Any]
    fingerprint: str

    def folder(self, home: Path, at: int) -> Path:
        return home / f"{self.name}-{self.fingerprint}" / f"{at:05d}"


class Engine(Protocol):
    """Who does the units: `run` does those that wait, and tells each as it is done. `close` ends what it started."""

    def run(self, stage: Stage, home: Path, waiting: Sequence[int]) -> Iterator[int]: ...
    def close(self) -> None: ...


@functools.cache
def code() -> str:
    """A fingerprint of the code that stages run: what other code has left half done is not gone on with."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(package.glob("curate/*.py")) + sorted(package.glob("search/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def counted(before: int, after: int | None = None, **left_out: int) -> Counts:
    """Counts of a unit: what came in, what goes on (all of it if not told), and what does not, by reason."""
    return {"in": before, "out": before if after is None else after, "left out": left_out}


def do(stage: Stage, home: Path, engine: Engine) -> list[Path]:
    """Do what is missing of a stage; the folders of all units, in order. Raises what a unit raised."""
    parts = [stage.folder(home, at) for at in range(len(stage.units))]
    waiting = [at for at, part in enumerate(parts) if not part.is_dir()]
    if waiting:
        _sweep(parts[0].parent)
        progress = Progress(stage.name, "parts", len(waiting))
        for _ in engine.run(stage, home, waiting):
            progress.add(1)
        _sweep(parts[0].parent)
    return parts


def _sweep(folder: Path) -> None:
    """Remove what killed processes have left; all units are done, or nobody works yet."""
    for left in folder.glob("*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def perform(stage: Stage, home: Path, at: int) -> None:
    """Do one unit, unless somebody has; whoever is second throws his own away."""
    folder, began = stage.folder(home, at), time.monotonic()
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        counts = stage.work(stage.units[at], partial)
        lost = counts["in"] - counts["out"] - sum(counts["left out"].values())
        assert not lost, f"{stage.name}, part {at}: {lost} of {counts['in']} are unaccounted for"
        run.write_json(partial / "counts.json", counts)
        run.write_json(partial / "timings.json", {stage.name: round(time.monotonic() - began, 3)})
        _flush(partial)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def totals(parts: Sequence[Path]) -> Counts:
    """The counts of all units together."""
    every = [run.read_json(part / "counts.json") for part in parts]
    left_out = sum((Counter(counts["left out"]) for counts in every), Counter())
    return counted(sum(c["in"] for c in every), sum(c["out"] for c in every), **left_out)


def seconds(folders: Sequence[Path]) -> dict[str, float]:
    """Seconds by stage, of all units."""
    spent: Counter[str] = Counter()
    for folder in folders:
        spent.update(run.read_json(folder / "timings.json"))
    return {name: round(value, 3) for name, value in spent.items()}


def joined(parts: Sequence[Path], path: Path) -> None:
    """One matrix of those of this name that the parts hold, one after another; rows without columns become zeros."""
    matrices = [np.load(part / path.name, mmap_mode="r") for part in parts]
    rows, channels = sum(map(len, matrices)), max((m.shape[1] for m in matrices), default=0)
    kind = matrices[0].dtype if matrices else np.dtype(np.float16)
    with open(path, "wb") as file:
        header = {"descr": kind.str, "fortran_order": False, "shape": (rows, channels)}
        np.lib.format.write_array_header_1_0(file, header)
        for matrix in matrices:
            file.write((matrix if matrix.shape[1] else np.zeros((len(matrix), channels), kind)).tobytes())


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


class Progress:
    """A line of progress every few seconds: how many, how fast, how long still."""

    def __init__(self, what: str, unit: str, total: int, seconds: float = 5.0):
        self.what, self.unit, self.total, self.seconds = what, unit, total, seconds
        self.began = self.said = time.monotonic()
        self.done = 0

    def add(self, count: int) -> None:
        self.done, now = self.done + count, time.monotonic()
        if now - self.said >= self.seconds:
            self.said, rate = now, max(self.done, 1) / (now - self.began)
            left, speed = _duration((self.total - self.done) / rate), f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
            run.say(f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {speed} a second, {left} left")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
