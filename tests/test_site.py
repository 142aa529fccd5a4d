"""The pages of docs/ make a site: each has its place, pictures and made pages are those of the scripts, and it builds.

A reader without a network sees all of it: nothing is loaded from elsewhere.
"""

import html
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

import troodon
from tests.test_house import ROOT

DOCS = ROOT / "docs"
LARGEST = 500_000  # bytes of all pictures
MISSING = [name for name in ("zensical", "mkdocstrings_handlers") if importlib.util.find_spec(name) is None]
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//"""
    r"""|url\(["']?(?:https?:)?//|@import"""
)


def settings() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def entries(nav: list | dict | str) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in entries(part)]


def test_every_page_has_one_place() -> None:
    assert sorted(entries(settings()["nav"])) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_first_page_leads_to_all_others() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [page for page in entries(settings()["nav"]) if f"({page})" not in text] == ["index.md"]


def test_every_public_name_is_explained() -> None:
    named = re.findall(r"^::: troodon\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(vars(troodon)["__all__"])


def test_the_page_of_recipes_is_made_from_the_recipes() -> None:
    made = runpy.run_path(str(DOCS / "recipes.py"))["page"]()
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == made, "run make pages"


def test_pictures_are_few_and_made_by_the_script() -> None:
    pictures = sorted((DOCS / "pictures").iterdir())
    text = (DOCS / "pictures.py").read_text(encoding="utf-8")
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    assert [path.name for path in pictures if path.name not in text and path.stem not in text] == []
    assert [path.name for path in pictures if f"(pictures/{path.name})" not in pages] == []
    assert sum(path.stat().st_size for path in pictures) < LARGEST


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The built pages."""
    shutil.copytree(DOCS, tmp_path / "docs")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "paths: [src]" in config
    (tmp_path / "mkdocs.yml").write_text(config.replace("paths: [src]", f"paths: [{json.dumps(str(ROOT / 'src'))}]"))
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / "site"


# One test, since one build takes seconds.
@pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: pip install -e '.[docs]'")
def test_the_site_is_whole_and_needs_no_network(site: Path) -> None:
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}
    text = {path: path.read_text(encoding="utf-8") for path in site.rglob("*") if path.suffix in (".html", ".css")}
    assert [path for path in text if LOADED.search(text[path])] == []
    assert dead_links(site, text) == []
    api = text[site / "api.html"]
    assert [name for name in vars(troodon)["__all__"] if not re.search(rf'id="troodon\.{name}"', api)] == []
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    assert {f"{page}.html" for page in pages} <= {item["location"].partition("#")[0] for item in index["items"]}


def dead_links(site: Path, text: dict[Path, str]) -> list[str]:
    """Links of the pages, to a file or a heading of the site, that lead nowhere."""
    dead = []
    ids = {path: set(re.findall(r"""\bid=["']?([^"'\s>]+)""", page)) for path, page in text.items()}
    for path in (path for path in text if path.suffix == ".html" and path.name != "404.html"):
        for link in re.findall(r"""<[a-z]+\b[^>]*?\s(?:href|src)=["']?([^"'\s>]*)""", text[path]):
            place, _, heading = html.unescape(link).partition("#")
            if re.match(r"[a-z]+:", place):
                continue
            target = (path.parent / unquote(place)).resolve() if place else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (heading and target.suffix == ".html" and unquote(heading) not in ids[target]):
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    there = '<a href="b.html#c"></a><img src="b.html"><h2 id="here"><a href="#here"></a>'
    wrong = '<a href="b.html#d"></a><a class="x" href="gone.html"></a><img alt="" src="gone.png"><a href=#gone></a>'
    for name, page in {"a.html": there + wrong, "b.html": '<h2 id="c">'}.items():
        (tmp_path / name).write_text(page)
    text = {path: path.read_text() for path in tmp_path.iterdir()}
    links = ["b.html#d", "gone.html", "gone.png", "#gone"]
    assert dead_links(tmp_path, text) == [f"a.html: {link}" for link in links]
