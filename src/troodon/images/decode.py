"""Decode bytes to pixels: the only module that handles broken and hostile files.

Everything that can be wrong with a file is raised as `BadImage`, with a status that can be counted. The file name plays
no part. Images give RGB, grey, or the four channels of the file (RGBA, CMYK, a TIFF's red, green, blue and near
infrared); NumPy's .npy gives any number of channels: uint8 or uint16, (H, W, C) or (H, W); with a range also other
numbers. No channel is added or dropped, except between grey and colour images. An animation gives its first frame. What
else changes pixels is decided in troodon/pixels.py, in the same way for files and for pictures in memory.

DICOM is read by dicom.py, and colours of 16 bits by deep.py.

JPEGs are decoded by simplejpeg if it is installed (extra `fast`): the same pixels, 1.2 to 1.9 times the images per
second. It is as strict as Pillow about truncated files, and Pillow decodes what it refuses.
"""

import contextlib
import ctypes
import io
import math
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from troodon.config import Range, UsageError
from troodon.images import deep, dicom, volumes
from troodon.pillow import band_count, has_deep_colours, of_pillow, orientation, upright
from troodon.pixels import BadImage, Values, to_uint8
from troodon.pixels import to_grey as to_grey  # for those who decode

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
HAS_SIMPLEJPEG = simplejpeg is not None

MEDICAL = ("DICOM", "NIfTI")  # formats whose files say which values are shown
MAX_PIXELS = 100_000_000
LIMIT = "TROODON_MAX_MEGAPIXELS"  # environment variable: another limit, in millions of pixels
MAX_TEXT = 1 << 26  # bytes of one text in a PNG, and a quarter of all: microscopes write megabytes

# Raster formats that Pillow reads by itself. Excluded: formats that start a program (EPS), need an operating system
# (WMF) or a plugin (HDF5, GRIB), or are defined so loosely that text passes for them.
# fmt: off
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM",
    "DIB", "QOI", "TGA", "ICO", "ICNS", "PSD", "DDS", "PCX", "SGI",
)
# fmt: on

# The messages of Pillow and NumPy about truncated files.
_TRUNCATED = re.compile(r"truncated|not enough|only got|^EOF:", re.IGNORECASE)

NPY_MAGIC = b"\x93NUMPY"
MAX_NPY_HEADER = 1024  # characters: parsing a longer header could be made expensive; 118 are usual

# Pillow warns about what this module decides. Filters cannot be changed safely while threads decode, so both settings
# are made once. Pillow's own limit stays, for images inside images (an icon may hold a PNG of another size).
warnings.filterwarnings("ignore", module=r"PIL\.")
with contextlib.suppress(OSError, AttributeError):  # libtiff prints its errors, from C; Pillow raises them, too
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)
PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT  # pyrefly: ignore[bad-assignment]
PngImagePlugin.MAX_TEXT_MEMORY = 4 * MAX_TEXT  # pyrefly: ignore[bad-assignment]


@dataclass(frozen=True)
class ImageHeader:
    """The header of an image: Pillow's names for format and mode; size in pixels, upright; number of channels.

    For an array the format is "NPY", and the mode the number of channels and their type: "5 x uint8". `is_deep` is
    whether the values have more than 8 bits.
    """

    format: str
    mode: str
    width: int
    height: int
    channels: int
    is_deep: bool = False


def decode(
    data: bytes,
    channels: int | None = 3,
    reduction: Callable[[int, int], int] | None = None,
    range: Range | None = None,
) -> np.ndarray:
    """Decode an image to uint8 (H, W, channels), upright and writable: RGB for 3 channels, grey for 1.

    With None, images give RGB, and arrays all their channels. Values of more than 8 bits become 8 as `pixels` says, by
    the `range` if there is one. Raises BadImage, also if the image does not have these channels, and nothing else but
    UsageError for a wrong limit of size. Thread-safe.

    `reduction` is called with the height and width, and returns by which factor the image may be reduced: 1, 2, 4 or 8.
    A JPEG is then decoded at that size, much faster, from fewer of its frequencies, with sides rounded up; images of
    other formats keep their size.
    """
    return as_bytes(decode_values(data, channels, reduction, range), channels, range)


def decode_values(
    data: bytes,
    channels: int | None = 3,
    reduction: Callable[[int, int], int] | None = None,
    range: Range | None = None,
) -> Values:
    """What `decode` makes 8 bits of: the values (H, W, C) as the file has them, upright."""
    with _as_bad_image(data):
        if data.startswith(NPY_MAGIC):
            values = _decode_npy(data, channels, range)
            if reduction is not None:
                reduction(*values.array.shape[:2])
            return values
        if dicom.is_dicom(data):
            return _decode_dicom(data, channels, reduction)
        opened = _open(data)
        if isinstance(opened, deep.TiffHeader):
            if reduction is not None:
                reduction(opened.height, opened.width)
            return Values(deep.read_tiff(data, opened, channels))
        with opened as image:
            if reduction is not None:
                factor = reduction(*_upright_size(image)[::-1])
                if factor > 1 and image.format == "JPEG":
                    image.draft(None, (image.width // factor, image.height // factor))
            if (values := deep.read(data, image, channels)) is not None:
                return Values(values)
            fast = _decode_jpeg(data, image) if channels in (1, 3, None) else None
            return Values(of_pillow(image, channels, range) if fast is None else upright(fast, orientation(image)))


def as_bytes(values: Values, channels: int | None = 3, range: Range | None = None) -> np.ndarray:
    """uint8 (H, W, channels), writable, of what `decode_values` has read."""
    return to_uint8(values.array, 3 if channels is None and not values.is_array else channels, range or values.window)


def pillow_to_array(image: Image.Image) -> np.ndarray:
    """The pixels of an open Pillow image, uint8 (H, W, 3), upright. Raises whatever Pillow raises."""
    return to_uint8(of_pillow(image), 3)


def decode_single_channel(data: bytes) -> np.ndarray:
    """Decode an image with one value per pixel, such as a class or a depth, to (H, W), with unchanged values.

    A palette gives its indices, not their colours; 16 and 32 bits are kept; an .npy array gives its values. Raises
    BadImage, also for a colour image, and nothing else. EXIF is ignored.
    """
    with _as_bad_image(data):
        if data.startswith(NPY_MAGIC):
            values = np.load(io.BytesIO(data), allow_pickle=False, max_header_size=MAX_NPY_HEADER)
        else:
            opened = _open(data)
            if isinstance(opened, deep.TiffHeader):
                values = deep.read_tiff(data, opened, None).squeeze(2)
            else:
                opened.load()
                values = np.asarray(opened)
        if values.ndim != 2 or values.dtype.kind not in "buif":
            raise BadImage("decode error", f"an array of {values.dtype} {values.shape}, not one value per pixel")
        return values


def to_rgb(pixels_HWC: np.ndarray) -> np.ndarray:
    """Convert any number of channels to uint8 (H, W, 3) for display: the first three, or the first of fewer as grey."""
    return pixels_HWC[:, :, :3] if pixels_HWC.shape[2] >= 3 else np.repeat(pixels_HWC[:, :, :1], 3, axis=2)


def read_header(data: bytes) -> ImageHeader:
    """Read format, mode and size from the header only: the file may still fail to decode. Raises BadImage."""
    with _as_bad_image(data):
        if data.startswith(NPY_MAGIC):
            shape, dtype, _, start = _npy_header(data)
            medical = volumes.trailer(data[start + math.prod(shape) * dtype.itemsize :])
            (height, width, channels), format = shape, medical[0] if medical else "NPY"
            return ImageHeader(format, f"{channels} x {dtype.name}", width, height, channels, dtype.itemsize > 1)
        if dicom.is_dicom(data):
            return ImageHeader("DICOM", *dicom.describe(data))
        opened = _open(data)
        if isinstance(opened, deep.TiffHeader):
            width, height, channels, dtype, _ = opened
            return ImageHeader("TIFF", f"{channels} x {dtype}", width, height, channels, not dtype.endswith("int8"))
        with opened as image:
            is_deep = image.mode == "F" or image.mode.startswith("I") or has_deep_colours(image)
            return ImageHeader(image.format or "", image.mode, *_upright_size(image), band_count(image), is_deep)


def _open(data: bytes) -> Image.Image | deep.TiffHeader:
    """The image, opened by Pillow; or the header of a TIFF that only OpenCV may read."""
    limit, opened = max_pixels(), None
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        with contextlib.suppress(struct.error, KeyError):
            opened = deep.tiff_header(data) if data.startswith(deep.TIFF_STARTS) else None
        if opened is None:
            raise
    if isinstance(opened, Image.Image) and opened.format == "TIFF":
        deep.check_layout(opened)
    if opened.width * opened.height > limit:
        raise _too_large(opened.width * opened.height)
    return opened


def max_pixels() -> int:
    """The most pixels that an image may have: MAX_PIXELS, or a million times what TROODON_MAX_MEGAPIXELS says."""
    text = os.environ.get(LIMIT)
    if text is None:
        return MAX_PIXELS
    try:
        limit = round(float(text) * 1e6)
    except (ValueError, OverflowError):
        limit = 0
    if limit < 1:
        raise UsageError(f"{LIMIT} {text!r}: a number of megapixels, such as {MAX_PIXELS // 1_000_000}")
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)
    return limit


def _decode_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """The pixels of a plain colour or grey JPEG, not turned; None if Pillow has to decode it.

    They have the size of `image`, which may be smaller than that of the file.
    """
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, min_height=image.height, min_width=image.width, min_factor=1)
    except Exception:  # Pillow decides on whatever it refuses
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None


def _decode_dicom(data: bytes, channels: int | None, reduction: Callable[[int, int], int] | None) -> Values:
    """The values of a DICOM file of one frame."""
    _, width, height, bands, _ = dicom.describe(data)
    if width * height > max_pixels():
        raise _too_large(width * height)
    if channels not in (1, 3, None):
        raise BadImage("decode error", f"channels: {bands} (DICOM), wanted: {channels}")
    if reduction is not None:
        reduction(height, width)
    return dicom.decode_one(data)


def _decode_npy(data: bytes, channels: int | None, range: Range | None) -> Values:
    """The values (H, W, C) of a .npy file."""
    shape, dtype, is_fortran, start = _npy_header(data)
    end = start + math.prod(shape) * dtype.itemsize
    medical = volumes.trailer(data[end:])
    if dtype.name not in ("uint8", "uint16") and range is None and medical is None:
        raise BadImage("decode error", f"an array of {dtype.name} where uint8 or uint16 is wanted; set --range")
    if shape[2] != (channels or shape[2]) and not (medical and channels in (1, 3)):
        raise BadImage("decode error", f"channels: {shape[2]}, wanted: {channels}")
    if (missing := end - len(data)) > 0:
        raise BadImage("truncated", f"the last {missing:,} bytes of an array of {end - start:,} are missing")
    pixels = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape, order="F" if is_fortran else "C")
    return Values(np.array(pixels, order="C"), medical[1] if medical else None, medical is None)


def _npy_header(data: bytes) -> tuple[tuple[int, int, int], np.dtype, bool, int]:
    """The header of a .npy file: (H, W, C), data type, whether in Fortran order, and offset of the data."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise BadImage("decode error", f"a .npy file of version {version[0]}.{version[1]}; 1.0 and 2.0 can be read")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file, max_header_size=MAX_NPY_HEADER)
    if dtype.kind not in "iuf":
        raise BadImage("decode error", f"an array of {dtype.name} where uint8 or uint16 is wanted")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImage("decode error", f"an array of shape {shape} where (H, W) or (H, W, C) is wanted")
    height, width, channels = (*shape, 1)[:3]
    if height * width > max_pixels():
        raise _too_large(height * width)
    return (height, width, channels), dtype, is_fortran, file.tell()


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height, upright. Pillow swaps the size of a TIFF when it opens it, and of no other format."""
    width, height = image.size
    return (height, width) if image.format != "TIFF" and orientation(image) >= 5 else (width, height)


@contextlib.contextmanager
def _as_bad_image(data: bytes) -> Iterator[None]:
    """Raise BadImage in place of whatever a bad file makes Pillow or NumPy raise."""
    if not len(data):
        raise BadImage("empty", "0 bytes")
    try:
        yield
    except (BadImage, UsageError):
        raise
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(int(re.findall(r"\d+", str(error))[0])) from None
    except MemoryError:
        raise BadImage("too large", "out of memory") from None
    except Exception as error:  # a bad file may cause nearly any exception
        text = " ".join(str(error).split()) or type(error).__name__
        is_truncated = isinstance(error, (EOFError, struct.error)) or _TRUNCATED.search(text) or _identify(data)[1]
        raise BadImage("truncated" if is_truncated else "decode error", text) from None


def _too_large(pixels: int) -> BadImage:
    limit = f"the limit of {max_pixels():,}, which the environment variable {LIMIT} sets"
    return BadImage("too large", f"{pixels:,} pixels are more than {limit}")


def _unidentified(data: bytes) -> BadImage:
    name, is_truncated = _identify(data)
    if data[344:348] in (b"n+1\0", b"ni1\0") or data.startswith(b"\x1f\x8b"):
        fix = f"{dicom.INSTALL} reads NIfTI files in folders, each slice as an image"
        return BadImage("not an image", f"a volume or a compressed file: {fix}")
    if name is None:
        return BadImage("not an image", f"no known format; it starts with {bytes(data[:12])!r}")
    hint = "; if it has bands that Pillow does not know, convert it to .npy" if name == "TIFF" else ""
    return BadImage(
        "truncated" if is_truncated else "decode error", f"starts like {name}, but its header cannot be read{hint}"
    )


def _identify(data: bytes) -> tuple[str | None, bool]:
    """The format by the first bytes, and whether the end is missing according to that format.

    Called only for files that fail, to distinguish an interrupted copy, damage, and a file that never was an image.
    """
    tail = data[-1024:]
    if data.startswith(b"\xff\xd8"):
        return "JPEG", b"\xff\xd9" not in tail
    if data.startswith(b"\x89PNG"):
        return "PNG", b"IEND" not in tail
    if data.startswith(b"GIF8"):
        return "GIF", b";" not in tail[-16:]
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP", 8 + int.from_bytes(data[4:8], "little") > len(data)
    if data.startswith((b"II*\0", b"MM\0*")):  # the offset of the directory, often near the end
        directory = int.from_bytes(data[4:8], "little" if data.startswith(b"I") else "big")
        return "TIFF", max(directory, 8) >= len(data)
    for signature, name in ((b"ftypavi", "AVIF"), (b"jP  \r\n\x87\n", "JPEG2000")):
        if data[4:].startswith(signature):
            return name, _boxes_missing(data)
    return None, False


def _boxes_missing(data: bytes) -> bool:
    """Whether a file that consists of boxes (ISO/IEC 14496-12, 15444-1) ends inside one."""
    offset = 0
    while offset + 8 <= len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        if size == 1:
            size = int.from_bytes(data[offset + 8 : offset + 16], "big")
        if size < 8:  # 0 means to the end of the file
            return False
        offset += size
    return offset != len(data)
