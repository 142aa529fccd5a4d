"""Patch features of square windows that slide over an image: what dense protocols read, made once for all of them.

An image is resized so that its shorter side is that of a window, times a scale; windows overlap by a third. So every
window has one size, whatever the images, and a picture of any shape is seen whole. Maps are float16, and mapped from
the disk where there is a cache: they are a thousand times larger than class tokens.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon import run
from troodon.evaluate.features import Reader, finite, in_parts, kept_as, told
from troodon.images.decode import BadImage
from troodon.images.index import Index

# Shape suffixes: N windows, B of a batch, L chosen blocks (oldest first), h w patches, D channels, S pixels of a side.

PART = 64  # images
OVERLAP = 1 / 3  # of a window's side, at least


@dataclass(frozen=True)
class View:
    """How windows are cut: their side in pixels, and how many times that the shorter side of the image is."""

    side: int
    scale: float = 1.0

    def resized(self, height: int, width: int) -> tuple[int, int]:
        short = max(self.side, round(self.side * self.scale))
        times = short / min(height, width)
        return max(short, round(height * times)), max(short, round(width * times))

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Top and left of each window of a resized image."""
        step = self.side * (1 - OVERLAP)
        rows, columns = (
            np.round(np.linspace(0, length - self.side, 1 + int(np.ceil((length - self.side) / step)))).astype(int)
            for length in (height, width)
        )
        return [(int(top), int(left)) for top in rows for left in columns]


@dataclass(frozen=True)
class Part:
    """Windows of some images."""

    maps_NLhwD: np.ndarray  # float16
    cls_NLD: np.ndarray  # float32
    rows_N: np.ndarray  # of the index
    places_N4: np.ndarray  # top and left of the window, height and width of the resized image
    left_out: dict[str, str]


@dataclass(frozen=True)
class Maps:
    """Windows of all images that could be read, in order."""

    view: View
    blocks: tuple[int, ...]  # of which there are maps, counted from 0
    parts: list[Part]

    @property
    def rows_N(self) -> np.ndarray:
        return np.concatenate([p.rows_N for p in self.parts])

    @property
    def places_N4(self) -> np.ndarray:
        return np.concatenate([p.places_N4 for p in self.parts])

    @property
    def channels(self) -> int:
        return self.parts[0].maps_NLhwD.shape[-1]

    @property
    def grid(self) -> int:
        return self.parts[0].maps_NLhwD.shape[2]

    @property
    def left_out(self) -> dict[str, str]:
        return {path: why for part in self.parts for path, why in part.left_out.items()}

    def get(self, windows_B: np.ndarray, blocks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Maps (B, L, D, h, w) and class tokens (B, L, D) of these windows and blocks, float32."""
        which = [self.blocks.index(b) for b in blocks]
        starts = np.cumsum([0, *(len(p.rows_N) for p in self.parts)])
        maps, cls = [], []
        for window in windows_B:
            part = int(np.searchsorted(starts, window, side="right")) - 1
            at = int(window - starts[part])
            maps.append(torch.from_numpy(np.asarray(self.parts[part].maps_NLhwD[at, which])).float())
            cls.append(torch.from_numpy(self.parts[part].cls_NLD[at, which]))
        return torch.stack(maps).movedim(-1, 2), torch.stack(cls)


def last_four(depth: int) -> tuple[int, ...]:
    """The last 4 blocks, or all of fewer."""
    return tuple(range(max(0, depth - 4), depth))


def spread_four(depth: int) -> tuple[int, ...]:
    """Four blocks spread over the depth, which the paper's dense heads read; all of fewer."""
    known = {24: (4, 11, 17, 23)}
    return known.get(depth) or tuple(sorted({max(0, (i + 1) * depth // 4 - 1) for i in range(4)}))


def window_side(backbone: Any, side: int) -> int:
    """`side`, or with 0 the side that the network's images have, in whole patches."""
    crop = backbone.preprocessing.crop
    side = side or (crop if isinstance(crop, int) else min(crop))
    patch = backbone.config.patch
    return max(1, round(side / patch)) * patch


def extract_maps(backbone: Any, index: Index, view: View, blocks: tuple[int, ...], reader: Reader) -> Maps:
    """Maps of every readable image. UsageError when none can be read."""
    key = kept_as(backbone, index, "maps", view, blocks)
    parts = in_parts(
        index, PART, key, reader,
        make=lambda rows: _extract(backbone, index, rows, view, blocks, reader), write=_write, read=_read,
    )  # fmt: skip
    maps = Maps(view, blocks, parts)
    told(maps.left_out, len(maps.rows_N), len(index))
    return maps


@torch.inference_mode()
def tokens(backbone: Any, x_BCSS: Tensor, blocks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Patches (B, L, h, w, D) and class tokens (B, L, D) of normalised windows after each of `blocks`, on the CPU."""
    width, patches, cls = x_BCSS.shape[-1] // backbone.config.patch, [], []
    for found in backbone.tokens(x_BCSS.to(backbone.device), backbone.config.depth - blocks[0]):
        chosen = [found[b - blocks[0]] for b in blocks]
        patches.append(torch.stack([c.patches_BPD.unflatten(1, (-1, width)) for c in chosen], 1).cpu())
        cls.append(torch.stack([c.cls_BD for c in chosen], 1).float().cpu())
    return torch.cat(patches), torch.cat(cls)


def normalised(backbone: Any, x_NCSS: Tensor) -> Tensor:
    """uint8 windows as the network wants them."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.preprocessing.mean, backbone.preprocessing.std))
    return (x_NCSS.float() / 255 - mean) / std


def resize(image_HWC: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 (C, *size), bicubic, antialiased."""
    x_CHW = torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)
    if tuple(x_CHW.shape[1:]) == size:
        return x_CHW
    return F.interpolate(x_CHW[None], size=size, mode="bicubic", antialias=True)[0]


def _extract(backbone: Any, index: Index, part: range, view: View, blocks: tuple[int, ...], reader: Reader) -> Part:
    rows, places, maps, cls = [], [], [], []
    broken: dict[int, BadImage] = {}
    for rows_B, images in reader.images(backbone, index, part, broken):
        windows = []
        for row, image in zip(rows_B, images):
            size, side = view.resized(*image.shape[:2]), view.side
            corners, x_CHW = view.corners(*size), resize(image, size)
            windows += [x_CHW[:, top : top + side, left : left + side] for top, left in corners]
            rows += [row] * len(corners)
            places += [(*corner, *size) for corner in corners]
        for start in range(0, len(windows), reader.batch):
            x_BCSS = normalised(backbone, torch.stack(windows[start : start + reader.batch]))
            patches, classes = tokens(backbone, x_BCSS, blocks)
            maps.append(patches.half().numpy())
            cls.append(classes.numpy())
    left_out = {index.path(row): str(broken[row]) for row in sorted(broken)}
    if not rows:
        blank = torch.zeros(1, backbone.channels, view.side, view.side)
        patches, classes = tokens(backbone, blank, blocks)
        maps, cls = [patches[:0].half().numpy()], [classes[:0].numpy()]
    made = Part(
        np.concatenate(maps), np.concatenate(cls), np.asarray(rows, np.int64),
        np.asarray(places, np.int64).reshape(-1, 4), left_out,
    )  # fmt: skip
    finite(backbone, made.cls_NLD)
    return made


def _write(path: Path, part: Part) -> None:
    data = io.BytesIO()
    np.save(data, part.maps_NLhwD)
    run.write_bytes(path.with_suffix(".maps.npy"), data.getvalue())
    data = io.BytesIO()
    why = np.asarray(list(part.left_out.items()), dtype=str).reshape(-1, 2)
    np.savez(data, cls=part.cls_NLD, rows=part.rows_N, places=part.places_N4, left_out=why)
    run.write_bytes(path, data.getvalue())  # last: where it is, the maps are


def _read(path: Path) -> Part | None:
    try:
        with open(path, "rb") as file, np.load(file) as kept:
            left_out = {str(p): str(reason) for p, reason in kept["left_out"]}
            maps = np.load(path.with_suffix(".maps.npy"), mmap_mode="r")
            part = Part(maps, kept["cls"], kept["rows"], kept["places"], left_out)
        return part if len(maps) == len(part.rows_N) else None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
