"""Readers of published class labels: from folders, lists, or tables of the publisher.

Each function makes a `Benchmark` of a `Tree`; the caller (layouts.py) sets its name.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa

from troodon.evaluate.sets.benchmark import LABEL_SEPARATOR, UNCERTAIN, Benchmark, Tree, tag_benchmark
from troodon.images.index import SCHEMA, Index

Row = tuple[str, str, str | None]  # name of the file, label, split


def labelled(tree: Tree, rows: Sequence[Row], train_benchmark: str | None = None) -> Benchmark:
    names, labels, splits = zip(*sorted(rows)) if rows else ((), (), ())
    return Benchmark(tree.name, "label", tree.index(names, labels, splits), train_benchmark=train_benchmark)


def from_patterns(tree: Tree, splits: dict[str, str], train_benchmark: str | None = None) -> Benchmark:
    """One pattern for each split. Its group is the class. The split "" means no split."""
    rows: list[Row] = []
    for split, pattern in splits.items():
        rows += [(name, match[1], split or None) for name, match in tree.find(pattern)]
    return labelled(tree, rows, train_benchmark)


Parse = Callable[[str], tuple[str, str]]  # a line -> file, class; ValueError or LookupError if it has none


def from_lists(tree: Tree, lists: dict[str, str], parse: Parse, form: str = "{}") -> Benchmark:
    """Lists of images, one per line, for each split. Images are found by the last parts of their paths."""
    listed = []
    for split, pattern in lists.items():
        for name, _ in tree.find(pattern):
            parsed = tree.parse(name, tree.lines(name), lambda line: parse(line.strip()))
            listed += [(form.format(file.lstrip("/")), label, split) for file, label in parsed]
    by_suffix = tree.by_suffix({file.count("/") + 1 for file, _, _ in listed})
    return labelled(tree, [(by_suffix.get(file, file), label, split) for file, label, split in dict.fromkeys(listed)])


def folder_label(line: str) -> tuple[str, str]:
    """The label is the folder."""
    return line, _filled("/".join(PurePosixPath(line.strip("/")).parts[:-1]))


def last_word_label(line: str) -> tuple[str, str]:
    """The label is the last word."""
    file, _, label = line.rpartition(" ")
    return _filled(file), label


def first_word_label(line: str) -> tuple[str, str]:
    """The file is the first word, and the label is the rest."""
    file, _, label = line.partition(" ")
    return file, _filled(label)


def _filled(word: str) -> str:
    if not word:
        raise ValueError("a file or its class is missing")
    return word


def breed_label(line: str) -> tuple[str, str]:
    """The label is the file name without its number."""
    file = line.split()[0]
    return file, file.rpartition("_")[0]


def imagenet(tree: Tree) -> Benchmark:
    """One folder per class, or all validation images in one folder with the table of labels from Kaggle."""
    rows: list[Row] = [(name, m[2], m[1]) for name, m in tree.find(r"(train|val)/(n\d{8})/[^/]+")]
    flat = {PurePosixPath(name).stem: name for name, _ in tree.find(r"val/[^/]+\.JPEG")}
    if flat:
        name = tree.find_one(r"LOC_val_solution\.csv")
        table = tree.table(name)
        listed = tree.parse(
            name, [*zip(table["ImageId"], table["PredictionString"])], lambda row: (row[0], row[1].split()[0])
        )
        rows += [(flat[image], label, "val") for image, label in listed if image in flat]
    return labelled(tree, rows)


def imagenet_real(tree: Tree) -> Benchmark:
    """ReaL: correct labels of each ImageNet validation image, by its number. Images without a label are skipped."""
    labels = json.loads(tree.read(tree.find_one(r"real\.json")))
    rows: list[Row] = []
    for name, match in tree.find(r"val/(?:[^/]+/)?ILSVRC2012_val_(\d{8})\.JPEG"):
        if label := labels[int(match[1]) - 1]:
            rows.append((name, LABEL_SEPARATOR.join(map(str, label)), "test"))
    return labelled(tree, rows, train_benchmark="imagenet-1k")


def inaturalist(tree: Tree) -> Benchmark:
    rows: list[Row] = []
    for name, match in tree.find(r"(train|val)20\d\d\.json"):
        listed = json.loads(tree.read(name))
        label = {a["image_id"]: str(a["category_id"]) for a in listed["annotations"]}
        root = name.rpartition("/")[0]
        found = tree.parse(name, listed["images"], lambda image, label=label: (image["file_name"], label[image["id"]]))
        rows += [(f"{root}/{file}".lstrip("/"), label_of_file, match[1]) for file, label_of_file in found]
    return labelled(tree, rows)


def _mat(tree: Tree, pattern: str) -> dict:
    from scipy.io import loadmat

    return loadmat(io.BytesIO(tree.read(tree.find_one(pattern))), squeeze_me=True)


def cars(tree: Tree) -> Benchmark:
    rows: list[Row] = []
    for split, table, folder in (("train", r"cars_train_annos\.mat", "cars_train"),
                                 ("test", r"cars_test_annos_withlabels\.mat", "cars_test")):  # fmt: skip
        files = {PurePosixPath(n).name: n for n, _ in tree.find(rf"{folder}/[^/]+")}
        listed = [(str(e["fname"]), str(e["class"])) for e in np.atleast_1d(_mat(tree, table)["annotations"])]
        rows += [(files.get(name, f"{folder}/{name}"), label, split) for name, label in listed]
    return labelled(tree, rows)


def flowers(tree: Tree) -> Benchmark:
    """The training and validation sets together are the training images, as in the tables of the paper."""
    classes, sets = np.atleast_1d(_mat(tree, r"imagelabels\.mat")["labels"]), _mat(tree, r"setid\.mat")
    files = {int(match[1]): name for name, match in tree.find(r"jpg/image_(\d{5})\.jpg")}
    rows: list[Row] = []
    for part, split in (("trnid", "train"), ("valid", "train"), ("tstid", "test")):
        listed = np.atleast_1d(sets[part]).tolist()
        rows += [(files.get(n, f"jpg/image_{n:05d}.jpg"), str(classes[n - 1]), split) for n in listed]
    return labelled(tree, rows)


def cub(tree: Tree) -> Benchmark:
    tables = [tree.find_one(rf"{name}\.txt") for name in ("image_class_labels", "train_test_split", "images")]
    classes, in_train, files = (dict(tree.parse(name, tree.lines(name), _two_words)) for name in tables)
    root = tables[-1].rpartition("/")[0]

    def row(numbered: tuple[str, str]) -> Row:
        number, file = numbered
        return f"{root}/images/{file}".lstrip("/"), classes[number], "train" if in_train[number] == "1" else "test"

    return labelled(tree, tree.parse(tables[-1], [*files.items()], row))


def _two_words(line: str) -> tuple[str, str]:
    first, second = line.split()
    return first, second


def voc2007(tree: Tree) -> Benchmark:
    """PASCAL VOC 2007. The list of a class gives for every image: 1 present, -1 absent, 0 difficult.

    Boxes are those of the training images, of all objects including the difficult ones (pixels are counted from 1).
    """
    root = tree.find_one(r"ImageSets/Main/[a-z]+_test\.txt").rpartition("ImageSets/")[0]
    tags: dict[tuple[str, str], list[str]] = {}
    listed: dict[tuple[str, str], set[str]] = {}  # by class and split
    for name, match in tree.find(r"ImageSets/Main/([a-z]+)_(trainval|test)\.txt"):
        present = {"1": [match[1]], "0": [UNCERTAIN + match[1]], "-1": []}

        def row(line: str, present: dict[str, list[str]] = present) -> tuple[str, list[str]]:
            image, presence = line.split()
            return image, present[presence]

        for image, named in tree.parse(name, tree.lines(name) if name.startswith(root) else [], row):
            tags.setdefault((f"{root}JPEGImages/{image}.jpg", match[2]), []).extend(named)
            listed.setdefault((match[1], match[2]), set()).add(f"{root}JPEGImages/{image}.jpg")
    for (image, part), names in tags.items():  # what a line that cannot be read would have said is unknown
        names += [UNCERTAIN + name for (name, of), images in listed.items() if of == part and image not in images]
    splits = ["train" if part == "trainval" else part for _, part in tags]
    joined = [LABEL_SEPARATOR.join(names) for names in tags.values()]
    benchmark = tag_benchmark(tree, [image for image, _ in tags], joined, splits)
    files = [f"{root}Annotations/{PurePosixPath(image).stem}.xml" if part == "trainval" else "" for image, part in tags]
    objects = tuple(_boxes(tree.read(name)) if name in tree.entries else NO_BOXES for name in files)
    return replace(benchmark, objects=objects)


NO_BOXES = np.zeros((0, 4))


def _boxes(xml: bytes) -> np.ndarray:
    """Left, top, right and bottom of each object (K, 4), without its parts. No boxes if the file cannot be read."""
    try:
        boxes = ElementTree.fromstring(xml).findall("object/bndbox")
        edges = [[float(box.findtext(edge, "")) for edge in ("xmin", "ymin", "xmax", "ymax")] for box in boxes]
    except (ElementTree.ParseError, ValueError):
        return NO_BOXES
    return np.array(edges).reshape(-1, 4) - [1, 1, 0, 0]


class CifarRecords:
    """A binary file of CIFAR as a dataset: rows of one or two labels and 3 x 32 x 32 bytes."""

    def __init__(self, data: bytes, labels: int):
        self.rows = np.frombuffer(data, np.uint8).reshape(-1, labels + 3072)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.rows[row, self.labels :].reshape(3, 32, 32).transpose(1, 2, 0)

    def classes(self) -> list[str]:
        """The last label of each row. If there are two, the first is the coarse one."""
        return [str(label) for label in self.rows[:, self.labels - 1]]


def cifar(tree: Tree) -> Benchmark:
    """CIFAR-10 and CIFAR-100. Classes are numbers, in the order of the published list of names."""
    columns: list[list] = [[] for _ in SCHEMA.names]
    objects: dict[str, Any] = {}
    for name, match in tree.find(r"(data_batch_\d|test_batch|train|test)\.bin"):
        split = "test" if match[1].startswith("test") else "train"
        hundred = "batch" not in match[1]
        data = tree.read(name)
        records, key = CifarRecords(data, 2 if hundred else 1), f"object:{tree.root}/{name}"
        objects[key] = records
        count = len(records)
        for column, values in zip(columns, (
            [f"{tree.name}/{name}/{row:05d}" for row in range(count)], [key] * count, range(count), [-1] * count,
            records.classes(), [split] * count,
        )):  # fmt: skip
            column.extend(values)
    return Benchmark(tree.name, "label", Index(pa.table(columns, schema=SCHEMA), datasets=objects))
