"""Segmentation and depth protocols: heads on frozen patch tokens, measured on the pixels of the ground truth."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from troodon import run
from troodon.config import UsageError
from troodon.evaluate import metrics
from troodon.evaluate.config import DenseConfig, EvaluateConfig
from troodon.evaluate.dense import (
    DepthTask,
    SegmentationTask,
    Task,
    cell_targets,
    interpolate,
    location_prior,
    predict,
    read_target,
    train_head,
)
from troodon.evaluate.feature_maps import WindowGrid, extract_maps, last_four, spread_four, window_side
from troodon.evaluate.features import Reader, dataset_fingerprint
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import IGNORE, Benchmark, depth_range
from troodon.evaluate.split import split_rows

# Shape suffixes: N images, C classes, K numbers per image, W windows, n cells per side, H W pixels, R samples.


def make_task(benchmark: Benchmark, config: DenseConfig) -> Task:
    """The task of a dataset. Raises UsageError for depths of unknown range, with the range measured on some images."""
    if benchmark.kind == "mask":
        if benchmark.classes:
            return SegmentationTask(len(benchmark.classes))
        rows = np.unique(np.linspace(0, len(benchmark.images) - 1, 200).astype(int))
        masks = [t for row in rows if (t := read_target(benchmark, SegmentationTask(IGNORE), int(row))) is not None]
        known = [int(t[t != IGNORE].astype(np.int64).max(initial=-1)) for t in masks]
        if max(known, default=-1) < 1:
            raise UsageError(f"{benchmark.name}: its masks contain fewer than two classes")
        return SegmentationTask(1 + max(known))
    unit = benchmark.unit or config.unit
    limits = config.range or benchmark.range
    if limits is None:
        low, high = depth_range(benchmark, unit)
        raise UsageError(
            f"{benchmark.name}: give the range of valid distances in metres with --dense.range LEAST MOST; in some "
            f"images they go from {low:.2f} to {high:.2f} (at {unit:g} m per count, --dense.unit)"
        )
    return DepthTask(unit, limits[0], limits[1], config.bins)


def check(benchmark: Benchmark, config: EvaluateConfig) -> None:
    """Raise UsageError for a dataset that cannot be measured, before anything runs."""
    if benchmark.kind == "mask" and "segment" in config.protocols:
        split_rows(benchmark.images, config.seed)
    if benchmark.kind == "depth" and "depth" in config.protocols:
        split_rows(benchmark.images, config.seed)
        make_task(benchmark, config.dense)


def evaluate_dense(backbone: Any, benchmark: Benchmark, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """Yield the scores of every configured head. The backbone runs once for all heads, and once more for each scale."""
    protocol = "segment" if benchmark.kind == "mask" else "depth"
    dense, task = config.dense, make_task(benchmark, config.dense)
    train_rows, val_rows, split = split_rows(benchmark.images, config.seed)
    train, val = _subset(benchmark, train_rows), _subset(benchmark, val_rows)
    depth = backbone.config.depth
    four_blocks = last_four(depth) if protocol == "segment" else spread_four(depth)
    side = window_side(backbone, dense.side)
    blocks = tuple(sorted({*four_blocks, depth - 1}))
    head_names = [head for head in dense.heads if protocol == "depth" or head not in ("patches", "dpt")]
    train_maps, val_maps = (
        extract_maps(backbone, part.images, WindowGrid(side), blocks, reader) for part in (train, val)
    )
    broken: dict[str, str] = {}
    target_Wnn, readable_W = cell_targets(train, task, train_maps, broken)
    if not len(readable_W):
        raise UsageError(f"{benchmark.name}: no training image has ground truth that can be read")
    shapes = {int(row): (int(h), int(w)) for row, (_, _, h, w) in zip(val_maps.rows_N, val_maps.positions_N4)}
    targets = _valid_targets(val, task, range(len(val.images)), broken, shapes)
    _report_broken(broken, reader)
    sizes = {row: (t.shape[0], t.shape[1]) for row, t in targets.items()}
    images = dataset_fingerprint(benchmark.images, "split")
    trained: dict[tuple[str, int], Any] = {}  # one scale and several scales use the same head
    for head in head_names:
        used = four_blocks if head not in ("linear", "patches") else (depth - 1,)
        scales = [val_maps]
        if head == "linear_4_ms":
            grids = [WindowGrid(side, scale) for scale in dense.scales]
            scales = [
                val_maps if g.scale == 1.0 else extract_maps(backbone, val.images, g, blocks, reader) for g in grids
            ]
        metrics_by_row = []
        for seed in range(config.seed, config.seed + dense.seeds):
            name = head.removesuffix("_ms")
            if (name, seed) not in trained:
                trained[name, seed] = train_head(
                    name, task, train_maps, used, target_Wnn, readable_W, dense, seed, backbone.device
                )
            predicted = predict(trained[name, seed], task, scales, used, sizes)
            metrics_by_row.append({row: _image_metrics(task, p, targets[row]) for row, p in predicted})
        settings = {
            "head": head, "blocks": [b + 1 for b in used], "window": side, "steps": dense.steps, "batch": dense.batch,
            "rate": dense.rate, "seeds": dense.seeds, "train": len(train_rows), "val": len(metrics_by_row[0]),
            "split": split, "interval": f"95 %, bootstrap over images, {config.resamples} resamples",
        } | _task_settings(task) | ({"scales": dense.scales} if head == "linear_4_ms" else {})  # fmt: skip
        if unreadable := train_maps.unreadable | val_maps.unreadable | broken:
            settings["images left out"] = len(unreadable)
        task_settings = _task_settings(task)
        like = likeness(backbone, images, head=head, window=side, dense=dense, task=task_settings, seed=config.seed)
        like["dense"] = {k: v for k, v in like["dense"].items() if k not in ("heads", "side")}
        name = protocol if head == "linear" else f"{protocol}_{head}"
        yield from _scores(name, benchmark, task, metrics_by_row, settings, like, config, unreadable)


def _report_broken(broken: dict[str, str], reader: Reader) -> None:
    """Name the files of ground truth that cannot be used, once for all backbones."""
    if new := [f"{path} ({reason})" for path, reason in broken.items() if path not in reader.set_aside]:
        run.say(f"ground truth that cannot be used is skipped with its image: {len(new)}: {', '.join(new)}"[:500])
    reader.set_aside.update(dict.fromkeys(broken, "without usable ground truth"))


def evaluate_location_prior(benchmark: Benchmark, config: EvaluateConfig) -> Iterator[Result]:
    """Yield the scores of the location prior, which needs no features."""
    task, (train, val, split) = make_task(benchmark, config.dense), split_rows(benchmark.images, config.seed)
    prior_ss = location_prior(benchmark, task, [int(row) for row in train])
    prior_11ss, metrics_by_row = torch.from_numpy(prior_ss)[None, None].float(), {}
    mode = "nearest" if isinstance(task, SegmentationTask) else "bilinear"
    for row, target_HW in _valid_targets(benchmark, task, val.tolist()).items():
        predicted_HW = interpolate(prior_11ss, target_HW.shape, mode)[0, 0].numpy()
        metrics_by_row[row] = _image_metrics(task, predicted_HW, target_HW)
    protocol = "segment" if benchmark.kind == "mask" else "depth"
    settings = {"guess": "what stands at each place of the training images", "train": len(train), "split": split}
    like = {"transform": "none", "images": dataset_fingerprint(benchmark.images, "split"), "task": _task_settings(task)}
    yield from _scores(protocol, benchmark, task, [metrics_by_row], settings | _task_settings(task), like, config)


def _valid_targets(
    benchmark: Benchmark,
    task: Task,
    rows: Iterable[int],
    broken: dict[str, str] | None = None,
    shapes: Mapping[int, tuple[int, int]] = MappingProxyType({}),
) -> dict[int, np.ndarray]:
    """Ground truth by row, of the images that have a valid pixel. Raises UsageError if none has."""
    read = {row: read_target(benchmark, task, row, broken, shapes.get(row)) for row in rows}
    targets = {row: target_HW for row, target_HW in read.items() if target_HW is not None}
    valid = {row: target_HW for row, target_HW in targets.items() if (target_HW != task.ignore_value).any()}
    if not valid:
        raise UsageError(f"{benchmark.name}: no test image has ground truth that can be read, with a valid pixel")
    return valid


def _image_metrics(task: Task, predicted_HW: np.ndarray, target_HW: np.ndarray) -> np.ndarray:
    """Numbers of one image: class counts (3, C), or depth errors in order."""
    if isinstance(task, SegmentationTask):
        return metrics.class_counts(predicted_HW, target_HW, task.classes, IGNORE)
    return np.array(list(metrics.depth_errors(predicted_HW.clip(max(task.low, 1e-3), task.high), target_HW).values()))


def _scores(
    protocol: str, benchmark: Benchmark, task: Task, metrics_by_row: list[dict], settings: dict, like: dict,
    config: EvaluateConfig, unreadable: dict[str, str] | None = None,
) -> Iterator[Result]:  # fmt: skip
    """Yield means over seeds, with intervals over images: class counts are summed over seeds, errors averaged."""
    rows = sorted(metrics_by_row[0])
    numbers = np.stack([np.stack([by_row[row] for row in rows]) for by_row in metrics_by_row])
    if isinstance(task, SegmentationTask):
        values: dict[str, tuple] = {}
        flat_NK = numbers.sum(0).reshape(len(rows), -1)

        def iou(sums_RK: np.ndarray) -> np.ndarray:
            return metrics.mean_iou(sums_RK.reshape(len(sums_RK), 3, -1))

        def accuracy(sums_RK: np.ndarray) -> np.ndarray:
            both, _, target = np.moveaxis(sums_RK.reshape(len(sums_RK), 3, -1), 1, 0)
            return both.sum(1) / target.sum(1)

        for metric, statistic in (("miou", iou), ("pixel_accuracy", accuracy)):
            mean = float(np.mean([statistic(n.sum(0).reshape(1, -1))[0] for n in numbers]))
            values[metric] = (mean, *metrics.bootstrap_interval_of(statistic, flat_NK, config.resamples, config.seed))
        both, predicted, target = numbers.sum((0, 1)).astype(float)
        names = benchmark.classes or tuple(str(c) for c in range(task.classes))
        with np.errstate(invalid="ignore", divide="ignore"):
            per_class = {n: float(v) for n, v in zip(names, both / (predicted + target - both)) if not np.isnan(v)}
        details = {"IoU of each class": per_class}
    else:
        names = metrics.depth_errors(np.ones((1, 1)), np.ones((1, 1)))
        mean_NK = numbers.mean(0)
        values = {
            metric: (float(mean_N.mean()), *metrics.bootstrap_interval(mean_N, config.resamples, config.seed))
            for metric, mean_N in zip(names, mean_NK.T)
        }
        details = {}
    details: dict = details | ({"left out": unreadable} if unreadable else {})
    for metric, (value, low, high) in values.items():
        yield Result(protocol, benchmark.name, metric, value, low, high, settings, like, details)
        details = {}


def _task_settings(task: Task) -> dict:
    """The parameters of the task for the settings of a score."""
    if isinstance(task, SegmentationTask):
        return {"classes": task.classes}
    return {"metres": [task.low, task.high], "unit": task.unit, "bins": task.bins}


def _subset(benchmark: Benchmark, rows: np.ndarray) -> Benchmark:
    """The benchmark with these rows only."""
    assert benchmark.ground_truth is not None
    return replace(benchmark, images=benchmark.images.take(rows), ground_truth=benchmark.ground_truth.take(rows))
