"""The stage "identical": the steps "exact" and "hash", and images of one colour; copies that need no comparison.

rows.npy        the remaining images, which are compared      shown.npy    those of benchmarks
verdict.parquet by image: which of these steps drops it, the cause, the score      colours.json    single colours
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from troodon import run
from troodon.copies.hashes import near_hashes
from troodon.curate import dedup, equal
from troodon.curate.context import CurationContext
from troodon.curate.stage import Counts, unit_counts


def remove_identical(context: CurationContext) -> Path:
    """Run these steps and write the remaining images."""
    config = context.config

    def work(folder: Path) -> Counts:
        total = len(context.index)
        cause_N, score_N = np.full(total, -1, np.int64), np.full(total, np.nan, np.float32)
        rank_N, protected_N = keep_ranks(context)
        dropped_by = {step: np.zeros(total, bool) for step in ("exact", "hash", "colour")}
        rows = np.flatnonzero(context.readable_N & ~context.benchmark_N)
        count = len(rows)
        if "exact" in config.steps:
            hashes = context.images["sha256"].take(pa.array(rows)).combine_chunks()
            cause = dedup.find_identical(hashes.dictionary_encode().indices.to_numpy(), rank_N[rows], protected_N[rows])
            dropped = rows[cause >= 0]
            cause_N[dropped], score_N[dropped], dropped_by["exact"][dropped] = rows[cause[cause >= 0]], 1.0, True
            run.say(f"exact: {len(dropped):,} of {len(rows):,} images are byte-identical to another")
            rows = rows[cause < 0]
        if "hash" in config.steps:
            dropped, cause, score = _hash_duplicates(context, rows, rank_N, protected_N)
            cause_N[dropped], score_N[dropped], dropped_by["hash"][dropped] = cause, score, True
            distance = f"within {config.hash_radius} bits of an image that is kept"
            run.say(f"hash: {len(dropped):,} of {len(rows):,} images are {distance}")
            rows = np.setdiff1d(rows, dropped, assume_unique=True)
        blank_N = equal.without_structure(context)
        candidates_N = blank_N & (context.benchmark_N | np.isin(np.arange(total), rows))
        colours = equal.single_colours(context, np.flatnonzero(candidates_N))
        if "duplicate" in config.steps:
            dropped, cause, score = _colour_duplicates(rows[np.isin(rows, list(colours))], colours, rank_N, protected_N)
            cause_N[dropped], score_N[dropped], dropped_by["colour"][dropped] = cause, score, True
        single_N = np.isin(np.arange(total), list(colours))
        apart, rows = int((single_N[rows] & (cause_N[rows] < 0)).sum()), rows[~single_N[rows]]
        benchmark_rows = np.flatnonzero(context.readable_N & context.benchmark_N & ~single_N)
        np.save(folder / "rows.npy", rows)
        np.save(folder / "shown.npy", benchmark_rows)
        pq.write_table(pa.table(dropped_by | {"cause": cause_N, "score": score_N}), folder / "verdict.parquet")
        run.write_json(folder / "colours.json", {str(row): colour.tolist() for row, colour in colours.items()})
        dropped_counts = {step: int(dropped_N.sum()) for step, dropped_N in dropped_by.items()}
        return unit_counts(count, len(rows), **dropped_counts, apart=apart)

    names = ("steps", "within_curated", "hash_radius")
    return context.run_single("identical", work, config.recorded(*names), context.curated, context.uncurated)


def keep_ranks(context: CurationContext) -> tuple[ndarray, ndarray]:
    """Return the rank of every image by the keep rule, and which images are protected: always kept. Of equal files
    those of preferred folders come first too."""
    width_N, height_N, bytes_N = (context.images[c].fill_null(0).to_numpy() for c in ("width", "height", "length"))
    preferred_N = np.array(context.preferences(np.arange(len(context.index))), np.int64)
    rank_N = dedup.keep_order(preferred_N, width_N * height_N, bytes_N, context.images["path"].to_pylist())
    return rank_N, context.curated_N if context.config.within_curated == "keep" else np.zeros_like(context.curated_N)


def _hash_duplicates(
    context: CurationContext, rows: ndarray, rank_N: ndarray, protected_N: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    """Return the rows to drop for near hashes, the row kept in place of each, and the share of equal bits."""
    column = context.images["hash"].take(pa.array(rows))
    valid = np.flatnonzero(column.is_valid().to_numpy())
    hash_M = column.fill_null(0).to_numpy()[valid]
    rows, edges = rows[valid], list(near_hashes(hash_M, context.config.hash_radius))
    label_M = dedup.components(len(rows), edges)
    best = np.lexsort((rank_N[rows], label_M))
    starts = np.flatnonzero(np.r_[True, np.diff(label_M[best]) > 0][: len(best)])
    kept_M = np.empty(len(rows), np.int64)
    kept_M[best] = np.repeat(best[starts], np.diff(np.r_[starts, len(best)]))
    bits_M = np.bitwise_count(hash_M ^ hash_M[kept_M])
    # Hashes chain as embeddings do: an image that differs from the kept one in more bits is not dropped.
    dropped = (kept_M != np.arange(len(rows))) & (bits_M <= context.config.hash_radius) & ~protected_N[rows]
    return rows[dropped], rows[kept_M[dropped]], (1 - bits_M[dropped] / 64).astype(np.float32)


def _colour_duplicates(
    rows: ndarray, colours: dict[int, ndarray], rank_N: ndarray, protected_N: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    """Return the rows to drop among images of one colour, the row kept in place of each, and how equal the two are."""
    rows = rows[np.argsort(rank_N[rows])]
    group_N = equal.group_colours([colours[int(row)] for row in rows])
    cause = dedup.find_identical(group_N, rank_N[rows], protected_N[rows])
    dropped, kept = rows[cause >= 0], rows[cause[cause >= 0]]
    differences = [np.abs(colours[int(a)] - colours[int(b)]).max() / 255 for a, b in zip(dropped, kept)]
    if len(rows):
        run.say(f"colour: {len(rows):,} images show one colour only; {len(dropped):,} of them are like another")
    return dropped, kept, 1 - np.array(differences, np.float32)
