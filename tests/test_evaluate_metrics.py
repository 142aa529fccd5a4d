"""Metrics against their definitions; splits with every class on both sides."""

from pathlib import Path

import numpy as np
import pytest

from tests.evaluate_world import make_index
from troodon.config import UsageError, from_dict, parse
from troodon.evaluate import metrics
from troodon.evaluate.config import SUITES, EvaluateConfig, get_suite
from troodon.evaluate.split import describe_split, few_shot, split, stratified


def test_class_accuracy_and_confusions() -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 4, 200), random.integers(0, 5, 200)
    correct = (labels == predicted).astype(float)
    accuracy = metrics.class_accuracy(correct, labels, 6)
    confusion = sklearn_metrics.confusion_matrix(labels, predicted, labels=range(6))
    assert accuracy[:4] == pytest.approx(np.diag(confusion)[:4] / confusion.sum(1)[:4])
    assert np.isnan(accuracy[4:]).all()
    np.fill_diagonal(confusion, 0)
    mistakes = metrics.top_confusions(predicted, labels, 6, limit=100)
    assert {(a, b): n for a, b, n in mistakes} == {(a, b): confusion[a, b] for a, b in zip(*confusion.nonzero())}
    assert [n for *_, n in mistakes] == sorted((n for *_, n in mistakes), reverse=True)


def test_the_interval_matches_a_plain_bootstrap() -> None:
    random = np.random.default_rng(0)
    correct = random.choice([0.0, 1 / 3, 2 / 3, 1.0], 80, p=[0.3, 0.2, 0.1, 0.4])  # means over three seeds
    resampled = correct[random.integers(0, 80, (20000, 80))].mean(1)
    interval = metrics.bootstrap_interval(correct, 20000, seed=1)
    assert interval == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.006)
    assert interval == metrics.bootstrap_interval(correct[::-1], 20000, seed=1)


def test_the_interval_has_the_nominal_coverage() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        low, high = metrics.bootstrap_interval((random.random(200) < 0.7).astype(float), 500, seed=trial)
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_the_interval_of_all_correct_images_is_not_empty() -> None:
    low, high = metrics.bootstrap_interval(np.ones(3), 1000, 0)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 3)), 1.0)
    assert metrics.bootstrap_interval(np.zeros(3), 1000, 0) == (0.0, pytest.approx(1 - low))


def test_a_score_has_these_keys() -> None:
    score = metrics.score_entry("knn", "pets", "accuracy", np.float64(0.5), 0.4, 0.6, {"k": 10}, "mine")
    assert list(score) == [
        "protocol",
        "dataset",
        "metric",
        "value",
        "low",
        "high",
        "settings",
        "backbone",
        "fingerprint",
    ]
    assert type(score["value"]) is float


def test_stratified_takes_a_fraction_of_every_class() -> None:
    labels = np.repeat([4, 7, 9, 11], [50, 2, 1, 3])
    mask = stratified(labels, 0.2, seed=0)
    assert [int(mask[labels == y].sum()) for y in (4, 7, 9, 11)] == [10, 1, 0, 1]
    assert (mask == stratified(labels, 0.2, seed=0)).all()
    assert (mask != stratified(labels, 0.2, seed=1)).any()


def test_few_shot_takes_a_number_of_each_class() -> None:
    labels = np.repeat([4, 7], [50, 2])
    rows = few_shot(labels, 3, seed=0)
    assert labels[rows].tolist() == [4, 4, 4, 7, 7]
    assert rows.tolist() != few_shot(labels, 3, seed=1).tolist()


@pytest.mark.parametrize(
    ("splits", "sizes", "description"),
    [
        (["train"] * 6 + ["val"] * 2 + ["test"] * 2, (6, 2), "train and val, as the data says"),
        (["train"] * 5 + ["test"] * 3 + [None] * 2, (5, 3), "train and test, as the data says"),
        (["train"] * 10, (8, 2), "80% and 20% of each class, at random (seed 3)"),
        ([None] * 10, (8, 2), "80% and 20% of each class, at random (seed 3)"),
    ],
)
def test_an_existing_split_has_priority(tmp_path: Path, splits: list, sizes: tuple[int, int], description: str) -> None:
    index = make_index(tmp_path, ["red", "blue"] * 5, splits)
    train, val = split(index, 3)
    assert (len(train), len(val)) == sizes
    assert describe_split(index, 3) == description
    assert not set(train.column("path")) & set(val.column("path"))


def test_images_without_a_label_are_skipped(tmp_path: Path) -> None:
    train, val = split(make_index(tmp_path, ["red", None, "red", "blue", None, "blue"]), 0)
    assert sorted(train.column("label") + val.column("label")) == ["blue", "blue", "red", "red"]


def test_no_labels_or_no_test_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none of the 3 images has a label: put .* folder .* labels\.csv"):
        split(make_index(tmp_path / "a", [None] * 3), 0)
    with pytest.raises(UsageError, match="is the only one of its class"):
        split(make_index(tmp_path / "b", ["red", "blue"]), 0)


def test_suites_by_name_and_settings_by_command_line() -> None:
    assert all(get_suite(name).suite == name for name in SUITES)
    with pytest.raises(UsageError, match="did you mean 'quick'"):
        get_suite("quikc")
    config = parse(EvaluateConfig, ["--ks", "5", "--linear.seeds", "3"], prog="evaluate", default=SUITES["quick"])
    assert (config.ks, config.linear.seeds, config.linear.blocks) == ((5,), 3, (1,))
    assert from_dict(EvaluateConfig(), {"rounds": 7, "at": [2]}, source="x.yaml") == EvaluateConfig(
        kmeans_iterations=7, retrieval_at=(2,)
    )
    with pytest.raises(UsageError, match="temperature -1"):
        from_dict(EvaluateConfig(), {"temperature": -1.0}, source="x.yaml")
    for changes in ({"ks": (0,)}, {"protocols": ()}, {"shots": (0,)}, {"resamples": 0}):
        with pytest.raises(UsageError):
            EvaluateConfig(**changes)
