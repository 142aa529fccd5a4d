"""The whole system on a small embedded world, and whether the demo judges its own selection rightly."""

import importlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from troodon import cli, launch

demo = importlib.import_module("troodon.demo")  # the name itself is the verb's
SMALL = demo.EMBEDDED_WORLD | {
    "classes": 3, "curated": 6, "clean": 60, "copies": 30, "off_topic": 20, "broken": 4, "train": 8, "val": 6,
    "dense": 4,
}  # fmt: skip
ENTRY = {"protocol", "dataset", "metric", "value", "low", "high", "settings", "backbone", "fingerprint"}


def test_the_demo_leaves_a_page_and_scores_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "EMBEDDED_WORLD", SMALL)
    words = ["demo", "--out", str(tmp_path / "a demo"), "--steps", "4"]
    assert cli.run(words) == launch.DONE
    scores = json.loads((tmp_path / "a demo" / "scores.json").read_text())
    assert all(set(entry) == ENTRY for entry in scores)
    assert {entry["protocol"] for entry in scores} == {
        "knn", "linear", "logistic", "kmeans", "duplicates", "retrieval"
    }  # fmt: skip
    assert len({entry["backbone"] for entry in scores if entry["protocol"] == "knn"}) == 6
    assert all(0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1 for entry in scores)
    page = (tmp_path / "a demo" / "report.html").read_text()
    assert "planted" in page
    assert str(tmp_path / "a demo" / "report.html") in capsys.readouterr().out

    before = (tmp_path / "a demo" / "run" / "metrics.jsonl").read_bytes()
    assert cli.run(words) == launch.DONE
    assert json.loads((tmp_path / "a demo" / "scores.json").read_text()) == scores
    assert (tmp_path / "a demo" / "run" / "metrics.jsonl").read_bytes() == before


def test_a_demo_of_no_steps_writes_nothing(tmp_path, capsys):
    assert cli.run(["demo", "--out", str(tmp_path / "x"), "--steps", "0"]) == launch.MISTAKE
    assert "steps 0: must be 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_selection_is_scored_by_the_ground_truth(tmp_path):
    # a: kept, and one of its two copies found. b: a curated picture, its copy found. c: wrongly dropped for a.
    rows = [  # path, pool, role, original, stage, cause, kept
        ("curated/b", "curated", "curated", None, "curated", -1, True),
        ("uncurated/a", "uncurated", "clean", None, "retrieved", -1, True),
        ("uncurated/a1", "uncurated", "copy", "uncurated/a", "duplicate", 1, False),
        ("uncurated/a2", "uncurated", "copy", "uncurated/a", "retrieved", -1, True),
        ("uncurated/b1", "uncurated", "copy", "curated/b", "exact", 0, False),
        ("uncurated/c", "uncurated", "clean", None, "duplicate", 1, False),
        ("uncurated/o", "uncurated", "off-topic", None, "retrieved", -1, True),
        ("uncurated/p", "uncurated", "off-topic", None, "not retrieved", -1, False),
    ]
    path, pool, role, original, stage, cause, kept = (list(column) for column in zip(*rows))
    (tmp_path / "world").mkdir()
    (tmp_path / "selection").mkdir()
    pq.write_table(pa.table({"path": path, "role": role, "original": original}), tmp_path / "world" / "truth.parquet")
    ledger = pa.table({"path": path, "pool": pool, "stage": stage, "cause": cause, "kept": kept})
    pq.write_table(ledger, tmp_path / "selection" / "images.parquet")
    values = {(s["protocol"], s["metric"], s["backbone"]): s["value"] for s in demo.check(tmp_path)}
    assert values == {
        ("duplicates", "precision", "first"): pytest.approx(2 / 3),
        ("duplicates", "recall", "first"): pytest.approx(2 / 3),
        ("retrieval", "precision", "first"): pytest.approx(2 / 3),
        ("retrieval", "precision", "whole pool"): pytest.approx(2 / 4),
    }
