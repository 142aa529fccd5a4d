"""The ledger: what became of every image that came in, and why. Nothing is lost silently.

    the index's columns, and
    pool     "curated" or "uncurated"
    kept     in the selection or not
    weight   1, or how often it was retrieved; 0 when not kept
    stage    who decided: "curated" (kept as it is), "decode", "exact", "duplicate" or "retrieve"
    reason   in words
    cause    row of this table: the image kept in its place at that stage, or the curated one that retrieved it; -1
    score    cosine with the cause, as that stage compares; nan without one

A cause may itself be dropped later: the first of two identical files as a near-duplicate, or because nothing
retrieved it.
"""

import numpy as np
import pyarrow as pa
from numpy import ndarray

from troodon.curate.config import CurateConfig
from troodon.curate.dedup import Verdict
from troodon.curate.retrieve import Hits, best_hits
from troodon.data.index import SCHEMA
from troodon.search.exact import cosines


def ledger(config: CurateConfig, images: pa.Table, curated_N: ndarray, verdict: pa.Table, hits: pa.Table) -> pa.Table:
    """Put together what the stages have decided about N images."""
    count = len(curated_N)
    exact_N, near_N, survives_N = (verdict[name].to_numpy() for name in ("exact", "near", "survives"))
    cause_N, score_N = verdict["cause"].to_numpy().copy(), verdict["score"].to_numpy().copy()
    stage_N = np.full(count, "decode", object)
    stage_N[exact_N], stage_N[near_N] = "exact", "duplicate"
    stage_N[survives_N & curated_N], stage_N[survives_N & ~curated_N] = "curated", "retrieve"
    status, why = images["status"].to_pylist(), images["reason"].to_pylist()
    reason_N = np.array([f"{s}: {w}" for s, w in zip(status, why)], object)
    reason_N[exact_N] = "byte-identical"
    reason_N[near_N] = [f"near-duplicate, cosine {score:.2f}" for score in score_N[near_N]]
    reason_N[stage_N == "curated"] = "kept as is"

    of_hits = Hits(*(hits[name].to_numpy() for name in ("query", "rank", "row", "score")))
    times_N, best_N = best_hits(of_hits, count)
    hit_N, best = times_N > 0, best_N[times_N > 0]
    assert (stage_N[hit_N] == "retrieve").all()
    floor = f" with a cosine of {config.minimum:g} or more" if config.minimum > -1 else ""
    reason_N[stage_N == "retrieve"] = f"not among the {config.k} nearest of any curated image{floor}"
    reason_N[hit_N] = [f"nearest {rank} of curated image" for rank in of_hits.rank_H[best]]
    cause_N[hit_N], score_N[hit_N] = of_hits.query_H[best], of_hits.score_H[best]

    kept_N = (stage_N == "curated") | hit_N
    weight_N = np.where(hit_N & (config.collisions == "multiplicity"), times_N, kept_N)
    columns = {
        "pool": pa.array(np.where(curated_N, "curated", "uncurated").astype(object), pa.string()),
        "kept": pa.array(kept_N),
        "weight": pa.array(weight_N.astype(np.float32)),
        "stage": pa.array(stage_N, pa.string()),
        "reason": pa.array(reason_N, pa.string()),
        "cause": pa.array(cause_N),
        "score": pa.array(score_N, pa.float32()),
    }
    table = images.select(SCHEMA.names)
    for name, column in columns.items():
        table = table.append_column(name, column)
    _balance(stage_N, kept_N, curated_N, cause_N)
    return table


def _balance(stage_N: ndarray, kept_N: ndarray, curated_N: ndarray, cause_N: ndarray) -> None:
    """Every image is kept or dropped by one stage, and whatever dropped it for another's sake names that other."""
    of = {stage: stage_N == stage for stage in ("curated", "decode", "exact", "duplicate", "retrieve")}
    assert (np.sum(list(of.values()), axis=0) == 1).all()
    assert kept_N[of["curated"]].all()
    assert not kept_N[of["decode"] | of["exact"] | of["duplicate"]].any()
    assert not (of["retrieve"] & curated_N).any()
    named_N = of["exact"] | of["duplicate"] | (of["retrieve"] & kept_N)
    assert ((cause_N >= 0) == named_N).all()
    cause, caused = cause_N[named_N], np.flatnonzero(named_N)
    assert (cause != caused).all()
    assert not of["decode"][cause].any()
    assert (curated_N[cause] | ~curated_N[caused]).all(), "a curated image went for the sake of an uncurated one"
    retrieved_N = of["retrieve"] & kept_N
    assert of["curated"][cause_N[retrieved_N]].all()
    near_N = of["duplicate"]
    assert (of["curated"] | of["retrieve"])[cause_N[near_N]].all(), "a near-duplicate went for the sake of one gone"


def groups(x_MD: ndarray, rows: ndarray, found: Verdict) -> pa.Table:
    """Groups of near-duplicates, the representative first and the others by their score with it."""
    member = np.flatnonzero(found.group_N >= 0)
    head = found.group_N[member]
    score = np.where(member == head, np.float32(1), cosines(x_MD, member, head))
    order = np.lexsort((member, -score, member != head, head))
    member, head, score = member[order], head[order], score[order]
    kept = found.cause_N[member] < 0
    return pa.table({"group": rows[head], "row": rows[member], "kept": kept, "score": score})


def summary(config: CurateConfig, table: pa.Table) -> dict:
    """Counts by stage, each of which must balance: what goes in comes out or is dropped, and is in the ledger."""
    stage_N, kept_N = np.array(table["stage"].to_pylist()), table["kept"].to_numpy()
    curated_N = np.array(table["pool"].to_pylist()) == "curated"
    stages, left = [], len(table)
    for name, what in (
        ("decode", "images that cannot be read"),
        ("exact", "files that are byte-identical to one that stays"),
        ("duplicate", "near-duplicates of an image that stays"),
        ("retrieve", f"uncurated images not among the {config.k} nearest of any curated one"),
    ):
        dropped = int(((stage_N == name) & ~kept_N).sum())
        stages.append({"name": name, "in": left, "out": left - dropped, "dropped": dropped, "what": what})
        left -= dropped
    assert left == kept_N.sum(), "the ledger does not balance"
    weight = float(table["weight"].to_numpy().sum())
    return {
        "stages": stages,
        "images": len(table),
        "kept": int(kept_N.sum()),
        "weight": weight,
        "curated": {"in": int(curated_N.sum()), "kept": int((curated_N & kept_N).sum())},
        "uncurated": {"in": int((~curated_N).sum()), "kept": int((~curated_N & kept_N).sum())},
    }
