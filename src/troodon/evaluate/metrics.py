"""What a score is: a mean over images of "was it right", and how far it would move with other images.

An image counts once, whatever its class; a class that training never showed counts, as wrong.
"""

import numpy as np

# Shape suffixes: N images, C classes, R resamples, U distinct values.

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


def score(
    protocol: str, dataset: str, metric: str, value: float, low: float, high: float, settings: dict, backbone: str
) -> dict:
    """One entry of scores.json. Values are in [0, 1]."""
    assert 0.0 <= value <= 1.0, value
    return {
        "protocol": protocol,
        "dataset": dataset,
        "metric": metric,
        "value": float(value),
        "low": float(low),
        "high": float(high),
        "settings": settings,
        "backbone": backbone,
    }
