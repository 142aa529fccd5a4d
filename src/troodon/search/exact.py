"""Exact neighbours by cosine: the best k, and all pairs above a threshold.

Tiles of a matrix product only propose. A proposed pair gets its score from its own two rows, always summed in the same
order, and that score decides: entries of a product differ in their last bits (4e-7 here) with the shape of the tile,
scores do not. So results depend neither on the size of the blocks nor on threads nor on the device.

Rows may be float16, as they are stored, or a file mapped into memory: each block is read, made float32 and
normalised again (half of the error that float16 leaves comes from the lengths). A row of zeros scores 0.

On 2 cores numpy's product ran at 190 GFLOPS, torch's at 150; a GPU takes part through torch, if `device` names one.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy import ndarray

# Shape suffixes: N M rows, Q queries, D channels, P B rows of one block, C proposed pairs, k neighbours.

SLACK = 1e-5  # how far a product may be off; far more than it ever is
CACHED = 2**18  # numbers of a gathered block that stays in the cache of a core


def pairs_above(
    x_ND: ndarray, threshold: float, y_MD: ndarray | None = None, *, block: int = 4096, device: Any = None
) -> tuple[ndarray, ndarray, ndarray]:
    """All pairs with a cosine above `threshold`: rows i and j (int64) and score (float32), sorted by (i, j).

    Without `y_MD` the pairs i < j within x; with it, i in x and j in y. `above` gives the same tile by tile, for
    thresholds that leave more pairs than fit into memory.
    """
    tiles = list(above(x_ND, threshold, y_MD, block=block, device=device))
    i, j, score = (np.concatenate([tile[part] for tile in tiles] or [_EMPTY[part]]) for part in range(3))
    order = np.lexsort((j, i))
    return i[order], j[order], score[order]


def above(
    x_ND: ndarray, threshold: float, y_MD: ndarray | None = None, *, block: int = 4096, device: Any = None
) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
    """What `pairs_above` returns, one tile at a time (also the empty ones; there are `tiles` of them)."""
    for p in range(0, len(x_ND), block):
        yield from band(x_ND, threshold, p, y_MD, block=block, device=device)


def band(
    x_ND: ndarray, threshold: float, p: int, y_MD: ndarray | None = None, *, block: int = 4096, device: Any = None
) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
    """The tiles of `above` whose rows i begin at `p`, a multiple of `block`."""
    itself, threshold = y_MD is None, float(threshold)
    other_MD = x_ND if y_MD is None else y_MD
    assert x_ND.shape[1] == other_MD.shape[1]
    a_PD = unit(x_ND[p : p + block])
    for q in range(p if itself else 0, len(other_MD), block):
        if threshold >= 1:  # no cosine is above
            yield _EMPTY
            continue
        b_BD = a_PD if itself and q == p else unit(other_MD[q : q + block])
        i_C, j_C = _proposed(a_PD, b_BD, threshold - SLACK, device)
        if itself and q == p:
            i_C, j_C = i_C[i_C < j_C], j_C[i_C < j_C]
        score_C = _scores(a_PD, i_C, b_BD, j_C)
        sure = score_C > threshold
        yield p + i_C[sure], q + j_C[sure], score_C[sure]


def tiles(rows: int, columns: int | None = None, *, block: int = 4096) -> int:
    """How many tiles `above` goes through."""
    down = -(-rows // block)
    return down * (down + 1) // 2 if columns is None else down * -(-columns // block)


def top_k(
    queries_QD: ndarray, base_ND: ndarray, k: int, *, block: int = 4096, device: Any = None
) -> tuple[ndarray, ndarray]:
    """The k rows of the base with the highest cosine to each query: score (Q, k) float32 and row (Q, k) int64.

    Best first; among equals the lower row. k is clipped to the size of the base. Each block improves on the k best
    so far: only scores that reach the worst of these are looked at.
    """
    assert k > 0
    assert queries_QD.shape[1] == base_ND.shape[1]
    k = min(k, len(base_ND))
    score_Qk = np.full((len(queries_QD), k), -np.inf, np.float32)
    row_Qk = np.full((len(queries_QD), k), -1, np.int64)
    if not k:
        return score_Qk, row_Qk
    for p in range(0, len(queries_QD), block):
        a_PD = unit(queries_QD[p : p + block])
        score_Pk, row_Pk = score_Qk[p : p + block], row_Qk[p : p + block]
        for q in range(0, len(base_ND), block):
            b_BD = unit(base_ND[q : q + block])
            i_C, j_C = _proposed(a_PD, b_BD, score_Pk[:, -1:] - SLACK, device, k)
            _merge(score_Pk, row_Pk, i_C, q + j_C, _scores(a_PD, i_C, b_BD, j_C))
    return score_Qk, row_Qk


_EMPTY = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def cosines(x_ND: ndarray, i_C: ndarray, j_C: ndarray) -> ndarray:
    """The scores (C,) float32 of these pairs of rows, as `pairs_above` gives them."""
    step = max(1, CACHED // max(1, x_ND.shape[1]))
    parts = [_dots(unit(x_ND[i_C[c : c + step]]), unit(x_ND[j_C[c : c + step]])) for c in range(0, len(i_C), step)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def unit(x_ND: ndarray) -> ndarray:
    """A copy in float32 with rows of length one; rows of zeros stay what they are."""
    x_ND = np.array(x_ND, dtype=np.float32)
    length_N1 = np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND))[:, None]
    assert np.isfinite(length_N1).all(), "embeddings must be finite"
    return np.divide(x_ND, length_N1, out=x_ND, where=length_N1 > 0)


def _proposed(
    a_PD: ndarray, b_BD: ndarray, floor_P1: float | ndarray, device: Any, k: int | None = None
) -> tuple[ndarray, ndarray]:
    """Pairs (i, j) of rows of a and b, in this order, whose product reaches a floor, one for all or for each row of a.

    With `k`, rows of a whose floor is still open (-inf) propose their k best.
    """
    if device is not None:
        return _proposed_on(device, a_PD, b_BD, floor_P1, k)
    s_PB = a_PD @ b_BD.T
    if k is not None and k < len(b_BD) and np.isinf(floor_P1).any():
        at = len(b_BD) - k
        floor_P1 = np.maximum(floor_P1, np.partition(s_PB, at, axis=1)[:, at : at + 1] - SLACK)
    return np.divmod(np.flatnonzero(s_PB >= floor_P1), len(b_BD))


def _proposed_on(
    device: Any, a_PD: ndarray, b_BD: ndarray, floor_P1: float | ndarray, k: int | None
) -> tuple[ndarray, ndarray]:
    """`_proposed` by torch, in full float32 whatever the process has asked for elsewhere."""
    import torch

    asked = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        s_PB = torch.from_numpy(a_PD).to(device) @ torch.from_numpy(b_BD).to(device).T
    finally:
        torch.set_float32_matmul_precision(asked)
    lowest_P1 = torch.as_tensor(floor_P1, dtype=torch.float32, device=device)
    if k is not None and k < len(b_BD) and torch.isinf(lowest_P1).any():
        lowest_P1 = torch.maximum(lowest_P1, s_PB.topk(k, dim=1).values[:, -1:] - SLACK)
    i_C, j_C = torch.nonzero(s_PB >= lowest_P1).T.cpu().numpy()
    return i_C, j_C


def _scores(a_PD: ndarray, i_C: ndarray, b_BD: ndarray, j_C: ndarray) -> ndarray:
    """Row i of a times row j of b, for each pair."""
    step = max(1, CACHED // max(1, a_PD.shape[1]))
    score_C = np.empty(len(i_C), np.float32)
    for c in range(0, len(i_C), step):
        score_C[c : c + step] = _dots(a_PD[i_C[c : c + step]], b_BD[j_C[c : c + step]])
    return score_C


def _dots(a_CD: ndarray, b_CD: ndarray) -> ndarray:
    """Row by row: each number a function of its two rows and of nothing else."""
    return np.clip(np.einsum("cd,cd->c", a_CD, b_CD), -1, 1)


def _merge(score_Pk: ndarray, row_Pk: ndarray, i_C: ndarray, row_C: ndarray, score_C: ndarray) -> None:
    """Put proposed rows among the k best so far, in place. They come sorted by query and row, from later blocks."""
    count_P = np.bincount(i_C, minlength=len(score_Pk))
    if not count_P.max(initial=0):
        return
    place_C = np.arange(len(i_C)) - np.repeat(np.cumsum(count_P) - count_P, count_P)
    k = score_Pk.shape[1]
    all_score = np.full((len(score_Pk), k + count_P.max()), -np.inf, np.float32)
    all_row = np.full(all_score.shape, -1, np.int64)
    all_score[:, :k], all_row[:, :k] = score_Pk, row_Pk
    all_score[i_C, k + place_C], all_row[i_C, k + place_C] = score_C, row_C
    # A stable sort keeps equals in the order of their rows, since later blocks hold higher rows.
    best_Pk = np.argsort(-all_score, axis=1, kind="stable")[:, :k]
    score_Pk[:] = np.take_along_axis(all_score, best_Pk, 1)
    row_Pk[:] = np.take_along_axis(all_row, best_Pk, 1)
