"""What a curated selection is worth to training, beside others of as many images, for the same steps.

    python benchmarks/curation_worth.py --data FOLDER [--quick] [--steps 600] [--seeds 0 1 2] [--arms] [--out FOLDER]

FOLDER holds cls_tinyin50_64.tar, photos_cc0_224.tar and neardup_cifar10_dev.tar. Every second of 50 classes is wanted,
and 40 images of each are known, drawn by the seed. The pool is all else: other images of these classes, those of the
other classes, photographs, and pictures of CIFAR-10 with near-duplicates. As somebody would who has no network yet:

    all        a network learns from the known images and the whole pool: it is what compares images in
    curated    `curate_small`: the known images, and what it gathers for them
    topped up  the known images, and as many of the pool by chance
    random     as many images by chance, known or not
    ideal      the known images, and as many of the pool of the wanted classes by chance: curated with the labels

Each arm trains the same network, from the same first weights, for the same steps. Its frozen features are measured by
k-NN and a linear probe: of the wanted classes, and of the others, all their training images teach, and their validation
images test. `ours` is the curated arm and `rival` another, means over seeds; `low` and `high` are the 95 % interval of
the mean difference (Student's t, paired by seed).
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy import ndarray
from scipy.stats import t

from curate_images import halves
from troodon import load, recipes
from troodon.curate.pipeline import curate
from troodon.evaluate.config import suite
from troodon.evaluate.sets.benchmark import Benchmark
from troodon.evaluate.suite import evaluate
from troodon.images.index import Index
from troodon.images.sources import open_source
from troodon.learn.pretrain import pretrain

ARMS = ("all", "curated", "topped up", "random", "ideal")
NETWORK = replace(recipes.pretrain("small"), vit=recipes.pretrain("demo").vit, crops=recipes.pretrain("demo").crops)
MEASURED = replace(suite("mine"), protocols=("knn", "linear"), ks=(20,))


@dataclass(frozen=True)
class Images:
    """Known images, those of the pool, and of both together which are of the wanted classes."""

    known: Index
    pool: Index
    wanted_N: ndarray

    @staticmethod
    def of(data: Path, seed: int, every: int) -> "Images":
        """Of the pool one in `every`."""
        others = [open_source(data / "photos_cc0_224.tar"), open_source(data / "neardup_cifar10_dev.tar" / "images")]
        known, pool, right_P = halves(data, seed, *others)
        rows = np.arange(0, len(pool), every)
        return Images(known, pool.take(rows), np.r_[np.ones(len(known), bool), right_P[rows]])

    @property
    def all(self) -> Index:
        return Index.concat([self.known.unlabelled(), self.pool])

    def arm(self, name: str, kept_N: ndarray, seed: int) -> ndarray:
        """Which of all images an arm learns from; `kept_N` are those that curation kept."""
        chance, pool = np.random.default_rng(seed), np.arange(len(kept_N)) >= len(self.known)
        count = int(kept_N[pool].sum())
        if name == "curated":
            return np.flatnonzero(kept_N)
        if name == "random":
            return np.sort(chance.permutation(len(kept_N))[: kept_N.sum()])
        some = np.flatnonzero(pool & self.wanted_N if name == "ideal" else pool)
        return np.r_[np.flatnonzero(~pool), np.sort(chance.permutation(some)[:count])]


def tests(data: Path, every: int) -> list[Benchmark]:
    """The wanted classes, and the others: their training images to learn from, and validation images to test on."""
    index = open_source(data / "cls_tinyin50_64.tar" / "images")
    label = np.array(index.column("label"))
    wanted = np.isin(label, np.unique(label)[::2])
    parts = {"wanted": wanted, "others": ~wanted}
    return [Benchmark(name, "label", index.take(np.flatnonzero(mine)[::every])) for name, mine in parts.items()]


def scores(place: Path, data: Path, every: int) -> dict[str, float]:
    """Accuracies of a run, by protocol and classes."""
    found = evaluate([load(place / "run")], tests(data, every), MEASURED, place / "scores")
    return {f"{s['protocol']} {s['dataset']}": s["value"] for s in found if s["metric"] == "accuracy"}


def trained(home: Path, data: Path, seed: int, arms: list[str], steps: int, every: int) -> dict[str, dict[str, float]]:
    """The arms of a seed, done or gone on with: their accuracies."""
    images, told = Images.of(data, seed, every), {}
    schedules = replace(NETWORK.schedules, lr=replace(NETWORK.schedules.lr, warmup=steps // 10))
    config = replace(NETWORK, schedules=schedules, seed=seed, threads=1, probe_every=0, steps=steps)
    pretrain(config, images.all, home / "all" / "run")
    out = curate(recipes.curate("curate_small"), images.known, images.pool, load(home / "all" / "run"), home / "kept")
    kept_N = pq.read_table(out / "images.parquet")["kept"].to_numpy()
    for name in arms:
        place = home / name.replace(" ", "-")
        rows = np.arange(len(kept_N)) if name == "all" else images.arm(name, kept_N, seed)
        pretrain(config, images.all.take(rows), place / "run")
        told[name] = scores(place, data, every)
        share = f"{len(rows):,} images, {images.wanted_N[rows].mean():.0%} wanted"
        accuracies = "  ".join(f"{what} {value:.1%}" for what, value in told[name].items())
        print(f"  seed {seed}  {name:<10} {share:<27} {accuracies}", flush=True)
    return told


def compared(told: list[dict[str, dict[str, float]]], settings: dict) -> list[dict]:
    """Lines of JSON: the curated arm beside each other."""
    lines = []
    for rival in (arm for arm in told[0] if arm != "curated" and "curated" in told[0]):
        for what in told[0][rival]:
            ours, theirs = ([seed[arm][what] for seed in told] for arm in ("curated", rival))
            more = [a - b for a, b in zip(ours, theirs, strict=True)]
            mean, low, high = statistics.mean(more), None, None
            if len(more) > 1:
                half = float(t.ppf(0.975, len(more) - 1)) * statistics.stdev(more) / len(more) ** 0.5
                low, high = mean - half, mean + half
                print(f"curated - {rival:<10} {what:<14} {mean:+.1%} ({low:+.1%} to {high:+.1%})")
            lines.append({
                "name": f"curated_over_{rival}_{what}".replace(" ", "_"), "ours": statistics.mean(ours),
                "rival": statistics.mean(theirs), "ratio": statistics.mean(ours) / statistics.mean(theirs),
                "unit": "accuracy", "settings": settings | {"differences": more, "low": low, "high": high},
            })  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, few images: that it runs")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="only these")
    parser.add_argument("--out", type=Path, help="keep the runs here; they go on where they stopped")
    given = parser.parse_args()
    if given.quick:
        given.steps, given.seeds, given.arms = 10, [0], ["curated", "topped up"]
    with tempfile.TemporaryDirectory(prefix="troodon-worth-") as temporary:
        home, every = given.out or Path(temporary), 10 if given.quick else 1
        told = [
            trained(home / f"seed-{seed}", given.data, seed, given.arms, given.steps, every) for seed in given.seeds
        ]
    print(json.dumps(compared(told, {"seeds": given.seeds, "steps": given.steps})))


if __name__ == "__main__":
    main()
