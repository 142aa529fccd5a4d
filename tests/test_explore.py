"""The explorer's server: what it answers, and what it refuses."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import troodon
from tests.test_dedup import picture
from troodon import UsageError, cli, dedup
from troodon.explore import layout as layouts
from troodon.explore.pictures import Pictures
from troodon.explore.server import MAX_BODY
from troodon.images.decisions import FILE, read_decisions
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.verbs.embedding import find_nearest
from troodon.verbs.exploration import serve

HOSTILE = "<img src=x onerror=alert(1)>\"' \u202eabc.png"


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Twenty pictures in two classes, copies of three of them, a broken file, and one of a hostile name."""
    folder = tmp_path_factory.mktemp("explore") / "photos"
    for seed in range(20):
        path = folder / ["cats", "dogs"][seed % 2] / f"{seed:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(seed)))
    for seed in range(3):
        Image.fromarray(picture(seed)).save(folder / "cats" / f"{seed:02d}-saved.jpg", quality=70)
    (folder / "dogs" / "broken.png").write_bytes(b"\x89PNG but not for long")
    (folder / "dogs" / HOSTILE).write_bytes(png(picture(50)))
    return folder.parent


@pytest.fixture(scope="session")
def selection(world) -> Path:
    return dedup(world / "photos", world / "selection")


class Client:
    """Requests to a server in this process."""

    def __init__(self, server):
        self.server, self.port, self.token = server, server.server_address[1], server.token

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, headers: dict | None = None, **values):
        """Status, type and body of an answer; with the token, unless it is among the values."""
        values = {"token": self.token} | values
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, f"{path}?{urlencode(values)}", body, headers or {})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.headers, data

    def json(self, path: str, **values):
        status, _, data = self.ask(path, **values)
        assert status == 200, data
        return json.loads(data)

    def post(self, path: str, value: object):
        status, _, data = self.ask(path, "POST", json.dumps(value).encode())
        return status, json.loads(data)


@pytest.fixture
def client(selection) -> Iterator[Client]:
    (selection / FILE).unlink(missing_ok=True)
    server = serve(selection)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield Client(server)
    server.shutdown()
    thread.join()
    server.server_close()


def rows(selection: Path) -> dict[str, int]:
    return {
        Path(path).name: row for row, path in enumerate(pq.read_table(selection / "images.parquet")["path"].to_pylist())
    }


def test_it_says_what_there_is(client, selection):
    found = client.json("/api/collection")
    assert (found["images"], found["vectors"], found["kind"]) == (25, 24, "selection")
    assert {"label", "stage", "cluster", "kept", "pixels"} <= {*found["colours"]}
    assert found["pairs"] == ["similar", "copies"]
    places = np.frombuffer(client.ask("/api/points")[2], "<f4").reshape(-1, 2)
    assert np.isnan(places[:, 0]).nonzero()[0].tolist() == [rows(selection)["broken.png"]]


def test_neighbours_are_those_of_an_exact_search(client, selection):
    x = np.load(selection / "embeddings" / "embeddings.npy").astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    row = rows(selection)["01.png"]
    found = client.json("/api/neighbours", id=row, k=5)
    score = x @ x[row]
    score[[row, rows(selection)["broken.png"]]] = -2
    assert [one["id"] for one in found] == np.argsort(-score, kind="stable")[:5].tolist()
    assert found[0]["similarity"] == pytest.approx(score.max(), abs=1e-4)
    assert len(client.json("/api/neighbours", id=row, k=1000)) == 23
    assert client.json("/api/neighbours", id=rows(selection)["broken.png"]) == []


def test_a_picture_from_elsewhere_finds_itself_also_from_a_form(client, selection):
    data, row = png(picture(7)), rows(selection)["07.png"]
    status, _, body = client.ask("/api/search", "POST", data, k=3)
    assert status == 200
    assert json.loads(body)[0] == {"id": row, "similarity": 1.0}
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + data + b"\r\n--x--\r\n"
    status, _, body = client.ask("/api/search", "POST", form, {"Content-Type": "multipart/form-data; boundary=x"}, k=3)
    assert json.loads(body)[0]["id"] == row


def test_no_picture_is_made_for_whoever_has_hung_up(client, selection, monkeypatch):
    """As a page does that was scrolled past: those in view need not wait for it."""
    made, go, make = [], threading.Event(), Pictures._make

    def slowly(self, row: int, side: int) -> bytes:
        made.append(row)
        assert go.wait(60)
        return make(self, row, side)

    monkeypatch.setattr(Pictures, "_make", slowly)
    *working, passed, last = [row for name, row in sorted(rows(selection).items()) if re.match(r"\d\d\.png", name)][:6]
    with ThreadPoolExecutor() as threads:
        first = [threads.submit(client.ask, "/api/thumbnail", id=row) for row in working]
        deadline = time.monotonic() + 60
        while len(made) < len(working) and time.monotonic() < deadline:
            time.sleep(0.01)
        connection = http.client.HTTPConnection("127.0.0.1", client.port)
        connection.request("GET", f"/api/thumbnail?id={passed}&token={client.token}")
        time.sleep(0.1)
        connection.close()
        then = threads.submit(client.ask, "/api/thumbnail", id=last)
        time.sleep(0.1)
        go.set()
        assert [answer.result()[0] for answer in (*first, then)] == [200] * 5
    assert sorted(made) == sorted([*working, last])


def test_thumbnails_of_every_size(client, selection):
    for size, side in (("small", 128), ("medium", 128), ("large", 128)):  # none is enlarged
        status, headers, data = client.ask("/api/thumbnail", id=0, size=size)
        assert (status, headers["Content-Type"]) == (200, "image/jpeg")
        assert max(Image.open(io.BytesIO(data)).size) == side
    broken = rows(selection)["broken.png"]
    assert client.ask("/api/thumbnail", id=broken)[0] == 404
    status, headers, _ = client.ask("/api/thumbnail", id=broken, missing="drawn")
    assert (status, headers["Content-Type"]) == (200, "image/svg+xml")


def test_colours_and_names(client, selection):
    data = client.ask("/api/colour", by="label")[2]
    length = int(np.frombuffer(data[:4], "<u4")[0])
    head, codes = json.loads(data[4 : 4 + length]), np.frombuffer(data[4 + length :], "<u2")
    labels = pq.read_table(selection / "images.parquet")["label"].to_pylist()
    assert [head["names"][code] for code in codes] == labels
    for name in client.json("/api/collection")["colours"]:
        assert client.ask("/api/colour", by=name)[0] == 200
    assert client.ask("/api/colour", by="path")[0] == 400
    assert client.json("/api/find", text="SAVED")["count"] == 3
    assert client.json("/api/find", text="<img src")["ids"] == [rows(selection)[HOSTILE]]


def test_pairs_of_a_ledger_and_of_vectors(client, selection):
    def pairs(name: str) -> tuple[np.ndarray, ...]:
        data = client.ask("/api/pairs", of=name)[2]
        count = int(np.frombuffer(data[:4], "<u4")[0])
        first, second = np.frombuffer(data[4 : 4 + 8 * count], "<u4").reshape(2, count)
        return first, second, np.frombuffer(data[4 + 8 * count :], "<f4")

    names = {row: name for name, row in rows(selection).items()}
    first, second, score = pairs("copies")
    assert {(names[a], names[b]) for a, b in zip(first, second)} == {
        (f"{i:02d}-saved.jpg", f"{i:02d}.png") for i in range(3)
    }
    first, second, score = pairs("similar")
    assert (np.diff(score) <= 0).all()
    assert (first < second).all()
    assert len(np.unique(first.astype(np.int64) * 100 + second)) == len(first)
    assert {frozenset((names[a], names[b])) for a, b in zip(first[:3], second[:3])} == {
        frozenset((f"{i:02d}-saved.jpg", f"{i:02d}.png")) for i in range(3)
    }


def test_decisions_are_written_as_they_are_made(client, selection):
    row = rows(selection)
    status, changed = client.post("/api/decide", {"ids": [row["03.png"], row["04.png"]], "keep": False})
    assert status == 200
    assert changed[str(row["03.png"])] == {"keep": False, "tags": [], "instead_of": None}
    client.post("/api/decide", {"ids": [row["04.png"]], "keep": None})
    client.post("/api/decide", {"ids": [row[HOSTILE]], "add_tag": " <b>odd</b> "})
    client.post("/api/decide", {"ids": [row["00-saved.jpg"]], "keep": True, "instead_of": row["00.png"]})
    found = {Path(path).name: made for path, made in read_decisions(selection / FILE).items()}
    assert {name: made.keep for name, made in found.items()} == {
        "03.png": False, "04.png": None, HOSTILE: None, "00-saved.jpg": True, "00.png": False,
    }  # fmt: skip
    assert found[HOSTILE].tags == ("<b>odd</b>",)
    assert found["00-saved.jpg"].instead_of == "photos/cats/00.png"
    assert len(found["03.png"].sha256) == 64
    assert client.json("/api/find", text="ODD")["ids"] == [row[HOSTILE]]
    assert client.json("/api/image", id=row["03.png"])["decision"]["keep"] is False
    kept = {Path(path).name for path in troodon.images.sources.open_source(selection).column("path")}
    assert {"03.png", "00.png"}.isdisjoint(kept)
    assert {"04.png", "00-saved.jpg"} <= kept
    again = serve(selection)
    again.server_close()
    assert json.loads(again.routes["GET", "/api/decisions"](None).body) == client.json("/api/decisions")


@pytest.mark.parametrize(
    "asked",
    [
        {}, {"ids": [0]}, {"ids": 0, "keep": True}, {"ids": [25], "keep": True}, {"ids": [-1], "keep": True},
        {"ids": [True], "keep": True}, {"ids": [0], "keep": 1}, {"ids": [0], "keep": "yes"},
        {"ids": [0], "add_tag": " "}, {"ids": [0], "add_tag": "x" * 101}, {"ids": [0], "add_tag": ["x"]},
        {"ids": [0], "keep": True, "instead_of": 0},
        {"ids": [0, 1], "keep": True, "instead_of": 2}, {"ids": [0], "instead_of": 1},
        {"ids": ["../../etc"], "keep": True},
        {"ids": list(range(25)) * 50_000, "keep": True},
    ],
)  # fmt: skip
def test_what_is_no_decision_is_refused_and_nothing_is_written(client, selection, asked):
    assert client.post("/api/decide", asked)[0] == 400
    assert not (selection / FILE).exists()


def test_only_who_has_the_token_is_served(client):
    for path in ("/", "/explore.js", "/api/collection", "/api/thumbnail", "/nothing"):
        for token in ("", "x", client.token[:-1], client.token + "x", "é"):
            assert client.ask(path, token=token)[0] == 403
    status, headers, body = client.ask("/")
    assert status == 200
    assert b'<script type="module"' in body
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert client.ask("/api/collection", token="", headers={"Cookie": f"a=b; {cookie.partition(';')[0]}"})[0] == 200
    assert client.ask("/api/collection", token="", headers={"X-Troodon-Token": client.token})[0] == 200
    assert client.ask("/api/collection", token="", headers={"Cookie": f"other={client.token}"})[0] == 403
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_other_names_and_other_pages_are_refused(client):
    port = client.port
    for host in (
        "evil.com",
        f"evil.com:{port}",
        f"127.0.0.1.evil.com:{port}",
        "",
        f"127.0.0.1:{port}@evil.com",
        "[::1].evil",
    ):
        assert client.ask("/api/collection", headers={"Host": host})[0] == 403
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:9999"):  # as through a tunnel
        assert client.ask("/api/collection", headers={"Host": host})[0] == 200
    for origin in (
        "http://evil.com",
        "null",
        f"https://127.0.0.1:{port}",
        "http://127.0.0.1:1",
        f"http://localhost:{port}",
    ):
        assert client.ask("/api/decide", "POST", b'{"ids": [0], "keep": false}', {"Origin": origin})[0] == 403
    assert client.ask("/api/search", "POST", png(picture(1)), {"Origin": f"http://127.0.0.1:{port}"})[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/page/../server.py",
        "/api",
        "/api/thumbnail/../../x",
        "/%00",
        "/explore.js/",
    ],
)
def test_no_path_leads_to_a_file(client, path):
    assert client.ask(path)[0] == 404


@pytest.mark.parametrize(
    "value", ["-1", "1000000", "99999999999999999999", "1e3", "0x1", "", "../0", "1;2", "٣", "nan"]
)
def test_a_number_that_is_no_image_is_refused(client, value):
    for path in ("/api/thumbnail", "/api/neighbours", "/api/image"):
        assert client.ask(path, id=value)[0] == 400
    if value != "3":
        assert client.ask("/api/neighbours", id=0, k=value if value != "1000000" else "1001")[0] == 400


def test_a_thousand_malformed_uploads_do_no_harm(client):
    random, good = np.random.default_rng(0), png(picture(3))
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    bodies = [b"", b"GIF89a", bomb.getvalue(), b"\x93NUMPY\x01\x00", good[:200], b"/etc/passwd"]
    for number in range(1000 - len(bodies)):
        damaged = bytearray(good)
        for place in random.integers(8, len(good), 12):
            damaged[place] = random.integers(256)
        bodies.append(bytes(damaged[: random.integers(1, len(good))]) if number % 2 else bytes(damaged))
    route = client.server.routes["POST", "/api/search"]
    statuses = {client.ask("/api/search", "POST", body, k=1)[0] for body in bodies[:40]}
    assert statuses <= {200, 400}
    assert 400 in statuses
    from troodon.explore.server import Refused, Request

    for body in bodies[40:]:
        with contextlib.suppress(Refused):  # and nothing else
            route(Request({"k": "1"}, body))
    forms = [b"--x\r\n" * 1000, b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nb\r\n--x--", b"\x00" * 100, b""]
    for kind in (
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "multipart/form-data; boundary=" + "x" * 5000,
    ):
        for form in forms:
            assert client.ask("/api/search", "POST", form, {"Content-Type": kind})[0] == 400
    assert client.ask("/api/search", "POST", good)[0] == 200


def raw(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_bodies_are_bounded_before_they_are_read(client):
    head = f"POST /api/search?token={client.token} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode()
    for length, status in (
        (str(MAX_BODY + 1), b"413"),
        ("-5", b"411"),
        ("x", b"411"),
        ("9" * 40, b"411"),
        ("10", b"400"),
    ):
        assert raw(client.port, head + f"Content-Length: {length}\r\n\r\nabc".encode()).split()[1] == status
    assert raw(client.port, head + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n").split()[1] == b"411"
    assert raw(client.port, b"GET / HTTP/1.1\r\n\r\n").split()[1] == b"403"
    assert raw(client.port, b"\x16\x03\x01 not http\r\n\r\n")[:0] == b""
    assert client.ask("/api/collection")[0] == 200


def test_many_at_once(client):
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda i: client.ask("/api/thumbnail", id=i % 3)[0], range(200)))
    assert answers == [200] * 200


def test_the_layout_is_kept_and_made_anew_for_other_vectors(selection, tmp_path, monkeypatch):
    x = np.random.default_rng(0).standard_normal((60, 16)).astype(np.float16)
    has = np.ones(60, bool)
    has[7] = False
    file = tmp_path / "layout.npz"
    first = layouts.layout_of(x, has, file, "vectors")
    assert np.isnan(first.place_N2[7]).all()
    assert not (first.row_Nk == 7).any()
    monkeypatch.setattr(layouts, "arrange", lambda *_: pytest.fail("made again"))
    again = layouts.layout_of(x, has, file, "vectors")
    assert np.array_equal(first.place_N2, again.place_N2, equal_nan=True)
    monkeypatch.undo()
    other = layouts.layout_of(-x, has, file, "other vectors")
    assert not np.array_equal(first.place_N2, other.place_N2, equal_nan=True)
    file.write_bytes(file.read_bytes()[:500])
    assert np.array_equal(layouts.layout_of(-x, has, file, "other vectors").place_N2, other.place_N2, equal_nan=True)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 16])
def test_a_layout_of_few_images(count):
    x = np.random.default_rng(0).standard_normal((count, 4)).astype(np.float16)
    row_Nk, score_Nk = layouts.nearest_neighbours(x, 15)
    assert np.isfinite(layouts.arrange(layouts.start_of(x), row_Nk, score_Nk)).all()


def test_neighbours_stay_neighbours_on_the_map():
    """Twenty clusters on the map lie apart, though their centres are random; principal components mix them."""
    random = np.random.default_rng(0)
    label = np.arange(1000) % 20
    x = random.standard_normal((20, 64))[label] + 0.5 * random.standard_normal((1000, 64))
    row_Nk, score_Nk = layouts.nearest_neighbours(x.astype(np.float16), 15)
    start = layouts.start_of(x)

    def pure(place: np.ndarray) -> float:
        far = ((place[:, None] - place[None]) ** 2).sum(-1)
        near = np.argsort(far, axis=1)[:, 1:11]
        return float((label[near] == label[:, None]).mean())

    assert pure(start) < 0.8
    assert pure(layouts.arrange(start, row_Nk, score_Nk)) > 0.95


def test_lists_find_nearly_all_neighbours(monkeypatch):
    x = np.random.default_rng(0).standard_normal((4000, 24)).astype(np.float16)
    exact = layouts.nearest_neighbours(x, 10)[0]
    monkeypatch.setattr(layouts, "MAX_EXACT", 100)
    found, score = layouts.nearest_neighbours(x, 10)
    same = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(exact, found)])
    assert same > 0.8
    assert (found != np.arange(4000)[:, None]).all()
    assert (np.diff(score, axis=1) <= 0).all()


@pytest.fixture(scope="session")
def net(world) -> Path:
    Backbone.random(ViTConfig(dim=32, depth=2, heads=2, patch=8, grid=2), Preprocessing(resize=16, crop=16)).save(
        world / "net"
    )
    return world / "net"


def test_images_are_embedded_first_and_the_backbone_must_be_theirs(world, net, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["explore", str(world / "photos"), "--no-open"]) == 2
    assert "give --backbone" in capsys.readouterr().err
    server = serve(world / "photos", backbone=net)
    server.server_close()
    assert (tmp_path / "photos-embeddings" / "manifest.json").exists()
    found = server.routes["POST", "/api/search"]
    from troodon.explore.server import Refused, Request

    (nearest,) = find_nearest(troodon.load(net), [png(picture(5))], tmp_path / "photos-embeddings", k=3)
    answer = json.loads(found(Request({"k": "3"}, png(picture(5)))).body)
    assert [one["id"] for one in answer] == [one["id"] for one in nearest]
    assert [one["similarity"] for one in answer] == pytest.approx([one["score"] for one in nearest], abs=1e-5)
    with pytest.raises(Refused, match="cannot be read"):
        found(Request({}, b"/etc/passwd"))
    without = serve(tmp_path / "photos-embeddings")
    without.server_close()
    with pytest.raises(Refused, match="--backbone"):
        without.routes["POST", "/api/search"](Request({}, png(picture(5))))
    other = Backbone.random(
        ViTConfig(dim=32, depth=2, heads=2, patch=8, grid=2), Preprocessing(resize=16, crop=16), seed=5
    )
    with pytest.raises(UsageError, match="another backbone"):
        serve(tmp_path / "photos-embeddings", backbone=other)
    with pytest.raises(UsageError, match="port 70000"):
        serve(tmp_path / "photos-embeddings", port=70000)
    for form in ("parquet", "arrow"):
        troodon.embed(net, world / "photos", tmp_path / form, format=form)
        table = serve(tmp_path / form)
        table.server_close()
        assert len(json.loads(table.routes["GET", "/api/neighbours"](Request({"id": "0", "k": "5"})).body)) == 5
    troodon.embed(net, world / "photos", tmp_path / "patches", tokens="patches")
    with pytest.raises(UsageError, match="holds patches"):
        serve(tmp_path / "patches")


def test_what_is_not_there_or_cannot_be_shown_is_named(net, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for place, reason in {"photoz": "there is no 'photoz' in", "empty": "is empty", "net": "is a backbone"}.items():
        place = net if place == "net" else tmp_path / place
        assert cli.run(["explore", str(place), "--no-open"]) == 2
        assert reason in capsys.readouterr().err


def test_the_command_prints_its_address_first_and_ends_on_request(selection):
    command = [sys.executable, "-m", "troodon.cli", "explore", str(selection), "--port", "0", "--no-open"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )  # fmt: skip
    try:
        address = process.stdout.readline().strip()
        port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{32})", address).groups()
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        for path, status in (("/", 403), (f"/?token={token}", 200)):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "ended" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
