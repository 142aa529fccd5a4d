"""Values of pixels: from whatever a picture is given as to uint8 (H, W, C), by one set of rules.

8 bits          unchanged; bool: 0 and 255
16 bits         the high byte, which is all that Pillow keeps of 16-bit colour; PGM and JPEG 2000 of 9 to 16 bits
                are scaled to 16 bits first, by the maximum that the file declares
32-bit grey     integers in [0, 255] unchanged, in [0, 65535] as 16-bit; floats in [0, 1] times 255;
                any other range of a file is scaled from its minimum and maximum; of an array in memory: refused
with a range    values of more than 8 bits: (low, high) becomes (0, 255), and what lies outside is cut off
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

from troodon.config import Range, UsageError
from troodon.text import plural

FEW_LEVELS = 64  # of 256: a set that uses no more is better shown with a range


class BadImage(Exception):
    """Bytes that cannot be decoded. `status` is "empty", "not an image", "truncated", "too large" or "decode error"."""

    def __init__(self, status: str, reason: str):
        super().__init__(status, reason)
        self.status, self.reason = status, reason

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"


class Used(NamedTuple):
    """The values that an image of more than 8 bits has: their type, as "uint16", the least and the greatest."""

    dtype: str
    low: float
    high: float


def of_pillow(image: Image.Image, channels: int | None = 3, range: Range | None = None) -> np.ndarray:
    """The values (H, W, C) of an open Pillow image, upright; what has more than 8 bits is not yet converted.

    C is 1 or 3 where `channels` is 1, 3 or None, which `to_uint8` evens out. Raises BadImage, or what Pillow raises.
    """
    is_deep = has_deep_colours(image)
    if is_deep and range not in (None, (0, 65535)):
        raise BadImage("decode error", "of 16-bit colours only the high byte is read; for a range, convert to .npy")
    image.load()
    if channels not in (1, 3, None):
        values = _four_bands(image, channels)
    elif image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)[:, :, None]
        if image.format in ("PPM", "PNG", "JPEG2000"):  # 16 bits, which Pillow may hold in 32
            values = values.astype(np.uint16)
    else:
        values = np.array(_on_white(image).convert("RGB"))
    return upright(values.astype(np.uint16) * 257 if is_deep else values, orientation(image))


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
    """uint8 (H, W, C) by the rules above. Grey becomes three channels, or colour one, if `channels` says 3 or 1."""
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
    if "own" in rules or len(rules) > 1:
        return f"{plural(len(seen), 'image')} of {of}: each is scaled by its own values; {remedy} to scale all alike"
    step = 256 if rules == {"high byte"} else 1 / 255
    levels = int(high / step) - int(low / step) + 1
    if levels > FEW_LEVELS:
        return ""
    use = "uses" if len(seen) == 1 else "use"
    return f"{plural(len(seen), 'image')} of {of} {use} {levels} of 256 levels; {remedy}"


def _rule(one: Used) -> str:
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
    low, high = range or (0.0, 1.0)
    with np.errstate(invalid="ignore", over="ignore"):  # from NaN and infinity
        scaled = values if range is None else (values.astype(np.float64) - low) / (high - low)
    return (np.nan_to_num(np.clip(scaled, 0, 1)) * 255).round().astype(np.uint8)


def has_deep_colours(image: Image.Image) -> bool:
    """Whether an image that is open, not yet loaded, has colours of more than 8 bits, which Pillow loads in 8."""
    if image.mode == "F" or image.mode.startswith("I"):
        return False
    return any(
        ";16" in str(args) or (codec.startswith("ppm") and isinstance(args, tuple) and args[-1] > 255)
        for codec, _, _, args in getattr(image, "tile", [])
    )


def band_count(image: Image.Image) -> int:
    """The number of channels of the file, with those that Pillow does not name."""
    samples = image.tag_v2.get(277, 1) if image.format == "TIFF" else 1  # pyrefly: ignore[missing-attribute]
    return max(len(image.getbands()), int(samples))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is broken."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata does not make an image unusable
        return 1
    return value if value in range(1, 9) else 1


def upright(x: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, C) upright as EXIF says (table 6 of the standard: where row 0 and column 0 lie)."""
    if orientation >= 5:
        x = x.swapaxes(0, 1)
    flip_rows, flip_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(x[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def _four_bands(image: Image.Image, channels: int) -> np.ndarray:
    """(H, W, 4) of an image with four channels. No other number has the same meaning in every format."""
    bands = band_count(image)
    if not bands == channels == 4:
        hint = "; convert it to .npy" if image.format == "TIFF" else ""
        raise BadImage("decode error", f"channels: {bands} ({image.mode}), wanted: {channels}{hint}")
    if image.mode == "RGB":  # the fourth sample lies where Pillow has no use for it
        return np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8).reshape(image.height, image.width, 4).copy()
    return np.array(image)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    if image.format == "TIFF" and image.mode == "RGBA" and 338 not in image.tag_v2:  # pyrefly: ignore[missing-attribute]
        return image  # the fourth sample is not said to be alpha
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    return flat
