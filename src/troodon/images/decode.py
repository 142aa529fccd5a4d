"""Bytes to pixels: the only place that meets a broken or hostile file.

Everything that can be wrong with a file comes out as `BadImage`, with a status that can be counted. What a file is
called plays no part. Pictures give RGB, grey, or four channels as they lie in the file (RGBA, CMYK); any number of
channels comes from NumPy's .npy: uint8 or uint16, (H, W, C) or (H, W). No channel is invented or left out, but between
pictures in grey and in colour. Choices that change pixels, all made here:

    orientation     the EXIF tag is applied
    animation       the first frame
    transparency    composited on white, also that of palettes
    16-bit grey     the high byte, which is also what Pillow keeps of 16-bit colour
    32-bit grey     integers in [0, 255] as they are, in [0, 65535] as 16-bit; floats in [0, 1] times 255;
                    any other range is stretched from its smallest to its largest value
    CMYK, LAB ...   Pillow's conversion; colour profiles are ignored, as by those who trained the released models
    grey of colour  0.299, 0.587, 0.114 of red, green and blue: Pillow's "L"
    16-bit arrays   the high byte

JPEGs are decoded by simplejpeg where it is installed (extra `fast`): the same pixels, 1.2 to 1.9 times the images per
second. It is as strict as Pillow about files that end too early, and whatever it refuses, Pillow is asked.
"""

import contextlib
import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
HAS_SIMPLEJPEG = simplejpeg is not None

MAX_PIXELS = 100_000_000

# Raster formats that Pillow reads by itself. Left out: those that start a program (EPS), need a system (WMF) or a
# plugin (HDF5, GRIB), and those so loosely defined that text passes for them.
# fmt: off
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM",
    "DIB", "QOI", "TGA", "ICO", "ICNS", "PSD", "DDS", "PCX", "SGI",
)
# fmt: on

# How Pillow and NumPy say that a file ends too early.
_SHORT = re.compile(r"truncated|not enough|only got|^EOF:", re.IGNORECASE)

NPY = b"\x93NUMPY"
NPY_HEADER = 1024  # characters, at most: what evaluates a header must not be made to work hard; 118 are usual

# Pillow warns of what is decided here. Filters cannot be changed safely while threads decode, so both settings are
# made once. Its own limit stays, for pictures inside pictures (an icon may hold a PNG of another size).
warnings.filterwarnings("ignore", module=r"PIL\.")
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)


class BadImage(Exception):
    """Bytes that give no picture. `status` is "empty", "not an image", "truncated", "too large" or "decode error"."""

    def __init__(self, status: str, reason: str):
        super().__init__(status, reason)
        self.status, self.reason = status, reason

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"


@dataclass(frozen=True)
class ImageHeader:
    """What a header says: Pillow's names for format and mode, the size of the upright picture in pixels, its channels.

    Of an array the format is "NPY", and the mode the number of channels and their type: "5 x uint8".
    """

    format: str
    mode: str
    width: int
    height: int
    channels: int


def decode(data: bytes, channels: int | None = 3, shrink: Callable[[int, int], int] | None = None) -> np.ndarray:
    """The picture, uint8 (H, W, channels), upright, writable: RGB if they are 3, grey if 1.

    With None, pictures give RGB, and arrays as many channels as they have. Raises BadImage, also for a picture that
    has not the channels, and nothing else. Thread-safe.

    `shrink` is told the height and width, and says how many times smaller the picture may be: 1, 2, 4 or 8. A JPEG then
    is decoded so, from fewer of its frequencies and much faster, its sides rounded up; nothing else is.
    """
    with _refusing(data):
        if data.startswith(NPY):
            array = _array(data, channels)
            if shrink is not None:
                shrink(*array.shape[:2])
            return array
        with _opened(data) as image:
            if shrink is not None:
                times = shrink(*_upright_size(image)[::-1])
                if times > 1 and image.format == "JPEG":
                    image.draft(None, (image.width // times, image.height // times))
            if channels not in (1, 3, None):
                pixels = _bands(image, channels)
            elif (pixels := _jpeg(data, image)) is None:
                image.load()
                pixels = _rgb(image)
            if channels == 1:
                pixels = to_grey(pixels)
            return np.ascontiguousarray(_upright(pixels, _orientation(image)))


def pillow_to_array(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of an open image, upright. Raises whatever Pillow raises."""
    image.load()
    return np.ascontiguousarray(_upright(_rgb(image), _orientation(image)))


def decode_single_channel(data: bytes) -> np.ndarray:
    """The numbers (H, W) of a picture that holds one for each pixel, as they lie there: classes, or depths.

    Of palettes the entries, not their colours; of 16 and 32 bits all; of an .npy array what it holds. Raises BadImage,
    also for a picture in colour, and nothing else. EXIF is not looked at.
    """
    with _refusing(data):
        if data.startswith(NPY):
            numbers = np.load(io.BytesIO(data), allow_pickle=False, max_header_size=NPY_HEADER)
        else:
            with _opened(data) as image:
                image.load()
                numbers = np.asarray(image)
        if numbers.ndim != 2 or numbers.dtype.kind not in "buif":
            raise BadImage("decode error", f"an array of {numbers.dtype} {numbers.shape}, not one number a pixel")
        return numbers


def to_grey(pixels_HW3: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 1) of RGB."""
    return np.array(Image.fromarray(pixels_HW3).convert("L"))[:, :, None]


def to_rgb(pixels_HWC: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of any number of channels, to be looked at: the first three, or the first of fewer as grey."""
    return pixels_HWC[:, :, :3] if pixels_HWC.shape[2] >= 3 else np.repeat(pixels_HWC[:, :, :1], 3, axis=2)


def read_header(data: bytes) -> ImageHeader:
    """Format, mode and size, from the header only: a file can pass here and fail to decode. Raises BadImage."""
    with _refusing(data):
        if data.startswith(NPY):
            (height, width, channels), dtype, *_ = _header(data)
            return ImageHeader("NPY", f"{channels} x {dtype.name}", width, height, channels)
        with _opened(data) as image:
            return ImageHeader(image.format or "", image.mode, *_upright_size(image), len(image.getbands()))


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(image.width * image.height)
    return image


def _jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """The pixels of a plain colour or grey JPEG as it lies in the file; None where Pillow has to look.

    At the size of `image`, which may be smaller than what lies there.
    """
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, min_height=image.height, min_width=image.width, min_factor=1)
    except Exception:  # whatever it does not like, Pillow decides
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None


def _bands(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 (H, W, 4) of a picture that has them; nothing else has a meaning that is the same in every format."""
    bands = len(image.getbands())
    if not bands == channels == 4:
        hint = "; convert it to .npy" if image.format == "TIFF" else ""
        raise BadImage("decode error", f"channels: {bands} ({image.mode}), wanted: {channels}{hint}")
    image.load()
    return np.array(image)


def _array(data: bytes, channels: int | None) -> np.ndarray:
    """uint8 (H, W, C) of the bytes of a .npy file."""
    shape, dtype, in_columns, start = _header(data)
    if shape[2] != (channels or shape[2]):
        raise BadImage("decode error", f"channels: {shape[2]}, wanted: {channels}")
    count = math.prod(shape)
    if (missing := start + count * dtype.itemsize - len(data)) > 0:
        raise BadImage("truncated", f"the last {missing:,} bytes of an array of {count * dtype.itemsize:,} are missing")
    pixels = np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if in_columns else "C")
    return np.array(_eight_bit(pixels) if dtype.itemsize == 2 else pixels, order="C")


def _header(data: bytes) -> tuple[tuple[int, int, int], np.dtype, bool, int]:
    """Of a .npy file: (H, W, C), the type of a number, whether columns lie together, and where the numbers start."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise BadImage("decode error", f"a .npy file of version {version[0]}.{version[1]}; 1.0 and 2.0 can be read")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read(file, max_header_size=NPY_HEADER)
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise BadImage("decode error", f"an array of {dtype.name} where uint8 or uint16 is wanted")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImage("decode error", f"an array of shape {shape} where (H, W) or (H, W, C) is wanted")
    height, width, channels = (*shape, 1)[:3]
    if height * width > MAX_PIXELS:
        raise _too_large(height * width)
    return (height, width, channels), dtype, in_columns, file.tell()


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of a loaded image of any mode."""
    if image.mode == "F" or image.mode.startswith("I"):
        return np.repeat(_eight_bit(np.asarray(image))[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A"))
        image = flat
    return np.array(image.convert("RGB"))


def _eight_bit(grey: np.ndarray) -> np.ndarray:
    """Values of 16 or 32 bits, grey (H, W), or of 16, as 8 bits."""
    if grey.dtype.kind == "u" and grey.dtype.itemsize == 2:
        return (grey >> 8).astype(np.uint8)
    finite = grey[np.isfinite(grey)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if grey.dtype.kind != "f" and low >= 0 and high <= 65535:
        return (grey if high <= 255 else grey >> 8).astype(np.uint8)
    if grey.dtype.kind != "f" or low < 0 or high > 1:
        with np.errstate(invalid="ignore"):  # of what is no number
            grey = (grey.astype(np.float64) - low) / max(high - low, np.finfo(np.float64).tiny)
    return (np.nan_to_num(np.clip(grey, 0, 1)) * 255).round().astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is broken."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a picture is not lost for its metadata
        return 1
    return value if value in range(1, 9) else 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height. Pillow turns the size of a TIFF when it opens it, that of other formats never."""
    width, height = image.size
    return (height, width) if image.format != "TIFF" and _orientation(image) >= 5 else (width, height)


def _upright(x: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, C) so that it looks as EXIF says (table 6 of the standard: where row 0 and column 0 lie)."""
    if orientation >= 5:
        x = x.swapaxes(0, 1)
    flip_rows, flip_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return x[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


@contextlib.contextmanager
def _refusing(data: bytes) -> Iterator[None]:
    """Turns whatever a bad file makes Pillow or NumPy raise into BadImage."""
    if not len(data):
        raise BadImage("empty", "0 bytes")
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(int(re.findall(r"\d+", str(error))[0])) from None
    except MemoryError:
        raise BadImage("too large", "out of memory") from None
    except Exception as error:  # they raise nearly every exception there is
        text = " ".join(str(error).split()) or type(error).__name__
        cut = isinstance(error, (EOFError, struct.error)) or _SHORT.search(text) or _announced(data)[1]
        raise BadImage("truncated" if cut else "decode error", text) from None


def _too_large(pixels: int) -> BadImage:
    return BadImage("too large", f"{pixels:,} pixels are more than the limit of {MAX_PIXELS:,}")


def _unidentified(data: bytes) -> BadImage:
    name, cut = _announced(data)
    if name is None:
        return BadImage("not an image", f"no known format; it starts with {bytes(data[:12])!r}")
    hint = "; if it has bands that Pillow does not know, convert it to .npy" if name == "TIFF" else ""
    return BadImage("truncated" if cut else "decode error", f"starts like {name}, but its header cannot be read{hint}")


def _announced(data: bytes) -> tuple[str | None, bool]:
    """The format that the first bytes announce, and whether, by that format's own account, the end is missing.

    Asked only of files that fail, to tell a copy that was interrupted from damage and from what never was an image.
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
    if data.startswith((b"II*\0", b"MM\0*")):  # where the directory lies, often at the end
        directory = int.from_bytes(data[4:8], "little" if data.startswith(b"I") else "big")
        return "TIFF", max(directory, 8) >= len(data)
    for signature, name in ((b"ftypavi", "AVIF"), (b"jP  \r\n\x87\n", "JPEG2000")):
        if data[4:].startswith(signature):
            return name, _boxes_missing(data)
    return None, False


def _boxes_missing(data: bytes) -> bool:
    """Whether a file made of boxes (ISO/IEC 14496-12, 15444-1) ends inside one."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: to the end of the file
            return False
        at += size
    return at != len(data)
