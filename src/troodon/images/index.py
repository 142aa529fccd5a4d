"""The index: a table with one row per image, which says where its bytes are. No image is copied.

    path       the name of the image inside its source, with / between folders
    container  the file that holds it: the image file itself, or a tar, zip, Parquet or NIfTI file; a local path or URL
    offset     where its bytes start in the container; in Parquet its row, in NIfTI the number of the slice
    length     number of stored bytes; -1 if that is not known before it is read
    label      the class, if the source gives one; else null
    split      "train", "val" or "test", if the source gives one; else null

`troodon scan` adds columns (see scan.py). A row number is the image's id. Rows are sorted by (source order, path), so
the same source gives the same ids everywhere.

An index of more than MIN_MAPPED_IMAGES images is saved twice: as `images.parquet`, for all purposes, and as
`images.arrow`: its usable rows, uncompressed, to be memory-mapped. A mapped index opens at once, needs no memory of its
own, and is shared by all processes of a machine.
"""

import hashlib
import itertools
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from troodon.config import Range, UsageError, check_range
from troodon.images import containers, files
from troodon.images.decode import decode
from troodon.stream import default_threads

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
MODIFIED = pa.field("modified", pa.int64())  # a further column: when the file was last changed, see scan.py
UNKNOWN = -1  # a time of change that is not known
MIN_MAPPED_IMAGES = 1_000_000  # a longer index is also saved for memory mapping
MAPPED_BATCH_ROWS = 1 << 16  # rows of a record batch of the mapped file
RANGE = b"range"  # name of the range in the metadata of a saved table
READS_PER_RELEASE = 256  # reads after which a process releases the pages of its mapping; the kernel may keep them


@dataclass(frozen=True)
class Index:
    """A table of images that can be read by row number."""

    table: pa.Table
    base: str = ""  # the folder or URL that relative containers start from
    datasets: Mapping[str, Any] = field(default_factory=dict, repr=False)  # Python datasets, by container name
    source_lengths: tuple[int, ...] = ()  # rows of each source; all from one if empty
    mapped_path: Path | None = None  # the mapped file, if the table is all of it
    fingerprint: str | None = None  # that of the artifact which a mapped table belongs to
    range: Range | None = None  # values of more than 8 bits that become 0 and 255; None: by their type (pixels.py)
    mapping: mmap.mmap | None = field(default=None, compare=False, repr=False)
    read_counter: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    def __len__(self) -> int:
        return self.table.num_rows

    def path(self, row: int) -> str:
        return self.table["path"][row].as_py()

    @property
    def is_remote(self) -> bool:
        """Whether the images are remote; tests the first and last row only, since there may be very many."""
        ends = [self.table["container"][row].as_py() for row in (0, -1)] if len(self) else []
        return any(files.REMOTE.match(self.located(container)) is not None for container in ends)

    @property
    def packing_helps(self) -> bool:
        """Whether `pack` would make single images faster to read: they are remote, or in the row groups of Parquet or
        in volumes."""
        return self.is_remote or containers.COLUMN_SEPARATOR in str(self.table["container"][0])

    def thread_count(self, threads: int) -> int:
        """The number of threads that read images: `threads`, or for 0 one per processor, at most 16.

        For remote images, 0 gives MAX_REMOTE_READS, since such threads mostly wait.
        """
        if threads < 0:
            raise UsageError(f"threads {threads}: must be 0, which is one per processor, or more")
        return threads or (files.MAX_REMOTE_READS if self.is_remote else default_threads())

    def file(self, row: int) -> str:
        """The path or URL of the file that holds an image."""
        return containers.file_of(self.located(self.location(row)[0]))

    def column(self, name: str) -> list:
        return self.table[name].to_pylist()

    def read(self, row: int) -> bytes:
        """Read one image, as bytes. Raises OSError if the container is missing or truncated, or the image too large."""
        container, offset, length = self.location(row)
        if container in self.datasets:
            return containers.read_item(self.datasets[container], offset)
        return containers.read(self.located(container), offset, length)

    def decode(
        self, row: int, channels: int | None = 3, reduction: Callable[[int, int], int] | None = None
    ) -> np.ndarray:
        """The pixels of one image, uint8 (H, W, channels), by the range of this index. Raises BadImage or OSError."""
        return decode(self.read(row), channels, reduction, self.range)

    def location(self, row: int) -> tuple[str, int, int]:
        """Container, offset and length, as listed."""
        if self.mapping is not None and next(self.read_counter) % READS_PER_RELEASE == 0:
            self.mapping.madvise(mmap.MADV_DONTNEED)
        container, offset, length = (self.table[name][row].as_py() for name in ("container", "offset", "length"))
        return container, offset, length

    def located_table(self) -> pa.Table:
        """The columns of SCHEMA, with the full path of every container."""
        table = self.table.select(SCHEMA.names)
        if not self.base:
            return table
        located = pa.array([self.located(c) for c in self.column("container")], pa.string())
        return table.set_column(table.schema.get_field_index("container"), "container", located)

    def modification_times(self) -> np.ndarray:
        """When the file of each image was last changed (N,), int64: see files.modified; UNKNOWN if not known."""
        encoded = self.table["container"].combine_chunks().dictionary_encode()
        encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
        times = np.array(containers.modified([self.located(c) for c in encoded.dictionary.to_pylist()]), np.int64)
        return times[encoded.indices.to_numpy()] if len(times) else times

    def with_times(self) -> "Index":
        """The same images in a table with full paths and the column `modified`: their times of change."""
        table = self.located_table().append_column(MODIFIED, pa.array(self.modification_times()))
        return replace(self, table=table, base="", mapped_path=None, fingerprint=None, mapping=None)

    def first_changed(self, path: Path) -> str | None:
        """The first file that has changed since a table of the same images with their times was saved; None for none.

        A table of an earlier release does not have the times.
        """
        try:
            recorded = pq.read_table(path, columns=[MODIFIED.name])[MODIFIED.name].to_numpy()
        except (pa.ArrowInvalid, OSError, KeyError):
            return None
        now = self.modification_times()
        changed = np.flatnonzero(recorded != now) if len(recorded) == len(now) else np.arange(len(now))
        changed = changed[now[changed] != UNKNOWN]  # a server that does not answer says nothing
        return self.file(int(changed[0])) if len(changed) else None

    def take(self, rows: Sequence[int] | np.ndarray) -> "Index":
        """An index of these rows, in this order."""
        table = self.table.take(pa.array(np.asarray(rows, dtype=np.int64)))
        return replace(self, table=table, source_lengths=(), mapped_path=None, fingerprint=None, mapping=None)

    def without_labels(self) -> "Index":
        """The same images without labels: the folder names of an uncurated pool are no classes."""
        place = self.table.schema.get_field_index("label")
        table = self.table.set_column(place, "label", pa.nulls(len(self), pa.string()))
        return replace(self, table=table, mapped_path=None, fingerprint=None, mapping=None)

    def with_range(self, range: Range | None) -> "Index":
        """The same images with this range of values, which is saved with them; None changes nothing."""
        if check_range(range) is None or range == self.range:
            return self
        numbers = tuple(float(n) for n in range or ())
        metadata = (self.table.schema.metadata or {}) | {RANGE: json.dumps(numbers).encode()}
        return replace(self, table=self.table.replace_schema_metadata(metadata), range=numbers)

    def content_hash(self) -> str:
        """A hash of the table: names, locations, lengths, labels and splits; and of the range. No image is read."""
        if self.fingerprint is not None and self.range is None:
            return self.fingerprint
        digest = hashlib.sha256(f"{self.fingerprint} {self.range}".encode() if self.range else b"")
        if self.fingerprint is not None:
            return digest.hexdigest()
        for name in SCHEMA.names:
            digest.update("\0".join(map(str, self.column(name))).encode() + b"\n")
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the index as Parquet, and a long one also as an Arrow file beside it, for mapping."""
        pq.write_table(self.table, path, compression="zstd")
        if len(self) > MIN_MAPPED_IMAGES:
            table = replace(self, table=usable_rows(self.table)).table.select(SCHEMA.names)
            with (
                pa.OSFile(str(path.with_suffix(".arrow")), "wb") as file,
                pa.ipc.new_file(file, table.schema) as writer,
            ):
                writer.write_table(table, max_chunksize=MAPPED_BATCH_ROWS)

    @staticmethod
    def load(path: Path) -> "Index":
        """Load all rows and columns of a saved index."""
        return Index(pq.read_table(path))

    @staticmethod
    def open_mapped(path: Path, base: str = "", fingerprint: str | None = None, range: Range | None = None) -> "Index":
        """Map the usable rows of a saved index from its Arrow file."""
        with open(path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        mapping.madvise(mmap.MADV_RANDOM)  # rows are read in random order: reading ahead would be wasted
        table = pa.ipc.open_file(pa.py_buffer(mapping)).read_all()
        range = range or saved_range(table.schema)
        return Index(table, base=base, mapped_path=path, fingerprint=fingerprint, mapping=mapping, range=range)

    @staticmethod
    def concat(parts: Sequence["Index"]) -> "Index":
        """Concatenate indexes. A single one is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        datasets: dict[str, Any] = {}
        for part in parts:
            for key, value in part.datasets.items():
                if datasets.setdefault(key, value) is not value:
                    raise UsageError(f"{key}: two datasets have this name; `troodon.pack` one of them first")
        if len(ranges := list(dict.fromkeys(part.range for part in parts if part.range))) > 1:
            raise UsageError(f"the sets have different ranges ({ranges[0]}, {ranges[1]}); set one --range for all")
        table = pa.concat_tables([p.located_table() for p in parts]).combine_chunks()
        index = Index(table, datasets=datasets, source_lengths=tuple(map(len, parts)))
        return index.with_range(ranges[0] if ranges else None)

    def located(self, container: str) -> str:
        """The full path or URL of a container."""
        return container if not self.base or files.REMOTE.match(container) else join_path(self.base, container)

    def __reduce__(self) -> tuple:
        if self.mapped_path is not None:  # each process maps the file itself, and all share its pages
            return Index.open_mapped, (self.mapped_path, self.base, self.fingerprint, self.range)
        return Index, (self.table, self.base, self.datasets, self.source_lengths, None, None, self.range)


def saved_range(schema: pa.Schema) -> Range | None:
    """The range that a saved table of this schema has."""
    text = (schema.metadata or {}).get(RANGE)
    return tuple(json.loads(text)) if text else None


def usable_rows(table: pa.Table) -> pa.Table:
    """The rows of an artifact's table that can be read; for a selection, the rows that it kept."""
    if "kept" in table.column_names:
        return table.filter(table["kept"])
    if "status" in table.column_names:
        return table.filter(pc.or_kleene(pc.is_null(table["status"]), pc.equal(table["status"], "ok")))
    return table


def join_path(base: str, path: str) -> str:
    """The path or URL below `base`; an absolute path is returned as it is."""
    return f"{base.rstrip('/')}/{path}" if files.REMOTE.match(base) else os.path.join(base, path)
