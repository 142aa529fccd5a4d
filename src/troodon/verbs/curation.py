"""The verb `curate`: which of many images are worth training on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from troodon import recipes
from troodon.curate.config import CurateConfig
from troodon.verbs.common import Data, Images, configured, opened, paths_of, quoted, suggest

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone


def curate(
    recipe: str | CurateConfig,
    curated: Data,
    uncurated: Data,
    backbone: "str | Path | Backbone",
    out: str | Path,
    *,
    settings: dict | None = None,
) -> Path:
    """Select from the uncurated images, without copies, those that resemble the curated ones; copies no image."""
    from troodon.curate.pipeline import curate as curating
    from troodon.data.sources import open_source

    config = configured(recipe, CurateConfig(), recipes.curate, settings)
    pool = open_source(*paths_of(uncurated)).unlabelled()
    return curating(config, open_source(*paths_of(curated)), pool, opened(backbone), Path(out))


@dataclass(frozen=True)
class Curate:
    """From a pool of images, without copies, those that resemble a curated set. Copies and deletes nothing."""

    recipe: Positional[str]
    """A recipe (see `troodon recipes`) or a YAML file."""
    curated: Images
    """Images that are wanted: folders, tars, paths inside tars."""
    uncurated: Images
    """The pool to choose from."""
    backbone: str
    """What compares images: a run, a backbone folder, released weights (.pth), a Hugging Face folder."""
    out: str
    """A new folder: the selection, which `pretrain --data` takes."""
    config: Annotated[CurateConfig, arg(name="")] = CurateConfig()

    def run(self) -> None:
        out = curate(self.config, self.curated, self.uncurated, self.backbone, self.out)
        summary = json.loads((out / "summary.json").read_text())
        for stage in summary["stages"]:
            print(f"{stage['name']:<10} {stage['in']:>9,} in {stage['dropped']:>9,} dropped {stage['out']:>9,} out")
        print(out)
        suggest(
            f"troodon pretrain small --data {quoted(self.out)} --out runs/first", f"troodon report {quoted(self.out)}"
        )
