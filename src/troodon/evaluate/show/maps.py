"""Maps over the patches of images: principal components of their features, and what is attended to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from troodon.evaluate.components import patch_colours
from troodon.evaluate.show.sheet import DENSITY, Sheet, Tile, draw, in_cell, scale_colours
from troodon.evaluate.show.views import Picture, View, enlarged, shown
from troodon.model.backbone import Backbone

# Shape suffixes: h w rows and columns of patches, D channels, N heads, Q class token and registers.

PAIRS = 3  # images in a row of the sheet of components
CELL, SMALL_CELL = 168, 112
HEADS = 8  # heads in a row of the sheet of attention
SHARE = 0.3  # of the image in an overlay


def pca(
    backbone: Backbone, pictures: Sequence[Picture], view: View, *, background: bool
) -> tuple[Image.Image, dict[str, Any]]:
    """Each image beside the principal components of its patch tokens as colours, and the numbers.

    Components, signs and foreground are those of `patch_colours`, over all images together.
    """
    patches = backbone.features([p.pixels_HWC for p in pictures], **view.options).patches
    found = patch_colours([hwD.float().cpu().numpy() for hwD in patches], foreground=not background)
    tiles = []
    for picture, colours_hw3, is_front_hw in zip(pictures, found.colours, found.foreground, strict=True):
        image = shown(backbone, picture, view, CELL * DENSITY)
        share = "" if background else f"foreground {100 * is_front_hw.mean():.0f} %"
        tiles += [Tile(image, picture.path), Tile(enlarged(colours_hw3, in_cell(image.size, CELL)), share)]
    percents = ", ".join(f"{100 * share:.1f} %" for share in found.variance)
    of = "the variance" if background else "the variance of the foreground"
    notes = [
        f"{backbone.name}: {view.sizes(backbone)}. Red, green and blue are the first three components of the patch "
        f"tokens of all images together; they explain {percents} of {of}."
    ]
    if not background:
        notes.append("Black is background: the side of the first component that lies more at the borders of images.")
    rows = [tiles[i : i + 2 * PAIRS] for i in range(0, len(tiles), 2 * PAIRS)]
    sheet = Sheet("Principal components of patch tokens", notes, rows, CELL)
    images = [
        {"path": p.path, "grid": list(front.shape), "foreground": float(front.mean())}
        for p, front in zip(pictures, found.foreground, strict=True)
    ]
    return draw(sheet), {"explained_variance": [float(v) for v in found.variance], "images": images}


def attention(
    backbone: Backbone, pictures: Sequence[Picture], view: View, *, block: int
) -> tuple[Image.Image, dict[str, Any]]:
    """What the class token and each register attend to in a block: the mean of the heads, and each head; and numbers.

    Each map is drawn over its image, from 0 to the largest value in it, which stands below it.
    """
    (block,) = backbone.block_numbers([block])
    maps = backbone.attention([p.pixels_HWC for p in pictures], block=block, **view.options)
    tokens = ["class token", *(f"register {i + 1}" for i in range(backbone.config.registers))]
    rows, images = [], []
    for picture, weights_NQhw in zip(pictures, maps, strict=True):
        image = shown(backbone, picture, view, SMALL_CELL * DENSITY)
        for number, token in enumerate(tokens):
            weights_Nhw = weights_NQhw[:, number].float().cpu().numpy()
            rows += _attention_rows(image, picture.path if not number else "", token, weights_Nhw)
            images.append({
                "path": picture.path, "token": token, "grid": list(weights_Nhw.shape[1:]),
                "patches": [float(hw.sum()) for hw in weights_Nhw], "max": [float(hw.max()) for hw in weights_Nhw],
            })  # fmt: skip
    notes = [
        f"{backbone.name}: {view.sizes(backbone)}. Block {block} of 0 to {backbone.config.depth - 1}, "
        f"{backbone.config.heads} heads. The number below a map is its largest value: what one patch gets of all that "
        "the token attends to."
    ]
    heads = ["image", "mean", *(f"head {i}" for i in range(min(HEADS, backbone.config.heads)))]
    if backbone.config.heads > HEADS:
        heads = ["image", "mean", "heads, in order"]
    sheet = Sheet("Attention to patches", notes, rows, SMALL_CELL, heads, scale=("0", "largest value of the map"))
    return draw(sheet), {"block": block, "images": images}


def _attention_rows(image: Image.Image, path: str, token: str, weights_Nhw: np.ndarray) -> list[list[Tile | None]]:
    """The tiles of one token: the image, the mean of the heads, and the heads, over several rows if they are many."""
    maps = [_overlay(image, weights_Nhw.mean(0), f"{token}, "), *(_overlay(image, hw) for hw in weights_Nhw)]
    first: list[Tile | None] = [Tile(image, path) if path else None, *maps[: 1 + HEADS]]
    more = [[None, None, *maps[i : i + HEADS]] for i in range(1 + HEADS, len(maps), HEADS)]
    return [first, *more]


def _overlay(image: Image.Image, weights_hw: np.ndarray, before: str = "") -> Tile:
    most = float(weights_hw.max())
    colours = enlarged(scale_colours(weights_hw / (most or 1)), image.size)
    return Tile(Image.blend(colours, image.convert("L").convert("RGB"), SHARE), f"{before}{100 * most:.1f} %")
