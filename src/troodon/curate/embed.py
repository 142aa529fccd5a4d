"""Compute embeddings: one float16 matrix, in the order of the index. Each image is read and decoded once.

    embeddings.npy    (N, D); row i is image i; zeros if it cannot be read; or .parquet, .arrow (embedding_files.py)
    copies.npy        the same by a second backbone, if another one finds copies
    pixels.npy        the same by the pixel backbone, if pixels are used to find copies (encoder.py)
    images.parquet    the index, and the metadata of each image:
                      status   "ok", or the status of BadImage   reason   why not, in one line; null if ok
                      width, height    in pixels, upright        sha256   of the bytes; null if unreadable
                      hash     perceptual, 64 bits; null if unreadable or of one colour
                      score_<name>     for every requested score
                      modified         when its file was last changed, as in an index (images/scan.py)

Until all images are done, every `partition_size` images are a unit of the stage "embed", so a killed run loses minutes.
"""

import functools
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from troodon.copies.hashes import perceptual_hash
from troodon.curate.backends import SingleProcess
from troodon.curate.context import row_ranges
from troodon.curate.embedding_files import compute_tokens, images_of_a_unit, write_table
from troodon.curate.encoder import (
    COPY_MATRIX,
    MAIN_MATRIX,
    PIXEL_MATRIX,
    PixelBackbone,
    compute_vectors,
    device_of,
    join_inputs,
    without_reader,
)
from troodon.curate.scores import Score, load_scores
from troodon.curate.stage import (
    Backend,
    Counts,
    Stage,
    code_fingerprint,
    concatenate_matrices,
    run_stage,
    stage_seconds,
    unit_counts,
)
from troodon.images.changes import refuse_changed, times_fingerprint
from troodon.images.decode import BadImage
from troodon.images.index import MODIFIED, SCHEMA, Index
from troodon.images.reading import read_batches
from troodon.lock import one_at_a_time
from troodon.model.backbone import Backbone
from troodon.progress import Progress

# Shape suffixes: N images, B images of one batch, D channels of an embedding.

PARTITION_SIZE = 20_000  # images per unit
_Encoder = tuple[Any, Callable[[Any], ndarray]]  # a network, and the function from what it prepares to vectors


@one_at_a_time
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
    partition_size: int = PARTITION_SIZE,
    backend: Backend | None = None,
    blocks: Sequence[int] = (),
    file_format: str = "npy",
) -> Path:
    """Compute the embeddings of all images of an index and publish them in the folder `out`, unless they exist.

    `tokens` is "cls", "mean" or "cls+mean": the class token, the mean patch token or both, each of unit length; or
    "patches", all patch tokens. They are those after these `blocks`, numbered from 0; the last one if there is none.
    `copies` encodes every image too, by its class token only; `pixels` stores pixels as well. `marks` name the scores
    to compute (see scores.py), and `file_format` is "npy", "parquet" or "arrow". Raises UsageError if `out` holds
    something else, or if the two backbones take different channels.
    """
    scores = load_scores(marks)
    settings = _settings(backbone, copies)
    # What was not always a setting is recorded only where it is not the default, so that earlier results stay valid.
    later = {"pixels": PixelBackbone.fingerprint if pixels else "", "scores": sorted(scores), "blocks": list(blocks)}
    later["format"] = file_format if file_format != "npy" else ""
    settings |= {"tokens": tokens} | {name: value for name, value in later.items() if value}
    fingerprint = config.fingerprint(settings, index.content_hash())
    if run.is_done(out, "embeddings", fingerprint, settings):
        refuse_changed(out, index)
        return out
    modified = index.modification_times()
    networks = {MAIN_MATRIX: encoder(backbone, tokens, blocks)}
    networks |= {} if copies is None else {COPY_MATRIX: encoder(copies, "cls")}
    networks |= {PIXEL_MATRIX: encoder(PixelBackbone(backbone.channels), "cls")} if pixels else {}
    if tokens == "patches":
        partition_size = min(partition_size, images_of_a_unit(*networks[MAIN_MATRIX]))
    # The batches can change the last bit of a vector, so partial results depend on them.
    inputs = (fingerprint, times_fingerprint(modified), partition_size, batch)
    stage_name = config.fingerprint(*inputs, code_fingerprint())
    work = _EmbedUnit(networks, index, scores, batch, threads)
    stage = Stage("embed", work, row_ranges(len(index), partition_size), stage_name)
    root = parts_folder(out)
    parts = run_stage(stage, root, backend or SingleProcess())
    with run.publish(out, "embeddings", fingerprint, settings) as partial:
        for matrix in networks:
            if matrix == MAIN_MATRIX and file_format != "npy":
                write_table(parts, partial / f"{matrix}.{file_format}")
            else:
                concatenate_matrices(parts, partial / f"{matrix}.npy")
        tables = [pq.read_table(part / "images.parquet") for part in parts]
        table = pa.concat_tables(tables).combine_chunks() if tables else SCHEMA.empty_table()
        table = table.append_column(MODIFIED, pa.array(modified))
        pq.write_table(table, partial / "images.parquet", compression="zstd")
        run.write_json(partial / "timings.json", stage_seconds(parts))
    shutil.rmtree(root, ignore_errors=True)
    return out


def _settings(backbone: Backbone, copies: Backbone | None) -> dict[str, Any]:
    """What is recorded of the networks. UsageError if they take different channels."""
    settings: dict[str, Any] = {"backbone": backbone.name, "weights": backbone.fingerprint}
    if (compute := str(getattr(backbone, "compute", torch.float32))) != str(torch.float32):
        settings["compute"] = compute.removeprefix("torch.")  # such vectors are close, not equal
    if copies is not None:
        settings["copies"] = copies.fingerprint
        if copies.channels != backbone.channels:
            raise UsageError(f"{copies.name} takes {copies.channels} channels, {backbone.name} {backbone.channels}")
    return settings


def encoder(network: Any, tokens: str, blocks: Sequence[int] = ()) -> _Encoder:
    """A network without its reader, and the function from what it prepares to vectors."""
    network = without_reader(network)
    if blocks or tokens not in ("cls", "cls+mean"):
        return network, functools.partial(compute_tokens, network, tokens, tuple(blocks))
    return network, functools.partial(compute_vectors, network, tokens)


def parts_folder(out: Path) -> Path:
    """The folder of what is finished until all images are done."""
    return out.with_name(f"{out.name}.parts")


def load_embeddings(folder: Path, matrix: str = MAIN_MATRIX) -> tuple[ndarray, pa.Table]:
    """Load the matrix (N, D) float16, memory-mapped, and the table of its images."""
    return np.load(folder / f"{matrix}.npy", mmap_mode="r"), pq.read_table(folder / "images.parquet")


@dataclass(frozen=True)
class _HashingIndex(Index):
    """An index that records the hash of every file that it reads."""

    sha256: dict[int, str] = field(default_factory=dict, compare=False, repr=False)
    excluded: frozenset[int] = frozenset()

    def read(self, row: int) -> bytes:
        if row in self.excluded:
            raise BadImage("deadly", "every process that reads it dies")
        data = super().read(row)
        self.sha256[row] = hashlib.sha256(data).hexdigest()
        return data


@dataclass(frozen=True)
class _EmbedUnit:
    """Reads and embeds rows (first, last) of the index."""

    networks: Mapping[str, _Encoder]  # by matrix
    index: Index
    scores: Mapping[str, Score]
    batch: int
    threads: int
    excluded: frozenset[int] = frozenset()  # rows that have killed processes

    @property
    def device(self) -> Any:
        """Where a network computes that has weights; None if there is none."""
        return next((network.device for network, _ in self.networks.values() if hasattr(network, "to")), None)

    def placed(self, processors: int) -> "_EmbedUnit":
        """The same with its networks on the device of this process, read for by its processors."""
        for network, _ in self.networks.values():
            device_of(network)
        return replace(self, threads=self.threads if self.index.is_remote else self.threads or processors)

    def excluding(self, row: int) -> "_EmbedUnit":
        return replace(self, excluded=self.excluded | {row})

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        excluded = frozenset(row - unit[0] for row in self.excluded)
        index, broken = _HashingIndex(**vars(self.index.take(range(*unit))), excluded=excluded), dict[int, BadImage]()
        metadata, matrices = dict[int, dict](), {name: dict[int, ndarray]() for name in self.networks}
        progress = Progress(f"embed {unit[0]:,} to {unit[1]:,}", "images", len(index))
        channels = next(iter(self.networks.values()))[0].channels
        join = functools.partial(join_inputs, [network for network, _ in self.networks.values()])
        batches = read_batches(
            index, self.batch, self._prepare, join=join, channels=channels, threads=self.threads, broken=broken
        )
        for rows, (batch_metadata, inputs) in batches:
            metadata.update(zip(rows, batch_metadata, strict=True))
            for (name, (_, encode)), prepared in zip(self.networks.items(), inputs, strict=True):
                vectors = encode(prepared).astype(np.float16)
                matrices[name].update(zip(rows, vectors, strict=True))
            progress.add(len(rows))
        progress.close()

        for name, vectors in matrices.items():
            x_ND = np.zeros((len(index), *next(iter(vectors.values()), np.zeros(0)).shape), np.float16)
            for row, vector in vectors.items():
                x_ND[row] = vector
            np.save(folder / f"{name}.npy", x_ND)
        pq.write_table(self._table(index, metadata, broken), folder / "images.parquet", compression="zstd")
        return unit_counts(len(index), len(metadata), **Counter(image.status for image in broken.values()))

    def _prepare(self, images: Sequence[ndarray]) -> tuple[list[dict], list[Any]]:
        """Metadata, and the inputs of each network."""
        inputs = [network.prepare(images) for network, _ in self.networks.values()]
        return [self._metadata(image) for image in images], inputs

    def _metadata(self, image: ndarray) -> dict:
        scores = {f"score_{name}": float(score(image)) for name, score in self.scores.items()}
        return {"height": image.shape[0], "width": image.shape[1], "hash": perceptual_hash(image)} | scores

    def _table(self, index: "_HashingIndex", metadata: dict[int, dict], broken: dict[int, BadImage]) -> pa.Table:
        """Return the index with the metadata of its images."""
        rows, table = range(len(index)), index.table.select(SCHEMA.names)
        assert metadata.keys() | broken.keys() == set(rows)
        assert not metadata.keys() & broken.keys()

        def column_of(name: str) -> list:
            return [metadata[row][name] if row in metadata else None for row in rows]

        columns = {
            "status": pa.array(["ok" if row in metadata else broken[row].status for row in rows], pa.string()),
            "reason": pa.array([None if row in metadata else broken[row].reason for row in rows], pa.string()),
            "width": pa.array(column_of("width"), pa.int64()),
            "height": pa.array(column_of("height"), pa.int64()),
            "sha256": pa.array([index.sha256.get(row) for row in rows], pa.string()),
            "hash": pa.array(column_of("hash"), pa.uint64()),
        } | {f"score_{name}": pa.array(column_of(f"score_{name}"), pa.float32()) for name in self.scores}
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table
