"""A run is its config: resumed, interrupted, sharded or guarded, it is the same run or a clear stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks import on_ranks
from troodon.config import UsageError
from troodon.data.config import CropsConfig
from troodon.data.sources import open_source
from troodon.learn import checkpoint, loop
from troodon.learn.config import ObjectiveConfig, PretrainConfig
from troodon.learn.pretrain import Interrupted, pretrain
from troodon.learn.schedules import Schedule, Schedules
from troodon.model.backbone import Backbone
from troodon.model.config import HeadConfig, ViTConfig

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
    folder = pretrain(CONFIG, open_source(images), tmp_path / "run", probe=lambda backbone: 0.25)
    assert folder == tmp_path / "run" / "backbone"
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(6))
    last = records(tmp_path / "run")[-1]
    assert last["loss"] == pytest.approx(sum(last[n] for n in ("dino_global", "dino_local", "ibot", "koleo")))
    assert last["knn"] == 0.25
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "backbone", "checkpoints", "config.yaml", "environment.json", "images.parquet", "manifest.json",
        "metrics.jsonl", "pictures",
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

    monkeypatch.setattr(checkpoint, "save", _killed_after(3, checkpoint.save))
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


def _killed_after(step, save):
    def saving(run, done, *rest):
        save(run, done, *rest)
        if done == step:
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
    config = replace(CONFIG, objective=ObjectiveConfig(koleo_group=4))
    pretrain(config, index, tmp_path / "single")
    on_ranks(2, pretrain, config, index, tmp_path / "sharded")
    for a, b in zip(records(tmp_path / "single"), records(tmp_path / "sharded"), strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    for name, tensor in weights(tmp_path / "single").items():
        torch.testing.assert_close(weights(tmp_path / "sharded")[name], tensor, rtol=1e-3, atol=2e-5)


def test_saved_on_two_ranks_resumes_on_one(images, tmp_path):
    index = open_source(images)
    config = replace(CONFIG, objective=ObjectiveConfig(koleo_group=4))
    pretrain(config, index, tmp_path / "whole")
    on_ranks(2, _cut, config, index, tmp_path / "run")
    pretrain(config, index, tmp_path / "run")
    for a, b in zip(records(tmp_path / "whole"), records(tmp_path / "run"), strict=True):
        assert a == pytest.approx(b, rel=2e-5)


def _cut(config, index, run):
    checkpoint.save = _killed_after(3, checkpoint.save)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, index, run)


def test_a_loss_that_is_not_finite_changes_nothing(images, tmp_path, monkeypatch):
    real = loop.optim.clip

    def poisoned(student, largest):
        if poisoned.calls == 4:
            next(student.parameters()).grad.fill_(float("inf"))
        poisoned.calls += 1
        return real(student, largest)

    poisoned.calls = 0
    monkeypatch.setattr(loop.optim, "clip", poisoned)
    with pytest.raises(FloatingPointError, match="step 4: the loss or its gradient is not finite"):
        pretrain(CONFIG, open_source(images), tmp_path / "run")
    assert [p.name for p in checkpoint.finished(tmp_path / "run")] == ["000003"]
    monkeypatch.undo()
    pretrain(CONFIG, open_source(images), tmp_path / "run")  # goes on from the last good step
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


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
