"""Images read in order by threads: how many threads, and what they return in turn."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from troodon.config import UsageError
from troodon.images.decode import BadImage, decode
from troodon.images.files import AT_ONCE
from troodon.images.index import Index

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2  # batches that are read while one is used


def threads_or_all(threads: int, distant: bool = False) -> int:
    """How many threads read images: as many as asked for, or one per processor, 16 at most.

    Of `distant` images it is more, for such threads mostly wait.
    """
    if threads < 0:
        raise UsageError(f"threads {threads}: must be 0, which is one per processor, or more")
    return threads or (AT_ONCE if distant else min(16, os.cpu_count() or 1))


def in_turn(pool: Executor, task: Callable[[T], R], over: Iterable[T], ahead: int) -> Iterator[R]:
    """What `task` gives of each, in order, with no more than `ahead` of them begun and not yet taken."""
    waiting: deque[Future[R]] = deque()
    for one in over:
        waiting.append(pool.submit(task, one))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def stream(
    index: Index,
    batch: int,
    prepare: Callable[[Sequence[np.ndarray]], "Tensor"],
    *,
    channels: int = 3,
    threads: int = 0,
    broken: dict[int, BadImage] | None = None,
) -> Iterator[tuple[list[int], "Tensor"]]:
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

    with ThreadPoolExecutor(threads_or_all(threads, index.distant), "stream") as pool:
        loaded = in_turn(pool, load, range(len(index)), (1 + AHEAD) * batch)
        for start in range(0, len(index), batch):
            rows = range(start, min(start + batch, len(index)))
            images = {row: image for row, image in zip(rows, loaded) if image is not None}
            if images:
                yield list(images), prepare(list(images.values()))
