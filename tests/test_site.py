"""The pages of docs/ make a site: each has its place, pictures and made pages are those of the scripts, and it builds.

A reader without a network sees all of it: nothing is loaded from elsewhere.
"""

import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import troodon
from tests.test_house import ROOT

DOCS = ROOT / "docs"
LARGEST = 500_000  # bytes of all pictures
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    if missing := [name for name in ("zensical", "mkdocstrings_handlers") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, folder / "docs")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "paths: [src]" in config
    (folder / "mkdocs.yml").write_text(config.replace("paths: [src]", f"paths: [{json.dumps(str(ROOT / 'src'))}]"))
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_every_page_is_built(site: Path) -> None:
    assert {path.stem for path in DOCS.glob("*.md")} <= {path.stem for path in site.glob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in (path for path in site.rglob("*") if path.suffix in (".html", ".css")):
        assert LOADED.search(path.read_text(encoding="utf-8")) is None, path


def test_the_page_of_python_has_the_docstrings(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in vars(troodon)["__all__"]:
        assert re.search(rf'id="troodon\.{name}"', text), name


def test_search_finds_every_page(site: Path) -> None:
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    found = {item["location"].partition("#")[0] for item in index["items"]}
    assert {f"{path.stem}.html" for path in DOCS.glob("*.md")} <= found
