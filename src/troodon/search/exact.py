"""Exact nearest neighbours by cosine similarity: the k best, and all pairs above a threshold.

Tiles of a matrix product only propose candidates. The score of a candidate pair is computed from its two rows, always
summed in the same order, and that score decides. Entries of a product differ in their last bits (4e-7 here) with the
shape of the tile; scores do not. Results therefore depend neither on the block size nor on threads nor on the device.

Rows may be float16, as they are stored, or a memory-mapped file: each block is read, converted to float32 and
normalised again (half of the float16 error comes from the lengths). A row of zeros scores 0.

On 2 cores numpy's product ran at 190 GFLOPS, torch's at 150. If `device` names a GPU, torch computes the products.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy import ndarray

# Shape suffixes: N M rows, Q queries, D channels, P B rows of one block, C candidate pairs, k neighbours.

SLACK = 1e-5  # tolerance for errors of a product; far larger than any error
CACHE_NUMBERS = 2**18  # size of a gathered block that stays in the cache of a core


def pairs_above(
    x_ND: ndarray, threshold: float, y_MD: ndarray | None = None, *, block: int = 4096, device: Any = None
) -> tuple[ndarray, ndarray, ndarray]:
    """Return all pairs with a cosine above `threshold`: rows i and j (int64) and score (float32), sorted by (i, j).

    Without `y_MD`: the pairs i < j within x. With it: i in x and j in y. `iter_pairs_above` yields the same pairs tile
    by tile, for thresholds that leave more pairs than fit into memory.
    """
    tiles = list(iter_pairs_above(x_ND, threshold, y_MD, block=block, device=device))
    i, j, score = (np.concatenate([tile[part] for tile in tiles] or [_NO_PAIRS[part]]) for part in range(3))
    order = np.lexsort((j, i))
    return i[order], j[order], score[order]


def iter_pairs_above(
    x_ND: ndarray, threshold: float, y_MD: ndarray | None = None, *, block: int = 4096, device: Any = None
) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
    """Yield what `pairs_above` returns, one tile at a time. Empty tiles are included; there are `count_tiles` tiles."""
    for start in range(0, len(x_ND), block):
        yield from iter_band_pairs(x_ND, threshold, start, y_MD, block=block, device=device)


def iter_band_pairs(
    x_ND: ndarray, threshold: float, start: int, y_MD: ndarray | None = None, *, block: int = 4096, device: Any = None
) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
    """Yield the tiles of `iter_pairs_above` whose rows i begin at `start`, a multiple of `block`."""
    same_matrix, threshold = y_MD is None, float(threshold)
    other_MD = x_ND if y_MD is None else y_MD
    assert x_ND.shape[1] == other_MD.shape[1]
    a_PD = l2_normalise(x_ND[start : start + block])
    for q in range(start if same_matrix else 0, len(other_MD), block):
        if threshold >= 1:  # no cosine exceeds 1
            yield _NO_PAIRS
            continue
        b_BD = a_PD if same_matrix and q == start else l2_normalise(other_MD[q : q + block])
        i_C, j_C = _propose(a_PD, b_BD, threshold - SLACK, device)
        if same_matrix and q == start:
            i_C, j_C = i_C[i_C < j_C], j_C[i_C < j_C]
        score_C = _pair_scores(a_PD, i_C, b_BD, j_C)
        is_above = score_C > threshold
        yield start + i_C[is_above], q + j_C[is_above], score_C[is_above]


def count_tiles(rows: int, columns: int | None = None, *, block: int = 4096) -> int:
    """Count the tiles that `iter_pairs_above` yields."""
    down = -(-rows // block)
    return down * (down + 1) // 2 if columns is None else down * -(-columns // block)


def top_k(
    queries_QD: ndarray, base_ND: ndarray, k: int, *, block: int = 4096, device: Any = None
) -> tuple[ndarray, ndarray]:
    """Return the k rows of the base with the highest cosine to each query: score (Q, k) float32, row (Q, k) int64.

    The best come first; among equal scores, the lower row. k is clipped to the size of the base. Each block updates the
    k best so far: only scores that reach the worst of these are considered.
    """
    assert k > 0
    assert queries_QD.shape[1] == base_ND.shape[1]
    k = min(k, len(base_ND))
    score_Qk = np.full((len(queries_QD), k), -np.inf, np.float32)
    row_Qk = np.full((len(queries_QD), k), -1, np.int64)
    if not k:
        return score_Qk, row_Qk
    for p in range(0, len(queries_QD), block):
        a_PD = l2_normalise(queries_QD[p : p + block])
        score_Pk, row_Pk = score_Qk[p : p + block], row_Qk[p : p + block]
        for q in range(0, len(base_ND), block):
            b_BD = l2_normalise(base_ND[q : q + block])
            i_C, j_C = _propose(a_PD, b_BD, score_Pk[:, -1:] - SLACK, device, k)
            _merge_top_k(score_Pk, row_Pk, i_C, q + j_C, _pair_scores(a_PD, i_C, b_BD, j_C))
    return score_Qk, row_Qk


_NO_PAIRS = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def cosines(x_ND: ndarray, i_C: ndarray, j_C: ndarray) -> ndarray:
    """Compute the scores (C,) float32 of these pairs of rows, equal to those of `pairs_above`."""
    step = max(1, CACHE_NUMBERS // max(1, x_ND.shape[1]))
    parts = [
        _row_dots(l2_normalise(x_ND[i_C[c : c + step]]), l2_normalise(x_ND[j_C[c : c + step]]))
        for c in range(0, len(i_C), step)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def l2_normalise(x_ND: ndarray) -> ndarray:
    """Return a float32 copy with rows of unit length. Rows of zeros stay zero."""
    x_ND = np.array(x_ND, dtype=np.float32)
    length_N1 = np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND))[:, None]
    assert np.isfinite(length_N1).all(), "embeddings must be finite"
    return np.divide(x_ND, length_N1, out=x_ND, where=length_N1 > 0)


def _propose(
    a_PD: ndarray, b_BD: ndarray, min_score_P1: float | ndarray, device: Any, k: int | None = None
) -> tuple[ndarray, ndarray]:
    """Return pairs (i, j) of rows of a and b, in this order, whose product reaches a minimum: one for all, or per row.

    With `k`, rows of a whose minimum is still -inf propose their k best.
    """
    if device is not None:
        return _propose_on_device(device, a_PD, b_BD, min_score_P1, k)
    s_PB = a_PD @ b_BD.T
    if k is not None and k < len(b_BD) and np.isinf(min_score_P1).any():
        at = len(b_BD) - k
        min_score_P1 = np.maximum(min_score_P1, np.partition(s_PB, at, axis=1)[:, at : at + 1] - SLACK)
    return np.divmod(np.flatnonzero(s_PB >= min_score_P1), len(b_BD))


def _propose_on_device(
    device: Any, a_PD: ndarray, b_BD: ndarray, min_score_P1: float | ndarray, k: int | None
) -> tuple[ndarray, ndarray]:
    """Do the same with torch, in full float32 whatever precision the process has set elsewhere."""
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        s_PB = torch.from_numpy(a_PD).to(device) @ torch.from_numpy(b_BD).to(device).T
    finally:
        torch.set_float32_matmul_precision(precision)
    minimum_P1 = torch.as_tensor(min_score_P1, dtype=torch.float32, device=device)
    if k is not None and k < len(b_BD) and torch.isinf(minimum_P1).any():
        minimum_P1 = torch.maximum(minimum_P1, s_PB.topk(k, dim=1).values[:, -1:] - SLACK)
    i_C, j_C = torch.nonzero(s_PB >= minimum_P1).T.cpu().numpy()
    return i_C, j_C


def _pair_scores(a_PD: ndarray, i_C: ndarray, b_BD: ndarray, j_C: ndarray) -> ndarray:
    """Multiply row i of a by row j of b, for each pair."""
    step = max(1, CACHE_NUMBERS // max(1, a_PD.shape[1]))
    score_C = np.empty(len(i_C), np.float32)
    for c in range(0, len(i_C), step):
        score_C[c : c + step] = _row_dots(a_PD[i_C[c : c + step]], b_BD[j_C[c : c + step]])
    return score_C


def _row_dots(a_CD: ndarray, b_CD: ndarray) -> ndarray:
    """Multiply row by row. Each result depends on its two rows only."""
    return np.clip(np.einsum("cd,cd->c", a_CD, b_CD), -1, 1)


def _merge_top_k(score_Pk: ndarray, row_Pk: ndarray, i_C: ndarray, row_C: ndarray, score_C: ndarray) -> None:
    """Merge candidate rows into the k best so far, in place. They come sorted by query and row, from later blocks."""
    count_P = np.bincount(i_C, minlength=len(score_Pk))
    if not count_P.max(initial=0):
        return
    column_C = np.arange(len(i_C)) - np.repeat(np.cumsum(count_P) - count_P, count_P)
    k = score_Pk.shape[1]
    all_score = np.full((len(score_Pk), k + count_P.max()), -np.inf, np.float32)
    all_row = np.full(all_score.shape, -1, np.int64)
    all_score[:, :k], all_row[:, :k] = score_Pk, row_Pk
    all_score[i_C, k + column_C], all_row[i_C, k + column_C] = score_C, row_C
    # A stable sort keeps equal scores in the order of their rows, since later blocks hold higher rows.
    best_Pk = np.argsort(-all_score, axis=1, kind="stable")[:, :k]
    score_Pk[:] = np.take_along_axis(all_score, best_Pk, 1)
    row_Pk[:] = np.take_along_axis(all_row, best_Pk, 1)
