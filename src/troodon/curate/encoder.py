"""The encoder that finds copies: the embedding of a network, concatenated with the pixels of the image.

A small network discards details; eight by eight pixels keep most of them. Concatenated, each normalised to unit length,
and whitened together, they find more copies than either alone. Measured (docs/log.md), network -> with pixels:

    average precision on attacked photographs
        a DINO backbone trained for 7 minutes   0.754 -> 0.985
        copies_small                            0.953 -> 0.991
        8 x 8 pixels alone                               0.978
    average precision on pairs of CIFAR-10 that people judge the same
        a DINO backbone trained for 7 minutes   0.069 -> 0.778
        copies_small                            0.756 -> 0.812
        8 x 8 pixels alone                               0.776

A mirrored picture counts as a copy. A copy descriptor from a file, such as SSCD, is used without pixels.
"""

import functools
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

from troodon.devices import choose_device
from troodon.images.decode import to_grey, to_rgb
from troodon.images.reading import listed
from troodon.model.preprocess import joined
from troodon.search.exact import l2_normalise

# Shape suffixes: N images, B of one batch, D channels.

SIDE = 8  # pixels; 6, 10 or 12 find as much
FRAME_GRID = 32  # rows and columns of the thumbnail in which a frame is searched
ONE_COLOUR = 10.0  # maximum deviation of a frame from its mean colour, in levels of 255
MAX_FRAME = 9  # rows of a frame. Its opposite side must be as wide; otherwise it is part of the picture, such as a sky
BOX = Image.Resampling.BOX
SIGNED_WEIGHT = 0.5  # 0 finds fewer pairs that people judge the same, 0.7 fewer mirrored copies
MAIN_MATRIX, COPY_MATRIX, PIXEL_MATRIX = "embeddings", "copies", "pixels"  # file names of vectors, see embed.py


@dataclass(frozen=True)
class PixelBackbone:
    """A backbone that only resizes images: its class token is the pixels of the first three channels minus the mean of
    each. It ignores brightness, contrast, the overall colour and a frame of one colour. A mirrored image has nearly the
    same token: the sum of the left and the right half, their difference, and its absolute value, which has a larger
    weight."""

    channels: int | None  # None: images as they are, of any number of channels, shown as three
    name: str = "pixels"
    fingerprint: str = f"{SIDE}x{SIDE}"

    def prepare(self, images: Sequence[ndarray]) -> Tensor:
        """uint8 (H, W, C) arrays of any sizes -> (B, SIDE, SIDE, 3), or 1 channel if there are fewer than three."""
        return torch.from_numpy(np.stack([self._thumbnail(image) for image in images])).float() / 255

    def _thumbnail(self, image_HWC: ndarray) -> ndarray:
        image_HWC = to_rgb(image_HWC) if self.channels is None else image_HWC
        picture = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] < 3 else image_HWC[..., :3])
        (h, w), (top, side) = image_HWC.shape[:2], frame_fractions(picture)
        box = (w * side, h * top, w * (1 - side), h * (1 - top))
        return np.asarray(picture.resize((SIDE, SIDE), BOX, box)).reshape(SIDE, SIDE, -1)

    def features(self, images_BHWC: Tensor, blocks: int = 1) -> SimpleNamespace:
        x_BHWC = images_BHWC - images_BHWC.mean((1, 2), keepdim=True)
        left, right = x_BHWC[:, :, : SIDE // 2], x_BHWC[:, :, SIDE // 2 :].flip(2)
        difference = left - right
        parts = [left + right, difference * SIGNED_WEIGHT, difference.abs() * (1 - SIGNED_WEIGHT**2) ** 0.5]
        return SimpleNamespace(cls=torch.cat(parts, 1).flatten(1))


def frame_fractions(picture: Image.Image) -> tuple[float, float]:
    """Measure the frame of one colour: its fraction of the height, above and below, and of the width, at each side."""
    x_GGC = np.asarray(picture.resize((FRAME_GRID, FRAME_GRID), BOX), np.float32).reshape(FRAME_GRID, FRAME_GRID, -1)
    widths = []
    for x_LGC in (x_GGC, x_GGC.swapaxes(0, 1)):
        sides = []
        for inwards_LGC in (x_LGC, x_LGC[::-1]):
            differs_L = np.abs(inwards_LGC - inwards_LGC[0].mean(0)).max((1, 2)) > ONE_COLOUR
            sides.append(int(differs_L.argmax()) if differs_L.any() else FRAME_GRID)
        widths.append(min(*sides, MAX_FRAME))
    return widths[0] / FRAME_GRID, widths[1] / FRAME_GRID


@dataclass(frozen=True)
class CopyEncoder:
    """Encodes images by the `tokens` ("cls" or "cls+mean") of a backbone and, optionally, by their pixels."""

    backbone: Any
    tokens: str = "cls"
    pixels: bool = True

    @staticmethod
    def create(backbone: Any, tokens: str, pixels: bool) -> "CopyEncoder":
        """Create the encoder. A copy descriptor finds more without pixels and is used without them."""
        return CopyEncoder(backbone, tokens, pixels and not getattr(backbone, "for_copies", False))

    @property
    def channels(self) -> int | None:
        return self.backbone.channels

    @property
    def fingerprint(self) -> str:
        """The fingerprint of everything that determines the vectors."""
        return "+".join([self.backbone.fingerprint, self.tokens, *([PixelBackbone.fingerprint] if self.pixels else [])])

    @property
    def networks(self) -> list[tuple[Any, str]]:
        """The networks with their tokens."""
        return [(self.backbone, self.tokens), *([(PixelBackbone(self.channels), "cls")] if self.pixels else [])]

    def without_reader(self) -> "CopyEncoder":
        return replace(self, backbone=without_reader(self.backbone))

    def prepare(self, images: Sequence[ndarray]) -> list[Any]:
        return [network.prepare(images) for network, _ in self.networks]

    def join(self, parts: Sequence[tuple[list[Any], list[Any]]]) -> tuple[list[Any], list[Any]]:
        """`join_inputs` of what `prepare` returned."""
        return join_inputs([network for network, _ in self.networks], parts)

    def encode(self, prepared: list[Any]) -> ndarray:
        """Compute vectors (B, D) float32 from the output of `prepare` for B images."""
        pairs = zip(self.networks, prepared, strict=True)
        return np.concatenate([compute_vectors(*network, inputs) for network, inputs in pairs], axis=1)

    def __call__(self, images: Sequence[ndarray], batch: int = 64) -> ndarray:
        """Compute vectors (N, D) float32 of uint8 (H, W, C) arrays. `embed` stores the same vectors in float16."""
        starts = range(0, len(images), batch)
        parts = [self.encode(self.prepare(images[start : start + batch])) for start in starts]
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def match_channels(self, images: Sequence[ndarray]) -> Sequence[ndarray]:
        """Convert uint8 (H, W, 3) arrays to grey if the network takes one channel."""
        return [to_grey(image) for image in images] if self.channels == 1 else images

    def load_vectors(self, folder: Path) -> "Concatenated":
        """Load the vectors of all images that `embed` has stored in a folder."""
        network_matrix = COPY_MATRIX if (folder / f"{COPY_MATRIX}.npy").exists() else MAIN_MATRIX
        names = [network_matrix, *([PIXEL_MATRIX] if self.pixels else [])]
        return Concatenated([np.load(folder / f"{name}.npy", mmap_mode="r") for name in names])


@dataclass(frozen=True)
class Concatenated:
    """Memory-mapped matrices (N, D) as one matrix. Rows are concatenated when they are indexed."""

    parts: Sequence[ndarray]

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: slice | ndarray) -> ndarray:
        return np.concatenate([part[rows] for part in self.parts], axis=1)


@dataclass(frozen=True)
class Placed:
    """A network that computes on a device, to which it moves once in each process.

    It travels as weights of a CPU. `device` is as `choose_device` takes it, so that each worker process has its own.
    """

    network: Any
    device: Any

    @functools.cached_property
    def here(self) -> Any:
        """The network on the device of this process."""
        return _moved(self.network, choose_device(self.device))

    def features(self, images: Any, **settings: Any) -> Any:
        return self.here.features(images, **settings)

    def optimized(self, compute: str, *, compile: bool = False) -> "Placed":
        """As that of a backbone; what is compiled stays in this process."""
        network = _moved(self.network, choose_device(self.device))
        return Placed(network.optimized(compute, compile=compile), self.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __reduce__(self) -> tuple:
        return Placed, (_moved(without_reader(self.network), torch.device("cpu")), self.device)


def join_inputs(networks: Sequence[Any], parts: Sequence[tuple[list[Any], list[Any]]]) -> tuple[list[Any], list[Any]]:
    """One batch of several parts, each with something of each image and with what every network has prepared of them.

    The inputs are where their networks compute.
    """
    inputs, devices = zip(*(prepared for _, prepared in parts), strict=True), map(device_of, networks)
    batch = [joined(parts_of_one, device) for parts_of_one, device in zip(inputs, devices, strict=True)]
    return listed([of_images for of_images, _ in parts]), batch


def device_of(network: Any) -> torch.device | None:
    """Where a network computes in this process; None if it has no weights."""
    network = network.here if isinstance(network, Placed) else network
    return network.device if hasattr(network, "to") else None


def _moved(network: Any, device: torch.device) -> Any:
    """The network on a device, as fast as it was made; itself if it is there, or has no weights."""
    if not hasattr(network, "to") or network.device == device:
        return network
    moved, compute = network.to(device), getattr(network, "compute", torch.float32)
    if getattr(network, "network", None) is None or not hasattr(moved, "optimized"):
        return moved
    return moved.optimized("bf16" if compute == torch.bfloat16 else "fp32")


def compute_vectors(network: Any, tokens: str, prepared: Any) -> ndarray:
    """Compute vectors (B, D) float32: the class token, or this and the mean patch token; each of unit length."""
    features = network.features(prepared)
    parts = [features.cls] + ([features.patches.mean((1, 2))] if tokens == "cls+mean" else [])
    return np.concatenate([l2_normalise(part.float().cpu().numpy()) for part in parts], axis=1)


def without_reader(backbone: Any) -> Any:
    """Return the backbone without its reader of paths, which may not be picklable. Other processes get pixels."""
    if isinstance(backbone, Placed):
        return replace(backbone, network=without_reader(backbone.network))
    return replace(backbone, read=None) if getattr(backbone, "read", None) is not None else backbone
