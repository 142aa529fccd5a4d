"""The index: one row per image, which says where its bytes lie. Images stay where they are.

    path       what people call it: the name inside its source, with / between folders
    container  the file that holds it: itself, or a tar, zip or Parquet file; on this machine or a URL
    offset     where its bytes start in the container; in Parquet, its row
    length     how many bytes, as they lie there; -1 where that is not known before it is read
    label      the class, where the source says one; else null
    split      "train", "val" or "test", where the source says one; else null

`troodon scan` adds what it found (see scan.py). A row number is the image's id. Rows are sorted by (source order,
path), so the same source gives the same ids everywhere.

An index of more than MAPPED images is kept twice: as `images.parquet` for everybody and everything, and as
`images.arrow`, its usable rows uncompressed, which is mapped from the disk: it opens at once, costs no memory of its
own, and all processes of a machine share it.
"""

import hashlib
import itertools
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from troodon.config import UsageError
from troodon.images import containers, files

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("container", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("label", pa.string()),
        ("split", pa.string()),
    ]
)
MAPPED = 1_000_000  # images from which an index is also written to be mapped
BATCH = 1 << 16  # rows that lie together there
FORGOTTEN = 256  # rows asked for, after which a process lets its pages of the mapping go; the kernel may keep them


@dataclass(frozen=True)
class Index:
    """A table of images that can be read by row number."""

    table: pa.Table
    home: str = ""  # what containers are relative to, where they are
    objects: Mapping[str, Any] = field(default_factory=dict, repr=False)  # data sets, by the container they stand for
    parts: tuple[int, ...] = ()  # how many rows come from each source; all from one if left out
    mapped: Path | None = None  # the file that the table is, whole, mapped from the disk
    name: str | None = None  # the fingerprint of the artifact that a mapped table belongs to
    pages: mmap.mmap | None = field(default=None, compare=False, repr=False)  # the mapping
    asked: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    def __len__(self) -> int:
        return self.table.num_rows

    def path(self, row: int) -> str:
        return self.table["path"][row].as_py()

    @property
    def distant(self) -> bool:
        """Whether its images are read from elsewhere; its ends are asked, for there may be very many."""
        ends = [self.table["container"][row].as_py() for row in (0, -1)] if len(self) else []
        return any(files.REMOTE.match(self._located(container)) is not None for container in ends)

    def column(self, name: str) -> list:
        return self.table[name].to_pylist()

    def read(self, row: int) -> bytes:
        """The bytes of one image. Raises OSError when its container is gone or was cut short, or it is too large."""
        container, offset, length = self.where(row)
        if container in self.objects:
            return containers.read_item(self.objects[container], offset)
        return containers.read(self._located(container), offset, length)

    def where(self, row: int) -> tuple[str, int, int]:
        """Container, offset and length, as they are listed."""
        if self.pages is not None and next(self.asked) % FORGOTTEN == 0:
            self.pages.madvise(mmap.MADV_DONTNEED)
        container, offset, length = (self.table[name][row].as_py() for name in ("container", "offset", "length"))
        return container, offset, length

    def rows(self) -> pa.Table:
        """The columns of SCHEMA, every container by its whole path."""
        table = self.table.select(SCHEMA.names)
        if not self.home:
            return table
        located = pa.array([self._located(c) for c in self.column("container")], pa.string())
        return table.set_column(table.schema.get_field_index("container"), "container", located)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Index":
        """The index of these rows, in this order."""
        table = self.table.take(pa.array(np.asarray(rows, dtype=np.int64)))
        return replace(self, table=table, parts=(), mapped=None, name=None, pages=None)

    def unlabelled(self) -> "Index":
        """The same images, their labels forgotten: folder names of a pool are no classes."""
        place = self.table.schema.get_field_index("label")
        table = self.table.set_column(place, "label", pa.nulls(len(self), pa.string()))
        return replace(self, table=table, mapped=None, name=None, pages=None)

    def contents(self) -> str:
        """A hash of what it lists: names, places, lengths, labels and splits. The pictures are not read."""
        if self.name is not None:
            return self.name
        digest = hashlib.sha256()
        for name in SCHEMA.names:
            digest.update("\0".join(map(str, self.column(name))).encode() + b"\n")
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write it as Parquet; a long one also beside it, to be mapped."""
        pq.write_table(self.table, path, compression="zstd")
        if len(self) > MAPPED:
            table = replace(self, table=usable(self.table)).table.select(SCHEMA.names)
            with pa.OSFile(str(path.with_suffix(".arrow")), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
                writer.write_table(table, max_chunksize=BATCH)

    @staticmethod
    def load(path: Path) -> "Index":
        """All rows and columns of a table that was saved."""
        return Index(pq.read_table(path))

    @staticmethod
    def map(path: Path, home: str = "", name: str | None = None) -> "Index":
        """The usable rows of a saved index, from its file that is to be mapped."""
        with open(path, "rb") as file:
            pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        pages.madvise(mmap.MADV_RANDOM)  # rows are asked for all over it: what lies beside one is not wanted next
        table = pa.ipc.open_file(pa.py_buffer(pages)).read_all()
        return Index(table, home=home, mapped=path, name=name, pages=pages)

    @staticmethod
    def concat(parts: Sequence["Index"]) -> "Index":
        """The rows of all, one after the other; one alone stays as it is."""
        if len(parts) == 1:
            return parts[0]
        objects: dict[str, Any] = {}
        for part in parts:
            for key, value in part.objects.items():
                if objects.setdefault(key, value) is not value:
                    raise UsageError(f"{key}: two data sets are called so; `troodon.pack` one of them first")
        table = pa.concat_tables([p.rows() for p in parts]).combine_chunks()
        return Index(table, objects=objects, parts=tuple(map(len, parts)))

    def _located(self, container: str) -> str:
        return container if not self.home or files.REMOTE.match(container) else join(self.home, container)

    def __reduce__(self) -> tuple:
        if self.mapped is not None:  # each process maps the file for itself, and all share its pages
            return Index.map, (self.mapped, self.home, self.name)
        return Index, (self.table, self.home, self.objects, self.parts)


def usable(table: pa.Table) -> pa.Table:
    """The rows of an artifact's table that can be read, or of a selection those that it kept."""
    if "kept" in table.column_names:
        return table.filter(table["kept"])
    if "status" in table.column_names:
        return table.filter(pc.or_kleene(pc.is_null(table["status"]), pc.equal(table["status"], "ok")))
    return table


def join(home: str, path: str) -> str:
    """A path or URL below `home`; an absolute path stays."""
    return f"{home.rstrip('/')}/{path}" if files.REMOTE.match(home) else os.path.join(home, path)
