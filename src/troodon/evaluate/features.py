"""The only thing here that runs a backbone: once over the images, for every protocol that wants their features."""

import hashlib
import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from troodon import run
from troodon.config import UsageError, fingerprint
from troodon.data.decode import BadImage
from troodon.data.index import Index
from troodon.data.loader import stream

# Shape suffixes: N images, B images of a batch, L last blocks (oldest first), D channels.


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


def extract(
    backbone: Extractor, index: Index, *, blocks: int = 4, batch: int = 64, threads: int = 0, cache: Path | None = None
) -> FrozenFeatures:
    """Features of every readable image from the last `blocks` blocks, or all of them where there are fewer.

    Kept in the folder `cache` under the fingerprint of backbone, images and blocks, and read from there the next
    time. UsageError when no image can be read.
    """
    if hasattr(backbone, "config"):
        blocks = min(blocks, backbone.config.depth)
    path = None
    if cache is not None:
        path = cache / f"{fingerprint(backbone.fingerprint, images_fingerprint(index), blocks)}.npz"
        if (kept := _read(path, backbone.name)) is not None:
            return kept
    features = _extract(backbone, index, blocks, batch, threads)
    if path is not None:
        _write(path, features)
    return features


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


def _extract(backbone: Extractor, index: Index, blocks: int, batch: int, threads: int) -> FrozenFeatures:
    rows: list[int] = []
    cls: list[Tensor] = []
    means: list[Tensor] = []
    broken: dict[int, BadImage] = {}
    found = stream(index, batch, backbone.prepare, channels=backbone.channels, threads=threads, broken=broken)
    for rows_B, images in found:
        with torch.inference_mode():
            per_block = backbone.features(images, blocks=blocks).blocks
        rows += rows_B
        cls.append(torch.stack([c for c, _ in per_block], dim=1).float().cpu())
        means.append(torch.stack([m for _, m in per_block], dim=1).float().cpu())
    left_out = {index.path(row): str(broken[row]) for row in sorted(broken)}
    if not rows:
        why = next(iter(left_out.items()), ("", "there is none"))
        raise UsageError(f"none of the {len(index)} images can be read: {': '.join(w for w in why if w)}")
    assert len(rows) + len(broken) == len(index), "an image was lost without a word"
    if left_out:
        run.say(f"{len(left_out)} of {len(index)} images cannot be read and are left out: {', '.join(left_out)}"[:500])
    features = FrozenFeatures(
        backbone.name, torch.cat(cls).numpy(), torch.cat(means).numpy(), np.asarray(rows, np.int64), left_out
    )
    if not np.isfinite(features.cls_NLD).all():
        raise UsageError(f"{backbone.name}: its features are not finite numbers; this network is broken")
    return features


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
