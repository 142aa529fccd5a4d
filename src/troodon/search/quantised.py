"""Near pairs by faiss: an inverted file with product quantisation, for matrices that do not fit into memory.

Codes take a sixteenth of the room of float32 and propose; a score from a code is off by 0.07, so whatever comes within
MARGIN of the threshold is scored again from its two rows (of 200,000 rows that kept 99.98 % of the pairs, at three
proposals a row). Raw scores would lose a fifth of the copies and make false ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from troodon.config import UsageError
from troodon.search.exact import cosines, unit
from troodon.search.lists import ITERATIONS, count_for, probes_for

MARGIN = 0.2
CHANNELS = 8  # that one byte stands for
SAMPLED = 64  # rows for each list that the training sees
BLOCK = 65_536  # rows of one partition


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UsageError("search faiss: needs the extra: pip install 'troodon[faiss]'") from None
    return faiss


@dataclass(frozen=True)
class Quantised:
    """An index of faiss, and how many rows it holds."""

    index: Any
    rows: int

    def __len__(self) -> int:
        return -(-self.rows // BLOCK)

    @staticmethod
    def of(x_ND: ndarray, seed: int = 0) -> "Quantised":
        """Train on a sample, add all rows. UsageError without faiss."""
        faiss = _faiss()
        rows, channels = x_ND.shape
        lists = min(count_for(rows), max(1, rows // 39))  # faiss wants 39 rows to a centroid
        parts = next(p for p in range(max(1, channels // CHANNELS), 0, -1) if channels % p == 0)
        kind = f"IVF{lists},PQ{parts}x8" if rows >= 256 * 39 else f"IVF{lists},Flat"
        index = faiss.index_factory(channels, kind, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        for clustering in (index.cp, *([index.pq.cp] if "PQ" in kind else [])):
            clustering.niter = ITERATIONS
        drawn = np.random.default_rng(seed).permutation(rows)[: max(lists * SAMPLED, 256 * 64)]
        index.train(unit(x_ND[np.sort(drawn)]))
        for start in range(0, rows, BLOCK):
            index.add(unit(x_ND[start : start + BLOCK]))
        return Quantised(index, rows)

    def near(self, x_ND: ndarray, threshold: float, at: int) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
        """Edges with a row in block `at`; see join.py. Those between two blocks may come from both."""
        start = at * BLOCK
        faiss = _faiss()
        query_QD = unit(x_ND[start : start + BLOCK])
        sought = faiss.SearchParametersIVF(nprobe=probes_for(self.index.nlist))
        lims, _, found = self.index.range_search(query_QD, max(-1.0, threshold - MARGIN), params=sought)
        i = start + np.repeat(np.arange(len(query_QD)), np.diff(lims.astype(np.int64)))
        i, j = i[i != found], found[i != found]
        low, high = np.divmod(np.unique(np.minimum(i, j) * self.rows + np.maximum(i, j)), self.rows)
        score = cosines(x_ND, low, high)
        sure = score > threshold
        yield low[sure], high[sure], score[sure]

    def save(self, folder: Path) -> None:
        _faiss().write_index(self.index, str(folder / "faiss.index"))

    @staticmethod
    def load(folder: Path) -> "Quantised":
        index = _faiss().read_index(str(folder / "faiss.index"))
        return Quantised(index, index.ntotal)
