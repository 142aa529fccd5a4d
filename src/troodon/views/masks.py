"""Block masks of the global crops for the patch objective (section 4 of https://arxiv.org/abs/2106.08254 and of
https://arxiv.org/abs/2304.07193).

Pure functions of the grid of patches and of random generators.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from troodon.views.config import MasksConfig

# Shape suffixes: N global crops, P patches of a crop, h and w patches along the sides of its grid.

MIN_BLOCK_PATCHES = 4
MIN_ASPECT = 0.3  # height over width of a block; the maximum is its inverse
MAX_TRIES = 10  # blocks that are drawn before the mask is left incomplete


def draw_sizes(count: int, grid: tuple[int, int], config: MasksConfig, random: np.random.Generator) -> np.ndarray:
    """How many patches the masks of `count` global crops are to cover: integers (count,), 0 for no mask.

    Exactly int(count * share) crops get a mask. The range of ratios is divided into as many equal slices, with one mask
    from each, so that every step has small and large masks; they are assigned to crops at random.
    """
    mask_count = int(count * config.share)
    edges = np.linspace(*config.ratio, mask_count + 1)
    ratios = edges[:-1] + np.diff(edges) * random.random(mask_count)
    sizes_N = np.zeros(count, int)
    sizes_N[random.permutation(count)[:mask_count]] = grid[0] * grid[1] * ratios
    return sizes_N


def draw_masks(
    sizes_N: np.ndarray, crops: Sequence[int], grid: tuple[int, int], random: Callable[[int], np.random.Generator]
) -> Tensor:
    """Draw the masks of these of N global crops: bool (crops, h * w), True where the student sees the mask token.

    `random` has a generator for each crop, so the mask of a crop does not depend on which others are drawn.
    """
    masks_Nhw = np.zeros((len(crops), *grid), dtype=bool)
    for mask_hw, crop in zip(masks_Nhw, crops):
        if sizes_N[crop]:
            mask_hw[:] = block_mask(grid, sizes_N[crop], random(crop))
    return torch.from_numpy(masks_Nhw.reshape(len(crops), grid[0] * grid[1]))


def block_mask(grid: tuple[int, int], target: int, random: np.random.Generator) -> np.ndarray:
    """Draw a mask of rectangles, which may overlap, that cover at most `target` patches: bool (h, w).

    A rectangle is smaller than the grid on both sides, so a grid of one row gets none, and a tiny grid rarely one. If
    no rectangle fits the remaining number, the mask is incomplete: one mask in thirteen on a 16 x 16 grid, by one to
    three patches.
    """
    mask_hw = np.zeros(grid, dtype=bool)
    remaining = target
    while remaining > 0:
        added = _add_block(mask_hw, remaining, random.random((MAX_TRIES, 4)).tolist())
        if not added:
            break
        remaining -= added
    return mask_hw


def _add_block(mask_hw: np.ndarray, limit: int, numbers: list[list[float]]) -> int:
    """Add the first of the drawn blocks that covers 1 to `limit` new patches; returns their number, or 0 for none."""
    height, width = mask_hw.shape
    for area_u, aspect_u, y_u, x_u in numbers:
        area = MIN_BLOCK_PATCHES + (limit - MIN_BLOCK_PATCHES) * area_u
        aspect = MIN_ASPECT ** (2 * aspect_u - 1)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(y_u * (height - h + 1)), int(x_u * (width - w + 1))
            block_hw = mask_hw[top : top + h, left : left + w]
            new = h * w - int(np.count_nonzero(block_hw))
            if 0 < new <= limit:
                block_hw[:] = True
                return new
    return 0
