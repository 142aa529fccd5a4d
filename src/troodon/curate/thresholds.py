"""Choose thresholds for the images at hand: draw and read the images that calibrate.py attacks and compares."""

from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image

from troodon import run
from troodon.config import UsageError
from troodon.curate import space
from troodon.curate.calibrate import MAX_OTHERS, STRENGTH, Calibration, calibrate
from troodon.curate.config import CurateConfig
from troodon.curate.context import CurationContext
from troodon.curate.encoder import CopyEncoder
from troodon.images.decode import decode
from troodon.images.index import Index
from troodon.images.reading import read_batches

MIN_SIDE, MAX_SIDE = 8, 512  # approximate limits of the shorter side of attacked pictures, in pixels


def choose_thresholds(
    context: CurationContext,
    rows: ndarray,
    x_MD: ndarray,
    encoder: CopyEncoder,
    fitted: space.Space,
    benchmark_images: int,
) -> dict:
    """Return the thresholds of the steps "duplicate" and "benchmark", and the calibration if either is calibrated."""
    config = context.config
    sets_duplicate = config.threshold is None and "duplicate" in config.steps
    sets_benchmark = config.benchmark_threshold is None and "benchmark" in config.steps and benchmark_images > 0
    threshold, benchmark_threshold, calibration = config.threshold, config.benchmark_threshold, None
    if sets_duplicate or sets_benchmark:
        rate = config.benchmark_false_merges if sets_benchmark else None
        calibration = _calibrate_rows(context, rows, x_MD, encoder, fitted, rate)
        threshold = calibration.threshold if threshold is None else threshold
        if calibration.benchmark_threshold is not None:
            benchmark_threshold = min(calibration.threshold, calibration.benchmark_threshold)
    return {
        "threshold": threshold,
        "benchmark_threshold": benchmark_threshold if benchmark_images else None,
        "calibration": None if calibration is None else calibration.as_dict(),
    }


def _calibrate_rows(
    context: CurationContext,
    rows: ndarray,
    x_MD: ndarray,
    encoder: CopyEncoder,
    fitted: space.Space,
    benchmark_false_merges: float | None,
) -> Calibration:
    """Calibrate on images drawn from `rows` of the index, whose vectors are `x_MD`."""
    config, random = context.config, np.random.default_rng(context.config.seed)
    drawn = random.permutation(len(rows))[:MAX_OTHERS]
    images = [_load_picture(context.index, int(row)) for row in rows[drawn[: config.calibration_images]]]
    return _calibrate_images(config, images, random, x_MD[drawn], len(rows), encoder, fitted, benchmark_false_merges)


def calibrate_index(config: CurateConfig, index: Index, encoder: CopyEncoder, strength: float) -> Calibration:
    """Calibrate an encoder on an index, outside of curation, with at most MAX_OTHERS of its images."""
    random = np.random.default_rng(config.seed)
    parts, rows = list[ndarray](), list[int]()
    drawn = random.permutation(len(index))[:MAX_OTHERS]
    encode: Any = encoder
    batches = read_batches(index.take(drawn), config.batch, encode, channels=encoder.channels, threads=config.threads)
    for batch_rows, vectors in batches:
        rows += drawn[batch_rows].tolist()
        parts.append(np.asarray(vectors))
    if len(rows) < 2:
        raise UsageError(
            f"calibration compares images with one another, and only {len(rows)} of {len(index)} can be read"
        )
    x_ND = np.concatenate(parts)
    fitted = space.fit(config.duplicate_space, x_ND)
    images = [_load_picture(index, row) for row in rows[: config.calibration_images]]
    return _calibrate_images(config, images, random, fitted(x_ND), len(index), encoder, fitted, None, strength)


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
    recall = np.mean(list(result.recall.values())) if result.recall else 0.0
    run.say(f"calibrate: threshold {result.threshold:.3f} finds {recall:.0%} of attacked copies")
    if result.benchmark_recall is not None:
        threshold, recall = result.benchmark_threshold, result.benchmark_recall
        run.say(f"calibrate: benchmark threshold {threshold:.3f} finds {recall:.1%} of attacked copies of a benchmark")
    return result


def _load_picture(index: Index, row: int) -> ndarray:
    return limit_size(decode(index.read(row)))


def limit_size(image_HW3: ndarray, max_side: int = MAX_SIDE) -> ndarray:
    """Resize the image for attacks: the shorter side at least MIN_SIDE, and less than twice `max_side`."""
    image = Image.fromarray(image_HW3)
    if min(image.size) < MIN_SIDE:
        image = image.resize((max(image.width, MIN_SIDE), max(image.height, MIN_SIDE)))
    factor = min(image.size) // max_side
    return np.asarray(image.reduce(factor) if factor > 1 else image)
