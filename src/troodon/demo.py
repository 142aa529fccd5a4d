"""The whole system on the embedded world: scan, curate, pretrain, distill, evaluate, report. And is it right?

The world knows which of its pictures are copies and which are off-topic, so the selection is judged too.
"""

from dataclasses import replace
from pathlib import Path

from troodon import verbs
from troodon.recipes import curation, distilled, own
from troodon.run import publish, say, write_json
from troodon.world.scene import WorldConfig
from troodon.world.write import write as write_world

EMBEDDED_WORLD = WorldConfig(texture_fidelity=0.95, habitat_fidelity=0.9, scale=(0.5, 0.9))


def demo(out: str | Path, *, steps: int | None = None, seed: int = 0) -> Path:
    """Leaves `out`/report.html and `out`/scores.json; goes on where it stopped. `steps` are of the longer training."""
    config = replace(own.demo() if steps is None else own.demo(steps), seed=seed)
    out = Path(out)
    say("1/7 world: pictures, drawn by rule")
    write_world(out / "world", seed, EMBEDDED_WORLD)
    pool, curated = out / "world" / "uncurated", out / "world" / "curated"

    say("2/7 scan: what is in the pool")
    summary = verbs.scan(pool, out / "index")
    say(f"  {summary['images']:,} images, {len(summary['broken'])} broken")

    say("3/7 curate: first a backbone to compare images by, trained for a short while on the whole pool")
    first = replace(own.demo(max(1, config.steps // 4)), seed=seed)
    verbs.pretrain(first, out / "index", out / "first")
    verbs.curate(curation.curate_demo(), curated, pool, out / "first", out / "selection")

    say("4/7 pretrain: on the selection, from there on")
    verbs.pretrain(config, out / "selection", out / "run", init=out / "first")

    say("5/7 distill: from what it has learnt, a student of a quarter of its parameters")
    student = replace(distilled.distill_demo(config.steps), seed=seed)
    verbs.distill(student, out / "run", out / "selection", out / "student")

    say("6/7 evaluate: frozen features, beside a random network and trivial descriptors")
    backbones, labelled = [out / "run", out / "student"], out / "world" / "evaluation"
    scores = verbs.evaluate("mine", backbones, labelled, out / "scores", cache=out / "features")
    scores += check(out)
    write_json(out / "scores.json", scores)

    say("7/7 report")
    verbs.report(out, out / "report.html", title="Troodon on an embedded world")
    return out


def check(out: Path) -> list[dict]:
    """How much of what the world knows of itself the selection found: precision and recall, with intervals."""
    import numpy as np
    import pyarrow.parquet as pq

    from troodon.evaluate.metrics import interval, score

    truth = {row["path"]: row for row in pq.read_table(out / "world" / "truth.parquet").to_pylist()}
    ledger = pq.read_table(out / "selection" / "images.parquet").to_pylist()
    role = np.array([truth[row["path"]]["role"] for row in ledger])
    family = np.array([truth[row["path"]]["original"] or row["path"] for row in ledger])
    pool = np.array([row["pool"] == "uncurated" for row in ledger])
    dropped = np.array([row["stage"] in ("exact", "duplicate") for row in ledger])
    right = dropped & np.array([row["cause"] >= 0 and family[row["cause"]] == own for row, own in zip(ledger, family)])

    found = []  # of every family, as many entries as it has images that need not stay: whether one is gone
    for name in np.unique(family[role == "copy"]):
        mine = pool & (family == name)
        removable = mine.sum() - (0 if (~pool & (family == name)).any() else 1)
        found += [i < right[mine].sum() for i in range(removable)]
    survivors = pool & (role != "broken") & ~dropped
    retrieved = np.array([row["kept"] for row in ledger]) & pool
    measured = {
        ("duplicates", "precision", "first"): right[dropped],
        ("duplicates", "recall", "first"): np.array(found, bool),
        ("retrieval", "precision", "first"): role[retrieved] != "off-topic",
        ("retrieval", "precision", "whole pool"): role[survivors] != "off-topic",  # what no retrieval would give
    }
    scores = [
        score(protocol, "planted", metric, hits.mean(), *interval(hits, 1000, 0), {"images": len(hits)}, backbone)
        for (protocol, metric, backbone), hits in measured.items()
        if len(hits)
    ]
    with publish(out / "truth", "scores", "planted", {}) as folder:
        write_json(folder / "scores.json", scores)
    return scores
