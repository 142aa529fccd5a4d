"""Scores of images and the marks that compare them with limits. No image is dropped because of a mark.

A score is a function from uint8 pixels (H, W, C) to a number. The scores of this module are cheap and need no weights.
Any other, such as a detector of faces or of unwanted content, is named as `module:function`.
"""

import importlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy import ndarray
from PIL import Image

from troodon.config import UsageError, nearest
from troodon.curate.config import MARK_PATTERN

Score = Callable[[ndarray], float]
SHARPNESS_PX = 256  # longer side at which sharpness is measured: large pictures are soft at their full size


def sharpness(image_HWC: ndarray) -> float:
    """Mean difference of a pixel from its neighbours, divided by the contrast; 0: one colour, 0.01: out of focus."""
    x_HW = _small_grey(image_HWC)
    if min(x_HW.shape) < 3:
        return 0.0
    neighbours = (x_HW[:-2, 1:-1] + x_HW[2:, 1:-1] + x_HW[1:-1, :-2] + x_HW[1:-1, 2:]) / 4
    return float(np.abs(x_HW[1:-1, 1:-1] - neighbours).mean() / max(float(x_HW.std()), 1e-3)) if x_HW.std() else 0.0


def brightness(image_HWC: ndarray) -> float:
    """The mean grey, from 0 for black to 1 for white."""
    return float(_small_grey(image_HWC).mean() / 255)


def contrast(image_HWC: ndarray) -> float:
    """The standard deviation of the grey values, from 0 for one colour to 0.5."""
    return float(_small_grey(image_HWC).std() / 255)


def _small_grey(image_HWC: ndarray) -> ndarray:
    """Grey values (H, W) float32 in [0, 255], the longer side at most SHARPNESS_PX."""
    picture = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] < 3 else image_HWC[..., :3]).convert("L")
    picture.thumbnail((SHARPNESS_PX, SHARPNESS_PX))
    return np.asarray(picture, np.float32)


def side(image_HWC: ndarray) -> float:
    """The shorter side in pixels."""
    return float(min(image_HWC.shape[:2]))


def aspect(image_HWC: ndarray) -> float:
    """The longer side divided by the shorter."""
    return max(image_HWC.shape[:2]) / min(image_HWC.shape[:2])


SCORES: dict[str, Score] = {f.__name__: f for f in (sharpness, side, aspect, brightness, contrast)}


def load_scores(marks: Sequence[str]) -> dict[str, Score]:
    """Load the scores that these marks need. Raises UsageError, with the nearest name, if a score does not exist."""
    names = [_parse_mark(mark)[0] for mark in marks]
    return {name: load_score(name) for name in names}


def load_score(name: str) -> Score:
    """Load one score. Raises UsageError, with the nearest name, if it does not exist."""
    module, colon, function = name.partition(":")
    if not colon and name not in SCORES:
        raise nearest("score", name, SCORES)
    try:
        return getattr(importlib.import_module(module), function) if colon else SCORES[name]
    except (ImportError, AttributeError) as error:
        raise UsageError(f"score {name!r}: {error}") from None


def image_marks(marks: Sequence[str], scores: dict[str, ndarray]) -> list[str]:
    """Return the marks of each image, separated by spaces."""
    names: list[list[str]] = [[] for _ in next(iter(scores.values()), [])]
    for mark in marks:
        for row in np.flatnonzero(has_mark(mark, scores)):
            names[row].append(mark)
    return [" ".join(image_names) for image_names in names]


def has_mark(mark: str, scores: dict[str, ndarray]) -> ndarray:
    """Test which images have this mark. An image without a score has none."""
    name, sign, limit = _parse_mark(mark)
    with np.errstate(invalid="ignore"):
        return scores[name] < limit if sign == "<" else scores[name] > limit


def _parse_mark(mark: str) -> tuple[str, str, float]:
    parts = MARK_PATTERN.fullmatch(mark)
    assert parts, mark
    return parts["score"], parts["sign"], float(parts["limit"])
