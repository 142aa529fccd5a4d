"""Scores of `troodon demo`, by seed: those that README.md shows.

    python benchmarks/demo.py [--quick] [--seeds 0 1 2] [--out FOLDER] [--record]
    python benchmarks/demo.py --folders DEMO ... [--commit COMMIT]      of finished demos; nothing is run

The seed of a finished demo is that of its run. A record names the present commit, unless --commit names the demo's.

One result for each seed, protocol and frozen features: accuracies of k-NN, linear probe and logistic regression, and
NMI of k-means, in per cent; `rival` is a random network of the same shape, for descriptors that of the first network.
Then precision and recall of the selection against what the world knows. `low` and `high` are the 95 % interval over
test images. A demo takes some six minutes on two cores; one in `--out` continues where it stopped.
"""

import tempfile
from pathlib import Path

import yaml

from measure import argument_parser, finish, result
from troodon.run import read_json

NAMES = {
    "run": "pretrained", "random": "random network", "random, as student": "random network, as student",
    "colour-histogram": "colour histogram", "raw-pixels": "raw pixels",
}  # fmt: skip
QUICK = {"classes": 3, "curated": 6, "clean": 60, "copies": 30, "off_topic": 20, "broken": 4, "train": 8, "val": 6,
         "dense": 4}  # fmt: skip


def run_demo(out: Path, seed: int, quick: bool) -> Path:
    """The folder of a finished demo of this seed; with `quick`, of 4 steps on a tiny world."""
    import importlib

    demo = importlib.import_module("troodon.demo")  # the name itself is the verb's
    if quick:
        demo.EMBEDDED_WORLD |= QUICK
    return demo.demo(out, steps=4 if quick else None, seed=seed)


def demo_results(folder: Path) -> list[dict]:
    """Results of a finished demo, from its scores and from the seed and steps that its run names."""
    config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    scores = read_json(folder / "scores.json")
    random = {(s["backbone"], s["protocol"]): s["value"] for s in scores if s["backbone"].startswith("random")}
    results = []
    for score in scores:
        backbone, protocol = score["backbone"], score["protocol"]
        rival = None
        if score["dataset"] != "planted" and not backbone.startswith("random"):
            rival = random["random, as student" if backbone == "student" else "random", protocol]
        name = f"demo_{protocol}_{score['metric']}" if score["dataset"] == "planted" else f"demo_{protocol}"
        settings = {"seed": config["seed"], "steps": config["steps"], "features": NAMES.get(backbone, backbone)}
        row = result(name, per_cent(score["value"]), per_cent(rival), "%", more_is_better=True, **settings)
        results.append(row | {"low": per_cent(score["low"]), "high": per_cent(score["high"])})
    return results


def per_cent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 6)


def main() -> None:
    parser = argument_parser(__doc__, packages=("pyarrow", "scipy"))
    parser.add_argument("--quick", action="store_true", help="one seed, 4 steps, a tiny world: shows only that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folders", type=Path, nargs="+", help="finished demos, in place of running them")
    parser.add_argument("--commit", default=parser.get_default("commit"), help="the commit that made the folders")
    parser.add_argument("--out", type=Path, help="folder that keeps the demos")
    arguments = parser.parse_args()
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    with tempfile.TemporaryDirectory(prefix="troodon-demo-") as temporary:
        home = arguments.out or Path(temporary)
        folders = arguments.folders or [run_demo(home / f"seed-{seed}", seed, arguments.quick) for seed in seeds]
        finish([row for folder in folders for row in demo_results(folder)], arguments)


if __name__ == "__main__":
    main()
