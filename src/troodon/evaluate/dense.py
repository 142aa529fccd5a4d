"""The one trainer of dense tasks: a head on frozen maps, for masks or for depths, and its pictures put together again.

A task says what the head gives, how far off it is, and what of it is averaged where windows and scales overlap.
Training sees four cells for each patch along each side; what is measured is measured on the pixels of the truth.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.evaluate import heads
from troodon.evaluate.config import DenseConfig
from troodon.evaluate.maps import Maps
from troodon.evaluate.sets.benchmark import IGNORE, Benchmark
from troodon.images.decode import BadImage

# Shape suffixes: N images, W windows, B of a batch, C channels of the head, K bins, n cells on a side of a window,
#                 H W pixels (of the truth, or of the resized image).

CELLS = 4  # of a patch, along each side, in training
FLAT = 0.15  # share of the mean that the scale-invariant loss keeps
LEAST = 0.1  # of the weight of a bin


@dataclass(frozen=True)
class Masks:
    """Segmentation: a class for each pixel, by cross-entropy."""

    classes: int

    @property
    def out(self) -> int:
        return self.classes

    cls = False
    nothing = IGNORE

    def loss(self, z_BChw: Tensor, target_Bnn: Tensor) -> Tensor:
        """The sum over known cells, over their number."""
        known = (target_Bnn != IGNORE).sum().clamp_min(1)
        z_BCnn = enlarged(z_BChw, target_Bnn.shape[-1])
        return F.cross_entropy(z_BCnn, target_Bnn.long(), ignore_index=IGNORE, reduction="sum") / known

    def averaged(self, z_BChw: Tensor) -> Tensor:
        return z_BChw.softmax(1)

    def answer(self, mean_CHW: Tensor) -> Tensor:
        return mean_CHW.argmax(0)

    def target(self, truth_HW: np.ndarray) -> np.ndarray:
        return truth_HW


@dataclass(frozen=True)
class Depths:
    """Depth in metres: a mean of bins weighted by what the head gives, by the scale-invariant loss in the logarithm."""

    unit: float
    low: float
    high: float
    bins: int

    @property
    def out(self) -> int:
        return self.bins

    cls = True
    nothing = 0

    def loss(self, z_BKhw: Tensor, target_Bnn: Tensor) -> Tensor:
        known = target_Bnn > 0
        if not known.any():
            return 0.0 * z_BKhw.sum()
        metres_Bnn = enlarged(self.averaged(z_BKhw), target_Bnn.shape[-1])[:, 0]
        off = metres_Bnn[known].log() - target_Bnn[known].log()
        return (off.var(unbiased=False) + FLAT * off.mean().square() + 1e-9).sqrt()

    def averaged(self, z_BKhw: Tensor) -> Tensor:
        weight_BKhw = z_BKhw.relu() + LEAST
        centre_K = torch.linspace(max(self.low, 1e-3), self.high, self.bins, device=z_BKhw.device)
        return (weight_BKhw * centre_K[:, None, None]).sum(1, keepdim=True) / weight_BKhw.sum(1, keepdim=True)

    def answer(self, mean_CHW: Tensor) -> Tensor:
        return mean_CHW[0]

    def target(self, truth_HW: np.ndarray) -> np.ndarray:
        """Metres, 0 where nothing was measured or it lies outside the range."""
        metres = truth_HW.astype(np.float32) * np.float32(self.unit)
        return np.where((metres > max(self.low, 1e-6)) & (metres <= self.high), metres, 0).astype(np.float32)


Task = Masks | Depths


def cells(benchmark: Benchmark, task: Task, maps: Maps) -> tuple[np.ndarray, np.ndarray]:
    """The truth in the cells of each window (W, n, n), nearest; and the windows whose truth could be read."""
    n = CELLS * maps.grid
    rows_W, places_W4 = maps.rows_N, maps.places_N4
    target, usable, last, truth = [], [], -1, None
    for window, (row, (top, left, height, width)) in enumerate(zip(rows_W, places_W4)):
        if row != last:
            last, truth = row, truth_of(benchmark, task, int(row))
        if truth is None:
            continue
        middle = (np.arange(n) + 0.5) * maps.view.side / n
        ys = ((top + middle) / height * truth.shape[0]).astype(int).clip(0, truth.shape[0] - 1)
        xs = ((left + middle) / width * truth.shape[1]).astype(int).clip(0, truth.shape[1] - 1)
        target.append(truth[np.ix_(ys, xs)])
        usable.append(window)
    return np.stack(target) if target else np.zeros((0, n, n)), np.asarray(usable, np.int64)


def truth_of(benchmark: Benchmark, task: Task, row: int) -> np.ndarray | None:
    """The truth of an image, as the task wants it; None where its picture cannot be read."""
    try:
        return task.target(benchmark.target(row))
    except (BadImage, OSError):
        return None


def fit(
    head: str, task: Task, maps: Maps, blocks: tuple[int, ...], target_Wnn: np.ndarray, windows_W: np.ndarray,
    config: DenseConfig, seed: int, device: torch.device | None = None,
) -> Any:  # fmt: skip
    """A head trained on these windows of the maps, by AdamW. A function of its arguments only."""
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = heads.Dense if head == "dpt" else heads.Linear
        model = kind(len(blocks), maps.channels, task.out, task.cls and head != "patches").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, weight_decay=config.weight_decay)
    batch, warm = min(config.batch, len(windows_W)), max(1, config.steps // 10)
    order: list[int] = []
    model.train(batch > 1)
    for step in range(config.steps):
        while len(order) < batch:
            order += random.permutation(len(windows_W)).tolist()
        places, order = np.sort(order[:batch]), order[batch:]
        rate = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.param_groups[0]["lr"] = config.rate * rate
        seen = (x.to(device) for x in maps.get(windows_W[places], blocks))
        loss = task.loss(model(*seen), torch.from_numpy(target_Wnn[places]).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def predict(
    model: Any, task: Task, scales: Sequence[Maps], blocks: tuple[int, ...], sizes: dict[int, tuple[int, int]]
) -> Iterator[tuple[int, np.ndarray]]:
    """The answer for each image, on (H, W) pixels, averaged over windows and scales. Rows that `sizes` lacks are
    left out."""
    device = next((p.device for p in model.parameters()), None)
    by_row: dict[int, list[tuple[Maps, np.ndarray]]] = {}
    places = {id(maps): maps.places_N4 for maps in scales}
    for maps in scales:
        rows_W = maps.rows_N
        starts = np.flatnonzero(np.diff(rows_W, prepend=-1))
        for group in np.split(np.arange(len(rows_W)), starts[1:]):
            if len(group):
                by_row.setdefault(int(rows_W[group[0]]), []).append((maps, group))
    for row, groups in by_row.items():
        if row not in sizes:
            continue
        answers = []
        for maps, group in groups:
            seen = (x.to(device) for x in maps.get(group, blocks))
            pixels_BCSS = enlarged(task.averaged(model(*seen)), maps.view.side)
            where_B4 = places[id(maps)][group]
            height, width = (int(v) for v in where_B4[0, 2:])
            canvas_CHW = torch.zeros(pixels_BCSS.shape[1], height, width, device=device)
            count_HW, side = torch.zeros(height, width, device=device), maps.view.side
            for (top, left, _, _), pixels_CSS in zip(where_B4, pixels_BCSS):
                canvas_CHW[:, top : top + side, left : left + side] += pixels_CSS
                count_HW[top : top + side, left : left + side] += 1
            answers.append(enlarged((canvas_CHW / count_HW)[None], sizes[row])[0])
        yield row, task.answer(torch.stack(answers).mean(0)).cpu().numpy()


def prior(benchmark: Benchmark, task: Task, train: Sequence[int], side: int = 64) -> np.ndarray:
    """What stands at each place of a training image, (side, side): the most frequent class, or the median distance.

    What a network must beat. NaN or IGNORE where it was never known.
    """
    seen = []
    for row in train:
        if (truth := truth_of(benchmark, task, row)) is not None:
            ys, xs = (((np.arange(side) + 0.5) / side * length).astype(int) for length in truth.shape)
            seen.append(truth[np.ix_(ys, xs)])
    seen_Nss = np.stack(seen)
    if isinstance(task, Masks):
        counts = np.stack([(seen_Nss == c).sum(0) for c in range(task.classes)])
        return counts.argmax(0)
    known_Nss = np.where(seen_Nss > 0, seen_Nss, np.nan)
    known_Nss[:, np.isnan(known_Nss).all(0)] = np.nanmedian(known_Nss)
    return np.nanmedian(known_Nss, 0)


def enlarged(x_BChw: Tensor, size: int | tuple[int, ...], mode: str = "bilinear") -> Tensor:
    """Resized to this height and width, or to a square."""
    size = size if isinstance(size, tuple) else (size, size)
    if tuple(x_BChw.shape[-2:]) == size:
        return x_BChw
    return F.interpolate(x_BChw, size=size, mode=mode)
