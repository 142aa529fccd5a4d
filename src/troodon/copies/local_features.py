"""Local features of an image: points with descriptors that survive crops, turns, frames and insets, and a thumbnail.

Descriptors are those of ORB (Rublee and others, 2011): 256 bits, the same however the picture is turned, but not if it
is mirrored; so the mirror image has its own. Points are spread over a grid, since a line of text would take all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy import ndarray

from troodon.copies.hashes import perceptual_hash

# Shape suffixes: N images, K points, G rows and columns of a thumbnail; 2: the picture and its mirror image.

SIDE = 320  # pixels of the longer side when points are searched; smaller pictures are enlarged
POINTS = 256  # at most, of each image and of its mirror image
GRID = 4  # rows and columns of the cells over which points are spread
THUMBNAIL = 64  # rows and columns, whatever the shape of the picture
DETECTED = 400  # points from which those that are spread are chosen
_ONE = 65535  # the width or height of an image, in the unit of stored points

cv2.setNumThreads(1)  # threads read images beside one another


class LocalFeatures(NamedTuple):
    """Of one image. Positions are shares of width and height, so that they do not depend on its size."""

    points_2K2: ndarray  # uint16 x, y in units of 1 / 65535
    descriptors_2K32: ndarray  # uint8
    count_2: ndarray  # uint16, points that there are
    thumbnail_GG: ndarray  # uint8, grey
    aspect: float  # width / height
    hash_8: ndarray  # uint64, perceptual hashes of the picture in eight orientations; 0 for none

    def points(self, mirrored: bool) -> ndarray:
        """Points (K, 2) float32 in [0, 1] of the picture, or of its mirror image."""
        return self.points_2K2[int(mirrored), : self.count_2[int(mirrored)]].astype(np.float32) / _ONE

    def descriptors(self, mirrored: bool) -> ndarray:
        """Descriptors (K, 32) uint8 of the points."""
        return self.descriptors_2K32[int(mirrored), : self.count_2[int(mirrored)]]


def local_features(image_HWC: ndarray) -> LocalFeatures:
    """Compute the local features of uint8 pixels (H, W, C) of any number of channels."""
    grey_HW = grey(image_HWC)
    height, width = grey_HW.shape
    factor = SIDE / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    large_HW = cv2.resize(grey_HW, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    points, descriptors = np.zeros((2, POINTS, 2), np.uint16), np.zeros((2, POINTS, 32), np.uint8)
    count = np.zeros(2, np.uint16)
    for mirrored, (found_K2, bits_K32) in enumerate(_detect(large_HW)):
        count[mirrored] = len(found_K2)
        points[mirrored, : len(found_K2)] = np.round(found_K2 / np.array(size) * _ONE)
        descriptors[mirrored, : len(found_K2)] = bits_K32
    small_GG = thumbnail(grey_HW)
    hash_8 = np.array([perceptual_hash(turned[..., None]) or 0 for turned in orientations(small_GG)], np.uint64)
    return LocalFeatures(points, descriptors, count, small_GG, width / height, hash_8)


def orientations(picture: ndarray) -> list[ndarray]:
    """A picture in eight orientations: o % 4 quarter turns clockwise, after a mirror if o >= 4."""
    return [np.rot90(side, -turns) for side in (picture, picture[:, ::-1]) for turns in range(4)]


def grey(image_HWC: ndarray) -> ndarray:
    """Grey values (H, W) of the first channel, or of the first three."""
    if image_HWC.shape[2] < 3:
        return np.ascontiguousarray(image_HWC[..., 0])
    return cv2.cvtColor(np.ascontiguousarray(image_HWC[..., :3]), cv2.COLOR_RGB2GRAY)


def thumbnail(picture: ndarray, side: int = THUMBNAIL) -> ndarray:
    """A picture (H, W) or (H, W, C) as a square of `side` pixels."""
    smaller = min(picture.shape[:2]) >= side
    return cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)


def _detect(grey_HW: ndarray) -> list[tuple[ndarray, ndarray]]:
    """Points (K, 2) in pixels and their descriptors (K, 32), of a picture and of its mirror image: at most POINTS, the
    strongest of each cell first."""
    detector = cv2.ORB.create(nfeatures=DETECTED, fastThreshold=7, edgeThreshold=15, patchSize=31)
    found = detector.detect(grey_HW, None)
    if not found:
        return [(np.zeros((0, 2), np.float32), np.zeros((0, 32), np.uint8))] * 2
    point_K2 = np.array([point.pt for point in found], np.float32)
    response_K = np.array([point.response for point in found], np.float32)
    height, width = grey_HW.shape
    column_K = np.minimum(point_K2[:, 0] * GRID // width, GRID - 1)
    row_K = np.minimum(point_K2[:, 1] * GRID // height, GRID - 1)
    cell_K = row_K * GRID + column_K
    order = np.lexsort((-response_K, cell_K))
    starts = np.flatnonzero(np.r_[True, np.diff(cell_K[order]) > 0])
    rank_K = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    order = order[np.lexsort((-response_K[order], rank_K))][:POINTS]
    chosen = [found[k] for k in order]
    mirrored = [
        cv2.KeyPoint(width - 1 - p.pt[0], p.pt[1], p.size, (180 - p.angle) % 360, place, p.octave, p.class_id)
        for place, p in enumerate(chosen)
    ]
    for place, point in enumerate(chosen):
        point.response = place  # `compute` gives them back in another order
    described = []
    for points, picture in ((chosen, grey_HW), (mirrored, np.ascontiguousarray(grey_HW[:, ::-1]))):
        points, bits_K32 = detector.compute(picture, points)
        places = np.argsort([point.response for point in points])
        described.append((np.array([point.pt for point in points], np.float32)[places], bits_K32[places]))
    return described


FILES = ("points", "descriptors", "count", "thumbnail", "aspect", "hashes")  # of a folder, one array each


def save_features(features: Sequence[LocalFeatures | None], folder: Path) -> None:
    """Write the features of images; None becomes an image without points."""
    nothing = LocalFeatures(
        np.zeros((2, POINTS, 2), np.uint16), np.zeros((2, POINTS, 32), np.uint8), np.zeros(2, np.uint16),
        np.zeros((THUMBNAIL, THUMBNAIL), np.uint8), 1.0, np.zeros(8, np.uint64),
    )  # fmt: skip
    columns = zip(*(nothing if f is None else f for f in (*features, None)))  # one more, so that none has a shape too
    for name, column in zip(FILES, columns, strict=True):
        np.save(folder / f"{name}.npy", np.stack([np.asarray(value) for value in column])[:-1])


@dataclass(frozen=True)
class SavedFeatures:
    """Local features of many images, memory-mapped, in folders of `size` images each (the last one may have fewer)."""

    folders: tuple[Path, ...]
    size: int

    def __len__(self) -> int:
        return sum(len(np.load(folder / "count.npy", mmap_mode="r")) for folder in self.folders)

    def load(self, part: int) -> list[ndarray]:
        """The arrays of one folder."""
        return [np.load(self.folders[part] / f"{name}.npy", mmap_mode="r") for name in FILES]

    def reader(self) -> "FeatureReader":
        return FeatureReader([self.load(part) for part in range(len(self.folders))], self.size)


@dataclass(frozen=True)
class FeatureReader:
    """Opened features: `reader[row]` are those of one image."""

    parts: list[list[ndarray]]
    size: int

    def __getitem__(self, row: int) -> LocalFeatures:
        arrays, at = self.parts[row // self.size], row % self.size
        points, descriptors, count, thumb, aspect, hashes = (array[at] for array in arrays)
        return LocalFeatures(points, descriptors, count, thumb, float(aspect), hashes)
