"""A training step of any recipe at any size: images a second, share of the peak, memory, and time by part.

    python benchmarks/step.py [--quick] [--recipe vitl16_short] [--size small] [--images 8] [--drop-path 0.3]
                              [--compute auto] [--compile] [--rounds 5] [--against usual | nothing]

On one device, on random images that are there already. `rival` is the same network and objective written the usual way
(benchmarks/usual.py). The share of the peak (MFU) is of the network's own products, as `--dry-run` counts them, without
those that are made again; the peak is that of the device's data sheet, or of one large product where none is known.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from measure import device, finish, line, peak_memory, seconds, settle
from troodon import dist, recipes
from troodon.learn import optim
from troodon.learn.config import ParallelConfig, PretrainConfig
from troodon.learn.loop import Learner, train
from troodon.learn.method import Method
from troodon.learn.parallel import build, first_weights
from troodon.learn.plan import people, plan, product_rate, total
from troodon.model.config import BASE, GIANT, LARGE, SMALL, ViTConfig
from troodon.views.batch import Batch
from usual import UsualMethod

SIZES = {"small": SMALL, "base": BASE, "large": LARGE, "giant": GIANT}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, by the data sheets


class Step:
    """A method with its optimiser, that can take one step after another on the same images."""

    def __init__(self, config: PretrainConfig, kind: type[Method], compute: torch.dtype):
        weights = first_weights(config, None, None)
        student, average = (build(config, weights, device(), compute) for _ in range(2))
        self.config, self.method = config, kind(config.objective, student, average, compute=compute)
        self.optimizer = optim.adamw(student, config.vit.depth, config.optim)
        self.batch, self.step, self.terms = images(config), config.steps // 2, {}

    def __call__(self) -> None:
        """The loop itself, for one step."""
        learner = Learner(self.method, self.optimizer, self.config.schedules, self.config.optim, self._note)
        train(
            [learner], iter([self.batch]), first_step=self.step, steps=self.config.steps,
            accumulate=self.config.parallel.accumulate, seed=0, rank=0, asked_to_stop=lambda: True,
        )  # fmt: skip

    def _note(self, step: int, batch: Batch, terms: dict) -> None:
        self.step, self.terms = step + 1, terms

    def by_part(self) -> dict[str, float]:
        """Seconds of each part of one step, each waited for: together they take a little longer than a step."""
        method, knobs, taken = self.method, self.config.schedules.at(self.step, self.config.steps), {}

        def timed(name: str, part: Callable):
            settle()
            start = time.perf_counter()
            found = part()
            settle()
            taken[name] = time.perf_counter() - start
            return found

        (targets,) = timed("teacher, targets", lambda: method.targets([self.batch], knobs))
        terms = timed("student, losses", lambda: method.losses(self.batch, targets, knobs))
        timed("backward", torch.stack([*terms.values()]).sum().backward)
        timed("clip", lambda: optim.clip(method.student, self.config.optim))
        timed("optimiser", self.optimizer.step)
        self.optimizer.zero_grad()
        timed("average", lambda: method.after_step(knobs))
        return taken


def images(config: PretrainConfig) -> Batch:
    """Noise, of which as many patches are masked as on average."""
    torch.manual_seed(0)
    wide, narrow, _ = config.crops.sizes()[0]
    count, patch, channels = config.batch, config.vit.patch, config.vit.channels
    masks_NP = torch.zeros(2 * count, wide[0] // patch * (wide[1] // patch), dtype=torch.bool)
    crops = round(len(masks_NP) * config.masks.share)
    masks_NP[:crops, : round(masks_NP.shape[1] * sum(config.masks.ratio) / 2)] = True
    views = torch.randn(2, count, channels, *wide), torch.randn(config.crops.locals, count, channels, *narrow)
    return Batch(*(x.to(device()) for x in views), masks_NP)


def asked_for(recipe: str, size: str | None, images: int, drop_path: float | None, compile: bool) -> PretrainConfig:
    config = recipes.pretrain(recipe)
    vit: ViTConfig = config.vit
    if size is not None:
        like = SIZES[size]
        vit = replace(vit, dim=like.dim, depth=like.depth, heads=like.heads, mlp=like.mlp)
    vit = vit if drop_path is None else replace(vit, drop_path=drop_path)
    parallel = ParallelConfig(compile=compile)
    return replace(config, vit=vit, batch=images, parallel=parallel,
                   objective=replace(config.objective, koleo_group=0))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 images, 2 rounds")
    parser.add_argument("--recipe", default="vitl16_short", help="crops, heads, objective, optimiser")
    parser.add_argument("--size", choices=[*SIZES], default="small", help="in place of the recipe's network")
    parser.add_argument("--own-size", action="store_true", help="the recipe's own network")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--drop-path", type=float, help="in place of the recipe's")
    parser.add_argument("--compute", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--compile", action="store_true", help="ours only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", choices=["usual", "nothing"], default="usual")
    asked = parser.parse_args()
    count, rounds = (2, 2) if asked.quick else (asked.images, asked.rounds)
    size = None if asked.own_size else asked.size
    config = asked_for(asked.recipe, size, count, asked.drop_path, asked.compile)
    compute = dist.compute_dtype(asked.compute, device())

    kinds = {"ours": Method} | ({"usual": UsualMethod} if asked.against == "usual" else {})
    sides = {name: Step(config, kind, compute) for name, kind in kinds.items()}
    times = dict(zip(sides, seconds([*sides.values()], rounds), strict=True))
    peaks = {name: peak_memory(side) for name, side in sides.items()}
    lasting = sum(t.numel() * t.element_size() for side in [sides["ours"]] for t in state(side))

    planned = plan(config, None, device().type, compute.itemsize, 1)
    own = total(planned.flops) - planned.flops.get("recomputed", 0.0)
    named = [rate for name, rate in PEAKS.items() if device().type == "cuda" and name in torch.cuda.get_device_name()]
    peak = named[0] if named else product_rate(device(), compute)
    for name, side in sides.items():
        rounds_of_parts = [side.by_part() for _ in range(min(rounds, 3))]
        parts = {part: statistics.median(r[part] for r in rounds_of_parts) for part in rounds_of_parts[0]}
        said = ", ".join(f"{part} {took:.3g}" for part, took in parts.items())
        print(
            f"{name}: {count / times[name]:.3g} images/s, {own / times[name] / peak:.1%} of {people(peak)}FLOP/s, "
            f"{people(peaks[name])}B above {people(lasting)}B of weights and state; seconds: {said}",
            file=sys.stderr,
        )
    settings = {
        "recipe": asked.recipe, "size": size or "own", "images": count, "drop_path": config.vit.drop_path,
        "compute": str(compute)[6:], "compile": asked.compile, "against": asked.against,
        "images_per_second": count / times["ours"], "mfu": own / times["ours"] / peak, "peak_flops": peak,
        "state_bytes": lasting,
    }  # fmt: skip
    if asked.against == "nothing":
        print(json.dumps([{"name": "step_time", "ours": times["ours"], "rival": None, "ratio": None, "unit": "s",
                           "settings": settings}]))  # fmt: skip
        return
    finish([
        line("step_time", times["ours"], times["usual"], "s", **settings),
        line("step_peak_memory", lasting + peaks["ours"], lasting + peaks["usual"], "bytes", **settings),
    ])  # fmt: skip


def state(side: Step) -> list[torch.Tensor]:
    """What lasts between steps: weights of both networks, moments."""
    networks = [*side.method.student.parameters(), *side.method.average.parameters()]
    return [*networks, *(t for s in side.optimizer.state.values() for t in s.values() if torch.is_tensor(t))]


if __name__ == "__main__":
    main()
