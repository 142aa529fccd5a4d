"""A copy descriptor from a TorchScript file, such as SSCD (https://arxiv.org/abs/2202.10261): it only finds copies.

SSCD has its own thresholds: at 0.75 nine of ten matches are right; 0.6 and 0.45 are those of DINOv2's curation.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from troodon.config import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 288  # pixels; pictures of any shape are resized to a square, since a batch needs one size


@dataclass(frozen=True)
class CopyDescriptor:
    """A network (B, 3, S, S) -> (B, D) in a file. When pickled, it is the path that is sent to other processes.

    `for_copies`: whether its vectors have unit length, as those of SSCD, for which thresholds were published.
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
    def load(path: Path) -> "CopyDescriptor":
        """Load the file. Raises UsageError if it is not TorchScript, or if the network does not return one vector."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated, but these files use it
                network = torch.jit.load(str(path), map_location="cpu").eval()
            with torch.no_grad():
                vector = network(torch.zeros(1, 3, SIDE, SIDE))
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{path}: not a TorchScript copy descriptor ({str(error).splitlines()[0]})") from None
        if vector.ndim != 2:
            raise UsageError(f"{path}: returns {tuple(vector.shape)}; a copy descriptor returns one vector per image")
        has_unit_length = abs(vector.norm().item() - 1.0) < 1e-3
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        return CopyDescriptor(path, network, digest, for_copies=has_unit_length)

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self.network.state_dict().values()), torch.device("cpu"))

    def to(self, device: torch.device) -> "CopyDescriptor":
        """The same descriptor on a device; this one stays where it is."""
        return replace(self, network=torch.jit.load(str(self.path), map_location=device).eval())

    def __reduce__(self) -> tuple:
        return CopyDescriptor.load, (self.path,)

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, 3) arrays of any sizes -> (B, 3, SIDE, SIDE), resized and normalised."""
        parts = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in images]
        x_BCHW = torch.cat([F.interpolate(part, (SIDE, SIDE), mode="bilinear", antialias=True) for part in parts])
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        return (x_BCHW.float() / 255 - mean) / std

    @torch.no_grad()
    def features(self, images: Tensor, blocks: int = 1) -> SimpleNamespace:
        return SimpleNamespace(cls=self.network(images.to(self.device)))
