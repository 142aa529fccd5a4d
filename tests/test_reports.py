"""Pages of true artifacts: a small pass through the verbs, whose pages have no gaps and no earlier words."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_report import read
from tests.test_troubles_training import NEW, TINY
from troodon import cli, curate, embed, evaluate, report, scan
from troodon.curate.config import CurateConfig
from troodon.evaluate.config import EvaluateConfig

GAPS = re.compile(r"\b(None|nan|NaN|inf|Infinity|True|False|undefined|tensor)\b")
# Words that settings and texts had before, in any form.
EARLIER = re.compile(r"\b(disguise\w*|engine|rounds|[a-z]+_weight|minimum similarity|faster)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """An index, a run, embeddings, a selection and scores of 33 images of two classes, one of which is broken."""
    home = tmp_path_factory.mktemp("world")
    for number in range(32):
        folder = home / "data" / ("train", "test")[number % 2] / f"kind {number // 16}"
        folder.mkdir(parents=True, exist_ok=True)
        low = np.random.default_rng(number).integers(0, 99, (7, 7, 3)) + 70 * (number // 16)
        Image.fromarray(low.astype(np.uint8)).resize((40 + number, 36)).save(folder / f"{number}.png")
    (home / "data" / "train" / "kind 0" / "bad.png").write_bytes(b"\x89PNG but not for long")
    data, run = home / "data", home / "run"
    scan(data, home / "index")
    words = ["pretrain", "small_dino", "--data", str(data), "--out", str(run), *TINY, *NEW, "--steps", "12"]
    cli.run([*words, "--log-every", "2", "--health-every", "4", "--probe-every", "4"])
    embed(run, data, home / "embeddings", compute="fp32")
    chosen = CurateConfig(gather="all", calibration_images=16)
    curate(chosen, None, data, run, home / "selection")
    quick = EvaluateConfig(protocols=("knn", "logistic", "kmeans"), ks=(1,), shots=(1,), resamples=20)
    evaluate(quick, run, data, home / "scores")
    return home


@pytest.mark.parametrize("name", ["index", "run", "selection", "scores", "."])
def test_a_page_of_true_artifacts_has_no_gaps(world, tmp_path, name):
    page = read(report(world / name, tmp_path / "page.html"))
    text = re.sub(r"\b(range|processes): null", "", page.text)  # of config.yaml, as it is
    assert len(text) > 500
    assert not [text[max(m.start() - 40, 0) : m.end() + 20] for m in GAPS.finditer(text)]
    assert not [text[max(m.start() - 40, 0) : m.end() + 20] for m in EARLIER.finditer(text)]
    assert "null" not in text
    for image in page.of("img"):
        assert image["src"].startswith("data:image/")
        assert image.get("alt", "").strip()


def test_the_page_says_what_was_measured(world, tmp_path):
    text = read(report(world, tmp_path / "page.html")).text
    said = "33 images were found", "1 file cannot be read", "12 of 12 steps", "kept 32 of 33", "k-means iterations 100"
    for words in said:
        assert words in text, words
