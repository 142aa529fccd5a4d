"""DICOM images, by pydicom (extra `medical`).

rescale         slope and intercept, or the table of the file, are applied: a CT has Hounsfield units
window          without a range, the first window of the file is shown, linearly (PS3.3, C.11.2); without a window, the
                least to the greatest value of the file; 8 bits are unchanged
MONOCHROME1     small values are bright: they are inverted within their bits, and the window with them
colours         become RGB, also those of a palette
several frames  each is an image (volumes.py)

pydicom decodes uncompressed, deflated and RLE files by itself, and JPEG Baseline and JPEG 2000 by Pillow. Anything else
is a broken image; its reason names the package that decodes it.
"""

import io
import logging
import math
import warnings
from functools import cache
from typing import Any

import numpy as np

from troodon.config import Range
from troodon.pixels import BadImage, Values

MAGIC, MAGIC_AT = b"DICM", 128
INSTALL = 'pip install "troodon[medical]"'
MAX_BYTES = 1 << 31  # of all frames of a file, decoded

# pydicom warns about what this module decides, and logs it. Filters cannot be changed safely while threads decode.
warnings.filterwarnings("ignore", module=r"pydicom\b")
logging.getLogger("pydicom").addHandler(logging.NullHandler())

# What decodes a transfer syntax that pydicom needs others for, by the last part of its identifier.
# fmt: off
DECODERS = {
    "51": "pylibjpeg pylibjpeg-libjpeg", "57": "pylibjpeg pylibjpeg-libjpeg", "70": "pylibjpeg pylibjpeg-libjpeg",
    "80": "pyjpegls", "81": "pyjpegls",
    "90": "pylibjpeg pylibjpeg-openjpeg", "91": "pylibjpeg pylibjpeg-openjpeg",
    "201": "pylibjpeg pylibjpeg-openjpeg", "202": "pylibjpeg pylibjpeg-openjpeg", "203": "pylibjpeg pylibjpeg-openjpeg",
}
# fmt: on


def is_dicom(start: bytes) -> bool:
    """Whether a file that begins so is DICOM; the list of files of a disk (DICOMDIR) is, too."""
    return start[MAGIC_AT : MAGIC_AT + 4] == MAGIC


@cache
def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise BadImage("not an image", f"a DICOM file: {INSTALL} reads it") from None
    return pydicom


def open_dicom(file: Any, header_only: bool = False) -> Any:
    """The data set of a file, given by its path or open. BadImage if it has no pixels."""
    pydicom = _pydicom()
    dataset = pydicom.dcmread(file, stop_before_pixels=header_only)
    if "Rows" not in dataset or "Columns" not in dataset:
        kind = getattr(dataset.get("SOPClassUID"), "name", None) or "of unknown kind"
        raise BadImage("not an image", f"a DICOM file without pixels ({kind})")
    return dataset


def frame_count(dataset: Any) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def describe(data: bytes) -> tuple[str, int, int, int, bool]:
    """Mode, width, height, channels, and whether the values have more than 8 bits. Raises BadImage, or anything."""
    dataset = open_dicom(io.BytesIO(data), header_only=True)
    channels = 3 if dataset.PhotometricInterpretation == "PALETTE COLOR" else int(dataset.get("SamplesPerPixel", 1))
    is_deep = channels == 1 and (dataset.BitsStored > 8 or _rescale(dataset, 0) != (1, 0))
    mode = f"{dataset.PhotometricInterpretation} {dataset.BitsStored} bits"
    return mode, int(dataset.Columns), int(dataset.Rows), channels, is_deep or int(dataset.BitsStored) > 8


def decode_one(data: bytes) -> Values:
    """The values of a file with one frame. Raises BadImage, or whatever pydicom raises."""
    dataset = open_dicom(io.BytesIO(data))
    if (count := frame_count(dataset)) > 1:
        hint = "as FILE#0, or give a folder that holds the file"
        raise BadImage("decode error", f"a DICOM file of {count:,} frames: name one, {hint}")
    return frames(dataset)[0]


def frames(dataset: Any) -> list[Values]:
    """The values (H, W, C) of every frame, and its window. Raises BadImage, or whatever pydicom raises."""
    count, channels = frame_count(dataset), int(dataset.get("SamplesPerPixel", 1))
    size = count * dataset.Rows * dataset.Columns * channels * max(8, int(dataset.BitsAllocated)) // 8
    if size > MAX_BYTES:
        raise BadImage("too large", f"{size:,} bytes of pixels are more than the limit of {MAX_BYTES:,}")
    array = _decoded(dataset)
    array = array if count > 1 else array[None]
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        array = _pydicom().pixels.apply_color_lut(array, dataset)
        array = (array >> 8).astype(np.uint8) if array.dtype.itemsize > 1 else array
        channels = 3
    if channels > 1:
        return [Values(frame[:, :, :3]) for frame in array]
    if dataset.BitsAllocated == 1:
        return [Values(frame.astype(bool)[:, :, None]) for frame in array]
    found = [_of_frame(dataset, frame, number) for number, frame in enumerate(array)]
    if any(values.window is None for values in found) and found[0].array.dtype != np.uint8:
        low, high = min(float(v.array.min()) for v in found), max(float(v.array.max()) for v in found)
        found = [v if v.window or low == high else v._replace(window=(low, high)) for v in found]
    return found


def _decoded(dataset: Any) -> np.ndarray:
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        return dataset.pixel_array
    except Exception as error:
        package = DECODERS.get(str(syntax).rpartition(".")[2]) if syntax.startswith("1.2.840.10008.1.2.4.") else None
        said = str(error)
        if package and ("missing dependencies" in said or ("does not support" in said and "libjpeg:" not in said)):
            raise BadImage("decode error", f"{syntax.name}: pip install {package} decodes it") from None
        if isinstance(error, NotImplementedError | RuntimeError) and "missing" in said:
            raise BadImage("decode error", f"{syntax.name}: no package that pydicom knows decodes it") from None
        raise


def _of_frame(dataset: Any, stored_HW: np.ndarray, number: int) -> Values:
    """The values (H, W, 1) of a grey frame: inverted if small ones are bright, then rescaled; and its window."""
    values, mirror = stored_HW, None
    slope, intercept = _rescale(dataset, number)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        mirror = -1 if dataset.get("PixelRepresentation", 0) else (1 << int(dataset.BitsStored)) - 1
        values = (mirror - values.astype(np.int64)).astype(values.dtype)
    if "ModalityLUTSequence" in dataset:
        values = _pydicom().pixels.apply_modality_lut(values, dataset)
    elif (slope, intercept) != (1, 0):
        is_whole = slope.is_integer() and intercept.is_integer() and values.dtype.kind in "iu"
        values = values * slope + intercept
        values = values.round().astype(np.int32) if is_whole else values.astype(np.float32)
    window = None if values.dtype == np.uint8 else _window(dataset, number)
    if window is not None and mirror is not None:
        around = slope * mirror + 2 * intercept
        window = around - float(window[1]), around - float(window[0])
    return Values(values[:, :, None], window)


def _said(dataset: Any, number: int, group: str, name: str) -> Any:
    """What a file says of a frame: by itself, in the group for all frames, or in that of the frame; else None."""
    if (value := dataset.get(name)) is not None:
        return value
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    each = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for item in [*each[number : number + 1], *shared[:1]]:
        for inner in (item.get(group) or [])[:1]:
            if (value := inner.get(name)) is not None:
                return value
    return None


def _rescale(dataset: Any, number: int) -> tuple[float, float]:
    group = "PixelValueTransformationSequence"
    slope, intercept = (_said(dataset, number, group, name) for name in ("RescaleSlope", "RescaleIntercept"))
    return float(1 if slope is None else slope), float(intercept or 0)


def _window(dataset: Any, number: int) -> Range | None:
    """The first window: the values that become black and white."""
    names = ("WindowCenter", "WindowWidth", "VOILUTFunction")
    centre, width, function = (_said(dataset, number, "FrameVOILUTSequence", name) for name in names)
    if centre is None or width is None:
        return None
    middle, size = (float(n) if isinstance(n, float | int) else float(next(iter(n), math.nan)) for n in (centre, width))
    if not (math.isfinite(middle) and 0 < size < math.inf):
        return None
    if function not in ("LINEAR_EXACT", "SIGMOID"):
        middle, size = middle - 0.5, max(size - 1, 1e-6 * max(1.0, abs(middle)))
    return middle - size / 2, middle + size / 2
