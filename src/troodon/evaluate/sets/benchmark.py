"""Evaluation sets: images, and a truth of one kind about them.

    label      a class for each image, and which images teach and which test
    tags       any number of classes for each image
    mask       a picture of classes for each image
    depth      a picture of distances for each image
    retrieval  queries, and for each the images that show the same thing
    copies     pairs of images that are copies of one another
    none       nothing: what two views of one image say of each other

What lies at a place is known by its files: sets as their owners publish them (layouts.py), and a table of one's own at
the top, named index.csv or pairs.csv, with the columns

    image, tags [, split]                      as car|person|?dog; what stands behind a ? is there or not: nobody says
    image, mask [, split]                      classes.txt, where there is one, names the classes (see named_classes)
    image or rgb, depth [, split]              counts of `depth.unit` metres, 0 where nothing was measured
    image, instance [, role]                   the other images of its instance are right for each of role "query"
    path_a, path_b                             pairs.csv: copies; all other images are distractors

Anything else is images with labels, or none: see labels.py.
"""

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from troodon.config import UsageError
from troodon.images import containers, listing
from troodon.images.decode import BadImage, plane
from troodon.images.index import SCHEMA, Index
from troodon.images.labels import read_table, split

# Shape suffixes: N images, Q queries.

Kind = Literal["label", "tags", "mask", "depth", "retrieval", "copies", "none"]
IGNORE = 255  # the class of a pixel that counts for nothing
NO_CLASS = re.compile(r"unlabel|void|ignore", re.IGNORECASE)
SEVERAL = "|"  # between the labels of an image for which any of several is right, and between its tags
UNSURE = "?"  # before a tag that counts for nothing
Judged = list[tuple[np.ndarray, np.ndarray]]  # for each query: rows that are right, and rows that count for nothing


@dataclass(frozen=True)
class Benchmark:
    """Images, in order, and what is true of them. A row is a place in `images`."""

    name: str
    kind: Kind
    images: Index
    truth: Index | None = None  # of masks and depths: the picture of each image, row for row
    read: Callable[[bytes], np.ndarray] = plane  # from such a picture's bytes to classes (IGNORE for none), or counts
    classes: tuple[str, ...] = ()  # of masks and tags; tags are what stands in the column of labels
    unit: float | None = None  # of depths: metres of a count, where the owner says it
    range: tuple[float, float] | None = None  # metres that count, where the owner says it
    queries: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (Q,) rows
    gallery: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,) rows
    judged: dict[str, Judged] = field(default_factory=dict)  # retrieval: by difficulty
    boxes: dict[int, tuple[float, float, float, float]] = field(default_factory=dict)  # left, top, right, bottom
    objects: tuple[np.ndarray, ...] = ()  # tags: boxes (K, 4) of each image, as above, where the owner says them
    average: Literal["steps", "trapezoids"] = "steps"  # how the area under precision and recall is taken
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # copies: rows
    learns_from: str | None = None  # labels: the benchmark that teaches, where this one only tests

    def target(self, row: int) -> np.ndarray:
        """The truth of an image: (H, W). Raises BadImage or OSError."""
        assert self.truth is not None
        return self.read(self.truth.read(row))


@dataclass(frozen=True)
class Tree:
    """The files of a folder, tar or zip, images or not, by name: container, offset and length of each."""

    root: str
    where: dict[str, tuple[str, int, int]]

    @staticmethod
    def open(place: str | Path) -> "Tree | None":
        """None for what is not a folder, tar or zip on this machine."""
        root = str(Path(place).expanduser().absolute())
        if Path(root).is_dir():
            found = {}
            for folder, _, names in os.walk(root, followlinks=True):
                inside = os.path.relpath(folder, root)
                for name in (n for n in names if not listing.hidden(n)):
                    path = os.path.join(folder, name)
                    found[posixpath.normpath(posixpath.join(inside, name))] = (path, 0, os.stat(path).st_size)
            return Tree(root, dict(sorted(found.items())))
        if containers.kind(root) in ("tar", "zip") and Path(root).is_file():
            members = containers.members(root, listing.hidden).where
            return Tree(root, {name: (root, *members[name]) for name in sorted(members)})
        return None

    @property
    def name(self) -> str:
        return Path(self.root).name

    def read(self, name: str) -> bytes:
        return containers.read(*self.where[name])

    def lines(self, name: str) -> list[str]:
        return [line for line in self.read(name).decode("utf-8-sig").splitlines() if line.strip()]

    def table(self, name: str) -> dict[str, list]:
        """The columns of a CSV file; none where it is not there or no such file."""
        return (read_table(self.read(name)) or {}) if name in self.where else {}

    def found(self, pattern: str) -> list[tuple[str, re.Match]]:
        """The files whose path, this place's own name included, ends in what the pattern says; and how."""
        wanted = re.compile(rf"(?:.*/)?{pattern}")
        tried = ((name, wanted.fullmatch(f"{self.name}/{name}")) for name in self.where)
        return [(name, match) for name, match in tried if match]

    def one(self, pattern: str) -> str:
        """The first such file."""
        if not (names := [name for name, _ in self.found(pattern)]):
            raise UsageError(f"{self.root}: has no file that is called like {pattern}")
        return names[0]

    def ends(self, parts: set[int]) -> dict[str, str]:
        """Images by the last so many parts of their paths."""
        split = ((name, name.split("/")) for name in self.images())
        return {"/".join(words[-count:]): name for name, words in split for count in parts}

    def images(self, under: str = "") -> list[str]:
        return [n for n in self.where if n.startswith(under) and listing.ending_of(n) in listing.ENDINGS]

    def index(
        self, names: Sequence[str], labels: Sequence[str | None] | None = None, splits: Sequence | None = None
    ) -> Index:
        """These files, in this order. UsageError, naming one, where some are not there."""
        if missing := [name for name in names if name not in self.where]:
            raise UsageError(f"{self.root}: {len(missing)} of {len(names)} files are missing, {missing[0]} among them")
        none = [None] * len(names)
        where = zip(*(self.where[name] for name in names)) if names else ([], [], [])
        columns = [list(names), *map(list, where), list(labels or none), list(splits or none)]
        return Index(pa.table([[f"{self.name}/{n}" for n in names], *columns[1:]], schema=SCHEMA))


def own(tree: Tree) -> Benchmark | None:
    """A benchmark that a table at the top of a tree describes."""
    pairs = tree.table("pairs.csv")
    if {"path_a", "path_b"} <= pairs.keys():
        return copies(tree, tree.name, tree.images(), list(zip(pairs["path_a"], pairs["path_b"])))
    table = tree.table("index.csv")
    images = table.get("image") or table.get("rgb")
    if images is None:
        return None
    parts = [split(part) for part in table.get("split", [])] or None
    if "instance" in table:
        roles = table.get("role", ["query"] * len(images))
        return instances(tree, tree.name, images, table["instance"], [role == "query" for role in roles])
    if "tags" in table:
        return tagged(tree, images, table["tags"], parts)
    if "mask" in table:
        read, classes = named_classes(tree.lines("classes.txt")) if "classes.txt" in tree.where else (None, ())
        masks, read = tree.index(table["mask"]), read or (lambda data: classed(plane(data), IGNORE))
        return Benchmark(tree.name, "mask", tree.index(images, splits=parts), masks, read, classes)
    if "depth" in table:
        return Benchmark(tree.name, "depth", tree.index(images, splits=parts), tree.index(table["depth"]))
    return None


def tagged(tree: Tree, images: Sequence[str], tags: Sequence[str], splits: Sequence[str | None] | None) -> Benchmark:
    """Images with any number of classes each."""
    classes = sorted({tag.removeprefix(UNSURE) for said in tags for tag in said.split(SEVERAL)} - {""})
    return Benchmark(tree.name, "tags", tree.index(images, tags, splits), classes=tuple(classes))


def tags_of(benchmark: Benchmark) -> np.ndarray:
    """The tags of each image (N, C): 1 is there, 0 is not, -1 nobody knows."""
    place = {name: i for i, name in enumerate(benchmark.classes)}
    tags_NC = np.zeros((len(benchmark.images), len(place)), np.int64)
    for row, said in enumerate(benchmark.images.column("label")):
        for tag in filter(None, said.split(SEVERAL)):
            tags_NC[row, place[tag.removeprefix(UNSURE)]] = -1 if tag.startswith(UNSURE) else 1
    return tags_NC


def named_classes(lines: Sequence[str]) -> tuple[Callable[[bytes], np.ndarray], tuple[str, ...]]:
    """How a mask is read whose classes are named, a line each, with their numbers before them or in order from 0.

    What is called unlabelled, void or to be ignored is no class.
    """
    said = [re.fullmatch(r"\s*(?:(\d+)[\s,:]+)?(.*\S)\s*", line) for line in lines]
    numbered = [(int(m[1]) if m[1] else i, m[2]) for i, m in enumerate(said) if m]
    known = [(number, name) for number, name in numbered if not NO_CLASS.search(name)]
    counts = np.full(1 << 16, IGNORE, np.uint8)
    for place, (number, _) in enumerate(known[:IGNORE]):
        counts[number] = place
    return lambda data: counts[plane(data).clip(0, len(counts) - 1)], tuple(name for _, name in known)


def classed(mask_HW: np.ndarray, classes: int, first: int = 0) -> np.ndarray:
    """Classes from 0 of a mask whose classes begin at `first`; IGNORE for what lies outside. Bits count as classes."""
    mask_HW = mask_HW.astype(np.int32) - first
    return np.where((mask_HW >= 0) & (mask_HW < classes), mask_HW, IGNORE).astype(
        np.uint8 if classes < 256 else np.int32
    )


def instances(tree: Tree, name: str, images: Sequence[str], things: Sequence[str], asked: Sequence[bool]) -> Benchmark:
    """Retrieval where all other images of a query's thing are right. Images of nothing ("") are distractors."""
    codes_N = np.unique(np.asarray(things), return_inverse=True)[1]
    queries = np.flatnonzero(np.asarray(asked) & (np.asarray(things) != ""))
    rows = np.arange(len(images))
    judged = [(np.flatnonzero((codes_N == codes_N[q]) & (rows != q)), np.array([q])) for q in queries]
    return Benchmark(name, "retrieval", tree.index(images), queries=queries, gallery=rows, judged={"all": judged})


def copies(tree: Tree, name: str, images: Iterable[str], pairs: Sequence[tuple[str, str]]) -> Benchmark:
    """Copy detection: of all pairs of `images`, which are these `pairs`?"""
    images = sorted({posixpath.normpath(n) for n in images} | {n for pair in pairs for n in pair})
    index, row = tree.index(images), {image: i for i, image in enumerate(images)}
    found = np.asarray(sorted({tuple(sorted((row[a], row[b]))) for a, b in pairs}), np.int64).reshape(-1, 2)
    return Benchmark(name, "copies", index, pairs=found)


def depth_seen(benchmark: Benchmark, unit: float, images: int = 20) -> tuple[float, float]:
    """The least and largest distance, in metres, among 20 of its images spread over it: what a range might be."""
    seen = []
    assert benchmark.truth is not None
    for row in np.unique(np.linspace(0, len(benchmark.truth) - 1, images).astype(int)):
        try:
            counts_HW = benchmark.target(int(row))
        except (BadImage, OSError):
            continue
        if (measured := counts_HW[counts_HW > 0]).size:
            seen += np.quantile(measured * unit, [0.001, 0.999]).tolist()
    return (min(seen), max(seen)) if seen else (0.0, 0.0)
