"""How owners say what is true of their images, where it is a class: by folders, lists, or tables of their own.

Each function makes a `Benchmark` of a `Tree`; its name is set by who asks (layouts.py).
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

from troodon.evaluate.sets.benchmark import SEVERAL, UNSURE, Benchmark, Tree, tagged
from troodon.images.index import SCHEMA, Index

Row = tuple[str, str, str | None]  # name of the file, label, split


def labelled(tree: Tree, rows: Sequence[Row], learns_from: str | None = None) -> Benchmark:
    names, labels, splits = zip(*sorted(rows)) if rows else ((), (), ())
    return Benchmark(tree.name, "label", tree.index(names, labels, splits), learns_from=learns_from)


def by_names(tree: Tree, splits: dict[str, str], learns_from: str | None = None) -> Benchmark:
    """A pattern for each split, whose group is the class; the split "" is none."""
    rows: list[Row] = []
    for split, pattern in splits.items():
        rows += [(name, match[1], split or None) for name, match in tree.found(pattern)]
    return labelled(tree, rows, learns_from)


Parse = Callable[[str], tuple[str, str]]  # a line -> file, class


def by_lists(tree: Tree, lists: dict[str, str], parse: Parse, form: str = "{}") -> Benchmark:
    """Lists of images, a line each, for each split. Images are known by the ends of their paths."""
    said = []
    for split, pattern in lists.items():
        for name, _ in tree.found(pattern):
            parsed = (parse(line.strip()) for line in tree.lines(name))
            said += [(form.format(file.lstrip("/")), label, split) for file, label in parsed]
    ends = tree.ends({file.count("/") + 1 for file, _, _ in said})
    return labelled(tree, [(ends.get(file, file), label, split) for file, label, split in dict.fromkeys(said)])


def foldered(line: str) -> tuple[str, str]:
    """The class is the folder."""
    return line, str(PurePosixPath(line).parent).strip("/")


def spaced(line: str) -> tuple[str, str]:
    """The last word is the class."""
    file, _, label = line.rpartition(" ")
    return file, label


def first_word(line: str) -> tuple[str, str]:
    """The first word is the file, all the rest the class."""
    file, _, label = line.partition(" ")
    return file, label


def breed(line: str) -> tuple[str, str]:
    """The class is the name of the file without its number."""
    file = line.split()[0]
    return file, file.rpartition("_")[0]


def imagenet(tree: Tree) -> Benchmark:
    """Folders for each class; or validation images in one folder, and Kaggle's table of what they are."""
    rows: list[Row] = [(name, m[2], m[1]) for name, m in tree.found(r"(train|val)/(n\d{8})/[^/]+")]
    flat = {PurePosixPath(name).stem: name for name, _ in tree.found(r"val/[^/]+\.JPEG")}
    if flat:
        table = tree.table(tree.one(r"LOC_val_solution\.csv"))
        said = zip(table["ImageId"], table["PredictionString"])
        rows += [(flat[image], words.split()[0], "val") for image, words in said if image in flat]
    return labelled(tree, rows)


def imagenet_real(tree: Tree) -> Benchmark:
    """Several right labels for each validation image of ImageNet, in the order of their numbers; of some, none."""
    answers = json.loads(tree.read(tree.one(r"real\.json")))
    rows: list[Row] = []
    for name, match in tree.found(r"val/(?:[^/]+/)?ILSVRC2012_val_(\d{8})\.JPEG"):
        if answer := answers[int(match[1]) - 1]:
            rows.append((name, SEVERAL.join(map(str, answer)), "test"))
    return labelled(tree, rows, learns_from="imagenet-1k")


def inaturalist(tree: Tree) -> Benchmark:
    rows: list[Row] = []
    for name, match in tree.found(r"(train|val)20\d\d\.json"):
        said = json.loads(tree.read(name))
        label = {a["image_id"]: str(a["category_id"]) for a in said["annotations"]}
        home = name.rpartition("/")[0]
        rows += [(f"{home}/{i['file_name']}".lstrip("/"), label[i["id"]], match[1]) for i in said["images"]]
    return labelled(tree, rows)


def _mat(tree: Tree, pattern: str) -> dict:
    from scipy.io import loadmat

    return loadmat(io.BytesIO(tree.read(tree.one(pattern))), squeeze_me=True)


def cars(tree: Tree) -> Benchmark:
    rows: list[Row] = []
    for split, table, folder in (("train", r"cars_train_annos\.mat", "cars_train"),
                                 ("test", r"cars_test_annos_withlabels\.mat", "cars_test")):  # fmt: skip
        files = {PurePosixPath(n).name: n for n, _ in tree.found(rf"{folder}/[^/]+")}
        said = [(str(e["fname"]), str(e["class"])) for e in np.atleast_1d(_mat(tree, table)["annotations"])]
        rows += [(files.get(name, f"{folder}/{name}"), label, split) for name, label in said]
    return labelled(tree, rows)


def flowers(tree: Tree) -> Benchmark:
    """Trained on the images of its training and validation sets together, as the paper's tables are."""
    classes, sets = np.atleast_1d(_mat(tree, r"imagelabels\.mat")["labels"]), _mat(tree, r"setid\.mat")
    files = {int(match[1]): name for name, match in tree.found(r"jpg/image_(\d{5})\.jpg")}
    rows: list[Row] = []
    for part, split in (("trnid", "train"), ("valid", "train"), ("tstid", "test")):
        said = np.atleast_1d(sets[part]).tolist()
        rows += [(files.get(n, f"jpg/image_{n:05d}.jpg"), str(classes[n - 1]), split) for n in said]
    return labelled(tree, rows)


def cub(tree: Tree) -> Benchmark:
    files, classes, teaches = (
        dict(line.split() for line in tree.lines(tree.one(rf"{name}\.txt")))
        for name in ("images", "image_class_labels", "train_test_split")
    )
    home = tree.one(r"images\.txt").rpartition("/")[0]
    return labelled(tree, [
        (f"{home}/images/{file}".lstrip("/"), classes[i], "train" if teaches[i] == "1" else "test")
        for i, file in files.items()
    ])  # fmt: skip


def voc2007(tree: Tree) -> Benchmark:
    """A list for each class says of every image whether it is there (1), not (-1), or hard to tell (0).

    The boxes are those of the images to learn from, all things that are there, hard to tell or not (pixels from 1).
    """
    home = tree.one(r"ImageSets/Main/[a-z]+_test\.txt").rpartition("ImageSets/")[0]
    tags: dict[tuple[str, str], list[str]] = {}
    for name, match in tree.found(r"ImageSets/Main/([a-z]+)_(trainval|test)\.txt"):
        for image, answer in (line.split() for line in tree.lines(name) if name.startswith(home)):
            found = tags.setdefault((f"{home}JPEGImages/{image}.jpg", match[2]), [])
            found += {"1": [match[1]], "0": [UNSURE + match[1]], "-1": []}[answer]
    splits = ["train" if part == "trainval" else part for _, part in tags]
    found = tagged(tree, [image for image, _ in tags], [SEVERAL.join(found) for found in tags.values()], splits)
    homes = [f"{home}Annotations/{PurePosixPath(image).stem}.xml" if part == "trainval" else "" for image, part in tags]
    return replace(found, objects=tuple(_boxes(tree.read(name)) if name in tree.where else NOWHERE for name in homes))


NOWHERE = np.zeros((0, 4))


def _boxes(said: bytes) -> np.ndarray:
    """Left, top, right and bottom of each thing (K, 4), none where the file cannot be read; its parts are no things."""
    try:
        boxes = ElementTree.fromstring(said).findall("object/bndbox")
        edges = [[float(box.findtext(edge, "")) for edge in ("xmin", "ymin", "xmax", "ymax")] for box in boxes]
    except (ElementTree.ParseError, ValueError):
        return NOWHERE
    return np.array(edges).reshape(-1, 4) - [1, 1, 0, 0]


class Records:
    """CIFAR's binary files as a data set: rows of one or two labels and 3 x 32 x 32 bytes."""

    def __init__(self, data: bytes, labels: int):
        self.rows = np.frombuffer(data, np.uint8).reshape(-1, labels + 3072)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.rows[row, self.labels :].reshape(3, 32, 32).transpose(1, 2, 0)

    def classes(self) -> list[str]:
        """The last of the labels: of two, the first is coarse."""
        return [str(label) for label in self.rows[:, self.labels - 1]]


def cifar(tree: Tree) -> Benchmark:
    """Both CIFARs; numbers for names, in the order of the owner's list."""
    columns: list[list] = [[] for _ in SCHEMA.names]
    objects: dict[str, Any] = {}
    for name, match in tree.found(r"(data_batch_\d|test_batch|train|test)\.bin"):
        split = "test" if match[1].startswith("test") else "train"
        hundred = "batch" not in match[1]
        data = tree.read(name)
        records, key = Records(data, 2 if hundred else 1), f"object:{tree.root}/{name}"
        objects[key] = records
        count = len(records)
        for column, values in zip(columns, (
            [f"{tree.name}/{name}/{row:05d}" for row in range(count)], [key] * count, range(count), [-1] * count,
            records.classes(), [split] * count,
        )):  # fmt: skip
            column.extend(values)
    return Benchmark(tree.name, "label", Index(pa.table(columns, schema=SCHEMA), objects=objects))
