"""The examples run, as they stand, on a few made images and a tiny backbone without training."""

import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import troodon
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
COLOURS = {"blue": (20, 40, 220), "red": (220, 40, 20), "white": (230, 230, 230)}
LONGEST = 40  # lines


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """Runs an example with arguments in a folder that has the backbone `net`; returns what it prints, line by line."""
    config = ViTConfig(dim=64, depth=2, heads=2, patch=8, grid=4, layer_scale=0.3)
    Backbone.random(config, Preprocessing(resize=36, crop=32), seed=0).save(tmp_path / "net")
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def draw(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """An image of noise around a colour."""
    noise = np.random.default_rng(seed).normal(0, 20, (40, 40 + seed % 5, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(path)


def draw_classes(folder: Path, each: int) -> None:
    for number, (name, colour) in enumerate(COLOURS.items()):
        for i in range(each):
            draw(folder / name / f"{i}.png", colour, 100 * number + i)


def test_classify(example, tmp_path):
    draw_classes(tmp_path / "labelled", 5)
    for i, (name, colour) in enumerate(COLOURS.items()):
        draw(tmp_path / "new" / f"{name}.png", colour, 1000 + i)
    (tmp_path / "new" / "broken.png").write_bytes(b"x")
    lines = [line.split() for line in example("classify.py", "net", "labelled", "new")]
    assert [line[:2] for line in lines] == [["blue.png", "blue"], ["red.png", "red"], ["white.png", "white"]]


def test_similar(example, tmp_path):
    draw_classes(tmp_path / "photos", 5)
    draw(tmp_path / "query.png", COLOURS["red"], 7)
    lines = example("similar.py", "net", "photos", "query.png")
    assert [line.split()[1].split("/")[1] for line in lines] == ["red"] * 5


def test_segment(example, tmp_path):
    for folder in ("images", "masks", "new", "out"):
        (tmp_path / folder).mkdir()
    for i in range(5):
        draw(tmp_path / ("images" if i else "new") / f"{i}.png", COLOURS["blue"], i)
        path = tmp_path / ("images" if i else "new") / f"{i}.png"
        pixels, mask = np.array(Image.open(path)), np.zeros((40, 40 + i), np.uint8)
        half = (slice(0, 20), slice(None)) if i % 2 else (slice(None), slice(0, 20))
        pixels[half], mask[half] = COLOURS["red"], 1
        Image.fromarray(pixels).save(path)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    assert example("segment.py", "net", "images", "masks", "new", "out") == []
    made, true = (np.array(Image.open(tmp_path / folder / "0.png")) for folder in ("out", "masks"))
    assert made.shape == true.shape
    assert (made == true).mean() > 0.85


def test_finetune(example, tmp_path):
    draw_classes(tmp_path / "labelled", 4)
    losses = [float(line.split()[-1]) for line in example("finetune.py", "net", "labelled", "tuned")]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    before, after = troodon.load("net"), troodon.load("tuned")
    assert after.fingerprint != before.fingerprint
    assert 0 < (after.vit.blocks[0].attn.qkv.weight - before.vit.blocks[0].attn.qkv.weight).abs().max() < 0.01


def test_duckdb_search(example, tmp_path):
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    draw_classes(tmp_path / "photos", 5)
    draw(tmp_path / "query.png", COLOURS["white"], 7)
    for _ in range(2):  # the second time from what is there
        lines = example("duckdb_search.py", "net", "photos", "vectors", "query.png")
        assert [line.split()[1] for line in lines] == ["white"] * 5


@pytest.mark.slow
def test_onnx_features(example, tmp_path):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    for i, name in enumerate(("a.png", "b.png")):
        draw(tmp_path / name, COLOURS["red"], i)
    troodon.export("net", "onnx", "net.onnx")
    check_printed(example("onnx_features.py", "net.onnx", "a.png", "b.png"))


@pytest.mark.filterwarnings("default")  # those of another library
def test_transformers_features(example, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    for i, name in enumerate(("a.png", "b.png")):
        draw(tmp_path / name, COLOURS["red"], i)
    troodon.export("net", "huggingface", "net-hf")
    check_printed(example("transformers_features.py", "net-hf", "a.png", "b.png"))


@pytest.mark.filterwarnings("default")  # those of another library
def test_timm_features(example, tmp_path):
    try:
        import_module("timm")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs timm with a torchvision that imports, which are in no extra: {error}")
    for i, name in enumerate(("a.png", "b.png")):
        draw(tmp_path / name, COLOURS["red"], i)
    troodon.export("net", "timm", "net.safetensors")
    check_printed(example("timm_features.py", "net.safetensors", "a.png", "b.png"))


def check_printed(lines: list[str]) -> None:
    """Each line has an image, shapes, and the first numbers of its class token."""
    expected = troodon.load("net").features(["a.png", "b.png"]).cls
    for path, line, vector in zip(("a.png", "b.png"), lines, expected, strict=True):
        name, shape, numbers = re.fullmatch(r"(\S+) \((\d+),?\).*\[(.+)\]", line).groups()
        assert (name, shape) == (path, "64")
        values = [float(number) for number in re.findall(r"-?[\d.]+", numbers)]
        assert values == pytest.approx(vector[:3].tolist(), abs=0.03)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_each_example_is_short_and_run_by_a_test(path):
    assert len(path.read_text().splitlines()) < LONGEST
    tests = [test for test in Path(__file__).parent.glob("test_*.py") if f'"{path.name}"' in test.read_text()]
    assert tests, f"no test names {path.name}"
