"""Colours of 16 bits in PNG and TIFF, and TIFFs of up to four channels that Pillow does not read well: by OpenCV.

Pillow keeps the high byte of 16-bit colours, and does not open colours of floats. Transparency and orientation follow
the rules of troodon/pixels.py. OpenCV reads a TIFF upright, and a PNG as it lies. Neither of both reads 16-bit channels
that are stored one after the other.
"""

import functools
import re
import struct
import sys
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from troodon.pillow import orientation, upright
from troodon.pixels import BadImage

TIFF_STARTS = (b"II*\0", b"MM\0*")
WIDTH, HEIGHT, BITS, SAMPLES, EXTRA, LAYOUT, KIND, TURNED = 256, 257, 258, 277, 338, 284, 339, 274  # tags of TIFF 6.0
SIZES = {1: "B", 3: "H", 4: "I"}  # types of the numbers of a tag
PLANAR = 2  # of LAYOUT: the channels one after the other
ALPHA = (1, 2)  # of EXTRA: multiplied into the colours, or not


class TiffHeader(NamedTuple):
    """What a TIFF says of its first image: size in pixels, upright; channels, and the type of a value."""

    width: int
    height: int
    channels: int
    dtype: str
    is_planar: bool


def read(data: bytes, image: Image.Image, channels: int | None) -> np.ndarray | None:
    """The values (H, W, C), upright, of a picture that Pillow has opened; None where Pillow reads it as well as OpenCV.

    Of colours, C is 3, or 4 if `channels` says so; three channels are composited on white. Raises BadImage.
    """
    layouts = [(tile[0], str(tile[3])) for tile in getattr(image, "tile", [])]
    if image.mode == "F" or image.mode.startswith("I"):
        # Of these, libtiff gives the bytes in the order of this machine, and Pillow takes them for the other order.
        is_swapped = any(codec == "libtiff" and re.search(r";\d+BS?F?\b", layout) for codec, layout in layouts)
        return _read(data) if is_swapped and sys.byteorder == "little" else None
    if image.format not in ("PNG", "TIFF") or not any(";16" in layout for _, layout in layouts):
        return None
    try:
        values = _read(data)
    except BadImage:  # such as one compressed by Zstandard; of_pillow gives its high byte
        return None
    if channels not in (1, 3, None):
        if values.shape[2] != channels:
            found = f"channels: {values.shape[2]} ({image.mode}, 16 bits)"
            raise BadImage("decode error", f"{found}, wanted: {channels}; convert it to .npy")
    elif values.shape[2] == 4:
        values = _on_white(values, image)
    return values if image.format == "TIFF" else upright(values, orientation(image))


def read_tiff(data: bytes, header: TiffHeader, channels: int | None) -> np.ndarray:
    """The values (H, W, C), upright, of a TIFF that Pillow does not read. Raises BadImage."""
    if header.is_planar and not header.dtype.endswith("int8"):
        raise _planar()
    if header.channels > 4 or header.channels == 2:
        raise BadImage("decode error", f"a TIFF of {header.channels} channels of {header.dtype}: convert it to .npy")
    if channels not in (None, header.channels) and {channels, header.channels} != {1, 3}:
        raise BadImage("decode error", f"channels: {header.channels} x {header.dtype}, wanted: {channels}")
    return _read(data)


def check_layout(image: Image.Image) -> None:
    """Raise BadImage for a TIFF of which Pillow reads wrong values: more than 8 bits, each channel by itself."""
    tags = image.tag_v2  # pyrefly: ignore[missing-attribute]
    if tags.get(LAYOUT) == PLANAR and tags.get(SAMPLES, 1) > 1 and max(tags.get(BITS, (1,))) > 8:
        raise _planar()


def _planar() -> BadImage:
    reason = "a TIFF whose channels of more than 8 bits are stored one after the other (PlanarConfiguration 2)"
    return BadImage("decode error", f"{reason}, which is not read: interleave them, or convert it to .npy")


def tiff_header(data: bytes) -> TiffHeader:
    """The header of a TIFF. Raises struct.error or KeyError for a damaged one."""
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    tags: dict[int, tuple[int, ...]] = {}
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from(f"{order}HHI", data, entry)
        if tag in (WIDTH, HEIGHT, BITS, SAMPLES, EXTRA, LAYOUT, KIND, TURNED) and kind in SIZES and 0 < length < 4096:
            numbers = f"{order}{length}{SIZES[kind]}"
            is_inside = struct.calcsize(numbers) <= 4
            where = entry + 8 if is_inside else struct.unpack_from(f"{order}I", data, entry + 8)[0]
            tags[tag] = struct.unpack_from(numbers, data, where)
    (width, *_), (height, *_), (bits, *_) = tags[WIDTH], tags[HEIGHT], tags.get(BITS, (1,))
    channels, kind = tags.get(SAMPLES, (1,))[0], {1: "uint", 2: "int", 3: "float"}.get(tags.get(KIND, (1,))[0], "type")
    if tags.get(TURNED, (1,))[0] >= 5:
        width, height = height, width
    return TiffHeader(width, height, channels, f"{kind}{bits}", tags.get(LAYOUT, (1,))[0] == PLANAR and channels > 1)


def _read(data: bytes) -> np.ndarray:
    """What OpenCV reads: (H, W, C), with red first."""
    cv2 = _opencv()
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise BadImage("decode error", f"OpenCV: {' '.join(str(error).split())[:200]}") from None
    if values is None:
        raise BadImage("decode error", "neither Pillow nor OpenCV can read it: it is damaged, or convert it to .npy")
    values = values[:, :, None] if values.ndim == 2 else values
    return np.ascontiguousarray(values[:, :, {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[values.shape[2]]])


def _on_white(values_HW4: np.ndarray, image: Image.Image) -> np.ndarray:
    """Three channels of four: composited on white, if the fourth is transparency."""
    colours = values_HW4[:, :, :3]
    tags = image.tag_v2 if image.format == "TIFF" else {EXTRA: ALPHA[1:]}  # pyrefly: ignore[missing-attribute]
    extra = tuple(tags.get(EXTRA, ()))[:1]
    if not set(extra) & set(ALPHA):
        return np.ascontiguousarray(colours)
    alpha = values_HW4[:, :, 3:].astype(np.float32) / 65535
    shown = colours if extra == (ALPHA[0],) else colours * alpha
    return (shown + 65535 * (1 - alpha)).clip(0, 65535).round().astype(np.uint16)


@functools.cache
def _opencv() -> Any:
    """OpenCV, without its messages: what it cannot read, it says to the console as well."""
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
