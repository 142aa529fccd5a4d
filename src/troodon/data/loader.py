"""The endless, shuffled, resumable stream of batches; and images in order, for those who only look.

A batch is a function of (seed, its number): which images, which crops, which colours, which masks, which size. Not
of the number of ranks, which each take a slice of it, nor of threads, nor of where a run was interrupted. The number is
that of the step, unless the run has left some out.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from torch import Tensor

from troodon.config import UsageError
from troodon.data import masks, photometric
from troodon.data.batch import Batch
from troodon.data.config import CropsConfig, MasksConfig, PhotometricConfig
from troodon.data.crops import generator, multi_crop
from troodon.data.decode import BadImage, decode, threads_or_all
from troodon.data.index import Index

AHEAD = 2  # batches prepared while one is used
NO_IMAGE, NO_IMAGE_EITHER = -1, -2  # whose random numbers draw the masks of a batch, and its size


def permute(position: int, length: int, key: int) -> int:
    """Where `position` goes in the permutation of range(length) that `key` names: a shuffle in constant memory.

    A Feistel network on the next power of four, walked until it lands inside (Black and Rogaway, 2002).
    """
    half = max(1, (max(length - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(4):
            mixed = (right * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9 + turn * 0x94D049BB133111EB) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & (2**64 - 1)
            left, right = right, left ^ ((mixed >> 32) & mask)
        position = (left << half) | right
        if position < length:
            return position


@dataclass(frozen=True)
class Loader:
    """Batches of `images` views of the images of an index; `rank` of `world` gets its slice of each."""

    index: Index
    crops: CropsConfig
    photometric: PhotometricConfig
    masks: MasksConfig
    patch: int
    images: int
    seed: int
    threads: int = 0
    rank: int = 0
    world: int = 1
    channels: int = 3
    broken: dict[int, str] = field(default_factory=dict)  # row -> why it cannot be read; a record, not an input

    def __post_init__(self) -> None:
        if self.images % self.world:
            raise UsageError(f"batch {self.images} does not divide over {self.world} ranks")

    def rows(self, batch: int) -> list[int]:
        """Which images of the index this rank's share of a batch shows, before broken ones are replaced."""
        per_rank = self.images // self.world
        first = batch * self.images + self.rank * per_rank
        return [self.row(position)[0] for position in range(first, first + per_rank)]

    def row(self, position: int) -> tuple[int, int]:
        """The image at a position of the endless stream, and how often it has been seen before."""
        visit, place = divmod(position, len(self.index))
        return permute(place, len(self.index), hash((self.seed, visit)) & (2**64 - 1)), visit

    def size(self, batch: int) -> CropsConfig:
        """The crops of a batch, all of one size: the same on every rank."""
        return self.crops.at(generator(self.seed, NO_IMAGE_EITHER, batch).random() if self.crops.mixed else 0.0)

    def batches(self, first: int, device: torch.device) -> Generator[Batch]:
        """Batches number `first`, `first` + 1, ..., on `device`, with colours applied there."""
        per_rank = self.images // self.world
        with ThreadPoolExecutor(threads_or_all(self.threads), "loader") as pool:
            waiting: list[tuple[int, list[Future]]] = []
            try:
                for batch in count(first):
                    start = batch * self.images + self.rank * per_rank
                    waiting.append((batch, [pool.submit(self.views, start + i) for i in range(per_rank)]))
                    if len(waiting) > AHEAD:
                        ready, views = waiting.pop(0)
                        yield self._collate(ready, [v.result() for v in views], device)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def views(self, position: int) -> tuple[Tensor, Tensor, np.ndarray]:
        """Global crops, local crops and colours of the image at a position of the endless stream.

        In place of an image that cannot be read comes the next row that can.
        """
        length, crops = len(self.index), self.size(position // self.images)
        row, visit = self.row(position)
        for tried in range(length):
            image = self._decode((row + tried) % length)
            if image is not None:
                random = generator(self.seed, (row + tried) % length, visit)
                wide, narrow = multi_crop(image, crops, random)
                return wide, narrow, photometric.draw(self.photometric, self._roles, random)
        raise UsageError(f"none of the {length} images can be read; the first: {self.broken[0]}")

    @property
    def _roles(self) -> tuple[int, ...]:
        return (photometric.FIRST, photometric.SECOND) + (photometric.LOCAL,) * self.crops.locals

    def _decode(self, row: int) -> np.ndarray | None:
        if row not in self.broken:
            try:
                return decode(self.index.read(row), self.channels)
            except (BadImage, OSError) as error:
                self.broken[row] = str(error)
        return None

    def _collate(self, batch: int, views: Sequence[tuple], device: torch.device) -> Batch:
        wide = torch.stack([v[0] for v in views], dim=1)
        narrow = torch.stack([v[1] for v in views], dim=1)
        colours_VBP = np.stack([v[2] for v in views], axis=1)
        developed = [
            photometric.apply(crops.flatten(0, 1).to(device, non_blocking=True), numbers, self.photometric).unflatten(
                0, crops.shape[:2]
            )
            for crops, numbers in (
                (wide, colours_VBP[:2].reshape(-1, colours_VBP.shape[-1])),
                (narrow, colours_VBP[2:].reshape(-1, colours_VBP.shape[-1])),
            )
        ]
        height, width = (side // self.patch for side in wide.shape[-2:])
        random = generator(self.seed, NO_IMAGE, batch)
        masks_NP = masks.collate(2 * self.images, (height, width), self.masks, random)
        mine = masks_NP.unflatten(0, (2, self.world, -1))[:, self.rank].flatten(0, 1)
        globals_GBCHW, locals_VBCHW = developed
        return Batch(globals_GBCHW, locals_VBCHW, mine.to(device, non_blocking=True))


def stream(
    index: Index,
    batch: int,
    prepare: Callable[[Sequence[np.ndarray]], Tensor],
    *,
    channels: int = 3,
    threads: int = 0,
    broken: dict[int, BadImage] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Every readable image in order: rows and what `prepare` makes of their pixels, `batch` at a time.

    Rows that cannot be read, or not with so many `channels`, are left out and recorded in `broken`.
    """
    broken = {} if broken is None else broken

    def load(row: int) -> np.ndarray | None:
        try:
            return decode(index.read(row), channels)
        except BadImage as error:
            broken[row] = error
        except OSError as error:
            broken[row] = BadImage("decode error", str(error))
        return None

    with ThreadPoolExecutor(threads_or_all(threads), "stream") as pool:
        starts = range(0, len(index), batch)
        waiting: list[tuple[range, list[Future]]] = []
        for start in [*starts, *[None] * AHEAD]:
            if start is not None:
                rows = range(start, min(start + batch, len(index)))
                waiting.append((rows, [pool.submit(load, row) for row in rows]))
            if waiting and (start is None or len(waiting) > AHEAD):
                rows, futures = waiting.pop(0)
                images = {row: image for row, f in zip(rows, futures, strict=True) if (image := f.result()) is not None}
                if images:
                    yield list(images), prepare(list(images.values()))
