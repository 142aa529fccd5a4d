"""Sources: which files are images, their paths, labels and splits, and the messages of errors."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from troodon import run
from troodon.config import UsageError
from troodon.images import decode
from troodon.images.formats import RASTER_EXTENSIONS
from troodon.images.index import SCHEMA, Index
from troodon.images.sources import open_source

MEMBERS = ["a/1.jpg", "a/2.PNG", "b/3.jpg", "b/c/4.webp", "notes.txt"]


def write_files(folder: Path, names: list[str]) -> Path:
    """Write files whose bytes are their own names: sources never read images."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def write_tar(tar: Path, names: list[str], size: int = 700) -> Path:
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(name.encode().ljust(size, b".")))
    return tar


def contents(index: Index) -> dict[str, bytes]:
    return {index.path(row): index.read(row).rstrip(b".") for row in range(len(index))}


def error_message(*paths) -> str:
    with pytest.raises(UsageError) as caught:
        open_source(*paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- folders, files, tars


def test_a_folder_is_listed_whole_and_in_order(tmp_path):
    write_files(tmp_path / "photos", ["b/2.JPG", "b/1.jpeg", "a.png", "b/readme.txt", ".hidden.jpg", ".cache/x.jpg"])
    write_files(tmp_path / "photos", ["__MACOSX/b/1.jpeg", "b/._1.jpeg", "deep/er/still/ü ber.webp"])
    index = open_source(tmp_path / "photos")
    names = ["a.png", "b/1.jpeg", "b/2.JPG", "deep/er/still/ü ber.webp"]
    assert contents(index) == {f"photos/{name}": name.encode() for name in names}
    assert index.column("path") == [f"photos/{name}" for name in names]
    assert index.column("container") == [str(tmp_path / "photos" / name) for name in names]
    assert index.column("length") == [len(name.encode()) for name in names]
    assert index.table.schema == SCHEMA


def test_links_are_followed_and_loops_end(tmp_path, capsys):
    write_files(tmp_path / "elsewhere", ["far.jpg"])
    photos = write_files(tmp_path / "photos", ["b/near.jpg"])
    (photos / "loop").symlink_to(photos)
    (photos / "b" / "up").symlink_to("..")
    (photos / "a_link").symlink_to("b")
    (photos / "z_out").symlink_to(tmp_path / "elsewhere")
    (photos / "y_out").symlink_to(tmp_path / "elsewhere")
    (photos / "out").symlink_to(tmp_path / "elsewhere")  # three ways to one folder: the first by name counts
    (photos / "one.jpg").symlink_to(tmp_path / "elsewhere" / "far.jpg")
    (photos / "dead.jpg").symlink_to("nowhere")
    (photos / "itself.jpg").symlink_to("itself.jpg")
    index = open_source(photos)
    assert index.column("path") == ["photos/b/near.jpg", "photos/one.jpg", "photos/out/far.jpg"]
    assert index.read(1) == index.read(2) == b"far.jpg"
    assert "leaves out: 2 links are broken (the first: dead.jpg)" in capsys.readouterr().err


def test_a_tar_is_read_in_place(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [f"./{name}" for name in [*MEMBERS, ".hidden/5.jpg", "a/._1.jpg"]])
    index = open_source(tar)
    assert contents(index) == {f"x.tar/{name}": f"./{name}".encode() for name in MEMBERS[:4]}
    assert set(index.column("container")) == {str(tar)}


def test_links_and_folders_in_a_tar_are_no_images(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("real.jpg"))
        odd = {
            "dir.jpg": tarfile.DIRTYPE,
            "soft.jpg": tarfile.SYMTYPE,
            "hard.jpg": tarfile.LNKTYPE,
            "holes.jpg": tarfile.GNUTYPE_SPARSE,  # its bytes do not lie in one piece
        }
        for name, kind in odd.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "real.jpg"
            tar.addfile(member)
    assert open_source(tmp_path / "x.tar").column("path") == ["x.tar/real.jpg"]


def test_difficult_names_in_tars(tmp_path, capsys):
    long = "d" * 90 + "/" + "e" * 120 + ".jpg"
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=format, encoding="utf-8") as tar:
            for name in (long, "twice.jpg", "twice.jpg", "latin\udce9.jpg"):
                member = tarfile.TarInfo(name)
                member.size = 1
                tar.addfile(member, io.BytesIO(str(tar.offset % 7).encode()))
        index = open_source(tmp_path / "x.tar")
        assert index.column("path") == [f"x.tar/{long}", "x.tar/latin\\xe9.jpg", "x.tar/twice.jpg"]
        with tarfile.open(tmp_path / "x.tar") as tar:
            assert index.read(2) == tar.extractfile(tar.getmembers()[2]).read()  # the later one
    assert "1 file has the name of a later one, which counts" in capsys.readouterr().err


def test_tars_in_a_folder_are_folders(tmp_path):
    shards = write_files(tmp_path / "shards", ["loose.jpg", "sub/x.jpg"])
    write_tar(shards / "0.tar", ["1.jpg", "2.jpg"])
    write_tar(shards / "sub" / "1.tar", ["1.jpg"])
    index = open_source(shards)
    paths = ["0.tar/1.jpg", "0.tar/2.jpg", "loose.jpg", "sub/1.tar/1.jpg", "sub/x.jpg"]
    assert index.column("path") == [f"shards/{path}" for path in paths]
    assert [index.read(row).rstrip(b".") for row in (1, 2, 3)] == [b"2.jpg", b"loose.jpg", b"1.jpg"]


@pytest.mark.parametrize(
    ("inside", "found"),
    [
        ("a", ["a/1.jpg", "a/2.PNG"]),
        ("b", ["b/3.jpg", "b/c/4.webp"]),
        ("b/c/", ["b/c/4.webp"]),
        ("a/1.jpg", ["a/1.jpg"]),
        ("?", ["a/1.jpg", "a/2.PNG", "b/3.jpg", "b/c/4.webp"]),
        ("b/*", ["b/3.jpg", "b/c/4.webp"]),
        ("b/*.jpg", ["b/3.jpg"]),
        ("a/?.PNG", ["a/2.PNG"]),
        ("*.jpg", ["top.jpg"]),  # a star does not reach into folders
    ],
)
def test_a_path_inside_a_tar_is_a_folder(tmp_path, inside, found):
    tar = write_tar(tmp_path / "x.tar", [*MEMBERS, "abc/5.txt", "top.jpg"])
    assert open_source(f"{tar}/{inside}").column("path") == [f"x.tar/{name}" for name in found]


def test_a_truncated_tar_gives_its_intact_files_and_a_message(tmp_path, capsys):
    whole = write_tar(tmp_path / "whole.tar", [f"{n}.jpg" for n in range(6)])
    data = whole.read_bytes()
    block = 512 + 1024  # header and padded content
    for length, left in [(block * 3 + 600, 3), (block * 3 + 100, 3), (block * 2, 2), (block * 2 + 512 + 700, 3)]:
        (tmp_path / "cut.tar").write_bytes(data[:length])
        index = open_source(tmp_path / "cut.tar")
        assert contents(index) == {f"cut.tar/{n}.jpg": f"{n}.jpg".encode() for n in range(left)}, length
        assert f"the {left} files before the damage are intact" in capsys.readouterr().err
    damaged = bytearray(data)
    damaged[block * 4 : block * 4 + 512] = b"\xaa" * 512
    (tmp_path / "cut.tar").write_bytes(damaged)
    assert len(open_source(tmp_path / "cut.tar")) == 4
    assert "the 4 files before the damage are intact" in capsys.readouterr().err
    backwards = bytearray(data)
    backwards[block + 124 : block + 136] = b"\xff" * 12  # a size of -1
    header = bytes(backwards[block : block + 148]) + b" " * 8 + bytes(backwards[block + 156 : block + 512])
    backwards[block + 148 : block + 156] = b"%06o\0 " % sum(header)
    (tmp_path / "cut.tar").write_bytes(backwards)
    assert len(open_source(tmp_path / "cut.tar")) == 1
    assert "the 1 file before the damage is intact" in capsys.readouterr().err
    open_source(whole)
    assert capsys.readouterr().err == ""


def test_an_image_is_listed_once_however_often_it_is_given(tmp_path):
    photos = write_files(tmp_path / "photos", ["cats/1.jpg", "dogs/2.jpg"])
    tar = write_tar(tmp_path / "x.tar", MEMBERS)
    (tmp_path / "other").symlink_to(photos)
    index = open_source(
        photos / "dogs", photos, str(photos) + "/", f"{tar}/a", tar, tmp_path / "other", photos / "dogs"
    )
    paths = ["dogs/2.jpg", "photos/cats/1.jpg", *(f"x.tar/{name}" for name in MEMBERS[:4])]
    assert index.column("path") == paths


def test_sources_of_one_name_get_distinct_paths(tmp_path):
    for place in ("one", "two"):
        write_files(tmp_path / place / "photos", ["1.jpg"])
    assert open_source(tmp_path / "two/photos", tmp_path / "one/photos").column("path") == [
        "two/photos/1.jpg",
        "one/photos/1.jpg",
    ]
    files = [tmp_path / "one/photos/1.jpg", tmp_path / "two/photos/1.jpg"]
    assert open_source(files[0]).column("path") == ["1.jpg"]
    assert open_source(*files).column("path") == ["one/photos/1.jpg", "two/photos/1.jpg"]


def test_a_relative_path_is_the_same_source(tmp_path, monkeypatch):
    photos = write_files(tmp_path / "photos", ["1.jpg"])
    monkeypatch.chdir(photos)
    assert open_source(".").table == open_source(photos).table == open_source("../photos").table


def test_every_extension_is_of_a_format_that_is_decoded():
    Image.init()
    known = {ending.lstrip("."): name for ending, name in Image.registered_extensions().items()}
    formats = {ending: known[ending] for ending in RASTER_EXTENSIONS - {"npy"}}  # an array, which Pillow has no part in
    assert set(formats.values()) - {"MPO"} <= set(decode.FORMATS)  # an MPO is opened as the JPEG it starts with
    assert {f for f in decode.FORMATS if f not in formats.values()} == set()


# ---- artifacts


def artifact(folder: Path, kind: str, table: pa.Table | None = None) -> Path:
    with run.publish(folder, kind, "0", {}) as partial:
        if table is not None:
            pq.write_table(table, partial / "images.parquet")
    return folder


def test_an_index_gives_the_rows_that_could_be_read(tmp_path):
    index = open_source(write_files(tmp_path / "photos", ["1.jpg", "2.jpg", "3.jpg"]))
    status = pa.array(["ok", "truncated", None])
    for kind in ("index", "embeddings"):
        folder = artifact(tmp_path / kind, kind, index.table.append_column("status", status))
        assert open_source(folder).table == index.take([0, 2]).table


def test_a_selection_gives_the_rows_it_kept(tmp_path):
    index = open_source(write_files(tmp_path / "photos", ["1.jpg", "2.jpg", "3.jpg"]))
    kept = index.table.append_column("kept", pa.array([False, True, True]))
    assert open_source(artifact(tmp_path / "s", "selection", kept)).table == index.take([1, 2]).table
    none = index.table.append_column("kept", pa.array([False] * 3))
    assert "this selection has no usable image" in error_message(artifact(tmp_path / "none", "selection", none))


def test_other_artifacts_list_no_images(tmp_path):
    assert "is a run, which lists no images" in error_message(artifact(tmp_path / "r", "run"))
    assert "is an index, which" in error_message(artifact(tmp_path / "i", "index"))


def test_an_index_with_a_missing_tar_is_refused(tmp_path):
    tar = write_tar(tmp_path / "x.tar", MEMBERS)
    folder = artifact(tmp_path / "i", "index", open_source(tar).table)
    tar.unlink()
    assert f"lists images in {tar}, which no longer exists" in error_message(folder)


def test_a_foreign_manifest_is_ignored(tmp_path):
    photos = write_files(tmp_path / "photos", ["1.jpg"])
    for text in ("not json", "[1, 2]", json.dumps({"name": "my app"})):
        (photos / "manifest.json").write_text(text)
        assert open_source(photos).column("path") == ["photos/1.jpg"]


# ---- labels and splits


def labels_and_splits(index: Index) -> list[tuple]:
    return list(zip(index.column("path"), index.column("label"), index.column("split")))


def test_folders_give_classes_and_splits(tmp_path):
    names = ["train/cat/1.jpg", "train/dog/images/2.jpg", "validation/cat/3.jpg", "Test/4.jpg", "5.jpg"]
    assert labels_and_splits(open_source(write_files(tmp_path / "d", names))) == [
        ("d/5.jpg", None, None),
        ("d/Test/4.jpg", None, "test"),
        ("d/train/cat/1.jpg", "cat", "train"),
        ("d/train/dog/images/2.jpg", "dog", "train"),
        ("d/validation/cat/3.jpg", "cat", "val"),
    ]


def test_a_single_folder_and_the_source_itself_are_no_classes(tmp_path):
    assert (
        open_source(write_files(tmp_path / "a", ["cats/1.jpg", "images/2.jpg", "3.jpg"])).column("label") == [None] * 3
    )
    assert open_source(write_files(tmp_path / "b", ["x/1.jpg", "2.jpg", "y/3.jpg"])).column("label") == [None, "x", "y"]
    assert labels_and_splits(open_source(write_files(tmp_path / "valid", ["1.jpg"]))) == [("valid/1.jpg", None, "val")]
    shards = tmp_path / "shards"
    write_tar(shards / "train" / "0.tar", ["1.jpg"])
    write_tar(shards / "train" / "1.tar", ["1.jpg"])
    assert labels_and_splits(open_source(shards)) == [(f"shards/train/{n}.tar/1.jpg", None, "train") for n in (0, 1)]


def test_a_table_overrides_folders(tmp_path, capsys):
    photos = write_files(tmp_path / "p", ["cat/1.jpg", "dog/2.jpg", "dog/3.jpg"])
    (photos / "labels.csv").write_text("path,label,split,more\ncat/1.jpg,7,valid,x\n./dog/2.jpg,,train,x\n")
    (photos / "index.csv").write_text("path,label\ncat/1.jpg,wrong\n")
    expected = [("p/cat/1.jpg", "7", "val"), ("p/dog/2.jpg", None, "train"), ("p/dog/3.jpg", None, None)]
    assert labels_and_splits(open_source(photos)) == expected
    (photos / "labels.csv").unlink()
    (photos / "index.csv").write_text("\ufeffimage,split\ncat/1.jpg,test\n")  # no class here: the folders say it
    expected = [("p/cat/1.jpg", "cat", "test"), ("p/dog/2.jpg", "dog", None), ("p/dog/3.jpg", "dog", None)]
    assert labels_and_splits(open_source(photos)) == expected
    assert capsys.readouterr().err == ""


def test_a_table_applies_to_its_own_folder_only(tmp_path):
    photos = write_files(tmp_path / "p", ["sets/x/images/1.jpg", "plain/cat/1.jpg", "plain/dog/1.jpg"])
    (photos / "sets" / "x" / "index.csv").write_text("path,class\nimages/1.jpg,bird\n")
    assert open_source(photos).column("label") == ["cat", "dog", "bird"]


def test_a_table_in_a_tar_applies_to_every_path_inside(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        table = b"path,label\na/1.jpg,one\nb/2.jpg,two\n"
        for name, data in (("a/1.jpg", b"1"), ("labels.csv", table), ("b/2.jpg", b"2")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert labels_and_splits(open_source(tmp_path / "x.tar/b")) == [("x.tar/b/2.jpg", "two", None)]


def test_unusable_tables_are_reported(tmp_path, capsys):
    photos = write_files(tmp_path / "p", ["cat/1.jpg", "dog/2.jpg"])
    (photos / "labels.csv").write_text("number,label\n1,7\n")
    assert open_source(photos).column("label") == ["cat", "dog"]
    assert "p/labels.csv: has no columns `path` and `label` (or `split`), but number, label, and is ignored\n" in (
        capsys.readouterr().err
    )
    (photos / "labels.csv").write_text("path,label\n/abs/cat/1.jpg,7\n")
    assert open_source(photos).column("label") == [None, None]
    assert "names none of the images" in capsys.readouterr().err
    (photos / "labels.csv").write_bytes(b"path,label\n\xff\xfe\0\0")
    assert open_source(photos).column("label") == ["cat", "dog"]
    assert "p/labels.csv: cannot be read as a table (it is not text), and is ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pack", "images", "classes", "splits"),
    [
        ("cls_tinyin50_64.tar", 14_000, 50, {"train": 11_500, "val": 2_500}),
        ("cls_caltech20_112.tar", 2_453, 20, {"train": 1_478, "val": 491, "test": 484}),
        ("photos_cc0_224.tar", 560, 0, {None: 560}),
        ("retr_eth80_dev.tar/images", 1_640, 40, {None: 1_640}),
        ("neardup_cifar10_dev.tar", 4_313, 10, {None: 4_313}),
        ("seg_camvid_dev.tar/images", 468, 0, {"train": 367, "val": 101}),
        ("seg_camvid_dev.tar", 936, 0, {"train": 367, "val": 101, None: 468}),  # masks are images by their names
        ("depth_kitchen_dev.tar/rgb", 240, 0, {None: 240}),
        ("formats_robustness.tar", 44, 0, {None: 44}),
    ],
)
def test_real_packs(shared, pack, images, classes, splits):
    name, _, inside = pack.partition("/")
    index = open_source(shared(name) / inside)
    labels = Counter(index.column("label"))
    assert len(index) == images
    assert len(labels.keys() - {None}) == classes
    assert not classes or None not in labels
    assert Counter(index.column("split")) == splits
    assert index.path(0).startswith(pack)


def test_every_row_of_a_real_pack_is_the_member_of_its_name(shared):
    tar = shared("cls_caltech20_112.tar")
    index = open_source(tar)
    with tarfile.open(tar) as archive:
        for row in range(0, len(index), 50):
            member = index.path(row).removeprefix(f"{tar.name}/")
            assert index.read(row) == archive.extractfile(member).read()


# ---- errors


def test_errors_about_missing_paths_suggest_similar_ones(tmp_path):
    write_files(tmp_path / "photos", ["cats/1.jpg"])
    tar = write_tar(tmp_path / "shots.tar", MEMBERS)
    assert "did you mean 'photos'?" in error_message(tmp_path / "photo")
    assert "did you mean 'cats'?" in error_message(tmp_path / "photos" / "cat" / "1.jpg")
    assert "did you mean 'shots.tar'?" in error_message(tmp_path / "shot.tar")
    assert "there is no 'notes.tx' in" in error_message(f"{tar}/notes.tx")
    assert "did you mean '3.jpg'?" in error_message(f"{tar}/b/4.jpg")
    assert "only 3.jpg, c" in error_message(f"{tar}/b/zzz")
    assert "is a file, not a folder, tar, zip or Parquet" in error_message(tmp_path / "photos/cats/1.jpg/x")
    assert "name a folder" in error_message()


def test_errors_about_sources_without_images_list_their_content(tmp_path):
    notes = write_files(tmp_path / "notes", [*(f"{n}.txt" for n in range(11)), "LICENSE"])
    assert "notes: no images among 12 files (1 without ending, 11 .txt); image files end in .jpg .png" in error_message(
        notes
    )
    (tmp_path / "empty").mkdir()
    assert "empty: is empty" in error_message(tmp_path / "empty")
    (notes / "12.txt").write_text("hello\nworld\n")
    assert "12.txt: no images among 2 files (2 without ending)" in error_message(notes / "12.txt")
    assert "LICENSE: does not have the name or the content of an image" in error_message(notes / "LICENSE")
    assert "no images among 1 file (1 .txt)" in error_message(write_tar(tmp_path / "x.tar", MEMBERS) / "notes.txt")
    write_files(tmp_path / "phone", ["1.HEIC", "2.heic"])
    assert "no images among 2 files (2 .heic (images that Pillow does not read))" in error_message(tmp_path / "phone")


def test_unsupported_formats_are_reported(tmp_path, capsys):
    open_source(write_files(tmp_path / "phone", ["1.HEIC", "2.heic", "3.jpg", "readme.md"]))
    assert "phone: leaves out 2 .heic (images that Pillow does not read), 1 .md\n" in capsys.readouterr().err


def test_tars_that_cannot_be_read_in_place_are_refused(tmp_path):
    tar = write_tar(tmp_path / "x.tar", MEMBERS)
    for name in ("x.tar.gz", "misnamed.tar"):
        (tmp_path / name).write_bytes(gzip.compress(tar.read_bytes()))
        assert f"is compressed, but images are read in place: run gunzip {tmp_path / name}" in error_message(
            tmp_path / name
        )
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04....")
    assert "x.zip: is not a complete zip" in error_message(tmp_path / "x.zip")
    (tmp_path / "shard-0").write_bytes(tar.read_bytes())
    assert "is a tar, but its name does not end in .tar: rename it" in error_message(tmp_path / "shard-0")
    (tmp_path / "text.tar").write_text("hello" * 500)
    assert "text.tar: is not a tar" in error_message(tmp_path / "text.tar")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    write_files(tmp_path / "locked", ["1.jpg"]).chmod(0)
    assert "cannot be read (Permission denied)" in error_message(tmp_path / "locked")


def test_a_wrong_path_is_reported_without_torch():
    code = "import sys, troodon.images.scan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
