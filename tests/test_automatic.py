"""The recipe `auto`: a look at the images decides, it says why, and whatever they are it trains."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import troodon
from troodon import cli, recipes
from troodon.config import UsageError, to_dict
from troodon.images.look import Look, look
from troodon.images.sources import open_source
from troodon.learn.config import fits
from troodon.recipes.automatic import SIZES, automatic
from troodon.recipes.own import SAME_SHADES, STRONG_COLOURS, WEAK_COLOURS
from troodon.run import write_json
from troodon.verbs.common import open_images
from troodon.verbs.training import as_begun

PHOTOS = Look(images=10_000, side=64, channels=3, chroma=0.15, hues=0.75)


def picture(rng: np.random.Generator, hue: int, side: int = 40) -> Image.Image:
    """A smooth picture of one hue."""
    value = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    planes = (Image.new("L", value.size, hue), Image.new("L", value.size, 180), value)
    return Image.merge("HSV", planes).convert("RGB")


def write(folder, images) -> str:
    folder.mkdir()
    for number, image in enumerate(images):
        if isinstance(image, Image.Image):
            image.save(folder / f"{number:03d}.png")
        else:
            np.save(folder / f"{number:03d}.npy", image)
    return str(folder)


def test_it_tells_arbitrary_colours_from_those_that_say_something(tmp_path):
    rng = np.random.default_rng(0)
    every = write(tmp_path / "every", [picture(rng, hue) for hue in range(0, 256, 4)])
    few = write(tmp_path / "few", [picture(rng, (15 + n % 30) if n % 3 else 150) for n in range(60)])
    grey = write(tmp_path / "grey", [picture(rng, 0).convert("L") for _ in range(20)])
    assert look(open_source(every)).hues > 0.97
    assert 0.2 < look(open_source(few)).hues < 0.8
    assert look(open_source(grey)).is_grey
    hue = {place: automatic(look(open_source(place)), steps=10).config.photometric.hue for place in (every, few, grey)}
    assert hue[every] > 10 * hue[few]
    assert hue[few] == hue[grey]


@pytest.mark.parametrize("images", [20, 33, 100, 1_000, 100_000])
@pytest.mark.parametrize(("device", "devices"), [("cpu", 1), ("cpu", 64), ("cuda", 1), ("cuda", 3), ("cuda", 8)])
def test_what_it_chooses_fits_for_every_number_of_images_and_devices(images, device, devices):
    for minutes in (0.5, 10, 600, 6000):
        config = automatic(replace(PHOTOS, images=images), minutes=minutes, device=device, devices=devices).config
        fits(config, devices if device == "cuda" else 1)
        assert config.minutes == minutes
        assert 8 <= config.batch <= max(8, images)


def test_more_time_gives_a_larger_network_and_it_says_that_none_was_measured():
    short = automatic(PHOTOS, minutes=1)
    long = automatic(PHOTOS, minutes=600, device="cuda", devices=8)
    assert [choice.config.vit for choice in (short, long)] == [SIZES[0].vit, SIZES[-1].vit]
    assert "not measured at this size" not in " ".join(short.reasons)
    assert "not measured at this size" in " ".join(long.reasons)


@pytest.mark.parametrize(("side", "px"), [(8, 32), (28, 32), (33, 40), (64, 64), (500, 64)])
def test_it_looks_at_images_with_no_more_pixels_than_they_have(side, px):
    assert automatic(replace(PHOTOS, side=side), minutes=5).config.inference_px == px


@pytest.mark.parametrize(
    ("hues", "colours", "how"),
    [(0.4, SAME_SHADES, "least"), (0.8, WEAK_COLOURS, "little"), (0.99, STRONG_COLOURS, "freely")],
)
def test_colours_change_as_far_as_the_images_bear_it(hues, colours, how):
    choice = automatic(replace(PHOTOS, hues=hues), minutes=5)
    assert choice.config.photometric == colours
    assert f"changed {how}" in " ".join(choice.reasons)


TINY = {"compute": "fp32", "vit": {"depth": 1}, "health_every": 0}


def test_the_command_says_what_it_chose_and_every_choice_can_be_set(tmp_path, capsys):
    rng = np.random.default_rng(0)
    data = write(tmp_path / "photos", [picture(rng, hue) for hue in range(0, 256, 8)])
    words = ["pretrain", "auto", "--data", data, "--out", str(tmp_path / "run"), "--crops.globals", "3", "--batch", "9"]
    assert cli.run([*words, "--dry-run"]) == 0
    err = capsys.readouterr().err
    for line in (
        "images       32,",
        "network      a ViT of 1 M",
        "batch        8 images, as there are only 32",
        "hues are used evenly",
    ):
        assert line in err
    config = cli.parse_command("pretrain", [*words[1:], "--steps", "4"]).config
    assert (config.batch, config.crops.globals, config.steps, config.minutes) == (9, 3, 4, 0)
    assert cli.parse_command("pretrain", [*words[1:], "--hours", "2"]).config.minutes == 120


def test_files_that_are_left_out_are_said_once(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    data = write(tmp_path / "photos", [picture(rng, hue) for hue in range(9)])
    (tmp_path / "photos" / "film.mp4").write_bytes(b"a film")
    line = f"{data}: leaves out 1 .mp4\n"
    assert cli.run(["pretrain", "auto", "--data", data, "--dry-run"]) == 0
    assert capsys.readouterr().err.count(line) == 1
    open_images(data)
    assert capsys.readouterr().err == line
    monkeypatch.setenv("RANK", "1")  # the first process says it
    open_images(data)
    assert capsys.readouterr().err == ""


def test_files_that_are_left_out_are_said_before_what_fails(tmp_path, capsys):
    (tmp_path / "film.mp4").write_bytes(b"a film")
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert cli.run(["pretrain", "auto", "--data", str(tmp_path), "--dry-run"]) == 2
    assert "leaves out 1 .mp4\n" in capsys.readouterr().err


def test_a_run_goes_on_with_what_it_chose_first(tmp_path, capsys):
    rng = np.random.default_rng(0)
    data = write(tmp_path / "photos", [picture(rng, 9 + n % 9) for n in range(32)])
    settings = {"steps": 2, **TINY}
    troodon.pretrain("auto", data, tmp_path / "run", settings=settings)
    first = json.loads((tmp_path / "run" / "manifest.json").read_text())
    capsys.readouterr()
    troodon.pretrain("auto", data, tmp_path / "run", settings=settings)
    assert "goes on with what it chose" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "manifest.json").read_text()) == first


def test_without_images_or_with_a_mistake_it_names_the_cause(tmp_path, capsys):
    assert cli.run(["pretrain", "auto", "--out", str(tmp_path / "run")]) == 2
    assert "auto looks at the images first: give them as --data" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    data = write(tmp_path / "photos", [picture(rng, 9) for _ in range(9)])
    assert cli.run(["pretrain", "auto", "--data", data, "--out", str(tmp_path / "run"), "--minutes", "soon"]) == 2
    assert "soon" in capsys.readouterr().err
    for option in ("--minutes", "--hours", "--steps"):
        assert cli.run(["pretrain", "auto", "--data", data, "--out", str(tmp_path / "run"), option, "-3"]) == 2
        assert f"{option[2:]} -3" in capsys.readouterr().err
    assert cli.run(["pretrain", "auto", "--data", data, "--out", str(tmp_path / "run"), "--minutes", "inf"]) == 2
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="none of 1 images looked at can be read"):
        troodon.pretrain("auto", str(tmp_path / "broken"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def sets(kind: str, rng: np.random.Generator) -> list:
    if kind == "blank":
        return [Image.new("RGB", (30, 30), "white") for _ in range(20)]
    if kind == "five bands":
        return [rng.integers(0, 256, (24, 24, 5), dtype=np.uint8) for _ in range(20)]
    if kind == "one band":
        return [rng.integers(0, 256, (24, 24), dtype=np.uint8) for _ in range(20)]
    if kind == "tiny and long":
        return [picture(rng, n).resize((3, 200)) for n in range(10)] + [
            picture(rng, n).resize((1, 1)) for n in range(10)
        ]
    return [picture(rng, 20 * n).convert("L") for n in range(20)]


@pytest.mark.parametrize("kind", ["blank", "five bands", "one band", "tiny and long", "grey"])
def test_whatever_the_images_are_it_trains(kind, tmp_path):
    data = write(tmp_path / "images", sets(kind, np.random.default_rng(0)))
    backbone = troodon.load(troodon.pretrain("auto", data, tmp_path / "run", settings={"steps": 3, **TINY}))
    features = backbone.features([np.full((20, 20, backbone.channels), 90, np.uint8)])
    assert np.isfinite(features.cls.numpy()).all()
    assert backbone.preprocessing.crop == automatic(look(open_source(data)), steps=3).config.inference_px


def test_it_is_listed_with_the_recipes():
    assert recipes.pretrain("auto") == recipes.pretrain("small")


@pytest.mark.parametrize("options", [[], ["--steps", "7", "--batch", "16"]])
def test_a_run_of_an_earlier_small_goes_on_as_it_began(options, tmp_path, capsys):
    begun = cli.parse_command("pretrain", ["small_dino", *options]).config
    write_json(tmp_path / "manifest.json", {"kind": "run", "fingerprint": "1", "settings": {"config": to_dict(begun)}})
    today = cli.parse_command("pretrain", ["small", *options]).config
    assert as_begun(today, tmp_path) == begun
    assert "called small_dino now" in capsys.readouterr().err
    assert as_begun(replace(today, seed=3), tmp_path) == replace(today, seed=3)
