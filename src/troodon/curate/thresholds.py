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
from troodon.curate.embed import describe
from troodon.curate.pool import Pool
from troodon.data.decode import decode, grey
from troodon.data.index import Index
from troodon.data.loader import stream

SEEN_PX = (8, 512)  # about the shorter side of pictures that are attacked: less is no picture, more is not seen


def thresholds(
    pool: Pool, rows: ndarray, x_MD: ndarray, backbone: Any, fitted: space.Space, tokens: str, shown: int
) -> dict:
    """The thresholds of both steps, and the calibration they come from, if either does."""
    config = pool.config
    set_here = config.threshold is None and "duplicate" in config.steps
    set_there = config.benchmark_threshold is None and "benchmark" in config.steps and shown > 0
    found = _calibrate(pool, rows, x_MD, backbone, fitted, tokens) if set_here or set_there else None
    threshold, other = config.threshold, config.benchmark_threshold
    if found is not None:
        threshold = found.threshold if threshold is None else threshold
        other = min(found.threshold, found.looser) if other is None else other
    calibration = None if found is None else found.as_dict()
    return {"threshold": threshold, "benchmark_threshold": other if shown else None, "calibration": calibration}


def _calibrate(
    pool: Pool, rows: ndarray, x_MD: ndarray, backbone: Any, fitted: space.Space, tokens: str
) -> Calibration:
    """Calibrate on images drawn from `rows` of the index, whose vectors are `x_MD`."""
    random = np.random.default_rng(pool.config.seed)
    drawn = random.permutation(len(rows))[:OTHERS]
    images = [_picture(pool.index, int(row)) for row in rows[drawn[: pool.config.calibration_images]]]
    return _attack(pool.config, images, random, x_MD[drawn], len(rows), backbone, fitted, tokens)


def measure(config: CurateConfig, index: Index, backbone: Any, strength: float) -> Calibration:
    """Calibrate a backbone on an index that is not curated now, by at most OTHERS of its images."""
    random = np.random.default_rng(config.seed)
    parts, rows = list[ndarray](), list[int]()
    drawn = random.permutation(len(index))[:OTHERS]
    look: Any = lambda images: describe(backbone, images, config.tokens)  # noqa: E731
    for some, vectors in stream(
        index.take(drawn), config.batch, look, channels=backbone.channels, threads=config.threads
    ):
        rows += drawn[some].tolist()
        parts.append(np.asarray(vectors))
    if len(rows) < 2:
        raise UsageError(f"calibration compares images with one another, and of {len(index)} {len(rows)} can be read")
    x_ND = np.concatenate(parts)
    fitted = space.fit(config.duplicate_space, x_ND)
    images = [_picture(index, row) for row in rows[: config.calibration_images]]
    return _attack(config, images, random, fitted(x_ND), len(index), backbone, fitted, config.tokens, strength)


def _attack(
    config: CurateConfig,
    images: list[ndarray],
    random: np.random.Generator,
    others_MD: ndarray,
    pool: int,
    backbone: Any,
    fitted: space.Space,
    tokens: str,
    strength: float = STRENGTH,
) -> Calibration:
    run.say(f"calibrate: attacking {len(images):,} images")
    see = grey if backbone.channels == 1 else np.asarray
    result = calibrate(
        lambda copies: fitted(describe(backbone, [see(copy) for copy in copies], tokens, config.batch)),
        images,
        random,
        others_MD=others_MD,
        pool=pool,
        false_merges=config.false_merges,
        looser=config.benchmark_false_merges,
        strength=strength,
    )
    found = np.mean(list(result.recall.values())) if result.recall else 0.0
    run.say(f"calibrate: threshold {result.threshold:.3f} finds {found:.0%} of attacked copies")
    return result


def _picture(index: Index, row: int) -> ndarray:
    image = Image.fromarray(decode(index.read(row)))
    if min(image.size) < SEEN_PX[0]:
        image = image.resize((max(image.width, SEEN_PX[0]), max(image.height, SEEN_PX[0])))
    factor = min(image.size) // SEEN_PX[1]
    return np.asarray(image.reduce(factor) if factor > 1 else image)
