"""A closer look at two images: is one a copy of the other? Geometric verification, as in the retrieval of images.

An affine map, that many local features agree on or that lies nearby, takes one image onto the other; the pixels must
agree after it. Points alone would join pictures that share a logo, pixels alone those with the same composition. A copy
may be cropped, turned, mirrored, stretched, framed, pasted into another picture, written on, or of other colours.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy import ndarray

from troodon.copies.compare import Compared, Picture, compare_details, compare_pixels, refine
from troodon.copies.local_features import SIDE, LocalFeatures

# Shape suffixes: K points, M matched points, G rows and columns of a thumbnail; 33: a map of homogeneous coordinates.

MAX_DISTANCE = 64  # bits in which matched descriptors differ
TOLERANCE = 4.0  # pixels, of SIDE, between a mapped point and its match
MIN_POINTS = 10  # matched points that agree on one map
MIN_AGREEMENT = 0.8  # of the pixels after a map: frames of a video that are a second apart have about 0.6
# A map that is fitted to the pixels, without points, makes things of one shape on white grounds agree by up to 0.94:
# pianos, motorcycles, starfish. Copies that text covers agree by 0.97 and more where it is not.
MIN_FITTED = 0.95
# Pictures that are small, blurred or badly saved differ in what is finest. So it is enough that both, blurred by BLUR
# pixels, agree this well where most of both is seen: other photographs have at most 0.95, and of 467
# frames of videos with those a second later, two reach it that do not reach MIN_AGREEMENT.
MIN_COARSE = 0.97
# Charts, drawings and things on one ground share most of their pixels with others of their kind. So where much of both
# is even, and no points tell the map, all details must agree, those that only one has too: pies, bars, lines and smooth
# gradients of different content have at most 0.87, photographs that are copies 0.88 and more.
# Where text or a sticker covers the rest, the share UNCOVERED is the same to the pixel; charts have at most 0.97.
SAME = 0.998
EVEN_SHARE, MIN_DETAIL = 0.25, 0.88  # share of both that is even, and the correlation of details
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
# A pair that misses these bounds is perhaps one of copies: if this share of the structure agrees, as where text covers
# the rest, or if blurred pixels do, whatever the details. Of 1,440 attacked copies of 64 pixels, 15 are missed; 13 of
# these have 0.87 and more after points, or 0.95 and more without, the others 0.96 blurred. Of other pictures, things of
# one model have 0.84 to 0.92 after points; all others have at most 0.71 among photographs of 64 pixels, 0.91 in frames.
PERHAPS_SHARE, PERHAPS_BY_POINTS, PERHAPS_BY_PIXELS = 0.4, 0.85, 0.95
PERHAPS_COARSE, PERHAPS_ELSEWHERE = 0.93, 60
IN_PART, BLURRED, DETAILS, ELSEWHERE = (  # what makes a pair doubtful
    "only a part of the pixels agrees",
    "pixels agree only if blurred",
    "fine details differ",
    "many features match in other places",
)


class Match(NamedTuple):
    """What shows that two images are copies, or perhaps."""

    map_33: ndarray  # float64, from positions in i to those in j; both are shares of width and height
    points: int  # matched points that agree on the map; 0 if pixels alone were compared
    agreement: float  # correlation of the pixels that enough of the structure of both reaches, from -1 to 1
    overlap: tuple[float, float]  # shares of i and of j that show the same
    doubt: str = ""  # why they may be no copies; "" for copies


def verify(i: LocalFeatures, j: LocalFeatures, orientation: int = 0, start_33: ndarray | None = None) -> Match | None:
    """The match of two images; None if they are not copies. See `look`."""
    match = look(i, j, orientation, start_33)
    return None if match is None or match.doubt else match


def look(i: LocalFeatures, j: LocalFeatures, orientation: int = 0, start_33: ndarray | None = None) -> Match | None:
    """The match of two images that are copies or, with a doubt, perhaps; None for others.

    `orientation` (see ORIENTATIONS) is how i must be turned to look like j, as far as known; -1: as it is, or mirrored.
    Points find any turn; they need to know about a mirror. Pixels are compared in this orientation only, or from the
    map `start_33` if one is known, as that of i to a copy of j.
    """
    one, other = Picture.of(i.thumbnail_GG), Picture.of(j.thumbnail_GG)
    matched, perhaps = matched_points(i, j, orientation >= 4), None
    points, map_33 = _map_by_points(matched, i.aspect, j.aspect)
    if points >= MIN_POINTS and map_33 is not None:
        perhaps = _match_points(one, other, map_33, points, count_elsewhere(matched, map_33, j.aspect))
        if perhaps is not None and not perhaps.doubt:
            return perhaps
    turns, needs = ((orientation,) if orientation >= 0 else (0, 4)), (DIRECT_OVERLAP, MIN_FITTED)
    from_i, to_j = np.linalg.inv(one.to_inside_33), other.to_inside_33
    starts = [(turned >= 4, to_j @ ORIENTATIONS[turned] @ from_i) for turned in turns]
    if start_33 is not None:
        starts, needs = [(orientation >= 4, start_33)], (MIN_OVERLAP, MIN_AGREEMENT)
    for mirrored, start in starts:
        if (match := _match_pixels(one, other, start, *needs)) is not None:
            matched = matched_points(i, j, mirrored)
            found = _unless_elsewhere(match, count_elsewhere(matched, match.map_33, j.aspect), MAX_ELSEWHERE)
            if not match.doubt:
                return perhaps if found is None or (found.doubt and perhaps is not None) else found
            perhaps = perhaps or found
    return perhaps


def _match_points(i: Picture, j: Picture, map_33: ndarray, points: int, elsewhere: int) -> Match | None:
    """The match by a map that many points agree on, if the pixels agree."""
    compared = compare_pixels(i, j, map_33)
    if min(compared.overlap) < MIN_OVERLAP or max(compared.overlap) < MAIN_OVERLAP:
        return None
    match = _match_at(i, j, map_33, points, compared, AGREEING, MIN_AGREEMENT)
    if match is None:
        return None
    return _unless_elsewhere(match, elsewhere, MAX_ELSEWHERE if match.agreement >= SURE else FEWER_ELSEWHERE)


def _match_pixels(
    i: Picture, j: Picture, start_33: ndarray, overlap_needed: float, fitted_needed: float
) -> Match | None:
    """The match by this map, or by one nearby that is fitted to the pixels, if they agree."""
    compared, perhaps = compare_pixels(i, j, start_33), None
    if compared.of(UNCOVERED) < MIN_START:
        return None
    fitted_33 = refine(i.grey_GG, j.grey_GG, start_33)
    for map_33, needed in ((start_33, MIN_AGREEMENT), (fitted_33, fitted_needed)):
        compared = compared if map_33 is start_33 else compare_pixels(i, j, map_33)
        if min(compared.overlap) < overlap_needed or not is_plausible(map_33):
            continue
        match = _match_at(i, j, map_33, 0, compared, UNCOVERED, needed)
        if match is not None and not match.doubt and match.agreement < SAME and not _details_agree(i, j, map_33):
            match = match._replace(doubt=DETAILS)
        if match is not None and not match.doubt:
            return match
        perhaps = perhaps or match
    return perhaps


def _match_at(
    i: Picture, j: Picture, map_33: ndarray, points: int, compared: Compared, share: float, needed: float
) -> Match | None:
    """The match by this map, if the pixels agree: in this share of the structure, or blurred in most of it."""
    agreement, doubt = compared.of(share), ""
    if agreement < needed:
        is_seen = min(compared.overlap) >= DIRECT_OVERLAP
        coarse = compare_pixels(i.blurred(), j.blurred(), map_33).of(AGREEING) if is_seen else 0.0
        if coarse >= MIN_COARSE:
            doubt = "" if _details_agree(i, j, map_33) else DETAILS
        elif compared.of(PERHAPS_SHARE) >= (PERHAPS_BY_POINTS if points else PERHAPS_BY_PIXELS):
            doubt = IN_PART
        elif coarse >= PERHAPS_COARSE:
            doubt = BLURRED
        else:
            return None
    return Match(map_33, points, agreement, compared.overlap, doubt)


def _details_agree(i: Picture, j: Picture, map_33: ndarray) -> bool:
    """Whether two thumbnails agree in all that is fine, after a map, if much of both is even."""
    even, correlation = compare_details(i, j, map_33)
    return even < EVEN_SHARE or correlation >= MIN_DETAIL


def _unless_elsewhere(match: Match, elsewhere: int, limit: int) -> Match | None:
    """The match, doubtful or none if too many matched features lie elsewhere."""
    if elsewhere <= limit:
        return match
    return match._replace(doubt=match.doubt or ELSEWHERE) if elsewhere <= PERHAPS_ELSEWHERE else None


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
