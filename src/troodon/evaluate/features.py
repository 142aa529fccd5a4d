"""The only thing here that runs a backbone: once over the images, for every protocol that wants their features.

`extract` gives class tokens and mean patches of whole images; maps.py, through `in_parts`, the patches of windows. Both
work on one part of the images after another. A part is kept in the cache as soon as it is done, so what was interrupted
goes on where it stopped; and several ranks each do some of the parts, so that no image is done, or counted, twice.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from troodon import dist, run
from troodon.config import UsageError, fingerprint
from troodon.evaluate.results import versions
from troodon.images.decode import BadImage
from troodon.images.index import Index
from troodon.images.reading import stream

# Shape suffixes: N images, B images of a batch, L last blocks (oldest first), D channels.

T = TypeVar("T")
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

PART = 4096  # images


class Extractor(Protocol):
    """What a backbone, or anything that stands in for one, must have. `features` returns `.blocks`."""

    @property
    def name(self) -> str: ...

    @property
    def channels(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor: ...

    def features(self, images: Tensor, *, blocks: int = 1) -> Any: ...


@dataclass(frozen=True)
class FrozenFeatures:
    """Features of the images that could be read: row i of the arrays is row `rows[i]` of the index.

    float32, not 16: an untrained network tells images apart only by the last digits of its class token.
    """

    backbone: str
    cls_NLD: np.ndarray  # class token of each of the last blocks, after the last norm
    mean_NLD: np.ndarray  # mean patch token likewise; D is 0 where there are no patches
    rows: np.ndarray  # (N,) int64
    left_out: dict[str, str]  # path -> why it could not be read

    @property
    def final_ND(self) -> np.ndarray:
        """The class token after the last norm."""
        return self.cls_NLD[:, -1]

    def take(self, places: np.ndarray) -> "FrozenFeatures":
        """The features at these places; `left_out` stays with the whole."""
        return FrozenFeatures(self.backbone, self.cls_NLD[places], self.mean_NLD[places], self.rows[places], {})


@dataclass(frozen=True)
class Reader:
    """How images are read, and where features are kept."""

    batch: int = 64
    threads: int = 0
    cache: Path | None = None
    shared: bool = False  # whether all ranks ask for the same features at the same time, and each do a part
    kept: dict[str, FrozenFeatures] = field(default_factory=dict, repr=False)  # those that were asked for before

    def images(
        self, backbone: Extractor, index: Index, rows: range, broken: dict[int, BadImage]
    ) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """The images that can be read among these rows, a batch at a time; of the others, why they cannot."""
        wrong: dict[int, BadImage] = {}
        part = index.take(rows)
        kept: Callable[[Sequence[np.ndarray]], Any] = list
        found = stream(part, self.batch, kept, channels=backbone.channels, threads=self.threads, broken=wrong)
        for rows_B, images in found:
            yield [rows[i] for i in rows_B], list(images)  # pyrefly: ignore[invalid-yield]
        broken.update({rows[i]: error for i, error in wrong.items()})


def extract(
    backbone: Extractor,
    index: Index,
    *,
    blocks: int = 4,
    boxes: dict[int, Box] | None = None,
    reader: Reader | None = None,
) -> FrozenFeatures:
    """Features of every readable image from the last `blocks` blocks, or all of them where there are fewer.

    Of rows in `boxes` only that part of the image is looked at. UsageError when no image can be read.
    """
    reader = reader or Reader()
    if hasattr(backbone, "config"):
        blocks = min(blocks, backbone.config.depth)
    boxes = boxes or {}
    cut = [sorted(boxes.items())] if boxes else []
    key = kept_as(backbone, index, blocks, *cut)
    if key in reader.kept:
        return reader.kept[key]
    parts = in_parts(
        index, PART, key, reader,
        make=lambda rows: _extract(backbone, index, rows, blocks, boxes, reader),
        write=_write, read=lambda path: _read(path, backbone.name),
    )  # fmt: skip
    left_out = {path: why for part in parts for path, why in part.left_out.items()}
    cls, mean, rows = (np.concatenate([getattr(p, name) for p in parts]) for name in ("cls_NLD", "mean_NLD", "rows"))
    told(left_out, len(rows), len(index))
    return reader.kept.setdefault(key, FrozenFeatures(backbone.name, cls, mean, rows, left_out))


def kept_as(backbone: Extractor, index: Index, *what: Any) -> str:
    """The name of features in the cache: of who gives them, in which precision, by which versions, of which images."""
    computed = str(getattr(backbone, "compute", torch.float32))  # products in bf16 give features of their own
    return fingerprint(backbone.fingerprint, images_fingerprint(index), computed, versions(), *what)


def in_parts(
    index: Index,
    size: int,
    key: str,
    reader: Reader,
    *,
    make: Callable[[range], T],
    write: Callable[[Path, T], None],
    read: Callable[[Path], T | None],
) -> list[T]:
    """What `make` says of each part of the rows, in order; kept in the cache, and made by all ranks together.

    A mistake that one rank finds is raised on all of them.
    """
    parts = [range(start, min(start + size, len(index))) for start in range(0, len(index), size)] or [range(0)]
    paths = [reader.cache / f"{key}-{i}.npz" if reader.cache else None for i in range(len(parts))]
    rank, ranks = (dist.rank(), dist.world()) if reader.shared else (0, 1)
    made: dict[int, T] = {}
    wrong = ""
    try:
        for i in range(rank, len(parts), ranks):
            path = paths[i]
            if (found := read(path) if path else None) is None:
                found = make(parts[i])
                if path:
                    write(path, found)
            made[i] = found
    except UsageError as error:
        wrong = str(error)
    if ranks > 1:
        said = dist.gather_objects(wrong if wrong or reader.cache else made)
        wrong = next((s for s in said if isinstance(s, str) and s), "")
        if not reader.cache and not wrong:
            made = {i: part for some in said for i, part in some.items()}
    if wrong:
        raise UsageError(wrong)
    for i, path in enumerate(paths):
        if i not in made:
            found = read(path) if path else None
            assert found is not None, f"part {i} that another rank wrote cannot be read: is {path} on a shared disk?"
            made[i] = found
    return [made[i] for i in range(len(parts))]


def told(left_out: dict[str, str], found: int, images: int) -> None:
    """Say which images could not be read; UsageError where none could."""
    if not found:
        why = next(iter(left_out.items()), ("", "there is none"))
        raise UsageError(f"none of the {images} images can be read: {': '.join(w for w in why if w)}")
    if left_out:
        run.say(f"{len(left_out)} of {images} images cannot be read and are left out: {', '.join(left_out)}"[:500])


def same_images(index: Index, *columns: str) -> str:
    """A name for images called so, as long and with these columns, wherever they lie: what scores are compared by."""
    return fingerprint([index.column(name) for name in ("path", "length", *columns)])


def images_fingerprint(index: Index, *columns: str) -> str:
    """A name for these images, and these columns besides, in this order, that changes when one of their files does."""
    digest = hashlib.sha256()
    for name in ("path", "container", "offset", "length", *columns):
        digest.update("\0".join(map(str, index.column(name))).encode())
    for container in sorted(set(index.column("container"))):
        try:
            found = os.stat(container)
            digest.update(f"\0{container}\0{found.st_size}\0{found.st_mtime_ns}".encode())
        except OSError:
            digest.update(f"\0{container}\0gone".encode())
    return digest.hexdigest()[:16]


def finite(backbone: Extractor, x: np.ndarray) -> None:
    if not np.isfinite(x).all():
        raise UsageError(f"{backbone.name}: its features are not finite numbers; this network is broken")


def _extract(
    backbone: Extractor, index: Index, part: range, blocks: int, boxes: dict[int, Box], reader: Reader
) -> FrozenFeatures:
    rows: list[int] = []
    cls: list[Tensor] = []
    means: list[Tensor] = []
    broken: dict[int, BadImage] = {}
    for rows_B, images in reader.images(backbone, index, part, broken):
        images = [_cut(image, boxes.get(row)) for row, image in zip(rows_B, images)]
        with torch.inference_mode():
            per_block = backbone.features(backbone.prepare(images), blocks=blocks).blocks
        rows += rows_B
        cls.append(torch.stack([c for c, _ in per_block], dim=1).float().cpu())
        means.append(torch.stack([m for _, m in per_block], dim=1).float().cpu())
    left_out = {index.path(row): str(broken[row]) for row in sorted(broken)}
    assert len(rows) + len(broken) == len(part), "an image was lost without a word"
    if not rows:
        return FrozenFeatures(backbone.name, *_nothing(backbone, blocks), np.zeros(0, np.int64), left_out)
    features = FrozenFeatures(
        backbone.name, torch.cat(cls).numpy(), torch.cat(means).numpy(), np.asarray(rows, np.int64), left_out
    )
    finite(backbone, features.cls_NLD)
    return features


def _nothing(backbone: Extractor, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of no image, as wide as of one."""
    with torch.inference_mode():
        grey = backbone.prepare([np.zeros((32, 32, backbone.channels), np.uint8)])
        per_block = backbone.features(grey, blocks=blocks).blocks
    cls, mean = (torch.stack([b[i] for b in per_block], 1)[:0].float().cpu().numpy() for i in (0, 1))
    return cls, mean


def _cut(image_HWC: np.ndarray, box: Box | None) -> np.ndarray:
    if box is None:
        return image_HWC
    left, top, right, bottom = (max(0, round(edge)) for edge in box)
    cut = image_HWC[top:bottom, left:right]
    return cut if cut.size else image_HWC


def _write(path: Path, features: FrozenFeatures) -> None:
    data = io.BytesIO()
    why = np.asarray(list(features.left_out.items()), dtype=str).reshape(-1, 2)
    np.savez(data, cls=features.cls_NLD, mean=features.mean_NLD, rows=features.rows, left_out=why)
    run.write_bytes(path, data.getvalue())


def _read(path: Path, name: str) -> FrozenFeatures | None:
    """What was kept; None where there is nothing, or nothing whole."""
    try:
        with open(path, "rb") as file, np.load(file) as kept:
            left_out = {str(p): str(reason) for p, reason in kept["left_out"]}
            return FrozenFeatures(name, kept["cls"], kept["mean"], kept["rows"], left_out)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
