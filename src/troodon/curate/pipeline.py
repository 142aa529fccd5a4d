"""Pools of images to one selection: embed, drop copies and leaks, gather, compose.

While it works the stages lie beside the selection, in `<out>.work`, each unit complete or absent; a killed run goes on
with what is there. The selection itself appears at the end, whole, and takes the embeddings with it.

    images.parquet    the ledger: one row for every image that came in (see compose.py)
    groups.parquet    near-duplicates: group, row, kept, score with the representative, whose row names the group
    hits.parquet      what was retrieved: query (a curated row), rank from 1, row, score
    clusters.parquet  where clusters were chosen: dataset, cluster, hits, size, taken
    summary.json      counts by stage, thresholds and their calibration
    timings.json      seconds by stage
    embeddings/       of all images, curated ones first, as in the ledger
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from troodon import run
from troodon.config import UsageError, fingerprint, to_dict
from troodon.curate import compose
from troodon.curate.config import CurateConfig
from troodon.curate.copies import compare, duplicates
from troodon.curate.embed import embed, load
from troodon.curate.engines import Here
from troodon.curate.finder import Finder
from troodon.curate.gather import gather
from troodon.curate.leak import leaks
from troodon.curate.pool import Pool, need
from troodon.curate.stage import Engine, seconds
from troodon.images.index import SCHEMA, Index
from troodon.model.backbone import Backbone

NOT_OF_THE_RESULT = ("batch", "threads", "part")  # settings that change how fast, not what
PUBLISHED = (0.6, 0.45)  # thresholds of the paper, which hold for its copy descriptor and for no other network
NOTHING = Index(SCHEMA.empty_table())


def curate(
    config: CurateConfig,
    curated: Index,
    uncurated: Index,
    backbone: Backbone,
    out: Path,
    *,
    benchmark: Index = NOTHING,
    copies: Any = None,
    engine: Engine | None = None,
) -> Path:
    """Select from `uncurated` what resembles `curated`, without copies and `benchmark`'s, and publish it as `out`.

    `copies` compares images to find copies where it shall be another network than `backbone`. Does nothing where the
    selection is there already. UsageError when there is no readable curated image to gather by, when `out` was made
    with other settings or from other images, and without a threshold for a backbone that takes neither RGB nor grey.
    """
    compares = backbone if copies is None else copies
    _check(config, curated, benchmark, compares)
    finder = Finder.of(compares, config.tokens if copies is None else "cls", config.pixels)
    settings = {k: v for k, v in to_dict(config).items() if k not in NOT_OF_THE_RESULT}
    settings |= {"backbone": backbone.name, "weights": backbone.fingerprint}
    if copies is not None:
        settings["copies"] = copies.fingerprint
    name = fingerprint(settings, *(index.contents() for index in (curated, uncurated, benchmark)))
    work = out.with_name(f"{out.name}.work")
    if run.is_done(out, "selection", name, settings):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed just before its end
        return out

    engine = engine or Here()
    index = Index.concat([curated, uncurated, *([benchmark] if len(benchmark) else [])])
    embeddings = embed(
        backbone, index, work / "embeddings", batch=config.batch, threads=config.threads, tokens=config.tokens,
        copies=copies, pixels=finder.pixels, marks=config.marks, part=config.part, engine=engine,
    )  # fmt: skip
    x_ND, images = load(embeddings)
    device = None if str(getattr(backbone, "device", "cpu")) == "cpu" else str(backbone.device)
    made = run.read_json(embeddings / run.MANIFEST)["fingerprint"]
    pool = Pool(config, index, images, len(curated), len(uncurated), _datasets(curated), work, made, engine, device)
    del x_ND
    if config.gather in ("sample", "cluster", "auto"):
        need(len(curated), pool.readable_N, images, "curated")

    compared = compare(pool, embeddings, finder)
    settled = duplicates(pool, compared)
    unleaked = leaks(pool, compared, settled, finder)
    gathered = gather(pool, embeddings, unleaked)

    began = time.monotonic()
    verdict = pq.read_table(unleaked / "verdict.parquet")
    decided = compose.decide(pool, verdict, gathered)
    found = run.read_json(settled / "threshold.json")
    summary = compose.summary(pool, decided) | found | {"backbone": backbone.name, "finds_copies": compares.name}
    with run.publish(out, "selection", name, settings) as partial:
        compose.ledger(pool, decided, partial / "images.parquet")
        shutil.copy(settled / "groups.parquet", partial)
        shutil.copy(gathered / "hits.parquet", partial)
        if (gathered / "clusters.parquet").exists():
            shutil.copy(gathered / "clusters.parquet", partial)
        shutil.copytree(embeddings, partial / "embeddings", copy_function=_link)
        run.write_json(partial / "summary.json", summary)
        stages = sorted(work.glob("*-*/[0-9]*"))
        spent = run.read_json(embeddings / "timings.json") | seconds(stages)
        run.write_json(partial / "timings.json", spent | {"compose": round(time.monotonic() - began, 3)})
    shutil.rmtree(work)
    run.say(f"curate: kept {summary['kept']:,} of {len(index):,} images: {out}")
    return out


def _check(config: CurateConfig, curated: Index, benchmark: Index, compares: Any) -> None:
    """UsageError for what cannot work; a warning for thresholds that hold for another network."""
    if not len(curated) and config.gather in ("sample", "cluster", "auto"):
        raise UsageError(
            "no curated images: retrieval needs at least one to start from; or set gather to balance or all"
        )
    asked = {"duplicate": config.threshold}
    if len(benchmark):
        asked["benchmark"] = config.benchmark_threshold
    calibrates = any(step in config.steps and threshold is None for step, threshold in asked.items())
    if calibrates and compares.channels not in (1, 3):
        why = f"it is calibrated on copies of pictures, and {compares.name} takes {compares.channels} channels"
        raise UsageError(f"threshold None: {why}; set it, for example to 0.9")
    named = [t for t in asked.values() if t in PUBLISHED]
    if named and not (getattr(compares, "for_copies", False) and config.duplicate_space == "plain"):
        where = "as they are" if config.duplicate_space == "plain" else config.duplicate_space
        run.say(
            f"warning: threshold {named[0]} holds for a copy descriptor such as SSCD, not for embeddings of "
            f"{compares.name}, {where}; leave it out to have it calibrated, or see `troodon curate calibrate`"
        )


def _datasets(curated: Index) -> tuple[tuple[str, int], ...]:
    """The curated sets: what their paths begin with, and how many images each has."""
    sizes = [size for size in curated.parts if size] or [len(curated)] if len(curated) else []
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    return tuple((curated.path(start).partition("/")[0], size) for start, size in zip(starts, sizes))


def _link(source: str, target: str) -> None:
    """The same file under another name, where the file system can; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
