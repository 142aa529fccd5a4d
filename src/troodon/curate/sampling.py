"""Sampling from clusters: from those that contain curated images, or evenly from all of them.

The sample depends on the seed and on the row numbers of images, never on how images are divided among workers.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from troodon.search.inverted_lists import kmeans, nearest_centroids

# Shape suffixes: N images, L clusters, D channels.

ITERATIONS, IMAGES_PER_CLUSTER = 10, 100  # of k-means: iterations, and training images per cluster


def draw_order(rows: ndarray, seed: int) -> ndarray:
    """Return the order (N,) in which images are drawn: sorted by a hash of row number and seed (splitmix64)."""
    with np.errstate(over="ignore"):
        z = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.lexsort((rows, z ^ (z >> np.uint64(31))))


@dataclass(frozen=True)
class ClusterSample:
    """Images drawn for curated sets, and the chosen clusters: one record per set and cluster."""

    rows: ndarray  # sorted
    dataset: ndarray  # the set that each cluster is chosen for
    cluster: ndarray
    hits: ndarray  # number of its curated images of the set
    size: ndarray  # number of its pool images
    taken: ndarray  # number of images drawn from it


def sample_clusters(
    cluster_Q: ndarray,
    dataset_Q: ndarray,
    rows: ndarray,
    cluster_N: ndarray,
    *,
    more_than: int,
    per_cluster: int,
    cap: int,
    seed: int,
) -> ClusterSample:
    """Draw at most `per_cluster` images from every cluster with more than `more_than` curated images of a set.

    At most `cap` images are drawn for one set. `cluster_Q` and `dataset_Q` belong to the curated images, `rows` and
    `cluster_N` to the pool. An image may be drawn for several sets. (https://arxiv.org/abs/2304.07193, appendix A.4:
    more than 3, 10,000 and a million.)
    """
    order = draw_order(rows, seed)
    order = order[np.argsort(cluster_N[order], kind="stable")]
    clusters = np.arange(int(max(cluster_N.max(initial=0), cluster_Q.max(initial=0))) + 2)
    starts = np.searchsorted(cluster_N[order], clusters)
    records, drawn = [], list[ndarray]()
    for dataset in np.unique(dataset_Q):
        hits = np.bincount(cluster_Q[dataset_Q == dataset], minlength=len(clusters))
        chosen = np.flatnonzero(hits > more_than)
        parts = [order[starts[c] : min(starts[c + 1], starts[c] + per_cluster)] for c in chosen]
        candidates = np.concatenate(parts) if parts else order[:0]
        sample = rows[candidates[draw_order(rows[candidates], seed)[:cap]]]
        record = np.searchsorted(chosen, cluster_N[np.searchsorted(rows, np.sort(sample))])
        taken = np.bincount(record, minlength=len(chosen))
        records.append((np.full(len(chosen), dataset), chosen, hits[chosen], np.diff(starts)[chosen], taken))
        drawn.append(sample)
    columns = [np.concatenate(column) for column in zip(*records)] if records else [np.zeros(0, np.int64)] * 5
    return ClusterSample(np.unique(np.concatenate(drawn)) if drawn else rows[:0], *columns)


def hierarchical_kmeans(x_ND: ndarray, levels: tuple[int, ...], seed: int) -> list[ndarray]:
    """Cluster images, then the clusters, and so on: for each level the cluster (L,) of every item one level below.

    A level has no more clusters than items.
    """
    clusters, rows = list[ndarray](), x_ND
    for level, count in enumerate(levels):
        centroids_LD = kmeans(rows, min(count, len(rows)), seed + level, ITERATIONS, IMAGES_PER_CLUSTER)
        clusters.append(nearest_centroids(rows, centroids_LD, 1)[1][:, 0].astype(np.int64))
        rows = centroids_LD
    return clusters


def balanced_quotas(sizes: ndarray, target: int) -> ndarray:
    """Divide `target` among groups of these sizes, as evenly as the sizes allow: the quota of each group."""
    remaining = min(target, int(sizes.sum()))
    quotas = np.zeros(len(sizes), np.int64)
    order = np.argsort(sizes, kind="stable")
    for done, group in enumerate(order.tolist()):  # the smallest first: the larger groups supply what they lack
        quotas[group] = min(int(sizes[group]), remaining // (len(order) - done))
        remaining -= int(quotas[group])
    return quotas


def sample_hierarchy(rows: ndarray, levels: list[ndarray], target: int, seed: int) -> ndarray:
    """Draw `target` of these images evenly over the clusters of the highest level, within each evenly over the clusters
    below, and so on (as in https://arxiv.org/abs/2405.15613). Returns sorted rows."""
    order = draw_order(rows, seed)
    quota = np.array([min(target, len(rows))], np.int64)
    parents = [*levels, np.zeros(int(levels[-1].max(initial=-1)) + 1, np.int64)]
    sizes = [np.ones(len(rows), np.int64)]
    for parent in parents:
        sizes.append(np.bincount(parent, weights=sizes[-1]).astype(np.int64))
    for level in range(len(parents) - 1, 0, -1):
        parent, child_quota = parents[level], np.zeros(len(parents[level]), np.int64)
        by_parent = np.argsort(parent, kind="stable")
        starts = np.searchsorted(parent[by_parent], np.arange(len(quota) + 1))
        for number, parent_quota in enumerate(quota.tolist()):
            children = by_parent[starts[number] : starts[number + 1]]
            child_quota[children] = balanced_quotas(sizes[level][children], parent_quota)
        quota = child_quota
    cluster = levels[0][order]
    by_cluster = np.argsort(cluster, kind="stable")
    start = np.searchsorted(cluster[by_cluster], cluster[by_cluster])
    position = np.arange(len(order)) - start
    return np.sort(rows[order[by_cluster[position < quota[cluster[by_cluster]]]]])
