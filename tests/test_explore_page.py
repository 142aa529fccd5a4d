"""The explorer's page in a browser: a person opens it, looks around, and decides. Its console stays empty."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.browser import Browser
from tests.test_dedup import picture
from tests.test_explore import HOSTILE, rows, selection, world  # noqa: F401
from troodon.images.decisions import FILE, read_decisions
from troodon.verbs.exploration import serve

READY = "document.body.dataset.ready === 'yes'"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        browser.size(1280, 800)
        yield browser


@pytest.fixture
def address(selection) -> Iterator[str]:  # noqa: F811
    (selection / FILE).unlink(missing_ok=True)
    server = serve(selection)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.address
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def opened(page, address) -> Iterator[Browser]:
    page.messages.clear()
    page.open(address)
    page.wait(READY)
    yield page
    assert page.messages == []


def shown(page: Browser) -> list[int]:
    """The images in the grid, as far as they are drawn."""
    cells = "[...document.querySelectorAll('.cell')].sort((a, b) => a.id.slice(5) - b.id.slice(5))"
    return page.run(f"{cells}.map(cell => Number(cell.dataset.id))")


def words(page: Browser, selector: str) -> str:
    return page.run(f"document.querySelector({json.dumps(selector)}).innerText")


def decided(selection: Path) -> dict[str, bool | None]:  # noqa: F811
    return {Path(path).name: made.keep for path, made in read_decisions(selection / FILE).items()}


def test_search_by_a_picture_and_click_through(opened, selection, tmp_path):  # noqa: F811
    row = rows(selection)
    Image.fromarray(picture(7)).save(tmp_path / "query.png")
    assert "token" not in opened.run("location.href")
    opened.choose_file("#file", tmp_path / "query.png")
    opened.wait("document.querySelector('#shown').textContent.startsWith('Nearest to query.png')")
    opened.wait("document.querySelector('.cell .badge')?.textContent === '1.000'")
    assert shown(opened)[0] == row["07.png"]
    opened.click("#cell-0")
    opened.wait("document.querySelector('dialog[open] h2')?.textContent === '07.png'")
    opened.wait("document.querySelectorAll('dialog .strip img').length > 5")
    nearest = opened.run("document.querySelector('dialog .strip img').src.match(/id=(\\d+)/)[1]")
    opened.click("dialog .strip button")
    opened.wait(f"document.querySelector('dialog .large img').src.includes('id={nearest}&')")
    opened.press("Escape")
    opened.wait("!document.querySelector('dialog').open")


def test_lasso_tag_save_and_reload(opened, selection):  # noqa: F811
    opened.click("#lasso")
    box = opened.run("(({ x, y, width, height }) => [x, y, width, height])(overlay.getBoundingClientRect())")
    x, y, width, height = box
    opened.drag(
        [
            (x + 5, y + height / 2),
            (x + 5, y + height - 5),
            (x + width - 5, y + height - 5),
            (x + width - 5, y + height / 2),
        ]
    )
    opened.wait("document.querySelector('#shown').textContent.includes('in the lasso')")
    inside = int(words(opened, "#shown").split()[0])
    assert 0 < inside < 24
    opened.type("#tag", "lower <b>half</b>")
    opened.press("Enter")
    opened.wait("document.querySelector('#status').textContent.includes('saved')")
    made = read_decisions(selection / FILE)
    assert [decision.tags for decision in made.values()] == [("lower <b>half</b>",)] * inside
    opened.click("#leave-out")
    opened.wait(f"document.querySelectorAll('.cell.is-dropped').length === {min(inside, len(shown(opened)))}")
    assert [*decided(selection).values()] == [False] * inside
    opened.click("#undo")
    opened.wait("!document.querySelector('.cell.is-dropped')")
    assert [*decided(selection).values()] == [None] * inside
    opened.run("window.isOld = true; location.reload()")
    opened.wait(f"!window.isOld && {READY} && !document.querySelector('#decided').hidden")
    assert words(opened, "#decided") == f"Decided: {inside}"
    opened.type("#find-text", "<b>HALF")
    opened.press("Enter")
    opened.wait(f"document.querySelector('#shown').textContent.startsWith('{inside} image')")


def test_the_slider_recounts_and_another_image_is_kept(opened, selection):  # noqa: F811
    row = rows(selection)
    opened.click("#tab-copies")
    opened.wait("document.querySelectorAll('#groups .member').length === 6")
    assert words(opened, "#threshold-says").startswith("3 pairs of ")
    assert "3 groups, 3 images are left out" in words(opened, "#threshold-says")
    assert "There is none below." in words(opened, "#below")
    slide = "document.querySelector('#threshold').value = {}; threshold.dispatchEvent(new Event('input'))"
    opened.run(slide.format(1000))
    assert words(opened, "#threshold-says").startswith("1 pair of ")
    opened.wait("below.querySelectorAll('.pair').length === 2 && above.querySelectorAll('.pair').length === 1")
    opened.run(slide.format(0))
    opened.wait("document.querySelectorAll('#groups .member').length === 6")
    assert "Stays: " in words(opened, "#groups .member.stays")
    first = opened.run(
        "[...document.querySelectorAll('#groups .group:first-child img')].map(i => Number(i.src.match(/id=(\\d+)/)[1]))"
    )
    opened.run(
        "[...document.querySelectorAll('.group:first-child .do')].find(b => b.textContent.includes('instead')).click()"
    )
    opened.wait("document.querySelector('#status').textContent.includes('kept: saved')")
    names = {number: name for name, number in row.items()}
    assert decided(selection) == {names[first[1]]: True, names[first[0]]: False}
    assert "You keep it" in words(opened, "#groups .group:first-child")
    assert "Keep it" in words(opened, "#groups .group:first-child .member:first-child")  # the one that was left out
    opened.press("u")
    opened.wait("document.querySelector('#status').textContent.includes('undecided: saved')")
    assert {*decided(selection).values()} == {None}
    assert "You keep it" not in words(opened, "#groups .group:first-child")
    opened.click("#tab-similar")
    opened.wait("document.querySelector('#threshold-says')?.textContent.includes('if one of each group stays')")


def test_the_map_shows_what_is_under_the_mouse_and_its_neighbours(opened, selection):  # noqa: F811
    opened.wait("document.querySelectorAll('#thumbs img').length > 5")
    image = opened.run("Number(document.querySelector('#thumbs img').src.match(/id=(\\d+)/)[1])")
    place = "(({ x, y, width, height }) => [x + width / 2, y + height / 2])(thumbs.firstChild.getBoundingClientRect())"
    x, y = opened.run(place)
    opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    opened.wait(f"!card.hidden && card.querySelector('img').src.includes('id={image}&')")
    opened.drag([(x, y)])
    opened.wait("document.querySelector('#shown').textContent.startsWith('Nearest to')")
    opened.wait(f"document.querySelector('#cell-0')?.dataset.id === '{image}'")


def test_hostile_names_are_text(opened, selection):  # noqa: F811
    opened.type("#find-text", "<img src")
    opened.press("Enter")
    opened.wait("document.querySelector('#shown').textContent.startsWith('1 image with')")
    opened.click("#cell-0")
    opened.wait(f"document.querySelector('dialog[open] h2')?.textContent === {json.dumps(HOSTILE)}")
    assert opened.run("document.querySelectorAll('img[src=x], [onerror]').length") == 0
    opened.press("Escape")


def test_all_of_it_by_keys(opened, selection):  # noqa: F811
    opened.press("g")
    for key in ("ArrowRight", "ArrowRight", "x", "ArrowDown", "k"):
        opened.press(key)
    opened.wait(
        "document.querySelectorAll('.is-dropped').length === 1 && document.querySelectorAll('.is-kept').length === 1"
    )
    assert sorted(map(str, decided(selection).values())) == ["False", "True"]
    opened.press("u")
    opened.wait("!document.querySelector('.cell.is-kept')")
    opened.press("Enter")
    opened.wait("document.querySelector('dialog').open")
    opened.press("x")
    opened.wait("document.querySelector('dialog .drop').getAttribute('aria-pressed') === 'true'")
    opened.press("Escape")
    opened.wait("document.activeElement.id === 'grid'")
    opened.run("document.querySelector('#overlay').focus()")
    for key in ("+", "+", "+", "ArrowLeft", "v"):
        opened.press(key)
    opened.wait("document.querySelector('#shown').textContent.includes('visible on the map')")
    assert 0 <= int(words(opened, "#shown").split()[0]) < 24


def test_keys_go_on_from_image_to_image_whatever_has_the_focus(opened, selection):  # noqa: F811
    """Neither an image that comes nor a decision takes the focus away from a control that stays."""
    title = "document.querySelector('dialog h2').textContent"
    opened.click("#cell-0")
    opened.wait(f"document.querySelector('dialog').open && {title}")
    names = [opened.run(title)]
    for way in ("ArrowRight", "dialog .drop", "ArrowRight", "ArrowRight", "dialog .strip button", "ArrowRight"):
        if way == "ArrowRight":
            opened.press(way)
            opened.wait(f"{title} !== {json.dumps(names[-1])}")
            names.append(opened.run(title))
        elif way == "dialog .drop":
            opened.click(way)
            opened.wait("document.querySelector('dialog .drop').getAttribute('aria-pressed') === 'true'")
            assert opened.run("document.activeElement === document.querySelector('dialog .drop')")
        else:
            opened.click(way)
            opened.wait(f"{title} !== {json.dumps(names[-1])}")
            names.append(opened.run(title))
    opened.press("k")
    opened.wait("document.querySelector('dialog .keep').getAttribute('aria-pressed') === 'true'")
    assert decided(selection) == {names[1]: False, names[-1]: True}
    opened.press("Escape")
    opened.type("#find-text", "cats")
    opened.press("Enter")
    opened.wait("document.querySelector('#shown').textContent.includes('with “cats”')")
    opened.run("document.querySelector('#keep').focus()")
    opened.press("Enter")
    opened.wait("document.querySelector('#status').textContent.includes('kept: saved')")
    assert opened.run("document.activeElement.id") == "keep"
    opened.run("document.querySelector('#show-all').focus()")
    opened.press("Enter")
    opened.wait("document.activeElement.id === 'grid'")  # the button has gone


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(page, address, dark):
    page.messages.clear()
    page.size(390, 844, dark, 2, True)
    try:
        page.open(address)
        page.wait(READY)
        assert page.run("document.documentElement.scrollWidth") <= 390
        assert page.run("document.querySelector('#grid').clientHeight") > 100
        page.click("#cell-1")
        page.wait("document.querySelector('dialog[open] .large img')?.complete")
        assert page.run("document.querySelector('dialog').getBoundingClientRect().width") == 390
        ground = page.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, ground[4:-1].split(","))) < 200) is dark
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
        page.size(1280, 800)
    assert page.messages == []


def test_without_webgl_the_map_is_drawn_all_the_same(address, tmp_path):
    with Browser(tmp_path, "--disable-gpu", "--disable-3d-apis") as page:
        page.size(900, 700)
        page.open(address)
        page.wait(READY)
        assert page.run("document.createElement('canvas').getContext('webgl') === null")
        page.wait("document.querySelector('#points').getContext('2d') !== null")
        page.wait("points.getContext('2d').getImageData(0, 0, points.width, points.height).data.some(Boolean)")
        assert [message for message in page.messages if "WebGL" not in message] == []
