"""Choose thresholds for the images at hand: draw and read the images that calibrate.py attacks and compares."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image

from troodon import run
from troodon.config import UsageError
from troodon.copies.hashes import perceptual_hash
from troodon.curate import space
from troodon.curate.calibrate import (
    MAX_OTHERS,
    MIN_IMAGES,
    MIN_LEAK_IMAGES,
    STRENGTH,
    Calibration,
    calibrate,
    threshold_function,
)
from troodon.curate.config import CurateConfig
from troodon.curate.context import CurationContext
from troodon.curate.encoder import CopyEncoder
from troodon.images.index import Index
from troodon.images.reading import read_batches
from troodon.search.exact import l2_normalise

MIN_FOUND = 0.2  # share of the attacked copies; a threshold that finds fewer is an alarm
CANDIDATES = 3.0  # images that one is compared with by a closer look because of their vectors
MIN_SIDE, MAX_SIDE = 8, 512  # approximate limits of the shorter side of attacked pictures, in pixels


def choose_thresholds(
    context: CurationContext,
    rows: ndarray,
    structured: ndarray,
    x_MD: ndarray,
    encoder: CopyEncoder,
    fitted: space.Space,
    benchmark_images: int,
) -> dict:
    """Return the thresholds of the steps "duplicate" and "benchmark", the calibration if either is calibrated, and
    alarms if there are any. `structured` are the positions in `rows` of images that are not of one colour, or nearly.

    Where a closer look decides, pairs above a threshold are only candidates, and it is one that few others exceed. Else
    with too few images, a threshold is not calibrated, and nothing is compared in a space that would be fitted to them:
    it is 1, so that only equal images are copies.
    """
    config, count = context.config, len(structured)
    if config.verify == "geometric":
        threshold = _candidate_threshold(config, structured, x_MD)
        return {
            "threshold": threshold if config.threshold is None else config.threshold,
            "benchmark_threshold": (config.benchmark_threshold or threshold) if benchmark_images else None,
            "calibration": None,
        }
    fits = config.duplicate_space != "plain"
    compares = {"duplicate": "duplicate" in config.steps, "benchmark": "benchmark" in config.steps and benchmark_images}
    sets_duplicate = config.threshold is None and compares["duplicate"]
    sets_benchmark = config.benchmark_threshold is None and compares["benchmark"]
    threshold, benchmark_threshold, calibration = config.threshold, config.benchmark_threshold, None
    alarms = list[str]()
    if compares["duplicate"] and count < MIN_IMAGES and (sets_duplicate or fits):
        threshold, sets_duplicate = 1.0, False
        alarms.append(_too_few(count, MIN_IMAGES, "near-duplicates", "one another"))
    if compares["benchmark"] and (count < MIN_LEAK_IMAGES if sets_benchmark else count < MIN_IMAGES and fits):
        benchmark_threshold, sets_benchmark = 1.0, False
        needed = MIN_LEAK_IMAGES if config.benchmark_threshold is None else MIN_IMAGES
        alarms.append(_too_few(count, needed, "images of a benchmark", "one of it"))
    if sets_duplicate or sets_benchmark:
        rate = config.benchmark_false_merges if sets_benchmark else None
        calibration = _calibrate_rows(context, rows, structured, x_MD, encoder, fitted, rate)
        alarms += low_recall(calibration, sets_duplicate)
        threshold = calibration.threshold if threshold is None else threshold
        if calibration.benchmark_threshold is not None:
            benchmark_threshold = min(calibration.threshold, calibration.benchmark_threshold)
    return ({"alarms": alarms} if alarms else {}) | {
        "threshold": threshold,
        "benchmark_threshold": benchmark_threshold if benchmark_images else None,
        "calibration": None if calibration is None else calibration.as_dict(),
    }


def _candidate_threshold(config: CurateConfig, structured: ndarray, x_MD: ndarray) -> float:
    """The cosine that CANDIDATES others of an image exceed, on average; all do where there are only a few."""
    if len(structured) <= config.candidates:
        return -1.0
    drawn = structured[np.random.default_rng(config.seed).permutation(len(structured))[:MAX_OTHERS]]
    x_nD = l2_normalise(np.asarray(x_MD[np.sort(drawn)], np.float32))
    return threshold_function(x_nD[: config.calibration_images], x_nD, len(structured))(CANDIDATES)


def _too_few(count: int, needed: int, what: str, other: str) -> str:
    return (
        f"{count} images with any structure: at least {needed} are needed to tell {what} from look-alikes. Only images "
        f"with the same bytes, pixels or single colour as {other} are found"
    )


def low_recall(calibration: Calibration, sets_duplicate: bool = True) -> list[str]:
    """The alarms of a calibration: its thresholds find less than MIN_FOUND of the attacked copies."""
    found = {"near-duplicates": calibration.mean_recall} if sets_duplicate and calibration.recall else {}
    if calibration.benchmark_recall is not None:
        found["a benchmark's images"] = calibration.benchmark_recall
    return [
        f"the calibrated threshold finds {share:.0%} of attacked copies, so it misses most {what}; another backbone, "
        "such as a run of copies_small as --copies, may find more"
        for what, share in found.items()
        if share < MIN_FOUND
    ]


def _calibrate_rows(
    context: CurationContext,
    rows: ndarray,
    structured: ndarray,
    x_MD: ndarray,
    encoder: CopyEncoder,
    fitted: space.Space,
    benchmark_false_merges: float | None,
) -> Calibration:
    """Calibrate on images drawn from the structured `rows` of the index; `x_MD` are the vectors of all of `rows`."""
    config, random = context.config, np.random.default_rng(context.config.seed)
    drawn = structured[random.permutation(len(structured))[:MAX_OTHERS]]
    images = [_load_picture(context.index, int(row)) for row in rows[drawn[: config.calibration_images]]]
    count = len(structured)
    return _calibrate_images(config, images, random, x_MD[drawn], count, encoder, fitted, benchmark_false_merges)


def calibrate_index(config: CurateConfig, index: Index, encoder: CopyEncoder, strength: float) -> Calibration:
    """Calibrate an encoder on an index, outside of curation, with at most MAX_OTHERS of its images."""
    random = np.random.default_rng(config.seed)
    parts, rows = list[ndarray](), list[int]()
    drawn = random.permutation(len(index))[:MAX_OTHERS]

    def prepare(images: Sequence[ndarray]) -> Any:
        return [perceptual_hash(image) is not None for image in images], encoder.prepare(images)

    batches = read_batches(
        index.take(drawn), config.batch, prepare, join=encoder.join, channels=encoder.channels, threads=config.threads
    )
    blank = 0
    for batch_rows, (structured, prepared) in batches:
        structured_B, vectors = np.array(structured), encoder.encode(prepared)
        blank += int((~structured_B).sum())
        rows += drawn[batch_rows][structured_B].tolist()
        parts.append(vectors[structured_B])
    if len(rows) < MIN_IMAGES:
        usable = f"{len(rows)} of {len(index)} can be read and are not of one colour"
        raise UsageError(f"a threshold is calibrated on at least {MIN_IMAGES} images: {usable}")
    x_ND = np.concatenate(parts)
    fitted = space.fit(config.duplicate_space, x_ND)
    images = [_load_picture(index, row) for row in rows[: config.calibration_images]]
    count = len(index) - blank
    result = _calibrate_images(config, images, random, fitted(x_ND), count, encoder, fitted, None, strength)
    for alarm in low_recall(result):
        run.say(f"alarm: {alarm}")
    return result


def _calibrate_images(
    config: CurateConfig,
    images: list[ndarray],
    random: np.random.Generator,
    others_MD: ndarray,
    pool_size: int,
    encoder: CopyEncoder,
    fitted: space.Space,
    benchmark_false_merges: float | None,
    strength: float = STRENGTH,
) -> Calibration:
    run.say(f"calibrate: attacking {len(images):,} images")
    result = calibrate(
        lambda copies: fitted(encoder(encoder.match_channels(copies), config.batch)),
        images,
        random,
        others_MD=others_MD,
        pool_size=pool_size,
        false_merges=config.false_merges,
        benchmark_false_merges=benchmark_false_merges,
        benchmark_attacks=config.benchmark_attacks,
        strength=strength,
    )
    run.say(f"calibrate: threshold {result.threshold:.3f} finds {result.mean_recall:.0%} of attacked copies")
    if result.benchmark_recall is not None:
        threshold, recall = result.benchmark_threshold, result.benchmark_recall
        run.say(f"calibrate: benchmark threshold {threshold:.3f} finds {recall:.1%} of attacked copies of a benchmark")
    return result


def _load_picture(index: Index, row: int) -> ndarray:
    return limit_size(index.decode(row))


def limit_size(image_HW3: ndarray, max_side: int = MAX_SIDE) -> ndarray:
    """Resize the image for attacks: the shorter side at least MIN_SIDE, and less than twice `max_side`."""
    image = Image.fromarray(image_HW3)
    if min(image.size) < MIN_SIDE:
        image = image.resize((max(image.width, MIN_SIDE), max(image.height, MIN_SIDE)))
    factor = min(image.size) // max_side
    return np.asarray(image.reduce(factor) if factor > 1 else image)
