"""What a source says of its images: the class and the split, from a table if there is one, else from folder names.

    a table         labels.csv, or else index.csv, says it for the folder in which it lies and all below it. It has a
                    column of PATHS, relative to itself, and one of LABELS, `split`, or both. What it does not name has
                    no label; what it has no column for is read off folder names. Lists of images and the columns of
                    Parquet files say it for themselves
    folder names    train, val, valid, validation and test give the split; the name right above the file is the class,
                    where it is neither a split nor one of GENERIC and the source holds at least two such names

A class is a string; nothing turns it into a number here.
"""

import csv
import io
import re
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


# How the name of a file ends that is as good as a folder, the number of a shard included.
CONTAINER = re.compile(r"([-_.]\d+([-_]of[-_]\d+)?)?\.(tar|zip|parquet|txt|csv|tsv)$", re.IGNORECASE)

# What columns are called, by those who make such tables.
# fmt: off
PATHS = (
    "path", "image", "file_name", "filename", "file", "filepath", "file_path", "image_path", "img", "url", "image_url",
    "uri",
)
LABELS = ("label", "class", "labels", "class_name", "fine_label")
# fmt: on


@dataclass(frozen=True)
class Table:
    """What a labels.csv says, by path relative to its folder; None where it has no such column."""

    names: frozenset[str]
    labels: dict[str, str | None] | None
    splits: dict[str, str | None] | None


def read_table(data: bytes, delimiter: str = ",") -> dict[str, list] | None:
    """The columns in the bytes of a CSV file; None where it is no such file, or has no row."""
    try:
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        header, *rows = csv.reader(text, delimiter=delimiter, strict=True)
    except (UnicodeDecodeError, csv.Error, ValueError):
        return None
    rows = [row for row in rows if row]
    return {name: [row[i] if i < len(row) else "" for row in rows] for i, name in enumerate(header)} if rows else None


def listed(columns: dict[str, list], classes: dict[str, list[str]]) -> tuple[list[str], Table] | None:
    """The paths that a table names, and what it says of them; None where no column is one of PATHS."""
    known = {name.strip().lower(): name for name in reversed(columns)}
    column = next((known[name] for name in PATHS if name in known and _words(columns[known[name]])), None)
    if column is None:
        return None
    names = [(name or "").strip().removeprefix("./") for name in columns[column]]
    if not all(names):
        kept = [i for i, name in enumerate(names) if name]
        names, columns = [names[i] for i in kept], {n: [c[i] for i in kept] for n, c in columns.items()}
    return list(dict.fromkeys(names)), spoken(names, columns, classes)


def spoken(names: list[str], columns: dict[str, list], classes: dict[str, list[str]]) -> Table:
    """What the columns of a table say of the images `names`, one a row. `classes` names what numbers stand for."""
    known = {name.strip().lower(): name for name in reversed(columns)}
    label = next((known[name] for name in LABELS if name in known), None)
    return Table(
        names=frozenset(names),
        labels=None if label is None else dict(zip(names, _named(columns[label], classes.get(label)))),
        splits={n: split(s or "") for n, s in zip(names, columns[known["split"]])} if "split" in known else None,
    )


def _words(column: list) -> bool:
    return any(isinstance(value, str) and value for value in column)


def _named(column: list, names: list[str] | None) -> list[str | None]:
    def name(value: object) -> str | None:
        if value is None or value == "":
            return None
        if names is None or not isinstance(value, int):
            return str(value)
        return names[value] if 0 <= value < len(names) else None  # the sets of others write -1 for none

    return [name(value) for value in column]


def split(name: str) -> str | None:
    """The split that a folder or a cell of this name stands for."""
    return SPLITS.get(str(name).strip().lower())


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
            return None if split(name) or CONTAINER.search(name) else name
    return None


def _split_of(folder: str) -> str | None:
    """The split that the folder nearest to the file stands for, of those that stand for one."""
    return next((s for name in reversed(folder.split("/")) if (s := split(CONTAINER.sub("", name)))), None)
