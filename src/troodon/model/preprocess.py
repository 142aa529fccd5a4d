"""From pixels to the network's input: resized, cropped or whole, normalised."""

import dataclasses
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.config import UsageError, pair
from troodon.model.config import Preprocessing

# Shape suffixes: C colours, H W pixels.

LONGEST = 4  # the longer side of what is resized is at most as many times the shorter one that is shown


def with_size(p: Preprocessing, size: int | Sequence[int] | None, patch: int) -> Preprocessing:
    """This preprocessing for crops of another size, a side or (height, width) in pixels; `resize` is scaled along.

    UsageError for what is no size, or does not divide into patches.
    """
    if size is None:
        return p
    sides = [size, size] if isinstance(size, Integral) else list(size) if isinstance(size, Sequence) else []
    if len(sides) != 2 or not all(isinstance(side, Integral) and side > 0 for side in sides):
        raise UsageError(f"size {size!r}: pixels of a side, or (height, width)")
    check_divides(sides, patch, "size")
    height, width = sides
    resize = round(p.resize * min(sides) / min(pair(p.crop)))
    return dataclasses.replace(p, resize=resize, crop=height if height == width else (height, width))


def check_divides(sides: Sequence[int], patch: int, what: str) -> None:
    """UsageError for a height and a width in pixels that do not divide into patches; it names the nearest that do."""
    if any(side % patch or not side for side in sides):
        size, near = (" x ".join(map(str, s)) for s in (sides, [max(1, round(s / patch)) * patch for s in sides]))
        raise UsageError(f"{what} of {size} pixels does not divide into patches of {patch}; the nearest is {near}")


def crop(image_HWC: np.ndarray, p: Preprocessing) -> Tensor:
    """uint8 (H, W, C) -> (C, *crop): resized to cover the crop, cut to its middle, and normalised."""
    crop_h, crop_w = pair(p.crop)
    height, width = image_HWC.shape[:2]
    # What a long image has beyond these is never shown, and is cut before resizing.
    tallest, widest = max(1, LONGEST * width * crop_h // crop_w), max(1, LONGEST * height * crop_w // crop_h)
    top, left = max(0, height - tallest) // 2, max(0, width - widest) // 2
    image_HWC = image_HWC[top : top + tallest, left : left + widest]
    height, width = image_HWC.shape[:2]
    cover = [side * p.resize / min(crop_h, crop_w) for side in (crop_h, crop_w)]
    scale = max(cover[0] / height, cover[1] / width)
    size = [max(round(cover[0]), round(height * scale)), max(round(cover[1]), round(width * scale))]
    x_CHW = _resized(image_HWC, size)
    top, left = (size[0] - crop_h) // 2, (size[1] - crop_w) // 2
    return _normalised(x_CHW[:, top : top + crop_h, left : left + crop_w], p)


def whole(image_HWC: np.ndarray, p: Preprocessing, patch: int) -> Tensor:
    """uint8 (H, W, C) -> (C, h, w): all of the image at its own aspect, each side rounded to whole patches.

    The shorter side is that of the crop, unless the longer one would have more than LONGEST times as many pixels.
    """
    short, sides = min(pair(p.crop)), image_HWC.shape[:2]
    scale = min(short / min(sides), LONGEST * short / max(sides))
    return _normalised(_resized(image_HWC, [max(1, round(side * scale / patch)) * patch for side in sides]), p)


def _resized(image_HWC: np.ndarray, size: list[int]) -> Tensor:
    x_CHW = torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)  # a copy: some are read-only
    if size == list(image_HWC.shape[:2]):
        return x_CHW
    return F.interpolate(x_CHW[None], size=size, mode="bicubic", antialias=True)[0]


def _normalised(x_CHW: Tensor, p: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (p.mean, p.std))
    return (x_CHW.float() / 255.0 - mean) / std
