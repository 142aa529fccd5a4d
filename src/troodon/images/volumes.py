"""Files of several medical images: NIfTI by nibabel, and DICOM of several frames (extra `medical`).

An image of such a file has the path `brain.nii.gz#012` in an index, and is read as the bytes of a .npy file, behind
which a line of JSON says the format and the window: the values that are shown without a range.

NIfTI: the first two axes are those of the image, x to the right and y upwards, as viewers show it; each step along the
others is an image. Slope and intercept are applied. The window is that of the header (cal_min and cal_max) or, if it
has none, from the least to the greatest value of the volume. 8 bits without slope are unchanged.
"""

import io
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from troodon.config import Range, check_range
from troodon.images import dicom
from troodon.pixels import BadImage, Values

NIFTI_NAME = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
SEPARATOR = "#"  # between the name of a file and the number of an image in it
MEMBER = "#slices"  # what the container of such an image ends in
TRAILER = b'\n{"format": '  # begins the line behind an array

# Kinds of DICOM files (the last parts of their SOP class, PS3.4 B.5) that never have several frames: CR, DX, MG, CT, MR
# and PET. They need not be opened to be listed.
SINGLE = frozenset(("1", "1.1", "1.1.1", "1.2", "1.2.1", "2", "4", "128"))
STORAGE = re.compile(rb"\x02\0\x02\0UI.\0" + re.escape(b"1.2.840.10008.5.1.4.1.1.") + rb"([\d.]+)", re.DOTALL)
START_BYTES = 1024  # of a DICOM file: its kind is there


class Volume(NamedTuple):
    """A file of several images, opened: how many, the values of each, how much memory they take, and the format."""

    count: int
    image: Callable[[int], Values]
    size: int
    format: str


def image_count(path: str) -> int | None:
    """How many images a local file holds, each listed by itself; None for one image that is read as a whole.

    0 for DICOM without pixels. What is broken is listed, and named when it is read.
    """
    try:
        if NIFTI_NAME.search(path):
            return math.prod(_nibabel().load(path).shape[2:])
        with open(path, "rb") as file:
            start = file.read(START_BYTES)
        kind = STORAGE.search(start)
        if not dicom.is_dicom(start) or (kind and kind[1].rstrip(b"\0").decode() in SINGLE):
            return None
        count = dicom.frame_count(dicom.open_dicom(path, header_only=True))
        return count if count > 1 else None
    except BadImage as bad:
        return 0 if bad.status == "not an image" else None
    except Exception:  # a bad file may cause nearly any exception
        return 1 if NIFTI_NAME.search(path) else None


def open_volume(path: str) -> Volume:
    """Open a file of several images. Raises OSError, with the reason, for a broken one."""
    try:
        if NIFTI_NAME.search(path):
            return _open_nifti(path)
        dataset = dicom.open_dicom(path)
        found = dicom.frames(dataset)
        return Volume(len(found), found.__getitem__, sum(values.array.nbytes for values in found), "DICOM")
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {' '.join(str(error).split())[:300] or type(error).__name__}") from None


def to_bytes(volume: Volume, number: int) -> bytes:
    """The bytes of one image. Raises OSError if there is none of this number."""
    if not 0 <= number < volume.count:
        raise OSError(f"has no image {number:,}, but {volume.count:,}")
    values = volume.image(number)
    out = io.BytesIO()
    np.save(out, values.array, allow_pickle=False)
    return out.getvalue() + b"\n" + json.dumps({"format": volume.format, "window": values.window}).encode() + b"\n"


def trailer(behind: bytes) -> tuple[str, Range | None] | None:
    """Format and window, from what lies behind an array; None for an array that is of no medical image."""
    if not behind.startswith(TRAILER):
        return None
    said = json.loads(behind)
    return str(said["format"]), check_range(tuple(map(float, said["window"]))) if said["window"] else None


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError:
        raise BadImage("decode error", f"a NIfTI file: {dicom.INSTALL} reads it") from None
    return nibabel


def _open_nifti(path: str) -> Volume:
    picture = _nibabel().load(path)
    proxy, shape = picture.dataobj, picture.shape
    size = math.prod(shape) * proxy.dtype.itemsize
    is_compressed = path.lower().endswith(".gz")
    if len(shape) < 2 or proxy.dtype.kind not in "uifV":
        raise OSError(f"{path}: an array of {proxy.dtype} and shape {shape}, not of images")
    if is_compressed and size > dicom.MAX_BYTES:
        raise OSError(f"{path}: {size:,} bytes are more than the limit of {dicom.MAX_BYTES:,}; gunzip it")
    stored = proxy.get_unscaled()
    slope, intercept = float(proxy.slope), float(proxy.inter)
    count = math.prod(shape[2:])

    def values_of(number: int) -> np.ndarray:
        place = np.unravel_index(number, shape[2:], order="F") if len(shape) > 2 else ()
        values = np.rot90(np.asarray(stored[(slice(None), slice(None), *place)]))
        if values.dtype.kind == "V":
            return np.stack([values[name] for name in "RGB"], axis=2)
        values = values.astype(values.dtype.newbyteorder("="))
        if (slope, intercept) != (1, 0):
            values = (values * slope + intercept).astype(np.float32)
        return values[:, :, None]

    header, window = picture.header, None
    if (proxy.dtype.itemsize > 1 and proxy.dtype.kind != "V") or (slope, intercept) != (1, 0):
        window = float(header.get("cal_min", 0)), float(header.get("cal_max", 0))
        window = window if window[0] < window[1] else _extremes(values_of, count)
    return Volume(count, lambda number: Values(values_of(number), window), size if is_compressed else 0, "NIfTI")


def _extremes(values_of: Callable[[int], np.ndarray], count: int) -> Range | None:
    """The least and the greatest value of all images; None if they are the same."""
    low, high = math.inf, -math.inf
    for number in range(count):
        values = values_of(number)
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return (low, high) if low < high else None
