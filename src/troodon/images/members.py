"""What a container holds: the members of a tar or zip, the columns of a Parquet file, the labels of a Python dataset.

Listing reads a container once and finds, for every image in it, the offset and length by which containers.py reads it.
Training never needs this module.
"""

import io
import json
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from troodon import run
from troodon.config import UsageError
from troodon.images import containers, files
from troodon.images.formats import IMAGE_EXTENSIONS, LOOK_BYTES, LeftOut, extension, find_images, is_image
from troodon.images.labels import LABEL_COLUMNS
from troodon.text import plural

ZIP_END_BYTES = 22 + 0xFFFF  # the longest record at the end of a zip, with its comment (APPNOTE.TXT, 4.3.16)
MAX_CLASS_BYTES = 256  # a longer .cls member is no class
MAX_JSON_BYTES = 1 << 16  # a longer .json member is not looked at for a class
METHODS = {9: "Deflate64", 12: "BZIP2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd"}  # of zips (APPNOTE.TXT)

# The first bytes of compressed files, and the program that decompresses them.
# fmt: off
COMPRESSED = (
    (b"\x1f\x8b", "gunzip"), (b"BZh", "bunzip2"), (b"\xfd7zXZ", "unxz"), (b"\x28\xb5\x2f\xfd", "unzstd"),
)
# fmt: on


@dataclass
class Members:
    """The files in a tar or zip: the offset and length of each by name, and what else the listing met."""

    locations: dict[str, tuple[int, int]] = field(default_factory=dict)
    images: set[str] = field(default_factory=set)  # files whose content is an image, though their name does not say so
    classes: dict[str, str] = field(default_factory=dict)  # WebDataset: the class in a .cls or .json, by its name
    left_out: LeftOut = field(default_factory=LeftOut)  # what is in no location

    def class_files(self) -> dict[str, str]:
        """The name of the .cls or .json that says the class of each file beside it.

        The key of a WebDataset sample ends at the first dot of the base name; of two files with that key, the one
        that shares more of the name is meant.
        """
        if not self.classes:
            return {}
        by_key = {}
        for name in sorted(self.classes, key=lambda name: name.endswith(".cls")):  # a .cls counts before a .json
            by_key |= dict.fromkeys((sample_key(name), name.rpartition(".")[0]), name)
        keys = ((name, name.rpartition(".")[0]) for name in self.locations if name not in self.classes)
        found = ((name, by_key.get(stem) or by_key.get(sample_key(name))) for name, stem in keys)
        return {name: of_class for name, of_class in found if of_class is not None}


def sample_key(name: str) -> str:
    """The key of the WebDataset sample that a file belongs to."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def list_members(container: str, is_hidden: Callable[[str], bool]) -> Members:
    """List the files in a tar or zip, without hidden ones. Of two files of one name the later counts, as in unpacking.

    A damaged tar gives its intact files, and a message says so. Raises UsageError if it has none.
    """
    list_files = _list_zip if containers.kind(container) == "zip" else _list_tar
    members, count, is_intact = list_files(container, is_hidden)
    if not is_intact:
        before = plural(count, "file before the damage is", "files before the damage are")
        run.say(f"{container}: is truncated or damaged; the {before} intact and used")
    if again := count - len(members.locations):
        run.say(f"{container}: {plural(again, 'file has', 'files have')} the name of a later one, which counts")
    return members


def _list_tar(container: str, is_hidden: Callable[[str], bool]) -> tuple[Members, int, bool]:
    size, members = files.size(container), Members()
    count, is_intact = 0, True
    with files.open_file(container) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # pyrefly: ignore[missing-attribute]  # tarfile keeps a kilobyte for each
                    if member.size < 0 or (member.isreg() and member.offset_data + member.size > size):
                        is_intact = False  # a negative size would make tarfile go back, and loop for ever
                        break
                    name = _clean_name(member.name)
                    if _is_left_out(member, name, is_hidden, members.left_out):
                        continue
                    members.locations[name] = (member.offset_data, member.size)
                    count += 1
                    if extension(name) not in IMAGE_EXTENSIONS:
                        _look(file, member, name, members)
                file.seek(tar.offset)
                is_intact = is_intact and file.read(512) == bytes(512)  # tarfile stops silently at damage
        except (tarfile.TarError, ValueError) as error:
            if not count:
                refuse_others(container)
                raise UsageError(f"{container}: is not a tar ({error})") from None
            is_intact = False
    return members, count, is_intact


def _is_left_out(member: tarfile.TarInfo, name: str, is_hidden: Callable[[str], bool], left_out: LeftOut) -> bool:
    """Whether a member of a tar is not listed, and is counted in `left_out` if it may be missed."""
    if hidden := next(filter(is_hidden, name.split("/")), None):
        if member.isreg():
            left_out.add_hidden(hidden)
        return True
    if member.issym() or member.islnk():
        left_out.add_reason("link", "are not followed", name)
    elif member.issparse():
        left_out.add_reason("file", "are stored with holes (sparse)", name)
    return not member.isreg() or member.issparse()


def _look(file: Any, member: tarfile.TarInfo, name: str, members: Members) -> None:
    """Note what a member of a tar is whose name is not that of an image: an image still, or a class."""
    file.seek(member.offset_data)
    if name.endswith((".cls", ".json")):
        limit = MAX_CLASS_BYTES if name.endswith(".cls") else MAX_JSON_BYTES
        _add_class(members, name, file.read(member.size) if member.size <= limit else b"")
    elif is_image(name, file.read(min(member.size, LOOK_BYTES))):
        members.images.add(name)


def _add_class(members: Members, name: str, content: bytes) -> None:
    """Note the class that a .cls, or the label of a .json, gives the files beside it."""
    if name.endswith(".cls"):
        if content:
            members.classes[name] = content.decode(errors="replace").strip()
        return
    if not any(f'"{column}"'.encode() in content for column in LABEL_COLUMNS):
        return
    try:
        said = json.loads(content)
        value = next(said[column] for column in LABEL_COLUMNS if column in said)
    except (ValueError, TypeError, StopIteration):
        return
    if isinstance(value, str | int | float):
        members.classes[name] = str(value)


def _list_zip(container: str, is_hidden: Callable[[str], bool]) -> tuple[Members, int, bool]:
    members, count, unnamed = Members(), 0, dict[str, zipfile.ZipInfo]()
    try:
        with files.open_file(container) as file, zipfile.ZipFile(file) as archive:
            is_intact = len(archive.infolist()) >= _count_at_end(file)  # zipfile stops silently at damage
            for member in archive.infolist():
                name = _clean_name(member.filename)
                if member.is_dir():
                    continue
                if hidden := next(filter(is_hidden, name.split("/")), None):
                    members.left_out.add_hidden(hidden)
                    continue
                if member.flag_bits & 1:
                    members.left_out.add_reason("file", "are encrypted", name)
                    continue
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    method = METHODS.get(member.compress_type, f"method {member.compress_type}")
                    members.left_out.add_reason("file", f"are compressed by {method}, which is not read in place", name)
                    continue
                members.locations[name] = (member.header_offset, member.compress_size)
                count += 1
                limit = {"cls": MAX_CLASS_BYTES, "json": MAX_JSON_BYTES}.get(suffix := extension(name), -1)
                if member.file_size <= limit:
                    _add_class(members, name, _start_of(archive, member, limit))
                elif suffix not in IMAGE_EXTENSIONS:
                    unnamed[name] = member
            if not files.REMOTE.match(container):  # its files would be fetched one by one
                members.images |= find_images(unnamed.items(), lambda m: _start_of(archive, m, LOOK_BYTES))
    except UnicodeDecodeError as error:
        raise UsageError(f"{container}: has names that are not UTF-8, as they should be ({error.object!r})") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        refuse_others(container)
        raise UsageError(f"{container}: is not a complete zip ({error}): the list of its files is at its end") from None
    return members, count, is_intact


def _count_at_end(file: Any) -> int:
    """The number of files that a zip says it lists; 0 where it is too large for the record at the end."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - ZIP_END_BYTES))
    end = file.read()
    start = end.rfind(b"PK\x05\x06") + 10
    count = int.from_bytes(end[start : start + 2], "little")
    return 0 if count == 0xFFFF else count


def _start_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo, size: int) -> bytes:
    """The first bytes of a member; none if it is damaged."""
    try:
        with archive.open(member) as content:
            return content.read(size)
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return b""


def _clean_name(name: str) -> str:
    """The name of a member as it is unpacked: below the folder of the container, without ../ at its start."""
    name = posixpath.normpath(name.replace("\\", "/") if "/" not in name else name).lstrip("/")
    while name.startswith("../"):
        name = name[3:]
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def refuse_others(container: str) -> None:
    """Raise UsageError if a file with the name of a container is compressed as a whole, or an image."""
    refuse_compressed(container)
    with files.open_file(container) as file:
        if is_image(container, file.read(LOOK_BYTES)):
            raise UsageError(f"{container}: is an image, but has the name of a {containers.kind(container)}: rename it")


def refuse_compressed(path: str) -> None:
    """Raise UsageError if the file is compressed as a whole, and name the program that decompresses it."""
    with files.open_file(path) as file:
        start = file.read(8)
    for magic, tool in COMPRESSED:
        if start.startswith(magic):
            raise UsageError(f"{path}: is compressed, but images are read in place: run {tool} {path} first")


FIRST_ITEMS = 8  # of a dataset: if none of them has a class, the others are not read


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet table of images, or of paths and URLs, with its labels and splits."""

    rows: int
    image_column: str | None  # the column of image bytes; None if the table only names images
    columns: dict[str, list]  # its columns of labels and splits; without images, all columns of strings
    class_names: dict[str, list[str]]  # by column: the names that its integers stand for
    largest_group_bytes: int  # the largest row group, decompressed
    paths: dict[int, str]  # rows that have no bytes, but the path of a file


def read_columns(container: str, image_column: str | None = None) -> ParquetTable | None:
    """Read the columns of a Parquet table that say something about its images; None if it has none, and no images.

    `image_column` names the column of images. The default is `image`, `img` or the first column of bytes. Raises
    UsageError if the file is not Parquet or has no such column.
    """
    try:
        with files.open_file(container) as file, pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            byte_columns = [f.name for f in schema if containers.bytes_field(f.type) is not None]
            if image_column is not None and image_column not in byte_columns:
                has = ", ".join(byte_columns) or "none"
                raise UsageError(f"{container}/{image_column}: no such column of images; it has {has}")
            if image_column is None:
                of_images = [name for name in byte_columns if not _is_about_images(name)]  # labels may be bytes, too
                image_column = next((n for n in ("image", "img", *of_images) if n in of_images), None)
            others = [
                f.name for f in schema
                if (_is_about_images(f.name) or (image_column is None and _is_text(f.type))) and f.name != image_column
            ]  # fmt: skip
            if lists := [name for name in others if pa.types.is_nested(schema.field(name).type)]:
                run.say(f"{container}: the column {lists[0]!r} is {schema.field(lists[0]).type}, and gives no labels")
            others = [name for name in others if name not in lists]
            if image_column is None and not others:
                return None
            group_bytes = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
            columns = table.read(columns=others).to_pydict() if others else {}
            paths = _rows_of_paths(table, image_column) if image_column else {}
            largest = max(group_bytes, default=0)
            return ParquetTable(table.metadata.num_rows, image_column, columns, _class_names(schema), largest, paths)
    except UsageError:
        raise
    except containers.PARQUET_DAMAGE as error:
        refuse_others(container)
        raise UsageError(f"{container}: is not a Parquet table ({' '.join(str(error).split())[:200]})") from None


def _is_about_images(column: str) -> bool:
    return column.strip().lower() in (*LABEL_COLUMNS, "split")


def _is_text(type: pa.DataType) -> bool:
    type = type.value_type if pa.types.is_dictionary(type) else type
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)


def _rows_of_paths(table: pq.ParquetFile, column: str) -> dict[int, str]:
    """The rows of a column of bytes and paths, as Hugging Face writes it, that have only a path."""
    type, found, start = table.schema_arrow.field(column).type, dict[int, str](), 0
    if not pa.types.is_struct(type) or type.get_field_index("path") < 0:
        return {}
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        leaves = (group.column(i) for i in range(group.num_columns))
        counted = next((leaf.statistics for leaf in leaves if leaf.path_in_schema == f"{column}.bytes"), None)
        nulls = counted.null_count if counted is not None and counted.has_null_count else None
        if nulls != 0:
            wanted = [f"{column}.path", f"{column}.bytes"][: 1 if nulls == group.num_rows else 2]
            values = table.read_row_group(number, columns=wanted)[column].to_pylist()
            found |= {
                start + row: value["path"]
                for row, value in enumerate(values)
                if value is not None and value.get("bytes") is None and value["path"]
            }
        start += group.num_rows
    return found


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The class names by column, from the metadata that Hugging Face's datasets writes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: list(f["names"]) for name, f in features.items() if isinstance(f, dict) and "names" in f}
    except (KeyError, TypeError, ValueError):
        return {}


def dataset_labels(dataset: Any) -> Sequence[str | None] | None:
    """The class of each item of a dataset; None if the dataset does not give them as torchvision or Hugging Face do."""
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


def item_labels(dataset: Any) -> list[str | None] | None:
    """The class of each item of a dataset that gives it beside the image: in a tuple, or in a dict by one of
    LABEL_COLUMNS or as "target". Reads every item; None for one that fails. None in all if the first have no class."""
    names, labels = getattr(dataset, "classes", None), list[str | None]()
    for row in range(len(dataset)):
        try:
            label = _label_beside_image(dataset[row])
        except Exception:  # foreign code may raise anything; the image of this item is broken, too
            label = None
        if isinstance(label, int) and isinstance(names, list | tuple) and 0 <= label < len(names):
            label = names[label]
        labels.append(None if label is None else str(label))
        if row + 1 == FIRST_ITEMS and not any(labels):
            return None
    return labels if any(label is not None for label in labels) else None


def _label_beside_image(item: Any) -> str | int | None:
    values = []
    if isinstance(item, dict):
        values = [item[name] for name in (*LABEL_COLUMNS, "target") if name in item]
    elif isinstance(item, tuple | list):
        values = list(item[1:])  # pyrefly: ignore[bad-index]
    for value in values:
        value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
        if isinstance(value, str | int) and not isinstance(value, bool):
            return value
    return None
