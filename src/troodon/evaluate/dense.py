"""Training and prediction of dense heads on frozen feature maps, for segmentation and depth.

A task defines the output channels, the loss, and the values that are averaged where windows and scales overlap. Targets
of training are four cells per patch along each side. Metrics are computed at the resolution of the ground truth.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.config import UsageError
from troodon.evaluate import heads
from troodon.evaluate.config import DenseConfig
from troodon.evaluate.feature_maps import FeatureMaps
from troodon.evaluate.sets.benchmark import IGNORE, Benchmark
from troodon.images.decode import BadImage
from troodon.progress import watched

# Shape suffixes: N images, W windows, B of a batch, C channels of the head, K bins, n cells on a side of a window,
#                 H W pixels (of the ground truth, or of the resized image).

MAX_STRETCH = 1.25  # between an image and its ground truth; more is the ground truth of another image, or turned
CELLS_PER_PATCH = 4  # target cells of a patch along each side, in training
MEAN_WEIGHT = 0.15  # weight of the squared mean error in the scale-invariant loss
MIN_BIN_WEIGHT = 0.1  # added to the weight of each depth bin


@dataclass(frozen=True)
class SegmentationTask:
    """Segmentation: a class for each pixel, with the cross-entropy loss."""

    classes: int

    @property
    def out_channels(self) -> int:
        return self.classes

    uses_cls = False
    ignore_value = IGNORE

    def loss(self, z_BChw: Tensor, target_Bnn: Tensor) -> Tensor:
        """Mean cross-entropy over the valid cells."""
        valid = (target_Bnn != IGNORE).sum().clamp_min(1)
        z_BCnn = interpolate(z_BChw, target_Bnn.shape[-1])
        return F.cross_entropy(z_BCnn, target_Bnn.long(), ignore_index=IGNORE, reduction="sum") / valid

    def activation(self, z_BChw: Tensor) -> Tensor:
        """Class probabilities, which are averaged over windows and scales."""
        return z_BChw.softmax(1)

    def prediction(self, mean_CHW: Tensor) -> Tensor:
        """The predicted classes (H, W)."""
        return mean_CHW.argmax(0)

    def target(self, raw_HW: np.ndarray) -> np.ndarray:
        return raw_HW


@dataclass(frozen=True)
class DepthTask:
    """Depth in metres: mean of the bin centres weighted by the head, with the scale-invariant loss of logarithms."""

    unit: float
    low: float
    high: float
    bins: int

    @property
    def out_channels(self) -> int:
        return self.bins

    uses_cls = True
    ignore_value = 0

    def loss(self, z_BKhw: Tensor, target_Bnn: Tensor) -> Tensor:
        valid = target_Bnn > 0
        if not valid.any():
            return 0.0 * z_BKhw.sum()
        metres_Bnn = interpolate(self.activation(z_BKhw), target_Bnn.shape[-1])[:, 0]
        difference = metres_Bnn[valid].log() - target_Bnn[valid].log()
        return (difference.var(unbiased=False) + MEAN_WEIGHT * difference.mean().square() + 1e-9).sqrt()

    def activation(self, z_BKhw: Tensor) -> Tensor:
        """Metres (B, 1, h, w), which are averaged over windows and scales."""
        weight_BKhw = z_BKhw.relu() + MIN_BIN_WEIGHT
        centre_K = torch.linspace(max(self.low, 1e-3), self.high, self.bins, device=z_BKhw.device)
        return (weight_BKhw * centre_K[:, None, None]).sum(1, keepdim=True) / weight_BKhw.sum(1, keepdim=True)

    def prediction(self, mean_CHW: Tensor) -> Tensor:
        return mean_CHW[0]

    def target(self, raw_HW: np.ndarray) -> np.ndarray:
        """Metres; 0 where nothing was measured or the distance is out of range."""
        metres = raw_HW.astype(np.float32) * np.float32(self.unit)
        return np.where((metres > max(self.low, 1e-6)) & (metres <= self.high), metres, 0).astype(np.float32)


Task = SegmentationTask | DepthTask


def cell_targets(
    benchmark: Benchmark, task: Task, maps: FeatureMaps, broken: dict[str, str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Targets of the windows whose ground truth can be read (W, n, n), by nearest neighbour; and these windows."""
    n = CELLS_PER_PATCH * maps.patches_per_side
    rows_W, positions_W4 = maps.rows_N, maps.positions_N4
    target, readable, last, target_HW = [], [], -1, None
    for window, (row, (top, left, height, width)) in enumerate(zip(rows_W, positions_W4)):
        if row != last:
            last, target_HW = row, read_target(benchmark, task, int(row), broken, (height, width))
        if target_HW is None:
            continue
        middle = (np.arange(n) + 0.5) * maps.grid.side / n
        ys = ((top + middle) / height * target_HW.shape[0]).astype(int).clip(0, target_HW.shape[0] - 1)
        xs = ((left + middle) / width * target_HW.shape[1]).astype(int).clip(0, target_HW.shape[1] - 1)
        target.append(target_HW[np.ix_(ys, xs)])
        readable.append(window)
    return np.stack(target) if target else np.zeros((0, n, n)), np.asarray(readable, np.int64)


def read_target(
    benchmark: Benchmark,
    task: Task,
    row: int,
    broken: dict[str, str] | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray | None:
    """Ground truth of an image in the format of the task; None if its file cannot be read, or does not have the aspect
    of the image, of this `size` (height, width) at any scale. Then `broken` gets the path of the file, and why."""
    try:
        target_HW = task.target(benchmark.target(row))
        if size is not None and not fits(target_HW.shape, size):
            shape = f"{target_HW.shape[1]} x {target_HW.shape[0]}"
            raise BadImage("decode error", f"{shape}: another aspect than that of its image")
        return target_HW
    except (BadImage, OSError) as error:
        assert benchmark.ground_truth is not None
        if broken is not None:
            broken[benchmark.ground_truth.path(row)] = str(error)
        return None


def fits(a: tuple[int, ...], b: tuple[int, int]) -> bool:
    """Whether two heights and widths have about the same aspect."""
    ratio = (a[0] / a[1]) / (b[0] / b[1])
    return max(ratio, 1 / ratio) <= MAX_STRETCH


def train_head(
    head: str, task: Task, maps: FeatureMaps, blocks: tuple[int, ...], target_Wnn: np.ndarray, windows_W: np.ndarray,
    config: DenseConfig, seed: int, device: torch.device | None = None,
) -> Any:  # fmt: skip
    """Train a head on these windows with AdamW. Deterministic: the result depends on the arguments only."""
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head_class = heads.DPTHead if head == "dpt" else heads.LinearHead
        cls = task.uses_cls and head != "patches"
        model = head_class(len(blocks), maps.channels, task.out_channels, cls).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, weight_decay=config.weight_decay)
    batch, warmup = min(config.batch, len(windows_W)), max(1, config.steps // 10)
    order: list[int] = []
    model.train(batch > 1)
    for step in watched(range(config.steps), f"{head} head", "steps"):
        while len(order) < batch:
            order += random.permutation(len(windows_W)).tolist()
        batch_B, order = np.sort(order[:batch]), order[batch:]
        rate = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.param_groups[0]["lr"] = config.rate * rate
        inputs = (x.to(device) for x in maps.get(windows_W[batch_B], blocks))
        loss = task.loss(model(*inputs), torch.from_numpy(target_Wnn[batch_B]).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def predict(
    model: Any, task: Task, scales: Sequence[FeatureMaps], blocks: tuple[int, ...], sizes: dict[int, tuple[int, int]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the row and the prediction (H, W) of each image, averaged over windows and scales.

    `sizes` gives the size of each prediction; rows that it does not contain are skipped.
    """
    device = next((p.device for p in model.parameters()), None)
    by_row: dict[int, list[tuple[FeatureMaps, np.ndarray]]] = {}
    positions = {id(maps): maps.positions_N4 for maps in scales}
    for maps in scales:
        rows_W = maps.rows_N
        starts = np.flatnonzero(np.diff(rows_W, prepend=-1))
        for group in np.split(np.arange(len(rows_W)), starts[1:]):
            if len(group):
                by_row.setdefault(int(rows_W[group[0]]), []).append((maps, group))
    for row, groups in by_row.items():
        if row not in sizes:
            continue
        predictions = []
        for maps, group in groups:
            inputs = (x.to(device) for x in maps.get(group, blocks))
            pixels_BCSS = interpolate(task.activation(model(*inputs)), maps.grid.side)
            positions_B4 = positions[id(maps)][group]
            height, width = (int(v) for v in positions_B4[0, 2:])
            canvas_CHW = torch.zeros(pixels_BCSS.shape[1], height, width, device=device)
            count_HW, side = torch.zeros(height, width, device=device), maps.grid.side
            for (top, left, _, _), pixels_CSS in zip(positions_B4, pixels_BCSS):
                canvas_CHW[:, top : top + side, left : left + side] += pixels_CSS
                count_HW[top : top + side, left : left + side] += 1
            predictions.append(interpolate((canvas_CHW / count_HW)[None], sizes[row])[0])
        yield row, task.prediction(torch.stack(predictions).mean(0)).cpu().numpy()


def location_prior(benchmark: Benchmark, task: Task, train: Sequence[int], side: int = 64) -> np.ndarray:
    """Baseline that sees no image: the most frequent class, or the median distance, at each place (side, side).

    Places without any valid training pixel get class 0, or the median of all distances.
    """
    targets = []
    for row in train:
        if (target_HW := read_target(benchmark, task, row)) is not None:
            ys, xs = (((np.arange(side) + 0.5) / side * length).astype(int) for length in target_HW.shape)
            targets.append(target_HW[np.ix_(ys, xs)])
    if not targets:
        raise UsageError(f"{benchmark.name}: no training image has ground truth that can be read")
    target_Nss = np.stack(targets)
    if isinstance(task, SegmentationTask):
        counts = np.stack([(target_Nss == c).sum(0) for c in range(task.classes)])
        return counts.argmax(0)
    valid_Nss = np.where(target_Nss > 0, target_Nss, np.nan)
    valid_Nss[:, np.isnan(valid_Nss).all(0)] = np.nanmedian(valid_Nss)
    return np.nanmedian(valid_Nss, 0)


def interpolate(x_BChw: Tensor, size: int | tuple[int, ...], mode: str = "bilinear") -> Tensor:
    """Resize to a height and width, or to a square."""
    size = size if isinstance(size, tuple) else (size, size)
    if tuple(x_BChw.shape[-2:]) == size:
        return x_BChw
    return F.interpolate(x_BChw, size=size, mode=mode)
