"""Spaces in which embeddings are compared: plain, centred, or whitened.

Embeddings of small or briefly trained networks all point in one direction: different images have cosines above 0.9, as
high as copies. Whitening, fitted on the images at hand, separates the copies again. Measured, plain -> whitened:

    recall of copies at one false merge per fifty images, among 11,500 photographs of 64 pixels
        8 x 8 pixels                0.59 -> 0.90
        a small trained CNN         0.22 -> 0.26, among 5,750
        an untrained ViT            0.10 -> 0.07: whitening does not help
    near-duplicates in CIFAR-10, as people judge, found by 8 x 8 pixels at calibrated thresholds
                                    0.37 -> 0.89
    share of images of the same class, of 50 classes, among the four nearest
        the same three networks     0.065 -> 0.082, 0.194 -> 0.204, 0.057 -> 0.063
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from troodon.curate import config
from troodon.search.exact import l2_normalise

# Shape suffixes: N images, D channels of an embedding, K of the space, B images of one block.

MAX_COMPONENTS = 128  # enough to tell images apart; the joins cost a third of those of 384 channels
VARIANCE = 0.99  # share of the variance that the components explain
SHRINKAGE = 0.2  # of the variances towards their mean: with few images, small variances are poorly estimated
BLOCK = 8192


@dataclass(frozen=True)
class Space:
    """A linear map from embeddings to the vectors whose cosines are compared."""

    mean_D: ndarray | None = None
    matrix_DK: ndarray | None = None

    def __call__(self, x_ND: ndarray) -> ndarray:
        """(N, D) of any float type -> (N, K) float32 of unit length. The plain space returns its input."""
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
        x_BD = l2_normalise(x_BD) - self.mean_D
        return l2_normalise(x_BD if self.matrix_DK is None else x_BD @ self.matrix_DK)


def fit(kind: config.SpaceKind, x_ND: Any, rows_N: ndarray | None = None) -> Space:
    """Fit the space of this kind to these rows of a matrix, by default all. Makes two passes over them in blocks, and
    sums in float64."""
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
    if variance_D.sum() < 1e-12:  # all embeddings are equal
        return Space(mean_D)
    needed = int(np.searchsorted(variance_D.cumsum() / variance_D.sum(), VARIANCE)) + 1
    components = min(needed, MAX_COMPONENTS, max(1, count - 1))
    variance_K = (1 - SHRINKAGE) * variance_D[:components] + SHRINKAGE * variance_D[:components].mean()
    return Space(mean_D, (axes_DD[:, :components] / np.sqrt(variance_K)).astype(np.float32))


def _blocks(x_ND: Any, rows_N: ndarray) -> Iterator[ndarray]:
    for start in range(0, len(rows_N), BLOCK):
        yield l2_normalise(x_ND[rows_N[start : start + BLOCK]])
