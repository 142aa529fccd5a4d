"""What a person decided about images: decisions.jsonl, which `troodon explore` writes, a line for each decision.

    {"path": ..., "sha256": ..., "keep": true, "instead_of": ..., "tags": [...], "time": ...}

Of several lines about one image, the last holds. `keep` is true, false or null, for no decision. `instead_of` is the
path of the image in whose place this one is kept; that one is left out. An image is known by its path, and by its bytes
where their sha256 is known: a file that was moved is found, and one that was changed is another image.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from troodon.config import UsageError
from troodon.run import say
from troodon.text import plural

FILE = "decisions.jsonl"
STAGE = "decided"  # in a ledger, of what a person decided
KEPT, LEFT_OUT, REPLACED = "a person keeps it", "a person leaves it out", "a person keeps another one in its place"


@dataclass(frozen=True)
class Decision:
    """What a person decided about one image."""

    path: str
    sha256: str = ""  # "" where it is not known
    keep: bool | None = None
    instead_of: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decided:
    """Decisions to keep or leave out, for M rows of a table of images."""

    row_M: ndarray  # int64
    keep_M: ndarray  # bool
    cause_M: ndarray  # int64, the row that is kept in place of this one; -1 for none
    reason_M: ndarray  # object

    def words(self) -> str:
        kept = int(self.keep_M.sum())
        return f"{plural(kept, 'image')} kept and {len(self.row_M) - kept:,} left out by a person"


def read_decisions(file: Path) -> dict[str, Decision]:
    """The decision about each image, by path. UsageError for a line that is none; one that a kill cut short is no line.
    No decisions where there is no file."""
    try:
        text = file.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from None
    found, lines = dict[str, Decision](), text.split("\n")
    for number, line in enumerate(lines[:-1], 1):
        if line.strip():
            decision = _decision(line, f"{file}, line {number}")
            found[decision.path] = decision
    return found


def _decision(line: str, place: str) -> Decision:
    try:
        value = json.loads(line)
        decision = Decision(
            value["path"], value.get("sha256") or "", value.get("keep"), value.get("instead_of") or "",
            tuple(value.get("tags") or ()),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f'{place}: {line[:80]!r} is no decision, such as {{"path": "a.jpg", "keep": false}}') from None
    texts = (decision.path, decision.sha256, decision.instead_of, *decision.tags)
    if not all(isinstance(text, str) for text in texts) or decision.keep not in (True, False, None):
        raise UsageError(f"{place}: path, sha256, instead_of and tags are text, and keep is true, false or null")
    return decision


def append_decisions(file: Path, decisions: Iterable[Decision]) -> None:
    """Add decisions to a file, and flush it to the disk. What a kill cut short before is ended first."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    lines = []
    for made in decisions:
        fields: dict[str, Any] = {"path": made.path, "keep": made.keep, "tags": list(made.tags), "time": time}
        fields |= {name: value for name in ("sha256", "instead_of") if (value := getattr(made, name))}
        lines.append(json.dumps(fields))
    data = "".join(f"{line}\n" for line in lines).encode()
    with open(file, "ab+", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":  # cut short by a kill: that line is none
                start = _last_line(stream, size)
                stream.truncate(start)
                size = start
        try:
            if stream.write(data) < len(data):
                raise OSError(28, os.strerror(28), str(file))
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(size)
            raise


def _last_line(stream: Any, size: int) -> int:
    """Where the last line of a file starts."""
    stream.seek(max(0, size - 2**20))
    tail = stream.read()
    return size - len(tail) + tail.rfind(b"\n") + 1


def decided_rows(decisions: Mapping[str, Decision], images: pa.Table) -> dict[int, Decision]:
    """The decisions by row of a table of images: by path, unless the bytes are others; else by the bytes."""
    if not decisions:
        return {}
    paths = pa.array([*decisions], pa.string())
    sha256 = images["sha256"] if "sha256" in images.column_names else pa.nulls(len(images), pa.string())
    found: dict[int, Decision] = {}
    row_of = _first_rows(images["path"], paths)
    rows = {path: row for path, row in zip(decisions, row_of) if row is not None}
    digests = sha256.take(pa.array(list(rows.values()), pa.int64())).to_pylist() if rows else []
    for (path, row), digest in zip(rows.items(), digests):
        if not digest or not decisions[path].sha256 or digest == decisions[path].sha256:
            found[row] = decisions[path]
    placed = {decision.path for decision in found.values()}
    others = [made for path, made in decisions.items() if path not in placed and made.sha256]
    for made, row in zip(others, _first_rows(sha256, pa.array([made.sha256 for made in others], pa.string()))):
        if row is not None:
            found.setdefault(row, made)
    return found


def _first_rows(column: Any, values: pa.Array) -> list[int | None]:
    """The first row of each value in a column; None for one that is not there."""
    hits = np.flatnonzero(pc.is_in(column, values).to_numpy(zero_copy_only=False)) if len(values) else []
    first: dict[str, int] = {}
    for row, value in zip(list(hits), column.take(pa.array(hits, pa.int64())).to_pylist() if len(hits) else []):
        first.setdefault(value, int(row))
    return [first.get(value) for value in values.to_pylist()]


def resolve(decisions: Mapping[str, Decision], images: pa.Table, barred_N: ndarray, what: str) -> Decided:
    """Which rows are kept or left out. Images that are `barred_N` (benchmarks, unreadable ones) cannot be kept.

    Says what is not followed: decisions about images that are not here, or not to be kept.
    """
    found = decided_rows(decisions, images)
    if len(found) < len(decisions):
        say(f"{what}: {len(decisions) - len(found):,} of {len(decisions):,} decisions are about images not here")
    others = sorted({made.instead_of for made in found.values() if made.keep and made.instead_of})
    place_of = dict(zip(others, _first_rows(images["path"], pa.array(others, pa.string()))))
    kept = {row for row, made in found.items() if made.keep}
    outcome: dict[int, tuple[bool, int, str]] = {}
    barred = 0
    for row, made in sorted(found.items()):
        if made.keep is None or barred_N[row]:
            barred += bool(made.keep)
            continue
        outcome.setdefault(row, (made.keep, -1, KEPT if made.keep else LEFT_OUT))
        replaced = place_of.get(made.instead_of) if made.keep else None
        if replaced is not None and not barred_N[replaced] and replaced not in kept:
            outcome[replaced] = (False, row, REPLACED)
    if barred:
        say(f"{what}: {plural(barred, 'decision')} to keep cannot be followed: unreadable, or of a benchmark")
    rows = sorted(outcome)
    keep, cause, reason = ([outcome[row][part] for row in rows] for part in range(3))
    return Decided(
        np.array(rows, np.int64), np.array(keep, bool), np.array(cause, np.int64), np.array([*reason, ""], object)[:-1]
    )


def followed(images: pa.Table, folder: Path) -> pa.Table:
    """The table of an artifact, as the decisions in its folder say: a ledger with other rows kept, others without the
    rows that are left out."""
    if not (decisions := read_decisions(folder / FILE)):
        return images
    is_ledger = "kept" in images.column_names
    barred_N = np.zeros(len(images), bool)
    if is_ledger:
        unreadable, benchmark = pc.equal(images["stage"], "decode"), pc.equal(images["pool"], "benchmark")
        barred_N = pc.or_(unreadable, benchmark).to_numpy()
    decided = resolve(decisions, images, barred_N, str(folder))
    if not len(decided.row_M):
        return images
    say(f"{folder}: {decided.words()} ({FILE})")
    if not is_ledger:
        left_out = decided.row_M[~decided.keep_M]
        return images.take(pa.array(np.setdiff1d(np.arange(len(images)), left_out)))
    values = {
        "kept": decided.keep_M, "weight": decided.keep_M, "stage": np.full(len(decided.row_M), STAGE, object),
        "reason": decided.reason_M, "cause": decided.cause_M, "score": np.full(len(decided.row_M), np.nan),
    }  # fmt: skip
    for name, value_M in values.items():
        place = images.schema.get_field_index(name)
        column = images[name].to_numpy().copy()
        column[decided.row_M] = value_M
        images = images.set_column(place, images.schema.field(place), pa.array(column, images.schema.field(place).type))
    return images
