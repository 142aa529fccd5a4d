"""Every kind of source gives the same images: zips, Parquet, lists, Python datasets, local and remote."""

import contextlib
import functools
import http.server
import io
import json
import re
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from troodon import run
from troodon.config import UsageError
from troodon.images import containers, files
from troodon.images.index import SCHEMA, Index
from troodon.images.sources import open_source
from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig
from troodon.views.loader import Loader

NAMES = ["cats/0.jpg", "cats/1.png", "dogs/2.jpg", "dogs/3.webp", "dogs/4.jpg"]
LABELS = ["cats", "cats", "dogs", "dogs", "dogs"]


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files with ranges; the first request for a path in `failing` fails."""

    failing: ClassVar[set[str]] = set()
    requests: ClassVar[list[tuple[str, str | None]]] = []
    ranges = True

    def do_GET(self):
        self.requests.append((self.path, self.headers.get("Range")))
        if self.path in self.failing:
            self.failing.remove(self.path)
            return self.send_error(503)
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        path = Path(self.translate_path(self.path))
        if not (requested and self.ranges) or not path.is_file():
            return super().do_GET()
        data = path.read_bytes()
        first, last = int(requested[1]), min(int(requested[2] or len(data) - 1), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def end_headers(self):
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A separate cache for one test."""
    monkeypatch.setenv("TROODON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "RETRY_WAIT_S", 0.001)
    for function in (files.cache_folder, files._cache_budget):
        function.cache_clear()
    yield tmp_path / "cache"
    for function in (files.cache_folder, files._cache_budget):
        function.cache_clear()


@pytest.fixture
def web(made, cached):
    """The files of `made` over HTTP."""
    pytest.importorskip("aiohttp")
    Server.failing, Server.requests, Server.ranges = set(), [], True
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(made)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def made(tmp_path):
    """The same five images as a folder, a tar, a zip, a WebDataset, Parquet files and lists."""
    home, random, data = tmp_path / "made", np.random.default_rng(0), []
    for i, name in enumerate(NAMES):
        pixels = random.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)
        (home / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(home / "folder" / name)
        data.append((home / "folder" / name).read_bytes())
    with tarfile.open(home / "a.tar", "w") as tar, zipfile.ZipFile(home / "a.zip", "w") as archive:
        for i, (name, content) in enumerate(zip(NAMES, data, strict=True)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
    with tarfile.open(home / "web.tar", "w") as tar:
        for i, (name, label, content) in enumerate(zip(NAMES, LABELS, data, strict=True)):
            for ending, part in ((Path(name).suffix, content), (".cls", label.encode()), (".json", b"{}")):
                info = tarfile.TarInfo(f"{i:05d}{ending}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    images = [{"bytes": content, "path": name} for name, content in zip(NAMES, data, strict=True)]
    features = {"info": {"features": {"label": {"names": ["cats", "dogs"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": images, "label": pa.array([0, 0, 1, 1, 1], pa.int64())})
    (home / "hub" / "data").mkdir(parents=True)
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}),
        home / "hub" / "data" / "train-00000-of-00001.parquet",
        row_group_size=2,
    )
    pq.write_table(pa.table({"note": ["x"] * 5, "photo": data, "label": LABELS}), home / "plain.parquet")
    (home / "list.txt").write_text("".join(f"folder/{name}\n" for name in NAMES))
    rows = zip(NAMES, LABELS, strict=True)
    (home / "list.csv").write_text("file_name,label,split\n" + "".join(f"folder/{n},{c},val\n" for n, c in rows))
    pq.write_table(pa.table({"url": [f"folder/{n}" for n in NAMES], "label": LABELS}), home / "list.parquet")
    return home


PLACES = (
    "folder", "a.tar", "a.zip", "web.tar", "hub", "hub/data/train-00000-of-00001.parquet", "plain.parquet",
    "plain.parquet/photo", "list.txt", "list.csv", "list.parquet",
)  # fmt: skip


def images(index: Index) -> list[bytes]:
    return [index.read(row) for row in range(len(index))]


def batch(index: Index):
    crops = CropsConfig(global_px=16, local_px=8, locals=2)
    batches = Loader(index, crops, PhotometricConfig(), MasksConfig(), 4, 4, 0, threads=2).batches(
        0, torch.device("cpu")
    )
    try:
        return next(batches)
    finally:
        batches.close()


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("globals_GBCHW", "locals_VBCHW", "masks_NP"))


@pytest.mark.parametrize("place", PLACES)
def test_every_place_gives_the_same_images_labels_and_batches(made, place):
    index = open_source(made / place)
    assert images(index) == [(made / "folder" / name).read_bytes() for name in NAMES]
    assert index.column("label") == LABELS
    assert same(batch(index), batch(open_source(made / "folder")))


@pytest.mark.parametrize("place", [p for p in PLACES if p not in ("folder", "hub")])
def test_every_place_gives_the_same_images_over_http(made, web, place):
    index = open_source(f"{web}/{place}")
    assert images(index) == [(made / "folder" / name).read_bytes() for name in NAMES]
    assert index.column("label") == LABELS
    assert index.is_remote
    earlier = len(Server.requests)
    if "parquet" not in place or "list" in place:  # groups of rows are kept in memory, not on the disk
        assert images(open_source(f"{web}/{place}")) == images(index)
        read = [path for path, _ in Server.requests[earlier:] if path.endswith((".jpg", ".png", ".webp"))]
        assert not read  # from the cache


@pytest.mark.parametrize("place", ["bucket", "bucket/folder", "bucket/a.tar", "bucket/a.zip", "bucket/list.csv"])
def test_buckets_are_read_like_folders(made, cached, place):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in made.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/{path.relative_to(made).as_posix()}", path.read_bytes())
    index = open_source(f"memory://{place}")
    expected = [(made / "folder" / name).read_bytes() for name in NAMES]
    if place == "bucket":
        assert len(index) == 6 * len(NAMES)  # the folder, tar, zip, WebDataset and two Parquet files
        assert set(images(index)) == set(expected)
    else:
        assert images(index) == expected
        assert index.column("label") == LABELS
    memory.store.clear()


def test_failed_requests_are_retried(made, web):
    index = open_source(f"{web}/list.txt")
    Server.failing = {f"/folder/{name}" for name in NAMES}
    assert images(index) == [(made / "folder" / name).read_bytes() for name in NAMES]
    assert not Server.failing


def test_a_missing_url_is_one_bad_image(made, web, monkeypatch):
    (made / "urls.txt").write_text(f"{web}/folder/{NAMES[0]}\n{web}/folder/none.jpg\n")
    index = open_source(made / "urls.txt")
    assert index.column("length") == [-1, -1]
    assert len(index.read(0)) == (made / "folder" / NAMES[0]).stat().st_size
    with pytest.raises(OSError, match=r"none.jpg"):
        index.read(1)


def test_a_server_without_ranges_works(made, web):
    Server.ranges = False
    index = open_source(made / "a.tar")
    afar = replace(index, table=index.table.set_column(1, "container", pa.array([f"{web}/a.tar"] * len(index))))
    assert images(afar) == images(index)


def test_the_cache_keeps_what_fits(made, web, cached, monkeypatch):
    sizes = [(made / "folder" / name).stat().st_size for name in NAMES]
    monkeypatch.setenv("TROODON_CACHE_GB", str((sizes[0] + sizes[1]) / 1e9))
    assert images(open_source(f"{web}/a.tar")) == images(open_source(made / "a.tar"))
    kept = [path for path in cached.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) <= sizes[0] + sizes[1]
    assert kept
    files._cache_budget.cache_clear()
    monkeypatch.setenv("TROODON_CACHE_GB", "much")
    with pytest.raises(UsageError, match="TROODON_CACHE_GB 'much': a number"):
        files._cache_budget()


def test_an_unknown_scheme_is_a_usage_error():
    with pytest.raises(UsageError, match="nosuch"):
        open_source("nosuch://bucket/folder")


def test_splits_come_from_the_names_of_shards(made):
    assert set(open_source(made / "hub").column("split")) == {"train"}
    assert set(open_source(made / "list.csv").column("split")) == {"val"}


def test_lists_of_missing_files(made, capsys):
    (made / "some.txt").write_text(f"folder/{NAMES[0]}\nfolder/none.jpg\n\n")
    assert len(open_source(made / "some.txt")) == 2
    assert "1 of the files that it names do not exist; the first: folder/none.jpg" in capsys.readouterr().err
    (made / "none.txt").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(UsageError, match=r"none of the 2 files that it names exists; the first: a.jpg"):
        open_source(made / "none.txt")
    (made / "notes.csv").write_text("when,what\n1,2\n")
    with pytest.raises(UsageError, match="has no column `path` or `url`"):
        open_source(made / "notes.csv")


def test_a_missing_column_and_an_invalid_table_are_refused(made):
    with pytest.raises(UsageError, match="no such column of images; it has photo"):
        open_source(made / "plain.parquet" / "images")
    (made / "broken.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(UsageError, match=r"broken.parquet: is not a Parquet table"):
        open_source(made / "broken.parquet")


def test_one_bad_shard_does_not_stop_the_others(made, capsys):
    (made / "broken.parquet").write_bytes(b"PAR1" + bytes(100))
    (made / "broken.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    (made / "broken.tar").write_bytes(b"hello" * 300)
    assert len(open_source(made)) == 6 * len(NAMES)
    message = capsys.readouterr().err
    assert "3 containers cannot be opened (the first: broken.parquet)" in message
    for name in ("broken.parquet", "broken.zip", "broken.tar"):
        assert name in message


def test_damage_inside_a_zip_is_one_bad_image(made):
    whole = (made / "a.zip").read_bytes()
    index = open_source(made / "a.zip")
    offset, length = (index.table[name][1].as_py() for name in ("offset", "length"))
    damaged = bytearray(whole)
    damaged[offset + 40 : offset + length] = b"\xff" * (length - 40)
    (made / "a.zip").write_bytes(damaged)
    with pytest.raises(OSError, match=r"damaged|cut short"):
        index.read(1)
    assert index.read(0) == (made / "folder" / NAMES[0]).read_bytes()


def test_a_zip_bomb_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MAX_IMAGE_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(2 << 20))
    with pytest.raises(OSError, match="more than 1,048,576 bytes"):
        open_source(tmp_path / "bomb.zip").read(0)


def test_encrypted_zips_are_reported(made, capsys):
    data = bytearray((made / "a.zip").read_bytes())
    for magic, at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):  # the flag of encryption, in either header of the first
        data[data.index(magic) + at] |= 1
    (made / "a.zip").write_bytes(data)
    assert len(open_source(made / "a.zip")) == len(NAMES) - 1
    assert "leaves out: 1 file is encrypted (cats/0.jpg)" in capsys.readouterr().err


# ---- Python datasets


class Folder:
    """A dataset like those of torchvision: tuples of an image and a class, with class names."""

    def __init__(self, home: Path):
        self.files, self.classes, self.targets = [home / n for n in NAMES], ["cats", "dogs"], [0, 0, 1, 1, 1]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        return Image.open(self.files[row]), self.targets[row]


class Forms:
    """Every form that an item may have."""

    def __init__(self, home: Path):
        self.files = [home / name for name in NAMES]

    def __len__(self):
        return 9

    def __getitem__(self, row):
        file = self.files[0]
        with Image.open(file) as image:
            picture = image.copy()
        pixels = np.array(picture)
        return [
            file.read_bytes(),
            {"image": {"bytes": file.read_bytes(), "path": None}},
            {"image": {"bytes": None, "path": str(file)}, "label": 3},
            str(file),
            pixels,
            (torch.from_numpy(pixels).permute(2, 0, 1), 7),
            {"pixel_values": pixels},
            picture,
            {"text": "x", "img": picture.convert("RGB")},
        ][row]


def test_a_dataset_is_a_source(made):
    index = open_source(Folder(made / "folder"))
    assert index.column("label") == LABELS
    assert same(batch(index), batch(open_source(made / "folder")))


def test_items_of_every_form_give_the_same_image(made):
    from troodon.images.decode import decode

    index = open_source(Forms(made / "folder"))
    pictures = [decode(index.read(row)) for row in range(len(index))]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


class Bad(Forms):
    def __len__(self):
        return 4

    def __getitem__(self, row):
        if row == 3:
            raise ValueError("not today")
        return [None, np.zeros((4, 4, 3), np.float32), {"label": 3}][row]


def test_a_bad_item_is_one_bad_image(made):
    index = open_source(Bad(made / "folder"))
    for row, message in enumerate(("no image in NoneType", "float32", "no image in dict", "ValueError: not today")):
        with pytest.raises(OSError, match=message):
            index.read(row)


def test_datasets_mix_with_other_sources_and_need_distinct_names(made):
    one, other = Folder(made / "folder"), Folder(made / "folder")
    both = open_source(one, made / "a.tar")
    assert both.source_lengths == (5, 5)
    assert len(set(images(both.take(range(5, 10))))) == 5
    with pytest.raises(UsageError, match="two datasets have this name"):
        open_source(one, other)
    for wrong in (3, None, object(), []):
        with pytest.raises(UsageError):
            open_source(wrong)


def test_processes_read_datasets_too(made):
    index = open_source(Forms(made / "folder"))
    crops = CropsConfig(global_px=16, local_px=8, locals=2)
    taken = []
    for processes in (0, 1):
        loader = Loader(index, crops, PhotometricConfig(), MasksConfig(), 4, 4, 0, threads=1, processes=processes)
        with contextlib.closing(loader.batches(0, torch.device("cpu"))) as batches:
            taken.append(next(batches))
    assert same(*taken)


# ---- artifacts


def test_a_moved_or_remote_artifact_can_be_read(made, web):
    index = open_source(made / "a.tar")
    table = index.table.set_column(1, "container", pa.array(["shards/a.tar"] * len(index)))
    with run.publish(made / "packed", "index", "abc", {}) as folder:
        (folder / "shards").mkdir()
        (folder / "shards" / "a.tar").write_bytes((made / "a.tar").read_bytes())
        Index(table).save(folder / "images.parquet")
    assert images(open_source(made / "packed")) == images(index)
    assert images(open_source(f"{web}/packed")) == images(index)
    (made / "packed").rename(made / "elsewhere")
    assert images(open_source(made / "elsewhere")) == images(index)


def test_a_long_index_is_mapped_and_shared(made, monkeypatch):
    import pickle

    monkeypatch.setattr("troodon.images.index.MIN_MAPPED_IMAGES", 3)
    index = open_source(made / "a.tar")
    status = pa.array(["ok", "empty", "ok", "ok", "ok"])
    with run.publish(made / "long", "index", "abc", {}) as folder:
        Index(index.table.append_column("status", status)).save(folder / "images.parquet")
    mapped = open_source(made / "long")
    assert mapped.mapped_path == made / "long" / "images.arrow"
    assert mapped.content_hash() == "abc"
    assert mapped.table.schema == SCHEMA
    assert images(mapped) == [data for row, data in enumerate(images(index)) if row != 1]
    sent = pickle.dumps(mapped)
    assert len(sent) < 1000
    assert images(pickle.loads(sent)) == images(mapped)
    assert mapped.take([1, 0]).mapped_path is None
    for _ in range(1000):  # its pages are let go now and then, and come back
        assert mapped.location(0) == index.location(0)
