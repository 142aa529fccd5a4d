"""The scan: each image is read once, and all counts are right on a dataset small enough to count by hand."""

import csv
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from troodon import run
from troodon.config import UsageError
from troodon.images import scan as module
from troodon.images.index import SCHEMA, Index
from troodon.images.inventory import format_summary, summarise
from troodon.images.scan import MODIFIED, SCAN_SCHEMA, scan_to
from troodon.images.sources import open_source


def scan(index: Index, threads: int, **more) -> pa.Table:
    return module.scan(index, threads, **more)[0]


def picture(seed: int, width: int = 20, height: int = 10, mode: str = "RGB", format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path) -> Path:
    """Nine files: one image three times in two splits and two classes, one twice in one class, three broken."""
    a, b = picture(0), picture(1, 40, 30, "L", "PNG")
    files = {
        "train/cat/1.jpg": a,
        "train/cat/2.jpg": a,
        "val/dog/3.jpg": a,
        "train/dog/4.png": b,
        "train/dog/5.png": b,
        "val/dog/6.jpg": picture(2, 60, 60),
        "train/cat/7.jpg": picture(3)[:-50],
        "train/cat/8.jpg": b"",
        "train/cat/9.jpg": b"hello",
    }
    for name, data in files.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(data)
    return tmp_path / "photos"


def by_name(table: pa.Table) -> dict[str, dict]:
    return {row["path"].removeprefix("photos/"): row for row in table.to_pylist()}


def test_every_image_is_described(photos):
    table = scan(open_source(photos), threads=2)
    assert table.schema == pa.schema([*SCHEMA, *SCAN_SCHEMA, MODIFIED])
    rows = by_name(table)
    fine = rows["train/dog/4.png"]
    expected = {"status": "ok", "reason": None, "format": "PNG", "mode": "L", "channels": 1,
                "width": 40, "height": 30}  # fmt: skip
    assert {key: fine[key] for key in expected} == expected
    for name, row in rows.items():
        assert row["sha256"] == hashlib.sha256((photos / name).read_bytes()).hexdigest()
    short = rows["train/cat/7.jpg"]
    assert (short["status"], short["format"], short["width"]) == ("truncated", "JPEG", 20)  # its header is whole
    assert rows["train/cat/8.jpg"]["status"] == "empty"
    assert rows["train/cat/9.jpg"]["status"] == "not an image"
    assert rows["train/cat/9.jpg"]["width"] is None
    assert all((row["reason"] is None) == (row["status"] == "ok") for row in rows.values())


def test_a_deleted_file_is_unreadable_and_the_others_are_read(photos):
    index = open_source(photos)
    (photos / "train/cat/1.jpg").unlink()
    rows = by_name(scan(index, threads=2))
    gone = rows["train/cat/1.jpg"]
    assert (gone["status"], gone["reason"], gone["sha256"]) == ("unreadable", "No such file or directory", None)
    assert Counter(row["status"] for row in rows.values())["ok"] == 5


def test_a_tar_truncated_after_listing_is_unreadable_at_its_end(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("1.jpg", "2.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(picture(0))
            tar.addfile(member, io.BytesIO(picture(0)))
    index = open_source(tmp_path / "x.tar")
    with open(tmp_path / "x.tar", "r+b") as file:
        file.truncate(index.column("offset")[1] + 10)
    table = scan(index, threads=1)
    assert table["status"].to_pylist() == ["ok", "unreadable"]
    assert "ends before" in table["reason"][1].as_py()


def test_threads_change_nothing_and_progress_arrives(photos, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    index, calls = open_source(photos), []
    assert scan(index, threads=1) == scan(index, threads=4, progress=lambda *done: calls.append(done))
    assert calls == [(2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]


def test_the_summary_counts(photos):
    summary = summarise(scan(open_source(photos), threads=2))
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["images"], summary["ok"]) == (9, 6)
    assert summary["bytes"] == sum(file.stat().st_size for file in photos.rglob("*.*"))
    assert [(b["path"], b["status"]) for b in summary["broken"]] == [
        ("photos/train/cat/7.jpg", "truncated"),
        ("photos/train/cat/8.jpg", "empty"),
        ("photos/train/cat/9.jpg", "not an image"),
    ]
    assert summary["formats"] == {"JPEG": 4, "PNG": 2}
    assert summary["modes"] == {"RGB": 4, "L": 2}
    assert summary["sizes"]["width"] == {"min": 20, "median": 30, "max": 60}
    assert summary["sizes"]["height"] == {"min": 10, "median": 20, "max": 60}
    assert summary["sizes"]["megapixels"] == {"min": 0.0002, "median": 0.0007, "max": 0.0036}
    assert summary["labels"] == {"cat": 5, "dog": 4}
    assert summary["splits"] == {"train": 7, "val": 2}
    same = summary["identical"]
    assert (same["groups"], same["images"], same["pairs"]) == (2, 5, 4)  # 3 of three and 1 of two
    assert (same["pairs_across_splits"], same["by_splits"]) == (2, {"train / val": 2})
    assert same["examples"] == [
        [f"photos/{name}" for name in ("train/cat/1.jpg", "train/cat/2.jpg", "val/dog/3.jpg")],
        [f"photos/{name}" for name in ("train/dog/4.png", "train/dog/5.png")],
    ]
    assert (summary["conflicts"]["groups"], summary["conflicts"]["images"]) == (1, 3)
    assert summary["conflicts"]["examples"][0][2] == {"path": "photos/val/dog/3.jpg", "label": "dog"}


def test_broken_files_are_not_duplicates_of_one_another(tmp_path):
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"")
    summary = summarise(scan(open_source(tmp_path), threads=1))
    assert summary["identical"]["groups"] == 0
    assert summary["sizes"]["width"] is None
    assert "broken      2 (empty 2)" in format_summary(summary)


def test_the_summary_as_text(photos):
    text = format_summary(summarise(scan(open_source(photos), threads=2)))
    for line in (
        "broken      3 (empty 1, not an image 1, truncated 1)",
        "formats     JPEG 4, PNG 2",
        "width       20 to 60 px, median 30",
        "splits      train 7, val 2",
        "labels      2 classes of 4 to 5 images",
        "identical   4 pairs of byte-identical images (5 images in 2 groups); across splits 2 pairs (train / val 2)",
        "conflicts   1 group of identical images with different labels",
        "  photos/train/cat/8.jpg: empty, 0 bytes",
        "  photos/train/dog/4.png = photos/train/dog/5.png",
        "  photos/train/cat/1.jpg (cat) = photos/train/cat/2.jpg (cat) = photos/val/dog/3.jpg (dog)",
    ):
        assert line in text.splitlines()


def test_long_lists_are_truncated(tmp_path):
    for n in range(13):
        (tmp_path / f"{n:02}.jpg").write_bytes(b"hello")
    lines = format_summary(summarise(scan(open_source(tmp_path), threads=1))).splitlines()
    assert lines[-1] == "  ... and 3 more"
    assert sum("not an image" in line for line in lines) == 11  # the count, and ten of the files


def test_an_index_is_published_once_and_opens_again(photos, tmp_path, monkeypatch):
    out = tmp_path / "index"
    summary = scan_to([photos], out, threads=2)
    assert summary["ok"] == 6
    assert run.read_manifest(out)["kind"] == "index"
    assert run.read_json(out / "summary.json") == summary
    again = open_source(out)
    assert len(again) == 6
    assert again.read(0) == (photos / "train/cat/1.jpg").read_bytes()

    monkeypatch.setattr(module, "scan", lambda *_: pytest.fail("scanned twice"))
    assert scan_to([photos], out, threads=2) == summary
    with pytest.raises(UsageError, match="was made with other settings"):
        scan_to([photos / "train"], out, threads=2)


def test_only_what_has_changed_is_read_again(photos, tmp_path, monkeypatch):
    out = tmp_path / "index"
    scan_to([photos], out, threads=2)
    (photos / "new.jpg").write_bytes(picture(9))
    (photos / "train/cat/8.jpg").write_bytes(picture(10))  # was empty
    (photos / "val/dog/6.jpg").unlink()
    same = photos / "train/cat/1.jpg"  # another picture of the same length, seen by the time of its change
    same.write_bytes(same.read_bytes()[:-20] + bytes(20))
    os.utime(same, ns=(1, 1))
    read, examine = [], module._examine
    monkeypatch.setattr(module, "_examine", lambda index, row: read.append(index.path(row)) or examine(index, row))
    summary = scan_to([photos], out, threads=2)
    assert sorted(read) == ["photos/new.jpg", "photos/train/cat/1.jpg", "photos/train/cat/8.jpg"]
    assert (summary["images"], summary["read"]) == (9, 3)
    monkeypatch.undo()
    fresh = scan_to([photos], tmp_path / "fresh", threads=1)
    assert {k: v for k, v in summary.items() if k not in ("read", "seconds")} == {
        k: v for k, v in fresh.items() if k not in ("read", "seconds")
    }
    one, other = (pq.read_table(folder / "images.parquet") for folder in (out, tmp_path / "fresh"))
    assert one == other


def test_an_interrupted_scan_resumes(photos, tmp_path, monkeypatch):
    out, examine, read = tmp_path / "index", module._examine, []

    def stopping(index, row):
        read.append(index.path(row))
        if len(read) == 6:
            raise KeyboardInterrupt
        return examine(index, row)

    monkeypatch.setattr(module, "CHUNK", 1)
    monkeypatch.setattr(module, "_examine", stopping)
    with pytest.raises(KeyboardInterrupt):
        scan_to([photos], out, threads=1)
    assert not out.exists()
    first = set(read[:5])
    read.clear()
    monkeypatch.setattr(module, "_examine", lambda index, row: read.append(index.path(row)) or examine(index, row))
    assert scan_to([photos], out, threads=1)["read"] == len(read)
    assert not first & set(read)
    assert scan(open_source(photos), threads=1) == pq.read_table(out / "images.parquet")
    assert [p.name for p in tmp_path.iterdir() if p.name != "photos"] == ["index"]


def test_unreadable_images_are_read_again(photos, tmp_path):
    index = open_source(photos)
    data = (photos / "train/cat/1.jpg").read_bytes()
    (photos / "train/cat/1.jpg").unlink()
    table, _ = module.scan(index, threads=1)
    (photos / "train/cat/1.jpg").write_bytes(data)
    again, read = module.scan(index, threads=1, previous=[table])
    assert read == 1
    assert again["status"].to_pylist().count("ok") == 6


def test_the_same_pixels_in_other_bytes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    folders = {"train/a": ("PNG", pixels), "val/b": ("BMP", pixels), "val/c": ("PNG", pixels.transpose(1, 0, 2))}
    for name, (format, shown) in folders.items():
        (tmp_path / "x" / name).mkdir(parents=True)
        Image.fromarray(np.ascontiguousarray(shown)).save(tmp_path / "x" / name / f"1.{format.lower()}", format)
    summary = summarise(scan(open_source(tmp_path / "x"), threads=1))
    assert summary["identical"]["groups"] == 0
    assert summary["same_pixels"]["examples"] == [["x/train/a/1.png", "x/val/b/1.bmp"]]
    assert summary["same_pixels"]["by_splits"] == {"train / val": 1}
    assert summary["conflicts"]["examples"] == [
        [{"path": "x/train/a/1.png", "label": "a"}, {"path": "x/val/b/1.bmp", "label": "b"}]
    ]


def test_content_hashes_of_different_indexes_differ(photos):
    index = open_source(photos)
    assert index.content_hash() == open_source(photos).content_hash()
    assert len({i.content_hash() for i in (index, index.take(range(8)), index.take(range(8, -1, -1)))}) == 3


# ---- real images


def test_identical_images_across_the_splits_of_a_real_dataset(shared):
    """Byte-identical copies of two training images are in the validation split, with other labels."""
    path = shared("cls_tinyin50_64.tar")
    table = scan(open_source(path), threads=2)
    summary = summarise(table)
    assert (summary["images"], summary["ok"]) == (14_000, 14_000)
    assert summary["modes"] == {"RGB": 13_750, "L": 250}
    assert (summary["identical"]["pairs"], summary["identical"]["by_splits"]) == (2, {"train / val": 2})
    assert summary["conflicts"]["groups"] == 2

    with tarfile.open(path) as tar:  # the same, by hand
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    rows = list(csv.DictReader(io.StringIO(files["labels.csv"].decode())))
    train = {files[row["path"]]: row["path"] for row in rows if row["split"] == "train"}
    pairs = {(train[files[r["path"]]], r["path"]) for r in rows if r["split"] == "val" and files[r["path"]] in train}
    found = {tuple(name.removeprefix(f"{path.name}/") for name in group) for group in summary["identical"]["examples"]}
    assert found == pairs
    assert pairs == {
        ("images/train/n01855672/n01855672_44.JPEG", "images/val/n02002724/val_2157.JPEG"),
        ("images/train/n03770439/n03770439_128.JPEG", "images/val/n03404251/val_5819.JPEG"),
    }


def test_broken_files_among_awkward_files(shared):
    summary = summarise(scan(open_source(shared("formats_robustness.tar")), threads=2))
    assert {b["path"].rpartition("/")[2]: b["status"] for b in summary["broken"]} == {
        "corrupt_ukbench09268.jpg": "not an image",
        "text.jpg": "not an image",
        "truncated_half.jpg": "truncated",
        "zero_bytes.jpg": "empty",
    }
    assert summary["ok"] == 40
