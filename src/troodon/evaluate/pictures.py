"""Pictures of features: principal components of patch tokens, and nearest neighbours of images."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from troodon.evaluate.components import patch_colours
from troodon.evaluate.features import FrozenFeatures
from troodon.images.decode import to_rgb
from troodon.images.index import Index
from troodon.run import write_bytes
from troodon.search.exact import top_k

# Shape suffixes: B images, h w patches along height and width, D channels, K neighbours.

WIDTH = 1000  # of a picture, in pixels
WHITE, INK, GREY = (255, 255, 255), (34, 34, 40), (120, 120, 130)
RIGHT, WRONG, FRAME = (38, 150, 90), (208, 62, 62), 4
PAIRS = 3  # images per row in the PCA picture
NEIGHBOURS = 7


def draw_pca(backbone: Any, images: Sequence[np.ndarray], path: Path) -> None:
    """Draw each preprocessed image beside its patch tokens, coloured by their principal components.

    Components are computed over the patches of all images, so a colour means the same everywhere. The first three are
    red, green and blue.
    """
    with torch.inference_mode():
        prepared = backbone.prepare(images)
        patches_BhwD = backbone.features(prepared).patches.float().cpu().numpy()
    inputs = _denormalise(backbone, prepared)
    colours_Bhw3 = patch_colours([*patches_BhwD]).colours
    gap, margin = 4, 16
    cell = (WIDTH - margin * (PAIRS + 1) - gap * PAIRS) // (2 * PAIRS)
    size = (cell, round(cell * prepared.shape[2] / prepared.shape[3]))
    rows = -(-len(images) // PAIRS)
    page = Image.new("RGB", (WIDTH, margin + rows * (size[1] + margin)), WHITE)
    for position, (image, colours_hw3) in enumerate(zip(inputs, colours_Bhw3, strict=True)):
        row, column = divmod(position, PAIRS)
        x, y = margin + column * (2 * cell + gap + margin), margin + row * (size[1] + margin)
        page.paste(Image.fromarray(to_rgb(image)).resize(size, Image.Resampling.BICUBIC), (x, y))
        page.paste(Image.fromarray(colours_hw3).resize(size, Image.Resampling.BICUBIC), (x + cell + gap, y))
    _save(page, path)


def draw_neighbours(
    train: Index,
    val: Index,
    features: tuple[FrozenFeatures, FrozenFeatures],
    path: Path,
    *,
    queries: Sequence[int] | None = None,
) -> None:
    """Draw in each row a validation image and its nearest training images, with their cosines.

    The frame shows whether the classes agree, if both images have one. `queries` are positions in the validation
    features; the default is six positions spread over the classes.
    """
    train_features, val_features = features
    if queries is None:
        queries = spread_over_classes([val.table["label"][int(row)].as_py() for row in val_features.rows], 6)
    score_MK, row_MK = top_k(val_features.final_ND[queries], train_features.final_ND, NEIGHBOURS)
    edge, gap, query_gap, caption_height = 16, 8, 24, 22
    cell = (WIDTH - 2 * edge - query_gap - (NEIGHBOURS - 1) * gap) // (NEIGHBOURS + 1)
    page = Image.new("RGB", (WIDTH, edge + len(queries) * (cell + caption_height + gap)), WHITE)
    for position, (query, scores_K, rows_K) in enumerate(zip(queries, score_MK, row_MK, strict=True)):
        y, row = edge + position * (cell + caption_height + gap), int(val_features.rows[query])
        query_label = val.table["label"][row].as_py()
        _thumbnail(page, (edge, y), cell, val.decode(row, None), None, query_label or "", INK)
        for rank, (score, row_position) in enumerate(zip(scores_K, rows_K, strict=True)):
            row = int(train_features.rows[row_position])
            label = train.table["label"][row].as_py()
            frame = None if None in (query_label, label) else RIGHT if label == query_label else WRONG
            caption = f"{score:.2f}" if label is None or label == query_label else f"{score:.2f}  {label}"
            x = edge + cell + query_gap + rank * (cell + gap)
            _thumbnail(page, (x, y), cell, train.decode(row, None), frame, caption, GREY)
    _save(page, path)


def spread_over_classes(labels: Sequence[str | None], count: int) -> list[int]:
    """At most `count` positions, spread evenly over the classes, in the order of the classes."""
    order = sorted(range(len(labels)), key=lambda i: labels[i] or "")
    return [order[i] for i in np.unique(((np.arange(count) + 0.5) * len(order) / count).astype(int))]


def _denormalise(backbone: Any, prepared: torch.Tensor) -> np.ndarray:
    """Undo the normalisation of prepared images: uint8 (B, H, W, C)."""
    preprocessing = getattr(backbone, "preprocessing", None)
    x = prepared.float().cpu().permute(0, 2, 3, 1)
    if preprocessing is not None:
        x = x * torch.tensor(preprocessing.std) + torch.tensor(preprocessing.mean)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _thumbnail(
    page: Image.Image,
    corner: tuple[int, int],
    cell: int,
    pixels: np.ndarray,
    frame: tuple | None,
    caption: str,
    ink: tuple,
) -> None:
    """Draw the central square of an image, with a frame and one line of text below it."""
    image, (x, y), draw = Image.fromarray(to_rgb(pixels)), corner, ImageDraw.Draw(page)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((cell, cell), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    page.paste(image, corner)
    if frame is not None:
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=frame, width=FRAME)
    font = ImageFont.load_default(13)
    if font.getlength(caption) > cell:
        while caption and font.getlength(f"{caption}…") > cell:
            caption = caption[:-1]
        caption = f"{caption.rstrip()}…"
    draw.text((x, y + cell + 3), caption, fill=ink, font=font)


def _save(page: Image.Image, path: Path) -> None:
    data = io.BytesIO()
    page.save(data, "PNG")
    write_bytes(path, data.getvalue())
