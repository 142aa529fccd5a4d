"""Two pools of images to one selection: embed, drop copies, retrieve, compose.

While it works the stages lie beside the selection, in `<out>.work`, each complete or absent; a killed run continues
with what is there. The selection itself appears at the end, whole, and takes the embeddings with it.

    images.parquet    the ledger: one row for every image that came in (see compose.py)
    groups.parquet    near-duplicates: group, row, kept, score with the representative, whose row names the group
    hits.parquet      what was retrieved: query (a curated row), rank from 1, row, score
    summary.json      counts by stage, the threshold and its calibration
    timings.json      seconds by stage
    embeddings/       of all images, curated ones first, as in the ledger
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray
from PIL import Image

from troodon import run
from troodon.config import UsageError, fingerprint, to_dict
from troodon.curate import compose, dedup, space
from troodon.curate.calibrate import OTHERS, Calibration, calibrate
from troodon.curate.config import CurateConfig
from troodon.curate.embed import Progress, describe, embed, load
from troodon.curate.retrieve import retrieve
from troodon.data.decode import decode, grey
from troodon.data.index import Index
from troodon.data.scan import contents
from troodon.model.backbone import Backbone
from troodon.search.exact import tiles

NOT_OF_THE_RESULT = ("batch", "threads")  # settings that change how fast, not what
SEEN_PX = (8, 512)  # about the shorter side of pictures that are attacked: less is no picture, more is not seen


def curate(config: CurateConfig, curated: Index, uncurated: Index, backbone: Backbone, out: Path) -> Path:
    """Select from `uncurated` what resembles `curated`, without copies, and publish the selection `out`.

    Does nothing where it is there already. UsageError when there is no readable curated image, when `out` was made
    with other settings or from other images, and without a threshold for a backbone that takes neither RGB nor grey.
    """
    if not len(curated):
        raise UsageError("no curated images: retrieval needs at least one to start from")
    if config.threshold is None and backbone.channels not in (1, 3):
        why = f"it is calibrated on copies of pictures, and {backbone.name} takes {backbone.channels} channels"
        raise UsageError(f"threshold None: {why}; set it, for example to 0.9")
    settings = {k: v for k, v in to_dict(config).items() if k not in NOT_OF_THE_RESULT}
    settings |= {"backbone": backbone.name, "weights": backbone.fingerprint}
    name = fingerprint(settings, contents(curated), contents(uncurated))
    work = out.with_name(f"{out.name}.work")
    if run.is_done(out, "selection", name, settings):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed just before its end
        return out

    index = Index.concat([curated, uncurated])
    embeddings = embed(
        backbone, index, work / "embeddings", batch=config.batch, threads=config.threads, tokens=config.tokens
    )
    x_ND, images = load(embeddings)
    curated_N = np.arange(len(index)) < len(curated)
    readable_N = np.array(images["status"].to_pylist()) == "ok"
    if not (readable_N & curated_N).any():
        first = images.slice(0, 1).to_pylist()[0]
        why = f"the first, {first['path']}, is {first['status']} ({first['reason']})"
        raise UsageError(f"none of the {len(curated):,} curated images can be read; {why}")

    device = None if str(getattr(backbone, "device", "cpu")) == "cpu" else backbone.device
    duplicates = _duplicates(config, index, images, x_ND, curated_N, readable_N, backbone, device, work)
    verdict = pq.read_table(duplicates / "verdict.parquet")
    survives_N = verdict["survives"].to_numpy()
    hits = _retrieve(config, x_ND, curated_N, survives_N, duplicates, device, work)

    began = time.monotonic()
    ledger = compose.ledger(config, images, curated_N, verdict, pq.read_table(hits / "hits.parquet"))
    found = run.read_json(duplicates / "threshold.json")
    summary = compose.summary(config, ledger) | found | {"backbone": backbone.name}
    with run.publish(out, "selection", name, settings) as partial:
        pq.write_table(ledger, partial / "images.parquet", compression="zstd")
        shutil.copy(duplicates / "groups.parquet", partial)
        shutil.copy(hits / "hits.parquet", partial)
        shutil.copytree(embeddings, partial / "embeddings", copy_function=_link)
        run.write_json(partial / "summary.json", summary)
        seconds = {k: v for s in (embeddings, duplicates, hits) for k, v in run.read_json(s / "timings.json").items()}
        run.write_json(partial / "timings.json", seconds | {"compose": round(time.monotonic() - began, 3)})
    shutil.rmtree(work)
    run.say(f"curate: kept {summary['kept']:,} of {len(index):,} images: {out}")
    return out


def _duplicates(
    config: CurateConfig,
    index: Index,
    images: pa.Table,
    x_ND: ndarray,
    curated_N: ndarray,
    readable_N: ndarray,
    backbone: Backbone,
    device: Any,
    work: Path,
) -> Path:
    """The stages "exact" and "duplicate": for every image whether it survives, and if not, for whose sake."""
    names = (
        "within_curated",
        "duplicate_space",
        "threshold",
        "false_merges",
        "calibration_images",
        "recheck_above",
        "seed",
    )
    out, settings = work / "duplicates", {name: getattr(config, name) for name in names}
    name = fingerprint(settings, run.read_json(work / "embeddings" / run.MANIFEST)["fingerprint"], int(curated_N.sum()))
    if run.is_done(out, "duplicates", name, settings):
        return out
    began = time.monotonic()
    width_N, height_N, bytes_N = (images[c].fill_null(0).to_numpy() for c in ("width", "height", "length"))
    rank_N = dedup.keep_order(curated_N, width_N * height_N, bytes_N)
    protected_N = curated_N if config.within_curated == "keep" else np.zeros_like(curated_N)

    cause_N, score_N = np.full(len(x_ND), -1, np.int64), np.full(len(x_ND), np.nan, np.float32)
    rows = np.flatnonzero(readable_N)
    digests = images["sha256"].take(pa.array(rows)).to_pylist()
    cause = dedup.identical(digests, rank_N[rows], protected_N[rows])
    cause_N[rows[cause >= 0]], score_N[rows[cause >= 0]] = rows[cause[cause >= 0]], 1.0
    exact_N = cause_N >= 0
    run.say(f"exact: {exact_N.sum():,} of {len(rows):,} images are byte-identical to another")

    rows = rows[cause < 0]
    fitted = space.fit(config.duplicate_space, x_ND[rows])
    x_MD = fitted(x_ND[rows])
    threshold, calibration = config.threshold, None
    if threshold is None:
        calibration = _calibrate(config, index, rows, x_MD, backbone, fitted)
        threshold = calibration.threshold
    progress = Progress("duplicate", "tiles", tiles(len(rows)))
    found = dedup.near_duplicates(
        x_MD,
        threshold,
        rank_N[rows],
        curated_N[rows],
        protected_N[rows],
        config.recheck_above,
        device=device,
        tile_done=progress.add,
    )
    gone = found.cause_N >= 0
    cause_N[rows[gone]], score_N[rows[gone]] = rows[found.cause_N[gone]], found.score_N[gone]
    run.say(f"duplicate: {gone.sum():,} of {len(rows):,} images resemble another, cosine above {threshold:.3f}")
    near_N = (cause_N >= 0) & ~exact_N
    with run.publish(out, "duplicates", name, settings) as partial:
        verdict = {"survives": readable_N & (cause_N < 0), "exact": exact_N, "near": near_N}
        pq.write_table(pa.table(verdict | {"cause": cause_N, "score": score_N}), partial / "verdict.parquet")
        pq.write_table(compose.groups(x_MD, rows, found), partial / "groups.parquet", compression="zstd")
        described = {"threshold": threshold, "calibration": None if calibration is None else calibration.as_dict()}
        run.write_json(partial / "threshold.json", described)
        run.write_json(partial / "timings.json", {"duplicate": round(time.monotonic() - began, 3)})
    return out


def _calibrate(
    config: CurateConfig, index: Index, rows: ndarray, x_MD: ndarray, backbone: Backbone, fitted: space.Space
) -> Calibration:
    """Calibrate on images drawn from `rows` of the index, whose vectors are `x_MD`."""
    random = np.random.default_rng(config.seed)
    drawn = random.permutation(len(rows))[:OTHERS]
    images = [_picture(index, int(row)) for row in rows[drawn[: config.calibration_images]]]
    run.say(f"calibrate: attacking {len(images):,} images")
    see = grey if backbone.channels == 1 else np.asarray
    result = calibrate(
        lambda copies: fitted(describe(backbone, [see(copy) for copy in copies], config.tokens, config.batch)),
        images,
        random,
        others_MD=x_MD[drawn],
        pool=len(rows),
        false_merges=config.false_merges,
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


def _retrieve(
    config: CurateConfig,
    x_ND: ndarray,
    curated_N: ndarray,
    survives_N: ndarray,
    duplicates: Path,
    device: Any,
    work: Path,
) -> Path:
    """The stage "retrieve": hits among the uncurated images that survive."""
    out, settings = work / "hits", {name: getattr(config, name) for name in ("retrieve_space", "k", "minimum")}
    name = fingerprint(settings, run.read_json(duplicates / run.MANIFEST)["fingerprint"])
    if run.is_done(out, "hits", name, settings):
        return out
    began, rows = time.monotonic(), np.flatnonzero(survives_N)
    x_MD = space.fit(config.retrieve_space, x_ND[rows])(x_ND[rows])
    queries, candidates = np.flatnonzero(curated_N[rows]), np.flatnonzero(~curated_N[rows])
    hits = retrieve(x_MD, queries, candidates, config.k, config.minimum, device=device)
    with run.publish(out, "hits", name, settings) as partial:
        table = {"query": rows[hits.query_H], "rank": hits.rank_H, "row": rows[hits.row_H], "score": hits.score_H}
        pq.write_table(pa.table(table), partial / "hits.parquet", compression="zstd")
        run.write_json(partial / "timings.json", {"retrieve": round(time.monotonic() - began, 3)})
    return out


def _link(source: str, target: str) -> None:
    """The same file under another name, where the file system can; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
