"""The pages name what exists: files, names of the code, commands, options and links.

Each check (pages.py) is tried first on a small made page for each kind of mistake, then on the pages.
"""

import re
from pathlib import Path

import pytest

from tests.pages import EXAMPLES, Code, Page, link_mistakes
from tests.test_house import FLOORS, PACKAGE, ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# Pages that also name things of other programs: of these only commands, options and links are checked.
OTHERS = {"CHANGELOG", "adapt", "copies", "explore", "export", "features", "performance", "show", "small-data"}
OTHERS |= {"values", "weights"}
HISTORY = {"CHANGELOG", "log"}  # their commands are those of their day


@pytest.fixture(scope="module")
def code() -> Code:
    """All code but that of this file, which is full of names that do not exist."""
    return Code(PACKAGE, ROOT / "tests", ROOT / "benchmarks", skip=__name__)


RIGHT = """
# A page

`views/loader.py` calls `generator(seed, image, visit)`; `views/` has `loader.py` too. `Index.read(row)`, `losses.dino`,
`Method.losses`, `troodon.run`, `troodon.load("runs/first")`, `tests.test_house`, `TERMS`, `small`, `labels.csv`.

`troodon curate
calibrate`, `troodon pretrain --devices N`, `--schedules.lr.peak 5e-4`, `make test`,
`objective.terms: dino 1 koleo 0.1`.

```bash
troodon pretrain small --data photos/ --out run   # a comment
.venv/bin/python -m pytest tests/test_docs.py
```

```python
import troodon

f = troodon.load("runs/first").features(["a.jpg"])  # f.cls (B, D)
```

```
src/troodon/
  cli.py     commands; demo.py: all of it
tests/       a claim is a test
```

[here](#a-page), [tour](tour.md)
"""


def test_a_page_without_mistakes_passes(code: Code) -> None:
    page = Page(RIGHT, code)
    assert page.mistakes() + link_mistakes(page.text, page.path) == []


@pytest.mark.parametrize(
    ("right", "wrong", "mistake"),
    [
        ("views/loader.py", "views/loder.py", "page.md:4: there is no views/loder.py"),
        ("`loader.py`", "`dedup.py`", "there is no dedup.py"),  # of another room
        ("`views/`", "`vews/`", "there is no vews/"),
        ("generator(", "generater(", "there is no generater"),
        (
            "(seed, image, visit)",
            "(seed, visit, image)",
            "generator(seed, visit, image): the parameters are seed",
        ),
        ("(seed, image, visit)", "(seed, picture)", "generator(seed, picture): the parameters are seed, image, visit"),
        ("Index.read(", "Index.raed(", "there is no Index.raed"),
        ("(row)", "(number)", "Index.read(number): the parameters are row"),
        ("Method.losses", "Methode.losses", "there is no Methode.losses"),
        ("Method.losses", "Method.lesson", "there is no Method.lesson"),
        ("losses.dino", "losses.dyno", "there is no losses.dyno"),
        ("troodon.run", "troodon.walk", "there is no troodon.walk"),
        ('troodon.load("runs/first")`', 'troodon.lode("runs/first")`', "there is no troodon.lode"),
        ("tests.test_house", "tests.test_flat", "there is no tests.test_flat"),
        ("`TERMS`", "`TURMS`", "there is no TURMS"),
        ("`TERMS`", "`two words`", "two words is neither a name, a path nor a command"),
        ("`labels.csv`", "`lables.csv`", "there is no lables.csv"),
        ("calibrate`", "celebrate`", "'celebrate'"),
        ("--devices N", "--devises N", "--devises"),
        ("--schedules.lr.peak", "--schedules.lr.pique", "there is no option --schedules.lr.pique"),
        ("5e-4", "high", "high: must be FLOAT"),
        ("dino 1", "dyno 1", "dyno"),
        ("`make test`", "`make tests2`", "there is no target 'tests2'"),
        ("pretrain small", "pretrain smal", "'smal'"),
        ("--out run ", "--outt run ", "there is no option --outt"),
        ("--out run ", "--outt run \\\n    --dry-run ", "there is no option --outt"),
        ("troodon pretrain small --data", "torchrun -m troodon pretrain smal --data", "'smal'"),
        ("--out run ", "--schedules.momentum.peak 0.9 --out run ", "there is no option --schedules.momentum.peak"),
        ("tests/test_docs.py", "tests/test_dogs.py", "there is no tests/test_dogs.py"),
        ("troodon.load", "troodon.lode", "there is no troodon.lode"),
        (".features(", ".feetures(", ".feetures"),
        ("f.cls", "f.class_token", "there is no f.class_token"),
        ("  cli.py", "  clip.py", "there is no clip.py in the tree"),
        ("demo.py:", "memo.py:", "there is no memo.py in the tree"),
        ("#a-page", "#no-page", "there is no heading #no-page"),
        ("(tour.md)", "(detour.md)", "there is no file detour.md"),
    ],
)
def test_each_kind_of_mistake_is_found(right: str, wrong: str, mistake: str, code: Code) -> None:
    assert right in RIGHT
    page = Page(RIGHT.replace(right, wrong), code)
    found = page.mistakes() + link_mistakes(page.text, page.path)
    assert any(mistake in line for line in found), found


@pytest.mark.parametrize("path", [path for path in PAGES if path.stem not in HISTORY], ids=lambda path: path.name)
def test_a_page_names_what_exists(path: Path, code: Code) -> None:
    page = Page(path.read_text(), code, path)
    assert (page.command_mistakes() if path.stem in OTHERS else page.mistakes()) == []


def test_of_pages_with_foreign_names_commands_are_checked(code: Code) -> None:
    page = Page("`vews/` and `troodon curate celebrate`\n\n```\ntroodon export x --two onnx\n```\n", code)
    assert [mistake.partition(": ")[0] for mistake in page.command_mistakes()] == ["page.md:1", "page.md:3"]
    assert len(page.mistakes()) == 3


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert link_mistakes(path.read_text(), path) == []


def test_examples_are_still_used() -> None:
    text = "".join(path.read_text() for path in PAGES)
    assert [example for example in EXAMPLES if example not in text] == []


@pytest.mark.parametrize("name", ["README.md", "docs/tour.md"])
def test_every_room_is_named(name: str) -> None:
    text = (ROOT / name).read_text()
    rooms = [path.name for path in sorted(PACKAGE.iterdir()) if (path / "__init__.py").exists()]
    assert [room for room in rooms if f"{room}/" not in text] == []


def test_contributing_has_the_floors_of_the_house_test() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = [
        set(re.findall(r"\w+", line)) for line in re.findall(r"^ *floor \d +(.+?)(?: {6}.*)?$", text, re.MULTILINE)
    ]
    exists = {path.stem for path in PACKAGE.iterdir()} - {"__init__", "__main__"}
    for names, line in zip(FLOORS, reversed(lines), strict=True):
        assert names & exists <= line
        assert line & exists <= names
