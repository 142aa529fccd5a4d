"""The objective as a list of terms: what it is in a config, what each term minimises, and what a new one takes."""

from dataclasses import replace

import pytest
import torch

from tests.test_pretrain import CONFIG
from troodon import config as c
from troodon import recipes
from troodon.config import UsageError
from troodon.learn import losses, objective, terms
from troodon.learn.config import PretrainConfig
from troodon.learn.losses import ALONE
from troodon.learn.method import Method
from troodon.learn.network import Network
from troodon.learn.objective import TERMS, ObjectiveConfig
from troodon.views.batch import Batch

DINOV2 = ObjectiveConfig().terms
VISIBLE = ObjectiveConfig(terms=(("dino", 1.0), ("ibot", 1.0), ("ibot_visible", 0.5), ("koleo", 0.1)))


def method(config: ObjectiveConfig) -> Method:
    torch.manual_seed(0)
    student, ema = (Network(CONFIG.vit, CONFIG.dino_head, CONFIG.ibot_head) for _ in range(2))
    student.initialize()
    ema.load_state_dict(student.state_dict())
    return Method(config, student, ema)


def batch(images: int = 4) -> Batch:
    random = torch.Generator().manual_seed(0)
    side, patches = CONFIG.crops.global_px, (CONFIG.crops.global_px // CONFIG.vit.patch) ** 2
    masks = torch.rand(2 * images, patches, generator=random) < 0.4
    masks[:images] = False  # half of the crops have no mask
    crops = [torch.randn(v, images, 3, px, px, generator=random) for v, px in ((2, side), (2, CONFIG.crops.local_px))]
    return Batch(*crops, masks)


def test_every_term_has_a_line_in_the_table_and_a_function():
    assert list(TERMS) == list(terms.FUNCTIONS)


@pytest.mark.parametrize("term", TERMS)
def test_patches_are_computed_only_for_terms_that_need_them(term):
    classes = ("dino", "koleo", "kde", "contrast", "cls_features")
    assert ObjectiveConfig(terms=(("dino", 1.0), (term, 2.0))[term == "dino" :]).patches is (term not in classes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((("dnio", 1.0),), "'dnio': did you mean 'dino'"),
        ((("dino", 1.0), ("dino", 2.0)), "dino is there twice"),
        ((("dino", 0.0),), "dino 0: must be above 0"),
        ((("dino", float("nan")),), "dino nan: must be above 0"),
        ((), r"\(none\): nothing to learn from"),
        ((("koleo", 1.0), ("gram", 1.0)), "koleo gram: nothing to learn from"),
    ],
)
def test_a_wrong_list_is_refused_by_name(wrong, message):
    with pytest.raises(UsageError, match=message):
        ObjectiveConfig(terms=wrong)


def test_recorded_configs_of_earlier_versions_load_with_a_note(capsys):
    earlier = {
        "objective": {
            "targets": "sinkhorn", "dino_weight": 1.0, "ibot_weight": 0.3, "koleo_weight": 0.03, "koleo_group": 0,
            "contrast_weight": 0.0, "gram_weight": 0.0, "cls_weight": 0.0, "patch_weight": 0.0,
        },
        "schedules": {"momentum": {"peak": 0.9, "end": 1.0, "warmup": 0, "start": 0.0, "shape": "cosine"}},
    }  # fmt: skip
    config = c.from_dict(recipes.pretrain("small_dino"), earlier, source="old.yaml")
    assert config == recipes.pretrain("small_dino")
    notes = capsys.readouterr().err
    assert "old.yaml" in notes
    assert "--objective.terms dino 1.0 ibot 0.3 koleo 0.03" in notes
    assert "--schedules.momentum as --schedules.ema-momentum" in notes
    features = {
        "objective": {"dino_weight": 0, "ibot_weight": 0, "koleo_weight": 0, "cls_weight": 1, "patch_weight": 0.5}
    }
    loaded = c.from_dict(PretrainConfig(), features, source="old.yaml").objective
    assert loaded.terms == (("cls_features", 1.0), ("patch_features", 0.5))


def test_an_earlier_option_changes_one_weight_and_keeps_the_others():
    small = recipes.pretrain("small_dino")
    parsed = c.parse(PretrainConfig, ["--objective.koleo-weight", "0.5", "--steps=7"], prog="x", default=small)
    assert parsed.objective.terms == (("dino", 1.0), ("ibot", 0.3), ("koleo", 0.5))
    assert parsed.steps == 7
    with pytest.raises(UsageError, match=r"--objective.koleo-weight and --objective.terms say the same"):
        c.parse(
            PretrainConfig, ["--objective.koleo-weight", "1", "--objective.terms", "dino", "1"], prog="x", default=small
        )
    with pytest.raises(UsageError, match="much"):
        c.parse(PretrainConfig, ["--objective.koleo-weight", "much"], prog="x", default=small)


def test_ibot_on_visible_patches_is_what_it_says():
    """iBOT++ by its definition: full matrices, every patch of the global crops, the mean over each crop's patches."""
    made, seen, scheduled = method(VISIBLE), batch(), CONFIG.schedules.at(1, 6)
    (targets,) = made.targets([seen], scheduled)
    found = made.losses(seen, targets)
    assert list(found) == ["dino_global", "dino_local", "ibot", "ibot_visible", "koleo"]

    crops = seen.globals_GBCHW.flatten(0, 1)
    (teacher,) = made.ema.backbone([crops])
    (student,) = made.student.backbone([crops], [seen.masks_NP])
    target = losses.sinkhorn(
        made.ema.ibot_head(teacher.patches_BPD.flatten(0, 1)).logits(), scheduled.teacher_temperature, ALONE
    )
    logits = made.student.ibot_head(student.patches_BPD.flatten(0, 1)).logits()
    pairs_NP = losses.cross_entropies(logits[None], target[None], 0.1)[0, 0].view(seen.masks_NP.shape)
    for name, mask, weight in (("ibot", seen.masks_NP, 1.0), ("ibot_visible", ~seen.masks_NP, 0.5)):
        by_crop = [pairs[m].mean() if m.any() else torch.tensor(0.0) for pairs, m in zip(pairs_NP, mask, strict=True)]
        assert found[name].item() == pytest.approx(weight * torch.stack(by_crop).mean().item(), rel=1e-5), name

    found["ibot_visible"].backward()
    assert made.student.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
    assert made.student.ibot_head.last_layer.weight_v.grad.abs().sum() > 0


def test_without_masks_visible_patches_are_all_patches():
    made, seen, scheduled = method(VISIBLE), replace_masks(batch(), False), CONFIG.schedules.at(1, 6)
    (targets,) = made.targets([seen], scheduled)
    found = made.losses(seen, targets)
    assert found["ibot"] == 0
    assert found["ibot_visible"] > 0


def replace_masks(seen: Batch, value: bool) -> Batch:
    return Batch(seen.globals_GBCHW, seen.locals_VBCHW, torch.full_like(seen.masks_NP, value))


def test_terms_are_recorded_in_the_order_and_with_the_weights_of_the_list():
    scheduled, seen = CONFIG.schedules.at(1, 6), batch()
    one = method(ObjectiveConfig(terms=(("koleo", 0.1), ("dino", 1.0))))
    two = method(ObjectiveConfig(terms=(("koleo", 0.3), ("dino", 2.0))))
    first, second = (m.losses(seen, m.targets([seen], scheduled)[0]) for m in (one, two))
    assert list(first) == ["koleo", "dino_global", "dino_local"]
    for name, factor in (("koleo", 3), ("dino_global", 2), ("dino_local", 2)):
        assert second[name].item() == pytest.approx(factor * first[name].item(), rel=1e-6)


def test_a_new_term_is_a_function_and_a_line_in_the_table(monkeypatch):
    def length(comparison):
        return {"length": comparison.student.cls_GBD.float().square().mean()}

    monkeypatch.setattr(objective, "TERMS", {**TERMS, "length": ()})
    monkeypatch.setitem(terms.FUNCTIONS, "length", length)
    config = replace(CONFIG, objective=ObjectiveConfig(terms=(*DINOV2, ("length", 0.5))))
    assert c.from_dict(CONFIG, c.to_dict(config), source="x").objective.weight("length") == 0.5
    made, seen = method(config.objective), batch()
    found = made.losses(seen, made.targets([seen], CONFIG.schedules.at(1, 6))[0])
    (tokens,) = made.student.backbone([seen.globals_GBCHW.flatten(0, 1)], [seen.masks_NP])
    assert found["length"].item() == pytest.approx(0.5 * tokens.cls_BD.square().mean().item(), rel=1e-5)
