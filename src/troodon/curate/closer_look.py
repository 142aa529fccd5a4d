"""The closer look at images that may be copies (copies/verify.py), as stages.

local     local features of images
votes     images that share some, by hash table
looks     the pairs that are copies, or perhaps, and how one lies in the other
traits    what tells which of some copies is kept (copies/keeper.py)
"""

import functools
import hashlib
import heapq
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray
from PIL import Image

from troodon import run
from troodon.copies import keeper
from troodon.copies.local_features import FeatureReader, SavedFeatures, grey, local_features, save_features, thumbnail
from troodon.copies.verify import Match, look, verify
from troodon.copies.votes import (
    IMAGES_PER_BLOCK,
    IMAGES_PER_PART,
    MIRRORED,
    TABLES,
    Pairs,
    add_votes,
    alike_hashes,
    most_voted,
    vote,
)
from troodon.curate.context import CurationContext, row_ranges
from troodon.curate.dedup import Verdict
from troodon.curate.groups import Matches, resolve, reversed_match
from troodon.curate.scores import Score, load_score
from troodon.curate.stage import Counts, unit_counts
from troodon.images.decode import BadImage
from troodon.images.index import Index
from troodon.images.reading import map_ordered
from troodon.progress import Progress

T = TypeVar("T")

# Shape suffixes: N images, those of benchmarks last; P pairs.

MIN_VOTES = 3  # fewer are accidents: three of four such pairs are of other pictures
PAIRS_PER_UNIT, PAIRS_PER_TASK = 20_000, 100
PICTURES_PER_UNIT = 2_000  # 100 MB
DETAIL_SHARES = (0.71, 0.6, 0.5, 0.42, 0.34, 0.25)  # of width and height, at which loss is measured
MAX_DOUBTFUL = 1_000  # pairs that are remembered
MAX_LOSS = 1.0  # root mean square, in levels of 255
EXIF, CAPTURE_DATE = 0x8769, 0x9003  # tags
LOOK_SCHEMA = pa.schema(
    [("i", pa.int64()), ("j", pa.int64()), ("points", pa.int32()), ("agreement", pa.float32())]
    + [(name, pa.float64()) for name in ("overlap_i", "overlap_j", *(f"m{k}" for k in range(6)))]
    + [("doubt", pa.string())]
)


@dataclass(frozen=True)
class CloserLook:
    """Looks at pairs among N images: `rows` of the index, the `benchmark_rows` after them."""

    context: CurationContext
    rows: ndarray
    benchmark_rows: ndarray
    features: SavedFeatures
    name: str  # fingerprint of the features
    copies: Matches  # among the rows
    leaks: Matches  # between rows and benchmark rows, doubtful ones too
    checked: set[tuple[int, int]]  # pairs that were looked at
    doubtful: list[tuple[float, int, int, str]]  # pairs of rows that are perhaps copies: agreement, i, j, doubt

    @staticmethod
    def extract(context: CurationContext, rows: ndarray, benchmark_rows: ndarray) -> "CloserLook":
        """Compute the local features of these images, unless they are there."""
        config, size = context.config, context.config.partition_size
        both = np.r_[rows, benchmark_rows]
        digest = hashlib.sha256(both.tobytes()).hexdigest()
        work = _Extract(context.index.take(both), config.threads)
        folders = context.run_units("local", work, row_ranges(len(both), size), digest, size)
        name = folders[0].parent.name if folders else "none"
        features, count = SavedFeatures(tuple(folders), size), len(both)
        return CloserLook(context, rows, benchmark_rows, features, name, Matches(count), Matches(count), set(), [])

    def candidates(self, active_N: ndarray) -> Pairs:
        """Pairs of active images that share local features or have nearly the same perceptual hash, at most
        `candidates` of each image."""
        first, limit = len(self.rows), self.context.config.candidates
        count, parts = len(active_N), -(-int(active_N.sum()) // IMAGES_PER_PART)
        inputs = (self.name, hashlib.sha256(active_N.tobytes()).hexdigest(), limit, parts)
        units = [(table, part) for table in range(TABLES) for part in range(parts)]
        voted = self.context.run_units("votes", _Vote(self.features, active_N, first, parts), units, *inputs)
        pairs = Pairs.concatenate(
            add_votes((self._wanted(_read_pairs(folder, *block)) for folder in voted), MIN_VOTES)
            for block in row_ranges(count, IMAGES_PER_BLOCK)
        )
        pairs, left_out = most_voted(pairs, limit, first)
        if left_out:
            run.say(f"candidates: {left_out:,} pairs with fewer votes than {limit} others of their images are left out")
        alike = add_votes([self._wanted(alike_hashes(self.features, active_N, first))], 1)
        return Pairs.concatenate([pairs, most_voted(alike, limit, first)[0]])

    def _wanted(self, pairs: Pairs) -> Pairs:
        """The pairs that a step asks for: those with a benchmark, or all."""
        return pairs if "duplicate" in self.context.config.steps else pairs.take(pairs.j_P >= len(self.rows))

    def without_groups(self, pairs: Pairs) -> Pairs:
        """The pairs that are not in one group already; `decide` looks at those that matter."""
        group_N = np.arange(self.copies.count)
        for group in self.copies.groups():
            group_N[group] = group[0]
        return pairs.take(group_N[pairs.i_P] != group_N[pairs.j_P])

    def look(self, pairs: Pairs) -> int:
        """Look at those pairs that were not looked at before. Returns how many are copies."""
        known_P = np.fromiter((pair in self.checked for pair in zip(pairs.i_P.tolist(), pairs.j_P.tolist())), bool)
        table = np.unique(np.stack([pairs.i_P, pairs.j_P, pairs.orientation_P])[:, ~known_P], axis=1)
        self.checked.update(zip(table[0].tolist(), table[1].tolist()))
        units = _without_splitting_pairs(table, PAIRS_PER_UNIT)
        digest = hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest()
        parts = self.context.run_units(
            "looks", _Look(self.features, table, self.context.config.threads), units, self.name, digest
        )
        found = [row for part in parts for row in pq.read_table(part / "looks.parquet").to_pylist()]
        for row in found:
            map_33 = np.array([*(row[f"m{k}"] for k in range(6)), 0, 0, 1.0]).reshape(3, 3)
            match = Match(map_33, row["points"], row["agreement"], (row["overlap_i"], row["overlap_j"]), row["doubt"])
            if row["j"] >= len(self.rows):
                self.leaks.add(row["i"], row["j"], match)
            elif not match.doubt:
                self.copies.add(row["i"], row["j"], match)
        doubtful = ((row["agreement"], row["i"], row["j"], row["doubt"]) for row in found
                    if row["doubt"] and row["j"] < len(self.rows))  # fmt: skip
        self.doubtful[:] = heapq.nlargest(MAX_DOUBTFUL, [*self.doubtful, *doubtful])
        return sum(not row["doubt"] for row in found)

    def _verify(self, reader: FeatureReader, i: int, j: int, map_33: ndarray) -> Match | None:
        """Look at one pair, given where one lies in the other, from a chain of copies between them."""
        mirrored = np.linalg.det(map_33[:2, :2]) < 0
        if i < j:
            return verify(reader[i], reader[j], MIRRORED * int(mirrored), map_33)
        match = verify(reader[j], reader[i], MIRRORED * int(mirrored), np.linalg.inv(map_33))
        return None if match is None else reversed_match(match)

    def is_limited(self) -> bool:
        """Whether an image may have more copies than it was compared with."""
        return any(len(others) >= self.context.config.candidates for others in self.copies.of.values())

    def distinct(self) -> ndarray:
        """The rows without those that are copies of an earlier one, as far as known: positions (R,)."""
        copies = {row for group in self.copies.groups() for row in group[1:]}
        return np.array([row for row in range(len(self.rows)) if row not in copies], np.int64)

    def decide(self, protected_M: ndarray) -> Verdict:
        """Which of the rows are kept."""
        context, config = self.context, self.context.config
        members = sorted(row for group in self.copies.groups() for row in group)
        rows = self.rows[np.asarray(members, np.int64)]
        digest = hashlib.sha256(rows.tobytes()).hexdigest()
        work = _Inspect(context.index.take(rows), config.threads, config.keep_by)
        parts = context.run_units("traits", work, row_ranges(len(rows), PICTURES_PER_UNIT), self.name, digest)
        preferred = dict(zip(members, context.preferences(rows)))
        traits = TraitsReader(parts, {member: position for position, member in enumerate(members)}, preferred)
        verify_pair = functools.partial(self._verify, self.features.reader())
        verdict = resolve(self.copies, traits, verify_pair, np.r_[protected_M, self.benchmark_rows >= 0])
        count = len(self.rows)
        columns = (verdict.cause_N, verdict.score_N, verdict.group_N, verdict.reason_N)
        return Verdict(*(column[:count] for column in columns if column is not None))


def look_first(context: CurationContext, identical: Path) -> CloserLook:
    """Look at the images that share local features or hashes, before any vectors are compared."""
    rows, steps = np.load(identical / "rows.npy"), context.config.steps
    benchmark_rows = np.load(identical / "shown.npy") if "benchmark" in steps else rows[:0]
    compared = rows if "duplicate" in steps or len(benchmark_rows) else rows[:0]
    look = CloserLook.extract(context, compared, benchmark_rows)
    look.look(look.candidates(np.ones(len(compared) + len(benchmark_rows), bool)))
    return look


def _map_rows(index: Index, threads: int, function: Callable[[int], T]) -> list[T | None]:
    """`function` of each row, by threads; None for an image that cannot be read again."""

    def task(row: int) -> T | None:
        try:
            return function(row)
        except (BadImage, OSError):
            return None

    count = index.thread_count(threads)
    with ThreadPoolExecutor(count, "look") as pool:
        return list(map_ordered(pool, task, range(len(index)), 2 * count))


@dataclass(frozen=True)
class _Extract:
    """Local features of rows (first, last) of an index. An image that cannot be read again has none."""

    index: Index
    threads: int

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        index = self.index.take(range(*unit))
        found = _map_rows(index, self.threads, lambda row: local_features(index.decode(row, None)))
        save_features(found, folder)
        missing = sum(one is None for one in found)
        return unit_counts(len(index), len(index) - missing, unreadable=missing)


@dataclass(frozen=True)
class _Inspect:
    """The traits of rows (first, last) of an index."""

    index: Index
    threads: int
    score: str  # of the user's own, which decides; "" for none

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        index = self.index.take(range(*unit))
        score = load_score(self.score) if self.score else None
        found = _map_rows(index, self.threads, lambda row: inspect(index, row, score))
        none = keeper.Traits(np.zeros((keeper.PICTURE, keeper.PICTURE, 3), np.uint8), 1, 1)
        some = [none if one is None else one for one in found]
        np.save(folder / "pictures.npy", np.stack([one.picture for one in some]))
        columns = [field.name for field in fields(keeper.Traits) if field.name != "picture"]
        pq.write_table(
            pa.table({name: [getattr(one, name) for one in some] for name in columns}), folder / "traits.parquet"
        )
        missing = sum(one is None for one in found)
        return unit_counts(len(index), len(index) - missing, unreadable=missing)


class TraitsReader:
    """Traits of images by row, read where they are wanted."""

    def __init__(self, parts: Sequence[Path], position_of: dict[int, int], preferred: dict[int, int]):
        self.pictures = [np.load(part / "pictures.npy", mmap_mode="r") for part in parts]
        self.tables = [pq.read_table(part / "traits.parquet").to_pylist() for part in parts]
        self.position_of, self.preferred = position_of, preferred

    def __call__(self, rows: Sequence[int]) -> list[keeper.Traits]:
        found = []
        for row in rows:
            part, at = divmod(self.position_of[row], PICTURES_PER_UNIT)
            values = self.tables[part][at] | {"preferred": self.preferred[row]}
            found.append(keeper.Traits(np.array(self.pictures[part][at]), **values))
        return found


def inspect(index: Index, row: int, score: Score | None) -> keeper.Traits:
    """What tells how near an image is to an original: its picture, sizes, and how it was saved."""
    image_HWC, data = index.decode(row, None), index.read(row)
    grey_HW = grey(image_HWC)
    channels = image_HWC[..., :3] if image_HWC.shape[2] >= 3 else np.repeat(grey_HW[..., None], 3, 2)
    fineness, dated = saved_how(data)
    return keeper.Traits(
        picture=thumbnail(np.ascontiguousarray(channels), keeper.PICTURE),
        width=image_HWC.shape[1],
        height=image_HWC.shape[0],
        detail=detail(grey_HW),
        sharpness=float(np.abs(cv2.Laplacian(grey_HW.astype(np.float32), cv2.CV_32F)).mean()),
        fineness=fineness,
        dated=dated,
        name=index.path(row),
        length=len(data),
        score=float(score(image_HWC)) if score else 0.0,
    )


def saved_how(data: bytes) -> tuple[float, bool]:
    """How fine the JPEG tables of a file are (minus their sum; 0 without any), and whether it has a capture date."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            tables = getattr(picture, "quantization", None) or {}
            return -float(sum(sum(table) for table in tables.values())), CAPTURE_DATE in picture.getexif().get_ifd(EXIF)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # other readers may open it
        return 0.0, False


def detail(grey_HW: ndarray) -> float:
    """The share of width and height at which a picture loses nothing: less than 1 if it was enlarged."""
    picture, least = Image.fromarray(grey_HW), 1.0
    for share in DETAIL_SHARES:
        size = max(2, round(picture.width * share)), max(2, round(picture.height * share))
        back = picture.resize(size, Image.Resampling.LANCZOS).resize(picture.size, Image.Resampling.BICUBIC)
        if np.sqrt(np.mean((np.asarray(back, np.float32) - grey_HW) ** 2)) > MAX_LOSS:
            break
        least = share
    return least


@dataclass(frozen=True)
class _Vote:
    """The votes of one of some parts of a hash table."""

    features: SavedFeatures
    active_N: ndarray
    first_benchmark: int
    parts: int

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        pairs = vote(self.features, self.active_N, self.first_benchmark, *unit, self.parts)
        pq.write_table(pa.table(dict(zip("ijov", pairs))), folder / "votes.parquet", compression="zstd")
        return unit_counts(len(pairs.i_P))


def _read_pairs(folder: Path, first: int, last: int) -> Pairs:
    """The pairs of images from first to last; groups of others in the file are not read."""
    table = pq.read_table(folder / "votes.parquet", filters=[("i", ">=", first), ("i", "<", last)])
    return Pairs(*(table[name].to_numpy() for name in "ijov"))


def _without_splitting_pairs(table: ndarray, size: int) -> list[tuple[int, int]]:
    """Ranges of columns of about `size` pairs each; candidates of one pair, in several orientations, stay together."""
    edges = np.flatnonzero(np.r_[True, (np.diff(table[:2], axis=1) != 0).any(0)][: table.shape[1]])
    starts = edges[::size].tolist()
    return list(zip(starts, [*starts[1:], table.shape[1]]))


def _look_row(i: int, j: int, match: Match) -> dict:
    values = (match.points, match.agreement, *match.overlap, *match.map_33[:2].ravel().tolist(), match.doubt)
    return dict(zip(LOOK_SCHEMA.names, (i, j, *values), strict=True))


@dataclass(frozen=True)
class _Look:
    """Looks at candidates (first, last) of a table (3, P) of i, j and orientation, in order of i and j."""

    features: SavedFeatures
    table: ndarray
    threads: int

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        reader, table, found = self.features.reader(), self.table[:, slice(*unit)], []

        def look_at(some: tuple[int, int]) -> list[dict]:
            matches: dict[tuple[int, int], Match] = {}
            for i, j, orientation in table[:, slice(*some)].T.tolist():
                known = matches.get((i, j))
                if known is not None and not known.doubt:  # is a copy in another orientation
                    continue
                match = look(reader[i], reader[j], orientation)
                if match is not None and (known is None or not match.doubt):
                    matches[i, j] = match
            return [_look_row(i, j, match) for (i, j), match in matches.items()]

        count = self.threads or min(16, os.cpu_count() or 1)
        with Progress("looks", "pairs", table.shape[1]) as progress, ThreadPoolExecutor(count, "look") as pool:
            chunks = _without_splitting_pairs(table, PAIRS_PER_TASK)
            for chunk, verified in zip(chunks, map_ordered(pool, look_at, chunks, 2 * count)):
                found += verified
                progress.add(chunk[1] - chunk[0])
        pq.write_table(pa.Table.from_pylist(found, LOOK_SCHEMA), folder / "looks.parquet", compression="zstd")
        return unit_counts(table.shape[1], len(found), other=table.shape[1] - len(found))
