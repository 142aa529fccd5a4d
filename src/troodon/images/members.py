"""What a container holds: the members of a tar or zip, the columns of a Parquet file, the labels of a Python dataset.

Listing reads a container once and finds, for every image in it, the offset and length by which containers.py reads it.
Training never needs this module.
"""

import json
import posixpath
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from troodon import run
from troodon.config import UsageError
from troodon.images import containers, files

MAX_CLASS_BYTES = 256  # a longer .cls member is no class

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
    classes: dict[str, str] = field(default_factory=dict)  # WebDataset: the key of a sample -> its .cls
    unsupported: int = 0  # files that are encrypted, or compressed by an unsupported method


def list_members(container: str, is_hidden: Callable[[str], bool]) -> Members:
    """List the files in a tar or zip, without hidden ones. Of two files of one name the later counts, as in unpacking.

    A damaged tar gives its intact files, and a message says so. Raises UsageError if it has none.
    """
    list_files = _list_zip if containers.kind(container) == "zip" else _list_tar
    members, count, is_intact = list_files(container, is_hidden)
    if not is_intact:
        run.say(f"{container}: is truncated or damaged; the {count} files before the damage are intact and used")
    if count > len(members.locations):
        run.say(f"{container}: {count - len(members.locations)} files have the name of a later one and are skipped")
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
                    if not member.isreg() or member.issparse() or any(map(is_hidden, name.split("/"))):
                        continue
                    members.locations[name] = (member.offset_data, member.size)
                    count += 1
                    if name.endswith(".cls") and member.size <= MAX_CLASS_BYTES:
                        content = tar.extractfile(member)
                        members.classes[name[:-4]] = content.read().decode(errors="replace").strip() if content else ""
                file.seek(tar.offset)
                is_intact = is_intact and file.read(512) == bytes(512)  # tarfile stops silently at damage
        except (tarfile.TarError, ValueError) as error:
            if not count:
                refuse_compressed(container)
                raise UsageError(f"{container}: is not a tar ({error})") from None
            is_intact = False
    return members, count, is_intact


def _list_zip(container: str, is_hidden: Callable[[str], bool]) -> tuple[Members, int, bool]:
    members, count = Members(), 0
    try:
        with files.open_file(container) as file, zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                name = _clean_name(member.filename)
                if member.is_dir() or any(map(is_hidden, name.split("/"))):
                    continue
                if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    members.unsupported += 1
                    continue
                members.locations[name] = (member.header_offset, member.compress_size)
                count += 1
                if name.endswith(".cls") and member.file_size <= MAX_CLASS_BYTES:
                    members.classes[name[:-4]] = archive.read(member).decode(errors="replace").strip()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UsageError(f"{container}: is not a complete zip ({error}): the list of its files is at its end") from None
    return members, count, True


def _clean_name(name: str) -> str:
    name = posixpath.normpath(name.replace("\\", "/") if "/" not in name else name).lstrip("/")
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def refuse_compressed(path: str) -> None:
    """Raise UsageError if the file is compressed as a whole, and name the program that decompresses it."""
    with files.open_file(path) as file:
        start = file.read(8)
    for magic, tool in COMPRESSED:
        if start.startswith(magic):
            raise UsageError(f"{path}: is compressed, but images are read in place: run {tool} {path} first")


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet table of images, or of paths and URLs, with its labels and splits."""

    rows: int
    image_column: str | None  # the column of image bytes; None if the table only names images
    columns: pa.Table  # its columns of strings and integers
    class_names: dict[str, list[str]]  # by column: the names that its integers stand for
    largest_group_bytes: int  # the largest row group, decompressed


def read_columns(container: str, image_column: str | None = None) -> ParquetTable | None:
    """Read all columns of a Parquet table but the images; None if it has no image bytes, strings or integers.

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
            image_column = image_column or next((n for n in ("image", "img", *byte_columns) if n in byte_columns), None)
            others = [
                f.name for f in schema
                if pa.types.is_string(f.type) or pa.types.is_large_string(f.type) or pa.types.is_integer(f.type)
            ]  # fmt: skip
            if image_column is None and not others:
                return None
            group_bytes = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
            columns = table.read(columns=others) if others else pa.table({})
            largest = max(group_bytes, default=0)
            return ParquetTable(table.metadata.num_rows, image_column, columns, _class_names(schema), largest)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(f"{container}: is not a Parquet table ({' '.join(str(error).split())[:200]})") from None


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
