"""Two pictures, one laid over the other by a map: how well their pixels agree, as thumbnails.

Frames of one colour count nothing, and neither do brightness and contrast.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy import ndarray

from troodon.copies.local_features import THUMBNAIL

# Shape suffixes: N pixels, G rows and columns of a thumbnail; 33: a map of homogeneous coordinates.

WINDOW = 9  # pixels of a thumbnail that are compared at a time
MIN_STRUCTURE = 0.5  # deviation in levels of 255, on average: less is no structure
BLUR = 1.5  # pixels of a thumbnail
EVEN = 3.0  # levels of 255 by which pixels vary: less is even
DETAIL, EVEN_WINDOW = 2.0, 5  # pixels of a thumbnail: what is finer is detail, and what is looked at for evenness
INNER_EDGE = 0.5  # share of the inner edge of a frame where the picture has another colour
FRAME = 10  # levels of 255: a frame of one colour varies less

# The centre of a pixel is its place.
_THUMBNAIL_33 = np.array([[THUMBNAIL, 0, -0.5], [0, THUMBNAIL, -0.5], [0, 0, 1.0]])
_SHARES_33 = np.linalg.inv(_THUMBNAIL_33)


class Picture(NamedTuple):
    """A thumbnail, and what of it lies inside a frame of one colour: pictures in frames alike may differ."""

    grey_GG: ndarray  # uint8
    inside_GG: ndarray  # uint8, 255 inside and 0 outside
    to_inside_33: ndarray  # from shares of what is inside to shares of the picture

    @staticmethod
    def of(grey_GG: ndarray) -> "Picture":
        left, right, top, bottom = frame(grey_GG)
        to_inside_33 = np.array([[1 - left - right, 0, left], [0, 1 - top - bottom, top], [0, 0, 1.0]])
        inside_GG = np.full_like(grey_GG, 255)
        for lines_GG, width in (
            (inside_GG.T, left),
            (inside_GG.T[::-1], right),
            (inside_GG, top),
            (inside_GG[::-1], bottom),
        ):
            lines_GG[: round(width * THUMBNAIL) + 1 if width else 0] = 0  # and one line that is half of either
        return Picture(grey_GG, inside_GG, to_inside_33)

    def blurred(self) -> "Picture":
        return self._replace(grey_GG=cv2.GaussianBlur(self.grey_GG, (0, 0), BLUR))


class Compared(NamedTuple):
    """How well the pixels of two thumbnails agree after a map."""

    correlation_N: ndarray  # in windows, the lowest first
    structure_N: ndarray  # that both have, up to there
    overlap: tuple[float, float]  # shares of both that overlap, frames included

    def of(self, share: float) -> float:
        """The correlation that this share of the structure reaches; 0 where nothing is to be compared.

        In pictures of one scene from another place, or with something moved, parts agree and others do not; the
        average of both is high.
        """
        if not len(self.structure_N):
            return 0.0
        return float(self.correlation_N[np.searchsorted(self.structure_N, (1 - share) * self.structure_N[-1])])


_NOTHING = np.zeros(0, np.float32)


def compare_pixels(i: Picture, j: Picture, map_33: ndarray) -> Compared:
    """Compare two thumbnails after a map.

    Correlation in windows, which ignores brightness and contrast, weighted by the structure that both have: an even sky
    says little, text that only one has counts little, and frames count nothing.
    """
    scale = abs(np.linalg.det(map_33[:2, :2]))
    if scale > 1:  # the other is reduced: a reduced image has all that an enlarged one shows
        compared = compare_pixels(j, i, np.linalg.inv(map_33))
        return compared._replace(overlap=compared.overlap[::-1])
    if scale < 1e-6:
        return Compared(_NOTHING, _NOTHING, (0.0, 0.0))
    covered_GG, x_GG, inside_GG = _laid_over(i, j, map_33, scale)
    overlap_j = float(covered_GG.mean())
    overlap = (min(1.0, overlap_j / scale), overlap_j)
    if inside_GG.sum() < WINDOW:
        return Compared(_NOTHING, _NOTHING, overlap)
    return Compared(*_correlation(x_GG, j.grey_GG.astype(np.float32), inside_GG), overlap)


def _laid_over(i: Picture, j: Picture, map_33: ndarray, scale: float) -> tuple[ndarray, ndarray, ndarray]:
    """A thumbnail, reduced to `scale` of its area, where the map takes it: the pixels of the other that it covers, its
    values there, and where they are compared: outside all frames."""
    side, size = max(4, round(THUMBNAIL * scale**0.5)), (THUMBNAIL, THUMBNAIL)
    small_GG, inside_GG, from_small_33 = i.grey_GG, i.inside_GG, _SHARES_33
    if side < THUMBNAIL:
        small_GG, inside_GG = (cv2.resize(z, (side, side), interpolation=cv2.INTER_AREA) for z in (small_GG, inside_GG))
        from_small_33 = np.linalg.inv(np.array([[side, 0, -0.5], [0, side, -0.5], [0, 0, 1.0]]))
    warp_23 = (_THUMBNAIL_33 @ map_33 @ from_small_33)[:2]
    x_GG = cv2.warpAffine(small_GG, warp_23, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    covered_GG, compared_GG = (
        cv2.warpAffine(z, warp_23, size, flags=cv2.INTER_LINEAR) > 250 for z in (np.full_like(small_GG, 255), inside_GG)
    )
    return covered_GG, x_GG.astype(np.float32), compared_GG & (j.inside_GG > 0)


def compare_details(i: Picture, j: Picture, map_33: ndarray) -> tuple[float, float]:
    """The share of two thumbnails that is even in both, after a map, and the correlation of all that is fine."""
    scale = abs(np.linalg.det(map_33[:2, :2]))
    if scale > 1:
        return compare_details(j, i, np.linalg.inv(map_33))
    _, x_GG, inside_GG = _laid_over(i, j, map_33, scale)
    both, window = (x_GG, j.grey_GG.astype(np.float32)), (EVEN_WINDOW, EVEN_WINDOW)
    varies_GG = np.maximum(*(cv2.blur(z_GG * z_GG, window) - cv2.blur(z_GG, window) ** 2 for z_GG in both))
    even = float((varies_GG[inside_GG] < EVEN**2).mean())
    x_N, y_N = ((z_GG - cv2.GaussianBlur(z_GG, (0, 0), DETAIL))[inside_GG] for z_GG in both)
    norm = float(np.linalg.norm(x_N) * np.linalg.norm(y_N))
    return even, float(x_N @ y_N) / norm if norm else 1.0


def _correlation(x_GG: ndarray, y_GG: ndarray, inside_GG: ndarray) -> tuple[ndarray, ndarray]:
    """Correlations in windows, the lowest first, and the structure that both have up to each; nothing without any."""
    window = (WINDOW, WINDOW)
    weight_GG = inside_GG.astype(np.float32)
    share_GG = np.maximum(cv2.blur(weight_GG, window), 1e-6)

    def mean(z_GG: ndarray) -> ndarray:
        return cv2.blur(z_GG * weight_GG, window) / share_GG

    mean_x, mean_y = mean(x_GG), mean(y_GG)
    var_x = np.maximum(mean(x_GG * x_GG) - mean_x * mean_x, 0)
    var_y = np.maximum(mean(y_GG * y_GG) - mean_y * mean_y, 0)
    covariance = mean(x_GG * y_GG) - mean_x * mean_y
    local_GG = covariance / np.sqrt(np.maximum(var_x, 4) * np.maximum(var_y, 4))
    structure_GG = np.sqrt(np.minimum(var_x, var_y)) * weight_GG
    order = np.argsort(local_GG, axis=None)
    up_to = np.cumsum(structure_GG.ravel()[order])
    if up_to[-1] <= inside_GG.sum() * MIN_STRUCTURE:
        return _NOTHING, _NOTHING
    return local_GG.ravel()[order], up_to


def refine(i_GG: ndarray, j_GG: ndarray, map_33: ndarray) -> ndarray:
    """The map nearby for which the pixels correlate best (Evangelidis and Psarakis, 2008)."""
    inverse_23 = (_THUMBNAIL_33 @ np.linalg.inv(map_33) @ _SHARES_33)[:2].astype(np.float32)
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 30, 1e-3)
    try:
        _, inverse_23 = cv2.findTransformECC(j_GG, i_GG, inverse_23, cv2.MOTION_AFFINE, stop, None, 5)
    except cv2.error:  # it does not converge
        return map_33
    inverse_33 = np.vstack([inverse_23.astype(np.float64), [0, 0, 1]])
    if abs(np.linalg.det(inverse_33)) < 1e-6:
        return map_33
    return _SHARES_33 @ np.linalg.inv(inverse_33) @ _THUMBNAIL_33


def frame(picture_GG: ndarray) -> tuple[float, float, float, float]:
    """The widths of a frame of one colour, as shares of the picture: left, right, top, bottom; 0 where there is none.

    Both sides must have one, of the same colour, and the picture must begin along most of its inner edge: a sky is
    none, nor is a white ground around an object.
    """
    widths, colours = [], []
    for turned in (picture_GG.T, picture_GG.T[::-1], picture_GG, picture_GG[::-1]):
        lines = turned.astype(np.float32)
        colour = float(np.median(lines[0]))
        differs = np.abs(lines - colour).max(1) > FRAME
        width = int(differs.argmax()) if differs.any() else 0
        edge = (np.abs(lines[width : width + 2] - colour) > FRAME).mean(1)
        widths.append(width if edge.max() >= INNER_EDGE else 0)
        colours.append(colour)
    shares = [0.0] * 4
    for first in (0, 2):
        width = min(widths[first : first + 2])
        same = abs(colours[first] - colours[first + 1]) <= FRAME
        if same and width > 0 and max(widths[first : first + 2]) < THUMBNAIL * 0.4:
            shares[first], shares[first + 1] = (widths[k] / THUMBNAIL for k in (first, first + 1))
    return shares[0], shares[1], shares[2], shares[3]
