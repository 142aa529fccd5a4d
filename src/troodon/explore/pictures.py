"""Pictures of single images for the page: thumbnails and larger ones, as JPEG, the latest of them in memory."""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable

from PIL import Image

from troodon.images.decode import to_rgb
from troodon.images.index import Index

SIDES = {"small": 128, "medium": 320, "large": 1280}  # pixels of the longer side
CACHE_BYTES = 128 * 2**20


class Pictures:
    """JPEGs of the images of an index, by row."""

    def __init__(self, index: Index):
        self.index = index
        self.kept: OrderedDict[tuple[int, str], bytes] = OrderedDict()
        self.size, self.lock = 0, threading.Lock()
        self.decoding = threading.Semaphore(4)  # large images take memory while they are decoded

    def get(self, row: int, size: str, is_gone: Callable[[], bool] = lambda: False) -> bytes:
        """The image with a longer side of SIDES[size] pixels at most. Raises BadImage or OSError; ConnectionError where
        nobody waits for it any more, as for one that was scrolled past.
        """
        key = (row, size)
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        with self.decoding:
            if is_gone():
                raise ConnectionError("nobody waits for this picture")
            data = self._make(row, SIDES[size])
        with self.lock:
            if key not in self.kept:
                self.kept[key] = data
                self.size += len(data)
            while self.size > CACHE_BYTES:
                self.size -= len(self.kept.popitem(last=False)[1])
        return data

    def _make(self, row: int, side: int) -> bytes:
        def reduction(height: int, width: int) -> int:
            return next((times for times in (8, 4, 2) if max(height, width) >= 2 * times * side), 1)

        image = Image.fromarray(to_rgb(self.index.decode(row, None, reduction)))
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=82)
        return out.getvalue()
