"""Multi-label classification: a logistic regression for each class, as for VOC 2007 (DINOv2, appendix B.3)."""

from collections.abc import Iterator

import numpy as np

from troodon.config import UsageError
from troodon.evaluate import metrics
from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.features import Extractor, Reader, dataset_fingerprint, extract
from troodon.evaluate.logistic import logistic
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import Benchmark, tag_matrix
from troodon.evaluate.split import split_rows

# Shape suffixes: N images, M test images, C classes, R bootstrap samples.

CHUNK = 50  # bootstrap samples at a time


def classify_tags(
    backbone: Extractor, benchmark: Benchmark, config: EvaluateConfig, reader: Reader
) -> Iterator[Result]:
    """Yield mean average precision over the classes of the test images: by steps, and by the eleven points of VOC."""
    features = extract(backbone, benchmark.images, reader=reader)
    tags_NC = tag_matrix(benchmark)[features.rows]
    train, val, split = split_rows(benchmark.images, config.seed)
    train_N, val_N = np.isin(features.rows, train), np.isin(features.rows, val)
    tags_MC = tags_NC[val_N]
    if not (present_C := (tags_MC > 0).any(0)).any() or not train_N.any():
        raise UsageError(f"{benchmark.name}: there is no readable training image, or no readable test image has a tag")
    x_ND, classes = features.final_ND, len(benchmark.classes)
    fitted = logistic(x_ND[train_N], tags_NC[train_N], x_ND[val_N], classes, config.logistic, config.seed)
    score_MC = fitted.logits_MC.numpy()
    per_class_C2 = metrics.tag_average_precision(score_MC, tags_MC)
    random, count = np.random.default_rng(config.seed), len(tags_MC)
    samples = []
    for size in np.diff([*range(0, config.resamples, CHUNK), config.resamples]):
        weight_RM = random.multinomial(count, np.full(count, 1 / count), size)
        per_class_C2R = metrics.tag_average_precision(score_MC, tags_MC, weight_RM).reshape(classes, 2, -1)
        samples.append(np.nanmean(per_class_C2R, 0))
    tails = [(1 - metrics.CONFIDENCE) / 2, (1 + metrics.CONFIDENCE) / 2]
    low_2, high_2 = np.quantile(np.concatenate(samples, 1), tails, axis=1)
    settings = {
        "C": float(f"{fitted.strengths[fitted.chosen]:.4g}"), "chosen on": fitted.chosen_on,
        "chosen from": len(fitted.strengths), "features": "class token of the last block", "train": int(train_N.sum()),
        "val": count, "classes": int(present_C.sum()), "split": split,
        "interval": f"95 %, bootstrap over images, {config.resamples} resamples",
    }  # fmt: skip
    if features.unreadable:
        settings["images left out"] = len(features.unreadable)
    images = dataset_fingerprint(benchmark.images, "label", "split")
    like = likeness(backbone, images, logistic=config.logistic, seed=config.seed)
    for method, metric in enumerate(("map", "map_11_points")):
        per_class = {name: float(v) for name, v in zip(benchmark.classes, per_class_C2[:, method]) if not np.isnan(v)}
        value, details = float(np.nanmean(per_class_C2[:, method])), {"per class": per_class}
        low, high = float(low_2[method]), float(high_2[method])
        yield Result("logistic", benchmark.name, metric, value, low, high, settings, like, details)
