"""Segmentation and depth: what is trained on frozen patches, measured on the pixels of the truth."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from troodon.config import UsageError
from troodon.evaluate import metrics
from troodon.evaluate.config import DenseConfig, EvaluateConfig
from troodon.evaluate.dense import Depths, Masks, Task, cells, enlarged, fit, predict, prior, truth_of
from troodon.evaluate.features import Reader, same_images
from troodon.evaluate.maps import View, extract_maps, last_four, spread_four, window_side
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import IGNORE, Benchmark, depth_seen
from troodon.evaluate.split import by_split

# Shape suffixes: N images, C classes, K numbers of an image.


def task_of(benchmark: Benchmark, config: DenseConfig) -> Task:
    """What is to be predicted. UsageError for depths whose range nobody says, with what a look at them shows."""
    if benchmark.kind == "mask":
        if benchmark.classes:
            return Masks(len(benchmark.classes))
        rows = np.unique(np.linspace(0, len(benchmark.images) - 1, 200).astype(int))
        seen = [t for row in rows if (t := truth_of(benchmark, Masks(IGNORE), int(row))) is not None]
        known = [int(t[t != IGNORE].max(initial=-1)) for t in seen]
        if max(known, default=-1) < 1:
            raise UsageError(f"{benchmark.name}: its masks hold fewer than two classes")
        return Masks(1 + max(known))
    unit = benchmark.unit or config.unit
    span = config.range or benchmark.range
    if span is None:
        low, high = depth_seen(benchmark, unit)
        raise UsageError(
            f"{benchmark.name}: say which distances count, in metres, with --dense.range LEAST MOST; in some of its "
            f"pictures they go from {low:.2f} to {high:.2f} (at {unit:g} m a count, --dense.unit)"
        )
    return Depths(unit, span[0], span[1], config.bins)


def check(benchmark: Benchmark, config: EvaluateConfig) -> None:
    """UsageError for what could not be measured, before anything runs."""
    if benchmark.kind == "mask" and "segment" in config.protocols:
        by_split(benchmark.images, config.seed)
    if benchmark.kind == "depth" and "depth" in config.protocols:
        by_split(benchmark.images, config.seed)
        task_of(benchmark, config.dense)


def measure(backbone: Any, benchmark: Benchmark, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """Scores of every head that is asked for; the backbone runs once for all of them, and once more for each scale."""
    protocol = "segment" if benchmark.kind == "mask" else "depth"
    dense, task = config.dense, task_of(benchmark, config.dense)
    train_rows, val_rows, how = by_split(benchmark.images, config.seed)
    train, val = _part(benchmark, train_rows), _part(benchmark, val_rows)
    depth = backbone.config.depth
    four = last_four(depth) if protocol == "segment" else spread_four(depth)
    side = window_side(backbone, dense.side)
    blocks = tuple(sorted({*four, depth - 1}))
    heads = [head for head in dense.heads if protocol == "depth" or head not in ("patches", "dpt")]
    learn, test = (extract_maps(backbone, part.images, View(side), blocks, reader) for part in (train, val))
    target_Wnn, usable_W = cells(train, task, learn)
    if not len(usable_W):
        raise UsageError(f"{benchmark.name}: no image to learn from has a picture of its truth that can be read")
    truths = {row: t for row in range(len(val.images)) if (t := truth_of(val, task, row)) is not None}
    truths = {row: t for row, t in truths.items() if (t != task.nothing).any()}
    sizes = {row: (t.shape[0], t.shape[1]) for row, t in truths.items()}
    images = same_images(benchmark.images, "split")
    fitted: dict[tuple[str, int], Any] = {}  # of one scale and of several it is the same head
    for head in heads:
        used = four if head not in ("linear", "patches") else (depth - 1,)
        scales = [test]
        if head == "linear_4_ms":
            views = [View(side, scale) for scale in dense.scales]
            scales = [test if v.scale == 1.0 else extract_maps(backbone, val.images, v, blocks, reader) for v in views]
        counted = []
        for seed in range(config.seed, config.seed + dense.seeds):
            kind = head.removesuffix("_ms")
            if (kind, seed) not in fitted:
                fitted[kind, seed] = fit(kind, task, learn, used, target_Wnn, usable_W, dense, seed, backbone.device)
            model = fitted[kind, seed]
            counted.append({r: _numbers(task, a, truths[r]) for r, a in predict(model, task, scales, used, sizes)})
        settings = {
            "head": head, "blocks": [b + 1 for b in used], "window": side, "steps": dense.steps, "batch": dense.batch,
            "rate": dense.rate, "seeds": dense.seeds, "train": len(train_rows), "val": len(counted[0]), "split": how,
            "interval": f"95 %, bootstrap over images, {config.resamples} resamples",
        } | _about(task) | ({"scales": dense.scales} if head == "linear_4_ms" else {})  # fmt: skip
        if left_out := len(learn.left_out) + len(test.left_out):
            settings["images left out"] = left_out
        like = likeness(backbone, images, head=head, window=side, dense=dense, task=_about(task), seed=config.seed)
        like["dense"] = {k: v for k, v in like["dense"].items() if k not in ("heads", "side")}
        name = protocol if head == "linear" else f"{protocol}_{head}"
        yield from _scores(name, benchmark, task, counted, settings, like, config)


def place_prior(benchmark: Benchmark, config: EvaluateConfig) -> Iterator[Result]:
    """The scores of what stands at each place of the training images: what needs no features at all."""
    task, (train, val, how) = task_of(benchmark, config.dense), by_split(benchmark.images, config.seed)
    guess = prior(benchmark, task, [int(row) for row in train])
    counted = {}
    for row in (int(r) for r in val):
        truth = truth_of(benchmark, task, row)
        if truth is not None and (truth != task.nothing).any():
            guess_11HW = torch.from_numpy(guess)[None, None].float()
            mode = "nearest" if isinstance(task, Masks) else "bilinear"
            said = enlarged(guess_11HW, truth.shape, mode)[0, 0].numpy()
            counted[row] = _numbers(task, said, truth)
    protocol = "segment" if benchmark.kind == "mask" else "depth"
    settings = {"guess": "what stands at each place of the training images", "train": len(train), "split": how}
    like = {"transform": "none", "images": same_images(benchmark.images, "split"), "task": _about(task)}
    yield from _scores(protocol, benchmark, task, [counted], settings | _about(task), like, config)


def _numbers(task: Task, answer_HW: np.ndarray, truth_HW: np.ndarray) -> np.ndarray:
    """What is kept of one picture: counts (3, C), or its errors in order."""
    if isinstance(task, Masks):
        return metrics.class_counts(answer_HW, truth_HW, task.classes, IGNORE)
    return np.array(list(metrics.depth_errors(answer_HW.clip(max(task.low, 1e-3), task.high), truth_HW).values()))


def _scores(
    protocol: str, benchmark: Benchmark, task: Task, counted: list[dict], settings: dict, like: dict,
    config: EvaluateConfig,
) -> Iterator[Result]:  # fmt: skip
    """The means over seeds; intervals over images, of the numbers summed (masks) or averaged over seeds."""
    rows = sorted(counted[0])
    numbers = np.stack([np.stack([c[row] for row in rows]) for c in counted])
    if isinstance(task, Masks):
        values: dict[str, tuple] = {}
        flat_NK = numbers.sum(0).reshape(len(rows), -1)

        def iou(sums_RK: np.ndarray) -> np.ndarray:
            return metrics.mean_iou(sums_RK.reshape(len(sums_RK), 3, -1))

        def accuracy(sums_RK: np.ndarray) -> np.ndarray:
            both, _, target = np.moveaxis(sums_RK.reshape(len(sums_RK), 3, -1), 1, 0)
            return both.sum(1) / target.sum(1)

        for metric, of in (("miou", iou), ("pixel_accuracy", accuracy)):
            mean = float(np.mean([of(n.sum(0).reshape(1, -1))[0] for n in numbers]))
            values[metric] = (mean, *metrics.interval_of(of, flat_NK, config.resamples, config.seed))
        both, predicted, target = numbers.sum((0, 1)).astype(float)
        names = benchmark.classes or tuple(str(c) for c in range(task.classes))
        with np.errstate(invalid="ignore", divide="ignore"):
            per_class = {n: float(v) for n, v in zip(names, both / (predicted + target - both)) if not np.isnan(v)}
        details = {"IoU of each class": per_class}
    else:
        names = metrics.depth_errors(np.ones((1, 1)), np.ones((1, 1)))
        mean_NK = numbers.mean(0)
        values = {
            metric: (float(mean_N.mean()), *metrics.interval(mean_N, config.resamples, config.seed))
            for metric, mean_N in zip(names, mean_NK.T)
        }
        details = {}
    for metric, (value, low, high) in values.items():
        yield Result(protocol, benchmark.name, metric, value, low, high, settings, like, details)
        details = {}


def _about(task: Task) -> dict:
    if isinstance(task, Masks):
        return {"classes": task.classes}
    return {"metres": [task.low, task.high], "unit": task.unit, "bins": task.bins}


def _part(benchmark: Benchmark, rows: np.ndarray) -> Benchmark:
    """Some of its images, with their truth."""
    assert benchmark.truth is not None
    return replace(benchmark, images=benchmark.images.take(rows), truth=benchmark.truth.take(rows))
