"""What a source says of its images: the class and the split, from a table if there is one, else from folder names.

    a table         labels.csv, or else index.csv, says it for the folder in which it lies and all below it. It has a
                    column `path` (or image, file_name), relative to itself, and `label` (or class), `split`, or both.
                    What it does not name has no label; what it has no column for is read off folder names
    folder names    train, val, valid, validation and test give the split; the name right above the file is the class,
                    where it is neither a split nor one of GENERIC and the source holds at least two such names

A class is a string; nothing turns it into a number here.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

TABLES = ("labels.csv", "index.csv")  # in this order: the first that says something counts

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

# Folder names that say what kind of files lie there, not what the pictures show. The class is looked for above them.
# fmt: off
GENERIC = frozenset((
    "images", "image", "img", "imgs", "files", "file", "data", "photos", "pictures", "jpg", "jpeg", "jpegs",
    "jpegimages", "png", "raw", "rgb", "depth", "masks", "mask", "annotations", "labels", "all",
))
# fmt: on


@dataclass(frozen=True)
class Table:
    """What a labels.csv says, by path relative to its folder; None where it has no such column."""

    names: frozenset[str]
    labels: dict[str, str | None] | None
    splits: dict[str, str | None] | None


def read_table(data: bytes) -> Table | None:
    """The table in the bytes of a CSV file; None where it has not the columns, or is no CSV."""
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error):
        return None
    columns = rows[0].keys() if rows else ()
    path = next((c for c in ("path", "image", "file_name") if c in columns), None)
    label = next((c for c in ("label", "class") if c in columns), None)
    if path is None or (label is None and "split" not in columns):
        return None
    names = [(row[path] or "").removeprefix("./") for row in rows]
    return Table(
        names=frozenset(names),
        labels=None if label is None else {n: row[label] or None for n, row in zip(names, rows)},
        splits={n: split(row["split"] or "") for n, row in zip(names, rows)} if "split" in columns else None,
    )


def split(name: str) -> str | None:
    """The split that a folder or a cell of this name stands for."""
    return SPLITS.get(name.strip().lower())


def assign(
    paths: list[str], root: str, tables: dict[str, Table], say: Callable[[str], None]
) -> tuple[list[str | None], list[str | None]]:
    """Label and split of each path of one source.

    `root` is what all paths start with, the source's own name: it may give the split, never the class. `tables` are
    keyed by the folder they lie in, written as the paths are and ending in "/". `say` hears of tables that name none
    of the images.
    """
    folders = [path[: path.rfind("/") + 1] for path in paths]
    homes = {folder: _home(folder, tables) for folder in set(folders)}
    classes = {f: _class_of(f[len(root) :]) for f, home in homes.items() if home is None or tables[home].labels is None}
    if len(set(classes.values()) - {None}) < 2:  # one folder is not a class among others
        classes = {}
    parts = {folder: _split_of(folder) for folder in homes}

    labels, splits, used = [], [], set()
    for path, folder in zip(paths, folders):
        label, part = classes.get(folder), parts[folder]
        if (home := homes[folder]) is not None:
            table, name = tables[home], path[len(home) :]
            if table.labels is not None:
                label = table.labels.get(name)
            if table.splits is not None:
                part = table.splits.get(name)
            if name in table.names:
                used.add(home)
        labels.append(label)
        splits.append(part)
    for home in sorted({home for home in homes.values() if home is not None} - used):
        say(f"{home}: its table of labels names none of the images beside it")
    return labels, splits


def _home(folder: str, tables: dict[str, Table]) -> str | None:
    """The nearest folder, from this one up, in which a table lies."""
    while folder and folder not in tables:
        folder = folder[: folder.rfind("/", 0, -1) + 1]
    return folder or None


def _class_of(folder: str) -> str | None:
    for name in reversed(folder.split("/")[:-1]):
        if name.lower() not in GENERIC:
            return None if split(name) or name.endswith(".tar") else name
    return None


def _split_of(folder: str) -> str | None:
    """The split that the folder nearest to the file stands for, of those that stand for one."""
    return next((s for name in reversed(folder.split("/")) if (s := split(name.removesuffix(".tar")))), None)
