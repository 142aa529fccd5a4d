"""Leaks of a benchmark into the training images: named, excluded, and scored with and without."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from troodon import cli, launch, leak
from troodon.config import UsageError
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.run import read_json


@pytest.fixture
def places(tmp_path) -> dict[str, Path]:
    """Thirty images to train on, a labelled benchmark of 24, three of which are among the thirty; and a backbone."""
    random = np.random.default_rng(0)

    def picture() -> np.ndarray:
        return np.kron(random.integers(0, 255, (6, 6, 3), dtype=np.uint8), np.ones((4, 4, 1), np.uint8))

    for name in ("training", "benchmark/train/a", "benchmark/train/b", "benchmark/val/a", "benchmark/val/b"):
        (tmp_path / name).mkdir(parents=True)
    for i in range(30):
        Image.fromarray(picture()).save(tmp_path / "training" / f"{i:02d}.png")
    for i in range(24):
        image = Image.open(tmp_path / "training" / f"{i:02d}.png") if i in (2, 5, 8) else Image.fromarray(picture())
        split, label = "train" if i < 12 and i not in (2, 5, 8) else "val", "ab"[i % 2]
        image.save(tmp_path / "benchmark" / split / label / f"{i:02d}.png")
    config = ViTConfig(dim=32, depth=2, heads=2, patch=8, grid=3, layer_scale=1.0)
    Backbone.random(config, Preprocessing(resize=24, crop=24)).save(tmp_path / "backbone")
    return {name: tmp_path / name for name in ("training", "benchmark", "backbone")}


def test_leaks_are_named_excluded_and_scored_with_and_without(places, tmp_path):
    result = leak(
        places["backbone"], places["training"], places["benchmark"], tmp_path / "out", suite="quick",
        settings={"verify": "none", "benchmark_threshold": 0.9999, "duplicate_space": "plain"},
    )  # fmt: skip
    assert (result["images"], result["leaked"], result["benchmark"], result["benchmark_leaked"]) == (30, 3, 24, 3)
    pairs = {(pair["image"], pair["benchmark"]) for pair in result["pairs"]}
    assert pairs == {
        ("training/02.png", "benchmark/val/a/02.png"),
        ("training/05.png", "benchmark/val/b/05.png"),
        ("training/08.png", "benchmark/val/a/08.png"),
    }
    assert len(open_source(tmp_path / "out" / "selection")) == 27
    remaining = open_source(tmp_path / "out" / "benchmark")
    assert len(remaining) == 21
    assert set(remaining.column("split")) == {"train", "val"}
    images = {which: scores[0]["settings"]["protocol"] for which, scores in result["scores"].items()}
    assert images.keys() == {"all", "without"}
    assert read_json(tmp_path / "out" / "leaks.json") == result
    again = leak(
        places["backbone"], places["training"], places["benchmark"], tmp_path / "out", suite="quick",
        settings={"verify": "none", "benchmark_threshold": 0.9999, "duplicate_space": "plain"},
    )  # fmt: skip
    assert again == result


def test_the_command_and_its_errors(places, tmp_path, capsys):
    words = ["leak", "--backbone", places["backbone"], "--data", places["training"], "--benchmark", places["benchmark"]]
    words = [str(w) for w in [*words, "--out", tmp_path / "out", "--suite", "none"]]
    cosine = ["--verify", "none", "--benchmark-threshold", "0.9999", "--duplicate-space", "plain"]
    assert cli.run([*words, *cosine]) == launch.DONE
    out, _ = capsys.readouterr()
    assert out.startswith("3 of 30 images resemble one of the benchmark's")
    assert cli.run([*words, "--steps", "exact", "--out", str(tmp_path / "other")]) == launch.MISTAKE
    assert "has the step benchmark" in capsys.readouterr().err
    assert cli.run([*words, "--out", str(tmp_path / "looked-at")]) == launch.DONE
    assert "read with --verify none only" not in capsys.readouterr().err
    with pytest.raises(UsageError, match="quik"):
        leak(places["backbone"], places["training"], places["benchmark"], tmp_path / "more", suite="quik")
    assert not (tmp_path / "more").exists()
