"""The reference recipes, number for number, against a table of the paper's appendix and the release."""

import pytest

from troodon import recipes
from troodon.learn.parallel import empty

TABLE = {
    "vitl16_short": {
        "vit": {"dim": 1024, "depth": 24, "heads": 16, "patch": 16, "mlp": "gelu", "drop_path": 0.3,
                "layer_scale": 1e-5},
        "heads": ("shared", 65_536, 256, 65_536, 256), "targets": "centring", "local_px": 96, "batch": 2048,
        "lr": 5.657e-3, "steps": 125_000, "warmup": 12_500, "decay": (0.04, 0.4), "momentum": 0.992, "layer_decay": 0.9,
        "millions": 303,
    },
    "vitl14": {
        "vit": {"dim": 1024, "depth": 24, "heads": 16, "patch": 14, "mlp": "swiglu", "drop_path": 0.4,
                "layer_scale": 1e-5},
        "heads": ("separate", 131_072, 384, 131_072, 256), "targets": "sinkhorn", "local_px": 98, "batch": 3072,
        "lr": 3.464e-4, "steps": 625_000, "warmup": 100_000, "decay": (0.04, 0.2), "momentum": 0.994,
        "layer_decay": 1.0,
        "millions": 303,
    },
    "vitg14": {
        "vit": {"dim": 1536, "depth": 40, "heads": 24, "patch": 14, "mlp": "swiglu", "drop_path": 0.4,
                "layer_scale": 1e-5},
        "heads": ("separate", 131_072, 384, 131_072, 256), "targets": "sinkhorn", "local_px": 98, "batch": 3072,
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
    assert (o.targets, o.dino_weight, o.ibot_weight, o.koleo_weight) == (t["targets"], 1.0, 1.0, 0.1)
    assert o.student_temperature == 0.1
    assert (c.crops.global_px, c.crops.local_px, c.crops.locals) == (224, t["local_px"], 8)
    assert (c.crops.global_scale, c.crops.local_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert (c.masks.share, c.masks.ratio) == (0.5, (0.1, 0.5))
    assert (c.batch, c.steps) == (t["batch"], t["steps"])
    s = c.schedules
    assert (s.lr.start, s.lr.peak, s.lr.end, s.lr.warmup) == (0.0, t["lr"], 1e-6, t["warmup"])
    assert (s.weight_decay.peak, s.weight_decay.end) == t["decay"]
    assert (s.momentum.peak, s.momentum.end) == (t["momentum"], 1.0)
    temperature = s.teacher_temperature
    assert (temperature.start, temperature.peak, temperature.end, temperature.warmup) == (0.04, 0.07, 0.07, 37_500)
    assert s.last_layer_frozen == 1_250
    assert c.optim.betas == (0.9, 0.999)
    assert (c.optim.clip, c.optim.layer_decay, c.optim.patch_embed) == (3.0, t["layer_decay"], 0.2)
    assert c.photometric.blur == (0.0, 0.9, 0.5)


@pytest.mark.parametrize("name", recipes.KNOWN["pretrain"])
def test_every_recipe_builds_on_the_meta_device(name):
    branch = empty(recipes.pretrain(name))
    millions = sum(p.numel() for p in branch.backbone.parameters()) / 1e6
    if name in TABLE:
        assert millions == pytest.approx(TABLE[name]["millions"], rel=0.01)
    else:
        assert 0.1 < millions < 10
