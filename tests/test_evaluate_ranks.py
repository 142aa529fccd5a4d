"""Several ranks return the scores of one rank, and together process each image once."""

from pathlib import Path

import numpy as np

from tests.evaluate_world import FakeBackbone, make_index, merge_splits
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


def run_evaluation(index, folder: Path, cache: Path | None) -> tuple[list[dict], int]:
    """With parts of four images. The part size is restored afterwards."""
    fake, reader, part = FakeBackbone(), Reader(batch=2, cache=cache, shared=True), features.PART_SIZE
    features.PART_SIZE = 4
    try:
        return evaluate(
            [fake], [merge_splits(*split(index, 0), "colours")], CONFIG, folder, reader=reader
        ), fake.batches
    finally:
        features.PART_SIZE = part


def error_message(index) -> str:
    try:
        extract(FakeBackbone(sharpness=float("nan")), index, reader=Reader(shared=True))
    except UsageError as error:
        return str(error)
    return ""


def run_all(index, folder: Path) -> tuple:
    return (
        run_evaluation(index, folder / "both", None),
        run_evaluation(index, folder / "kept", folder / "cache"),
        error_message(index),
    )


def test_ranks_share_the_images_and_return_the_scores_of_one_rank(tmp_path: Path) -> None:
    index = make_index(tmp_path / "images", ["red", "green", "blue"] * 7)  # 21: the last part is smaller
    (tmp_path / "images" / "004.png").write_bytes(b"broken")
    alone, batches = run_evaluation(index, tmp_path / "alone", None)
    first, second = on_ranks(2, run_all, index, tmp_path)
    for a, b in zip(first[:2], second[:2]):
        assert a[0] == b[0] == alone
        assert b[1] < batches  # the first also draws the pictures
    assert first[1][1] + second[1][1] < batches + 2  # each part once, and the patches that are drawn
    assert first[2] == second[2]  # a mistake that both find, or one
    assert "not finite" in first[2]


def test_two_processes_match_one_process(tmp_path: Path) -> None:
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
