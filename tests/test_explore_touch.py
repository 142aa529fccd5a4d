"""The explorer's page by touch, at the width of a phone: one finger moves the map, two zoom it, a tap chooses."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.browser import Browser
from tests.test_explore import selection, world  # noqa: F401
from tests.test_explore_page import READY, address, decided, words  # noqa: F401

PLACES = """Object.fromEntries([...thumbs.children].map(image => [image.src.match(/id=(\\d+)/)[1],
    (({ x, y }) => [x + 22, y + 22])(image.getBoundingClientRect())]))"""
# A finger that touches what still moves stops it, and chooses nothing.
STILL = """new Promise(done => { let last = ""; const timer = setInterval(() => {
    const now = [...document.querySelectorAll("#grid, .strip")].map(e => `${e.scrollTop} ${e.scrollLeft}`).join();
    if (now === last) { clearInterval(timer); done(); } last = now; }, 120); })"""
BOX = "(({ left, top, right, bottom }) => [left, top, right, bottom])(%s.getBoundingClientRect())"


@contextlib.contextmanager
def opened(browser: Browser, place: str) -> Iterator[Browser]:
    """The page on a phone; its console stays empty, and the page itself neither zooms nor scrolls."""
    browser.messages.clear()
    browser.size(390, 844, phone=True, scale=2)
    browser.open(place)
    browser.wait(READY)
    browser.wait("thumbs.children.length > 5")
    yield browser
    assert browser.messages == []
    assert browser.run("[visualViewport.scale, scrollX, scrollY]") == [1, 0, 0]
    assert browser.run("document.documentElement.scrollWidth") == 390


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def phone(browser, address) -> Iterator[Browser]:  # noqa: F811
    with opened(browser, address) as page:
        yield page


def frame(page: Browser) -> dict[str, list[float]]:
    """Where the pictures on the map are, once it is drawn."""
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.run(PLACES)


def line(start: tuple[float, float], end: tuple[float, float], steps: int = 8) -> list[tuple[float, float]]:
    return [
        (start[0] + (end[0] - start[0]) * i / steps, start[1] + (end[1] - start[1]) * i / steps)
        for i in range(steps + 1)
    ]


def middle(page: Browser, selector: str = "overlay", down: float = 0.5) -> tuple[float, float]:
    """A place in the middle of an element's width, and so far down in it."""
    left, top, right, bottom = page.run(BOX % selector)
    return (left + right) / 2, top + down * (bottom - top)


def test_one_finger_moves_the_map(phone):
    before, (x, y) = frame(phone), middle(phone)
    phone.touch(line((x, y), (x + 40, y + 30)))
    after = frame(phone)
    moved = [(after[i][0] - before[i][0], after[i][1] - before[i][1]) for i in before if i in after]
    assert len(moved) > 2
    assert all(abs(dx - 40) < 2 and abs(dy - 30) < 2 for dx, dy in moved), moved
    assert words(phone, "#shown").startswith("All 25")


def test_two_fingers_zoom_about_their_middle(address, tmp_path):  # noqa: F811
    # In a browser of its own: after a pinch, Chromium gives the touches it is told of to no further page.
    with Browser(tmp_path) as browser, opened(browser, address) as page:
        before, (x, y) = frame(page), middle(page)
        page.touch(line((x - 40, y), (x - 60, y)), line((x + 40, y), (x + 60, y)))
        after = frame(page)
        grown = [(after[i][0] - x) / (before[i][0] - x) for i in before if i in after and abs(before[i][0] - x) > 20]
        assert len(grown) > 2
        assert all(1.4 < factor < 1.6 for factor in grown), grown
        page.touch(line((x - 60, y), (x - 40, y)), line((x + 60, y), (x + 40, y)))
        back = frame(page)
        assert all(abs(back[i][0] - before[i][0]) < 3 for i in before if i in back)
        assert words(page, "#shown").startswith("All 25")


def test_a_finger_that_shakes_chooses_all_the_same(phone):
    places = frame(phone)
    image = next(i for i, (x, y) in places.items() if 60 < x < 330 and 180 < y < 400)
    x, y = places[image]
    phone.touch([(x, y), (x + 3, y + 4), (x + 5, y + 2)])
    phone.wait("document.querySelector('#shown').textContent.startsWith('Nearest to')")
    phone.wait(f"document.querySelector('#cell-0')?.dataset.id === '{image}'")


def test_a_lasso_by_finger_and_a_decision(phone, selection):  # noqa: F811
    """The finger leaves the map fast, as hands do: the tap that comes next counts."""
    (image, place), *_ = frame(phone).items()
    x, y = middle(phone)
    phone.touch(line((x, y), (x + 90, y + 60)))
    phone.tap("#fit")
    phone.wait(f"Math.abs(({PLACES})[{image}]?.[0] - {place[0]}) < 1")
    phone.tap("#lasso")
    left, top, right, bottom = phone.run(BOX % "map")
    corners = [(left + 3, top + 3), (left + 3, bottom - 3), (right - 3, bottom - 3), (right - 3, top + 3)]
    phone.touch(corners)
    phone.wait("document.querySelector('#shown').textContent === '24 images in the lasso'")
    phone.tap("#leave-out")
    phone.wait("document.querySelector('#status').textContent.includes('saved')")
    assert len(decided(selection)) == 24
    phone.tap("#undo")
    phone.wait("!document.querySelector('.cell.is-dropped')")


def test_lists_scroll_and_an_image_opens_and_closes(phone):
    x, y = middle(phone, "grid", 0.8)
    phone.touch(line((x, y), (x, y - 150), 12))
    phone.wait("grid.scrollTop > 60")
    phone.run(STILL)
    assert not phone.run("document.querySelector('dialog').open")
    cell = phone.run("[...document.querySelectorAll('.cell')].find(c => { const b = c.getBoundingClientRect();"
                     " return b.top > grid.getBoundingClientRect().top && b.bottom < innerHeight; }).id")  # fmt: skip
    phone.tap(f"#{cell}")
    phone.wait("document.querySelector('dialog').open && document.querySelectorAll('dialog .strip img').length > 5")
    x, y = phone.place("dialog .strip img")
    phone.touch(line((x + 200, y), (x, y), 10))
    phone.wait("document.querySelector('dialog .strip').scrollLeft > 60")
    phone.run(STILL)
    phone.tap("dialog .close")
    phone.wait("!document.querySelector('dialog').open")


def test_a_phone_that_is_turned_still_shows_the_whole_map(phone):
    phone.size(844, 390, phone=True, scale=2)
    phone.wait("innerWidth === 844 && overlay.clientWidth !== 390")
    phone.run("new Promise(done => setTimeout(done, 100))")
    places, (left, top, right, bottom) = frame(phone), phone.run(BOX % "overlay")
    assert len(places) > 5
    assert [p for p in places.values() if not (left < p[0] < right and top < p[1] < bottom)] == []
    phone.size(390, 844, phone=True, scale=2)
    phone.wait("innerWidth === 390")


def test_the_threshold_by_touch(phone):
    phone.tap("#tab-copies")
    phone.wait("document.querySelectorAll('#groups .member').length === 6")
    left, top, right, bottom = phone.run(BOX % "threshold")
    phone.touch(line((left + 8, (top + bottom) / 2), (right - 8, (top + bottom) / 2), 10))
    phone.wait("document.querySelector('#threshold').value > 900")
    assert words(phone, "#threshold-says").startswith("1 pair of ")


def test_what_a_finger_touches_is_large_enough(phone):
    small = """[...document.querySelectorAll('button, select, input:not([hidden])')].filter(e => e.checkVisibility())
        .map(e => [e.id || e.textContent, Math.round(e.getBoundingClientRect().height)])
        .filter(([, height]) => height < 36)"""
    assert phone.run(small) == []
    # A smaller font makes the browsers of telephones zoom into the page when it is entered.
    assert phone.run("parseFloat(getComputedStyle(document.querySelector('#find-text')).fontSize)") >= 16
