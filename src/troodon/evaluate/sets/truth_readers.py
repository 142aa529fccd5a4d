"""How owners say what is true of their images, where it is a picture, or what shows the same.

Each function makes a `Benchmark` of a `Tree`; its name is set by who asks (layouts.py). Nothing here runs what a
file says: pickles give numbers, strings, lists and arrays, or nothing.
"""

import io
import json
import pickle
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from troodon.config import UsageError
from troodon.evaluate.sets.benchmark import IGNORE, Benchmark, Tree, classed, copies
from troodon.images.decode import plane


def by_pairs(tree: Tree, image: str, truth: tuple[str, ...], splits: dict[str, str], about: dict) -> Benchmark:
    """Images that fit a pattern, whose first group says the split, and the picture of each: its name by a template."""
    names, pictures, parts = [], [], []
    wanted = re.compile(image)
    for name, match in tree.found(image):
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
    """Of several years that lie in one devkit, the last."""
    names, pictures, parts = [], [], []
    for split in ("train", "val"):
        name = tree.found(rf"ImageSets/Segmentation/{split}\.txt")[-1][0]
        home = name[: -len(f"ImageSets/Segmentation/{split}.txt")]
        for line in tree.lines(name):
            names.append(f"{home}JPEGImages/{line.strip()}.jpg")
            pictures.append(f"{home}SegmentationClass/{line.strip()}.png")
            parts.append(split)
    return _pictured(tree, names, pictures, parts, {"kind": "mask", "read": voc_classes, "classes": VOC})


def kitti(tree: Tree) -> Benchmark:
    """Depths in 1/256 metres; the raw image of a depth has the same drive and number."""
    place = r"((?:\d{4}_\d\d_\d\d)_drive_\d{4}_sync)"
    raw = {(m[1], m[2]): name for name, m in tree.found(rf"{place}/image_02/data/(\d+)\.(?:png|jpg)")}
    truths = tree.found(rf"(train|val)/{place}/proj_depth/groundtruth/image_02/(\d+)\.png")
    both = [(raw[m[2], m[3]], name, m[1]) for name, m in truths if (m[2], m[3]) in raw]
    names, pictures, parts = zip(*both) if both else ((), (), ())
    return _pictured(tree, names, pictures, parts, {"kind": "depth", "unit": 1 / 256, "range": (0.001, 80.0)})


def rotated(data: bytes) -> np.ndarray:
    """Millimetres of SUN RGB-D, which keeps them turned by three bits."""
    counts = plane(data).astype(np.uint16)
    return (counts >> 3) | (counts << 13)


def sun_rgbd(tree: Tree) -> Benchmark:
    """The picture of an image is the one in the folder depth beside its folder; there is no split by name."""
    images = {m[1]: name for name, m in tree.found(r"SUNRGBD/(.+)/image/[^/]+\.jpg")}
    both = [(images[m[1]], name) for name, m in tree.found(r"SUNRGBD/(.+)/depth/[^/]+\.png") if m[1] in images]
    names, pictures = zip(*both) if both else ((), ())
    about = {"kind": "depth", "read": rotated, "unit": 0.001, "range": (0.001, 10.0)}
    return _pictured(tree, names, pictures, [None] * len(names), about)


# ---- retrieval and copies


class _Plain(pickle.Unpickler):
    """A pickle of numbers, strings, lists and arrays; whatever else one names is refused, and nothing is run."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"_reconstruct": np.zeros(1).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module.partition(".")[0] == "numpy" and name in known:
            return known[name]
        raise pickle.UnpicklingError(f"names {module}.{name}, which plain data does not")


def revisited(tree: Tree) -> Benchmark:
    """Oxford and Paris revisited: easy, medium and hard, queries cut out by their boxes, areas by trapezoids."""
    name = tree.one(r"gnd_r(?:oxford5k|paris6k)\.pkl")
    try:
        said = _Plain(io.BytesIO(tree.read(name)), encoding="latin1").load()
        gallery, queries, truth = said["imlist"], said["qimlist"], said["gnd"]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{tree.root}/{name}: is not the ground truth that its name says ({error})") from None
    files = {PurePosixPath(n).stem: n for n, _ in tree.found(r"jpg/[^/]+\.jpg")}
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
    base, asked = (json.loads(tree.read(tree.one(rf"{name}\.json"))) for name in ("MET_database", "testset"))
    gallery = [(entry["path"], str(entry["id"])) for entry in base]
    queries = [(e["path"], str(e["MET_id"])) for e in asked if e.get("MET_id") is not None]
    paths = [path.removeprefix("./") for path, _ in (*gallery, *queries)]
    ends = tree.ends({path.count("/") + 1 for path in paths})
    names = [ends.get(path, path) for path in paths]
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
    new, old = ({m[1]: n for n, m in tree.found(rf"{f}/([^/]+)\.(?:png|jpg)")} for f in ("new", "old"))
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
    for name, match in tree.found(r"(?:original|strong)/(\d{4})\d\d\.jpg"):
        groups.setdefault(match[1], []).append(name)
    pairs = [(a, b) for group in groups.values() for i, a in enumerate(group) for b in group[i + 1 :]]
    images = [n for n in tree.images() if not re.search(r"(^|/)(jpeg|crops)/", n)]
    return copies(tree, tree.name, images, pairs)
