"""The endless, shuffled, resumable stream of batches; and images in order, for those who only look.

A batch is a function of (seed, its number): which images, which crops, which colours, which masks, which size. Not
of the number of ranks, which each take a slice of it, nor of threads, nor of where a run was interrupted. The number is
that of the step, unless the run has left some out.
"""

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor

from troodon.config import UsageError
from troodon.images import containers
from troodon.images.decode import HAS_SIMPLEJPEG, BadImage, decode
from troodon.images.index import Index
from troodon.images.reading import thread_count
from troodon.views import masks, photometric
from troodon.views.batch import Batch
from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig
from troodon.views.crops import MultiCrop, generator
from troodon.views.order import assign_source, check_weights, permute

AHEAD = 2  # batches prepared while one is used
MASK_STREAM, SIZE_STREAM = -1, -2  # whose random numbers draw the masks of a batch, and its size


@dataclass(frozen=True)
class PartialBatch:
    """What one worker makes of some images: crops as bytes, what is to happen to their colours, what was broken."""

    globals_GBCHW: Tensor
    locals_VBCHW: Tensor
    colours_BVP: Tensor
    images_B2: Tensor
    broken: dict[int, str]


@dataclass(frozen=True)
class Loader:
    """Batches of `images` views of the images of an index; `rank` of `world` gets its slice of each.

    With `weights`, one for each source of the index, that many of every so many images come from each; without, all
    images of all sources make one pass. With `processes`, these read and crop in place of threads.
    """

    index: Index
    crops: CropsConfig
    photometric: PhotometricConfig
    masks: MasksConfig
    patch: int
    batch_size: int
    seed: int
    threads: int = 0
    rank: int = 0
    world_size: int = 1
    channels: int = 3
    processes: int = 0
    weights: tuple[float, ...] = ()
    compiled: bool = False  # the colours: see photometric.apply
    broken: dict[int, str] = field(default_factory=dict)  # row -> why it cannot be read; a record, not an input

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise UsageError(f"batch {self.batch_size} does not divide over {self.world_size} ranks")
        check_weights(self.weights, self.index.source_lengths or (len(self.index),))

    def rows(self, batch: int) -> list[int]:
        """Which images of the index this rank's share of a batch shows, before broken ones are replaced."""
        return [self.row_at(position)[0] for position in self.positions(batch)]

    def positions(self, batch: int) -> range:
        """Where this rank's share of a batch lies in the endless stream of images."""
        per_rank = self.batch_size // self.world_size
        first = batch * self.batch_size + self.rank * per_rank
        return range(first, first + per_rank)

    def row_at(self, position: int) -> tuple[int, int]:
        """The image at a position of the endless stream, and how often it has been seen before."""
        source, place = assign_source(position, self.weights)
        first, length = self._source_range(source)
        visit, place = divmod(place, length)
        key = (self.seed, visit, source) if self.weights else (self.seed, visit)
        return first + permute(place, length, hash(key) & (2**64 - 1)), visit

    def crops_of(self, batch: int) -> CropsConfig:
        """The crops of a batch, all of one size: the same on every rank."""
        return self.crops.pick_size(generator(self.seed, SIZE_STREAM, batch).random() if self.crops.mixed else 0.0)

    def batches(self, first: int, device: torch.device) -> Generator[Batch]:
        """Batches number `first`, `first` + 1, ..., on `device`, with colours applied there."""
        per_rank = self.batch_size // self.world_size
        with self._workers() as (submit, workers), ThreadPoolExecutor(1, "collate") as collector:
            each = max(1, min(16, per_rank // (4 * workers)))  # a few images at once: dealt evenly, handed over cheaply
            waiting: list[tuple[int, Future]] = []
            try:
                for batch in count(first):
                    positions = self.positions(batch)
                    shares = [submit(positions[i : i + each]) for i in range(0, per_rank, each)]
                    waiting.append((batch, collector.submit(self._gather, batch, shares, device.type == "cuda")))
                    if len(waiting) > AHEAD:
                        ready, views = waiting.pop(0)
                        yield self._finish(ready, views.result(), device)
            finally:
                for _, views in waiting:
                    views.cancel()

    def load(self, position: int) -> tuple[np.ndarray, MultiCrop, np.random.Generator]:
        """The image at a position of the endless stream, its boxes, and the random numbers that come after these.

        In place of an image that cannot be read comes the next row of its source that can.
        """
        crops = self.crops_of(position // self.batch_size)
        row, visit = self.row_at(position)
        first, length = self._source_range(assign_source(position, self.weights)[0])
        for tried in range(length):
            other = first + (row - first + tried) % length
            if other in self.broken:
                continue
            which = visit % self.crops.visits if self.crops.visits else visit
            random = generator(self.seed, other, which)
            views = MultiCrop(crops, random, (other, which))
            try:
                return decode(self.index.read(other), self.channels, views.draw_boxes), views, random
            except (BadImage, OSError) as error:
                self.broken[other] = str(error)
        raise UsageError(f"none of the {length} images can be read; the first: {self.broken[first]}")

    def load_views(self, position: int) -> tuple[Tensor, Tensor, np.ndarray, tuple[int, int]]:
        """Of the image at a position of the endless stream: global crops, local crops, colours; and which it is."""
        image, views, random = self.load(position)
        return *views.crop(image), photometric.draw_parameters(self.photometric, self._roles, random), views.image_visit

    def load_partial(self, positions: range) -> PartialBatch:
        """The views of the images at these positions, one beside the other."""
        wide, narrow, colours, whose = zip(*map(self.load_views, positions))
        colours_BVP = torch.from_numpy(np.stack(colours))
        return PartialBatch(torch.stack(wide, 1), torch.stack(narrow, 1), colours_BVP, torch.tensor(whose), dict(self.broken))

    def preview(self, batch: int, images: int) -> Batch:
        """The first images of a batch as they are in it, and no others made."""
        return self._finish(batch, self.load_partial(self.positions(batch)[:images]), torch.device("cpu"))

    def advice(self) -> list[str]:
        """What makes images come faster here, the most likely first; nothing if nothing is known to."""
        said, processors = [], os.cpu_count() or 1
        workers = self.processes or thread_count(self.threads, self.index.is_remote)
        if workers * self.world_size < processors:
            said.append(f"more threads (threads {workers} on {processors} processors)")
        if self.index.is_remote or containers.COLUMN_SEPARATOR in str(self.index.table["container"][0]):
            said.append("`troodon pack` puts the images on this machine's disk, each within reach")
        if not HAS_SIMPLEJPEG:
            said.append('pip install "troodon[fast]" decodes JPEGs faster')
        side = max(px for size in self.crops.sizes() for px in size[0])
        return [
            *said,
            f"`troodon pack --side {round(1.5 * side / 64) * 64}` makes large pictures small once and for all",
        ]

    @property
    def _roles(self) -> tuple[int, ...]:
        return (photometric.GLOBAL_1, photometric.GLOBAL_2) + (photometric.LOCAL,) * self.crops.locals

    def _source_range(self, source: int) -> tuple[int, int]:
        """First row and length of a source; without weights all are one."""
        if not self.weights:
            return 0, len(self.index)
        return sum(self.index.source_lengths[:source]), self.index.source_lengths[source]

    @contextlib.contextmanager
    def _workers(self) -> Iterator[tuple[Callable[[range], Future], int]]:
        """What hands positions to workers, and how many these are."""
        if self.processes:
            # Spawned, not forked: threads of this process may hold locks. Tensors come back through shared memory.
            context = torch.multiprocessing.get_context("spawn")
            pool: Executor = ProcessPoolExecutor(self.processes, context, _init_worker, (replace(self, broken={}),))
            submit, workers = functools.partial(pool.submit, _load_partial), self.processes
        else:
            workers = thread_count(self.threads, self.index.is_remote)
            pool = ThreadPoolExecutor(workers, "loader")
            submit = functools.partial(pool.submit, self.load_partial)
        try:
            yield submit, workers
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _gather(self, batch: int, shares: list[Future], pinned: bool) -> PartialBatch:
        """The parts of a batch as one, in memory that a device can fetch from by itself."""
        try:
            parts = [share.result() for share in shares]
        except BrokenProcessPool:
            raise OSError(f"a process that reads images died at batch {batch}; its images are the suspects") from None
        wide, narrow = (
            torch.empty((len(first), self.batch_size // self.world_size, *first.shape[2:]), dtype=torch.uint8, pin_memory=pinned)
            for first in (parts[0].globals_GBCHW, parts[0].locals_VBCHW)
        )
        torch.cat([part.globals_GBCHW for part in parts], 1, out=wide)
        torch.cat([part.locals_VBCHW for part in parts], 1, out=narrow)
        for part in parts:
            self.broken.update(part.broken)
        colours, images = ([getattr(part, name) for part in parts] for name in ("colours_BVP", "images_B2"))
        return PartialBatch(wide, narrow, torch.cat(colours), torch.cat(images), {})

    def _finish(self, batch: int, views: PartialBatch, device: torch.device) -> Batch:
        """The batch on the device, its colours applied, its masks drawn."""
        colours_VBP = views.colours_BVP.numpy().swapaxes(0, 1)
        developed = []
        for crops, numbers in ((views.globals_GBCHW, colours_VBP[:2]), (views.locals_VBCHW, colours_VBP[2:])):
            crops_NCHW, numbers_NP = crops.flatten(0, 1), numbers.reshape(-1, numbers.shape[-1])
            sent_NCHW = crops_NCHW.to(device, non_blocking=True)
            x_NCHW = photometric.apply(sent_NCHW, numbers_NP, self.photometric, self.compiled)
            developed.append(x_NCHW.unflatten(0, crops.shape[:2]))
        height, width = (side // self.patch for side in views.globals_GBCHW.shape[-2:])
        random = generator(self.seed, MASK_STREAM, batch)
        masks_NP = masks.draw_masks(2 * self.batch_size, (height, width), self.masks, random)
        mine = masks_NP.unflatten(0, (2, self.world_size, -1))[:, self.rank, : views.globals_GBCHW.shape[1]].flatten(0, 1)
        globals_GBCHW, locals_VBCHW = developed
        return Batch(globals_GBCHW, locals_VBCHW, mine, views.images_B2)


_worker_loader: list[Loader] = []  # of a process that works for a loader


def _init_worker(loader: Loader) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the process that asked for this one
    _worker_loader[:] = [loader]


def _load_partial(positions: range) -> PartialBatch:
    return _worker_loader[0].load_partial(positions)
