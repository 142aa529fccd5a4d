"""Drawing from clusters: those in which curated images lie, or all of them evenly.

What is drawn depends on a seed and on the number of an image, never on how images were divided among workers.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from troodon.search.lists import kmeans, nearest

# Shape suffixes: N images, L clusters, D channels.

ITERATIONS, SAMPLED = 10, 100  # of k-means, and images for each cluster that it sees


def draw_order(rows: ndarray, seed: int) -> ndarray:
    """The order (N,) in which images are drawn: sorted by a hash of their number and the seed (splitmix64)."""
    with np.errstate(over="ignore"):
        z = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.lexsort((rows, z ^ (z >> np.uint64(31))))


@dataclass(frozen=True)
class Drawn:
    """Images drawn for curated sets, and the clusters that they come from: one record for each set and cluster."""

    rows: ndarray  # sorted
    dataset: ndarray  # of each cluster chosen
    cluster: ndarray
    hits: ndarray  # curated images of the set in it
    size: ndarray  # images of the pool in it
    taken: ndarray


def from_clusters(
    cluster_Q: ndarray,
    dataset_Q: ndarray,
    rows: ndarray,
    cluster_N: ndarray,
    *,
    more_than: int,
    most: int,
    cap: int,
    seed: int,
) -> Drawn:
    """From every cluster with `more_than` curated images of a set, up to `most` images, and `cap` for each set.

    `cluster_Q` and `dataset_Q` are those of the curated images; `rows` and `cluster_N` those of the pool. An image may
    be drawn for several sets. (https://arxiv.org/abs/2304.07193, appendix A.4: more than 3, 10,000 and a million.)
    """
    order = draw_order(rows, seed)
    order = order[np.argsort(cluster_N[order], kind="stable")]
    clusters = np.arange(int(max(cluster_N.max(initial=0), cluster_Q.max(initial=0))) + 2)
    starts = np.searchsorted(cluster_N[order], clusters)
    found, chosen = [], list[ndarray]()
    for dataset in np.unique(dataset_Q):
        hits = np.bincount(cluster_Q[dataset_Q == dataset], minlength=len(clusters))
        ours = np.flatnonzero(hits > more_than)
        parts = [order[starts[c] : min(starts[c + 1], starts[c] + most)] for c in ours]
        every = np.concatenate(parts) if parts else order[:0]
        kept = rows[every[draw_order(rows[every], seed)[:cap]]]
        at = np.searchsorted(ours, cluster_N[np.searchsorted(rows, np.sort(kept))])
        taken = np.bincount(at, minlength=len(ours))
        found.append((np.full(len(ours), dataset), ours, hits[ours], np.diff(starts)[ours], taken))
        chosen.append(kept)
    columns = [np.concatenate(column) for column in zip(*found)] if found else [np.zeros(0, np.int64)] * 5
    return Drawn(np.unique(np.concatenate(chosen)) if chosen else rows[:0], *columns)


def hierarchy(x_ND: ndarray, levels: tuple[int, ...], seed: int) -> list[ndarray]:
    """Clusters of images, clusters of these, and so on: for each level the cluster (L,) of everything one level below.

    A level has no more clusters than there is to cluster.
    """
    found, rows = list[ndarray](), x_ND
    for level, count in enumerate(levels):
        centroids_LD = kmeans(rows, min(count, len(rows)), seed + level, ITERATIONS, SAMPLED)
        found.append(nearest(rows, centroids_LD, 1)[1][:, 0].astype(np.int64))
        rows = centroids_LD
    return found


def shares(sizes: ndarray, target: int) -> ndarray:
    """How many to take of each of some groups so that it is `target` in all, as evenly as their sizes allow."""
    target = min(target, int(sizes.sum()))
    taken, left = np.zeros(len(sizes), np.int64), target
    order = np.argsort(sizes, kind="stable")
    for at, group in enumerate(order.tolist()):  # the smallest first: what they cannot give, the others do
        taken[group] = min(int(sizes[group]), left // (len(order) - at))
        left -= int(taken[group])
    return taken


def evenly(rows: ndarray, levels: list[ndarray], target: int, seed: int) -> ndarray:
    """`target` of these images, drawn evenly over the clusters of the highest level, in each over those below, and so
    on (the way of https://arxiv.org/abs/2405.15613). Sorted."""
    order = draw_order(rows, seed)
    quota = np.array([min(target, len(rows))], np.int64)
    parents = [*levels, np.zeros(int(levels[-1].max(initial=-1)) + 1, np.int64)]
    sizes = [np.ones(len(rows), np.int64)]
    for parent in parents:
        sizes.append(np.bincount(parent, weights=sizes[-1]).astype(np.int64))
    for level in range(len(parents) - 1, 0, -1):
        parent, given = parents[level], np.zeros(len(parents[level]), np.int64)
        of_parent = np.argsort(parent, kind="stable")
        starts = np.searchsorted(parent[of_parent], np.arange(len(quota) + 1))
        for at, share in enumerate(quota.tolist()):
            children = of_parent[starts[at] : starts[at + 1]]
            given[children] = shares(sizes[level][children], share)
        quota = given
    cluster = levels[0][order]
    by_cluster = np.argsort(cluster, kind="stable")
    start = np.searchsorted(cluster[by_cluster], cluster[by_cluster])
    place = np.arange(len(order)) - start
    return np.sort(rows[order[by_cluster[place < quota[cluster[by_cluster]]]]])
