"""Several datasets in one evaluation, and comparable scores."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tests.evaluate_world import FakeBackbone, make_index, merge_splits
from troodon import cli, verbs
from troodon.config import UsageError
from troodon.evaluate import classify, suite
from troodon.evaluate.config import EvaluateConfig, LinearConfig, LogisticConfig
from troodon.evaluate.features import Reader
from troodon.evaluate.results import releases, versions
from troodon.evaluate.sets.benchmark import Benchmark, tag_matrix
from troodon.evaluate.split import split
from troodon.evaluate.suite import evaluate, group_datasets
from troodon.images.index import SCHEMA, Index
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.report.scores import label_unlike_protocols
from troodon.verbs.evaluation import open_benchmarks, scores_table

CONFIG = EvaluateConfig(
    protocols=("knn", "linear", "logistic", "kmeans"), ks=(1,), choose=("held-out", "val"), resamples=50,
    linear=LinearConfig(rates=(1e-2, 1e-1), epochs=1, least_steps=30), logistic=LogisticConfig(strengths=(0.1, 10.0)),
)  # fmt: skip


def relabelled(index: Index, labels: list[str]) -> Index:
    return Index(index.table.set_column(SCHEMA.get_field_index("label"), "label", pa.array(labels)))


def test_every_classification_protocol_and_its_choice(tmp_path: Path) -> None:
    index = make_index(tmp_path / "i", ["red", "green", "blue"] * 10)
    scores = evaluate([FakeBackbone()], [merge_splits(*split(index, 0), "colours")], CONFIG, tmp_path / "s")
    by_protocol = {s["protocol"]: s for s in scores}
    assert list(by_protocol) == ["knn", "linear", "linear_chosen_on_val", "logistic", "kmeans"]
    assert [s["value"] for s in scores] == pytest.approx([1.0] * 5)
    assert by_protocol["linear"]["settings"]["chosen on"] == "held-out training images"
    assert by_protocol["linear_chosen_on_val"]["settings"]["chosen on"] == "the images it is measured on"
    assert (by_protocol["kmeans"]["metric"], by_protocol["kmeans"]["settings"]["clusters"]) == ("nmi", 3)
    assert len({s["fingerprint"] for s in scores}) == 5


def test_several_test_sets_share_one_training_set(tmp_path: Path) -> None:
    """As for ImageNet classes: numbers instead of names, several correct labels, and some of the classes only."""
    base = merge_splits(*split(make_index(tmp_path / "base", ["red", "green", "blue"] * 10), 0), "base")
    numbered = relabelled(make_index(tmp_path / "v2", ["blue", "green", "red"]), ["0", "1", "2"])  # by name, sorted
    several = relabelled(make_index(tmp_path / "real", ["red", "blue", "blue", "red"]), ["1|2", "1", "0", "2"])
    some = make_index(tmp_path / "a", ["red", "green", "red"])
    wrong = relabelled(make_index(tmp_path / "b", ["blue", "green"]), ["red", "green"])  # one answers what it must not
    others = [
        Benchmark(name, "label", images, train_benchmark="base")
        for name, images in (("v2", numbered), ("real", several), ("a", some), ("b", wrong))
    ]
    scores = evaluate([FakeBackbone()], [*others, base], CONFIG, tmp_path / "s")
    for protocol in ("knn", "linear", "logistic"):
        by_dataset = {s["dataset"]: s for s in scores if s["protocol"] == protocol}
        assert {name: s["value"] for name, s in by_dataset.items() if name != "b"} == {
            "base": 1.0, "v2": 1.0, "real": 0.75, "a": 1.0,
        }, protocol  # fmt: skip
        assert by_dataset["a"]["settings"]["answers"] == "only the 2 classes of this set"
        assert "answers" not in by_dataset["v2"]["settings"]
    (dataset,), _ = group_datasets([*others, base], CONFIG)
    features = classify.extract_labelled(FakeBackbone(), dataset, CONFIG, Reader())
    for predictions in classify._all_predictions(features, CONFIG):
        predicted = np.array(features.classes)[predictions.variants[0][1][0][features.test_M == 4]]
        assert set(predicted) <= {"red", "green"}  # blue is none of its classes
    with pytest.raises(UsageError, match="v2: has only test images; also give base, to train on"):
        evaluate([FakeBackbone()], others[:1], CONFIG, tmp_path / "t")


def test_multi_label_classification(tmp_path: Path) -> None:
    """Bright and red, one, both or neither. Unknown tags are used neither for training nor for testing."""
    folder, rows = tmp_path / "tagged", ["image,tags,split"]
    folder.mkdir()
    for i in range(48):
        red, bright = i % 2, i // 2 % 2
        noise = np.random.default_rng(i).normal(0, 8, (20, 20, 3))
        pixels = np.array([60 + 60 * red, 60 - 30 * red, 60 - 30 * red]) + 90 * bright + noise
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
        tags = [*["red"] * red, *["bright"] * bright]
        unsure = i % 11 == 10
        text = "|".join(["?" + ("red", "bright")[i % 2], *["bright"] * (bright and i % 2 == 0)] if unsure else tags)
        rows.append(f"{i:02d}.png,{text},{'test' if i % 3 == 0 else 'train'}")
    (folder / "index.csv").write_text("\n".join(rows))
    (tagged,) = open_benchmarks([folder])
    assert (tagged.kind, tagged.classes) == ("tags", ("bright", "red"))
    assert sorted(np.unique(tag_matrix(tagged))) == [-1, 0, 1]
    scores = evaluate([FakeBackbone()], [tagged], CONFIG, tmp_path / "s")
    assert [(s["protocol"], s["metric"]) for s in scores] == [("logistic", "map"), ("logistic", "map_11_points")]
    assert all(s["value"] > 0.95 and s["low"] <= s["value"] <= s["high"] for s in scores)
    assert scores[0]["settings"]["classes"] == 2
    (tmp_path / "tagged" / "index.csv").write_text("image,tags,split\n00.png,,train\n01.png,,test\n")
    with pytest.raises(UsageError, match="no readable training image, or no readable test image has a tag"):
        evaluate([FakeBackbone()], open_benchmarks([folder]), CONFIG, tmp_path / "t")


def test_a_suite_without_suitable_data_is_an_error(tmp_path: Path) -> None:
    base = merge_splits(*split(make_index(tmp_path / "base", ["red", "green"] * 5), 0), "base")
    with pytest.raises(UsageError, match=r"no dataset here suits its protocols \(depth\)"):
        evaluate([FakeBackbone()], [base], dataclasses.replace(CONFIG, protocols=("depth",)), tmp_path / "s")


def test_datasets_with_a_split_or_layout_stay_separate_and_the_rest_is_merged(tmp_path: Path) -> None:
    for name in ("one", "two"):
        for part in ("train", "val"):
            for label in ("red", "blue"):
                make_index(tmp_path / name / part / label, [label] * 2)
    for label in ("red", "blue"):
        make_index(tmp_path / "loose" / label, [label])
    make_index(tmp_path / "pairs", ["red", "red"])
    (tmp_path / "pairs" / "pairs.csv").write_text("path_a,path_b\n000.png,001.png\n")
    benchmarks = open_benchmarks([tmp_path / name for name in ("one", "pairs", "two", "loose")])
    assert [(b.name, b.kind, len(b.images)) for b in benchmarks] == [
        ("pairs", "copies", 2), ("one", "label", 8), ("two", "label", 8), ("loose", "label", 2),
    ]  # fmt: skip
    parts = open_benchmarks([tmp_path / "one" / "train", tmp_path / "one" / "val"])
    assert [(b.name, len(b.images)) for b in parts] == [("train + val", 8)]
    with pytest.raises(UsageError, match="two datasets are called pairs"):
        open_benchmarks([tmp_path / "pairs", tmp_path / "pairs"])


def test_versions_of_one_release_are_compared_and_of_others_not(tmp_path: Path, monkeypatch) -> None:
    images = merge_splits(*split(make_index(tmp_path / "i", ["red", "green"] * 10), 0), "colours")
    config = dataclasses.replace(CONFIG, protocols=("knn",))
    prints = {}
    for torch_version in ("2.13.0", "2.14.1+cpu", "3.0.0", None):
        used = {"troodon": "0.1.0", "torch": torch_version, "numpy": "2.3.1", "pillow": "12.0.0", "simplejpeg": None}
        monkeypatch.setattr(suite, "versions", lambda used=used: used)
        (score,) = evaluate([FakeBackbone()], [images], config, tmp_path / str(torch_version))
        prints[torch_version] = score["fingerprint"]
        assert score["settings"]["versions"] == used
    assert prints["2.13.0"] == prints["2.14.1+cpu"]
    assert len(set(prints.values())) == 3
    like, unlike = verbs.compare([tmp_path / "2.13.0", tmp_path / "2.14.1+cpu", tmp_path / "3.0.0"])
    assert like["later"] == {str(tmp_path / "2.14.1+cpu"): ["torch: 2.13.0 -> 2.14.1+cpu"]}
    assert (unlike["differs"], "later" in unlike) == (["releases.torch: 2 -> 3"], False)
    assert releases({"troodon": "0.0.3", "torch": "2.13.0", "simplejpeg": "1.9.0"}) == {
        "troodon": "0.0.3",
        "torch": "2",
    }
    assert (versions()["torch"] or "").partition("+")[0] == torch.__version__.partition("+")[0]
    assert set(versions()) == set(used)


def test_a_table_has_a_column_for_each_backbone() -> None:
    def score(backbone: str, dataset: str, metric: str, value: float, protocol: str = "knn") -> dict:
        settings = {"protocol": {"view": {"crop": {"a": 48, "b": 32}[backbone]}}} if backbone != "prior" else {}
        entry = {"backbone": backbone, "dataset": dataset, "protocol": protocol, "metric": metric, "settings": settings}
        return entry | {"value": value, "low": value - 0.01, "high": value + 0.01}

    text = scores_table([
        score("a", "birds", "accuracy", 0.5), score("b", "birds", "accuracy", 0.75),
        score("a", "rooms", "absrel", 0.25, "depth"), score("prior", "rooms", "absrel", 0.5, "depth"),
        score("a", "rooms", "rmse", 0.25, "depth"),
    ])  # fmt: skip
    first, second = ([line.split("|")[1:-1] for line in block.splitlines()] for block in text.split("\n\n"))
    first, second = ([[text.strip() for text in line] for line in block] for block in (first, second))
    assert first[0] == ["data", "protocol", "metric", "a, 48 px", "b, 32 px"]
    assert first[2] == ["birds", "knn", "accuracy, %", "50.0 (49.0-51.0)", "**75.0** (74.0-76.0)"]
    assert second[2:] == [
        ["rooms", "depth", "absrel, lower is better", "**0.250** (0.240-0.260)", "0.500 (0.490-0.510)"]
    ]


def test_unlabelled_images_run_patch_matching(tmp_path: Path) -> None:
    make_index(tmp_path / "loose", [None] * 4)
    vit = ViTConfig(dim=32, depth=2, heads=2, patch=8, grid=4, layer_scale=1.0)
    networks = [Backbone.random(vit, Preprocessing(side, side), seed=7) for side in (32, 40)]
    networks = [dataclasses.replace(b, name=f"{b.preprocessing.crop} px") for b in networks]
    scores = verbs.evaluate("mine", networks, tmp_path / "loose", tmp_path / "s")
    assert {s["protocol"] for s in scores} == {"match", "match_light"}
    assert [s["backbone"] for s in scores if (s["protocol"], s["metric"]) == ("match", "pck@0.1")] == [
        "32 px", "40 px", "random", "random, as 40 px", "patch-colours",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="has a label"):
        verbs.evaluate("quick", networks, tmp_path / "loose", tmp_path / "t")
    with pytest.raises(UsageError, match=r"compute: \['float32', .* -> \['bfloat16'"):
        verbs.evaluate("mine", networks, tmp_path / "loose", tmp_path / "s", compute="bf16")
    with pytest.raises(UsageError, match="did you mean 'bf16'"):
        verbs.evaluate("mine", networks, tmp_path / "loose", tmp_path / "s", compute="bf61")


def test_compare_groups_only_comparable_scores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for label in ("red", "blue"):
        make_index(tmp_path / "data" / label, [label] * 8)
    vit = ViTConfig(dim=32, depth=2, heads=2, patch=8, grid=4, layer_scale=1.0)
    for name, crop, k, seed in (("a", 32, 3, 7), ("b", 32, 3, 8), ("crop", 40, 3, 7), ("k", 32, 5, 7)):
        backbone = dataclasses.replace(Backbone.random(vit, Preprocessing(crop, crop), seed), name="ours")
        settings = {"ks": [k], "protocols": ["knn"]}
        verbs.evaluate("mine", backbone, tmp_path / "data", tmp_path / name, baselines=name == "a", settings=settings)
    rows = verbs.compare([tmp_path / name for name in ("a", "b", "crop", "k")])
    assert [[name.rpartition("/")[2] for name in row["scores"]] for row in rows] == [
        ["a: ours", "b: ours"], ["crop: ours"], ["k: ours"],
    ]  # fmt: skip
    assert [row["differs"] for row in rows] == [
        [], ["view.crop: 32 -> 40", "view.resize: 32 -> 40"], ["ks: [3] -> [5]"],
    ]  # fmt: skip
    assert cli.run(["compare", str(tmp_path / "a"), str(tmp_path / "crop")]) == 0
    assert "not to be compared with the one above: view.crop: 32 -> 40" in capsys.readouterr().out
    entries = json.loads((tmp_path / "a" / "scores.json").read_text())
    used = entries[0]["settings"]["versions"] | {"torch": "2.99.1"}
    patched = [e | {"settings": e["settings"] | {"versions": used}} for e in entries]
    (tmp_path / "patched").mkdir()
    (tmp_path / "patched" / "scores.json").write_text(json.dumps(patched))
    assert cli.run(["compare", str(tmp_path / "a"), str(tmp_path / "patched")]) == 0
    output = capsys.readouterr().out
    assert f"with other versions: {tmp_path / 'patched'}: torch: " in output
    assert "not to be compared" not in output
    assert cli.run(["compare", str(tmp_path / "data")]) == 2
    assert "holds no scores.json" in capsys.readouterr().err

    entries = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("a", "b", "crop")]
    assert {e["protocol"] for e in label_unlike_protocols(entries[:2])} == {"knn"}
    apart = label_unlike_protocols(entries)
    assert len({e["protocol"] for e in apart}) == 2
    assert len({e["protocol"] for e in apart[: len(entries[0])]}) == 1  # what a compares with goes with it
