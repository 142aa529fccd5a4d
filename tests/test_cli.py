"""The commands: one clear line for a mistake, exit codes, nothing written; and the main job on real files."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pages import flag_of
from troodon import cli

TINY = [
    "--vit.dim", "32", "--vit.depth", "2", "--vit.heads", "2", "--vit.patch", "8", "--vit.grid", "2",
    "--crops.global-px", "16", "--crops.local-px", "8", "--crops.locals", "2", "--batch", "8", "--steps", "4",
    "--log-every", "1", "--probe-every", "2", "--threads", "1", "--dino-head.prototypes", "32",
    "--dino-head.hidden", "32", "--ibot-head.prototypes", "32", "--ibot-head.hidden", "32",
]  # fmt: skip


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes of pictures, train and val, a broken file and a text file."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for label, level in (("dark", 40), ("light", 200)):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(level + random.normal(0, 20, (24, 30, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "photos" / "train" / "dark" / "broken.png").write_bytes(b"no picture at all")
    (tmp_path / "photos" / "notes.txt").write_text("notes")
    return tmp_path / "photos"


def run(*words: object, code: int = 0, capsys) -> tuple[str, str]:
    assert cli.run([str(w) for w in words]) == code
    out, err = capsys.readouterr()
    return out, err


def test_a_copy_descriptor_is_trained_calibrated_and_used(photos, tmp_path, capsys):
    small = ["--steps", "2", "--batch", "8", "--vit.dim", "32", "--vit.depth", "1"]
    _, err = run("pretrain", "copies_small", "--data", photos, "--out", tmp_path / "my copies", *small, capsys=capsys)
    suggested = shlex.split(err[err.index("next:") :].splitlines()[1])
    assert suggested[:3] == ["troodon", "curate", "calibrate"]
    out, _ = run(*suggested[1:], "--images", "10", capsys=capsys)
    assert "copies of 10 images, found by attack" in out
    curate = ["curate", "curate_small", "--uncurated", photos, "--gather", "all", "--copies", tmp_path / "my copies",
              "--backbone", tmp_path / "my copies", "--out", tmp_path / "selection"]  # fmt: skip
    run(*curate, capsys=capsys)
    assert {p.name for p in (tmp_path / "selection" / "embeddings").glob("*.npy")} == {
        "embeddings.npy", "copies.npy", "pixels.npy"
    }  # fmt: skip


def test_the_main_job(photos, tmp_path, capsys):
    out, _ = run("scan", photos, "--out", tmp_path / "index", capsys=capsys)
    assert "36" in out
    out, err = run("pretrain", "small_dino", "--data", photos, "--out", tmp_path / "run", *TINY, capsys=capsys)
    assert Path(out.strip()) == tmp_path / "run" / "backbone"
    assert "next:" in err
    assert "k-NN" in err
    curate = ["curate", "curate_small", "--curated", photos / "train" / "light", "--uncurated", photos / "val",
              "--backbone", tmp_path / "run", "--out", tmp_path / "selection", "--k", "2"]  # fmt: skip
    out, _ = run(*curate, capsys=capsys)
    assert out.splitlines()[-1] == str(tmp_path / "selection")
    run("pretrain", "small_dino", "--data", tmp_path / "selection", "--out", tmp_path / "again", *TINY, "--init",
        tmp_path / "run", capsys=capsys)  # fmt: skip
    evaluate = ["evaluate", "quick", "--backbone", tmp_path / "again", "--data", photos, "--out", tmp_path / "scores"]
    out, _ = run(*evaluate, "--json", capsys=capsys)
    scores = json.loads(out)
    assert {s["backbone"] for s in scores} == {"again", "random", "colour-histogram", "raw-pixels"}
    assert scores == json.loads((tmp_path / "scores" / "scores.json").read_text())
    sheet = tmp_path / "crops.png"
    out, _ = run(
        "show", "crops", "small_dino", "--data", photos, "--out", sheet, "--images", "3", "--at", "1", capsys=capsys
    )
    assert out.strip() == str(sheet)
    with Image.open(sheet) as picture:
        assert picture.width > picture.height > 0
    out, _ = run("embed", "--backbone", tmp_path / "run", "--data", photos, "--out", tmp_path / "e", capsys=capsys)
    assert np.load(tmp_path / "e" / "embeddings.npy").shape == (37, 32)
    out, _ = run("report", tmp_path, "--out", tmp_path / "report.html", capsys=capsys)
    assert (tmp_path / "report.html").read_text().count("<section") >= 4


def test_a_dry_run_writes_nothing(photos, tmp_path, capsys):
    words = ["pretrain", "small_dino", "--data", photos, "--out", tmp_path / "run", *TINY]
    _, err = run(*words, "--dry-run", capsys=capsys)
    assert "parameters" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "did you mean 'pretrain'"),
        (["pretrain"], "say first which recipe"),
        (["pretrain", "smal", "--data", "{photos}", "--out", "{out}"], "did you mean 'small'"),
        (["pretrain", "small.yaml", "--data", "{photos}", "--out", "{out}"], "small.yaml: no such recipe file"),
        (["pretrain", "small_dino", "--data", "{photos}"], "--out"),
        (["pretrain", "small_dino", "--data", "{photos}s", "--out", "{out}"], "photos"),
        (["pretrain", "small_dino", "--data", "{photos}/notes.txt", "--out", "{out}"], "notes.txt"),
        (["pretrain", "small_dino", "--data", "{photos}", "--out", "{photos}"], "choose a new --out"),
        (["pretrain", "small_dino", "--data", "{photos}", "--out", "{out}", "--vit.dimm", "3"], "--vit.dim"),
        (["pretrain", "small_dino", "--data", "{photos}", "--out", "{out}", "--vit.dim", "x"], "dim x: must be INT"),
        (["pretrain", "small_dino", "--crops.global_px=x"], "pretrain: --crops.global-px x: must be INT|{INT INT}"),
        (["pretrain", "small_dino", "--data", "{photos}", "--out", "{out}", "--vit.dim", "101"], "not a multiple"),
        (["pretrain", "small_dino", "--data", "{photos}", "--out", "{out}", "--vit.mlp", "gela"], "gelu"),
        (["pretrain", "small_dino", "--data", "{photos}", "--out", "{out}", "--steps", "0"], "steps 0"),
        (["pretrain", "small_dino", "--data", "{photos}", "--out", "{out}", "--init", "{photos}"], "neither a run"),
        (["pretrain", "small_dino", "--data", "{photos}", "--out", "{out}", "--crops.global-px", "50"], "is 48"),
        *[
            (["pretrain", "small_dino", "--data", "{photos}", "--out", "{out}", flag_of(name), *value], name)
            for name, *value in (
                ("batch", "1"),
                ("threads", "-1"),
                ("keep", "0"),
                ("checkpoint_every", "0"),
                ("vit.depth", "0"),
                ("vit.drop_path", "1"),
                ("crops.locals", "-1"),
                ("crops.global_scale", "0.9", "0.3"),
                ("photometric.hue", "3"),
                ("photometric.blur", "0", "2", "0"),
                ("masks.ratio", "0.5", "0.1"),
                ("objective.student_temperature", "0"),
                ("optim.betas", "0.9", "1.5"),
                ("schedules.ema_momentum.peak", "2"),
                ("schedules.lr.warmup", "-1"),
            )
        ],
        (["scan", "{photos}", "--threads", "-1"], "threads -1"),
        (["embed", "--backbone", "{photos}", "--data", "{photos}", "--out", "{out}", "--batch", "0"], "batch 0"),
        (["scan"], "no images to scan"),
        (["pack", "--out", "{out}"], "no images to pack"),
        (["pack", "{photos}"], "--out"),
        (["pack", "{photos}", "--out", "{photos}"], "choose a new --out"),
        (["pack", "{photos}", "--out", "{out}", "--threads", "-2"], "threads -2"),
        (["show"], "show attention, show crops, show matches, show neighbours, show pca"),
        (["show", "crop", "small"], "did you mean 'show crops'"),
        (["show", "crops"], "say first which recipe"),
        (["show", "crops", "smal", "--data", "{photos}"], "did you mean 'small'"),
        (["show", "crops", "small_dino", "--data", "{photos}", "--out", "{out}", "--images", "0"], "images 0"),
        (["show", "crops", "small_dino", "--data", "{photos}", "--crops.global-px", "50"], "nearest is 48"),
        (["show", "crops", "small_dino", "--data", "{photos}", "--out", "{out}", "--at", "-1"], "batch -1"),
        (["scan", "{photos}/nothing"], "nothing"),
        (["scan", "{empty}"], "empty"),
        (["scan", "{texts}"], "no images"),
        (["evaluate", "mien", "--backbone", "{photos}", "--data", "{photos}", "--out", "{out}"], "did you mean 'mine'"),
        (["evaluate", "mine", "--backbone", "{photos}x", "--data", "{photos}", "--out", "{out}"], "no such run"),
        (["curate", "curate_smal", "--curated", "a"], "did you mean 'curate_small'"),
        (["embed", "--backbone", "{photos}", "--data", "{photos}", "--out", "{out}", "--tokens", "clss"], "'cls'"),
        (["report", "{empty}"], "empty"),
        (["pretrain", "small_dino", "--data", "{photos}", "--out", "{photos}/notes.txt/run"], "not a directory"),
        (["recipes", "dmo"], "did you mean 'demo'"),
        (["demo"], "--out"),
        (["demo", "--out", "{out}", "--steps", "many"], "steps many: must be {None}|INT"),
    ],
)
def test_a_mistake_is_one_clear_line(photos, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    places = {"photos": photos, "out": tmp_path / "out", "empty": tmp_path / "empty", "texts": tmp_path / "texts"}
    out, err = run(*(w.format(**places) for w in words), code=2, capsys=capsys)
    assert out == ""
    lines = [line for line in err.splitlines() if "leaves out 1 .txt" not in line]  # which the source says of itself
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].startswith("troodon")
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_edited_recipe_is_a_recipe(photos, tmp_path, capsys):
    out, _ = run("recipes", "small", capsys=capsys)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(out.replace("local_px:", "local_pxx:"))
    run("pretrain", recipe, "--data", photos, "--out", tmp_path / "run", *TINY, code=2, capsys=capsys)
    recipe.write_text(out.replace("global_px: 48", "global_px: 16"))
    run("pretrain", recipe, "--data", photos, "--out", tmp_path / "run", *TINY, capsys=capsys)
    assert "global_px: 16" in (tmp_path / "run" / "config.yaml").read_text()


def test_debug_prints_the_traceback(capsys, tmp_path):
    _, err = run("scan", tmp_path / "nothing", "--debug", code=2, capsys=capsys)
    assert "Traceback" in err


def test_a_crash_prints_the_stack():
    code = "import os, signal; from troodon import cli\n"
    code += "cli.run = lambda words: os.kill(os.getpid(), signal.SIGSEGV)\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert "cli.py" in done.stderr


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_help_is_quick_and_loads_nothing_heavy(verb):
    code = f"import sys; sys.argv = ['troodon', *{verb.split()!r}, '--help']; from troodon import cli\n"
    code += "try: cli.main()\nfinally:\n"
    code += "    import time; assert time.process_time() < 5  # half a second on a quiet machine\n"
    code += "    assert not {'torch', 'numpy', 'pyarrow', 'PIL'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert done.stderr == ""


def test_ctrl_c_saves_and_says_so(photos, tmp_path):
    command = [sys.executable, "-m", "troodon", "pretrain", "small_dino", "--data", photos, "--out", tmp_path / "run"]
    command += [*TINY, "--steps", "100000"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while child.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "everything is saved" in err
    assert "Traceback" not in err
    assert list((tmp_path / "run" / "checkpoints").iterdir())
