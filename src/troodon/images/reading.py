"""Read images in order by threads: how many threads, and the ordered results of their tasks."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from troodon.config import UsageError
from troodon.images.decode import BadImage, decode
from troodon.images.files import MAX_REMOTE_READS
from troodon.images.index import Index

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

BATCHES_AHEAD = 2  # read while one batch is used


def thread_count(threads: int, is_remote: bool = False) -> int:
    """The number of threads that read images: `threads`, or for 0 one per processor, at most 16.

    For remote images, 0 gives MAX_REMOTE_READS, since such threads mostly wait.
    """
    if threads < 0:
        raise UsageError(f"threads {threads}: must be 0, which is one per processor, or more")
    return threads or (MAX_REMOTE_READS if is_remote else min(16, os.cpu_count() or 1))


def map_ordered(pool: Executor, task: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """The results of `task` on each item, in order; at most `ahead` tasks are submitted and not yet yielded."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(task, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def read_batches(
    index: Index,
    batch: int,
    prepare: Callable[[Sequence[np.ndarray]], "Tensor"],
    *,
    channels: int = 3,
    threads: int = 0,
    broken: dict[int, BadImage] | None = None,
) -> Iterator[tuple[list[int], "Tensor"]]:
    """Yield all readable images in order, `batch` rows at a time: their rows, and what `prepare` makes of their pixels.

    Images that cannot be read, or do not have `channels` channels, are skipped and recorded in `broken`, by row.
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

    with ThreadPoolExecutor(thread_count(threads, index.is_remote), "read") as pool:
        loaded = map_ordered(pool, load, range(len(index)), (1 + BATCHES_AHEAD) * batch)
        for start in range(0, len(index), batch):
            rows = range(start, min(start + batch, len(index)))
            images = {row: image for row, image in zip(rows, loaded) if image is not None}
            if images:
                yield list(images), prepare(list(images.values()))
