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

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from troodon.curate.dedup import Verdict
from troodon.curate.pool import Pool
from troodon.curate.retrieve import Hits, best_hits
from troodon.curate.scores import bears, marked
from troodon.images.index import SCHEMA
from troodon.search.exact import cosines

STAGES = ("curated", "decode", "exact", "hash", "duplicate", "benchmark", "retrieve")
DROPS = {"exact": "exact", "hash": "hash", "near": "duplicate", "leak": "benchmark"}  # columns of a verdict
SAID = {  # of what went for another's sake
    "hash": "perceptual hash equal, share of bits {:.2f}",
    "duplicate": "near-duplicate, cosine {:.2f}",
    "benchmark": "resembles a benchmark image, cosine {:.2f}",
}
BLOCK = 65_536  # rows of the ledger that are put into words at once


@dataclass(frozen=True)
class Decided:
    """What the stages have decided about N images, in numbers."""

    stage_N: ndarray  # int8, a place in STAGES
    cause_N: ndarray  # int64
    score_N: ndarray  # float32
    kept_N: ndarray  # bool
    weight_N: ndarray  # float32
    rank_N: ndarray  # int32 of its best hit; 0 for none
    drawn_N: ndarray  # bool
    shown_N: ndarray  # bool, readable images of benchmarks

    def of(self, stage: str) -> ndarray:
        return self.stage_N == STAGES.index(stage)


def decide(pool: Pool, verdict: pa.Table, gathered: Path) -> Decided:
    """Put together what the stages have decided; it balances, or an assertion says where not."""
    count, curated_N = len(pool.index), pool.curated_N
    survives_N = verdict["survives"].to_numpy()
    cause_N, score_N = verdict["cause"].to_numpy().copy(), verdict["score"].to_numpy().copy()
    stage_N = np.full(count, STAGES.index("decode"), np.int8)
    for column, stage in DROPS.items():
        if column in verdict.column_names:
            stage_N[verdict[column].to_numpy()] = STAGES.index(stage)
    shown_N = pool.readable_N & pool.benchmark_N
    stage_N[survives_N & curated_N] = STAGES.index("curated")
    stage_N[survives_N & ~curated_N] = STAGES.index("retrieve")
    stage_N[shown_N] = STAGES.index("benchmark")

    found = pq.read_table(gathered / "hits.parquet")
    of_hits = Hits(*(found[name].to_numpy() for name in ("query", "rank", "row", "score")))
    times_N, best_N = best_hits(of_hits, count)
    hit_N, best = times_N > 0, best_N[times_N > 0]
    rank_N, drawn_N = np.zeros(count, np.int32), np.zeros(count, bool)
    rank_N[hit_N], cause_N[hit_N], score_N[hit_N] = of_hits.rank_H[best], of_hits.query_H[best], of_hits.score_H[best]
    drawn_N[np.load(gathered / "drawn.npy")] = True
    kept_N = (stage_N == STAGES.index("curated")) | hit_N | drawn_N
    weight_N = np.where(hit_N & (pool.config.collisions == "multiplicity"), times_N, kept_N).astype(np.float32)
    decided = Decided(stage_N, cause_N, score_N, kept_N, weight_N, rank_N, drawn_N, shown_N)
    _balance(decided, pool)
    return decided


def ledger(pool: Pool, decided: Decided, path: Path) -> None:
    """Write the ledger, some rows at a time."""
    parts = (_words(pool, decided, slice(start, start + BLOCK)) for start in range(0, max(1, len(pool.index)), BLOCK))
    first = next(parts)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        for part in (first, *parts):
            writer.write_table(part)


def _words(pool: Pool, decided: Decided, rows: slice) -> pa.Table:
    """These rows of the ledger."""
    config, images = pool.config, pool.images.slice(rows.start, rows.stop - rows.start)
    stage, score, kept, rank = (getattr(decided, f"{n}_N")[rows] for n in ("stage", "score", "kept", "rank"))
    drawn, shown = decided.drawn_N[rows], decided.shown_N[rows]
    named = np.array(STAGES, object)[stage]
    reason = np.array([f"{s}: {w}" for s, w in zip(images["status"].to_pylist(), images["reason"].to_pylist())], object)
    reason[named == "exact"] = "byte-identical"
    for name, said in SAID.items():
        reason[named == name] = [said.format(number) for number in score[named == name]]
    reason[(named == "benchmark") & np.isnan(score)] = "joined to an image that resembles a benchmark's"
    reason[shown] = "of a benchmark: not to train on"
    reason[named == "curated"] = "kept as is"
    reason[named == "retrieve"] = _not_gathered(pool)
    reason[drawn] = {"all": "kept: no copy of another", "balance": "drawn evenly"}.get(
        config.gather, "drawn from a cluster of curated images"
    )
    reason[rank > 0] = [f"nearest {number} of curated image" for number in rank[rank > 0]]
    of_pool = np.where(pool.curated_N[rows], "curated", np.where(pool.benchmark_N[rows], "benchmark", "uncurated"))
    scores = {name: images[name] for name in images.column_names if name.startswith("score_")}
    columns = {
        "pool": pa.array(of_pool.astype(object), pa.string()),
        "kept": pa.array(kept),
        "weight": pa.array(decided.weight_N[rows]),
        "stage": pa.array(named, pa.string()),
        "reason": pa.array(reason, pa.string()),
        "cause": pa.array(decided.cause_N[rows]),
        "score": pa.array(score, pa.float32()),
    }
    if config.marks:
        columns["marks"] = pa.array(marked(config.marks, _plain(images)), pa.string())
    table = images.select(SCHEMA.names)
    for name, column in (columns | scores).items():
        table = table.append_column(name, column)
    return table


def _plain(images: pa.Table) -> dict[str, ndarray]:
    """The scores by name; nan where there is none."""
    names = [name for name in images.column_names if name.startswith("score_")]
    return {name[len("score_") :]: images[name].to_numpy() for name in names}


def _not_gathered(pool: Pool) -> str:
    config = pool.config
    floor = f" with a cosine of {config.minimum:g} or more" if config.minimum > -1 else ""
    near = f"not among the {config.k} nearest of any curated image{floor}"
    cluster = f"in no cluster of more than {config.more_than} curated images, or not drawn from it"
    return {"sample": near, "cluster": cluster, "auto": f"{near}; {cluster}"}.get(config.gather, "not drawn")


def _balance(decided: Decided, pool: Pool) -> None:
    """Every image is kept or dropped by one stage, and whatever dropped it for another's sake names that other."""
    of, kept_N, cause_N, curated_N = decided.of, decided.kept_N, decided.cause_N, pool.curated_N
    leaked_N, hit_N = of("benchmark") & ~decided.shown_N, decided.rank_N > 0
    assert of("retrieve")[hit_N | decided.drawn_N].all()
    assert kept_N[of("curated")].all()
    assert not kept_N[~of("curated") & ~of("retrieve")].any()
    assert not kept_N[pool.benchmark_N].any()
    assert not (of("retrieve") & curated_N).any()
    named_N = of("exact") | of("hash") | of("duplicate") | leaked_N | hit_N
    assert ((cause_N >= 0) == named_N).all()
    cause, caused = cause_N[named_N], np.flatnonzero(named_N)
    assert (cause != caused).all()
    assert not of("decode")[cause].any()
    assert pool.benchmark_N[cause_N[leaked_N]].all()
    assert (curated_N[cause] | ~curated_N[caused] | leaked_N[caused]).all(), "a curated image went for a pool's"
    assert of("curated")[cause_N[hit_N]].all()
    near = cause_N[of("duplicate")]
    assert not (of("exact") | of("hash") | of("duplicate"))[near].any(), "a near-duplicate went for one that is gone"


def groups(x_MD: ndarray, rows: ndarray, found: Verdict) -> pa.Table:
    """Groups of near-duplicates, the representative first and the others by their score with it."""
    member = np.flatnonzero(found.group_N >= 0)
    head = found.group_N[member]
    score = np.where(member == head, np.float32(1), cosines(x_MD, member, head))
    order = np.lexsort((member, -score, member != head, head))
    member, head, score = member[order], head[order], score[order]
    kept = found.cause_N[member] < 0
    return pa.table({"group": rows[head], "row": rows[member], "kept": kept, "score": score})


def summary(pool: Pool, decided: Decided) -> dict:
    """Counts by stage, each of which must balance: what goes in comes out or is dropped, and is in the ledger."""
    config, kept_N = pool.config, decided.kept_N
    steps = {
        "decode": "images that cannot be read",
        "exact": "files that are byte-identical to one that stays",
        "hash": "images with the perceptual hash of one that stays",
        "duplicate": "near-duplicates of an image that stays",
        "benchmark": "images of benchmarks, and those that resemble one",
        "retrieve": _summed(pool),
    }
    stages, left = [], len(kept_N)
    for name, what in steps.items():
        dropped = int((decided.of(name) & ~kept_N).sum())
        done = pool.benchmark_N.any() if name == "benchmark" else name in ("decode", "retrieve", *config.steps)
        if done or dropped:
            stages.append({"name": name, "in": left, "out": left - dropped, "dropped": dropped, "what": what})
        left -= dropped
    assert left == kept_N.sum(), "the ledger does not balance"
    of_pool = {"curated": pool.curated_N, "uncurated": ~pool.curated_N & ~pool.benchmark_N}
    if pool.benchmark_N.any():
        of_pool["benchmark"] = pool.benchmark_N
    told: dict = {"stages": stages, "images": len(kept_N), "kept": int(kept_N.sum())}
    told["weight"] = float(decided.weight_N.sum(dtype=np.float64))
    told |= {name: {"in": int(mine.sum()), "kept": int((mine & kept_N).sum())} for name, mine in of_pool.items()}
    if config.marks:
        told["marked"] = {mark: int(bears(mark, _plain(pool.images)).sum()) for mark in config.marks}
    return told


def _summed(pool: Pool) -> str:
    return {
        "sample": f"uncurated images not among the {pool.config.k} nearest of any curated one",
        "all": "nothing: all that is left is kept",
        "balance": "uncurated images not drawn",
    }.get(pool.config.gather, "uncurated images that no curated set has gathered")
