"""The verbs on images: `scan` and `pack`."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from troodon.config import Range, from_dict, to_dict
from troodon.images.config import PackConfig
from troodon.progress import Progress
from troodon.verbs.common import (
    Data,
    Paths,
    as_list,
    open_images,
    require_some,
    suggest_next,
)

if TYPE_CHECKING:
    pass


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
        with Progress("scan") as progress:
            return summarise(scan(index, threads, progress)[0])
    with Progress("scan") as progress:
        summary = scan_to(paths, Path(out), threads, progress, range)
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
    with Progress("pack") as progress:
        return pack(open_images(data), Path(out), config, threads, progress)


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
