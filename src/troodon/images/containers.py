"""Files that hold many images, each where it lies: tars, zips, Parquet tables, and data sets that live in Python.

A container is listed once (`members`, `columns`), which says for every image in it at which offset how many bytes lie;
`read` then takes one image out, by these two numbers, from any thread.

    tar       uncompressed; the bytes as they lie
    zip       stored or deflated; the offset is that of the member's own header
    Parquet   a column of bytes, or of structs with a field `bytes`; the offset is the row. A group of rows is
              unpacked whole: the last few are kept, which serves those who read in order
"""

import io
import math
import posixpath
import struct
import tarfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from troodon import run
from troodon.config import UsageError
from troodon.images import files

LARGEST = 1 << 30  # bytes of an image: what is larger was named like one (arrays may be anything), and stays unread
GROUPS = 8  # groups of rows of Parquet kept unpacked
HEADER = struct.Struct("<4s5H3L2H")  # of a member of a zip (APPNOTE.TXT, 4.3.7)
COLUMN = "#"  # between the path of a Parquet file and the column that holds the images
LONGEST_CLASS = 256  # bytes of a .cls member

# The first bytes of compressed files, and what unpacks them.
# fmt: off
COMPRESSED = (
    (b"\x1f\x8b", "gunzip"), (b"BZh", "bunzip2"), (b"\xfd7zXZ", "unxz"), (b"\x28\xb5\x2f\xfd", "unzstd"),
)
# fmt: on


def kind(path: str) -> str | None:
    """What a file's name says it is: "tar", "zip", "parquet", or None for no container."""
    ending = path.rpartition("/")[2].rpartition(".")[2].lower()
    return ending if ending in ("tar", "zip", "parquet") else None


def read(container: str, offset: int, length: int) -> bytes:
    """The bytes of the image that lies there. OSError where it does not, or where it is too large."""
    if length > LARGEST:
        raise OSError(f"{length:,} bytes are more than the limit of {LARGEST:,}")
    path, _, column = container.rpartition(COLUMN)
    if kind(path) == "parquet":
        return _cell(path, column, offset)
    if kind(container) == "zip":
        return _inflated(container, offset, length)
    if kind(container) != "tar" and not files.REMOTE.match(container):
        offset, length = 0, -1  # a file that has grown since is read as it is now
    return files.read(container, offset, length)


@dataclass
class Members:
    """What lies in a tar or a zip: each file's offset and length by name, and what was met besides."""

    where: dict[str, tuple[int, int]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)  # of WebDataset: the key of a sample -> its .cls
    locked: int = 0  # files that are encrypted, or compressed in a way that is not read


def members(container: str, hidden: Callable[[str], bool]) -> Members:
    """What lies in a tar or a zip, but for hidden names; of two of one name, the later, as unpacking would.

    A damaged one gives what is whole, and a line about it; UsageError where nothing is.
    """
    found, count, whole = (_zip if kind(container) == "zip" else _tar)(container, hidden)
    if not whole:
        run.say(f"{container}: is cut short or damaged; the {count} files before that are whole and used")
    if count > len(found.where):
        run.say(f"{container}: {count - len(found.where)} files have the name of a later one and are left out")
    return found


def _tar(container: str, hidden: Callable[[str], bool]) -> tuple[Members, int, bool]:
    size, found = files.size(container), Members()
    count, whole = 0, True
    with files.open_file(container) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # pyrefly: ignore[missing-attribute]  # it would keep them, a kilobyte each
                    if member.size < 0 or (member.isreg() and member.offset_data + member.size > size):
                        whole = False  # a size below zero would send tarfile back to where it was, for ever
                        break
                    name = _clean(member.name)
                    if not member.isreg() or member.issparse() or any(map(hidden, name.split("/"))):
                        continue
                    found.where[name] = (member.offset_data, member.size)
                    count += 1
                    if name.endswith(".cls") and member.size <= LONGEST_CLASS:
                        said = tar.extractfile(member)
                        found.classes[name[:-4]] = said.read().decode(errors="replace").strip() if said else ""
                file.seek(tar.offset)
                whole = whole and file.read(512) == bytes(512)  # damage too makes tarfile stop without a word
        except (tarfile.TarError, ValueError) as error:
            if not count:
                refuse_compressed(container)
                raise UsageError(f"{container}: is not a tar ({error})") from None
            whole = False
    return found, count, whole


def _zip(container: str, hidden: Callable[[str], bool]) -> tuple[Members, int, bool]:
    found, count = Members(), 0
    try:
        with files.open_file(container) as file, zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                name = _clean(member.filename)
                if member.is_dir() or any(map(hidden, name.split("/"))):
                    continue
                if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    found.locked += 1
                    continue
                found.where[name] = (member.header_offset, member.compress_size)
                count += 1
                if name.endswith(".cls") and member.file_size <= LONGEST_CLASS:
                    found.classes[name[:-4]] = archive.read(member).decode(errors="replace").strip()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UsageError(f"{container}: is not a whole zip ({error}): its list of files stands at its end") from None
    return found, count, True


def _clean(name: str) -> str:
    name = posixpath.normpath(name.replace("\\", "/") if "/" not in name else name).lstrip("/")
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def refuse_compressed(path: str) -> None:
    with files.open_file(path) as file:
        start = file.read(8)
    for magic, tool in COMPRESSED:
        if start.startswith(magic):
            raise UsageError(f"{path}: is compressed, but images are read where they lie: first {tool} {path}")


def _inflated(container: str, offset: int, length: int) -> bytes:
    """A member of a zip, unpacked. What its header says of lengths is not trusted; the end of the data is."""
    magic, *_, method, _, _, _, _, _, name, extra = HEADER.unpack(files.read(container, offset, HEADER.size))
    if magic != b"PK\x03\x04" or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise OSError(f"{container}: no file begins at {offset:,}; it has changed since it was listed")
    data = files.read(container, offset + HEADER.size + name + extra, length)
    if method == zipfile.ZIP_STORED:
        return data
    unpacker = zlib.decompressobj(-15)
    try:
        data = unpacker.decompress(data, LARGEST)
    except zlib.error as error:
        raise OSError(f"{container}: damaged at {offset:,} ({error})") from None
    if not unpacker.eof:
        raise OSError(f"{container}: what begins at {offset:,} is cut short, or more than {LARGEST:,} bytes")
    return data


# ---- Parquet


@dataclass(frozen=True)
class Columns:
    """What a Parquet table holds: one of bytes, or of paths and URLs; and what it says of labels and splits."""

    rows: int
    images: str | None  # the column with the bytes, None if images lie elsewhere
    table: pa.Table  # its columns of strings and numbers
    classes: dict[str, list[str]]  # by column: the names that its numbers stand for
    group: int  # bytes of the largest group of rows, unpacked


def columns(container: str, images: str | None = None) -> Columns | None:
    """What a Parquet table holds; None where it has no image bytes and no column of strings.

    `images` names the column; else it is `image`, or the first that has bytes. UsageError for what is no Parquet, and
    for a column that is not there.
    """
    try:
        with files.open_file(container) as file, pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            known = [f.name for f in schema if _bytes_of(f.type) is not None]
            if images is not None and images not in known:
                raise UsageError(f"{container}/{images}: no such column of images; it has {', '.join(known) or 'none'}")
            images = images or next((name for name in ("image", "img", *known) if name in known), None)
            plain = [
                f.name for f in schema
                if pa.types.is_string(f.type) or pa.types.is_large_string(f.type) or pa.types.is_integer(f.type)
            ]  # fmt: skip
            if images is None and not plain:
                return None
            groups = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
            said = table.read(columns=plain) if plain else pa.table({})
            return Columns(table.metadata.num_rows, images, said, _classes(schema), max(groups, default=0))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(f"{container}: is not a Parquet table ({' '.join(str(error).split())[:200]})") from None


def _bytes_of(type: pa.DataType) -> str | None:
    """The field that holds bytes, "" if that is the column itself, None if it has none."""
    if pa.types.is_struct(type):
        names = [type.field(i).name for i in range(type.num_fields)]
        return "bytes" if "bytes" in names and _bytes_of(type.field("bytes").type) == "" else None
    return "" if pa.types.is_binary(type) or pa.types.is_large_binary(type) else None


def _classes(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of classes, as Hugging Face's datasets writes them beside a table."""
    import json

    try:
        said = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: list(f["names"]) for name, f in said.items() if isinstance(f, dict) and "names" in f}
    except (KeyError, TypeError, ValueError):
        return {}


class _Table:
    """One column of an open Parquet file: the bytes of any row."""

    def __init__(self, path: str, column: str):
        local = not files.REMOTE.match(path)
        self.file = pq.ParquetFile(path if local else files.open_file(path), memory_map=local)
        counts = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = np.cumsum([0, *counts])
        inner = _bytes_of(self.file.schema_arrow.field(column).type)
        self.column, self.leaf = column, f"{column}.{inner}" if inner else column
        self.lock = threading.Lock()  # a ParquetFile is not made for several threads

    def group(self, number: int) -> pa.Array:
        with self.lock:
            column = self.file.read_row_group(number, columns=[self.leaf])[self.column]
        return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


class _Kept:
    """Results of the last few calls; one that is being made is waited for, not made twice."""

    def __init__(self, limit: int):
        self.limit, self.lock, self.made = limit, threading.Lock(), OrderedDict[Any, Future]()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        with self.lock:
            mine = key not in self.made
            future = self.made.setdefault(key, Future())
            self.made.move_to_end(key)
            while len(self.made) > self.limit:
                self.made.popitem(last=False)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self.lock:
                    self.made.pop(key, None)
                future.set_exception(error)
        return future.result()


_tables, _groups = _Kept(256), _Kept(GROUPS)


def _cell(path: str, column: str, row: int) -> bytes:
    try:
        table = _tables.get((path, column), lambda: _Table(path, column))
        number = int(np.searchsorted(table.starts, row, "right")) - 1
        if not 0 <= row < table.starts[-1]:
            raise OSError(f"{path}: has no row {row:,}; it has changed since it was listed")
        cell = _groups.get((path, column, number), lambda: table.group(number))[row - int(table.starts[number])]
    except (pa.ArrowException, KeyError) as error:
        raise OSError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    value = cell.as_py()
    return (value["bytes"] if isinstance(value, dict) else value) or b""


# ---- data sets that live in Python


def read_item(dataset: Any, row: int) -> bytes:
    """The image of an item, as the bytes of a file: those it comes with, or of a .npy of its pixels."""
    try:
        item = dataset[row]
    except Exception as error:  # it is not ours, and one bad item is one bad image
        raise OSError(f"item {row} of {type(dataset).__name__}: {type(error).__name__}: {error}") from error
    image = image_of(item)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image:
        return files.read(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if image is None:
        raise OSError(f"item {row} of {type(dataset).__name__}: no image in {type(item).__name__}")
    return _npy(image)


def image_of(item: Any) -> Any:
    """What is the image in an item: itself, the first of a tuple that can be one, or by its name in a dict."""
    if isinstance(item, dict) and "bytes" not in item:
        named = next((n for n in ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values") if n in item), None)
        return item[named] if named else next(filter(_is_image, item.values()), None)
    if isinstance(item, tuple | list):
        return next(filter(_is_image, item), None)
    return item


def _is_image(value: Any) -> bool:
    bytes_of = isinstance(value, dict) and "bytes" in value
    return bytes_of or isinstance(value, bytes | bytearray) or hasattr(value, "__array_interface__") or _tensor(value)


def _tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "numpy")


def _npy(image: Any) -> bytes:
    """The bytes of a .npy file of a picture, an array (H, W) or (H, W, C), or a tensor (C, H, W)."""
    if hasattr(image, "getbands"):
        from troodon.images.decode import pixels

        array = pixels(image)
    else:
        array = image.cpu().numpy() if _tensor(image) else np.asarray(image)
        if _tensor(image) and array.ndim == 3:
            array = array.transpose(1, 2, 0)
    if array.dtype.kind != "u" or array.dtype.itemsize > 2 or not math.prod(array.shape):
        raise OSError(f"an image of {array.dtype} and shape {array.shape}, where uint8 or uint16 is wanted")
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def labels_of(dataset: Any) -> Sequence[str | None] | None:
    """The classes of a data set's items, where it says them of itself, as those of torchvision and Hugging Face do."""
    names, codes = getattr(dataset, "classes", None), getattr(dataset, "targets", None)
    features = getattr(dataset, "features", None)
    if codes is None and isinstance(features, dict):
        column = next((n for n in ("label", "labels", "class", "fine_label") if n in features), None)
        if column is None:
            return None
        names, codes = getattr(features[column], "names", None), dataset[column]
    if codes is None or len(codes) != len(dataset):
        return None
    codes = [c.item() if hasattr(c, "item") else c for c in codes]
    return [None if c is None else str(names[c] if names and isinstance(c, int) else c) for c in codes]
