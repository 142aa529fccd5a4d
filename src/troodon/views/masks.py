"""Block masks of the global crops, for the patch objective (section 4 of https://arxiv.org/abs/2106.08254 and of
https://arxiv.org/abs/2304.07193).

Pure functions of the grid of patches and a random generator.
"""

import math

import numpy as np
import torch
from torch import Tensor

from troodon.views.config import MasksConfig

# Shape suffixes: N global crops, P patches of a crop, h and w patches along the sides of its grid.

MIN_BLOCK_PATCHES = 4  # patches of a block
MIN_ASPECT = 0.3  # height over width of a block; the other extreme is its inverse
MAX_TRIES = 10  # blocks to draw before the mask is left as it is


def draw_masks(count: int, grid: tuple[int, int], config: MasksConfig, random: np.random.Generator) -> Tensor:
    """The masks of one step's `count` global crops: bool (count, h * w), True where the student sees a mask token.

    Exactly int(count * share) crops get one. The range of ratios is cut into as many equal slices, with one mask from
    each, so every step sees small and large masks; which crop gets which is shuffled.
    """
    masked = int(count * config.share)
    edges = np.linspace(*config.ratio, masked + 1)
    ratios = edges[:-1] + np.diff(edges) * random.random(masked)
    masks_Nhw = np.zeros((count, *grid), dtype=bool)
    for row, ratio in zip(random.permutation(count)[:masked], ratios):
        masks_Nhw[row] = block_mask(grid, int(grid[0] * grid[1] * ratio), random)
    return torch.from_numpy(masks_Nhw.reshape(count, grid[0] * grid[1]))


def block_mask(grid: tuple[int, int], target: int, random: np.random.Generator) -> np.ndarray:
    """At most `target` patches covered by rectangles, which may overlap: bool (h, w).

    A rectangle is smaller than the grid on both sides, so a grid of one row gets none, and a few patches rarely one.
    When no try fits into what is left, the mask stays short: one in thirteen on a 16 x 16 grid, by one to three.
    """
    mask_hw = np.zeros(grid, dtype=bool)
    left = target
    while left > 0:
        added = _add_block(mask_hw, left, random.random((MAX_TRIES, 4)).tolist())
        if not added:
            break
        left -= added
    return mask_hw


def _add_block(mask_hw: np.ndarray, most: int, numbers: list[list[float]]) -> int:
    """Add the first of the drawn blocks that covers between 1 and `most` new patches; how many it does, or 0."""
    height, width = mask_hw.shape
    for size, shape, down, across in numbers:
        area = MIN_BLOCK_PATCHES + (most - MIN_BLOCK_PATCHES) * size
        aspect = MIN_ASPECT ** (2 * shape - 1)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
            block_hw = mask_hw[top : top + h, left : left + w]
            new = h * w - int(np.count_nonzero(block_hw))
            if 0 < new <= most:
                block_hw[:] = True
                return new
    return 0
