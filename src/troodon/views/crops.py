"""Multi-crop on the CPU: draws boxes of an image and resizes them to crops (sections 3.2 and 5.1 of
https://arxiv.org/abs/2006.09882).

Everything is a pure function of the image, the settings and a random generator, so threads can share it. Pixels stay
uint8 and channels last until the end: torch resizes this layout fastest.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.config import pair
from troodon.views.config import CropsConfig, Size

# Shape suffixes: G global crops, V local crops, C colours, H and W pixels.
# A box is (top, left, height, width) in whole pixels of the image.

Box = tuple[int, int, int, int]
Attack = Callable[[np.ndarray, CropsConfig, int, int], np.ndarray]  # that of attacks.random_attack
CHANNELS_AT_ONCE = 4  # that torch resizes in uint8; more are converted to float and back, six times slower
MAX_TRIES = 10  # boxes that are drawn before the central one is taken
MARGIN = 1.5  # pixels of a reduced image per pixel of a crop, at least; mean error in photographs: 1.3 levels of 256
NUMBERS_PER_CROP = 2 * MAX_TRIES + 3  # of a crop: area and aspect of each try, two of position, one of flip
UINT64_MAX = 2**64 - 1


def generator(seed: int, image: int, visit: int, part: int = 0) -> np.random.Generator:
    """The random generator of a part of one visit to one image; other (seed, image, visit, part) share no numbers.

    A counter-based generator with these four as key and counter: about ten microseconds, without state to save. Use
    image -1 for what belongs to no image. Integers are taken modulo 2^64.
    """
    key = np.array([seed & UINT64_MAX, image & UINT64_MAX], np.uint64)
    counter = np.array([0, part & UINT64_MAX, visit & UINT64_MAX, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class MultiCrop:
    """The crops of one image: boxes, which are drawn when its size is known, and then cut from its pixels.

    Global crops use the first random numbers, and every crop uses equally many, so the number of local crops changes no
    other crop. `config` must have one size: `config.pick_size` picks one of several.
    """

    def __init__(
        self,
        config: CropsConfig,
        random: np.random.Generator,
        image_visit: tuple[int, int] = (-1, 0),
        attack: Attack | None = None,
    ):
        assert not config.mixed, config.mixed
        assert attack or not config.attack, "crops.attack needs a function that attacks: views.attacks.random_attack"
        self.attack = attack
        self.image_visit = image_visit  # the image's row, and the number of its set of crops
        # Drawn first, so that the number of local crops changes no attack; and only if there are attacks, so that
        # runs without them can resume.
        self.attack_seeds = random.integers(2**63, size=config.globals).tolist() if config.attack else []
        self.config, self.random_numbers = (
            config,
            random.random((config.globals + config.locals, NUMBERS_PER_CROP)).tolist(),
        )
        wide, narrow = pair(config.global_px), pair(config.local_px)
        self.crop_types = [(config.global_scale, wide)] * config.globals + [
            (config.local_scale, narrow)
        ] * config.locals

    def draw_boxes(self, height: int, width: int) -> int:
        """Draw the boxes of an image of this size; returns the factor by which it may be reduced: 1, 2, 4 or 8.

        Every box then keeps MARGIN times the pixels of its crop in both directions.
        """
        self.size = height, width
        self.boxes = [self._draw_box(u, *kind, self.size) for u, kind in zip(self.random_numbers, self.crop_types)]
        scale = min(min(h / size[0], w / size[1]) for (_, _, h, w), (_, size) in zip(self.boxes, self.crop_types))
        self.reduction = next(factor for factor in (8, 4, 2, 1) if factor == 1 or scale >= factor * MARGIN)
        return self.reduction

    def crop(self, image_HWC: np.ndarray) -> tuple[Tensor, Tensor]:
        """Crop the image or its reduced copy: uint8 (G, C, *global size) and (V, C, *local size), contiguous."""
        wide, narrow, count = self.config.global_px, self.config.local_px, self.config.globals
        if self.attack is None or not self.attack_seeds:
            return self._crop(image_HWC, 0, count, wide), self._crop(image_HWC, count, None, narrow)
        # An image that was decoded at full size is reduced first: the cost of an attack grows with its pixels.
        reduction = self.reduction if image_HWC.shape[:2] == self.size else 1
        copies = [self.attack(image_HWC, self.config, seed, reduction) for seed in self.attack_seeds]
        globals_ = [self._crop(copy_HWC, view, view + 1, wide) for view, copy_HWC in enumerate(copies)]
        return torch.cat(globals_), self._crop(image_HWC, count, None, narrow)

    def _boxes_of_copy(self, height: int, width: int, first: int, end: int | None) -> list[Box]:
        """The boxes in a copy of the image with another size."""
        if "quarter_turn" in self.config.attack_kinds and (height > width) != (self.size[0] > self.size[1]):
            # In a copy that lies on its side, a box of the original would change its aspect ratio twice.
            drawn = zip(self.random_numbers[first:end], self.crop_types[first:end])
            return [self._draw_box(u, *kind, (height, width)) for u, kind in drawn]
        return [_scale_box(box, self.size, (height, width)) for box in self.boxes[first:end]]

    def _draw_box(self, u: list[float], scale: tuple[float, float], px: Size, size: Size) -> Box:
        low, high = self.config.aspect
        return random_box(*size, scale, (low * (px[1] / px[0]), high * (px[1] / px[0])), u)

    def _crop(self, image_HWC: np.ndarray, first: int, end: int | None, px: int | Size) -> Tensor:
        boxes, size = self.boxes[first:end], pair(px)
        crops_VCHW = np.empty((len(boxes), image_HWC.shape[2], *size), np.uint8)
        if image_HWC.shape[:2] != self.size:
            boxes = self._boxes_of_copy(image_HWC.shape[0], image_HWC.shape[1], first, end)
        for crop_CHW, box, u in zip(crops_VCHW, boxes, self.random_numbers[first:end]):
            top, left, h, w = box
            crop_HWC = _resize(image_HWC[top : top + h, left : left + w], *size)
            if u[-1] < self.config.flip:
                crop_HWC = crop_HWC[:, ::-1]
            np.copyto(crop_CHW, crop_HWC.transpose(2, 0, 1))  # which also makes a flip free
        return torch.from_numpy(crops_VCHW)


def multi_crop(
    image_HWC: np.ndarray, config: CropsConfig, random: np.random.Generator, attack: Attack | None = None
) -> tuple[Tensor, Tensor]:
    """Crop one uint8 image of any size from 1x1 and any channels: the global and local crops of `config`.

    Returns uint8 (G, C, *global size) and (V, C, *local size), contiguous.
    """
    views = MultiCrop(config, random, attack=attack)
    views.draw_boxes(*image_HWC.shape[:2])
    return views.crop(image_HWC)


def random_box(height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float], u: list[float]) -> Box:
    """A box whose share of the area is uniform in `scale` and whose aspect ratio is log-uniform in `aspect`.

    `u` holds NUMBERS_PER_CROP uniform random numbers. If no try fits the image, the largest central box whose aspect
    ratio (width over height) is in the range.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for area_u, aspect_u in zip(u[0 : 2 * MAX_TRIES : 2], u[1 : 2 * MAX_TRIES : 2]):
        pixels = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
        ratio = math.exp(low + (high - low) * aspect_u)
        h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(u[-3] * (height - h + 1)), int(u[-2] * (width - w + 1)), h, w
    h = min(height, max(1, round(width / aspect[0])))
    w = min(width, max(1, round(height * aspect[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def _scale_box(box: Box, size: Size, shape: tuple[int, ...]) -> Box:
    """The same box, to the nearest pixel, in a copy of the image with another size."""
    (top, left, h, w), (y, x) = box, (shape[0] / size[0], shape[1] / size[1])
    h, w = (min(max(1, round(side)), limit) for side, limit in ((h * y, shape[0]), (w * x, shape[1])))
    return min(round(top * y), shape[0] - h), min(round(left * x), shape[1] - w), h, w


def _resize(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize with bicubic interpolation and antialiasing, like Pillow, in uint8 throughout."""
    assert image_HWC.dtype == np.uint8, image_HWC.dtype
    if (channels := image_HWC.shape[2]) > CHANNELS_AT_ONCE:
        parts = [image_HWC[:, :, c : c + CHANNELS_AT_ONCE] for c in range(0, channels, CHANNELS_AT_ONCE)]
        return np.concatenate([_resize(part, height, width) for part in parts], axis=2)
    # The box is copied to be contiguous, and the leading axis is added before the others are permuted: torch then
    # recognises channels last. Otherwise it unpacks the pixels, a fifth slower, and refuses some arrays.
    box_1HWC = torch.from_numpy(np.array(image_HWC, order="C"))[None]
    resized_1CHW = F.interpolate(box_1HWC.permute(0, 3, 1, 2), (height, width), mode="bicubic", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()
