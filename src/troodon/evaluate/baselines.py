"""Descriptors without learning, which a network must beat. Each stands in for a backbone in `extract`."""

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

# Shape suffixes: B images, C channels of an image, S pixels on a side, P pixels, K bins, D channels of a descriptor.

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
    """Histogram of hue, saturation and value, 8 x 4 x 4 bins, summing to one, then square roots (Hellinger).

    Other than three channels are no colours: each has a histogram of its own, of as many bins as hue.
    """

    bins: tuple[int, int, int] = (8, 4, 4)
    side: int = 64
    channels: int = 3
    name: str = "colour-histogram"

    @property
    def fingerprint(self) -> str:
        return fingerprint(VERSION, self)

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, C) arrays -> (B, C, S, S), in [0, 1]; of three, hue, saturation and value."""
        x_BSSC = [_resized(image, self.side) for image in images]
        if self.channels == 3:
            x_BSSC = [np.asarray(Image.fromarray(x_SSC).convert("HSV")) for x_SSC in x_BSSC]
        return torch.from_numpy(np.stack(x_BSSC)).permute(0, 3, 1, 2) / 255.0

    def features(self, images: Tensor, *, blocks: int = 1) -> Described:
        colours, hue = self.channels == 3, self.bins[0]
        bins = torch.tensor(self.bins if colours else [hue])[:, None]
        x_BCP = torch.minimum((images.flatten(2) * bins).long(), bins - 1)
        if colours:
            code_BP = (x_BCP[:, 0] * self.bins[1] + x_BCP[:, 1]) * self.bins[2] + x_BCP[:, 2]
        else:
            code_BP = (x_BCP + hue * torch.arange(self.channels)[:, None]).flatten(1)
        count_BK = torch.zeros(len(images), int(np.prod(self.bins)) if colours else hue * self.channels)
        count_BK.scatter_add_(1, code_BP, torch.ones_like(code_BP, dtype=torch.float32))
        return Described((count_BK / code_BP.shape[1]).sqrt())


@dataclass(frozen=True)
class RawPixels:
    """The image at 16 x 16 pixels, less its mean brightness (without which cosines say little else)."""

    side: int = 16
    channels: int = 3
    name: str = "raw-pixels"

    @property
    def fingerprint(self) -> str:
        return fingerprint(VERSION, self)

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, C) arrays -> (B, C, S, S) in [0, 1]."""
        return torch.from_numpy(np.stack([_resized(i, self.side) for i in images])).permute(0, 3, 1, 2) / 255.0

    def features(self, images: Tensor, *, blocks: int = 1) -> Described:
        return Described((images - images.mean((1, 2, 3), keepdim=True)).flatten(1))


@dataclass(frozen=True)
class PatchColours:
    """Mean and deviation of each channel in each patch, seen as a network of this preprocessing sees it: for dense
    protocols, which ask for patches only. It stands in for a network of one block."""

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

    def tokens(self, x_BCHW: Tensor, blocks: int) -> Iterator[list[Any]]:
        """What `Backbone.tokens` gives: patches (B, P, D), and their mean in the place of the class token."""
        x_BChwpp = x_BCHW.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        x_BDhw = torch.cat([x_BChwpp.mean((-2, -1)), x_BChwpp.std((-2, -1), unbiased=False)], 1)
        patches_BPD = x_BDhw.flatten(2).transpose(1, 2)
        yield [SimpleNamespace(patches_BPD=patches_BPD, cls_BD=patches_BPD.mean(1))]


@dataclass(frozen=True)
class LocationPrior:
    """A guess that looks at no picture: what stands at each place of the images to learn from, for dense protocols."""

    name: str = "location-prior"
    fingerprint: str = "location-prior"
    channels: int = 3


BASELINES = (ColourHistogram(), RawPixels())


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    """The whole image, squeezed to a square: uint8 (S, S, C)."""
    bands = (Image.fromarray(band).resize((side, side), Image.Resampling.BILINEAR) for band in np.moveaxis(image, 2, 0))
    return np.stack([np.asarray(band) for band in bands], axis=2)
