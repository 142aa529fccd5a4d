"""Readers of published ground truth that is an image (masks, depths), or that pairs images (retrieval, copies).

Each function makes a `Benchmark` of a `Tree`; the caller (layouts.py) sets its name. Nothing here executes the contents
of a file: pickles may only contain numbers, strings, lists and arrays.
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
from troodon.evaluate.sets.benchmark import IGNORE, Benchmark, Tree, copy_benchmark, shift_classes
from troodon.images.decode import decode_single_channel


def from_pairs(tree: Tree, image: str, truth: tuple[str, ...], splits: dict[str, str], fields: dict) -> Benchmark:
    """Images that match a pattern, whose first group is the split. `truth` are templates of ground truth names."""
    names, truth_names, image_splits = [], [], []
    regex = re.compile(image)
    for name, match in tree.find(image):
        suffix = name[len(name) - (match.end() - _match_start(match, image)) :]
        truth_name = next((p for p in (regex.sub(t, suffix) for t in truth)), "")
        prefix = name[: len(name) - len(suffix)]
        if prefix + truth_name in tree.entries:
            names.append(name)
            truth_names.append(prefix + truth_name)
            image_splits.append(splits[match[1]])
    return _benchmark(tree, names, truth_names, image_splits, fields)


def _match_start(match: re.Match, image: str) -> int:
    """The position where the pattern itself starts in the matched path, after the leading folders."""
    last = None
    for start in [0, *(m.end() for m in re.finditer("/", match.string))]:
        if re.compile(image).fullmatch(match.string, start):
            last = start
    assert last is not None
    return last


def _benchmark(
    tree: Tree, names: Sequence[str], truth_names: Sequence[str], splits: Sequence[str | None], fields: dict
) -> Benchmark:
    return Benchmark(tree.name, images=tree.index(names, splits=splits), ground_truth=tree.index(truth_names), **fields)


def numbered_classes(count: int) -> tuple[str, ...]:
    return tuple(str(i + 1) for i in range(count))


def ade20k(data: bytes) -> np.ndarray:
    """150 classes, starting at 1; 0 is ignored."""
    return shift_classes(decode_single_channel(data), 150, first=1)


# The 19 classes that are evaluated, by their label id in the files.
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
    class_of = np.full(256, IGNORE, np.uint8)
    class_of[list(CITYSCAPES_IDS)] = range(len(CITYSCAPES_IDS))
    return class_of[decode_single_channel(data).clip(0, 255)]


def voc_classes(data: bytes) -> np.ndarray:
    return shift_classes(decode_single_channel(data), len(VOC))


def voc(tree: Tree) -> Benchmark:
    """PASCAL VOC segmentation. If one devkit contains several years, the last one is used."""
    names, truth_names, splits = [], [], []
    for split in ("train", "val"):
        name = tree.find(rf"ImageSets/Segmentation/{split}\.txt")[-1][0]
        prefix = name[: -len(f"ImageSets/Segmentation/{split}.txt")]
        for line in tree.lines(name):
            names.append(f"{prefix}JPEGImages/{line.strip()}.jpg")
            truth_names.append(f"{prefix}SegmentationClass/{line.strip()}.png")
            splits.append(split)
    return _benchmark(tree, names, truth_names, splits, {"kind": "mask", "read": voc_classes, "classes": VOC})


def kitti(tree: Tree) -> Benchmark:
    """KITTI: depths in 1/256 metres. The raw image of a depth map has the same drive and number."""
    drive = r"((?:\d{4}_\d\d_\d\d)_drive_\d{4}_sync)"
    raw = {(m[1], m[2]): name for name, m in tree.find(rf"{drive}/image_02/data/(\d+)\.(?:png|jpg)")}
    truth_matches = tree.find(rf"(train|val)/{drive}/proj_depth/groundtruth/image_02/(\d+)\.png")
    pairs = [(raw[m[2], m[3]], name, m[1]) for name, m in truth_matches if (m[2], m[3]) in raw]
    names, truth_names, splits = zip(*pairs) if pairs else ((), (), ())
    return _benchmark(tree, names, truth_names, splits, {"kind": "depth", "unit": 1 / 256, "range": (0.001, 80.0)})


def sun_rgbd_depth(data: bytes) -> np.ndarray:
    """Depths of SUN RGB-D in millimetres, which are stored rotated by three bits."""
    units = decode_single_channel(data).astype(np.uint16)
    return (units >> 3) | (units << 13)


def sun_rgbd(tree: Tree) -> Benchmark:
    """SUN RGB-D: the depth map is in the folder depth beside the folder of the image. No split is defined."""
    images = {m[1]: name for name, m in tree.find(r"SUNRGBD/(.+)/image/[^/]+\.jpg")}
    pairs = [(images[m[1]], name) for name, m in tree.find(r"SUNRGBD/(.+)/depth/[^/]+\.png") if m[1] in images]
    names, truth_names = zip(*pairs) if pairs else ((), ())
    fields = {"kind": "depth", "read": sun_rgbd_depth, "unit": 0.001, "range": (0.001, 10.0)}
    return _benchmark(tree, names, truth_names, [None] * len(names), fields)


# ---- retrieval and copies


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles numbers, strings, lists and arrays. Anything else is refused, and no code is executed."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct": np.zeros(1).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module.partition(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not plain data")


def revisited(tree: Tree) -> Benchmark:
    """Oxford and Paris revisited: easy, medium and hard; queries are cropped to their boxes; trapezoidal AP."""
    name = tree.find_one(r"gnd_r(?:oxford5k|paris6k)\.pkl")
    try:
        contents = _PlainUnpickler(io.BytesIO(tree.read(name)), encoding="latin1").load()
        gallery, queries, truth = contents["imlist"], contents["qimlist"], contents["gnd"]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{tree.root}/{name}: is not the expected ground truth ({error})") from None
    files = {PurePosixPath(n).stem: n for n, _ in tree.find(r"jpg/[^/]+\.jpg")}
    names = [files.get(n, f"jpg/{n}.jpg") for n in (*gallery, *queries)]
    first = len(gallery)
    difficulties = {"easy": (("easy",), ("hard", "junk")), "medium": (("easy", "hard"), ("junk",)),
                    "hard": (("hard",), ("easy", "junk"))}  # fmt: skip

    def rows(query: dict, keys: tuple[str, ...]) -> np.ndarray:
        return np.concatenate([np.asarray(query[key], np.int64).ravel() for key in keys])

    relevance = {
        difficulty: [(rows(q, relevant), rows(q, ignored)) for q in truth]
        for difficulty, (relevant, ignored) in difficulties.items()
    }
    boxes = {first + i: tuple(float(v) for v in q["bbx"]) for i, q in enumerate(truth)}
    return Benchmark(
        tree.name, "retrieval", tree.index(names), queries=np.arange(first, len(names)), gallery=np.arange(first),
        relevance=relevance, boxes=boxes, ap_method="trapezoids",  # pyrefly: ignore[bad-argument-type]
    )  # fmt: skip


def met(tree: Tree) -> Benchmark:
    """The Met: images of the museum are the gallery, photographs of its works the queries. Others are skipped."""
    database, test_set = (
        json.loads(tree.read(tree.find_one(rf"{name}\.json"))) for name in ("MET_database", "testset")
    )
    gallery = [(entry["path"], str(entry["id"])) for entry in database]
    queries = [(e["path"], str(e["MET_id"])) for e in test_set if e.get("MET_id") is not None]
    paths = [path.removeprefix("./") for path, _ in (*gallery, *queries)]
    by_suffix = tree.by_suffix({path.count("/") + 1 for path in paths})
    names = [by_suffix.get(path, path) for path in paths]
    instances = np.array([instance for _, instance in gallery])
    ignored = np.zeros(0, np.int64)
    relevance = {"all": [(np.flatnonzero(instances == instance), ignored) for _, instance in queries]}
    first = len(gallery)
    return Benchmark(
        tree.name, "retrieval", tree.index(names), queries=np.arange(first, len(names)), gallery=np.arange(first),
        relevance=relevance,
    )  # fmt: skip


def amstertime(tree: Tree) -> Benchmark:
    """AmsterTime: each query is an old photograph; the new photograph of the same name is relevant."""
    new, old = ({m[1]: n for n, m in tree.find(rf"{f}/([^/]+)\.(?:png|jpg)")} for f in ("new", "old"))
    pairs = [key for key in old if key in new]
    gallery, queries = list(new), pairs
    names = [*(new[key] for key in gallery), *(old[key] for key in queries)]
    position, ignored = {key: i for i, key in enumerate(gallery)}, np.zeros(0, np.int64)
    relevance = {"all": [(np.array([position[key]]), ignored) for key in queries]}
    first = len(gallery)
    return Benchmark(
        tree.name, "retrieval", tree.index(names), queries=np.arange(first, len(names)), gallery=np.arange(first),
        relevance=relevance,
    )  # fmt: skip


def copydays(tree: Tree) -> Benchmark:
    """Copydays: the names of an original and its strong attacks share four digits. Other images are distractors."""
    groups: dict[str, list[str]] = {}
    for name, match in tree.find(r"(?:original|strong)/(\d{4})\d\d\.jpg"):
        groups.setdefault(match[1], []).append(name)
    pairs = [(a, b) for group in groups.values() for i, a in enumerate(group) for b in group[i + 1 :]]
    images = [n for n in tree.images() if not re.search(r"(^|/)(jpeg|crops)/", n)]
    return copy_benchmark(tree, tree.name, images, pairs)
