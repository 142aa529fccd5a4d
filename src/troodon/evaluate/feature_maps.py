"""Feature maps: patch tokens of square sliding windows, computed once for all dense protocols.

An image is resized so that its shorter side is the side of a window times a scale. Neighbouring windows overlap by at
least a third. So all windows have the same size, and images of any shape are covered completely. Maps are float16, and
memory-mapped if there is a cache: they are a thousand times larger than class tokens.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon import run
from troodon.evaluate.features import Reader, cache_key, check_finite, compute_in_parts, report_unreadable
from troodon.images.decode import BadImage
from troodon.images.index import Index
from troodon.images.reading import listed

# Shape suffixes: N windows, B of a batch, L chosen blocks (first to last), h w patches, D channels, S pixels per side.

PART_SIZE = 64  # images
MIN_OVERLAP = 1 / 3  # minimum overlap, as a fraction of the side of a window


@dataclass(frozen=True)
class WindowGrid:
    """The grid of windows: their side in pixels, and the shorter side of the resized image divided by it."""

    side: int
    scale: float = 1.0

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the resized image."""
        short = max(self.side, round(self.side * self.scale))
        factor = short / min(height, width)
        return max(short, round(height * factor)), max(short, round(width * factor))

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Top and left of each window of a resized image."""
        step = self.side * (1 - MIN_OVERLAP)
        rows, columns = (
            np.round(np.linspace(0, length - self.side, 1 + int(np.ceil((length - self.side) / step)))).astype(int)
            for length in (height, width)
        )
        return [(int(top), int(left)) for top in rows for left in columns]

    def windows(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Of each image the size it is resized to, the corners of its windows, and these: uint8 (C, S, S)."""
        found = []
        for image_HWC in images:
            size, side = self.resized(*image_HWC.shape[:2]), self.side
            corners, x_CHW = self.corners(*size), resize(image_HWC, size)
            found.append((size, corners, [x_CHW[:, y : y + side, x : x + side] for y, x in corners]))
        return found


@dataclass(frozen=True)
class FeatureMapsPart:
    """Windows of some images."""

    maps_NLhwD: np.ndarray  # float16
    cls_NLD: np.ndarray  # float32
    rows_N: np.ndarray  # rows of the index
    positions_N4: np.ndarray  # top and left of the window, height and width of the resized image
    unreadable: dict[str, str]


@dataclass(frozen=True)
class FeatureMaps:
    """Windows of all readable images, in order."""

    grid: WindowGrid
    blocks: tuple[int, ...]  # from 0
    parts: list[FeatureMapsPart]

    @property
    def rows_N(self) -> np.ndarray:
        return np.concatenate([p.rows_N for p in self.parts])

    @property
    def positions_N4(self) -> np.ndarray:
        return np.concatenate([p.positions_N4 for p in self.parts])

    @property
    def channels(self) -> int:
        return self.parts[0].maps_NLhwD.shape[-1]

    @property
    def patches_per_side(self) -> int:
        return self.parts[0].maps_NLhwD.shape[2]

    @property
    def unreadable(self) -> dict[str, str]:
        return {path: why for part in self.parts for path, why in part.unreadable.items()}

    def get(self, windows_B: np.ndarray, blocks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Maps (B, L, D, h, w) and class tokens (B, L, D) of these windows and blocks, float32."""
        block_rows = [self.blocks.index(b) for b in blocks]
        starts = np.cumsum([0, *(len(p.rows_N) for p in self.parts)])
        maps, cls = [], []
        for window in windows_B:
            part = int(np.searchsorted(starts, window, side="right")) - 1
            row = int(window - starts[part])
            maps.append(torch.from_numpy(np.asarray(self.parts[part].maps_NLhwD[row, block_rows])).float())
            cls.append(torch.from_numpy(self.parts[part].cls_NLD[row, block_rows]))
        return torch.stack(maps).movedim(-1, 2), torch.stack(cls)


def last_four(depth: int) -> tuple[int, ...]:
    """The last four blocks, or all if there are fewer."""
    return tuple(range(max(0, depth - 4), depth))


def spread_four(depth: int) -> tuple[int, ...]:
    """Four blocks spread over the depth, as the dense heads of the paper use them; all if there are fewer."""
    released = {24: (4, 11, 17, 23)}
    return released.get(depth) or tuple(sorted({max(0, (i + 1) * depth // 4 - 1) for i in range(4)}))


def window_side(backbone: Any, side: int) -> int:
    """`side`, or for 0 the size of the network's input images, rounded to whole patches."""
    crop = backbone.preprocessing.crop
    side = side or (crop if isinstance(crop, int) else min(crop))
    patch = backbone.config.patch
    return max(1, round(side / patch)) * patch


def extract_maps(backbone: Any, index: Index, grid: WindowGrid, blocks: tuple[int, ...], reader: Reader) -> FeatureMaps:
    """Extract the feature maps of every readable image. Raises UsageError if none can be read."""
    key = cache_key(backbone, index, "maps", grid, blocks)
    parts = compute_in_parts(
        index, PART_SIZE, key, reader,
        make=lambda rows: _extract(backbone, index, rows, grid, blocks, reader), write=_write, read=_read,
    )  # fmt: skip
    maps = FeatureMaps(grid, blocks, parts)
    report_unreadable(maps.unreadable, len(set(maps.rows_N.tolist())), len(index), reader)
    return maps


@torch.inference_mode()
def tokens(backbone: Any, x_BCSS: Tensor, blocks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Patch tokens (B, L, h, w, D) and class tokens (B, L, D) of normalised windows after these blocks, on the CPU."""
    width, patches, cls = x_BCSS.shape[-1] // backbone.config.patch, [], []
    for chosen in backbone.tokens(x_BCSS.to(backbone.device), blocks):
        patches.append(torch.stack([c.patches_BPD.unflatten(1, (-1, width)) for c in chosen], 1).cpu())
        cls.append(torch.stack([c.cls_BD for c in chosen], 1).float().cpu())
    return torch.cat(patches), torch.cat(cls)


def normalise(backbone: Any, x_NCSS: Tensor) -> Tensor:
    """Normalise uint8 windows by the mean and the standard deviation of the network's preprocessing."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.preprocessing.mean, backbone.preprocessing.std))
    return (x_NCSS.float() / 255 - mean) / std


def resize(image_HWC: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resize an image to uint8 (C, *size): bicubic, antialiased."""
    x_CHW = torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)
    if tuple(x_CHW.shape[1:]) == size:
        return x_CHW
    return F.interpolate(x_CHW[None], size=size, mode="bicubic", antialias=True)[0]


def _extract(
    backbone: Any, index: Index, part: range, grid: WindowGrid, blocks: tuple[int, ...], reader: Reader
) -> FeatureMapsPart:
    rows, positions, maps, cls = [], [], [], []
    broken: dict[int, BadImage] = {}
    for rows_B, images in reader.prepared(backbone, index, part, broken, grid.windows, listed):
        windows = []
        for row, (size, corners, windows_of_one) in zip(rows_B, images, strict=True):
            windows += windows_of_one
            rows += [row] * len(corners)
            positions += [(*corner, *size) for corner in corners]
        for start in range(0, len(windows), reader.batch):
            x_BCSS = normalise(backbone, torch.stack(windows[start : start + reader.batch]))
            patches, classes = tokens(backbone, x_BCSS, blocks)
            maps.append(patches.half().numpy())
            cls.append(classes.numpy())
    unreadable = {index.path(row): str(broken[row]) for row in sorted(broken)}
    if not rows:
        blank = torch.zeros(1, backbone.channels, grid.side, grid.side)
        patches, classes = tokens(backbone, blank, blocks)
        maps, cls = [patches[:0].half().numpy()], [classes[:0].numpy()]
    part_maps = FeatureMapsPart(
        np.concatenate(maps), np.concatenate(cls), np.asarray(rows, np.int64),
        np.asarray(positions, np.int64).reshape(-1, 4), unreadable,
    )  # fmt: skip
    check_finite(backbone, part_maps.cls_NLD)
    return part_maps


def _write(path: Path, part: FeatureMapsPart) -> None:
    data = io.BytesIO()
    np.save(data, part.maps_NLhwD)
    run.write_bytes(path.with_suffix(".maps.npy"), data.getvalue())
    data = io.BytesIO()
    unreadable = np.asarray(list(part.unreadable.items()), dtype=str).reshape(-1, 2)
    np.savez(data, cls=part.cls_NLD, rows=part.rows_N, places=part.positions_N4, left_out=unreadable)
    run.write_bytes(path, data.getvalue())  # written last: where this file exists, the maps are complete


def _read(path: Path) -> FeatureMapsPart | None:
    """The cached part; None if a file is missing or damaged."""
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            unreadable = {str(p): str(reason) for p, reason in arrays["left_out"]}
            maps = np.load(path.with_suffix(".maps.npy"), mmap_mode="r")
            part = FeatureMapsPart(maps, arrays["cls"], arrays["rows"], arrays["places"], unreadable)
        return part if len(maps) == len(part.rows_N) else None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
