"""The endless, shuffled, resumable stream of batches.

A batch is a function of the seed and its number: its images, crops, colours, masks and size. It does not depend on the
number of ranks, which each take a slice of it, nor on threads, nor on where a run was interrupted. The number is that
of the step, unless the run has skipped batches.
"""

import contextlib
import functools
import importlib.util
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

from troodon.bad_image import BadImage
from troodon.config import UsageError
from troodon.dist import Share, processors
from troodon.views import masks, photometric
from troodon.views.batch import Batch
from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig
from troodon.views.crops import Attack, MultiCrop, generator
from troodon.views.image_source import ImageSource
from troodon.views.order import assign_source, check_weights, permute

BATCHES_AHEAD = 2  # prepared while one batch is used
MASK_STREAM, SIZE_STREAM = -1, -2  # in place of an image: random numbers for the masks and the size of a batch


@dataclass(frozen=True)
class PartialBatch:
    """Some images of a batch, from one worker: crops in uint8, parameters of their colours, masks, broken images."""

    globals_GBCHW: Tensor
    locals_VBCHW: Tensor
    colours_BVP: Tensor
    masks_GBP: Tensor
    images_B2: Tensor
    broken: dict[int, str]


@dataclass(frozen=True)
class Loader:
    """Batches of `batch_size` images of an index, of which `rank` of `world_size` gets its slice.

    `weights`, one for each source of the index, give the proportions of the sources; without them, every pass has all
    images of all sources once. With `processes`, that many processes read and crop in place of threads.
    """

    index: ImageSource
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
    compiled: bool = False  # colour operations: see photometric.apply
    attack: Attack | None = None  # of the pictures from which global crops are cut, where `crops` asks for attacks
    progress: Callable[[int], float] | None = None  # of a batch: the share of the run before it; None: its start
    broken: dict[int, str] = field(default_factory=dict)  # output: row -> why it cannot be read

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise UsageError(f"batch {self.batch_size} does not divide over {self.world_size} ranks")
        check_weights(self.weights, self.index.source_lengths or (len(self.index),))

    def rows(self, batch: int) -> list[int]:
        """The rows of this rank's images of a batch, before broken ones are replaced."""
        return [self.row_at(position)[0] for position in self.positions(batch)]

    def positions(self, batch: int) -> range:
        """The positions of this rank's images of a batch in the endless stream of images."""
        per_rank = self.batch_size // self.world_size
        first = batch * self.batch_size + self.rank * per_rank
        return range(first, first + per_rank)

    def row_at(self, position: int) -> tuple[int, int]:
        """The row of the image at a position of the stream, and the number of its earlier visits."""
        source, place = assign_source(position, self.weights)
        first, length = self._source_range(source)
        visit, place = divmod(place, length)
        key = (self.seed, visit, source) if self.weights else (self.seed, visit)
        return first + permute(place, length, hash(key) & (2**64 - 1)), visit

    def broken_share(self, batches: int) -> float:
        """About which share of the images tried cannot be read, once so many batches were taken."""
        tried = (batches + BATCHES_AHEAD) * (self.batch_size // self.world_size) + len(self.broken)
        return len(self.broken) / max(1, min(tried, len(self.index)))

    def crops_of(self, batch: int) -> CropsConfig:
        """The crop settings of a batch, which have one size: the same on every rank."""
        if not self.crops.mixed:
            return self.crops
        if self.crops.mixed_by == "chance":
            return self.crops.pick_size(generator(self.seed, SIZE_STREAM, batch).random())
        return self.crops.pick_size(self.progress(batch) if self.progress else 0.0)

    def batches(self, first: int, device: torch.device) -> Generator[Batch]:
        """Yield batches number `first`, `first` + 1, ..., on `device`, where the colours are applied."""
        per_rank = self.batch_size // self.world_size
        with self._workers() as (submit, workers), ThreadPoolExecutor(1, "collate") as collector:
            size = max(1, min(16, per_rank // (4 * workers)))  # images per task: even load, little overhead
            pending: list[tuple[int, Future]] = []
            try:
                for batch in count(first):
                    positions, crops = self.positions(batch), self.crops_of(batch)
                    parts = [submit(positions[i : i + size], crops) for i in range(0, per_rank, size)]
                    pending.append((batch, collector.submit(self._concatenate, batch, parts, device.type == "cuda")))
                    if len(pending) > BATCHES_AHEAD:
                        ready, views = pending.pop(0)
                        yield self._finish(ready, views.result(), device)
            finally:
                for _, views in pending:
                    views.cancel()

    def load(
        self, position: int, crops: CropsConfig | None = None
    ) -> tuple[np.ndarray, MultiCrop, np.random.Generator]:
        """Load the image at a position of the stream: its pixels, its crops, and the generator after the crops.

        An image that cannot be read is replaced by the next row of its source that can. `crops` are those of its batch.
        """
        crops = crops or self.crops_of(position // self.batch_size)
        row, visit = self.row_at(position)
        first, length = self._source_range(assign_source(position, self.weights)[0])
        crop_set = visit % self.crops.visits if self.crops.visits else visit
        for offset in range(length):
            candidate = first + (row - first + offset) % length
            if candidate in self.broken:
                continue
            random = generator(self.seed, candidate, crop_set)
            views = MultiCrop(crops, random, (candidate, crop_set), self.attack)
            try:
                return self.index.decode(candidate, self.channels, views.draw_boxes), views, random
            except (BadImage, OSError) as error:
                self.broken[candidate] = str(error)
        raise UsageError(f"none of the {length} images can be read; the first: {self.broken[first]}")

    def load_views(
        self, position: int, crops: CropsConfig | None = None
    ) -> tuple[Tensor, Tensor, np.ndarray, tuple[int, int]]:
        """Global crops, local crops, colour parameters, and (row, set of crops) of the image at a position."""
        image, views, random = self.load(position, crops)
        return *views.crop(image), photometric.draw_parameters(self.photometric, self._roles, random), views.image_visit

    def load_partial(self, positions: range, crops: CropsConfig | None = None) -> PartialBatch:
        """The crops of the images at these positions of one batch, stacked."""
        wide, narrow, colours, images = zip(*(self.load_views(position, crops) for position in positions))
        height, width = (side // self.patch for side in wide[0].shape[-2:])
        return PartialBatch(
            torch.stack(wide, 1),
            torch.stack(narrow, 1),
            torch.from_numpy(np.stack(colours)),
            self.draw_masks(positions, (height, width)),
            torch.tensor(images),
            dict(self.broken),
        )

    def draw_masks(self, positions: range, grid: tuple[int, int]) -> Tensor:
        """(G, B, P): the masks of the images at these positions of one batch, which depend on their places in it."""
        batch, first = divmod(positions.start, self.batch_size)
        views, size, random = (
            self.crops.globals,
            self.batch_size,
            functools.partial(generator, self.seed, MASK_STREAM, batch),
        )
        sizes_N = masks.draw_sizes(views * size, grid, self.masks, random())
        crops = [view * size + first + i for view in range(views) for i in range(len(positions))]
        return masks.draw_masks(sizes_N, crops, grid, lambda crop: random(1 + crop)).unflatten(0, (views, -1))

    def preview(self, batch: int, images: int) -> Batch:
        """The first images of a batch, exactly as in it, without computing the others."""
        return self._finish(batch, self.load_partial(self.positions(batch)[:images]), torch.device("cpu"))

    def advice(self) -> list[str]:
        """What would make loading faster here, the most likely first."""
        advice, there = [], processors()
        workers = self.processes or self.index.thread_count(self.threads)
        if workers * self.world_size < there:
            advice.append(f"more threads (threads {workers} on {there} processors)")
        if self.index.packing_helps:
            advice.append("`troodon pack` puts the images on the disk of this machine, and makes each fast to read")
        if importlib.util.find_spec("simplejpeg") is None:
            advice.append('pip install "troodon[fast]" decodes JPEGs faster')
        side = max(px for size in self.crops.sizes() for px in size[0])
        return [
            *advice,
            f"`troodon pack --side {max(1, round(1.5 * side / 64)) * 64}` reduces large images once and for all",
        ]

    @property
    def _roles(self) -> tuple[int, ...]:
        roles = (photometric.GLOBAL_1, photometric.GLOBAL_2) * self.crops.globals
        return roles[: self.crops.globals] + (photometric.LOCAL,) * self.crops.locals

    def _source_range(self, source: int) -> tuple[int, int]:
        """First row and length of a source; without weights, all sources are one."""
        if not self.weights:
            return 0, len(self.index)
        return sum(self.index.source_lengths[:source]), self.index.source_lengths[source]

    @contextlib.contextmanager
    def _workers(self) -> Iterator[tuple[Callable[[range, CropsConfig], Future], int]]:
        """Start the workers: a function that submits positions to them, and their number."""
        if self.processes:
            # Spawned, not forked: threads of this process may hold locks. Tensors return through shared memory.
            context = torch.multiprocessing.get_context("spawn")
            pool: Executor = ProcessPoolExecutor(
                self.processes, context, _init_worker, (replace(self, broken={}, progress=None),)
            )
            submit, workers = functools.partial(pool.submit, _load_partial), self.processes
        else:
            workers = self.index.thread_count(self.threads)
            pool = ThreadPoolExecutor(workers, "loader")
            submit = functools.partial(pool.submit, self.load_partial)
        try:
            yield submit, workers
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _concatenate(self, batch: int, futures: list[Future], is_pinned: bool) -> PartialBatch:
        """Concatenate the parts of a batch, in pinned memory if `is_pinned`, which a GPU reads by itself."""
        try:
            parts = [future.result() for future in futures]
        except BrokenProcessPool:
            raise OSError(f"a process that reads images died at batch {batch}; one of its images may be why") from None
        per_rank = self.batch_size // self.world_size
        wide, narrow = (
            torch.empty((len(crops), per_rank, *crops.shape[2:]), dtype=torch.uint8, pin_memory=is_pinned)
            for crops in (parts[0].globals_GBCHW, parts[0].locals_VBCHW)
        )
        torch.cat([part.globals_GBCHW for part in parts], 1, out=wide)
        torch.cat([part.locals_VBCHW for part in parts], 1, out=narrow)
        for part in parts:
            self.broken.update(part.broken)
        colours, masks_GBP = torch.cat([p.colours_BVP for p in parts]), torch.cat([p.masks_GBP for p in parts], 1)
        return PartialBatch(wide, narrow, colours, masks_GBP, torch.cat([p.images_B2 for p in parts]), {})

    def _finish(self, batch: int, views: PartialBatch, device: torch.device) -> Batch:
        """Send the crops to the device, and apply their colours there."""
        colours_VBP = views.colours_BVP.numpy().swapaxes(0, 1)
        finished, colours = [], np.split(colours_VBP, [self.crops.globals])
        for crops, parameters in zip((views.globals_GBCHW, views.locals_VBCHW), colours, strict=True):
            crops_NCHW, parameters_NP = crops.flatten(0, 1), parameters.reshape(-1, parameters.shape[-1])
            crops_NCHW = crops_NCHW.to(device, non_blocking=True)
            x_NCHW = photometric.apply(crops_NCHW, parameters_NP, self.photometric, self.compiled)
            finished.append(x_NCHW.unflatten(0, crops.shape[:2]))
        globals_GBCHW, locals_VBCHW = finished
        first, count = self.rank * (self.batch_size // self.world_size), views.globals_GBCHW.shape[1]
        share = Share(self.seed, batch, self.batch_size, range(first, first + count))
        return Batch(globals_GBCHW, locals_VBCHW, views.masks_GBP.flatten(0, 1), views.images_B2, share)


_worker_loader: list[Loader] = []  # the loader of a worker process


def _init_worker(loader: Loader) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles it
    _worker_loader[:] = [loader]


def _load_partial(positions: range, crops: CropsConfig) -> PartialBatch:
    return _worker_loader[0].load_partial(positions, crops)
