"""The verb `curate`: which of many images are worth training on; and how near copies lie, for one backbone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from troodon import recipes
from troodon.config import UsageError
from troodon.curate.config import CurateConfig, Space, Tokens
from troodon.verbs.common import Data, Images, configured, opened, paths_of, quoted, suggest

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone

TORCHSCRIPT = (".pt", ".torchscript")


def curate(
    recipe: str | CurateConfig,
    curated: Data | None,
    uncurated: Data,
    backbone: "str | Path | Backbone",
    out: str | Path,
    *,
    benchmark: Data | None = None,
    copies: "str | Path | Backbone | None" = None,
    engine: str = "local",
    workers: int = 0,
    settings: dict | None = None,
) -> Path:
    """Select from the uncurated images, without copies, those that resemble the curated ones; copies no image.

    Images that resemble one of `benchmark` are left out. `copies` finds copies in the backbone's place: another one, or
    a copy descriptor as a TorchScript file. `engine` is "local", with so many processes as `workers` (0: this one),
    "ray" or a Ray cluster's address. Without curated images (None) the recipe must gather without them.
    """
    from troodon.curate.engines import engine as named
    from troodon.curate.pipeline import NOTHING
    from troodon.curate.pipeline import curate as curating
    from troodon.images.sources import open_source

    config, does = configured(recipe, CurateConfig(), recipes.curate, settings), named(engine, workers)
    wanted, shown = (open_source(*paths_of(data)) if data else NOTHING for data in (curated, benchmark))
    pool = open_source(*paths_of(uncurated)).unlabelled()
    finds = None if copies is None else _finds_copies(copies)
    try:
        return curating(
            config, wanted, pool, opened(backbone), Path(out), benchmark=shown, copies=finds, engine=does
        )  # fmt: skip
    finally:
        does.close()


def calibrate(
    backbone: "str | Path | Backbone",
    data: Data,
    *,
    space: Space = "whitened",
    tokens: Tokens = "cls",
    pixels: bool = True,
    images: int = 250,
    false_merges: float = CurateConfig.false_merges,
    strength: float = 0.5,
    seed: int = 0,
) -> dict:
    """How near copies of these images lie by this backbone (and `pixels` beside it), and how near other images: see
    curate/calibrate.py.

    Returns the threshold, the share of attacked copies found by kind of attack, and a table of both for other rates of
    false merges. Nothing is written.
    """
    from troodon.curate.finder import Finder
    from troodon.curate.thresholds import measure
    from troodon.images.sources import open_source

    if not 0 < strength <= 1:
        raise UsageError(f"strength {strength}: it lies in (0, 1]; 0.25 is mild, 1 is strong")
    config = CurateConfig(
        duplicate_space=space, tokens=tokens, calibration_images=images, false_merges=false_merges, seed=seed
    )  # fmt: skip
    finder = Finder.of(_finds_copies(backbone), tokens, pixels)
    return measure(config, open_source(*paths_of(data)), finder, strength).as_dict()


def _finds_copies(backbone: Any) -> Any:
    """A backbone, or a copy descriptor in a TorchScript file."""
    if isinstance(backbone, str | Path) and Path(backbone).suffix in TORCHSCRIPT and Path(backbone).is_file():
        from troodon.curate.descriptor import Descriptor

        return Descriptor.load(Path(backbone))
    return opened(backbone)


@dataclass(frozen=True)
class Curate:
    """From a pool of images, without copies, those that resemble a curated set. Copies and deletes nothing."""

    recipe: Positional[str]
    """A recipe (see `troodon recipes`) or a YAML file."""
    uncurated: Images
    """The pool to choose from: folders, tars, paths inside tars."""
    backbone: str
    """What compares images: a run, a backbone folder, released weights (.pth), a Hugging Face folder."""
    out: str
    """A new folder: the selection, which `pretrain --data` takes."""
    curated: Images = ()
    """Images that are wanted; several sets are gathered for one by one. Without them, see --gather."""
    benchmark: Images = ()
    """Images that training must not see, nor anything like them."""
    copies: str | None = None
    """What finds copies, where not the backbone: another one, such as a run of copies_small, or a copy descriptor's
    TorchScript file (.pt)."""
    engine: str = "local"
    """Who works: local, ray (this machine, or the cluster it belongs to), or a cluster's address, ray://HOST:PORT."""
    workers: int = 0
    """local: processes; 0 is this one alone. They change how fast, not what."""
    config: Annotated[CurateConfig, arg(name="")] = CurateConfig()

    def run(self) -> None:
        out = curate(
            self.config, self.curated, self.uncurated, self.backbone, self.out,
            benchmark=self.benchmark, copies=self.copies, engine=self.engine, workers=self.workers,
        )  # fmt: skip
        summary = json.loads((out / "summary.json").read_text())
        for stage in summary["stages"]:
            print(f"{stage['name']:<10} {stage['in']:>9,} in {stage['dropped']:>9,} dropped {stage['out']:>9,} out")
        print(out)
        suggest(
            f"troodon pretrain small --data {quoted(self.out)} --out runs/first", f"troodon report {quoted(self.out)}"
        )


@dataclass(frozen=True)
class Calibrate:
    """Thresholds for near-duplicates: how near attacked copies of your images lie, and how near other images."""

    backbone: str
    """What compares images: a run, a backbone folder, released weights, or a copy descriptor's TorchScript (.pt)."""
    data: Images
    """Folders, tars, paths inside tars: images such as those to be curated."""
    space: Space = "whitened"
    """How embeddings are compared."""
    tokens: Tokens = "cls"
    """cls: class tokens; cls+mean: these and mean patch tokens."""
    pixels: bool = True
    """Look by 8 x 8 pixels as well, as curation does."""
    images: int = 250
    """Images to attack."""
    false_merges: float = CurateConfig.false_merges
    """How many other images, on average, one image may be wrongly taken for a copy of."""
    strength: float = 0.5
    """Of the attacks, up to 1."""
    seed: int = 0
    """Of what is drawn."""
    json: bool = False
    """Print all of it as JSON."""

    def run(self) -> None:
        found = calibrate(
            self.backbone, self.data, space=self.space, tokens=self.tokens, pixels=self.pixels, images=self.images,
            false_merges=self.false_merges, strength=self.strength, seed=self.seed,
        )  # fmt: skip
        if self.json:
            print(json.dumps(found, indent=1))
            return
        print(f"threshold {found['threshold']:.4f}, with {found['false_merges']:g} false merges an image")
        print(f"{'false merges':>13} {'threshold':>10} {'copies found':>13}")
        for row in found["table"]:
            print(f"{row['false_merges']:>13g} {row['threshold']:>10.4f} {row['recall']:>13.1%}")
        print(f"{found['copies']:,} copies of {found['images']:,} images, found by attack:")
        for name, share in sorted(found["recall"].items(), key=lambda item: -item[1]):
            print(f"  {name:<12} {share:7.1%}")
