"""Parts of gpu.py that are no benchmark of their own: does each recipe run, and how fast is a run that reads files.

    python benchmarks/gpu_parts.py runs      # three tiny steps of each recipe, compiled or not, each recomputation
    python benchmarks/gpu_parts.py fed       # a real run from JPEGs, with threads and with processes
    python benchmarks/gpu_parts.py learning  # small_data.py on a few drawn pictures: a toy

`runs` takes the recipes' settings with small networks, and compares the first losses with those of a CPU in fp32. Steps
after the first run under torch.cuda.set_sync_debug_mode("error"): there, only the guard's verdict waits, by an event. A
run that fails is a row whose `ours` is null, with the error, and the next one runs.
"""

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from loader import photo
from measure import device, result, synchronize
from step import random_batch
from troodon import recipes
from troodon.dist import Share
from troodon.learn import optim
from troodon.learn.clock import Clock
from troodon.learn.config import ParallelConfig, PretrainConfig
from troodon.learn.frozen import FrozenNetwork
from troodon.learn.loop import Learner, train
from troodon.learn.method import Method
from troodon.learn.objective import ANCHOR
from troodon.learn.parallel import build, build_anchor, first_weights
from troodon.model.config import HeadConfig
from troodon.views.batch import Batch

HERE = Path(__file__).parent
HEAD = HeadConfig(prototypes=4096, hidden=128, bottleneck=64)
IMAGES = 12  # one whole group of stochastic depth: shapes stay


def tiny(config: PretrainConfig) -> PretrainConfig:
    """A recipe's settings, with two narrow blocks, small heads and few, small crops."""
    patch = config.vit.patch
    vit = replace(config.vit, dim=128, depth=2, heads=2, grid=4)
    crops = replace(config.crops, global_px=4 * patch, local_px=2 * patch, locals=2)
    objective = replace(config.objective, koleo_group=0)
    return replace(config, vit=vit, crops=crops, dino_head=HEAD, ibot_head=HEAD, objective=objective, batch=IMAGES)


def tiny_recipes() -> dict[str, tuple[PretrainConfig, PretrainConfig | None]]:
    """By name: the config, and that of a frozen teacher."""
    vitl14 = recipes.pretrain("vitl14")
    gram = replace(vitl14.objective, terms=(*vitl14.objective.terms, ("gram", 1.0)))
    configs = {
        "vitl16_short": recipes.pretrain("vitl16_short"),
        "vitl14": vitl14,
        "heads": recipes.pretrain("heads", start=lambda: vitl14),
        "gram": replace(vitl14, objective=gram),
    }
    student, teacher = tiny(recipes.distill("distill_vitl14")), tiny(recipes.pretrain("vitg14"))
    return {name: (tiny(config), None) for name, config in configs.items()} | {"distill": (student, teacher)}


class Tiny:
    """A method with its optimiser on a device, which takes steps on one batch."""

    def __init__(
        self, config: PretrainConfig, teacher: PretrainConfig | None, where: torch.device, compute: torch.dtype
    ):
        self.config, weights = config, first_weights(config, None, None)
        student, ema = (build(config, weights, where, compute) for _ in range(2))
        frozen = []
        if teacher is not None:
            teacher = replace(teacher, vit=replace(teacher.vit, drop_path=0.0))
            network = build(teacher, first_weights(teacher, None, None), where, compute)
            frozen = [FrozenNetwork("teacher", network, teacher.vit)]
            student.backbone.mask_token.requires_grad_(False)
        if config.schedules.backbone_frozen >= config.steps:
            student.backbone.requires_grad_(False)
        anchor = build_anchor(config, weights, where, compute) if ANCHOR in config.objective.needs else None
        self.method = Method(config.objective, student, ema, teachers=frozen, anchor=anchor, compute=compute)
        self.optimizer, self.step = optim.adamw(student, config.vit.depth, config.optim), config.steps // 2
        made = random_batch(config)
        crops = made.globals_GBCHW.to(where), made.locals_VBCHW.to(where)
        self.batch = Batch(*crops, made.masks_NP, share=Share(0, 0, config.batch, range(config.batch)))
        self.terms: dict[str, torch.Tensor] = {}

    def __call__(self) -> None:
        """Take one step."""
        learner = Learner(self.method, self.optimizer, self.config.schedules, self.config.optim, self._after_step)
        again = Batch(self.batch.globals_GBCHW, self.batch.locals_VBCHW, self.batch.masks_NP, share=self.batch.share)
        train(
            [learner], iter([again]), first_step=self.step, clock=Clock.of_steps(self.config.steps), accumulate=1,
            stop_requested=lambda: True,
        )  # fmt: skip

    def _after_step(self, step: int, parts: list[Batch], terms: dict[str, torch.Tensor]) -> None:
        self.step, self.terms = step + 1, terms

    def losses(self) -> dict[str, float]:
        """The terms of the last step."""
        return {name: term.item() for name, term in self.terms.items() if not name.startswith("grad_norm")}


@contextmanager
def no_waits() -> Iterator[None]:
    """On a GPU, an error where the host waits for the device."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def three_steps(name: str, compile: bool, recompute: str) -> dict:
    """One row: the seconds of the third step, and how far the first losses are from a CPU's."""
    config, teacher = tiny_recipes()[name]
    settings = {"recipe": name, "compile": compile, "recompute": recompute, "images": config.batch}
    try:
        placed = replace(config, parallel=ParallelConfig(compile="always" if compile else "never", recompute=recompute))
        ours = Tiny(placed, teacher, device(), torch.bfloat16)
        ours()
        synchronize()
        first = ours.losses()
        ours()
        with no_waits():
            start = time.perf_counter()
            ours()
        synchronize()
        seconds = time.perf_counter() - start
        plain = Tiny(config, teacher, torch.device("cpu"), torch.float32)
        plain()
        expected = plain.losses()
        settings["losses"] = {loss: [first[loss], expected[loss]] for loss in expected}
        settings["largest_difference"] = max(abs(first[loss] - expected[loss]) for loss in expected)
        return result("three_steps", seconds, None, "s", **settings)
    except Exception as error:
        settings["error"] = traceback.format_exc(limit=-4)
        print(f"{name} compile={compile} recompute={recompute}: {type(error).__name__}: {error}", file=sys.stderr)
        return {"name": "three_steps", "ours": None, "rival": None, "ratio": None, "unit": "s", "settings": settings}


def runs(gpu: bool) -> list[dict]:
    """Rows of all recipes; uncompiled first, and on a CPU uncompiled only."""
    rows = []
    for compile in (False, True) if gpu else (False,):
        for recompute in ("none", "selective", "full") if gpu else ("none",):
            rows += [three_steps(name, compile, recompute) for name in tiny_recipes()]
            print(json.dumps(rows), flush=True)  # the last line of what is done, should the time be over
    return rows


def fed(gpu: bool) -> list[dict]:
    """Images a second of real runs from JPEGs of 500 x 375: processes beside threads."""
    import troodon

    recipe = recipes.pretrain("vitl16_short") if gpu else tiny(recipes.pretrain("vitl16_short"))
    steps, files, batch = (40, 2000, 64) if gpu else (4, 24, IMAGES)
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        originals = [photo((500, 375), number) for number in range(min(files, 16))]
        for number in range(files):
            (photos / f"{number}.jpg").write_bytes(originals[number % len(originals)])
        for how, many in (("threads", {"processes": 0}), ("processes", {"processes": 8 if gpu else 1})):
            config = replace(recipe, batch=batch, steps=steps, log_every=max(1, steps // 4), probe_every=0,
                             health_every=0, checkpoint_every=steps,
                             objective=replace(recipe.objective, koleo_group=0), **many)  # fmt: skip
            out = Path(folder, how)
            troodon.pretrain(config, data=photos, out=out, devices=1)
            records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            rates[how] = [each for each in records if "images_per_second" in each][-1]
    waits = {f"data_wait_{how}": each["data_wait"] for how, each in rates.items()}
    speeds = {how: each["images_per_second"] for how, each in rates.items()}
    return [
        result("fed", speeds["processes"], speeds["threads"], "images/s", more_is_better=True, images=batch, **waits)
    ]


def learning(gpu: bool) -> list[dict]:
    """Rows of small_data.py for a second of each arm."""
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(("first", "second")):
            Path(folder, name).mkdir()
            for picture in range(12):
                Path(folder, name, f"{picture}.jpg").write_bytes(photo((32, 32), 100 * number + picture))
        command = [sys.executable, str(HERE / "small_data.py"), "--data", folder, "--cpu-seconds", "1"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    part = {"runs": runs, "fed": fed, "learning": learning}[sys.argv[1]]
    print(json.dumps(part(torch.cuda.is_available())))


if __name__ == "__main__":
    main()
