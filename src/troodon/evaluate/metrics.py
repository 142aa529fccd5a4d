"""Metrics, their bootstrap confidence intervals, and the entries of scores.json.

Every image has the same weight, whatever its class. Images of classes without training images count as wrong.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from troodon.config import fingerprint

# Shape suffixes: N images, C classes, R bootstrap samples, U distinct values, K numbers of an image, P pairs.

CONFIDENCE = 0.95  # level of every confidence interval


def class_accuracy(correct_N: np.ndarray, labels_N: np.ndarray, classes: int) -> np.ndarray:
    """Accuracy within each class (C,); NaN for classes without an image. `correct_N` holds fractions in [0, 1]."""
    images_C = np.bincount(labels_N, minlength=classes).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.bincount(labels_N, weights=correct_N, minlength=classes) / images_C


def top_confusions(predicted_N: np.ndarray, labels_N: np.ndarray, classes: int, limit: int = 10) -> list[tuple]:
    """The most frequent confusions as (true class, predicted class, images), most frequent first."""
    wrong = predicted_N != labels_N
    pair, images = np.unique(labels_N[wrong].astype(np.int64) * classes + predicted_N[wrong], return_counts=True)
    order = np.argsort(-images, kind="stable")[:limit]
    return [(int(pair[i]) // classes, int(pair[i]) % classes, int(images[i])) for i in order]


def bootstrap_interval(correct_N: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Bootstrap interval (percentiles 2.5 and 97.5) of the mean over images, which are drawn with replacement.

    The mean of a bootstrap sample depends only on how often each distinct value is drawn. So R multinomial draws of U
    counts are exactly R samples of N images. If all images are correct, or all are wrong, the bootstrap has no spread;
    then the open end is the binomial bound (Clopper and Pearson, 1934): 3 of 3 is [0.29, 1].
    """
    value_U, images_U = np.unique(np.asarray(correct_N, dtype=np.float64), return_counts=True)
    count, tail = int(images_U.sum()), (1 - CONFIDENCE) / 2
    if len(value_U) == 1 and value_U[0] in (0.0, 1.0):
        bound = tail ** (1 / count)
        return (bound, 1.0) if value_U[0] else (0.0, 1 - bound)
    samples_RU = np.random.default_rng(seed).multinomial(count, images_U / count, size=resamples)
    low, high = np.quantile(samples_RU @ value_U / count, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_interval_of(
    statistic: Callable[[np.ndarray], np.ndarray], sums_NK: np.ndarray, resamples: int, seed: int
) -> tuple[float, float]:
    """Bootstrap interval of a function (R, K) -> (R,) of sums over images, such as the mean IoU."""
    random, count = np.random.default_rng(seed), len(sums_NK)
    values = [
        statistic(random.multinomial(count, np.full(count, 1 / count), size=min(64, resamples - start)) @ sums_NK)
        for start in range(0, resamples, 64)
    ]
    low, high = np.nanquantile(np.concatenate(values), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def average_precision(relevant_N: np.ndarray, positives: int, method: str = "steps") -> float:
    """Area under the precision-recall curve of a ranking, best first; `positives` is the number of relevant images.

    "steps" sums the precision at each relevant image, as scikit-learn does; "trapezoids" uses the trapezoidal rule
    between the points where recall grows, as for Oxford and Paris (https://arxiv.org/abs/1803.11285).
    """
    ranks = np.flatnonzero(relevant_N)
    hits = np.arange(1, len(ranks) + 1)
    precision = hits / (ranks + 1)
    if method == "trapezoids":
        before = np.where(ranks > 0, (hits - 1) / np.maximum(ranks, 1), 1.0)
        precision = (precision + before) / 2
    return float(precision.sum() / positives)


def weighted_average_precision(relevant_N: np.ndarray, weight_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision (R,) of a ranking, best first, with image weights (R, N), by two methods; NaN without hits.

    The methods are "steps" as in `average_precision`, and that of VOC 2007: the mean over recalls 0, 0.1 ... 1 of the
    largest precision at this recall or more (https://doi.org/10.1007/s11263-009-0275-4, section 4.2).
    """
    if not len(relevant_N):
        return np.full(len(weight_RN), np.nan), np.full(len(weight_RN), np.nan)
    hits_RN, count_RN = np.cumsum(weight_RN * relevant_N, 1), np.cumsum(weight_RN, 1)
    precision_RN, total_R = hits_RN / np.maximum(count_RN, 1), hits_RN[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        steps_R = (weight_RN * relevant_N * precision_RN).sum(1) / total_R
    best_RN = np.maximum.accumulate(precision_RN[:, ::-1], 1)[:, ::-1]
    rank_RT = np.stack([(10 * hits_RN >= tenth * total_R[:, None]).argmax(1) for tenth in range(11)], 1)
    eleven_R = np.take_along_axis(best_RN, rank_RT, 1).mean(1)
    return steps_R, np.where(total_R > 0, eleven_R, np.nan)


def tag_average_precision(score_NC: np.ndarray, tags_NC: np.ndarray, weight_RN: np.ndarray | None = None) -> np.ndarray:
    """Average precision of each class by both methods (C, 2), or in each sample (C, 2, R). Tags of -1 are ignored."""
    weight_RN = np.ones((1, len(score_NC)), np.int64) if weight_RN is None else weight_RN
    values = []
    for score_N, tags_N in zip(score_NC.T, tags_NC.T, strict=True):
        order = np.argsort(-score_N, kind="stable")
        order = order[tags_N[order] >= 0]
        values.append(weighted_average_precision(tags_N[order] > 0, weight_RN[:, order]))
    ap_C2R = np.array(values)
    return ap_C2R[:, :, 0] if len(weight_RN) == 1 else ap_C2R


def micro_ap(score_P: np.ndarray, correct_P: np.ndarray, resamples: int, seed: int) -> tuple[float, float, float]:
    """Average precision of all pairs in one ranking, and its bootstrap interval over the correct pairs.

    Equal scores share a rank: the precision at each is that after the last of them.
    """
    score_R = np.sort(score_P[correct_P])[::-1]
    wrong = np.sort(score_P[~correct_P])
    above_R = len(wrong) - np.searchsorted(wrong, score_R, side="left")  # wrong pairs with this score or more
    last_R = np.searchsorted(-score_R, -score_R, side="right") - 1  # the last correct pair with this score

    def ap(weight_XR: np.ndarray) -> np.ndarray:
        hits_XR = np.cumsum(weight_XR, 1)[:, last_R]
        precision_XR = hits_XR / np.maximum(hits_XR + above_R, 1)
        return (weight_XR * precision_XR).sum(1) / weight_XR.sum(1)

    count = len(score_R)
    samples = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    low, high = np.quantile(ap(samples), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(ap(np.ones((1, count)))[0]), float(low), float(high)


def class_counts(predicted: np.ndarray, target: np.ndarray, classes: int, ignore: int) -> np.ndarray:
    """Pixels of one image (3, C) per class: intersection, predicted, ground truth; without the ignored ones."""
    valid = target != ignore
    predicted, target = predicted[valid].astype(np.int64), target[valid].astype(np.int64)
    both = predicted[predicted == target]
    return np.stack([np.bincount(x, minlength=classes) for x in (both, predicted, target)])


def mean_iou(counts_R3C: np.ndarray) -> np.ndarray:
    """Mean IoU over classes (R,) of summed `class_counts` (R, 3, C). Classes with an empty union are not counted."""
    both, predicted, target = np.moveaxis(counts_R3C.astype(np.float64), 1, 0)
    union = predicted + target - both
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nanmean(np.where(union > 0, both / union, np.nan), axis=1)


def depth_errors(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Depth errors of one image (https://arxiv.org/abs/1406.2283, section 4), where `target` is above 0."""
    valid = target > 0
    p, t = predicted[valid].astype(np.float64), target[valid].astype(np.float64)
    ratio, logs = np.maximum(p / t, t / p), np.log(p / t)
    return {
        "absrel": float((np.abs(p - t) / t).mean()),
        "rmse": float(np.sqrt(((p - t) ** 2).mean())),
        "rmse_log": float(np.sqrt((logs**2).mean())),
        **{f"delta{i}": float((ratio < 1.25**i).mean()) for i in (1, 2, 3)},
    }


def nmi(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Normalised mutual information of two partitions: divided by their mean entropy; 1 if both have a single part."""
    a, b = (np.unique(x, return_inverse=True)[1] for x in (a_N, b_N))
    joint = np.bincount(a * (b.max() + 1) + b, minlength=(a.max() + 1) * (b.max() + 1)) / len(a)
    joint = joint.reshape(a.max() + 1, b.max() + 1)

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    ha, hb = entropy(joint.sum(1)), entropy(joint.sum(0))
    return 1.0 if ha + hb == 0 else max(0.0, 2 * (ha + hb - entropy(joint.ravel())) / (ha + hb))


# Metrics where lower is better. All others lie in [0, 1].
ERROR_METRICS = frozenset(("absrel", "rmse", "rmse_log"))


def score_entry(
    protocol: str,
    dataset: str,
    metric: str,
    value: float,
    low: float,
    high: float,
    settings: dict,
    backbone: str,
    like: Any = None,
) -> dict:
    """One entry of scores.json. Values are in [0, 1], except those of ERROR_METRICS.

    `like` holds the settings that another score must share to be compared with this one; by default all `settings`.
    """
    assert 0.0 <= value <= 1.0 or metric in ERROR_METRICS, (metric, value)
    settings, like = json.loads(json.dumps([settings, settings if like is None else like]))
    recorded = settings if like == settings else settings | {"protocol": like}
    return {
        "protocol": protocol,
        "dataset": dataset,
        "metric": metric,
        "value": float(value),
        "low": float(low),
        "high": float(high),
        "settings": recorded,
        "backbone": backbone,
        "fingerprint": fingerprint(protocol, dataset, metric, like),
    }
