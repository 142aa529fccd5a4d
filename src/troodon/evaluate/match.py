"""Do the patches of one view find their places in another? Two views of each image, matched by cosine.

The second view is a crop of the first, turned, so that where each patch went is known exactly. A patch of the first
view whose place lies in the second is matched to the patch nearest in features; it is right if that lies within a share
of the view's side (PCK). No label is needed.

Colours alone find most places in a view that is only moved: what features know besides shows when the second view is
also seen in another light.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.features import Reader, same_images, told
from troodon.evaluate.maps import normalised, resize, tokens, window_side
from troodon.evaluate.metrics import interval
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import Benchmark
from troodon.images.decode import BadImage

# Shape suffixes: B images, P patches, D channels, S pixels on a side.

SMALLEST = 0.5  # side of the second view, as a share of the first
TURN = 30  # degrees, at most, either way
LIGHT = 0.5  # natural logarithm, at most, either way, of the gain of each colour and of the exponent of all


def match(backbone: Any, benchmark: Benchmark, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """The share of patches that are matched rightly, for each distance that is close enough; of each image alike.

    The second view as it is ("match"), and in another light ("match_light").
    """
    rows = np.random.default_rng(config.seed).permutation(len(benchmark.images))[: config.match_images]
    index = benchmark.images.take(np.sort(rows))
    side, last = window_side(backbone, config.dense.side), (backbone.config.depth - 1,)
    broken: dict[int, BadImage] = {}
    found: dict[str, list[np.ndarray]] = {"match": [], "match_light": []}
    for rows_B, images in reader.images(backbone, index, range(len(index)), broken):
        for row, image in zip(rows_B, images):
            first_CSS = resize(_square(image), (side, side))
            random = np.random.default_rng([config.seed, row])
            turn = moved(random)
            second_CSS = warped(first_CSS, turn)
            x_3CSS = normalised(backbone, torch.stack([first_CSS, second_CSS, lit(second_CSS, random)]))
            patches = tokens(backbone, x_3CSS, last)[0][:, 0].float()
            for off, second_hwD in zip(found.values(), patches[1:]):
                off.append(offsets(patches[0], second_hwD, turn))
    told({index.path(row): str(error) for row, error in broken.items()}, len(found["match"]), len(index))
    settings = {
        "images": len(found["match"]), "window": side, "features": "patches of the last block, cosine",
        "views": f"the middle square; a part of it of {SMALLEST:g} to 1 of its side, turned up to {TURN} degrees",
        "interval": f"95 %, bootstrap over images, {config.resamples} resamples",
    }  # fmt: skip
    like = likeness(backbone, same_images(index), window=side, seed=config.seed, smallest=SMALLEST, turn=TURN)
    for protocol, off_B in found.items():
        light = {} if protocol == "match" else {"light": LIGHT}
        for share in config.match_within:
            right_B = np.array([float((off <= share).mean()) for off in off_B if len(off)])
            low, high = interval(right_B, config.resamples, config.seed)
            value = float(right_B.mean())
            yield Result(protocol, benchmark.name, f"pck@{share:g}", value, low, high, settings | light, like | light)


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


def lit(view_CSS: Tensor, random: np.random.Generator) -> Tensor:
    """The view, uint8, in another light: each colour brighter or darker, and all with another contrast."""
    gain_C11 = torch.from_numpy(np.exp(random.uniform(-LIGHT, LIGHT, (len(view_CSS), 1, 1)))).float()
    exponent = math.exp(random.uniform(-LIGHT, LIGHT))
    return ((view_CSS / 255) ** exponent * gain_C11 * 255).round().clamp(0, 255).to(torch.uint8)


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
