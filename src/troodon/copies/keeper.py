"""Which one of a group of copies is kept: the original, as far as the copies tell.

The others vote: edits differ from one another, and most of them leave the shape and most of the picture as they were.
So the kept one has the shape of most and lies in their middle. Where votes tie, as between two images: what is framed,
pasted into another picture, cropped, written on or grey goes; then the image with more detail stays, the one that was
saved finer, that has a date, a plain name, more bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy import ndarray

from troodon.copies.compare import frame

# Shape suffixes: M members of a group; 33: a map of homogeneous coordinates; 42: x and y of four corners.

PICTURE = 128  # rows and columns of the pictures that are compared
SAME_PLACE = 0.03  # of the side: corners of images of the same shape lie nearer
SAME_ASPECT = 0.03  # relative difference of width / height
SAME_EXTENT = 0.05  # relative difference of the area that is shown
SAME_PICTURE = 1.0  # levels of 255 by which distances to the others may differ
SAME_SHARE = 0.15  # of the smallest of these distances, likewise
SAME_SHARPNESS = 0.4  # logarithm of the relative difference from that of most
SAME_DETAIL = 0.15  # relative difference of the number of pixels
COLOURFUL = 1.5  # mean distance of the channels from their mean, in levels: less is grey
CLIPPED = 0.03  # share of black and white pixels that one has more than the other
SEAM = 1.5  # times the largest gradient beside it: the edge of a picture that was pasted into another
WRITING = 1.5  # times the detail of the picture in that place
MIN_WRITING = 4.0  # mean squared difference, in levels of 255
LOCAL = 0.6  # share of the squared difference in a tenth of the picture: something is written there
EDITED = re.compile(r"copy|edit|thumb|small|resiz|crop|rotat|scaled|preview|\(\d+\)|[-_]\d+x\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Traits:
    """What is known of one image of a group."""

    picture: ndarray  # (PICTURE, PICTURE, 3) uint8
    width: int
    height: int
    detail: float = 1.0  # share of width and height at which nothing is lost: below 1 for an enlarged picture
    sharpness: float = 0.0  # mean size of the second derivative, in levels
    fineness: float = 0.0  # of its JPEG tables; 0 without loss, smaller is coarser
    dated: bool = False  # it has a capture date
    name: str = ""
    length: int = 0  # bytes
    preferred: int = 0  # larger is kept first, before everything else
    score: float = 0.0  # of the user's own, the same

    @property
    def aspect(self) -> float:
        return self.width / self.height

    @property
    def pixels(self) -> float:
        """Pixels that carry detail."""
        return self.width * self.height * self.detail**2


def is_edited(path: str) -> bool:
    """Whether the name of a file tells that it was made from another one."""
    return EDITED.search(path.rpartition("/")[2]) is not None


def rank(members: Sequence[Traits], maps_M33: Sequence[ndarray]) -> tuple[list[int], list[str]]:
    """The order in which members are kept, and for each member but the first why the first is better.

    `maps_M33` take each member to the places of one of them. The order of equal members is that given.
    """
    corners_M42 = np.stack([_corners(map_33) for map_33 in maps_M33])
    columns = _criteria(members, corners_M42, maps_M33)
    values = np.stack([column for _, column in columns])
    order = np.lexsort((np.arange(len(members)), *-values[::-1])).tolist()
    reasons = [""] * len(members)
    for member in order[1:]:
        better = np.flatnonzero(values[:, order[0]] > values[:, member])
        reasons[member] = columns[better[0]][0] if len(better) else "which comes first"
    return order, reasons


def _criteria(
    members: Sequence[Traits], corners_M42: ndarray, maps_M33: Sequence[ndarray]
) -> list[tuple[str, ndarray]]:
    """Numbers (M,), larger is better, the most important first, and what it means that one is better."""
    shape_MM = _same_shape(members, corners_M42)
    votes_M = shape_MM.sum(1)
    framed_M = np.array([max(frame(cv2.cvtColor(m.picture, cv2.COLOR_RGB2GRAY))) > 0.01 for m in members])
    extent_M, pasted_M = _extents(members, corners_M42, maps_M33)
    distance_M = _distance_to_others(members, shape_MM, votes_M)
    grey_M = np.array([_colour(m.picture) < COLOURFUL for m in members])
    pixels_M = np.array([m.pixels for m in members])
    return [
        ("which is preferred", np.array([float(m.preferred) for m in members])),
        ("which has the better score", np.array([m.score for m in members])),
        ("which has the shape of most", np.where(votes_M.max() > 2, votes_M, 0)),
        ("which has no frame", -framed_M.astype(float)),
        ("which is not pasted into another picture", -pasted_M.astype(float)),
        ("which shows more", _steps(np.array([np.median(extent_M[same_M]) for same_M in shape_MM]), SAME_EXTENT)),
        ("which is not grey", -grey_M.astype(float)),
        ("which is not written on", -_written_on(members, shape_MM).astype(float)),
        ("which the others resemble most", -_beyond(distance_M, max(SAME_PICTURE, distance_M.min() * SAME_SHARE))),
        ("which is as sharp as most", -_beyond(_off_sharpness(members), SAME_SHARPNESS)),
        ("which has more detail", _steps(pixels_M, SAME_DETAIL)),
        ("which has fewer black and white pixels", -_beyond(np.array([_clipped(m.picture) for m in members]), CLIPPED)),
        ("which was saved finer", np.array([m.fineness for m in members])),
        ("which has a capture date", np.array([float(m.dated) for m in members])),
        ("which has a plain name", np.array([-float(is_edited(m.name)) for m in members])),
        ("which has more bytes", np.array([float(m.length) for m in members])),
    ]


def _corners(map_33: ndarray) -> ndarray:
    return np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]]) @ map_33[:2, :2].T + map_33[:2, 2]


def _area(corners_42: ndarray) -> float:
    x, y = corners_42.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _same_shape(members: Sequence[Traits], corners_M42: ndarray) -> ndarray:
    """Which members show the same part, as upright, and of the same aspect: (M, M) bool."""
    area_M = np.array([_area(corners_42) for corners_42 in corners_M42])
    away_MM = np.linalg.norm(corners_M42[:, None] - corners_M42[None], axis=-1).max(-1)
    side_MM = np.sqrt(np.maximum(area_M[:, None], area_M[None]))
    aspect_M = np.log([m.aspect for m in members])
    return (away_MM < SAME_PLACE * side_MM) & (np.abs(aspect_M[:, None] - aspect_M[None]) < SAME_ASPECT)


def _steps(value_M: ndarray, relative: float) -> ndarray:
    """Values such that those that differ by less than this from the largest are equal to it."""
    largest = value_M.max()
    return np.where(value_M >= largest * (1 - relative), largest, value_M)


def _beyond(value_M: ndarray, tolerance: float) -> ndarray:
    """By how much values are above the smallest, beyond a tolerance."""
    above_M = value_M - value_M.min()
    return np.where(above_M > tolerance, above_M, 0.0)


def _distance_to_others(members: Sequence[Traits], shape_MM: ndarray, votes_M: ndarray) -> ndarray:
    """Mean distance of each picture from the others of the shape of most: (M,), in levels of 255.

    0 for all if these are fewer than three; the largest for members of another shape.
    """
    same_M = shape_MM[int(votes_M.argmax())]
    if same_M.sum() < 3:
        return np.zeros(len(members))
    x_MF = np.stack([m.picture.ravel() for m, same in zip(members, same_M) if same]).astype(np.float32)
    mean_M = np.array([np.abs(x_MF - x_F).mean() for x_F in x_MF]) * len(x_MF) / (len(x_MF) - 1)
    distance_M = np.full(len(members), mean_M.max())
    distance_M[same_M] = mean_M
    return distance_M


def _extents(members: Sequence[Traits], corners_M42: ndarray, maps_M33: Sequence[ndarray]) -> tuple[ndarray, ndarray]:
    """The area that each member shows, in that of one of them, and whether another member is pasted into it."""
    area_M = np.array([_area(corners_42) for corners_42 in corners_M42])
    pasted_M = np.zeros(len(members), bool)
    for outer, member in enumerate(members):
        into_33 = np.linalg.inv(maps_M33[outer])
        for inner in np.flatnonzero(area_M < area_M[outer] * 0.9).tolist():
            pasted_M[outer] |= _has_seam(member.picture, _corners(into_33 @ maps_M33[inner]))
    return area_M, pasted_M


def _has_seam(picture: ndarray, corners_42: ndarray) -> bool:
    """Whether an upright rectangle inside a picture has an edge all around: it was pasted."""
    left, top = corners_42.min(0) * PICTURE
    right, bottom = corners_42.max(0) * PICTURE
    upright = np.abs(corners_42[0] - corners_42[3])[0] + np.abs(corners_42[0] - corners_42[1])[1] < 0.06 * 2
    if not upright or right - left < 12 or bottom - top < 12:
        return False
    x = picture.astype(np.float32)
    across, down = np.abs(np.diff(x, axis=1)).mean(2), np.abs(np.diff(x, axis=0)).mean(2)
    rows, columns = slice(max(0, round(top) + 2), round(bottom) - 2), slice(max(0, round(left) + 2), round(right) - 2)
    sides, seams = 0, 0
    for profile, at in (
        (across[rows].mean(0), left), (across[rows].mean(0), right),
        (down[:, columns].mean(1), top), (down[:, columns].mean(1), bottom),
    ):  # fmt: skip
        place = round(at) - 1
        if not 3 <= place < PICTURE - 4:  # at the edge of the picture there is nothing to see
            continue
        sides += 1
        near = profile[max(0, place - 2) : place + 3].max()
        beside = np.r_[profile[max(0, place - 12) : place - 2], profile[place + 3 : place + 13]].max()
        seams += int(near > SEAM * max(beside, 1.0))
    return sides >= 2 and seams == sides


def _off_sharpness(members: Sequence[Traits]) -> ndarray:
    """Relative difference of the sharpness from the median of members with about as many pixels: noise has more, blur
    has less. (M,); 0 if these are fewer than three."""
    off_M, pixels_M = np.zeros(len(members)), np.array([m.width * m.height for m in members])
    sharpness_M = np.array([m.sharpness for m in members])
    for member, pixels in enumerate(pixels_M):
        alike_M = np.abs(pixels_M - pixels) <= pixels * SAME_DETAIL
        if alike_M.sum() > 2:
            off_M[member] = abs(
                np.log(max(sharpness_M[member], 1e-3) / max(float(np.median(sharpness_M[alike_M])), 1e-3))
            )
    return off_M


def _colour(picture: ndarray) -> float:
    x = picture.astype(np.float32)
    return float(np.abs(x - x.mean(2, keepdims=True)).mean())


def _clipped(picture: ndarray) -> float:
    return float(((picture <= 2) | (picture >= 253)).all(2).mean())


def _written_on(members: Sequence[Traits], shape_MM: ndarray) -> ndarray:
    """Whether a member has something that is not in the median of the others of its shape: (M,) bool."""
    written_M = np.zeros(len(members), bool)
    grey_M = [member.picture.astype(np.float32).mean(2) for member in members]
    for member, same_M in enumerate(shape_MM):
        others = [grey_M[other] for other in np.flatnonzero(same_M) if other != member]
        if not others:
            continue
        x, y = grey_M[member], np.median(np.stack(others), 0).astype(np.float32)
        y = (y - y.mean()) * (x.std() / max(float(y.std()), 1e-3)) + x.mean()
        squared = cv2.blur(x - y, (5, 5)) ** 2  # what only differs in sharpness is even
        there = squared >= np.quantile(squared, 0.9)
        if squared.mean() < MIN_WRITING or squared[there].sum() < LOCAL * squared.sum():
            continue
        mine, theirs = (np.abs(cv2.Laplacian(z, cv2.CV_32F))[there].mean() for z in (x, y))
        written_M[member] = mine > WRITING * theirs
    return written_M
