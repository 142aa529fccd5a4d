"""The reference recipes, number for number, against a table of the paper's appendix and the release."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from troodon import recipes
from troodon.config import UsageError
from troodon.images.sources import open_source
from troodon.learn.config import PretrainConfig, fits
from troodon.learn.parallel import empty
from troodon.learn.pretrain import pretrain
from troodon.recipes.lengths import for_steps
from troodon.run import MetricsFile
from troodon.views.attacks import random_attack

TABLE = {
    "vitl16_short": {
        "vit": {"dim": 1024, "depth": 24, "heads": 16, "patch": 16, "mlp": "gelu", "drop_path": 0.3,
                "layer_scale": 1e-5},
        "heads": ("shared", 65_536, 256, 65_536, 256), "targets": "centring", "local_px": 96, "batch": 2048,
        "koleo_group": 64,
        "lr": 5.657e-3, "steps": 125_000, "warmup": 12_500, "decay": (0.04, 0.4), "momentum": 0.992, "layer_decay": 0.9,
        "millions": 303,
    },
    "vitl14": {
        "vit": {"dim": 1024, "depth": 24, "heads": 16, "patch": 14, "mlp": "swiglu", "drop_path": 0.4,
                "layer_scale": 1e-5},
        "heads": ("separate", 131_072, 384, 131_072, 256), "targets": "sinkhorn", "local_px": 98, "batch": 3072,
        "koleo_group": 32,
        "lr": 3.464e-4, "steps": 625_000, "warmup": 100_000, "decay": (0.04, 0.2), "momentum": 0.994,
        "layer_decay": 1.0,
        "millions": 303,
    },
    "vitg14": {
        "vit": {"dim": 1536, "depth": 40, "heads": 24, "patch": 14, "mlp": "swiglu", "drop_path": 0.4,
                "layer_scale": 1e-5},
        "heads": ("separate", 131_072, 384, 131_072, 256), "targets": "sinkhorn", "local_px": 98, "batch": 3072,
        "koleo_group": 32,
        "lr": 3.464e-4, "steps": 625_000, "warmup": 100_000, "decay": (0.04, 0.2), "momentum": 0.994,
        "layer_decay": 1.0,
        "millions": 1135,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_released_recipe_has_the_released_numbers(name):
    t, c = TABLE[name], recipes.pretrain(name)
    assert {k: getattr(c.vit, k) for k in t["vit"]} == t["vit"]
    ours = (c.objective.heads, c.dino_head.prototypes, c.dino_head.bottleneck, c.ibot_head.prototypes,
            c.ibot_head.bottleneck)  # fmt: skip
    assert ours == t["heads"]
    assert {(h.hidden, h.layers) for h in (c.dino_head, c.ibot_head)} == {(2048, 3)}
    o = c.objective
    assert (o.targets, o.terms) == (t["targets"], (("dino", 1.0), ("ibot", 1.0), ("koleo", 0.1)))
    assert o.student_temperature == 0.1
    assert (c.crops.global_px, c.crops.local_px, c.crops.locals) == (224, t["local_px"], 8)
    assert (c.crops.global_scale, c.crops.local_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert (c.masks.share, c.masks.ratio) == (0.5, (0.1, 0.5))
    assert (c.batch, c.steps) == (t["batch"], t["steps"])
    assert o.koleo_group == t["koleo_group"]
    s = c.schedules
    assert (s.lr.start, s.lr.peak, s.lr.end, s.lr.warmup) == (0.0, t["lr"], 1e-6, t["warmup"])
    assert (s.weight_decay.peak, s.weight_decay.end) == t["decay"]
    assert (s.ema_momentum.peak, s.ema_momentum.end) == (t["momentum"], 1.0)
    temperature = s.teacher_temperature
    assert (temperature.start, temperature.peak, temperature.end, temperature.warmup) == (0.04, 0.07, 0.07, 37_500)
    assert s.last_layer_frozen == 1_250
    assert c.optim.betas == (0.9, 0.999)
    assert (c.optim.clip, c.optim.layer_decay, c.optim.patch_embed) == (3.0, t["layer_decay"], 0.2)
    assert c.photometric.blurs == (0.0, 0.9, 0.5)


SIZES = {  # channels, blocks, attention heads, millions of parameters
    "s": (384, 12, 6, 22), "b": (768, 12, 12, 86), "l": (1024, 24, 16, 303), "g": (1536, 40, 24, 1135),
}  # fmt: skip


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_with_and_without_registers(size, registers):
    config = recipes.pretrain(f"vit{size}14{'_reg' if registers else ''}")
    dim, depth, heads, millions = SIZES[size]
    vit = config.vit
    assert (vit.dim, vit.depth, vit.heads, vit.registers, vit.patch) == (dim, depth, heads, registers, 14)
    assert (vit.position_offset, vit.position_antialias) == ((0.0, True) if registers else (0.1, False))
    assert sum(p.numel() for p in empty(config).backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


START = replace(recipes.pretrain("vitl14"), reuse="whole")


def test_high_resolution_compresses_the_schedules_of_the_run():
    c = recipes.pretrain("high_resolution", lambda: START)
    assert (c.vit.grid, c.crops.global_px, c.crops.local_px) == (37, 518, 224)
    assert (c.steps, c.reuse, c.batch) == (10_000, "whole", 3072)
    s = c.schedules
    assert (s.lr.warmup, s.teacher_temperature.warmup, s.last_layer_frozen) == (1600, 600, 20)
    assert (s.lr.peak, s.backbone_frozen) == (pytest.approx(3.464e-5), 0)
    alone = recipes.pretrain("high_resolution", lambda: PretrainConfig(vit=START.vit))
    assert (alone.reuse, alone.schedules.backbone_frozen) == ("backbone", 1000)


@pytest.mark.parametrize("name", ["small", "demo", "small_dino", "demo_dino"])
def test_a_student_has_a_quarter_of_the_parameters_of_its_teacher(name):
    teacher, student = (
        sum(p.numel() for p in empty(config).backbone.parameters())
        for config in (recipes.pretrain(name), recipes.distill(f"distill_{name}"))
    )
    assert 0.23 < student / teacher < 0.28


def test_adapt_warms_up_new_heads_on_a_frozen_backbone():
    c = recipes.pretrain("adapt", lambda: START)
    assert replace(c.vit, drop_path=START.vit.drop_path) == START.vit
    assert c.reuse == "backbone"
    assert c.schedules.at(c.schedules.backbone_frozen - 1, c.steps).backbone_frozen
    assert not c.schedules.at(c.schedules.backbone_frozen, c.steps).backbone_frozen
    assert 0 < c.schedules.backbone_frozen < c.schedules.lr.warmup
    assert c.optim.layer_decay < 1


@pytest.mark.parametrize("name", ["adapt", "high_resolution"])
def test_a_recipe_that_goes_on_needs_weights(name):
    with pytest.raises(UsageError, match=f"recipe {name} goes on from weights: give them as --init"):
        recipes.pretrain(name)


def toy(config: PretrainConfig) -> PretrainConfig:
    """The same recipe on a network, crops and heads that two steps of a processor can bear."""
    vit = replace(config.vit, dim=32, depth=2, heads=2, patch=4, grid=4)
    config = replace(
        config,
        vit=vit,
        dino_head=replace(config.dino_head, prototypes=48, hidden=32, bottleneck=16),
        ibot_head=replace(config.ibot_head, prototypes=40, hidden=32, bottleneck=16),
        objective=replace(config.objective, koleo_group=min(config.objective.koleo_group, 4)),
        crops=replace(config.crops, global_px=16, local_px=8),
        batch=8,
        threads=1,
    )
    return for_steps(config, 2)


@pytest.mark.parametrize("name", recipes.KNOWN["pretrain"])
def test_every_recipe_builds_and_takes_two_steps(name, tmp_path):
    config = recipes.pretrain(name, lambda: START)
    fits(config, 1)
    branch = empty(config)  # at its true size, on the meta device
    if config.objective.weight("dino"):
        assert branch.dino_head.last_layer.weight_v.shape == (config.dino_head.prototypes, config.dino_head.bottleneck)
    else:
        projector = ["projector"] if config.objective.projector else []
        assert [name for name, _ in branch.named_children()] == ["backbone", *projector]
    random = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(random.integers(0, 255, (24, 20, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    pretrain(toy(config), open_source(tmp_path), tmp_path / "run", attack=random_attack)
    loss = [r["loss"] for r in MetricsFile(tmp_path / "run" / "metrics.jsonl").read() if "loss" in r]
    assert loss
    assert all(math.isfinite(value) for value in loss)
