"""What a few minutes of one core learn from few small images: features after the same CPU seconds of training.

    python benchmarks/small_data.py [--data PATH ...] [--recipe NAME] [--against NAME] [--cpu-seconds 300] [--seeds 0]
                                    [--rivals] [--quick] [--record]

`ours` is a recipe of today, `auto` where there is one, else `small`. The rival is `small` as it was (its settings stand
in small_data_rival.yaml), on today's code, or the recipe `--against`. `--rivals` adds, on the same images and seconds:

    reference  the released models' settings, on the network of `small`: heads, batch and rate scaled down
    SimCLR     ResNet-18, and DINO, ViT-Ti: the usual way, in plain PyTorch, with transforms through Pillow

Each arm trains in a process of its own, with one thread and its own clock: the CPU seconds of the process, from the
first image that it reads to its last checkpoint, whatever else the machine does; on a GPU, seconds. Features are
measured at each quarter of the time: k-NN (k = 20) by class token and by both tokens, ridge regression on both tokens,
and the effective rank of the class tokens. Colour histogram, raw pixels and the untrained network stand beside them.

Without --data, the packs in ../shared/data are taken where they are, else the embedded world is drawn.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy import ndarray

from measure import argument_parser, finish, result
from troodon import recipes
from troodon.config import from_yaml
from troodon.learn.config import ObjectiveConfig, OptimConfig, PretrainConfig
from troodon.learn.schedules import Schedule, Schedules
from troodon.model.config import HeadConfig

HERE = Path(__file__).parent
PACK = HERE.parents[1] / "shared" / "data" / "cls_tinyin50_64.tar"
QUARTERS = 4
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # candidates of the ridge penalty, per image
USUAL = ("simclr", "dino")

Measures = dict[str, float]


@dataclass(frozen=True)
class Images:
    """Images to train on and to measure with; `every` leaves out all but one in so many."""

    places: tuple[str, ...]
    every: int = 1

    def open(self) -> tuple:
        """The index of the images to train on, that of all images, their labels, and which are for training."""
        from troodon.images.sources import open_source

        index = open_source(*self.places)
        rows_N, labels = np.arange(0, len(index), self.every), np.array(index.column("label"), dtype=object)
        rows_N = rows_N[[labels[row] is not None for row in rows_N]]
        index, labels_N = index.take(rows_N), np.unique(labels[rows_N].astype(str), return_inverse=True)[1]
        splits = np.array(index.column("split"), dtype=object)
        if {"train", "val"} <= set(splits):
            train_N = splits == "train"
        else:  # a fifth of each class to measure with
            train_N = np.random.default_rng(0).permuted(np.arange(len(index)) % 5 != 0)
        return index.take(np.flatnonzero(train_N)), index, labels_N, train_N


def config_of(arm: str, index: Any, seed: int, seconds: float) -> PretrainConfig:
    """The training of an arm of ours on these images."""
    if arm == "rival":
        config = from_yaml(PretrainConfig(), HERE / "small_data_rival.yaml")
    elif arm == "reference":
        config = reference()
    elif arm == "auto":
        from troodon.images.look import look
        from troodon.recipes.automatic import automatic

        config = automatic(look(index), minutes=seconds / 60).config
    else:
        config = recipes.pretrain(arm)
    return replace(config, **settings_of(seed, seconds))


def settings_of(seed: int, seconds: float) -> dict:
    """Checkpoints at each quarter and nothing else beside the steps."""
    return {
        "seed": seed, "minutes": seconds / 60, "threads": 1, "probe_every": 0, "health_every": 0,
        "checkpoint_every": 10**9, "keep": QUARTERS, "compute": "fp32",
    }  # fmt: skip


def reference() -> PretrainConfig:
    """The released models' settings on the network, crops and steps of `small`."""
    small = from_yaml(PretrainConfig(), HERE / "small_data_rival.yaml")
    head = HeadConfig(prototypes=4096, bottleneck=256)
    return PretrainConfig(
        vit=replace(small.vit, layer_scale=1e-5, drop_path=0.1),
        dino_head=head,
        ibot_head=head,
        objective=ObjectiveConfig(),
        optim=OptimConfig(),
        schedules=Schedules(
            lr=Schedule(peak=4e-3 * (small.batch / 1024) ** 0.5, end=1e-6, warmup=small.steps // 10),
            teacher_temperature=Schedule(start=0.04, peak=0.07, end=0.07, warmup=small.steps * 3 // 10),
            last_layer_frozen=small.steps // 100,
        ),
        crops=replace(small.crops, global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), locals=8),
        steps=small.steps,
        batch=small.batch,
    )


def train_ours(arm: str, images: Images, out: Path, seed: int, seconds: float) -> None:
    """Train in CPU seconds of this process, or in seconds of a GPU."""
    import torch

    from troodon.images.cache import cached
    from troodon.learn import clock
    from troodon.learn.pretrain import pretrain

    torch.set_num_threads(1)
    tell = time.monotonic if torch.cuda.is_available() else time.process_time
    index = images.open()[0]
    setattr(clock, "time", SimpleNamespace(monotonic=tell))  # noqa: B010
    pretrain(config_of(arm, index, seed, seconds), cached(index, None), out, began=tell())


def snapshots(out: Path) -> Iterator[tuple[float, int, Any]]:
    """The share of the time, the images seen, and the backbone of each checkpoint."""
    from troodon import load

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = max(record["step"] for record in records if "step" in record) + 1
    for folder in sorted(path for path in (out / "checkpoints").glob("*") if path.name.isdigit()):
        saved = json.loads((folder / "run.json").read_text())
        yield int(folder.name) / steps, saved["images_seen"], load(folder / "backbone")


def measure(cls_ND: ndarray, both_ND: ndarray, labels_N: ndarray, train_N: ndarray) -> Measures:
    """Accuracies on the images that are not for training, in per cent, and the effective rank of the class tokens."""
    import torch

    from troodon.evaluate.knn import knn_accuracy
    from troodon.learn.health import feature_readings

    def knn(x_ND: ndarray) -> float:
        x, y = torch.from_numpy(np.ascontiguousarray(x_ND)).float(), torch.from_numpy(labels_N)
        train = torch.from_numpy(train_N)
        return 100 * knn_accuracy(x[train], y[train], x[~train], y[~train])

    rank = feature_readings(torch.from_numpy(cls_ND[~train_N][:2000]).float())["effective_rank"].item()
    linear = 100 * ridge(both_ND, labels_N, train_N)
    return {"knn_cls": knn(cls_ND), "knn": knn(both_ND), "linear": linear, "rank": rank}


def ridge(x_ND: ndarray, labels_N: ndarray, train_N: ndarray) -> float:
    """Accuracy of ridge regression on standardised features, its penalty chosen on a tenth of the training images."""
    x_ND = x_ND.astype(np.float64)
    x_ND = (x_ND - x_ND[train_N].mean(0)) / (x_ND[train_N].std(0) + 1e-6)
    x_ND, y_NC = np.c_[x_ND, np.ones(len(x_ND))], np.eye(labels_N.max() + 1)[labels_N]
    rows = np.random.default_rng(0).permutation(np.flatnonzero(train_N))
    held, fitted = rows[: len(rows) // 10], rows[len(rows) // 10 :]

    def accuracy(on: ndarray, at: ndarray, strength: float) -> float:
        x, penalty = x_ND[on], strength * len(on) * np.eye(x_ND.shape[1])
        model_DC = np.linalg.solve(x.T @ x + penalty, x.T @ y_NC[on])
        return float(((x_ND[at] @ model_DC).argmax(1) == labels_N[at]).mean())

    best = max(STRENGTHS, key=lambda strength: accuracy(fitted, held, strength))
    return accuracy(rows, np.flatnonzero(~train_N), best)


def features_of(extractor: Any, index: Any) -> tuple[ndarray, ndarray]:
    """Class tokens, and these with the mean patch tokens, each part of length one; (N, D) and (N, 2 D)."""
    from troodon.evaluate.features import Reader, extract

    found = extract(extractor, index, blocks=1, reader=Reader(threads=1))
    parts = [found.cls_NLD[:, -1], found.mean_NLD[:, -1]]
    parts = [x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in parts if x.shape[1]]
    return found.cls_NLD[:, -1], np.concatenate(parts, axis=1)


def measure_arm(arm: str, images: Images, out: Path, seed: int, seconds: float) -> list[dict]:
    """Train an arm, and measure it at each quarter of its time."""
    _, index, labels_N, train_N = images.open()
    curve = []
    if arm in USUAL:
        from small_rivals import train_usual

        for share, seen, cls_ND, both_ND in train_usual(arm, images, seed, seconds, QUARTERS):
            curve.append({"share": share, "images": seen, **measure(cls_ND, both_ND, labels_N, train_N)})
        return curve
    train_ours(arm, images, out, seed, seconds)
    for share, seen, backbone in snapshots(out):
        measured = measure(*features_of(backbone, index), labels_N, train_N)
        curve.append({"share": share, "images": seen, **measured})
    return curve


def trivial(images: Images) -> dict[str, Measures]:
    """Measures of what learns nothing."""
    from troodon.evaluate.baselines import ColourHistogram, RawPixels
    from troodon.learn.recorder import preprocessing
    from troodon.model.backbone import Backbone

    _, index, labels_N, train_N = images.open()
    config = from_yaml(PretrainConfig(), HERE / "small_data_rival.yaml")
    random = replace(Backbone.random(config.vit, preprocessing(config), seed=0), name="untrained")
    known = {"untrained": random, "colour histogram": ColourHistogram(), "raw pixels": RawPixels()}
    return {name: measure(*features_of(e, index), labels_N, train_N) for name, e in known.items()}


def in_a_process(arm: str, images: Images, seed: int, seconds: float, out: Path) -> list[dict]:
    """Train and measure an arm in a process with one thread."""
    words = [sys.executable, __file__, "--worker", json.dumps([arm, images.places, images.every, seed, seconds])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([*words, "--out", str(out)], check=True, env=environment, stdout=sys.stderr)
    return json.loads((out / "curve.json").read_text())


def worker(arguments: list, out: Path) -> None:
    arm, places, every, seed, seconds = arguments
    out.mkdir(parents=True, exist_ok=True)
    curve = measure_arm(arm, Images(tuple(places), every), out / "run", seed, seconds)
    (out / "curve.json").write_text(json.dumps(curve))


def show(name: str, measured: Measures, seen: str = "") -> None:
    cells = "  ".join(f"{key} {value:5.1f}" for key, value in measured.items() if key not in ("share", "images"))
    print(f"  {name:<28}{seen:>24}  {cells}", file=sys.stderr, flush=True)


def rows(ours: list[dict], rival: list[dict], **settings: object) -> list[dict]:
    """Results from the last points of the curves of one seed."""
    last, other = ours[-1], rival[-1]
    results = []
    for name in ("knn", "linear"):
        more = {"rank": last["rank"], "images": last["images"], "rival_images": other["images"]}
        curve = [round(point[name], 2) for point in ours]
        results.append(result(
            f"{name}_at_budget", last[name], other[name], "%", more_is_better=True, **settings, **more, curve=curve,
            rival_curve=[round(point[name], 2) for point in rival],
        ))  # fmt: skip
    return results


def world(folder: Path) -> Path:
    """The embedded world, drawn into the folder."""
    from troodon.demo import EMBEDDED_WORLD
    from troodon.world.scene import WorldConfig
    from troodon.world.write import write_world

    write_world(folder, 0, WorldConfig(**EMBEDDED_WORLD))
    return folder / "evaluation"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", nargs="+", help="images with labels; with train and val splits, or without splits")
    parser.add_argument("--recipe", help="the recipe that is ours")
    parser.add_argument("--against", default="rival", help="a recipe in place of `small` as it was")
    parser.add_argument("--cpu-seconds", type=float, default=300.0, help="of one training; on a GPU, seconds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rivals", action="store_true", help="train the other rivals too")
    parser.add_argument("--quick", action="store_true", help="15 CPU seconds and a fifth of the images")
    parser.add_argument("--out", type=Path, help="folder that keeps the runs")
    parser.add_argument("--worker", type=json.loads, help="(one training of this benchmark, which starts it itself)")
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker, arguments.out)
    ours = arguments.recipe or ("auto" if "auto" in recipes.KNOWN["pretrain"] else "small")
    for name in {ours, arguments.against} - {"rival"}:
        recipes.pretrain(name)  # an unknown one is an error before anything is trained
    seconds = 15.0 if arguments.quick else arguments.cpu_seconds
    with tempfile.TemporaryDirectory(prefix="troodon-small-") as temporary:
        home, results = arguments.out or Path(temporary), []
        places = arguments.data or ([str(PACK / "images")] if PACK.is_file() else [str(world(home / "world"))])
        images = Images(tuple(places), 5 if arguments.quick else 1)
        for name, measured in trivial(images).items():
            show(name, measured)
        for seed in arguments.seeds:
            curves = {}
            for arm in [ours, arguments.against, *(["reference", *USUAL] if arguments.rivals else [])]:
                curves[arm] = in_a_process(arm, images, seed, seconds, home / f"{arm}-{seed}")
                for point in curves[arm]:
                    show(f"{arm}, seed {seed}", point, f"{point['share']:.0%}, {point['images']:,} images")
            settings = {"seed": seed, "recipe": ours, "cpu_seconds": seconds, "data": [Path(p).name for p in places]}
            for arm in list(curves)[1:]:
                results += rows(curves[ours], curves[arm], **settings, against="small" if arm == "rival" else arm)
        finish(results, arguments)
    return None


if __name__ == "__main__":
    main()
