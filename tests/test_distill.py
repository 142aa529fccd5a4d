"""A student learns what its teacher says; with others, resumed or sharded, as if it were alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.ranks import on_ranks
from tests.test_pretrain import CONFIG, records, weights
from troodon import cli, distill, launch, load, pretrain
from troodon.config import UsageError, to_yaml
from troodon.images.sources import open_source
from troodon.learn import checkpoint, losses
from troodon.learn import distill as training
from troodon.learn.engine import Task
from troodon.learn.features import moments, standardised
from troodon.learn.frozen import FrozenNetwork, TeacherCache, build_teacher
from troodon.learn.losses import ALONE
from troodon.learn.method import Method
from troodon.learn.network import Network
from troodon.learn.objective import ObjectiveConfig
from troodon.model.vit import ViT
from troodon.run import read_json
from troodon.verbs.distillation import open_teacher
from troodon.views.batch import Batch
from troodon.views.config import MasksConfig

STUDENT = replace(
    CONFIG, vit=replace(CONFIG.vit, dim=16, depth=1, patch=8, grid=2, registers=1), masks=MasksConfig(share=0.0)
)
WIDE = replace(STUDENT, vit=replace(STUDENT.vit, dim=24, patch=4, grid=4), seed=STUDENT.seed)
FEATURES = replace(
    STUDENT,
    objective=ObjectiveConfig(terms=(("cls_features", 1.0), ("patch_features", 0.5))),
)
CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(20):
        pixels = random.integers(0, 255, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
    return tmp_path / "images"


@pytest.fixture
def teacher(images, tmp_path) -> Path:
    pretrain(CONFIG, images, tmp_path / "teacher", settings={"steps": 2})
    return tmp_path / "teacher"


def batch(count: int = 3, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    wide, narrow = (torch.randn(v, count, 3, s, s, generator=draw) for v, s in ((2, 16), (2, 8)))
    return Batch(wide, narrow, torch.zeros(2 * count, 4, dtype=torch.bool))


def method(config, frozen: list[FrozenNetwork]) -> Method:
    torch.manual_seed(0)
    o, widths = config.objective, [f.vit.dim for f in frozen]
    heads = (config.dino_head if o.weight("dino") else None, config.ibot_head if o.weight("ibot") else None)
    student, average = (Network(config.vit, *heads, {kind: widths for kind in o.features}) for _ in range(2))
    student.initialize()
    average.load_state_dict(student.state_dict())
    return Method(config.objective, student, average, teachers=frozen)


def frozen_of(teacher: Path) -> FrozenNetwork:
    return build_teacher(open_teacher(teacher), CONFIG, CPU, torch.float32)


def test_the_student_answers_as_the_teachers_own_heads_do(teacher):
    """The loss by the definitions: whole matrices, every patch of both global crops, no mask, another patch size."""
    frozen, seen = frozen_of(teacher), batch()
    made, scheduled = method(STUDENT, [frozen]), STUDENT.schedules.at(1, 6)
    (targets,) = made.targets([seen], scheduled)
    terms = made.losses(seen, targets)

    network, student = frozen.network, made.student
    with torch.no_grad():
        (tokens,) = network.backbone([seen.globals_GBCHW.flatten(0, 1)])
        grid = tokens.patches_BPD.mT.unflatten(2, (4, 4))
        patches = F.interpolate(grid, (2, 2), mode="bilinear", antialias=True).flatten(2).mT
        cls = losses.sinkhorn(network.dino_head(tokens.cls_BD).logits(), scheduled.teacher_temperature, ALONE)
        of_patches = losses.sinkhorn(
            network.ibot_head(patches.flatten(0, 1)).logits(), scheduled.teacher_temperature, ALONE
        )
    wide, narrow = student.backbone([seen.globals_GBCHW.flatten(0, 1), seen.locals_VBCHW.flatten(0, 1)], [None, None])
    logits = student.dino_head(torch.cat([wide.cls_BD, narrow.cls_BD])).logits().unflatten(0, (4, 3))
    pairs = losses.cross_entropies(logits, cls.unflatten(0, (2, 3)), 0.1)
    wanted = (pairs[0, 1] + pairs[1, 0]).mean() / 6 + pairs[2:].mean() * 4 / 6
    assert (terms["dino_global"] + terms["dino_local"]).item() == pytest.approx(wanted.item(), rel=1e-5)
    said = student.ibot_head(wide.patches_BPD.flatten(0, 1)).logits()
    each = losses.cross_entropies(said[None], of_patches[None], 0.1)[0, 0]
    assert terms["ibot"].item() == pytest.approx(each.mean().item(), rel=1e-5)


def test_features_are_compared_after_a_map_on_one_scale(teacher):
    frozen, seen = frozen_of(teacher), batch()
    made, scheduled = method(replace(FEATURES, vit=WIDE.vit), [frozen, frozen]), FEATURES.schedules.at(0, 6)
    (targets,) = made.targets([seen], scheduled)
    terms = made.losses(seen, targets)
    (wide,) = made.student.backbone([seen.globals_GBCHW.flatten(0, 1)], [None])
    (tokens,) = frozen.network.backbone([seen.globals_GBCHW.flatten(0, 1)])

    def scaled(x):
        x = x.detach().flatten(0, -2)
        return (x - x.mean(0)) / x.std(0, unbiased=False)

    maps = made.student.maps
    cls = [1 - F.cosine_similarity(layer(wide.cls_BD), scaled(tokens.cls_BD)).mean() for layer in maps.cls]
    patches = [
        F.smooth_l1_loss(layer(wide.patches_BPD).flatten(0, 1), scaled(tokens.patches_BPD)) for layer in maps.patches
    ]
    assert terms["cls"].item() == pytest.approx(sum(cls).item() / 2, rel=1e-4)
    assert terms["patches"].item() == pytest.approx(0.5 * sum(patches).item() / 2, rel=1e-4)
    assert terms.keys() == {"cls", "patches"}


def test_moments_are_those_of_all_rows_so_far():
    rows = [torch.randn(50, 3) * torch.tensor([1.0, 2.0, 5.0]) + 4 for _ in range(7)]
    so_far = torch.zeros(3, 3, dtype=torch.float64)
    for some in rows:
        so_far = moments(some, so_far, ALONE)
    every = torch.cat(rows)
    torch.testing.assert_close(so_far[1].float(), every.mean(0))
    whitened = standardised(every, so_far)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(whitened.std(0, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)


def test_a_teacher_trained_on_other_colours_sees_its_own(teacher):
    other = replace(CONFIG, photometric=replace(CONFIG.photometric, mean=(0.1, 0.5, 0.9), std=(0.5, 0.2, 0.4)))
    pixels = torch.rand(2, 2, 3, 16, 16)
    seen = []
    for config in (CONFIG, other):
        mean, std = (torch.tensor(v)[:, None, None] for v in (config.photometric.mean, config.photometric.std))
        crops = Batch((pixels - mean) / std, torch.zeros(0, 2, 3, 8, 8), torch.zeros(4, 16, dtype=torch.bool))
        seen.append(build_teacher(open_teacher(teacher), config, CPU, torch.float32).cls(crops))
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


def test_several_students_are_as_each_alone_and_the_teacher_looks_once(images, teacher, tmp_path, monkeypatch):
    looks = []
    see = ViT.forward
    monkeypatch.setattr(ViT, "forward", lambda vit, *a: looks.append(vit.config.depth) or see(vit, *a))
    students = {"narrow": STUDENT, "wide": WIDE, "features": FEATURES}
    made = distill(students, teacher, images, tmp_path / "together")
    assert looks.count(CONFIG.vit.depth) == CONFIG.steps  # the health at the end is read from what was seen
    assert made == {name: tmp_path / "together" / name / "backbone" for name in students}
    for name, config in students.items():
        assert distill(config, teacher, images, tmp_path / name) == tmp_path / name / "backbone"
        assert records(tmp_path / name) == records(tmp_path / "together" / name)
        for key, tensor in weights(tmp_path / name).items():
            assert torch.equal(tensor, weights(tmp_path / "together" / name)[key]), (name, key)
        assert load(tmp_path / "together" / name).config.dim == config.vit.dim
    assert read_json(tmp_path / "narrow" / "manifest.json")["settings"]["teachers"]


@pytest.mark.parametrize("config", [STUDENT, FEATURES], ids=["prototypes", "features"])
def test_resumed_it_is_the_same_run(images, teacher, tmp_path, monkeypatch, config):
    """Killed when the first student has saved step 4 and the second has not: both go on from step 2."""
    students = {"a": replace(config, checkpoint_every=2), "b": replace(config, checkpoint_every=2, vit=WIDE.vit)}
    distill(students, teacher, images, tmp_path / "whole")
    save, saved = checkpoint.Saver.save, []

    def killed(saver, progress, *rest):
        saved.append(progress.step)
        save(saver, progress, *rest)
        if saved.count(4):
            saver.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Saver, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(students, teacher, images, tmp_path / "cut")
    monkeypatch.undo()
    last = [checkpoint.finished(tmp_path / "cut" / name)[-1].name for name in students]
    assert last == ["000004", "000002"]
    distill(students, teacher, images, tmp_path / "cut")
    for name in students:
        assert records(tmp_path / "cut" / name) == records(tmp_path / "whole" / name)
        for key, tensor in weights(tmp_path / "whole" / name).items():
            assert torch.equal(tensor, weights(tmp_path / "cut" / name)[key]), key


def test_crops_that_come_again_are_looked_at_once(images, teacher, tmp_path, monkeypatch):
    """Twenty images in batches of four with two sets of crops: from the third pass on the teacher is not asked."""
    config = replace(STUDENT, crops=replace(STUDENT.crops, visits=2), batch=4, steps=25, health_every=0)
    looks, look = [], FrozenNetwork._forward
    monkeypatch.setattr(
        FrozenNetwork, "_forward", lambda frozen, crops: looks.append(len(crops)) or look(frozen, crops)
    )
    distill(config, teacher, images, tmp_path / "kept")
    assert len(looks) == 10
    assert "seen-by-teachers" not in {p.name for p in (tmp_path / "kept").iterdir()}
    monkeypatch.setattr(TeacherCache, "fits", lambda *_: False)
    distill(config, teacher, images, tmp_path / "anew")
    assert len(looks) == 10 + 25
    for a, b in zip(records(tmp_path / "kept"), records(tmp_path / "anew"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)  # kept in half precision
    assert records(tmp_path / "kept")[9] == records(tmp_path / "anew")[9]


def test_sharded_equals_single(images, teacher, tmp_path):
    students = {"by_prototypes": STUDENT, "by_features": FEATURES}
    distill(students, teacher, images, tmp_path / "single")
    tasks = [Task(config, tmp_path / "sharded" / name) for name, config in students.items()]
    on_ranks(2, _distil, tasks, open_source(images), teacher)
    for name in students:
        for a, b in zip(records(tmp_path / "single" / name), records(tmp_path / "sharded" / name), strict=True):
            assert a == pytest.approx(b, rel=5e-5, abs=1e-6)
        for key, tensor in weights(tmp_path / "single" / name).items():
            torch.testing.assert_close(weights(tmp_path / "sharded" / name)[key], tensor, rtol=1e-3, atol=2e-5)


def _distil(tasks, index, teacher):
    training.distill(tasks, index, [open_teacher(teacher)])


def test_heads_are_learnt_for_a_backbone_without_and_then_it_teaches(images, teacher, tmp_path):
    with pytest.raises(UsageError, match=r"troodon pretrain heads --init .*/teacher/backbone --data"):
        distill(STUDENT, teacher / "backbone", images, tmp_path / "student")
    settings = {
        "steps": 3, "batch": 8, "compute": "fp32", "threads": 1,
        "dino_head": {"prototypes": 48, "hidden": 32, "bottleneck": 16}, "objective": {"koleo_group": 0},
        "ibot_head": {"prototypes": 40, "hidden": 32, "bottleneck": 16},
        "crops": {"global_px": 16, "local_px": 8, "locals": 2}, "schedules": {"backbone_frozen": 3},
    }  # fmt: skip
    pretrain("heads", images, tmp_path / "heads", init=teacher / "backbone", settings=settings)
    before, after = (weights(run) for run in (teacher, tmp_path / "heads"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert records(tmp_path / "heads")[-1]["grad_norm_backbone"] == 0
    assert records(tmp_path / "heads")[-1]["grad_norm_dino_head"] > 0
    distill(STUDENT, tmp_path / "heads", images, tmp_path / "student")
    assert np.isfinite(records(tmp_path / "student")[-1]["loss"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crops": replace(CONFIG.crops, global_px=14, local_px=14), "vit": replace(STUDENT.vit, patch=7)},
         "the nearest that suits both is 28"),
        ({"dino_head": replace(CONFIG.dino_head, prototypes=47)}, "set dino_head.prototypes to 48"),
        ({"ibot_head": replace(CONFIG.ibot_head, prototypes=47)}, "set ibot_head.prototypes to 40"),
        ({"objective": ObjectiveConfig(heads="shared")}, "set objective.heads to separate"),
        ({"vit": replace(STUDENT.vit, channels=1),
          "photometric": replace(CONFIG.photometric, mean=(0.5,), std=(0.5,))}, "sees 3 channels"),
        ({"batch": 1}, "batch 1"),
        ({"reuse": "whole"}, "reuse whole: a student's heads are new"),
    ],
)  # fmt: skip
def test_what_cannot_be_brought_together_is_refused_with_the_remedy(images, teacher, tmp_path, change, said):
    with pytest.raises(UsageError, match=said):
        distill(replace(STUDENT, **change), teacher, images, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_other_refusals(images, teacher, tmp_path, capsys):
    with pytest.raises(UsageError, match="several teachers are compared by their features"):
        distill(STUDENT, [teacher, teacher], images, tmp_path / "student")
    with pytest.raises(UsageError, match="students see the same images, but b differs: seed: 0 -> 1"):
        distill({"a": STUDENT, "b": replace(STUDENT, seed=1)}, teacher, images, tmp_path / "student")
    with pytest.raises(UsageError, match="see troodon distill"):
        pretrain(FEATURES, images, tmp_path / "student")
    assert cli.run(["distill", "distill_dmo", "--teacher", str(teacher)]) == launch.MISTAKE
    assert "did you mean 'distill_demo'" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_the_command_trains_several_students(images, teacher, tmp_path, capsys):
    files = []
    for name, config in {"narrow": STUDENT, "wide": WIDE}.items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(to_yaml(config))
    places = ["--teacher", teacher, "--data", images, "--out", tmp_path / "students"]
    words = [str(w) for w in ["distill", *files, *places, "--steps", 2]]
    assert cli.run([*words, "--dry-run"]) == launch.DONE
    assert not (tmp_path / "students").exists()
    assert cli.run(words) == launch.DONE
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / "students" / name / "backbone") for name in ("narrow", "wide")]
    assert "narrow: step 2/2" in err
    assert cli.run([str(w) for w in ["distill", files[0], files[0], *places]]) == launch.MISTAKE
    assert "two students are called narrow" in capsys.readouterr().err
    assert cli.run(["report", str(tmp_path / "students"), "--out", str(tmp_path / "page.html")]) == launch.DONE
