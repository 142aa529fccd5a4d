"""Teachers that do not learn, for distillation: what they see of a batch, and their features on one scale."""

import contextlib
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from troodon.learn.losses import Ranks
from troodon.model.config import ViTConfig
from troodon.views.batch import Batch

# Shape suffixes: N = G * B global crops of B images, C colours, H W pixels, P patches, h w rows and columns of them,
#                 T tokens: the class token and the patches, D channels,
#                 M rows: class tokens, or patches, of the whole batch.

LEFT_FREE = 0.1  # of the disk that holds what teachers have seen
SETTLED = 100.0  # steps over which moments are plain means; later ones forget at this rate
EPS = 1e-6


class Frozen:
    """A network with its heads, if it has any, that only answers. Any number of students may ask it about one batch:
    it looks once. `scale` and `shift`, (C, 1, 1) each, turn the students' crops into what it was trained to see."""

    def __init__(
        self,
        name: str,
        network: Any,  # a Branch of method.py, which knows this file
        vit: ViTConfig,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ):
        self.name, self.network, self.vit = name, network.requires_grad_(False).eval(), vit
        self.scale, self.shift = scale, shift
        self.kept: Kept | None = None  # what it has seen of crops that come again
        self._seen: WeakKeyDictionary[Batch, Tensor] = WeakKeyDictionary()

    def cls(self, batch: Batch) -> Tensor:
        """(N, D): its class tokens of the global crops, one view after another."""
        return self._see(batch)[:, 0]

    def patches(self, batch: Batch, patch: int) -> Tensor:
        """(N, P, D): its patches of the global crops, resampled to a grid of patches of another size."""
        patches_NPD, (height, width) = self._see(batch)[:, 1:], batch.globals_GBCHW.shape[-2:]
        if patch == self.vit.patch:
            return patches_NPD
        patches_NDhw = patches_NPD.mT.unflatten(2, (height // self.vit.patch, width // self.vit.patch)).float()
        grid = (height // patch, width // patch)
        resampled = F.interpolate(patches_NDhw, grid, mode="bilinear", antialias=True, align_corners=False)
        return resampled.flatten(2).mT.to(patches_NPD.dtype)

    def _see(self, batch: Batch) -> Tensor:
        """(N, 1 + P, D): class token and patches of the global crops."""
        if batch not in self._seen:
            known = None if self.kept is None else self.kept.read(batch)
            if known is None:
                known = self._look(batch.globals_GBCHW.flatten(0, 1))
                if self.kept is not None:
                    self.kept.write(batch, known)
            self._seen[batch] = known
        return self._seen[batch]

    def _look(self, crops_NCHW: Tensor) -> Tensor:
        if self.scale is not None and self.shift is not None:
            crops_NCHW = crops_NCHW * self.scale + self.shift
        (tokens,) = self.network.backbone([crops_NCHW])
        return torch.cat([tokens.cls_BD[:, None], tokens.patches_BPD], 1)


class Kept:
    """What a teacher has seen, in half precision, in a scratch file that the ranks of a machine share.

    Of `images` images with so many sets of `views` global crops each. A part of a batch is read if all of it is there.
    """

    def __init__(self, path: Path, images: int, visits: int, views: int, tokens: int, dim: int):
        self.visits, self.views = visits, views
        shape = (images * visits, views, tokens, dim)
        with contextlib.suppress(FileExistsError):  # by the first of the ranks; as long as it says, and empty
            for file, size in ((path, 2 * math.prod(shape)), (path.with_suffix(".there"), shape[0])):
                with open(file, "xb") as made:
                    made.truncate(size)
        self.tokens = np.memmap(path, np.float16, "r+", shape=shape)
        self.there = np.memmap(path.with_suffix(".there"), np.uint8, "r+", shape=shape[:1])

    @staticmethod
    def fits(path: Path, images: int, visits: int, views: int, tokens: int, dim: int) -> bool:
        """Whether the disk has room."""
        disk = shutil.disk_usage(path.parent)
        return 2 * images * visits * views * tokens * dim < disk.free - LEFT_FREE * disk.total

    def read(self, batch: Batch) -> Tensor | None:
        """(N, 1 + P, D), on the batch's device; None if some image of it has not been seen."""
        rows = self._rows(batch)
        if not self.there[rows].all():
            return None
        known_BGTD = torch.from_numpy(self.tokens[rows])
        return known_BGTD.transpose(0, 1).flatten(0, 1).float().to(batch.globals_GBCHW.device)

    def write(self, batch: Batch, tokens_NTD: Tensor) -> None:
        rows = self._rows(batch)
        known_BGTD = tokens_NTD.unflatten(0, (self.views, -1)).transpose(0, 1)
        self.tokens[rows] = known_BGTD.half().cpu().numpy()
        self.there[rows] = 1

    def _rows(self, batch: Batch) -> np.ndarray:
        assert batch.images_B2 is not None, "a loader says which images a batch shows"
        image_B, visit_B = batch.images_B2.numpy().T
        return image_B * self.visits + visit_B


class Maps(nn.Module):
    """Of a student: linear maps of its class token ("cls") and of its patches ("patches"), if they are asked of, to as
    many channels as each teacher has."""

    def __init__(self, dim: int, widths: Mapping[str, Sequence[int]]):
        super().__init__()
        self.kinds = tuple(widths)
        for kind, of in widths.items():
            self.add_module(kind, nn.ModuleList(nn.Linear(dim, width) for width in of))

    @torch.no_grad()
    def initialize(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, **tokens: Tensor) -> dict[str, list[Tensor]]:
        """What the student makes of each teacher's tokens."""
        return {kind: [layer(tokens[kind]) for layer in self.get_submodule(kind).children()] for kind in self.kinds}


def moments(rows_MD: Tensor, before_3D: Tensor, ranks: Ranks) -> Tensor:
    """(3, D): steps counted, means and mean squares of the channels over all rows so far, and those of all ranks.

    In fp64: a deviation may be a thousandth of the mean, and is what is left of the squares.
    """
    rows_MD = rows_MD.double()
    count = ranks.total(rows_MD.new_full((), len(rows_MD))).clamp(min=1.0)
    now_2D = ranks.total(torch.stack([rows_MD.sum(0), rows_MD.square().sum(0)])) / count
    steps_D = before_3D[0] + 1.0
    return torch.cat([steps_D[None], before_3D[1:].lerp(now_2D, 1.0 / steps_D.clamp(max=SETTLED))])


def standardised(rows_MD: Tensor, moments_3D: Tensor) -> Tensor:
    """The same rows, every channel of mean 0 and deviation 1."""
    _, mean_D, square_D = moments_3D
    deviation_D = (square_D - mean_D.square()).clamp(min=EPS**2).sqrt()
    return (rows_MD.float() - mean_D.float()) / deviation_D.float()
