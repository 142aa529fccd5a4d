"""What a score is: a number over images, how far it would move with other images, and what it may be compared with.

An image counts once, whatever its class; a class that training never showed counts, as wrong.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from troodon.config import fingerprint

# Shape suffixes: N images, C classes, R resamples, U distinct values, K numbers of an image, Q queries, P pairs.

LEVEL = 0.95  # of every interval


def class_accuracy(right_N: np.ndarray, labels_N: np.ndarray, classes: int) -> np.ndarray:
    """Accuracy within each class (C,); NaN for classes without an image. `right_N` holds shares in [0, 1]."""
    images_C = np.bincount(labels_N, minlength=classes).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.bincount(labels_N, weights=right_N, minlength=classes) / images_C


def confusions(predicted_N: np.ndarray, labels_N: np.ndarray, classes: int, most: int = 10) -> list[tuple]:
    """The most frequent mistakes, as (true class, predicted class, images), most frequent first."""
    wrong = predicted_N != labels_N
    pair, images = np.unique(labels_N[wrong].astype(np.int64) * classes + predicted_N[wrong], return_counts=True)
    order = np.argsort(-images, kind="stable")[:most]
    return [(int(pair[i]) // classes, int(pair[i]) % classes, int(images[i])) for i in order]


def interval(right_N: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Bootstrap interval (percentiles 2.5 and 97.5) of the mean over images, images drawn with replacement.

    A resample's mean depends only on how often each distinct value is drawn, so R multinomial draws of U
    counts are the R resamples of N images, exactly. Where every image is right, or every one wrong, a bootstrap
    sees no spread at all; the open end is then the binomial bound (Clopper and Pearson, 1934): 3 of 3 is [0.29, 1].
    """
    value_U, images_U = np.unique(np.asarray(right_N, dtype=np.float64), return_counts=True)
    count, tail = int(images_U.sum()), (1 - LEVEL) / 2
    if len(value_U) == 1 and value_U[0] in (0.0, 1.0):
        bound = tail ** (1 / count)
        return (bound, 1.0) if value_U[0] else (0.0, 1 - bound)
    drawn_RU = np.random.default_rng(seed).multinomial(count, images_U / count, size=resamples)
    low, high = np.quantile(drawn_RU @ value_U / count, [tail, 1 - tail])
    return float(low), float(high)


def interval_of(
    statistic: Callable[[np.ndarray], np.ndarray], sums_NK: np.ndarray, resamples: int, seed: int
) -> tuple[float, float]:
    """Bootstrap interval of a function of sums over images, such as the mean IoU: (R, K) -> (R,)."""
    random, count = np.random.default_rng(seed), len(sums_NK)
    found = [
        statistic(random.multinomial(count, np.full(count, 1 / count), size=min(64, resamples - start)) @ sums_NK)
        for start in range(0, resamples, 64)
    ]
    low, high = np.nanquantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def average_precision(relevant_N: np.ndarray, positives: int, how: str = "steps") -> float:
    """Area under precision over recall of a ranking, best first; `positives` are all there are.

    "steps" sums precision at each relevant image (what scikit-learn does); "trapezoids" joins the points between which
    recall grows, as the evaluation of Oxford and Paris does (https://arxiv.org/abs/1803.11285).
    """
    at = np.flatnonzero(relevant_N)
    found = np.arange(1, len(at) + 1)
    precision = found / (at + 1)
    if how == "trapezoids":
        before = np.where(at > 0, (found - 1) / np.maximum(at, 1), 1.0)
        precision = (precision + before) / 2
    return float(precision.sum() / positives)


def precisions(relevant_N: np.ndarray, weight_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision (R,) of a ranking, best first, in which images count so often; NaN where none is relevant.

    Two ways: the sum of "steps", as in `average_precision`; and that of VOC 2007, the mean over recalls of 0, 0.1 ... 1
    of the largest precision at this recall or more (https://doi.org/10.1007/s11263-009-0275-4, section 4.2).
    """
    if not len(relevant_N):
        return np.full(len(weight_RN), np.nan), np.full(len(weight_RN), np.nan)
    found_RN, seen_RN = np.cumsum(weight_RN * relevant_N, 1), np.cumsum(weight_RN, 1)
    precision_RN, total_R = found_RN / np.maximum(seen_RN, 1), found_RN[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        steps_R = (weight_RN * relevant_N * precision_RN).sum(1) / total_R
    best_RN = np.maximum.accumulate(precision_RN[:, ::-1], 1)[:, ::-1]
    firsts_RT = np.stack([(10 * found_RN >= tenth * total_R[:, None]).argmax(1) for tenth in range(11)], 1)
    eleven_R = np.take_along_axis(best_RN, firsts_RT, 1).mean(1)
    return steps_R, np.where(total_R > 0, eleven_R, np.nan)


def tag_precision(score_NC: np.ndarray, tags_NC: np.ndarray, weight_RN: np.ndarray | None = None) -> np.ndarray:
    """Average precision of each class, in two ways (C, 2), or in each resample (C, 2, R); -1 counts for nothing."""
    weight_RN = np.ones((1, len(score_NC)), np.int64) if weight_RN is None else weight_RN
    found = []
    for score_N, tags_N in zip(score_NC.T, tags_NC.T, strict=True):
        order = np.argsort(-score_N, kind="stable")
        order = order[tags_N[order] >= 0]
        found.append(precisions(tags_N[order] > 0, weight_RN[:, order]))
    found_C2R = np.array(found)
    return found_C2R[:, :, 0] if len(weight_RN) == 1 else found_C2R


def micro_ap(score_P: np.ndarray, right_P: np.ndarray, resamples: int, seed: int) -> tuple[float, float, float]:
    """Average precision of all pairs in one ranking, and its interval over the pairs that are right.

    Equal scores are ranked together: the precision at each is that after the last of them.
    """
    score_R = np.sort(score_P[right_P])[::-1]
    wrong = np.sort(score_P[~right_P])
    above_R = len(wrong) - np.searchsorted(wrong, score_R, side="left")  # wrong pairs that score as much or more
    last_R = np.searchsorted(-score_R, -score_R, side="right") - 1  # the last of the right pairs with this score

    def ap(weight_XR: np.ndarray) -> np.ndarray:
        found_XR = np.cumsum(weight_XR, 1)[:, last_R]
        precision_XR = found_XR / np.maximum(found_XR + above_R, 1)
        return (weight_XR * precision_XR).sum(1) / weight_XR.sum(1)

    count = len(score_R)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    low, high = np.quantile(ap(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(ap(np.ones((1, count)))[0]), float(low), float(high)


def class_counts(predicted: np.ndarray, target: np.ndarray, classes: int, ignore: int) -> np.ndarray:
    """Of one picture, for each class the pixels (3, C) that are both, predicted and so in truth; ignored ones aside."""
    known = target != ignore
    predicted, target = predicted[known].astype(np.int64), target[known].astype(np.int64)
    both = predicted[predicted == target]
    return np.stack([np.bincount(x, minlength=classes) for x in (both, predicted, target)])


def mean_iou(counts_R3C: np.ndarray) -> np.ndarray:
    """Mean over classes of intersection over union (R,), of summed `class_counts`; a class that is nowhere is none."""
    both, predicted, target = np.moveaxis(counts_R3C.astype(np.float64), 1, 0)
    union = predicted + target - both
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nanmean(np.where(union > 0, both / union, np.nan), axis=1)


def depth_errors(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Errors of one picture's distances (https://arxiv.org/abs/1406.2283, section 4) where `target` is above 0."""
    known = target > 0
    p, t = predicted[known].astype(np.float64), target[known].astype(np.float64)
    ratio, logs = np.maximum(p / t, t / p), np.log(p / t)
    return {
        "absrel": float((np.abs(p - t) / t).mean()),
        "rmse": float(np.sqrt(((p - t) ** 2).mean())),
        "rmse_log": float(np.sqrt((logs**2).mean())),
        **{f"delta{i}": float((ratio < 1.25**i).mean()) for i in (1, 2, 3)},
    }


def mutual_information(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Normalised mutual information of two partitions, over the mean of their entropies; 1 if both are of one part."""
    a, b = (np.unique(x, return_inverse=True)[1] for x in (a_N, b_N))
    joint = np.bincount(a * (b.max() + 1) + b, minlength=(a.max() + 1) * (b.max() + 1)) / len(a)
    joint = joint.reshape(a.max() + 1, b.max() + 1)

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    ha, hb = entropy(joint.sum(1)), entropy(joint.sum(0))
    return 1.0 if ha + hb == 0 else max(0.0, 2 * (ha + hb - entropy(joint.ravel())) / (ha + hb))


# Metrics that are no share of anything; every other lies in [0, 1].
ERRORS = frozenset(("absrel", "rmse", "rmse_log"))


def score(
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
    """One entry of scores.json. Values are in [0, 1], but for ERRORS.

    `like` is all that another score must share to stand in one row with this one; its settings, if not said.
    """
    assert 0.0 <= value <= 1.0 or metric in ERRORS, (metric, value)
    settings, like = json.loads(json.dumps([settings, settings if like is None else like]))
    told = settings if like == settings else settings | {"protocol": like}
    return {
        "protocol": protocol,
        "dataset": dataset,
        "metric": metric,
        "value": float(value),
        "low": float(low),
        "high": float(high),
        "settings": told,
        "backbone": backbone,
        "fingerprint": fingerprint(protocol, dataset, metric, like),
    }
