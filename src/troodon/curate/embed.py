"""Images to embeddings: one float16 matrix, in the order of the index.

    embeddings.npy    (N, D); row i is image i; zeros where it could not be read
    images.parquet    the index, and what reading each image has told:
                      status   "ok", or what BadImage says       reason   why not, in one line; null where ok
                      width, height    in pixels, upright        sha256   of the bytes; null where unreadable

Every PART images are an artifact of their own until all are there, so a killed run loses minutes.
"""

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from troodon import config, run
from troodon.data.decode import BadImage
from troodon.data.index import SCHEMA, Index
from troodon.data.loader import stream
from troodon.data.scan import contents
from troodon.model.backbone import Backbone
from troodon.search.exact import unit

# Shape suffixes: N images, B images of one batch, D channels of an embedding.

PART = 20_000


def embed(backbone: Backbone, index: Index, out: Path, *, batch: int, threads: int, tokens: str = "cls") -> Path:
    """Publish the embeddings of all images of an index in the folder `out`, unless they are there.

    `tokens` is "cls" or "cls+mean": the class token, or it and the mean patch side by side; each of length one.
    UsageError when `out` holds something else.
    """
    settings = {"backbone": backbone.name, "weights": backbone.fingerprint, "tokens": tokens}
    fingerprint = config.fingerprint(settings, contents(index))
    if run.is_done(out, "embeddings", fingerprint, settings):
        return out
    began, home = time.monotonic(), out.with_name(f"{out.name}.parts")
    parts = [_Part(backbone, index, home, start, fingerprint, tokens) for start in range(0, len(index), PART)]
    waiting = [part for part in parts if not part.is_done()]
    progress = Progress("embed", "images", sum(len(part.rows) for part in waiting))
    for part in waiting:
        part.make(batch, threads, progress)
    with run.publish(out, "embeddings", fingerprint, settings) as partial:
        _join([part.folder for part in parts], partial)
        run.write_json(partial / "timings.json", {"embed": round(time.monotonic() - began, 3)})
    shutil.rmtree(home, ignore_errors=True)
    return out


def load(folder: Path) -> tuple[ndarray, pa.Table]:
    """The matrix (N, D) float16, mapped from the disk, and the table of its images."""
    return np.load(folder / "embeddings.npy", mmap_mode="r"), pq.read_table(folder / "images.parquet")


def describe(backbone: Backbone, images: Sequence[ndarray], tokens: str, batch: int = 64) -> ndarray:
    """Embeddings (N, D) float32 of uint8 (H, W, C) arrays, as `embed` stores them but for the rounding."""
    starts = range(0, len(images), batch)
    parts = [_tokens(backbone, backbone.prepare(images[start : start + batch]), tokens) for start in starts]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


class Progress:
    """A line of progress every few seconds: how many, how fast, how long still."""

    def __init__(self, what: str, unit: str, total: int, seconds: float = 5.0):
        self.what, self.unit, self.total, self.seconds = what, unit, total, seconds
        self.began = self.said = time.monotonic()
        self.done = 0

    def add(self, count: int) -> None:
        self.done, now = self.done + count, time.monotonic()
        if now - self.said >= self.seconds:
            self.said, rate = now, self.done / (now - self.began)
            left = _duration((self.total - self.done) / rate)
            run.say(f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.0f} a second, {left} left")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


@dataclass(frozen=True)
class _Hashing(Index):
    """An index that notes the hash of whatever is read through it."""

    sha256: dict[int, str] = field(default_factory=dict, compare=False, repr=False)

    def read(self, row: int) -> bytes:
        data = super().read(row)
        self.sha256[row] = hashlib.sha256(data).hexdigest()
        return data


@dataclass(frozen=True)
class _Part:
    """PART images from `start` on, an artifact of their own."""

    backbone: Backbone
    index: Index
    home: Path
    start: int
    whole: str  # fingerprint of what this is a part of
    tokens: str

    @property
    def rows(self) -> range:
        return range(self.start, min(self.start + PART, len(self.index)))

    @property
    def folder(self) -> Path:
        return self.home / f"{self.start // PART:05d}"

    @property
    def _name(self) -> tuple[str, str, dict]:
        settings = {"whole": self.whole, "first": self.start, "images": len(self.rows)}
        return "embeddings", config.fingerprint(settings), settings

    def is_done(self) -> bool:
        return run.is_done(self.folder, *self._name)

    def make(self, batch: int, threads: int, progress: Progress) -> None:
        index, broken = _Hashing(self.index.take(self.rows).table), dict[int, BadImage]()
        sizes, embeddings = dict[int, tuple[int, int]](), list[tuple[list[int], ndarray]]()

        def prepare(images: Sequence[ndarray]) -> Any:
            return [image.shape[:2] for image in images], self.backbone.prepare(images)

        images = stream(index, batch, prepare, channels=self.backbone.channels, threads=threads, broken=broken)
        for rows, (shapes, prepared) in images:
            sizes.update(zip(rows, shapes, strict=True))
            embeddings.append((rows, _tokens(self.backbone, prepared, self.tokens).astype(np.float16)))
            progress.add(len(rows))
        progress.add(len(broken))

        x_ND = np.zeros((len(index), embeddings[0][1].shape[1] if embeddings else 0), np.float16)
        for rows, x_BD in embeddings:
            x_ND[rows] = x_BD
        with run.publish(self.folder, *self._name) as partial:
            np.save(partial / "embeddings.npy", x_ND)
            pq.write_table(_seen(index, sizes, broken), partial / "images.parquet", compression="zstd")


def _seen(index: _Hashing, sizes: dict[int, tuple[int, int]], broken: dict[int, BadImage]) -> pa.Table:
    """The index with what reading its images has told."""
    every, table = range(len(index)), index.table.select(SCHEMA.names)
    assert sizes.keys() | broken.keys() == set(every)
    assert not sizes.keys() & broken.keys()
    columns = {
        "status": pa.array(["ok" if row in sizes else broken[row].status for row in every], pa.string()),
        "reason": pa.array([None if row in sizes else broken[row].reason for row in every], pa.string()),
        "width": pa.array([sizes[row][1] if row in sizes else None for row in every], pa.int64()),
        "height": pa.array([sizes[row][0] if row in sizes else None for row in every], pa.int64()),
        "sha256": pa.array([index.sha256.get(row) for row in every], pa.string()),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def _tokens(backbone: Backbone, prepared: Any, tokens: str) -> ndarray:
    features = backbone.features(prepared)
    parts = [features.cls] + ([features.patches.mean((1, 2))] if tokens == "cls+mean" else [])
    return np.concatenate([unit(part.float().cpu().numpy()) for part in parts], axis=1)


def _join(parts: Sequence[Path], folder: Path) -> None:
    """The parts one after the other; those without a readable image are as wide as the others."""
    matrices = [np.load(part / "embeddings.npy", mmap_mode="r") for part in parts]
    rows, channels = sum(map(len, matrices)), max((m.shape[1] for m in matrices), default=0)
    with open(folder / "embeddings.npy", "wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, channels)}
        np.lib.format.write_array_header_1_0(file, header)
        for matrix in matrices:
            file.write((matrix if matrix.shape[1] else np.zeros((len(matrix), channels), np.float16)).tobytes())
    tables = [pq.read_table(part / "images.parquet") for part in parts]
    table = pa.concat_tables(tables).combine_chunks() if tables else SCHEMA.empty_table()
    pq.write_table(table, folder / "images.parquet", compression="zstd")
