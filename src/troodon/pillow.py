"""Pictures that Pillow has opened: their values, by the rules of pixels.py, and how they lie."""

import numpy as np
from PIL import Image

from troodon.config import Range
from troodon.pixels import BadImage


def of_pillow(image: Image.Image, channels: int | None = 3, range: Range | None = None) -> np.ndarray:
    """The values (H, W, C) of an open Pillow image, upright; what has more than 8 bits is not yet converted.

    C is 1 or 3 where `channels` is 1, 3 or None, which `to_uint8` evens out. Raises BadImage, or what Pillow raises.
    """
    is_deep = has_deep_colours(image)
    if is_deep and range not in (None, (0, 65535)):
        fix = "for a range, give the path or the bytes of a PNG or TIFF, or an array"
        raise BadImage("decode error", f"Pillow keeps the high byte of colours of more than 8 bits; {fix}")
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
