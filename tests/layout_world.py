"""A small dataset in each published layout, made of a few files."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

A, B = "n01440764", "n01443537"


def write_image(path: Path, shade: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path)


def write_map(path: Path, values: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def write_text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def write_mat(path: Path, **values) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, values)


def write_classes(root: Path, pattern: str, names: tuple[str, ...] = (A, B), each: int = 2) -> None:
    for name in names:
        for i in range(each):
            write_image(root / pattern.format(name, i))


def imagenet(root: Path) -> None:
    write_classes(root, "train/{0}/{0}_{1}.JPEG")
    write_classes(root, "val/{0}/ILSVRC2012_val_{1:08d}.JPEG", each=1)


def real(root: Path) -> None:
    for i in range(3):
        write_image(root / "val" / A / f"ILSVRC2012_val_{i + 1:08d}.JPEG")
    write_text(root / "real.json", json.dumps([[0], [0, 1], []]))


def inaturalist(root: Path) -> None:
    for part in ("train", "val"):
        names = [f"{part}_val2018/Aves/{i}/x{i}.jpg" for i in (7, 9)]
        for name in names:
            write_image(root / name)
        images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        labels = [{"image_id": i, "category_id": 40 + i} for i in range(2)]
        write_text(root / f"{part}2018.json", json.dumps({"images": images, "annotations": labels}))


def places(root: Path) -> None:
    for part in ("train", "val"):
        for i in (0, 1):
            write_image(root / "images256" / "a" / "abbey" / f"{part}{i}.jpg")
        write_text(root / "trainvalsplit" / f"{part}_places205.csv", f"a/abbey/{part}0.jpg 0\na/abbey/{part}1.jpg 1\n")


def food(root: Path) -> None:
    for part in ("train", "test"):
        write_text(root / "meta" / f"{part}.txt", f"apple_pie/{part}1\nramen/{part}2\n")
        write_image(root / "images" / "apple_pie" / f"{part}1.jpg")
        write_image(root / "images" / "ramen" / f"{part}2.jpg")


def cifar(labels: int) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        random = np.random.default_rng(0)
        rows = np.concatenate([np.tile([[9, 4][-labels:]], (3, 1)), random.integers(0, 256, (3, 3072))], 1)
        rows[1, labels - 1] = 5
        data = rows.astype(np.uint8).tobytes()
        root.mkdir(parents=True, exist_ok=True)
        for name in ("data_batch_1.bin", "test_batch.bin") if labels == 1 else ("train.bin", "test.bin"):
            (root / name).write_bytes(data)
        write_text(root / ("batches.meta.txt" if labels == 1 else "fine_label_names.txt"), "apple\n")

    return make


def sun(root: Path) -> None:
    for part in ("Training", "Testing"):
        write_text(root / f"{part}_01.txt", f"/a/abbey/{part}.jpg\n/b/bar/indoor/{part}.jpg\n")
        write_image(root / "SUN397" / "a" / "abbey" / f"{part}.jpg")
        write_image(root / "SUN397" / "b" / "bar" / "indoor" / f"{part}.jpg")


def cars(root: Path) -> None:
    for part, table in (("train", "cars_train_annos"), ("test", "cars_test_annos_withlabels")):
        entries = np.array([(1, f"0000{i}.jpg") for i in (1, 2)], dtype=[("class", "i4"), ("fname", "U20")])
        entries["class"][1] = 7
        write_mat(root / "devkit" / f"{table}.mat", annotations=entries)
        for i in (1, 2):
            write_image(root / f"cars_{part}" / f"0000{i}.jpg")


def aircraft(root: Path) -> None:
    for i, part in enumerate(("trainval", "test")):
        write_text(root / "data" / f"images_variant_{part}.txt", f"100{i} 707-320\n200{i} F-16A/B\n")
        write_image(root / "data" / "images" / f"100{i}.jpg")
        write_image(root / "data" / "images" / f"200{i}.jpg")


def dtd(root: Path) -> None:
    for i, part in enumerate(("train", "val", "test")):
        write_text(root / "labels" / f"{part}1.txt", f"banded/banded_000{i}.jpg\nwoven/woven_000{i}.jpg\n")
        for name in ("banded", "woven"):
            write_image(root / "images" / name / f"{name}_000{i}.jpg")


def pets(root: Path) -> None:
    for part, i in (("trainval", 1), ("test", 2)):
        write_text(root / "annotations" / f"{part}.txt", f"great_pyrenees_{i} 1 1 1\nBengal_{i} 2 2 1\n")
        for name in ("great_pyrenees", "Bengal"):
            write_image(root / "images" / f"{name}_{i}.jpg")


def flowers(root: Path) -> None:
    for i in range(1, 7):
        write_image(root / "jpg" / f"image_{i:05d}.jpg")
    write_mat(root / "imagelabels.mat", labels=[1, 2, 1, 2, 1, 2])
    write_mat(root / "setid.mat", trnid=[1, 2], valid=[3], tstid=[4, 5, 6])


def cub(root: Path) -> None:
    names = [f"00{1 + i % 2}.Bird/b{i}.jpg" for i in range(4)]
    for name in names:
        write_image(root / "CUB_200_2011" / "images" / name)
    for file, values in (("images", names), ("image_class_labels", [1, 2, 1, 2]), ("train_test_split", [1, 1, 0, 0])):
        write_text(root / "CUB_200_2011" / f"{file}.txt", "".join(f"{i + 1} {v}\n" for i, v in enumerate(values)))


def voc2007(root: Path) -> None:
    home = root / "VOCdevkit" / "VOC2007"
    for part, images in (("trainval", ("000005", "000007")), ("test", ("000001", "000002"))):
        write_text(home / "ImageSets" / "Main" / f"{part}.txt", "\n".join(images))
        for name, presence in (("car", " 1 -1"), ("dog", "-1  0"), ("person", " 1  1")):
            lines = [f"{image} {present:>2}" for image, present in zip(images, presence.split())]
            write_text(home / "ImageSets" / "Main" / f"{name}_{part}.txt", "\n".join(lines) + "\n")
        for name in images:
            write_image(home / "JPEGImages" / f"{name}.jpg")
            box = "<bndbox><xmax>5</xmax><xmin>2</xmin><ymax>6</ymax><ymin>1</ymin></bndbox>"
            part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
            write_text(home / "Annotations" / f"{name}.xml", f"<annotation><object>{part}{box}</object></annotation>")
    write_text(home / "Annotations" / "000007.xml", "<annotation><obj")


MASK = np.array([[0, 1, 7, 26], [150, 151, 255, 33]], np.uint8)


def ade(root: Path) -> None:
    for part in ("training", "validation"):
        write_image(root / "ADEChallengeData2016" / "images" / part / "ADE_1.jpg")
        write_map(root / "ADEChallengeData2016" / "annotations" / part / "ADE_1.png", MASK)


def cityscapes(root: Path) -> None:
    for part in ("train", "val"):
        write_image(root / "leftImg8bit" / part / "ulm" / "ulm_0_1_leftImg8bit.png")
        write_map(root / "gtFine" / part / "ulm" / "ulm_0_1_gtFine_labelIds.png", MASK)
        write_map(root / "gtFine" / part / "ulm" / "ulm_0_1_gtFine_instanceIds.png", MASK)


def voc(root: Path) -> None:
    home = root / "VOCdevkit" / "VOC2012"
    for part, name in (("train", "2007_000032"), ("val", "2007_000033")):
        write_text(home / "ImageSets" / "Segmentation" / f"{part}.txt", f"{name}\n")
        write_image(home / "JPEGImages" / f"{name}.jpg")
        write_map(home / "SegmentationClass" / f"{name}.png", MASK, palette=True)


METRES = np.array([[0, 1000], [2560, 40000]], np.uint16)


def nyu(root: Path) -> None:
    for place in ("sync/kitchen_0028b", "official_splits/test/bathroom"):
        write_image(root / place / "rgb_00045.jpg")
        write_map(root / place / "sync_depth_00045.png", METRES)


def kitti(root: Path) -> None:
    for part, drive in (("train", "2011_09_26_drive_0001_sync"), ("val", "2011_09_26_drive_0002_sync")):
        write_map(
            root / "data_depth_annotated" / part / drive / "proj_depth/groundtruth/image_02/0000000005.png", METRES
        )
        write_image(root / "raw" / "2011_09_26" / drive / "image_02" / "data" / "0000000005.png")


def sun_rgbd(root: Path) -> None:
    for place in ("kv1/NYUdata/NYU0001", "realsense/lg/2014"):
        write_image(root / "SUNRGBD" / place / "image" / "a.jpg")
        write_map(root / "SUNRGBD" / place / "depth" / "b.png", METRES)


def oxford(root: Path) -> None:
    names, queries = [f"christ_{i}" for i in range(5)], ["all_souls_13"]
    for name in (*names, *queries):
        write_image(root / "jpg" / f"{name}.jpg")
    truth = [{"bbx": [1.0, 1.0, 5.0, 4.0], "easy": np.array([0]), "hard": [2], "junk": np.array([1])}]
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"imlist": names, "qimlist": queries, "gnd": truth}))


def met(root: Path) -> None:
    write_text(
        root / "ground_truth" / "MET_database.json", json.dumps([{"id": i, "path": f"MET/{i}/0.jpg"} for i in (4, 6)])
    )
    queries = [{"path": "test_met/a.jpg", "MET_id": 6}, {"path": "test_other/b.jpg"}]
    write_text(root / "ground_truth" / "testset.json", json.dumps(queries))
    for name in ("MET/4/0.jpg", "MET/6/0.jpg", "test_met/a.jpg", "test_other/b.jpg"):
        write_image(root / name)


def amstertime(root: Path) -> None:
    for name in ("1", "2"):
        for age in ("new", "old"):
            write_image(root / "AmsterTime-v1.0" / age / f"{name}.png")


def copydays(root: Path) -> None:
    for name in ("original/200000.jpg", "original/200100.jpg", "strong/200001.jpg", "strong/200002.jpg"):
        write_image(root / name)


LAYOUT_BUILDERS: dict[str, Callable[[Path], None]] = {
    "imagenet-1k": imagenet,
    "imagenet-v2": lambda root: write_classes(root, "imagenetv2-matched-frequency-format-val/{}/{}.jpeg", ("0", "1")),
    "imagenet-real": real,
    "imagenet-a": lambda root: write_classes(root, "imagenet-a/{}/{}.jpg"),
    "imagenet-r": lambda root: write_classes(root, "imagenet-r/{}/art_{}.jpg"),
    "imagenet-sketch": lambda root: write_classes(root, "sketch/{}/sketch_{}.JPEG"),
    "inaturalist": inaturalist, "places205": places, "food101": food, "cifar10": cifar(1), "cifar100": cifar(2),
    "sun397": sun, "cars": cars, "aircraft": aircraft, "dtd": dtd, "pets": pets,
    "caltech101": lambda root: write_classes(
        root, "101_ObjectCategories/{}/image_{:04d}.jpg", ("crab", "BACKGROUND_Google")
    ),
    "flowers102": flowers, "cub200": cub, "voc2007": voc2007,
    "ade20k": ade, "cityscapes": cityscapes, "voc2012": voc, "nyuv2": nyu,
    "kitti": kitti, "sun-rgbd": sun_rgbd, "roxford5k": oxford, "met": met, "amstertime": amstertime,
    "copydays": copydays,
}  # fmt: skip
LAYOUT_BUILDERS["rparis6k"] = lambda root: (
    oxford(root),
    (root / "gnd_roxford5k.pkl").rename(root / "gnd_rparis6k.pkl"),
)[0]
