"""Near-duplicates: which images are copies of one another, and which one of them stays.

Pairs above a threshold, their connected components, one image kept of each (https://arxiv.org/abs/2304.07193,
appendix A.3); whoever goes is told for whose sake. Components chain: A resembles B and B resembles C, while A and C
are different pictures. In a component of more than a few images each must therefore resemble the kept one itself;
the best of those that do not is kept too, and so on until each is kept or resembles one that is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from troodon.search.exact import above, cosines, pairs_above, top_k

# Shape suffixes: N images, M images of one component in the order of the keep rule, D channels.

BLOCK = 1024  # members of a component that are compared at once

Edges = tuple[ndarray, ndarray, ndarray]  # rows i < j and their cosine, see search/join.py
EdgesOf = Callable[[ndarray, int], Iterable[Edges]]


@dataclass(frozen=True)
class Verdict:
    """What became of N images. A cause is the row of the image kept in its place, -1 for what stays."""

    cause_N: ndarray  # int64
    score_N: ndarray  # float32 cosine with the cause; nan for what stays
    group_N: ndarray  # int64, of near-duplicates the first row by the keep rule; -1 for what resembles nothing


def keep_order(curated_N: ndarray, area_N: ndarray, bytes_N: ndarray) -> ndarray:
    """Rank of each image, 0 is kept first: curated, then the largest area, then most bytes, then the lowest row."""
    rank_N = np.empty(len(area_N), np.int64)
    rank_N[np.lexsort((np.arange(len(area_N)), -bytes_N, -area_N, ~curated_N))] = np.arange(len(area_N))
    return rank_N


def identical(digests: Sequence[str] | ndarray, rank_N: ndarray, protected_N: ndarray) -> ndarray:
    """For each image the row kept in its place (N,) int64, -1 if it stays: images with the same digest are one."""
    _, kind_N = np.unique(np.asarray(digests), return_inverse=True)
    order_N = np.lexsort((rank_N, kind_N))
    new_N = np.r_[True, np.diff(kind_N[order_N]) > 0][: len(order_N)]
    cause_N = np.empty(len(order_N), np.int64)
    cause_N[order_N] = order_N[np.flatnonzero(new_N)][np.cumsum(new_N) - 1]
    return np.where(protected_N | (cause_N == np.arange(len(order_N))), -1, cause_N)


def near_duplicates(
    x_ND: ndarray,
    threshold: float,
    rank_N: ndarray,
    curated_N: ndarray,
    protected_N: ndarray,
    recheck_above: int,
    *,
    edges: EdgesOf | None = None,
    rounds: int = 1,
) -> Verdict:
    """Find near-duplicates, cosine above `threshold`, and keep one of each group by `rank_N` (see `keep_order`).

    `protected_N` (bool) are kept whatever they resemble. Components of more than `recheck_above` are rechecked.
    `edges(rows, round)` gives the edges among some rows, by their places; without it they are found here, exactly.
    Where it may miss some, more `rounds` look again among the images that stay. Memory: a few numbers an image, and the
    pairs of one tile.
    """
    label_N, rows = np.arange(len(x_ND)), np.arange(len(x_ND))
    verdict = settle(x_ND, label_N, threshold, rank_N, curated_N, protected_N, recheck_above)
    for turn in range(rounds):
        found = above(x_ND[rows], threshold) if edges is None else edges(rows, turn)
        label_N = components(len(x_ND), ((rows[i], rows[j], score) for i, j, score in found), label_N)
        verdict = settle(x_ND, label_N, threshold, rank_N, curated_N, protected_N, recheck_above)
        rows = np.flatnonzero(verdict.cause_N < 0)
    return verdict


def settle(
    x_ND: ndarray,
    component_N: ndarray,
    threshold: float,
    rank_N: ndarray,
    curated_N: ndarray,
    protected_N: ndarray,
    recheck_above: int,
) -> Verdict:
    """Who stays of each component, and for whose sake the others go; see `near_duplicates`."""
    count = len(x_ND)
    order_N = np.lexsort((rank_N, component_N))
    starts = np.flatnonzero(np.r_[True, np.diff(component_N[order_N]) > 0][:count])
    sizes = np.diff(np.r_[starts, count])

    cause_N, group_N = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist()):
        members_M = order_N[start : start + size]
        protected_M = protected_N[members_M]
        if size <= recheck_above and not protected_M[1:].any():
            cause_M = np.r_[-1, np.zeros(size - 1, np.int64)]
        else:
            limit = threshold if size > recheck_above else None
            cause_M = _stays(x_ND[members_M], curated_N[members_M], protected_M, limit)
        gone_M = cause_M >= 0
        cause_N[members_M[gone_M]] = members_M[cause_M[gone_M]]
        head_M = np.zeros(size, np.int64) if size <= recheck_above else np.where(gone_M, cause_M, np.arange(size))
        alone_M = (np.bincount(head_M, minlength=size) == 1)[head_M]
        group_N[members_M] = np.where(alone_M, -1, members_M[head_M])

    score_N, gone_N = np.full(count, np.nan, np.float32), cause_N >= 0
    score_N[gone_N] = cosines(x_ND, np.flatnonzero(gone_N), cause_N[gone_N])
    return Verdict(cause_N, score_N, group_N)


def components(count: int, edges: Iterable[Edges], label: ndarray | None = None) -> ndarray:
    """Connected components of `count` nodes from edges (i, j, score) that come in parts: (count,) the lowest node
    of each node's component. The order of the edges and of the parts plays no part. `label` are components so far.
    In memory are a few numbers a node, and one part.
    """
    label = np.arange(count) if label is None else label.copy()
    for i, j, _ in edges:
        a, b = _root(label, i), _root(label, j)
        a, b = a[a != b], b[a != b]
        if not len(a):
            continue
        ids, place = np.unique(np.concatenate([a, b]), return_inverse=True)
        graph = coo_array((np.ones(len(a), np.int8), (place[: len(a)], place[len(a) :])), shape=(len(ids), len(ids)))
        part = connected_components(graph, directed=False)[1]
        lowest = np.unique(part, return_index=True)[1]  # ids are sorted: the first of a part is its lowest
        label[ids] = ids[lowest[part]]
    return _root(label, np.arange(count))


def _root(label: ndarray, nodes: ndarray) -> ndarray:
    root = label[nodes]
    while not np.array_equal(root, further := label[root]):
        root = further
    return root


def _stays(x_MD: ndarray, curated_M: ndarray, protected_M: ndarray, threshold: float | None) -> ndarray:
    """Who stays of one component (-1), and for whose sake each other goes: (M,) int64.

    Without a threshold the protected ones stay. With one, also whoever resembles none that stays.
    """
    kept = np.flatnonzero(protected_M) if threshold is None else _spread(x_MD, protected_M, threshold)
    cause_M = np.full(len(x_MD), -1, np.int64)
    gone = np.setdiff1d(np.arange(len(x_MD)), kept)
    if not len(gone):
        return cause_M
    cause_M[gone] = kept[top_k(x_MD[gone], x_MD[kept], 1)[1][:, 0]]
    curated = kept[curated_M[kept]]
    if threshold is not None and len(curated):  # a curated cause before a nearer one that is not
        score, nearest = top_k(x_MD[gone], x_MD[curated], 1)
        close = score[:, 0] > threshold
        cause_M[gone[close]] = curated[nearest[close, 0]]
    return cause_M


def _spread(x_MD: ndarray, protected_M: ndarray, threshold: float) -> ndarray:
    """The protected ones, and in order each that resembles none before it that stays."""
    kept = np.flatnonzero(protected_M)
    others = np.flatnonzero(~protected_M)
    for start in range(0, len(others), BLOCK):
        block = others[start : start + BLOCK]
        if len(kept):
            block = block[top_k(x_MD[block], x_MD[kept], 1)[0][:, 0] <= threshold]
        i, j, _ = pairs_above(x_MD[block], threshold)
        first = np.searchsorted(i, np.arange(len(block) + 1))
        stays = np.ones(len(block), bool)
        for at in range(len(block)):
            if stays[at]:
                stays[j[first[at] : first[at + 1]]] = False
        kept = np.r_[kept, block[stays]]
    return np.sort(kept)
