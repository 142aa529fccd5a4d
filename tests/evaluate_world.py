"""A small labelled dataset on disk, and a fake backbone, for the tests of evaluation."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from troodon.evaluate.features import FrozenFeatures
from troodon.evaluate.sets.benchmark import Benchmark
from troodon.images.index import SCHEMA, Index

COLOURS = {"red": (200, 60, 60), "green": (60, 190, 70), "blue": (50, 80, 210), "grey": (128, 128, 128)}


def make_index(folder: Path, labels: Sequence[str | None], splits: Sequence[str | None] | None = None) -> Index:
    """One small noisy PNG per label, in the colour that the label names (other labels are grey)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, label in enumerate(labels):
        noise = np.random.default_rng(i).normal(0, 25, (24 + i % 3, 20, 3))
        pixels = np.clip(np.array(COLOURS.get(label or "", COLOURS["grey"])) + noise, 0, 255).astype(np.uint8)
        path = folder / f"{i:03d}.png"
        Image.fromarray(pixels).save(path)
        split = splits[i] if splits else None
        rows.append((path.name, str(path), 0, path.stat().st_size, label, split))
    return Index(pa.table([list(c) for c in zip(*rows, strict=True)], schema=SCHEMA))


class FakeBackbone:
    """A backbone of three blocks: the mean colour, with noise of the image that decreases from block to block."""

    channels = 3

    def __init__(self, name: str = "fake", fingerprint: str = "f1", sharpness: float = 1.0):
        self.name, self.fingerprint, self.sharpness = name, fingerprint, sharpness
        self.config = SimpleNamespace(depth=3)
        self.batches = 0

    def prepare(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        resized = [np.asarray(Image.fromarray(i).resize((16, 16))) for i in images]
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255.0

    def features(self, images: torch.Tensor, *, blocks: int = 1) -> SimpleNamespace:
        assert blocks <= 3, "more than three blocks requested"
        self.batches += 1
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).mean((-2, -1)).permute(0, 2, 3, 1) - 0.5
        noise = images[:, :, :3].flatten(1)[:, :3]
        mean = patches.mean((1, 2))
        cls = [self.sharpness * mean + noise * (3 - b) / 100 for b in range(1, 4)]
        per_block = [SimpleNamespace(cls=cls[b - 1], mean=mean + b) for b in range(1, 4)]
        return SimpleNamespace(cls=cls[-1], patches=patches, blocks=per_block[-blocks:])


def merge_splits(train: Index, val: Index, name: str) -> Benchmark:
    """A classification dataset with a train and val split."""
    index = Index(pa.concat_tables([train.table, val.table]))
    splits = pa.array(["train"] * len(train) + ["val"] * len(val), pa.string())
    return Benchmark(name, "label", Index(index.table.set_column(SCHEMA.get_field_index("split"), "split", splits)))


def make_features(cls_ND: np.ndarray, mean_ND: np.ndarray | None = None, blocks: int = 1) -> FrozenFeatures:
    """Features without a backbone. The channels are divided into `blocks` blocks."""
    n = len(cls_ND)
    mean_ND = np.zeros((n, 0)) if mean_ND is None else mean_ND
    mean_NLD = np.repeat(mean_ND.astype(np.float32)[:, None], blocks, 1)
    return FrozenFeatures("made", cls_ND.astype(np.float32).reshape(n, blocks, -1), mean_NLD, np.arange(n), {})
