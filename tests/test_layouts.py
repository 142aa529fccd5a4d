"""Every published layout, made of a few files: what is read from it, and the message if a part is missing."""

import io
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.layout_world import LAYOUT_BUILDERS, B, ade, voc, write_classes, write_image, write_text
from troodon.config import UsageError
from troodon.evaluate.sets.benchmark import IGNORE, Benchmark, tag_matrix
from troodon.evaluate.sets.layouts import LAYOUTS, open_benchmark
from troodon.images.decode import decode


def build_and_open(folder: Path, name: str) -> Benchmark:
    LAYOUT_BUILDERS[name](folder / "data")
    benchmark = open_benchmark(folder / "data", name if LAYOUTS[name].classes else None)
    assert benchmark is not None
    return benchmark


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_detected_and_its_images_are_readable(name: str, tmp_path: Path) -> None:
    benchmark = build_and_open(tmp_path, name)
    assert benchmark.name == name
    assert len(benchmark.images) >= 2
    for row in range(len(benchmark.images)):
        assert decode(benchmark.images.read(row)).ndim == 3
        if benchmark.ground_truth is not None:
            assert benchmark.target(row).ndim == 2
    splits = set(benchmark.images.column("split"))
    if benchmark.kind == "label" and benchmark.train_benchmark is None:
        assert splits in ({"train", "val"}, {"train", "test"}, {None})
        assert len(set(benchmark.images.column("label"))) == (1 if name == "caltech101" else 2)
    if benchmark.kind == "tags":
        assert splits == {"train", "test"}
    if benchmark.kind in ("mask", "depth"):
        assert splits in ({"train", "val"}, {None})
    if benchmark.kind == "retrieval":
        assert len(benchmark.queries) >= 1
        assert all(len(relevance) == len(benchmark.queries) for relevance in benchmark.relevance.values())


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.required])
def test_missing_files_and_the_source_are_named(name: str, tmp_path: Path, capsys) -> None:
    root = tmp_path / "data"
    LAYOUT_BUILDERS[name](root)
    marker = LAYOUTS[name].markers[0]
    kept = [p for p in root.rglob("*") if re.fullmatch(rf"(?:.*/)?(?:{marker})", f"data/{p.relative_to(root)}")]
    assert kept, "the marker exists"
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_file() and not any(path == k or k in path.parents for k in kept):
            path.unlink()
    with pytest.raises(UsageError) as raised:
        open_benchmark(root, name)
    assert f"{name} without " in str(raised.value)
    assert LAYOUTS[name].source in str(raised.value)
    assert open_benchmark(root) is None  # it is not detected, and this is said
    assert str(raised.value) in capsys.readouterr().err


def test_an_explicit_layout_and_a_misspelled_one(tmp_path: Path) -> None:
    write_image(tmp_path / "data" / "x.jpg")
    with pytest.raises(UsageError, match="ade20k without its marker"):
        open_benchmark(tmp_path / "data", "ade20k")
    with pytest.raises(UsageError, match="did you mean 'ade20k'"):
        open_benchmark(tmp_path / "data", "ade2k")
    assert open_benchmark(tmp_path / "data") is None


def test_an_incomplete_layout_is_not_detected_unless_it_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "data", "train/{0}/{0}_{1}.JPEG")
    assert open_benchmark(tmp_path / "data") is None
    with pytest.raises(UsageError, match=r"imagenet-1k without .*val/.*https://image-net\.org"):
        open_benchmark(tmp_path / "data", "imagenet-1k")


def test_a_dataset_in_a_zip(tmp_path: Path) -> None:
    ade(tmp_path / "data")
    shutil.make_archive(str(tmp_path / "ade"), "zip", tmp_path / "data")
    assert zipfile.is_zipfile(tmp_path / "ade.zip")
    benchmark = open_benchmark(tmp_path / "ade.zip")
    assert benchmark is not None
    assert (benchmark.name, len(benchmark.images)) == ("ade20k", 2)


def test_voc2007_tags_and_boxes(tmp_path: Path) -> None:
    benchmark = build_and_open(tmp_path, "voc2007")
    assert benchmark.classes == ("car", "dog", "person")
    rows = zip(benchmark.images.column("path"), benchmark.images.column("split"), benchmark.images.column("label"))
    assert {Path(path).stem: (split, label) for path, split, label in rows} == {
        "000005": ("train", "car|person"), "000007": ("train", "?dog|person"),
        "000001": ("test", "car|person"), "000002": ("test", "?dog|person"),
    }  # fmt: skip
    assert tag_matrix(benchmark).tolist() == [[1, 0, 1], [0, -1, 1]] * 2
    boxes = {
        Path(path).stem: b.tolist() for path, b in zip(benchmark.images.column("path"), benchmark.objects, strict=True)
    }
    assert boxes == {"000005": [[1, 0, 5, 6]], "000007": [], "000001": [], "000002": []}
    inside = open_benchmark(tmp_path / "data" / "VOCdevkit" / "VOC2007")
    assert inside is not None
    assert (inside.kind, len(inside.images)) == ("tags", 4)
    voc(tmp_path / "data")
    for part in ("train", "val"):
        write_text(
            tmp_path / "data" / "VOCdevkit" / "VOC2007" / "ImageSets" / "Segmentation" / f"{part}.txt", "000005\n"
        )
    masks = open_benchmark(tmp_path / "data", "voc2012")
    assert masks is not None
    assert [Path(path).stem for path in masks.images.column("path")] == ["2007_000032", "2007_000033"]


def test_masks_have_the_evaluated_classes(tmp_path: Path) -> None:
    i = IGNORE
    for name, expected in (
        ("ade20k", [[i, 0, 6, 25], [149, i, i, 32]]),
        ("cityscapes", [[i, i, 0, 13], [i, i, i, 18]]),
        ("voc2012", [[0, 1, 7, i], [i, i, i, i]]),
    ):
        benchmark = build_and_open(tmp_path / name, name)
        assert benchmark.target(0).tolist() == expected
        assert benchmark.images.column("split") == ["train", "val"]


def test_depths_have_the_published_unit(tmp_path: Path) -> None:
    for name, metres in (("nyuv2", 2.56), ("kitti", 10.0), ("sun-rgbd", 0.32)):
        benchmark = build_and_open(tmp_path / name, name)
        assert benchmark.unit is not None
        assert benchmark.target(0)[1, 0] * benchmark.unit == pytest.approx(metres)
        assert benchmark.range is not None


def test_oxford_difficulties_boxes_and_ignored_images(tmp_path: Path) -> None:
    benchmark = build_and_open(tmp_path, "roxford5k")
    assert {d: (r.tolist(), n.tolist()) for d, ((r, n),) in benchmark.relevance.items()} == {
        "easy": ([0], [2, 1]), "medium": ([0, 2], [1]), "hard": ([2], [0, 1]),
    }  # fmt: skip
    assert (benchmark.boxes, benchmark.ap_method) == ({5: (1.0, 1.0, 5.0, 4.0)}, "trapezoids")


def test_a_pickle_executes_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    write_image(tmp_path / "data" / "jpg" / "a.jpg")
    (tmp_path / "data" / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"imlist": Evil()}))
    with pytest.raises(UsageError, match="is not the expected ground truth"):
        open_benchmark(tmp_path / "data")
    assert not (tmp_path / "made").exists()


def test_imagenet_real_names_its_training_dataset(tmp_path: Path) -> None:
    benchmark = build_and_open(tmp_path, "imagenet-real")
    assert benchmark.images.column("label") == ["0", "0|1"]
    assert benchmark.train_benchmark == "imagenet-1k"


def test_cifar_records_are_images(tmp_path: Path) -> None:
    benchmark = build_and_open(tmp_path, "cifar100")
    pixels = decode(benchmark.images.read(0))
    data = np.frombuffer((tmp_path / "data" / "test.bin").read_bytes(), np.uint8).reshape(3, -1)
    assert pixels.shape == (32, 32, 3)
    assert pixels[0, :3, 0].tolist() == data[0, 2:5].tolist()
    assert set(benchmark.images.column("label")) == {"4", "5"}
    assert io.BytesIO(benchmark.images.read(1)).read(1)


def test_flat_validation_images_get_labels_from_the_table_of_kaggle(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_classes(root, "ILSVRC/Data/CLS-LOC/train/{0}/{0}_{1}.JPEG")
    write_image(root / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG")
    write_text(
        root / "LOC_val_solution.csv", f"ImageId,PredictionString\nILSVRC2012_val_00000001,{B} 1 2 3 4 {B} 5 6 7 8\n"
    )
    benchmark = open_benchmark(root)
    assert benchmark is not None
    assert [
        (label, s) for label, s in zip(benchmark.images.column("label"), benchmark.images.column("split")) if s == "val"
    ] == [(B, "val")]
