"""Several ranks give the scores of one, and look at each image once between them."""

from pathlib import Path

import numpy as np

from tests.evaluate_world import Fake, labels_of, make_index
from tests.ranks import on_ranks
from troodon import verbs
from troodon.config import UsageError
from troodon.evaluate import features
from troodon.evaluate.config import EvaluateConfig, LinearConfig
from troodon.evaluate.features import Reader, extract
from troodon.evaluate.split import split
from troodon.evaluate.suite import evaluate
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig

CONFIG = EvaluateConfig(
    protocols=("knn", "linear", "kmeans"), ks=(1, 3), linear=LinearConfig(rates=(0.1,), epochs=1, least_steps=20),
    resamples=50,
)  # fmt: skip


def evaluated(index, folder: Path, cache: Path | None) -> tuple[list[dict], int]:
    """With parts of four images, where the process goes on with parts as they are."""
    fake, reader, part = Fake(), Reader(batch=2, cache=cache, shared=True), features.PART_SIZE
    features.PART_SIZE = 4
    try:
        return evaluate([fake], [labels_of(*split(index, 0), "colours")], CONFIG, folder, reader=reader), fake.batches
    finally:
        features.PART_SIZE = part


def wrong(index) -> str:
    try:
        extract(Fake(sharpness=float("nan")), index, reader=Reader(shared=True))
    except UsageError as error:
        return str(error)
    return ""


def everything(index, folder: Path) -> tuple:
    return evaluated(index, folder / "both", None), evaluated(index, folder / "kept", folder / "cache"), wrong(index)


def test_ranks_share_the_images_and_give_the_scores_of_one(tmp_path: Path) -> None:
    index = make_index(tmp_path / "images", ["red", "green", "blue"] * 7)  # 21: no number of ranks divides all parts
    (tmp_path / "images" / "004.png").write_bytes(b"broken")
    alone, batches = evaluated(index, tmp_path / "alone", None)
    first, second = on_ranks(2, everything, index, tmp_path)
    for a, b in zip(first[:2], second[:2]):
        assert a[0] == b[0] == alone
        assert b[1] < batches  # the first also draws the pictures
    assert first[1][1] + second[1][1] < batches + 2  # each part once, and the patches that are drawn
    assert first[2] == second[2]  # a mistake that both find, or one
    assert "not finite" in first[2]


def test_the_command_on_two_processes_is_the_command_on_one(tmp_path: Path) -> None:
    make_index(tmp_path / "data" / "train" / "a", ["red"] * 6)
    make_index(tmp_path / "data" / "train" / "b", ["blue"] * 6)
    make_index(tmp_path / "data" / "val" / "a", ["red"] * 3)
    make_index(tmp_path / "data" / "val" / "b", ["blue"] * 3)
    vit = ViTConfig(dim=32, depth=2, heads=2, patch=8, grid=4, layer_scale=1.0)
    Backbone.random(vit, Preprocessing(resize=32, crop=32)).save(tmp_path / "b")
    one, two = (
        verbs.evaluate("quick", tmp_path / "b", tmp_path / "data", tmp_path / f"s{n}", devices=n, baselines=False)
        for n in (1, 2)
    )
    assert [(s["protocol"], s["fingerprint"]) for s in one] == [(s["protocol"], s["fingerprint"]) for s in two]
    assert np.allclose([s["value"] for s in one], [s["value"] for s in two])
