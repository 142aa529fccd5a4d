"""Trainings that learn nothing, go on with other settings, meet one another, or lose images: nothing is silent."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks import on_ranks
from tests.test_pretrain import CONFIG
from troodon import cli, launch, lock, recipes, verbs
from troodon.config import UsageError, fingerprint, to_dict, to_yaml
from troodon.images.sources import open_source
from troodon.learn import engine
from troodon.learn.clock import Clock
from troodon.learn.config import GuardConfig, ParallelConfig, PretrainConfig
from troodon.learn.plan import shapes_change
from troodon.learn.pretrain import pretrain
from troodon.lock import alone
from troodon.model.backbone import Backbone
from troodon.model.config import SMALL, Preprocessing, ViTConfig
from troodon.recipes.lengths import for_steps, longer_than_run
from troodon.run import MetricsFile, publish
from troodon.verbs.common import resolve_config
from troodon.verbs.training import as_begun

START = replace(recipes.pretrain("vitl14"), reuse="whole")
TINY = (
    *("--batch", "8", "--threads", "1", "--compute", "fp32", "--probe-every", "0", "--health-every", "0"),
    *("--crops.global-px", "16", "--crops.local-px", "8", "--crops.locals", "1"),
    *("--dino-head.prototypes", "16", "--dino-head.hidden", "16", "--dino-head.bottleneck", "8"),
    *("--ibot-head.prototypes", "16", "--ibot-head.hidden", "16", "--ibot-head.bottleneck", "8"),
)
NEW = ["--vit.dim", "32", "--vit.depth", "1", "--vit.heads", "1", "--vit.grid", "2"]


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images", range(16))


@pytest.fixture
def backbone(tmp_path) -> Path:
    torch.manual_seed(0)
    vit = ViTConfig(dim=32, depth=1, heads=1, patch=8, grid=2, layer_scale=1.0)
    Backbone.random(vit, Preprocessing(18, 16)).save(tmp_path / "backbone")
    return tmp_path / "backbone"


def write_images(folder: Path, numbers) -> Path:
    folder.mkdir(exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng(i).integers(0, 255, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Backbone.load(run / "backbone" if (run / "backbone").is_dir() else run).vit.state_dict()


# ---- numbers of steps


@pytest.mark.parametrize("steps", [20, 250, 10_000])
@pytest.mark.parametrize("name", [*recipes.KNOWN["pretrain"], *recipes.KNOWN["distill"]])
def test_steps_reach_every_number_of_a_recipe(name, steps):
    """A recipe runs for fewer steps | warm-up, freezing and intervals keep their share; options still win"""
    verb = "pretrain" if name in recipes.KNOWN["pretrain"] else "distill"
    named = (lambda n: recipes.pretrain(n, lambda: START)) if verb == "pretrain" else recipes.distill
    whole, config = named(name), resolve_config(name, PretrainConfig(), named, {"steps": steps})
    now, before = config.schedules, whole.schedules
    for kind in ("lr", "weight_decay", "ema_momentum", "teacher_temperature"):
        assert getattr(now, kind).warmup == getattr(before, kind).warmup * steps // whole.steps, kind
    for kind in ("last_layer_frozen", "backbone_frozen"):
        assert getattr(now, kind) == getattr(before, kind) * steps // whole.steps, kind
    assert now.anchor.refresh == max(1, before.anchor.refresh * steps // whole.steps)
    for kind in ("health_every", "probe_every", "checkpoint_every"):
        most = max(10, steps // 4) if steps != whole.steps else whole.steps
        decides = kind == "probe_every" and whole.adapt.patience  # when the run stops
        share = max(1, whole.probe_every * steps // whole.steps)
        assert getattr(config, kind) == (share if decides else min(getattr(whole, kind), most))
    learns = sum(not now.at(step, steps).backbone_frozen for step in range(steps))
    assert learns == 0 if name == "heads" else learns >= 0.9 * steps
    recipe = recipes.KNOWN[verb][name]
    assert config == (recipe(START, steps=steps) if recipes.needs_start(recipe) else recipe(steps=steps))
    explicit = resolve_config(name, PretrainConfig(), named, {"steps": steps, "schedules": {"lr": {"warmup": 7}}})
    assert explicit == replace(config, schedules=replace(now, lr=replace(now.lr, warmup=7)))


def test_steps_mean_the_same_wherever_they_are_written(tmp_path):
    """The steps stand in a file, an option or a call | all mean the same, also on a file from `troodon recipes`"""
    file, whole = tmp_path / "mine.yaml", tmp_path / "whole.yaml"
    whole.write_text(to_yaml(recipes.pretrain("vits14")))
    words = ["--data", "d", "--out", "o"]
    expected = recipes.KNOWN["pretrain"]["vits14"](steps=1000)
    assert cli.parse_command("pretrain", [str(whole), *words]).config == recipes.pretrain("vits14")
    assert cli.parse_command("pretrain", [str(whole), *words, "--steps", "1000"]).config == expected
    assert cli.parse_command("pretrain", ["vits14", *words, "--steps=1000"]).config == expected
    assert cli.parse_command("pretrain", ["vits14", *words, "--steps", "9", "--steps", "1000"]).config == expected
    assert cli.parse_command("pretrain", ["vits14", *words, "--steps", "1_000"]).config == expected
    command = cli.parse_command("distill", ["distill_small", *words, "--teacher", "t", "--steps", "300"])
    assert command.configs["distill_small"] == recipes.KNOWN["distill"]["distill_small"](steps=300)
    file.write_text("steps: 200\n")
    assert cli.parse_command("pretrain", [str(file), *words]).config.schedules.lr.warmup == 20
    file.write_text("steps: 200\nschedules:\n  lr:\n    warmup: 50\n")
    config = cli.parse_command("pretrain", [str(file), *words]).config
    assert (config.schedules.lr.warmup, config.schedules.backbone_frozen) == (50, 0)
    file.write_text("schedules:\n  lr:\n    warmup: 50\n")
    config = cli.parse_command("pretrain", [str(file), *words, "--steps", "200"]).config
    assert (config.schedules.lr.warmup, config.schedules.last_layer_frozen) == (50, 2)


@pytest.mark.parametrize("recipe", ["adapt", "heads"])
def test_a_short_run_on_given_weights_changes_what_it_says(images, backbone, tmp_path, recipe):
    """`adapt` or `heads` runs for a few steps | `adapt` changes the backbone, `heads` only the heads"""
    words = [recipe, "--init", str(backbone), "--data", str(images), "--out", str(tmp_path / "run"), "--steps", "8"]
    assert cli.run(["pretrain", *words, *TINY, "--objective.koleo-group", "0"]) == 0
    before, after = weights(backbone), weights(tmp_path / "run")
    moved = any(not torch.equal(after[name], before[name]) for name in before)
    assert moved == (recipe == "adapt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--schedules.backbone-frozen", "9"], "backbone did not change in 4 steps: see schedules.backbone_frozen 9"),
        (["--schedules.lr.peak", "0", "--schedules.lr.end", "0"], "backbone, dino_head, ibot_head did not change in 4"),
        (["--schedules.ema-momentum.peak", "1", "--schedules.ema-momentum.end", "1"], "did not change in 4 steps"),
    ],
)
def test_a_run_in_which_nothing_was_learned_fails(images, tmp_path, capsys, options, said):
    """The rate is zero, or what should learn is frozen all along | the run names what did not change, and fails"""
    words = ["pretrain", "small_dino", "--data", str(images), "--out", str(tmp_path / "run"), "--steps", "4"]
    words += [*TINY, *NEW]
    assert cli.run([*words, *options]) == launch.FAILED
    err = capsys.readouterr().err
    assert said in err
    assert ("longer than the run of 4 steps: schedules.backbone_frozen 9" in err) == ("9" in options)
    assert cli.run([*words, *options]) == launch.FAILED  # it is still so


def test_numbers_that_are_longer_than_the_run_are_named(images, tmp_path, capsys):
    """A warm-up or freezing is longer than the run | a line names it before the first step"""
    config = replace(recipes.pretrain("vitl14"), steps=1000)
    assert longer_than_run(config) == ["schedules.lr.warmup 100,000", "schedules.last_layer_frozen 1,250"]
    assert longer_than_run(recipes.pretrain("vitl14")) == []
    assert for_steps(config, 1000) is config
    words = ["pretrain", "small_dino", "--data", str(images), "--out", str(tmp_path / "run"), *TINY, *NEW]
    cli.run([*words, "--steps", "2", "--schedules.lr.warmup", "20"])
    assert "longer than the run of 2 steps: schedules.lr.warmup 20\n" in capsys.readouterr().err


# ---- what may change on resume


FREE = {
    "threads": 2, "processes": 1, "image_cache_gib": 0.5, "log_every": 2, "log_to": ("tensorboard",),
    "health_every": 2, "probe_every": 1, "checkpoint_every": 2, "keep": 5, "keep_every": 3,
    "max_broken": 0.9, "guard": GuardConfig(limit=9), "parallel": ParallelConfig(recompute="full"),
}  # fmt: skip


def test_settings_that_change_no_result_may_change_on_resume(images, tmp_path):
    """A run goes on with other threads, loggers or intervals | it may, to the bit, and config.yaml has the latest"""
    index, run = open_source(images), tmp_path / "run"
    pretrain(CONFIG, index, tmp_path / "whole")
    pretrain(CONFIG, index, run)
    for folder in ("000006", "000003"):
        shutil.rmtree(run / "checkpoints" / folder)
        changed = replace(CONFIG, **({name: FREE[name] for name in FREE if name not in ("processes", "log_to")}))
        pretrain(changed, index, run)
        assert (run / "config.yaml").read_text() == to_yaml(changed)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(run)[name], tensor)
    for name in ("processes", "log_to"):
        pretrain(replace(CONFIG, **{name: FREE[name]}), index, run)
    pretrain(CONFIG, index, run)
    assert (run / "config.yaml").read_text() == to_yaml(CONFIG)


@pytest.mark.parametrize(
    "change",
    [{"steps": 8}, {"seed": 1}, {"batch": 4}, {"compute": "bf16"}, {"parallel": ParallelConfig(reduce="bf16")},
     {"parallel": ParallelConfig(accumulate=2)}, {"guard": GuardConfig("skip")}, {"weights": (1.0,)}],
)  # fmt: skip
def test_settings_that_may_change_the_result_are_refused_with_the_way_out(images, tmp_path, change):
    """A run goes on with other steps, seed or batch | refused, with the differences and how to start from it"""
    config, run = (
        replace(CONFIG, steps=2, objective=replace(CONFIG.objective, terms=(("dino", 1.0),))),
        tmp_path / "run",
    )
    pretrain(config, open_source(images), run)
    message = rf"a run with other settings \(config\..*\); choose a new --out, or start from it: --init {run} --reuse"
    with pytest.raises(UsageError, match=message):
        pretrain(replace(config, **change), open_source(images), run)


def test_a_run_that_failed_before_its_first_step_is_not_in_the_way(images, tmp_path, capsys):
    """No image could be read, and then they are repaired | the same command works, also with other settings"""
    bad = tmp_path / "bad"
    bad.mkdir()
    for i in range(16):
        (bad / f"{i:02d}.png").write_text("no image")
    words = ["pretrain", "small_dino", "--data", str(bad), "--out", str(tmp_path / "run"), "--steps", "2", *TINY, *NEW]
    assert cli.run(words) == launch.MISTAKE
    assert cli.run(["pretrain", "heads", "--init", str(tmp_path / "run"), "--data", str(bad), "--out", "x"]) != 0
    assert "a run without a checkpoint" in capsys.readouterr().err
    write_images(bad, range(16))
    assert cli.run([*words, "--seed", "3"]) == launch.DONE
    assert "seed: 3" in (tmp_path / "run" / "config.yaml").read_text()
    assert cli.run([*words, "--seed", "4"]) == launch.MISTAKE  # now it has learned


def test_a_folder_that_only_looks_like_a_run_is_left_alone(images, tmp_path):
    """--out holds a config.yaml or manifest.json of something else | refused, and nothing is touched"""
    for name, text in (("config.yaml", "mine: 1"), ("manifest.json", '{"name": "an app"}')):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / name).write_text(text)
        with pytest.raises(UsageError, match="is not empty and not a run"):
            pretrain(CONFIG, open_source(images), other)
        assert [(p.name, p.read_text()) for p in other.iterdir()] == [(name, text)]


def test_a_run_of_an_earlier_version_keeps_its_numbers_of_steps(images, tmp_path, capsys):
    """A run began when recipes ignored --steps | the same command keeps the numbers it began with, and says so"""
    index, run = open_source(images), tmp_path / "run"
    begun = replace(CONFIG, schedules=replace(CONFIG.schedules, lr=replace(CONFIG.schedules.lr, warmup=5)))
    pretrain(begun, index, run)
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["settings"]["config"]["max_broken"]
    data = fingerprint(index.column("path"), index.column("length"))
    manifest["fingerprint"] = fingerprint(manifest["settings"], data)
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert as_begun(CONFIG, run) == begun
    assert "other numbers of steps, which stay (schedules.lr.warmup: 2 -> 5)" in capsys.readouterr().err
    pretrain(as_begun(CONFIG, run), index, run)
    rate = replace(CONFIG.schedules.lr, peak=2e-3)
    for other in (replace(CONFIG, steps=7), replace(CONFIG, schedules=replace(CONFIG.schedules, lr=rate))):
        assert as_begun(other, run) == other
        with pytest.raises(UsageError, match="a run with other settings"):
            pretrain(as_begun(other, run), index, run)


# ---- one command at a time


@contextlib.contextmanager
def other_process(folder: Path, then: str = "time.sleep(60)") -> Iterator[subprocess.Popen]:
    """A process that works on `folder`, until it is done or the block ends, when it is killed."""
    code = f"""
        import time; from pathlib import Path; from troodon import lock, run
        run.current_command[:] = ["troodon", "pretrain", "small_dino"]
        with lock.alone(Path({str(folder)!r})):
            print("at work", flush=True); {then}
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        yield process
        process.kill()


def test_the_same_command_twice_at_once(images, backbone, tmp_path, capsys):
    """A command starts twice at once on one --out | the second names the process at work, and stops (exit 2)"""
    out, data = str(tmp_path / "out"), str(images)
    commands = [
        ["pretrain", "small_dino", "--data", data, "--out", out, "--steps", "2", *TINY, *NEW],
        ["distill", "distill_features", "--teacher", str(backbone), "--data", data, "--out", out, "--steps", "2"],
        ["pack", data, "--out", out],
        ["scan", data, "--out", out],
        ["embed", "--backbone", str(backbone), "--data", data, "--out", out],
        ["curate", "curate_small", "--gather", "all", "--uncurated", data, "--backbone", str(backbone), "--out", out],
        ["evaluate", "mine", "--backbone", str(backbone), "--data", data, "--out", out],
        ["demo", "--out", out],
    ]
    with other_process(tmp_path / "out") as process:
        for words in commands:
            code, err = cli.run(words), capsys.readouterr().err
            assert (code, f"process {process.pid} on " in err) == (launch.MISTAKE, True), err
            assert f"{out}: troodon pretrain small_dino is at work on it (process" in err
    assert not Path(out).exists()
    assert cli.run(commands[0]) == launch.DONE  # the lock ended with the process that was killed
    assert not list(tmp_path.glob(".*"))


def test_a_lock_knows_threads_ranks_and_who_started_them(tmp_path, monkeypatch):
    """Two threads write one --out, or several ranks do | the second thread is refused, ranks work together"""
    out, caught = tmp_path / "out", []

    def enter():
        try:
            with alone(out):
                pass
        except UsageError as error:
            caught.append(str(error))

    with alone(out), alone(out):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        code = f"from pathlib import Path; from troodon.lock import alone\nwith alone(Path({str(out)!r})): pass"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert f"process {os.getpid()} on " in caught[0]
    with other_process(out):
        monkeypatch.setenv("RANK", "1")
        with alone(out):
            pass


def test_a_filesystem_without_locks(tmp_path, monkeypatch):
    """The filesystem of --out has no locks | a file names the process at work, and counts while that lives"""
    import fcntl

    def no_locks(*_):
        raise OSError(95, "not supported")

    with other_process(tmp_path / "out") as process:
        monkeypatch.setattr(fcntl, "lockf", no_locks)
        with pytest.raises(UsageError, match=f"process {process.pid} on "), alone(tmp_path / "out"):
            pass
    assert (tmp_path / ".out.lock").exists()
    with alone(tmp_path / "out"):
        assert json.loads((tmp_path / ".out.lock").read_text())["process"] == os.getpid()
    assert not (tmp_path / ".out.lock").exists()


def test_a_command_that_finds_all_done_is_waited_for(tmp_path, monkeypatch):
    """A command begins while another only finds that all is done | it waits half a second, and works"""
    assert lock.WAIT_S == 0.5
    monkeypatch.setattr(lock, "WAIT_S", 30)  # machines of tests are busy
    with other_process(tmp_path / "out", "time.sleep(0.1)"), alone(tmp_path / "out"):
        assert (tmp_path / ".out.lock").exists()


# ---- folders of others


def test_saving_deletes_nothing_of_others(backbone, tmp_path):
    """An artifact is saved into a folder with other files | refused, and every file stays"""
    network, home = Backbone.load(backbone), tmp_path / "models"
    home.mkdir()
    (home / "thesis.txt").write_text("three years")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        network.save(home)
    (tmp_path / "models.partial").mkdir()  # nor if a killed command has left something
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        network.save(home)
    assert (home / "thesis.txt").read_text() == "three years"
    network.save(backbone)  # one of its kind is replaced
    (backbone / "thesis.txt").write_text("three years")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        network.save(backbone)
    assert (backbone / "thesis.txt").exists()
    with pytest.raises(UsageError, match="is there and not an index"), publish(backbone, "index", "x", {}):
        pass
    with pytest.raises(UsageError, match=r"model\.safetensors: "):
        network.save(backbone / "model.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    network.save(tmp_path / "link")
    assert (tmp_path / "empty" / "backbone.json").exists()
    assert (tmp_path / "link").is_symlink()


# ---- images that cannot be read


def test_unreadable_images_are_told(images, tmp_path, capsys):
    """Some images of a training cannot be read | a line at the first and at the end, an alarm when they are many"""
    for name in ("03.png", "05.png"):
        (images / name).write_bytes((images / name).read_bytes()[:60])
    words = ["pretrain", "small_dino", "--data", str(images), "--out", str(tmp_path / "run"), "--steps", "3"]
    words += [*TINY, *NEW]
    assert cli.run(words) == launch.DONE
    err = capsys.readouterr().err
    assert "an image cannot be read and is set aside" in err
    assert "alarm: 12% of the images tried cannot be read" in err
    assert f"2 images could not be read: see {tmp_path / 'run' / 'quarantine.jsonl'}" in err
    listed = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert [Path(json.loads(line)["path"]).name for line in listed] == ["03.png", "05.png"]


def test_a_training_on_few_readable_images_stops(images, tmp_path, capsys):
    """Most images of a training cannot be read | above max_broken (0.5 by default) it saves and stops"""
    for path in sorted(images.iterdir())[:-1]:
        path.write_bytes(path.read_bytes()[:60])
    words = ["pretrain", "small_dino", "--data", str(images), "--out", str(tmp_path / "run"), "--steps", "9"]
    words += [*TINY, *NEW]
    assert cli.run(words) == launch.FAILED
    err = capsys.readouterr().err
    assert "of the images tried cannot be read, and max_broken is 0.5; stopped at step 1, everything is saved" in err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000001"]
    assert cli.run([*words, "--max-broken", "1"]) == launch.DONE  # as it was asked to
    steps = [r["step"] for r in MetricsFile(tmp_path / "run" / "metrics.jsonl").read() if "step" in r]
    assert steps[-1] == 8


def test_the_share_of_unreadable_images_is_of_those_tried(images):
    """Few of many images were tried so far | the share of unreadable ones is of those tried, not of all"""
    config = PretrainConfig(vit=SMALL, batch=4)
    loader = engine._loader(config, open_source(images), None, Clock(config))
    loader.broken.update(dict.fromkeys(range(3), "broken"))
    assert [loader.broken_share(batches) for batches in (1, 100)] == [3 / 15, 3 / 16]
    assert to_dict(config)["max_broken"] == 0.5
    assert verbs.pretrain


# ---- stochastic depth


def test_stochastic_depth_is_the_same_on_any_number_of_ranks(images, tmp_path):
    """A run with vit.drop_path goes to another number of devices | each image skips the same branches as before"""
    config = replace(CONFIG, vit=replace(CONFIG.vit, drop_path=0.4), seed=5)
    pretrain(config, open_source(images), tmp_path / "one")
    on_ranks(2, pretrain, config, open_source(images), tmp_path / "two")
    other = replace(config, vit=replace(CONFIG.vit, drop_path=0.0))
    pretrain(other, open_source(images), tmp_path / "other")
    one, two, plain = (weights(tmp_path / run) for run in ("one", "two", "other"))
    of_ranks, of_drawing = (max((one[n] - x[n]).abs().max().item() for n in one) for x in (two, plain))
    assert 20 * of_ranks < of_drawing


def test_a_run_whose_ranks_drew_by_themselves_is_told(images, tmp_path, capsys):
    """A run that an earlier version began goes on, with other draws | it goes on, and says which draws are others"""
    config, index, run = replace(CONFIG, vit=replace(CONFIG.vit, drop_path=0.4)), open_source(images), tmp_path / "run"
    pretrain(config, index, run)
    shutil.rmtree(run / "checkpoints" / "000006")
    pretrain(config, index, run)
    assert "this run began" not in capsys.readouterr().err
    manifest = json.loads((run / "manifest.json").read_text())
    assert [manifest["settings"].pop(name) for name in ("drop_path", "masks")] == ["by image", "by crop"]
    manifest["fingerprint"] = fingerprint(
        manifest["settings"], fingerprint(index.column("path"), index.column("length"))
    )
    (run / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(run / "checkpoints" / "000006")
    pretrain(config, index, run)
    told = capsys.readouterr().err
    assert "warning: this run began when each rank drew by itself" in told
    assert "warning: this run began when the masks of a batch were drawn one after another" in told
    with pytest.raises(UsageError, match=r"other settings \(config.seed: 0 -> 1\)"):
        pretrain(replace(config, seed=1), index, run)


def test_compiled_blocks_with_changing_shapes_are_told():
    """parallel.compile with vit.drop_path and few images on a device | a warning says why it helps little"""
    config = replace(
        PretrainConfig(), batch=48, vit=replace(SMALL, drop_path=0.1), parallel=ParallelConfig(compile="always")
    )
    assert [shapes_change(config, ranks) is None for ranks in (1, 2, 4, 3)] == [True, True, True, False]
    assert "whole groups of 12 images go through them at once, and here 16 do" in (shapes_change(config, 3) or "")
    assert shapes_change(replace(config, vit=SMALL), 3) is None
