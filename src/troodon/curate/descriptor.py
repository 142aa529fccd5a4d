"""A copy descriptor from a TorchScript file, such as SSCD's (https://arxiv.org/abs/2202.10261): it only finds copies.

Its thresholds are its own: 0.75 makes nine of ten matches right, 0.6 and 0.45 are those of DINOv2's curation.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from troodon.config import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 288  # pixels, to which pictures are resized, whatever their shape: batches need one size


@dataclass(frozen=True)
class Descriptor:
    """A network (B, 3, S, S) -> (B, D) in a file; the file travels between processes, not the network.

    `for_copies`: whether its vectors have length one, as SSCD's do, for which thresholds were published.
    """

    path: Path
    network: Any
    fingerprint: str
    channels: int = 3
    for_copies: bool = False

    @property
    def name(self) -> str:
        return self.path.name

    @staticmethod
    def load(path: Path) -> "Descriptor":
        """UsageError for a file that is not TorchScript, or whose network does not give one vector an image."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is old; the files are what they are
                network = torch.jit.load(str(path), map_location="cpu").eval()
            with torch.no_grad():
                found = network(torch.zeros(1, 3, SIDE, SIDE))
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{path}: not a TorchScript copy descriptor ({str(error).splitlines()[0]})") from None
        if found.ndim != 2:
            raise UsageError(f"{path}: gives {tuple(found.shape)} for an image; a copy descriptor gives one vector")
        unit = abs(found.norm().item() - 1.0) < 1e-3
        return Descriptor(path, network, hashlib.sha256(path.read_bytes()).hexdigest()[:12], for_copies=unit)

    def __reduce__(self) -> tuple:
        return Descriptor.load, (self.path,)

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, 3) arrays of any sizes -> (B, 3, SIDE, SIDE), resized and normalised."""
        parts = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in images]
        x_BCHW = torch.cat([F.interpolate(part, (SIDE, SIDE), mode="bilinear", antialias=True) for part in parts])
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        return (x_BCHW.float() / 255 - mean) / std

    @torch.no_grad()
    def features(self, images: Tensor, blocks: int = 1) -> SimpleNamespace:
        return SimpleNamespace(cls=self.network(images))
