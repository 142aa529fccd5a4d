"""The worth of a curated selection to training, beside other selections of as many images, for the same steps.

    python benchmarks/curation_worth.py --data FOLDER [--quick] [--steps 600] [--seeds 0 1 2] [--arms] [--out FOLDER]
                                        [--record]

FOLDER holds cls_tinyin50_64.tar, photos_cc0_224.tar and neardup_cifar10_dev.tar. Every second of 50 classes is wanted,
and 40 images of each are known, drawn by the seed. The pool is all else: other images of these classes, those of the
other classes, photographs, and pictures of CIFAR-10 with near-duplicates. As for a user who has no network yet:

    all        a network trains on the known images and the whole pool: it is the one that compares images in
    curated    `curate_small`: the known images, and what it gathers for them
    topped up  the known images, and as many of the pool by chance
    random     as many images by chance, known or not
    ideal      the known images, and as many of the pool of the wanted classes by chance: curated with the labels

Each arm trains the same network, from the same first weights, for the same steps. Its frozen features are measured by
k-NN and a linear probe on the wanted classes, and on the others: fitted on all their training images, tested on their
validation images. `ours` is the curated arm and `rival` another, means over seeds; `low` and `high` are the 95 %
interval of the mean difference (Student's t, paired by seed).
"""

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy import ndarray
from scipy.stats import t

from curate_images import split_classes
from measure import argument_parser, finish, result
from troodon import load, recipes
from troodon.curate.pipeline import curate
from troodon.evaluate.config import get_suite
from troodon.evaluate.sets.benchmark import Benchmark
from troodon.evaluate.suite import evaluate
from troodon.images.index import Index
from troodon.images.sources import open_source
from troodon.learn.pretrain import pretrain

ARMS = ("all", "curated", "topped up", "random", "ideal")
NETWORK = replace(recipes.pretrain("small"), vit=recipes.pretrain("demo").vit, crops=recipes.pretrain("demo").crops)
MEASURED = replace(get_suite("mine"), protocols=("knn", "linear"), ks=(20,))


@dataclass(frozen=True)
class Images:
    """Known images, images of the pool, and which of both together are of the wanted classes."""

    known: Index
    pool: Index
    wanted_N: ndarray

    @staticmethod
    def open(data: Path, seed: int, every: int) -> "Images":
        """The images of a seed; of the pool only one in `every`."""
        others = [open_source(data / "photos_cc0_224.tar"), open_source(data / "neardup_cifar10_dev.tar" / "images")]
        known, pool, right_P = split_classes(data, seed, *others)
        rows = np.arange(0, len(pool), every)
        return Images(known, pool.take(rows), np.r_[np.ones(len(known), bool), right_P[rows]])

    @property
    def all(self) -> Index:
        return Index.concat([self.known.without_labels(), self.pool])

    def arm(self, name: str, kept_N: ndarray, seed: int) -> ndarray:
        """The rows of all images that an arm trains on; `kept_N` marks those that curation kept."""
        generator, pool = np.random.default_rng(seed), np.arange(len(kept_N)) >= len(self.known)
        count = int(kept_N[pool].sum())
        if name == "curated":
            return np.flatnonzero(kept_N)
        if name == "random":
            return np.sort(generator.permutation(len(kept_N))[: kept_N.sum()])
        candidates = np.flatnonzero(pool & self.wanted_N if name == "ideal" else pool)
        return np.r_[np.flatnonzero(~pool), np.sort(generator.permutation(candidates)[:count])]


def evaluation_sets(data: Path, every: int) -> list[Benchmark]:
    """The wanted classes, and the others: training images to fit on, and validation images to test on."""
    index = open_source(data / "cls_tinyin50_64.tar" / "images")
    label = np.array(index.column("label"))
    wanted = np.isin(label, np.unique(label)[::2])
    parts = {"wanted": wanted, "others": ~wanted}
    return [Benchmark(name, "label", index.take(np.flatnonzero(members)[::every])) for name, members in parts.items()]


def accuracies(folder: Path, data: Path, every: int) -> dict[str, float]:
    """Accuracies of a run, by protocol and classes."""
    scores = evaluate([load(folder / "run")], evaluation_sets(data, every), MEASURED, folder / "scores")
    return {f"{s['protocol']} {s['dataset']}": s["value"] for s in scores if s["metric"] == "accuracy"}


def train_arms(
    home: Path, data: Path, seed: int, arms: list[str], steps: int, every: int
) -> dict[str, dict[str, float]]:
    """Train the arms of a seed, or continue them; the accuracies of each arm."""
    images, measured = Images.open(data, seed, every), {}
    schedules = replace(NETWORK.schedules, lr=replace(NETWORK.schedules.lr, warmup=steps // 10))
    config = replace(NETWORK, schedules=schedules, seed=seed, threads=1, probe_every=0, steps=steps)
    pretrain(config, images.all, home / "all" / "run")
    out = curate(recipes.curate("curate_small"), images.known, images.pool, load(home / "all" / "run"), home / "kept")
    kept_N = pq.read_table(out / "images.parquet")["kept"].to_numpy()
    for name in arms:
        folder = home / name.replace(" ", "-")
        rows = np.arange(len(kept_N)) if name == "all" else images.arm(name, kept_N, seed)
        pretrain(config, images.all.take(rows), folder / "run")
        measured[name] = accuracies(folder, data, every)
        share = f"{len(rows):,} images, {images.wanted_N[rows].mean():.0%} wanted"
        percentages = "  ".join(f"{key} {value:.1%}" for key, value in measured[name].items())
        print(f"  seed {seed}  {name:<10} {share:<27} {percentages}", flush=True)
    return measured


def compare_arms(seeds: list[dict[str, dict[str, float]]], settings: dict) -> list[dict]:
    """Results of the curated arm beside each other arm, from the accuracies of each seed."""
    results = []
    for rival in (arm for arm in seeds[0] if arm != "curated" and "curated" in seeds[0]):
        for key in seeds[0][rival]:
            ours, theirs = ([seed[arm][key] for seed in seeds] for arm in ("curated", rival))
            differences = [a - b for a, b in zip(ours, theirs, strict=True)]
            mean, low, high = statistics.mean(differences), None, None
            if len(differences) > 1:
                error = statistics.stdev(differences) / len(differences) ** 0.5
                half = float(t.ppf(0.975, len(differences) - 1)) * error
                low, high = mean - half, mean + half
                print(f"curated - {rival:<10} {key:<14} {mean:+.1%} ({low:+.1%} to {high:+.1%})")
            results.append(result(
                f"curated_over_{rival}_{key}".replace(" ", "_"), statistics.mean(ours), statistics.mean(theirs),
                "accuracy", more_is_better=True, **settings, differences=differences, low=low, high=high,
            ))  # fmt: skip
    return results


def main() -> None:
    parser = argument_parser(__doc__, packages=("scipy",))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, few images: shows only that it runs")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="the arms to train")
    parser.add_argument("--out", type=Path, help="folder that keeps the runs, which continue where they stopped")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.seeds, arguments.arms = 10, [0], ["curated", "topped up"]
    with tempfile.TemporaryDirectory(prefix="troodon-worth-") as temporary:
        home, every = arguments.out or Path(temporary), 10 if arguments.quick else 1
        measured = [
            train_arms(home / f"seed-{seed}", arguments.data, seed, arguments.arms, arguments.steps, every)
            for seed in arguments.seeds
        ]
    settings = {"seeds": arguments.seeds, "steps": arguments.steps}
    finish(compare_arms(measured, settings), arguments)


if __name__ == "__main__":
    main()
