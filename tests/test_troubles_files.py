"""Files that change, are damaged or hang: each is noticed and named, and costs no more than itself."""

import errno
import hashlib
import http.server
import io
import os
import shutil
import socket
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.evaluate_world import FakeBackbone
from tests.fuzz import fuzz_containers
from troodon import cli
from troodon.config import UsageError
from troodon.curate.config import CurateConfig
from troodon.curate.embed import embed, load_embeddings
from troodon.evaluate.features import Reader, extract, files_fingerprint
from troodon.images import changes, containers, files
from troodon.images.config import PackConfig
from troodon.images.decode import BadImage, decode
from troodon.images.index import Index
from troodon.images.pack import pack
from troodon.images.scan import scan_to
from troodon.images.sources import open_source
from troodon.launch import describe_error

COUNT = 6
LATER_NS = 10**9  # what the time of a file is moved by when it is written again


def picture(seed: int, format: str = "BMP") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(out, format)
    return out.getvalue()


def write_container(path: Path, seeds: list[int]) -> Path:
    """Pictures of these seeds as 0.bmp, 1.bmp ... in a tar, zip, Parquet file, list or folder; a later call is seen."""
    before = path.stat().st_mtime_ns if path.exists() else time.time_ns() - 10 * LATER_NS
    data = [(f"{i}.bmp", picture(seed)) for i, seed in enumerate(seeds)]
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for name, content in data:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in data:
                archive.writestr(name, content)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"image": [content for _, content in data]}), path)
    else:
        home = path if path.suffix == "" else path.parent / "listed"
        home.mkdir(exist_ok=True)
        for name, content in data:
            (home / name).write_bytes(content)
            os.utime(home / name, ns=(before, before + LATER_NS))
        if path.suffix == ".txt":
            path.write_text("".join(f"listed/{name}\n" for name, _ in data))
    os.utime(path, ns=(before, before + LATER_NS))
    return path


SHAPES = ("x.tar", "x.zip", "x.parquet", "folder", "x.txt")
shapes = pytest.mark.parametrize("shape", SHAPES)


class Backbone(FakeBackbone):
    """A backbone for embeddings: the mean colour in blocks."""

    def features(self, images, *, blocks=1):
        found = super().features(images, blocks=blocks)
        found.cls = images.unfold(2, 4, 4).unfold(3, 4, 4).mean((-2, -1)).flatten(1)
        return found


# ---- What changed on the disk


@shapes
def test_cached_features_of_changed_images_are_not_used(tmp_path, shape):
    """The images of a dataset have changed, and `evaluate --cache` runs again | their features are computed anew"""
    reader = lambda: Reader(cache=tmp_path / "cache")  # noqa: E731
    before = extract(Backbone(), open_source(write_container(tmp_path / shape, [*range(COUNT)])), reader=reader())
    assert files_fingerprint(open_source(tmp_path / shape)) == files_fingerprint(open_source(tmp_path / shape))
    index = open_source(write_container(tmp_path / shape, [*range(COUNT, 2 * COUNT)]))
    after, fresh = extract(Backbone(), index, reader=reader()), extract(Backbone(), index)
    assert np.array_equal(after.cls_NLD, fresh.cls_NLD)
    assert not np.array_equal(after.cls_NLD, before.cls_NLD)


@shapes
def test_an_index_of_changed_files_is_refused(tmp_path, shape, capsys):
    """A tar, zip, Parquet file or image that an index lists has changed | the index is refused, with the file's name"""
    write_container(tmp_path / shape, [*range(COUNT)])
    assert cli.run(["scan", str(tmp_path / shape), "--out", str(tmp_path / "index")]) == 0
    assert len(open_source(tmp_path / "index")) == COUNT
    write_container(tmp_path / shape, [*range(COUNT)][::-1])
    capsys.readouterr()
    assert cli.run(["pack", str(tmp_path / "index"), "--out", str(tmp_path / "packed")]) == 2
    message = capsys.readouterr().err
    assert "changed since the index was made; scan again" in message
    name = {"folder": "folder/0.bmp", "x.txt": "listed/0.bmp"}.get(shape, shape)
    assert f"{tmp_path / name}: changed" in message
    assert cli.run(["scan", str(tmp_path / shape), "--out", str(tmp_path / "index")]) == 0
    assert open_source(tmp_path / "index").read(0) == picture(COUNT - 1)


@pytest.mark.parametrize("kind", ["embeddings", "selection"])
def test_embeddings_and_selections_of_changed_files_are_refused(tmp_path, kind):
    """The files of a selection or of embeddings have changed, and it is the data of another command | it is refused"""
    from troodon.curate.pipeline import curate

    index = open_source(write_container(tmp_path / "x.tar", [*range(COUNT)]))
    if kind == "embeddings":
        embed(Backbone(), index, tmp_path / "out", batch=4, threads=1)
    else:
        nothing = index.take([])
        curate(CurateConfig(gather="all", threshold=0.99), nothing, index, Backbone(), tmp_path / "out")
    assert len(open_source(tmp_path / "out")) == COUNT
    write_container(tmp_path / "x.tar", [*range(COUNT)][::-1])
    with pytest.raises(UsageError, match=r"x\.tar: changed since the index was made; scan again"):
        open_source(tmp_path / "out")


def test_an_index_of_an_earlier_release_is_checked_by_lengths(tmp_path):
    """An index that does not know times lists a file that has become shorter | it is refused, with the file's name"""
    for shape in ("x.tar", "folder"):
        index = open_source(write_container(tmp_path / shape, [*range(COUNT)]))
        out = tmp_path / f"{shape}-index"
        scan_to([tmp_path / shape], out, threads=1)
        Index(index.table).save(out / "images.parquet")
        write_container(tmp_path / shape, [*range(COUNT)][::-1])
        assert len(open_source(out)) == COUNT  # of the same length
        last = tmp_path / shape / "5.bmp" if shape == "folder" else tmp_path / shape
        last.write_bytes(last.read_bytes()[:5000] + b"" if shape == "x.tar" else b"short")
        with pytest.raises(UsageError, match="changed since the index was made; scan again"):
            open_source(out)


def test_of_very_many_files_a_sample_is_checked(tmp_path, monkeypatch, capsys):
    """An index lists very many files | a sample of them is compared with the disk, and a line says so"""
    scan_to([write_container(tmp_path / "folder", [*range(COUNT)])], tmp_path / "index", threads=1)
    monkeypatch.setattr(changes, "MAX_CHECKED", 3)
    open_source(tmp_path / "index")
    assert "lists 6 files; 3 of them are checked for changes" in capsys.readouterr().err
    os.utime(tmp_path / "folder" / "5.bmp", ns=(1, 1))
    with pytest.raises(UsageError, match=r"5\.bmp: changed since"):
        open_source(tmp_path / "index")


def test_a_mapped_index_of_changed_files_is_refused(tmp_path, monkeypatch):
    """An index of more than a million images lists a file that has changed | it is refused, with the file's name"""
    from troodon.images import index

    monkeypatch.setattr(index, "MIN_MAPPED_IMAGES", 1)
    scan_to([write_container(tmp_path / "x.tar", [*range(COUNT)])], tmp_path / "index", threads=1)
    assert open_source(tmp_path / "index").mapped_path is not None
    write_container(tmp_path / "x.tar", [*range(COUNT)][::-1])
    with pytest.raises(UsageError, match=r"x\.tar: changed since the index was made"):
        open_source(tmp_path / "index")


def test_packed_shards_may_move_but_not_change(tmp_path):
    """A shard of a packed dataset is replaced | it is refused; a packed dataset that is copied elsewhere opens"""
    data = open_source(write_container(tmp_path / "folder", [*range(COUNT)]))
    pack(data, tmp_path / "packed", PackConfig(), threads=1)
    shutil.copytree(tmp_path / "packed", tmp_path / "moved", copy_function=shutil.copyfile)
    assert open_source(tmp_path / "moved").read(3) == picture(3)
    with tarfile.open(tmp_path / "moved" / "00000.tar") as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(tmp_path / "moved" / "00000.tar", "w") as tar:
        for member, content in members[::-1]:
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UsageError, match=r"00000\.tar: changed since the index was made; pack again"):
        open_source(tmp_path / "moved")
    (tmp_path / "moved" / "00000.tar").unlink()
    with pytest.raises(UsageError, match=r"00000\.tar, which no longer exists"):
        open_source(tmp_path / "moved")


@shapes
@pytest.mark.parametrize("verb", ["embed", "pack", "curate"])
def test_finished_work_on_changed_images_is_refused(tmp_path, shape, verb):
    """`embed`, `pack` or `curate` runs again after its images have changed | it is refused; another --out works"""
    from troodon.curate.pipeline import curate

    def run(out: str) -> Path:
        index = open_source(tmp_path / shape)
        if verb == "embed":
            return embed(Backbone(), index, tmp_path / out, batch=4, threads=1)
        if verb == "pack":
            pack(index, tmp_path / out, PackConfig(), threads=1)
            return tmp_path / out
        config = CurateConfig(gather="all", threshold=0.99)
        return curate(config, index.take([]), index, Backbone(), tmp_path / out)

    write_container(tmp_path / shape, [*range(COUNT)])
    run("out")
    run("out")  # again: already there
    write_container(tmp_path / shape, [*range(COUNT, 2 * COUNT)])
    with pytest.raises(
        UsageError, match=r"was made from .*, which has changed since; choose a new --out, or remove it"
    ):
        run("out")
    again = run("other")
    hashes = pq.read_table((again / "embeddings" if verb == "curate" else again) / "images.parquet")["sha256"]
    assert hashes[0].as_py() == hashlib.sha256(picture(COUNT)).hexdigest()


def test_unfinished_work_on_other_images_is_not_continued(tmp_path, monkeypatch):
    """`embed` is killed, its images change, and it runs again | it begins anew"""
    write_container(tmp_path / "x.tar", [*range(COUNT)])
    from troodon.curate import embed as module

    original = module.concatenate_matrices
    monkeypatch.setattr(module, "concatenate_matrices", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        embed(Backbone(), open_source(tmp_path / "x.tar"), tmp_path / "out", batch=4, threads=1)
    monkeypatch.setattr(module, "concatenate_matrices", original)
    write_container(tmp_path / "x.tar", [*range(COUNT, 2 * COUNT)])
    index = open_source(tmp_path / "x.tar")
    vectors = load_embeddings(embed(Backbone(), index, tmp_path / "out", batch=4, threads=1))[0]
    fresh = load_embeddings(embed(Backbone(), index, tmp_path / "fresh", batch=4, threads=1))[0]
    assert np.array_equal(vectors, fresh)


def test_a_run_that_goes_on_with_other_images_says_so(tmp_path, capsys):
    """The images of a run have changed, and the same `pretrain` goes on | a warning names the first that has changed"""
    from troodon.learn.config import PretrainConfig
    from troodon.learn.folder import open_folder

    write_container(tmp_path / "x.tar", [*range(COUNT)])
    for _ in range(2):
        open_folder(tmp_path / "run", PretrainConfig(), open_source(tmp_path / "x.tar"), None, [])
    assert "changed" not in capsys.readouterr().err
    write_container(tmp_path / "x.tar", [*range(COUNT)][::-1])
    open_folder(tmp_path / "run", PretrainConfig(), open_source(tmp_path / "x.tar"), None, [])
    assert f"warning: {tmp_path / 'x.tar'} has changed since this run began" in capsys.readouterr().err


# ---- Files on servers


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `pages`: body and headers by path; a path in `hanging` gets no answer, one in `dripping` a slow one."""

    pages: ClassVar[dict[str, tuple[bytes, dict[str, str]]]] = {}
    hanging: ClassVar[set[str]] = set()
    dripping: ClassVar[set[str]] = set()
    got: ClassVar[list[str]] = []
    stop = threading.Event()

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.got.append(self.path)
        if self.path in self.hanging:
            self.stop.wait(20)
            return
        body = self.answer()
        if self.path in self.dripping:
            for value in body:
                if self.stop.wait(0.1):
                    return
                self.wfile.write(bytes([value]))
        self.wfile.write(body)

    def answer(self) -> bytes:
        if self.path not in self.pages:
            self.send_error(404)
            return b""
        body, headers = self.pages[self.path]
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        return body

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """The address of a server of Server.pages; a cache of its own, and quick retries."""
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("TROODON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "RETRY_WAIT_S", 0.001)
    for function in (files.cache_folder, files._cache_budget):
        function.cache_clear()
    Server.pages, Server.hanging, Server.dripping, Server.got = {}, set(), set(), []
    Server.stop = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # of readers that gave up
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
    yield f"http://127.0.0.1:{server.server_port}"
    Server.stop.set()
    server.shutdown()
    server.server_close()
    for function in (files.cache_folder, files._cache_budget):
        function.cache_clear()


def url_list(tmp_path: Path, *names: str) -> Path:
    (tmp_path / "l.txt").write_text("\n".join(names))
    return tmp_path / "l.txt"


HEADERS = ({"ETag": '"{}"'}, {"Last-Modified": "Sat, 0{} Aug 2026 10:00:00 GMT"})


@pytest.mark.parametrize("headers", HEADERS, ids=["ETag", "Last-Modified"])
def test_an_image_that_a_server_replaces_is_fetched_again(tmp_path, web, headers):
    """The image at a URL is replaced | the cache notices (ETag, Last-Modified), and the new one is read"""
    address = f"{web}/a.bmp"
    for seed in (1, 2):
        said = {name: value.format(seed) for name, value in headers.items()}
        Server.pages = {"/a.bmp": (picture(seed), said)}
        Server.got = []
        for _ in range(2):  # fetched, then from the cache
            assert open_source(url_list(tmp_path, address)).read(0) == picture(seed)
        assert Server.got == ["/a.bmp"]


def test_without_etag_the_age_of_a_copy_counts(tmp_path, web, monkeypatch):
    """A server says neither ETag nor Last-Modified | copies in the cache are used for TROODON_CACHE_DAYS (7) days"""
    Server.pages = {"/a.bmp": (picture(1), {})}
    data = url_list(tmp_path, f"{web}/a.bmp")
    assert open_source(data).read(0) == picture(1)
    Server.pages = {"/a.bmp": (picture(2), {})}
    assert open_source(data).read(0) == picture(1)
    monkeypatch.setenv("TROODON_CACHE_DAYS", "0")
    assert open_source(data).read(0) == picture(2)
    monkeypatch.setenv("TROODON_CACHE_DAYS", "a week")
    with pytest.raises(UsageError, match="TROODON_CACHE_DAYS 'a week': a number"):
        open_source(data).read(0)


def test_copies_are_used_where_the_server_cannot_be_reached(tmp_path, web):
    """A server cannot be reached | images that the cache has are read from it"""
    address = "http://127.0.0.1:1/a.bmp"
    cached = files.cache_folder() / files._cache_name(address, 0, -1)
    files._store(cached, files.Version("ETag 1", 3), picture(1))
    assert open_source(url_list(tmp_path, address)).read(0) == picture(1)


def test_an_image_that_a_server_deletes_is_not_read_from_the_cache(tmp_path, web):
    """The image at a URL is deleted | it is one broken image, although the cache has a copy"""
    Server.pages = {"/a.bmp": (picture(1), {"ETag": "1"})}
    data = url_list(tmp_path, f"{web}/a.bmp")
    assert open_source(data).read(0) == picture(1)
    Server.pages = {}
    with pytest.raises(FileNotFoundError):
        open_source(data).read(0)


def test_a_page_of_text_is_not_kept_as_an_image(tmp_path, web, capsys):
    """A server answers with a page of text in place of an image | it is one broken image, and is not kept"""
    page = b"<html>try again later</html>".ljust(len(picture(1)))  # else the length tells
    Server.pages = {"/a.bmp": (page, {"ETag": "1"})}
    data = url_list(tmp_path, f"{web}/a.bmp")
    assert cli.run(["scan", str(data)]) == 0
    assert "not an image" in capsys.readouterr().out
    Server.pages = {"/a.bmp": (picture(1), {"ETag": "1"})}
    assert open_source(data).read(0) == picture(1)


def test_the_cache_can_be_seen_and_emptied(tmp_path, web, capsys):
    """The cache of remote images is full, or not wanted | `troodon doctor` shows it, `--empty-cache` empties it"""
    Server.pages = {f"/{i}.bmp": (picture(i), {}) for i in range(2)}
    index = open_source(url_list(tmp_path, f"{web}/0.bmp", f"{web}/1.bmp"))
    assert [index.read(row) for row in (0, 1)] == [picture(0), picture(1)]
    count, size = files.cache_usage()
    assert count == 2
    assert size > 2 * len(picture(0))
    assert cli.run(["doctor", "--empty-cache"]) == 0
    assert f"{tmp_path / 'cache'}" in capsys.readouterr().out
    assert files.cache_usage() == (0, 0)
    assert index.read(0) == picture(0)
    assert Server.got.count("/0.bmp") == 2


def test_an_index_of_urls_notices_that_they_changed(tmp_path, web):
    """The images at the URLs of an index have changed | the index is refused; a new scan reads what has changed"""
    Server.pages = {f"/{i}.bmp": (picture(i), {"ETag": str(i)}) for i in range(3)}
    data = url_list(tmp_path, *(f"{web}/{i}.bmp" for i in range(3)))
    assert scan_to([data], tmp_path / "index", threads=1)["read"] == 3
    assert len(open_source(tmp_path / "index")) == 3
    Server.pages |= {"/1.bmp": (picture(8), {"ETag": "8"})}
    with pytest.raises(UsageError, match=r"/1\.bmp: changed since the index was made; scan again"):
        open_source(tmp_path / "index")
    assert scan_to([data], tmp_path / "index", threads=1)["read"] == 1
    index = open_source(tmp_path / "index")
    assert index.read(1) == picture(8)


# ---- One bad thing is one bad thing


@pytest.mark.parametrize(
    "bad",
    ["android-app://com.example/x.jpg", "ftp://127.0.0.1:1/x.jpg", "http://127.0.0.1:1/x.jpg", "s4://a/x.jpg",
     "http://[::bad/x.jpg", "http:///x.jpg", "sftp://127.0.0.1:1/x.jpg", "memory://none.jpg", "file:///none.jpg",
     "zip://a.jpg::http://127.0.0.1:1/x.zip", "foo::bar"],
)  # fmt: skip
def test_a_bad_url_is_one_broken_image(tmp_path, web, bad, capsys):
    """A list has a URL with an unknown scheme, or of a dead server | it is one broken image, and the others are read"""
    Server.pages = {"/a.bmp": (picture(1), {})}
    data = url_list(tmp_path, f"{web}/a.bmp", bad)
    assert cli.run(["scan", str(data), "--out", str(tmp_path / "index")]) == 0
    assert "broken      1 (unreadable 1)" in capsys.readouterr().out
    assert cli.run(["pack", str(data), "--out", str(tmp_path / "packed")]) == 0
    assert len(open_source(tmp_path / "packed")) == 1


@pytest.mark.parametrize("how", ["hanging", "dripping"])
def test_a_server_that_hangs_costs_one_image(tmp_path, web, monkeypatch, capsys, how):
    """A server hangs, or sends a byte now and then | after TROODON_TIMEOUT_S (60) seconds it is one broken image"""
    Server.pages = {"/a.bmp": (picture(1), {}), "/b.bmp": (picture(2), {})}
    setattr(Server, how, {"/b.bmp"})
    monkeypatch.setenv("TROODON_TIMEOUT_S", "0.5")
    start = time.monotonic()
    assert cli.run(["scan", str(url_list(tmp_path, f"{web}/a.bmp", f"{web}/b.bmp"))]) == 0
    assert time.monotonic() - start < 5
    assert "no complete answer within 0.5 s" in capsys.readouterr().out
    monkeypatch.setenv("TROODON_TIMEOUT_S", "-1")
    assert cli.run(["scan", str(url_list(tmp_path, f"{web}/a.bmp", f"{web}/b.bmp"))]) == 2
    assert "TROODON_TIMEOUT_S -1: must be more than 0" in capsys.readouterr().err


def test_pipes_sockets_and_devices_are_never_opened(tmp_path, capsys, monkeypatch):
    """A pipe, socket or device has the name of an image | it is left out, or broken in a list; never opened"""
    write_container(tmp_path / "folder", [1])
    os.mkfifo(tmp_path / "folder" / "pipe.jpg")
    os.mkfifo(tmp_path / "folder" / "pipe.tar")
    os.mkfifo(tmp_path / "folder" / "labels.csv")
    os.symlink("/dev/zero", tmp_path / "folder" / "zero.jpg")
    monkeypatch.chdir(tmp_path / "folder")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.jpg")
        assert cli.run(["scan", str(tmp_path / "folder")]) == 0
        assert "images      1, " in capsys.readouterr().out
        names = ("folder/0.bmp", "folder/pipe.jpg", "folder/zero.jpg", "folder/socket.jpg", "folder")
        assert cli.run(["scan", str(url_list(tmp_path, *names))]) == 0
        assert "broken      3 (unreadable 3)" in capsys.readouterr().out
        for name in ("pipe.jpg", "pipe.tar", "zero.jpg"):
            assert cli.run(["scan", str(tmp_path / "folder" / name)]) == 2
            assert "is a pipe, socket or device" in capsys.readouterr().err


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
def test_a_damaged_member_of_a_zip_is_one_broken_image(tmp_path, method, streamed, capsys):
    """A byte inside a zip is damaged, and its image still decodes | its checksum tells: it is one broken image"""

    class Unseekable(io.RawIOBase):  # zipfile then writes the checksum behind the data
        def __init__(self):
            self.file = open(tmp_path / "x.zip", "wb")  # noqa: SIM115

        def writable(self):
            return True

        def write(self, data):
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    target = Unseekable() if streamed else tmp_path / "x.zip"
    with zipfile.ZipFile(target, "w", method) as archive:
        for i in range(3):
            archive.writestr(f"{i}.bmp", picture(i))
    if streamed:
        target.file.close()
    index = open_source(tmp_path / "x.zip")
    assert [index.read(row) for row in range(3)] == [picture(i) for i in range(3)]
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[index.table["offset"][1].as_py() + 1000] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(tmp_path / "x.zip").read("1.bmp")
    assert cli.run(["scan", str(tmp_path / "x.zip")]) == 0
    out = capsys.readouterr().out
    assert "broken      1 (unreadable 1)" in out
    assert "x.zip/1.bmp: unreadable" in out
    assert "damaged at" in out


def test_damaged_tiffs_print_nothing(tmp_path, capfd):
    """A TIFF is damaged | it is one broken image; libtiff prints nothing of its own"""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(
        out, "TIFF", compression="tiff_lzw"
    )
    data = bytearray(out.getvalue())
    data[100:2000] = bytes(1900)
    with pytest.raises(BadImage):
        decode(bytes(data), None)
    assert capfd.readouterr().err == ""


def test_damaged_containers_are_never_lost_silently():
    """A tar, zip, Parquet file or list is damaged | clear lines say what is lost, and all else is read"""
    assert sum(fuzz_containers(150, seed=0)["outcomes"].values()) == 150


def test_a_path_that_is_not_utf_8_is_one_line(tmp_path, capsys):
    """A path is not UTF-8 | one clear line, or one file that is left out; no traceback"""
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    write_container(tmp_path / "folder", [1])
    os.rename(tmp_path / "folder", name)
    assert cli.run(["scan", name]) == 2
    assert "not UTF-8" in capsys.readouterr().err


# ---- A full disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_a_full_disk(code):
    """The disk is full | the message says so, and where"""
    message = "out: the disk is full" if code == errno.ENOSPC else "out: the quota of the disk is used up"
    assert describe_error(OSError(code, os.strerror(code), "out"))[1].startswith(message)
    wrapped = RuntimeError("could not write")
    wrapped.__cause__ = OSError(code, os.strerror(code))
    assert message.partition(": ")[2] in describe_error(wrapped)[1]
    for text in ("16384 requested and 4096 written", "checkpoint: unexpected pos 704 vs 598"):  # of NumPy, and of torch
        assert "disk is full" in describe_error(OSError(text))[1]
    assert "disk" not in describe_error(OSError(errno.EIO, os.strerror(errno.EIO)))[1]


def test_a_disk_that_fills_up_ends_scan_pack_and_embed_with_one_line(tmp_path, capsys, monkeypatch):
    """The disk fills up during `scan`, `pack` or `embed` | one line says so, and what was there before stays"""
    from troodon import run

    write_container(tmp_path / "folder", [1])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run, "write_bytes", full)
    for verb in ("scan", "pack"):
        assert cli.run([verb, str(tmp_path / "folder"), "--out", str(tmp_path / "out")]) == 1
        assert "the disk is full" in capsys.readouterr().err


def test_files_of_a_container_are_found_with_a_number_sign_in_their_path(tmp_path):
    """A folder has a # in its name | its files are not taken for columns of Parquet files"""
    (tmp_path / "a#b").mkdir()
    assert containers.file_of("a#b/x.jpg") == "a#b/x.jpg"
    assert containers.file_of("a#b/x.parquet#image") == "a#b/x.parquet"
    scan_to([write_container(tmp_path / "a#b" / "x.parquet", [1])], tmp_path / "index", threads=1)
    assert open_source(tmp_path / "index").read(0) == picture(1)
