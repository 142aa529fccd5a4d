"""Leaks: images that are near-duplicates of a benchmark's, and would make its scores mean less.

Relative de-duplication (https://arxiv.org/abs/2304.07193, appendix A.3): against other images, and with another
threshold, than de-duplication of a pool in itself.

A benchmark is small and its copies may not get through, so its images are compared with in disguise too: padded,
turned, mirrored, written on. A padded copy in the pool is far from its original, and near to the padded original.
"""

import zlib
from collections.abc import Iterable

import numpy as np
from numpy import ndarray

from troodon.curate.dedup import Edges, components
from troodon.data.attacks import attack
from troodon.search.exact import above, pairs_above

# The attacks that networks bear least, and their strengths. The first ones matter most.
DISGUISES = (
    ("flip", 1.0), ("pad", 0.5), ("rotate", 0.5), ("screenshot", 0.5), ("crop", 0.5), ("grey", 0.8), ("sticker", 0.5),
    ("text", 0.5), ("pad", 0.2), ("pad", 0.65), ("rotate", 0.35), ("rotate", 0.65), ("crop", 0.35), ("crop", 0.65),
    ("mix", 0.35), ("mix", 0.65), ("pad", 0.4), ("pad", 0.8), ("sticker", 0.35), ("sticker", 0.65), ("text", 0.35),
    ("text", 0.65), ("screenshot", 0.35), ("screenshot", 0.65), ("stretch", 0.35), ("stretch", 0.65), ("pad", 0.35),
    ("pad", 0.6), ("rotate", 0.8), ("grey", 0.5),
)  # fmt: skip


def disguised(image: ndarray, count: int) -> list[ndarray]:
    """The image (H, W, 3) uint8 in the first `count` disguises, and always in the same."""
    random = np.random.default_rng(zlib.crc32(image.tobytes()))
    return [attack(image, kind, random, strength) for kind, strength in DISGUISES[:count]]


def leaks(x_ND: ndarray, benchmark_MD: ndarray, threshold: float, *, mode: str = "direct") -> tuple[ndarray, ndarray]:
    """Which images resemble a benchmark's, cosine above `threshold`: for each the row of the benchmark image, -1 for
    none, and their cosine.

    "direct": the nearest one. "component": so also images that resemble one that does, and so on, which is the paper's
    way, takes far more, and chains; these name the benchmark image of the one they hang on, with no cosine (nan).
    """
    hits = above(x_ND, threshold, benchmark_MD)
    row_N, score_N = nearest_hits(len(x_ND), hits)
    if mode == "component":
        row_N = spread(row_N, score_N, [pairs_above(x_ND, threshold)])
    return row_N, score_N


def nearest_hits(count: int, hits: Iterable[Edges]) -> tuple[ndarray, ndarray]:
    """Of each of `count` images the best hit: row (N,) int64, -1 for none, and score (N,) float32, nan for none. Among
    equals the lower row, in whatever order hits come."""
    row_N, score_N = np.full(count, -1, np.int64), np.full(count, np.nan, np.float32)
    for i, j, score in hits:
        i, j, score = (np.r_[before, new] for before, new in ((np.flatnonzero(row_N >= 0), i), (row_N[row_N >= 0], j),
                                                              (score_N[row_N >= 0], score)))  # fmt: skip
        order = np.lexsort((j, -score, i))
        first = order[np.flatnonzero(np.r_[True, np.diff(i[order]) > 0][: len(order)])]
        row_N[i[first]], score_N[i[first]] = j[first], score[first]
    return row_N, score_N


def spread(row_N: ndarray, score_N: ndarray, edges: Iterable[Edges]) -> ndarray:
    """The hits of `row_N`, and for images joined to one of these by edges its hit; the best of a component's."""
    label_N = components(len(row_N), edges)
    hit = np.flatnonzero(row_N >= 0)
    order = hit[np.lexsort((hit, -score_N[hit], label_N[hit]))]
    first = order[np.flatnonzero(np.r_[True, np.diff(label_N[order]) > 0][: len(order)])]
    of_component = np.full(len(row_N), -1, np.int64)
    of_component[label_N[first]] = row_N[first]
    return np.where(row_N >= 0, row_N, of_component[label_N])
