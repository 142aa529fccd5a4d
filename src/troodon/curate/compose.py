"""The ledger: what became of every image that came in, and why. Nothing is lost silently.

    the index's columns, and
    pool     "curated", "uncurated" or "benchmark"
    kept     in the selection or not
    weight   1, or how often it was retrieved; 0 when not kept
    stage    who decided: "curated" (kept as it is), "decode", "exact", "hash", "duplicate", "benchmark" or "retrieve"
    reason   in words
    cause    row of this table: the image kept in its place at that stage, the benchmark's image that it resembles, or
             the curated one that retrieved it; -1
    score    cosine with the cause, as that stage compares, or share of equal bits of hashes; nan without one
    marks    what it was marked for; nothing goes for that
    score_<name>    the scores that it was marked by

A cause may itself be dropped later: the first of two identical files as a near-duplicate, or because nothing
retrieved it.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from troodon.curate.dedup import Verdict
from troodon.curate.pool import Pool
from troodon.curate.retrieve import Hits, best_hits
from troodon.curate.scores import marked
from troodon.data.index import SCHEMA
from troodon.search.exact import cosines

STAGES = ("curated", "decode", "exact", "hash", "duplicate", "benchmark", "retrieve")
DROPS = {"exact": "exact", "hash": "hash", "near": "duplicate", "leak": "benchmark"}  # columns of a verdict


def ledger(pool: Pool, verdict: pa.Table, gathered: Path) -> pa.Table:
    """Put together what the stages have decided about N images."""
    config, count, curated_N = pool.config, len(pool.index), pool.curated_N
    survives_N = verdict["survives"].to_numpy()
    cause_N, score_N = verdict["cause"].to_numpy().copy(), verdict["score"].to_numpy().copy()
    stage_N = np.full(count, "decode", object)
    for column, stage in DROPS.items():
        if column in verdict.column_names:
            stage_N[verdict[column].to_numpy()] = stage
    shown_N = pool.readable_N & pool.benchmark_N
    stage_N[survives_N & curated_N], stage_N[survives_N & ~curated_N] = "curated", "retrieve"
    stage_N[shown_N] = "benchmark"
    status, why = pool.images["status"].to_pylist(), pool.images["reason"].to_pylist()
    reason_N = np.array([f"{s}: {w}" for s, w in zip(status, why)], object)
    reason_N[stage_N == "exact"] = "byte-identical"
    for stage, said in (
        ("hash", "perceptual hash equal, share of bits {:.2f}"),
        ("duplicate", "near-duplicate, cosine {:.2f}"),
        ("benchmark", "resembles a benchmark image, cosine {:.2f}"),
    ):
        reason_N[stage_N == stage] = [said.format(score) for score in score_N[stage_N == stage]]
    reason_N[(stage_N == "benchmark") & np.isnan(score_N)] = "joined to an image that resembles a benchmark's"
    reason_N[shown_N] = "of a benchmark: not to train on"
    reason_N[stage_N == "curated"] = "kept as is"

    found = pq.read_table(gathered / "hits.parquet")
    of_hits = Hits(*(found[name].to_numpy() for name in ("query", "rank", "row", "score")))
    times_N, best_N = best_hits(of_hits, count)
    hit_N, best = times_N > 0, best_N[times_N > 0]
    drawn_N = np.zeros(count, bool)
    drawn_N[np.load(gathered / "drawn.npy")] = True
    assert (stage_N[hit_N | drawn_N] == "retrieve").all()
    reason_N[stage_N == "retrieve"] = _not_gathered(pool)
    reason_N[drawn_N] = {"all": "kept: no copy of another", "balance": "drawn evenly"}.get(
        config.gather, "drawn from a cluster of curated images"
    )
    reason_N[hit_N] = [f"nearest {rank} of curated image" for rank in of_hits.rank_H[best]]
    cause_N[hit_N], score_N[hit_N] = of_hits.query_H[best], of_hits.score_H[best]

    kept_N = (stage_N == "curated") | hit_N | drawn_N
    weight_N = np.where(hit_N & (config.collisions == "multiplicity"), times_N, kept_N)
    scores = {n: pool.images[n] for n in pool.images.column_names if n.startswith("score_")}
    plain = {name[len("score_") :]: column.to_numpy() for name, column in scores.items()}
    pools = np.where(curated_N, "curated", np.where(pool.benchmark_N, "benchmark", "uncurated")).astype(object)
    columns = {
        "pool": pa.array(pools, pa.string()),
        "kept": pa.array(kept_N),
        "weight": pa.array(weight_N.astype(np.float32)),
        "stage": pa.array(stage_N, pa.string()),
        "reason": pa.array(reason_N, pa.string()),
        "cause": pa.array(cause_N),
        "score": pa.array(score_N, pa.float32()),
    }
    if config.marks:
        columns["marks"] = pa.array(marked(config.marks, plain), pa.string())
    table = pool.images.select(SCHEMA.names)
    for name, column in (columns | scores).items():
        table = table.append_column(name, column)
    _balance(stage_N, kept_N, pool, shown_N, cause_N, hit_N)
    return table


def _not_gathered(pool: Pool) -> str:
    config = pool.config
    floor = f" with a cosine of {config.minimum:g} or more" if config.minimum > -1 else ""
    near = f"not among the {config.k} nearest of any curated image{floor}"
    cluster = f"in no cluster of more than {config.more_than} curated images, or not drawn from it"
    return {"sample": near, "cluster": cluster, "auto": f"{near}; {cluster}"}.get(config.gather, "not drawn")


def _balance(stage_N: ndarray, kept_N: ndarray, pool: Pool, shown_N: ndarray, cause_N: ndarray, hit_N: ndarray) -> None:
    """Every image is kept or dropped by one stage, and whatever dropped it for another's sake names that other."""
    curated_N = pool.curated_N
    of = {stage: stage_N == stage for stage in STAGES}
    assert (np.sum(list(of.values()), axis=0) == 1).all()
    assert kept_N[of["curated"]].all()
    assert not kept_N[~of["curated"] & ~of["retrieve"]].any()
    assert not kept_N[pool.benchmark_N].any()
    assert not (of["retrieve"] & curated_N).any()
    named_N = of["exact"] | of["hash"] | of["duplicate"] | (of["benchmark"] & ~shown_N) | hit_N
    assert ((cause_N >= 0) == named_N).all()
    cause, caused = cause_N[named_N], np.flatnonzero(named_N)
    assert (cause != caused).all()
    assert not of["decode"][cause].any()
    assert pool.benchmark_N[cause_N[of["benchmark"] & ~shown_N]].all()
    assert (curated_N[cause] | ~curated_N[caused] | of["benchmark"][caused]).all(), "a curated image went for a pool's"
    assert of["curated"][cause_N[hit_N]].all()
    near = cause_N[of["duplicate"]]
    assert not (of["exact"] | of["hash"] | of["duplicate"])[near].any(), (
        "a near-duplicate went for the sake of one gone"
    )


def groups(x_MD: ndarray, rows: ndarray, found: Verdict) -> pa.Table:
    """Groups of near-duplicates, the representative first and the others by their score with it."""
    member = np.flatnonzero(found.group_N >= 0)
    head = found.group_N[member]
    score = np.where(member == head, np.float32(1), cosines(x_MD, member, head))
    order = np.lexsort((member, -score, member != head, head))
    member, head, score = member[order], head[order], score[order]
    kept = found.cause_N[member] < 0
    return pa.table({"group": rows[head], "row": rows[member], "kept": kept, "score": score})


def summary(pool: Pool, table: pa.Table) -> dict:
    """Counts by stage, each of which must balance: what goes in comes out or is dropped, and is in the ledger."""
    config, stage_N, kept_N = pool.config, np.array(table["stage"].to_pylist()), table["kept"].to_numpy()
    pool_N = np.array(table["pool"].to_pylist())
    steps = {
        "decode": "images that cannot be read",
        "exact": "files that are byte-identical to one that stays",
        "hash": "images with the perceptual hash of one that stays",
        "duplicate": "near-duplicates of an image that stays",
        "benchmark": "images of benchmarks, and those that resemble one",
        "retrieve": _summed(pool),
    }
    stages, left = [], len(table)
    for name, what in steps.items():
        dropped = int(((stage_N == name) & ~kept_N).sum())
        done = pool.benchmark_N.any() if name == "benchmark" else name in ("decode", "retrieve", *config.steps)
        if done or dropped:
            stages.append({"name": name, "in": left, "out": left - dropped, "dropped": dropped, "what": what})
        left -= dropped
    assert left == kept_N.sum(), "the ledger does not balance"
    of_pool = {
        name: {"in": int((pool_N == name).sum()), "kept": int(((pool_N == name) & kept_N).sum())}
        for name in ("curated", "uncurated", "benchmark")
        if name != "benchmark" or pool.benchmark_N.any()
    }
    weight = float(table["weight"].to_numpy().sum())
    told = {"stages": stages, "images": len(table), "kept": int(kept_N.sum()), "weight": weight, **of_pool}
    if config.marks:
        borne = [mark for each in table["marks"].to_pylist() for mark in each.split()]
        told["marked"] = {mark: borne.count(mark) for mark in config.marks}
    return told


def _summed(pool: Pool) -> str:
    return {
        "sample": f"uncurated images not among the {pool.config.k} nearest of any curated one",
        "all": "nothing: all that is left is kept",
        "balance": "uncurated images not drawn",
    }.get(pool.config.gather, "uncurated images that no curated set has gathered")
