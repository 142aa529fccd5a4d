"""What a plan says a run will take, against what a step then takes: numbers of parameters, products, memory."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from benchmarks.measure import peak_memory
from torch.utils.flop_counter import FlopCounterMode

from troodon import recipes, verbs
from troodon.config import UsageError
from troodon.dist import Share
from troodon.learn import cost, optim, prototypes
from troodon.learn.clock import Clock
from troodon.learn.config import ObjectiveConfig, ParallelConfig, PretrainConfig
from troodon.learn.loop import Learner, train
from troodon.learn.method import Method
from troodon.learn.parallel import build, build_anchor, empty, first_weights
from troodon.learn.plan import plan, timed, total
from troodon.model.config import HeadConfig, ViTConfig
from troodon.text import with_prefix
from troodon.views.batch import Batch
from troodon.views.config import CropsConfig, MasksConfig

CPU = torch.device("cpu")
BASE = PretrainConfig(
    vit=ViTConfig(dim=128, depth=4, heads=2, patch=8, grid=8),
    dino_head=HeadConfig(1024, 512, 128),
    ibot_head=HeadConfig(1024, 512, 128),
    crops=CropsConfig(global_px=64, local_px=32, locals=4),
    batch=8,
    steps=100,
)
LARGE_HEADS = HeadConfig(8192, 512, 256)
CONFIGS = {
    "plain": BASE,
    "stochastic depth": replace(BASE, vit=replace(BASE.vit, drop_path=0.3)),
    "selective": replace(BASE, parallel=ParallelConfig(recompute="selective")),
    "full": replace(BASE, parallel=ParallelConfig(recompute="full")),
    "full, stochastic depth": replace(
        BASE, parallel=ParallelConfig(recompute="full"), vit=replace(BASE.vit, drop_path=0.3)
    ),
    "accumulate": replace(
        BASE, parallel=ParallelConfig(accumulate=2), objective=ObjectiveConfig(koleo_group=4), batch=16
    ),
    "swiglu, registers": replace(BASE, vit=replace(BASE.vit, mlp="swiglu", registers=4)),
    "gram": replace(BASE, objective=ObjectiveConfig(terms=(*ObjectiveConfig().terms, ("gram", 1.0)))),
    "contrast": replace(
        BASE,
        objective=ObjectiveConfig(terms=(("koleo", 0.1), ("contrast", 1.0))),
        masks=MasksConfig(share=0.0),
        crops=replace(BASE.crops, locals=0),
        batch=64,
    ),
    "centring, one head": replace(BASE, objective=ObjectiveConfig(targets="centring", heads="shared")),
    "large heads": replace(BASE, dino_head=LARGE_HEADS, ibot_head=LARGE_HEADS, batch=4),
    "long, not square": replace(
        BASE,
        vit=replace(BASE.vit, grid=28),
        crops=CropsConfig(global_px=(192, 224), local_px=(96, 64), locals=2),
        batch=2,
    ),
}


def batch(config: PretrainConfig) -> Batch:
    """One of which as many patches are masked as in the mean."""
    ((wide, narrow, _),), (images, channels) = config.crops.sizes(), (config.batch, config.vit.channels)
    masks = torch.zeros(2 * images, (wide[0] // config.vit.patch) * (wide[1] // config.vit.patch), dtype=torch.bool)
    masked = round(masks.shape[1] * sum(config.masks.ratio) / 2)
    masks[: int(len(masks) * config.masks.share), :masked] = True
    crops = torch.randn(2, images, channels, *wide), torch.randn(config.crops.locals, images, channels, *narrow)
    return Batch(*crops, masks, share=Share(0, 0, images, range(images)))


def method_of(config: PretrainConfig, compute: torch.dtype) -> Method:
    weights = first_weights(config, None, None)
    student, average = (build(config, weights, CPU, compute) for _ in range(2))
    anchor = build_anchor(config, weights, CPU, compute) if config.objective.weight("gram") else None
    return Method(config.objective, student, average, anchor=anchor, compute=compute)


def take_steps(config: PretrainConfig, compute: torch.dtype, steps: int) -> None:
    method, seen = method_of(config, compute), batch(config)
    optimizer = optim.adamw(method.student, config.vit.depth, config.optim)
    learner = Learner(method, optimizer, config.schedules, config.optim, after_step=lambda *_: None)
    train(
        [learner], iter([seen] * steps), first_step=config.steps - steps, clock=Clock(config),
        accumulate=config.parallel.accumulate, stop_requested=lambda: False,
    )  # fmt: skip


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_memory_is_that_of_the_tensors_of_a_step(name, compute):
    peak = peak_memory(lambda: take_steps(CONFIGS[name], compute, 2))
    assert total(plan(CONFIGS[name], None, "cpu", compute.itemsize, 1).memory) == pytest.approx(peak, rel=0.07)


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("long")])
def test_products_are_those_of_a_step(name):
    config = CONFIGS[name]
    with FlopCounterMode(display=False) as counter:
        take_steps(config, torch.bfloat16, 1)  # in which attention of short crops is products, that the counter sees
    assert total(plan(config, None, "cpu", 2, 1).flops) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("targets", ["sinkhorn", "centring"])
def test_logits_that_are_made_again_are_counted(targets, monkeypatch):
    for module in (cost, prototypes):
        monkeypatch.setattr(module, "CACHED", 0)
    config = replace(CONFIGS["large heads"], objective=ObjectiveConfig(targets=targets))
    peak = peak_memory(lambda: take_steps(config, torch.float32, 2))
    assert total(plan(config, None, "cpu", 4, 1).memory) == pytest.approx(peak, rel=0.07)
    with FlopCounterMode(display=False) as counter:
        take_steps(config, torch.bfloat16, 1)
    flops = plan(config, None, "cpu", 2, 1).flops
    assert total(flops) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert flops["recomputed"] > 0


@pytest.mark.parametrize("recipe", ["vitl16_short", "vitl14", "vitg14", "vits14_reg", "small", "demo"])
def test_parameters_are_those_of_the_student(recipe):
    config = recipes.pretrain(recipe)
    made, said = empty(config), plan(config, None, "cuda", 2, 8).parameters
    assert total(said) == sum(p.numel() for p in made.parameters())
    assert said["backbone"] == sum(p.numel() for p in made.backbone.parameters())


def test_ranks_share_state_and_images():
    one, eight = (plan(recipes.pretrain("vitl14"), None, "cuda", 2, ranks) for ranks in (1, 8))
    assert total(eight.state) == pytest.approx(total(one.state) / 8, rel=1e-6)
    assert (eight.tokens, total(eight.flops)) == (one.tokens, pytest.approx(total(one.flops), rel=0.01))
    assert eight.memory["blocks"] == pytest.approx(one.memory["blocks"] / 8, rel=0.01)


def test_time_follows_from_images_a_second():
    config = recipes.pretrain("vitl14")
    told = plan(config, 1_000_000, "cuda", 2, 8, images_per_second=1000.0)
    assert told.seconds == config.steps * config.batch / 1000
    assert "at 1,000 images/s" in told.render()
    assert "give --images-per-second" in plan(config, None, "cuda", 2, 8).render()
    assert timed(plan(BASE, None, "cpu", 4, 1), CPU, torch.float32).seconds > 0


def test_a_dry_run_of_any_recipe_needs_neither_images_nor_torch():
    script = (
        "import sys; from troodon import recipes, verbs\n"
        "for name in ('vitg14', 'vitl14', 'vitl16_short', 'vits14_reg', 'small', 'demo'):\n"
        "    verbs.pretrain(name, dry_run=True, devices=32)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("32 x cuda, bf16") == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "devices '0': a number or auto"),
        ({"devices": 3}, "batch 64 does not divide over 3 devices: set batch 63, or devices 2"),
        ({"images_per_second": 0.0}, "images_per_second 0.0: is above 0"),
        ({"images_per_second": float("nan")}, "images_per_second nan: is above 0"),
        ({"images_per_second": 5.0, "dry_run": False}, "images_per_second 5.0: is above 0, and for a dry run"),
        ({"settings": {"crops": {"global_px": 30}}}, "crops.global_px 30 does not divide"),
        ({"dry_run": False}, "no --data and no --out; or give --dry-run"),
    ],
)
def test_mistakes_in_a_dry_run(changes, message):
    with pytest.raises(UsageError, match=message):
        verbs.pretrain("small", **({"dry_run": True} | changes))


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 "), (999.4, "999 "), (999.6, "1k"), (12_345, "12.3k"), (3e15, "3P")]
)
def test_numbers_for_people(number, text):
    assert with_prefix(number) == text
