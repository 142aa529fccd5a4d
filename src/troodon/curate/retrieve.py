"""Retrieval: the uncurated images that lie nearest to curated ones (https://arxiv.org/abs/2304.07193, section 3)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from troodon.search.exact import top_k

# Shape suffixes: Q queries, N candidates, k neighbours, H hits.


@dataclass(frozen=True)
class Hits:
    """H retrieved images, by query and rank. The same image may be hit by several queries."""

    query_H: ndarray  # int64 row of the curated image
    rank_H: ndarray  # int32, 1 is the nearest
    row_H: ndarray  # int64 row of the uncurated image
    score_H: ndarray  # float32 cosine


def retrieve(
    x_ND: ndarray, queries: ndarray, candidates: ndarray, k: int, minimum: float = -1.0, *, device: Any = None
) -> Hits:
    """The `k` candidates nearest to each query, but for those with a cosine below `minimum`.

    `queries` and `candidates` are rows of the embeddings `x_ND`; k is clipped to the number of candidates.
    """
    score_Qk, place_Qk = top_k(x_ND[queries], x_ND[candidates], k, device=device)
    near_Qk = score_Qk >= minimum
    rank_Qk = np.broadcast_to(np.arange(1, score_Qk.shape[1] + 1, dtype=np.int32), score_Qk.shape)
    query_Qk = np.broadcast_to(np.asarray(queries, np.int64)[:, None], score_Qk.shape)
    row_Qk = np.asarray(candidates, np.int64)[place_Qk]
    return Hits(query_Qk[near_Qk], rank_Qk[near_Qk], row_Qk[near_Qk], score_Qk[near_Qk])


def fill(hits: Hits, k_H: ndarray) -> Hits:
    """Of hits that go deep enough, those by which each query has k images that no other has, where there are so many.

    Whoever is short asks for its next; of several that ask for one image the nearest has it, the others ask on.
    `k_H` is the k of each hit's query. What is asked for in the same turn goes to the highest score, then the lowest
    query.
    """
    order = np.lexsort((hits.rank_H, hits.query_H))
    query, image, score, k = hits.query_H[order], hits.row_H[order], hits.score_H[order], k_H[order]
    starts = np.flatnonzero(np.r_[True, np.diff(query) > 0][: len(query)])
    ends, missing = np.r_[starts[1:], len(query)].astype(np.int64), k[starts].copy()
    at, taken, won = starts.copy(), np.zeros(image.max(initial=-1) + 1, bool), np.zeros(len(query), bool)
    while len(asking := np.flatnonzero((missing > 0) & (at < ends))):
        hit = at[asking]
        at[asking] += 1
        free = ~taken[image[hit]]
        asking, hit = asking[free], hit[free]
        best = np.lexsort((query[hit], -score[hit], image[hit]))
        first = best[np.flatnonzero(np.r_[True, np.diff(image[hit][best]) > 0][: len(best)])]
        taken[image[hit[first]]], won[hit[first]] = True, True
        missing[asking[first]] -= 1
    kept = np.sort(order[won])
    return Hits(hits.query_H[kept], hits.rank_H[kept], hits.row_H[kept], hits.score_H[kept])


def best_hits(hits: Hits, count: int) -> tuple[ndarray, ndarray]:
    """For each of `count` images how often it was hit, and its best hit: the place in `hits`, -1 for none.

    The best has the highest score; among equals the lowest rank, then the lowest query.
    """
    times_N = np.bincount(hits.row_H, minlength=count)
    order_H = np.lexsort((hits.query_H, hits.rank_H, -hits.score_H, hits.row_H))
    rows, first = np.unique(hits.row_H[order_H], return_index=True)
    best_N = np.full(count, -1, np.int64)
    best_N[rows] = order_H[first]
    return times_N, best_N
