"""Self-join of a matrix: all near pairs, by one of several search methods that yield the same kind of edge.

An edge is (i, j, score): rows i < j (int64) and their cosine (float32), always computed from the two rows, above the
threshold. A search first builds an index, then yields edges partition by partition; partitions may be processed
anywhere and in any order. An edge comes once; from faiss, if its rows lie in two partitions, it may come twice.

    exact    tiles of the whole matrix; finds all pairs
    lists    our inverted lists (inverted_lists.py); finds most pairs, far sooner
    faiss    an inverted file with product quantisation, for matrices larger than memory (extra `faiss`)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy import ndarray

from troodon.config import nearest
from troodon.search.exact import iter_band_pairs, top_k
from troodon.search.inverted_lists import InvertedLists

SearchMethod = Literal["auto", "exact", "lists", "faiss"]
MAX_EXACT_ROWS = 500_000  # above this size the exact join takes more than ten minutes on two cores
AUDIT_SIZE = 10_000
Z_95 = 1.96  # standard deviations that contain 95 % of a normal distribution


class SearchIndex(Protocol):
    """Rows indexed for search, in len() partitions."""

    def __len__(self) -> int: ...
    def pairs(self, x_ND: ndarray, threshold: float, partition: int) -> Iterator[tuple[ndarray, ndarray, ndarray]]: ...


@dataclass(frozen=True)
class ExactTiles:
    """The exact join. A partition is one band of tiles; nothing is stored but the sizes."""

    rows: int
    device: Any = None
    block: int = 4096

    def __len__(self) -> int:
        return -(-self.rows // self.block)

    def pairs(self, x_ND: ndarray, threshold: float, partition: int) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
        return iter_band_pairs(x_ND, threshold, partition * self.block, block=self.block, device=self.device)

    def save(self, folder: Path) -> None:
        np.save(folder / "tiles.npy", np.array([self.rows, self.block]))

    @staticmethod
    def load(folder: Path, device: Any = None) -> "ExactTiles":
        rows, block = np.load(folder / "tiles.npy").tolist()
        return ExactTiles(rows, device, block)


def resolve_method(method: SearchMethod, rows: int) -> str:
    """Resolve "auto" to a method for this number of rows. Raises UsageError, with the nearest name, if unknown."""
    if method not in get_args(SearchMethod):
        raise nearest("search", method, get_args(SearchMethod))
    return method if method != "auto" else "exact" if rows <= MAX_EXACT_ROWS else "lists"


def build_index(
    x_ND: ndarray, method: SearchMethod = "auto", seed: int = 0, device: Any = None, folder: Path | None = None
) -> SearchIndex:
    """Build the index of a matrix and, with a folder, save it there for `load_index`. Another `seed` gives other lists,
    which miss other pairs."""
    kind = resolve_method(method, len(x_ND))
    if kind == "lists" and len(x_ND):
        return InvertedLists.build(x_ND, seed, folder=folder)
    if kind == "faiss" and len(x_ND):
        from troodon.search.faiss_index import FaissIndex

        index = FaissIndex.build(x_ND, seed)
    else:
        index = ExactTiles(len(x_ND), device)
    if folder is not None:
        index.save(folder)
    return index


def load_index(folder: Path, device: Any = None) -> SearchIndex:
    """Load the index that `build_index` has saved in this folder."""
    if (folder / "tiles.npy").exists():
        return ExactTiles.load(folder, device)
    if (folder / "starts.npy").exists():
        return InvertedLists.load(folder)
    from troodon.search.faiss_index import FaissIndex

    return FaissIndex.load(folder)


def near_pairs(
    x_ND: ndarray, threshold: float, method: SearchMethod = "auto", seed: int = 0, device: Any = None
) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
    """Yield the edges of all rows with a cosine above `threshold`, one tile at a time."""
    index = build_index(x_ND, method, seed, device)
    for partition in range(len(index)):
        yield from index.pairs(x_ND, threshold, partition)


@dataclass(frozen=True)
class AuditResult:
    """The number of checked rows that resemble another by exact search, with the 95 % interval of their share."""

    checked: int
    similar: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.similar / self.checked if self.checked else 0.0


def audit(
    x_ND: ndarray, threshold: float, candidates: ndarray, *, images: int = AUDIT_SIZE, seed: int = 0, device: Any = None
) -> AuditResult:
    """Draw rows from `candidates` and search exactly for any other row with a cosine above `threshold`."""
    drawn = np.sort(np.random.default_rng(seed).permutation(candidates)[:images])
    score_Q2, row_Q2 = top_k(x_ND[drawn], x_ND, 2, device=device)
    return wilson_interval(int(((score_Q2 > threshold) & (row_Q2 != drawn[:, None])).any(1).sum()), len(drawn))


def wilson_interval(similar: int, checked: int) -> AuditResult:
    """Compute the Wilson interval of a proportion, which is valid for small counts and for zero."""
    if not checked:
        return AuditResult(0, 0, 0.0, 1.0)
    p, n = similar / checked, checked
    centre, half = p + Z_95**2 / (2 * n), Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
    low, high = ((centre + sign * half) / (1 + Z_95**2 / n) for sign in (-1, 1))
    return AuditResult(n, similar, max(0.0, low), min(1.0, high))
