"""How owners say what is true of their images: by folders, by lists, by pairs of pictures, by a format of their own.

Each function makes a `Benchmark` of a `Tree`; its name is set by who asks. Patterns may begin anywhere in the path, the
place's own name included. Nothing here runs what a file says: pickles give numbers, strings and lists, or nothing.
"""

import io
import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from troodon.config import UsageError
from troodon.data.benchmarks import IGNORE, SEVERAL, Benchmark, Tree, classed, copies
from troodon.data.decode import plane
from troodon.data.index import SCHEMA, Index

Row = tuple[str, str, str | None]  # name of the file, label, split


def labelled(tree: Tree, rows: Sequence[Row], learns_from: str | None = None) -> Benchmark:
    names, labels, splits = zip(*sorted(rows)) if rows else ((), (), ())
    return Benchmark(tree.name, "label", tree.index(names, labels, splits), learns_from=learns_from)


def found(tree: Tree, pattern: str) -> list[tuple[str, re.Match]]:
    """The files that fit, and how."""
    wanted = re.compile(rf"(?:.*/)?{pattern}")
    said = ((name, wanted.fullmatch(f"{tree.name}/{name}")) for name in tree.where)
    return [(name, match) for name, match in said if match]


def one(tree: Tree, pattern: str) -> str:
    """The file that fits."""
    names = [name for name, _ in found(tree, pattern)]
    if not names:
        raise UsageError(f"{tree.root}: has no file that is called like {pattern}")
    return names[0]


# ---- labels


def by_names(tree: Tree, splits: dict[str, str], learns_from: str | None = None) -> Benchmark:
    """A pattern for each split, whose group is the class; the split "" is none."""
    rows: list[Row] = []
    for split, pattern in splits.items():
        rows += [(name, match[1], split or None) for name, match in found(tree, pattern)]
    return labelled(tree, rows, learns_from)


Parse = Callable[[str], tuple[str, str]]  # a line -> file, class


def by_lists(tree: Tree, lists: dict[str, str], parse: Parse, form: str = "{}") -> Benchmark:
    """Lists of images, a line each, for each split. Images are known by the ends of their paths."""
    rows, ends = [], _ends(tree)
    for split, pattern in lists.items():
        for name, _ in found(tree, pattern):
            for line in tree.lines(name):
                file, label = parse(line.strip())
                file = form.format(file.lstrip("/"))
                if file not in ends:
                    raise UsageError(f"{tree.root}: {file} is missing, which {name} names")
                rows.append((ends[file], label, split))
    return labelled(tree, list(dict.fromkeys(rows)))


def _ends(tree: Tree) -> dict[str, str]:
    """Images by each of the ends of their paths that begin at a folder."""
    ends = {}
    for name in tree.images():
        parts = name.split("/")
        ends.update({"/".join(parts[i:]): name for i in range(max(0, len(parts) - 5), len(parts))})
    return ends


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
    rows: list[Row] = [(n, m[1], m[2]) for n, m in _imagenet(tree, r"train/(n\d{8})/[^/]+", "train")]
    rows += [(n, m[1], m[2]) for n, m in _imagenet(tree, r"val/(n\d{8})/[^/]+", "val")]
    flat = {PurePosixPath(name).stem: name for name, _ in found(tree, r"val/[^/]+\.JPEG")}
    if flat:
        table = tree.table(one(tree, r"LOC_val_solution\.csv"))
        said = zip(table["ImageId"], table["PredictionString"])
        rows += [(flat[image], words.split()[0], "val") for image, words in said if image in flat]
    return labelled(tree, rows)


def _imagenet(tree: Tree, pattern: str, split: str) -> list[tuple[str, tuple]]:
    return [(name, (name, match[1], split)) for name, match in found(tree, pattern)]


def imagenet_real(tree: Tree) -> Benchmark:
    """Several right labels for each validation image of ImageNet, in the order of their numbers; of some, none."""
    answers = json.loads(tree.read(one(tree, r"real\.json")))
    rows: list[Row] = []
    for name, match in found(tree, r"val/(?:[^/]+/)?ILSVRC2012_val_(\d{8})\.JPEG"):
        if answer := answers[int(match[1]) - 1]:
            rows.append((name, SEVERAL.join(map(str, answer)), "test"))
    return labelled(tree, rows, learns_from="imagenet-1k")


def inaturalist(tree: Tree) -> Benchmark:
    rows: list[Row] = []
    for name, match in found(tree, r"(train|val)20\d\d\.json"):
        said = json.loads(tree.read(name))
        label = {a["image_id"]: str(a["category_id"]) for a in said["annotations"]}
        home = name.rpartition("/")[0]
        rows += [(f"{home}/{i['file_name']}".lstrip("/"), label[i["id"]], match[1]) for i in said["images"]]
    return labelled(tree, rows)


def _mat(tree: Tree, pattern: str) -> dict:
    from scipy.io import loadmat

    return loadmat(io.BytesIO(tree.read(one(tree, pattern))), squeeze_me=True)


def cars(tree: Tree) -> Benchmark:
    rows: list[Row] = []
    for split, table, folder in (("train", r"cars_train_annos\.mat", "cars_train"),
                                 ("test", r"cars_test_annos_withlabels\.mat", "cars_test")):  # fmt: skip
        files = {PurePosixPath(n).name: n for n, _ in found(tree, rf"{folder}/[^/]+")}
        for entry in np.atleast_1d(_mat(tree, table)["annotations"]):
            rows.append((files.get(str(entry["fname"]), f"{folder}/{entry['fname']}"), str(entry["class"]), split))
    return labelled(tree, rows)


def flowers(tree: Tree) -> Benchmark:
    """Trained on the images of its training and validation sets together, as the paper's tables are."""
    classes, sets = np.atleast_1d(_mat(tree, r"imagelabels\.mat")["labels"]), _mat(tree, r"setid\.mat")
    rows: list[Row] = []
    for part, split in (("trnid", "train"), ("valid", "train"), ("tstid", "test")):
        for number in np.atleast_1d(sets[part]):
            rows.append((one(tree, rf"jpg/image_{number:05d}\.jpg"), str(classes[number - 1]), split))
    return labelled(tree, rows)


def cub(tree: Tree) -> Benchmark:
    files, classes, teaches = (
        dict(line.split() for line in tree.lines(one(tree, rf"{name}\.txt")))
        for name in ("images", "image_class_labels", "train_test_split")
    )
    home = one(tree, r"images\.txt").rpartition("/")[0]
    return labelled(tree, [
        (f"{home}/images/{file}".lstrip("/"), classes[i], "train" if teaches[i] == "1" else "test")
        for i, file in files.items()
    ])  # fmt: skip


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
    for name, match in found(tree, r"(data_batch_\d|test_batch|train|test)\.bin"):
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


# ---- masks and depths


def by_pairs(tree: Tree, image: str, truth: tuple[str, ...], splits: dict[str, str], about: dict) -> Benchmark:
    """Images that fit a pattern, whose first group says the split, and the picture of each: its name by a template."""
    names, pictures, parts = [], [], []
    wanted = re.compile(image)
    for name, match in found(tree, image):
        inside = name[len(name) - (match.end() - _start(match, image)) :]
        picture = next((p for p in (wanted.sub(t, inside) for t in truth)), "")
        home = name[: len(name) - len(inside)]
        if home + picture in tree.where:
            names.append(name)
            pictures.append(home + picture)
            parts.append(splits[match[1]])
    return _pictured(tree, names, pictures, parts, about)


def _start(match: re.Match, image: str) -> int:
    """Where the pattern itself begins in what it was found in, after the folders before it."""
    last = None
    for start in [0, *(m.end() for m in re.finditer("/", match.string))]:
        if re.compile(image).fullmatch(match.string, start):
            last = start
    assert last is not None
    return last


def _pictured(
    tree: Tree, names: Sequence[str], pictures: Sequence[str], splits: Sequence[str | None], about: dict
) -> Benchmark:
    return Benchmark(tree.name, images=tree.index(names, splits=splits), truth=tree.index(pictures), **about)


def numbers(count: int) -> tuple[str, ...]:
    return tuple(str(i + 1) for i in range(count))


def ade20k(data: bytes) -> np.ndarray:
    """150 classes from 1; 0 is everything else."""
    return classed(plane(data), 150, first=1)


# The 19 classes that count, by the number they have in the files.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv",
)  # fmt: skip


def cityscapes(data: bytes) -> np.ndarray:
    counts = np.full(256, IGNORE, np.uint8)
    counts[list(CITYSCAPES_IDS)] = range(len(CITYSCAPES_IDS))
    return counts[plane(data).clip(0, 255)]


def voc_classes(data: bytes) -> np.ndarray:
    return classed(plane(data), len(VOC))


def voc(tree: Tree) -> Benchmark:
    names, pictures, parts = [], [], []
    for split in ("train", "val"):
        name = one(tree, rf"ImageSets/Segmentation/{split}\.txt")
        home = name[: -len(f"ImageSets/Segmentation/{split}.txt")]
        for line in tree.lines(name):
            names.append(f"{home}JPEGImages/{line.strip()}.jpg")
            pictures.append(f"{home}SegmentationClass/{line.strip()}.png")
            parts.append(split)
    return _pictured(tree, names, pictures, parts, {"kind": "mask", "read": voc_classes, "classes": VOC})


def kitti(tree: Tree) -> Benchmark:
    """Depths in 1/256 metres; the raw image of a depth has the same drive and number."""
    place = r"((?:\d{4}_\d\d_\d\d)_drive_\d{4}_sync)"
    raw = {(m[1], m[2]): name for name, m in found(tree, rf"{place}/image_02/data/(\d+)\.(?:png|jpg)")}
    truths = found(tree, rf"(train|val)/{place}/proj_depth/groundtruth/image_02/(\d+)\.png")
    both = [(raw[m[2], m[3]], name, m[1]) for name, m in truths if (m[2], m[3]) in raw]
    names, pictures, parts = zip(*both) if both else ((), (), ())
    return _pictured(tree, names, pictures, parts, {"kind": "depth", "unit": 1 / 256, "range": (0.001, 80.0)})


def rotated(data: bytes) -> np.ndarray:
    """Millimetres of SUN RGB-D, which keeps them turned by three bits."""
    counts = plane(data).astype(np.uint16)
    return (counts >> 3) | (counts << 13)


def sun_rgbd(tree: Tree) -> Benchmark:
    """The picture of an image is the one in the folder depth beside its folder; there is no split by name."""
    images = {m[1]: name for name, m in found(tree, r"SUNRGBD/(.+)/image/[^/]+\.jpg")}
    both = [(images[m[1]], name) for name, m in found(tree, r"SUNRGBD/(.+)/depth/[^/]+\.png") if m[1] in images]
    names, pictures = zip(*both) if both else ((), ())
    about = {"kind": "depth", "read": rotated, "unit": 0.001, "range": (0.001, 10.0)}
    return _pictured(tree, names, pictures, [None] * len(names), about)


# ---- retrieval and copies


class _Plain(pickle.Unpickler):
    """A pickle of numbers, strings, lists and arrays; whatever else one names is refused, and nothing is run."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "_reconstruct": np.core.multiarray._reconstruct if hasattr(np, "core") else None,
            "ndarray": np.ndarray, "dtype": np.dtype,
        }  # fmt: skip
        if module.partition(".")[0] == "numpy" and known.get(name) is not None:
            return known[name]
        if module.partition(".")[0] == "numpy" and name == "scalar":
            return lambda dtype, data: np.frombuffer(data, dtype)[0]
        raise pickle.UnpicklingError(f"names {module}.{name}, which plain data does not")


def revisited(tree: Tree) -> Benchmark:
    """Oxford and Paris revisited: easy, medium and hard, queries cut out by their boxes, areas by trapezoids."""
    name = one(tree, r"gnd_r(?:oxford5k|paris6k)\.pkl")
    try:
        said = _Plain(io.BytesIO(tree.read(name)), encoding="latin1").load()
        gallery, queries, truth = said["imlist"], said["qimlist"], said["gnd"]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{tree.root}/{name}: is not the ground truth that its name says ({error})") from None
    files = {PurePosixPath(n).stem: n for n, _ in found(tree, r"jpg/[^/]+\.jpg")}
    names = [files.get(n, f"jpg/{n}.jpg") for n in (*gallery, *queries)]
    first = len(gallery)
    parts = {"easy": (("easy",), ("hard", "junk")), "medium": (("easy", "hard"), ("junk",)),
             "hard": (("hard",), ("easy", "junk"))}  # fmt: skip

    def rows(query: dict, of: tuple[str, ...]) -> np.ndarray:
        return np.concatenate([np.asarray(query[name], np.int64).ravel() for name in of])

    judged = {d: [(rows(q, right), rows(q, nothing)) for q in truth] for d, (right, nothing) in parts.items()}
    boxes = {first + i: tuple(float(v) for v in q["bbx"]) for i, q in enumerate(truth)}
    return Benchmark(
        tree.name, "retrieval", tree.index(names), queries=np.arange(first, len(names)), gallery=np.arange(first),
        judged=judged, boxes=boxes, average="trapezoids",  # pyrefly: ignore[bad-argument-type]
    )  # fmt: skip


def met(tree: Tree) -> Benchmark:
    """The museum's images are the gallery; photographs of its works ask. Others, of no work of it, ask for nothing."""
    base, asked = (json.loads(tree.read(one(tree, rf"{name}\.json"))) for name in ("MET_database", "testset"))
    gallery = [(entry["path"], str(entry["id"])) for entry in base]
    queries = [(e["path"], str(e["MET_id"])) for e in asked if e.get("MET_id") is not None]
    ends = _ends(tree)
    names = [ends.get(path.removeprefix("./"), path) for path, _ in (*gallery, *queries)]
    things = np.array([thing for _, thing in gallery])
    nothing = np.zeros(0, np.int64)
    judged = {"all": [(np.flatnonzero(things == thing), nothing) for _, thing in queries]}
    first = len(gallery)
    return Benchmark(
        tree.name, "retrieval", tree.index(names), queries=np.arange(first, len(names)), gallery=np.arange(first),
        judged=judged,
    )  # fmt: skip


def amstertime(tree: Tree) -> Benchmark:
    """An old photograph asks for the new one of its name."""
    new, old = ({m[1]: n for n, m in found(tree, rf"{f}/([^/]+)\.(?:png|jpg)")} for f in ("new", "old"))
    both = [key for key in old if key in new]
    gallery, queries = list(new), both
    names = [*(new[key] for key in gallery), *(old[key] for key in queries)]
    place, nothing = {key: i for i, key in enumerate(gallery)}, np.zeros(0, np.int64)
    judged = {"all": [(np.array([place[key]]), nothing) for key in queries]}
    first = len(gallery)
    return Benchmark(
        tree.name, "retrieval", tree.index(names), queries=np.arange(first, len(names)), gallery=np.arange(first),
        judged=judged,
    )  # fmt: skip


def copydays(tree: Tree) -> Benchmark:
    """An original and its strong attacks share the first four digits of their names; other images are distractors."""
    groups: dict[str, list[str]] = {}
    for name, match in found(tree, r"(?:original|strong)/(\d{4})\d\d\.jpg"):
        groups.setdefault(match[1], []).append(name)
    pairs = [(a, b) for group in groups.values() for i, a in enumerate(group) for b in group[i + 1 :]]
    images = [n for n in tree.images() if not re.search(r"(^|/)(jpeg|crops)/", n)]
    return copies(tree, tree.name, images, pairs)
