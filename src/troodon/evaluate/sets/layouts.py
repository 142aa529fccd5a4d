"""Layouts of published evaluation datasets: a table of their names, markers, required files and sources.

A layout is detected by its `markers`: patterns that match some of its folders or files, at any depth. `required` lists
further folders or files as (pattern, name in messages). If one is missing, a message names it and the source of the
dataset, and the files are read as any others; if the user has named the layout, this is an error. `build` makes a
`Benchmark` from the file names and the lists of the publisher (label_readers.py, truth_readers.py).
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from troodon import run
from troodon.config import UsageError, nearest
from troodon.evaluate.sets import label_readers as labels
from troodon.evaluate.sets import truth_readers as truths
from troodon.evaluate.sets.benchmark import Benchmark, Tree, open_table
from troodon.images import files, listing
from troodon.text import plural

WNID = r"n\d{8}"
KITTI = r"(\d{4}_\d\d_\d\d)_drive_\d{4}_sync"


@dataclass(frozen=True)
class Layout:
    """The layout of a published dataset."""

    build: Callable[[Tree], Benchmark]
    markers: tuple[str, ...]
    source: str  # where the dataset is published
    required: tuple[tuple[str, str], ...] = ()  # (pattern, name in messages)
    classes: int = 0  # number of classes without which it is not detected,
    or_file: str = "(?!)"  # unless this file is there


def paired(image: str, truth: tuple[str, ...], splits: dict[str, str], **fields) -> Callable[[Tree], Benchmark]:
    return partial(truths.from_pairs, image=image, truth=truth, splits=splits, fields=fields)


LAYOUTS: dict[str, Layout] = {
    # ---- labels: ImageNet and sets of its classes
    "imagenet-1k": Layout(
        labels.imagenet, (rf"train/{WNID}", rf"val/{WNID}|.*LOC_val_solution\.csv"),
        "https://image-net.org/challenges/LSVRC/2012 (val/ in folders, or flat beside Kaggle's LOC_val_solution.csv)",
        classes=1000, or_file=r"LOC_val_solution\.csv",
    ),
    "imagenet-v2": Layout(
        partial(labels.from_patterns, splits={"test": r"imagenetv2-[^/]+/(\d+)/[^/]+"}, train_benchmark="imagenet-1k"),
        (r"imagenetv2-[^/]+/\d+",), "https://github.com/modestyachts/ImageNetV2",
    ),
    "imagenet-real": Layout(
        labels.imagenet_real, (r"real\.json",), "https://github.com/google-research/reassessed-imagenet",
        ((r".*ILSVRC2012_val_00000001\.JPEG|val/.+", "the validation images of ImageNet, val/, beside real.json"),),
    ),
    "imagenet-a": Layout(
        partial(labels.from_patterns, splits={"test": rf"imagenet-a/({WNID})/[^/]+"}, train_benchmark="imagenet-1k"),
        (rf"imagenet-a/{WNID}",), "https://github.com/hendrycks/natural-adv-examples",
    ),
    "imagenet-r": Layout(
        partial(labels.from_patterns, splits={"test": rf"imagenet-r/({WNID})/[^/]+"}, train_benchmark="imagenet-1k"),
        (rf"imagenet-r/{WNID}",), "https://github.com/hendrycks/imagenet-r",
    ),
    "imagenet-sketch": Layout(
        partial(labels.from_patterns, splits={"test": rf"sketch/({WNID})/[^/]+"}, train_benchmark="imagenet-1k"),
        (rf"sketch/{WNID}",), "https://github.com/HaohanWang/ImageNet-Sketch", classes=1000,
    ),
    # ---- labels: other sets
    "inaturalist": Layout(
        labels.inaturalist, (r"train20\d\d\.json",), "https://github.com/visipedia/inat_comp",
        ((r"val20\d\d\.json", "val20xx.json"),),
    ),
    "places205": Layout(
        partial(
            labels.from_lists, parse=labels.last_word_label,
            lists={"train": r"train_places205\.csv", "val": r"val_places205\.csv"},
        ),
        (r"train_places205\.csv",), "http://places.csail.mit.edu/user/download.php",
        ((r"val_places205\.csv", "val_places205.csv"),),
    ),
    "food101": Layout(
        partial(labels.from_lists, lists={"train": r"meta/train\.txt", "test": r"meta/test\.txt"},
                parse=labels.folder_label, form="images/{}.jpg"),
        (r"meta/train\.txt",), "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        ((r"meta/test\.txt", "meta/test.txt"), (r"images/.+", "images/")),
    ),
    "cifar10": Layout(
        labels.cifar, (r"data_batch_1\.bin",), "https://www.cs.toronto.edu/~kriz/cifar.html (the binary version)",
        ((r"test_batch\.bin", "test_batch.bin"),),
    ),
    "cifar100": Layout(
        labels.cifar, (r"fine_label_names\.txt",), "https://www.cs.toronto.edu/~kriz/cifar.html (the binary version)",
        ((r"train\.bin", "train.bin"), (r"test\.bin", "test.bin")),
    ),
    "sun397": Layout(
        partial(
            labels.from_lists, parse=labels.folder_label,
            lists={"train": r"Training_01\.txt", "test": r"Testing_01\.txt"},
        ),
        (r"Training_01\.txt",), "https://vision.princeton.edu/projects/2010/SUN",
        ((r"Testing_01\.txt", "Testing_01.txt"),),
    ),
    "cars": Layout(
        labels.cars, (r"cars_train_annos\.mat",), "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        ((r"cars_test_annos_withlabels\.mat", "cars_test_annos_withlabels.mat"), (r"cars_test/?.*", "cars_test/")),
    ),
    "aircraft": Layout(
        partial(labels.from_lists, parse=labels.first_word_label, form="images/{}.jpg",
                lists={"train": r"images_variant_trainval\.txt", "test": r"images_variant_test\.txt"}),
        (r"images_variant_trainval\.txt",), "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        ((r"images_variant_test\.txt", "images_variant_test.txt"),),
    ),
    "dtd": Layout(
        partial(labels.from_lists, lists={"train": r"labels/(train|val)1\.txt", "test": r"labels/test1\.txt"},
                parse=labels.folder_label, form="images/{}"),
        (r"labels/train1\.txt",), "https://www.robots.ox.ac.uk/~vgg/data/dtd",
        ((r"labels/test1\.txt", "labels/test1.txt"), (r"images/.+", "images/")),
    ),
    "pets": Layout(
        partial(labels.from_lists, lists={"train": r"annotations/trainval\.txt", "test": r"annotations/test\.txt"},
                parse=labels.breed_label, form="images/{}.jpg"),
        (r"annotations/trainval\.txt",), "https://www.robots.ox.ac.uk/~vgg/data/pets",
        ((r"annotations/test\.txt", "annotations/test.txt"), (r"images", "images/")),
    ),
    "caltech101": Layout(
        partial(labels.from_patterns, splits={"": r"101_ObjectCategories/((?!BACKGROUND_Google)[^/]+)/[^/]+"}),
        (r"101_ObjectCategories/[^/]+",), "https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    "flowers102": Layout(
        labels.flowers, (r"imagelabels\.mat",), "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        ((r"setid\.mat", "setid.mat"), (r"jpg", "jpg/")),
    ),
    "cub200": Layout(
        labels.cub, (r"image_class_labels\.txt",), "https://www.vision.caltech.edu/datasets/cub_200_2011",
        ((r"images\.txt", "images.txt"), (r"train_test_split\.txt", "train_test_split.txt")),
    ),
    "voc2007": Layout(
        labels.voc2007, (r"VOC2007/ImageSets/Main|ImageSets/Main/[a-z]+_test\.txt",),
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007 (VOCtrainval_06-Nov-2007 and VOCtest_06-Nov-2007)",
        ((r"ImageSets/Main/[a-z]+_trainval\.txt", "ImageSets/Main/*_trainval.txt"),
         (r"ImageSets/Main/[a-z]+_test\.txt", "ImageSets/Main/*_test.txt"), (r"JPEGImages", "JPEGImages/")),
    ),
    # ---- masks
    "ade20k": Layout(
        paired(r"images/(training|validation)/(.+)\.jpg", (r"annotations/\1/\2.png",),
               {"training": "train", "validation": "val"},
               kind="mask", read=truths.ade20k, classes=truths.numbered_classes(150)),
        (r"annotations/training",), "http://sceneparsing.csail.mit.edu (ADEChallengeData2016)",
        ((r"images/training", "images/training"), (r"images/validation", "images/validation"),
         (r"annotations/validation", "annotations/validation")),
    ),
    "cityscapes": Layout(
        paired(r"leftImg8bit/(train|val)/(.+)_leftImg8bit\.png", (r"gtFine/\1/\2_gtFine_labelIds.png",),
               {"train": "train", "val": "val"}, kind="mask", read=truths.cityscapes, classes=truths.CITYSCAPES),
        (r"gtFine/train",), "https://www.cityscapes-dataset.com",
        ((r"leftImg8bit/train", "leftImg8bit/train"), (r"leftImg8bit/val", "leftImg8bit/val"),
         (r"gtFine/val", "gtFine/val")),
    ),
    "voc2012": Layout(
        truths.voc, (r"ImageSets/Segmentation/train\.txt",), "http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
        ((r"ImageSets/Segmentation/val\.txt", "ImageSets/Segmentation/val.txt"), (r"JPEGImages", "JPEGImages/"),
         (r"SegmentationClass", "SegmentationClass/")),
    ),
    # ---- depths
    "nyuv2": Layout(
        paired(r"(sync|official_splits/test)/(.+)/rgb_(\d+)\.jpg", (r"\1/\2/sync_depth_\3.png",),
               {"sync": "train", "official_splits/test": "val"}, kind="depth", unit=0.001, range=(0.001, 10.0)),
        (r"official_splits/test",), "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html, as frames",
        ((r"sync/.+", "sync/, the frames to learn from"),),
    ),
    "kitti": Layout(
        truths.kitti, (rf"(train|val)/{KITTI}/proj_depth/groundtruth/image_02",),
        "https://www.cvlibs.net/datasets/kitti/eval_depth.php (annotated depths, and the raw drives)",
        ((rf".*{KITTI}/image_02/data", "the raw drives, DATE/DRIVE/image_02/data"),),
    ),
    "sun-rgbd": Layout(
        truths.sun_rgbd, (r"SUNRGBD/.+/depth",), "https://rgbd.cs.princeton.edu",
        ((r"SUNRGBD/.+/image", "the image folder beside each depth folder"),),
    ),
    # ---- retrieval and copies
    "roxford5k": Layout(
        truths.revisited, (r"gnd_roxford5k\.pkl",), "http://cmp.felk.cvut.cz/revisitop", ((r"jpg", "jpg/, the images"),)
    ),
    "rparis6k": Layout(
        truths.revisited, (r"gnd_rparis6k\.pkl",), "http://cmp.felk.cvut.cz/revisitop", ((r"jpg", "jpg/, the images"),)
    ),
    "met": Layout(
        truths.met, (r"MET_database\.json",), "http://cmp.felk.cvut.cz/met",
        ((r"testset\.json", "testset.json"), (r"MET", "MET/, the images of the museum"), (r"test_met", "test_met/")),
    ),
    "amstertime": Layout(
        truths.amstertime, (r"AmsterTime.*/old",), "https://github.com/seyrankhademi/AmsterTime", ((r".*new", "new/"),)
    ),
    "copydays": Layout(truths.copydays, (r"strong", r"original"), "https://lear.inrialpes.fr/~jegou/data.php"),
}  # fmt: skip


def open_benchmark(place: object, layout: str | None = None) -> Benchmark | None:
    """Open the dataset at a place, detected from its files: a table at the top or a published layout. None if neither.

    `layout` names one of LAYOUTS instead of the detection. Raises UsageError if a required part of it is missing. Says
    which layout is taken.
    """
    if layout is not None and layout not in LAYOUTS:
        raise nearest("layout", layout, LAYOUTS)
    is_local = isinstance(place, str | Path) and not files.REMOTE.match(str(place))
    tree = Tree.open(str(place)) if is_local else None
    if tree is None:
        if layout is not None:
            raise UsageError(f"{place}: --layout {layout} is for a folder, tar or zip on this machine")
        return None
    known = known_paths(tree)
    for name in [layout] if layout else [] if has_table(tree) else LAYOUTS:
        if layout or all(_exists(marker, known) for marker in LAYOUTS[name].markers):
            counts_classes = not layout and not _exists(LAYOUTS[name].or_file, known)
            if not (missing := _missing_parts(name, known)):
                benchmark = _build(tree, name)
                missing = _missing_content(benchmark, LAYOUTS[name].classes if counts_classes else 0)
                if not missing:
                    return _say_taken(tree, benchmark, name)
            text = f"{tree.root}: {name} without {', and '.join(missing)}; published at {LAYOUTS[name].source}"
            if layout:
                raise UsageError(text)
            run.say(f"{text}. It is not read as {name}")
    benchmark = open_table(tree)
    return benchmark and _say_taken(tree, benchmark, f"{benchmark.kind}, by the table at its top")


def _say_taken(tree: Tree, benchmark: Benchmark, what: str) -> Benchmark:
    if os.environ.get("RANK", "0") == "0":
        run.say(f"{tree.root}: read as {what}, {plural(len(benchmark.images), 'image')}")
    return benchmark


def has_table(tree: Tree) -> bool:
    """Whether the tree has a table at the top. A table has priority over all layouts."""
    return any(name in tree.entries for name in ("index.csv", "pairs.csv", "labels.csv", "manifest.json"))


def known_paths(tree: Tree) -> set[str]:
    """All folders and all files except images, with the name of the root before them."""
    paths = set()
    for name in tree.entries:
        folder = name.rpartition("/")[0]
        while folder and folder not in paths:
            paths.add(folder)
            folder = folder.rpartition("/")[0]
        if listing.extension(name) not in listing.IMAGE_EXTENSIONS:
            paths.add(name)
    return {f"{tree.name}/{name}" for name in paths}


def _exists(pattern: str, known: set[str]) -> bool:
    regex = re.compile(rf"(?:.*/)?(?:{pattern})")
    return any(map(regex.fullmatch, known))


def _missing_parts(name: str, known: set[str]) -> list[str]:
    """The markers and required files that are missing, in words."""
    layout = LAYOUTS[name]
    markers = [(marker, f"its marker ({marker})") for marker in layout.markers]
    return [text for pattern, text in (*markers, *layout.required) if not _exists(pattern, known)]


def _missing_content(benchmark: Benchmark, classes: int) -> list[str]:
    """What a dataset lacks that has all files of a layout, which needs so many classes."""
    if not len(benchmark.images):
        return ["any of its images"]
    if benchmark.kind == "copies" and not len(benchmark.pairs):
        return ["any of its pairs"]
    missing = classes - len(set(benchmark.images.column("label"))) if classes else 0
    return [f"{missing:,} of its {classes:,} classes"] if missing > 0 else []


def _build(tree: Tree, name: str) -> Benchmark:
    """The dataset. Raises UsageError if its files are not as they were published."""
    try:
        return replace(LAYOUTS[name].build(tree), name=name)
    except UsageError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise UsageError(f"{tree.root}: its files are not those of {name} ({text}); --layout says another") from None
