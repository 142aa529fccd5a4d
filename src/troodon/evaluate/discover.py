"""Unsupervised object discovery: one box for each image, from its patch tokens.

The method is LOST (https://arxiv.org/abs/2109.14279, section 3): the seed is the patch that is similar to the fewest
others; the object is the connected component of the seed among the patches that are similar to the seeds. LOST compares
keys; here the patch tokens of the last block are compared, minus their mean over the image, without which all patches
would be similar.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.feature_maps import normalise, resize, tokens, window_side
from troodon.evaluate.features import Reader, dataset_fingerprint, report_unreadable
from troodon.evaluate.metrics import bootstrap_interval
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import Benchmark
from troodon.images.decode import BadImage

# Shape suffixes: P patches, D channels, h w patches per side, K objects of an image.

SEED_FRACTION = 0.1  # fraction of the patches that may extend the seed: 100 of about a thousand in the paper
MIN_IOU = 0.5  # a box is correct if its IoU with an object exceeds this


def discover(backbone: Any, benchmark: Benchmark, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """Yield the fraction of images whose box matches one of their objects (CorLoc). Nothing without boxes."""
    rows = [row for row, objects_K4 in enumerate(benchmark.objects) if len(objects_K4)]
    if not rows:
        return
    index, patch = benchmark.images.take(np.asarray(rows)), backbone.config.patch
    side, last = window_side(backbone, config.dense.side), (backbone.config.depth - 1,)
    broken: dict[int, BadImage] = {}
    correct, whole_image = [], []
    for rows_B, images in reader.images(backbone, index, range(len(index)), broken):
        for row, image in zip(rows_B, images):
            height, width = image.shape[:2]
            grid = [max(1, round(length * side / min(height, width) / patch)) for length in (height, width)]
            input_1CHW = normalise(backbone, resize(image, (grid[0] * patch, grid[1] * patch))[None])
            box_4 = discover_box(tokens(backbone, input_1CHW, last)[0][0, 0].float()) * np.tile([width, height], 2)
            objects_K4 = benchmark.objects[rows[row]]
            correct.append(iou(box_4, objects_K4).max() > MIN_IOU)
            whole_image.append(iou(np.array([0.0, 0.0, width, height]), objects_K4).max() > MIN_IOU)
    report_unreadable({index.path(row): str(error) for row, error in broken.items()}, len(correct), len(index), reader)
    settings = {
        "images": len(correct), "shorter side": side, "features": "patches of the last block, less their mean",
        "a box of the whole picture": float(np.mean(whole_image)),
        "interval": f"95 %, bootstrap over images, {config.resamples} resamples",
    }  # fmt: skip
    like = likeness(backbone, dataset_fingerprint(index), side=side, seeds=SEED_FRACTION, fits=MIN_IOU)
    low, high = bootstrap_interval(np.array(correct), config.resamples, config.seed)
    yield Result("discover", benchmark.name, "corloc", float(np.mean(correct)), low, high, settings, like)


def discover_box(patches_hwD: Tensor) -> np.ndarray:
    """Left, top, right and bottom of the discovered object, as fractions of the width and the height."""
    h, w = patches_hwD.shape[:2]
    x_PD = patches_hwD.flatten(0, 1)
    x_PD = x_PD - x_PD.mean(0)
    similarity_PP = x_PD @ x_PD.T
    candidates = (similarity_PP > 0).sum(1).argsort(stable=True)[: max(1, round(SEED_FRACTION * h * w))]
    seed = candidates[0]
    seeds = candidates[similarity_PP[seed, candidates] > 0]
    object_hw = (similarity_PP[:, seeds].sum(1) > 0).view(h, w)
    object_hw.view(-1)[seed] = True
    component_hw, _ = ndimage.label(object_hw.numpy())  # 4-connected components
    object_hw = torch.from_numpy(component_hw == component_hw.flat[int(seed)])
    ys, xs = (torch.nonzero(object_hw.any(d)).flatten() for d in (1, 0))
    return np.array([xs[0] / w, ys[0] / h, (xs[-1] + 1) / w, (ys[-1] + 1) / h])


def iou(box_4: np.ndarray, others_K4: np.ndarray) -> np.ndarray:
    """Intersection over union (K,) of a box with others: left, top, right, bottom."""
    sides_K2 = np.minimum(box_4[2:], others_K4[:, 2:]) - np.maximum(box_4[:2], others_K4[:, :2])
    both_K = sides_K2.clip(0).prod(1)
    return both_K / ((box_4[2:] - box_4[:2]).prod() + (others_K4[:, 2:] - others_K4[:, :2]).prod(1) - both_K)
