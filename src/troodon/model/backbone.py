"""A trained network for use: pictures in any form become features.

saved.py has its folder; weights.py reads the weights of others into the same object.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from troodon.config import UsageError, nearest, pair
from troodon.devices import choose_device, memory_advice
from troodon.model import inference
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.notebook import backbone_table, features_table
from troodon.model.preprocess import check_divides, crop, joined, stacked, whole, with_size
from troodon.model.saved import SavedViT
from troodon.model.vit import Tokens, ViT
from troodon.pillow import band_count, of_pillow
from troodon.pixels import BadImage, advice, of_array, to_uint8, used
from troodon.run import say
from troodon.stream import default_threads, map_ordered

# Shape suffixes: B images, C colours, H W pixels, D channels, N heads, R registers, h w rows and columns of patches.

Picture = Any  # a path, bytes, a PIL image, an array (H, W) or (H, W, C), or a tensor (C, H, W)
Size = int | Sequence[int] | None  # of crops: pixels of a side, or (height, width); None: that of the preprocessing


@dataclass(frozen=True)
class Features:
    """Frozen features of B images, or those after one block: ordinary tensors, which a head can be trained on.

    With `keep_aspect` each image has a grid of its own: then `patches` is a list of tensors (h, w, D).
    """

    cls: Tensor  # (B, D) class token
    patches: Any  # Tensor (B, h, w, D)
    registers: Tensor  # (B, R, D)
    blocks: list["Features"] = dataclasses.field(default_factory=list)  # after each chosen block, in order
    rows: list[int] = dataclasses.field(default_factory=list)  # which of the given images: without those left out

    @property
    def mean(self) -> Tensor:
        """The mean patch token (B, D)."""
        if isinstance(self.patches, Tensor):
            return self.patches.mean((1, 2))
        return torch.stack([hwD.mean((0, 1)) for hwD in self.patches]) if self.patches else torch.zeros_like(self.cls)

    def _repr_html_(self) -> str:
        return features_table(self)


@dataclass(frozen=True)
class Backbone(SavedViT):
    """A ViT for inference with its preprocessing.

    `read` gives the values (H, W, C) of the image at a path, or in bytes; `troodon.load` provides it.
    """

    read: Callable[[Any], np.ndarray] | None = None
    compute: torch.dtype = torch.float32
    network: ViT | None = None  # the copy of `vit` that `optimized` made for inference

    def __repr__(self) -> str:
        c, size = self.config, " x ".join(map(str, pair(self.preprocessing.crop)))
        shape = f"depth {c.depth}, dim {c.dim}, patch {c.patch}, images of {size} pixels"
        return f"Backbone({self.name!r}, {shape}, {self.dtype}, computes in {self.compute}, on {self.device})"

    def _repr_html_(self) -> str:
        return backbone_table(self)

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights, and of features."""
        return self.vit.cls_token.dtype

    def to(self, device: str | torch.device) -> "Backbone":
        """The same backbone on a device, without what `optimized` did, which depends on the device.

        This one stays where it is. UsageError for a data type, and for a device that is not there.
        """
        if isinstance(device, torch.dtype):
            raise UsageError(f"to({device}): weights stay in fp32; optimized('bf16') gives a backbone that is faster")
        target = choose_device(device)
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

    def prepare(self, images: Picture | Sequence[Picture], *, size: Size = None) -> Tensor:
        """Pictures of any sizes, as `features` takes them -> (B, C, *crop), resized, cropped and normalised."""
        p = with_size(self.preprocessing, size, self.config.patch)
        if isinstance(images, list) and images and len(p.mean) == self.channels and all(map(is_pixels, images)):
            batch_BCHW = torch.empty(len(images), self.channels, *pair(p.crop))  # written once: this is what threads do
            for image_HWC, x_CHW in zip(images, batch_BCHW, strict=True):
                crop(self._pixels(image_HWC), p, x_CHW)
            return batch_BCHW
        batches = [x_BCHW for _, x_BCHW in self._batches(images, p, False, "raise")]
        return joined(batches) if batches else torch.zeros(0, self.channels, *pair(p.crop))

    @torch.no_grad()
    def features(
        self,
        images: Tensor | Picture | Sequence[Picture],
        *,
        size: Size = None,
        blocks: int | Sequence[int] = 1,
        norm: bool = True,
        keep_aspect: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> Features:
        """Features of images: paths, bytes, PIL images, arrays and tensors; one alone, or a list in which they mix.

        The same picture gives the same features in every form (troodon/pixels.py): PIL images are treated as files,
        arrays (H, W, C) and tensors (C, H, W) of integers are uint8, uint16 or bool, arrays of floats are in [0, 1],
        and C is the network's number of channels; (H, W) is grey. A tensor of floats, (C, H, W) or (B, C, H, W), is
        prepared already (`prepare`): any height and width that the patch size divides.

        `size` is that of the crops, in pixels: a side, or (height, width). With `keep_aspect` nothing is cut off: each
        image keeps its aspect, with a shorter side of that size, and `patches` is a list of tensors (h, w, D).

        The features are those after the last block. `blocks` adds some after other blocks, as `Features` in `.blocks`:
        a number means that many last blocks, a list the blocks of these numbers, from 0, where -1 is the last. `norm`
        says whether the last norm is applied, to all of them.

        An image that cannot be read is a UsageError that names it; with `on_error` "skip" it is left out, and
        `rows` tells which images the features are of. UsageError for whatever this network cannot take.
        """
        if on_error not in ("raise", "skip"):
            raise nearest("on_error", on_error, ("raise", "skip"))
        wanted, last = self.block_numbers(blocks), self.config.depth - 1
        run = sorted({*wanted, last})  # the order in which blocks compute
        p, rows, parts = with_size(self.preprocessing, size, self.config.patch), [], []
        for batch_rows, x_BCHW in self._batches(images, p, keep_aspect, on_error):
            rows += batch_rows
            width = x_BCHW.shape[-1] // self.config.patch
            parts += [
                [(t.cls_BD, t.patches_BPD.unflatten(1, (-1, width)), t.registers_BRD) for t in per_block]
                for per_block in self.tokens(self._moved(x_BCHW), run, norm)
            ]
        empty = self._none(images, p)
        order = sorted(range(len(rows)), key=rows.__getitem__)
        computed = [_joined([part[i] for part in parts] or [empty], order, keep_aspect) for i in range(len(run))]
        return dataclasses.replace(
            computed[-1], blocks=[computed[run.index(number)] for number in wanted], rows=[rows[i] for i in order]
        )

    @torch.no_grad()
    def attention(
        self,
        images: Tensor | Picture | Sequence[Picture],
        *,
        size: Size = None,
        block: int = -1,
        keep_aspect: bool = False,
    ) -> Any:
        """What the class token and the registers attend to, in a block: (B, N, 1 + R, h, w), the class token first.

        Probabilities over all tokens, of which those of the patches are returned; so they sum to less than one. Images
        and sizes as in `features`; with `keep_aspect` a list of tensors (N, 1 + R, h, w).
        """
        (block,) = self.block_numbers([block])
        p, rows, parts = with_size(self.preprocessing, size, self.config.patch), [], []
        for batch_rows, x_BCHW in self._batches(images, p, keep_aspect, "raise"):
            rows += batch_rows
            for minibatch_BCHW in inference.minibatches(self._moved(x_BCHW), self.vit):
                parts += inference.attention(self.vit, minibatch_BCHW, block)
        maps = [parts[i] for i in sorted(range(len(rows)), key=rows.__getitem__)]
        if keep_aspect:
            return maps
        grid = self._none(images, p)[1].shape[1:3]
        shape = 0, self.config.heads, 1 + self.config.registers, *grid
        return torch.stack(maps) if maps else torch.zeros(shape, device=self.device)

    def tokens(self, images_BCHW: Tensor, blocks: Sequence[int], norm: bool = True) -> Iterator[list[Tokens]]:
        """Tokens after each of these blocks, numbered from 0 and ascending, of a few prepared images at a time."""
        for minibatch_BCHW in inference.minibatches(images_BCHW, self.vit):
            with torch.no_grad(), inference.autocast(self.device, self.compute), self._memory_advice(minibatch_BCHW):
                per_block = (self.network or self.vit).after_blocks([minibatch_BCHW], blocks, norm=norm)
            yield [tokens for (tokens,) in per_block]

    def _memory_advice(self, x_BCHW: Tensor) -> contextlib.AbstractContextManager[None]:
        count, size = len(x_BCHW), " x ".join(map(str, x_BCHW.shape[2:]))
        fix = f"a smaller batch takes less (--batch {count // 2})" if count > 1 else "smaller images take less (--size)"
        return memory_advice(self.device, f"{count} images of {size} pixels at once", fix)

    def block_numbers(self, blocks: int | Sequence[int]) -> list[int]:
        """The numbers, from 0, of so many last blocks, or of those in a list, in its order."""
        depth = self.config.depth
        if isinstance(blocks, int):
            if not 1 <= blocks <= depth:
                raise UsageError(f"blocks {blocks}: this network has {depth}; take 1 to {depth}, or a list of numbers")
            return list(range(depth - blocks, depth))
        for number in blocks:
            if not (isinstance(number, int) and -depth <= number < depth):
                raise UsageError(f"block {number}: this network has the blocks 0 to {depth - 1}; -1 is the last")
        return [number % depth for number in blocks]

    def _moved(self, x_BCHW: Tensor) -> Tensor:
        """Prepared images on this device, in the data type of the weights."""
        if self.device.type == "cuda" and x_BCHW.device.type == "cpu":
            x_BCHW = x_BCHW.pin_memory()  # the copy overlaps with work of the device
        return x_BCHW.to(self.device, self.dtype, non_blocking=True)

    def _batches(
        self, images: Tensor | Picture | Sequence[Picture], p: Preprocessing, keep_aspect: bool, on_error: str
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Prepared images (B, C, H, W) of one size each, and which of the given images they are.

        Pictures are read a few at a time, so that any number of them fits into memory.
        """
        if isinstance(images, Tensor) and images.is_floating_point():
            if len(x_BCHW := self._check(images)):
                yield list(range(len(x_BCHW))), x_BCHW
            return
        if len(p.mean) != self.channels:
            counts = f"its preprocessing has {len(p.mean)} means for {self.channels} channels"
            raise UsageError(f"{self.name}: {counts}; give it prepared tensors")
        waiting: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for row, x_CHW in self._prepared(images, p, keep_aspect, on_error):
            of_size = waiting.setdefault(x_CHW.shape, [])
            of_size.append((row, x_CHW))
            if len(waiting) > 1 and not keep_aspect:
                a, b = (" x ".join(map(str, shape[1:])) for shape in list(waiting)[:2])
                raise UsageError(
                    f"image {row} is prepared in another size than those before ({b} and {a} pixels); "
                    "keep_aspect=True takes images of any sizes"
                )
            if len(of_size) >= inference.images_at_once(self.vit, x_CHW.shape[1:]):
                yield [row for row, _ in of_size], stacked([x for _, x in of_size], self.device)
                of_size.clear()
        for of_size in waiting.values():
            if of_size:
                yield [row for row, _ in of_size], stacked([x for _, x in of_size], self.device)

    def _prepared(
        self, images: Picture | Sequence[Picture], p: Preprocessing, keep_aspect: bool, on_error: str
    ) -> Iterator[tuple[int, Tensor]]:
        """Each readable picture as a tensor (C, H, W), with its number. It says which are left out, and why.

        Files are read, decoded and prepared by threads, ahead of the network.
        """
        pictures, seen, broken = _as_list(images), [], []

        def prepare(numbered: tuple[int, Picture]) -> tuple[Tensor | Exception, Any]:
            row, picture = numbered
            if isinstance(picture, Tensor) and picture.is_floating_point():
                if picture.ndim != 3:
                    raise UsageError(
                        f"image {row}, a tensor of shape {tuple(picture.shape)}: in a list each is one "
                        f"image ({self.channels}, height, width)"
                    )
                return self._check(picture)[0].cpu(), None
            try:
                values = self._values(picture)
            except (BadImage, OSError) as error:
                return error, None
            pixels_HWC = self._to_uint8(values)
            prepared = whole(pixels_HWC, p, self.config.patch) if keep_aspect else crop(pixels_HWC, p)
            return prepared, None if p.range else used(values)

        for row, (prepared, values_used) in enumerate(self._mapped(prepare, pictures, p)):
            if isinstance(prepared, Exception):
                name = str(pictures[row]) if isinstance(pictures[row], str | Path) else f"image {row}"
                reason = (prepared.strerror or prepared) if isinstance(prepared, OSError) else prepared
                broken.append(f"{name}: {reason}")
                if on_error == "raise":
                    raise UsageError(f"{broken[0]}; on_error='skip' leaves it out") from None
                continue
            seen += [] if values_used is None else [values_used]
            yield row, prepared
        if broken:
            say(f"features: {len(broken)} of {len(pictures)} images left out: {'; '.join(broken)}"[:500])
        if seen and (line := advice(seen)):
            say(f"features: {line} (troodon.load(..., range=...))")

    def _mapped(self, prepare: Callable, pictures: list[Picture], p: Preprocessing) -> Iterator[Any]:
        """What `prepare` makes of each picture with its number, in order: by threads if all of them are files.

        Others may be the same object twice, and arrays are often prepared by threads already.
        """
        are_files = all(isinstance(picture, str | Path | bytes | bytearray) for picture in pictures)
        threads = min(default_threads(), len(pictures)) if are_files else 1
        if threads < 2:
            yield from map(prepare, enumerate(pictures))
            return
        ahead = max(2 * threads, inference.images_at_once(self.vit, pair(p.crop)))
        with ThreadPoolExecutor(threads, "prepare") as pool:
            yield from map_ordered(pool, prepare, enumerate(pictures), ahead)

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
        if isinstance(picture, Tensor):  # (C, H, W), as others read files
            picture = picture.cpu().numpy()
            picture = picture[0] if len(picture) == 1 else np.moveaxis(picture, 0, -1)
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
        check_divides(x_BCHW.shape[2:], patch, "a tensor")
        return x_BCHW.float()

    def _none(self, images: Any, p: Preprocessing) -> tuple[Tensor, Tensor, Tensor]:
        """Class tokens, patches and registers of no image, with the shapes of those of some."""
        is_prepared = isinstance(images, Tensor) and images.is_floating_point()
        grid = [side // self.config.patch for side in (images.shape[-2:] if is_prepared else pair(p.crop))]
        shapes = (), grid, [self.config.registers]
        cls, patches, registers = (
            torch.zeros(0, *shape, self.config.dim, device=self.device, dtype=self.dtype) for shape in shapes
        )
        return cls, patches, registers

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


def is_pixels(picture: Picture) -> bool:
    """Whether this is what reading gives: an array (H, W, C) of 8 bits."""
    return isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3


def _as_list(images: Picture | Sequence[Picture]) -> list[Picture]:
    """The pictures, also where there is one."""
    if isinstance(images, str | Path | bytes | bytearray) or hasattr(images, "convert"):
        return [images]
    is_one = isinstance(images, np.ndarray | Tensor) and images.ndim < 4
    return [images] if is_one else list(images)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]], order: list[int], keep_aspect: bool) -> Features:
    """Class tokens, patches and registers of batches, put together in the order of the given images."""
    cls, registers = (torch.cat([part[i] for part in parts]) for i in (0, 2))
    if keep_aspect:
        patches = [hwD for _, patches_BhwD, _ in parts for hwD in patches_BhwD.clone()]
        return Features(cls[order], [patches[i] for i in order], registers[order])
    return Features(cls, torch.cat([patches for _, patches, _ in parts]), registers)
