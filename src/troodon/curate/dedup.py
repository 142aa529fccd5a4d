"""Near-duplicates: which images are copies of one another, and which one of them is kept.

Pairs above a threshold form connected components, and one image of each is kept (https://arxiv.org/abs/2304.07193,
appendix A.3). The cause of a dropped image is the image kept in its place. Components chain: A resembles B and B
resembles C, while A and C are different pictures. In a component of more than a few images, each dropped image must
therefore resemble the kept image itself. The best image that does not is kept too, and so on, until every image is kept
or resembles one that is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from troodon.copies.keeper import is_edited
from troodon.search.exact import cosines, iter_pairs_above, pairs_above, top_k

# Shape suffixes: N images, M images of one component in the order of the keep rule, D channels.

BLOCK = 1024  # members of a component that are compared in one block

Edges = tuple[ndarray, ndarray, ndarray]  # rows i < j and their cosine, see search/join.py
FindEdges = Callable[[ndarray, int], Iterable[Edges]]


@dataclass(frozen=True)
class Verdict:
    """The decision for N images. The cause is the row of the image kept in its place, or -1 for a kept image."""

    cause_N: ndarray  # int64
    score_N: ndarray  # float32 cosine with the cause; nan for a kept image
    group_N: ndarray  # int64, the first row of its group by the keep rule; -1 for an image without near-duplicates
    reason_N: ndarray | None = None  # object, why the cause is kept and not this image; "" for a kept image


def keep_order(preferred_N: ndarray, area_N: ndarray, bytes_N: ndarray, names: Sequence[str] = ()) -> ndarray:
    """Rank images by the keep rule (0 is kept first): the largest `preferred_N`, as of curated images, then the largest
    area, most bytes, the plainest of the names, the lowest row."""
    count = len(area_N)
    edited_N, length_N = np.zeros(count, bool), np.zeros(count, np.int64)
    if names:
        edited_N, length_N = np.array([is_edited(n) for n in names], bool), np.array([*map(len, names)], np.int64)
    order_N = np.lexsort((np.arange(count), length_N, edited_N, -bytes_N, -area_N, -preferred_N.astype(np.int64)))
    rank_N = np.empty(count, np.int64)
    rank_N[order_N] = np.arange(count)
    return rank_N


def find_identical(digests: Sequence[str] | ndarray, rank_N: ndarray, protected_N: ndarray) -> ndarray:
    """Keep one image of each digest. Returns for each image the row kept in its place (N,) int64, -1 if it is kept."""
    _, digest_N = np.unique(np.asarray(digests), return_inverse=True)
    order_N = np.lexsort((rank_N, digest_N))
    is_first_N = np.r_[True, np.diff(digest_N[order_N]) > 0][: len(order_N)]
    cause_N = np.empty(len(order_N), np.int64)
    cause_N[order_N] = order_N[np.flatnonzero(is_first_N)][np.cumsum(is_first_N) - 1]
    return np.where(protected_N | (cause_N == np.arange(len(order_N))), -1, cause_N)


def near_duplicates(
    x_ND: ndarray,
    threshold: float,
    rank_N: ndarray,
    curated_N: ndarray,
    protected_N: ndarray,
    recheck_above: int,
    *,
    find_edges: FindEdges | None = None,
    rounds: int = 1,
) -> Verdict:
    """Find near-duplicates, cosine above `threshold`, and keep one of each group by `rank_N` (see `keep_order`).

    `protected_N` (bool) images are always kept. Components of more than `recheck_above` images are rechecked.
    `find_edges(rows, round)` yields the edges among these rows, as positions in `rows`; without it they are computed
    here, exactly. If it misses edges, more `rounds` search again among the images that remain. Memory: a few numbers
    per image, and the pairs of one tile.
    """
    label_N, rows = np.arange(len(x_ND)), np.arange(len(x_ND))
    verdict = resolve_components(x_ND, label_N, threshold, rank_N, curated_N, protected_N, recheck_above)
    for round_number in range(rounds):
        edges = iter_pairs_above(x_ND[rows], threshold) if find_edges is None else find_edges(rows, round_number)
        label_N = components(len(x_ND), ((rows[i], rows[j], score) for i, j, score in edges), label_N)
        verdict = resolve_components(x_ND, label_N, threshold, rank_N, curated_N, protected_N, recheck_above)
        rows = np.flatnonzero(verdict.cause_N < 0)
    return verdict


def resolve_components(
    x_ND: ndarray,
    component_N: ndarray,
    threshold: float,
    rank_N: ndarray,
    curated_N: ndarray,
    protected_N: ndarray,
    recheck_above: int,
) -> Verdict:
    """Choose the images kept of each component, and the cause of each dropped one; see `near_duplicates`."""
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
            recheck_threshold = threshold if size > recheck_above else None
            cause_M = _resolve_component(x_ND[members_M], curated_N[members_M], protected_M, recheck_threshold)
        dropped_M = cause_M >= 0
        cause_N[members_M[dropped_M]] = members_M[cause_M[dropped_M]]
        first_M = np.zeros(size, np.int64) if size <= recheck_above else np.where(dropped_M, cause_M, np.arange(size))
        single_M = (np.bincount(first_M, minlength=size) == 1)[first_M]
        group_N[members_M] = np.where(single_M, -1, members_M[first_M])

    score_N, dropped_N = np.full(count, np.nan, np.float32), cause_N >= 0
    score_N[dropped_N] = cosines(x_ND, np.flatnonzero(dropped_N), cause_N[dropped_N])
    return Verdict(cause_N, score_N, group_N)


def join_equal(verdict: Verdict, digest_N: ndarray, rank_N: ndarray, protected_N: ndarray) -> Verdict:
    """Also drop kept images whose digest, if not "", is that of a better one; their near-duplicates follow it."""
    some = np.flatnonzero((digest_N != "") & (verdict.cause_N < 0))
    cause = find_identical(digest_N[some].astype(str), rank_N[some], protected_N[some])
    dropped, kept = some[cause >= 0], some[cause[cause >= 0]]
    if not len(dropped):
        return verdict
    follows_N = np.arange(len(digest_N))
    follows_N[dropped] = kept
    cause_N, score_N, group_N = (column.copy() for column in (verdict.cause_N, verdict.score_N, verdict.group_N))
    cause_N[dropped], score_N[dropped] = kept, 1.0
    has_cause_N, in_group_N = cause_N >= 0, group_N >= 0
    cause_N[has_cause_N], group_N[in_group_N] = follows_N[cause_N[has_cause_N]], follows_N[group_N[in_group_N]]
    group_N[dropped], group_N[kept] = kept, kept
    return Verdict(cause_N, score_N, group_N)


def components(count: int, edges: Iterable[Edges], label: ndarray | None = None) -> ndarray:
    """Compute connected components from edges (i, j, score) that come in parts.

    Returns for each of `count` nodes the lowest node of its component: (count,). The result does not depend on the
    order of edges and parts. `label` holds earlier components, if any. Memory: a few numbers per node, and one part.
    """
    label = np.arange(count) if label is None else label.copy()
    for i, j, _ in edges:
        a, b = _root(label, i), _root(label, j)
        a, b = a[a != b], b[a != b]
        if not len(a):
            continue
        ids, index = np.unique(np.concatenate([a, b]), return_inverse=True)
        graph = coo_array((np.ones(len(a), np.int8), (index[: len(a)], index[len(a) :])), shape=(len(ids), len(ids)))
        component = connected_components(graph, directed=False)[1]
        lowest = np.unique(component, return_index=True)[1]  # ids are sorted: the first of a component is its lowest
        label[ids] = ids[lowest[component]]
    return _root(label, np.arange(count))


def _root(label: ndarray, nodes: ndarray) -> ndarray:
    root = label[nodes]
    while not np.array_equal(root, parent := label[root]):
        root = parent
    return root


def _resolve_component(x_MD: ndarray, curated_M: ndarray, protected_M: ndarray, threshold: float | None) -> ndarray:
    """Return the cause of each image of one component, or -1 for a kept image: (M,) int64.

    Without a threshold the protected images are kept. With one, images that resemble no kept image are kept too.
    """
    kept = np.flatnonzero(protected_M) if threshold is None else _select_representatives(x_MD, protected_M, threshold)
    cause_M = np.full(len(x_MD), -1, np.int64)
    dropped = np.setdiff1d(np.arange(len(x_MD)), kept)
    if not len(dropped):
        return cause_M
    cause_M[dropped] = kept[top_k(x_MD[dropped], x_MD[kept], 1)[1][:, 0]]
    curated = kept[curated_M[kept]]
    if threshold is not None and len(curated):  # a curated cause takes precedence over a nearer uncurated one
        score, nearest = top_k(x_MD[dropped], x_MD[curated], 1)
        near = score[:, 0] > threshold
        cause_M[dropped[near]] = curated[nearest[near, 0]]
    return cause_M


def _select_representatives(x_MD: ndarray, protected_M: ndarray, threshold: float) -> ndarray:
    """Return the protected images and, in order, each image that resembles no earlier representative."""
    kept = np.flatnonzero(protected_M)
    others = np.flatnonzero(~protected_M)
    for start in range(0, len(others), BLOCK):
        block = others[start : start + BLOCK]
        if len(kept):
            block = block[top_k(x_MD[block], x_MD[kept], 1)[0][:, 0] <= threshold]
        i, j, _ = pairs_above(x_MD[block], threshold)
        first = np.searchsorted(i, np.arange(len(block) + 1))
        is_kept = np.ones(len(block), bool)
        for row in range(len(block)):
            if is_kept[row]:
                is_kept[j[first[row] : first[row + 1]]] = False
        kept = np.r_[kept, block[is_kept]]
    return np.sort(kept)
