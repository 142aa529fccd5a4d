"""Verbs on images alone: what is there, and one vector for each."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from troodon.config import UsageError, nearest
from troodon.verbs.common import Data, Images, opened, paths_of, progress, quoted, some, suggest

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone


def scan(data: Data, out: str | Path | None = None, *, threads: int = 0) -> dict:
    """Look at every image once: formats, sizes, broken files with the reason, exact duplicates, label conflicts.

    Returns the summary; with `out`, also writes an index artifact there, which other verbs take as data.
    """
    from troodon.data import scan as scanning
    from troodon.data.sources import open_source

    paths = paths_of(data)
    if out is not None:
        return scanning.scan_to(paths, Path(out), threads, progress("scan"))
    return scanning.summarise(scanning.scan(open_source(*paths), threads, progress("scan")))


@dataclass(frozen=True)
class Scan:
    """Inventory of images: formats, sizes, broken files with the reason, exact duplicates. Changes nothing."""

    data: Positional[Images]
    """Folders, tars, paths inside tars (x.tar/train), or images."""
    out: str | None = None
    """Where to write the index, a folder; nowhere if left out."""
    threads: int = 0
    """Threads that read; 0 is one per processor."""
    json: bool = False
    """Print the summary as JSON."""

    def run(self) -> None:
        from troodon.data.scan import render

        summary = scan(some(self.data, "images to scan"), self.out, threads=self.threads)
        print(json.dumps(summary, indent=1) if self.json else render(summary))
        if self.out:
            suggest(f"troodon pretrain small --data {quoted(self.out)} --out runs/first")


def embed(
    backbone: "str | Path | Backbone",
    data: Data,
    out: str | Path,
    *,
    tokens: str = "cls",
    batch: int = 64,
    threads: int = 0,
) -> Path:
    """Write one vector per image: class tokens ("cls"), or these and mean patch tokens ("cls+mean")."""
    from troodon.curate.embed import embed as embedding
    from troodon.data.sources import open_source

    if tokens not in ("cls", "cls+mean"):
        raise nearest("tokens", tokens, ("cls", "cls+mean"))
    if batch < 1:
        raise UsageError(f"batch {batch}: must be 1 or more")
    return embedding(
        opened(backbone), open_source(*paths_of(data)), Path(out), batch=batch, threads=threads, tokens=tokens
    )


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

    def run(self) -> None:
        print(embed(self.backbone, self.data, self.out, tokens=self.tokens, batch=self.batch, threads=self.threads))
