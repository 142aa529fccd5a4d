"""Does a thing stand out from its picture, though nobody said what to look for? One box for each image, by its patches.

As LOST does it (https://arxiv.org/abs/2109.14279, section 3): the patch that is like the fewest others begins a thing,
and those like it and its kind that touch it are the rest. It compares keys; here they are patches of the last block,
less their mean over the picture, without which all would be alike.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.features import Reader, same_images, told
from troodon.evaluate.maps import normalised, resize, tokens, window_side
from troodon.evaluate.metrics import interval
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import Benchmark
from troodon.images.decode import BadImage

# Shape suffixes: P patches, D channels, h w patches of a side, K things of an image.

SEEDS = 0.1  # of the patches may extend the first one: 100 of about a thousand in the paper
FITS = 0.5  # a box fits a thing whose intersection with it is more than this share of their union


def discover(backbone: Any, benchmark: Benchmark, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """The share of images whose box fits any of their things (CorLoc). Nothing for data that says no boxes."""
    rows = [row for row, things_K4 in enumerate(benchmark.objects) if len(things_K4)]
    if not rows:
        return
    index, patch = benchmark.images.take(np.asarray(rows)), backbone.config.patch
    side, last = window_side(backbone, config.dense.side), (backbone.config.depth - 1,)
    broken: dict[int, BadImage] = {}
    fits, whole = [], []
    for rows_B, images in reader.images(backbone, index, range(len(index)), broken):
        for row, image in zip(rows_B, images):
            height, width = image.shape[:2]
            cells = [max(1, round(length * side / min(height, width) / patch)) for length in (height, width)]
            seen = normalised(backbone, resize(image, (cells[0] * patch, cells[1] * patch))[None])
            box_4 = box_of(tokens(backbone, seen, last)[0][0, 0].float()) * np.tile([width, height], 2)
            things_K4 = benchmark.objects[rows[row]]
            fits.append(overlap(box_4, things_K4).max() > FITS)
            whole.append(overlap(np.array([0.0, 0.0, width, height]), things_K4).max() > FITS)
    told({index.path(row): str(error) for row, error in broken.items()}, len(fits), len(index))
    settings = {
        "images": len(fits), "shorter side": side, "features": "patches of the last block, less their mean",
        "a box of the whole picture": float(np.mean(whole)),
        "interval": f"95 %, bootstrap over images, {config.resamples} resamples",
    }  # fmt: skip
    like = likeness(backbone, same_images(index), side=side, seeds=SEEDS, fits=FITS)
    low, high = interval(np.array(fits), config.resamples, config.seed)
    yield Result("discover", benchmark.name, "corloc", float(np.mean(fits)), low, high, settings, like)


def box_of(patches_hwD: Tensor) -> np.ndarray:
    """Left, top, right and bottom of the thing that stands out, as shares of the width and the height."""
    h, w = patches_hwD.shape[:2]
    x_PD = patches_hwD.flatten(0, 1)
    x_PD = x_PD - x_PD.mean(0)
    alike_PP = x_PD @ x_PD.T
    fewest = (alike_PP > 0).sum(1).argsort(stable=True)[: max(1, round(SEEDS * h * w))]
    first = fewest[0]
    kind = fewest[alike_PP[first, fewest] > 0]
    thing_hw = (alike_PP[:, kind].sum(1) > 0).view(h, w)
    thing_hw.view(-1)[first] = True
    part_hw, _ = ndimage.label(thing_hw.numpy())  # what touches by its sides is one part
    grown_hw = torch.from_numpy(part_hw == part_hw.flat[int(first)])
    ys, xs = (torch.nonzero(grown_hw.any(d)).flatten() for d in (1, 0))
    return np.array([xs[0] / w, ys[0] / h, (xs[-1] + 1) / w, (ys[-1] + 1) / h])


def overlap(box_4: np.ndarray, others_K4: np.ndarray) -> np.ndarray:
    """Intersection over union (K,) of a box with others: left, top, right, bottom."""
    inside_K2 = np.minimum(box_4[2:], others_K4[:, 2:]) - np.maximum(box_4[:2], others_K4[:, :2])
    both_K = inside_K2.clip(0).prod(1)
    return both_K / ((box_4[2:] - box_4[:2]).prod() + (others_K4[:, 2:] - others_K4[:, :2]).prod(1) - both_K)
