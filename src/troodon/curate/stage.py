"""Stages: pure functions of immutable partitions, whose results are files.

A stage is work on a list of units. The result of a unit is a folder, which is written under a temporary name, flushed
and renamed; the folder of the stage is named by the fingerprint of its inputs. So a unit is complete or absent. Any
worker may compute it, anywhere and more than once, and gets the same bytes; a repeated run computes what is missing. A
backend decides where units are computed:

    <root>/<stage>-<fingerprint>/00000/     the files that the stage writes, and
        counts.json     "in", "out", and "left out" by reason: they balance, or the unit fails
        timings.json    seconds; the only file that differs between two runs
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
from troodon.progress import Progress

Counts = dict[str, Any]
MAX_DEATHS = 3  # of processes by one unit


@dataclass(frozen=True)
class Stage:
    """`work(unit, folder)` fills a folder and returns its counts. It depends only on files and on its own fields.

    Work that holds networks has a method `placed(processors)`: the same work, its networks where they compute in this
    process, which has so many processors. Processes that compute several units call it first.
    """

    name: str
    work: Callable[[Any, Path], Counts]
    units: Sequence[Any]
    fingerprint: str

    def folder(self, root: Path, number: int) -> Path:
        return root / f"{self.name}-{self.fingerprint}" / f"{number:05d}"


class Backend(Protocol):
    """Where units are computed. `run` computes the pending units and yields the number of each when it is complete;
    `close` ends the workers that it started."""

    def run(self, stage: Stage, root: Path, pending: Sequence[int]) -> Iterator[int]: ...
    def close(self) -> None: ...


@functools.cache
def code_fingerprint() -> str:
    """Return a fingerprint of the code of curation, so that no run continues the unfinished stages of other code."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(path for name in ("copies", "curate", "search") for path in package.glob(f"{name}/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def unit_counts(before: int, after: int | None = None, **dropped: int) -> Counts:
    """Return the counts of a unit: items in, items out (by default all of them), and dropped items by reason."""
    return {"in": before, "out": before if after is None else after, "left out": dropped}


def run_stage(stage: Stage, root: Path, backend: Backend) -> list[Path]:
    """Compute the missing units of a stage and return the folders of all units, in order. Raises what a unit raised."""
    parts = [stage.folder(root, number) for number in range(len(stage.units))]
    pending = [number for number, part in enumerate(parts) if not part.is_dir()]
    if pending:
        _remove_partial(parts[0].parent)
        with Progress(stage.name, "units", len(pending)) as progress:
            for _ in backend.run(stage, root, pending):
                progress.add(1)
        _remove_partial(parts[0].parent)
    return parts


def _remove_partial(folder: Path) -> None:
    """Remove the folders that killed processes have left. Called before any worker starts or after all have ended."""
    for partial in folder.glob("*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def run_unit(stage: Stage, root: Path, number: int) -> None:
    """Compute and publish one unit. If another worker has already published the unit, the copy is deleted."""
    folder, start = stage.folder(root, number), time.monotonic()
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        counts = stage.work(stage.units[number], partial)
        lost = counts["in"] - counts["out"] - sum(counts["left out"].values())
        assert not lost, f"{stage.name}, unit {number}: {lost} of {counts['in']} are unaccounted for"
        run.write_json(partial / "counts.json", counts)
        run.write_json(partial / "timings.json", {stage.name: round(time.monotonic() - start, 3)})
        _fsync(partial)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def total_counts(parts: Sequence[Path]) -> Counts:
    """Add up the counts of all units."""
    counts = [run.read_json(part / "counts.json") for part in parts]
    dropped = sum((Counter(c["left out"]) for c in counts), Counter())
    return unit_counts(sum(c["in"] for c in counts), sum(c["out"] for c in counts), **dropped)


def stage_seconds(folders: Sequence[Path]) -> dict[str, float]:
    """Add up the seconds of all units by stage."""
    seconds: Counter[str] = Counter()
    for folder in folders:
        seconds.update(run.read_json(folder / "timings.json"))
    return {name: round(value, 3) for name, value in seconds.items()}


def concatenate_matrices(parts: Sequence[Path], path: Path) -> None:
    """Concatenate the arrays of this file name in all parts into one file. Rows without columns become zeros."""
    matrices = [np.load(part / path.name, mmap_mode="r") for part in parts]
    rows, shape = sum(map(len, matrices)), max((m.shape[1:] for m in matrices), default=(0,))
    dtype = matrices[0].dtype if matrices else np.dtype(np.float16)
    with open(path, "wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (rows, *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for matrix in matrices:
            file.write((matrix if matrix.shape[1] else np.zeros((len(matrix), *shape), dtype)).tobytes())


def _fsync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
