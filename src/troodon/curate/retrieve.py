"""Retrieval: the uncurated images that lie nearest to curated ones (https://arxiv.org/abs/2304.07193, section 3)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from troodon.search.exact import top_k


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
