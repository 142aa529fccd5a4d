"""What all steps know of the images that are curated: which pool each is in, what reading it told, where work lies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from troodon.config import UsageError, fingerprint
from troodon.curate.config import CurateConfig
from troodon.curate.engines import Here
from troodon.curate.space import Space
from troodon.curate.stage import Counts, Engine, Stage, code, counted, do
from troodon.images.index import Index
from troodon.search.lists import probed

BLOCK = 65_536  # rows of one unit, where a unit is some rows


@dataclass(frozen=True)
class Pool:
    """N images: curated ones first, then the uncurated, then those of benchmarks."""

    config: CurateConfig
    index: Index
    images: pa.Table  # the index with what reading has told, see embed.py
    curated: int
    uncurated: int
    datasets: tuple[tuple[str, int], ...]  # the curated sets: name and how many images, in order
    home: Path  # where stages lie until the selection is there
    name: str  # fingerprint of the embeddings
    engine: Engine
    device: Any  # where matrix products are done; None: in numpy

    @property
    def curated_N(self) -> ndarray:
        return np.arange(len(self.index)) < self.curated

    @property
    def benchmark_N(self) -> ndarray:
        return np.arange(len(self.index)) >= self.curated + self.uncurated

    @property
    def readable_N(self) -> ndarray:
        return pc.equal(self.images["status"], "ok").to_numpy()

    def here(self, name: str, work: Any, *made_from: Any) -> Path:
        """A stage of one unit that this process does: `work(folder)` fills a folder, and returns its counts."""
        stage = Stage(name, lambda _, folder: work(folder), [0], fingerprint(self.name, code(), *made_from))
        return do(stage, self.home, Here())[0]

    def spread(self, name: str, work: Any, units: list, *made_from: Any) -> list[Path]:
        """A stage whose units the engine does: `work(unit, folder)`."""
        return do(Stage(name, work, units, fingerprint(self.name, code(), *made_from)), self.home, self.engine)

    def settings(self, *names: str) -> dict:
        return {name: getattr(self.config, name) for name in names}


def mapped(x_ND: Any, space: Space, rows: ndarray, path: Path) -> None:
    """Write the vectors of these rows as compared in `space`, one block at a time."""
    first = space(x_ND[:1])
    out = np.lib.format.open_memmap(path, "w+", first.dtype, (len(rows), first.shape[1]))
    for start in range(0, len(rows), BLOCK):
        out[start : start + BLOCK] = space(x_ND[rows[start : start + BLOCK]])
    out.flush()


@dataclass(frozen=True)
class Assign:
    """The centroids that rows (first, last) of a matrix are nearest to, best first (N, p), as `probed` gives them."""

    vectors: Path
    centroids: Path
    p: int | None = None

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        rows = np.load(self.vectors, mmap_mode="r")[slice(*unit)]
        np.save(folder / "lists.npy", probed(rows, np.load(self.centroids), self.p))
        return counted(len(rows))


def need(images: int, readable_N: ndarray, table: pa.Table, what: str) -> None:
    """UsageError unless one of the first `images` can be read."""
    if not readable_N[:images].any():
        first = table.slice(0, 1).to_pylist()[0]
        why = f"the first, {first['path']}, is {first['status']} ({first['reason']})"
        raise UsageError(f"none of the {images:,} {what} images can be read; {why}")


def ranges(count: int, size: int = BLOCK) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]
