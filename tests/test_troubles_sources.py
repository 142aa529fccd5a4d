"""Troubles of sources: files that are not read, locked archives, odd tables, results among the images."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from troodon import cli, run
from troodon.config import UsageError
from troodon.images import formats
from troodon.images.sources import open_source


def picture(seed: int, format: str = "JPEG") -> bytes:
    pixels, out = np.random.default_rng(seed).integers(0, 256, (12, 14, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def folder(place: Path, names: Sequence[str], content: bytes | None = None) -> Path:
    """A folder of different JPEGs, or of files with this content, under these names."""
    for seed, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(picture(seed) if content is None else content)
    return place


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED, locked: int = 0) -> Path:
    """A zip, whose first members have the flag of encryption in both headers."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    data = bytearray(path.read_bytes())
    for magic, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        for _ in range(locked):
            at = data.find(magic, at + 1)
            data[at + flag] |= 1
    path.write_bytes(data)
    return path


def paths(*places: object) -> list[str]:
    return open_source(*places).column("path")


def labels(place: Path) -> list[str | None]:
    return open_source(place).column("label")


def refused(*places: object) -> str:
    with pytest.raises(UsageError) as caught:
        open_source(*places)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def publish(place: Path, kind: str, names: Sequence[str]) -> Path:
    with run.publish(place, kind, "abc", {}) as partial:
        folder(partial, names)
    return place


# ---- what is left out


def test_what_is_left_out_is_counted(tmp_path, capsys):
    """Some files of a source are not read | Every verb says in one line how many, by their ending or by the reason."""
    data = folder(tmp_path / "d", ["1.jpg"])
    odd = ["LICENSE", "a.json", "b.json", "scan.mha", "v.mnc.gz", "more.tar.gz", "x.tgz", "n.q-r", ".a.jpg", ".git"]
    folder(data, odd, b"no image")
    write_zip(data / "in.zip", {"2.jpg": picture(2), "nested.zip": b"PK\x03\x04", "readme.md": b"text"})
    (data / "dead.jpg").symlink_to("nowhere")
    assert paths(data) == ["d/1.jpg", "d/in.zip/2.jpg"]
    assert capsys.readouterr().err == (
        f"{data}: leaves out 1 .mnc.gz (compressed), 1 .tar.gz (to be unpacked first), 1 .tgz (to be unpacked first), "
        "1 .zip inside an archive, 1 with an odd ending, 1 without ending, 2 .json, 1 .md, 2 with 2 other endings; "
        "1 link is broken (dead.jpg)\n"
    )
    folder(tmp_path / "plain", ["1.jpg", ".git/x", ".DS_Store", "._1.jpg"])
    open_source(tmp_path / "plain")
    assert capsys.readouterr().err == ""


def test_splits_of_other_names_are_told(tmp_path, capsys):
    """A split in a table is none of train, val and test | One line names it; these images have no split."""
    data = folder(tmp_path / "d", [f"{i}.jpg" for i in range(5)])
    splits = ("Training", "dev", "dev", "holdout", "")
    (data / "labels.csv").write_text("path,split\n" + "".join(f"{i}.jpg,{s}\n" for i, s in enumerate(splits)))
    assert open_source(data).column("split") == ["train", None, None, None, None]
    said = "3 rows have a split that is none of train, val and test, and is left out ('dev', 'holdout')"
    assert said in capsys.readouterr().err
    (data / "labels.csv").write_text("path,split\n0.jpg,valid\n1.jpg,test\n")
    open_source(data)
    assert capsys.readouterr().err == ""


def test_content_counts_where_the_name_says_nothing(tmp_path, capsys):
    """Images have no ending, an odd one, or that of another format | Their first bytes are looked at; they are read."""
    names = ["0b1c2d3e4f", "x.jpg_large", "y.jpg?w=640", "IMG_1.HEIC", "z.dat", "a b.c d", "deep/er/20", "v1.2"]
    data = folder(tmp_path / "d", names)
    assert paths(data) == sorted(f"d/{name}" for name in names)
    members = {name: picture(seed) for seed, name in enumerate(names)}
    for place in (write_tar(tmp_path / "t.tar", members), write_zip(tmp_path / "z.zip", members, zipfile.ZIP_DEFLATED)):
        index = open_source(place)
        assert [index.read(row) for row in range(len(index))] == [members[n] for n in sorted(names)]
    assert paths(data / "IMG_1.HEIC") == ["IMG_1.HEIC"]
    (tmp_path / "list.txt").write_text("".join(f"d/{name}\n" for name in names))
    assert len(paths(tmp_path / "list.txt")) == len(names)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "DDS"])
def test_every_usual_format_is_known_by_its_first_bytes(tmp_path, format):
    """A file without ending has any usual format of images | It is known by its first bytes."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "nameless").write_bytes(picture(0, format))
    assert paths(tmp_path / "d") == ["d/nameless"]


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet"])
def test_images_with_the_name_of_a_container(tmp_path, capsys, kind):
    """An image has the name of a tar, zip or Parquet file | A message says so, and asks to rename it."""
    data = folder(tmp_path / "d", ["1.jpg", f"2.{kind}"])
    assert f"2.{kind}: is an image, but has the name of a {kind}: rename it" in refused(data / f"2.{kind}")
    assert paths(data) == ["d/1.jpg"]
    assert f"leaves out: 1 container cannot be opened (2.{kind})" in capsys.readouterr().err


def test_what_only_looks_like_an_image_is_left_out(tmp_path, capsys):
    """A text or a raw file of a camera begins a little like an image | It is left out, and counted."""
    data = folder(tmp_path / "d", ["1.jpg"])
    folder(data, ["a.nef", "b.dng"], picture(0, "TIFF"))
    folder(data, ["BMW.md"], b"BMW is a maker of cars, and this is a text about them.")
    folder(data, ["p"], b"P1 is a name")
    folder(data, ["empty"], b"")
    assert paths(data) == ["d/1.jpg"]
    assert "1 .dng (images that Pillow does not read)" in (said := capsys.readouterr().err)
    assert "leaves out 2 without ending" in said
    assert said.endswith(", 1 .md\n")


def test_few_files_of_many_are_looked_at(tmp_path, monkeypatch):
    """Very many files are no images | A sample of each ending is looked at, and all where the sample has an image."""
    monkeypatch.setattr(formats, "LOOKS", 3)
    looked = []

    def look(place: int) -> bytes:
        looked.append(place)
        return picture(0) if place == 40 else b"text"

    places = [(f"{n:03}.txt", n) for n in range(50)] + [(f"{n:03}", n) for n in range(50, 60)]
    assert formats.find_images(places, look) == set()
    assert len(looked) <= 6
    monkeypatch.setattr(formats, "LOOKS", 10)
    assert formats.find_images(places, look) == {"040.txt"}


def test_members_above_the_container_are_read(tmp_path):
    """The names in a tar or zip begin with ../ | The members are read, without ../, as they are unpacked."""
    members = {f"../photos/{n}.jpg": picture(n) for n in range(3)} | {
        "../../up.jpg": picture(3),
        "/abs.jpg": picture(4),
    }
    names = ["abs.jpg", *(f"photos/{n}.jpg" for n in range(3)), "up.jpg"]
    assert paths(write_tar(tmp_path / "up.tar", members)) == [f"up.tar/{name}" for name in names]
    assert paths(write_zip(tmp_path / "up.zip", members)) == [f"up.zip/{name}" for name in names]


def test_empty_is_said_of_what_is_empty_only(tmp_path):
    """A source has files, but none that can be read | The message says what they are; only an empty one "is empty"."""
    some = {f"{n}.jpg": picture(n) for n in range(4)}
    assert refused(write_zip(tmp_path / "password.zip", some, locked=4)).endswith(
        "password.zip: no images: 4 files are encrypted (the first: 0.jpg)"
    )
    assert "no images: 4 files are compressed by LZMA, which is not read in place (the first: 0.jpg)" in refused(
        write_zip(tmp_path / "lzma.zip", some, zipfile.ZIP_LZMA)
    )
    assert "no images: 4 files are compressed by BZIP2" in refused(
        write_zip(tmp_path / "b.zip", some, zipfile.ZIP_BZIP2)
    )
    assert "hidden: no images among 1 file (1 hidden)" in refused(folder(tmp_path / "hidden", [".cache/1.jpg"]))
    assert "no images: 1 folder is made by Troodon (x)" in refused(
        publish(tmp_path / "o" / "x", "run", ["1.jpg"]).parent
    )
    (tmp_path / "none").mkdir()
    for empty in (tmp_path / "none", write_tar(tmp_path / "e.tar", {}), write_zip(tmp_path / "e.zip", {})):
        assert f"{empty}: is empty" in refused(empty)


def test_a_partly_locked_zip_in_a_folder_gives_the_rest(tmp_path, capsys):
    """Some files of a zip are encrypted | The line of what is left out says how many; the others are read."""
    data = folder(tmp_path / "d", ["a.jpg"])
    write_zip(data / "z.zip", {f"{n}.jpg": picture(n) for n in range(3)}, locked=2)
    assert paths(data) == ["d/a.jpg", "d/z.zip/2.jpg"]
    assert capsys.readouterr().err == f"{data}: leaves out: 2 files are encrypted (the first: 0.jpg)\n"


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    """A folder among the images may not be read | The others are read, and a message names it."""
    data, scandir = folder(tmp_path / "d", ["1.jpg", "locked/2.jpg"]), os.scandir

    def guarded(place):
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", guarded)
    assert paths(data) == ["d/1.jpg"]
    assert capsys.readouterr().err == f"{data}: leaves out: 1 folder cannot be read (locked)\n"


def test_names_that_are_not_utf8_are_named(tmp_path, capsys):
    """A name is not UTF-8 | A file is left out and named, a member is read; no verb ends in a traceback."""
    data = folder(tmp_path / "d", ["a.jpg"])
    try:
        Path(os.fsdecode(bytes(data) + b"/caf\xe9.jpg")).write_bytes(picture(1))
        Path(os.fsdecode(bytes(tmp_path) + b"/\xff")).mkdir()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert paths(data) == ["d/a.jpg"]
    assert "leaves out: 1 name is not UTF-8 (caf\\xe9.jpg)" in capsys.readouterr().err
    assert "the name is not UTF-8; rename it" in refused(os.fsdecode(bytes(tmp_path) + b"/\xff"))


def test_control_characters_of_names_reach_no_terminal(tmp_path, capsys):
    """The name of a file has control characters | Messages and the summary write them out, as \\x1b."""
    data = folder(tmp_path / "d", ["a\x1b[31mred.jpg", "b\nline.jpg"], b"broken")
    (data / "\x1b]0;title\x07.jpg").symlink_to("nowhere")
    assert cli.run(["scan", str(data)]) == 0
    said = capsys.readouterr()
    assert "d/a\\x1b[31mred.jpg: not an image" in said.out
    assert "d/b\\nline.jpg: not an image" in said.out
    assert "1 link is broken (\\x1b]0;title\\x07.jpg)" in said.err
    assert not {"\x1b", "\x07"} & set(said.out + said.err)


# ---- folders of Troodon


def test_results_among_the_images_are_no_images(tmp_path, capsys):
    """The folder for results lies inside the folder of images | What Troodon has made, or is making, is left out."""
    data = folder(tmp_path / "photos", ["1.jpg", "2.jpg"])
    before = open_source(data)
    publish(data / "runs" / "a", "run", ["pictures/crops.png", "checkpoints/x/backbone/extra.png"])
    publish(data / "shards", "index", [])
    write_tar(data / "shards" / "00000.tar", {"1.jpg": picture(1)})
    folder(data / "shards2.partial", ["1.jpg"])
    folder(data / "going", ["pictures/crops.png"])
    for name in ("config.yaml", "metrics.jsonl"):
        (data / "going" / name).touch()
    unit = folder(data / "e.parts" / "embed-1" / "00000", ["embeddings.npy", "copies.npy"])
    for name in ("counts.json", "timings.json"):
        (unit / name).write_text("{}")
    index = open_source(data)
    assert index.table == before.table
    assert index.content_hash() == before.content_hash()
    assert "leaves out: 5 folders are made by Troodon (the first: e.parts/embed-1/00000)\n" in capsys.readouterr().err


def test_results_among_remote_images_are_no_images(tmp_path, capsys):
    """The folder for results lies inside a bucket of images | What Troodon has made there is left out."""
    fsspec = pytest.importorskip("fsspec")
    publish(folder(tmp_path / "photos", ["1.jpg", "app/2.jpg"]) / "runs" / "a", "run", ["pictures/crops.png"])
    (tmp_path / "photos" / "app" / "manifest.json").write_text("{}")
    memory = fsspec.filesystem("memory")
    for file in (tmp_path / "photos").rglob("*.*"):
        memory.pipe_file(f"/bucket5/{file.relative_to(tmp_path).as_posix()}", file.read_bytes())
    assert paths("memory://bucket5/photos") == ["photos/1.jpg", "photos/app/2.jpg"]
    assert "leaves out 1 .json; 1 folder is made by Troodon (runs/a)\n" in capsys.readouterr().err


def test_scan_and_pack_into_their_own_source(tmp_path, capsys):
    """Scan or pack writes into the folder that it reads, twice | The second time it finds the same images."""
    data = folder(tmp_path / "photos", ["1.jpg", "2.jpg"])
    for _ in range(2):
        assert cli.run(["scan", str(data), "--out", str(data / "index")]) == 0
        assert cli.run(["pack", str(data), "--out", str(data / "shards")]) == 0
        assert capsys.readouterr().out.startswith("images      2,")
    assert paths(data / "shards") == ["photos/1.jpg", "photos/2.jpg"]


def test_a_manifest_of_another_program_hides_nothing(tmp_path, capsys):
    """A folder of images has the manifest of another program | Its images are read."""
    data = folder(tmp_path / "site", ["app/1.jpg", "app2/2.jpg"])
    (data / "app" / "manifest.json").write_text('{"name": "app", "icons": []}')
    (data / "app2" / "manifest.json").write_text("[1")
    assert paths(data) == ["site/app/1.jpg", "site/app2/2.jpg"]


# ---- tables

ROWS = [("img/0.jpg", "cat"), ("img/1.jpg", "dog, big"), ("img/2.jpg", "été")]
QUOTED = 'path{0}label\nimg/0.jpg{0}cat\nimg/1.jpg{0}"dog, big"\nimg/2.jpg{0}été\n'
TABLES = {
    "spaces": QUOTED.format(", ").encode(),
    "spaces before": QUOTED.format(" , ").encode(),
    "semicolons": QUOTED.format(";").encode(),
    "tabs": QUOTED.format("\t").encode(),
    "bars": QUOTED.format("|").encode(),
    "quotes": b'"path","label"\n"img/0.jpg" , "cat"\n"img/1.jpg","dog, big" \n"img/2.jpg","\xc3\xa9t\xc3\xa9"\n',
    "Excel": b"sep=;\r\n" + QUOTED.format(";").replace("\n", "\r\n").encode(),
    "mark": b"\xef\xbb\xbf" + QUOTED.format(",").encode(),
    "Latin-1": QUOTED.format(",").encode("latin-1"),
    "UTF-16": QUOTED.format(",").encode("utf-16"),
    "UTF-16 without mark": QUOTED.format(",").encode("utf-16-le"),
    "big-endian": b"\xfe\xff" + QUOTED.format(",").encode("utf-16-be"),
    "Windows": QUOTED.format(",").replace("img/", "img\\").encode(),
    "empty lines": QUOTED.format(",").replace("\n", "\n\n ,\n").encode(),
    "capitals": QUOTED.format(",").replace("path", "File_Name").replace("label", "Label").encode(),
}


@pytest.mark.parametrize("form", TABLES)
def test_tables_are_read_in_every_usual_form(tmp_path, capsys, form):
    """A CSV has spaces, quotes, semicolons, tabs, a byte order mark, Latin-1 or UTF-16 | Labels are read as meant."""
    data = folder(tmp_path / "d", [name for name, _ in ROWS])
    (data / "labels.csv").write_bytes(TABLES[form])
    assert labels(data) == [label for _, label in ROWS]
    (data / "labels.csv").rename(data / "list.csv")
    assert labels(data / "list.csv") == [label for _, label in ROWS]
    assert ("is read as Latin-1" in capsys.readouterr().err) == (form == "Latin-1")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "labels.tsv", "index.csv", "Labels.csv"])
def test_tables_of_every_usual_name(tmp_path, capsys, name):
    """The labels are in metadata.csv or metadata.jsonl, as Hugging Face writes them | They are read."""
    data = folder(tmp_path / "d", [name for name, _ in ROWS])
    rows = [{"file_name": file, "label": label} for file, label in ROWS]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not name.endswith("jsonl"):
        text = "file_name,label\n" + "".join(f'{file},"{label}"\n' for file, label in ROWS)
    (data / name).write_text(text, encoding="utf-8")
    assert labels(data) == [label for _, label in ROWS]
    assert labels(write_tar(tmp_path / "t.tar", {f: b"x" for f, _ in ROWS} | {name: text.encode()})) == [
        label for _, label in ROWS
    ]
    assert capsys.readouterr().err == ""


def test_the_first_table_by_rank_counts(tmp_path):
    """A folder has several tables | The first of labels.csv, index.csv, metadata.csv, metadata.jsonl counts."""
    data = folder(tmp_path / "d", ["0.jpg"])
    (data / "metadata.jsonl").write_text('{"file_name": "0.jpg", "label": 3}\n')
    assert labels(data) == ["3"]
    for name in ("metadata.csv", "index.csv", "labels.csv"):
        (data / name).write_text(f"path,label\n0.jpg,{name}\n")
        assert labels(data) == [name]


def test_any_column_may_name_the_images(tmp_path, capsys):
    """The column of images has an unusual name | It is found by its values, and a message says which it is."""
    data = folder(tmp_path / "d", ["0.jpg", "1.jpg"])
    (data / "labels.csv").write_text("id,Bilddatei,label\n7,0.jpg,a\n8,1.jpg,b\n")
    assert labels(data) == ["a", "b"]
    assert "d/labels.csv: takes the images from the column 'Bilddatei'" in capsys.readouterr().err
    (data / "labels.csv").write_text("image,file_name,label\n7,0.jpg,a\n8,1.jpg,b\n")  # the usual one has no images
    assert labels(data) == ["a", "b"]
    assert "takes the images from the column 'file_name'" in capsys.readouterr().err
    (data / "list.csv").write_text("foto,art\n0.jpg,a\n1.jpg,b\n")
    assert labels(data / "list.csv") == [None, None]
    assert (
        "gives no labels, since no column is called label or class; its columns: foto, art" in capsys.readouterr().err
    )
    (data / "labels.csv").write_text("rgb,depth,label\n0.jpg,1.jpg,a\n")  # which is meant?
    assert labels(data) == [None, None]
    assert "(or `split`), but rgb, depth, label, and is ignored" in capsys.readouterr().err


def test_tables_that_name_images_twice_or_in_vain(tmp_path, capsys):
    """labels.csv names images that are not there, twice, or with different labels | One line each says how many."""
    data = folder(tmp_path / "d", ["0.jpg", "1.jpg", "2.jpg"])
    (data / "labels.csv").write_text("path,label\n0.jpg,a\n0.jpg,b\n1.jpg,c\n1.jpg,c\n2.jpg,d\nx.jpg,e\ny.jpg,f\n")
    assert labels(data) == ["b", "c", "d"]
    assert capsys.readouterr().err.splitlines() == [
        "d/labels.csv: names 2 images more than once, 1 of them with different labels or splits, of which the last "
        "counts; the first: 0.jpg (a, then b)",
        "d/labels.csv: of 5 images that it names, 2 are not there; the first: x.jpg",
    ]
    (data / "list.txt").write_text("0.jpg\n1.jpg\n0.jpg\n")
    assert paths(data / "list.txt") == ["list.txt/0.jpg", "list.txt/1.jpg"]
    assert "list.txt: names 1 image more than once; the first: 0.jpg" in capsys.readouterr().err


def test_broken_tables_are_named(tmp_path, capsys):
    """A table is damaged, or a row has more fields than the first line | A message names the table and the line."""
    data = folder(tmp_path / "d", ["0.jpg", "1.jpg"])
    (data / "labels.csv").write_text("path,label\n0.jpg,dog, big\n1.jpg,cat,\n")
    assert labels(data) == ["dog", "cat"]
    assert "d/labels.csv: 1 row has more fields than the first line, which are not read; the first: line 2" in (
        capsys.readouterr().err
    )
    (data / "labels.csv").write_text('path,label\n0.jpg,"cat\n1.jpg,dog\n')
    assert labels(data) == [None, None]
    assert "d/labels.csv: cannot be read as a table (line 3: unexpected end of data), and is ignored" in (
        capsys.readouterr().err
    )
    (data / "labels.csv").write_text("path,label\n")
    assert labels(data) == [None, None]
    assert "d/labels.csv: has no row, and is ignored" in capsys.readouterr().err
    assert "labels.csv: has no row below its first line, and names no image" in refused(data / "labels.csv")
    (data / "list.jsonl").write_text('{"image": "0.jpg"}\n{"image"\n')
    assert "list.jsonl: cannot be read as a list (line 2:" in refused(data / "list.jsonl")


PARQUET = {
    "dictionary": (pa.array(["a", "b", None]).dictionary_encode(), ["a", "b", None]),
    "boolean": (pa.array([True, False, None]), ["True", "False", None]),
    "float": (pa.array([1.0, 2.5, float("nan")]), ["1", "2.5", None]),
    "integer": (pa.array([1, 2, None], pa.int8()), ["1", "2", None]),
    "large": (pa.array(["a", "b", ""], pa.large_string()), ["a", "b", None]),
    "bytes": (pa.array([b"a", b"b", None]), ["a", "b", None]),
}


@pytest.mark.parametrize("kind", PARQUET)
def test_labels_of_parquet_may_have_any_type(tmp_path, kind):
    """Labels in Parquet are dictionary-encoded, booleans, floats or bytes | They are read; 1.0 is the class 1."""
    column, expected = PARQUET[kind]
    images = [picture(n) for n in range(3)]
    pq.write_table(pa.table({"label": column, "photo": images}), tmp_path / "t.parquet")
    index = open_source(tmp_path / "t.parquet")
    assert index.column("label") == expected
    assert [index.read(row) for row in range(3)] == images
    data = folder(tmp_path, ["0.jpg", "1.jpg", "2.jpg"])
    names = pa.array(["0.jpg", "1.jpg", "2.jpg"]).dictionary_encode()
    pq.write_table(pa.table({"label": column, "path": names}), data / "list.parquet")
    assert labels(data / "list.parquet") == expected


def test_labels_that_are_lists_are_reported(tmp_path, capsys):
    """The column of labels in Parquet holds lists | A message says that it gives no labels."""
    pq.write_table(pa.table({"label": [[1, 2]], "image": [picture(0)]}), tmp_path / "t.parquet")
    assert labels(tmp_path / "t.parquet") == [None]
    assert "the column 'label' is list<element: int64>, and gives no labels" in capsys.readouterr().err


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_of_parquet_with_only_a_path(tmp_path, statistics):
    """Rows of a Hugging Face table have the path of a file, but no bytes | The file is read."""
    folder(tmp_path, ["img/0.jpg", "img/1.jpg"])
    rows = [
        {"bytes": None, "path": "img/0.jpg"},
        {"bytes": picture(5), "path": "x.jpg"},
        {"bytes": None, "path": "img/1.jpg"},
    ]
    pq.write_table(
        pa.table({"image": rows, "label": [0, 1, 0]}), tmp_path / "t.parquet", row_group_size=2,
        write_statistics=statistics,
    )  # fmt: skip
    index = open_source(tmp_path / "t.parquet")
    assert [index.read(row) for row in range(3)] == [picture(0), picture(5), picture(1)]
    assert index.column("label") == ["0", "1", "0"]


# ---- lists and WebDataset


def test_hosts_are_no_classes(tmp_path):
    """A list has URLs of several hosts and folders | Their names give no classes and no splits."""
    urls = ["https://a.org/train/cats/1.jpg", "https://b.org/test/dogs/2.jpg", "s3://bucket/birds/3"]
    (tmp_path / "urls.txt").write_text("\n".join(urls))
    index = open_source(tmp_path / "urls.txt")
    assert index.column("label") == index.column("split") == [None] * 3
    (tmp_path / "urls.csv").write_text("url,label\n" + "".join(f"{url},{n}\n" for n, url in enumerate(urls)))
    assert labels(tmp_path / "urls.csv") == ["0", "1", "2"]


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_keys_of_webdataset_end_at_the_first_dot(tmp_path, capsys, write):
    """The images of a WebDataset are called 0.image.jpg | 0.cls, or the label in 0.json, is their class."""
    members = {"a/0.image.jpg": picture(0), "a/0.cls": b"7", "a/0.json": b'{"label": 9}'}
    members |= {"a/1.left.jpg": picture(1), "a/1.right.png": picture(2), "a/1.json": b'{"width": 3, "label": "owl"}'}
    members |= {"b.c/2.jpg": picture(3), "b.c/2.json": b"{}"}
    assert labels(write(tmp_path / f"w.{write.__name__[6:]}", members)) == ["7", "owl", "owl", None]
    assert "leaves out 2 .json\n" in capsys.readouterr().err
    dotted = {f"photo.{n}.{end}": c for n in (1, 2) for end, c in (("jpg", picture(n)), ("cls", b"%d" % n))}
    assert labels(write(tmp_path / f"d.{write.__name__[6:]}", dotted)) == ["1", "2"]


# ---- few images


def test_sources_of_no_usable_image(tmp_path, capsys):
    """A source has no image, one, or only broken ones | Scan and pack say so in one line."""
    (tmp_path / "none").mkdir()
    for verb in (["scan"], ["pack", "--out", str(tmp_path / "p")]):
        assert cli.run([verb[0], str(tmp_path / "none"), *verb[1:]]) == 2
        assert "none: is empty; image files end in" in capsys.readouterr().err
    broken = folder(tmp_path / "broken", [f"{n}/{n}.jpg" for n in range(3)], b"no image")
    assert cli.run(["scan", str(broken)]) == 0
    said = capsys.readouterr().out
    assert "broken      3 (not an image 3); no image here can be used\n" in said
    assert "labels      3 classes of 1 image\n" in said
    assert cli.run(["pack", str(broken), "--out", str(tmp_path / "b")]) == 0
    assert "pack: none of 3 sampled images begins like an image that can be decoded" in capsys.readouterr().err
    assert cli.run(["scan", str(broken), "--out", str(tmp_path / "index")]) == 0
    page = (tmp_path / "index" / "report.html").read_text()
    assert "None can be read (3 not an image), so nothing here can be used." in page
    assert "index: this index has no usable image" in refused(tmp_path / "index")
    one = folder(tmp_path / "one", ["1.jpg"])
    assert cli.run(["scan", str(one)]) == 0
    assert "images      1, 0.0 MB\nbroken      none: all decode\n" in capsys.readouterr().out
    assert cli.run(["pack", str(one), "--out", str(tmp_path / "q")]) == 0
    assert capsys.readouterr().out.startswith("1 image in 1 shard, ")


def test_numbers_in_messages_are_written_as_people_read_them(tmp_path, capsys):
    """Very many files are left out | Their number is written as 10,000."""
    members = {f"{n}.txt": b"" for n in range(1234)} | {"1.jpg": picture(0)}
    assert len(paths(write_zip(tmp_path / "z.zip", members))) == 1
    assert "leaves out 1,234 .txt\n" in capsys.readouterr().err
