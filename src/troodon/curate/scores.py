"""Scores of images, by which they are marked; nothing goes for a mark.

A score is a function from uint8 pixels (H, W, C) to a number. Those here cost little and need no weights; any other,
such as a detector of faces or of what should not be seen, is named as `module:function`.
"""

import importlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy import ndarray
from PIL import Image

from troodon.config import UsageError, nearest
from troodon.curate.config import MARK

Score = Callable[[ndarray], float]
SEEN_PX = 256  # the longer side at which sharpness is measured: large pictures are soft at their own size


def sharpness(image_HWC: ndarray) -> float:
    """Mean difference of a pixel from its neighbours, over the contrast; 0 is one colour, 0.01 is out of focus."""
    picture = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] < 3 else image_HWC[..., :3]).convert("L")
    picture.thumbnail((SEEN_PX, SEEN_PX))
    x_HW = np.asarray(picture, np.float32)
    if min(x_HW.shape) < 3:
        return 0.0
    around = (x_HW[:-2, 1:-1] + x_HW[2:, 1:-1] + x_HW[1:-1, :-2] + x_HW[1:-1, 2:]) / 4
    return float(np.abs(x_HW[1:-1, 1:-1] - around).mean() / max(float(x_HW.std()), 1e-3)) if x_HW.std() else 0.0


def side(image_HWC: ndarray) -> float:
    """The shorter side in pixels."""
    return float(min(image_HWC.shape[:2]))


def aspect(image_HWC: ndarray) -> float:
    """The longer side over the shorter."""
    return max(image_HWC.shape[:2]) / min(image_HWC.shape[:2])


SCORES: dict[str, Score] = {f.__name__: f for f in (sharpness, side, aspect)}


def named(marks: Sequence[str]) -> dict[str, Score]:
    """The scores that these marks need. UsageError, with the nearest name, for one that does not exist."""
    found = {}
    for mark in marks:
        name = _parts(mark)[0]
        module, colon, function = name.partition(":")
        if not colon and name not in SCORES:
            raise nearest("score", name, SCORES)
        try:
            found[name] = getattr(importlib.import_module(module), function) if colon else SCORES[name]
        except (ImportError, AttributeError) as error:
            raise UsageError(f"marks {mark!r}: {error}") from None
    return found


def marked(marks: Sequence[str], scores: dict[str, ndarray]) -> list[str]:
    """For each image the marks that it bears, with spaces between."""
    borne: list[list[str]] = [[] for _ in next(iter(scores.values()), [])]
    for mark in marks:
        for row in np.flatnonzero(bears(mark, scores)):
            borne[row].append(mark)
    return [" ".join(each) for each in borne]


def bears(mark: str, scores: dict[str, ndarray]) -> ndarray:
    """Which images bear this mark; none without a score."""
    name, sign, limit = _parts(mark)
    with np.errstate(invalid="ignore"):
        return scores[name] < limit if sign == "<" else scores[name] > limit


def _parts(mark: str) -> tuple[str, str, float]:
    parts = MARK.fullmatch(mark)
    assert parts, mark
    return parts["score"], parts["sign"], float(parts["limit"])
