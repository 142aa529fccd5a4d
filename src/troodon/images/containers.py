"""Files that hold many images: reads one image from a tar, zip or Parquet file, or from a Python dataset.

An image is found by its container, an offset and a length, from any thread. members.py lists a container and finds
these numbers.

    tar       uncompressed; the bytes are returned unchanged
    zip       stored or deflated members, whose checksums are compared; the offset is that of the local header
    volumes   NIfTI and DICOM of several frames (volumes.py); the offset is the number of an image. Those used last stay
              in memory
    Parquet   a column of bytes, or of structs with a field `bytes`; the offset is the row number. A row group is
              decompressed whole: the last few are cached, which makes sequential reading fast
"""

import io
import math
import os
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from troodon.images import files, volumes

T = TypeVar("T")

MAX_IMAGE_BYTES = 1 << 30  # a larger file only has the name of an image (arrays may be any size), and is not read
CACHED_ROW_GROUPS = 8  # row groups of Parquet files kept decompressed
CACHED_VOLUME_BYTES = 1 << 30  # of volumes kept decompressed
OPEN_VOLUME_BYTES = 1 << 22  # that each one counts in addition
ZIP_HEADER = struct.Struct("<4s5H3L2H")  # the local header of a zip member (APPNOTE.TXT, 4.3.7)
ZIP_DESCRIPTOR_FLAG = 1 << 3  # checksum and lengths are behind the data (APPNOTE.TXT, 4.4.4)
PARQUET_DAMAGE = (pa.ArrowException, LookupError, TypeError, ValueError)  # what reading a damaged file may raise
COLUMN_SEPARATOR = "#"  # between the path of a Parquet file and the name of its image column


def kind(path: str) -> str | None:
    """The type of container by its file name: "tar", "zip" or "parquet"; None for any other file."""
    extension = path.rpartition("/")[2].rpartition(".")[2].lower()
    return extension if extension in ("tar", "zip", "parquet") else None


def file_of(container: str) -> str:
    """The path or URL of the file that is the container: without the column, if it is Parquet."""
    path = container.rpartition(COLUMN_SEPARATOR)[0]
    return path if kind(path) == "parquet" or container.endswith(volumes.MEMBER) else container


def modified(names: Sequence[str]) -> list[int]:
    """When the files of these containers were last changed: see files.modified."""
    return map_files(files.modified, [file_of(name) for name in names])


def map_files(ask: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """`ask` for each path or URL; URLs by threads, since each waits for an answer."""
    if not any(files.REMOTE.match(name) for name in names):
        return list(map(ask, names))
    with ThreadPoolExecutor(files.MAX_REMOTE_READS) as pool:
        return list(pool.map(ask, names))


def read(container: str, offset: int, length: int) -> bytes:
    """Read the bytes of one image. Raises OSError if they are not there, or are too many."""
    if length > MAX_IMAGE_BYTES:
        raise OSError(f"{length:,} bytes are more than the limit of {MAX_IMAGE_BYTES:,}")
    path = file_of(container)
    if container.endswith(volumes.MEMBER):
        return _read_slice(path, offset)
    if path != container:
        return _read_cell(path, container[len(path) + 1 :], offset)
    if kind(container) == "zip":
        return _read_zip_member(container, offset, length)
    if kind(container) != "tar" and not files.REMOTE.match(container):
        offset, length = 0, -1  # if the file has changed since it was listed, its present content is read
    return files.read(container, offset, length)


def read_path(path: str) -> bytes:
    """Read the image file at a local path, or one image of a file of several: `brain.nii.gz#12`. Raises OSError."""
    whole, separator, number = path.rpartition(volumes.SEPARATOR)
    if separator and number.isdecimal() and not os.path.exists(path):
        return _read_slice(whole, int(number))
    if volumes.NIFTI_NAME.search(path):
        count = _volume(path).count
        raise OSError(f"holds {count:,} images: name one, as {path}{volumes.SEPARATOR}{count // 2}")
    return files.read(path)


def _read_slice(path: str, number: int) -> bytes:
    return volumes.to_bytes(_volume(path), number)


def _volume(path: str) -> volumes.Volume:
    files.require_file(path)
    return _volumes.get((path, files.modified(path)), lambda: volumes.open_volume(path))


def _read_zip_member(container: str, offset: int, length: int) -> bytes:
    """Read and decompress a member of a zip. The lengths in its header are not trusted; the end of its data is."""
    header = ZIP_HEADER.unpack(files.read(container, offset, ZIP_HEADER.size))
    magic, _, flags, method, _, _, checksum, _, stored_length, name_length, extra_length = header
    if magic != b"PK\x03\x04" or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise OSError(f"{container}: no file begins at {offset:,}; it has changed since it was listed")
    start = offset + ZIP_HEADER.size + name_length + extra_length
    is_behind = bool(flags & ZIP_DESCRIPTOR_FLAG)
    stored = files.read(container, start, length + 8 * is_behind)
    stored, descriptor = stored[:length], stored[length:]
    data = stored if method == zipfile.ZIP_STORED else _inflate(container, offset, stored)
    checksums = {checksum}
    if is_behind:  # with or without a signature
        checksums = {int.from_bytes(descriptor[:4], "little")}
        if descriptor[:4] == b"PK\x07\x08":
            checksums.add(int.from_bytes(descriptor[4:], "little"))
    elif not checksum and not stored_length:  # this writer left them out
        return data
    if zlib.crc32(data) not in checksums:
        raise OSError(f"{container}: damaged at {offset:,} (its checksum, CRC-32, is another)")
    return data


def _inflate(container: str, offset: int, data: bytes) -> bytes:
    decompressor = zlib.decompressobj(-15)
    try:
        data = decompressor.decompress(data, MAX_IMAGE_BYTES)
    except zlib.error as error:
        raise OSError(f"{container}: damaged at {offset:,} ({error})") from None
    if not decompressor.eof:
        raise OSError(f"{container}: the member at {offset:,} is truncated, or more than {MAX_IMAGE_BYTES:,} bytes")
    return data


# ---- Parquet


def bytes_field(type: pa.DataType) -> str | None:
    """The name of the field that holds bytes, "" if the column itself does, None if there is none."""
    if pa.types.is_struct(type):
        names = [type.field(i).name for i in range(type.num_fields)]
        return "bytes" if "bytes" in names and bytes_field(type.field("bytes").type) == "" else None
    return "" if pa.types.is_binary(type) or pa.types.is_large_binary(type) else None


class _ParquetColumn:
    """The image column of an open Parquet file."""

    def __init__(self, path: str, column: str):
        if is_local := not files.REMOTE.match(path):
            files.require_file(path)
        self.file = pq.ParquetFile(path if is_local else files.open_file(path), memory_map=is_local)
        counts = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.group_starts = np.cumsum([0, *counts])
        field = bytes_field(self.file.schema_arrow.field(column).type)
        self.column, self.leaf = column, f"{column}.{field}" if field else column
        self.lock = threading.Lock()  # a ParquetFile is not thread-safe

    def read_group(self, number: int) -> pa.Array:
        with self.lock:
            column = self.file.read_row_group(number, columns=[self.leaf])[self.column]
        return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


class _Cache:
    """The results of the last few calls, which together cost at most so much, or the last one alone. A result that
    another thread is computing is waited for."""

    def __init__(self, limit: int, cost: Callable[[Any], int] = lambda _: 1):
        self.limit, self.cost, self.lock, self.futures = limit, cost, threading.Lock(), OrderedDict[Any, Future]()

    def get(self, key: Any, compute: Callable[[], Any]) -> Any:
        with self.lock:
            is_new = key not in self.futures
            future = self.futures.setdefault(key, Future())
            self.futures.move_to_end(key)
            self._shorten()
        if is_new:
            try:
                future.set_result(compute())
                with self.lock:
                    self._shorten()
            except BaseException as error:
                with self.lock:
                    self.futures.pop(key, None)
                future.set_exception(error)
        return future.result()

    def _shorten(self) -> None:
        costs = [self.cost(f.result()) if f.done() and not f.exception() else 1 for f in self.futures.values()]
        total = sum(costs)
        for cost in costs[:-1]:
            if total <= self.limit:
                break
            total -= cost
            self.futures.popitem(last=False)


_columns, _groups = _Cache(256), _Cache(CACHED_ROW_GROUPS)
_volumes = _Cache(CACHED_VOLUME_BYTES, lambda volume: volume.size + OPEN_VOLUME_BYTES)


def _read_cell(path: str, column_name: str, row: int) -> bytes:
    key = (path, column_name, files.modified(path))  # a file that is written anew is opened anew
    try:
        column = _columns.get(key, lambda: _ParquetColumn(path, column_name))
        starts = column.group_starts
        number = int(np.searchsorted(starts, row, "right")) - 1
        if not 0 <= row < starts[-1]:
            raise OSError(f"{path}: has no row {row:,}; it has changed since it was listed")
        group = _groups.get((*key, number), lambda: column.read_group(number))
        value = group[row - int(starts[number])].as_py()
    except PARQUET_DAMAGE as error:
        raise OSError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    return (value["bytes"] if isinstance(value, dict) else value) or b""


# ---- Python datasets


def read_item(dataset: Any, row: int) -> bytes:
    """The image of one item as the bytes of a file: the ones it holds, or those of a .npy file of its pixels."""
    try:
        item = dataset[row]
    except Exception as error:  # foreign code may raise anything; one bad item is one bad image
        raise OSError(f"item {row} of {type(dataset).__name__}: {type(error).__name__}: {error}") from error
    image = _find_image(item)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image:
        return files.read(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if image is None:
        raise OSError(f"item {row} of {type(dataset).__name__}: no image in {type(item).__name__}")
    return _to_npy(image)


def _find_image(item: Any) -> Any:
    """The image in an item: by its key in a dict, the first value of a tuple that can be one, or the item itself."""
    if isinstance(item, dict) and "bytes" not in item:
        key = next((n for n in ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values") if n in item), None)
        return item[key] if key else next(filter(_is_image, item.values()), None)
    if isinstance(item, tuple | list):
        return next(filter(_is_image, item), None)
    return item


def _is_image(value: Any) -> bool:
    if isinstance(value, dict):
        return "bytes" in value
    return isinstance(value, bytes | bytearray) or hasattr(value, "__array_interface__") or _is_tensor(value)


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "numpy")


def _to_npy(image: Any) -> bytes:
    """The bytes of a .npy file of a Pillow image, an array (H, W) or (H, W, C), or a tensor (C, H, W).

    A Pillow image of more than 8 bits gives the bytes of a TIFF.
    """
    if hasattr(image, "getbands"):
        from PIL import Image

        from troodon.images.decode import pillow_to_array
        from troodon.pillow import of_pillow

        if image.mode == "F" or image.mode.startswith("I"):  # more than 8 bits, which become 8 where it is decoded
            Image.fromarray(of_pillow(image)[:, :, 0]).save(out := io.BytesIO(), "TIFF")
            return out.getvalue()
        array = pillow_to_array(image)
    else:
        array = image.cpu().numpy() if _is_tensor(image) else np.asarray(image)
        if _is_tensor(image) and array.ndim == 3:
            array = array.transpose(1, 2, 0)
    if array.dtype.kind != "u" or array.dtype.itemsize > 2 or not math.prod(array.shape):
        raise OSError(f"an image of {array.dtype} and shape {array.shape}, where uint8 or uint16 is wanted")
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()
