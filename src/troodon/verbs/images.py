"""The verbs on images: `scan`, `pack`, `show_crops` and `embed`."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from troodon import recipes
from troodon.config import Range, UsageError, from_dict, nearest, to_dict
from troodon.images.config import PackConfig
from troodon.learn.config import PretrainConfig, fits
from troodon.verbs.common import (
    Data,
    Paths,
    as_backbone,
    as_list,
    common_range,
    open_images,
    progress_callback,
    require_some,
    resolve_config,
    suggest_next,
)
from troodon.verbs.plans import loader_of

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone


def scan(data: Data, out: str | Path | None = None, *, threads: int = 0, range: Range | None = None) -> dict:
    """Read every image once: formats, sizes, broken files with the reason, exact duplicates, label conflicts.

    Returns the summary. With `out`, it also writes an index there, which other verbs take as data, and an HTML page; a
    second scan reads only files that have changed. `range` gives the values of images of more than 8 bits that become
    black and white: two numbers, two for each channel, or percentiles of the values of all images, ("1%", "99%"). The
    index keeps it as numbers, for the verbs that take it as data.
    """
    from troodon.images.inventory import summarise
    from troodon.images.scan import scan, scan_to
    from troodon.images.sources import open_source
    from troodon.images.values import measured
    from troodon.report.page import report

    paths = as_list(data)
    if out is None:
        index = open_source(*paths)
        index = index.with_range(measured(index, range, threads))
        return summarise(scan(index, threads, progress_callback("scan"))[0])
    summary = scan_to(paths, Path(out), threads, progress_callback("scan"), range)
    if not (page := Path(out) / "report.html").exists():
        report([Path(out)], page)
    return summary


@dataclass(frozen=True)
class Scan:
    """An inventory of images: formats, sizes, broken files with the reason, exact duplicates. Changes no image."""

    data: Positional[Paths]
    """Folders, tars, zips, Parquet files, lists, paths inside them (x.tar/train), URLs, or images."""
    out: str | None = None
    """A folder for the index and a page with pictures; without it, nothing is written."""
    threads: int = 0
    """Threads that read images; 0 is one per processor."""
    range: Range | None = None
    """Values of images of more than 8 bits that become black and white, such as 0 4095, or two for each channel; or
    percentiles, such as 1% 99%, which are measured. By their type if left out. The index keeps the numbers."""
    json: bool = False
    """Print the summary as JSON."""

    def run(self) -> None:
        from troodon.images.inventory import format_summary

        summary = scan(require_some(self.data, "images to scan"), self.out, threads=self.threads, range=self.range)
        print(json.dumps(summary, indent=1) if self.json else format_summary(summary))
        if self.out:
            if not self.json:
                print(f"{'page':<11} {Path(self.out, 'report.html')}")
            if summary["ok"]:
                suggest_next(f"troodon pretrain small --data {shlex.quote(self.out)} --out runs/first")


def pack(data: Data, out: str | Path, *, settings: dict | None = None, threads: int = 0) -> dict:
    """Copy images into tar shards with an index, which other verbs take as data; the same call goes on.

    Images are copied byte for byte, unless `settings`, those of PackConfig, change them: {"side": 512}. Returns a
    summary.
    """
    from troodon.images.pack import pack

    config = from_dict(PackConfig(), settings or {}, source="settings")
    return pack(open_images(data), Path(out), config, threads, progress_callback("pack"))


@dataclass(frozen=True)
class Pack:
    """Images as tar shards with an index, byte for byte or made smaller; WebDataset reads them too."""

    data: Positional[Paths]
    """Images to pack: folders, tars, zips, Parquet files, lists, URLs, an index or a selection."""
    out: str
    """A new folder, which every --data takes."""
    threads: int = 0
    """Threads that read images; 0 is one per processor."""
    config: Annotated[PackConfig, arg(name="")] = PackConfig()

    def run(self) -> None:
        data = require_some(self.data, "images to pack")
        summary = pack(data, self.out, settings=to_dict(self.config), threads=self.threads)
        images, shards = (f"{summary[n]:,} {n[:-1] if summary[n] == 1 else n}" for n in ("images", "shards"))
        skipped = f"; {summary['left_out']:,} skipped: see left_out.json" if summary["left_out"] else ""
        print(f"{images} in {shards}, {summary['bytes'] / 1e6:,.1f} MB, read again and the same{skipped}")
        print(self.out)
        if summary["images"]:
            suggest_next(f"troodon pretrain small --data {shlex.quote(self.out)} --out runs/first")


def show_crops(recipe: str | PretrainConfig, data: Data, out: str | Path, *, images: int = 8, batch: int = 0) -> Path:
    """Draw the views that a network gets of some images, a row for each image: its crop boxes, and every view of it.

    The images are the first of batch number `batch` in a run of that recipe. Returns the picture's path, a PNG.
    """
    from troodon.views.sheet import draw_crops

    if images < 1 or batch < 0:
        raise UsageError(f"images {images}, batch {batch}: at least 1 image, and batches are numbered from 0")
    config = resolve_config(recipe, PretrainConfig(), recipes.pretrain)
    fits(config, 1)
    draw_crops(loader_of(config, open_images(data, config.range)), Path(out), batch, images)
    return Path(out)


@dataclass(frozen=True)
class ShowCrops:
    """A picture to check before training: images with their crops, as a recipe's network would get them."""

    recipe: Positional[str]
    """A recipe (see `troodon recipes`) or a YAML file."""
    data: Paths
    """Folders, tars, paths inside tars, an index or a selection."""
    out: str = "crops.png"
    """The picture."""
    images: int = 8
    """Images in the picture, a row for each."""
    at: int = 0
    """Number of the batch whose first images are shown."""
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
    range: Range | None = None,
) -> Path:
    """Write one vector per image: class tokens ("cls"), or these and mean patch tokens ("cls+mean").

    `compute` is the precision of products: "bf16", "fp32", or the faster on this machine ("auto"), which is measured
    once and then kept, also by a command that goes on. `compile` compiles the network first. `range` gives the values
    of images of more than 8 bits that become black and white, in place of the backbone's own. Returns the folder.
    """
    from troodon.curate.embed import embed as write_embeddings

    if tokens not in ("cls", "cls+mean"):
        raise nearest("tokens", tokens, ("cls", "cls+mean"))
    if batch < 1:
        raise UsageError(f"batch {batch}: must be 1 or more")
    backbone = as_backbone(backbone, range)
    index = open_images(data, common_range(range, backbone))
    faster = _optimized(backbone, Path(out), compute, compile)
    return write_embeddings(faster, index, Path(out), batch=batch, threads=threads, tokens=tokens)


def _optimized(backbone: "Backbone", out: Path, compute: str, compile: bool) -> "Backbone":
    """The backbone in this precision; for "auto" in that of the embeddings in `out`, finished or begun, if any are."""
    from troodon.curate.embed import parts_folder
    from troodon.run import read_manifest, write_bytes

    names, recorded = {"float32": "fp32", "bfloat16": "bf16"}, parts_folder(out) / "compute"
    if compute == "auto" and (manifest := read_manifest(out)) and manifest["kind"] == "embeddings":
        return backbone.optimized(names[manifest["settings"].get("compute", "float32")], compile=compile)
    if compute == "auto" and recorded.is_file() and recorded.read_text() in names:
        return backbone.optimized(names[recorded.read_text()], compile=compile)
    faster = backbone.optimized(compute, compile=compile)
    if compute == "auto" and not out.exists():
        write_bytes(recorded, str(faster.compute).removeprefix("torch.").encode())
    return faster


@dataclass(frozen=True)
class Embed:
    """One vector per image, by a backbone: embeddings.npy beside the list of images."""

    backbone: str
    """A run, a backbone folder, released weights (.pth), or a Hugging Face folder."""
    data: Paths
    """Folders, tars, paths inside tars, or images."""
    out: str
    """A new folder."""
    tokens: str = "cls"
    """cls: class tokens; cls+mean: these and mean patch tokens."""
    batch: int = 64
    """Images that go through the network together."""
    threads: int = 0
    """Threads that read images; 0 is one per processor."""
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of products; auto measures once which is faster here. Vectors stay the same to a hundredth."""
    range: Range | None = None
    """Values of images of more than 8 bits that become black and white, such as 0 4095; by the backbone's rule if left
    out."""
    compile: bool = False
    """Compile the network first (torch.compile): takes minutes, and pays off after hours."""

    def run(self) -> None:
        options = {"tokens": self.tokens, "batch": self.batch, "threads": self.threads, "range": self.range}
        print(embed(self.backbone, self.data, self.out, **options, compute=self.compute, compile=self.compile))
