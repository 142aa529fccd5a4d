"""Patches of two images that are each other's nearest."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from troodon.evaluate.show.sheet import DENSITY, WHITE, Sheet, Tile, draw, in_cell, scale_colours
from troodon.evaluate.show.views import Picture, View, shown
from troodon.model.backbone import Backbone
from troodon.search.exact import l2_normalise

# Shape suffixes: h w rows and columns of patches, P Q patches of the two images, D channels, M matches.

CELL, APART = 440, 40  # an image, and the space between the two
DARK = (20, 20, 24)


def mutual_nearest(
    first_PD: np.ndarray, second_QD: np.ndarray, above: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that are each other's nearest by cosine, of at least `above`, the best first: rows, rows and cosine (M,).

    Among equal cosines the first patch is the nearest.
    """
    cosine_PQ = l2_normalise(first_PD) @ l2_normalise(second_QD).T
    nearest_P, nearest_Q = cosine_PQ.argmax(1), cosine_PQ.argmax(0)
    i_M = np.flatnonzero(nearest_Q[nearest_P] == np.arange(len(first_PD)))
    score_M = cosine_PQ[i_M, nearest_P[i_M]]
    order = np.argsort(-score_M, kind="stable")
    order = order[score_M[order] >= above]
    return i_M[order], nearest_P[i_M[order]], score_M[order]


def matches(
    backbone: Backbone, pictures: Sequence[Picture], view: View, *, above: float, count: int
) -> tuple[Image.Image, dict[str, Any]]:
    """Two images side by side with lines between the patches that match, at most the best `count`; and all as numbers.

    The positions of a match are the row and the column of each patch.
    """
    grids = [
        hwD.float().cpu().numpy() for hwD in backbone.features([p.pixels_HWC for p in pictures], **view.options).patches
    ]
    dim = backbone.config.dim
    i_M, j_M, score_M = mutual_nearest(grids[0].reshape(-1, dim), grids[1].reshape(-1, dim), above)
    at = [np.stack(np.unravel_index(rows, hwD.shape[:2]), 1) for rows, hwD in zip((i_M, j_M), grids, strict=True)]
    images = [shown(backbone, p, view, CELL * DENSITY) for p in pictures]
    images = [image.resize(in_cell(image.size, CELL), Image.Resampling.LANCZOS) for image in images]
    both = Image.new("RGB", ((2 * CELL + APART) * DENSITY, max(i.height for i in images)), "white")
    lefts = (0, (CELL + APART) * DENSITY)
    for image, left in zip(images, lefts, strict=True):
        both.paste(image, (left, 0))
    ends = [
        (at_M2[:, ::-1] + 0.5) / hwD.shape[1::-1] * image.size + (left, 0)
        for at_M2, hwD, image, left in zip(at, grids, images, lefts, strict=True)
    ]
    drawn = min(count, len(score_M))
    low, high = (float(score_M[drawn - 1]), float(score_M[0])) if drawn else (above, 1.0)
    _draw_lines(both, ends, (score_M - low) / max(high - low, 1e-6), drawn)
    fewer = f"; the best {drawn:,} are drawn" if drawn < len(score_M) else ""
    sizes = " and ".join(f"{hwD.shape[0] * hwD.shape[1]:,}" for hwD in grids)
    notes = [
        f"{backbone.name}: {view.sizes(backbone)}. Of {sizes} patches, {len(score_M):,} pairs are each other's "
        f"nearest, with a cosine of {above:g} or more{fewer}.",
        f"Left: {pictures[0].path}",
        f"Right: {pictures[1].path}",
    ]
    digits = 2 if high - low >= 0.05 else 4
    scale = (f"cosine {low:.{digits}f}", f"{high:.{digits}f}") if drawn else None
    listed = [
        {"score": float(s), "first": a.tolist(), "second": b.tolist()} for s, a, b in zip(score_M, *at, strict=True)
    ]
    sheet = Sheet("Patches that match", notes, [[Tile(both)]], 2 * CELL + APART, scale=scale)
    return draw(sheet), {
        "images": [{"path": p.path, "grid": list(hwD.shape[:2])} for p, hwD in zip(pictures, grids, strict=True)],
        "above": above, "drawn": drawn, "matches": listed,
    }  # fmt: skip


def _draw_lines(page: Image.Image, ends: Sequence[np.ndarray], value_M: np.ndarray, count: int) -> None:
    """Lines with edges of the other brightness, so that they are seen on any image; the best last, above the others."""
    pen = ImageDraw.Draw(page)
    for m in reversed(range(count)):
        a, b, colour = tuple(ends[0][m]), tuple(ends[1][m]), tuple(scale_colours(value_M[m : m + 1])[0].tolist())
        edge = DARK if value_M[m] > 0.4 else WHITE
        pen.line([a, b], fill=edge, width=3 * DENSITY)
        pen.line([a, b], fill=colour, width=round(1.5 * DENSITY))
        for x, y in (a, b):
            r = 3.5 * DENSITY
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=edge, width=DENSITY)
