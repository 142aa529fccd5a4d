"""Evaluation datasets: images, and ground truth of one kind.

    label      a class for each image, and the split into training and test images
    tags       any number of classes for each image
    mask       a map of classes for each image
    depth      a map of distances for each image
    retrieval  queries, and for each the relevant images
    copies     pairs of images that are copies of one another
    none       no ground truth: two views of one image are compared

The kind of a dataset is detected from its files: the layout of its publisher (layouts.py), or a table at the top,
index.csv or pairs.csv, with the columns

    image, tags [, split]                      such as car|person|?dog; it is unknown whether tags after a ? are present
    image, mask [, split]                      classes.txt, if there is one, names the classes (see mask_reader)
    image or rgb, depth [, split]              depths in units of `depth.unit` metres, 0 where nothing was measured
    image, instance [, role]                   for each image of role "query", the others of its instance are relevant
    path_a, path_b                             pairs.csv: copies; all other images are distractors

Anything else is a dataset of images with or without labels: see images/labels.py.
"""

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from troodon import run
from troodon.config import UsageError, fingerprint
from troodon.images import containers, listing, members
from troodon.images.decode import BadImage, decode_single_channel
from troodon.images.index import SCHEMA, Index
from troodon.images.labels import parse_csv, parse_split
from troodon.text import plural

# Shape suffixes: N images, Q queries.

Kind = Literal["label", "tags", "mask", "depth", "retrieval", "copies", "none"]
IGNORE = 255  # the class of ignored pixels
NO_CLASS = re.compile(r"unlabel|void|ignore", re.IGNORECASE)
LABEL_SEPARATOR = "|"  # between the alternative correct labels of an image, and between its tags
UNCERTAIN = "?"  # before a tag that is ignored
Parsed = TypeVar("Parsed")
Relevance = list[tuple[np.ndarray, np.ndarray]]  # for each query: relevant rows and ignored rows


@dataclass(frozen=True)
class Benchmark:
    """Images in order, and their ground truth. A row is a position in `images`."""

    name: str
    kind: Kind
    images: Index
    ground_truth: Index | None = None  # masks or depths, row by row
    # From the bytes of a ground truth file to classes (IGNORE for none) or to depths in units.
    read: Callable[[bytes], np.ndarray] = decode_single_channel
    class_lines: tuple[str, ...] = ()  # of the user's classes.txt
    classes: tuple[str, ...] = ()  # of masks and tags; the column "label" holds the tags
    unit: float | None = None  # of depths: metres per unit, if the publisher defines it
    range: tuple[float, float] | None = None  # valid distances in metres, if the publisher defines it
    queries: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (Q,) rows
    gallery: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,) rows
    relevance: dict[str, Relevance] = field(default_factory=dict)  # retrieval: by difficulty
    boxes: dict[int, tuple[float, float, float, float]] = field(default_factory=dict)  # left, top, right, bottom
    objects: tuple[np.ndarray, ...] = ()  # tags: boxes (K, 4) of each image, as above, if published
    ap_method: Literal["steps", "trapezoids"] = "steps"  # see `average_precision`
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # copies: rows
    train_benchmark: str | None = None  # labels: name of the dataset to train on, if this one only has test images

    def truth_digest(self) -> str:
        """A digest of the ground truth that no file of `images` and `ground_truth` holds; "" if there is none."""
        truth = [self.pairs.tolist(), self.queries.tolist(), self.gallery.tolist(), sorted(self.boxes.items())]
        truth += [{name: [[r.tolist() for r in rows] for rows in of] for name, of in self.relevance.items()}]
        truth += [[boxes_K4.tolist() for boxes_K4 in self.objects], self.class_lines]
        return fingerprint(truth) if any(truth) else ""

    def target(self, row: int) -> np.ndarray:
        """The ground truth (H, W) of an image. Raises BadImage or OSError."""
        assert self.ground_truth is not None
        return self.read(self.ground_truth.read(row))


@dataclass(frozen=True)
class Tree:
    """All files of a folder, tar or zip by name: container, offset and length of each."""

    root: str
    entries: dict[str, tuple[str, int, int]]

    @staticmethod
    def open(place: str | Path) -> "Tree | None":
        """List the files, without those in artifacts of Troodon. None for anything but a folder, tar or zip here."""
        root = str(Path(place).expanduser().absolute())
        if Path(root).is_dir():
            entries = {}
            for folder, inner, names in os.walk(root, followlinks=True):
                inside = os.path.relpath(folder, root)
                if inside != "." and listing.is_ours(folder, {*inner, *names}):
                    inner.clear()
                    continue
                for name in (n for n in names if not listing.is_hidden(n)):
                    path = os.path.join(folder, name)
                    entries[posixpath.normpath(posixpath.join(inside, name))] = (path, 0, os.stat(path).st_size)
            return Tree(root, dict(sorted(entries.items())))
        if containers.kind(root) in ("tar", "zip") and Path(root).is_file():
            locations = members.list_members(root, listing.is_hidden).locations
            return Tree(root, {name: (root, *locations[name]) for name in sorted(locations)})
        return None

    @property
    def name(self) -> str:
        return Path(self.root).name

    def read(self, name: str) -> bytes:
        return containers.read(*self.entries[name])

    def lines(self, name: str) -> list[str]:
        return [line for line in self.read(name).decode("utf-8-sig").splitlines() if line.strip()]

    def parse(self, name: str, rows: Sequence[Any], read: Callable[[Any], Parsed]) -> list[Parsed]:
        """What `read` makes of each row of a file. Rows of which it makes nothing (ValueError, LookupError, TypeError)
        are set aside, counted, and the first is named. Raises UsageError if these are more than half."""
        parsed, bad = [], []
        for number, row in enumerate(rows, start=1):
            try:
                parsed.append(read(row))
            except (ValueError, LookupError, TypeError):
                bad.append(f"number {number}, {str(row)[:80]!r}")
        if bad:
            text = (
                f"{self.root}/{name}: {len(bad):,} of {plural(len(rows), 'row')} cannot be read, {bad[0]}, among them"
            )
            if 2 * len(bad) > len(rows):
                raise UsageError(text)
            run.say(f"{text}; they are set aside")
        return parsed

    def table(self, name: str) -> dict[str, list]:
        """The columns of a CSV file. Empty if the file does not exist or cannot be parsed."""
        return (parse_csv(self.read(name)) or {}) if name in self.entries else {}

    def find(self, pattern: str) -> list[tuple[str, re.Match]]:
        """The files whose path, including the name of the root, ends in a match of the pattern; and the match."""
        regex = re.compile(rf"(?:.*/)?{pattern}")
        matches = ((name, regex.fullmatch(f"{self.name}/{name}")) for name in self.entries)
        return [(name, match) for name, match in matches if match]

    def find_one(self, pattern: str) -> str:
        """The first such file. Raises UsageError if there is none."""
        if not (names := [name for name, _ in self.find(pattern)]):
            raise UsageError(f"{self.root}: no file matches {pattern}")
        return names[0]

    def by_suffix(self, parts: set[int]) -> dict[str, str]:
        """Images by the last parts of their paths, for each of these numbers of parts."""
        split = ((name, name.split("/")) for name in self.images())
        return {"/".join(words[-count:]): name for name, words in split for count in parts}

    def images(self, under: str = "") -> list[str]:
        return [n for n in self.entries if n.startswith(under) and listing.extension(n) in listing.IMAGE_EXTENSIONS]

    def index(
        self, names: Sequence[str], labels: Sequence[str | None] | None = None, splits: Sequence | None = None
    ) -> Index:
        """An index of these files in this order. A file that is missing is an image that cannot be read, and is named.

        Raises UsageError, which names the first, if all are missing.
        """
        if missing := [name for name in names if name not in self.entries]:
            text = f"{self.root}: {len(missing)} of {len(names)} files are missing, {missing[0]} among them"
            if len(missing) == len(names):
                raise UsageError(text)
            run.say(f"{text}; they are set aside")
        none = [None] * len(names)
        nowhere = {name: (os.path.join(self.root, name or "no name"), 0, -1) for name in missing}
        locations = zip(*((self.entries | nowhere)[name] for name in names)) if names else ([], [], [])
        columns = [list(names), *map(list, locations), list(labels or none), list(splits or none)]
        return Index(pa.table([[f"{self.name}/{n}" for n in names], *columns[1:]], schema=SCHEMA))


def open_table(tree: Tree) -> Benchmark | None:
    """The benchmark that a table at the top of the tree describes; None without such a table."""
    pairs = tree.table("pairs.csv")
    if {"path_a", "path_b"} <= pairs.keys():
        return copy_benchmark(tree, tree.name, tree.images(), list(zip(pairs["path_a"], pairs["path_b"])))
    table = tree.table("index.csv")
    images = table.get("image") or table.get("rgb")
    if images is None:
        return None
    splits = [parse_split(part) for part in table.get("split", [])] or None
    if "instance" in table:
        roles = table.get("role", ["query"] * len(images))
        return instance_benchmark(tree, tree.name, images, table["instance"], [role == "query" for role in roles])
    if "tags" in table:
        return tag_benchmark(tree, images, table["tags"], splits)
    if "mask" in table:
        read, classes = mask_reader(tree.lines("classes.txt")) if "classes.txt" in tree.entries else (None, ())
        masks = tree.index(table["mask"])
        read = read or (lambda data: shift_classes(decode_single_channel(data), IGNORE))
        lines = tuple(tree.lines("classes.txt")) if classes else ()
        index = tree.index(images, splits=splits)
        return Benchmark(tree.name, "mask", index, masks, read, class_lines=lines, classes=classes)
    if "depth" in table:
        return Benchmark(tree.name, "depth", tree.index(images, splits=splits), tree.index(table["depth"]))
    return None


def tag_benchmark(
    tree: Tree, images: Sequence[str], tags: Sequence[str], splits: Sequence[str | None] | None
) -> Benchmark:
    """Multi-label classification: images with any number of tags each."""
    classes = sorted({tag.removeprefix(UNCERTAIN) for text in tags for tag in text.split(LABEL_SEPARATOR)} - {""})
    return Benchmark(tree.name, "tags", tree.index(images, tags, splits), classes=tuple(classes))


def tag_matrix(benchmark: Benchmark) -> np.ndarray:
    """The tags of each image (N, C): 1 present, 0 absent, -1 unknown."""
    position = {name: i for i, name in enumerate(benchmark.classes)}
    tags_NC = np.zeros((len(benchmark.images), len(position)), np.int64)
    for row, text in enumerate(benchmark.images.column("label")):
        for tag in filter(None, text.split(LABEL_SEPARATOR)):
            tags_NC[row, position[tag.removeprefix(UNCERTAIN)]] = -1 if tag.startswith(UNCERTAIN) else 1
    return tags_NC


def mask_reader(lines: Sequence[str]) -> tuple[Callable[[bytes], np.ndarray], tuple[str, ...]]:
    """A function that reads masks, and the names of the classes, from lines with or without a number before the name.

    Lines without numbers are numbered from 0. Classes named unlabelled, void or ignore are ignored.
    """
    matches = [re.fullmatch(r"\s*(?:(\d+)[\s,:]+)?(.*\S)\s*", line) for line in lines]
    numbered = [(int(m[1]) if m[1] else i, m[2]) for i, m in enumerate(matches) if m]
    valid = [(number, name) for number, name in numbered if not NO_CLASS.search(name)]
    class_of = np.full(1 << 16, IGNORE, np.uint8)
    for position, (number, _) in enumerate(valid[:IGNORE]):
        class_of[number] = position
    return lambda data: class_of[decode_single_channel(data).clip(0, len(class_of) - 1)], tuple(
        name for _, name in valid
    )


def shift_classes(mask_HW: np.ndarray, classes: int, first: int = 0) -> np.ndarray:
    """Shift classes from `first` to start at 0. Others become IGNORE. Boolean masks have the classes 0 and 1."""
    mask_HW = mask_HW.astype(np.int32) - first
    return np.where((mask_HW >= 0) & (mask_HW < classes), mask_HW, IGNORE).astype(
        np.uint8 if classes < 256 else np.int32
    )


def instance_benchmark(
    tree: Tree, name: str, images: Sequence[str], instance_of: Sequence[str], is_query: Sequence[bool]
) -> Benchmark:
    """Retrieval: the other images of the instance of a query are relevant. Images without one ("") are distractors."""
    codes_N = np.unique(np.asarray(instance_of), return_inverse=True)[1]
    queries = np.flatnonzero(np.asarray(is_query) & (np.asarray(instance_of) != ""))
    rows = np.arange(len(images))
    relevance = [(np.flatnonzero((codes_N == codes_N[q]) & (rows != q)), np.array([q])) for q in queries]
    return Benchmark(name, "retrieval", tree.index(images), queries=queries, gallery=rows, relevance={"all": relevance})


def copy_benchmark(tree: Tree, name: str, images: Iterable[str], pairs: Sequence[tuple[str, str]]) -> Benchmark:
    """Copy detection: find these `pairs` among all pairs of `images`."""
    images = sorted({posixpath.normpath(n) for n in images} | {n for pair in pairs for n in pair})
    index, row = tree.index(images), {image: i for i, image in enumerate(images)}
    rows = np.asarray(sorted({tuple(sorted((row[a], row[b]))) for a, b in pairs}), np.int64).reshape(-1, 2)
    return Benchmark(name, "copies", index, pairs=rows)


def depth_range(benchmark: Benchmark, unit: float, images: int = 20) -> tuple[float, float]:
    """Smallest and largest distance in metres, measured on 20 images spread over the dataset. Suggests a range."""
    quantiles = []
    assert benchmark.ground_truth is not None
    for row in np.unique(np.linspace(0, len(benchmark.ground_truth) - 1, images).astype(int)):
        try:
            counts_HW = benchmark.target(int(row))
        except (BadImage, OSError):
            continue
        if (measured := counts_HW[counts_HW > 0]).size:
            quantiles += np.quantile(measured * unit, [0.001, 0.999]).tolist()
    return (min(quantiles), max(quantiles)) if quantiles else (0.0, 0.0)
