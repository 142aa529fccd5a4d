"""Going on from trained weights: the best ones are kept, adapters are merged, and images may have other channels."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks import on_ranks
from tests.test_pretrain import CONFIG, _killed_after, images, records, weights  # noqa: F401
from troodon import cli, recipes
from troodon.config import UsageError
from troodon.images.sources import open_source
from troodon.learn import adapters, checkpoint, heads, losses, outcome
from troodon.learn.best import best, given_up, is_kept
from troodon.learn.config import AdaptConfig, ObjectiveConfig
from troodon.learn.pretrain import pretrain
from troodon.model.backbone import Backbone
from troodon.model.channels import with_channels
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.saved import SavedViT
from troodon.recipes.lengths import for_steps
from troodon.run import MetricsFile

TINY = [
    *("--batch", "8", "--threads", "1", "--compute", "fp32", "--crops.locals", "1", "--objective.koleo-group", "0"),
    *("--dino-head.prototypes", "16", "--dino-head.hidden", "16", "--dino-head.bottleneck", "8"),
    *("--ibot-head.prototypes", "16", "--ibot-head.hidden", "16", "--ibot-head.bottleneck", "8"),
]
KEEPS = replace(CONFIG, adapt=AdaptConfig(patience=2), probe_every=1, steps=9, keep=1, checkpoint_every=4)


def start(channels: int = 3, positions: str = "learned", preprocessing: Preprocessing | None = None) -> Backbone:
    torch.manual_seed(0)
    vit = ViTConfig(dim=32, depth=2, heads=2, patch=4, grid=4, layer_scale=0.1, channels=channels, positions=positions)  # pyrefly: ignore
    return Backbone.random(vit, preprocessing or Preprocessing(18, 16))


def coloured(folder: Path, mode: str = "RGB", labels: bool = True) -> Path:
    """Noise, in classes of another brightness."""
    for i in range(24):
        home = folder / f"class{i % 3}" if labels else folder
        home.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 60, (24, 24, 3)) + 60 * (i % 3)
        Image.fromarray(noise.astype(np.uint8)).convert(mode).save(home / f"{i}.png")
    return folder


class Scripted:
    """A probe whose readings are given; it remembers which weights it saw."""

    def __init__(self, *accuracies: float):
        self.accuracies, self.seen = accuracies, []

    def __call__(self, saved: SavedViT) -> float:
        self.seen.append({name: w.clone() for name, w in saved.vit.state_dict().items()})
        return self.accuracies[len(self.seen) - 1]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the best


def test_the_best_weights_are_kept_and_the_run_stops_when_features_stay_worse(images, tmp_path, capsys):  # noqa: F811
    run, index, probe = tmp_path / "run", open_source(images), Scripted(0.5, 0.6, 0.7, 0.69, 0.6, 0.6, 0.1, 0.1, 0.1, 1)
    pretrain(KEEPS, index, run, init=start(), probe=probe)
    # 0.69 is no worse but for noise; two readings of 0.6 are, after steps 4 and 5, and the step begun ends.
    assert records(run)[-1]["step"] == 5
    assert same(weights(run), probe.seen[2])
    assert not same(weights(run), Backbone.load(checkpoint.finished(run)[-1] / "backbone").vit.state_dict())
    # The whole state of the best step stays too, besides the last; its heads are those of the backbone.
    assert [saved.name for saved in checkpoint.finished(run)] == ["000002", "000006"]
    assert checkpoint.of_backbone(run) == run / "checkpoints" / "000002"
    of_best = heads.of_run(run, KEEPS)
    shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "backbone")  # then the last checkpoint's
    assert not torch.equal(
        of_best["dino_head.last_layer.weight_v"],
        heads.of_run(tmp_path / "other", KEEPS)["dino_head.last_layer.weight_v"],
    )
    outcome.tell(run, KEEPS)
    said = capsys.readouterr().err
    assert (
        "stopped early, as features got worse: the last 2 k-NN readings are at most 60.0%, and the best is 70.0%"
        in said
    )
    assert "k-NN before 50.0%, best 70.0% at step 2 (kept), last" in said
    before = (run / "metrics.jsonl").read_bytes()
    pretrain(KEEPS, index, run, init=start(), probe=Scripted())  # done: no step, no reading
    outcome.tell(run, KEEPS)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert same(weights(run), probe.seen[2])


def test_weights_that_only_got_worse_are_the_first_ones(images, tmp_path):  # noqa: F811
    probe, run = Scripted(0.9, *(9 * [0.5])), tmp_path / "run"
    pretrain(KEEPS, open_source(images), run, init=start(), probe=probe)
    assert same(weights(run), start().vit.state_dict())
    assert checkpoint.of_backbone(run) is None
    assert heads.of_run(run, KEEPS)  # those of the last checkpoint


@pytest.mark.parametrize("killed", [2, 4])
def test_killed_and_resumed_the_same_weights_are_kept(images, tmp_path, monkeypatch, killed):  # noqa: F811
    """Step 2 is the best, and saved for that; step 4 is a checkpoint as usual."""
    readings, index = (0.5, 0.6, 0.7, 0.69, 0.69, 0.65, 0.69, 0.6, 0.6, 0.6), open_source(images)
    whole = Scripted(*readings)
    pretrain(KEEPS, index, tmp_path / "whole", init=start(), probe=whole)
    monkeypatch.setattr(checkpoint.Saver, "save", _killed_after(killed, checkpoint.Saver.save))
    with pytest.raises(KeyboardInterrupt):
        pretrain(KEEPS, index, tmp_path / "cut", init=start(), probe=Scripted(*readings))
    monkeypatch.undo()
    assert same(weights(tmp_path / "cut"), whole.seen[2])
    pretrain(KEEPS, index, tmp_path / "cut", init=start(), probe=Scripted(*readings[killed + 1 :]))
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), whole.seen[2])


def test_without_patience_the_last_weights_are_kept(images, tmp_path):  # noqa: F811
    config, probe = replace(KEEPS, adapt=AdaptConfig(), steps=4), Scripted(0.9, 0.1, 0.1, 0.1, 0.1)
    pretrain(config, open_source(images), tmp_path / "run", init=start(), probe=probe)
    assert same(weights(tmp_path / "run"), probe.seen[-1])


def test_readings():
    known = [(0, 0.5), (10, 0.7), (20, 0.7), (30, 0.69), (40, 0.6)]
    assert best(known) == (10, 0.7)
    assert [step for step in (0, 10, 20, 40) if is_kept(known, 3, step)] == [10]
    assert is_kept(known, 0, 40)
    assert is_kept([], 3, 40)
    assert given_up(known, 1)
    assert not given_up(known, 2)  # 0.69 is not clearly worse
    assert not given_up([(0, 0.5)], 1)
    assert not given_up(known, 0)


def test_a_rate_that_destroys_features_stops_the_command(tmp_path, capsys):
    """As a user: readings before, at intervals and after; a rate far too high; the first weights are kept."""
    start().save(tmp_path / "backbone")
    words = ["adapt", "--init", str(tmp_path / "backbone"), "--data", str(coloured(tmp_path / "images"))]
    words += ["--out", str(tmp_path / "run"), "--steps", "40", *TINY, "--schedules.lr.peak", "3"]
    words += ["--schedules.ema-momentum.peak", "0.1", "--schedules.ema-momentum.end", "0.1", "--optim.layer-decay", "1"]
    assert cli.run(["pretrain", *words]) == 0
    said = capsys.readouterr().err
    known = [(r["step"] + 1, r["knn"]) for r in MetricsFile(tmp_path / "run" / "metrics.jsonl").read() if "knn" in r]
    assert known[0][0] == 0
    assert known[-1][0] < 40
    assert max(accuracy for _, accuracy in known[-5:]) < best(known)[1]
    assert "stopped early, as features got worse: the last 5 k-NN readings" in said
    assert f"k-NN before {known[0][1]:.1%}, best {best(known)[1]:.1%}" in said
    assert cli.run(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Stopped early" in page
    assert "40 of 40" not in page


def test_images_without_labels_are_adapted_to_and_nothing_is_claimed(tmp_path, capsys):
    start().save(tmp_path / "backbone")
    words = ["adapt", "--init", str(tmp_path / "backbone"), "--data", str(coloured(tmp_path / "i", labels=False))]
    assert cli.run(["pretrain", *words, "--out", str(tmp_path / "run"), "--steps", "4", *TINY]) == 0
    said = capsys.readouterr().err
    assert "no k-NN readings (they need labels), so the last weights are kept; whether they are better is not" in said
    last = checkpoint.finished(tmp_path / "run")[-1]
    assert same(weights(tmp_path / "run"), Backbone.load(last / "backbone").vit.state_dict())


def test_outcome_without_labels_has_what_is_known():
    records = [{"step": 9, "effective_rank": 4.0}, {"step": 19, "effective_rank": 5.5}]
    ((name, text),) = outcome.lines(records, 3)
    assert name == "outcome"
    assert "(effective rank 4.0 at step 10, 5.5 at step 20)" in text


# ---- adapters


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_merged_adapters_have_the_same_features(positions):
    vit = start(positions=positions).vit
    plain = {name: w.clone() for name, w in vit.state_dict().items()}
    adapters.add(vit, 3)
    image_BCHW = torch.randn(2, 3, 16, 16)
    first_BD = vit(image_BCHW)
    merged = adapters.merged(vit.state_dict())
    assert same(merged, plain)  # nothing has been learned
    for layer in [m for m in vit.modules() if isinstance(m, adapters.LowRank)]:
        torch.nn.init.normal_(layer.up, std=0.3)
    other = start(positions=positions).vit
    other.load_state_dict(adapters.merged(vit.state_dict()))
    assert not torch.allclose(vit(image_BCHW), first_BD, atol=1e-2)
    torch.testing.assert_close(other(image_BCHW), vit(image_BCHW), rtol=1e-5, atol=1e-5)


def test_only_adapters_learn_and_what_is_saved_is_an_ordinary_backbone(images, tmp_path, monkeypatch):  # noqa: F811
    config, index, first = replace(CONFIG, adapt=AdaptConfig(rank=2)), open_source(images), start()
    given = {name: w.clone() for name, w in first.vit.state_dict().items()}
    students = []
    monkeypatch.setattr(
        adapters, "freeze_others", lambda vit, real=adapters.freeze_others: students.append(real(vit) or vit)
    )
    pretrain(config, index, tmp_path / "whole", init=first)
    own = students[0].state_dict()
    assert {name for name in given if not torch.equal(own[name], given[name])} == {"mask_token"}
    after = weights(tmp_path / "whole")
    changed = {name for name in given if not torch.equal(after[name], given[name])}
    assert changed == {"mask_token"} | {n for n in given if n.startswith("blocks.") and given[n].ndim == 2}
    for name in changed - {"mask_token"}:
        assert torch.linalg.matrix_rank(after[name] - given[name], rtol=1e-3) <= 2, name

    monkeypatch.setattr(checkpoint.Saver, "save", _killed_after(3, checkpoint.Saver.save))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, index, tmp_path / "cut", init=first)
    monkeypatch.undo()
    pretrain(config, index, tmp_path / "cut", init=first)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), after)
    with pytest.raises(UsageError, match=r"adapt\.rank 2: there are no weights to adapt; give them as --init"):
        pretrain(config, index, tmp_path / "none")


@pytest.mark.slow
def test_adapters_on_two_ranks_learn_what_one_learns(images, tmp_path):  # noqa: F811
    config = replace(CONFIG, adapt=AdaptConfig(rank=3), objective=ObjectiveConfig(koleo_group=4))
    index = open_source(images)
    pretrain(config, index, tmp_path / "one", init=start())
    on_ranks(2, _adapted, config, index, tmp_path / "two")
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-5)


def _adapted(config, index, run):
    pretrain(config, index, run, init=start())


def test_a_plan_counts_what_learns():
    whole = recipes.pretrain("adapt", lambda: recipes.pretrain("vitl14"))
    from troodon.learn.plan import plan

    full, low = (plan(c, None, "cuda", 2, 1) for c in (whole, replace(whole, adapt=AdaptConfig(rank=8))))
    assert low.parameters["adapters"] == 24 * 8 * (4 + 2) * 1024 + 24 * 8 * (1024 + 2 * 2736 + 2736 + 1024)
    assert low.state["moments"] < 0.3 * full.state["moments"]
    assert low.state["weights"] > full.state["weights"]


# ---- channels

OWN = Preprocessing(18, 16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_picture_that_is_the_same_in_all_channels_keeps_its_features(channels):
    backbone = start(preprocessing=OWN)
    mean, std = [0.3 + 0.1 * k for k in range(channels)], [0.2 + 0.03 * k for k in range(channels)]
    other = with_channels(backbone, mean, std)
    assert other.channels == channels
    grey = np.random.default_rng(0).integers(0, 256, (16, 16, 1), dtype=np.uint8)
    ours, theirs = (b.features([np.repeat(grey, b.channels, 2)]) for b in (other, backbone))
    torch.testing.assert_close(ours.cls, theirs.cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.patches, theirs.patches, rtol=1e-5, atol=1e-5)


def test_grey_images_are_adapted_to_from_weights_for_colours(tmp_path, capsys):
    """The first reading is that of the three-channel network on the same grey pictures."""
    start(preprocessing=OWN).save(tmp_path / "backbone")
    images_, first = str(coloured(tmp_path / "images", "L")), str(tmp_path / "backbone")
    grey = ["--vit.channels", "1", "--photometric.mean", "0.5", "--photometric.std", "0.25"]
    for name, more in (("grey", grey), ("colour", [])):
        words = ["adapt", "--init", first, "--data", images_, "--out", str(tmp_path / name), "--steps", "2", *TINY]
        assert cli.run(["pretrain", *words, *more]) == 0
    assert "init has 3 channels: each of 1 begins with a share of all of them" in capsys.readouterr().err
    before = [MetricsFile(tmp_path / name / "metrics.jsonl").read()[0]["knn"] for name in ("grey", "colour")]
    assert before[0] == before[1]
    assert Backbone.load(tmp_path / "grey" / "backbone").channels == 1
    colour = json.loads((tmp_path / "colour" / "backbone" / "backbone.json").read_text())["preprocessing"]
    assert colour["mean"] == [0.4, 0.5, 0.6]  # what the weights were trained with


# ---- the recipe and its term


def test_the_recipe_knows_the_pixels_that_the_weights_know(tmp_path):
    from troodon.verbs.common import config_of_weights

    start().save(tmp_path / "backbone")
    crops = config_of_weights(tmp_path / "backbone").crops
    assert (crops.global_px, crops.local_px) == (16, 8)
    large = Backbone.random(replace(start().config, patch=16, grid=2), Preprocessing(592, 518))
    assert (config_of_weights(large).crops.global_px, config_of_weights(large).crops.local_px) == (224, 96)


@pytest.mark.parametrize("steps", [100, 20_000])
def test_readings_that_decide_keep_their_share(steps):
    whole = recipes.pretrain("adapt", lambda: recipes.pretrain("vitl14"))
    assert for_steps(whole, steps).probe_every * whole.steps == whole.probe_every * steps


def test_kde_is_the_mean_log_density_of_the_others():
    x_BD = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    unit = x_BD / x_BD.norm(dim=1, keepdim=True)
    expected = 0.0
    for i in range(6):
        density = sum(math.exp(5.0 * (float(unit[i] @ unit[j]) - 1)) for j in range(6) if j != i) / 5
        expected += math.log(density) / 6
    assert losses.kde(x_BD) == pytest.approx(expected, rel=1e-5)
    assert losses.kde(torch.ones(5, 3)) == pytest.approx(0.0, abs=1e-5)  # the same image five times: finite
    assert losses.kde(torch.eye(4)) < losses.kde(x_BD) < 0


def test_kde_is_a_term_that_lowers_it(images, tmp_path):  # noqa: F811
    objective = ObjectiveConfig(terms=(("dino", 1.0), ("kde", 0.5)))
    pretrain(replace(CONFIG, objective=objective), open_source(images), tmp_path / "run")
    kde = [r["kde"] for r in records(tmp_path / "run")]
    assert all(value < 0 for value in kde)
    assert kde[-1] < kde[0]
