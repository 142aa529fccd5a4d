"""Decoded images that stay in memory: training sees each image many times, and decodes it once."""

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from troodon.images.index import Index
from troodon.stream import default_threads

MEMORY_SHARE = 4  # one part in so many of the memory that is free holds decoded images
SAMPLE = 256  # images after which their mean size tells whether all of them fit
OVERHEAD = 400  # bytes of memory for each array, besides its pixels
AVAILABLE = Path("/proc/meminfo")
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container

Key = tuple[int, int | None]  # row and channels


@dataclass
class Decoded:
    """An image: its size (height, width), and its pixels for each factor by which it was to be reduced."""

    size: tuple[int, int]
    by_factor: dict[int, np.ndarray] = field(default_factory=dict)


class Cache:
    """Decoded images, and the bytes that they take."""

    def __init__(self) -> None:
        self.images: dict[Key, Decoded] = {}
        self.bytes = 0
        self.is_closed = False
        self.lock = threading.Lock()

    def add(self, key: Key, size: tuple[int, int], factor: int, pixels_HWC: np.ndarray) -> np.ndarray:
        """Add an image; returns the pixels kept. What a factor did not reduce is kept once for all such factors."""
        with self.lock:
            if self.is_closed:  # by another thread, meanwhile
                return pixels_HWC
            decoded = self.images.setdefault(key, Decoded(size))
            same = (kept for kept in decoded.by_factor.values() if kept.shape == pixels_HWC.shape)
            if (kept := next(same, None)) is None:
                kept = pixels_HWC
                self.bytes += pixels_HWC.nbytes + OVERHEAD
            decoded.by_factor[factor] = kept
            return kept

    def close(self) -> None:
        """Give the memory back, and keep no more images."""
        with self.lock:
            self.is_closed, self.images, self.bytes = True, {}, 0


@dataclass(frozen=True)
class CachedIndex(Index):
    """An index whose decoded images stay in memory if all of them fit into `limit` bytes. Pixels are read-only.

    As soon as the images decoded so far are larger than their share of the limit, none is kept any more.
    """

    limit: int = 0
    cache: Cache = field(default_factory=Cache, init=False, compare=False, repr=False)

    def decode(
        self, row: int, channels: int | None = 3, reduction: Callable[[int, int], int] | None = None
    ) -> np.ndarray:
        if self.cache.is_closed:
            return super().decode(row, channels, reduction)
        if (known := self.cache.images.get((row, channels))) is not None:
            factor = reduction(*known.size) if reduction else 1
            if (pixels_HWC := known.by_factor.get(factor)) is not None:
                return pixels_HWC
        size, factor = (0, 0), 1

        def chosen(height: int, width: int) -> int:
            nonlocal size, factor
            size, factor = (height, width), reduction(height, width) if reduction else 1
            return factor

        pixels_HWC = super().decode(row, channels, chosen)
        pixels_HWC.setflags(write=False)
        pixels_HWC = self.cache.add((row, channels), size, factor, pixels_HWC)
        if self.cache.bytes > self.limit * min(1.0, max(SAMPLE, len(self.cache.images)) / len(self)):
            self.cache.close()
        return pixels_HWC

    def __reduce__(self) -> tuple:
        # Processes that read in place of threads keep images of their own.
        return _cached, (Index(*_values(self)), self.limit // default_threads())


def cached(index: Index, gib: float | None) -> Index:
    """The index, with its decoded images kept in memory where all of them fit.

    `gib` is how much this machine gives to them, over all ranks; None is a quarter of the memory that is free, or of
    the limit of its container; 0 keeps none.
    """
    here = free_memory() // MEMORY_SHARE if gib is None else round(gib * 2**30)
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    return _cached(index, here // int(ranks))


def free_memory() -> int:
    """Bytes of memory that new data may take, at most the limit of the container; 0 where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = AVAILABLE.read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS: it does not say more
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no container; the limit "max"
            found.append(int(limit.read_text()))
    return min(found, default=0)


def _values(index: Index) -> list:
    return [getattr(index, each.name) for each in fields(Index)]


def _cached(index: Index, limit: int) -> Index:
    return CachedIndex(*_values(index), limit=limit) if limit else index
