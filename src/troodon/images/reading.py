"""Read images in order by threads, and the ordered results of their tasks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from troodon.images.decode import BadImage
from troodon.images.index import Index

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

BATCHES_AHEAD = 2  # read while one batch is used


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
    channels: int | None = 3,
    threads: int = 0,
    broken: dict[int, BadImage] | None = None,
) -> Iterator[tuple[list[int], "Tensor"]]:
    """Yield all readable images in order, `batch` rows at a time: their rows, and what `prepare` makes of their pixels.

    Images that cannot be read, or do not have `channels` channels, are skipped and recorded in `broken`, by row.
    """
    broken = {} if broken is None else broken

    def load(row: int) -> np.ndarray | None:
        try:
            return index.decode(row, channels)
        except BadImage as error:
            broken[row] = error
        except OSError as error:
            broken[row] = BadImage("decode error", str(error))
        return None

    with ThreadPoolExecutor(index.thread_count(threads), "read") as pool:
        loaded = map_ordered(pool, load, range(len(index)), (1 + BATCHES_AHEAD) * batch)
        for start in range(0, len(index), batch):
            rows = range(start, min(start + batch, len(index)))
            images = {row: image for row, image in zip(rows, loaded) if image is not None}
            if images:
                yield list(images), prepare(list(images.values()))
