"""The worth of distillation, and the cost of several students: beside the same student alone, and separate runs.

    python benchmarks/distill.py [--quick] [--steps 500] [--seeds 0 1 2] [--parts worth cost] [--out FOLDER] [--record]

Parts:

    worth     on the embedded world of each seed: a teacher pretrained as `demo` for so many steps; a student of a
              quarter of its parameters distilled from it for as many (`distill_demo`); and the same student pretrained
              alone, as the teacher was, on the same images for as many steps. `ours` is the accuracy of the distilled
              student, `rival` that of the student alone, k-NN and linear, means over seeds
    cost      seconds of a step of three students in one run, and of three runs. The teacher, a ViT-S/14, is several
              times as large as a student

`closed` is the part of the gap from the student alone to the teacher that the distilled student closes.
"""

import itertools
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from measure import argument_parser, finish, result
from troodon import distill, evaluate, pretrain, recipes
from troodon.config import to_dict
from troodon.demo import EMBEDDED_WORLD
from troodon.learn.config import ObjectiveConfig, PretrainConfig
from troodon.model.config import ViTConfig
from troodon.views.config import CropsConfig
from troodon.world.scene import WorldConfig
from troodon.world.write import write_world

BY_FEATURES = ObjectiveConfig(terms=(("cls_features", 1.0), ("patch_features", 1.0)))

QUICK_WORLD = {"clean": 200, "copies": 20, "off_topic": 20, "broken": 2, "curated": 20, "train": 120, "val": 60}


def accuracies(run: Path, data: Path, out: Path) -> dict[str, float]:
    """The accuracy of frozen features by protocol."""
    scores = evaluate("quick", run, data, out, baselines=False)
    scores += evaluate("mine", run, data, Path(f"{out}-mine"), baselines=False)
    return {s["protocol"]: s["value"] for s in scores if s["metric"] == "accuracy"}


def worth(home: Path, seeds: list[int], steps: int, quick: bool) -> list[dict]:
    """Results of the part `worth`."""
    by_network: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        folder = home / f"seed-{seed}"
        write_world(folder / "world", seed, WorldConfig(**EMBEDDED_WORLD | (QUICK_WORLD if quick else {})))
        images, data = folder / "world" / "uncurated", folder / "world" / "evaluation"
        settings = {"seed": seed, "threads": 1, "probe_every": 0, "steps": steps}
        settings |= {"schedules": {"lr": {"warmup": steps // 10}}}
        student, teacher = recipes.distill("distill_demo"), recipes.pretrain("demo")
        pretrain(teacher, images, folder / "teacher", settings=settings)
        pretrain(replace(teacher, vit=student.vit), images, folder / "alone", settings=settings)
        distill(student, folder / "teacher", images, folder / "distilled", settings=settings)
        for name in ("teacher", "alone", "distilled"):
            measured = accuracies(folder / name, data, folder / f"scores-{name}")
            by_network.setdefault(name, []).append(measured)
            print(f"  seed {seed}  {name:<12} " + "  ".join(f"{k} {v:6.1%}" for k, v in measured.items()), flush=True)
    results = []
    for protocol in by_network["teacher"][0]:
        mean = {name: statistics.mean(each[protocol] for each in values) for name, values in by_network.items()}
        gap = mean["teacher"] - mean["alone"]
        closed = (mean["distilled"] - mean["alone"]) / gap if gap > 0 else None
        wins = sum(a[protocol] > b[protocol] for a, b in zip(by_network["distilled"], by_network["alone"]))
        about = {"seeds": seeds, "steps": steps, "teacher": mean["teacher"], "closed": closed, "seeds_won": wins}
        results.append(result(
            f"distilled_{protocol}", mean["distilled"], mean["alone"], "accuracy", more_is_better=True, **about
        ))  # fmt: skip
    return results


def cost(home: Path, rounds: int, quick: bool) -> list[dict]:
    """Seconds of a step, from steps after the first of whole runs: other costs of a run are excluded."""
    from PIL import Image

    images = home / "images"
    images.mkdir(parents=True)
    for number in range(16):
        pixels = (torch.rand(160, 200, 3) * 255).byte().numpy()
        Image.fromarray(pixels).save(images / f"{number}.jpg")
    side, large = (56, ViTConfig(dim=96, depth=4, heads=3, grid=4)) if quick else (112, ViTConfig(grid=8))
    small = ViTConfig(dim=96, depth=3, heads=3, grid=large.grid)
    crops = CropsConfig(global_px=side, local_px=28, locals=2)
    teacher = PretrainConfig(vit=large, crops=crops, steps=1, batch=8, threads=1, health_every=0, log_every=1,
                             probe_every=0, objective=BY_FEATURES)  # fmt: skip
    from troodon.model.backbone import Backbone
    from troodon.model.config import Preprocessing

    Backbone.random(large, Preprocessing(crop=side)).save(home / "teacher")
    steps = 3 + rounds
    students = {
        f"student-{dim}": replace(teacher, vit=replace(small, dim=dim, heads=dim // 32), steps=steps)
        for dim in (96, 64, 128)
    }

    def seconds(folder: Path) -> float:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        times = [line["seconds"] for line in lines if "loss" in line]
        return statistics.median(b - a for a, b in itertools.pairwise(times[1:]))

    distill(students, home / "teacher", images, home / "together")
    together = seconds(home / "together" / next(iter(students)))
    apart = 0.0
    for name, config in students.items():
        distill(config, home / "teacher", images, home / name)
        apart += seconds(home / name)
    print(f"  three students: {together * 1e3:.0f} ms a step together, {apart * 1e3:.0f} ms apart")
    settings = {"teacher": to_dict(large), "batch": 8, "steps": steps}
    return [result("three_students_step", together, apart, "s", **settings)]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: shows only that it runs")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", default=["worth", "cost"], choices=["worth", "cost"])
    parser.add_argument("--out", type=Path, help="folder that keeps the runs, which continue where they stopped")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.seeds, arguments.rounds = 20, [0], 4
    results: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="troodon-distill-") as temporary:
        home = arguments.out or Path(temporary)
        if "worth" in arguments.parts:
            print("worth")
            results += worth(home, arguments.seeds, arguments.steps, arguments.quick)
        if "cost" in arguments.parts:
            print("cost")
            results += cost(home / "cost", arguments.rounds, arguments.quick)
    finish(results, arguments)


if __name__ == "__main__":
    main()
