"""Pairs of images that resemble one another, the most alike first: by their vectors, or as a ledger has them."""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from troodon.explore.collection import Collection
from troodon.explore.layout import Layout

MAX_PAIRS = 200_000
COPY_STAGES = ("exact", "hash", "colour", "duplicate")


@dataclass(frozen=True)
class Pairs:
    """P pairs: of a ledger, `row` was left out for `other`."""

    row_P: ndarray
    other_P: ndarray
    score_P: ndarray

    def __len__(self) -> int:
        return len(self.row_P)


def similar(layout: Layout) -> Pairs:
    """Neighbours on the map, each pair once, by the cosine of their vectors."""
    row_P, column_P = np.nonzero(layout.row_Nk >= 0)
    other_P, score_P = layout.row_Nk[row_P, column_P].astype(np.int64), layout.score_Nk[row_P, column_P]
    best = np.argsort(-score_P, kind="stable")[: 2 * MAX_PAIRS]
    low, high = np.minimum(row_P[best], other_P[best]), np.maximum(row_P[best], other_P[best])
    _, first = np.unique(low * np.int64(len(layout.row_Nk)) + high, return_index=True)
    first = np.sort(first)[:MAX_PAIRS]
    return Pairs(low[first], high[first], score_P[best][first])


def copies(collection: Collection) -> Pairs:
    """Images that were left out as copies, and the one that each is a copy of."""
    return _of_ledger(collection, COPY_STAGES)


def leaks(collection: Collection) -> Pairs:
    """Images that were left out for a benchmark image."""
    return _of_ledger(collection, ("benchmark",))


def _of_ledger(collection: Collection, stages: tuple[str, ...]) -> Pairs:
    cause_N = collection.column("cause", -1).astype(np.int64)
    stage_N = collection.column("stage", "").astype(str)
    rows = np.flatnonzero(np.isin(stage_N, stages) & (cause_N >= 0) & (cause_N < len(cause_N)))
    score_P = np.nan_to_num(collection.column("score", np.nan)[rows].astype(np.float32), nan=1.0)
    rows = rows[order := np.lexsort((rows, -score_P))][:MAX_PAIRS]
    return Pairs(rows, cause_N[rows], score_P[order][:MAX_PAIRS])
