"""Baselines: descriptors without learning. Each has the interface of a backbone in `extract`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from troodon.config import fingerprint
from troodon.model.config import Preprocessing

# Shape suffixes: B images, C channels of an image, S pixels per side, P pixels, K bins, D channels of a descriptor.

VERSION = 1  # increase it when a descriptor changes, so that features cached before are not used


@dataclass(frozen=True)
class DescriptorFeatures:
    """The class token is the descriptor. There are no patch tokens, so their mean has no channels."""

    cls: Tensor

    @property
    def mean(self) -> Tensor:
        return self.cls[:, :0]

    @property
    def blocks(self) -> list["DescriptorFeatures"]:
        return [self]


@dataclass(frozen=True)
class ColourHistogram:
    """Histogram of hue, saturation and value with 8 x 4 x 4 bins, normalised to sum 1, then square roots (Hellinger).

    Images of other than three channels have no hue: then each channel has a histogram with as many bins as hue.
    """

    bins: tuple[int, int, int] = (8, 4, 4)
    side: int = 64
    channels: int = 3
    name: str = "colour-histogram"

    @property
    def fingerprint(self) -> str:
        return fingerprint(VERSION, self)

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, C) arrays -> (B, C, S, S) in [0, 1]; for three channels hue, saturation and value."""
        x_BSSC = [_resize_square(image, self.side) for image in images]
        if self.channels == 3:
            x_BSSC = [np.asarray(Image.fromarray(x_SSC).convert("HSV")) for x_SSC in x_BSSC]
        return torch.from_numpy(np.stack(x_BSSC)).permute(0, 3, 1, 2) / 255.0

    def features(self, images: Tensor, *, blocks: int = 1) -> DescriptorFeatures:
        colours, hue = self.channels == 3, self.bins[0]
        bins = torch.tensor(self.bins if colours else [hue])[:, None]
        x_BCP = torch.minimum((images.flatten(2) * bins).long(), bins - 1)
        if colours:
            code_BP = (x_BCP[:, 0] * self.bins[1] + x_BCP[:, 1]) * self.bins[2] + x_BCP[:, 2]
        else:
            code_BP = (x_BCP + hue * torch.arange(self.channels)[:, None]).flatten(1)
        count_BK = torch.zeros(len(images), int(np.prod(self.bins)) if colours else hue * self.channels)
        count_BK.scatter_add_(1, code_BP, torch.ones_like(code_BP, dtype=torch.float32))
        return DescriptorFeatures((count_BK / code_BP.shape[1]).sqrt())


@dataclass(frozen=True)
class RawPixels:
    """The image at 16 x 16 pixels minus its mean brightness, which would otherwise dominate the cosine."""

    side: int = 16
    channels: int = 3
    name: str = "raw-pixels"

    @property
    def fingerprint(self) -> str:
        return fingerprint(VERSION, self)

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, C) arrays -> (B, C, S, S) in [0, 1]."""
        return torch.from_numpy(np.stack([_resize_square(i, self.side) for i in images])).permute(0, 3, 1, 2) / 255.0

    def features(self, images: Tensor, *, blocks: int = 1) -> DescriptorFeatures:
        return DescriptorFeatures((images - images.mean((1, 2, 3), keepdim=True)).flatten(1))


@dataclass(frozen=True)
class PatchColours:
    """Mean and standard deviation of each channel in each patch, after this preprocessing. For dense protocols, which
    use patch tokens only. It has the interface of a network of one block."""

    preprocessing: Preprocessing
    patch: int
    name: str = "patch-colours"

    @property
    def channels(self) -> int:
        return len(self.preprocessing.mean)

    @property
    def fingerprint(self) -> str:
        return fingerprint(VERSION, self)

    @property
    def config(self) -> Any:
        return SimpleNamespace(depth=1, patch=self.patch)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def tokens(self, x_BCHW: Tensor, blocks: Sequence[int]) -> Iterator[list[Any]]:
        """The output of `Backbone.tokens`: patch tokens (B, P, D), and their mean instead of the class token."""
        x_BChwpp = x_BCHW.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        x_BDhw = torch.cat([x_BChwpp.mean((-2, -1)), x_BChwpp.std((-2, -1), unbiased=False)], 1)
        patches_BPD = x_BDhw.flatten(2).transpose(1, 2)
        yield [SimpleNamespace(patches_BPD=patches_BPD, cls_BD=patches_BPD.mean(1))]


@dataclass(frozen=True)
class LocationPrior:
    """The usual target at each place of the training images, without looking at the image. For dense protocols."""

    name: str = "location-prior"
    fingerprint: str = "location-prior"
    channels: int = 3


BASELINES = (ColourHistogram(), RawPixels())


def _resize_square(image: np.ndarray, side: int) -> np.ndarray:
    """Resize the whole image to a square, ignoring the aspect ratio: uint8 (S, S, C)."""
    channels = (
        Image.fromarray(x_HW).resize((side, side), Image.Resampling.BILINEAR) for x_HW in np.moveaxis(image, 2, 0)
    )
    return np.stack([np.asarray(x_SS) for x_SS in channels], axis=2)
