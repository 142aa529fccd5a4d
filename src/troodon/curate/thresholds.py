"""Thresholds for the images at hand: which are drawn, how they are read and attacked (calibrate.py does the rest)."""

from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image

from troodon import run
from troodon.config import UsageError
from troodon.curate import space
from troodon.curate.calibrate import OTHERS, STRENGTH, Calibration, calibrate
from troodon.curate.config import CurateConfig
from troodon.curate.finder import Finder
from troodon.curate.pool import Pool
from troodon.images.decode import decode
from troodon.images.index import Index
from troodon.images.reading import stream

LEAST, MOST = 8, 512  # about the shorter side of pictures that are attacked: less is no picture, more is not seen


def thresholds(pool: Pool, rows: ndarray, x_MD: ndarray, finder: Finder, fitted: space.Space, shown: int) -> dict:
    """The thresholds of both steps, and the calibration they come from, if either does."""
    config = pool.config
    set_here = config.threshold is None and "duplicate" in config.steps
    set_there = config.benchmark_threshold is None and "benchmark" in config.steps and shown > 0
    rate = config.benchmark_false_merges if set_there else None
    found = _calibrate(pool, rows, x_MD, finder, fitted, rate) if set_here or set_there else None
    threshold, other = config.threshold, config.benchmark_threshold
    if found is not None:
        threshold = found.threshold if threshold is None else threshold
        if found.benchmark_threshold is not None:
            other = min(found.threshold, found.benchmark_threshold)
    calibration = None if found is None else found.as_dict()
    return {"threshold": threshold, "benchmark_threshold": other if shown else None, "calibration": calibration}


def _calibrate(
    pool: Pool, rows: ndarray, x_MD: ndarray, finder: Finder, fitted: space.Space, rate: float | None
) -> Calibration:
    """Calibrate on images drawn from `rows` of the index, whose vectors are `x_MD`."""
    random = np.random.default_rng(pool.config.seed)
    drawn = random.permutation(len(rows))[:OTHERS]
    images = [_picture(pool.index, int(row)) for row in rows[drawn[: pool.config.calibration_images]]]
    return _attack(pool.config, images, random, x_MD[drawn], len(rows), finder, fitted, rate)


def measure(config: CurateConfig, index: Index, finder: Finder, strength: float) -> Calibration:
    """Calibrate what finds copies on an index that is not curated now, by at most OTHERS of its images."""
    random = np.random.default_rng(config.seed)
    parts, rows = list[ndarray](), list[int]()
    drawn = random.permutation(len(index))[:OTHERS]
    look: Any = finder
    for some, vectors in stream(
        index.take(drawn), config.batch, look, channels=finder.channels, threads=config.threads
    ):
        rows += drawn[some].tolist()
        parts.append(np.asarray(vectors))
    if len(rows) < 2:
        raise UsageError(f"calibration compares images with one another, and of {len(index)} {len(rows)} can be read")
    x_ND = np.concatenate(parts)
    fitted = space.fit(config.duplicate_space, x_ND)
    images = [_picture(index, row) for row in rows[: config.calibration_images]]
    return _attack(config, images, random, fitted(x_ND), len(index), finder, fitted, None, strength)


def _attack(
    config: CurateConfig,
    images: list[ndarray],
    random: np.random.Generator,
    others_MD: ndarray,
    pool: int,
    finder: Finder,
    fitted: space.Space,
    benchmark_false_merges: float | None,
    strength: float = STRENGTH,
) -> Calibration:
    run.say(f"calibrate: attacking {len(images):,} images")
    result = calibrate(
        lambda copies: fitted(finder(finder.of_colour(copies), config.batch)),
        images,
        random,
        others_MD=others_MD,
        pool=pool,
        false_merges=config.false_merges,
        benchmark_false_merges=benchmark_false_merges,
        disguises=config.disguises,
        strength=strength,
    )
    found = np.mean(list(result.recall.values())) if result.recall else 0.0
    run.say(f"calibrate: threshold {result.threshold:.3f} finds {found:.0%} of attacked copies")
    if result.benchmark_recall is not None:
        at, found = result.benchmark_threshold, result.benchmark_recall
        run.say(f"calibrate: of a benchmark's, threshold {at:.3f} finds {found:.1%}")
    return result


def _picture(index: Index, row: int) -> ndarray:
    return picture(decode(index.read(row)))


def picture(image_HW3: ndarray, most: int = MOST) -> ndarray:
    """The image at a size at which it can be attacked, the shorter side less than twice `most`."""
    image = Image.fromarray(image_HW3)
    if min(image.size) < LEAST:
        image = image.resize((max(image.width, LEAST), max(image.height, LEAST)))
    factor = min(image.size) // most
    return np.asarray(image.reduce(factor) if factor > 1 else image)
