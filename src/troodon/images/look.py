"""A first look at a set of images, from a few hundred of them: how large they are, and which colours they use."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from troodon.bad_image import BadImage
from troodon.config import UsageError
from troodon.images.index import Index
from troodon.images.reading import map_ordered

LOOKED_AT = 400  # images, evenly over the set
SIDE = 32  # pixels, to which an image is reduced before its colours are counted
HUES = 12  # parts of the colour circle
CHROMA = 0.01  # below it an image counts as grey


@dataclass(frozen=True)
class Look:
    """What a set of images looks like."""

    images: int
    side: int
    """Median of the shorter sides, in pixels."""
    channels: int
    """Of most images: 3 for pictures, grey ones too; arrays may have others."""
    chroma: float
    """Mean of saturation times value, from 0 to 1: 0 for grey images."""
    hues: float
    """How evenly the set uses all hues, from 0 (one of them) to 1: photographs 0.6 to 0.8, where greens and violets are
    rare; 1 where colours are drawn by chance, so that they say nothing of what is shown. 0 for grey images."""

    @property
    def is_grey(self) -> bool:
        return self.chroma < CHROMA


def look(index: Index, threads: int = 0) -> Look:
    """Look at a set. UsageError if none of the images looked at can be read."""
    rows = np.unique(np.linspace(0, len(index) - 1, LOOKED_AT).round().astype(int)).tolist() if len(index) else []
    with ThreadPoolExecutor(workers := index.thread_count(threads)) as pool:
        seen = [
            one for one in map_ordered(pool, lambda row: _look_at(index, row), rows, 2 * workers) if one is not None
        ]
    if not seen:
        raise UsageError(f"none of {len(rows):,} images looked at can be read; see `troodon scan`")
    sides, channels, hues = zip(*seen)
    coloured = [hue_H / hue_H.sum() for hue_H in hues if hue_H.sum() > CHROMA]
    chroma = float(np.mean([hue_H.sum() for hue_H in hues]))
    return Look(len(index), int(np.median(sides)), Counter(channels).most_common(1)[0][0], chroma, _evenness(coloured))


def _look_at(index: Index, row: int) -> tuple[int, int, np.ndarray] | None:
    """The shorter side of an image, its channels, and the mean chroma of its pixels of each hue."""
    try:
        image_HWC = index.decode(row, None)
    except (BadImage, OSError):
        return None
    height, width, channels = image_HWC.shape
    if channels != 3:
        return min(height, width), channels, np.zeros(HUES)
    small = Image.fromarray(image_HWC).resize((SIDE, SIDE), Image.Resampling.BOX).convert("HSV")
    hue, saturation, value = np.moveaxis(np.asarray(small).astype(np.int64), 2, 0)
    weights = (saturation * value / 255**2).ravel()
    return min(height, width), channels, np.bincount(hue.ravel() * HUES // 256, weights, HUES) / SIDE**2


def _evenness(hues: list[np.ndarray]) -> float:
    """The entropy of the mean of these distributions, over the largest possible."""
    if not hues:
        return 0.0
    share = np.mean(hues, 0)
    return float(-(share * np.log(share.clip(1e-12))).sum() / np.log(HUES))
