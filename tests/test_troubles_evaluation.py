"""Troubles of evaluation: little or odd data, layouts, labels and ground truth."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.layout_world import LAYOUT_BUILDERS, A, write_classes, write_image, write_text
from troodon import evaluate
from troodon.config import UsageError
from troodon.evaluate.config import DenseConfig, EvaluateConfig, LinearConfig, LogisticConfig
from troodon.evaluate.sets.layouts import open_benchmark
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.run import read_json, write_manifest
from troodon.verbs.evaluation import open_benchmarks

QUICK = EvaluateConfig(
    protocols=("knn", "linear", "logistic", "kmeans", "match", "copies", "segment", "depth"), ks=(1,), shots=(),
    resamples=20, match_images=4, cluster_seeds=1,
    linear=LinearConfig(rates=(1e-2,), epochs=1, least_steps=5), logistic=LogisticConfig(strengths=(1.0,)),
    dense=DenseConfig(heads=("linear",), steps=5, seeds=1, range=(0.1, 10.0)),
)  # fmt: skip
BACKBONE = Backbone.random(ViTConfig(dim=32, depth=2, heads=2, patch=8, grid=4, layer_scale=1.0), Preprocessing(32, 32))


def picture(seed: int, shade: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 90, (32, 32, 3)) + shade
    return Image.fromarray(pixels.astype(np.uint8))


def fill(folder: Path, **classes: int) -> Path:
    """Folders such as train/red and their numbers of images; / is written as __."""
    for number, (name, count) in enumerate(classes.items()):
        place = folder / name.replace("__", "/")
        place.mkdir(parents=True)
        for i in range(count):
            picture(100 * number + i, 40 * (number % 4)).save(place / f"{i}.png")
    return folder


def score(data: object, out: Path, **settings) -> dict[str, float]:
    results = evaluate(QUICK, BACKBONE, data, out, baselines=False, settings=settings or None)
    return {f"{r['protocol']} {r['metric']}": r["value"] for r in results}


def write_masks(folder: Path, count: int = 10) -> Path:
    """Images of two classes by their halves, with masks, as an index.csv says."""
    folder.mkdir()
    rows = ["image,mask,split"]
    for i in range(count):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[:, 16:] = 200
        Image.fromarray(pixels + np.uint8(i)).save(folder / f"{i}.png")
        Image.fromarray((pixels[..., 0] > 0).astype(np.uint8)).save(folder / f"m{i}.png")
        rows.append(f"{i}.png,m{i}.png,{'train' if i < 6 else 'val'}")
    (folder / "index.csv").write_text("\n".join(rows))
    return folder


# Layouts


def test_wordnet_names_alone_are_not_imagenet(tmp_path, capsys):
    """Folders have WordNet names, as ImageNet's | They are ImageNet-1k only with all 1000 classes; a line says it."""
    data = fill(tmp_path / "pets", train__n01440764=4, train__n01443537=4, val__n01440764=2, val__n01443537=2)
    (benchmark,) = open_benchmarks(data)
    assert benchmark.name == "pets"
    assert set(benchmark.images.column("label")) == {"n01440764", "n01443537"}
    assert "imagenet-1k without 998 of its 1,000 classes" in capsys.readouterr().err
    (named,) = open_benchmarks(data, "imagenet-1k")
    assert named.name == "imagenet-1k"
    assert "read as imagenet-1k, 12 images" in capsys.readouterr().err


def test_folders_that_resemble_a_layout_are_read_as_labelled_ones(tmp_path, capsys):
    """Classes are called original and strong, as in Copydays | They are classes, as no pair of Copydays is there."""
    (benchmark,) = open_benchmarks(fill(tmp_path / "sauce", original=5, strong=5))
    assert (benchmark.kind, set(benchmark.images.column("label"))) == ("label", {"original", "strong"})
    assert "It is not read as copydays" in capsys.readouterr().err


# Labels


class Pairs:
    """A dataset of Python."""

    def __init__(self, items: list):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> object:
        return self.items[row]


@pytest.mark.parametrize("form", ["tuples", "dicts", "list", "names"])
def test_labels_of_python_items_are_used(form, tmp_path):
    """A Python data set gives (image, label) or dicts | evaluate uses these labels."""
    items = [(picture(i, 150 * (i % 2)), np.int64(i % 2)) for i in range(20)]
    if form == "dicts":
        items = [{"image": image, "label": int(label)} for image, label in items]
    data = items if form == "list" else Pairs(items)
    if form == "names":
        vars(data)["classes"] = ["cat", "dog"]
    assert "knn accuracy" in score(data, tmp_path / "out")
    (benchmark,) = open_benchmarks(data)
    assert set(benchmark.images.column("label")) == ({"cat", "dog"} if form == "names" else {"0", "1"})


def test_items_without_labels_are_said(tmp_path, capsys):
    """A Python data set gives no labels | evaluate says so, and measures what needs none."""
    measured = score(Pairs([picture(i) for i in range(4)]), tmp_path / "out")
    assert all(name.startswith("match") for name in measured)
    err = capsys.readouterr().err
    assert "no labels are known" in err
    assert "none of its 4 images has a label" in err


def test_a_class_without_training_images_is_named(tmp_path, capsys):
    """A class is in the test split only | A line names it and its images, which count as wrong; an alarm above half."""
    classes = {"train__a": 6, "train__b": 6, "test__a": 2, "test__b": 2, "test__c": 3}
    measured = score(fill(tmp_path / "data", **classes), tmp_path / "out")
    assert measured["knn accuracy"] <= 4 / 7
    assert (
        "3 of 7 test images are of classes without training images, and count as wrong: c 3" in capsys.readouterr().err
    )
    classes["test__c"] = 9
    score(fill(tmp_path / "more", **classes), tmp_path / "out2")
    assert "alarm: more: 9 of 13 test images" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no test image has a class of the training images"):
        score(fill(tmp_path / "other", train__a=4, train__b=4, test__c=4), tmp_path / "out3")


def test_one_class_is_no_classification(tmp_path, capsys):
    """All images are of one class | Nothing is classified, and evaluate says so, or refuses in one line."""
    measured = score(fill(tmp_path / "one", train__a=6, test__a=2), tmp_path / "out")
    assert all(name.startswith("match") for name in measured)
    assert "folders of one name are no classes" in capsys.readouterr().err
    (tmp_path / "one" / "labels.csv").write_text("path,label\n" + "".join(f"train/a/{i}.png,a\n" for i in range(6)))
    with pytest.raises(UsageError, match="two classes are needed"):
        score(tmp_path / "one", tmp_path / "out2")


def test_one_class_to_test_is_not_clustered(tmp_path, capsys):
    """All test images are of one class | k-means is left out, since any clustering would agree with it."""
    measured = score(fill(tmp_path / "data", train__a=6, train__b=6, test__a=3), tmp_path / "out")
    assert measured.keys() == {"knn accuracy", "linear accuracy", "logistic accuracy"}
    assert "all test images are of one class" in capsys.readouterr().err


def test_identical_images_of_several_classes_are_measured(tmp_path):
    """All images are the same or blank | Scores are those of guessing, and nothing fails."""
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (32, 32), "white").save(tmp_path / "data" / label / f"{i}.png")
    measured = score(tmp_path / "data", tmp_path / "out")
    assert all(0 <= value <= 1 for value in measured.values())


# Ground truth


def test_one_bad_mask_is_one_broken_item(tmp_path, capsys):
    """A mask is damaged, another is missing | Both are named and counted; the others are used."""
    data = write_masks(tmp_path / "masks")
    (data / "m1.png").write_bytes(b"damaged")
    (data / "m9.png").unlink()
    (data / "3.png").unlink()
    assert "segment miou" in score(data, tmp_path / "out")
    err = capsys.readouterr().err
    assert "1 of 10 files are missing, m9.png among them" in err
    assert "masks/m1.png (not an image" in err
    assert "masks/m9.png" in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("evaluate: 3 of 10 images are set aside: 2 without usable ground truth, 1 ")
    details = read_json(tmp_path / "out" / "details.json")
    left_out = next(d["left out"] for d in details if d["protocol"] == "segment" and "left out" in d)
    assert left_out.keys() == {"masks/m1.png", "masks/m9.png", "masks/3.png"}


def test_a_mask_of_another_shape_is_a_broken_item(tmp_path, capsys):
    """A mask has not the shape of its image, as if turned | It is named and left out; the others are used."""
    data = write_masks(tmp_path / "masks")
    for name in ("m2.png", "m8.png"):
        Image.fromarray(np.ones((16, 32), np.uint8)).save(data / name)
    score(data, tmp_path / "out", protocols=("segment",))
    err = capsys.readouterr().err
    assert "masks/m2.png (decode error: 32 x 16: another aspect than that of its image)" in err
    assert "evaluate: 2 of 10 images are set aside: 2 without usable ground truth" in err


def test_masks_that_are_all_bad_are_one_line(tmp_path):
    """No mask of the test images can be read | One line says so."""
    data = write_masks(tmp_path / "masks")
    for i in range(6, 10):
        (data / f"m{i}.png").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="no test image has ground truth"):
        score(data, tmp_path / "out")


def test_changed_masks_are_not_answered_with_old_scores(tmp_path):
    """A mask changes under the same name | The same command does not answer with old scores."""
    data = write_masks(tmp_path / "masks")
    first = score(data, tmp_path / "out", protocols=("segment",))
    assert score(data, tmp_path / "out", protocols=("segment",)) == first
    Image.fromarray(np.ones((32, 32), np.uint8)).save(data / "m7.png")
    with pytest.raises(UsageError, match="images or the backbone"):
        score(data, tmp_path / "out", protocols=("segment",))


@pytest.mark.parametrize("file", ["pairs.csv", "classes.txt"])
def test_changed_tables_are_not_answered_with_old_scores(file, tmp_path):
    """A table of ground truth changes | The same command does not answer with old scores."""
    if file == "pairs.csv":
        data, protocols = fill(tmp_path / "copies", images=5), ("copies",)
        old, new = "path_a,path_b\nimages/0.png,images/1.png\n", "path_a,path_b\nimages/0.png,images/2.png\n"
    else:
        data, protocols = write_masks(tmp_path / "masks"), ("segment",)
        old, new = "0 dark\n1 light\n", "1 dark\n0 light\n"
    (data / file).write_text(old)
    score(data, tmp_path / "out", protocols=protocols)
    (data / file).write_text(new)
    with pytest.raises(UsageError, match="images or the backbone"):
        score(data, tmp_path / "out", protocols=protocols)


def test_images_set_aside_are_counted_at_the_end(tmp_path, capsys):
    """More than half of the images cannot be read | The last line counts them by reason, as an alarm."""
    data = fill(tmp_path / "data", a=8, b=8)
    for label in "ab":
        for i in range(5):
            (data / label / f"{i}.png").write_bytes(b"" if i else b"<html>")
    score(data, tmp_path / "out")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "evaluate: alarm: 10 of 16 images are set aside: 8 empty, 2 not an image"


# Lists of publishers


BAD_LINES = [
    ("cub200", "images", "CUB_200_2011/images.txt", "5"),
    ("cub200", "classes", "CUB_200_2011/image_class_labels.txt", "no numbers in this line"),
    ("places205", "no file", "trainvalsplit/train_places205.csv", "17"),
    ("aircraft", "no class", "data/images_variant_test.txt", "9009"),
    ("food101", "no folder", "meta/train.txt", "alone"),
    ("voc2007", "presence", "VOCdevkit/VOC2007/ImageSets/Main/dog_test.txt", "000009 maybe"),
    ("voc2007", "words", "VOCdevkit/VOC2007/ImageSets/Main/dog_test.txt", "000009"),
]


@pytest.mark.parametrize(("layout", "what", "file", "line"), BAD_LINES, ids=[f"{row[0]}-{row[1]}" for row in BAD_LINES])
def test_a_bad_line_of_a_list_is_one_bad_row(layout, what, file, line, tmp_path, capsys):
    """One line of a publisher's list cannot be read | it is set aside, counted and named; the others are read"""
    LAYOUT_BUILDERS[layout](tmp_path / "data")
    whole = open_benchmark(tmp_path / "data", layout)
    with open(tmp_path / "data" / file, "a") as listed:
        listed.write(line + "\n")
    capsys.readouterr()
    benchmark = open_benchmark(tmp_path / "data", layout)
    said = capsys.readouterr().err
    assert f"1 of {3 if layout != 'cub200' else 5} rows cannot be read, number" in said
    assert repr(line) in said
    assert whole is not None
    assert benchmark is not None
    for column in ("path", "label", "split"):
        assert benchmark.images.column(column) == whole.images.column(column)


def test_a_list_of_bad_lines_is_refused(tmp_path):
    """Most lines of a publisher's list cannot be read | it is refused, with the number and the first"""
    LAYOUT_BUILDERS["places205"](tmp_path)
    write_text(tmp_path / "trainvalsplit" / "train_places205.csv", "a/abbey/train0.jpg 0\n1\n2\n3\n")
    with pytest.raises(UsageError, match="3 of 4 rows cannot be read, number 2, '1', among them"):
        open_benchmark(tmp_path, "places205")


def test_a_line_of_voc_that_cannot_be_read_leaves_a_class_unknown(tmp_path):
    """A list of PASCAL VOC lost an image's line | whether the image shows the class is unknown, and does not count"""
    LAYOUT_BUILDERS["voc2007"](tmp_path)
    lists = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    write_text(lists / "car_test.txt", "000001\n000002 -1\n")
    benchmark = open_benchmark(tmp_path)
    assert benchmark is not None
    labels = {Path(p).stem: tags for p, tags in zip(benchmark.images.column("path"), benchmark.images.column("label"))}
    assert labels == {
        "000005": "car|person", "000007": "?dog|person", "000001": "person|?car", "000002": "?dog|person"
    }  # fmt: skip


def test_tables_with_rows_without_an_answer_lose_these_rows(tmp_path, capsys):
    """Tables of ImageNet (Kaggle) or iNaturalist have rows without a class | these are set aside and counted"""
    write_classes(tmp_path / "in", "ILSVRC/Data/CLS-LOC/train/{0}/{0}_{1}.JPEG")
    for i in (1, 2, 3):
        write_image(tmp_path / "in" / f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_0000000{i}.JPEG")
    answers = "".join(f"ILSVRC2012_val_0000000{i},{answer}\n" for i, answer in enumerate((f"{A} 1 2 3 4", "", A), 1))
    write_text(tmp_path / "in" / "LOC_val_solution.csv", "ImageId,PredictionString\n" + answers)
    benchmark = open_benchmark(tmp_path / "in")
    assert benchmark is not None
    assert [s for s in benchmark.images.column("split") if s == "val"] == ["val"] * 2
    assert "1 of 3 rows cannot be read, number 2" in capsys.readouterr().err

    LAYOUT_BUILDERS["inaturalist"](tmp_path / "nature")
    table = tmp_path / "nature" / "train2018.json"
    table.write_text(table.read_text().replace('"image_id": 1', '"image_id": 88'))
    benchmark = open_benchmark(tmp_path / "nature", "inaturalist")
    assert benchmark is not None
    assert len(benchmark.images) == 3
    assert "1 of 2 rows cannot be read, number 2" in capsys.readouterr().err


def test_artifacts_in_a_dataset_are_not_its_images(tmp_path):
    """Scores or selections lie in the folder of a published dataset | their pictures are not taken as its images"""
    LAYOUT_BUILDERS["copydays"](tmp_path / "data")
    whole = open_benchmark(tmp_path / "data")
    place = tmp_path / "data" / "scores"
    write_image(place / "pictures" / "original" / "200000.jpg")
    write_manifest(place, "scores", "0" * 16, {})
    shutil.copytree(place, tmp_path / "data" / "runs" / "deep")
    benchmark = open_benchmark(tmp_path / "data")
    assert whole is not None
    assert benchmark is not None
    assert benchmark.images.column("path") == whole.images.column("path")
