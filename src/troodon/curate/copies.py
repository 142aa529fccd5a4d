"""The steps that take copies out of a pool, as stages: exact, hash, duplicate. Each writes a verdict; the step
"benchmark" is in leak.py.

compare     byte-identical files and equal hashes; vectors of what is left; the threshold and its calibration
centres, probes, layout, join    edges between these vectors (search/join.py), one round after the other; the first
            two only by lists, and from the second round on `among`, the vectors of those that stay
duplicate   their groups, who stays of each, and how many are still alike
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
from troodon.curate import compose, dedup, space
from troodon.curate.finder import Finder
from troodon.curate.hashes import near_hashes
from troodon.curate.pool import Assign, Pool, mapped, ranges
from troodon.curate.stage import Counts, counted, joined
from troodon.curate.thresholds import thresholds
from troodon.search import join
from troodon.search.lists import Lists, count_for, kmeans

LISTS = 64  # partitions of a layout that are one unit
EDGES = pa.schema([("i", pa.int64()), ("j", pa.int64()), ("score", pa.float32())])


def compare(pool: Pool, embeddings: Path, finder: Finder) -> Path:
    """The steps "exact" and "hash", and all that the step "duplicate" needs."""
    names = ("steps", "within_curated", "hash_radius", "duplicate_space", "threshold", "false_merges",
             "calibration_images", "benchmark_threshold", "benchmark_false_merges", "disguises", "seed")  # fmt: skip
    config = pool.config

    def work(folder: Path) -> Counts:
        x_ND = finder.stored(embeddings)
        cause_N, score_N = np.full(len(x_ND), -1, np.int64), np.full(len(x_ND), np.nan, np.float32)
        rank_N, protected_N = order(pool)
        why = {kind: np.zeros(len(x_ND), bool) for kind in ("exact", "hash")}
        rows = np.flatnonzero(pool.readable_N & ~pool.benchmark_N)
        before = len(rows)
        if "exact" in config.steps:
            digests = pool.images["sha256"].take(pa.array(rows)).combine_chunks().dictionary_encode().indices.to_numpy()
            cause = dedup.identical(digests, rank_N[rows], protected_N[rows])
            gone = rows[cause >= 0]
            cause_N[gone], score_N[gone], why["exact"][gone] = rows[cause[cause >= 0]], 1.0, True
            run.say(f"exact: {len(gone):,} of {len(rows):,} images are byte-identical to another")
            rows = rows[cause < 0]
        if "hash" in config.steps:
            gone, cause, score = _alike(pool, rows, rank_N, protected_N)
            cause_N[gone], score_N[gone], why["hash"][gone] = cause, score, True
            run.say(
                f"hash: {len(gone):,} of {len(rows):,} images are within {config.hash_radius} bits of one that stays"
            )
            rows = np.setdiff1d(rows, gone, assume_unique=True)
        fitted = space.fit(config.duplicate_space, x_ND, rows)
        fitted.save(folder / "space.npz")
        mapped(x_ND, fitted, rows, folder / "vectors.npy")
        shown = np.flatnonzero(pool.readable_N & pool.benchmark_N)
        mapped(x_ND, fitted, shown, folder / "benchmark.npy")
        np.save(folder / "rows.npy", rows)
        np.save(folder / "shown.npy", shown)
        pq.write_table(pa.table(why | {"cause": cause_N, "score": score_N}), folder / "verdict.parquet")
        x_MD = np.load(folder / "vectors.npy", mmap_mode="r")
        run.write_json(folder / "threshold.json", thresholds(pool, rows, x_MD, finder, fitted, len(shown)))
        return counted(before, len(rows), **{kind: int(gone_N.sum()) for kind, gone_N in why.items()})

    return pool.here("compare", work, pool.settings(*names), finder.fingerprint, pool.curated, pool.uncurated)


def duplicates(pool: Pool, compared: Path) -> Path:
    """The step "duplicate": for every image whether it survives, and if not, for whose sake."""
    names = ("steps", "recheck_above", "search", "rounds", "seed", "within_curated")
    config, made_from = pool.config, (pool.settings(*names), compared.parent.name)

    def work(folder: Path) -> Counts:
        said, rows = run.read_json(compared / "threshold.json"), np.load(compared / "rows.npy")
        x_MD = np.load(compared / "vectors.npy", mmap_mode="r")
        verdict = pq.read_table(compared / "verdict.parquet")
        cause_N, score_N = verdict["cause"].to_numpy().copy(), verdict["score"].to_numpy().copy()
        why = {name: verdict[name].to_numpy().copy() for name in ("exact", "hash")} | {
            "near": np.zeros(len(cause_N), bool)
        }
        how, residual = join.chosen(config.search, len(rows)), None
        nothing = dedup.Verdict(*np.full((3, len(rows)), -1))
        found = nothing
        if "duplicate" in config.steps:
            rank_N, protected_N = order(pool)
            rank, protected = rank_N[rows], protected_N[rows]
            found = dedup.near_duplicates(
                x_MD, said["threshold"], rank, pool.curated_N[rows], protected, config.recheck_above,
                edges=Join(pool, compared, said["threshold"], how),
                rounds=1 if how == "exact" else config.rounds,
            )  # fmt: skip
            gone = found.cause_N >= 0
            cause_N[rows[gone]], score_N[rows[gone]] = rows[found.cause_N[gone]], found.score_N[gone]
            why["near"][rows[gone]] = True
            above_what = f"cosine above {said['threshold']:.3f}"
            run.say(f"duplicate: {gone.sum():,} of {len(rows):,} images resemble another, {above_what}")
            if how != "exact":
                residual = _audit(x_MD, said["threshold"], gone, protected, config.seed, pool.device)
        survives_N = pool.readable_N & ~pool.benchmark_N & (cause_N < 0)
        columns = {"survives": survives_N, **why, "cause": cause_N, "score": score_N}
        pq.write_table(pa.table(columns), folder / "verdict.parquet")
        pq.write_table(compose.groups(x_MD, rows, found), folder / "groups.parquet", compression="zstd")
        run.write_json(folder / "threshold.json", said | {"search": {"by": how, "still_alike": residual}})
        return counted(len(rows), int((found.cause_N < 0).sum()), near=int((found.cause_N >= 0).sum()))

    return pool.here("duplicate", work, *made_from)


def order(pool: Pool) -> tuple[ndarray, ndarray]:
    """The rank by the keep rule of every image, and which of them stay whatever they resemble."""
    width_N, height_N, bytes_N = (pool.images[c].fill_null(0).to_numpy() for c in ("width", "height", "length"))
    rank_N = dedup.keep_order(pool.curated_N, width_N * height_N, bytes_N)
    return rank_N, pool.curated_N if pool.config.within_curated == "keep" else np.zeros_like(pool.curated_N)


@dataclass(frozen=True)
class Join:
    """Edges among compared images, found by the engine: called with rows and the round, as dedup.py asks."""

    pool: Pool
    compared: Path
    threshold: float
    how: Any

    def __call__(self, rows: ndarray, turn: int) -> Iterator[dedup.Edges]:
        seed, every = self.pool.config.seed + turn, np.load(self.compared / "vectors.npy", mmap_mode="r")
        among = hashlib.sha256(rows.tobytes()).hexdigest() if len(rows) < len(every) else "all"
        made_from = (self.compared.parent.name, self.how, seed, among)

        matrix = self.compared / "vectors.npy"
        if len(rows) < len(every):
            matrix = self.pool.here("among", lambda folder: _among(every, rows, folder), *made_from) / "vectors.npy"
        parts = list[Path]()
        if self.how == "lists" and len(rows):  # which of them each row is near takes long, and is shared out
            centres = self.pool.here("centres", lambda folder: _centres(matrix, seed, folder), *made_from)
            parts = self.pool.spread("probes", Assign(matrix, centres / "centroids.npy"), ranges(len(rows)), *made_from)

        def lay_out(folder: Path) -> Counts:
            x_MD = np.load(matrix, mmap_mode="r")
            if parts:
                told, lists = folder / "lists.npy", len(np.load(centres / "centroids.npy", mmap_mode="r"))
                joined(parts, told)
                Lists.by(x_MD, np.load(told, mmap_mode="r"), lists, folder)
                told.unlink()
            else:
                join.lay_out(x_MD, self.how, seed, folder=folder)
            return counted(len(rows))

        laid = self.pool.here("layout", lay_out, *made_from)
        size = 1 if self.how == "exact" else LISTS
        units = ranges(len(join.load(laid)), size)
        work = _Find(laid, matrix, self.threshold, self.pool.device)
        yield from read_edges(self.pool.spread("join", work, units, self.threshold, *made_from))


def _among(every_ND: ndarray, rows: ndarray, folder: Path) -> Counts:
    mapped(every_ND, space.Space(), rows, folder / "vectors.npy")
    return counted(len(rows))


def _centres(matrix: Path, seed: int, folder: Path) -> Counts:
    x_ND = np.load(matrix, mmap_mode="r")
    np.save(folder / "centroids.npy", kmeans(x_ND, count_for(len(x_ND)), seed))
    return counted(len(x_ND))


@dataclass(frozen=True)
class _Find:
    """The edges of partitions (first, last) of a layout."""

    laid: Path
    matrix: Path
    threshold: float
    device: Any

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        x_ND, layout = np.load(self.matrix, mmap_mode="r"), join.load(self.laid, self.device)
        return write_edges(folder, (tile for at in range(*unit) for tile in layout.near(x_ND, self.threshold, at)))


def write_edges(folder: Path, edges: Iterator[dedup.Edges]) -> Counts:
    total = 0
    with pq.ParquetWriter(folder / "edges.parquet", EDGES, compression="zstd") as writer:
        for tile in edges:
            if len(tile[0]):
                writer.write_table(pa.table(list(tile), schema=EDGES))
                total += len(tile[0])
    return counted(total)


def read_edges(parts: list[Path]) -> Iterator[dedup.Edges]:
    for part in parts:
        with pq.ParquetFile(part / "edges.parquet") as file:
            for batch in file.iter_batches(1 << 20):
                i, j, score = (column.to_numpy() for column in batch.columns)
                yield i, j, score


def _alike(pool: Pool, rows: ndarray, rank_N: ndarray, protected_N: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Rows that go for equal hashes, for whose sake, and the share of bits that are the same."""
    column = pool.images["hash"].take(pa.array(rows))
    known = np.flatnonzero(column.is_valid().to_numpy())
    hash_M = column.fill_null(0).to_numpy()[known]
    rows, edges = rows[known], list(near_hashes(hash_M, pool.config.hash_radius))
    label_M = dedup.components(len(rows), edges)
    best = np.lexsort((rank_N[rows], label_M))
    starts = np.flatnonzero(np.r_[True, np.diff(label_M[best]) > 0][: len(best)])
    head_M = np.empty(len(rows), np.int64)
    head_M[best] = np.repeat(best[starts], np.diff(np.r_[starts, len(best)]))
    bits_M = np.bitwise_count(hash_M ^ hash_M[head_M])
    # Hashes chain as embeddings do: whoever differs from the kept one in more bits stays.
    gone = (head_M != np.arange(len(rows))) & (bits_M <= pool.config.hash_radius) & ~protected_N[rows]
    return rows[gone], rows[head_M[gone]], (1 - bits_M[gone] / 64).astype(np.float32)


def _audit(x_MD: ndarray, threshold: float, gone_M: ndarray, protected_M: ndarray, seed: int, device: Any) -> dict:
    """How many survivors still resemble another, by exact search for some of them."""
    stay = np.flatnonzero(~gone_M)
    left = join.audit(x_MD[stay], threshold, np.flatnonzero(~protected_M[stay]), seed=seed, device=device)
    interval = f"95 % interval {left.low:.2%} to {left.high:.2%}"
    run.say(
        f"audit: {left.found:,} of {left.looked_at:,} survivors still resemble another ({left.share:.2%}, {interval})"
    )
    return {"looked_at": left.looked_at, "found": left.found, "low": left.low, "high": left.high}
