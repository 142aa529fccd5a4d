"""The index: one row per image, which says where its bytes lie. Images stay where they are.

    path       what people call it: the name inside its source, with / between folders
    container  the file that holds it: itself, or a tar
    offset     where its bytes start in the container
    length     how many bytes
    label      the class, where the source says one; else null
    split      "train", "val" or "test", where the source says one; else null

`troodon scan` adds: status, reason, format, mode, width, height, sha256 (see scan.py). A row number is the
image's id. Rows are sorted by (source order, path), so the same source gives the same ids everywhere.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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


LARGEST = 1 << 32  # bytes of an image: what is larger was named like one (arrays may be anything), and stays unread


@dataclass(frozen=True)
class Index:
    """A table of images that can be read by row number."""

    table: pa.Table
    _files: dict[str, int] = field(default_factory=dict, compare=False, repr=False)  # open containers
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def __len__(self) -> int:
        return self.table.num_rows

    def path(self, row: int) -> str:
        return self.table["path"][row].as_py()

    def column(self, name: str) -> list:
        return self.table[name].to_pylist()

    def read(self, row: int) -> bytes:
        """The bytes of one image. Raises OSError when its container is gone or was cut short, or it is too large."""
        container = self.table["container"][row].as_py()
        offset, length = self.table["offset"][row].as_py(), self.table["length"][row].as_py()
        if length > LARGEST:
            raise OSError(f"{length:,} bytes are more than the limit of {LARGEST:,}")
        if not container.endswith(".tar"):
            return Path(container).read_bytes()
        data = os.pread(self._open(container), length, offset)
        if len(data) != length:
            raise OSError(f"{container}: ends before the {length} bytes of {self.path(row)}")
        return data

    def take(self, rows: Sequence[int] | np.ndarray) -> "Index":
        """The index of these rows, in this order."""
        return Index(self.table.take(pa.array(np.asarray(rows, dtype=np.int64))))

    def unlabelled(self) -> "Index":
        """The same images, their labels forgotten: folder names of a pool are no classes."""
        place = self.table.schema.get_field_index("label")
        return Index(self.table.set_column(place, "label", pa.nulls(len(self), pa.string())))

    def save(self, path: Path) -> None:
        pq.write_table(self.table, path, compression="zstd")

    @staticmethod
    def load(path: Path) -> "Index":
        return Index(pq.read_table(path))

    @staticmethod
    def concat(parts: Sequence["Index"]) -> "Index":
        return Index(pa.concat_tables([p.table.select(SCHEMA.names) for p in parts]).combine_chunks())

    def __reduce__(self) -> tuple:
        return Index, (self.table,)  # open files and locks do not travel to other processes

    def _open(self, container: str) -> int:
        with self._lock:
            if container not in self._files:
                self._files[container] = os.open(container, os.O_RDONLY)
            return self._files[container]
