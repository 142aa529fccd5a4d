"""Multi-crop geometry on the CPU: which boxes of an image the network sees, resampled (sections 3.2 and 5.1 of
https://arxiv.org/abs/2006.09882).

Everything is a pure function of the image, the settings and a random generator, so threads may share it. Pixels
stay uint8, channels last until the very end: that is the layout in which torch resamples fastest.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from troodon.config import pair
from troodon.images.decode import to_grey, to_rgb
from troodon.views.attacks import ATTACKS, attack
from troodon.views.config import CropsConfig, Size

# Shape suffixes: G the two global crops, V local crops, C colours, H and W pixels.
# A box is (top, left, height, width) in whole pixels of the image.

Box = tuple[int, int, int, int]
CHANNELS_AT_ONCE = 4  # channels that torch resamples in 8 bits; more at a time it takes to floats and back, six times slower
MAX_TRIES = 10  # boxes to draw before the central one is taken
MARGIN = (
    1.5  # pixels, at least, of a smaller copy of the image for each of a crop; 1.3 levels of 256 off in photographs
)
MIN_ATTACK_PX = 16  # pixels of the shorter side: what has fewer is not attacked
NUMBERS_PER_CROP = 2 * MAX_TRIES + 3  # random numbers of one crop: area and aspect of every try, two of position, one of flip
UINT64_MAX = 2**64 - 1


def generator(seed: int, image: int, visit: int) -> np.random.Generator:
    """The random numbers of one visit to one image; no two (seed, image, visit) share any.

    A counter-based generator with these three as its key and counter: about ten microseconds, no state to save.
    What belongs to no image may take image -1. Integers are taken modulo 2^64.
    """
    key = np.array([seed & UINT64_MAX, image & UINT64_MAX], np.uint64)
    counter = np.array([0, 0, visit & UINT64_MAX, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class MultiCrop:
    """The crops of one image: boxes, drawn once its size is known, and then cut out of its pixels.

    Global crops come first in the stream of random numbers and every crop takes as many, so the number of local crops
    changes no other crop. `config` has one size: of mixed ones, `config.pick_size` picks it.
    """

    def __init__(self, config: CropsConfig, random: np.random.Generator, image_visit: tuple[int, int] = (-1, 0)):
        assert not config.mixed, config.mixed
        self.image_visit = image_visit  # the image's row, and which set of crops of it this is
        # First, so that the number of local crops changes no attack; and only where there are any, as runs go on.
        self.attack_seeds = random.integers(2**63, size=2).tolist() if config.attack else []
        self.config, self.random_numbers = config, random.random((2 + config.locals, NUMBERS_PER_CROP)).tolist()
        wide, narrow = pair(config.global_px), pair(config.local_px)
        self.crop_types = [(config.global_scale, wide)] * 2 + [(config.local_scale, narrow)] * config.locals

    def draw_boxes(self, height: int, width: int) -> int:
        """Draw the boxes of an image of this size. How many times smaller its pixels may be: 1, 2, 4 or 8.

        So much that every box keeps MARGIN times the pixels of its crop in either direction.
        """
        self.size = height, width
        self.boxes = [self._box(u, *kind) for u, kind in zip(self.random_numbers, self.crop_types)]
        spare = min(min(h / size[0], w / size[1]) for (_, _, h, w), (_, size) in zip(self.boxes, self.crop_types))
        self.reduction = next(times for times in (8, 4, 2, 1) if times == 1 or spare >= times * MARGIN)
        return self.reduction

    def crop(self, image_HWC: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 (2, C, *global size) and (V, C, *local size), contiguous, of the image, or of a smaller copy of it."""
        wide, narrow = self.config.global_px, self.config.local_px
        if not self.attack_seeds:
            return self._cut(image_HWC, 0, 2, wide), self._cut(image_HWC, 2, None, narrow)
        # What was not read smaller is made so: an attack costs by the pixel.
        times = self.reduction if image_HWC.shape[:2] == self.size else 1
        copies = [random_attack(image_HWC, self.config, seed, times) for seed in self.attack_seeds]
        globals_ = [self._cut(copy_HWC, view, view + 1, wide) for view, copy_HWC in enumerate(copies)]
        return torch.cat(globals_), self._cut(image_HWC, 2, None, narrow)

    def _box(self, u: list[float], scale: tuple[float, float], size: Size) -> Box:
        low, high = self.config.aspect
        return random_box(*self.size, scale, (low * (size[1] / size[0]), high * (size[1] / size[0])), u)

    def _cut(self, image_HWC: np.ndarray, first: int, end: int | None, px: int | Size) -> Tensor:
        boxes, size = self.boxes[first:end], pair(px)
        crops_VCHW = np.empty((len(boxes), image_HWC.shape[2], *size), np.uint8)
        for crop_CHW, box, u in zip(crops_VCHW, boxes, self.random_numbers[first:end]):
            top, left, h, w = box if image_HWC.shape[:2] == self.size else _scaled(box, self.size, image_HWC.shape)
            crop_HWC = _resized(image_HWC[top : top + h, left : left + w], *size)
            if u[-1] < self.config.flip:
                crop_HWC = crop_HWC[:, ::-1]
            np.copyto(crop_CHW, crop_HWC.transpose(2, 0, 1))  # the flip costs nothing here
        return torch.from_numpy(crops_VCHW)


def multi_crop(image_HWC: np.ndarray, config: CropsConfig, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Two global and `config.locals` local crops of one uint8 image of any size from 1x1 up and any channels.

    Returns uint8 (2, C, *global size) and (V, C, *local size), contiguous.
    """
    views = MultiCrop(config, random)
    views.draw_boxes(*image_HWC.shape[:2])
    return views.crop(image_HWC)


def random_attack(image_HWC: np.ndarray, config: CropsConfig, seed: int, times: int = 1) -> np.ndarray:
    """A near-duplicate of the image, made from a copy `times` smaller; or, as often as `config.attack` says, itself.

    uint8 (h, w, C), C being 1 or 3, of another size. Pictures of a few pixels in width or height are left alone.
    """
    random = np.random.Generator(np.random.Philox(seed))
    if random.random() >= config.attack or min(image_HWC.shape[:2]) < MIN_ATTACK_PX * times:
        return image_HWC
    kinds = config.attack_kinds or tuple(ATTACKS)
    kind, strength = kinds[int(random.integers(len(kinds)))], 1.0 - random.random()
    copy_HW3 = attack(Image.fromarray(to_rgb(image_HWC)).reduce(times), kind, random, strength)
    return copy_HW3 if image_HWC.shape[2] == 3 else to_grey(copy_HW3)


def random_box(height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float], u: list[float]) -> Box:
    """A box whose share of the area is uniform in `scale` and whose aspect is log-uniform in `aspect`.

    `u` holds NUMBERS_PER_CROP uniform random numbers. If no try fits into the image, the largest central box whose aspect
    (width over height) lies in the range.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for area, shape in zip(u[0 : 2 * MAX_TRIES : 2], u[1 : 2 * MAX_TRIES : 2]):
        pixels = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = math.exp(low + (high - low) * shape)
        h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(u[-3] * (height - h + 1)), int(u[-2] * (width - w + 1)), h, w
    h = min(height, max(1, round(width / aspect[0])))
    w = min(width, max(1, round(height * aspect[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def _scaled(box: Box, size: Size, shape: tuple[int, ...]) -> Box:
    """The same box, to the nearest pixel, in a copy of the image of another size."""
    (top, left, h, w), (y, x) = box, (shape[0] / size[0], shape[1] / size[1])
    h, w = (min(max(1, round(side)), most) for side, most in ((h * y, shape[0]), (w * x, shape[1])))
    return min(round(top * y), shape[0] - h), min(round(left * x), shape[1] - w), h, w


def _resized(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing, as Pillow does it, in uint8 throughout."""
    assert image_HWC.dtype == np.uint8, image_HWC.dtype
    if (channels := image_HWC.shape[2]) > CHANNELS_AT_ONCE:
        parts = [image_HWC[:, :, c : c + CHANNELS_AT_ONCE] for c in range(0, channels, CHANNELS_AT_ONCE)]
        return np.concatenate([_resized(part, height, width) for part in parts], axis=2)
    # A dense copy of the box first, and the leading axis before the others change places: torch then knows the
    # strides for channels last. Otherwise it unpacks the pixels, a fifth slower, and refuses some arrays.
    box_1HWC = torch.from_numpy(np.array(image_HWC, order="C"))[None]
    resized_1CHW = F.interpolate(box_1HWC.permute(0, 3, 1, 2), (height, width), mode="bicubic", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()
