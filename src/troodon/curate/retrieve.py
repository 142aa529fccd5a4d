"""Retrieval: the uncurated images nearest to curated ones (https://arxiv.org/abs/2304.07193, section 3)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from troodon.search.exact import top_k

# Shape suffixes: Q queries, N candidates, k neighbours, H hits.


@dataclass(frozen=True)
class Hits:
    """H retrieved images, by query and rank. Several queries may retrieve the same image."""

    query_H: ndarray  # int64 row of the curated image
    rank_H: ndarray  # int32, 1 is the nearest
    row_H: ndarray  # int64 row of the uncurated image
    score_H: ndarray  # float32 cosine


def retrieve(
    x_ND: ndarray, queries: ndarray, candidates: ndarray, k: int, min_similarity: float = -1.0, *, device: Any = None
) -> Hits:
    """Retrieve the `k` candidates nearest to each query, without those with a cosine below `min_similarity`.

    `queries` and `candidates` are rows of the embeddings `x_ND`. k is clipped to the number of candidates.
    """
    score_Qk, index_Qk = top_k(x_ND[queries], x_ND[candidates], k, device=device)
    near_Qk = score_Qk >= min_similarity
    rank_Qk = np.broadcast_to(np.arange(1, score_Qk.shape[1] + 1, dtype=np.int32), score_Qk.shape)
    query_Qk = np.broadcast_to(np.asarray(queries, np.int64)[:, None], score_Qk.shape)
    row_Qk = np.asarray(candidates, np.int64)[index_Qk]
    return Hits(query_Qk[near_Qk], rank_Qk[near_Qk], row_Qk[near_Qk], score_Qk[near_Qk])


def fill_hits(hits: Hits, k_H: ndarray) -> Hits:
    """Select hits so that each query has k images that no other query has, as far as the hits suffice.

    In every round, each query that lacks images requests its next one. Of several queries that request the same image,
    the one with the highest score gets it, then the lowest query; the others continue. `k_H` is the k of each hit's
    query.
    """
    order = np.lexsort((hits.rank_H, hits.query_H))
    query, image, score, k = hits.query_H[order], hits.row_H[order], hits.score_H[order], k_H[order]
    starts = np.flatnonzero(np.r_[True, np.diff(query) > 0][: len(query)])
    ends, missing = np.r_[starts[1:], len(query)].astype(np.int64), k[starts].copy()
    next_hit, taken = starts.copy(), np.zeros(image.max(initial=-1) + 1, bool)
    selected = np.zeros(len(query), bool)
    while len(requesting := np.flatnonzero((missing > 0) & (next_hit < ends))):
        hit = next_hit[requesting]
        next_hit[requesting] += 1
        free = ~taken[image[hit]]
        requesting, hit = requesting[free], hit[free]
        best = np.lexsort((query[hit], -score[hit], image[hit]))
        first = best[np.flatnonzero(np.r_[True, np.diff(image[hit][best]) > 0][: len(best)])]
        taken[image[hit[first]]], selected[hit[first]] = True, True
        missing[requesting[first]] -= 1
    kept = np.sort(order[selected])
    return Hits(hits.query_H[kept], hits.rank_H[kept], hits.row_H[kept], hits.score_H[kept])


def best_hits(hits: Hits, count: int) -> tuple[ndarray, ndarray]:
    """Return for each of `count` images how often it was hit, and the index of its best hit, -1 for none.

    The best hit has the highest score; ties go to the lowest rank, then to the lowest query.
    """
    times_N = np.bincount(hits.row_H, minlength=count)
    order_H = np.lexsort((hits.query_H, hits.rank_H, -hits.score_H, hits.row_H))
    rows, first = np.unique(hits.row_H[order_H], return_index=True)
    best_N = np.full(count, -1, np.int64)
    best_N[rows] = order_H[first]
    return times_N, best_N
