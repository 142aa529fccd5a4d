"""Gather from the remaining images: the nearest to curated ones, clusters that contain these, an even sample, or all.

look-alikes    vectors of all remaining images
retrieve       hits of curated images, some queries at a time
cluster        centroids from a sample
assign         the cluster of each remaining image, some images at a time
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
from troodon.curate.context import AssignProbes, CurationContext, row_ranges, write_mapped
from troodon.curate.embed import load_embeddings
from troodon.curate.retrieve import Hits, fill_hits
from troodon.curate.sampling import (
    IMAGES_PER_CLUSTER,
    ITERATIONS,
    ClusterSample,
    hierarchical_kmeans,
    sample_clusters,
    sample_hierarchy,
)
from troodon.curate.stage import Counts, unit_counts
from troodon.devices import accelerator
from troodon.search.exact import top_k
from troodon.search.inverted_lists import kmeans

QUERIES_PER_UNIT = 16_384
FILL_DEPTH = 8  # hits per wanted image for collisions="fill", since other queries may get some of them
HIT_TYPES = {"query": pa.int64(), "rank": pa.int32(), "row": pa.int64(), "score": pa.float32()}
CLUSTER_COLUMNS = ("dataset", "cluster", "hits", "size", "taken")


@dataclass(frozen=True)
class _Remaining:
    """The images that remain after all steps: curated ones are queries, the others are candidates."""

    rows: ndarray  # of the index
    queries: ndarray  # positions in `rows`
    candidates: ndarray  # positions in `rows`
    dataset_Q: ndarray  # number of the curated set of each query
    by_sample: ndarray  # bool, for each curated set: retrieve its neighbours; otherwise draw from clusters
    k_Q: ndarray  # number of images to retrieve

    @property
    def by_sample_Q(self) -> ndarray:
        return self.by_sample[self.dataset_Q]

    @staticmethod
    def load(context: CurationContext, verdicts: Path) -> "_Remaining":
        config, datasets = context.config, context.datasets
        rows = np.flatnonzero(pq.read_table(verdicts / "verdict.parquet")["survives"].to_numpy())
        curated_M = context.curated_N[rows]
        queries, candidates = np.flatnonzero(curated_M), np.flatnonzero(~curated_M)
        ends = np.cumsum([size for _, size in datasets])
        dataset_Q = np.searchsorted(ends, rows[queries], side="right")
        is_auto = config.gather == "auto"
        by_sample = [config.gather == "sample" or (is_auto and size > config.large) for _, size in datasets]
        k = [config.k_for(name) for name, _ in datasets]
        k_Q = np.array(k, np.int64)[dataset_Q]
        return _Remaining(rows, queries, candidates, dataset_Q, np.array(by_sample, bool), k_Q)


def gather(context: CurationContext, embeddings: Path, verdicts: Path) -> Path:
    """Choose the images that are kept. Writes drawn.npy (rows), hits.parquet and clusters.parquet."""
    names = ("gather", "retrieve_space", "k", "k_of", "min_similarity", "collisions", "large", "clusters", "more_than",
             "per_cluster", "cap", "target", "levels", "seed")  # fmt: skip
    config, inputs = context.config, (context.config.recorded(*names), verdicts.parent.name, context.datasets)
    remaining = _Remaining.load(context, verdicts)
    vectors, parts, cluster_M = Path(), list[Path](), None
    if config.gather != "all":
        vectors = _write_vectors(context, embeddings, remaining, verdicts)
    if remaining.by_sample_Q.any() and len(remaining.candidates):
        queries = remaining.queries[remaining.by_sample_Q]
        depth = int(remaining.k_Q.max()) * (FILL_DEPTH if config.collisions == "fill" else 1)
        work = _RetrieveHits(vectors, queries, remaining.candidates, depth, context.device)
        parts = context.run_units("retrieve", work, row_ranges(len(queries), QUERIES_PER_UNIT), *inputs)
    if len(remaining.candidates) and config.gather in ("cluster", "auto") and not remaining.by_sample.all():
        cluster_M = _assign_clusters(context, vectors, remaining.candidates, inputs)

    def choose(folder: Path) -> Counts:
        hits = _select_hits(context, remaining, parts)
        if cluster_M is not None:
            sample = _sample_clusters(context, remaining, cluster_M)
            drawn = sample.rows
            _write_clusters(context, sample, folder / "clusters.parquet")
        else:
            drawn = _draw(context, remaining, vectors)
        np.save(folder / "drawn.npy", drawn)
        columns = {n: pa.array(v, t) for (n, t), v in zip(HIT_TYPES.items(), vars(hits).values())}
        pq.write_table(pa.table(columns), folder / "hits.parquet", compression="zstd")
        candidates, kept = len(remaining.candidates), len(np.union1d(drawn, hits.row_H))
        return unit_counts(candidates, kept, not_gathered=candidates - kept)

    return context.run_single("gather", choose, *inputs)


def _write_vectors(context: CurationContext, embeddings: Path, remaining: _Remaining, verdicts: Path) -> Path:
    """Write the vectors of all remaining images in the space of retrieval."""
    kind = context.config.retrieve_space

    def work(folder: Path) -> Counts:
        x_ND = load_embeddings(embeddings)[0]
        write_mapped(x_ND, space.fit(kind, x_ND, remaining.rows), remaining.rows, folder / "vectors.npy")
        return unit_counts(len(remaining.rows))

    return context.run_single("look-alikes", work, kind, verdicts.parent.name) / "vectors.npy"


def _assign_clusters(context: CurationContext, vectors: Path, candidates: ndarray, inputs: tuple) -> ndarray:
    """Cluster the candidates; return the cluster of each remaining image."""
    config = context.config

    def train(folder: Path) -> Counts:
        x_ND = np.load(vectors, mmap_mode="r")[candidates]
        centroids = kmeans(x_ND, config.clusters, config.seed, ITERATIONS, IMAGES_PER_CLUSTER)
        np.save(folder / "centroids.npy", centroids)
        return unit_counts(len(candidates))

    trained = context.run_single("cluster", train, *inputs)
    assign = AssignProbes(vectors, trained / "centroids.npy", 1)
    parts = context.run_units("assign", assign, row_ranges(len(np.load(vectors, mmap_mode="r"))), *inputs)
    return np.concatenate([np.load(part / "lists.npy")[:, 0] for part in parts]).astype(np.int32)


def _select_hits(context: CurationContext, remaining: _Remaining, parts: list[Path]) -> Hits:
    """Return the hits that are similar enough, k for each query."""
    config, hits = context.config, _read_hits(parts, remaining.rows)
    if not len(hits.row_H):
        return hits
    k_H = remaining.k_Q[np.searchsorted(remaining.rows[remaining.queries], hits.query_H)]
    near_H = hits.score_H >= config.min_similarity
    hits, k_H = Hits(*(column[near_H] for column in vars(hits).values())), k_H[near_H]
    if config.collisions == "fill":
        return fill_hits(hits, k_H)
    return Hits(*(column[hits.rank_H <= k_H] for column in vars(hits).values()))


def _sample_clusters(context: CurationContext, remaining: _Remaining, cluster_M: ndarray) -> ClusterSample:
    """Draw candidates from the clusters of those queries that are not retrieved for."""
    config, by_cluster_Q = context.config, ~remaining.by_sample_Q
    cluster_Q, dataset_Q = cluster_M[remaining.queries[by_cluster_Q]], remaining.dataset_Q[by_cluster_Q]
    sample = sample_clusters(
        cluster_Q, dataset_Q, remaining.rows[remaining.candidates], cluster_M[remaining.candidates],
        more_than=config.more_than, per_cluster=config.per_cluster, cap=config.cap, seed=config.seed,
    )  # fmt: skip
    small, wanted = int((sample.size < config.per_cluster).sum()), f"{config.per_cluster:,}"
    run.say(f"cluster: {len(sample.cluster):,} clusters chosen, {small:,} of them with fewer than {wanted} images")
    return sample


def _draw(context: CurationContext, remaining: _Remaining, vectors: Path) -> ndarray:
    """Return the rows drawn without curated images: all candidates, an even sample, or none."""
    config, rows = context.config, remaining.rows[remaining.candidates]
    if config.gather == "all":
        return rows
    if config.gather != "balance" or not len(rows):
        return rows[:0]
    levels = hierarchical_kmeans(np.load(vectors, mmap_mode="r")[remaining.candidates], config.levels, config.seed)
    return sample_hierarchy(rows, levels, config.target or max(1, len(rows) // 2), config.seed)


def _write_clusters(context: CurationContext, sample: ClusterSample, path: Path) -> None:
    names = np.array([name for name, _ in context.datasets], object)[sample.dataset.astype(int)]
    columns = {"dataset": pa.array(names, pa.string())} | {n: getattr(sample, n) for n in CLUSTER_COLUMNS[1:]}
    pq.write_table(pa.table(columns), path)


@dataclass(frozen=True)
class _RetrieveHits:
    """Retrieves the hits of some queries, as positions among the remaining images."""

    vectors: Path
    queries: ndarray
    candidates: ndarray
    k: int
    device: Any

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        x_MD, queries = np.load(self.vectors, mmap_mode="r"), self.queries[slice(*unit)]
        base: Any = _RowView(x_MD, self.candidates)
        score_Qk, index_Qk = top_k(x_MD[queries], base, self.k, device=accelerator(self.device))
        np.savez(folder / "hits.npz", query=queries, row=self.candidates[index_Qk], score=score_Qk)
        return unit_counts(len(queries))


@dataclass(frozen=True)
class _RowView:
    """Some rows of a memory-mapped matrix. Rows are read when they are indexed."""

    x_ND: ndarray
    rows: ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.x_ND.shape[1]

    def __getitem__(self, part: slice) -> ndarray:
        return self.x_ND[self.rows[part]]


def _read_hits(parts: list[Path], rows: ndarray) -> Hits:
    """Read the hits of all units and convert positions to rows of the index."""
    query, rank, row, score = ([np.zeros(0, dtype)] for dtype in (np.int64, np.int32, np.int64, np.float32))
    for part in parts:
        with np.load(part / "hits.npz") as hits:
            index_Qk = hits["row"]
            query.append(np.repeat(rows[hits["query"]], index_Qk.shape[1]))
            rank.append(np.tile(np.arange(1, index_Qk.shape[1] + 1, dtype=np.int32), len(index_Qk)))
            row.append(rows[index_Qk.ravel()])
            score.append(hits["score"].ravel())
    return Hits(*(np.concatenate(column) for column in (query, rank, row, score)))
