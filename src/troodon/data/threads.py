"""Threads that read images: how many, and what they give in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

from troodon.config import UsageError
from troodon.data.files import AT_ONCE

T = TypeVar("T")
R = TypeVar("R")


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
