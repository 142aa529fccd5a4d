"""The steps that drop copies, as stages: exact, hash, duplicate. Each writes a verdict; the step "benchmark" is in
leak.py.

compare     byte-identical files, equal hashes, images of one colour; vectors of the remaining images; thresholds and
            their calibration
centres, probes, layout, join    edges between these vectors (search/join.py), in rounds; the first two only by lists,
            and from the second round on `among`, the vectors of the images that remain
duplicate   groups of near-duplicates, the images kept of each, and how many remaining images are still alike
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from troodon import run
from troodon.curate import dedup, equal, ledger, space
from troodon.curate.context import AssignProbes, CurationContext, row_ranges, write_mapped
from troodon.curate.encoder import CopyEncoder
from troodon.curate.hashes import near_hashes
from troodon.curate.stage import Counts, concatenate_matrices, unit_counts
from troodon.curate.thresholds import choose_thresholds
from troodon.search import join
from troodon.search.inverted_lists import InvertedLists, kmeans, list_count

PARTITIONS_PER_UNIT = 64  # of a search index, except for the exact search
EDGE_SCHEMA = pa.schema([("i", pa.int64()), ("j", pa.int64()), ("score", pa.float32())])


def prepare_comparison(context: CurationContext, embeddings: Path, encoder: CopyEncoder) -> Path:
    """Run the steps "exact" and "hash", and write everything that the step "duplicate" needs."""
    names = ("steps", "within_curated", "hash_radius", "duplicate_space", "threshold", "false_merges", "seed",
             "calibration_images", "benchmark_threshold", "benchmark_false_merges", "benchmark_attacks")  # fmt: skip
    config = context.config

    def work(folder: Path) -> Counts:
        x_ND = encoder.load_vectors(embeddings)
        cause_N, score_N = np.full(len(x_ND), -1, np.int64), np.full(len(x_ND), np.nan, np.float32)
        rank_N, protected_N = keep_ranks(context)
        dropped_by = {step: np.zeros(len(x_ND), bool) for step in ("exact", "hash", "colour")}
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
        candidates_N = blank_N & (context.benchmark_N | np.isin(np.arange(len(x_ND)), rows))
        colours = equal.single_colours(context, np.flatnonzero(candidates_N))
        if "duplicate" in config.steps:
            dropped, cause, score = _colour_duplicates(rows[np.isin(rows, list(colours))], colours, rank_N, protected_N)
            cause_N[dropped], score_N[dropped], dropped_by["colour"][dropped] = cause, score, True
        single_N = np.isin(np.arange(len(x_ND)), list(colours))
        apart, rows = int((single_N[rows] & (cause_N[rows] < 0)).sum()), rows[~single_N[rows]]
        structured = np.flatnonzero(~blank_N[rows])
        fitted = space.fit(config.duplicate_space, x_ND, rows[structured] if len(structured) else rows)
        fitted.save(folder / "space.npz")
        write_mapped(x_ND, fitted, rows, folder / "vectors.npy")
        benchmark_rows = np.flatnonzero(context.readable_N & context.benchmark_N & ~single_N)
        write_mapped(x_ND, fitted, benchmark_rows, folder / "benchmark.npy")
        np.save(folder / "rows.npy", rows)
        np.save(folder / "shown.npy", benchmark_rows)
        pq.write_table(pa.table(dropped_by | {"cause": cause_N, "score": score_N}), folder / "verdict.parquet")
        run.write_json(folder / "colours.json", {str(row): colour.tolist() for row, colour in colours.items()})
        x_MD = np.load(folder / "vectors.npy", mmap_mode="r")
        thresholds = choose_thresholds(context, rows, structured, x_MD, encoder, fitted, len(benchmark_rows))
        run.write_json(folder / "threshold.json", thresholds)
        dropped_counts = {step: int(dropped_N.sum()) for step, dropped_N in dropped_by.items()}
        return unit_counts(count, len(rows), **dropped_counts, apart=apart)

    inputs = (config.recorded(*names), encoder.fingerprint, context.curated, context.uncurated)
    return context.run_single("compare", work, *inputs)


def remove_duplicates(context: CurationContext, comparison: Path) -> Path:
    """Run the step "duplicate": decide for every image whether it remains and, if not, which image is the cause."""
    names = ("steps", "recheck_above", "search", "rounds", "seed", "within_curated")
    config, inputs = context.config, (context.config.recorded(*names), comparison.parent.name)

    def work(folder: Path) -> Counts:
        thresholds, rows = run.read_json(comparison / "threshold.json"), np.load(comparison / "rows.npy")
        x_MD = np.load(comparison / "vectors.npy", mmap_mode="r")
        table = pq.read_table(comparison / "verdict.parquet")
        cause_N, score_N = table["cause"].to_numpy().copy(), table["score"].to_numpy().copy()
        dropped_by = {step: table[step].to_numpy().copy() for step in ("exact", "hash", "colour")}
        dropped_by["near"] = np.zeros(len(cause_N), bool)
        method, audited = join.resolve_method(config.search, len(rows)), None
        verdict = dedup.Verdict(*np.full((3, len(rows)), -1))
        if "duplicate" in config.steps:
            rank_N, protected_N = keep_ranks(context)
            threshold, protected_M = thresholds["threshold"], protected_N[rows]
            verdict = dedup.near_duplicates(
                x_MD, threshold, rank_N[rows], context.curated_N[rows], protected_M, config.recheck_above,
                find_edges=EdgeSearch(context, comparison, threshold, method),
                rounds=0 if threshold >= 1 else 1 if method == "exact" else config.rounds,
            )  # fmt: skip
            verdict = dedup.join_equal(verdict, _equal_among_kept(context, rows, verdict), rank_N[rows], protected_M)
            dropped_M = verdict.cause_N >= 0
            cause_N[rows[dropped_M]] = rows[verdict.cause_N[dropped_M]]
            score_N[rows[dropped_M]] = verdict.score_N[dropped_M]
            dropped_by["near"][rows[dropped_M]] = True
            similarity = f"cosine above {threshold:.3f}"
            run.say(f"duplicate: {dropped_M.sum():,} of {len(rows):,} images resemble another, {similarity}")
            if method != "exact" and threshold < 1:
                audited = _audit(x_MD, threshold, dropped_M, protected_M, config.seed, context.device)
        survives_N = context.readable_N & ~context.benchmark_N & (cause_N < 0)
        columns = {"survives": survives_N, **dropped_by, "cause": cause_N, "score": score_N}
        pq.write_table(pa.table(columns), folder / "verdict.parquet")
        pq.write_table(ledger.duplicate_groups(x_MD, rows, verdict), folder / "groups.parquet", compression="zstd")
        run.write_json(folder / "threshold.json", thresholds | {"search": {"by": method, "still_alike": audited}})
        return unit_counts(len(rows), int((verdict.cause_N < 0).sum()), near=int((verdict.cause_N >= 0).sum()))

    return context.run_single("duplicate", work, *inputs)


def keep_ranks(context: CurationContext) -> tuple[ndarray, ndarray]:
    """Return the rank of every image by the keep rule, and which images are protected: always kept."""
    width_N, height_N, bytes_N = (context.images[c].fill_null(0).to_numpy() for c in ("width", "height", "length"))
    rank_N = dedup.keep_order(context.curated_N, width_N * height_N, bytes_N)
    return rank_N, context.curated_N if context.config.within_curated == "keep" else np.zeros_like(context.curated_N)


@dataclass(frozen=True)
class EdgeSearch:
    """Finds the edges among compared images on the backend. dedup.py calls it with rows and the number of the round."""

    context: CurationContext
    comparison: Path
    threshold: float
    method: Any

    def __call__(self, rows: ndarray, round_number: int) -> Iterator[dedup.Edges]:
        context, matrix, seed = self.context, self.comparison / "vectors.npy", self.context.config.seed + round_number
        x_MD = np.load(matrix, mmap_mode="r")
        rows_digest = hashlib.sha256(rows.tobytes()).hexdigest() if len(rows) < len(x_MD) else "all"
        inputs = (self.comparison.parent.name, self.method, seed, rows_digest)
        if len(rows) < len(x_MD):
            selected = context.run_single("among", lambda folder: _select_rows(x_MD, rows, folder), *inputs)
            matrix = selected / "vectors.npy"
        probes, lists = list[Path](), 0
        if self.method == "lists" and len(rows):  # assigning probes takes long, so the backend does it
            trained = context.run_single("centres", lambda folder: _train_centroids(matrix, seed, folder), *inputs)
            assign = AssignProbes(matrix, trained / "centroids.npy")
            probes = context.run_units("probes", assign, row_ranges(len(rows)), *inputs)
            lists = len(np.load(trained / "centroids.npy", mmap_mode="r"))

        def build_index(folder: Path) -> Counts:
            x_ND = np.load(matrix, mmap_mode="r")
            if probes:
                concatenate_matrices(probes, folder / "lists.npy")
                InvertedLists.from_probes(x_ND, np.load(folder / "lists.npy", mmap_mode="r"), lists, folder)
                (folder / "lists.npy").unlink()
            else:
                join.build_index(x_ND, self.method, seed, folder=folder)
            return unit_counts(len(rows))

        index = context.run_single("layout", build_index, *inputs)
        units = row_ranges(len(join.load_index(index)), 1 if self.method == "exact" else PARTITIONS_PER_UNIT)
        work = _JoinPartitions(index, matrix, self.threshold, context.device)
        yield from read_edges(context.run_units("join", work, units, self.threshold, *inputs))


def _select_rows(x_ND: ndarray, rows: ndarray, folder: Path) -> Counts:
    write_mapped(x_ND, space.Space(), rows, folder / "vectors.npy")
    return unit_counts(len(rows))


def _train_centroids(matrix: Path, seed: int, folder: Path) -> Counts:
    x_ND = np.load(matrix, mmap_mode="r")
    np.save(folder / "centroids.npy", kmeans(x_ND, list_count(len(x_ND)), seed))
    return unit_counts(len(x_ND))


@dataclass(frozen=True)
class _JoinPartitions:
    """Finds the edges of partitions (first, last) of a search index."""

    index: Path
    matrix: Path
    threshold: float
    device: Any

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        x_ND, index = np.load(self.matrix, mmap_mode="r"), join.load_index(self.index, self.device)
        tiles = (tile for partition in range(*unit) for tile in index.pairs(x_ND, self.threshold, partition))
        return write_edges(folder, tiles)


def write_edges(folder: Path, edges: Iterator[dedup.Edges]) -> Counts:
    total = 0
    with pq.ParquetWriter(folder / "edges.parquet", EDGE_SCHEMA, compression="zstd") as writer:
        for tile in edges:
            if len(tile[0]):
                writer.write_table(pa.table(list(tile), schema=EDGE_SCHEMA))
                total += len(tile[0])
    return unit_counts(total)


def read_edges(parts: list[Path]) -> Iterator[dedup.Edges]:
    for part in parts:
        with pq.ParquetFile(part / "edges.parquet") as file:
            for batch in file.iter_batches(1 << 20):
                i, j, score = (column.to_numpy() for column in batch.columns)
                yield i, j, score


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


def _equal_among_kept(context: CurationContext, rows: ndarray, verdict: dedup.Verdict) -> ndarray:
    """Return a digest of the pixels (M,) of those kept images that may equal another one; "" for all others."""
    kept = np.flatnonzero(verdict.cause_N < 0)
    digest_M = np.full(len(rows), "", object)
    digest_M[kept] = equal.equal_pixels(context, rows[kept])
    return digest_M


def _audit(x_MD: ndarray, threshold: float, dropped_M: ndarray, protected_M: ndarray, seed: int, device: Any) -> dict:
    """Count, for a sample of the remaining images and by exact search, how many still resemble another."""
    remaining = np.flatnonzero(~dropped_M)
    candidates = np.flatnonzero(~protected_M[remaining])
    result = join.audit(x_MD[remaining], threshold, candidates, seed=seed, device=device)
    interval = f"95 % interval {result.low:.2%} to {result.high:.2%}"
    similar = f"{result.similar:,} of {result.checked:,} remaining images still resemble another"
    run.say(f"audit: {similar} ({result.share:.2%}, {interval})")
    return {"looked_at": result.checked, "found": result.similar, "low": result.low, "high": result.high}
