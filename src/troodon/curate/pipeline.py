"""Curation from pools of images to one selection: embed, drop copies and leaks, gather, write the ledger.

During the work the stages are in `<out>.work`, beside the selection; each unit is complete or absent, and a killed run
continues with what is there. The selection itself appears at the end, complete, and includes the embeddings.

    images.parquet    the ledger: one row per input image (see ledger.py)
    selection.csv     the same in short, as text; kept.txt, left_out.txt: the files (images/carry_out.py)
    groups.parquet    near-duplicates: group, row, kept, score with the representative, whose row names the group
    doubtful.parquet  pairs that are perhaps copies, and are kept: row, other, score, why
    hits.parquet      retrieved images: query (a curated row), rank from 1, row, score
    clusters.parquet  if clusters were chosen: dataset, cluster, hits, size, taken
    summary.json      counts by stage, thresholds and their calibration
    timings.json      seconds by stage
    embeddings/       of all images, curated ones first, as in the ledger
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from troodon import run
from troodon.config import UsageError, fingerprint, nearest
from troodon.curate import ledger
from troodon.curate.backends import SingleProcess
from troodon.curate.closer_look import look_first
from troodon.curate.config import CurateConfig
from troodon.curate.context import CurationContext, require_readable_curated
from troodon.curate.copies import DOUBTFUL, prepare_comparison, remove_duplicates
from troodon.curate.embed import embed, load_embeddings
from troodon.curate.encoder import CopyEncoder
from troodon.curate.gather import gather
from troodon.curate.identical import remove_identical
from troodon.curate.leak import remove_leaks
from troodon.curate.scores import load_score, load_scores
from troodon.curate.stage import Backend, stage_seconds
from troodon.images.carry_out import write_lists
from troodon.images.changes import refuse_changed, times_fingerprint
from troodon.images.decisions import Decision
from troodon.images.index import MODIFIED, SCHEMA, Index
from troodon.lock import one_at_a_time
from troodon.model.backbone import Backbone
from troodon.text import set_aside

SPEED_SETTINGS = ("batch", "threads", "part")  # as recorded; they change the speed, not the result
PAPER_THRESHOLDS = (0.6, 0.45)  # they hold for the copy descriptor of the paper, and for no other network
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # as recorded of embeddings, and as `optimized` takes them
NO_IMAGES = Index(SCHEMA.empty_table())


@one_at_a_time
def curate(
    config: CurateConfig,
    curated: Index,
    uncurated: Index,
    backbone: Backbone,
    out: Path,
    *,
    benchmark: Index = NO_IMAGES,
    copies: Any = None,
    backend: Backend | None = None,
    decisions: Mapping[str, Decision] | None = None,
) -> Path:
    """Select images of `uncurated` that resemble `curated`, without copies and leaks of `benchmark`; publish as `out`.

    `copies` is the network that finds copies, if not `backbone`; `decisions` are a person's, by path. If the selection
    exists, nothing is done. Raises UsageError if no curated image is readable and gathering needs one, if `out` has
    other settings or images, and if a backbone that takes neither RGB nor grey images has no threshold.
    """
    _check_settings(config, curated, uncurated, benchmark, backbone if copies is None else copies)
    settings = _recorded(config, backbone, copies, decisions or {})
    name = fingerprint(settings, *(index.content_hash() for index in (curated, uncurated, benchmark)))
    root = out.with_name(f"{out.name}.work")
    index = Index.concat([curated, uncurated, *([benchmark] if len(benchmark) else [])])
    if run.is_done(out, "selection", name, settings):
        refuse_changed(out, index)
        shutil.rmtree(root, ignore_errors=True)  # left if an earlier run was killed just before its end
        _say_alarms(run.read_json(out / "summary.json"))
        return out

    _remove_if_changed(root / "embeddings", index)
    backbone = _as_begun(root / "embeddings", backbone)
    encoder = CopyEncoder.create(*((backbone, config.tokens) if copies is None else (copies, "cls")), config.pixels)
    embeddings = embed(
        backbone, index, root / "embeddings", batch=config.batch, threads=config.threads, tokens=config.tokens,
        copies=copies, pixels=encoder.pixels, marks=config.marks, partition_size=config.partition_size, backend=backend,
    )  # fmt: skip
    device = None if str(getattr(backbone, "device", "cpu")) == "cpu" else str(backbone.device)
    context = CurationContext(
        config, index, load_embeddings(embeddings)[1], len(curated), len(uncurated), _datasets(curated), root,
        _identify(embeddings), backend or SingleProcess(), device,
    )  # fmt: skip
    require_readable_curated(context)

    duplicates, verdicts = _drop_copies(context, embeddings, encoder)
    gathered = gather(context, embeddings, verdicts)

    start = time.monotonic()
    combined = ledger.combine_decisions(context, pq.read_table(verdicts / "verdict.parquet"), gathered, decisions)
    summary = ledger.summarise(context, combined) | run.read_json(duplicates / "threshold.json")
    summary |= {"backbone": backbone.name, "finds_copies": encoder.backbone.name}
    with run.publish(out, "selection", name, settings) as partial:
        ledger.write_ledger(context, combined, partial / "images.parquet")
        write_lists(partial)
        _copy_results(partial, embeddings, duplicates, gathered)
        run.write_json(partial / "summary.json", summary)
        seconds = run.read_json(embeddings / "timings.json") | stage_seconds(sorted(root.glob("*-*/[0-9]*")))
        run.write_json(partial / "timings.json", seconds | {"compose": round(time.monotonic() - start, 3)})
    shutil.rmtree(root)
    _say_result(out, summary, context)
    return out


def _drop_copies(context: CurationContext, embeddings: Path, encoder: CopyEncoder) -> tuple[Path, Path]:
    """Run the steps that drop copies and leaks. Returns the folders of the steps "duplicate" and of the last one."""
    identical = remove_identical(context)
    look = look_first(context, identical) if context.config.verify == "geometric" else None
    distinct = np.arange(len(np.load(identical / "rows.npy"))) if look is None else look.distinct()
    comparison = prepare_comparison(context, identical, embeddings, encoder, distinct)
    duplicates = remove_duplicates(context, comparison, look)
    return duplicates, remove_leaks(context, comparison, duplicates, encoder, look)


def _recorded(config: CurateConfig, backbone: Backbone, copies: Any, decisions: Mapping[str, Decision]) -> dict:
    """The settings that determine a selection, besides its images."""
    settings = {name: value for name, value in config.recorded().items() if name not in SPEED_SETTINGS}
    settings |= {"backbone": backbone.name, "weights": backbone.fingerprint}
    settings |= {"decisions": fingerprint(*sorted(map(str, decisions.values())))} if decisions else {}
    return settings | ({} if copies is None else {"copies": copies.fingerprint})


def _remove_if_changed(embeddings: Path, index: Index) -> None:
    """Remove the embeddings of an unfinished selection whose files have changed: it is made anew."""
    if index.first_changed(embeddings / "images.parquet") is not None:
        shutil.rmtree(embeddings)


def _as_begun(embeddings: Path, backbone: Backbone) -> Backbone:
    """The backbone in the precision of the finished embeddings of an unfinished selection: about `optimized("auto")` a
    timing decides, which may decide otherwise the next time."""
    if (manifest := run.read_manifest(embeddings)) is None or manifest["settings"]["weights"] != backbone.fingerprint:
        return backbone
    begun = manifest["settings"].get("compute", "float32")
    if begun not in PRECISIONS or str(getattr(backbone, "compute", torch.float32)) == f"torch.{begun}":
        return backbone
    return backbone.optimized(PRECISIONS[begun])


def _identify(embeddings: Path) -> str:
    """A name of the embeddings that tells apart those of other images, also if only the files have changed."""
    name = run.read_json(embeddings / run.MANIFEST)["fingerprint"]
    images = pq.read_table(embeddings / "images.parquet")
    if MODIFIED.name not in images.column_names:  # of an earlier release
        return name
    return fingerprint(name, times_fingerprint(images[MODIFIED.name].to_numpy()))


def _say_result(out: Path, summary: dict, context: CurationContext) -> None:
    run.say(f"curate: kept {summary['kept']:,} of {len(context.index):,} images: {out}")
    if unreadable := Counter(context.images["status"].filter(pa.array(~context.readable_N)).to_pylist()):
        run.say(f"curate: {set_aside(unreadable, len(context.index))}")
    _say_alarms(summary)


def _say_alarms(summary: dict) -> None:
    for alarm in summary.get("alarms", []) + ([] if summary["kept"] else ["nothing is kept"]):
        run.say(f"alarm: {alarm}")


def _copy_results(folder: Path, embeddings: Path, duplicates: Path, gathered: Path) -> None:
    """Copy the results of the stages into the selection."""
    shutil.copy(duplicates / "groups.parquet", folder)
    shutil.copy(duplicates / DOUBTFUL, folder)
    shutil.copy(gathered / "hits.parquet", folder)
    if (gathered / "clusters.parquet").exists():
        shutil.copy(gathered / "clusters.parquet", folder)
    shutil.copytree(embeddings, folder / "embeddings", copy_function=_link)


def _check_settings(
    config: CurateConfig, curated: Index, uncurated: Index, benchmark: Index, copy_network: Any
) -> None:
    """Raise UsageError for settings that cannot work; warn of thresholds that hold for another network."""
    if not len(curated) and config.gather in ("sample", "cluster", "auto"):
        raise UsageError(
            "no curated images: retrieval needs at least one to start from; or set gather to balance or all"
        )
    thresholds = {"duplicate": config.threshold}
    if len(benchmark):
        thresholds["benchmark"] = config.benchmark_threshold
    load_scores(config.marks)
    if config.keep_by:
        load_score(config.keep_by)
    for folder in config.prefer:
        paths = [path for index in (curated, uncurated) for path in index.column("path")]
        if not Path(folder).exists() and not any(path.startswith(f"{folder}/") for path in paths):
            raise nearest("prefer", folder, sorted({str(Path(path).parent) for path in paths}))
    steps = tuple(step for step in config.steps if len(benchmark) or step != "benchmark")
    for warning in replace(config, steps=steps).unread():
        run.say(f"warning: {warning}")
    if config.verify == "geometric":
        return
    if config.prefer or config.keep_by:
        raise UsageError("prefer, keep_by: a closer look chooses by them; leave out --verify none")
    calibrates = any(step in config.steps and threshold is None for step, threshold in thresholds.items())
    if calibrates and copy_network.channels not in (1, 3):
        reason = (
            f"it is calibrated on copies of pictures, and {copy_network.name} takes {copy_network.channels} channels"
        )
        raise UsageError(f"threshold None: {reason}; set it, for example to 0.9")
    published = [threshold for threshold in thresholds.values() if threshold in PAPER_THRESHOLDS]
    if published and not (getattr(copy_network, "for_copies", False) and config.duplicate_space == "plain"):
        space = "as they are" if config.duplicate_space == "plain" else config.duplicate_space
        run.say(
            f"warning: threshold {published[0]} holds for a copy descriptor such as SSCD, not for embeddings of "
            f"{copy_network.name}, {space}; leave it out to have it calibrated, or see `troodon curate calibrate`"
        )


def _datasets(curated: Index) -> tuple[tuple[str, int], ...]:
    """Return the curated sets: the first part of their paths, and their number of images."""
    sizes = [size for size in curated.source_lengths if size] or [len(curated)] if len(curated) else []
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return tuple((curated.path(start).partition("/")[0], size) for start, size in zip(starts, sizes))


def _link(source: str, target: str) -> None:
    """Create a hard link if the file system supports it, otherwise a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
