"""A run is its config: resumed, interrupted, sharded or guarded, it is the same run or a clear stop."""

import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.ranks import on_ranks
from troodon import dist
from troodon.config import UsageError, fingerprint
from troodon.images.sources import open_source
from troodon.learn import checkpoint, engine, loop
from troodon.learn.config import GuardConfig, ObjectiveConfig, ParallelConfig, PretrainConfig
from troodon.learn.engine import Interrupted
from troodon.learn.parallel import prepare
from troodon.learn.pretrain import pretrain
from troodon.learn.recorder import TERMS, Recorder
from troodon.learn.schedules import Anchor, Schedule, Schedules
from troodon.model.backbone import Backbone
from troodon.model.config import HeadConfig, ViTConfig
from troodon.model.saved import SavedViT
from troodon.model.vit import ViT
from troodon.run import MetricsFile
from troodon.views.config import CropsConfig, PhotometricConfig

CONFIG = PretrainConfig(
    vit=ViTConfig(dim=32, depth=2, heads=2, patch=4, grid=4, layer_scale=0.1),
    dino_head=HeadConfig(48, 32, 16),
    ibot_head=HeadConfig(40, 32, 16),
    crops=CropsConfig(global_px=16, local_px=8, locals=2),
    schedules=Schedules(
        lr=Schedule(peak=1e-3, end=1e-6, warmup=2),
        teacher_temperature=Schedule(start=0.04, peak=0.07, end=0.07, warmup=4),
        last_layer_frozen=1,
    ),
    batch=8,
    steps=6,
    log_every=1,
    checkpoint_every=3,
    compute="fp32",
    threads=1,
)


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(random.integers(0, 255, (24, 20, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def records(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "data_wait")} for r in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Backbone.load(run / "backbone").vit.state_dict()


def test_a_run_leaves_what_it_promises(images, tmp_path):
    called = []
    folder = pretrain(
        CONFIG,
        open_source(images),
        tmp_path / "run",
        probe=lambda backbone: 0.25,
        before=lambda *what: called.append(what),
    )
    assert called == [(CONFIG, tmp_path / "run")]
    assert folder == tmp_path / "run" / "backbone"
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(6))
    last = records(tmp_path / "run")[-1]
    assert last["loss"] == pytest.approx(sum(last[n] for n in ("dino_global", "dino_local", "ibot", "koleo")))
    assert last["knn"] == 0.25
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "backbone", "checkpoints", "config.yaml", "environment.json", "images.parquet", "manifest.json",
        "metrics.jsonl",
    }  # fmt: skip
    for saved in checkpoint.finished(tmp_path / "run"):
        Backbone.load(saved / "backbone")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    pretrain(CONFIG, open_source(images), tmp_path / "run")  # finished: nothing to do
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("objective", [ObjectiveConfig(), ObjectiveConfig(targets="centring", heads="shared")])
def test_a_resumed_run_is_the_same_run(images, tmp_path, objective, monkeypatch):
    config = replace(CONFIG, objective=objective, vit=replace(CONFIG.vit, drop_path=0.3))
    index = open_source(images)
    pretrain(config, index, tmp_path / "whole")

    monkeypatch.setattr(checkpoint.Saver, "save", _killed_after(3, checkpoint.Saver.save))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, index, tmp_path / "cut")
    monkeypatch.undo()
    assert [p.name for p in checkpoint.finished(tmp_path / "cut")] == ["000003"]
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1')  # a line that the kill cut short
    pretrain(config, index, tmp_path / "cut")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "cut")[name]), name


def test_a_run_of_an_earlier_version_goes_on(images, tmp_path):
    """A setting that it did not know has its default value, and earlier names of settings are read."""
    index, run = open_source(images), tmp_path / "run"
    pretrain(CONFIG, index, run)
    manifest = json.loads((run / "manifest.json").read_text())
    config = manifest["settings"]["config"]
    del config["crops"]["visits"]
    config["schedules"]["momentum"] = config["schedules"].pop("ema_momentum")
    config["objective"] |= {f"{name}_weight": weight for name, weight in config["objective"].pop("terms")}
    config["objective"] |= dict.fromkeys(("contrast_weight", "gram_weight", "cls_weight", "patch_weight"), 0.0)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    name = fingerprint(manifest["settings"], fingerprint(index.column("path"), index.column("length")))
    (run / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": name}))
    before = weights(run)
    shutil.rmtree(run / "checkpoints" / "000006")
    pretrain(CONFIG, index, run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())
    with pytest.raises(UsageError, match=r"other settings \(config.crops.visits: 0 -> 3\)"):
        pretrain(replace(CONFIG, crops=replace(CONFIG.crops, visits=3)), index, run)
    with pytest.raises(UsageError, match=r"other settings \(config.objective.terms: "):
        pretrain(replace(CONFIG, objective=ObjectiveConfig(terms=(("dino", 1.0),))), index, run)
    with pytest.raises(UsageError, match="other images"):
        pretrain(CONFIG, index.take(range(20)[::-1]), run)


def _killed_after(step, save):
    def saving(saver, progress, *rest):
        save(saver, progress, *rest)
        if progress.step == step:
            saver.wait()
            raise KeyboardInterrupt

    return saving


def test_a_signal_saves_and_the_same_command_goes_on(images, tmp_path):
    config = replace(CONFIG, steps=400, checkpoint_every=1000)
    index = open_source(images)

    def ask():
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    with pytest.raises(Interrupted, match="everything is saved"):
        pretrain(config, index, tmp_path / "run")
    (saved,) = checkpoint.finished(tmp_path / "run")
    assert 0 < int(saved.name) < 400
    assert len(records(tmp_path / "run")) == int(saved.name)
    with pytest.raises(UsageError, match=r"config.steps: 400 -> 300"):
        pretrain(replace(config, steps=300), index, tmp_path / "run")


def test_kept_checkpoints_are_the_newest(images, tmp_path):
    pretrain(replace(CONFIG, checkpoint_every=1, keep=2), open_source(images), tmp_path / "run")
    assert [p.name for p in checkpoint.finished(tmp_path / "run")] == ["000005", "000006"]


def test_sharded_equals_single(images, tmp_path):
    index = open_source(images)
    config = CONFIG  # KoLeo among all images of a step, whatever ranks hold them
    pretrain(config, index, tmp_path / "single")
    on_ranks(2, pretrain, config, index, tmp_path / "sharded")
    for a, b in zip(records(tmp_path / "single"), records(tmp_path / "sharded"), strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    for name, tensor in weights(tmp_path / "single").items():
        torch.testing.assert_close(weights(tmp_path / "sharded")[name], tensor, rtol=1e-3, atol=2e-5)


def test_sharded_equals_single_in_low_precision_too(images, tmp_path):
    """Weights are gathered in bf16, and rounded once more than on one rank: near, and not equal."""
    index, config = open_source(images), replace(CONFIG, compute="bf16", steps=3)
    pretrain(config, index, tmp_path / "single")
    on_ranks(2, pretrain, config, index, tmp_path / "sharded")
    for a, b in zip(records(tmp_path / "single"), records(tmp_path / "sharded"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-2)


def test_what_is_sharded_is_whole_on_rank_zero():
    first, *others = on_ranks(3, _unsharded, (1, 3, 4, 7))
    for x in first:
        assert torch.equal(x, torch.arange(2.0 * len(x)).reshape(-1, 2))
    assert [len(x) for x in first] == [1, 3, 4, 7]
    assert others == [[None] * 4] * 2


def _unsharded(sizes):
    mesh = init_device_mesh("cpu", (dist.world_size(),))
    tensors = [torch.arange(2.0 * rows).reshape(-1, 2) for rows in sizes]
    return [dist.full_tensor(distribute_tensor(x, mesh, [Shard(0)])) for x in tensors]


def test_the_quick_knn_is_read_on_one_rank_of_two(images, tmp_path):
    on_ranks(2, _probed, replace(CONFIG, steps=2), open_source(images), tmp_path / "run")
    assert records(tmp_path / "run")[-1]["knn"] == 0.25


def _probed(config, index, run):
    pretrain(config, index, run, probe=lambda backbone: 0.25)


def test_saved_on_two_ranks_resumes_on_one(images, tmp_path):
    index = open_source(images)
    config = replace(CONFIG, objective=ObjectiveConfig(koleo_group=4))
    pretrain(config, index, tmp_path / "whole")
    on_ranks(2, _cut, config, index, tmp_path / "run")
    pretrain(config, index, tmp_path / "run")
    for a, b in zip(records(tmp_path / "whole"), records(tmp_path / "run"), strict=True):
        assert a == pytest.approx(b, rel=2e-5)


def _cut(config, index, run):
    checkpoint.Saver.save = _killed_after(3, checkpoint.Saver.save)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, index, run)


def poison(monkeypatch, *clips):
    """The gradient of these turns of the loop becomes infinite, in the middle of what the first rank holds."""
    real, calls = loop.optim.clip, iter(range(10**6))

    def poisoned(student, config):
        if next(calls) in clips and dist.rank() == 0:
            next(student.parameters()).grad.mul_(float("inf"))
        return real(student, config)

    monkeypatch.setattr(loop.optim, "clip", poisoned)


def events(run: Path) -> list[dict]:
    return [r for r in MetricsFile(run / "metrics.jsonl").read() if "event" in r]


def guarded(policy, **changes):
    return replace(CONFIG, guard=GuardConfig(policy, **changes))


def test_a_loss_that_is_not_finite_changes_nothing(images, tmp_path, monkeypatch):
    config = guarded("stop")
    poison(monkeypatch, 4)
    with pytest.raises(FloatingPointError, match="step 4: a loss or a gradient is not finite"):
        pretrain(config, open_source(images), tmp_path / "run")
    assert [p.name for p in checkpoint.finished(tmp_path / "run")] == ["000003"]
    (event,) = events(tmp_path / "run")
    assert event["at"] == 4
    assert "rank 0: grad_norm, grad_norm_backbone" in event["message"]
    (said,) = (tmp_path / "run" / "trouble").iterdir()
    (rank,) = json.loads(said.read_text())["ranks"]
    assert len(rank["images"]) == 8
    assert all((images.parent / image).is_file() for image in rank["images"])
    assert math.isfinite(rank["terms"]["koleo"])
    monkeypatch.undo()
    pretrain(config, open_source(images), tmp_path / "run")  # goes on from the last good step
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_a_skipped_step_changes_nothing(images, tmp_path, monkeypatch):
    poison(monkeypatch, 0, 4)
    pretrain(guarded("skip"), open_source(images), tmp_path / "run")
    assert [r["step"] for r in records(tmp_path / "run") if "step" in r] == [1, 2, 3, 5]
    assert [e["at"] for e in events(tmp_path / "run")] == [0, 4]


def test_a_rollback_goes_on_with_other_images(images, tmp_path, monkeypatch):
    poison(monkeypatch, 4)
    pretrain(guarded("rollback"), open_source(images), tmp_path / "run")
    pretrain(CONFIG, open_source(images), tmp_path / "whole")
    run, whole = ([r for r in records(tmp_path / name) if "step" in r] for name in ("run", "whole"))
    assert [r["step"] for r in run] == list(range(6))
    assert run[:3] == whole[:3]
    assert run[3]["loss"] != whole[3]["loss"]  # of other images
    last = json.loads((checkpoint.finished(tmp_path / "run")[-1] / "run.json").read_text())
    assert last["progress"] == {"step": 6, "batch": 8, "rescues": 1}
    assert events(tmp_path / "run")[0]["message"].endswith("going back to step 3, and on with the images that follow")


@pytest.mark.parametrize(
    ("config", "clips", "said"),
    [
        (guarded("skip", limit=1), (1, 2), "happened 2 times, and guard.limit is 1"),
        (guarded("rollback"), (1,), "no checkpoint yet"),
    ],
)
def test_a_guard_gives_up(images, tmp_path, monkeypatch, config, clips, said):
    poison(monkeypatch, *clips)
    with pytest.raises(FloatingPointError):
        pretrain(config, open_source(images), tmp_path / "run")
    assert said in events(tmp_path / "run")[-1]["message"]


def test_trouble_of_one_rank_stops_all(images, tmp_path):
    on_ranks(2, _poisoned, open_source(images), tmp_path / "run")
    (event,) = events(tmp_path / "run")
    assert "rank 0: " in event["message"]
    assert [r["step"] for r in records(tmp_path / "run") if "step" in r] == [0, 1, 2, 3, 5]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def _poisoned(index, run):
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch, 4)
        pretrain(guarded("skip"), index, run)


def test_a_full_disk_stops_nothing_but_the_checkpoint(images, tmp_path, monkeypatch):
    real, saved, full, run = os.fsync, Recorder.save, [], tmp_path / "run"

    def fsync(descriptor):
        if full:
            raise OSError(28, "No space left on device")
        real(descriptor)

    def save(recorder):
        if recorder.saver.writing:  # full until the next checkpoint
            futures.wait([recorder.saver.writing])
        full[:] = [True] if recorder.progress.step == 2 else []
        saved(recorder)

    (images / "broken.jpg").write_bytes(b"no image")
    monkeypatch.setattr(Recorder, "save", save)
    monkeypatch.setattr(os, "fsync", fsync)
    poison(monkeypatch, 2)
    pretrain(replace(guarded("skip"), checkpoint_every=2), open_source(images), run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["000004", "000006"]
    unsaved, poisoned = events(run)
    assert "images and terms could not be written ([Errno 28]" in poisoned["message"]
    assert "the disk is full" in unsaved["message"]
    assert "there is none yet" in unsaved["message"]
    assert [r["path"] for r in MetricsFile(run / "quarantine.jsonl").read()] == ["images/broken.jpg"]
    assert not list(run.rglob("*.partial"))


def test_a_run_whose_end_cannot_be_saved_fails(images, tmp_path, monkeypatch):
    def full(backbone, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SavedViT, "save", full)
    with pytest.raises(OSError, match=r"the last checkpoint could not be written: the disk is full"):
        pretrain(CONFIG, open_source(images), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    monkeypatch.undo()
    pretrain(CONFIG, open_source(images), tmp_path / "run")
    assert (tmp_path / "run" / "backbone").is_dir()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such option")
def test_memory_that_a_step_frees_serves_the_next(images, tmp_path):
    pretrain(replace(CONFIG, steps=2), open_source(images), tmp_path / "run")
    torch.ones(2**26)  # 256 MiB: half of it is wanted again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000  # of 32,768 pages


def test_what_is_written_is_not_what_goes_on_learning(images, tmp_path, monkeypatch):
    """A checkpoint is a copy: one that is written late equals one that is written at once."""
    real = checkpoint.Saver._publish

    def late(saver, *rest):
        time.sleep(0.3)
        real(saver, *rest)

    config = replace(CONFIG, checkpoint_every=4)
    monkeypatch.setattr(checkpoint.Saver, "_publish", late)
    pretrain(config, open_source(images), tmp_path / "late")
    monkeypatch.undo()
    pretrain(replace(config, steps=6, keep=5), open_source(images), tmp_path / "soon")
    states = []
    for name in ("late", "soon"):
        folder = checkpoint.finished(tmp_path / name)[0]
        assert folder.name == "000004"
        states.append(Backbone.load(folder / "backbone").vit.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_milestones_are_kept_for_ever(images, tmp_path):
    pretrain(replace(CONFIG, checkpoint_every=1, keep=1, keep_every=2), open_source(images), tmp_path / "run")
    assert [p.name for p in checkpoint.finished(tmp_path / "run")] == ["000002", "000004", "000006"]


def test_a_step_in_parts_is_the_same_step(images, tmp_path):
    """Sinkhorn, centres and stochastic depth included: 4 parts of 2 images, and 2 ranks of 2 parts. With a rate of 0.9
    some parts keep no sequence."""
    index = open_source(images)
    for targets, drop in (("sinkhorn", 0.3), ("centring", 0.9)):
        vit, objective = replace(CONFIG.vit, drop_path=drop), ObjectiveConfig(targets=targets, koleo_group=2)
        config = replace(CONFIG, vit=vit, objective=objective)
        pretrain(config, index, tmp_path / targets)
        pretrain(replace(config, parallel=ParallelConfig(accumulate=4)), index, tmp_path / f"{targets}-parts")
        halves = replace(config, parallel=ParallelConfig(accumulate=2))
        on_ranks(2, pretrain, halves, index, tmp_path / f"{targets}-ranks")
        for other in ("parts", "ranks"):
            for a, b in zip(records(tmp_path / targets), records(tmp_path / f"{targets}-{other}"), strict=True):
                assert a == pytest.approx(b, rel=5e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="compiling needs a C++ compiler"
)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_compiled_blocks_have_the_same_gradients(recompute):
    torch.manual_seed(0)
    eager, compiled = (ViT(replace(CONFIG.vit, drop_path=0.3)) for _ in range(2))
    eager.initialize()
    compiled.load_state_dict(eager.state_dict())
    for block in compiled.blocks:
        prepare(block, recompute, compiled=True)
    crops, gradients = [torch.randn(8, 3, 16, 16), torch.randn(16, 3, 8, 8)], []
    for network in (eager, compiled):
        torch.manual_seed(1)  # of stochastic depth
        try:
            wide, narrow = network.train()(crops)
        except torch._dynamo.exc.BackendCompilerFailed as error:  # as where torch lies in a path with a space
            pytest.skip(f"torch cannot compile here: {str(error).splitlines()[0]}")
        (wide.cls_BD.square().sum() + narrow.patches_BPD.pow(3).sum()).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        difference = (gradients[1][name] - gradient).abs().max()
        assert difference <= 1e-3 * gradient.abs().max().clamp(min=1e-6), name


def _on_two_machines(config: PretrainConfig, *more: object) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    pretrain(config, *more)


@pytest.mark.slow
def test_machines_that_hold_replicas_learn_as_one_rank(images, tmp_path):
    """Four ranks, two on each machine, and two parts of which only the last sums gradients over machines."""
    terms = tuple(term for term in CONFIG.objective.terms if term[0] != "koleo")  # which parts look at differently
    one, index = (
        replace(CONFIG, steps=4, batch=8, objective=replace(CONFIG.objective, terms=terms)),
        open_source(images),
    )
    pretrain(one, index, tmp_path / "one")
    on_ranks(4, _on_two_machines, replace(one, parallel=ParallelConfig(accumulate=2)), index, tmp_path / "four")
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "four"), strict=True):
        assert a == pytest.approx(b, rel=2e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_is_the_same(images, tmp_path, recompute):
    config = replace(CONFIG, steps=3, vit=replace(CONFIG.vit, drop_path=0.3))
    index = open_source(images)
    pretrain(config, index, tmp_path / "kept")
    again = replace(config, parallel=ParallelConfig(recompute=recompute))
    pretrain(again, index, tmp_path / "again")
    for a, b in zip(records(tmp_path / "kept"), records(tmp_path / "again"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    on_ranks(2, pretrain, again, index, tmp_path / "sharded")
    for a, b in zip(records(tmp_path / "kept"), records(tmp_path / "sharded"), strict=True):
        assert a == pytest.approx(b, rel=2e-5)


@pytest.mark.parametrize(
    ("objective", "terms"),
    [
        (ObjectiveConfig(terms=(("dino", 1.0), ("koleo", 0.1))), {"dino_global", "dino_local", "koleo"}),
        (ObjectiveConfig(terms=(("ibot", 1.0), ("koleo", 0.1))), {"ibot", "koleo"}),
        (ObjectiveConfig(terms=(("ibot", 1.0),), heads="shared", targets="centring"), {"ibot"}),
        (ObjectiveConfig(terms=(("koleo", 0.1), ("contrast", 2.0))), {"koleo", "contrast"}),
        (
            ObjectiveConfig(terms=(*ObjectiveConfig().terms, ("gram", 2.0))),
            {"dino_global", "dino_local", "ibot", "koleo", "gram"},
        ),
    ],
)
def test_an_objective_has_the_terms_that_it_weighs(images, tmp_path, objective, terms):
    index, anchor = open_source(images), Anchor(start=2, refresh=2, refreshes=1)
    config = replace(CONFIG, objective=objective, schedules=replace(CONFIG.schedules, anchor=anchor))
    pretrain(config, index, tmp_path / "single")
    on_ranks(2, pretrain, config, index, tmp_path / "sharded")
    for a, b in zip(records(tmp_path / "single"), records(tmp_path / "sharded"), strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    last = records(tmp_path / "single")[-1]
    assert {name for name in last if name in TERMS} == terms
    gram = [r.get("gram", 0.0) for r in records(tmp_path / "single")]
    assert [value > 0 for value in gram] == [objective.weight("gram") > 0 and step >= 2 for step in range(6)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel": ParallelConfig(accumulate=3)}, "batch 8 does not divide over 1 devices of parallel.accumulate 3 "
         "parts: set batch 9"),
        ({"parallel": ParallelConfig(accumulate=2)}, "koleo_group 0 looks .* that can be exact is 4"),
        ({"parallel": ParallelConfig(accumulate=2),
          "objective": ObjectiveConfig(terms=(*ObjectiveConfig().terms, ("contrast", 1.0)), koleo_group=4)},
         "accumulate 2: contrast in objective.terms compares all images of a step: set it to 1"),
        ({"objective": ObjectiveConfig(koleo_group=3)}, "koleo_group 3 does not divide the batch of 8"),
    ],
)  # fmt: skip
def test_a_step_that_cannot_be_cut_is_refused(images, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        pretrain(replace(CONFIG, **change), open_source(images), tmp_path / "run")


def test_broken_files_are_named(images, tmp_path):
    (images / "07.png").write_bytes(b"no picture")
    pretrain(replace(CONFIG, steps=5), open_source(images), tmp_path / "run")
    (line,) = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "images/07.png"


def test_init_starts_from_given_weights(images, tmp_path):
    index = open_source(images)
    pretrain(CONFIG, index, tmp_path / "first")
    first = Backbone.load(tmp_path / "first" / "backbone")
    frozen = replace(CONFIG, steps=1, schedules=replace(CONFIG.schedules, lr=Schedule(peak=0.0, end=0.0)))
    with pytest.raises(engine.NothingLearned, match=r"did not change in 1 steps: see schedules\.lr"):
        pretrain(frozen, index, tmp_path / "second", init=first)
    for name, tensor in weights(tmp_path / "second").items():
        torch.testing.assert_close(tensor, first.vit.state_dict()[name])
    other = replace(CONFIG, vit=replace(CONFIG.vit, depth=3))
    with pytest.raises(UsageError, match=r"vit.depth: 2 -> 3"):
        pretrain(other, index, tmp_path / "third", init=first)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crops": CropsConfig(global_px=18, local_px=8)}, "crops.global_px 18 does not divide into patches of 4"),
        ({"crops": CropsConfig(global_px=16, local_px=2)}, "crops.local_px 2 does not .* the nearest is 4"),
        ({"batch": 1}, "batch 1"),
        (
            {
                "crops": CropsConfig(global_px=16, locals=0, attack=0.5),
                "vit": replace(CONFIG.vit, channels=4),
                "photometric": PhotometricConfig(mean=(0.5,) * 4, std=(0.5,) * 4),
            },
            r"crops.attack 0.5: attacks are for pictures in grey or colour, not for images of 4 channels",
        ),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(images, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        pretrain(replace(CONFIG, **change), open_source(images), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(images, tmp_path):
    with pytest.raises(UsageError, match="is not empty and not a run"):
        pretrain(CONFIG, open_source(images), images)
    assert len(list(images.iterdir())) == 20


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(images, tmp_path):
    """kill -9 a few times, wherever it is: the finished run equals the undisturbed one."""
    index = open_source(images)
    config = replace(CONFIG, steps=60, checkpoint_every=5)
    pretrain(config, index, tmp_path / "whole")
    command = [sys.executable, "-c", _AGAIN, str(images), str(tmp_path / "killed")]
    for steps in (3, 17, 31):
        child = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE)
        while child.poll() is None and _steps(tmp_path / "killed") < steps:
            time.sleep(0.001)
        assert child.poll() is None, child.stderr.read().decode()
        child.kill()
        child.communicate()
    pretrain(config, index, tmp_path / "killed")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.partial"))


def _steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


_AGAIN = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from tests.test_pretrain import CONFIG, open_source, pretrain
torch.set_num_threads(1)
pretrain(replace(CONFIG, steps=60, checkpoint_every=5), open_source(sys.argv[1]), Path(sys.argv[2]))
"""
