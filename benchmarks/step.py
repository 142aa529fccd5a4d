"""A training step of any recipe at any size: images a second, share of peak FLOP/s, memory, and time by part.

    python benchmarks/step.py [--quick] [--recipe vitl16_short] [--size small] [--images 8] [--drop-path 0.3]
                              [--compute auto] [--compile] [--rounds 5] [--against usual | nothing] [--record]

On one device, on random images that are already in memory. `rival` is the same network and objective written the usual
way (benchmarks/usual.py). The share of the peak (MFU) counts the network's own products, as `--dry-run` does, without
those that are recomputed; the peak is that of the device's data sheet, or the rate of one large product where none is
known.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from measure import argument_parser, device, finish, median_seconds, peak_memory, result, synchronize
from troodon import dist, recipes
from troodon.learn import optim
from troodon.learn.clock import Clock
from troodon.learn.config import ParallelConfig, PretrainConfig
from troodon.learn.loop import Learner, train
from troodon.learn.method import Method
from troodon.learn.parallel import build, first_weights
from troodon.learn.plan import plan, product_rate, total
from troodon.model.config import BASE, GIANT, LARGE, SMALL, ViTConfig
from troodon.text import with_prefix
from troodon.views.batch import Batch
from usual import UsualMethod

SIZES = {"small": SMALL, "base": BASE, "large": LARGE, "giant": GIANT}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, by the data sheets


class Step:
    """A method with its optimiser. Each call takes one more training step on the same images."""

    def __init__(self, config: PretrainConfig, kind: type[Method], compute: torch.dtype):
        weights = first_weights(config, None, None)
        student, ema = (build(config, weights, device(), compute) for _ in range(2))
        self.config, self.method = config, kind(config.objective, student, ema, compute=compute)
        self.optimizer = optim.adamw(student, config.vit.depth, config.optim)
        self.batch, self.step, self.terms = random_batch(config), config.steps // 2, {}

    def __call__(self) -> None:
        """Run the training loop for one step."""
        learner = Learner(self.method, self.optimizer, self.config.schedules, self.config.optim, self._after_step)
        train(
            [learner], iter([self.batch]), first_step=self.step, clock=Clock(self.config),
            accumulate=self.config.parallel.accumulate, stop_requested=lambda: True,
        )  # fmt: skip

    def _after_step(self, step: int, parts: list[Batch], terms: dict) -> None:
        self.step, self.terms = step + 1, terms

    def by_part(self) -> dict[str, float]:
        """Seconds of each part of one step. Each is waited for, so together they take a little longer than a step."""
        method, scheduled, seconds = self.method, self.config.schedules.at(self.step, self.config.steps), {}

        def timed(name: str, part: Callable):
            synchronize()
            start = time.perf_counter()
            output = part()
            synchronize()
            seconds[name] = time.perf_counter() - start
            return output

        (targets,) = timed("teacher, targets", lambda: method.targets([self.batch], scheduled))
        terms = timed("student, losses", lambda: method.losses(self.batch, targets))
        timed("backward", torch.stack([*terms.values()]).sum().backward)
        timed("clip", lambda: optim.clip(method.student, self.config.optim))
        timed("optimiser", self.optimizer.step)
        self.optimizer.zero_grad()
        timed("ema", lambda: method.after_step(scheduled))
        return seconds


def random_batch(config: PretrainConfig) -> Batch:
    """A batch of noise in which as many patches are masked as on average."""
    torch.manual_seed(0)
    global_size, local_size, _ = config.crops.sizes()[0]
    count, patch, channels = config.batch, config.vit.patch, config.vit.channels
    masks_NP = torch.zeros(2 * count, global_size[0] // patch * (global_size[1] // patch), dtype=torch.bool)
    crops = round(len(masks_NP) * config.masks.share)
    masks_NP[:crops, : round(masks_NP.shape[1] * sum(config.masks.ratio) / 2)] = True
    globals_GBCHW = torch.randn(2, count, channels, *global_size)
    locals_VBCHW = torch.randn(config.crops.locals, count, channels, *local_size)
    return Batch(*(x.to(device()) for x in (globals_GBCHW, locals_VBCHW)), masks_NP)


def build_config(recipe: str, size: str | None, images: int, drop_path: float | None, compile: bool) -> PretrainConfig:
    """The config of a recipe with these settings in place of its own; None keeps the recipe's."""
    config = recipes.pretrain(recipe)
    vit: ViTConfig = config.vit
    if size is not None:
        chosen = SIZES[size]
        vit = replace(vit, dim=chosen.dim, depth=chosen.depth, heads=chosen.heads, mlp=chosen.mlp)
    vit = vit if drop_path is None else replace(vit, drop_path=drop_path)
    parallel = ParallelConfig(compile="always" if compile else "never")
    return replace(config, vit=vit, batch=images, parallel=parallel,
                   objective=replace(config.objective, koleo_group=0))  # fmt: skip


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="2 images, 2 rounds")
    parser.add_argument("--recipe", default="vitl16_short", help="crops, heads, objective, optimiser")
    parser.add_argument("--size", choices=[*SIZES], default="small", help="in place of the recipe's network")
    parser.add_argument("--own-size", action="store_true", help="the recipe's own network")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--drop-path", type=float, help="in place of the recipe's")
    parser.add_argument("--compute", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--compile", action="store_true", help="compile our side only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", choices=["usual", "nothing"], default="usual")
    arguments = parser.parse_args()
    count, rounds = (2, 2) if arguments.quick else (arguments.images, arguments.rounds)
    size = None if arguments.own_size else arguments.size
    config = build_config(arguments.recipe, size, count, arguments.drop_path, arguments.compile)
    compute = dist.compute_dtype(arguments.compute, device())

    kinds = {"ours": Method} | ({"usual": UsualMethod} if arguments.against == "usual" else {})
    steps = {name: Step(config, kind, compute) for name, kind in kinds.items()}
    times = dict(zip(steps, median_seconds([*steps.values()], rounds), strict=True))
    peaks = {name: peak_memory(step) for name, step in steps.items()}
    lasting = lasting_bytes(steps["ours"])

    planned = plan(config, None, device().type, compute.itemsize, 1)
    flops = total(planned.flops) - planned.flops.get("recomputed", 0.0)
    known = [rate for name, rate in PEAKS.items() if device().type == "cuda" and name in torch.cuda.get_device_name()]
    peak = known[0] if known else product_rate(device(), compute)
    for name, step in steps.items():
        rounds_of_parts = [step.by_part() for _ in range(min(rounds, 3))]
        parts = {part: statistics.median(r[part] for r in rounds_of_parts) for part in rounds_of_parts[0]}
        by_part = ", ".join(f"{part} {seconds:.3g}" for part, seconds in parts.items())
        print(
            f"{name}: {count / times[name]:.3g} images/s, "
            f"{flops / times[name] / peak:.1%} of {with_prefix(peak)}FLOP/s, "
            f"{with_prefix(peaks[name])}B above {with_prefix(lasting)}B of weights and state; seconds: {by_part}",
            file=sys.stderr,
        )
    settings = {
        "recipe": arguments.recipe, "size": size or "own", "images": count, "drop_path": config.vit.drop_path,
        "compute": str(compute)[6:], "compile": arguments.compile, "against": arguments.against,
        "images_per_second": count / times["ours"], "mfu": flops / times["ours"] / peak, "peak_flops": peak,
        "state_bytes": lasting,
    }  # fmt: skip
    if arguments.against == "nothing":
        return finish([result("step_time", times["ours"], None, "s", **settings)], arguments)
    finish([
        result("step_time", times["ours"], times["usual"], "s", **settings),
        result("step_peak_memory", lasting + peaks["ours"], lasting + peaks["usual"], "bytes", **settings),
    ], arguments)  # fmt: skip


def lasting_bytes(step: Step) -> int:
    """Bytes of all tensors that last between steps: weights of both networks, moments."""
    networks = [*step.method.student.parameters(), *step.method.ema.parameters()]
    moments = (t for state in step.optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    return sum(t.numel() * t.element_size() for t in (*networks, *moments))


if __name__ == "__main__":
    main()
