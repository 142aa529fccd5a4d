"""Calibration: the threshold between copies and look-alikes, measured on the images at hand.

The cosine of a near-duplicate depends on the network: 0.6 of one is 0.97 of another. So images are drawn from the pool.

  * They are compared with the other images of the pool, nearly all of them different pictures. This sets the threshold:
    one image is taken for a copy of `false_merges` others, on average.
  * They are attacked, as pictures are on the web, and compared with their copies. This gives the expected recall. The
    threshold is not lower than where 95 % of these copies are found; that matters in pools of a few images.

The pool may contain true copies, and nobody knows how many. They have the highest scores, so the threshold is not read
off there, but extrapolated from lower scores: from those that 50 and 5 others of an image exceed. There, copies are few
among the others. In atanh of the cosine, the logarithm of the number of others above falls about linearly: aiming at
0.02, the result was between 0 and 0.1 with five kinds of features, 100 to 11,500 images, and up to half of them copied
once. If each image has several copies, the threshold is too high: copies remain, but no different picture is lost.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from numpy.random import Generator

from troodon.search.exact import l2_normalise
from troodon.views.attacks import ATTACKS, attack, attacked_copies

# Shape suffixes: n images that were drawn, M others, V views (an image and its attacked copies), D channels.

FAR, NEAR = 50, 5  # numbers of others above the two scores that the threshold is extrapolated from
RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # of false merges, in the table
COPIES_PER_IMAGE = 4  # by one attack after the other
STRENGTH = 0.5  # of the attacks: a JPEG of quality 34, 83 % of the area, rotated by ten degrees ...
MIN_RECALL = 0.95  # share of the copies that is sufficient
# With fewer images no threshold is calibrated: their space has so few dimensions that different images are near. For a
# benchmark, whose attacked copies are compared too: of 16 images, one in seven was taken for a leak; of 32, one in 96.
MIN_IMAGES, MIN_LEAK_IMAGES = 16, 32
MAX_OTHERS = 20_000
MAX_BENCHMARK_IMAGES = 100  # images that are compared as images of a benchmark are

EmbedImages = Callable[[list[ndarray]], ndarray]


@dataclass(frozen=True)
class Calibration:
    """A threshold and its expected effect."""

    threshold: float
    benchmark_threshold: float | None  # at another rate, for benchmark images and their attacked copies
    benchmark_recall: float | None  # share of the copies found at this threshold
    false_merges: float  # target: number of others that one image is wrongly taken for a copy of, on average
    images: int  # number of images drawn
    copies: int  # number of attacked copies
    strength: float
    recall: dict[str, float]  # share of the copies found, by attack
    table: list[dict[str, float]]  # "false_merges", "threshold", "recall" for a range of thresholds

    @property
    def mean_recall(self) -> float:
        """The share of the copies found, averaged over attacks; 0 without any."""
        return float(np.mean(list(self.recall.values()))) if self.recall else 0.0

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def calibrate(
    embed_images: EmbedImages,
    images: Sequence[ndarray],
    random: Generator,
    *,
    others_MD: ndarray | None = None,
    pool_size: int | None = None,
    false_merges: float = 0.001,
    benchmark_false_merges: float | None = None,
    benchmark_attacks: int = 0,
    strength: float = STRENGTH,
) -> Calibration:
    """Choose the threshold for images uint8 (H, W, 3) that were drawn from a pool of `pool_size` images.

    `embed_images` returns vectors (B, D) whose cosines are compared. `others_MD` holds vectors of images of the pool,
    those of `images` first; without it the images are compared with one another. `benchmark_false_merges` is the rate
    for benchmark images, if there are any, with this number of `benchmark_attacks` (views/attacks.py).
    """
    others_MD = l2_normalise(embed_images(list(images)) if others_MD is None else others_MD)
    assert len(others_MD) >= len(images)
    original_nD, pool_size = others_MD[: len(images)], pool_size or len(others_MD)
    threshold_at = threshold_function(original_nD, others_MD, pool_size)

    benchmark_threshold = None
    view_nVD = original_nD[:MAX_BENCHMARK_IMAGES, None]
    if benchmark_false_merges is not None:
        view_nVD = _with_attacked_copies(embed_images, images, view_nVD, benchmark_attacks)
        benchmark_threshold_at = threshold_function(original_nD[: len(view_nVD)], others_MD, pool_size, view_nVD)
        benchmark_threshold = benchmark_threshold_at(benchmark_false_merges)

    scores, benchmark_scores = _copy_scores(embed_images, images, random, strength, original_nD, view_nVD)
    all_scores = np.array([score for attack_scores in scores.values() for score in attack_scores])
    lowest = round(float(np.quantile(all_scores, 1 - MIN_RECALL)), 6) if len(all_scores) else -1.0
    threshold = max(threshold_at(false_merges), lowest)
    table = [
        {"false_merges": rate, "threshold": threshold_at(rate), "recall": _recall(all_scores, threshold_at(rate))}
        for rate in RATES
        if len(all_scores)
    ]
    has_benchmark = benchmark_scores and benchmark_threshold is not None
    return Calibration(
        threshold=threshold,
        benchmark_threshold=benchmark_threshold,
        benchmark_recall=_recall(benchmark_scores, benchmark_threshold) if has_benchmark else None,
        false_merges=false_merges,
        images=len(images),
        copies=len(all_scores),
        strength=strength,
        recall={name: _recall(attack_scores, threshold) for name, attack_scores in scores.items() if attack_scores},
        table=table,
    )


def _with_attacked_copies(
    embed_images: EmbedImages, images: Sequence[ndarray], view_nVD: ndarray, attacks: int
) -> ndarray:
    """Append the vectors of `attacks` attacked copies to those of each image: (n, 1, D) -> (n, 1 + attacks, D)."""
    if not attacks or not len(view_nVD):
        return view_nVD
    copies = [l2_normalise(embed_images(attacked_copies(image, attacks))) for image in images[: len(view_nVD)]]
    return np.concatenate([view_nVD, np.stack(copies)], axis=1)


def _copy_scores(
    embed_images: EmbedImages,
    images: Sequence[ndarray],
    random: Generator,
    strength: float,
    original_nD: ndarray,
    view_nVD: ndarray,
) -> tuple[dict[str, list[float]], list[float]]:
    """Attack every image COPIES_PER_IMAGE times; return the cosines of copies with their originals by attack, and the
    highest cosines with any view of these."""
    names = list(ATTACKS)
    scores, view_scores = {name: list[float]() for name in names}, list[float]()
    for copy in range(COPIES_PER_IMAGE if len(images) else 0):
        attacks = [names[(row * COPIES_PER_IMAGE + copy) % len(names)] for row in range(len(images))]
        copies = [attack(image, name, random, strength) for image, name in zip(images, attacks, strict=True)]
        copy_nD = l2_normalise(embed_images(copies))
        view_scores += np.einsum("nd,nvd->nv", copy_nD[: len(view_nVD)], view_nVD).max(1).tolist()
        for name, score in zip(attacks, np.einsum("nd,nd->n", copy_nD, original_nD), strict=True):
            scores[name].append(score)
    return scores, view_scores


def _recall(scores: Sequence | ndarray, threshold: float) -> float:
    return round(float((np.asarray(scores) > threshold).mean()), 4)


def threshold_function(
    original_nD: ndarray, others_MD: ndarray, pool_size: int, view_nVD: ndarray | None = None
) -> Callable[[float], float]:
    """Return a function from a rate of false merges to the threshold: `rate` others exceed it, on average over the
    images, in a pool of this size. With several views of an image, the highest cosine of any view counts. The first of
    `others_MD` are the images themselves."""
    count = min(len(original_nD), len(others_MD))
    if pool_size < 3 or count < 2 or not original_nD.any():  # all images are the same
        return lambda rate: 1.0
    score_nM = original_nD @ others_MD.T
    for view_nD in () if view_nVD is None else view_nVD.swapaxes(0, 1):
        np.maximum(score_nM, view_nD @ others_MD.T, out=score_nM)
    score_nM[np.arange(count), np.arange(count)] = -1
    score = np.sort(score_nM, axis=None)[::-1]

    def exceeded_by(rate: float) -> float:
        """Return atanh of the score that this number of images of the pool exceed."""
        rank = int(rate * count * (len(others_MD) - 1) / (pool_size - 1))
        return float(np.arctanh(np.clip(score[min(rank, len(score) - 1)].astype(np.float64), -1 + 1e-7, 1 - 1e-7)))

    far = min(FAR, 0.3 * (pool_size - 1))
    near = far * NEAR / FAR
    slope = (exceeded_by(near) - exceeded_by(far)) / np.log(far / near)
    if exceeded_by(near) >= np.arctanh(1 - 1e-6):  # the network has collapsed: no image is a duplicate
        return lambda rate: 1.0
    return lambda rate: round(float(np.tanh(exceeded_by(near) + slope * np.log(near / rate))), 6)
