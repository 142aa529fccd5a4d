"""The explorer's grid of very many images: it has few elements and waits for few pictures, however it is scrolled."""

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.browser import Browser
from tests.test_dedup import picture
from tests.test_explore_page import READY
from troodon.explore.api import Api
from troodon.explore.collection import Collection
from troodon.explore.layout import Layout
from troodon.explore.pictures import Pictures
from troodon.explore.server import Server
from troodon.images.index import SCHEMA, Index

# Scroll to the bottom with so many stops of so many milliseconds: the most elements that were there at once, and
# the times between frames where there is no rest.
SCROLL = """(async (stops, rest) => { let most = 0; const end = grid.scrollHeight - grid.clientHeight, times = [];
    for (let i = 1; i <= stops; i++) { grid.scrollTop = end * i / stops;
        times.push(await new Promise(requestAnimationFrame));
        if (rest) await new Promise(done => setTimeout(done, rest));
        most = Math.max(most, grid.querySelectorAll("*").length); }
    return [most, times.slice(1).map((time, i) => time - times[i]).sort((a, b) => a - b)]; })(%d, %d)"""
FILLED = """(() => { const box = grid.getBoundingClientRect();
    const seen = [...grid.querySelectorAll(".cell")].filter(cell => {
    const { top, bottom } = cell.getBoundingClientRect(); return bottom > box.top && top < box.bottom; });
    return seen.length && seen.every(cell => cell.querySelector("img")?.naturalWidth); })()"""


def many(folder: Path, images: int) -> Collection:
    """So many images; forty pictures in one file are the bytes of all."""
    files = []
    for seed in range(40):
        Image.fromarray(picture(seed)).save(out := io.BytesIO(), "JPEG")
        files.append(out.getvalue())
    (folder / "pictures").write_bytes(b"".join(files))
    length, which = np.array([*map(len, files)]), np.arange(images) % len(files)
    columns = {
        "path": [f"{i:05d}.jpg" for i in range(images)],
        "container": ["pictures"] * images,
        "offset": (np.cumsum(length) - length)[which],
        "length": length[which],
        "label": pa.nulls(images, pa.string()),
        "split": pa.nulls(images, pa.string()),
    }
    table = pa.table(columns, schema=SCHEMA)
    vectors = np.random.default_rng(0).standard_normal((images, 4)).astype(np.float16)
    return Collection(folder, "embeddings", "", Index(table, base=str(folder)), table, vectors)


def worked(page: Browser) -> float:
    """Milliseconds of a processor that the page's own thread has taken."""
    return 1000 * {m["name"]: m["value"] for m in page.call("Performance.getMetrics")["metrics"]}["TaskDuration"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pictures that the server makes; each takes a while, as large ones do."""
    made, make = [], Pictures._make

    def slowly(self: Pictures, row: int, side: int) -> bytes:
        made.append(row)
        time.sleep(0.06)
        return make(self, row, side)

    monkeypatch.setattr(Pictures, "_make", slowly)
    return made


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Browser]:
    count = 20_000
    collection, places = many(tmp_path, count), np.random.default_rng(1).standard_normal((count, 2))
    layout = Layout(places.astype("f4"), np.full((count, 2), -1, "i4"), np.zeros((count, 2), "f4"))
    server = Server(Api(collection, lambda: layout).routes())
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    with Browser(tmp_path) as browser:
        browser.size(1280, 800)
        browser.open(server.address)
        browser.wait(READY)
        yield browser
        assert browser.messages == []
    server.shutdown()
    thread.join()
    server.server_close()


def test_twenty_thousand_images_scroll(page: Browser, made: list[int]) -> None:
    page.wait(FILLED)
    page.call("Performance.enable", timeDomain="threadTicks")
    before = worked(page)
    most, times = page.run(SCROLL % (200, 0))
    assert most < 250
    print(f"the page's thread works {(worked(page) - before) / 200:.1f} ms a frame")
    print(f"frames: {times[20]:.0f}, {times[100]:.0f}, {times[180]:.0f} ms at 10, 50 and 90 %")
    page.run("grid.scrollTop = 0")
    assert page.run(SCROLL % (25, 120))[0] < 250
    scrolled = len(made)
    page.wait("document.querySelector('#cell-19999')")
    page.wait(FILLED)
    # Those that were scrolled past are not waited for: what is made now is what is seen, and what had begun.
    assert len(made) - scrolled < 60
    assert made[-1] > 19_900


def test_the_last_of_two_million_images_is_reached(page: Browser) -> None:
    """By the scroll bar and by keys: no element may be as tall as all of them."""
    page.run("""import("/grid.js").then(({ Grid }) => { const other = grid.cloneNode(); grid.replaceWith(other);
        new Grid(other, { open() {}, key() {} }).show(Array.from({ length: 2e6 }, (_, i) => i % 20000)); })""")
    inside = """[grid, document.querySelector("#cell-%d")].map(element => element.getBoundingClientRect())
        .reduce((box, { top, bottom }) => top >= box.top - 1 && bottom <= box.bottom + 1)"""
    page.wait(inside % 0)
    page.run("grid.scrollTop = 1e9")
    page.wait(inside % 1_999_999)
    page.run("grid.focus()")
    for key, index in (("Home", 0), ("End", 1_999_999), ("ArrowLeft", 1_999_998)):
        page.press(key)
        page.wait(inside % index)
