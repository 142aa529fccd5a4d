"""The step "benchmark", as stages: near-duplicates of a benchmark's images, which would make its scores mean less.

Relative de-duplication (https://arxiv.org/abs/2304.07193, appendix A.3): against other images, and with another
threshold, than de-duplication of a pool in itself. "direct": whoever resembles a benchmark image goes. "component": so
do images that resemble one that does, and so on, which is the paper's way, takes far more, and chains.

A benchmark is small and its copies may not get through, so its images are compared with in disguise too: padded,
turned, mirrored, written on. A turned copy in the pool is far from its original, and near to the turned original.

disguises   the vectors of benchmark images, attacked in many ways
leaks       edges from what is left to benchmark images, as such and in disguise
benchmark   who resembles one
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from troodon import run
from troodon.curate import space
from troodon.curate.copies import Join, read_edges, write_edges
from troodon.curate.dedup import Edges, components
from troodon.curate.finder import Finder
from troodon.curate.pool import Pool, ranges
from troodon.curate.stage import Counts, Progress, counted
from troodon.curate.thresholds import picture
from troodon.images.decode import BadImage, decode
from troodon.images.index import Index
from troodon.images.reading import in_turn, threads_or_all
from troodon.search.exact import above
from troodon.views.attacks import disguised

DISGUISED_PX = 256  # about the shorter side: a dozen of each image lie in memory


def leaks(pool: Pool, compared: Path, settled: Path, finder: Finder) -> Path:
    """The step "benchmark": which survivors resemble an image of a benchmark; the verdict with these gone."""
    config, shown = pool.config, np.load(compared / "shown.npy")
    if "benchmark" not in config.steps or not len(shown):
        return settled
    names = ("benchmark_threshold", "benchmark_mode", "benchmark_false_merges")
    threshold = run.read_json(compared / "threshold.json")["benchmark_threshold"]
    rows, verdict = np.load(compared / "rows.npy"), pq.read_table(settled / "verdict.parquet")
    made_from = (pool.settings(*names), settled.parent.name)
    looks, disguises = list[Path](), config.disguises if finder.channels in (1, 3) else 0
    if disguises:
        units = ranges(len(shown), max(1, config.part // disguises))
        disguise = _Disguise(finder.bare(), pool.index.take(shown), compared, disguises, config.threads)
        looks = pool.spread("disguises", disguise, units, disguises, len(units), compared.parent.name)
    finds = _Leaks(compared, looks, threshold, pool.device)
    parts = pool.spread("leaks", finds, ranges(len(rows)), *made_from, disguises)

    def work(folder: Path) -> Counts:
        survives_N = verdict["survives"].to_numpy().copy()
        place, score = nearest_hits(len(rows), read_edges(parts))
        if config.benchmark_mode == "component":
            place = spread(place, score, Join(pool, compared, threshold, "exact")(np.arange(len(rows)), 0))
        leaked = (place >= 0) & survives_N[rows]
        gone = rows[leaked]
        cause_N, score_N, leak_N = (verdict[n].to_numpy().copy() for n in ("cause", "score", "exact"))
        leak_N[:] = False
        cause_N[gone], score_N[gone], leak_N[gone] = shown[place[leaked]], score[leaked], True
        survives_N[gone] = False
        told = {name: verdict[name] for name in ("exact", "hash", "near")}
        columns = {"survives": survives_N, **told, "leak": leak_N, "cause": cause_N, "score": score_N}
        pq.write_table(pa.table(columns), folder / "verdict.parquet")
        run.say(f"benchmark: {len(gone):,} of {len(rows):,} images resemble one of {len(shown):,} of the benchmarks")
        left = int(survives_N.sum())
        return counted(left + len(gone), left, leak=len(gone))

    return pool.here("benchmark", work, *made_from, disguises)


@dataclass(frozen=True)
class _Disguise:
    """The vectors of images (first, last) of benchmarks in all disguises (N V, D), and in `of.npy` which images these
    are. What cannot be read again has none."""

    finder: Finder
    index: Index
    compared: Path
    disguises: int
    threads: int
    gpu = True

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        index, fitted = self.index.take(range(*unit)), space.Space.load(self.compared / "space.npz")
        vectors, of = list[ndarray](), list[int]()
        progress = Progress(f"disguises {unit[0]:,} to {unit[1]:,}", "images", len(index))

        def load(row: int) -> Any:
            try:
                images = disguised(picture(decode(index.read(row)), DISGUISED_PX), self.disguises)
                return self.finder.prepare(self.finder.of_colour(images))
            except (BadImage, OSError):
                return None

        count = threads_or_all(self.threads)
        with ThreadPoolExecutor(count, "disguises") as threads:
            for row, prepared in enumerate(in_turn(threads, load, range(len(index)), count + 1)):
                if prepared is not None:
                    vectors.append(fitted(self.finder.vectors(prepared)).astype(np.float16))
                    of += [unit[0] + row] * self.disguises
                progress.add(1)
        np.save(folder / "vectors.npy", np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float16))
        np.save(folder / "of.npy", np.array(of, np.int64))
        return counted(len(index), len(vectors), unreadable=len(index) - len(vectors))


@dataclass(frozen=True)
class _Leaks:
    """Edges from rows (first, last) to images of benchmarks, as such and in disguise."""

    compared: Path
    disguises: list[Path]
    threshold: float
    device: Any

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        x_BD = np.load(self.compared / "vectors.npy", mmap_mode="r")[slice(*unit)]
        return write_edges(folder, ((unit[0] + i, j, score) for i, j, score in self._near(x_BD)))

    def _near(self, x_BD: ndarray) -> Iterator[Edges]:
        yield from above(
            x_BD, self.threshold, np.load(self.compared / "benchmark.npy", mmap_mode="r"), device=self.device
        )
        for part in self.disguises:
            other_MD, of_M = np.load(part / "vectors.npy", mmap_mode="r"), np.load(part / "of.npy")
            for i, j, score in above(x_BD, self.threshold, other_MD, device=self.device) if len(of_M) else ():
                yield i, of_M[j], score


def nearest_hits(count: int, hits: Iterable[Edges]) -> tuple[ndarray, ndarray]:
    """Of each of `count` images the best hit: row (N,) int64, -1 for none, and score (N,) float32, nan for none. Among
    equals the lower row, in whatever order hits come."""
    row_N, score_N = np.full(count, -1, np.int64), np.full(count, np.nan, np.float32)
    for i, j, score in hits:
        i, j, score = (np.r_[before, new] for before, new in ((np.flatnonzero(row_N >= 0), i), (row_N[row_N >= 0], j),
                                                              (score_N[row_N >= 0], score)))  # fmt: skip
        order = np.lexsort((j, -score, i))
        first = order[np.flatnonzero(np.r_[True, np.diff(i[order]) > 0][: len(order)])]
        row_N[i[first]], score_N[i[first]] = j[first], score[first]
    return row_N, score_N


def spread(row_N: ndarray, score_N: ndarray, edges: Iterable[Edges]) -> ndarray:
    """The hits of `row_N`, and for images joined to one of these by edges its hit; the best of a component's."""
    label_N = components(len(row_N), edges)
    hit = np.flatnonzero(row_N >= 0)
    order = hit[np.lexsort((hit, -score_N[hit], label_N[hit]))]
    first = order[np.flatnonzero(np.r_[True, np.diff(label_N[order]) > 0][: len(order)])]
    of_component = np.full(len(row_N), -1, np.int64)
    of_component[label_N[first]] = row_N[first]
    return np.where(row_N >= 0, row_N, of_component[label_N])
