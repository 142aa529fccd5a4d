"""Training and validation split: the split of the dataset, or a seeded fraction of every class."""

import numpy as np
import pyarrow.compute as pc

from troodon.config import UsageError
from troodon.images.index import Index

# Shape suffixes: N images.

VAL_FRACTION = 0.2  # of each class, if the dataset has no split


def split(index: Index, seed: int) -> tuple[Index, Index]:
    """Training and validation images of a labelled dataset. Images without a label are skipped.

    Uses the splits "train" and "val" of the dataset (or "test" without "val"), otherwise a seeded, stratified split of
    80 and 20 %. Raises UsageError if there are no labels or too few images.
    """
    index = labelled(index)
    if existing := _existing_split(index):
        splits = np.asarray(index.column("split"), dtype=object)
        return index.take(np.flatnonzero(splits == "train")), index.take(np.flatnonzero(splits == existing))
    val_N = stratified(np.unique(index.column("label"), return_inverse=True)[1], VAL_FRACTION, seed)
    if not val_N.any():
        raise UsageError(f"each of the {len(index)} labelled images is the only one of its class: none is left to test")
    return index.take(np.flatnonzero(~val_N)), index.take(np.flatnonzero(val_N))


def split_rows(index: Index, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Training rows and validation rows of images with any ground truth, and a description of the split.

    Uses the splits "train" and "val" of the dataset (or "test" without "val"), otherwise a seeded split of 80 and 20 %.
    Raises UsageError for fewer than two images.
    """
    if existing := _existing_split(index):
        splits = np.asarray(index.column("split"), dtype=object)
        description = f"train and {existing}, as the data says"
        return np.flatnonzero(splits == "train"), np.flatnonzero(splits == existing), description
    if len(index) < 2:
        raise UsageError(f"{len(index)} images: two are needed, one to train on and one to test on")
    rows = np.random.default_rng(seed).permutation(len(index))
    val_count = max(1, round(VAL_FRACTION * len(index)))
    description = f"{1 - VAL_FRACTION:.0%} and {VAL_FRACTION:.0%}, at random (seed {seed})"
    return np.sort(rows[val_count:]), np.sort(rows[:val_count]), description


def describe_split(index: Index, seed: int) -> str:
    """Describe the result of `split` in words, for the settings of a score."""
    if existing := _existing_split(labelled(index)):
        return f"train and {existing}, as the data says"
    return f"{1 - VAL_FRACTION:.0%} and {VAL_FRACTION:.0%} of each class, at random (seed {seed})"


def labelled(index: Index) -> Index:
    """The images that have a label. Raises UsageError, with a note on how to give labels, if none has."""
    labelled_N = np.asarray(pc.is_valid(index.table["label"]))
    if not labelled_N.any():
        raise UsageError(
            f"none of the {len(index)} images has a label: put the images of each class in a folder of its name, "
            "or add a labels.csv with the columns path and label"
        )
    return index if labelled_N.all() else index.take(np.flatnonzero(labelled_N))


def stratified(labels_N: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Mask of about `fraction` of each class: at least one image, but never all. None of a class with one image."""
    mask_N = np.zeros(len(labels_N), dtype=bool)
    random = np.random.default_rng(seed)
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        if len(rows) > 1:
            mask_N[random.permutation(rows)[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] = True
    return mask_N


def few_shot(labels_N: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Sorted rows of `per_class` random images of each class, or of all its images if there are fewer."""
    random = np.random.default_rng(seed)
    rows = [random.permutation(np.flatnonzero(labels_N == label))[:per_class] for label in np.unique(labels_N)]
    return np.sort(np.concatenate(rows))


def _existing_split(index: Index) -> str | None:
    splits = set(index.column("split"))
    return next((name for name in ("val", "test") if {"train", name} <= splits), None)
