"""Inverted lists (IVF): near pairs without comparing every row with every other.

Spherical k-means on a sample gives the lists. Each row is stored in the list of its nearest centroid, and is compared
with all rows in the lists nearest to it. Of 200,000 rows of 384 channels, two rounds (the second over the remaining
rows, with other lists) find 99.6 % of the copies that exact search finds, in a third of its time; of a million 99.2 %.
Lists store rows in eight bits. These codes propose pairs; the rows themselves decide, as in exact.py.

Lists do not depend on threads, blocks or devices: centroids, and the rows compared with them, are whole multiples of
1 / GRID, whose products and sums stay below 2^24. float32 represents these exactly, in any order of summation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.sparse import csr_array

from troodon.search.exact import cosines, l2_normalise

# Shape suffixes: N rows, L lists, D channels, p probes (lists that a row is compared with), B Q rows of one block,
# C pairs, A all probes of a block.

MAX_PROBES = 84  # probes of a row, at most
GRID = 4000.0
SAMPLE_SIZE = (16, 32, 80_000)  # training rows of k-means: minimum and maximum per list, and total
ITERATIONS = 5
SLACK = 0.01  # tolerance for errors of a cosine of eight-bit codes; the error is mostly 0.001
BLOCK = 4096
SORT_BLOCK = 2**16  # rows whose probes are sorted at once
FILES = ("row_N", "starts", "probes_Np", "asks", "asked", "codes_ND", "scale_N")  # on disk, in the order of the fields


def list_count(rows: int) -> int:
    """Return the number of lists for which assigning rows costs about as much as searching, with no list too short."""
    return max(1, round(min(5 * rows**0.5, rows / 56)))


def probe_count(lists: int) -> int:
    """Return the number of lists that a row is compared with. Many small lists find more than few large ones."""
    return min(MAX_PROBES, max(14, lists // 45))


def kmeans(x_ND: ndarray, count: int, seed: int, iterations: int = ITERATIONS, sampled: int = 0) -> ndarray:
    """Train centroids (L, D) float32 on the grid, on at most `count` x `sampled` (0: SAMPLE_SIZE) rows drawn by `seed`.

    L is `count`, or the number of rows if that is smaller. An empty cluster moves its centroid to the row that is
    farthest from its own centroid.
    """
    random, (minimum, maximum, total) = np.random.default_rng(seed), SAMPLE_SIZE
    sampled = sampled or max(minimum, min(maximum, total // max(1, count)))
    drawn = np.sort(random.permutation(len(x_ND))[: count * sampled])
    count = min(count, len(drawn))
    rows = np.concatenate(
        [round_to_grid(x_ND[part]) for part in blocks(drawn)] or [np.zeros((0, x_ND.shape[1]), np.float32)]
    )
    centroids_LD = rows[np.sort(random.permutation(len(rows))[:count])]
    for _ in range(iterations):
        scores, lists = nearest_centroids(rows, centroids_LD, 1, gridded=True)
        list_N, score_N = lists[:, 0], scores[:, 0]
        members = csr_array((np.ones(len(rows), np.float32), (list_N, np.arange(len(rows)))), (count, len(rows)))
        sums_LD = members @ rows  # in the order of the rows, in one thread
        empty = np.bincount(list_N, minlength=count) == 0
        sums_LD[empty] = rows[np.argsort(score_N, kind="stable")[: empty.sum()]]
        centroids_LD = round_to_grid(sums_LD)
    return centroids_LD


def nearest_centroids(
    x_ND: ndarray, centroids_LD: ndarray, p: int, *, gridded: bool = False
) -> tuple[ndarray, ndarray]:
    """Find the p centroids nearest to each row, best first: cosine (N, p) float32 and list (N, p) int32.

    `gridded` rows are used without rounding. p is clipped to the number of lists; ties go to the lower list.
    """
    p = min(p, len(centroids_LD))
    score_Np, list_Np = np.zeros((len(x_ND), p), np.float32), np.zeros((len(x_ND), p), np.int32)
    step = max(64, min(BLOCK, 2**24 // max(1, len(centroids_LD))))
    for start in range(0, len(x_ND), step):
        rows = x_ND[start : start + step]
        s_BL = (rows if gridded else round_to_grid(rows)) @ centroids_LD.T
        score_Np[start : start + step], list_Np[start : start + step] = _top_p(s_BL, p)
    return score_Np / np.float32(GRID**2), list_Np


def assign_probes(x_ND: ndarray, centroids_LD: ndarray, probes: int | None = None) -> ndarray:
    """Return the probes of each row (N, p), its own list first, in the smallest type that holds their numbers."""
    list_Np = nearest_centroids(x_ND, centroids_LD, probes or probe_count(len(centroids_LD)))[1]
    return list_Np.astype(np.min_scalar_type(len(centroids_LD)))


def round_to_grid(x_ND: ndarray) -> ndarray:
    """Normalise rows to unit length and round them to whole multiples of 1 / GRID: float32."""
    return np.rint(l2_normalise(x_ND) * np.float32(GRID))


def blocks(rows: ndarray, size: int = BLOCK) -> Iterator[ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _top_p(s_BL: ndarray, p: int) -> tuple[ndarray, ndarray]:
    """Return the p largest values of each row and their columns, best first."""
    rows, lists = s_BL.shape
    if p == 1:
        list_B1 = s_BL.argmax(1)[:, None]
        return np.take_along_axis(s_BL, list_B1, 1), list_B1
    groups = 4 * p
    if lists < 4 * groups:
        floor_B1 = np.partition(s_BL, lists - p, axis=1)[:, lists - p, None]
    else:  # the p-th largest of the group maxima is no higher than the p-th largest value, and far cheaper to find
        width = lists // groups
        maxima = s_BL[:, : groups * width].reshape(rows, width, groups).max(1)
        floor_B1 = np.partition(maxima, groups - p, axis=1)[:, groups - p, None]
    row_C, list_C = np.divmod(np.flatnonzero(s_BL >= floor_B1), lists)
    count_B = np.bincount(row_C, minlength=rows)
    column_C = np.arange(len(row_C)) - np.repeat(np.cumsum(count_B) - count_B, count_B)
    score = np.full((rows, count_B.max()), -np.inf, np.float32)
    index = np.zeros(score.shape, np.int32)
    score[row_C, column_C], index[row_C, column_C] = s_BL[row_C, list_C], list_C
    best = np.argsort(-score, axis=1, kind="stable")[:, :p]
    return np.take_along_axis(score, best, 1), np.take_along_axis(index, best, 1)


@dataclass(frozen=True)
class InvertedLists:
    """Rows sorted by their list, and for each list the query rows that are compared with its rows.

    All rows are numbered by their position in this order; `row_N` gives the row of the matrix.
    """

    row_N: ndarray  # int64
    starts: ndarray  # (L + 1,) first position of each list
    probes_Np: ndarray  # unsigned, the probes of each row, its own list first
    queries: ndarray  # (N p,) positions of query rows, sorted by the list that they probe
    query_starts: ndarray  # (L + 1,) first query of each list
    codes_ND: ndarray  # int8, each row times its scale
    scale_N: ndarray  # float32

    def __len__(self) -> int:
        return len(self.starts) - 1

    @staticmethod
    def build(
        x_ND: ndarray, seed: int = 0, *, count: int | None = None, probes: int | None = None, folder: Path | None = None
    ) -> "InvertedLists":
        """Build the lists of a matrix. `seed` draws the training sample and the initial centroids."""
        centroids_LD = kmeans(x_ND, count or list_count(len(x_ND)), seed)
        return InvertedLists.from_probes(x_ND, assign_probes(x_ND, centroids_LD, probes), len(centroids_LD), folder)

    @staticmethod
    def from_probes(x_ND: ndarray, probes_Np: ndarray, count: int, folder: Path | None = None) -> "InvertedLists":
        """Build `count` lists from the probes of each row. With a folder, the large arrays are written there, for
        `load`, and memory holds a few numbers per row."""

        def allocate(name: str, shape: tuple[int, ...], dtype: Any) -> ndarray:
            if folder is None:
                return np.empty(shape, dtype)
            return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)

        def store(name: str, values: ndarray) -> ndarray:
            stored = allocate(name, values.shape, values.dtype)
            stored[...] = values
            return stored

        rows, p = probes_Np.shape
        order_N = np.argsort(probes_Np[:, 0], kind="stable")
        starts = np.searchsorted(probes_Np[order_N, 0], np.arange(count + 1))
        sorted_Np = allocate("probes_Np", (rows, p), probes_Np.dtype)
        codes_ND = allocate("codes_ND", x_ND.shape, np.int8)
        scale_N, queries_L = allocate("scale_N", (rows,), np.float32), np.zeros(count, np.int64)
        for block in blocks(np.arange(rows)):
            x_BD = l2_normalise(x_ND[order_N[block]])
            scale_N[block] = scale = 127 / np.abs(x_BD).max(1).clip(1e-6)
            codes_ND[block] = np.rint(x_BD * scale[:, None])
            sorted_Np[block] = probes_Np[order_N[block]]
            queries_L += np.bincount(sorted_Np[block].ravel(), minlength=count)
        query_starts = np.r_[0, np.cumsum(queries_L)]
        queries = allocate("asks", (rows * p,), np.int32 if rows < 2**31 else np.int64)
        next_L = query_starts[:-1].copy()
        for block in blocks(np.arange(rows), SORT_BLOCK):
            list_A = sorted_Np[block].ravel()
            order_A = np.argsort(list_A, kind="stable")
            list_A, queries_L = list_A[order_A], np.bincount(list_A, minlength=count)
            first_L = np.cumsum(queries_L) - queries_L
            queries[(next_L - first_L)[list_A] + np.arange(len(list_A))] = block[order_A // p]
            next_L += queries_L
        row_N, starts, query_starts = store("row_N", order_N), store("starts", starts), store("asked", query_starts)
        return InvertedLists(row_N, starts, sorted_Np, queries, query_starts, codes_ND, scale_N)

    @staticmethod
    def load(folder: Path) -> "InvertedLists":
        return InvertedLists(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in FILES))

    def pairs(self, x_ND: ndarray, threshold: float, partition: int) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
        """Yield pairs with a cosine above `threshold` of one list: rows i < j and score, as `iter_pairs_above` does.

        No pair comes from two lists. `x_ND` is the matrix that the lists were built from; its rows decide.
        """
        minimum, first = np.float32(threshold - SLACK), self.starts[partition]
        queries = self.queries[self.query_starts[partition] : self.query_starts[partition + 1]]
        for base in blocks(np.arange(first, self.starts[partition + 1])):
            base_BD = self.codes_ND[base].astype(np.float32) / self.scale_N[base, None]
            for query in blocks(queries):
                s_QB = self.codes_ND[query].astype(np.float32) @ base_BD.T
                i, j = np.divmod(np.flatnonzero(s_QB >= (minimum * self.scale_N[query])[:, None]), len(base))
                i, j = query[i], base[j]
                # If j probes the list of i, that list yields the pair as well: keep only the one with i < j.
                keep = i < j
                reversed_ = np.flatnonzero((i > j) & (self.probes_Np[i, 0] != partition))
                list_of_i = self.probes_Np[i[reversed_], :1]
                keep[reversed_] = ~(self.probes_Np[j[reversed_]] == list_of_i).any(1)
                i, j = self.row_N[i[keep]], self.row_N[j[keep]]
                i, j = np.minimum(i, j), np.maximum(i, j)
                score = cosines(x_ND, i, j)
                is_above = score > threshold
                yield i[is_above], j[is_above], score[is_above]
