"""Which images teach and which test: the data's own split, or a seeded share of every class."""

import numpy as np
import pyarrow.compute as pc

from troodon.config import UsageError
from troodon.images.index import Index

# Shape suffixes: N images.

SHARE = 0.2  # of each class that tests, where the data has no split of its own


def split(index: Index, seed: int) -> tuple[Index, Index]:
    """Training and validation images of labelled data; images without a label are left out.

    The data's own "train" and "val" (or, without one, "test"); else a seeded, stratified 80 and 20 %.
    UsageError when there are no labels, or too few images.
    """
    index = labelled(index)
    if own := _own_split(index):
        splits = np.asarray(index.column("split"), dtype=object)
        return index.take(np.flatnonzero(splits == "train")), index.take(np.flatnonzero(splits == own))
    val_N = stratified(np.unique(index.column("label"), return_inverse=True)[1], SHARE, seed)
    if not val_N.any():
        raise UsageError(f"all {len(index)} labelled images are the only one of their class: none is left to test on")
    return index.take(np.flatnonzero(~val_N)), index.take(np.flatnonzero(val_N))


def by_split(index: Index, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows to learn from and to test on of images with any truth, and how they were divided, in words.

    The data's own "train" and "val" (or "test"); else a seeded 80 and 20 %. UsageError for fewer than two images.
    """
    if own := _own_split(index):
        splits = np.asarray(index.column("split"), dtype=object)
        return np.flatnonzero(splits == "train"), np.flatnonzero(splits == own), f"train and {own}, as the data says"
    if len(index) < 2:
        raise UsageError(f"{len(index)} images: two are needed, one to learn from and one to test on")
    rows = np.random.default_rng(seed).permutation(len(index))
    tests = max(1, round(SHARE * len(index)))
    said = f"{1 - SHARE:.0%} and {SHARE:.0%}, at random (seed {seed})"
    return np.sort(rows[tests:]), np.sort(rows[:tests]), said


def how_split(index: Index, seed: int) -> str:
    """What `split` does with this index, in words for the settings of a score."""
    if own := _own_split(labelled(index)):
        return f"train and {own}, as the data says"
    return f"{1 - SHARE:.0%} and {SHARE:.0%} of each class, at random (seed {seed})"


def labelled(index: Index) -> Index:
    """The images that have a label. UsageError, saying how labels are found, when none has."""
    known = np.asarray(pc.is_valid(index.table["label"]))
    if not known.any():
        raise UsageError(
            f"none of the {len(index)} images has a label: put the images of each class in a folder of its name, "
            "or add a labels.csv with the columns path and label"
        )
    return index if known.all() else index.take(np.flatnonzero(known))


def stratified(labels_N: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A mask of about `share` of each class: at least one image and never all; none of a class of one."""
    mask_N = np.zeros(len(labels_N), dtype=bool)
    random = np.random.default_rng(seed)
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        if len(rows) > 1:
            mask_N[random.permutation(rows)[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    return mask_N


def few_shot(labels_N: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Sorted rows of `per_class` random images of each class, or of all it has where it has fewer."""
    random = np.random.default_rng(seed)
    rows = [random.permutation(np.flatnonzero(labels_N == label))[:per_class] for label in np.unique(labels_N)]
    return np.sort(np.concatenate(rows))


def _own_split(index: Index) -> str | None:
    found = set(index.column("split"))
    return next((name for name in ("val", "test") if {"train", name} <= found), None)
