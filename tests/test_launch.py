"""Ranks that a run starts itself: they train the same run; signals, mistakes and failures are reported once."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.test_pretrain import CONFIG, images, records, weights  # noqa: F401  images is a fixture
from troodon import cli, dist, launch, verbs
from troodon.config import UsageError, to_yaml
from troodon.devices import ranks_to_start
from troodon.images.sources import open_source
from troodon.learn import checkpoint
from troodon.learn.config import ObjectiveConfig
from troodon.learn.engine import Interrupted
from troodon.learn.pretrain import pretrain
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing

SHARED = replace(CONFIG, objective=ObjectiveConfig(koleo_group=4))  # two ranks compute the same as one


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # also for processes that are killed before they clean up
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.fixture
def fake_rank(tmp_path, monkeypatch) -> Callable[[str], None]:
    """`fake_rank(code)` makes every rank run this code, which may use its `rank` and write to `folder`."""

    def replace_python(code: str) -> None:
        script = tmp_path / "rank"
        head = "import os, pathlib, signal, sys, time\n"
        place = f"rank, folder = int(os.environ['RANK']), pathlib.Path({str(tmp_path)!r})\n"
        (tmp_path / "rank.py").write_text(head + place + code)
        # Through a shell: the first line of a script may not name an interpreter whose path has a space.
        words = " ".join(map(shlex.quote, (sys.executable, str(tmp_path / "rank.py"))))
        script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return replace_python


def when(condition: Callable[[], bool], do: Callable[[], None]) -> None:
    """Do something in another thread as soon as a condition holds."""

    def wait() -> None:
        end = time.monotonic() + 250  # before the test itself times out
        while time.monotonic() < end:
            if condition():
                return do()
            time.sleep(0.01)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
def test_two_ranks_train_as_one_does(images, tmp_path, capfd):  # noqa: F811
    pretrain(SHARED, open_source(images), tmp_path / "single")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(SHARED))
    command = ["pretrain", str(recipe), "--data", str(images), "--out", str(tmp_path / "two"), "--devices", "2"]
    capfd.readouterr()
    assert cli.run(command) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [str(tmp_path / "two" / "backbone")]
    assert err.count("next:") == 1
    assert err.count("2 x cpu") == 1
    for a, b in zip(records(tmp_path / "single"), records(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    for name, tensor in weights(tmp_path / "single").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=2e-5)
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["command"] == ["troodon", *command]
    assert (tmp_path / "two" / "config.yaml").read_text() == (tmp_path / "single" / "config.yaml").read_text()

    assert cli.run([*command, "--seed", "1"]) == 2  # only rank zero notices; the other rank fails because it waits
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"troodon pretrain: {tmp_path / 'two'}: a run with other settings (config.seed: 0 -> 1); " + (
        f"choose a new --out, or start from it: --init {tmp_path / 'two'} --reuse whole\n"
    )


@pytest.mark.slow
def test_a_failed_rank_ends_the_job_a_signal_saves_it_and_the_same_command_goes_on(
    images,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    run, ranks, killed_at = tmp_path / "run", [], []
    config = replace(SHARED, steps=120, checkpoint_every=5)

    class RecordedPopen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            ranks.append(self)

    monkeypatch.setattr(subprocess, "Popen", RecordedPopen)

    def kill_a_rank():
        killed_at.append(time.monotonic())
        os.kill(ranks[1].pid, signal.SIGKILL)

    when(lambda: bool(checkpoint.finished(run)), kill_a_rank)
    with pytest.raises(launch.RankFailed, match=r"rank 1 of 2 died of SIGKILL .* the same command goes on"):
        verbs.pretrain(config, images, run, devices=2)
    assert time.monotonic() - killed_at[0] < 15
    saved = checkpoint.finished(run)[-1]

    when(lambda: checkpoint.finished(run)[-1] > saved, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"stopped after .* of 120 steps; everything is saved"):
        verbs.pretrain(config, images, run, devices="2")
    assert int(checkpoint.finished(run)[-1].name) == len(records(run)) < 120

    assert verbs.pretrain(config, images, run, devices=2) == run / "backbone"
    assert [r["step"] for r in records(run)] == list(range(120))
    assert all(child.returncode is not None for child in ranks)


@pytest.mark.slow
def test_ranks_end_with_the_process_that_started_them(images, tmp_path):  # noqa: F811
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(to_yaml(replace(SHARED, steps=100_000, checkpoint_every=100_000)))
    command = [sys.executable, "-m", "troodon", "pretrain", recipe, "--data", images, "--out", run, "--devices", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as parent:
        while parent.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.01)
        parent.kill()
        parent.stderr.read()  # ends with the last that holds it: rank zero
    assert int(checkpoint.finished(run)[-1].name) == len(records(run))


def test_a_failed_rank_ends_the_others(fake_rank, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    fake_rank("if rank == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
         "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)")  # fmt: skip
    start = time.monotonic()
    result = launch.launch([], 3)
    assert result.code == 1
    assert result.message.startswith("rank 2 of 3 died of SIGKILL")
    assert time.monotonic() - start < 10


def test_standard_error_of_a_rank_without_a_report_is_shown(fake_rank, capfd):
    fake_rank("if rank == 1: print('no such device', file=sys.stderr); sys.exit(7)\nprint('not shown')")
    assert launch.launch([], 2) == launch.LaunchResult(1, "rank 1 of 2 ended with exit code 7")
    assert capfd.readouterr() == ("", "no such device\n")


def test_the_first_failure_is_reported(fake_rank):
    fake_rank("""
time.sleep(0 if rank else 0.5)  # the other is gone first, yet this one was the cause
meet = pathlib.Path(os.environ['TROODON_RENDEZVOUS'])
if rank == 0: os.symlink('0', meet / 'first')
(meet / f'{rank}.json').write_text('{"said": "disk %d is full", "trace": "where"}' % rank)
sys.exit(1)
""")
    assert launch.launch([], 2) == launch.LaunchResult(1, "rank 0 of 2: disk 0 is full", "where")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_the_ranks_may_save(fake_rank, tmp_path, monkeypatch, number):
    monkeypatch.setattr(launch, "GRACE_S", 0.1)
    fake_rank("""
received = []
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda n, _: received.append(n))
(folder / f'ready{rank}').touch()
while not received: time.sleep(0.01)
time.sleep(0.5 * rank)  # it saves for longer than the grace of a lost rank
(folder / f'received{rank}').write_text(repr([int(n) for n in received]))
sys.exit(130)
""")
    before = signal.getsignal(number)
    when(lambda: len(list(tmp_path.glob("ready*"))) == 2, lambda: os.kill(os.getpid(), number))
    assert launch.launch([], 2) == launch.LaunchResult(130, "interrupted")
    assert [(tmp_path / f"received{n}").read_text() for n in range(2)] == [f"[{int(number)}]"] * 2
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_does_not_wait(fake_rank, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    fake_rank("signal.signal(signal.SIGINT, lambda *_: (folder / f'interrupted{rank}').touch())\n"
         "(folder / f'ready{rank}').touch()\nwhile True: time.sleep(0.01)")  # fmt: skip
    when(lambda: len(list(tmp_path.glob("ready*"))) == 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    when(lambda: len(list(tmp_path.glob("interrupted*"))) == 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert launch.launch([], 2) == launch.LaunchResult(130, "interrupted")


def test_the_environment_of_a_rank(fake_rank, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    fake_rank("(folder / f'env{rank}').write_text(' '.join([*sys.argv[1:], *(os.environ[n] for n in "
         "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS'))]))")  # fmt: skip
    assert launch.launch(["pretrain", "x"], 2) == launch.LaunchResult()
    assert [(tmp_path / f"env{n}").read_text() for n in range(2)] == [
        "-m troodon.cli pretrain x 0 0 2 3",
        "-m troodon.cli pretrain x 1 1 2 3",
    ]


@pytest.mark.parametrize(
    ("result", "kind", "code"),
    [
        (launch.LaunchResult(130, "stopped after 3 of 6 steps; everything is saved", "where"), Interrupted, 130),
        (launch.LaunchResult(2, "out: a run with other settings", "where"), UsageError, 2),
        (launch.LaunchResult(1, "rank 1 of 2 died of SIGKILL"), RuntimeError, 1),
    ],
)
def test_a_failure_becomes_an_exception_and_one_line(images, tmp_path, monkeypatch, capsys, result, kind, code):  # noqa: F811
    monkeypatch.setattr(launch, "launch", lambda words, ranks, began: result)
    with pytest.raises(kind) as raised:
        verbs.pretrain(CONFIG, images, tmp_path / "run", devices=2)
    assert str(raised.value) == result.message
    assert raised.value.__notes__ == [result.traceback]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(CONFIG))
    assert cli.run(["pretrain", str(recipe), "--data", str(images), "--out", "run", "--devices", "2"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"troodon pretrain: {result.message}")


@pytest.mark.parametrize(
    ("change", "devices", "message"),
    [
        ({}, "x", "devices 'x': a number or auto"),
        ({}, 0, "devices '0': a number or auto"),
        ({}, "-1", "devices '-1': a number or auto"),
        ({}, 3, "batch 8 does not divide over 3 devices: set batch 9, or devices 2"),
        ({"batch": 10}, "4", "batch 10 does not divide over 4 devices: set batch 8, or devices 2"),
        ({"crops": replace(CONFIG.crops, global_px=18)}, 2, "crops.global_px 18 does not divide"),
    ],
)
def test_mistakes_are_reported_before_anything_starts(images, tmp_path, monkeypatch, change, devices, message):  # noqa: F811
    monkeypatch.setattr(launch, "launch", None)
    with pytest.raises(UsageError, match=message):
        verbs.pretrain(replace(CONFIG, **change), images, tmp_path / "run", devices=devices)
    assert not (tmp_path / "run").exists()


def test_ranks_need_paths(images, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(launch, "launch", None)
    init = Backbone.random(CONFIG.vit, Preprocessing(18, 16), seed=0)
    with pytest.raises(UsageError, match="init: several processes need its path, not a Backbone; save it"):
        verbs.pretrain(CONFIG, images, tmp_path / "run", init=init, devices=2)
    launched = []
    monkeypatch.setattr(launch, "launch", lambda words, ranks, began: launched.extend(words) or launch.LaunchResult())
    init.save(tmp_path / "init")
    verbs.pretrain(CONFIG, [images, images / "00.png"], tmp_path / "run", init=tmp_path / "init", devices=2)
    assert launched[2:] == ["--data", str(images), str(images / "00.png"), "--out", str(tmp_path / "run"),
                         "--init", str(tmp_path / "init")]  # fmt: skip


def test_a_dry_run_starts_nothing(images, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(launch, "launch", None)
    verbs.pretrain(CONFIG, images, tmp_path / "run", devices=2, dry_run=True)
    assert "2 x " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_devices_are_those_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ranks_to_start("auto") == 1
    assert ranks_to_start("4") == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert ranks_to_start("auto") == 4
    assert ranks_to_start(2) == 2
    with pytest.raises(UsageError, match="devices 5: this machine has 4"):
        ranks_to_start("5")
    assert dist.device() == torch.device("cuda", 0)
    monkeypatch.setenv("RANK", "1")  # started by others: by torchrun, by Slurm, by ourselves
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks_to_start("auto") == 1
    assert dist.device() == torch.device("cuda", 1)
