"""Class and split of each image of a source: from a table if there is one, else from folder names.

    table           the first of TABLE_NAMES applies to its own folder and all folders below. It has one of
                    PATH_COLUMNS, relative to itself, or another column of image files, and one of LABEL_COLUMNS,
                    `split`, or both. An image that it does not name has no label; what it has no column for comes from
                    folder names. Lists of images and Parquet files are their own tables
    folder names    train, val, valid, validation and test give the split; the folder right above the file gives the
                    class, if its name is neither a split nor one of GENERIC_FOLDERS and the source has at least two
                    such names

A class is a string here, never a number. URLs in a list give neither class nor split: they name hosts.

CSV tables may be in UTF-8, UTF-16 or the encoding of Western Windows, and have commas, semicolons, tabs or bars between
their fields, which may be quoted. JSON Lines have an object per line.
"""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from troodon import run
from troodon.images import files
from troodon.images.formats import IMAGE_EXTENSIONS, extension
from troodon.images.volumes import SEPARATOR
from troodon.text import plural

# In this order: the first with labels or splits is used. The last two are those of Hugging Face's imagefolder.
TABLE_NAMES = ("labels.csv", "labels.tsv", "index.csv", "metadata.csv", "metadata.jsonl")

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
CONTAINER_SUFFIX = re.compile(r"([-_.]\d+([-_]of[-_]\d+)?)?\.(tar|zip|parquet|txt|csv|tsv|jsonl)$", re.IGNORECASE)

# Usual names of the columns of such tables.
# fmt: off
PATH_COLUMNS = (
    "path", "image", "file_name", "filename", "file", "filepath", "file_path", "image_path", "img", "url", "image_url",
    "uri",
)
URL_COLUMNS = ("url", "image_url", "uri")
LABEL_COLUMNS = ("label", "class", "labels", "class_name", "fine_label")
# fmt: on
GUESSED = dict.fromkeys(("cp1252", "latin-1"), "is not in UTF-8, and is read as Latin-1")  # what is said of an encoding
SEPARATORS = ",;\t|"
SAMPLE_ROWS = 100  # rows by which a column of images is recognised


@dataclass(frozen=True)
class LabelTable:
    """The content of a labels.csv, by path relative to its folder; None if there is no such column."""

    names: frozenset[str]
    labels: dict[str, str | None] | None
    splits: dict[str, str | None] | None
    file: str = ""  # the table's file, if it may name images that are not there


def decode_text(data: bytes) -> tuple[str, str]:
    """The text of a table or list, and its encoding: UTF-8, UTF-16, or that of Western Windows, a kind of Latin-1."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    else:
        zero = data[:64].find(b"\0")  # UTF-16 without a mark: every other byte of Latin letters is zero
        encodings = ["utf-8-sig", "cp1252", "latin-1"] if zero < 0 else ["utf-16-be" if zero % 2 == 0 else "utf-16-le"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text, encoding
    raise ValueError("it is not text")


def parse_csv(data: bytes) -> dict[str, list] | None:
    """The columns of a CSV file, from its bytes; None if it is not a CSV file or has no row."""
    try:
        return read_table(data, lambda _: None) or None
    except ValueError:
        return None


def read_table(data: bytes, say: Callable[[str], None]) -> dict[str, list]:
    """The columns of a CSV file or of JSON Lines, from its bytes; none if it has no row.

    `say` is called for what is a guess, or is lost. Raises ValueError, which says why, for anything else.
    """
    text, encoding = decode_text(data)
    if encoding in GUESSED:
        say(GUESSED[encoding])
    if text.lstrip().startswith("{"):
        return _json_columns(text)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # how Excel names the separator
        text, separator = text.partition("\n")[2], first.strip()[4]
    else:
        unquoted = re.sub('"[^"]*"', "", first)
        separator = max(SEPARATORS, key=unquoted.count)  # the first of them, if there is none
    text = re.sub(rf'(?<=") +(?=[{re.escape(separator)}\r\n]|$)', "", text)  # spaces after a quoted field
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num:,}: {error}") from None
    if len(rows) < 2:
        return {}
    header = rows.pop(0)[1]
    if longer := [line for line, row in rows if any(row[len(header) :])]:
        have, line = plural(len(longer), "row has", "rows have"), longer[0]
        say(f"{have} more fields than the first line, which are not read; the first: line {line:,}")
    return {name: [row[i] if i < len(row) else "" for _, row in rows] for i, name in enumerate(header)}


def _json_columns(text: str) -> dict[str, list]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number:,}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def parse_image_list(
    file: str, columns: dict[str, list], class_names: dict[str, list[str]]
) -> tuple[list[str], LabelTable] | None:
    """The image paths that the table in `file` names, and their labels; None if no column names images."""
    column = _image_column(file, columns)
    if column is None:
        return None
    names = [clean_path(name) if isinstance(name, str) else "" for name in columns[column]]
    if not all(names):
        kept = [i for i, name in enumerate(names) if name]
        names, columns = [names[i] for i in kept], {n: [c[i] for i in kept] for n, c in columns.items()}
    return list(dict.fromkeys(names)), parse_labels(file, names, columns, class_names)


def _image_column(file: str, columns: dict[str, list]) -> str | None:
    """The column of image files: one of PATH_COLUMNS, or else the only one whose values end like images; a message says
    which. Of more such columns some may be masks or depths, so none is taken.

    Of several of PATH_COLUMNS the first counts, unless only another one has the endings of images.
    """
    known = {name.strip().lower(): name for name in reversed(columns)}
    usual = [n for n in PATH_COLUMNS if n in known and any(isinstance(v, str) and v for v in columns[known[n]])]
    likely = [known[n] for n in usual if n not in URL_COLUMNS and _names_images(columns[known[n]])]
    if usual and (usual[0] in URL_COLUMNS or not likely):
        return known[usual[0]]
    if not likely and len(likely := [name for name in columns if _names_images(columns[name])]) != 1:
        return None
    column = likely[0]
    if not usual or column != known[usual[0]]:
        run.say(f"{file}: takes the images from the column {column!r}")
    return column


def _names_images(values: list) -> bool:
    sample = [value for value in values if isinstance(value, str) and value][:SAMPLE_ROWS]
    return 2 * sum(extension(value.strip()) in IMAGE_EXTENSIONS for value in sample) > len(sample)


def clean_path(name: str) -> str:
    """A path in a table or list, with / between folders, also where it was written on Windows."""
    name = name.strip()
    return (name if "/" in name else name.replace("\\", "/")).removeprefix("./")


def parse_labels(
    file: str, names: list[str], columns: dict[str, list], class_names: dict[str, list[str]]
) -> LabelTable:
    """The labels and splits of the images `names`, one per row. `class_names` gives the names of integer classes.

    Of rows that name the same image, the last counts, and a message says so.
    """
    known = {name.strip().lower(): name for name in reversed(columns)}
    label = next((known[name] for name in LABEL_COLUMNS if name in known), None)
    if label is not None and any(isinstance(value, list | dict) for value in columns[label]):
        run.say(f"{file}: the column {label!r} holds lists, and gives no labels")
        label = None
    labels = None if label is None else _to_names(columns[label], class_names.get(label))
    splits = _to_splits(file, columns[known["split"]]) if "split" in known else None
    table = LabelTable(
        names=frozenset(names),
        labels=None if labels is None else dict(zip(names, labels)),
        splits=None if splits is None else dict(zip(names, splits)),
    )
    if len(table.names) < len(names):
        _say_repeats(file, names, list(zip(labels or [None] * len(names), splits or [None] * len(names))))
    return table


def _to_splits(file: str, column: list) -> list[str | None]:
    """The split that each cell stands for; a message names what stands for none."""
    words = [_to_name(cell) or "" for cell in column]
    splits = [parse_split(word) for word in words]
    if unknown := Counter(word for word, split in zip(words, splits) if word.strip() and split is None):
        first = ", ".join(repr(word) for word, _ in unknown.most_common(3)) + (" ..." if len(unknown) > 3 else "")
        rows = plural(unknown.total(), "row has", "rows have")
        run.say(f"{file}: {rows} a split that is none of train, val and test, and is left out ({first})")
    return splits


def _say_repeats(file: str, names: list[str], rows: list[tuple]) -> None:
    said: dict[str, list[tuple]] = {}
    for name, row in zip(names, rows):
        said.setdefault(name, []).append(row)
    again = [name for name, of_image in said.items() if len(of_image) > 1]
    differ = [name for name in again if len(set(said[name])) > 1]
    text = f"names {plural(len(again), 'image')} more than once"
    if differ:
        values = ", then ".join(str(next(filter(None, row), None)) for row in dict.fromkeys(said[differ[0]]))
        text += f", {len(differ):,} of them with different labels or splits, of which the last counts"
        text += f"; the first: {differ[0]} ({values})"
    else:
        text += f"; the first: {again[0]}"
    run.say(f"{file}: {text}")


def _to_names(column: list, names: list[str] | None) -> list[str | None]:
    def name(value: Any) -> str | None:
        is_number = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if names is None or not is_number:
            return _to_name(value)
        return names[int(value)] if 0 <= value < len(names) else None  # public datasets write -1 for no class

    return [name(value) for value in column]


def _to_name(value: Any) -> str | None:
    """The class that a cell names. Numbers of integers with gaps are floats in many tables: 3.0 is 3."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


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
    folders = [_folder(path, root) for path in paths]
    table_of = {folder: _nearest_table(folder, tables) for folder in set(folders)}
    by_name = [folder for folder, table in table_of.items() if table is None or tables[table].labels is None]
    classes = {folder: _class_of(folder[len(root) :]) for folder in by_name}
    if len(set(classes.values()) - {None}) < 2:  # a single folder is not a class
        classes = {}
    split_of = {folder: _split_of(folder) for folder in table_of}

    labels, splits, used = [], [], {home: 0 for home in table_of.values() if home is not None}
    previous = None
    for path, folder in zip(paths, folders):
        label, split = classes.get(folder), split_of[folder]
        if (home := table_of[folder]) is not None:
            table, name = tables[home], path[len(home) :]
            if name not in table.names:  # an image of a file of several has what is said of the file
                name = name.rpartition(SEPARATOR)[0] or name
            if table.labels is not None:
                label = table.labels.get(name)
            if table.splits is not None:
                split = table.splits.get(name)
            used[home] += name in table.names and (home, name) != previous
            previous = home, name
        labels.append(label)
        splits.append(split)
    for home in sorted(used):
        if not used[home]:
            first = min(tables[home].names, default="none")
            say(f"{home}: the table of labels here names none of the images; the first that it names: {first}")
        elif tables[home].file and used[home] < len(tables[home].names):
            here = [path[len(home) :] for path in paths if path.startswith(home)]
            _say_missing(tables[home], {*here, *(name.rpartition(SEPARATOR)[0] for name in here)}, say)
    return labels, splits


def _say_missing(table: LabelTable, present: set[str], say: Callable[[str], None]) -> None:
    if missing := table.names - present:
        are = "is" if len(missing) == 1 else "are"
        named = plural(len(table.names), "image")
        say(f"{table.file}: of {named} that it names, {len(missing):,} {are} not there; the first: {min(missing)}")


def _folder(path: str, root: str) -> str:
    """The folder of a path, which names it; that of the source for a URL in a list."""
    return root if files.REMOTE.match(path, len(root)) else path[: path.rfind("/") + 1]


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
