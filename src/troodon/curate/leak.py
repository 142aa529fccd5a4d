"""The step "benchmark", as stages: drop near-duplicates of benchmark images, which would distort the scores.

Relative de-duplication (https://arxiv.org/abs/2304.07193, appendix A.3): images are compared with other images than
themselves, and with another threshold. "direct" drops images that resemble a benchmark image. "component" also drops
images that resemble a dropped one, and so on; this is the paper's way, drops far more images, and chains.

A benchmark is small, and an attacked copy of it may go unnoticed. Images are therefore also compared with attacked
copies of the benchmark: padded, rotated, mirrored, with text. A rotated copy in the pool is far from its original, and
near to the rotated original.

disguises   the vectors of attacked copies of benchmark images
leaks       edges from the remaining images to benchmark images and their attacked copies
benchmark   which images resemble a benchmark image
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from troodon import run
from troodon.curate import equal, space
from troodon.curate.closer_look import CloserLook
from troodon.curate.context import CurationContext, row_ranges
from troodon.curate.copies import EdgeSearch, nearest_pairs, read_edges, write_edges
from troodon.curate.dedup import Edges, components
from troodon.curate.encoder import CopyEncoder, device_of
from troodon.curate.stage import Counts, unit_counts
from troodon.curate.thresholds import limit_size
from troodon.devices import accelerator
from troodon.images.decode import BadImage
from troodon.images.index import Index
from troodon.images.reading import map_ordered
from troodon.progress import Progress
from troodon.search.exact import iter_pairs_above
from troodon.views.attacks import attacked_copies

ATTACKED_PX = 256  # approximate shorter side; a dozen copies of each image are in memory


def remove_leaks(
    context: CurationContext, comparison: Path, duplicates: Path, encoder: CopyEncoder, look: CloserLook | None
) -> Path:
    """Run the step "benchmark": drop the remaining images that resemble a benchmark image, and write a new verdict.

    With a closer look, it decides, and vectors only add candidates; else the cosine does. What is perhaps a copy goes
    too: a few look-alikes lost do less harm than a leak.
    """
    config, benchmark_rows = context.config, np.load(comparison / "shown.npy")
    if "benchmark" not in config.steps or not (context.readable_N & context.benchmark_N).any():
        return duplicates
    names = ("benchmark_threshold", "benchmark_mode", "benchmark_false_merges")
    threshold = run.read_json(comparison / "threshold.json")["benchmark_threshold"]
    threshold = 1.0 if threshold is None else threshold  # no benchmark image has any structure
    rows, verdict = np.load(comparison / "rows.npy"), pq.read_table(duplicates / "verdict.parquet")
    attacks = config.benchmark_attacks if encoder.channels in (1, 3) and look is None else 0
    inputs = (config.recorded(*names), duplicates.parent.name, attacks)
    copies = list[Path]()
    if attacks and len(benchmark_rows) and threshold < 1:
        units = row_ranges(len(benchmark_rows), max(1, config.partition_size // attacks))
        index = context.index.take(benchmark_rows)
        encode = _EncodeAttackedCopies(encoder.without_reader(), index, comparison, attacks, config.threads)
        copies = context.run_units("disguises", encode, units, attacks, len(units), comparison.parent.name)
    find_leaks = _FindLeaks(comparison, copies, threshold, context.device)
    parts = context.run_units("leaks", find_leaks, row_ranges(len(rows) if threshold < 1 else 0), *inputs)

    def work(folder: Path) -> Counts:
        survives_N = verdict["survives"].to_numpy().copy()
        edges = read_edges(parts) if look is None else verified_leaks(look, read_edges(parts), config.candidates)
        match_M, score_M = best_matches(len(rows), edges)
        if config.benchmark_mode == "component":
            search = EdgeSearch(context, comparison, threshold, "exact")
            edges = search(np.arange(len(rows)), 0) if look is None else _group_edges(duplicates, rows)
            match_M = propagate_matches(match_M, score_M, edges)
        cause_N, score_N = (verdict[name].to_numpy().copy() for name in ("cause", "score"))
        leak_N, searched = np.zeros(len(survives_N), bool), np.flatnonzero(survives_N)
        leaked_M = (match_M >= 0) & survives_N[rows]
        dropped = rows[leaked_M]
        cause_N[dropped], score_N[dropped] = benchmark_rows[match_M[leaked_M]], score_M[leaked_M]
        why_N = np.array(verdict["why"].to_pylist(), object)
        if look is not None:
            why_N[dropped] = [_doubt(look, at, int(match_M[at])) for at in np.flatnonzero(leaked_M).tolist()]
        equal_N = _equal_rows(context, comparison, np.setdiff1d(searched, dropped))
        dropped, equal_rows = np.union1d(dropped, np.flatnonzero(equal_N >= 0)), equal_N >= 0
        cause_N[equal_rows], score_N[equal_rows] = equal_N[equal_rows], 1.0
        leak_N[dropped], survives_N[dropped] = True, False
        earlier = {name: verdict[name] for name in ("exact", "hash", "colour", "near")}
        columns = {"survives": survives_N, **earlier, "why": pa.array(why_N), "leak": leak_N, "cause": cause_N}
        columns["score"] = score_N
        pq.write_table(pa.table(columns), folder / "verdict.parquet")
        shown = int((context.readable_N & context.benchmark_N).sum())
        leaks = f"{len(dropped):,} of {len(searched):,} images resemble one of {shown:,} benchmark images"
        doubtful = int((why_N[dropped] != "").sum())
        run.say(f"benchmark: {leaks}{f', {doubtful:,} of these perhaps' if doubtful else ''}")
        remaining = int(survives_N.sum())
        return unit_counts(remaining + len(dropped), remaining, leak=len(dropped))

    return context.run_single("benchmark", work, *inputs)


def verified_leaks(look: CloserLook, edges: Iterable[Edges], limit: int) -> Iterator[Edges]:
    """Edges between rows and benchmark images that a closer look verifies, scored by the agreement of their pixels; the
    doubtful ones of a row only where it has no others."""
    first = len(look.rows)
    look.look(nearest_pairs(((i, first + j, score) for i, j, score in edges), limit, first))
    pairs = []
    for i, others in sorted(look.leaks.of.items()):
        is_sure = any(not match.doubt for match in others.values())
        if i < first:
            pairs += [(i, j - first, m.agreement) for j, m in sorted(others.items()) if not (is_sure and m.doubt)]
    columns = np.array(pairs).reshape(-1, 3)
    yield columns[:, 0].astype(np.int64), columns[:, 1].astype(np.int64), columns[:, 2].astype(np.float32)


def _doubt(look: CloserLook, row: int, benchmark_image: int) -> str:
    """Why a leak may be none; "" where it is sure, or joined to an image that leaks."""
    match = look.leaks.of.get(row, {}).get(len(look.rows) + benchmark_image)
    return "" if match is None else match.doubt


def _group_edges(duplicates: Path, rows: ndarray) -> list[Edges]:
    """Edges between the members of a group of copies and the one that is kept."""
    groups = pq.read_table(duplicates / "groups.parquet")
    kept, member = (np.searchsorted(rows, groups[name].to_numpy()) for name in ("group", "row"))
    return [(kept, member, groups["score"].to_numpy())]


def _equal_rows(context: CurationContext, comparison: Path, rows: ndarray) -> ndarray:
    """For every image the benchmark image that it equals, if it is one of these rows and equals any; else -1. (N,)"""
    colours = {int(row): np.array(c, np.float32) for row, c in run.read_json(comparison / "colours.json").items()}
    equal_N = np.full(len(context.index), -1, np.int64)
    shown = np.flatnonzero(context.readable_N & context.benchmark_N)
    equal_N[rows] = equal.equal_benchmark_rows(context, rows, shown, colours)
    return equal_N


@dataclass(frozen=True)
class _EncodeAttackedCopies:
    """Encodes attacked copies of benchmark images (first, last): vectors (N V, D), and in `of.npy` the image of each.
    An image that cannot be read again has no copies."""

    encoder: CopyEncoder
    index: Index
    comparison: Path
    attacks: int
    threads: int

    @property
    def device(self) -> Any:
        return self.encoder.backbone.device if hasattr(self.encoder.backbone, "to") else None

    def placed(self, processors: int) -> "_EncodeAttackedCopies":
        """The same with its network on the device of this process, read for by its processors."""
        device_of(self.encoder.backbone)
        return replace(self, threads=self.threads or processors)

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        index, fitted = self.index.take(range(*unit)), space.Space.load(self.comparison / "space.npz")
        vectors, image_of = list[ndarray](), list[int]()
        task = f"attacked copies of {unit[0]:,} to {unit[1]:,}"

        def load(row: int) -> Any:
            try:
                images = attacked_copies(limit_size(index.decode(row), ATTACKED_PX), self.attacks)
                return self.encoder.prepare(self.encoder.match_channels(images))
            except (BadImage, OSError):
                return None

        count = self.index.thread_count(self.threads)
        with Progress(task, "images", len(index)) as progress, ThreadPoolExecutor(count, "attacks") as threads:
            for row, prepared in enumerate(map_ordered(threads, load, range(len(index)), count + 1)):
                if prepared is not None:
                    vectors.append(fitted(self.encoder.encode(prepared)).astype(np.float16))
                    image_of += [unit[0] + row] * self.attacks
                progress.add(1)
        np.save(folder / "vectors.npy", np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float16))
        np.save(folder / "of.npy", np.array(image_of, np.int64))
        return unit_counts(len(index), len(vectors), unreadable=len(index) - len(vectors))


@dataclass(frozen=True)
class _FindLeaks:
    """Finds edges from rows (first, last) to benchmark images and their attacked copies."""

    comparison: Path
    copies: list[Path]
    threshold: float
    device: Any

    def __call__(self, unit: tuple[int, int], folder: Path) -> Counts:
        x_BD = np.load(self.comparison / "vectors.npy", mmap_mode="r")[slice(*unit)]
        return write_edges(folder, ((unit[0] + i, j, score) for i, j, score in self._edges(x_BD)))

    def _edges(self, x_BD: ndarray) -> Iterator[Edges]:
        benchmark_MD = np.load(self.comparison / "benchmark.npy", mmap_mode="r")
        yield from iter_pairs_above(x_BD, self.threshold, benchmark_MD, device=accelerator(self.device))
        for part in self.copies:
            copy_MD, image_M = np.load(part / "vectors.npy", mmap_mode="r"), np.load(part / "of.npy")
            if len(image_M):
                for i, j, score in iter_pairs_above(x_BD, self.threshold, copy_MD, device=accelerator(self.device)):
                    yield i, image_M[j], score


def best_matches(count: int, edges: Iterable[Edges]) -> tuple[ndarray, ndarray]:
    """Find the best match of each of `count` images: row (N,) int64, -1 for none, and score (N,) float32, nan for none.
    Ties go to the lower row, whatever the order of the edges."""
    row_N, score_N = np.full(count, -1, np.int64), np.full(count, np.nan, np.float32)
    for i, j, score in edges:
        i, j, score = (np.r_[before, new] for before, new in ((np.flatnonzero(row_N >= 0), i), (row_N[row_N >= 0], j),
                                                              (score_N[row_N >= 0], score)))  # fmt: skip
        order = np.lexsort((j, -score, i))
        first = order[np.flatnonzero(np.r_[True, np.diff(i[order]) > 0][: len(order)])]
        row_N[i[first]], score_N[i[first]] = j[first], score[first]
    return row_N, score_N


def propagate_matches(row_N: ndarray, score_N: ndarray, edges: Iterable[Edges]) -> ndarray:
    """Give every image without a match the best match within its component, as defined by the edges: row (N,) int64."""
    label_N = components(len(row_N), edges)
    matched = np.flatnonzero(row_N >= 0)
    order = matched[np.lexsort((matched, -score_N[matched], label_N[matched]))]
    first = order[np.flatnonzero(np.r_[True, np.diff(label_N[order]) > 0][: len(order)])]
    match_of_component = np.full(len(row_N), -1, np.int64)
    match_of_component[label_N[first]] = row_N[first]
    return np.where(row_N >= 0, row_N, match_of_component[label_N])
