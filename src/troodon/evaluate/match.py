"""Patch matching between two views of each image, by cosine similarity.

The second view is a rotated crop of the first, so that the true position of each patch is known exactly. A patch of the
first view whose true position lies in the second view is matched to the patch with the nearest features. The match is
correct if it lies within a fraction of the side of the view (PCK, percentage of correct keypoints). No label is needed.

Colours alone match most patches of a view that is only moved. What features encode beyond colour shows when the light
of the second view is changed too.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.feature_maps import normalise, resize, tokens, window_side
from troodon.evaluate.features import Reader, dataset_fingerprint, report_unreadable
from troodon.evaluate.metrics import bootstrap_interval
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import Benchmark
from troodon.images.decode import BadImage

# Shape suffixes: B images, P patches, D channels, S pixels per side.

MIN_SCALE = 0.5  # minimum side of the second view, as a fraction of the first
MAX_ROTATION = 30  # degrees, in both directions
MAX_LIGHT_CHANGE = 0.5  # maximum absolute natural logarithm of the gain of each channel, and of the exponent


def match(backbone: Any, benchmark: Benchmark, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """Yield the fraction of correctly matched patches for each threshold. All images have the same weight.

    The second view is used as it is ("match"), and with changed light ("match_light").
    """
    rows = np.random.default_rng(config.seed).permutation(len(benchmark.images))[: config.match_images]
    index = benchmark.images.take(np.sort(rows))
    side, last = window_side(backbone, config.dense.side), (backbone.config.depth - 1,)
    broken: dict[int, BadImage] = {}
    distances: dict[str, list[np.ndarray]] = {"match": [], "match_light": []}
    for rows_B, images in reader.images(backbone, index, range(len(index)), broken):
        for row, image in zip(rows_B, images):
            first_CSS = resize(_centre_crop(image), (side, side))
            random = np.random.default_rng([config.seed, row])
            affine_23 = random_affine(random)
            second_CSS = warp(first_CSS, affine_23)
            x_3CSS = normalise(backbone, torch.stack([first_CSS, second_CSS, change_light(second_CSS, random)]))
            patches = tokens(backbone, x_3CSS, last)[0][:, 0].float()
            for of_protocol, second_hwD in zip(distances.values(), patches[1:]):
                of_protocol.append(match_distances(patches[0], second_hwD, affine_23))
    matched = len(distances["match"])
    report_unreadable({index.path(row): str(error) for row, error in broken.items()}, matched, len(index), reader)
    settings = {
        "images": matched, "window": side, "features": "patches of the last block, cosine",
        "views": f"the middle square; a part of it of {MIN_SCALE:g} to 1 of its side, "
                 f"turned up to {MAX_ROTATION} degrees",
        "interval": f"95 %, bootstrap over images, {config.resamples} resamples",
    }  # fmt: skip
    images = dataset_fingerprint(index)
    like = likeness(backbone, images, window=side, seed=config.seed, smallest=MIN_SCALE, turn=MAX_ROTATION)
    for protocol, distances_B in distances.items():
        light = {} if protocol == "match" else {"light": MAX_LIGHT_CHANGE}
        protocol_settings, protocol_like = settings | light, like | light
        for threshold in config.match_within:
            correct_B = np.array([float((x_P <= threshold).mean()) for x_P in distances_B if len(x_P)])
            low, high = bootstrap_interval(correct_B, config.resamples, config.seed)
            value, metric = float(correct_B.mean()), f"pck@{threshold:g}"
            yield Result(protocol, benchmark.name, metric, value, low, high, protocol_settings, protocol_like)


def random_affine(random: np.random.Generator) -> Tensor:
    """Random matrix (2, 3) from positions in the second view to positions in the first, both in [-1, 1]."""
    scale = random.uniform(MIN_SCALE, 1)
    angle = math.radians(random.uniform(-MAX_ROTATION, MAX_ROTATION))
    x, y = random.uniform(scale - 1, 1 - scale, 2)
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[cosine, -sine, x], [sine, cosine, y]], dtype=torch.float32)


def warp(first_CSS: Tensor, affine_23: Tensor) -> Tensor:
    """The second view, uint8. Outside of the first view its edge is repeated."""
    grid = F.affine_grid(affine_23[None], [1, *first_CSS.shape], align_corners=False)
    sampled = F.grid_sample(first_CSS[None].float(), grid, "bicubic", "border", align_corners=False)
    return sampled[0].round().clamp(0, 255).to(torch.uint8)


def change_light(view_CSS: Tensor, random: np.random.Generator) -> Tensor:
    """The view, uint8, with a random gain of each channel and a random exponent (gamma) of all."""
    gain_C11 = np.exp(random.uniform(-MAX_LIGHT_CHANGE, MAX_LIGHT_CHANGE, (len(view_CSS), 1, 1)))
    exponent = math.exp(random.uniform(-MAX_LIGHT_CHANGE, MAX_LIGHT_CHANGE))
    return (
        ((view_CSS / 255) ** exponent * torch.from_numpy(gain_C11).float() * 255).round().clamp(0, 255).to(torch.uint8)
    )


def match_distances(first_hwD: Tensor, second_hwD: Tensor, affine_23: Tensor) -> np.ndarray:
    """Distance of each match from the true position, in sides of a view, for patches whose true position is in view."""
    h, w = first_hwD.shape[:2]
    ys, xs = (2 * (torch.arange(n) + 0.5) / n - 1 for n in (h, w))
    position_P2 = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(-1, 2)
    target_P2 = (position_P2 - affine_23[:, 2]) @ torch.linalg.inv(affine_23[:, :2]).T
    visible_P = (target_P2.abs() <= 1).all(1)
    first_PD, second_PD = (F.normalize(x.flatten(0, 1), dim=1) for x in (first_hwD, second_hwD))
    nearest_P = (first_PD[visible_P] @ second_PD.T).argmax(1)
    return ((position_P2[nearest_P] - target_P2[visible_P]).norm(dim=1) / 2).numpy()


def _centre_crop(image_HWC: np.ndarray) -> np.ndarray:
    side = min(image_HWC.shape[:2])
    top, left = ((length - side) // 2 for length in image_HWC.shape[:2])
    return image_HWC[top : top + side, left : left + side]
