"""What the explorer shows: images, their vectors, what is known about each, and where decisions are written."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from troodon.images.decisions import FILE
from troodon.images.index import Index

LAYOUT = "layout.npz"  # in the folder of the artifact


@dataclass(frozen=True)
class Collection:
    """N images. `images` has the columns of an index, of embeddings, and of a ledger if this is a selection."""

    folder: Path  # the artifact, which also holds the layout and the decisions
    kind: str  # "embeddings" or "selection"
    fingerprint: str
    index: Index
    images: pa.Table
    x_ND: ndarray  # float16, mapped; zeros where there is no vector
    encode: Callable[[bytes], ndarray] | None = None  # the vector (D,) of another image; None without its backbone
    backbone: str = ""  # the name of the one that made the vectors

    def __len__(self) -> int:
        return len(self.images)

    @property
    def decisions_file(self) -> Path:
        return self.folder / FILE

    @cached_property
    def has_vector_N(self) -> ndarray:
        if "status" in self.images.column_names:
            return pc.fill_null(pc.equal(self.images["status"], "ok"), False).to_numpy(zero_copy_only=False)
        return np.ones(len(self), bool)

    def column(self, name: str, otherwise: object = None) -> ndarray:
        """A column as an array; `otherwise` in each row where there is none."""
        if name not in self.images.column_names:
            return np.full(len(self), otherwise)
        return self.images[name].to_numpy(zero_copy_only=False)
