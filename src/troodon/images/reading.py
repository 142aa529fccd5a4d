"""Read images in order by threads, which also prepare them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from troodon.images.decode import BadImage
from troodon.images.index import Index
from troodon.stream import map_ordered as map_ordered  # for those who read
from troodon.stream import prepared_batches


def listed(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """What was prepared of single images, as one list."""
    return [one for part in parts for one in part]


def read_batches(
    index: Index,
    batch: int,
    prepare: Callable[[list[np.ndarray]], Any],
    *,
    join: Callable[[list[Any]], Any] = listed,
    channels: int | None = 3,
    threads: int = 0,
    broken: dict[int, BadImage] | None = None,
) -> Iterator[tuple[list[int], Any]]:
    """Yield all readable images in order, `batch` rows at a time: their rows, and what `prepare` makes of their pixels.

    Threads call `prepare` with a few images of a batch, and one thread calls `join` with what it returned for all of
    these: both run ahead, while a batch is used, so neither may depend on what is done with batches.

    Images that cannot be read, or do not have `channels` channels, are skipped and recorded in `broken`, by row.
    """
    broken = {} if broken is None else broken

    def load(rows: Sequence[int]) -> tuple[list[int], Any] | None:
        images = dict[int, np.ndarray]()
        for row in rows:
            try:
                images[row] = index.decode(row, channels)
            except BadImage as error:
                broken[row] = error
            except OSError as error:
                broken[row] = BadImage("decode error", str(error))
        return (list(images), prepare(list(images.values()))) if images else None

    def joined(parts: list[tuple[list[int], Any] | None]) -> tuple[list[int], Any] | None:
        found = [part for part in parts if part is not None]
        return (listed([rows for rows, _ in found]), join([prepared for _, prepared in found])) if found else None

    batches = prepared_batches(range(len(index)), batch, load, joined, index.thread_count(threads))
    yield from (each for each in batches if each is not None)
