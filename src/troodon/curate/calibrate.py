"""The threshold between copies and look-alikes, measured on the images at hand.

What is a near-duplicate depends on the network: 0.6 of one is 0.97 of another. So images are drawn from the pool, and

  * compared with the other images of the pool, nearly all of them different pictures, which sets the threshold: it is
    where one image would be taken for a copy of `false_merges` others, on average;
  * attacked, as pictures are on the web, and compared with their copies, which tells what share it will find. Nor
    is the threshold lower than where 95 % of these copies are found: that matters in pools of a few images.

The pool may hold true copies, and nobody knows how many. They are the highest scores, so the threshold is not read off
there, but extrapolated from lower ones: from the scores that 50 and 5 others of an image exceed. Below these, copies
are lost in the crowd. In atanh of the cosine the logarithm of the number of others above falls about linearly: aiming
at 0.02, it came to between 0 and 0.1 with five kinds of features, 100 to 11,500 images, and up to half of them copied
once. Where each image has several copies the threshold comes out too high: copies stay, pictures are not lost.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from numpy.random import Generator

from troodon.search.exact import unit
from troodon.views.attacks import ATTACKS, attack, disguised

# Shape suffixes: n images that were drawn, M others, D channels.

FAR, NEAR = 50, 5  # others above the two scores that the threshold is extrapolated from
RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # of false merges, in the table
COPIES = 4  # of each image, by attacks in turn
STRENGTH = 0.5  # of the attacks: a JPEG of quality 34, 83 % of the area, turned by ten degrees ...
FOUND = 0.95  # share of the copies: enough
OTHERS = 20_000  # to compare with, at most
DISGUISED = 100  # images that are disguised, at most


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what to expect of it."""

    threshold: float
    benchmark_threshold: float | None  # the same at another rate, for images of a benchmark in their disguises
    benchmark_recall: float | None  # share of the copies that it finds
    false_merges: float  # others that one image is wrongly taken for a copy of, on average, as aimed at
    images: int  # that were drawn
    copies: int  # that were made of them
    strength: float
    recall: dict[str, float]  # share of the copies found, by attack
    table: list[dict[str, float]]  # "false_merges", "threshold", "recall" for a range of thresholds

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def calibrate(
    embed_images: Callable[[list[ndarray]], ndarray],
    images: Sequence[ndarray],
    random: Generator,
    *,
    others_MD: ndarray | None = None,
    pool: int | None = None,
    false_merges: float = 0.001,
    benchmark_false_merges: float | None = None,
    disguises: int = 0,
    strength: float = STRENGTH,
) -> Calibration:
    """Choose the threshold for images uint8 (H, W, 3) that were drawn from a pool of `pool` images.

    `embed_images` gives vectors (B, D) whose cosines are compared. `others_MD` holds those of images of the pool,
    first of all of `images` themselves; without it they are compared with one another. `benchmark_false_merges` is the
    rate for images of a benchmark, where there is one, which are compared in so many `disguises` (views/attacks.py).
    """
    if others_MD is None:
        others_MD = embed_images(list(images))
    others_MD = unit(others_MD)
    assert len(others_MD) >= len(images)
    original_nD = others_MD[: len(images)]
    threshold_at = tail(original_nD, others_MD, pool or len(others_MD))

    benchmark_threshold, of_benchmark = None, list[float]()
    seen_nVD = original_nD[:DISGUISED, None]  # these images as such and in disguise
    if benchmark_false_merges is not None:
        if disguises and len(seen_nVD):
            attacked = [unit(embed_images(disguised(image, disguises))) for image in images[:DISGUISED]]
            seen_nVD = np.concatenate([seen_nVD, np.stack(attacked)], axis=1)
        at = tail(original_nD[:DISGUISED], others_MD, pool or len(others_MD), seen_nVD)
        benchmark_threshold = at(benchmark_false_merges)

    scores = {kind: list[ndarray]() for kind in ATTACKS}
    kinds = list(ATTACKS)
    for turn in range(COPIES if len(images) else 0):
        names = [kinds[(at * COPIES + turn) % len(kinds)] for at in range(len(images))]
        copies = [attack(image, name, random, strength) for image, name in zip(images, names, strict=True)]
        copy_nD = unit(embed_images(copies))
        cosine_n = np.einsum("nd,nd->n", copy_nD, original_nD)
        of_benchmark += np.einsum("nd,nvd->nv", copy_nD[:DISGUISED], seen_nVD).max(1).tolist()
        for name, cosine in zip(names, cosine_n, strict=True):
            scores[name].append(cosine)
    every = np.array([cosine for of_kind in scores.values() for cosine in of_kind])

    def recall(cosines: Sequence | ndarray, threshold: float) -> float:
        return round(float((np.asarray(cosines) > threshold).mean()), 4)

    found = recall(of_benchmark, benchmark_threshold) if of_benchmark and benchmark_threshold is not None else None
    threshold = max(threshold_at(false_merges), round(float(np.quantile(every, 1 - FOUND)), 6) if len(every) else -1.0)
    return Calibration(
        threshold=threshold,
        benchmark_threshold=benchmark_threshold,
        benchmark_recall=found,
        false_merges=false_merges,
        images=len(images),
        copies=len(every),
        strength=strength,
        recall={kind: recall(cosines, threshold) for kind, cosines in scores.items() if cosines},
        table=[
            {"false_merges": rate, "threshold": threshold_at(rate), "recall": recall(every, threshold_at(rate))}
            for rate in RATES
            if len(every)
        ],
    )


def tail(
    original_nD: ndarray, others_MD: ndarray, pool: int, seen_nVD: ndarray | None = None
) -> Callable[[float], float]:
    """The threshold that `rate` others of an image exceed, on average over the images, in a pool of this size; where
    they are seen in several ways, by whichever is nearest. Of `others_MD` the first are the images themselves."""
    count = min(len(original_nD), len(others_MD))
    if pool < 3 or count < 2:
        return lambda rate: 1.0
    score_nM = original_nD @ others_MD.T
    for seen_nD in () if seen_nVD is None else seen_nVD.swapaxes(0, 1):
        np.maximum(score_nM, seen_nD @ others_MD.T, out=score_nM)
    score_nM[np.arange(count), np.arange(count)] = -1
    score = np.sort(score_nM, axis=None)[::-1]

    def exceeded_by(rate: float) -> float:
        """atanh of the score that so many of the pool exceed."""
        at = int(rate * count * (len(others_MD) - 1) / (pool - 1))
        return float(np.arctanh(np.clip(score[min(at, len(score) - 1)].astype(np.float64), -1 + 1e-7, 1 - 1e-7)))

    far = min(FAR, 0.3 * (pool - 1))
    near = far * NEAR / FAR
    slope = (exceeded_by(near) - exceeded_by(far)) / np.log(far / near)
    if exceeded_by(near) >= np.arctanh(1 - 1e-6):  # the network tells nothing apart: nothing is a duplicate
        return lambda rate: 1.0
    return lambda rate: round(float(np.tanh(exceeded_by(near) + slope * np.log(near / rate))), 6)
