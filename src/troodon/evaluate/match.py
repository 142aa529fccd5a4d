"""Do the patches of one view find their places in another? Two views of each image, matched by cosine.

The second view is a crop of the first, turned, so that where each patch went is known exactly. A patch of the first
view whose place lies in the second is matched to the patch nearest in features; it is right if that lies within a share
of the view's side (PCK). No label is needed.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.data.benchmarks import Benchmark
from troodon.data.decode import BadImage
from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.features import Reader, same_images, told
from troodon.evaluate.maps import normalised, resize, tokens, window_side
from troodon.evaluate.metrics import interval
from troodon.evaluate.results import Result, likeness

# Shape suffixes: B images, P patches, D channels, S pixels on a side.

SMALLEST = 0.5  # side of the second view, as a share of the first
TURN = 30  # degrees, at most, either way


def match(backbone: Any, benchmark: Benchmark, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """The share of patches that are matched rightly, for each distance that is close enough; of each image alike."""
    rows = np.random.default_rng(config.seed).permutation(len(benchmark.images))[: config.match_images]
    index = benchmark.images.take(np.sort(rows))
    side, last = window_side(backbone, config.dense.side), (backbone.config.depth - 1,)
    broken: dict[int, BadImage] = {}
    found = []
    for rows_B, images in reader.images(backbone, index, range(len(index)), broken):
        for row, image in zip(rows_B, images):
            first_CSS = resize(_square(image), (side, side))
            turn = moved(np.random.default_rng([config.seed, row]))
            second_CSS = warped(first_CSS, turn)
            x_2CSS = normalised(backbone, torch.stack([first_CSS, second_CSS]))
            patches = tokens(backbone, x_2CSS, last)[0][:, 0].float()
            found.append(offsets(patches[0], patches[1], turn))
    told({index.path(row): str(error) for row, error in broken.items()}, len(found), len(index))
    settings = {
        "images": len(found), "window": side, "features": "patches of the last block, cosine",
        "views": f"the middle square; a part of it of {SMALLEST:g} to 1 of its side, turned up to {TURN} degrees",
        "interval": f"95 %, bootstrap over images, {config.resamples} resamples",
    }  # fmt: skip
    like = likeness(backbone, same_images(index), window=side, seed=config.seed, smallest=SMALLEST, turn=TURN)
    for share in config.match_within:
        right_B = np.array([float((off <= share).mean()) for off in found if len(off)])
        low, high = interval(right_B, config.resamples, config.seed)
        yield Result("match", benchmark.name, f"pck@{share:g}", float(right_B.mean()), low, high, settings, like)


def moved(random: np.random.Generator) -> Tensor:
    """The matrix (2, 3) from places in the second view to places in the first, both in [-1, 1]."""
    scale = random.uniform(SMALLEST, 1)
    angle = math.radians(random.uniform(-TURN, TURN))
    x, y = random.uniform(scale - 1, 1 - scale, 2)
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[cosine, -sine, x], [sine, cosine, y]], dtype=torch.float32)


def warped(first_CSS: Tensor, turn_23: Tensor) -> Tensor:
    """The second view, uint8; what lies outside the first repeats its edge."""
    grid = F.affine_grid(turn_23[None], [1, *first_CSS.shape], align_corners=False)
    seen = F.grid_sample(first_CSS[None].float(), grid, "bicubic", "border", align_corners=False)
    return seen[0].round().clamp(0, 255).to(torch.uint8)


def offsets(first_hwD: Tensor, second_hwD: Tensor, turn_23: Tensor) -> np.ndarray:
    """How far, in sides of a view, each match lies from where its patch went; of patches whose place is in view."""
    h, w = first_hwD.shape[:2]
    ys, xs = (2 * (torch.arange(n) + 0.5) / n - 1 for n in (h, w))
    place_P2 = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(-1, 2)
    went_P2 = (place_P2 - turn_23[:, 2]) @ torch.linalg.inv(turn_23[:, :2]).T
    seen_P = (went_P2.abs() <= 1).all(1)
    first_PD, second_PD = (F.normalize(x.flatten(0, 1), dim=1) for x in (first_hwD, second_hwD))
    best_P = (first_PD[seen_P] @ second_PD.T).argmax(1)
    return ((place_P2[best_P] - went_P2[seen_P]).norm(dim=1) / 2).numpy()


def _square(image_HWC: np.ndarray) -> np.ndarray:
    side = min(image_HWC.shape[:2])
    top, left = ((length - side) // 2 for length in image_HWC.shape[:2])
    return image_HWC[top : top + side, left : left + side]
