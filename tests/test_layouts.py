"""Every owner's layout, made of a few files: what is read of it, and what is said where a part is missing."""

import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from troodon.config import UsageError
from troodon.evaluate.sets.benchmark import IGNORE, Benchmark, tag_matrix
from troodon.evaluate.sets.layouts import LAYOUTS, open_benchmark
from troodon.images.decode import decode

A, B = "n01440764", "n01443537"


def image(path: Path, shade: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path)


def plane(path: Path, values: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    if palette:
        picture.putpalette(list(range(256)) * 3)
    picture.save(path)


def text(path: Path, said: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(said)


def mat(path: Path, **values) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, values)


def classes(root: Path, pattern: str, names: tuple[str, ...] = (A, B), each: int = 2) -> None:
    for name in names:
        for i in range(each):
            image(root / pattern.format(name, i))


def imagenet(root: Path) -> None:
    classes(root, "train/{0}/{0}_{1}.JPEG")
    classes(root, "val/{0}/ILSVRC2012_val_{1:08d}.JPEG", each=1)


def real(root: Path) -> None:
    for i in range(3):
        image(root / "val" / A / f"ILSVRC2012_val_{i + 1:08d}.JPEG")
    text(root / "real.json", json.dumps([[0], [0, 1], []]))


def inaturalist(root: Path) -> None:
    for part in ("train", "val"):
        names = [f"{part}_val2018/Aves/{i}/x{i}.jpg" for i in (7, 9)]
        for name in names:
            image(root / name)
        images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        said = [{"image_id": i, "category_id": 40 + i} for i in range(2)]
        text(root / f"{part}2018.json", json.dumps({"images": images, "annotations": said}))


def places(root: Path) -> None:
    for part in ("train", "val"):
        for i in (0, 1):
            image(root / "images256" / "a" / "abbey" / f"{part}{i}.jpg")
        text(root / "trainvalsplit" / f"{part}_places205.csv", f"a/abbey/{part}0.jpg 0\na/abbey/{part}1.jpg 1\n")


def food(root: Path) -> None:
    for part in ("train", "test"):
        text(root / "meta" / f"{part}.txt", f"apple_pie/{part}1\nramen/{part}2\n")
        image(root / "images" / "apple_pie" / f"{part}1.jpg")
        image(root / "images" / "ramen" / f"{part}2.jpg")


def cifar(labels: int) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        random = np.random.default_rng(0)
        rows = np.concatenate([np.tile([[9, 4][-labels:]], (3, 1)), random.integers(0, 256, (3, 3072))], 1)
        rows[1, labels - 1] = 5
        data = rows.astype(np.uint8).tobytes()
        root.mkdir(parents=True, exist_ok=True)
        for name in ("data_batch_1.bin", "test_batch.bin") if labels == 1 else ("train.bin", "test.bin"):
            (root / name).write_bytes(data)
        text(root / ("batches.meta.txt" if labels == 1 else "fine_label_names.txt"), "apple\n")

    return make


def sun(root: Path) -> None:
    for part in ("Training", "Testing"):
        text(root / f"{part}_01.txt", f"/a/abbey/{part}.jpg\n/b/bar/indoor/{part}.jpg\n")
        image(root / "SUN397" / "a" / "abbey" / f"{part}.jpg")
        image(root / "SUN397" / "b" / "bar" / "indoor" / f"{part}.jpg")


def cars(root: Path) -> None:
    for part, table in (("train", "cars_train_annos"), ("test", "cars_test_annos_withlabels")):
        entries = np.array([(1, f"0000{i}.jpg") for i in (1, 2)], dtype=[("class", "i4"), ("fname", "U20")])
        entries["class"][1] = 7
        mat(root / "devkit" / f"{table}.mat", annotations=entries)
        for i in (1, 2):
            image(root / f"cars_{part}" / f"0000{i}.jpg")


def aircraft(root: Path) -> None:
    for i, part in enumerate(("trainval", "test")):
        text(root / "data" / f"images_variant_{part}.txt", f"100{i} 707-320\n200{i} F-16A/B\n")
        image(root / "data" / "images" / f"100{i}.jpg")
        image(root / "data" / "images" / f"200{i}.jpg")


def dtd(root: Path) -> None:
    for i, part in enumerate(("train", "val", "test")):
        text(root / "labels" / f"{part}1.txt", f"banded/banded_000{i}.jpg\nwoven/woven_000{i}.jpg\n")
        for name in ("banded", "woven"):
            image(root / "images" / name / f"{name}_000{i}.jpg")


def pets(root: Path) -> None:
    for part, i in (("trainval", 1), ("test", 2)):
        text(root / "annotations" / f"{part}.txt", f"great_pyrenees_{i} 1 1 1\nBengal_{i} 2 2 1\n")
        for name in ("great_pyrenees", "Bengal"):
            image(root / "images" / f"{name}_{i}.jpg")


def flowers(root: Path) -> None:
    for i in range(1, 7):
        image(root / "jpg" / f"image_{i:05d}.jpg")
    mat(root / "imagelabels.mat", labels=[1, 2, 1, 2, 1, 2])
    mat(root / "setid.mat", trnid=[1, 2], valid=[3], tstid=[4, 5, 6])


def cub(root: Path) -> None:
    names = [f"00{1 + i % 2}.Bird/b{i}.jpg" for i in range(4)]
    for name in names:
        image(root / "CUB_200_2011" / "images" / name)
    for file, values in (("images", names), ("image_class_labels", [1, 2, 1, 2]), ("train_test_split", [1, 1, 0, 0])):
        text(root / "CUB_200_2011" / f"{file}.txt", "".join(f"{i + 1} {v}\n" for i, v in enumerate(values)))


def voc2007(root: Path) -> None:
    home = root / "VOCdevkit" / "VOC2007"
    for part, images in (("trainval", ("000005", "000007")), ("test", ("000001", "000002"))):
        text(home / "ImageSets" / "Main" / f"{part}.txt", "\n".join(images))
        for name, said in (("car", " 1 -1"), ("dog", "-1  0"), ("person", " 1  1")):
            lines = [f"{image} {answer:>2}" for image, answer in zip(images, said.split())]
            text(home / "ImageSets" / "Main" / f"{name}_{part}.txt", "\n".join(lines) + "\n")
        for name in images:
            image(home / "JPEGImages" / f"{name}.jpg")
            box = "<bndbox><xmax>5</xmax><xmin>2</xmin><ymax>6</ymax><ymin>1</ymin></bndbox>"
            part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
            text(home / "Annotations" / f"{name}.xml", f"<annotation><object>{part}{box}</object></annotation>")
    text(home / "Annotations" / "000007.xml", "<annotation><obj")


MASK = np.array([[0, 1, 7, 26], [150, 151, 255, 33]], np.uint8)


def ade(root: Path) -> None:
    for part in ("training", "validation"):
        image(root / "ADEChallengeData2016" / "images" / part / "ADE_1.jpg")
        plane(root / "ADEChallengeData2016" / "annotations" / part / "ADE_1.png", MASK)


def cityscapes(root: Path) -> None:
    for part in ("train", "val"):
        image(root / "leftImg8bit" / part / "ulm" / "ulm_0_1_leftImg8bit.png")
        plane(root / "gtFine" / part / "ulm" / "ulm_0_1_gtFine_labelIds.png", MASK)
        plane(root / "gtFine" / part / "ulm" / "ulm_0_1_gtFine_instanceIds.png", MASK)


def voc(root: Path) -> None:
    home = root / "VOCdevkit" / "VOC2012"
    for part, name in (("train", "2007_000032"), ("val", "2007_000033")):
        text(home / "ImageSets" / "Segmentation" / f"{part}.txt", f"{name}\n")
        image(home / "JPEGImages" / f"{name}.jpg")
        plane(home / "SegmentationClass" / f"{name}.png", MASK, palette=True)


METRES = np.array([[0, 1000], [2560, 40000]], np.uint16)


def nyu(root: Path) -> None:
    for place in ("sync/kitchen_0028b", "official_splits/test/bathroom"):
        image(root / place / "rgb_00045.jpg")
        plane(root / place / "sync_depth_00045.png", METRES)


def kitti(root: Path) -> None:
    for part, drive in (("train", "2011_09_26_drive_0001_sync"), ("val", "2011_09_26_drive_0002_sync")):
        plane(root / "data_depth_annotated" / part / drive / "proj_depth/groundtruth/image_02/0000000005.png", METRES)
        image(root / "raw" / "2011_09_26" / drive / "image_02" / "data" / "0000000005.png")


def sun_rgbd(root: Path) -> None:
    for place in ("kv1/NYUdata/NYU0001", "realsense/lg/2014"):
        image(root / "SUNRGBD" / place / "image" / "a.jpg")
        plane(root / "SUNRGBD" / place / "depth" / "b.png", METRES)


def oxford(root: Path) -> None:
    names, asked = [f"christ_{i}" for i in range(5)], ["all_souls_13"]
    for name in (*names, *asked):
        image(root / "jpg" / f"{name}.jpg")
    truth = [{"bbx": [1.0, 1.0, 5.0, 4.0], "easy": np.array([0]), "hard": [2], "junk": np.array([1])}]
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"imlist": names, "qimlist": asked, "gnd": truth}))


def met(root: Path) -> None:
    text(root / "ground_truth" / "MET_database.json", json.dumps([{"id": i, "path": f"MET/{i}/0.jpg"} for i in (4, 6)]))
    asked = [{"path": "test_met/a.jpg", "MET_id": 6}, {"path": "test_other/b.jpg"}]
    text(root / "ground_truth" / "testset.json", json.dumps(asked))
    for name in ("MET/4/0.jpg", "MET/6/0.jpg", "test_met/a.jpg", "test_other/b.jpg"):
        image(root / name)


def amstertime(root: Path) -> None:
    for name in ("1", "2"):
        for age in ("new", "old"):
            image(root / "AmsterTime-v1.0" / age / f"{name}.png")


def copydays(root: Path) -> None:
    for name in ("original/200000.jpg", "original/200100.jpg", "strong/200001.jpg", "strong/200002.jpg"):
        image(root / name)


MADE: dict[str, Callable[[Path], None]] = {
    "imagenet-1k": imagenet,
    "imagenet-v2": lambda root: classes(root, "imagenetv2-matched-frequency-format-val/{}/{}.jpeg", ("0", "1")),
    "imagenet-real": real,
    "imagenet-a": lambda root: classes(root, "imagenet-a/{}/{}.jpg"),
    "imagenet-r": lambda root: classes(root, "imagenet-r/{}/art_{}.jpg"),
    "imagenet-sketch": lambda root: classes(root, "sketch/{}/sketch_{}.JPEG"),
    "inaturalist": inaturalist, "places205": places, "food101": food, "cifar10": cifar(1), "cifar100": cifar(2),
    "sun397": sun, "cars": cars, "aircraft": aircraft, "dtd": dtd, "pets": pets,
    "caltech101": lambda root: classes(root, "101_ObjectCategories/{}/image_{:04d}.jpg", ("crab", "BACKGROUND_Google")),
    "flowers102": flowers, "cub200": cub, "voc2007": voc2007,
    "ade20k": ade, "cityscapes": cityscapes, "voc2012": voc, "nyuv2": nyu,
    "kitti": kitti, "sun-rgbd": sun_rgbd, "roxford5k": oxford, "met": met, "amstertime": amstertime,
    "copydays": copydays,
}  # fmt: skip
MADE["rparis6k"] = lambda root: (oxford(root), (root / "gnd_roxford5k.pkl").rename(root / "gnd_rparis6k.pkl"))[0]


def opened(folder: Path, name: str) -> Benchmark:
    MADE[name](folder / "data")
    found = open_benchmark(folder / "data")
    assert found is not None
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_known_by_its_files_and_every_image_can_be_read(name: str, tmp_path: Path) -> None:
    found = opened(tmp_path, name)
    assert found.name == name
    assert len(found.images) >= 2
    for row in range(len(found.images)):
        assert decode(found.images.read(row)).ndim == 3
        if found.ground_truth is not None:
            assert found.target(row).ndim == 2
    splits = set(found.images.column("split"))
    if found.kind == "label" and found.train_benchmark is None:
        assert splits in ({"train", "val"}, {"train", "test"}, {None})
        assert len(set(found.images.column("label"))) == (1 if name == "caltech101" else 2)
    if found.kind == "tags":
        assert splits == {"train", "test"}
    if found.kind in ("mask", "depth"):
        assert splits in ({"train", "val"}, {None})
    if found.kind == "retrieval":
        assert len(found.queries) >= 1
        assert all(len(relevance) == len(found.queries) for relevance in found.relevance.values())


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.required])
def test_what_is_missing_is_said_and_where_to_get_it(name: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    MADE[name](root)
    mark = LAYOUTS[name].markers[0]
    kept = [p for p in root.rglob("*") if re.fullmatch(rf"(?:.*/)?(?:{mark})", f"data/{p.relative_to(root)}")]
    assert kept, "the mark is there"
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_file() and not any(path == k or k in path.parents for k in kept):
            path.unlink()
    with pytest.raises(UsageError) as said:
        open_benchmark(root)
    assert f"{name} without " in str(said.value)
    assert LAYOUTS[name].source in str(said.value)


def test_a_layout_can_be_named_and_its_name_be_mistaken(tmp_path: Path) -> None:
    image(tmp_path / "data" / "x.jpg")
    with pytest.raises(UsageError, match="ade20k without its marker"):
        open_benchmark(tmp_path / "data", "ade20k")
    with pytest.raises(UsageError, match="did you mean 'ade20k'"):
        open_benchmark(tmp_path / "data", "ade2k")
    assert open_benchmark(tmp_path / "data") is None


def test_a_folder_that_only_looks_alike_is_left_alone_until_it_is_named(tmp_path: Path) -> None:
    classes(tmp_path / "data", "train/{0}/{0}_{1}.JPEG")
    assert open_benchmark(tmp_path / "data") is None
    with pytest.raises(UsageError, match=r"imagenet-1k without .*val/.*https://image-net\.org"):
        open_benchmark(tmp_path / "data", "imagenet-1k")


def test_it_may_lie_in_a_zip(tmp_path: Path) -> None:
    ade(tmp_path / "data")
    shutil.make_archive(str(tmp_path / "ade"), "zip", tmp_path / "data")
    assert zipfile.is_zipfile(tmp_path / "ade.zip")
    found = open_benchmark(tmp_path / "ade.zip")
    assert found is not None
    assert (found.name, len(found.images)) == ("ade20k", 2)


def test_voc2007_says_of_every_class_whether_it_is_there(tmp_path: Path) -> None:
    found = opened(tmp_path, "voc2007")
    assert found.classes == ("car", "dog", "person")
    rows = zip(found.images.column("path"), found.images.column("split"), found.images.column("label"))
    assert {Path(path).stem: (split, label) for path, split, label in rows} == {
        "000005": ("train", "car|person"), "000007": ("train", "?dog|person"),
        "000001": ("test", "car|person"), "000002": ("test", "?dog|person"),
    }  # fmt: skip
    assert tag_matrix(found).tolist() == [[1, 0, 1], [0, -1, 1]] * 2
    boxes = {Path(path).stem: b.tolist() for path, b in zip(found.images.column("path"), found.objects, strict=True)}
    assert boxes == {"000005": [[1, 0, 5, 6]], "000007": [], "000001": [], "000002": []}
    inside = open_benchmark(tmp_path / "data" / "VOCdevkit" / "VOC2007")
    assert inside is not None
    assert (inside.kind, len(inside.images)) == ("tags", 4)
    voc(tmp_path / "data")
    for part in ("train", "val"):
        text(tmp_path / "data" / "VOCdevkit" / "VOC2007" / "ImageSets" / "Segmentation" / f"{part}.txt", "000005\n")
    masks = open_benchmark(tmp_path / "data", "voc2012")
    assert masks is not None
    assert [Path(path).stem for path in masks.images.column("path")] == ["2007_000032", "2007_000033"]


def test_masks_are_the_classes_that_count(tmp_path: Path) -> None:
    i = IGNORE
    for name, expected in (
        ("ade20k", [[i, 0, 6, 25], [149, i, i, 32]]),
        ("cityscapes", [[i, i, 0, 13], [i, i, i, 18]]),
        ("voc2012", [[0, 1, 7, i], [i, i, i, i]]),
    ):
        found = opened(tmp_path / name, name)
        assert found.target(0).tolist() == expected
        assert found.images.column("split") == ["train", "val"]


def test_depths_are_in_the_owners_unit(tmp_path: Path) -> None:
    for name, metres in (("nyuv2", 2.56), ("kitti", 10.0), ("sun-rgbd", 0.32)):
        found = opened(tmp_path / name, name)
        assert found.unit is not None
        assert found.target(0)[1, 0] * found.unit == pytest.approx(metres)
        assert found.range is not None


def test_difficulty_boxes_and_what_counts_for_nothing(tmp_path: Path) -> None:
    found = opened(tmp_path, "roxford5k")
    assert {d: (r.tolist(), n.tolist()) for d, ((r, n),) in found.relevance.items()} == {
        "easy": ([0], [2, 1]), "medium": ([0, 2], [1]), "hard": ([2], [0, 1]),
    }  # fmt: skip
    assert (found.boxes, found.ap_method) == ({5: (1.0, 1.0, 5.0, 4.0)}, "trapezoids")


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    image(tmp_path / "data" / "jpg" / "a.jpg")
    (tmp_path / "data" / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"imlist": Evil()}))
    with pytest.raises(UsageError, match="is not the expected ground truth"):
        open_benchmark(tmp_path / "data")
    assert not (tmp_path / "made").exists()


def test_sets_of_imagenets_classes_say_what_teaches_them(tmp_path: Path) -> None:
    found = opened(tmp_path, "imagenet-real")
    assert found.images.column("label") == ["0", "0|1"]
    assert found.train_benchmark == "imagenet-1k"


def test_records_are_pictures(tmp_path: Path) -> None:
    found = opened(tmp_path, "cifar100")
    pixels = decode(found.images.read(0))
    data = np.frombuffer((tmp_path / "data" / "test.bin").read_bytes(), np.uint8).reshape(3, -1)
    assert pixels.shape == (32, 32, 3)
    assert pixels[0, :3, 0].tolist() == data[0, 2:5].tolist()
    assert set(found.images.column("label")) == {"4", "5"}
    assert io.BytesIO(found.images.read(1)).read(1)


def test_kaggles_table_says_what_flat_validation_images_show(tmp_path: Path) -> None:
    root = tmp_path / "data"
    classes(root, "ILSVRC/Data/CLS-LOC/train/{0}/{0}_{1}.JPEG")
    image(root / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG")
    text(root / "LOC_val_solution.csv", f"ImageId,PredictionString\nILSVRC2012_val_00000001,{B} 1 2 3 4 {B} 5 6 7 8\n")
    found = open_benchmark(root)
    assert found is not None
    assert [
        (label, s) for label, s in zip(found.images.column("label"), found.images.column("split")) if s == "val"
    ] == [(B, "val")]
