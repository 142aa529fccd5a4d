"""The step "duplicate", as stages. The steps before it are in identical.py, "benchmark" is in leak.py.

compare     vectors of the remaining images; thresholds and their calibration
centres, probes, layout, join    edges between these vectors (search/join.py), in rounds; the first two only by lists,
            and from the second round on `among`, the vectors of the images that remain
duplicate   groups of near-duplicates, the images kept of each, and how many remaining images are still alike
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from troodon import run
from troodon.copies.verify import Match
from troodon.copies.votes import AS_IS_OR_MIRRORED, Pairs, add_votes, most_voted
from troodon.curate import dedup, equal, ledger, space
from troodon.curate.closer_look import CloserLook
from troodon.curate.context import AssignProbes, CurationContext, row_ranges, write_mapped
from troodon.curate.encoder import CopyEncoder
from troodon.curate.identical import keep_ranks
from troodon.curate.stage import Counts, concatenate_matrices, unit_counts
from troodon.curate.thresholds import choose_thresholds
from troodon.devices import accelerator
from troodon.search import join
from troodon.search.inverted_lists import InvertedLists, kmeans, list_count

PARTITIONS_PER_UNIT = 64  # of a search index, except for the exact search
DOUBTFUL = "doubtful.parquet"
DOUBTFUL_SCHEMA = pa.schema([("row", pa.int64()), ("other", pa.int64()), ("score", pa.float32()), ("why", pa.string())])
EDGE_SCHEMA = pa.schema([("i", pa.int64()), ("j", pa.int64()), ("score", pa.float32())])


def prepare_comparison(
    context: CurationContext, identical: Path, embeddings: Path, encoder: CopyEncoder, distinct: ndarray
) -> Path:
    """Write everything that vectors are compared with. Spaces and thresholds are fitted to the rows `distinct` only:
    positions of images that are no copies of one another, as far as known."""
    names = ("steps", "duplicate_space", "threshold", "false_merges", "seed", "calibration_images",
             "benchmark_threshold", "benchmark_false_merges", "benchmark_attacks", "verify")  # fmt: skip
    config = context.config

    def work(folder: Path) -> Counts:
        x_ND, rows = encoder.load_vectors(embeddings), np.load(identical / "rows.npy")
        for name in ("rows.npy", "shown.npy", "colours.json", "verdict.parquet"):
            shutil.copy(identical / name, folder)
        structured = distinct[~equal.without_structure(context)[rows[distinct]]]
        fitted = space.fit(config.duplicate_space, x_ND, rows[structured] if len(structured) else rows)
        fitted.save(folder / "space.npz")
        benchmark_rows = np.load(identical / "shown.npy")
        write_mapped(x_ND, fitted, rows, folder / "vectors.npy")
        write_mapped(x_ND, fitted, benchmark_rows, folder / "benchmark.npy")
        x_MD = np.load(folder / "vectors.npy", mmap_mode="r")
        thresholds = choose_thresholds(context, rows, structured, x_MD, encoder, fitted, len(benchmark_rows))
        run.write_json(folder / "threshold.json", thresholds)
        return unit_counts(len(rows))

    digest = hashlib.sha256(distinct.tobytes()).hexdigest()
    inputs = (config.recorded(*names), encoder.fingerprint, context.curated, context.uncurated)
    return context.run_single("compare", work, *inputs, identical.name, identical.parent.name, digest)


def remove_duplicates(context: CurationContext, comparison: Path, look: CloserLook | None) -> Path:
    """Run the step "duplicate": decide for every image whether it remains and, if not, which image is the cause.

    With a closer look, it decides; else the cosine does.
    """
    names = ("steps", "recheck_above", "search", "rounds", "seed", "within_curated",
             "candidates", "prefer", "keep_by")  # fmt: skip
    config, inputs = context.config, (context.config.recorded(*names), comparison.parent.name)

    def work(folder: Path) -> Counts:
        rows, table = np.load(comparison / "rows.npy"), pq.read_table(comparison / "verdict.parquet")
        cause_N, score_N = table["cause"].to_numpy().copy(), table["score"].to_numpy().copy()
        dropped_by = {step: table[step].to_numpy().copy() for step in ("exact", "hash", "colour")}
        dropped_by["near"] = np.zeros(len(cause_N), bool)
        why_N = np.full(len(cause_N), "", object)
        verdict, search = dedup.Verdict(*np.full((3, len(rows)), -1)), {}
        if "duplicate" in config.steps:
            decide = _by_cosine if look is None else look_at_all
            verdict, search = decide(context, comparison, rows, look)
            dropped_M = verdict.cause_N >= 0
            cause_N[rows[dropped_M]] = rows[verdict.cause_N[dropped_M]]
            score_N[rows[dropped_M]] = verdict.score_N[dropped_M]
            dropped_by["near"][rows[dropped_M]] = True
            if verdict.reason_N is not None:
                why_N[rows] = verdict.reason_N
        survives_N = context.readable_N & ~context.benchmark_N & (cause_N < 0)
        columns = {"survives": survives_N, **dropped_by, "cause": cause_N, "score": score_N, "why": pa.array(why_N)}
        pq.write_table(pa.table(columns), folder / "verdict.parquet")
        x_MD = np.load(comparison / "vectors.npy", mmap_mode="r")
        pq.write_table(ledger.duplicate_groups(x_MD, rows, verdict), folder / "groups.parquet", compression="zstd")
        pq.write_table(_doubtful_pairs(look, rows, verdict), folder / DOUBTFUL, compression="zstd")
        run.write_json(folder / "threshold.json", run.read_json(comparison / "threshold.json") | {"search": search})
        return unit_counts(len(rows), int((verdict.cause_N < 0).sum()), near=int((verdict.cause_N >= 0).sum()))

    return context.run_single("duplicate", work, *inputs)


def look_at_all(
    context: CurationContext, comparison: Path, rows: ndarray, look: CloserLook | None
) -> tuple[dedup.Verdict, dict]:
    """Near-duplicates are images that a closer look verifies. Vectors add candidates to those looked at before."""
    assert look is not None
    config, threshold = context.config, run.read_json(comparison / "threshold.json")["threshold"]
    method, protected_M = join.resolve_method(config.search, len(rows)), keep_ranks(context)[1][rows]
    search, active = EdgeSearch(context, comparison, threshold, method), np.arange(len(rows))
    for round_number in range(config.rounds):
        found = 0
        if threshold < 1:
            edges = ((active[i], active[j], score) for i, j, score in search(active, round_number))
            found += look.look(look.without_groups(nearest_pairs(edges, config.candidates, len(rows))))
        if round_number:
            found += look.look(look.candidates(np.isin(np.arange(look.copies.count), active)))
        if not found and round_number:
            break
        active = look.distinct()
        if method == "exact" and not look.is_limited():
            break
    distinct = look.distinct()
    digests = equal.equal_pixels(context, rows[distinct])
    for digest in sorted({*digests.tolist()} - {""}):
        first, *others = distinct[digests == digest].tolist()
        for other in others:  # too even for a closer look
            look.copies.add(first, other, Match(np.eye(3), 0, 1.0, (1.0, 1.0)))
    verdict = look.decide(protected_M)
    dropped, looked = int((verdict.cause_N >= 0).sum()), len(look.checked)
    run.say(f"duplicate: {dropped:,} of {len(rows):,} images are copies, by a closer look at {looked:,} pairs")
    return verdict, {"by": method, "pairs": looked, "verified": look.copies.count_pairs()}


def _doubtful_pairs(look: CloserLook | None, rows: ndarray, verdict: dedup.Verdict) -> pa.Table:
    """Pairs of kept images that are perhaps copies, those that agree most first; at most MAX_DOUBTFUL of all pairs."""
    kept_M = verdict.cause_N < 0
    pairs = [] if look is None else [pair for pair in look.doubtful if kept_M[pair[1]] and kept_M[pair[2]]]
    values = [{"row": rows[i], "other": rows[j], "score": score, "why": why} for score, i, j, why in pairs]
    return pa.Table.from_pylist(values, DOUBTFUL_SCHEMA)


def nearest_pairs(edges: Iterator[dedup.Edges], limit: int, first_benchmark: int) -> Pairs:
    """The edges among the `limit` best of either image as candidates, as they are or mirrored."""
    parts = []
    for i, j, score in edges:
        votes = np.round(score.astype(np.float64) * 1e6).astype(np.int64)
        parts.append(Pairs(i.astype(np.int64), j.astype(np.int64), np.full(len(i), AS_IS_OR_MIRRORED, np.int8), votes))
    return most_voted(add_votes(parts, -1_000_000), limit, first_benchmark)[0]


def _by_cosine(
    context: CurationContext, comparison: Path, rows: ndarray, _: CloserLook | None
) -> tuple[dedup.Verdict, dict]:
    """Near-duplicates are images whose cosine is above the threshold."""
    config, threshold = context.config, run.read_json(comparison / "threshold.json")["threshold"]
    x_MD, method = np.load(comparison / "vectors.npy", mmap_mode="r"), join.resolve_method(config.search, len(rows))
    rank_N, protected_N = keep_ranks(context)
    protected_M = protected_N[rows]
    verdict = dedup.near_duplicates(
        x_MD, threshold, rank_N[rows], context.curated_N[rows], protected_M, config.recheck_above,
        find_edges=EdgeSearch(context, comparison, threshold, method),
        rounds=0 if threshold >= 1 else 1 if method == "exact" else config.rounds,
    )  # fmt: skip
    verdict = dedup.join_equal(verdict, _equal_among_kept(context, rows, verdict), rank_N[rows], protected_M)
    dropped_M = verdict.cause_N >= 0
    similarity = f"cosine above {threshold:.3f}"
    run.say(f"duplicate: {dropped_M.sum():,} of {len(rows):,} images resemble another, {similarity}")
    audited = None
    if method != "exact" and threshold < 1:
        audited = _audit(x_MD, threshold, dropped_M, protected_M, config.seed, context.device)
    return verdict, {"by": method, "still_alike": audited}


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
        device = context.device if self.method == "exact" else None  # other methods compute on processors
        work = _JoinPartitions(index, matrix, self.threshold, device)
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
        x_ND, index = np.load(self.matrix, mmap_mode="r"), join.load_index(self.index, accelerator(self.device))
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
    result = join.audit(x_MD[remaining], threshold, candidates, seed=seed, device=accelerator(device))
    interval = f"95 % interval {result.low:.2%} to {result.high:.2%}"
    similar = f"{result.similar:,} of {result.checked:,} remaining images still resemble another"
    run.say(f"audit: {similar} ({result.share:.2%}, {interval})")
    return {"looked_at": result.checked, "found": result.similar, "low": result.low, "high": result.high}
