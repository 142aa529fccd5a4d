"""Images whose class tokens are near to those of others."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from troodon.evaluate.show.sheet import Sheet, Tile, draw
from troodon.evaluate.show.views import Picture, View, read_pictures
from troodon.images.decode import BadImage, to_rgb
from troodon.images.index import Index
from troodon.images.reading import read_batches
from troodon.model.backbone import Backbone
from troodon.run import say
from troodon.search.exact import top_k

# Shape suffixes: N images, D channels.

CELL = 120
SAME, OTHER = (0, 114, 178), (213, 94, 0)  # blue and orange, which colour-blind people tell apart
BATCH = 64
GONE = np.full((8, 8, 3), 200, np.uint8)  # in place of an image that is no longer there


def find(
    backbone: Backbone,
    index: Index,
    queries: Sequence[Picture],
    view: View,
    k: int,
    progress: Callable[[int, int], None],
) -> tuple[list[list[dict]], dict[int, BadImage]]:
    """The k images of an index nearest to each query, as `nearest_images` gives them, and its unreadable images."""
    broken: dict[int, BadImage] = {}

    def encode(images: Sequence[np.ndarray]) -> Any:
        return backbone.features(images, **view.options).cls.float().cpu()

    rows, parts = [], []
    for batch_rows, images in read_batches(index, BATCH, list, channels=backbone.channels, broken=broken):
        rows += batch_rows
        parts.append(encode(images).numpy())
        progress(batch_rows[-1] + 1, len(index))
    if not parts:
        return [[] for _ in queries], broken
    scores, nearest = top_k(encode([q.pixels_HWC for q in queries]).numpy(), np.concatenate(parts), k)
    return [
        [
            {"id": row, "path": index.path(row), "label": index.table["label"][row].as_py(), "score": float(score)}
            for row, score in zip((rows[i] for i in row_k), score_k, strict=True)
        ]
        for row_k, score_k in zip(nearest, scores, strict=True)
    ], broken


def neighbours(
    backbone: Backbone, index: Index, queries: Sequence[Picture], found: Sequence[Sequence[dict]], sizes: str
) -> tuple[Image.Image, dict[str, Any]]:
    """A row for each query: the query, and the images found for it, the nearest first; and the same as numbers."""
    rows, is_labelled = [], False
    for query, nearest in zip(queries, found, strict=True):
        row: list[Tile | None] = [_tile(query, "query: ")]
        for image in nearest:
            both = None not in (query.label, image["label"])
            is_labelled |= both
            frame = (SAME if query.label == image["label"] else OTHER) if both else None
            pictures, broken = read_pictures(index, [image["id"]], backbone.channels)
            if broken:  # gone since it was embedded
                say(f"show neighbours: {broken[0]}")
                pictures = [Picture(image["path"], image["label"], GONE)]
            row.append(_tile(pictures[0], f"{image['score']:.3f} ", frame))
        rows.append(row)
    notes = [
        f"{backbone.name}: {sizes}. Among {len(index):,} images; the number is the cosine of the class tokens, and the "
        "nearest stand first."
    ]
    swatches = ((SAME, "same class"), (OTHER, "another class")) if is_labelled else ()
    sheet = Sheet("Nearest images", notes, rows, CELL, swatches=swatches)
    listed = [{"query": q.path, "label": q.label, "nearest": list(n)} for q, n in zip(queries, found, strict=True)]
    return draw(sheet), {"images": len(index), "queries": listed}


def _tile(picture: Picture, before: str, frame: tuple[int, int, int] | None = None) -> Tile:
    words = picture.path if picture.label is None else f"{picture.label}: {picture.path}"
    return Tile(Image.fromarray(to_rgb(picture.pixels_HWC)), f"{before}{words}", frame)
