"""The images that training reads, by row number: what it needs of an index, wherever the images lie."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np


class ImageSource(Protocol):
    """An images.index.Index, as training sees it."""

    @property
    def source_lengths(self) -> tuple[int, ...]: ...  # rows that come from each source; () if all are from one

    @property
    def fingerprint(self) -> str | None: ...  # of the artifact that lists the images on the disk

    @property
    def mapped_path(self) -> Path | None: ...  # the file that lists very many images

    @property
    def packing_helps(self) -> bool: ...

    def __len__(self) -> int: ...

    def path(self, row: int) -> str: ...

    def decode(
        self, row: int, channels: int | None, reduction: Callable[[int, int], int] | None
    ) -> np.ndarray: ...  # pixels, uint8 (H, W, channels); OSError or BadImage if the image cannot be read

    def column(self, name: str) -> list: ...

    def thread_count(self, threads: int) -> int: ...  # that read images; 0 is as many as suit the source

    def with_times(self) -> "ImageSource": ...  # the same, to be saved with the times when the files were changed

    def first_changed(self, path: Path) -> str | None: ...  # a file that has changed since these were saved there

    def save(self, path: Path) -> None: ...
