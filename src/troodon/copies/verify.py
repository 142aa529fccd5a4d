"""A closer look at two images: is one a copy of the other? Geometric verification, as in the retrieval of images.

An affine map, that many local features agree on or that lies nearby, takes one image onto the other; the pixels must
agree after it. Points alone would join pictures that share a logo, pixels alone those with the same composition. A copy
may be cropped, turned, mirrored, stretched, framed, pasted into another picture, written on, or of other colours.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy import ndarray

from troodon.copies.local_features import SIDE, THUMBNAIL, LocalFeatures

# Shape suffixes: K points, M matched points, G rows and columns of a thumbnail; 33: a map of homogeneous coordinates.

MAX_DISTANCE = 64  # bits in which matched descriptors differ
TOLERANCE = 4.0  # pixels, of SIDE, between a mapped point and its match
MIN_POINTS = 10  # matched points that agree on one map
MIN_AGREEMENT = 0.8  # of the pixels after a map: frames of a video that are a second apart have about 0.6
# A map that is fitted to the pixels, without points, makes things of one shape on white grounds agree by up to 0.94:
# pianos, motorcycles, starfish. Copies that text covers agree by 0.97 and more where it is not.
MIN_FITTED = 0.95
# Pictures that are small, blurred or badly saved differ in what is finest. So it is enough that both, blurred by BLUR
# pixels of a thumbnail, agree this well where most of both is seen: other photographs have at most 0.95, and of 467
# frames of videos with those a second later, two reach it that do not reach MIN_AGREEMENT.
MIN_COARSE, BLUR = 0.97, 1.5
# Charts, drawings and things on one ground share most of their pixels with others of their kind. So where much of both
# is even, and no points tell the map, all details must agree, those that only one has too: pies, bars, lines and smooth
# gradients of different content have at most 0.87, photographs that are copies 0.88 and more.
# Where text or a sticker covers the rest, the share UNCOVERED is the same to the pixel; charts have at most 0.97.
SAME = 0.998
EVEN, EVEN_SHARE, MIN_DETAIL = 3.0, 0.25, 0.88  # levels of 255 by which pixels vary; share of both; correlation
DETAIL, EVEN_WINDOW = 2.0, 5  # pixels of a thumbnail: what is finer is detail, and what is looked at for evenness
# Tables, charts and lattices repeat themselves: many features match that lie elsewhere. Of 3,160 pairs of copies none
# has more than 40 such, and five of those whose pixels agree by less than SURE have more than 30.
MAX_ELSEWHERE, FEWER_ELSEWHERE, SURE = 40, 30, 0.9  # matched points; and where the pixels agree less after their map
NEAR = 6.0  # pixels, of SIDE: what lies farther from where the map takes it is elsewhere
MIN_OVERLAP, MAIN_OVERLAP = 0.1, 0.5  # shares that are seen of either image, and of the one that is seen more
DIRECT_OVERLAP = 0.6  # share that is seen of both images, where no points tell the map, or by blurred pixels
MIN_START = 0.2  # agreement from which a map is refined
MAX_STRETCH, MAX_SCALE = 2.0, 5.0  # of a map: more is an accident
# Share of the structure of both that must agree: after a map of points, and where nothing is turned or moved, so that
# large text or a sticker may cover much of a small picture.
AGREEING, UNCOVERED = 0.8, 0.6
MIN_STRUCTURE = 0.5  # deviation in levels of 255, on average: less is no structure
WINDOW = 9  # pixels of a thumbnail that are compared at a time
INNER_EDGE = 0.5  # share of the inner edge of a frame where the picture has another colour
FRAME = 10  # levels of 255: a frame of one colour varies less


class Match(NamedTuple):
    """What shows that two images are copies."""

    map_33: ndarray  # float64, from positions in i to those in j; both are shares of width and height
    points: int  # matched points that agree on the map; 0 if pixels alone were compared
    agreement: float  # correlation of the pixels that enough of the structure of both reaches, from -1 to 1
    overlap: tuple[float, float]  # shares of i and of j that show the same


def verify(i: LocalFeatures, j: LocalFeatures, orientation: int = 0, start_33: ndarray | None = None) -> Match | None:
    """The match of two images; None if they are not copies.

    `orientation` (see ORIENTATIONS) is how i must be turned to look like j, as far as known; -1: as it is, or mirrored.
    Points find any turn; they need to know about a mirror. Pixels are compared in this orientation only, or from the
    map `start_33` if one is known, as that of i to a copy of j.
    """
    one, other = Picture.of(i.thumbnail_GG), Picture.of(j.thumbnail_GG)
    matched = matched_points(i, j, orientation >= 4)
    points, map_33 = _map_by_points(matched, i.aspect, j.aspect)
    if points >= MIN_POINTS and map_33 is not None:
        match = _match_at(one, other, map_33, points, AGREEING, MIN_AGREEMENT)
        is_seen = match is not None and min(match.overlap) >= MIN_OVERLAP and max(match.overlap) >= MAIN_OVERLAP
        limit = MAX_ELSEWHERE if match is not None and match.agreement >= SURE else FEWER_ELSEWHERE
        if is_seen and count_elsewhere(matched, map_33, j.aspect) <= limit:
            return match
    turns, needs = ((orientation,) if orientation >= 0 else (0, 4)), (DIRECT_OVERLAP, MIN_FITTED)
    from_i, to_j = np.linalg.inv(one.to_inside_33), other.to_inside_33
    starts = [(turned >= 4, to_j @ ORIENTATIONS[turned] @ from_i) for turned in turns]
    if start_33 is not None:
        starts, needs = [(orientation >= 4, start_33)], (MIN_OVERLAP, MIN_AGREEMENT)
    for mirrored, start in starts:
        if (match := _match_pixels(one, other, start, *needs)) is not None:
            matched = matched_points(i, j, mirrored)
            return match if count_elsewhere(matched, match.map_33, j.aspect) <= MAX_ELSEWHERE else None
    return None


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


def _match_pixels(
    i: Picture, j: Picture, start_33: ndarray, overlap_needed: float, fitted_needed: float
) -> Match | None:
    """The match by this map, or by one nearby that is fitted to the pixels, if they agree."""
    if compare_pixels(i, j, start_33, UNCOVERED)[0] < MIN_START:
        return None
    fitted_33 = _refine(i.grey_GG, j.grey_GG, start_33)
    for map_33, needed in ((start_33, MIN_AGREEMENT), (fitted_33, fitted_needed)):
        match = _match_at(i, j, map_33, 0, UNCOVERED, needed)
        is_seen = match is not None and min(match.overlap) >= overlap_needed and is_plausible(map_33)
        if is_seen and (match.agreement >= SAME or _details_agree(i, j, map_33)):
            return match
    return None


def _match_at(i: Picture, j: Picture, map_33: ndarray, points: int, share: float, needed: float) -> Match | None:
    """The match by this map, if the pixels agree: in this share of the structure, or blurred in most of it."""
    agreement, overlap = compare_pixels(i, j, map_33, share)
    if agreement < needed:
        if min(overlap) < DIRECT_OVERLAP:
            return None
        if compare_pixels(i.blurred(), j.blurred(), map_33)[0] < MIN_COARSE or not _details_agree(i, j, map_33):
            return None
    return Match(map_33, points, agreement, overlap)


MIRROR = np.array([[-1.0, 0, 1], [0, 1, 0], [0, 0, 1]])
_TURN = np.array([[0.0, -1, 1], [1, 0, 0], [0, 0, 1]])  # a quarter, clockwise
# By number: o % 4 quarter turns clockwise, after a mirror if o >= 4.
ORIENTATIONS = [np.linalg.matrix_power(_TURN, o % 4) @ (MIRROR if o >= 4 else np.eye(3)) for o in range(8)]


def matched_points(i: LocalFeatures, j: LocalFeatures, mirrored: bool) -> tuple[ndarray, ndarray]:
    """Places of the points of two images, or of i's mirror image, whose descriptors are alike: (M, 2) in i and in j."""
    if min(i.count_2[int(mirrored)], j.count_2[0]) == 0:
        return np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32)
    matched_i, matched_j = mutually_nearest(i.descriptors(mirrored), j.descriptors(False))
    from_M2 = i.points(mirrored)[matched_i]
    if mirrored:
        from_M2[:, 0] = 1 - from_M2[:, 0]
    return from_M2, j.points(False)[matched_j]


def _map_by_points(matched: tuple[ndarray, ndarray], aspect_i: float, aspect_j: float) -> tuple[int, ndarray | None]:
    """The affine map that most matched points agree on (RANSAC, Fischler and Bolles, 1981), and how many do."""
    if len(matched[0]) < MIN_POINTS:
        return 0, None
    pixels_i, pixels_j = _to_pixels(aspect_i), _to_pixels(aspect_j)
    from_M2, to_M2 = matched[0] * pixels_i.diagonal()[:2], matched[1] * pixels_j.diagonal()[:2]
    affine_23, agree = cv2.estimateAffine2D(
        from_M2.astype(np.float32), to_M2.astype(np.float32), method=cv2.RANSAC, ransacReprojThreshold=TOLERANCE,
        maxIters=500, confidence=0.99,
    )  # fmt: skip
    if affine_23 is None:
        return 0, None
    map_33 = np.vstack([affine_23, [0, 0, 1]])
    if not is_plausible(map_33):
        return 0, None
    return int(agree.sum()), np.linalg.inv(pixels_j) @ map_33 @ pixels_i


def count_elsewhere(matched: tuple[ndarray, ndarray], map_33: ndarray, aspect_j: float) -> int:
    """How many matched points of what both show lie elsewhere than the map takes them."""
    mapped_M2 = matched[0] @ map_33[:2, :2].T + map_33[:2, 2]
    is_seen_M = ((mapped_M2 > 0) & (mapped_M2 < 1)).all(1)
    away_M = np.linalg.norm((mapped_M2 - matched[1]) * _to_pixels(aspect_j).diagonal()[:2], axis=1)
    return int((is_seen_M & (away_M > NEAR)).sum())


def mutually_nearest(a_K32: ndarray, b_L32: ndarray) -> tuple[ndarray, ndarray]:
    """Rows of both such that each descriptor is the nearest of the other, within MAX_DISTANCE bits: (M,), (M,)."""
    a_K4, b_L4 = (np.ascontiguousarray(x).view(np.uint64) for x in (a_K32, b_L32))
    bits_KL = np.zeros((len(a_K4), len(b_L4)), np.uint16)
    for word in range(4):
        bits_KL += np.bitwise_count(a_K4[:, word, None] ^ b_L4[None, :, word])
    nearest_K = bits_KL.argmin(1)
    rows = np.arange(len(a_K4))
    ok_K = (bits_KL.argmin(0)[nearest_K] == rows) & (bits_KL[rows, nearest_K] <= MAX_DISTANCE)
    return rows[ok_K], nearest_K[ok_K]


def is_plausible(map_33: ndarray) -> bool:
    """Whether a map changes size and shape no more than copying does."""
    largest, smallest = np.linalg.svd(map_33[:2, :2], compute_uv=False)
    return bool(smallest > 1 / MAX_SCALE and largest < MAX_SCALE and largest / smallest < MAX_STRETCH)


def _to_pixels(aspect: float) -> ndarray:
    """From shares of width and height to pixels at which the longer side has SIDE."""
    return np.diag([SIDE * min(1.0, aspect), SIDE * min(1.0, 1 / aspect), 1.0])


_THUMBNAIL_33 = np.array(
    [[THUMBNAIL, 0, -0.5], [0, THUMBNAIL, -0.5], [0, 0, 1.0]]
)  # the centre of a pixel is its place
_SHARES_33 = np.linalg.inv(_THUMBNAIL_33)


def compare_pixels(
    i: Picture, j: Picture, map_33: ndarray, share: float = AGREEING
) -> tuple[float, tuple[float, float]]:
    """How well the pixels of two thumbnails agree after a map, and the shares of both that overlap, frames included.

    Correlation in windows, which ignores brightness and contrast, weighted by the structure that both have: an even sky
    says little, text that only one has counts little, and frames count nothing.
    """
    scale = abs(np.linalg.det(map_33[:2, :2]))
    if scale > 1:  # the other is reduced: a reduced image has all that an enlarged one shows
        agreement, (overlap_j, overlap_i) = compare_pixels(j, i, np.linalg.inv(map_33), share)
        return agreement, (overlap_i, overlap_j)
    if scale < 1e-6:
        return 0.0, (0.0, 0.0)
    covered_GG, x_GG, inside_GG = _laid_over(i, j, map_33, scale)
    overlap_j = float(covered_GG.mean())
    overlap = (min(1.0, overlap_j / scale), overlap_j)
    if inside_GG.sum() < WINDOW:
        return 0.0, overlap
    return _correlation(x_GG, j.grey_GG.astype(np.float32), inside_GG, share), overlap


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


def _details_agree(i: Picture, j: Picture, map_33: ndarray) -> bool:
    """Whether two thumbnails agree in all that is fine, after a map, if much of both is even."""
    scale = abs(np.linalg.det(map_33[:2, :2]))
    if scale > 1:
        return _details_agree(j, i, np.linalg.inv(map_33))
    _, x_GG, inside_GG = _laid_over(i, j, map_33, scale)
    both, window = (x_GG, j.grey_GG.astype(np.float32)), (EVEN_WINDOW, EVEN_WINDOW)
    varies_GG = np.maximum(*(cv2.blur(z_GG * z_GG, window) - cv2.blur(z_GG, window) ** 2 for z_GG in both))
    if (varies_GG[inside_GG] < EVEN**2).mean() < EVEN_SHARE:
        return True
    x_N, y_N = ((z_GG - cv2.GaussianBlur(z_GG, (0, 0), DETAIL))[inside_GG] for z_GG in both)
    return float(x_N @ y_N) >= MIN_DETAIL * float(np.linalg.norm(x_N) * np.linalg.norm(y_N))


def _correlation(x_GG: ndarray, y_GG: ndarray, inside_GG: ndarray, share: float) -> float:
    """The correlation in windows that this share of the structure reaches, which counts where both have it.

    In pictures of one scene from another place, or with something moved, parts agree and others do not; the
    average of both is high.
    """
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
        return 0.0
    return float(local_GG.ravel()[order[np.searchsorted(up_to, (1 - share) * up_to[-1])]])


def _refine(i_GG: ndarray, j_GG: ndarray, map_33: ndarray) -> ndarray:
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
