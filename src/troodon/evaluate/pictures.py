"""Pictures of features: what the patches of some images have in common, and which images lie near which."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from troodon.evaluate.features import FrozenFeatures
from troodon.images.decode import decode, shown
from troodon.images.index import Index
from troodon.run import write_bytes
from troodon.search.exact import top_k

# Shape suffixes: B images, h w rows and columns of patches, D channels, T patches of all images, K neighbours.

WIDTH = 1000  # pixels of a picture
PAGE, INK, QUIET = (255, 255, 255), (34, 34, 40), (120, 120, 130)
RIGHT, WRONG, FRAME = (38, 150, 90), (208, 62, 62), 4
PAIRS = 3  # images beside one another in the picture of patches
NEIGHBOURS = 7


def pca_picture(backbone: Any, images: Sequence[np.ndarray], path: Path, *, foreground: bool = False) -> None:
    """Images as the network sees them, each beside its patches in the colours of their principal components.

    Components are of all patches of all images together, so a colour means the same everywhere. Their first three
    are red, green and blue; with `foreground`, the first one divides objects from what lies at the border, which
    stays dark, and the next three, of the objects alone, are the colours (paper, section 7.6).
    """
    with torch.inference_mode():
        prepared = backbone.prepare(images)
        patches_BhwD = backbone.features(prepared).patches.float().cpu().numpy()
    seen = _seen(backbone, prepared)
    colours_Bhw3 = pca_colours(patches_BhwD, foreground=foreground)
    gap, between = 4, 16
    cell = (WIDTH - between * (PAIRS + 1) - gap * PAIRS) // (2 * PAIRS)
    size = (cell, round(cell * prepared.shape[2] / prepared.shape[3]))
    rows = -(-len(images) // PAIRS)
    page = Image.new("RGB", (WIDTH, between + rows * (size[1] + between)), PAGE)
    for place, (image, colours_hw3) in enumerate(zip(seen, colours_Bhw3, strict=True)):
        row, column = divmod(place, PAIRS)
        x, y = between + column * (2 * cell + gap + between), between + row * (size[1] + between)
        page.paste(Image.fromarray(shown(image)).resize(size, Image.Resampling.BICUBIC), (x, y))
        page.paste(Image.fromarray(colours_hw3).resize(size, Image.Resampling.BICUBIC), (x + cell + gap, y))
    _save(page, path)


def pca_colours(patches_BhwD: np.ndarray, *, foreground: bool = False) -> np.ndarray:
    """uint8 (B, h, w, 3): three principal components of all patches together, each stretched over [0, 255]."""
    x_TD = patches_BhwD.reshape(-1, patches_BhwD.shape[-1]).astype(np.float64)
    shown_T = np.ones(len(x_TD), dtype=bool)
    if foreground:
        first_Bhw = _components(x_TD, 1)[:, 0].reshape(patches_BhwD.shape[:3])
        border = np.concatenate([first_Bhw[:, [0, -1]].ravel(), first_Bhw[:, :, [0, -1]].ravel()])
        shown_T = (first_Bhw * (1 if border.mean() <= 0 else -1)).ravel() > 0
    values_T3 = np.zeros((len(x_TD), 3))
    if shown_T.any():
        values = _components(x_TD[shown_T], 3)
        low, high = np.percentile(values, [1, 99], axis=0)
        values_T3[shown_T] = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    return (values_T3 * 255).round().astype(np.uint8).reshape(*patches_BhwD.shape[:3], 3)


def neighbours_picture(
    train: Index,
    val: Index,
    features: tuple[FrozenFeatures, FrozenFeatures],
    path: Path,
    *,
    queries: Sequence[int] | None = None,
) -> None:
    """In each row a validation image, and the training images nearest to it, with their cosines.

    The frame says whether the classes agree, where both have one. `queries` are positions in the validation
    features; if not said, six, spread over the classes.
    """
    near, far = features
    if queries is None:
        queries = spread([val.table["label"][int(row)].as_py() for row in far.rows], 6)
    score_MK, row_MK = top_k(far.final_ND[queries], near.final_ND, NEIGHBOURS)
    edge, gap, apart, line = 16, 8, 24, 22
    cell = (WIDTH - 2 * edge - apart - (NEIGHBOURS - 1) * gap) // (NEIGHBOURS + 1)
    page = Image.new("RGB", (WIDTH, edge + len(queries) * (cell + line + gap)), PAGE)
    for place, (query, scores_K, rows_K) in enumerate(zip(queries, score_MK, row_MK, strict=True)):
        y, row = edge + place * (cell + line + gap), int(far.rows[query])
        mine = val.table["label"][row].as_py()
        _thumbnail(page, (edge, y), cell, decode(val.read(row), channels=None), None, mine or "", INK)
        for rank, (score, position) in enumerate(zip(scores_K, rows_K, strict=True)):
            row = int(near.rows[position])
            label = train.table["label"][row].as_py()
            frame = None if None in (mine, label) else RIGHT if label == mine else WRONG
            words = f"{score:.2f}" if label is None or label == mine else f"{score:.2f}  {label}"
            x = edge + cell + apart + rank * (cell + gap)
            _thumbnail(page, (x, y), cell, decode(train.read(row), channels=None), frame, words, QUIET)
    _save(page, path)


def spread(labels: Sequence[str | None], most: int) -> list[int]:
    """At most `most` positions, of as many classes as there are, in the order of the classes."""
    order = sorted(range(len(labels)), key=lambda i: labels[i] or "")
    return [order[i] for i in np.unique(((np.arange(most) + 0.5) * len(order) / most).astype(int))]


def _components(x_TD: np.ndarray, count: int) -> np.ndarray:
    """The first principal components (T, count) of rows; their signs are settled by the largest channel."""
    x_TD = x_TD - x_TD.mean(0)
    _, axes_DD = np.linalg.eigh(x_TD.T @ x_TD)
    axes_DC = axes_DD[:, ::-1][:, :count]
    axes_DC = axes_DC * np.sign(np.take_along_axis(axes_DC, np.abs(axes_DC).argmax(0)[None], 0))
    found = x_TD @ axes_DC
    return np.pad(found, ((0, 0), (0, count - found.shape[1])))


def _seen(backbone: Any, prepared: torch.Tensor) -> np.ndarray:
    """uint8 (B, H, W, C) of prepared images: without the normalisation that the backbone says it does."""
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
    words: str,
    ink: tuple,
) -> None:
    """The central square of an image, in a frame, with one line of words below it."""
    image, (x, y), draw = Image.fromarray(shown(pixels)), corner, ImageDraw.Draw(page)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((cell, cell), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    page.paste(image, corner)
    if frame is not None:
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=frame, width=FRAME)
    font = ImageFont.load_default(13)
    if font.getlength(words) > cell:
        while words and font.getlength(f"{words}…") > cell:
            words = words[:-1]
        words = f"{words.rstrip()}…"
    draw.text((x, y + cell + 3), words, fill=ink, font=font)


def _save(page: Image.Image, path: Path) -> None:
    data = io.BytesIO()
    page.save(data, "PNG")
    write_bytes(path, data.getvalue())
