"""Class and split of each image of a source: from a table if there is one, else from folder names.

    table           labels.csv, or else index.csv, applies to its own folder and all folders below. It has one of
                    PATH_COLUMNS, relative to itself, and one of LABEL_COLUMNS, `split`, or both. An image that it does
                    not name has no label; what it has no column for comes from folder names. Lists of images and
                    Parquet files are their own tables
    folder names    train, val, valid, validation and test give the split; the folder right above the file gives the
                    class, if its name is neither a split nor one of GENERIC_FOLDERS and the source has at least two
                    such names

A class is a string here, never a number.
"""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

TABLE_NAMES = ("labels.csv", "index.csv")  # in this order: the first with labels or splits is used

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

# Folder names that tell the type of the files, not what the images show. The class is the name of a folder above.
# fmt: off
GENERIC_FOLDERS = frozenset((
    "images", "image", "img", "imgs", "files", "file", "data", "photos", "pictures", "jpg", "jpeg", "jpegs",
    "jpegimages", "png", "raw", "rgb", "depth", "masks", "mask", "annotations", "labels", "all",
))
# fmt: on
# The end of the name of a container, which counts as a folder, with the number of a shard if there is one.
CONTAINER_SUFFIX = re.compile(r"([-_.]\d+([-_]of[-_]\d+)?)?\.(tar|zip|parquet|txt|csv|tsv)$", re.IGNORECASE)

# Usual names of the columns of such tables.
# fmt: off
PATH_COLUMNS = (
    "path", "image", "file_name", "filename", "file", "filepath", "file_path", "image_path", "img", "url", "image_url",
    "uri",
)
LABEL_COLUMNS = ("label", "class", "labels", "class_name", "fine_label")
# fmt: on


@dataclass(frozen=True)
class LabelTable:
    """The content of a labels.csv, by path relative to its folder; None if there is no such column."""

    names: frozenset[str]
    labels: dict[str, str | None] | None
    splits: dict[str, str | None] | None


def parse_csv(data: bytes, delimiter: str = ",") -> dict[str, list] | None:
    """The columns of a CSV file, from its bytes; None if it is not a CSV file or has no row."""
    try:
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        header, *rows = csv.reader(text, delimiter=delimiter, strict=True)
    except (UnicodeDecodeError, csv.Error, ValueError):
        return None
    rows = [row for row in rows if row]
    return {name: [row[i] if i < len(row) else "" for row in rows] for i, name in enumerate(header)} if rows else None


def parse_image_list(
    columns: dict[str, list], class_names: dict[str, list[str]]
) -> tuple[list[str], LabelTable] | None:
    """The image paths that a table names, and their labels; None if it has none of PATH_COLUMNS."""
    known = {name.strip().lower(): name for name in reversed(columns)}
    column = next((known[name] for name in PATH_COLUMNS if name in known and _has_text(columns[known[name]])), None)
    if column is None:
        return None
    names = [(name or "").strip().removeprefix("./") for name in columns[column]]
    if not all(names):
        kept = [i for i, name in enumerate(names) if name]
        names, columns = [names[i] for i in kept], {n: [c[i] for i in kept] for n, c in columns.items()}
    return list(dict.fromkeys(names)), parse_labels(names, columns, class_names)


def parse_labels(names: list[str], columns: dict[str, list], class_names: dict[str, list[str]]) -> LabelTable:
    """The labels and splits of the images `names`, one per row. `class_names` gives the names of integer classes."""
    known = {name.strip().lower(): name for name in reversed(columns)}
    label = next((known[name] for name in LABEL_COLUMNS if name in known), None)
    return LabelTable(
        names=frozenset(names),
        labels=None if label is None else dict(zip(names, _to_names(columns[label], class_names.get(label)))),
        splits={n: parse_split(s or "") for n, s in zip(names, columns[known["split"]])} if "split" in known else None,
    )


def _has_text(column: list) -> bool:
    return any(isinstance(value, str) and value for value in column)


def _to_names(column: list, names: list[str] | None) -> list[str | None]:
    def name(value: object) -> str | None:
        if value is None or value == "":
            return None
        if names is None or not isinstance(value, int):
            return str(value)
        return names[value] if 0 <= value < len(names) else None  # public datasets write -1 for no class

    return [name(value) for value in column]


def parse_split(name: str) -> str | None:
    """The split that the name of a folder or the text of a cell stands for; None if it is no split."""
    return SPLITS.get(str(name).strip().lower())


def assign_labels(
    paths: list[str], root: str, tables: dict[str, LabelTable], say: Callable[[str], None]
) -> tuple[list[str | None], list[str | None]]:
    """The label and the split of each path of one source.

    All paths start with `root`, the name of the source: it may give the split, never the class. `tables` are keyed by
    their folder, in the form of the paths and ending in "/". `say` is called for a table that names none of the images.
    """
    folders = [path[: path.rfind("/") + 1] for path in paths]
    table_of = {folder: _nearest_table(folder, tables) for folder in set(folders)}
    by_name = [folder for folder, table in table_of.items() if table is None or tables[table].labels is None]
    classes = {folder: _class_of(folder[len(root) :]) for folder in by_name}
    if len(set(classes.values()) - {None}) < 2:  # a single folder is not a class
        classes = {}
    split_of = {folder: _split_of(folder) for folder in table_of}

    labels, splits, used = [], [], set()
    for path, folder in zip(paths, folders):
        label, split = classes.get(folder), split_of[folder]
        if (home := table_of[folder]) is not None:
            table, name = tables[home], path[len(home) :]
            if table.labels is not None:
                label = table.labels.get(name)
            if table.splits is not None:
                split = table.splits.get(name)
            if name in table.names:
                used.add(home)
        labels.append(label)
        splits.append(split)
    for home in sorted({home for home in table_of.values() if home is not None} - used):
        say(f"{home}: the table of labels here names none of the images")
    return labels, splits


def _nearest_table(folder: str, tables: dict[str, LabelTable]) -> str | None:
    """The nearest folder that holds a table: this one or one above."""
    while folder and folder not in tables:
        folder = folder[: folder.rfind("/", 0, -1) + 1]
    return folder or None


def _class_of(folder: str) -> str | None:
    for name in reversed(folder.split("/")[:-1]):
        if name.lower() not in GENERIC_FOLDERS:
            return None if parse_split(name) or CONTAINER_SUFFIX.search(name) else name
    return None


def _split_of(folder: str) -> str | None:
    """The split of the nearest folder above the file that stands for a split."""
    return next((s for name in reversed(folder.split("/")) if (s := parse_split(CONTAINER_SUFFIX.sub("", name)))), None)
