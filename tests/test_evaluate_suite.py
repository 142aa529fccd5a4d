"""The whole evaluation of a small dataset: written files, errors, and reuse of finished scores."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.evaluate_world import FakeBackbone, make_index, merge_splits
from troodon import run
from troodon.config import UsageError
from troodon.evaluate.baselines import ColourHistogram
from troodon.evaluate.config import EvaluateConfig, LinearConfig
from troodon.evaluate.features import Reader
from troodon.evaluate.sets.benchmark import Benchmark
from troodon.evaluate.split import describe_split, split
from troodon.evaluate.suite import evaluate
from troodon.images.index import Index

LINEAR = LinearConfig(rates=(1e-2, 1e-1), blocks=(1, 2), epochs=1, least_steps=30)
CONFIG = EvaluateConfig(protocols=("knn", "linear"), ks=(1, 3, 200), linear=LINEAR, resamples=200)
KEYS = ["protocol", "dataset", "metric", "value", "low", "high", "settings", "backbone", "fingerprint"]


def colour_splits(tmp_path: Path) -> tuple:
    return split(make_index(tmp_path / "images", ["red", "green", "blue"] * 10), 0)


def test_scores_of_two_backbones(tmp_path: Path) -> None:
    train, val = colour_splits(tmp_path)
    scores = evaluate(
        [FakeBackbone(), ColourHistogram()], [merge_splits(train, val, "colours")], CONFIG, tmp_path / "scores"
    )
    assert [(s["backbone"], s["protocol"]) for s in scores] == [
        ("fake", "knn"),
        ("fake", "linear"),
        ("colour-histogram", "knn"),
        ("colour-histogram", "linear"),
    ]
    assert all(list(s) == KEYS and s["dataset"] == "colours" and s["metric"] == "accuracy" for s in scores)
    assert scores == run.read_json(tmp_path / "scores" / "scores.json")
    assert run.read_manifest(tmp_path / "scores")["kind"] == "scores"
    nearest, linear = scores[0], scores[1]
    assert nearest["value"] == linear["value"] == nearest["high"] == 1.0
    assert 0.5 < nearest["low"] < 1.0
    settings = nearest["settings"]
    assert settings["k"] in (1, 3)
    assert (settings["train"], settings["val"], settings["classes"], settings["split"]) == (
        24,
        6,
        3,
        "train and val, as the data says",
    )
    assert linear["settings"]["choice"] == "held-out"
    assert linear["settings"]["best on val"]["value"] >= linear["value"]
    assert (linear["settings"]["scale"], linear["settings"]["chosen from"]) == ("standardise", 2 * 2 * 2)
    assert scores[3]["settings"]["chosen from"] == 2
    details = run.read_json(tmp_path / "scores" / "details.json")
    assert [v["k"] for v in details[0]["variants"]] == [1, 3, 24]
    assert details[0]["variants"][2]["k asked for"] == [200]
    assert [v["choice"] for v in details[1]["variants"]] == ["held-out", "best on val"]
    assert details[0]["per class"] == {"blue": 1.0, "green": 1.0, "red": 1.0}
    for name in ("pca", "neighbours"):
        with Image.open(tmp_path / "scores" / "pictures" / f"{name}.png") as picture:
            assert picture.width == 1000


def test_finished_scores_are_read_and_others_refused(tmp_path: Path) -> None:
    train, val = colour_splits(tmp_path)
    fake, out, cache = FakeBackbone(), tmp_path / "scores", tmp_path / "cache"
    scores = evaluate([fake], [merge_splits(train, val, "colours")], CONFIG, out, reader=Reader(cache=cache))
    ran = fake.batches
    assert evaluate([fake], [merge_splits(train, val, "colours")], CONFIG, out, reader=Reader(cache=cache)) == scores
    assert fake.batches == ran
    with pytest.raises(UsageError, match=r"temperature: 0\.07 -> 0\.1"):
        evaluate([fake], [merge_splits(train, val, "colours")], dataclasses.replace(CONFIG, temperature=0.1), out)
    with pytest.raises(UsageError, match="the images or the backbone"):
        evaluate([FakeBackbone(fingerprint="f2")], [merge_splits(train, val, "colours")], CONFIG, out)
    with pytest.raises(UsageError, match="the images or the backbone"):
        evaluate([fake], [merge_splits(train.take(range(20)), val, "colours")], CONFIG, out)
    ran = fake.batches
    other = dataclasses.replace(CONFIG, ks=(5,), linear=dataclasses.replace(LINEAR, blocks=(1,)))
    evaluate([fake], [merge_splits(train, val, "colours")], other, tmp_path / "other", reader=Reader(cache=cache))
    assert fake.batches == ran + 1  # only to draw the patches: features came from the cache


def relabelled(index: Index, names: dict[str, str]) -> Index:
    labels = [names.get(label, label) for label in index.column("label")]
    return Index(index.table.set_column(index.table.schema.get_field_index("label"), "label", [labels]))


def test_other_labels_give_other_scores(tmp_path: Path) -> None:
    train, val = colour_splits(tmp_path)
    config = dataclasses.replace(CONFIG, protocols=("knn",))
    (score,) = evaluate([FakeBackbone()], [merge_splits(train, val, "colours")], config, tmp_path / "scores")
    wrong = relabelled(val, {"green": "red"})
    with pytest.raises(UsageError, match="the images or the backbone"):
        evaluate([FakeBackbone()], [merge_splits(train, wrong, "colours")], config, tmp_path / "scores")
    (worse,) = evaluate([FakeBackbone()], [merge_splits(train, wrong, "colours")], config, tmp_path / "worse")
    assert (score["value"], worse["value"]) == (1.0, pytest.approx(2 / 3))
    (detail,) = run.read_json(tmp_path / "worse" / "details.json")
    assert detail["mistakes"] == [{"class": "red", "taken for": "green", "images": 2}]
    assert detail["per class"] == {"blue": 1.0, "red": 0.5}
    assert detail["class mean"] == 0.75


def test_choices_do_not_see_the_validation_labels(tmp_path: Path) -> None:
    """On noise, the setting that is best on the validation images is best by chance."""
    train, val = split(make_index(tmp_path / "images", ["this", "that", "other"] * 40), 0)
    config = dataclasses.replace(CONFIG, ks=(1, 2, 4, 8, 16))
    knn, linear = evaluate([FakeBackbone()], [merge_splits(train, val, "noise")], config, tmp_path / "scores")
    details = run.read_json(tmp_path / "scores" / "details.json")
    accuracy_of_k = {int(k): v for k, v in details[0]["leave-one-out"].items()}
    assert knn["settings"]["k"] == max(accuracy_of_k, key=lambda k: (accuracy_of_k[k], -k))
    assert knn["value"] < knn["settings"]["best on val"]["value"] == max(v["value"] for v in details[0]["variants"])
    tried = {c["classifier"]: c for c in details[1]["classifiers"]}
    assert tried[linear["settings"]["classifier"]]["held-out"] == max(c["held-out"] for c in tried.values())
    assert linear["settings"]["best on val"]["value"] == max(c["val"] for c in tried.values())


def test_a_class_without_training_images_counts_as_wrong(tmp_path: Path) -> None:
    index = make_index(
        tmp_path / "images",
        ["red", "blue"] * 5 + ["red", "blue", "green", "green"],
        ["train"] * 10 + ["val"] * 4,
    )
    for score in evaluate([FakeBackbone()], [Benchmark("colours", "label", index)], CONFIG, tmp_path / "scores"):
        assert score["value"] == 0.5
        assert score["settings"]["val images of classes without training images (counted as wrong)"] == 2
        assert score["settings"]["classes"] == 3


def test_a_broken_image_is_skipped_and_not_counted_as_wrong(tmp_path: Path) -> None:
    train, val = colour_splits(tmp_path)
    broken = Path(val.column("container")[2])
    broken.write_bytes(broken.read_bytes()[:90])
    for score in evaluate([FakeBackbone()], [merge_splits(train, val, "colours")], CONFIG, tmp_path / "scores"):
        assert (score["value"], score["settings"]["val"], score["settings"]["images left out"]) == (1.0, 5, 1)
    details = run.read_json(tmp_path / "scores" / "details.json")
    assert list(details[0]["left out"]["val"]) == [broken.name]


def test_three_images(tmp_path: Path) -> None:
    index = make_index(tmp_path / "images", ["red", "red", "blue"])
    train, val = split(index, 0)
    scores = evaluate([FakeBackbone()], [merge_splits(train, val, "few")], CONFIG, tmp_path / "scores")
    assert [s["value"] for s in scores] == [1.0, 1.0]
    assert scores[0]["low"] == pytest.approx(0.025)


def test_few_shot_and_seeds_are_means(tmp_path: Path) -> None:
    train, val = split(make_index(tmp_path / "images", ["this", "that", "other"] * 40), 0)
    linear = dataclasses.replace(LINEAR, seeds=5)
    config = dataclasses.replace(CONFIG, shots=(2,), shot_seeds=5, linear=linear)
    knn, shot, linear = evaluate([FakeBackbone()], [merge_splits(train, val, "noise")], config, tmp_path / "scores")
    assert (knn["protocol"], shot["protocol"]) == ("knn", "knn_2_shot")
    assert shot["settings"]["images of each class"] == 2
    assert len(linear["settings"]["classifier"]) == linear["settings"]["seeds"] == 5
    for score in (shot, linear):  # of five that differ: a whole number of fifths of an image, and not of images
        images = score["value"] * len(val)
        assert images * 5 == pytest.approx(round(images * 5))
        assert images != pytest.approx(round(images))


def test_backbones_of_one_name_get_distinct_names(tmp_path: Path) -> None:
    train, val = colour_splits(tmp_path)
    config = dataclasses.replace(CONFIG, protocols=("knn",))
    backbones = [
        FakeBackbone(fingerprint="aaaaaaaa"),
        FakeBackbone(fingerprint="bbbbbbbb"),
        FakeBackbone(fingerprint="aaaaaaaa"),
    ]
    scores = evaluate(backbones, [merge_splits(train, val, "colours")], config, tmp_path / "scores")
    assert [s["backbone"] for s in scores] == ["fake aaaaaa", "fake bbbbbb"]


def test_invalid_datasets_are_errors_before_anything_runs(tmp_path: Path) -> None:
    fake, out = FakeBackbone(), tmp_path / "scores"
    one = make_index(tmp_path / "one", ["red"] * 6)
    with pytest.raises(UsageError, match="have the label 'red': two classes are needed"):
        evaluate([fake], [Benchmark("one", "label", one)], CONFIG, out)
    with pytest.raises(UsageError, match="has a label"):
        evaluate([fake], [Benchmark("none", "label", make_index(tmp_path / "none", [None] * 4))], CONFIG, out)
    train, _ = colour_splits(tmp_path)
    with pytest.raises(UsageError, match="2 of 2 test images are also training images"):
        evaluate([fake], [merge_splits(train, train.take([0, 1]), "same")], CONFIG, out)
    assert fake.batches == 0
    assert not out.exists()


def test_real_photographs(tmp_path: Path, shared) -> None:
    """The colour histogram on three classes of photographs: far above chance, far below perfect."""
    sources = pytest.importorskip("troodon.images.sources")
    index = sources.open_source(shared("cls_caltech20_112.tar"))
    labels = np.asarray(index.column("label"), dtype=object)
    index = index.take(np.flatnonzero(np.isin(labels, sorted(set(labels))[:3]))[::2])
    train, val = split(index, 0)
    assert describe_split(index, 0) == "train and val, as the data says"
    config = dataclasses.replace(CONFIG, ks=(10,))
    for score in evaluate([ColourHistogram()], [merge_splits(train, val, "caltech")], config, tmp_path / "scores"):
        assert 0.4 < score["low"] < score["value"] < 1.0
