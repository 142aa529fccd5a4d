"""A trained network for use: pictures in any form become features.

saved.py has its folder; weights.py reads the weights of others into the same object.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.config import UsageError, nearest, pair
from troodon.model import inference
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.saved import SavedViT
from troodon.model.vit import Tokens, ViT
from troodon.pixels import BadImage, advice, band_count, of_array, of_pillow, to_uint8, used
from troodon.run import say

# Shape suffixes: B images, C colours, H W pixels, D channels, R registers, h w rows and columns of patches.

Picture = Any  # a path, bytes, a PIL image, or an array (H, W) or (H, W, C)
LONGEST = 4  # an image side longer than this many times what the crop needs is cut before resizing: it is never shown


@dataclass(frozen=True)
class Features:
    """Frozen features of B images: tensors of their own, which can be trained on and changed."""

    cls: Tensor  # (B, D) class token after the last norm
    patches: Tensor  # (B, h, w, D)
    registers: Tensor  # (B, R, D)
    blocks: list[tuple[Tensor, Tensor]]  # class token (B, D) and mean patch (B, D) of the last blocks, earliest first
    rows: list[int] = dataclasses.field(default_factory=list)  # which of the given images: without those left out


@dataclass(frozen=True)
class Backbone(SavedViT):
    """A ViT for inference with its preprocessing.

    `read` gives the values (H, W, C) of the image at a path, or in bytes; `troodon.load` provides it.
    """

    read: Callable[[Any], np.ndarray] | None = None
    compute: torch.dtype = torch.float32
    network: ViT | None = None  # the copy of `vit` that `optimized` made for inference

    def to(self, device: str | torch.device) -> "Backbone":
        """The same backbone on a device, without what `optimized` did, which depends on the device.

        This one stays where it is. UsageError for a data type, and for a device that is not there.
        """
        if isinstance(device, torch.dtype):
            raise UsageError(f"to({device}): weights stay in fp32; optimized('bf16') gives a backbone that is faster")
        try:
            target = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"device {str(device)!r}: not on this machine ({reason})") from None
        vit = self.vit if target == self.device else copy.deepcopy(self.vit).to(target)
        return dataclasses.replace(self, vit=vit, compute=torch.float32, network=None)

    def optimized(self, compute: str = "auto", *, compile: bool = False) -> "Backbone":
        """The same backbone with faster `features`: products in "bf16", "fp32", or the faster of both here ("auto").

        Features in bf16 differ from those in fp32, the default of `features`, by less than a hundredth. `compile` takes
        a minute or more before the first images of each size. UsageError for another `compute`.
        """
        known = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if compute not in ("auto", *known):
            raise nearest("compute", compute, ["auto", *known])
        dtype = (
            inference.fastest_dtype(self.vit, pair(self.preprocessing.crop)) if compute == "auto" else known[compute]
        )
        return dataclasses.replace(self, compute=dtype, network=inference.optimized(self.vit, dtype, compile=compile))

    def prepare(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Pictures of any sizes, as `features` takes them -> (B, C, *crop), resized, cropped and normalised."""
        return self._prepare(images, "raise")[0]

    @torch.no_grad()
    def features(
        self,
        images: Tensor | Picture | Sequence[Picture],
        *,
        blocks: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> Features:
        """Features of images: paths, bytes, arrays, PIL images, or a prepared (B, C, H, W) tensor; of one or a list.

        The same picture gives the same features in every form (troodon/pixels.py): PIL images are treated as files,
        arrays (H, W, C) are uint8, uint16, bool, or floats in [0, 1], and C is the network's number of channels; (H, W)
        is grey. A prepared tensor has floats, and any height and width that the patch size divides. `blocks` is the
        number of last blocks of which class and mean patch tokens are returned.

        An image that cannot be read is a UsageError that names it; with `on_error` "skip" it is left out, and
        `rows` tells which images the features are of. UsageError for whatever this network cannot take.
        """
        if on_error not in ("raise", "skip"):
            raise nearest("on_error", on_error, ("raise", "skip"))
        if not 1 <= blocks <= self.config.depth:
            raise UsageError(f"blocks {blocks}: this network has {self.config.depth}; take 1 to {self.config.depth}")
        if isinstance(images, Tensor):
            images = self._check(images)
            rows = list(range(len(images)))
        else:
            images, rows = self._prepare(images, on_error)
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()  # the copy overlaps with work of the device
        images, width = images.to(self.device, non_blocking=True), images.shape[-1] // self.config.patch
        parts = []
        for per_block in self.tokens(images, blocks) if rows else []:
            means = [(t.cls_BD, t.patches_BPD.mean(1)) for t in per_block]
            patches_BhwD = per_block[-1].patches_BPD.unflatten(1, (-1, width))
            parts.append(Features(per_block[-1].cls_BD, patches_BhwD, per_block[-1].registers_BRD, means))
        return dataclasses.replace(_concatenated(parts or [self._none(images, blocks)]), rows=rows)

    def tokens(self, images_BCHW: Tensor, blocks: int) -> Iterator[list[Tokens]]:
        """Tokens after each of the last blocks, earliest first, of a few images at a time."""
        for minibatch_BCHW in inference.minibatches(images_BCHW, self.vit):
            with torch.no_grad(), inference.autocast(self.device, self.compute):
                per_block = (self.network or self.vit).last_blocks([minibatch_BCHW], blocks)
            yield [tokens for (tokens,) in per_block]

    def _prepare(self, images: Picture | Sequence[Picture], on_error: str) -> tuple[Tensor, list[int]]:
        """Prepared images, and which of the given ones they are."""
        if len(self.preprocessing.mean) != self.channels:
            counts = f"its preprocessing has {len(self.preprocessing.mean)} means for {self.channels} channels"
            raise UsageError(f"{self.name}: {counts}; give it prepared tensors")
        is_one = isinstance(images, str | Path | bytes | bytearray) or hasattr(images, "convert")
        pictures = [images] if is_one or (isinstance(images, np.ndarray) and images.ndim < 4) else list(images)
        prepared, rows, seen, broken = [], [], [], []
        for row, picture in enumerate(pictures):
            try:
                values = self._values(picture)
            except (BadImage, OSError) as error:
                name = str(picture) if isinstance(picture, str | Path) else f"image {row}"
                broken.append(f"{name}: {error.strerror or error if isinstance(error, OSError) else error}")
                if on_error == "raise":
                    raise UsageError(f"{broken[0]}; on_error='skip' leaves it out") from None
                continue
            seen += [] if self.preprocessing.range or (one := used(values)) is None else [one]
            prepared.append(_prepare(self._to_uint8(values), self.preprocessing))
            rows.append(row)
        if broken:
            say(f"features: {len(broken)} of {len(pictures)} images left out: {'; '.join(broken)}"[:500])
        if seen and (line := advice(seen)):
            say(f"features: {line} (troodon.load(..., range=...))")
        empty = torch.zeros(0, self.channels, *pair(self.preprocessing.crop))
        return torch.stack(prepared) if prepared else empty, rows

    def _pixels(self, picture: Picture) -> np.ndarray:
        """uint8 (H, W, C) of a picture, as the network sees it before it is resized."""
        return self._to_uint8(self._values(picture))

    def _values(self, picture: Picture) -> np.ndarray:
        """The values (H, W, C) of a picture. BadImage or OSError if it cannot be read."""
        if isinstance(picture, str | Path | bytes | bytearray):
            if self.read is None:
                given = f"{len(picture)} bytes" if isinstance(picture, bytes | bytearray) else picture
                raise UsageError(f"{given}: this backbone takes pixels; load it with troodon.load to read paths")
            return self.read(picture)
        if hasattr(picture, "convert") and hasattr(picture, "getbands"):
            if self.channels not in (1, 3, bands := band_count(picture)):
                raise UsageError(f"an image of {bands} channels ({picture.mode}): this network takes {self.channels}")
            return of_pillow(picture, self.channels, self.preprocessing.range)
        values = of_array(np.asarray(picture), self.preprocessing.range)
        if values.shape[2] != self.channels and not (np.ndim(picture) == 2 and self.channels == 3):
            expected = f"this network takes (height, width, {self.channels})"
            raise UsageError(f"an image of shape {values.shape}: {expected}")
        return values

    def _to_uint8(self, values_HWC: np.ndarray) -> np.ndarray:
        return to_uint8(values_HWC, self.channels, self.preprocessing.range)

    def _check(self, images: Tensor) -> Tensor:
        """A prepared tensor as float32 (B, C, H, W); UsageError for one that the network cannot take."""
        x_BCHW, patch = images[None] if images.ndim == 3 else images, self.config.patch
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.channels:
            wanted = f"(batch, {self.channels}, height, width)"
            raise UsageError(f"a tensor of shape {tuple(images.shape)}: this network takes {wanted}")
        if not x_BCHW.is_floating_point():
            fix = f"give pictures as arrays (height, width, {self.channels})"
            raise UsageError(f"a tensor of {str(images.dtype)[6:]}: a prepared tensor has normalised floats; {fix}")
        if x_BCHW.shape[2] % patch or x_BCHW.shape[3] % patch or not x_BCHW.shape[2] * x_BCHW.shape[3]:
            near = " x ".join(str(max(1, round(side / patch)) * patch) for side in x_BCHW.shape[2:])
            size = f"{x_BCHW.shape[2]} x {x_BCHW.shape[3]} pixels"
            raise UsageError(f"a tensor of {size} does not divide into patches of {patch}; the nearest is {near}")
        return x_BCHW.float()

    def _none(self, images_BCHW: Tensor, blocks: int) -> Features:
        """Features of no image, with the shapes of those of some."""
        grid = [side // self.config.patch for side in images_BCHW.shape[2:]]
        shapes = (), grid, [self.config.registers]
        cls, patches, registers = (torch.zeros(0, *s, self.config.dim, device=self.device) for s in shapes)
        return Features(cls, patches, registers, [(cls, cls)] * blocks)

    @staticmethod
    def of(saved: SavedViT) -> "Backbone":
        """The same network, for use."""
        return Backbone(saved.vit, saved.preprocessing, saved.name, saved.fingerprint)

    @staticmethod
    def random(config: ViTConfig, preprocessing: Preprocessing, seed: int = 0) -> "Backbone":
        """An untrained network, the baseline of every trained one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit = ViT(config)
            vit.initialize()
        return Backbone.from_state_dict(vit.state_dict(), config, preprocessing, name="random")


def _concatenated(parts: list[Features]) -> Features:
    per_block = zip(*(f.blocks for f in parts), strict=True)
    return Features(
        torch.cat([f.cls for f in parts]),
        torch.cat([f.patches for f in parts]),
        torch.cat([f.registers for f in parts]),
        [(torch.cat([cls for cls, _ in block]), torch.cat([mean for _, mean in block])) for block in per_block],
    )


def _prepare(image_HWC: np.ndarray, p: Preprocessing) -> Tensor:
    crop_h, crop_w = pair(p.crop)
    height, width = image_HWC.shape[:2]
    tallest, widest = max(1, LONGEST * width * crop_h // crop_w), max(1, LONGEST * height * crop_w // crop_h)
    top, left = max(0, height - tallest) // 2, max(0, width - widest) // 2
    image_HWC = image_HWC[top : top + tallest, left : left + widest]
    height, width = image_HWC.shape[:2]
    cover = [side * p.resize / min(crop_h, crop_w) for side in (crop_h, crop_w)]
    scale = max(cover[0] / height, cover[1] / width)
    size = [max(round(cover[0]), round(height * scale)), max(round(cover[1]), round(width * scale))]
    x_CHW = torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)  # a copy: some are read-only
    if size != [height, width]:
        x_CHW = F.interpolate(x_CHW[None], size=size, mode="bicubic", antialias=True)[0]
    top, left = (size[0] - crop_h) // 2, (size[1] - crop_w) // 2
    x_CHW = x_CHW[:, top : top + crop_h, left : left + crop_w].float() / 255.0
    mean, std = (torch.tensor(v)[:, None, None] for v in (p.mean, p.std))
    return (x_CHW - mean) / std
