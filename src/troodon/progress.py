"""Progress of what takes long, on standard error: how far, how fast, and how long still.

In a terminal and in a notebook these are bars, drawn again and again. Elsewhere, as in a file or a pipe, a line comes
every few seconds.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Self, TypeVar

from troodon import run
from troodon.live import Fitted, bar, clear, draw, is_live, is_of_others, left

T = TypeVar("T")
LINE_S = 5.0  # between two lines


class Progress:
    """How far a task is: call it with (done, total), or `add` to what is done. It is gone once all is done, or closed.

    `items` is the plural of what is counted.
    """

    def __init__(self, task: str, items: str = "images", total: int = 0, interval: float = LINE_S):
        self.task, self.items, self.total, self.interval = task, items, total, interval
        self.start = self.last_print = time.monotonic()
        self.first: int | None = None  # what was done before
        self.done = 0

    def add(self, count: int) -> None:
        self.first = self.first or 0
        self(self.done + count, self.total)

    def __call__(self, done: int, total: int) -> None:
        """So many of all are done. What the first call tells was done earlier, and says nothing of the speed."""
        if self.first is None:
            self.first, self.start = done, time.monotonic()
        self.done, self.total = done, total
        if done >= total:
            self.close()
        elif is_live():
            draw(self, self._bar)
        elif time.monotonic() - self.last_print >= self.interval and not is_of_others():
            self.last_print = time.monotonic()
            run.say(", ".join([f"{self.task}: {self.done:,} of {self.total:,} {self.items}", *self._pace()]))

    def _pace(self) -> list[str]:
        """The speed and the time left, once they are known."""
        done, seconds = self.done - (self.first or 0), time.monotonic() - self.start
        if done <= 0 or seconds <= 0:
            return []
        rate = done / seconds
        speed = f"{float(f'{rate:.3g}'):,.0f}" if rate >= 10 else f"{rate:.2g}"
        return [f"{speed} a second", left((self.total - self.done) / rate)]

    def _bar(self) -> Fitted:
        return bar(self.task, self.done, self.total, f"{self.done:,} of {self.total:,} {self.items}", *self._pace())

    def close(self) -> None:
        clear(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def watched(values: Sequence[T], task: str, items: str) -> Iterator[T]:
    """The values one after the other, while it is shown how many are done."""
    with Progress(task, items, len(values)) as progress:
        for value in values:
            yield value
            progress.add(1)
