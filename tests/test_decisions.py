"""What a person decides about images is written, read, and followed by all that takes images."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.test_dedup import kept, photos  # noqa: F401
from troodon import UsageError, apply, cli, dedup
from troodon.images.decisions import FILE, Decision, append_decisions, decided_rows, read_decisions
from troodon.images.sources import open_source
from troodon.run import read_json


@pytest.fixture
def selection(photos, tmp_path) -> Path:  # noqa: F811
    return dedup(photos, tmp_path / "selection")


def rows(selection: Path) -> dict[str, dict]:
    table = pq.read_table(selection / "images.parquet").to_pylist()
    return {row["path"].partition("/")[2]: row | {"id": number} for number, row in enumerate(table)}


DECIDED = [
    Decision("photos/second/0-saved.jpg", keep=True, instead_of="photos/first/0.png"),
    Decision("photos/first/3.png", keep=False),
    Decision("photos/second/1.png", keep=True, tags=("a tag", "ανα")),
]


def test_the_last_line_about_an_image_holds(tmp_path):
    file = tmp_path / FILE
    assert read_decisions(file) == {}
    append_decisions(file, DECIDED)
    append_decisions(file, [Decision("photos/first/3.png", "ab" * 32, None, "", ("new\nline", "\u202e"))])
    found = read_decisions(file)
    assert [*found.values()] == [
        DECIDED[0],
        Decision("photos/first/3.png", "ab" * 32, None, "", ("new\nline", "\u202e")),
        DECIDED[2],
    ]
    assert len(file.read_bytes().splitlines()) == 4


def test_a_line_that_a_kill_cut_short_is_none_and_does_not_spoil_the_next(tmp_path):
    file = tmp_path / FILE
    append_decisions(file, DECIDED)
    file.write_bytes(file.read_bytes() + b'{"path": "photos/fir')
    assert [*read_decisions(file).values()] == DECIDED
    append_decisions(file, [Decision("photos/first/4.png", keep=False)])
    assert [*read_decisions(file).values()] == [*DECIDED, Decision("photos/first/4.png", keep=False)]


@pytest.mark.parametrize(
    "line",
    ["no json", "[]", '{"keep": true}', '{"path": 3}', '{"path": "a", "keep": 1.5}', '{"path": "a", "tags": [1]}'],
)
def test_a_line_that_is_no_decision_is_named(line, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(f'{{"path": "a.jpg", "keep": false}}\n{line}\n')
    with pytest.raises(UsageError, match=r"mine.jsonl, line 2"):
        read_decisions(tmp_path / "mine.jsonl")
    assert (
        cli.run(["dedup", str(tmp_path), "--out", str(tmp_path / "s"), "--decisions", str(tmp_path / "mine.jsonl")])
        == 2
    )
    assert not (tmp_path / "s").exists()


def test_an_image_is_known_by_its_path_and_its_bytes(selection):
    images = pq.read_table(selection / "embeddings" / "images.parquet")
    path, sha256 = images["path"].to_pylist(), images["sha256"].to_pylist()
    decisions = {
        name: Decision(name, digest, False)
        for name, digest in ((path[0], sha256[0]), ("moved.png", sha256[1]), (path[2], "f" * 64), (path[3], ""))
    }
    assert {row: made.path for row, made in decided_rows(decisions, images).items()} == {
        0: path[0],
        1: "moved.png",
        3: path[3],
    }


def test_a_new_selection_follows_the_file_and_its_ledger_says_so(photos, selection, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "mine.jsonl"
    append_decisions(
        file, [*DECIDED, Decision("photos/second/broken.png", keep=True), Decision("photos/gone.png", keep=True)]
    )
    before = kept(selection)
    assert cli.run(["dedup", str(photos), "--out", str(tmp_path / "new"), "--decisions", str(file)]) == 0
    err = capsys.readouterr().err
    assert "1 of 5 decisions are about images not here" in err
    assert "1 decision to keep cannot be followed" in err
    assert kept(tmp_path / "new") == before - {"first/0.png", "first/3.png"} | {"second/0-saved.jpg", "second/1.png"}
    table = rows(tmp_path / "new")
    stages = {name: row["stage"] for name, row in table.items() if row["stage"] == "decided"}
    assert {*stages} == {"second/0-saved.jpg", "first/0.png", "first/3.png", "second/1.png"}
    assert table["first/0.png"]["cause"] == table["second/0-saved.jpg"]["id"]
    assert table["first/3.png"]["reason"] == "a person leaves it out"
    assert table["second/1.png"]["tags"] == ["a tag", "ανα"]
    assert table["first/4.png"]["tags"] is None
    summary = read_json(tmp_path / "new" / "summary.json")
    assert summary["decided"] == {"kept": 2, "left_out": 2}
    assert summary["stages"][-1] == {
        "name": "decided",
        "in": 10,
        "out": 8,
        "dropped": 2,
        "what": "images that a person left out",
    }
    assert "photos/first/3.png" in {
        row["path"] for row in pq.read_table(tmp_path / "new" / "images.parquet").to_pylist()
    }
    assert (
        cli.run(["dedup", str(photos), "--out", str(tmp_path / "new"), "--decisions", str(file)]) == 0
    )  # does nothing
    append_decisions(file, [Decision("photos/first/4.png", keep=False)])
    assert cli.run(["dedup", str(photos), "--out", str(tmp_path / "new"), "--decisions", str(file)]) == 2
    assert cli.run(["report", str(tmp_path / "new"), "--out", str(tmp_path / "page.html")]) == 0


def test_a_selection_without_decisions_is_as_before(selection):
    assert "tags" not in pq.read_table(selection / "images.parquet").column_names
    assert "decisions" not in read_json(selection / "manifest.json")["settings"]
    assert "decided" not in json.dumps(read_json(selection / "summary.json"))


def test_whatever_reads_a_selection_follows_the_decisions_in_it(selection, tmp_path, capsys):
    before, count = open_source(selection), len(kept(selection))
    append_decisions(selection / FILE, DECIDED)
    index = open_source(selection)
    names = {path.partition("/")[2] for path in index.column("path")}
    assert names == kept(selection) - {"first/0.png", "first/3.png"} | {"second/0-saved.jpg", "second/1.png"}
    assert index.content_hash() != before.content_hash()
    assert "2 images kept and 2 left out by a person (decisions.jsonl)" in capsys.readouterr().err
    apply(selection, "list", tmp_path / "kept.txt")
    assert len((tmp_path / "kept.txt").read_text().splitlines()) == count
    apply(selection, "move", tmp_path / "out")
    assert (tmp_path / "out" / "photos" / "first" / "3.png").exists()
    assert not (tmp_path / "out" / "photos" / "second" / "1.png").exists()


def test_decisions_in_embeddings_leave_images_out(selection, tmp_path):
    folder = shutil.copytree(selection / "embeddings", tmp_path / "embeddings")
    append_decisions(folder / FILE, DECIDED)
    names = {path.partition("/")[2] for path in open_source(folder).column("path")}
    everything = {path.partition("/")[2] for path in open_source(selection / "embeddings").column("path")}
    assert names == everything - {"first/0.png", "first/3.png"}
