"""Frozen teachers at work: networks that do not learn, on their device, with a cache of their tokens."""

import contextlib
import dataclasses
import math
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from troodon import dist
from troodon.config import pair
from troodon.learn.config import AdaptConfig, ParallelConfig, PretrainConfig
from troodon.learn.cost import stays_whole
from troodon.learn.network import Network
from troodon.learn.objective import ObjectiveConfig
from troodon.learn.parallel import build, first_weights
from troodon.learn.teacher import Teacher
from troodon.model.config import ViTConfig
from troodon.run import say
from troodon.views.batch import Batch

# Shape suffixes: N = G * B global crops of B images, C colours, H W pixels, P patches, h w rows and columns of them,
#                 T tokens: the class token and the patches, D channels.

LEFT_FREE = 0.1  # of the disk that holds the cache
WITHOUT_HEADS = ObjectiveConfig(terms=(("cls_features", 1.0),))


def build_teacher(
    teacher: Teacher, config: PretrainConfig, device: torch.device, compute: torch.dtype
) -> "FrozenNetwork":
    """The network on its device, whole or if it is very large a shard of it, for crops of a run with this config."""
    parallel = ParallelConfig(compile=config.parallel.compile)
    run = teacher.run or PretrainConfig(objective=WITHOUT_HEADS)
    vit = dataclasses.replace(teacher.vit, drop_path=0.0)
    run = dataclasses.replace(run, vit=vit, parallel=parallel, adapt=AdaptConfig())
    is_whole = dist.world_size() == 1 or stays_whole(vit, compute.itemsize)
    network = build(run, first_weights(run, teacher.backbone, teacher.heads), device, compute, is_whole=is_whole)
    if is_whole and compute != torch.float32:  # shards are gathered in this dtype anyway
        for layer in network.backbone.blocks.modules():
            if isinstance(layer, nn.Linear):  # the same numbers that autocast computes at each step
                layer.to(compute)
    student, own = config.photometric, teacher.backbone.preprocessing
    if (student.mean, student.std) == (own.mean, own.std):
        return FrozenNetwork(teacher.backbone.name, network, teacher.vit)
    mean, std, own_mean, own_std = (
        torch.tensor(v, device=device)[:, None, None] for v in (student.mean, student.std, own.mean, own.std)
    )
    scale, shift = std / own_std, (mean - own_mean) / own_std
    return FrozenNetwork(teacher.backbone.name, network, teacher.vit, scale, shift)


@contextlib.contextmanager
def frozen_teachers(
    teachers: Sequence[Teacher],
    config: PretrainConfig,
    run: Path,
    images: int,
    device: torch.device,
    compute: torch.dtype,
) -> Iterator[list["FrozenNetwork"]]:
    """Frozen teachers on their device. If crops come again, each has a cache below the folder `run`, until the end."""
    frozen = [build_teacher(teacher, config, device, compute) for teacher in teachers]
    # Each machine has its own: on a disk of the network, others may see that tokens are there before they are.
    crops, home = config.crops, run / "seen-by-teachers" / platform.node()
    if not frozen or not crops.visits or crops.mixed:
        yield frozen
        return
    if dist.rank() == 0:
        shutil.rmtree(home.parent, ignore_errors=True)
    dist.barrier()
    home.mkdir(parents=True, exist_ok=True)
    try:
        for number, teacher in enumerate(frozen):
            height, width = pair(crops.global_px)
            tokens = 1 + height // teacher.vit.patch * (width // teacher.vit.patch)
            if isinstance(next(teacher.network.parameters()), DTensor):
                continue  # where some ranks had read what others compute, these would wait for their shards for ever
            sizes = (images, crops.visits, 2, tokens, teacher.vit.dim)
            if TeacherCache.fits(home / f"{number}", *sizes):
                teacher.cache = TeacherCache(home / f"{number}", *sizes)
            elif dist.rank() == 0:
                say(f"  {teacher.name}: the disk has no room for a cache; the teacher runs again at each visit")
        dist.barrier()
        yield frozen
    finally:
        if dist.rank() == 0:
            shutil.rmtree(home.parent, ignore_errors=True)


class FrozenNetwork:
    """A network, with heads if it has any, that does not learn. Any number of students may ask it about one batch: it
    runs once. `scale` and `shift`, (C, 1, 1) each, turn the students' normalisation into its own."""

    def __init__(
        self,
        name: str,
        network: Network,
        vit: ViTConfig,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ):
        self.name, self.network, self.vit = name, network.requires_grad_(False).eval(), vit
        self.scale, self.shift = scale, shift
        self.cache: TeacherCache | None = None  # for crops that come again
        self._tokens: WeakKeyDictionary[Batch, Tensor] = WeakKeyDictionary()

    def cls(self, batch: Batch) -> Tensor:
        """(N, D): class tokens of the global crops, one view after another."""
        return self._tokens_of(batch)[:, 0]

    def patches(self, batch: Batch, patch: int) -> Tensor:
        """(N, P, D): patches of the global crops, resampled to the grid of another patch size."""
        patches_NPD, (height, width) = self._tokens_of(batch)[:, 1:], batch.globals_GBCHW.shape[-2:]
        if patch == self.vit.patch:
            return patches_NPD
        patches_NDhw = patches_NPD.mT.unflatten(2, (height // self.vit.patch, width // self.vit.patch)).float()
        grid = (height // patch, width // patch)
        resampled = F.interpolate(patches_NDhw, grid, mode="bilinear", antialias=True, align_corners=False)
        return resampled.flatten(2).mT.to(patches_NPD.dtype)

    def _tokens_of(self, batch: Batch) -> Tensor:
        """(N, 1 + P, D): class token and patches of the global crops."""
        if batch not in self._tokens:
            tokens = None if self.cache is None else self.cache.read(batch)
            if tokens is None:
                tokens = self._forward(batch.globals_GBCHW.flatten(0, 1))
                if self.cache is not None:
                    self.cache.write(batch, tokens)
            self._tokens[batch] = tokens
        return self._tokens[batch]

    def _forward(self, crops_NCHW: Tensor) -> Tensor:
        if self.scale is not None and self.shift is not None:
            crops_NCHW = crops_NCHW * self.scale + self.shift
        (tokens,) = self.network.backbone([crops_NCHW])
        return torch.cat([tokens.cls_BD[:, None], tokens.patches_BPD], 1)


class TeacherCache:
    """Tokens of a frozen teacher, in half precision, in a scratch file that the ranks of a machine share.

    For `images` images with `visits` sets of `views` global crops each. A part of a batch is read if all its images are
    in the cache.
    """

    def __init__(self, path: Path, images: int, visits: int, views: int, tokens: int, dim: int):
        self.visits, self.views = visits, views
        shape = (images * visits, views, tokens, dim)
        with contextlib.suppress(FileExistsError):  # the first rank makes the files, full of zeros
            for file, size in ((path, 2 * math.prod(shape)), (path.with_suffix(".there"), shape[0])):
                with open(file, "xb") as new:
                    new.truncate(size)
        self.tokens = np.memmap(path, np.float16, "r+", shape=shape)
        self.present = np.memmap(path.with_suffix(".there"), np.uint8, "r+", shape=shape[:1])

    @staticmethod
    def fits(path: Path, images: int, visits: int, views: int, tokens: int, dim: int) -> bool:
        """Whether the disk has room."""
        disk = shutil.disk_usage(path.parent)
        return 2 * images * visits * views * tokens * dim < disk.free - LEFT_FREE * disk.total

    def read(self, batch: Batch) -> Tensor | None:
        """(N, 1 + P, D), on the batch's device; None if some image of it is not in the cache."""
        rows = self._rows(batch)
        if not self.present[rows].all():
            return None
        tokens_BGTD = dist.send(torch.from_numpy(self.tokens[rows]), batch.globals_GBCHW.device)  # half as many bytes
        return tokens_BGTD.transpose(0, 1).flatten(0, 1).float()

    def write(self, batch: Batch, tokens_NTD: Tensor) -> None:
        rows = self._rows(batch)
        tokens_BGTD = tokens_NTD.unflatten(0, (self.views, -1)).transpose(0, 1)
        self.tokens[rows] = tokens_BGTD.half().cpu().numpy()
        self.present[rows] = 1

    def _rows(self, batch: Batch) -> np.ndarray:
        assert batch.images_B2 is not None, "a loader sets which images a batch shows"
        image_B, visit_B = batch.images_B2.numpy().T
        return image_B * self.visits + visit_B
