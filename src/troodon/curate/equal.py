"""Equal images, found without vectors: of one colour alike, or with the same pixels.

All images of one colour have about the same vector, whatever their colour, and so they say nothing of copies and
look-alikes. They are compared by their colour, and with each other only. The pixels of other images are compared where
size and perceptual hash are equal; this also finds copies where there are too few images to compare vectors.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray
from PIL import Image

from troodon.curate.context import CurationContext
from troodon.images.decode import BadImage
from troodon.images.reading import read_batches

# Shape suffixes: N rows, M other rows, G rows and columns of a thumbnail, C channels.

GRID = 32  # rows and columns of the thumbnail
LEVELS = 4  # of 255: maximum deviation within one colour, and between two that count as the same


def without_structure(context: CurationContext) -> ndarray:
    """The readable images that have no perceptual hash: of one colour, or nearly. (N,) bool."""
    return context.readable_N & context.images["hash"].is_null().to_numpy()


def single_colours(context: CurationContext, rows: ndarray) -> dict[int, ndarray]:
    """The colour (C,) float32 of those of these rows that show one colour only, by row."""
    colours, config = dict[int, ndarray](), context.config

    def prepare(images: Sequence[ndarray]) -> Any:
        return [single_colour(image) for image in images]

    batches = read_batches(context.index.take(rows), config.batch, prepare, channels=None, threads=config.threads)
    for positions, found in batches:
        colours.update((int(rows[p]), colour) for p, colour in zip(positions, found) if colour is not None)
    return colours


def single_colour(image_HWC: ndarray) -> ndarray | None:
    """The mean (C,) float32 of an image of one colour; None for any other image."""
    channels = [Image.fromarray(image_HWC[..., c]) for c in range(image_HWC.shape[2])]
    small = [np.asarray(channel.resize((GRID, GRID), Image.Resampling.BOX), np.float32) for channel in channels]
    x_GGC = np.stack(small, -1)
    colour_C = x_GGC.mean((0, 1))
    return colour_C if np.abs(x_GGC - colour_C).max() <= LEVELS else None


def group_colours(colours: Sequence[ndarray]) -> ndarray:
    """The group (N,) of each colour: the first group whose first colour is the same to LEVELS. Their order matters."""
    group_of, firsts = dict[bytes, int](), list[ndarray]()
    for colour_C in colours:
        if colour_C.tobytes() not in group_of:
            same = next((g for g, first in enumerate(firsts) if same_colour(first, colour_C)), len(firsts))
            group_of[colour_C.tobytes()] = same
            if same == len(firsts):
                firsts.append(colour_C)
    return np.array([group_of[colour_C.tobytes()] for colour_C in colours], np.int64)


def same_colour(a_C: ndarray, b_C: ndarray) -> bool:
    """Whether two colours are the same to LEVELS. One channel counts as three equal ones."""
    return a_C.shape == b_C.shape and bool(np.abs(a_C - b_C).max() <= LEVELS)


def equal_pixels(context: CurationContext, rows: ndarray) -> ndarray:
    """A digest of the pixels of these rows, for those that may equal another; "" for all others. (N,) str."""
    images = context.images.select(["width", "height", "hash"]).take(pa.array(rows))
    keys = np.stack([images[name].fill_null(0).to_numpy().astype(np.uint64) for name in images.column_names], 1)
    _, group_N, count_G = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    may_equal_N = (count_G[group_N.ravel()] > 1) & images["hash"].is_valid().to_numpy()
    digest_N = np.full(len(rows), "", object)
    for position in np.flatnonzero(may_equal_N):
        digest_N[position] = pixel_digest(context.index, int(rows[position]))
    return digest_N


def pixel_digest(index: Any, row: int) -> str:
    """A digest of size and pixels of an image, however it was saved; "" if it cannot be read."""
    try:
        image_HWC = index.decode(row, None)
    except (BadImage, OSError):
        return ""
    return hashlib.sha256(str(image_HWC.shape).encode() + image_HWC.tobytes()).hexdigest()


def equal_benchmark_rows(
    context: CurationContext, rows: ndarray, benchmark_rows: ndarray, colours: dict[int, ndarray]
) -> ndarray:
    """For each row the first row of a benchmark with equal bytes, pixels or single colour; -1 for none. (N,) int64."""
    sha256 = context.images["sha256"]
    same = pc.index_in(sha256.take(pa.array(rows)), value_set=sha256.take(pa.array(benchmark_rows)))
    found_N = _chosen(benchmark_rows, same.fill_null(-1).to_numpy())
    hash_N = context.images["hash"].fill_null(0).to_numpy()
    maybe = np.flatnonzero((found_N < 0) & np.isin(hash_N[rows], hash_N[benchmark_rows]))
    both = np.r_[benchmark_rows, rows[maybe]] if len(maybe) else rows[:0]
    digests = equal_pixels(context, both)
    of_benchmark = {digest: row for digest, row in zip(digests[: len(benchmark_rows)][::-1], benchmark_rows[::-1])}
    for position, digest in zip(maybe, digests[len(benchmark_rows) :]):
        found_N[position] = of_benchmark.get(digest, -1) if digest else -1
    for position in np.flatnonzero((found_N < 0) & np.isin(rows, list(colours))):
        colour_C = colours[int(rows[position])]
        alike = (b for b in benchmark_rows if int(b) in colours and same_colour(colours[int(b)], colour_C))
        found_N[position] = next(alike, -1)
    return found_N


def _chosen(rows: ndarray, position_N: ndarray) -> ndarray:
    return np.where(position_N >= 0, np.r_[rows, -1][position_N], -1)
