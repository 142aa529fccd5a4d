"""Streams: threads prepare, ahead of the one that uses it, and in order. Nothing here knows images or networks."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

MAX_THREADS = 16  # more would wait for the interpreter's lock
BATCHES_AHEAD = 2  # prepared while one batch is used
MAX_TASK = 8  # items of one task: more balance worse, fewer cost more than they take


def default_threads() -> int:
    """Threads that prepare: one for each processor that this process may use, at most MAX_THREADS."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, here)


def map_ordered(pool: Executor, task: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """The results of `task` on each item, in order; at most `ahead` tasks are submitted and not yet yielded."""
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(task, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def prepared_batches(
    items: Sequence[T], batch: int, prepare: Callable[[Sequence[T]], R], join: Callable[[list[R]], Any], threads: int
) -> Iterator[Any]:
    """What `join` makes of each `batch` items in order, prepared a few at a time by so many threads.

    `join` gets what `prepare` has made of the parts of one batch, in order. It runs in a thread of its own, so whatever
    it does, such as a copy to a device, overlaps with the use of the batches before.
    """
    size = max(1, min(MAX_TASK, batch // threads))

    def collect(parts: list[Future[R]]) -> Any:
        return join([part.result() for part in parts])

    with ThreadPoolExecutor(threads, "prepare") as pool, ThreadPoolExecutor(1, "join") as collector:

        def submitted() -> Iterator[list[Future[R]]]:
            for start in range(0, len(items), batch):
                end = min(start + batch, len(items))
                yield [pool.submit(prepare, items[at : min(at + size, end)]) for at in range(start, end, size)]

        try:
            yield from map_ordered(collector, collect, submitted(), 1 + BATCHES_AHEAD)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
