"""Near pairs by faiss: an inverted file with product quantisation, for matrices that do not fit into memory.

Codes take a sixteenth of the memory of float32 and propose pairs. The score of a code is off by 0.07, so every pair
within MARGIN of the threshold is scored from its two rows (of 200,000 rows that kept 99.98 % of the pairs, at three
proposals per row). Raw scores would miss a fifth of the copies and add false ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from troodon.config import UsageError
from troodon.search.exact import cosines, l2_normalise
from troodon.search.inverted_lists import ITERATIONS, list_count, probe_count

MARGIN = 0.2
CHANNELS_PER_BYTE = 8
SAMPLES_PER_LIST = 64  # training rows
BLOCK = 65_536  # rows of one partition


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UsageError("search faiss: needs the extra: pip install 'troodon[faiss]'") from None
    return faiss


@dataclass(frozen=True)
class FaissIndex:
    """A faiss index and its number of rows."""

    index: Any
    rows: int

    def __len__(self) -> int:
        return -(-self.rows // BLOCK)

    @staticmethod
    def build(x_ND: ndarray, seed: int = 0) -> "FaissIndex":
        """Train on a sample and add all rows. Raises UsageError if faiss is not installed."""
        faiss = _faiss()
        rows, channels = x_ND.shape
        lists = min(list_count(rows), max(1, rows // 39))  # faiss requires 39 rows per centroid
        parts = next(p for p in range(max(1, channels // CHANNELS_PER_BYTE), 0, -1) if channels % p == 0)
        kind = f"IVF{lists},PQ{parts}x8" if rows >= 256 * 39 else f"IVF{lists},Flat"
        index = faiss.index_factory(channels, kind, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        for clustering in (index.cp, *([index.pq.cp] if "PQ" in kind else [])):
            clustering.niter = ITERATIONS
        drawn = np.random.default_rng(seed).permutation(rows)[: max(lists * SAMPLES_PER_LIST, 256 * 64)]
        index.train(l2_normalise(x_ND[np.sort(drawn)]))
        for start in range(0, rows, BLOCK):
            index.add(l2_normalise(x_ND[start : start + BLOCK]))
        return FaissIndex(index, rows)

    def pairs(self, x_ND: ndarray, threshold: float, partition: int) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
        """Yield the edges with a row in this block; see join.py. Edges between two blocks may come from both."""
        start = partition * BLOCK
        faiss = _faiss()
        query_QD = l2_normalise(x_ND[start : start + BLOCK])
        parameters = faiss.SearchParametersIVF(nprobe=probe_count(self.index.nlist))
        limits, _, row = self.index.range_search(query_QD, max(-1.0, threshold - MARGIN), params=parameters)
        i = start + np.repeat(np.arange(len(query_QD)), np.diff(limits.astype(np.int64)))
        i, j = i[i != row], row[i != row]
        low, high = np.divmod(np.unique(np.minimum(i, j) * self.rows + np.maximum(i, j)), self.rows)
        score = cosines(x_ND, low, high)
        is_above = score > threshold
        yield low[is_above], high[is_above], score[is_above]

    def save(self, folder: Path) -> None:
        _faiss().write_index(self.index, str(folder / "faiss.index"))

    @staticmethod
    def load(folder: Path) -> "FaissIndex":
        index = _faiss().read_index(str(folder / "faiss.index"))
        return FaissIndex(index, index.ntotal)
