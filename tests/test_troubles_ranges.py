"""Ranges of values: by percentiles of a set, and with a pair for each channel."""

import cv2
import numpy as np
import pytest
from PIL import Image

import troodon
from tests.test_pretrain import CONFIG as TINY
from tests.test_troubles_values import SIGHT, VIT, run, smooth
from troodon.config import UsageError, check_range, from_dict
from troodon.images import values
from troodon.images.decode import BadImage, decode
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing

PERCENT = ("1%", "99%")


@pytest.fixture
def ct(tmp_path):
    """12 images of 12 bits in files of 16, and what they hold."""
    (tmp_path / "ct").mkdir()
    arrays = [(smooth(i) * 4095).astype(np.uint16) for i in range(12)]
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / "ct" / f"{i:02d}.png")
    return tmp_path / "ct", arrays


@pytest.fixture
def bands(tmp_path):
    """3 images of 5 bands, each ten times brighter than the one before; and what they hold."""
    (tmp_path / "bands").mkdir()
    arrays = [np.stack([smooth(i) * 10.0**c for c in range(5)], 2).astype(np.float32) for i in range(3)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / "bands" / f"{i}.npy", array)
    return tmp_path / "bands", arrays


def test_scan_measures_percentiles_and_its_index_keeps_the_numbers(ct, tmp_path, capsys):
    """The range is not known, but percentiles are | scan finds the numbers, shows them, and its index keeps them."""
    folder, arrays = ct
    assert run("scan", folder, "--range", *PERCENT, "--out", tmp_path / "index") == 0
    wanted = np.percentile(arrays, (1, 99))
    assert f"range 1% 99%: is {wanted[0]:g} {wanted[1]:g}, found from 12 of 12 images" in capsys.readouterr().err
    index = open_source(tmp_path / "index")
    assert index.range == pytest.approx(wanted)
    assert np.array_equal(index.decode(0, 1), decode((folder / "00.png").read_bytes(), 1, range=index.range))
    assert troodon.scan(folder, range=PERCENT)["values"]["range"] == pytest.approx(wanted)


def test_colours_share_their_percentiles(tmp_path):
    """Percentiles are asked of colours of 16 bits | All three channels have one pair, so that white stays white."""
    colours = np.dstack([smooth(i) * 1000 * (i + 1) for i in range(3)]).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), colours)
    got = troodon.scan(tmp_path, range=PERCENT)["values"]["range"]
    assert got == pytest.approx(np.percentile(colours, (1, 99)))


def test_percentiles_are_measured_again_where_images_have_changed(ct, tmp_path, capsys):
    """A scan with percentiles is repeated | Nothing is read; with other images, the range and all results are new."""
    folder, _ = ct
    for _ in range(2):
        first = troodon.scan(folder, tmp_path / "index", range=PERCENT)
    assert capsys.readouterr().err.count("found from") == 1
    Image.fromarray(np.full((64, 64), 60_000, np.uint16)).save(folder / "99.png")
    second = troodon.scan(folder, tmp_path / "index", range=PERCENT)
    assert (second["read"], second["values"]["range"][1]) == (13, 60_000)
    assert first["values"]["range"][1] < 4096


def test_results_of_another_range_are_not_used(ct, tmp_path, monkeypatch):
    """A scan was interrupted, and goes on with another range | Its results are those of that range."""
    folder, _ = ct

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        values_of(folder, tmp_path / "index", (0, 65535), stop)
    assert list((tmp_path / "index.parts").glob("*.parquet"))
    values_of(folder, tmp_path / "index", (0, 4095))
    values_of(folder, tmp_path / "other", (0, 4095))
    tables = [open_table(tmp_path / name) for name in ("index", "other")]
    assert tables[0]["pixels"].to_pylist() == tables[1]["pixels"].to_pylist()


def values_of(folder, out, range, progress=None) -> dict:
    from troodon.images.scan import scan_to

    return scan_to([folder], out, 1, progress, range)


def open_table(index):
    import pyarrow.parquet as pq

    return pq.read_table(index / "images.parquet")


def test_a_large_set_is_measured_on_a_sample(ct, monkeypatch, capsys):
    """A set is large | Its percentiles are found from a sample of images and of their values, and a line says so."""
    folder, arrays = ct
    monkeypatch.setattr(values, "MEASURED", 3)
    monkeypatch.setattr(values, "MEASURED_VALUES", 3 * 2000)
    got = values.measured(open_source(folder), ("5%", "95%"))
    assert got == pytest.approx(np.percentile([arrays[0], arrays[6], arrays[11]], (5, 95)), rel=0.05)
    assert "found from 3 of 12 images" in capsys.readouterr().err


def test_bands_that_differ_have_a_range_each(bands, tmp_path):
    """The bands of a satellite differ a thousandfold | Each channel has a pair of numbers, given or measured."""
    folder, arrays = bands
    measured = troodon.scan(folder, tmp_path / "index", range=("2%", "98%"))["values"]["range"]
    assert measured == pytest.approx(np.percentile(np.stack(arrays), (2, 98), axis=(0, 1, 2)).T.ravel(), rel=1e-4)
    pairs = [n for c in range(5) for n in (0, 10.0**c)]
    troodon.scan(folder, tmp_path / "given", range=pairs)
    got = open_source(tmp_path / "given").decode(0, 5)
    assert np.abs(got - (arrays[0] / 10.0 ** np.arange(5) * 255).round()).max() <= 1
    assert Preprocessing(range=tuple(pairs)).as_dict()["range"] == pairs


def test_a_range_of_other_channels_is_one_broken_image(ct, bands):
    """A range has pairs for other channels than an image | The image is named as broken, with both numbers."""
    data = (ct[0] / "00.png").read_bytes()
    with pytest.raises(BadImage, match="channels: 1; the range has 2 pairs"):
        decode(data, 1, range=(0, 100, 0, 200))
    summary = troodon.scan(ct[0], range=(0, 100, 0, 200))
    assert len(summary["broken"]) == 12


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (PERCENT, r"only scan measures percentiles, and its index .*: `troodon scan DATA --out index --range 1% 99%`"),
        (("99%", "1%"), "two percentiles, the smaller one first, such as 1% 99%"),
        (("1%", "101%"), "two percentiles"),
        (("1%", "9"), "two percentiles"),
        (("a", "b"), "range a b: two numbers, the smaller one first, such as 0 4095; or two for each channel"),
        ((0, 1, 2), "two numbers"),
        ((), "two numbers"),
        ((0, 1, 5, 2), "two numbers"),
        ((0, float("inf")), "two numbers"),
    ],
)
def test_what_is_no_range_is_refused(given, said):
    """A range is given as something else, or percentiles are given to another verb than scan | One line says what."""
    with pytest.raises(UsageError, match=said):
        check_range(given)


def test_percentiles_of_nothing_are_refused(tmp_path):
    """Percentiles are asked of images of 8 bits, or of equal values | One line says what to do."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="none of 1 of 1 images looked at has more than 8 bits; leave the range out"):
        troodon.scan(tmp_path, range=PERCENT)
    Image.fromarray(np.full((8, 8), 7, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="both are 7; choose percentiles further apart"):
        troodon.scan(tmp_path, range=PERCENT)


# ---- every verb


@pytest.fixture
def labelled(tmp_path):
    """Two classes of 12-bit images in PNG, TIFF and 16-bit colours, with a split."""
    for split, count in (("train", 6), ("val", 3)):
        for c in range(2):
            (folder := tmp_path / "data" / split / f"c{c}").mkdir(parents=True)
            for i in range(count):
                array = (smooth(100 * c + 10 * i + count) * (2000 + 2000 * c)).astype(np.uint16)
                Image.fromarray(array).save(folder / f"{i}.{'png' if i % 2 else 'tif'}")
            cv2.imwrite(str(folder / "colour.png"), np.dstack([array, array[::-1], array.T]))
    return tmp_path / "data"


@pytest.fixture
def net(tmp_path):
    Backbone.random(VIT, SIGHT).save(tmp_path / "net")
    return tmp_path / "net"


def test_calibrate_and_crops_follow_the_range(labelled, net, tmp_path):
    """calibrate or show crops gets images of 12 bits | A range changes what is measured and drawn, so it is used."""
    plain, ranged = (
        troodon.verbs.calibrate(net, labelled, images=8, space="plain", range=range)["table"]
        for range in (None, (0, 4095))
    )
    assert plain != ranged
    for name, range in (("plain", None), ("ranged", [0, 4095])):
        config = from_dict(TINY, {"range": range} if range else {}, source="test")
        troodon.verbs.show_crops(config, labelled, tmp_path / f"{name}.png", images=2)
    means = [np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).mean() for name in ("plain", "ranged")]
    assert means[1] > means[0] + 20


def test_a_picture_of_crops_is_not_put_among_the_images(labelled, tmp_path):
    """show crops writes its picture into the folder of its images | It is refused: the picture would count as one."""
    with pytest.raises(UsageError, match=r"crops\.png: would lie in .*data and count as an image there"):
        troodon.verbs.show_crops(TINY, labelled, labelled / "train" / "crops.png")
    assert not list(labelled.rglob("crops.png"))


def test_leaks_and_scores_follow_the_range(labelled, net, tmp_path):
    """leak or evaluate gets images of 12 bits | They use the range, and the indexes that leak writes keep it."""
    leaks = troodon.verbs.leak(
        net, labelled / "train", labelled / "val", tmp_path / "leak", suite="quick", range=(0, 4095)
    )
    assert set(leaks["scores"]) == {"all", "without"}
    for name in ("selection", "benchmark"):
        assert open_source(tmp_path / "leak" / name).range == (0, 4095)
    scores = [
        troodon.evaluate("quick", net, labelled, tmp_path / f"s{top}", baselines=False, range=(0, top))
        for top in (100, 4095)
    ]
    assert [s["value"] for s in scores[0]] != [s["value"] for s in scores[1]]


def test_students_and_later_runs_inherit_the_range(labelled, tmp_path, capsys):
    """A run begins with a network that has a range, or learns from one | It has that range, unless it is given one."""
    troodon.pretrain(TINY, labelled, tmp_path / "first", settings={"steps": 1, "range": [0, 4095]})
    one = {"steps": 1}
    for _ in range(2):  # the second time, it is finished
        troodon.pretrain(TINY, labelled, tmp_path / "second", init=tmp_path / "first", settings=one)
    troodon.distill(TINY, tmp_path / "first", labelled, tmp_path / "student", settings=one)
    ranges = {name: troodon.load(tmp_path / name).preprocessing.range for name in ("second", "student")}
    assert ranges == {"second": (0, 4095), "student": (0, 4095)}
    assert "--range" not in capsys.readouterr().err
