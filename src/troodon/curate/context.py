"""The context that all steps share: the images with their pools and metadata, and where stages are computed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from troodon.config import UsageError, fingerprint
from troodon.curate.backends import SingleProcess
from troodon.curate.config import CurateConfig
from troodon.curate.space import Space
from troodon.curate.stage import Backend, Counts, Stage, code_fingerprint, run_stage, unit_counts
from troodon.images.index import Index
from troodon.search.inverted_lists import assign_probes

BLOCK = 65_536  # rows per unit


@dataclass(frozen=True)
class CurationContext:
    """N images, in this order: curated, uncurated, benchmarks."""

    config: CurateConfig
    index: Index
    images: pa.Table  # the index with the metadata of each image, see embed.py
    curated: int  # number of images
    uncurated: int
    datasets: tuple[tuple[str, int], ...]  # the curated sets in order: name and number of images
    root: Path  # folder of the stages until the selection is published
    name: str  # fingerprint of the embeddings
    backend: Backend
    device: Any  # of matrix products, as `accelerator` takes it: each process has its own

    @property
    def curated_N(self) -> ndarray:
        return np.arange(len(self.index)) < self.curated

    @property
    def benchmark_N(self) -> ndarray:
        return np.arange(len(self.index)) >= self.curated + self.uncurated

    @property
    def readable_N(self) -> ndarray:
        return pc.equal(self.images["status"], "ok").to_numpy()

    def preferences(self, rows: ndarray) -> list[int]:
        """How much each row is preferred among copies: by the place of its folder in `prefer`, curated images more."""
        prefer, curated_N = self.config.prefer, self.curated_N
        folders = [Path(folder).resolve() for folder in prefer]
        ranks = []
        for row in rows.tolist():
            rank = (len(folders) + 1) * int(curated_N[row])
            if folders:
                path, file = Path(self.index.path(row)), Path(self.index.file(row)).resolve()
                places = zip(range(len(folders), 0, -1), folders, prefer)
                found = (p for p, folder, name in places if path.is_relative_to(name) or file.is_relative_to(folder))
                rank += next(found, 0)
            ranks.append(rank)
        return ranks

    def run_single(self, name: str, work: Any, *inputs: Any) -> Path:
        """Run a stage of one unit in this process. `work(folder)` fills a folder and returns its counts."""
        return run_stage(self._stage(name, lambda _, folder: work(folder), [0], inputs), self.root, SingleProcess())[0]

    def run_units(self, name: str, work: Any, units: list, *inputs: Any) -> list[Path]:
        """Run a stage on the backend. `work(unit, folder)` fills a folder and returns its counts."""
        return run_stage(self._stage(name, work, units, inputs), self.root, self.backend)

    def _stage(self, name: str, work: Any, units: list, inputs: tuple) -> Stage:
        return Stage(name, work, units, fingerprint(self.name, code_fingerprint(), *inputs))


def write_mapped(x_ND: Any, space: Space, rows: ndarray, path: Path) -> None:
    """Map these rows to `space` and write the vectors, one block at a time."""
    first = space(x_ND[:1])
    out = np.lib.format.open_memmap(path, "w+", first.dtype, (len(rows), first.shape[1]))
    for start in range(0, len(rows), BLOCK):
        out[start : start + BLOCK] = space(x_ND[rows[start : start + BLOCK]])
    out.flush()


@dataclass(frozen=True)
class AssignProbes:
    """Finds the centroids nearest to rows (first, last) of a matrix, best first (N, p), with `assign_probes`."""

    vectors: Path
    centroids: Path
    p: int | None = None

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        rows = np.load(self.vectors, mmap_mode="r")[slice(*unit)]
        np.save(folder / "lists.npy", assign_probes(rows, np.load(self.centroids), self.p))
        return unit_counts(len(rows))


def require_readable_curated(context: CurationContext) -> None:
    """Raise UsageError if gathering starts from curated images and none of them can be read."""
    starts_from_curated = context.config.gather in ("sample", "cluster", "auto")
    if starts_from_curated and not context.readable_N[: context.curated].any():
        first = context.images.slice(0, 1).to_pylist()[0]
        reason = f"the first, {first['path']}, is {first['status']} ({first['reason']})"
        raise UsageError(f"none of the {context.curated:,} curated images can be read; {reason}")


def row_ranges(count: int, size: int = BLOCK) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]
