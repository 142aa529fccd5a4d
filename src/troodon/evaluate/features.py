"""Feature extraction: the backbone runs once over the images for all protocols that need their features.

`extract` returns class tokens and mean patch tokens of whole images. feature_maps.py returns the patch tokens of
windows, through `compute_in_parts`. Both process the images in parts. A part is cached as soon as it is complete, so an
interrupted extraction resumes where it stopped. Each of several ranks computes some of the parts, so that no image is
computed or counted twice.
"""

import hashlib
import io
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
from troodon.images.changes import file_states
from troodon.images.decode import BadImage
from troodon.images.index import Index
from troodon.images.reading import listed, read_batches
from troodon.model.preprocess import joined
from troodon.progress import Progress

# Shape suffixes: N images, B images of a batch, L last blocks (oldest first), D channels.

T = TypeVar("T")
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

PART_SIZE = 4096  # images


class Extractor(Protocol):
    """The interface of a backbone or a baseline descriptor. Each of its `features().blocks` has `.cls` and `.mean`."""

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
    """Features of the readable images: row i of the arrays is row `rows[i]` of the index.

    float32, not float16: the class tokens of an untrained network differ only in the last digits.
    """

    backbone: str
    cls_NLD: np.ndarray  # class token of each of the last blocks, after the last norm
    mean_NLD: np.ndarray  # mean patch token of the same blocks; D is 0 without patches
    rows: np.ndarray  # (N,) int64
    unreadable: dict[str, str]  # path -> reason
    device: Any = None  # of the network; None for what has none

    @property
    def final_ND(self) -> np.ndarray:
        """The class token after the last norm."""
        return self.cls_NLD[:, -1]


@dataclass(frozen=True)
class Reader:
    """Reads the images of an extraction; holds its batch size and its caches."""

    batch: int = 64
    threads: int = 0
    cache: Path | None = None
    shared: bool = False  # all ranks extract the same features at the same time, and each computes some parts
    task: str = ""  # what its progress is called; "" shows none
    in_memory: dict[str, FrozenFeatures] = field(default_factory=dict, repr=False)  # by cache key
    set_aside: dict[str, str] = field(default_factory=dict, repr=False)  # path of an image or its ground truth: reason

    def images(
        self, backbone: Extractor, index: Index, rows: range, broken: dict[int, BadImage]
    ) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """Yield (rows, images) of the readable images in batches; add the errors of the others to `broken`."""
        return self.prepared(backbone, index, rows, broken, list, listed)

    def prepared(
        self,
        backbone: Extractor,
        index: Index,
        rows: range,
        broken: dict[int, BadImage],
        prepare: Callable[[list[np.ndarray]], Any],
        join: Callable[[list[Any]], Any],
    ) -> Iterator[tuple[list[int], Any]]:
        """As `images`, with what threads make of the images by `prepare` and `join`; see `read_batches`."""
        errors: dict[int, BadImage] = {}
        part, options = index.take(rows), {"channels": backbone.channels, "threads": self.threads, "broken": errors}
        with Progress(f"{self.task} of {backbone.name}", "images", len(index)) as progress:
            for rows_B, batch in read_batches(part, self.batch, prepare, join=join, **options):
                yield [rows[i] for i in rows_B], batch
                if self.task and dist.rank() == 0:
                    progress(rows[max(rows_B)] + 1, len(index))
        broken.update({rows[i]: error for i, error in errors.items()})


def extract(
    backbone: Extractor,
    index: Index,
    *,
    blocks: int = 4,
    boxes: dict[int, Box] | None = None,
    reader: Reader | None = None,
) -> FrozenFeatures:
    """Extract features of every readable image from the last `blocks` blocks, or from all blocks if there are fewer.

    Images of the rows in `boxes` are cropped to their box. Raises UsageError if no image can be read.
    """
    reader = reader or Reader()
    if hasattr(backbone, "config"):
        blocks = min(blocks, backbone.config.depth)
    boxes = boxes or {}
    box_settings = [sorted(boxes.items())] if boxes else []
    key = cache_key(backbone, index, blocks, *box_settings)
    if key in reader.in_memory:
        return reader.in_memory[key]
    parts = compute_in_parts(
        index, PART_SIZE, key, reader,
        make=lambda rows: _extract(backbone, index, rows, blocks, boxes, reader),
        write=_write, read=lambda path: _read(path, backbone.name),
    )  # fmt: skip
    unreadable = {path: why for part in parts for path, why in part.unreadable.items()}
    cls, mean, rows = (np.concatenate([getattr(p, name) for p in parts]) for name in ("cls_NLD", "mean_NLD", "rows"))
    report_unreadable(unreadable, len(rows), len(index), reader)
    device = getattr(backbone, "device", None)
    return reader.in_memory.setdefault(key, FrozenFeatures(backbone.name, cls, mean, rows, unreadable, device))


def cache_key(backbone: Extractor, index: Index, *settings: Any) -> str:
    """The cache key of features: backbone, image files, compute dtype, package versions and extraction settings."""
    computed = str(getattr(backbone, "compute", torch.float32))  # bf16 products give different features
    return fingerprint(backbone.fingerprint, files_fingerprint(index), computed, versions(), *settings)


def compute_in_parts(
    index: Index,
    size: int,
    key: str,
    reader: Reader,
    *,
    make: Callable[[range], T],
    write: Callable[[Path, T], None],
    read: Callable[[Path], T | None],
) -> list[T]:
    """Compute `make` for each part of `size` rows, and return the results in order.

    Parts are read from the cache if they are there, and written to it otherwise. Ranks divide the parts among them. A
    UsageError of one rank is raised on all ranks.
    """
    parts = [range(start, min(start + size, len(index))) for start in range(0, len(index), size)] or [range(0)]
    paths = [reader.cache / f"{key}-{i}.npz" if reader.cache else None for i in range(len(parts))]
    rank, ranks = (dist.rank(), dist.world_size()) if reader.shared else (0, 1)
    results: dict[int, T] = {}
    message = ""
    try:
        for i in range(rank, len(parts), ranks):
            path = paths[i]
            if (result := read(path) if path else None) is None:
                result = make(parts[i])
                if path:
                    write(path, result)
            results[i] = result
    except UsageError as error:
        message = str(error)
    if ranks > 1:
        gathered = dist.all_gather_objects(message if message or reader.cache else results)
        message = next((s for s in gathered if isinstance(s, str) and s), "")
        if not reader.cache and not message:
            results = {i: part for computed in gathered for i, part in computed.items()}
    if message:
        raise UsageError(message)
    for i, path in enumerate(paths):
        if i not in results:
            result = read(path) if path else None
            assert result is not None, f"part {i}, written by another rank, cannot be read: is {path} on a shared disk?"
            results[i] = result
    return [results[i] for i in range(len(parts))]


def report_unreadable(unreadable: dict[str, str], readable: int, images: int, reader: Reader) -> None:
    """Report the images that cannot be read, once for all backbones. Raises UsageError if none of them can."""
    if not readable:
        first = next(iter(unreadable.items()), ("", "there is none"))
        raise UsageError(f"none of the {images} images can be read: {': '.join(word for word in first if word)}")
    if new := [path for path in unreadable if path not in reader.set_aside]:
        run.say(f"{len(new)} of {images} images cannot be read and are skipped: {', '.join(new)}"[:500])
    reader.set_aside.update({path: reason.partition(":")[0] for path, reason in unreadable.items()})


def dataset_fingerprint(index: Index, *columns: str) -> str:
    """Fingerprint of paths, lengths and these columns, wherever the files are. Comparable scores share it."""
    return fingerprint([index.column(name) for name in ("path", "length", *columns)])


def files_fingerprint(index: Index, *columns: str) -> str:
    """Fingerprint of the images, their order and these columns. It changes when one of the files changes."""
    digest = hashlib.sha256(str(index.range).encode() if index.range else b"")
    for name in ("path", "container", "offset", "length", *columns):
        digest.update("\0".join(map(str, index.column(name))).encode())
    for container, state in file_states(index).items():
        digest.update(f"\0{container}\0{state}".encode())
    return digest.hexdigest()[:16]


def check_finite(backbone: Extractor, x: np.ndarray) -> None:
    if not np.isfinite(x).all():
        raise UsageError(f"{backbone.name}: its features are not finite; this network is broken")


def _extract(
    backbone: Extractor, index: Index, part: range, blocks: int, boxes: dict[int, Box], reader: Reader
) -> FrozenFeatures:
    rows: list[int] = []
    cls: list[Tensor] = []
    means: list[Tensor] = []
    broken: dict[int, BadImage] = {}
    device = getattr(backbone, "device", None)
    boxed = _BoxedIndex(**vars(index), boxes=boxes) if boxes else index
    batches = reader.prepared(backbone, boxed, part, broken, backbone.prepare, lambda parts: joined(parts, device))
    for rows_B, x_BCHW in batches:
        with torch.inference_mode():
            per_block = backbone.features(x_BCHW, blocks=blocks).blocks
        rows += rows_B
        cls.append(torch.stack([block.cls for block in per_block], dim=1).float().cpu())
        means.append(torch.stack([block.mean for block in per_block], dim=1).float().cpu())
    unreadable = {index.path(row): str(broken[row]) for row in sorted(broken)}
    assert len(rows) + len(broken) == len(part), "an image is neither read nor reported as broken"
    if not rows:
        return FrozenFeatures(backbone.name, *_empty_features(backbone, blocks), np.zeros(0, np.int64), unreadable)
    features = FrozenFeatures(
        backbone.name, torch.cat(cls).numpy(), torch.cat(means).numpy(), np.asarray(rows, np.int64), unreadable
    )
    check_finite(backbone, features.cls_NLD)
    return features


def _empty_features(backbone: Extractor, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of zero images, with the right number of channels."""
    with torch.inference_mode():
        grey = backbone.prepare([np.zeros((32, 32, backbone.channels), np.uint8)])
        per_block = backbone.features(grey, blocks=blocks).blocks
    both = [block.cls for block in per_block], [block.mean for block in per_block]
    cls, mean = (torch.stack(tokens, 1)[:0].float().cpu().numpy() for tokens in both)
    return cls, mean


@dataclass(frozen=True)
class _BoxedIndex(Index):
    """An index of images that are cropped to their box, where they have one."""

    boxes: dict[int, Box] = field(default_factory=dict)  # by row

    def take(self, rows: Sequence[int] | np.ndarray) -> "_BoxedIndex":
        boxes = {i: self.boxes[row] for i, row in enumerate(rows) if row in self.boxes}
        return _BoxedIndex(**vars(super().take(rows)) | {"boxes": boxes})

    def decode(self, row: int, channels: int | None = 3, reduction: Any = None) -> np.ndarray:
        image_HWC = super().decode(row, channels, reduction)
        return _crop(image_HWC, self.boxes[row]) if row in self.boxes else image_HWC


def _crop(image_HWC: np.ndarray, box: Box) -> np.ndarray:
    left, top, right, bottom = (max(0, round(edge)) for edge in box)
    cropped_HWC = image_HWC[top:bottom, left:right]
    return cropped_HWC if cropped_HWC.size else image_HWC


def _write(path: Path, features: FrozenFeatures) -> None:
    data = io.BytesIO()
    unreadable = np.asarray(list(features.unreadable.items()), dtype=str).reshape(-1, 2)
    np.savez(data, cls=features.cls_NLD, mean=features.mean_NLD, rows=features.rows, left_out=unreadable)
    run.write_bytes(path, data.getvalue())


def _read(path: Path, name: str) -> FrozenFeatures | None:
    """The cached features; None if the file is missing or damaged."""
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            unreadable = {str(p): str(reason) for p, reason in arrays["left_out"]}
            return FrozenFeatures(name, arrays["cls"], arrays["mean"], arrays["rows"], unreadable)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
