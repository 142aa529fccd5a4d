"""Verbs about the others: the report, the demo, the recipes, and what this machine can do."""

import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from troodon import recipes
from troodon.config import to_yaml
from troodon.verbs.common import Data, Images, paths_of, some
from troodon.verbs.evaluation import table


def report(paths: Data, out: str | Path, *, title: str | None = None) -> Path:
    """One HTML page, which opens without a network, of all artifacts in the given folders."""
    from troodon.report.page import report as reporting

    return reporting([Path(p) for p in paths_of(paths)], Path(out), title)


@dataclass(frozen=True)
class Report:
    """One HTML page, which opens without a network, of every artifact in the given folders."""

    paths: Positional[Images]
    """Runs, selections, scores, indexes, or folders of them."""
    out: str = "report.html"
    """The page."""
    title: str | None = None

    def run(self) -> None:
        print(report(some(self.paths, "artifacts to report on"), self.out, title=self.title))


@dataclass(frozen=True)
class Demo:
    """The whole system on an embedded world, in a few minutes: scan, curate, pretrain, distill, evaluate, report."""

    out: str
    """A folder; the same command goes on where it stopped."""
    steps: int | None = None
    """Steps of pretraining; fewer is faster and worse."""
    seed: int = 0
    """Of the world and of everything that is learnt from it."""

    def run(self) -> None:
        from troodon.demo import demo

        folder = demo(self.out, steps=self.steps, seed=self.seed)
        print(table(json.loads((folder / "scores.json").read_text())))
        print(folder / "report.html")


@dataclass(frozen=True)
class Recipes:
    """List the recipes; print one as YAML, to edit and to give in place of its name."""

    name: Positional[str | None] = None

    def run(self) -> None:
        if self.name is None:
            for verb, known in recipes.KNOWN.items():
                for name, recipe in known.items():
                    print(f"{verb:<9} {name:<14} {(recipe.__doc__ or '').strip().splitlines()[0]}")
        else:
            print(to_yaml(recipes.any_verb(self.name)), end="")


@dataclass(frozen=True)
class Doctor:
    """What this machine can do, and what is missing."""

    def run(self) -> None:
        from troodon.doctor import examine

        for line in examine():
            print(line)
