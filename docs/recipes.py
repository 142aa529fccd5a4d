"""Make docs/recipes.md from the recipes: their docstrings, and the numbers of their configs.

python docs/recipes.py             # or: make pages
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from troodon import recipes
from troodon.learn.config import PretrainConfig
from troodon.learn.cost import Cost
from troodon.learn.plan import grids
from troodon.text import with_prefix

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Recipes

A recipe holds choices and no mechanism: it is a function in `src/troodon/recipes/` that returns a config.
`troodon recipes` lists them, and `troodon recipes small` prints one as YAML, to edit and to pass as a file in place of
the name. Every number is an option too, such as `--schedules.lr.peak 5e-4`; `--steps` scales all that is counted in
steps. This page is made from their docstrings and numbers: `make pages`.
"""
TITLES = {
    "pretrain": "For `troodon pretrain`",
    "distill": "For `troodon distill`",
    "curate": "For `troodon curate`",
}
WITHOUT_NUMBERS = ("auto",)  # of its own: it chooses for the images, the time and the device
URL = re.compile(r"https://[^\s),]+[^\s),.]")
OPTION = r"--[\w.-]+\w"
COMMAND = re.compile(
    rf"`[^`]+`|troodon (?:pretrain|distill|curate) [\w.]+(?: {OPTION}(?: (?!-)\S*[\w/])?)*|{OPTION}(?: [\d.]*\d)?"
)


def page() -> str:
    """docs/recipes.md."""
    parts = [HEAD]
    for verb, named in recipes.KNOWN.items():
        parts.append(f"## {TITLES[verb]}\n")
        if verb != "curate":
            parts.append(table({name: recipe for name, recipe in named.items() if has_numbers(name, recipe)}))
        parts += [f"### {name}\n\n{text(recipe)}\n" for name, recipe in named.items()]
    return "\n".join(parts)


def has_numbers(name: str, recipe: Callable) -> bool:
    return name not in WITHOUT_NUMBERS and not recipes.needs_start(recipe)


def table(named: dict) -> str:
    """The numbers of the recipes of networks, a line each."""
    rows = ["| recipe | parameters | crops, pixels | images a step | steps | images seen | rate | objective |"]
    rows.append("|---" * 8 + "|")
    for name, recipe in named.items():
        config = recipe()
        objective = " + ".join(f"{weight:g} {term}" for term, weight in config.objective.terms)
        seen = with_prefix(config.steps * config.batch).strip()
        cells = (f"`{name}`", parameters(config), crops(config), f"{config.batch:,}", f"{config.steps:,}", seen,
                 f"{config.schedules.lr.peak:g}", objective)  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def parameters(config: PretrainConfig) -> str:
    """Of the backbone."""
    wide, narrow, _ = grids(config)[0]
    return with_prefix(Cost(config, wide, narrow, "cpu", 4, 1, ()).parameters["backbone"]).strip()


def crops(config: PretrainConfig) -> str:
    """How many crops of which sides an image gives; of several sizes, one after another."""
    c = config.crops
    sides = sorted({(wide[0], narrow[0]) for wide, narrow, _ in c.sizes()})
    wide = ", then ".join(str(px) for px in dict.fromkeys(px for px, _ in sides))
    local = f" + {c.locals} x {', then '.join(str(px) for px in dict.fromkeys(px for _, px in sides))}"
    return f"{c.globals} x {wide}{local if c.locals else ''}"


def text(recipe: object) -> str:
    """A docstring as Markdown: its commands and names as code, its pages and sources as links."""
    found = inspect.getdoc(recipe) or ""
    found = re.sub(r"^(Command: .*[\w/])\n(?=[A-Z])", r"\1.\n", found, flags=re.MULTILINE)
    found = URL.sub(r"<\g<0>>", found)
    found = COMMAND.sub(lambda m: m[0] if m[0].startswith("`") else f"`{m[0]}`", found)
    return re.sub(r"docs/([\w-]+)\.md", r"[\1](\1.md)", found)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
