"""What distillation is worth, and what several students cost: beside the same student alone, and beside separate runs.

    python benchmarks/distill.py [--quick] [--steps 800] [--seeds 0 1 2] [--parts worth cost] [--out FOLDER]

Parts:

    worth     on the embedded world of each seed: a teacher pretrained for so many steps; a student of a quarter of its
              parameters distilled from it for as many: by its heads (`distilled`), by heads that its backbone alone
              was given first, for as many steps (`heads first`), and by its features (`by features`); and the same
              student pretrained alone on the same images for as many. `ours` is the distilled student's
              accuracy, `rival` that of the one alone, k-NN and linear, means over seeds
    cost      seconds of a step of three students in one run, and of three runs. The teacher, a ViT-S/14, is several
              times a student's size

`closed` is how much of the way from the student alone to the teacher the distilled one has gone.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from troodon import distill, evaluate, pretrain, recipes
from troodon.config import to_dict
from troodon.demo import EMBEDDED_WORLD
from troodon.learn.config import ObjectiveConfig, PretrainConfig
from troodon.model.config import ViTConfig
from troodon.views.config import CropsConfig
from troodon.world.write import write as write_world

BY_FEATURES = ObjectiveConfig(dino_weight=0.0, ibot_weight=0.0, koleo_weight=0.0, cls_weight=1.0, patch_weight=1.0)


def scores(run: Path, data: Path, out: Path) -> dict[str, float]:
    """By protocol: the accuracy of frozen features."""
    found = evaluate("quick", run, data, out, baselines=False)
    found += evaluate("mine", run, data, Path(f"{out}-mine"), baselines=False)
    return {s["protocol"]: s["value"] for s in found if s["metric"] == "accuracy"}


def worth(home: Path, seeds: list[int], steps: int, tiny: bool) -> list[dict]:
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        place = home / f"seed-{seed}"
        sizes = replace(EMBEDDED_WORLD, clean=200, copies=20, off_topic=20, broken=2, curated=20, train=120, val=60)
        write_world(place / "world", seed, sizes if tiny else EMBEDDED_WORLD)
        images, data = place / "world" / "uncurated", place / "world" / "evaluation"
        common = {"seed": seed, "threads": 1, "probe_every": 0, "steps": steps}
        common |= {"schedules": {"lr": {"warmup": steps // 10}}}
        student = recipes.distill("distill_demo")
        alone = replace(student, masks=recipes.pretrain("demo").masks)
        pretrain("demo", images, place / "teacher", settings=common)
        pretrain(alone, images, place / "alone", settings=common)
        settings = common | {"batch": student.batch}
        distill(student, place / "teacher", images, place / "distilled", settings=settings)
        by_features = replace(student, objective=BY_FEATURES)
        distill(by_features, place / "teacher", images, place / "by-features", settings=settings)
        # Heads for the backbone alone: the recipe `heads`, with the numbers of small data.
        own = recipes.pretrain("demo")
        frozen = replace(own.schedules, backbone_frozen=steps)
        heads = replace(own, schedules=frozen, objective=replace(own.objective, koleo_weight=0.0))
        pretrain(heads, images, place / "heads", init=place / "teacher" / "backbone", settings=common)
        distill(student, place / "heads", images, place / "heads-first", settings=settings)
        for name in ("teacher", "alone", "distilled", "heads-first", "by-features"):
            rows.setdefault(name, []).append(scores(place / name, data, place / f"scores-{name}"))
            print(
                f"  seed {seed}  {name:<12} " + "  ".join(f"{k} {v:6.1%}" for k, v in rows[name][-1].items()),
                flush=True,
            )
    told = []
    for protocol in rows["teacher"][0]:
        mean = {name: statistics.mean(found[protocol] for found in of) for name, of in rows.items()}
        gap = mean["teacher"] - mean["alone"]
        for name in ("distilled", "heads-first", "by-features"):
            closed = (mean[name] - mean["alone"]) / gap if gap > 0 else None
            wins = sum(a[protocol] > b[protocol] for a, b in zip(rows[name], rows["alone"]))
            settings = {"seeds": seeds, "steps": steps, "teacher": mean["teacher"], "closed": closed, "seeds_won": wins}
            told.append({
                "name": f"{name.replace('-', '_')}_{protocol}", "ours": mean[name], "rival": mean["alone"],
                "ratio": mean[name] / mean["alone"], "unit": "accuracy", "settings": settings,
            })  # fmt: skip
    return told


def cost(home: Path, rounds: int, tiny: bool) -> list[dict]:
    """Seconds a step: steps after the first, of whole runs, so that what a run costs besides is left out."""
    from PIL import Image

    images = home / "images"
    images.mkdir(parents=True)
    for number in range(16):
        pixels = (torch.rand(160, 200, 3) * 255).byte().numpy()
        Image.fromarray(pixels).save(images / f"{number}.jpg")
    side, large = (56, ViTConfig(dim=96, depth=4, heads=3, grid=4)) if tiny else (112, ViTConfig(grid=8))
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
        at = [line["seconds"] for line in lines if "loss" in line]
        return statistics.median(b - a for a, b in itertools.pairwise(at[1:]))

    distill(students, home / "teacher", images, home / "together")
    together = seconds(home / "together" / next(iter(students)))
    apart = 0.0
    for name, config in students.items():
        distill(config, home / "teacher", images, home / name)
        apart += seconds(home / name)
    print(f"  three students: {together * 1e3:.0f} ms a step together, {apart * 1e3:.0f} ms apart")
    settings = {"teacher": to_dict(large), "batch": 8, "steps": steps, "threads": torch.get_num_threads()}
    return [{"name": "three_students_step", "ours": together, "rival": apart, "ratio": apart / together, "unit": "s",
             "settings": settings}]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: shows that it runs, and no worth")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", default=["worth", "cost"], choices=["worth", "cost"])
    parser.add_argument("--out", type=Path, help="keep the runs here; they go on where they stopped")
    given = parser.parse_args()
    if given.quick:
        given.steps, given.seeds, given.rounds = 20, [0], 4
    told: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="troodon-distill-") as temporary:
        home = given.out or Path(temporary)
        if "worth" in given.parts:
            print("worth")
            told += worth(home, given.seeds, given.steps, given.quick)
        if "cost" in given.parts:
            print("cost")
            told += cost(home / "cost", given.rounds, given.quick)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
