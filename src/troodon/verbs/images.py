"""Verbs on images alone: what is there, and one vector for each."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from troodon import recipes
from troodon.config import UsageError, from_dict, nearest, to_dict
from troodon.images.config import PackConfig
from troodon.learn.config import PretrainConfig, fits
from troodon.verbs.common import Data, Images, configured, opened, paths_of, progress, quoted, some, suggest

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone


def scan(data: Data, out: str | Path | None = None, *, threads: int = 0) -> dict:
    """Look at every image once: formats, sizes, broken files with the reason, exact duplicates, label conflicts.

    Returns the summary; with `out`, also writes an index artifact there, which other verbs take as data, and a page
    to look at. Again, it reads only what has changed.
    """
    from troodon.images.inventory import summarise
    from troodon.images.scan import scan, scan_to
    from troodon.images.sources import open_source
    from troodon.report.page import report

    paths = paths_of(data)
    if out is None:
        return summarise(scan(open_source(*paths), threads, progress("scan"))[0])
    summary = scan_to(paths, Path(out), threads, progress("scan"))
    if not (page := Path(out) / "report.html").exists():
        report([Path(out)], page)
    return summary


@dataclass(frozen=True)
class Scan:
    """Inventory of images: formats, sizes, broken files with the reason, exact duplicates. Changes no image."""

    data: Positional[Images]
    """Folders, tars, zips, Parquet files, lists, paths inside them (x.tar/train), URLs, or images."""
    out: str | None = None
    """Where to write the index and a page with pictures, a folder; nowhere if left out."""
    threads: int = 0
    """Threads that read; 0 is one per processor."""
    json: bool = False
    """Print the summary as JSON."""

    def run(self) -> None:
        from troodon.images.inventory import render

        summary = scan(some(self.data, "images to scan"), self.out, threads=self.threads)
        print(json.dumps(summary, indent=1) if self.json else render(summary))
        if self.out:
            if not self.json:
                print(f"{'page':<11} {Path(self.out, 'report.html')}")
            suggest(f"troodon pretrain small --data {quoted(self.out)} --out runs/first")


def pack(data: Data, out: str | Path, *, settings: dict | None = None, threads: int = 0) -> dict:
    """Copy images into tar shards with an index, which other verbs take as data; the same call goes on.

    Byte for byte, unless `settings`, those of PackConfig, say otherwise: {"side": 512}. Returns a summary.
    """
    from troodon.images.pack import pack
    from troodon.images.sources import open_source

    config = from_dict(PackConfig(), settings or {}, source="settings")
    return pack(open_source(*paths_of(data)), Path(out), config, threads, progress("pack"))


@dataclass(frozen=True)
class Pack:
    """Images as tar shards with an index, byte for byte or made smaller; WebDataset reads them too."""

    data: Positional[Images]
    """What is to be packed: folders, tars, zips, Parquet files, lists, URLs, an index or a selection."""
    out: str
    """A new folder, which every --data takes."""
    threads: int = 0
    """Threads that read; 0 is one per processor."""
    config: Annotated[PackConfig, arg(name="")] = PackConfig()

    def run(self) -> None:
        summary = pack(some(self.data, "images to pack"), self.out, settings=to_dict(self.config), threads=self.threads)
        images, shards = (f"{summary[n]:,} {n[:-1] if summary[n] == 1 else n}" for n in ("images", "shards"))
        left = f"; {summary['left_out']:,} left out: see left_out.json" if summary["left_out"] else ""
        print(f"{images} in {shards}, {summary['bytes'] / 1e6:,.1f} MB, read again and the same{left}")
        print(self.out)
        suggest(f"troodon pretrain small --data {quoted(self.out)} --out runs/first")


def show_crops(recipe: str | PretrainConfig, data: Data, out: str | Path, *, images: int = 8, batch: int = 0) -> Path:
    """Draw what the network is shown of some images, a row each: the image with its boxes, and every view of it.

    The images are the first of batch number `batch` of a run of that recipe. Returns the picture's path, a PNG.
    """
    from troodon.images.sources import open_source
    from troodon.views.loader import Loader
    from troodon.views.sheet import draw

    if images < 1 or batch < 0:
        raise UsageError(f"images {images}, batch {batch}: at least 1 image, and batches are numbered from 0")
    config = configured(recipe, PretrainConfig(), recipes.pretrain)
    fits(config, 1)
    loader = Loader(
        open_source(*paths_of(data)), config.crops, config.photometric, config.masks, config.vit.patch, config.batch,
        config.seed, channels=config.vit.channels, weights=config.weights,
    )  # fmt: skip
    draw(loader, Path(out), batch, images)
    return Path(out)


@dataclass(frozen=True)
class ShowCrops:
    """The sheet to check before training: images with their crops, as a recipe's network would see them."""

    recipe: Positional[str]
    """A recipe (see `troodon recipes`) or a YAML file."""
    data: Images
    """Folders, tars, paths inside tars, an index or a selection."""
    out: str = "crops.png"
    """The picture."""
    images: int = 8
    """Rows of the sheet."""
    at: int = 0
    """Number of the batch whose first images are shown; another, for others."""
    config: Annotated[PretrainConfig, arg(name="")] = PretrainConfig()

    def run(self) -> None:
        print(show_crops(self.config, self.data, self.out, images=self.images, batch=self.at))


def embed(
    backbone: "str | Path | Backbone",
    data: Data,
    out: str | Path,
    *,
    tokens: str = "cls",
    batch: int = 64,
    threads: int = 0,
    compute: str = "auto",
    compile: bool = False,
) -> Path:
    """Write one vector per image: class tokens ("cls"), or these and mean patch tokens ("cls+mean").

    Products are made in "bf16" or "fp32", or in what is measured to be faster here ("auto").
    """
    from troodon.curate.embed import embed as embedding
    from troodon.images.sources import open_source

    if tokens not in ("cls", "cls+mean"):
        raise nearest("tokens", tokens, ("cls", "cls+mean"))
    if batch < 1:
        raise UsageError(f"batch {batch}: must be 1 or more")
    faster = opened(backbone).faster(compute, compile=compile)
    return embedding(faster, open_source(*paths_of(data)), Path(out), batch=batch, threads=threads, tokens=tokens)


@dataclass(frozen=True)
class Embed:
    """One vector per image, by a backbone: embeddings.npy beside the list of images."""

    backbone: str
    """A run, a backbone folder, released weights (.pth), or a Hugging Face folder."""
    data: Images
    """Folders, tars, paths inside tars, or images."""
    out: str
    """A new folder."""
    tokens: str = "cls"
    """cls: class tokens; cls+mean: these and mean patch tokens."""
    batch: int = 64
    """Images at once."""
    threads: int = 0
    """Threads that read; 0 is one per processor."""
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of products; auto is what is measured to be faster here. Vectors stay the same to a hundredth."""
    compile: bool = False
    """Compile the network first (torch.compile): minutes, for hours that follow."""

    def run(self) -> None:
        how = {"tokens": self.tokens, "batch": self.batch, "threads": self.threads}
        print(embed(self.backbone, self.data, self.out, **how, compute=self.compute, compile=self.compile))
