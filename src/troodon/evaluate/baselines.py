"""Descriptors without learning, which a network must beat. Each stands in for a backbone in `extract`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from troodon.config import fingerprint

# Shape suffixes: B images, S pixels on a side, P pixels, K bins, D channels.

VERSION = 1  # goes up when a descriptor changes, so that features kept from before do not serve it


@dataclass(frozen=True)
class Described:
    """The class token is the descriptor; there are no patches, so their mean has no channels."""

    cls: Tensor

    @property
    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.cls, self.cls[:, :0])]


@dataclass(frozen=True)
class ColourHistogram:
    """Histogram of hue, saturation and value, 8 x 4 x 4 bins, summing to one, then square roots (Hellinger)."""

    bins: tuple[int, int, int] = (8, 4, 4)
    side: int = 64
    name: str = "colour-histogram"

    @property
    def fingerprint(self) -> str:
        return fingerprint(VERSION, self)

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, 3) arrays -> (B, 3, S, S) hue, saturation and value, each in [0, 1]."""
        hsv = [np.asarray(_resized(image, self.side).convert("HSV")) for image in images]
        return torch.from_numpy(np.stack(hsv)).permute(0, 3, 1, 2) / 255.0

    def features(self, images: Tensor, *, blocks: int = 1) -> Described:
        bins = torch.tensor(self.bins)[:, None]
        hue_BP, saturation_BP, value_BP = torch.minimum((images.flatten(2) * bins).long(), bins - 1).unbind(1)
        code_BP = (hue_BP * self.bins[1] + saturation_BP) * self.bins[2] + value_BP
        count_BK = torch.zeros(len(images), int(np.prod(self.bins)))
        count_BK.scatter_add_(1, code_BP, torch.ones_like(code_BP, dtype=torch.float32))
        return Described((count_BK / code_BP.shape[1]).sqrt())


@dataclass(frozen=True)
class RawPixels:
    """The image at 16 x 16 pixels, less its mean brightness (without which cosines say little else)."""

    side: int = 16
    name: str = "raw-pixels"

    @property
    def fingerprint(self) -> str:
        return fingerprint(VERSION, self)

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, 3) arrays -> (B, 3, S, S) in [0, 1]."""
        return torch.from_numpy(np.stack([_resized(i, self.side) for i in images])).permute(0, 3, 1, 2) / 255.0

    def features(self, images: Tensor, *, blocks: int = 1) -> Described:
        return Described((images - images.mean((1, 2, 3), keepdim=True)).flatten(1))


BASELINES = (ColourHistogram(), RawPixels())


def _resized(image: np.ndarray, side: int) -> Image.Image:
    """The whole image, squeezed to a square."""
    return Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
