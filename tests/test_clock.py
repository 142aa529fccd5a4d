"""A run of so many minutes ends on time, goes through its schedules without a jump, and goes on after a kill."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import troodon
from tests.ranks import on_ranks
from troodon import cli
from troodon.config import UsageError
from troodon.images.sources import open_source
from troodon.learn import checkpoint, clock
from troodon.learn.clock import Clock
from troodon.learn.config import PretrainConfig
from troodon.learn.pretrain import pretrain
from troodon.learn.schedules import Anchor, Pace, Schedules
from troodon.verbs import training

from .test_pretrain import CONFIG, _killed_after, images, weights  # noqa: F401


def times(monkeypatch, *, each: float = 0.0) -> SimpleNamespace:
    """A clock on the wall that only moves when `now` is set, and by `each` when it is read."""
    wall = SimpleNamespace(now=100.0)

    def monotonic() -> float:
        wall.now += each
        return wall.now

    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=monotonic))
    return wall


def simulate(monkeypatch, seconds_of, config: PretrainConfig, end_s: float = 0.0) -> tuple[list[float], float]:
    """Positions of the steps of a run whose step number n takes `seconds_of(n)`, and the time that the run took."""
    wall = times(monkeypatch)
    run, step, positions = Clock(config), 0, []
    wall.now += 5.0  # before the first step
    run.start(0)
    while step < run.pace.end:
        positions.append(run.pace.at(step) / run.pace.steps)
        wall.now += seconds_of(step)
        step += 1
        if run.due(step, 200):
            wall.now += end_s
            run.noted(end_s, 0.0)
        run.tick(step)
    return positions, wall.now - 100.0


@pytest.mark.parametrize(
    "seconds_of",
    [
        lambda step: 0.05,
        lambda step: 3.0,  # 80 steps, where the recipe has 3,000
        lambda step: 60.0 if step == 0 else 0.05,  # compiling
        lambda step: 0.05 if step < 1000 else 0.15,  # another process
        lambda step: 0.15 if step < 500 else 0.05,
        lambda step: 0.05 if step % 3 else 0.1,  # crops of two sizes
    ],
)
def test_a_run_of_so_many_minutes_ends_on_time_and_its_schedules_do_not_jump(seconds_of, monkeypatch):
    positions, took = simulate(monkeypatch, seconds_of, PretrainConfig(steps=3000, minutes=4), end_s=4.0)
    assert 0.9 * 240 < took < 1.05 * 240
    jumps = [after - before for before, after in zip(positions, [*positions[1:], 1.0])]
    assert min(jumps) >= 0
    assert max(jumps) < max(0.02, 3 / len(positions))
    halfway = sum(position < 0.5 for position in positions) / len(positions)
    assert 0.2 < halfway < 0.8


def test_what_is_done_at_intervals_is_done_at_each_quarter_of_few_steps(monkeypatch):
    times(monkeypatch)
    run = Clock(PretrainConfig(steps=3000, minutes=4))
    run.pace = Pace(3000, 40)
    assert [done for done in range(1, 41) if run.due(done, 200)] == [10, 20, 30, 40]
    assert [done for done in range(1, 41) if run.due(done, 8)] == [8, 16, 24, 32, 40]
    assert [done for done in range(1, 41) if run.due(done, 600, by_share=True)] == [8, 16, 24, 32, 40]
    assert not any(run.due(done, 0) for done in range(1, 41))


@pytest.mark.parametrize("steps", [1, 7, 3000, 125_000, 999_983])
def test_a_run_of_so_many_steps_is_in_its_schedules_exactly_at_its_step(steps):
    pace, schedules = Pace(steps, steps), Schedules(anchor=Anchor(start=steps // 2, refresh=3))
    for step in {0, 1, 2, steps // 3, steps // 2, steps // 2 + 3, steps - 1} - {steps}:
        assert pace.at(step) == step
        assert schedules.at(pace.at(step), steps, pace.at(step + 1)) == schedules.at(step, steps)


def test_a_step_over_many_positions_still_takes_the_anchor():
    schedules = Schedules(anchor=Anchor(start=100, refresh=50))
    taken = [schedules.at(7.5 * n, 300, 7.5 * (n + 1)).new_anchor for n in range(40)]
    assert [n for n, new in enumerate(taken) if new] == [13, 20, 26, 33]  # 100, 150, 200, 250


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_where_it_was_in_its_schedules(images, tmp_path, monkeypatch):  # noqa: F811
    config, index, run = replace(CONFIG, minutes=0.1, steps=60), open_source(images), tmp_path / "run"
    times(monkeypatch, each=0.03)
    monkeypatch.setattr(checkpoint.Saver, "save", _killed_after(3, checkpoint.Saver.save))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, index, run)
    monkeypatch.undo()
    saved = json.loads((checkpoint.finished(run)[-1] / "run.json").read_text())["progress"]
    times(monkeypatch, each=0.03)
    pretrain(config, index, run)
    steps = [r for r in records(run) if "step" in r]
    assert [r["step"] for r in steps] == list(range(len(steps)))
    shares, first = [r["share"] for r in steps], saved["step"]
    expected = Pace(**{name: saved["clock"][name] for name in ("steps", "left", "first", "position")})
    assert shares[first] == expected.at(first + 1) / 60
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert saved["clock"]["seconds"] < 6
    (told,) = [r["message"] for r in records(run) if r.get("event") == "time"]
    assert told.startswith(f"{len(steps)} steps in ")
    assert 0.75 * 6 < _seconds(told) < 1.1 * 6
    before, metrics = weights(run), (run / "metrics.jsonl").read_bytes()
    pretrain(config, index, run)  # finished: nothing to do
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert before.keys() == weights(run).keys()
    with pytest.raises(UsageError, match=r"minutes: 0.1 -> 0.2"):
        pretrain(replace(config, minutes=0.2), index, run)


def test_ranks_agree_on_the_number_of_steps(images, tmp_path):  # noqa: F811
    on_ranks(2, pretrain, replace(CONFIG, minutes=0.02), open_source(images), tmp_path / "run")
    assert [r["share"] for r in records(tmp_path / "run") if "share" in r][-1] == 1


def test_the_command_and_what_it_leaves(images, tmp_path, capsys, monkeypatch):  # noqa: F811
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"steps": 50, **_tiny()}))
    words = ["pretrain", str(tmp_path / "tiny.yaml"), "--data", str(images), "--out", str(tmp_path / "run")]
    assert cli.run([*words, "--minutes", "1", "--steps", "3"]) == 2
    assert "--steps and --minutes: give one of them" in capsys.readouterr().err
    assert cli.run([*words, "--hours", "1", "--dry-run"]) == 0
    assert "about 1 h" in capsys.readouterr().err
    wall = times(monkeypatch, each=0.05)
    monkeypatch.setattr(training, "began_at", lambda: wall.now)
    assert cli.run([*words, "--minutes", "0.05"]) == 0
    assert 0.7 * 3 < _seconds(capsys.readouterr().err) < 1.2 * 3
    last = max(r["step"] for r in records(tmp_path / "run") if "step" in r) + 1
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["steps"], config["minutes"]) == (last, 0.05)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["config"]["minutes"] == 0.05
    assert cli.run([*words, "--minutes", "0.05"]) == 0
    assert f"finished at step {last}" in capsys.readouterr().err
    with pytest.raises(UsageError, match="steps 3 and minutes 1: give one of them"):
        troodon.pretrain("small", str(images), tmp_path / "other", settings={"steps": 3}, minutes=1)


def _seconds(message: str) -> float:
    """How long a run took, as it says at its end."""
    (seconds,) = re.findall(r"steps in ([\d.]+) s of", message)
    return float(seconds)


def _tiny() -> dict:
    return {
        "vit": {"dim": 32, "depth": 1, "heads": 2, "patch": 4, "grid": 4, "layer_scale": 0.1},
        "dino_head": {"prototypes": 48, "hidden": 32, "bottleneck": 16},
        "ibot_head": {"prototypes": 48, "hidden": 32, "bottleneck": 16},
        "crops": {"global_px": 16, "local_px": 8, "locals": 2},
        "batch": 8,
        "compute": "fp32",
        "threads": 1,
    }
