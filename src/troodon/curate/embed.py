"""Images to embeddings: one float16 matrix, in the order of the index. Each image is read and decoded once.

    embeddings.npy    (N, D); row i is image i; zeros where it could not be read
    copies.npy        the same by a second backbone, where copies are to be found by another
    pixels.npy        the same by nothing but small pictures, where these help to find copies (finder.py)
    images.parquet    the index, and what reading each image has told:
                      status   "ok", or what BadImage says       reason   why not, in one line; null where ok
                      width, height    in pixels, upright        sha256   of the bytes; null where unreadable
                      hash     perceptual, 64 bits; null where unreadable or of one colour
                      score_<name>     for every score that was asked for

Every `part` images are a unit of the stage "embed" until all are there, so a killed run loses minutes.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy import ndarray

from troodon import config, run
from troodon.config import UsageError
from troodon.curate.engines import Here
from troodon.curate.finder import COPIES, MATRIX, PIXELS, Pixels, bare, tokens_of
from troodon.curate.hashes import perceptual_hash
from troodon.curate.scores import Score, named
from troodon.curate.stage import Counts, Engine, Progress, Stage, code, counted, do, joined, seconds
from troodon.images.decode import BadImage
from troodon.images.index import SCHEMA, Index
from troodon.images.reading import stream
from troodon.model.backbone import Backbone

# Shape suffixes: N images, B images of one batch, D channels of an embedding.

PART = 20_000  # images of a unit


def embed(
    backbone: Backbone,
    index: Index,
    out: Path,
    *,
    batch: int,
    threads: int,
    tokens: str = "cls",
    copies: Backbone | None = None,
    pixels: bool = False,
    marks: Sequence[str] = (),
    part: int = PART,
    engine: Engine | None = None,
) -> Path:
    """Publish the embeddings of all images of an index in the folder `out`, unless they are there.

    `tokens` is "cls" or "cls+mean": the class token, or it and the mean patch side by side; each of length one.
    `copies` sees every image too, its class token only; and `pixels` are kept. `marks` name scores to give (see
    scores.py). UsageError when `out` holds something else, and for two backbones that want different channels.
    """
    settings: dict[str, Any] = {"backbone": backbone.name, "weights": backbone.fingerprint, "tokens": tokens}
    if (compute := str(getattr(backbone, "compute", torch.float32))) != str(torch.float32):
        settings["compute"] = compute.removeprefix("torch.")  # such vectors are close, not equal
    if copies is not None:
        settings["copies"] = copies.fingerprint
        if copies.channels != backbone.channels:
            raise UsageError(f"{copies.name} takes {copies.channels} channels, {backbone.name} {backbone.channels}")
    if pixels:
        settings["pixels"] = Pixels.fingerprint
    scores = named(marks)
    if scores:
        settings["scores"] = sorted(scores)
    fingerprint = config.fingerprint(settings, index.contents())
    if run.is_done(out, "embeddings", fingerprint, settings):
        return out
    seen_by = {MATRIX: (bare(backbone), tokens)}
    if copies is not None:
        seen_by[COPIES] = bare(copies), "cls"
    if pixels:
        seen_by[PIXELS] = Pixels(backbone.channels), "cls"
    units = [(start, min(start + part, len(index))) for start in range(0, len(index), part)]
    name = config.fingerprint(
        fingerprint, part, batch, code()
    )  # how images are batched may change the last bit of a vector
    home = out.with_name(f"{out.name}.parts")
    parts = do(Stage("embed", _Look(seen_by, index, scores, batch, threads), units, name), home, engine or Here())
    with run.publish(out, "embeddings", fingerprint, settings) as partial:
        for matrix in seen_by:
            joined(parts, partial / f"{matrix}.npy")
        tables = [pq.read_table(part / "images.parquet") for part in parts]
        table = pa.concat_tables(tables).combine_chunks() if tables else SCHEMA.empty_table()
        pq.write_table(table, partial / "images.parquet", compression="zstd")
        run.write_json(partial / "timings.json", seconds(parts))
    shutil.rmtree(home, ignore_errors=True)
    return out


def load(folder: Path, matrix: str = MATRIX) -> tuple[ndarray, pa.Table]:
    """The matrix (N, D) float16, mapped from the disk, and the table of its images."""
    return np.load(folder / f"{matrix}.npy", mmap_mode="r"), pq.read_table(folder / "images.parquet")


@dataclass(frozen=True)
class _Hashing(Index):
    """An index that notes the hash of whatever is read through it."""

    sha256: dict[int, str] = field(default_factory=dict, compare=False, repr=False)
    avoid: frozenset[int] = frozenset()

    def read(self, row: int) -> bytes:
        if row in self.avoid:
            raise BadImage("deadly", "every process that reads it dies")
        data = super().read(row)
        self.sha256[row] = hashlib.sha256(data).hexdigest()
        return data


@dataclass(frozen=True)
class _Look:
    """What is done for rows (start, stop) of the index."""

    seen_by: Mapping[str, tuple[Any, str]]
    index: Index
    scores: Mapping[str, Score]
    batch: int
    threads: int
    avoid: frozenset[int] = frozenset()  # rows that have ended processes
    gpu = True  # of use, where an engine has one to give

    def avoiding(self, row: int) -> "_Look":
        return replace(self, avoid=self.avoid | {row})

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        avoid = frozenset(row - unit[0] for row in self.avoid)
        index, broken = _Hashing(**vars(self.index.take(range(*unit))), avoid=avoid), dict[int, BadImage]()
        told, matrices = dict[int, dict](), {name: dict[int, ndarray]() for name in self.seen_by}
        progress = Progress(f"embed {unit[0]:,} to {unit[1]:,}", "images", len(index))
        first = next(iter(self.seen_by.values()))[0]

        def prepare(images: Sequence[ndarray]) -> Any:
            return [self._tell(image) for image in images], [b.prepare(images) for b, _ in self.seen_by.values()]

        images = stream(index, self.batch, prepare, channels=first.channels, threads=self.threads, broken=broken)
        for rows, (said, prepared) in images:
            told.update(zip(rows, said, strict=True))
            for (name, (backbone, tokens)), ready in zip(self.seen_by.items(), prepared, strict=True):
                matrices[name].update(zip(rows, tokens_of(backbone, tokens, ready).astype(np.float16), strict=True))
            progress.add(len(rows))

        for name, rows in matrices.items():
            x_ND = np.zeros((len(index), len(next(iter(rows.values()), ()))), np.float16)
            for row, vector in rows.items():
                x_ND[row] = vector
            np.save(folder / f"{name}.npy", x_ND)
        pq.write_table(self._seen(index, told, broken), folder / "images.parquet", compression="zstd")
        left_out: dict[str, int] = {}
        for bad in broken.values():
            left_out[bad.status] = left_out.get(bad.status, 0) + 1
        return counted(len(index), len(told), **left_out)

    def _tell(self, image: ndarray) -> dict:
        scores = {f"score_{name}": float(score(image)) for name, score in self.scores.items()}
        return {"height": image.shape[0], "width": image.shape[1], "hash": perceptual_hash(image)} | scores

    def _seen(self, index: "_Hashing", told: dict[int, dict], broken: dict[int, BadImage]) -> pa.Table:
        """The index with what reading its images has told."""
        every, table = range(len(index)), index.table.select(SCHEMA.names)
        assert told.keys() | broken.keys() == set(every)
        assert not told.keys() & broken.keys()

        def of(name: str) -> list:
            return [told[row][name] if row in told else None for row in every]

        columns = {
            "status": pa.array(["ok" if row in told else broken[row].status for row in every], pa.string()),
            "reason": pa.array([None if row in told else broken[row].reason for row in every], pa.string()),
            "width": pa.array(of("width"), pa.int64()),
            "height": pa.array(of("height"), pa.int64()),
            "sha256": pa.array([index.sha256.get(row) for row in every], pa.string()),
            "hash": pa.array(of("hash"), pa.uint64()),
        } | {f"score_{name}": pa.array(of(f"score_{name}"), pa.float32()) for name in self.scores}
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table
