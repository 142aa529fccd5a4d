"""How embeddings are compared: as they are, centred, or whitened.

Small or young networks give embeddings that all point one way: cosines of different images lie above 0.9, and those
of copies among them. Whitened on the images at hand, copies stand out again. Measured, plain -> whitened:

    copies found where one image in fifty is wrongly merged, among 11,500 photographs of 64 pixels
        8 x 8 pixels                0.59 -> 0.90
        a small trained CNN         0.22 -> 0.26, among 5,750
        an untrained ViT            0.10 -> 0.07: nothing helps
    near-duplicates in CIFAR-10, as people judge, found by 8 x 8 pixels at calibrated thresholds
                                    0.37 -> 0.89
    images of the same class, of 50, among the four nearest
        the same three networks     0.065 -> 0.082, 0.194 -> 0.204, 0.057 -> 0.063
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from troodon.curate import config
from troodon.search.exact import unit

# Shape suffixes: N images, D channels of an embedding, K of the space, B images of one block.

COMPONENTS = 128  # at most: enough to tell images apart, and the joins cost a third of what 384 channels do
VARIANCE = 0.99  # share of the variance that they hold
SHRINKAGE = 0.2  # of the variances towards their mean: few images leave the small ones badly known
BLOCK = 8192


@dataclass(frozen=True)
class Space:
    """A map from embeddings to vectors whose cosines are compared."""

    mean_D: ndarray | None = None
    matrix_DK: ndarray | None = None

    def __call__(self, x_ND: ndarray) -> ndarray:
        """(N, D) of any float type -> (N, K) float32 of length one; plain ones come back as they are."""
        if self.mean_D is None:
            return x_ND
        parts = [self._map(x_ND[start : start + BLOCK]) for start in range(0, len(x_ND), BLOCK)]
        return np.concatenate(parts) if parts else self._map(x_ND[:0])

    def save(self, path: Path) -> None:
        np.savez(path, **{name: value for name, value in vars(self).items() if value is not None})

    @staticmethod
    def load(path: Path) -> "Space":
        with np.load(path) as file:
            return Space(**file)

    def _map(self, x_BD: ndarray) -> ndarray:
        x_BD = unit(x_BD) - self.mean_D
        return unit(x_BD if self.matrix_DK is None else x_BD @ self.matrix_DK)


def fit(kind: config.Space, x_ND: Any, rows_N: ndarray | None = None) -> Space:
    """The space of this kind for these rows of a matrix, all if none are told: two passes over them, some at a time, in
    float64 where they are summed up."""
    rows_N = np.arange(len(x_ND)) if rows_N is None else rows_N
    if kind == "plain" or not len(rows_N):
        return Space()
    channels, count = x_ND[:1].shape[1], len(rows_N)
    mean_D = sum((block_BD.sum(0, dtype=np.float64) for block_BD in _blocks(x_ND, rows_N)), np.zeros(channels)) / count
    mean_D = mean_D.astype(np.float32)
    if kind == "centred":
        return Space(mean_D)
    covariance_DD = np.zeros((channels, channels))
    for block_BD in _blocks(x_ND, rows_N):
        block_BD -= mean_D
        covariance_DD += block_BD.T @ block_BD
    variance_D, axes_DD = np.linalg.eigh(covariance_DD / count)
    variance_D, axes_DD = variance_D[::-1].clip(min=0), axes_DD[:, ::-1]
    if variance_D.sum() < 1e-12:  # all embeddings are the same
        return Space(mean_D)
    needed = int(np.searchsorted(variance_D.cumsum() / variance_D.sum(), VARIANCE)) + 1
    kept = min(needed, COMPONENTS, max(1, count - 1))
    variance_K = (1 - SHRINKAGE) * variance_D[:kept] + SHRINKAGE * variance_D[:kept].mean()
    return Space(mean_D, (axes_DD[:, :kept] / np.sqrt(variance_K)).astype(np.float32))


def _blocks(x_ND: Any, rows_N: ndarray) -> Iterator[ndarray]:
    for start in range(0, len(rows_N), BLOCK):
        yield unit(x_ND[rows_N[start : start + BLOCK]])
