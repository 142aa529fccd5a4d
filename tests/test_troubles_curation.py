"""Troubles of curation, leaks and evaluation: little or blank data, odd labels, broken ground truth."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from troodon import calibrate, cli, curate, embed, launch, leak
from troodon.config import UsageError
from troodon.curate import backends, pipeline
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.run import read_json


def picture(seed: int) -> Image.Image:
    """A smooth picture like no other, 48 by 48."""
    low = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((48, 48), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    config = ViTConfig(dim=32, depth=2, heads=2, patch=8, grid=4, layer_scale=1.0)
    folder = tmp_path_factory.mktemp("backbone") / "backbone"
    Backbone.random(config, Preprocessing(resize=32, crop=32)).save(folder)
    return folder


def fill(folder: Path, images: dict[str, Image.Image]) -> Path:
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return folder


def select(backbone: Path, pool: Path, out: Path, **settings) -> tuple[set[str], dict, list[dict]]:
    """Names of the kept images, the summary and the ledger of a selection without curated images."""
    curate("curate_small", None, pool, backbone, out, settings={"gather": "all"} | settings)
    ledger = pq.read_table(out / "images.parquet").to_pylist()
    return {Path(row["path"]).name for row in ledger if row["kept"]}, read_json(out / "summary.json"), ledger


def test_blank_pages_do_not_change_the_threshold(backbone, tmp_path):
    """Blank pages are among the images | Calibration leaves them out; they are compared with each other, by colour."""
    pictures = {f"p{i:02d}.png": picture(i) for i in range(40)}
    pictures |= {f"q{i}.jpg": picture(i).resize((44, 44)) for i in range(5)}
    kept, summary, _ = select(backbone, fill(tmp_path / "plain", pictures), tmp_path / "a")
    blanks = {f"w{i:02d}.png": Image.new("RGB", (48 + i, 48), "white") for i in range(20)}
    blanks |= {f"k{i}.jpg": Image.new("L", (48, 40 + i), 3) for i in range(4)}
    mixed_kept, mixed, ledger = select(backbone, fill(tmp_path / "mixed", pictures | blanks), tmp_path / "b")
    assert mixed["threshold"] == pytest.approx(summary["threshold"], abs=1e-6)
    assert len(kept) == 40
    assert mixed_kept == kept | {"w19.png", "k3.jpg"}  # white is not black; the largest of each is kept
    assert {row["reason"] for row in ledger if row["stage"] == "colour"} == {
        "of one colour, like an image that stays; equal to 1.00"
    }


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_few_images_are_kept_unless_they_are_equal(count, backbone, tmp_path, capsys):
    """Few images, and --verify none | Only equal images are copies; an alarm says so, also in the summary."""
    images = {f"{i}.png": picture(i) for i in range(count)} | {"same.bmp": picture(0)}
    kept, summary, _ = select(backbone, fill(tmp_path / "pool", images), tmp_path / "out", verify="none")
    assert len(kept) == count
    assert "at least 16 are needed" in summary["alarms"][0]
    assert "alarm: " in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_copies_are_found_among_few_images(count, backbone, tmp_path):
    """Few images | A closer look finds their copies; it needs no threshold."""
    images = {f"{i}.png": picture(i) for i in range(count)} | {"small.png": picture(0).resize((40, 40))}
    images |= {"mirrored.png": ImageOps.mirror(picture(0))}
    kept, summary, _ = select(backbone, fill(tmp_path / "pool", images), tmp_path / "out")
    assert len(kept) == count
    assert "alarms" not in summary


@pytest.mark.parametrize("blank", [False, True])
def test_identical_images_are_one(blank, backbone, tmp_path):
    """All images are the same | One of them is kept."""
    image = Image.new("RGB", (48, 48), "white") if blank else picture(0)
    pool = fill(tmp_path / "pool", {f"{i}.{'png' if i % 2 else 'bmp'}": image for i in range(20)})
    assert len(select(backbone, pool, tmp_path / "out")[0]) == 1


@pytest.mark.parametrize("count", [1, 3, 12, 31])
def test_a_leak_among_few_images_is_an_equal_one(count, backbone, tmp_path, capsys):
    """Leaks among few images, and --verify none | leak reports exact copies only, and says how many images it needs."""
    data = {f"{i}.png": picture(i) for i in range(count)} | {"white.png": Image.new("RGB", (48, 48), "white")}
    benchmark = {f"b{i}.png": picture(100 + i) for i in range(5)}
    benchmark |= {"copy.bmp": picture(0), "page.png": Image.new("RGB", (60, 48), "white")}
    folders = fill(tmp_path / "d", data), fill(tmp_path / "b", benchmark)
    equal = {("d/0.png", "b/copy.bmp"), ("d/white.png", "b/page.png")}
    for verify in ("geometric", "none"):
        result = leak(backbone, *folders, tmp_path / verify, suite="", settings={"verify": verify})
        assert {(pair["image"], pair["benchmark"]) for pair in result["pairs"]} == equal
    assert "at least 32 are needed" in capsys.readouterr().err


def test_a_benchmark_of_blank_pages_leaks_by_colour(backbone, tmp_path):
    """A benchmark has blank pages only | leak finds those of the same colour."""
    benchmark = fill(tmp_path / "b", {"page.png": Image.new("RGB", (60, 48), "white")})
    pages = {"white.png": Image.new("RGB", (48, 48), "white"), "black.png": Image.new("RGB", (48, 48))}
    data = fill(tmp_path / "d", {f"{i}.png": picture(i) for i in range(5)} | pages)
    result = leak(backbone, data, benchmark, tmp_path / "out", suite="")
    assert [pair["image"] for pair in result["pairs"]] == ["d/white.png"]


@pytest.mark.parametrize("gather", ["balance", "cluster", "sample", "all"])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_every_way_to_gather_takes_few_or_equal_images(gather, count, backbone, tmp_path):
    """A pool has one image, or 20 equal ones, and clusters stay empty | Every way to gather keeps at least one."""
    pool = fill(
        tmp_path / "pool", {f"{i}.{'png' if i % 2 else 'bmp'}": picture(min(i, 20 - count)) for i in range(count)}
    )
    curated = None if gather in ("balance", "all") else fill(tmp_path / "curated", {"c.png": picture(50)})
    settings = {"gather": gather, "levels": (5, 3), "clusters": 5, "more_than": 0}
    out = curate("curate_small", curated, pool, backbone, tmp_path / "out", settings=settings)
    assert read_json(out / "summary.json")["kept"] >= 1


def test_calibration_on_equal_images_finds_nothing(backbone, tmp_path, capsys):
    """calibrate is given 20 equal images | The threshold is 1, and an alarm says that it finds nothing."""
    result = calibrate(backbone, fill(tmp_path / "pool", {f"{i}.png": picture(0) for i in range(20)}), images=20)
    assert result["threshold"] == 1
    assert "alarm: the calibrated threshold finds 0%" in capsys.readouterr().err


def test_a_selection_of_nothing_is_not_suggested(backbone, tmp_path, capsys):
    """Curation keeps nothing | An alarm says so, and no training on it is suggested."""
    pool = fill(tmp_path / "pool", {"a.png": picture(0)})
    words = ["curate", "curate_small", "--uncurated", pool, "--benchmark", pool, "--backbone", backbone]
    words += ["--out", tmp_path / "out", "--gather", "all"]
    assert cli.run([str(word) for word in words]) == launch.DONE
    err = capsys.readouterr().err
    assert "alarm: nothing is kept" in err
    assert "pretrain" not in err


def test_leaks_are_written_although_the_rest_cannot_be_scored(backbone, tmp_path, capsys):
    """Without its leaks, a benchmark has one class only | The leaks are written; a line says what is not measured."""
    data = fill(tmp_path / "data", {f"{i}.png": picture(i) for i in range(4)})
    labelled = {f"{'ab'[i // 4]}/{i}.png": picture(i) for i in range(8)}
    benchmark = fill(tmp_path / "benchmark", labelled)
    result = leak(backbone, data, benchmark, tmp_path / "out", suite="quick")
    assert (result["benchmark_leaked"], set(result["scores"])) == (4, {"all"})
    assert read_json(tmp_path / "out" / "leaks.json") == result
    assert "scores-without: not measured: all" in capsys.readouterr().err


def test_half_of_the_images_broken_is_an_alarm(backbone, tmp_path, capsys):
    """More than half of a pool cannot be read | The last lines count the files by reason, as an alarm."""
    pool = fill(tmp_path / "pool", {f"{i}.png": picture(i) for i in range(3)})
    for i in range(4):
        (pool / f"x{i}.jpg").write_bytes(b"" if i else b"<html>")
    select(backbone, pool, tmp_path / "out")
    assert "curate: alarm: 4 of 7 images are set aside: 3 empty, 1 not an image" in capsys.readouterr().err


def test_a_threshold_that_finds_next_to_nothing_is_an_alarm(tmp_path, capsys):
    """The network cannot tell copies from other images | An alarm says how few copies the threshold finds."""
    network = Backbone.random(ViTConfig(dim=32, depth=1, heads=1, patch=8, grid=2), Preprocessing(16, 16))
    pool = fill(tmp_path / "pool", {f"{i}.png": picture(i) for i in range(20)})
    settings = {"gather": "all", "verify": "none", "pixels": False, "duplicate_space": "plain"}
    settings |= {"calibration_images": 20}
    out = curate("curate_small", None, pool, network, tmp_path / "out", settings=settings)
    assert "of attacked copies" in read_json(out / "summary.json")["alarms"][0]
    assert "alarm: the calibrated threshold finds" in capsys.readouterr().err


def test_calibrate_names_the_images_it_needs(backbone, tmp_path):
    """calibrate is given few images, or blank ones | It says how many it needs, and how many there are."""
    images = {f"{i}.png": picture(i) for i in range(12)} | {
        f"w{i}.png": Image.new("L", (30, 30 + i), 255) for i in range(9)
    }
    with pytest.raises(UsageError, match="at least 16 images: 12 of 21"):
        calibrate(backbone, fill(tmp_path / "pool", images))


@pytest.mark.parametrize("begun", [False, True])
def test_a_timing_does_not_refuse_what_an_earlier_one_chose(begun, backbone, tmp_path, monkeypatch):
    """embed --compute auto is repeated on a busy machine | The precision is measured once, and kept for the folder."""
    pool, answers = fill(tmp_path / "pool", {"a.png": picture(0)}), iter([torch.bfloat16, torch.float32])
    monkeypatch.setattr("troodon.model.inference.fastest_dtype", lambda *_, **__: next(answers))
    if begun:
        stopped = pytest.MonkeyPatch()
        stopped.setattr(backends, "run_unit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(backbone, pool, tmp_path / "out")
        stopped.undo()
    for _ in range(2):
        embed(backbone, pool, tmp_path / "out")
    assert read_json(tmp_path / "out" / "manifest.json")["settings"]["compute"] == "bfloat16"
    assert not (tmp_path / "out.parts").exists()
    with pytest.raises(UsageError, match="compute"):
        embed(backbone, pool, tmp_path / "out", compute="fp32")


def test_a_timing_does_not_refuse_an_unfinished_selection(backbone, tmp_path, monkeypatch):
    """curate with backbone.optimized("auto") is killed, and timed anew | it goes on in the precision it began with"""
    pool = fill(tmp_path / "pool", {f"p{i:02d}.png": picture(i) for i in range(24)})
    network = Backbone.load(backbone)
    settings = {"gather": "all", "calibration_images": 16}
    curate("curate_small", None, pool, network.optimized("bf16"), tmp_path / "whole", settings=settings)
    monkeypatch.setattr(pipeline, "remove_duplicates", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        curate("curate_small", None, pool, network.optimized("bf16"), tmp_path / "out", settings=settings)
    monkeypatch.undo()
    curate("curate_small", None, pool, network.optimized("fp32"), tmp_path / "out", settings=settings)
    for name in ("images.parquet", "embeddings/embeddings.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_json(tmp_path / "out" / "summary.json") == read_json(tmp_path / "whole" / "summary.json")
