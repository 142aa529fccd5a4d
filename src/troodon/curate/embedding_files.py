"""What `embed` offers beyond class tokens in a matrix: other tokens and blocks, tables for others, nearest images.

    embeddings.npy      (N, D) float16: row i is image i, zeros if it cannot be read; patches: (N, h, w, D)
    embeddings.parquet  a row for each readable image: id, path, label, and the vector as a fixed-size list of float32;
    embeddings.arrow    the same as an Arrow IPC file (Feather), which can be memory-mapped; patches: a row for each
                        patch, with its row and column in the grid

`id` is the row of the image in images.parquet, which all formats have beside them.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy import ndarray

from troodon.curate.encoder import MAIN_MATRIX
from troodon.search.exact import l2_normalise, top_k

# Shape suffixes: N images, B images of one batch, D channels, h w patches, Q queries, k neighbours.

TOKENS = ("cls", "mean", "cls+mean", "patches")
FORMATS = ("npy", "parquet", "arrow")
UNIT_BYTES = 2**27  # of patches in one unit, which is in memory twice
CHUNK_VALUES = 2**24  # that are converted or searched at once


def compute_tokens(network: Any, tokens: str, blocks: Sequence[int], prepared: Any) -> ndarray:
    """Vectors (B, D) float32 of these tokens after these blocks, in their order; the last block if there is none.

    Each token has unit length; patches (B, h, w, D) are as the network gives them.
    """
    per_block = network.features(prepared, blocks=list(blocks) or 1).blocks
    if tokens == "patches":
        return torch.cat([features.patches for features in per_block], dim=-1).float().cpu().numpy()
    parts = [
        part
        for features in per_block
        for part in ([features.cls] if "cls" in tokens else []) + ([features.mean] if "mean" in tokens else [])
    ]
    return np.concatenate([l2_normalise(part.float().cpu().numpy()) for part in parts], axis=1)


def images_of_a_unit(network: Any, encode: Callable[[Any], ndarray]) -> int:
    """How many images a unit has whose vectors are as large as those of this network."""
    (vector,) = encode(network.prepare([np.zeros((32, 32, network.channels), np.uint8)]))
    return max(1, UNIT_BYTES // (2 * vector.size))


def write_table(parts: Sequence[Path], path: Path) -> None:
    """Write the vectors of all parts to `path` as Parquet, or as an Arrow file, by its suffix; a part at a time."""
    shape = max((_matrix(part).shape[1:] for part in parts), default=(0,))
    grid = [("row", pa.int32()), ("column", pa.int32())] if len(shape) > 1 else []
    vector = ("embedding", pa.list_(pa.float32(), shape[-1]))
    schema = pa.schema([("id", pa.int64()), ("path", pa.string()), ("label", pa.string()), *grid, vector])
    is_parquet = path.suffix == ".parquet"
    with pq.ParquetWriter(path, schema, compression="zstd") if is_parquet else pa.ipc.new_file(path, schema) as writer:
        first = 0
        for part in parts:
            matrix = _matrix(part)
            table = pq.read_table(part / "images.parquet", columns=["path", "label", "status"])
            readable = np.flatnonzero(pc.equal(table["status"], "ok").to_numpy(zero_copy_only=False))
            step = max(1, CHUNK_VALUES // max(1, int(np.prod(shape))))
            for start in range(0, len(readable), step):
                rows = readable[start : start + step]
                writer.write_table(_rows(first, rows, table, matrix[rows], schema))
            first += len(matrix)


def _matrix(part: Path) -> ndarray:
    return np.load(part / f"{MAIN_MATRIX}.npy", mmap_mode="r")


def _rows(first: int, rows_B: ndarray, table: pa.Table, vectors: ndarray, schema: pa.Schema) -> pa.Table:
    """The rows of a table for the images `rows_B` of a part, whose vectors are these (B, D) or (B, h, w, D)."""
    per_image = int(np.prod(vectors.shape[1:-1]))
    images = table.take(pa.array(rows_B.repeat(per_image)))
    columns = {"id": first + rows_B.repeat(per_image), "path": images["path"], "label": images["label"]}
    if vectors.ndim > 2:
        grid = np.indices(vectors.shape[1:-1], dtype=np.int32).reshape(2, -1)
        columns |= {name: np.tile(line, len(rows_B)) for name, line in zip(("row", "column"), grid, strict=True)}
    flat = pa.array(vectors.astype(np.float32).reshape(-1))
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[-1])
    return pa.table(columns, schema=schema)


def iter_vectors(folder: Path) -> Iterator[tuple[ndarray, ndarray]]:
    """Yield the ids and vectors (B, D) of the readable images of embeddings in any format, some at a time."""
    if (path := folder / f"{MAIN_MATRIX}.npy").exists():
        x_ND, status = np.load(path, mmap_mode="r"), pq.read_table(folder / "images.parquet", columns=["status"])
        readable = np.flatnonzero(pc.equal(status["status"], "ok").to_numpy(zero_copy_only=False))
        step = max(1, CHUNK_VALUES // max(1, x_ND.shape[1]))
        for start in range(0, len(readable), step):
            yield (rows := readable[start : start + step]), x_ND[rows]
        return
    columns = ["id", "embedding"]
    if (path := folder / f"{MAIN_MATRIX}.parquet").exists():
        batches = pq.ParquetFile(path).iter_batches(columns=columns)
    else:
        file = pa.ipc.open_file(pa.memory_map(str(folder / f"{MAIN_MATRIX}.arrow")))
        batches = (file.get_batch(i).select(columns) for i in range(file.num_record_batches))
    for batch in batches:
        ids = batch["id"].to_numpy()
        yield ids, batch["embedding"].flatten().to_numpy().reshape(len(ids), -1)


def nearest_images(queries_QD: ndarray, folder: Path, k: int, device: Any = None) -> list[list[dict]]:
    """The k nearest images of embeddings to each query, the best first: id, path, label and cosine similarity."""
    score_Qk = np.zeros((len(queries_QD), 0), np.float32)
    id_Qk = np.zeros((len(queries_QD), 0), np.int64)
    for ids, x_BD in iter_vectors(folder):
        score, row = top_k(queries_QD, x_BD, k, device=device)
        score_Qk, id_Qk = np.concatenate([score_Qk, score], 1), np.concatenate([id_Qk, ids[row]], 1)
        best_Qk = np.argsort(-score_Qk, axis=1, kind="stable")[:, :k]
        score_Qk, id_Qk = np.take_along_axis(score_Qk, best_Qk, 1), np.take_along_axis(id_Qk, best_Qk, 1)
    images = pq.read_table(folder / "images.parquet", columns=["path", "label"])
    return [
        [
            {"id": int(i), "path": images["path"][i].as_py(), "label": images["label"][i].as_py(), "score": float(s)}
            for i, s in zip(id_k.tolist(), score_k.tolist(), strict=True)
        ]
        for id_k, score_k in zip(id_Qk, score_Qk, strict=True)
    ]
