"""Retrieval and copies: rankings of known value, definitions, scikit-learn, and difficulties."""

from pathlib import Path

import numpy as np
import pytest

from tests.evaluate_world import FakeBackbone, make_index
from troodon.evaluate import metrics
from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.features import Reader
from troodon.evaluate.retrieve import detect_copies, rank_queries, retrieve, score_pairs
from troodon.evaluate.sets.benchmark import Benchmark

NOTHING = np.zeros(0, np.int64)


def test_average_precision_matches_scikit_learn_and_oxford() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    for share in (0.05, 0.5, 0.9):
        relevant = random.random(60) < share
        relevant[random.integers(60)] = True
        ap = metrics.average_precision(relevant, int(relevant.sum()))
        assert ap == pytest.approx(sklearn.average_precision_score(relevant, -np.arange(60)))
        steps, before, hits = 0.0, 1.0, 0  # the definition by trapezoids, step by step
        for rank, right in enumerate(relevant):
            before = hits / rank if rank else 1.0
            hits += right
            steps += right * (before + hits / (rank + 1)) / 2
        assert metrics.average_precision(relevant, int(relevant.sum()), "trapezoids") == pytest.approx(
            steps / relevant.sum()
        )
    assert metrics.average_precision(np.array([True, False]), 2) == 0.5  # one of two was never found


def test_micro_ap_matches_scikit_learn_with_ties() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    for scores in (random.normal(size=500), random.integers(0, 6, 500) / 6, np.zeros(500)):
        right = random.random(500) < 0.1
        value, low, high = metrics.micro_ap(scores, right, 200, 0)
        assert value == pytest.approx(sklearn.average_precision_score(right, scores))
        assert low <= value <= high


def test_ignored_images_are_removed_from_the_ranking() -> None:
    gallery = np.array([[1.0, 0], [0.9, 0.1], [0.5, 0.5], [0, 1]], np.float32)
    query = np.array([[1.0, 0], [0, 1.0], [1.0, 1.0]], np.float32)
    relevance = [(np.array([1, 2]), np.array([0])), (np.array([0]), NOTHING), (NOTHING, NOTHING)]
    ap, first = rank_queries(query, gallery, relevance, (1, 2), "steps")
    assert ap[:2] == pytest.approx([1.0, 0.25])
    assert np.isnan(ap[2])
    assert first[0].tolist() == [1.0, 1.0]
    assert first[1].tolist() == [0.0, 0.0]


def test_retrieval_of_colours(tmp_path: Path) -> None:
    images = make_index(tmp_path, ["red", "green", "blue"] * 4)
    rows = np.arange(12)
    relevance = [(rows[(rows % 3 == q) & (rows != q)], np.array([q])) for q in range(3)]
    easy = [(right[:1], np.append(right[1:], q)) for (right, _), q in zip(relevance, range(3))]
    benchmark = Benchmark(
        "colours", "retrieval", images, queries=np.arange(3), gallery=rows, relevance={"easy": easy, "all": relevance}
    )
    results = {
        (r.protocol, r.metric): r
        for r in retrieve(FakeBackbone(), benchmark, EvaluateConfig(retrieval_at=(1, 3)), Reader())
    }
    assert {key: r.value for key, r in results.items()} == {
        ("retrieve_easy", "map"): 1.0, ("retrieve_easy", "p@1"): 1.0, ("retrieve_easy", "p@3"): 1.0,
        ("retrieve", "map"): 1.0, ("retrieve", "p@1"): 1.0, ("retrieve", "p@3"): 1.0,
    }  # fmt: skip
    (tmp_path / "000.png").write_bytes(b"broken")  # a query less, and an image less in the gallery
    again = next(iter(retrieve(FakeBackbone(), benchmark, EvaluateConfig(), Reader())))
    assert (again.settings["queries"], again.settings["gallery"], again.settings["images left out"]) == (2, 11, 1)


def test_copies_are_separated_from_all_other_pairs(tmp_path: Path) -> None:
    images = make_index(tmp_path, ["red", "green", "blue", "grey"])
    for copy, of in (("001", "000"), ("003", "002")):
        (tmp_path / f"{copy}.png").write_bytes((tmp_path / f"{of}.png").read_bytes())
    images = update_lengths(tmp_path, images)
    benchmark = Benchmark("pairs", "copies", images, pairs=np.array([[0, 1], [2, 3]]))
    (result,) = detect_copies(FakeBackbone(), benchmark, EvaluateConfig(), Reader())
    assert (result.metric, result.value) == ("micro_ap", 1.0)
    wrong = Benchmark("pairs", "copies", images, pairs=np.array([[0, 2]]))
    (result,) = detect_copies(FakeBackbone(), wrong, EvaluateConfig(), Reader())
    assert result.value < 0.5


def update_lengths(folder: Path, index):
    """The same rows with the current lengths of the files."""
    import pyarrow as pa

    from troodon.images.index import Index

    lengths = pa.array([Path(c).stat().st_size for c in index.column("container")], pa.int64())
    return Index(index.table.set_column(index.table.schema.get_field_index("length"), "length", lengths))


def test_dropping_the_lowest_pairs_does_not_change_micro_ap(monkeypatch: pytest.MonkeyPatch) -> None:
    from troodon.evaluate import retrieve as module

    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    x[1], x[3] = x[0] + 0.1, x[2] + 0.2
    pairs = np.array([[0, 1], [2, 3]])
    every = metrics.micro_ap(*score_pairs(x, pairs), 100, 0)
    monkeypatch.setattr(module, "MAX_PAIRS", 10)
    few = score_pairs(x, pairs)
    assert len(few[0]) < 60 * 59 / 2
    assert metrics.micro_ap(*few, 100, 0) == pytest.approx(every)
