"""The verb `report`, and the command `recipes`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from troodon import recipes
from troodon.config import to_yaml
from troodon.verbs.common import Data, Paths, as_list, require_some


def report(paths: Data, out: str | Path, *, title: str | None = None) -> Path:
    """Write one HTML page, which opens without a network, about all artifacts in the given folders.

    `out` is the page, or a folder that gets a report.html. Returns the page's path.
    """
    from troodon.report.page import report as write_report

    return write_report([Path(p) for p in as_list(paths)], Path(out), title)


@dataclass(frozen=True)
class Report:
    """One HTML page, which opens without a network, about every artifact in the given folders."""

    paths: Positional[Paths]
    """Runs, selections, scores, indexes, or folders of them."""
    out: str = "report.html"
    """The page."""
    title: str | None = None

    def run(self) -> None:
        print(report(require_some(self.paths, "artifacts to report on"), self.out, title=self.title))


@dataclass(frozen=True)
class Recipes:
    """List the recipes; print one as YAML, to edit and to pass instead of its name."""

    name: Positional[str | None] = None

    def run(self) -> None:
        if self.name is None:
            for verb, known in recipes.KNOWN.items():
                for name, recipe in known.items():
                    print(f"{verb:<9} {name:<14} {(recipe.__doc__ or '').strip().splitlines()[0]}")
        else:
            print(to_yaml(recipes.any_verb(self.name)), end="")
