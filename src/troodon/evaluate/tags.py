"""Any number of classes for each image: logistic regression of each class by itself, as for VOC 2007 (appendix B.3)."""

from collections.abc import Iterator

import numpy as np

from troodon.config import UsageError
from troodon.evaluate import metrics
from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.features import Extractor, Reader, extract, same_images
from troodon.evaluate.logistic import logistic
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import Benchmark, tags_of
from troodon.evaluate.split import by_split

# Shape suffixes: N images, M images to test on, C classes, R resamples.

CHUNK = 50  # resamples at a time


def measure(backbone: Extractor, benchmark: Benchmark, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """Mean average precision over the classes that are in an image to test on: by steps, and by VOC's eleven points."""
    features = extract(backbone, benchmark.images, reader=reader)
    tags_NC = tags_of(benchmark)[features.rows]
    train, val, how = by_split(benchmark.images, config.seed)
    train_N, val_N = np.isin(features.rows, train), np.isin(features.rows, val)
    tags_MC = tags_NC[val_N]
    if not (there_C := (tags_MC > 0).any(0)).any() or not train_N.any():
        raise UsageError(f"{benchmark.name}: no image to learn from, or to test on, has a tag and can be read")
    x_ND, classes = features.final_ND, len(benchmark.classes)
    found = logistic(x_ND[train_N], tags_NC[train_N], x_ND[val_N], classes, config.logistic, config.seed)
    score_MC = found.logits_MC.numpy()
    per_class_C2 = metrics.tag_precision(score_MC, tags_MC)
    random, count = np.random.default_rng(config.seed), len(tags_MC)
    drawn = []
    for size in np.diff([*range(0, config.resamples, CHUNK), config.resamples]):
        weight_RM = random.multinomial(count, np.full(count, 1 / count), size)
        drawn.append(np.nanmean(metrics.tag_precision(score_MC, tags_MC, weight_RM).reshape(classes, 2, -1), 0))
    tails = [(1 - metrics.LEVEL) / 2, (1 + metrics.LEVEL) / 2]
    low_2, high_2 = np.quantile(np.concatenate(drawn, 1), tails, axis=1)
    settings = {
        "C": float(f"{found.strengths[found.chosen]:.4g}"), "chosen on": found.chosen_on,
        "chosen from": len(found.strengths), "features": "class token of the last block", "train": int(train_N.sum()),
        "val": count, "classes": int(there_C.sum()), "split": how,
        "interval": f"95 %, bootstrap over images, {config.resamples} resamples",
    }  # fmt: skip
    if features.left_out:
        settings["images left out"] = len(features.left_out)
    images = same_images(benchmark.images, "label", "split")
    like = likeness(backbone, images, logistic=config.logistic, seed=config.seed)
    for place, metric in enumerate(("map", "map_11_points")):
        per_class = {name: float(v) for name, v in zip(benchmark.classes, per_class_C2[:, place]) if not np.isnan(v)}
        value, details = float(np.nanmean(per_class_C2[:, place])), {"per class": per_class}
        yield Result(
            "logistic",
            benchmark.name,
            metric,
            value,
            float(low_2[place]),
            float(high_2[place]),
            settings,
            like,
            details,
        )
