"""What stands for an image where copies are looked for: what a network says of it, and its pixels beside that.

A small network forgets what it did not need, and eight by eight pixels forget little: side by side, each of length one,
whitened together, they find more than either. Measured (docs/log.md), network -> with pixels:

    average precision on attacked photographs
        a DINO backbone of seven minutes        0.754 -> 0.985
        copies_small                            0.953 -> 0.991
        8 x 8 pixels alone                               0.978
    average precision on pairs of CIFAR-10 that people call the same
        a DINO backbone of seven minutes        0.069 -> 0.778
        copies_small                            0.756 -> 0.812
        8 x 8 pixels alone                               0.776

A mirrored picture counts as a copy. A copy descriptor's file, such as SSCD's, is left by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor

from troodon.images.decode import grey
from troodon.search.exact import unit

# Shape suffixes: N images, B of one batch, D channels.

SIDE = 8  # pixels: with 6, 10 or 12 as much is found
GRID, ONE_COLOUR = 32, 10.0  # lines among which a frame is looked for, levels of 255 within which it is of one colour
WIDEST = 9  # lines of a frame. It is as wide on the other side: else it is a part of the picture, such as its sky
BOX = Image.Resampling.BOX
SIGNED = 0.5  # with 0 fewer pairs that people call the same are found, with 0.7 fewer mirrored copies
MATRIX, COPIES, PIXELS = "embeddings", "copies", "pixels"  # the files that vectors lie in, see embed.py


@dataclass(frozen=True)
class Pixels:
    """A network that only makes pictures small: its token is the pixels of the first three channels, less the mean of
    each, so that brightness, contrast and the colour of the whole say nothing. Nor does a frame of one colour. For a
    mirrored picture it is nearly the same: the sum of left and right, their difference, and the size of it, which
    weighs more."""

    channels: int
    name: str = "pixels"
    fingerprint: str = f"{SIDE}x{SIDE}"

    def prepare(self, images: Sequence[ndarray]) -> Tensor:
        """uint8 (H, W, C) arrays of any sizes -> (B, SIDE, SIDE, 3), or 1 where there are fewer than three channels."""
        return torch.from_numpy(np.stack([self._small(image) for image in images])).float() / 255

    def _small(self, image_HWC: ndarray) -> ndarray:
        picture = Image.fromarray(image_HWC[..., 0] if self.channels < 3 else image_HWC[..., :3])
        (h, w), (above, beside) = image_HWC.shape[:2], frame(picture)
        inside = (w * beside, h * above, w * (1 - beside), h * (1 - above))
        return np.asarray(picture.resize((SIDE, SIDE), BOX, inside)).reshape(SIDE, SIDE, -1)

    def features(self, images_BHWC: Tensor, blocks: int = 1) -> SimpleNamespace:
        x_BHWC = images_BHWC - images_BHWC.mean((1, 2), keepdim=True)
        left, right = x_BHWC[:, :, : SIDE // 2], x_BHWC[:, :, SIDE // 2 :].flip(2)
        differ = left - right
        parts = [left + right, differ * SIGNED, differ.abs() * (1 - SIGNED**2) ** 0.5]
        return SimpleNamespace(cls=torch.cat(parts, 1).flatten(1))


def frame(picture: Image.Image) -> tuple[float, float]:
    """What share of the height above and below, and of the width at either side, is of one colour."""
    x_GGC = np.asarray(picture.resize((GRID, GRID), BOX), np.float32).reshape(GRID, GRID, -1)
    lines = []
    for x_LGC in (x_GGC, x_GGC.swapaxes(0, 1)):
        sides = []
        for inwards_LGC in (x_LGC, x_LGC[::-1]):
            off_L = np.abs(inwards_LGC - inwards_LGC[0].mean(0)).max((1, 2)) > ONE_COLOUR
            sides.append(int(off_L.argmax()) if off_L.any() else GRID)
        lines.append(min(*sides, WIDEST))
    return lines[0] / GRID, lines[1] / GRID


@dataclass(frozen=True)
class Finder:
    """`backbone` by its `tokens` ("cls" or "cls+mean"), and pixels beside it or not."""

    backbone: Any
    tokens: str = "cls"
    pixels: bool = True

    @staticmethod
    def of(backbone: Any, tokens: str, pixels: bool) -> "Finder":
        """A copy descriptor that was trained as such knows better than pixels, and is left by itself."""
        return Finder(backbone, tokens, pixels and not getattr(backbone, "for_copies", False))

    @property
    def channels(self) -> int:
        return self.backbone.channels

    @property
    def fingerprint(self) -> str:
        """Of all that makes its vectors what they are."""
        return "+".join([self.backbone.fingerprint, self.tokens, *([Pixels.fingerprint] if self.pixels else [])])

    @property
    def looks(self) -> list[tuple[Any, str]]:
        return [(self.backbone, self.tokens), *([(Pixels(self.channels), "cls")] if self.pixels else [])]

    def bare(self) -> "Finder":
        return replace(self, backbone=bare(self.backbone))

    def prepare(self, images: Sequence[ndarray]) -> list[Any]:
        return [network.prepare(images) for network, _ in self.looks]

    def vectors(self, prepared: list[Any]) -> ndarray:
        """(B, D) float32 of what `prepare` made of B images."""
        parts = [tokens_of(*look, ready) for look, ready in zip(self.looks, prepared, strict=True)]
        return np.concatenate(parts, axis=1)

    def __call__(self, images: Sequence[ndarray], batch: int = 64) -> ndarray:
        """Vectors (N, D) float32 of uint8 (H, W, C) arrays, as `embed` stores them but for the rounding."""
        starts = range(0, len(images), batch)
        parts = [self.vectors(self.prepare(images[start : start + batch])) for start in starts]
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def of_colour(self, images: Sequence[ndarray]) -> Sequence[ndarray]:
        """What it takes of uint8 (H, W, 3) arrays: grey ones, where the network takes these."""
        return [grey(image) for image in images] if self.channels == 1 else images

    def stored(self, folder: Path) -> "Beside":
        """The vectors of all images that `embed` has put into a folder."""
        first = COPIES if (folder / f"{COPIES}.npy").exists() else MATRIX
        names = [first, *([PIXELS] if self.pixels else [])]
        return Beside([np.load(folder / f"{name}.npy", mmap_mode="r") for name in names])


@dataclass(frozen=True)
class Beside:
    """Matrices (N, D) side by side, mapped from the disk: rows are put together as they are asked for."""

    parts: Sequence[ndarray]

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: slice | ndarray) -> ndarray:
        return np.concatenate([part[rows] for part in self.parts], axis=1)


def tokens_of(network: Any, tokens: str, prepared: Any) -> ndarray:
    """(B, D) float32: the class token, or it and the mean patch side by side; each of length one."""
    features = network.features(prepared)
    parts = [features.cls] + ([features.patches.mean((1, 2))] if tokens == "cls+mean" else [])
    return np.concatenate([unit(part.float().cpu().numpy()) for part in parts], axis=1)


def bare(backbone: Any) -> Any:
    """Without the reader of paths that it was lent: other processes get pixels, and it may not travel."""
    return replace(backbone, read=None) if getattr(backbone, "read", None) is not None else backbone
