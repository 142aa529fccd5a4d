"""The demo: scan, curate, pretrain, distill, evaluate and report on the embedded world.

The world records which of its pictures are copies and which are off-topic, so the selection is scored too.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from troodon import verbs
from troodon.lock import one_at_a_time
from troodon.recipes import curation, distilled, own
from troodon.run import publish, say, write_json

EMBEDDED_WORLD = {"texture_fidelity": 0.95, "habitat_fidelity": 0.9, "scale": (0.5, 0.9)}  # settings of WorldConfig


@dataclass(frozen=True)
class Demo:
    """The whole system on an embedded world, in a few minutes: scan, curate, pretrain, distill, evaluate, report."""

    out: str
    """A folder; the same command goes on where it stopped."""
    steps: int | None = None
    """Steps of pretraining; fewer is faster and worse."""
    seed: int = 0
    """Of the world and of everything that is learned from it."""

    def run(self) -> None:
        from troodon.verbs.evaluation import scores_table

        folder = demo(self.out, steps=self.steps, seed=self.seed)
        print(scores_table(json.loads((folder / "scores.json").read_text())))
        print(folder / "report.html")


@one_at_a_time
def demo(out: str | Path, *, steps: int | None = None, seed: int = 0) -> Path:
    """Run the whole system on the embedded world; leaves `out`/report.html and `out`/scores.json, and returns `out`.

    The same call goes on where it stopped. `steps` are those of the pretraining on the selection.
    """
    from troodon.world.scene import WorldConfig
    from troodon.world.write import write_world

    config = replace(own.demo() if steps is None else own.demo(steps), seed=seed)
    out = Path(out)
    say("1/7 world: pictures, drawn by rule")
    write_world(out / "world", seed, WorldConfig(**EMBEDDED_WORLD))
    pool, curated = out / "world" / "uncurated", out / "world" / "curated"

    say("2/7 scan: what is in the pool")
    summary = verbs.scan(pool, out / "index")
    say(f"  {summary['images']:,} images, {len(summary['broken'])} broken")

    say("3/7 curate: first a backbone that compares images, trained for a short time on the whole pool")
    short = replace(own.demo(max(1, config.steps // 4)), seed=seed)
    verbs.pretrain(short, out / "index", out / "first")
    verbs.curate(curation.curate_demo(), curated, pool, out / "first", out / "selection")

    say("4/7 pretrain: on the selection, from there on")
    verbs.pretrain(config, out / "selection", out / "run", init=out / "first")

    say("5/7 distill: from this run, a student of a quarter of its parameters")
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
    """Score the selection by the world's ground truth: precision and recall of what it dropped and retrieved.

    Leaves them as scores with intervals in `out`/truth, and returns them.
    """
    import numpy as np
    import pyarrow.parquet as pq

    from troodon.evaluate.metrics import bootstrap_interval, score_entry

    truth = {row["path"]: row for row in pq.read_table(out / "world" / "truth.parquet").to_pylist()}
    ledger = pq.read_table(out / "selection" / "images.parquet").to_pylist()
    role = np.array([truth[row["path"]]["role"] for row in ledger])
    family = np.array([truth[row["path"]]["original"] or row["path"] for row in ledger])
    pool = np.array([row["pool"] == "uncurated" for row in ledger])
    dropped = np.array([row["stage"] in ("exact", "duplicate") for row in ledger])
    correct = dropped & np.array([row["cause"] >= 0 and family[row["cause"]] == f for row, f in zip(ledger, family)])

    hits_of_copies = []  # for every family, one entry for each image that is superfluous: whether one is dropped
    for name in np.unique(family[role == "copy"]):
        members = pool & (family == name)
        superfluous = members.sum() - (0 if (~pool & (family == name)).any() else 1)
        hits_of_copies += [i < correct[members].sum() for i in range(superfluous)]
    survivors = pool & (role != "broken") & ~dropped
    retrieved = np.array([row["kept"] for row in ledger]) & pool
    hits_by_score = {
        ("duplicates", "precision", "first"): correct[dropped],
        ("duplicates", "recall", "first"): np.array(hits_of_copies, bool),
        ("retrieval", "precision", "first"): role[retrieved] != "off-topic",
        ("retrieval", "precision", "whole pool"): role[survivors] != "off-topic",  # the precision without retrieval
    }
    scores = [
        score_entry(
            protocol,
            "planted",
            metric,
            hits.mean(),
            *bootstrap_interval(hits, 1000, 0),
            {"images": len(hits)},
            backbone,
        )
        for (protocol, metric, backbone), hits in hits_by_score.items()
        if len(hits)
    ]
    with publish(out / "truth", "scores", "planted", {}) as folder:
        write_json(folder / "scores.json", scores)
    return scores
