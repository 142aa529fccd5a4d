"""What is gathered from images that survive: the nearest to curated ones, clusters of these, an even spread, or all.

look-alikes    vectors of all survivors
retrieve       hits of curated images, some queries at a time
cluster        centroids from a sample, and the cluster of each survivor, some at a time
gather         which images are kept, and why
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from troodon import run
from troodon.curate import space
from troodon.curate.balance import ITERATIONS, SAMPLED, evenly, from_clusters, hierarchy
from troodon.curate.embed import load
from troodon.curate.pool import Assign, Pool, mapped, ranges
from troodon.curate.retrieve import Hits, fill
from troodon.curate.stage import Counts, counted
from troodon.search.exact import top_k
from troodon.search.lists import kmeans

QUERIES = 16_384  # of one unit
DEEPER = 8  # times as many hits are looked at as are wanted, where images may be taken already
NO_HITS = {"query": pa.int64(), "rank": pa.int32(), "row": pa.int64(), "score": pa.float32()}
CLUSTERS = ("dataset", "cluster", "hits", "size", "taken")


def gather(pool: Pool, embeddings: Path, settled: Path) -> Path:
    """For every survivor of the pool whether it is kept. Writes drawn.npy (rows), hits.parquet and clusters.parquet."""
    names = ("gather", "retrieve_space", "k", "k_of", "minimum", "collisions", "large", "clusters", "more_than",
             "per_cluster", "cap", "target", "levels", "seed")  # fmt: skip
    config, made_from = pool.config, (pool.settings(*names), settled.parent.name, pool.datasets)
    survivors = np.flatnonzero(pq.read_table(settled / "verdict.parquet")["survives"].to_numpy())
    curated_M = pool.curated_N[survivors]
    candidates, queries = np.flatnonzero(~curated_M), np.flatnonzero(curated_M)
    ends = np.cumsum([size for _, size in pool.datasets])
    dataset_Q = np.searchsorted(ends, survivors[queries], side="right")
    by_sample = np.array([config.gather == "sample" or size > config.large for _, size in pool.datasets], bool)
    if config.gather not in ("sample", "auto"):
        by_sample[:] = False
    asking = queries[by_sample[dataset_Q]]

    def look(folder: Path) -> Counts:
        x_ND = load(embeddings)[0]
        mapped(x_ND, space.fit(config.retrieve_space, x_ND, survivors), survivors, folder / "vectors.npy")
        return counted(len(survivors))

    spreads = config.gather != "all"
    looked = pool.here("look-alikes", look, config.retrieve_space, settled.parent.name) if spreads else None
    k_Q = (
        np.array([config.k_for(name) for name, _ in pool.datasets], np.int64)[dataset_Q] if len(queries) else dataset_Q
    )
    parts = list[Path]()
    if len(asking) and len(candidates):
        deep = int(k_Q.max()) * (DEEPER if config.collisions == "fill" else 1)
        work = _Retrieve(looked / "vectors.npy", asking, candidates, deep, pool.device)  # type: ignore[operator]
        parts = pool.spread("retrieve", work, ranges(len(asking), QUERIES), *made_from)
    clusters = None
    if len(candidates) and (config.gather == "cluster" or (config.gather == "auto" and not by_sample.all())):
        clusters = _clusters(pool, looked / "vectors.npy", candidates, made_from)  # type: ignore[operator]

    def work(folder: Path) -> Counts:
        hits = _hits(parts, survivors)
        k_H = np.zeros(0, np.int64)
        if len(hits.row_H):
            k_H = k_Q[np.searchsorted(survivors[queries], hits.query_H)]
            near = hits.score_H >= config.minimum
            hits, k_H = Hits(*(column[near] for column in vars(hits).values())), k_H[near]
            if config.collisions == "fill":
                hits = fill(hits, k_H)
            else:
                hits = Hits(*(column[hits.rank_H <= k_H] for column in vars(hits).values()))
        drawn, records = survivors[:0], None
        if config.gather == "all":
            drawn = survivors[candidates]
        elif config.gather == "balance" and len(candidates):
            x_MD = np.load(looked / "vectors.npy", mmap_mode="r")[candidates]  # type: ignore[operator]
            levels = hierarchy(x_MD, config.levels, config.seed)
            target = config.target or len(candidates) // 2
            drawn = evenly(survivors[candidates], levels, target, config.seed)
        elif clusters is not None and len(candidates):
            mine = ~by_sample[dataset_Q]
            records = from_clusters(
                clusters[queries[mine]], dataset_Q[mine], survivors[candidates], clusters[candidates],
                more_than=config.more_than, most=config.per_cluster, cap=config.cap, seed=config.seed,
            )  # fmt: skip
            drawn = records.rows
            short = int((np.minimum(config.per_cluster, records.size) < config.per_cluster).sum())
            run.say(
                f"cluster: {len(records.cluster):,} clusters chosen, {short:,} of them have fewer images than wanted"
            )
        np.save(folder / "drawn.npy", drawn)
        columns = zip(NO_HITS.items(), vars(hits).values())
        pq.write_table(
            pa.table({n: pa.array(v, t) for (n, t), v in columns}), folder / "hits.parquet", compression="zstd"
        )
        if records is not None:
            named = np.array([name for name, _ in pool.datasets], object)[records.dataset.astype(int)]
            table = {"dataset": pa.array(named, pa.string())} | {n: getattr(records, n) for n in CLUSTERS[1:]}
            pq.write_table(pa.table(table), folder / "clusters.parquet")
        kept = len(np.union1d(drawn, hits.row_H))
        return counted(len(candidates), kept, not_gathered=len(candidates) - kept)

    return pool.here("gather", work, *made_from)


def _clusters(pool: Pool, vectors: Path, candidates: ndarray, made_from: tuple) -> ndarray:
    """The cluster of each survivor."""
    config = pool.config

    def train(folder: Path) -> Counts:
        x_MD = np.load(vectors, mmap_mode="r")
        np.save(folder / "centroids.npy", kmeans(x_MD[candidates], config.clusters, config.seed, ITERATIONS, SAMPLED))
        return counted(len(candidates))

    trained = pool.here("cluster", train, *made_from)
    count = len(np.load(vectors, mmap_mode="r"))
    parts = pool.spread("assign", Assign(vectors, trained / "centroids.npy", 1), ranges(count), *made_from)
    return np.concatenate([np.load(part / "lists.npy")[:, 0] for part in parts]).astype(np.int32)


@dataclass(frozen=True)
class _Retrieve:
    """The hits of some queries, as places among the survivors."""

    vectors: Path
    queries: ndarray
    candidates: ndarray
    k: int
    device: Any

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        x_MD, queries = np.load(self.vectors, mmap_mode="r"), self.queries[slice(*unit)]
        score_Qk, place_Qk = top_k(x_MD[queries], _Rows(x_MD, self.candidates), self.k, device=self.device)  # type: ignore[arg-type]
        np.savez(folder / "hits.npz", query=queries, row=self.candidates[place_Qk], score=score_Qk)
        return counted(len(queries))


@dataclass(frozen=True)
class _Rows:
    """Some rows of a mapped matrix, read only as they are asked for."""

    x_ND: ndarray
    rows: ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.x_ND.shape[1]

    def __getitem__(self, part: slice) -> ndarray:
        return self.x_ND[self.rows[part]]


def _hits(parts: list[Path], survivors: ndarray) -> Hits:
    """The hits of all units, as rows of the index."""
    query, rank, row, score = ([np.zeros(0, kind)] for kind in (np.int64, np.int32, np.int64, np.float32))
    for part in parts:
        with np.load(part / "hits.npz") as found:
            place_Qk = found["row"]
            query.append(np.repeat(survivors[found["query"]], place_Qk.shape[1]))
            rank.append(np.tile(np.arange(1, place_Qk.shape[1] + 1, dtype=np.int32), len(place_Qk)))
            row.append(survivors[place_Qk.ravel()])
            score.append(found["score"].ravel())
    return Hits(*(np.concatenate(column) for column in (query, rank, row, score)))
