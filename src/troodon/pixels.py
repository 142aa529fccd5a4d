"""Values of pixels: from whatever a picture is given as to uint8 (H, W, C), by one set of rules.

8 bits          unchanged; bool: 0 and 255
16 bits         the high byte; PGM, PPM and JPEG 2000 of 9 to 16 bits are scaled to 16 bits first, by the maximum that
                the file declares; of colours in other files than PNG and TIFF, no more than the high byte is read
32-bit grey     integers in [0, 255] unchanged, in [0, 65535] as 16-bit; floats in [0, 1] times 255;
                any other range of a file is scaled from its minimum and maximum; of an array in memory: refused
with a range    values of more than 8 bits: (low, high) becomes (0, 255), and what lies outside is cut off; a range may
                have such a pair for each channel
medical images  without a range: by the window in the file (images/medical.py)
orientation     the EXIF tag is applied
transparency    composited on white, also for palettes; a fourth sample that no tag calls alpha is a channel
CMYK, LAB ...   Pillow's conversion; colour profiles are ignored, as in the training of the released models
colour to grey  0.299, 0.587, 0.114 of red, green and blue: Pillow's "L"
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from troodon.bad_image import BadImage as BadImage
from troodon.config import Range, UsageError
from troodon.text import plural

FEW_LEVELS = 64  # of 256: a set that uses no more is better shown with a range


class Used(NamedTuple):
    """The values that an image of more than 8 bits has: their type, as "uint16", the least and the greatest; and
    whether its file has a window."""

    dtype: str
    low: float
    high: float
    has_window: bool = False


class Values(NamedTuple):
    """The values (H, W, C) of an image as its file has them, upright.

    `window` has the values that become black and white without a range, if the file says so; `is_array` is whether it
    is an array of any number of channels, not an image.
    """

    array: np.ndarray
    window: Range | None = None
    is_array: bool = False


def of_array(values: np.ndarray, range: Range | None = None) -> np.ndarray:
    """The values (H, W, C) of an array (H, W) or (H, W, C) that may be meant as a picture; UsageError for others."""
    kind, top = values.dtype.kind, 1 if values.dtype.kind == "f" else 255
    if kind not in "buif" or values.ndim not in (2, 3) or not values.size:
        given = f"an array of {values.dtype} and shape {values.shape}"
        raise UsageError(f"{given}: an image is uint8 (height, width, channels)")
    if range is None and values.dtype.name not in ("uint8", "uint16", "bool"):
        seen = Used(values.dtype.name, values.min(), values.max()) if kind != "f" else used(values)
        if seen is not None and (seen.low < 0 or seen.high > top):
            found = f"an array of {values.dtype} with values from {seen.low:g} to {seen.high:g}"
            raise UsageError(
                f"{found}: give uint8, floats in [0, 1], or a range, as troodon.load(..., range=(0, 4095))"
            )
    return values[:, :, None] if values.ndim == 2 else values


def to_uint8(values_HWC: np.ndarray, channels: int | None, range: Range | None = None) -> np.ndarray:
    """uint8 (H, W, C) by the rules above. Grey becomes three channels, or colour one, if `channels` says 3 or 1.

    Raises BadImage for a range of other channels.
    """
    if range is not None and len(range) not in (2, 2 * values_HWC.shape[2]) and values_HWC.dtype.itemsize > 1:
        raise BadImage("decode error", f"channels: {values_HWC.shape[2]}; the range has {len(range) // 2} pairs")
    pixels = _bytes(values_HWC, range)
    if channels == 1 and pixels.shape[2] == 3:
        return to_grey(pixels)
    return np.repeat(pixels, 3, axis=2) if channels == 3 and pixels.shape[2] == 1 else pixels


def to_grey(pixels_HW3: np.ndarray) -> np.ndarray:
    """Convert RGB to grey: uint8 (H, W, 1)."""
    return np.array(Image.fromarray(pixels_HW3).convert("L"))[:, :, None]


def used(values: np.ndarray) -> Used | None:
    """The values in use; None for 8 bits or fewer, and where there is no number."""
    if values.dtype.kind not in "uif" or values.dtype.itemsize < 2:
        return None
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return Used(values.dtype.name, float(finite.min()), float(finite.max())) if finite.size else None


def advice(seen: Sequence[Used]) -> str:
    """One line on images that lose much when they are converted without a range; "" where none does."""
    rules = {_rule(one) for one in seen}
    if not rules or rules == {"unchanged"}:
        return ""
    low, high = min(one.low for one in seen), max(one.high for one in seen)
    if low == high:
        return ""
    of = "16 bits" if {one.dtype for one in seen} == {"uint16"} else " and ".join(sorted({one.dtype for one in seen}))
    whole = low >= 0 and not any(one.dtype.startswith("f") for one in seen)
    remedy = f"set --range {f'0 {2 ** max(8, int(high).bit_length()) - 1}' if whole else f'{low:g} {high:g}'}"
    if rules == {"window"}:
        return f"{plural(len(seen), 'image')} of {of}: the window in each file is shown; {remedy} to show all alike"
    if "own" in rules or len(rules) > 1:
        return f"{plural(len(seen), 'image')} of {of}: each is scaled by its own values; {remedy} to scale all alike"
    step = 256 if rules == {"high byte"} else 1 / 255
    levels = int(high / step) - int(low / step) + 1
    if levels > FEW_LEVELS:
        return ""
    use = "uses" if len(seen) == 1 else "use"
    return f"{plural(len(seen), 'image')} of {of} {use} {levels} of 256 levels; {remedy}"


def _rule(one: Used) -> str:
    if one.has_window:
        return "window"
    if one.dtype == "uint16":
        return "high byte"
    if one.dtype.startswith("f"):
        return "unit" if one.low >= 0 and one.high <= 1 else "own"
    return "own" if one.low < 0 or one.high > 65535 else "unchanged" if one.high <= 255 else "high byte"


def _bytes(values: np.ndarray, range: Range | None) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    if range is None and (seen := used(values)) is not None:
        if (rule := _rule(seen)) in ("unchanged", "high byte"):
            return (values >> (8 if rule == "high byte" else 0)).astype(np.uint8)
        if rule == "own":
            range = (seen.low, max(seen.high, np.nextafter(seen.low, math.inf)))
    low, high = np.array(range or (0, 1), np.float64).reshape(-1, 2).T
    with np.errstate(invalid="ignore", over="ignore"):  # from NaN and infinity
        scaled = values if range is None else (values.astype(np.float64) - low) / (high - low)
    return (np.nan_to_num(np.clip(scaled, 0, 1)) * 255).round().astype(np.uint8)
