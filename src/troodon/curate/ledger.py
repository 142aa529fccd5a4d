"""The ledger: the decision for every input image, and its reason. No image disappears silently.

    the columns of the index, and
    pool     "curated", "uncurated" or "benchmark"
    kept     whether the image is in the selection
    weight   1, or how often it was retrieved; 0 if not kept
    stage    the stage that decided: "curated" (kept as it is), "decode", "exact", "hash", "colour", "duplicate",
             "benchmark" or "retrieve"; "decided" if a person did (images/decisions.py)
    reason   in words
    cause    row of this table: the image kept in its place at that stage, the benchmark image that it resembles, or
             the curated image that retrieved it; -1 for none
    score    cosine with the cause, in the space of that stage, or share of equal bits of hashes; nan without a cause
    tags     those that a person gave the image, if any image has one
    marks    the marks of the image; no image is dropped because of a mark
    score_<name>    the scores that marks compare
    modified        when its file was last changed, as in an index (images/scan.py)

A cause may itself be dropped later: the first of two identical files as a near-duplicate, or because no curated image
retrieved it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from troodon.curate.context import CurationContext
from troodon.curate.dedup import Verdict
from troodon.curate.retrieve import Hits, best_hits
from troodon.curate.scores import has_mark, image_marks
from troodon.images.decisions import STAGE, Decision, decided_rows, resolve
from troodon.images.index import MODIFIED, SCHEMA
from troodon.search.exact import cosines

STAGES = ("curated", "decode", "exact", "hash", "colour", "duplicate", "benchmark", "retrieve", STAGE)
# By column of a verdict.
DROPS = {"exact": "exact", "hash": "hash", "colour": "colour", "near": "duplicate", "leak": "benchmark"}
BY_CLOSER_LOOK = {  # of images that have a cause, where a closer look decided
    "duplicate": "copy, pixels agree {:.2f}",
    "benchmark": "copy of a benchmark image, pixels agree {:.2f}",
}
PERHAPS = "perhaps a copy of a benchmark image"  # in a reason, before the doubt
REASONS = {  # of images that have a cause
    "hash": "perceptual hash equal, share of bits {:.2f}",
    "colour": "of one colour, like an image that stays; equal to {:.2f}",
    "duplicate": "near-duplicate, cosine {:.2f}",
    "benchmark": "resembles a benchmark image, cosine {:.2f}",
}
BLOCK = 65_536  # rows of the ledger that are written at once


@dataclass(frozen=True)
class Decisions:
    """The decisions of all stages for N images."""

    stage_N: ndarray  # int8, index in STAGES
    cause_N: ndarray  # int64
    score_N: ndarray  # float32
    kept_N: ndarray  # bool
    weight_N: ndarray  # float32
    rank_N: ndarray  # int32, rank of the best hit; 0 for none
    drawn_N: ndarray  # bool, drawn from clusters or evenly
    benchmark_N: ndarray  # bool, readable benchmark images
    why_N: ndarray  # object, what makes the cause of a copy better than this image, if known; the reason of a person
    tags: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # by row

    def is_at(self, stage: str) -> ndarray:
        return self.stage_N == STAGES.index(stage)


def combine_decisions(
    context: CurationContext, verdict: pa.Table, gathered: Path, made: Mapping[str, Decision] | None = None
) -> Decisions:
    """Combine the decisions of all stages, assert that they are consistent, and follow those that a person made."""
    count, curated_N = len(context.index), context.curated_N
    survives_N = verdict["survives"].to_numpy()
    cause_N, score_N = verdict["cause"].to_numpy().copy(), verdict["score"].to_numpy().copy()
    stage_N = np.full(count, STAGES.index("decode"), np.int8)
    for column, stage in DROPS.items():
        if column in verdict.column_names:
            stage_N[verdict[column].to_numpy()] = STAGES.index(stage)
    benchmark_N = context.readable_N & context.benchmark_N
    stage_N[survives_N & curated_N] = STAGES.index("curated")
    stage_N[survives_N & ~curated_N] = STAGES.index("retrieve")
    stage_N[benchmark_N] = STAGES.index("benchmark")

    table = pq.read_table(gathered / "hits.parquet")
    hits = Hits(*(table[name].to_numpy() for name in ("query", "rank", "row", "score")))
    times_N, best_N = best_hits(hits, count)
    hit_N, best = times_N > 0, best_N[times_N > 0]
    rank_N, drawn_N = np.zeros(count, np.int32), np.zeros(count, bool)
    rank_N[hit_N], cause_N[hit_N], score_N[hit_N] = hits.rank_H[best], hits.query_H[best], hits.score_H[best]
    drawn_N[np.load(gathered / "drawn.npy")] = True
    kept_N = (stage_N == STAGES.index("curated")) | hit_N | drawn_N
    weight_N = np.where(hit_N & (context.config.collisions == "multiplicity"), times_N, kept_N).astype(np.float32)
    why_N = np.array(verdict["why"].to_pylist(), object)
    decisions = Decisions(stage_N, cause_N, score_N, kept_N, weight_N, rank_N, drawn_N, benchmark_N, why_N)
    _check_consistency(decisions, context)
    return follow(decisions, context, made) if made else decisions


def follow(decisions: Decisions, context: CurationContext, made: Mapping[str, Decision]) -> Decisions:
    """The decisions of the stages, with those that a person made in their place."""
    decided = resolve(made, context.images, ~context.readable_N | context.benchmark_N, "curate")
    tags = {row: one.tags for row, one in decided_rows(made, context.images).items() if one.tags}
    columns = {
        "stage_N": STAGES.index(STAGE), "cause_N": decided.cause_M, "score_N": np.nan, "kept_N": decided.keep_M,
        "weight_N": decided.keep_M, "rank_N": 0, "drawn_N": False, "why_N": decided.reason_M,
    }  # fmt: skip
    changed = {name: getattr(decisions, name).copy() for name in columns}
    for name, value in columns.items():
        changed[name][decided.row_M] = value
    return replace(decisions, **changed, tags=tags)


def write_ledger(context: CurationContext, decisions: Decisions, path: Path) -> None:
    """Write the ledger, some rows at a time."""
    parts = (
        _ledger_rows(context, decisions, slice(start, start + BLOCK))
        for start in range(0, max(1, len(context.index)), BLOCK)
    )
    first = next(parts)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        for part in (first, *parts):
            writer.write_table(part)


def _ledger_rows(context: CurationContext, decisions: Decisions, rows: slice) -> pa.Table:
    """Build these rows of the ledger."""
    config, images = context.config, context.images.slice(rows.start, rows.stop - rows.start)
    stage, score, kept, rank = (getattr(decisions, f"{n}_N")[rows] for n in ("stage", "score", "kept", "rank"))
    drawn = decisions.drawn_N[rows]
    stage_name = np.array(STAGES, object)[stage]
    reason = np.array([f"{s}: {w}" for s, w in zip(images["status"].to_pylist(), images["reason"].to_pylist())], object)
    reason[stage_name == "exact"] = "byte-identical"
    templates = REASONS | (BY_CLOSER_LOOK if config.verify == "geometric" else {})
    for name, template in templates.items():
        reason[stage_name == name] = [template.format(number) for number in score[stage_name == name]]
    why = decisions.why_N[rows]
    for row in np.flatnonzero((stage_name == "duplicate") & (why != "")):
        reason[row] += f"; of that one, {why[row]}"
    for row in np.flatnonzero((stage_name == "benchmark") & (why != "")):
        reason[row] = f"{PERHAPS}: {why[row]}, agreement {score[row]:.2f}"
    reason[(stage_name == "benchmark") & np.isnan(score)] = "joined to an image that resembles a benchmark's"
    reason[decisions.benchmark_N[rows]] = "of a benchmark: not to train on"
    reason[stage_name == "curated"] = "kept as is"
    reason[stage_name == "retrieve"] = _not_gathered_reason(context)
    reason[stage_name == STAGE] = why[stage_name == STAGE]
    reason[drawn] = {"all": "kept: no copy of another", "balance": "drawn evenly"}.get(
        config.gather, "drawn from a cluster of curated images"
    )
    reason[rank > 0] = [f"nearest {number} of curated image" for number in rank[rank > 0]]
    pool = np.where(context.curated_N[rows], "curated", np.where(context.benchmark_N[rows], "benchmark", "uncurated"))
    copied = [name for name in images.column_names if name.startswith("score_") or name == MODIFIED.name]
    columns = {
        "pool": pa.array(pool.astype(object), pa.string()),
        "kept": pa.array(kept),
        "weight": pa.array(decisions.weight_N[rows]),
        "stage": pa.array(stage_name, pa.string()),
        "reason": pa.array(reason, pa.string()),
        "cause": pa.array(decisions.cause_N[rows]),
        "score": pa.array(score, pa.float32()),
    }
    if decisions.tags:
        tags = [decisions.tags.get(row) for row in range(rows.start, rows.start + len(images))]
        columns["tags"] = pa.array(tags, pa.list_(pa.string()))
    if config.marks:
        columns["marks"] = pa.array(image_marks(config.marks, _scores_by_name(images)), pa.string())
    table = images.select(SCHEMA.names)
    for name, column in (columns | {name: images[name] for name in copied}).items():
        table = table.append_column(name, column)
    return table


def _scores_by_name(images: pa.Table) -> dict[str, ndarray]:
    """Return the scores by name; nan for an image without a score."""
    names = [name for name in images.column_names if name.startswith("score_")]
    return {name[len("score_") :]: images[name].to_numpy() for name in names}


def _not_gathered_reason(context: CurationContext) -> str:
    config = context.config
    floor = f" with a cosine of {config.min_similarity:g} or more" if config.min_similarity > -1 else ""
    near = f"not among the {config.k} nearest of any curated image{floor}"
    cluster = f"in no cluster of more than {config.more_than} curated images, or not drawn from it"
    return {"sample": near, "cluster": cluster, "auto": f"{near}; {cluster}"}.get(config.gather, "not drawn")


def _check_consistency(decisions: Decisions, context: CurationContext) -> None:
    """Assert that every image is kept or dropped by exactly one stage, and that causes are set and valid."""
    is_at, kept_N, cause_N, curated_N = decisions.is_at, decisions.kept_N, decisions.cause_N, context.curated_N
    leaked_N, hit_N = is_at("benchmark") & ~decisions.benchmark_N, decisions.rank_N > 0
    assert is_at("retrieve")[hit_N | decisions.drawn_N].all()
    assert kept_N[is_at("curated")].all()
    assert not kept_N[~is_at("curated") & ~is_at("retrieve")].any()
    assert not kept_N[context.benchmark_N].any()
    assert not (is_at("retrieve") & curated_N).any()
    is_copy_N = is_at("exact") | is_at("hash") | is_at("colour") | is_at("duplicate")
    has_cause_N = is_copy_N | leaked_N | hit_N
    assert ((cause_N >= 0) == has_cause_N).all()
    cause, row = cause_N[has_cause_N], np.flatnonzero(has_cause_N)
    assert (cause != row).all()
    assert not is_at("decode")[cause].any()
    assert context.benchmark_N[cause_N[leaked_N]].all()
    assert (curated_N[cause] | ~curated_N[row] | leaked_N[row]).all(), (
        "an uncurated image is the cause of a curated one"
    )
    assert is_at("curated")[cause_N[hit_N]].all()
    near = cause_N[is_at("duplicate")]
    assert not is_copy_N[near].any(), "the cause of a near-duplicate is dropped"


def duplicate_groups(x_MD: ndarray, rows: ndarray, verdict: Verdict) -> pa.Table:
    """Return the groups of near-duplicates: the representative first, the others by their score with it."""
    member = np.flatnonzero(verdict.group_N >= 0)
    representative = verdict.group_N[member]
    score = np.where(member == representative, np.float32(1), verdict.score_N[member])
    unknown = np.isnan(score)  # kept beside its representative
    score[unknown] = cosines(x_MD, member[unknown], representative[unknown])
    order = np.lexsort((member, -score, member != representative, representative))
    member, representative, score = member[order], representative[order], score[order]
    kept = verdict.cause_N[member] < 0
    return pa.table({"group": rows[representative], "row": rows[member], "kept": kept, "score": score})


def summarise(context: CurationContext, decisions: Decisions) -> dict:
    """Count images by stage. Each stage balances: every image that goes in comes out or is dropped."""
    config, kept_N = context.config, decisions.kept_N
    steps = {
        "decode": "images that cannot be read",
        "exact": "files that are byte-identical to one that stays",
        "hash": "images with the perceptual hash of one that stays",
        "colour": "images of one colour, like one that stays",
        "duplicate": "near-duplicates of an image that stays",
        "benchmark": "images of benchmarks, and those that resemble one",
        "retrieve": _gather_description(context),
        STAGE: "images that a person left out",
    }
    stages, remaining = [], len(kept_N)
    for name, what in steps.items():
        dropped = int((decisions.is_at(name) & ~kept_N).sum())
        ran = context.benchmark_N.any() if name == "benchmark" else name in ("decode", "retrieve", *config.steps)
        if ran or dropped:
            stages.append({"name": name, "in": remaining, "out": remaining - dropped, "dropped": dropped, "what": what})
        remaining -= dropped
    assert remaining == kept_N.sum(), "the ledger does not balance"
    pools = {"curated": context.curated_N, "uncurated": ~context.curated_N & ~context.benchmark_N}
    if context.benchmark_N.any():
        pools["benchmark"] = context.benchmark_N
    counts: dict = {"stages": stages, "images": len(kept_N), "kept": int(kept_N.sum())}
    counts["weight"] = float(decisions.weight_N.sum(dtype=np.float64))
    counts |= {name: {"in": int(pool_N.sum()), "kept": int((pool_N & kept_N).sum())} for name, pool_N in pools.items()}
    if context.benchmark_N.any():
        counts["perhaps_leaks"] = int((decisions.is_at("benchmark") & (decisions.why_N != "")).sum())
    if (decided_N := decisions.is_at(STAGE)).any():
        counts[STAGE] = {"kept": int((decided_N & kept_N).sum()), "left_out": int((decided_N & ~kept_N).sum())}
    if config.marks:
        scores = _scores_by_name(context.images)
        counts["marked"] = {mark: int(has_mark(mark, scores).sum()) for mark in config.marks}
    return counts


def _gather_description(context: CurationContext) -> str:
    return {
        "sample": f"uncurated images not among the {context.config.k} nearest of any curated one",
        "all": "nothing: all that is left is kept",
        "balance": "uncurated images not drawn",
    }.get(context.config.gather, "uncurated images that no curated set has gathered")
