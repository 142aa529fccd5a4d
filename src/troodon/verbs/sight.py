"""What the backbones of runs see in some of their images, for the page that watches; computed as they are saved."""

import contextlib
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from troodon.report.live import Column, Sight
from troodon.run import read_manifest

if TYPE_CHECKING:
    import numpy as np


IMAGES, POOL, NEAREST = 6, 160, 6  # images that are watched; among which neighbours are found; neighbours shown
COLUMNS = 6  # of one run, at most: its first backbone and the latest
BATCH = 8
BUDGET_S = 60.0  # a backbone may take; for slow ones, neighbours are found among fewer images
SIDE = 96  # pixels of a picture


class Eye:
    """Looks at the same images through each backbone of some runs, once it is there.

    `sight` is what there is to show, and `pictures` are PNGs by their addresses.
    """

    def __init__(self, runs: Sequence[Path], names: Sequence[str]):
        self.runs, self.names = list(runs), list(names)
        self.pictures: dict[str, bytes] = {}
        self.sight = Sight([], [], "No backbone is saved yet: the first checkpoint has one.")
        self.pixels: list[np.ndarray] = []  # of the pool; the images that are watched come first
        self.labels: list[str | None] = []
        self.captions: list[str] = []
        self.seen: dict[str, Column] = {}  # by the fingerprint of the backbone
        self.colours: list[np.ndarray] = []  # of the maps of the latest backbone
        self.latest = 0.0  # when it was saved
        self.failed: set[str] = set()
        self.quiet = False

    def look(self, ended: threading.Event) -> None:
        """Look through all backbones that are new, the latest first; forget those that are no longer shown."""
        for folder, name in self._wanted():
            digest = (read_manifest(folder) or {}).get("fingerprint")
            if digest and digest not in self.seen and digest not in self.failed and not ended.is_set():
                self._look_through(folder, name, digest)
                self._show()
        self._show()

    def _show(self) -> None:
        """Show what has been seen through the backbones that are there now."""
        wanted = [(read_manifest(folder) or {}).get("fingerprint") for folder, _ in reversed(self._wanted())]
        self.seen = {digest: self.seen[digest] for digest in wanted if digest in self.seen}
        if columns := list(self.seen.values()):
            images = [(self._picture(p), c) for p, c in zip(self.pixels[:IMAGES], self.captions)]
            self.sight = Sight(images, columns)
            shown = {address for address, _ in images} | {address for column in columns for address in column.maps}
            shown |= {one[0] for column in columns for found in column.nearest for one in found}
            self.pictures = {name: png for name, png in self.pictures.items() if f"picture/{name}" in shown}

    def _wanted(self) -> list[tuple[Path, str]]:
        """Backbones to look through, the latest first: of one run its first and latest, of several the last of each."""
        if len(self.runs) > 1:
            return [(run / "backbone", name) for run, name in zip(self.runs, self.names, strict=True)][::-1]
        run = self.runs[0]
        saved = sorted(p for p in (run / "checkpoints").glob("*") if p.name.isdigit() and (p / "backbone").is_dir())
        chosen = saved if len(saved) <= COLUMNS else [saved[0], *saved[1 - COLUMNS :]]
        named = [(folder / "backbone", f"step {int(folder.name):,}") for folder in chosen]
        return named[::-1] or [(run / "backbone", "the backbone of now")]

    def _look_through(self, folder: Path, name: str, digest: str) -> None:
        """Add what one backbone sees. What cannot be read now is left for the next look, or said."""
        try:
            if not self.sight.columns:
                self.sight = Sight([], [], f"Looking at some images through {name} ...")
            self._be_quiet()
            from troodon.model.weights import load_weights

            saved, backbone = folder.stat().st_mtime, load_weights(folder)
            if not self.pixels:
                self._read_images(backbone.channels)
            self.seen[digest] = self._column(backbone, name, saved)
        except FileNotFoundError:  # replaced by the next while it was read
            return
        except Exception as error:  # the page goes on without
            self.failed.add(digest)
            self.sight = Sight(self.sight.images, self.sight.columns, f"No pictures of {name}: {error}")

    def _be_quiet(self) -> None:
        """Leave the processors to the training."""
        if not self.quiet:
            import torch

            self.quiet = True
            torch.set_num_threads(1)
            with contextlib.suppress(AttributeError, OSError):
                os.nice(10)

    def _read_images(self, channels: int) -> None:
        """Read some images of the first run that knows them, spread evenly; those that are watched come first."""
        from troodon.evaluate.show.views import read_pictures, spread
        from troodon.images.index import Index

        tables = [run / "images.parquet" for run in self.runs if (run / "images.parquet").is_file()]
        if not tables:
            raise ValueError("the run keeps no list of its images")
        index: Index = Index.load(tables[0])
        pictures, _ = read_pictures(index, spread(len(index), POOL), channels)
        first = set(spread(len(pictures), IMAGES))
        order = [*sorted(first), *(i for i in range(len(pictures)) if i not in first)]
        if not order:
            raise ValueError("none of its images can be read now")
        chosen = [pictures[i] for i in order]
        self.captions = [picture.label or Path(picture.path).name for picture in chosen]
        self.labels = [picture.label for picture in chosen]
        self.pixels = [picture.pixels_HWC for picture in chosen]

    def _column(self, backbone, name: str, saved: float) -> Column:
        """The maps of the watched images, and the nearest of the pool by the cosine of class tokens."""
        import numpy as np

        from troodon.evaluate.components import patch_colours
        from troodon.search.exact import top_k

        start, cls, patches = time.monotonic(), [], []
        for first in range(0, len(self.pixels), BATCH):
            features = backbone.features(self.pixels[first : first + BATCH])
            cls.append(features.cls.float().numpy())
            patches += [*features.patches.float().numpy()][: max(0, IMAGES - first)]
            took = (time.monotonic() - start) / (first + BATCH)
            if first == 0 and took * len(self.pixels) > BUDGET_S:  # the same fewer images from now on
                self.pixels = self.pixels[: max(IMAGES, round(BUDGET_S / took))]
        cls_ND, count = np.concatenate(cls)[: len(self.pixels)], min(IMAGES, len(self.pixels))
        colours = self._aligned(patch_colours(patches).colours, saved)
        norm_ND = cls_ND / np.maximum(np.linalg.norm(cls_ND, axis=1, keepdims=True), 1e-12)
        scores, rows = top_k(norm_ND[:count], norm_ND, min(NEAREST + 1, len(norm_ND)))
        nearest, agree = [], []
        for query in range(count):
            found = [(int(r), float(s)) for r, s in zip(rows[query], scores[query]) if int(r) != query][:NEAREST]
            same = [
                None if None in (self.labels[query], self.labels[r]) else self.labels[query] == self.labels[r]
                for r, _ in found
            ]
            nearest.append(
                [(self._picture(self.pixels[r]), f"{s:.2f} {self.captions[r]}", k) for (r, s), k in zip(found, same)]
            )
            agree += same
        maps = [self._picture(hw3, enlarge=True) for hw3 in colours]
        others = [self._same(q, r) for q in range(count) for r in range(len(norm_ND)) if r != q]
        return Column(name, maps, nearest, *(_share([k for k in both if k is not None]) for both in (agree, others)))

    def _same(self, first: int, second: int) -> bool | None:
        """Whether two images are of one class; None where it is not known."""
        both = self.labels[first], self.labels[second]
        return None if None in both else both[0] == both[1]

    def _aligned(self, colours: "list[np.ndarray]", saved: float) -> "list[np.ndarray]":
        """The colours in the order and direction that are most like those of the latest backbone, so that they last."""
        import numpy as np

        now = np.concatenate([hw3.reshape(-1, 3) for hw3 in colours]).astype(np.float64)
        if self.colours:
            before = np.concatenate([hw3.reshape(-1, 3) for hw3 in self.colours]).astype(np.float64)
            if len(before) == len(now):
                both = np.nan_to_num(np.corrcoef(before.T, now.T)[:3, 3:])
                order = max(itertools.permutations(range(3)), key=lambda o: sum(abs(both[i, o[i]]) for i in range(3)))
                colours = [
                    np.stack([hw3[..., o] if both[i, o] >= 0 else 255 - hw3[..., o] for i, o in enumerate(order)], -1)
                    for hw3 in colours
                ]
        if saved >= self.latest:
            self.colours, self.latest = colours, saved
        return colours

    def _picture(self, pixels_HWC: "np.ndarray", enlarge: bool = False) -> str:
        """The address of a small picture."""
        import io

        from PIL import Image

        from troodon.images.decode import to_rgb

        image = Image.fromarray(pixels_HWC if enlarge else to_rgb(pixels_HWC))
        if enlarge:
            image = image.resize((2 * SIDE, round(2 * SIDE * image.height / image.width)), Image.Resampling.NEAREST)
        else:
            image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        image.save(out, "PNG")
        address = hashlib.sha256(out.getvalue()).hexdigest()[:16]
        self.pictures[address] = out.getvalue()
        return f"picture/{address}"


def _share(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None
