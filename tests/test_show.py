"""Pictures of what a backbone sees: right in their pixels and numbers, the same in any order, and clear when wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import troodon
from tests.test_cli import run
from troodon.config import UsageError
from troodon.evaluate.components import patch_colours, principal_components
from troodon.evaluate.show.matches import APART, CELL, mutual_nearest
from troodon.evaluate.show.sheet import DENSITY, EDGE, GAP, SCALE, Sheet, Tile, draw, scale_colours, wrap
from troodon.evaluate.show.views import Picture, View, read_pictures, shown, spread
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.verbs.common import with_range

HOSTILE = "<script>alert(1)<script>\x1b[31m\N{CJK UNIFIED IDEOGRAPH-732B}.png"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    config = ViTConfig(dim=24, depth=2, heads=3, patch=4, grid=4, layer_scale=1.0, registers=2)
    return with_range(Backbone.random(config, Preprocessing(resize=16, crop=16)), None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images of two classes and three shapes, of noise."""
    for i in range(6):
        path = tmp_path / "images" / ("red" if i < 3 else "blue") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (24 + 8 * (i % 3), 24, 3), dtype=np.uint8)
        pixels[:, :, 2 if i < 3 else 0] //= 4
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert round(picture.info["dpi"][0]) == 72 * DENSITY
        return picture.size


# Principal components


def test_pca_shows_each_image_beside_the_colours_of_its_patches(backbone: Backbone, images: Path, tmp_path: Path):
    numbers = troodon.show_pca(backbone, images, tmp_path / "a.png", background=True)
    assert [one["grid"] for one in numbers["images"]] == [[4, 4]] * 6
    pictures, _ = read_pictures(open_source(images), range(6), 3)
    found = patch_colours([*backbone.features([p.pixels_HWC for p in pictures]).patches.numpy()])
    assert numbers["explained_variance"] == pytest.approx(found.variance.tolist())
    page = np.asarray(Image.open(tmp_path / "a.png"))
    cell = 168 * DENSITY
    x = EDGE * DENSITY + cell + GAP * DENSITY
    is_first = (page[:, x] == found.colours[0][0, 0]).all(-1)
    top = int(is_first.argmax())
    mosaic = page[top + cell // 8 : top + cell : cell // 4, x + cell // 8 : x + cell : cell // 4]
    assert np.array_equal(mosaic, found.colours[0])


def test_a_component_is_the_same_whatever_the_order_of_images_and_patches():
    x = np.random.default_rng(0).normal(size=(4, 5, 5, 8)) * np.linspace(3, 1, 8)
    forward, backward = patch_colours([*x], foreground=True), patch_colours([*x[::-1]], foreground=True)
    assert np.abs(np.stack(forward.colours) - np.stack(backward.colours[::-1]).astype(int)).max() <= 1
    assert np.array_equal(np.stack(forward.foreground), np.stack(backward.foreground[::-1]))
    assert forward.variance.sum() < 1
    assert list(forward.variance) == sorted(forward.variance, reverse=True)


def test_a_large_object_that_touches_the_border_is_the_foreground():
    """It has more patches at the border than the background has, but a smaller share of its own."""
    x = 0.05 * np.random.default_rng(0).normal(size=(8, 8, 6))
    x[:, :6, 2] += 1
    assert np.array_equal(patch_colours([x], foreground=True).foreground[0][0], [True] * 6 + [False] * 2)
    x[:, :6, 2] -= 2
    assert np.array_equal(patch_colours([x], foreground=True).foreground[0][0], [True] * 6 + [False] * 2)


def test_the_channel_of_the_largest_weight_counts_positive():
    for seed in range(8):
        x = np.random.default_rng(seed).normal(size=(50, 3)) * (5, 2, 0.1)  # channels are the axes, the largest first
        components, _ = principal_components(x, 2)
        assert ((components * x[:, :2]).sum(0) > 0).all()


def test_images_of_any_aspect_are_shown_whole(backbone: Backbone, images: Path, tmp_path: Path):
    numbers = troodon.show_pca(backbone, images, tmp_path / "a.png", whole=True, size=24)
    assert [one["grid"] for one in numbers["images"]] == [[6, 6], [8, 6], [10, 6]] * 2
    one = troodon.show_pca(backbone, images / "red" / "2.png", tmp_path / "b.png", size=(8, 24))
    assert one["images"][0]["grid"] == [2, 6]


def test_what_is_drawn_is_what_the_network_is_shown(backbone: Backbone):
    """A ramp from top to bottom: what is cut off, or squeezed, changes it."""
    ramp = np.broadcast_to(np.linspace(0, 255, 40)[:, None, None], (40, 24, 3)).astype(np.uint8)
    for view in (View(), View((8, 24)), View(12, whole=True)):
        drawn = shown(backbone, Picture("ramp", None, ramp), view, 96)
        h, w = backbone.features([ramp], **view.options).patches[0].shape[:2]
        assert drawn.width / drawn.height == w / h
        assert max(drawn.size) >= 96
        if not view.whole:
            p = backbone.preprocessing
            x_HWC = backbone.prepare([ramp], size=view.size)[0].permute(1, 2, 0)
            seen_HWC = x_HWC * torch.tensor(p.std) + torch.tensor(p.mean)
            small = np.asarray(drawn.resize((4 * w, 4 * h), Image.Resampling.BOX)) / 255
            assert np.abs(small - seen_HWC.numpy()).max() < 0.04
    assert np.ptp(np.asarray(drawn)) > 250  # all of it


def test_images_are_spread_and_what_is_left_out_is_said(backbone: Backbone, images: Path, tmp_path: Path, capsys):
    assert spread(10, 3) == [1, 5, 8]
    (images / "blue" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    numbers = troodon.show_pca(backbone, images, tmp_path / "a.png", count=2)
    assert len(numbers["images"]) == 2
    assert "2 of 7 images, spread evenly" in capsys.readouterr().err
    numbers = troodon.show_pca(backbone, images, tmp_path / "a.png")
    assert len(numbers["images"]) == 6
    assert "1 of 7 images cannot be read: images/blue/broken.png: " in capsys.readouterr().err


def test_patches_that_are_all_alike_have_no_foreground(backbone: Backbone, tmp_path: Path, capsys, monkeypatch):
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    real = Backbone.features
    monkeypatch.setattr(
        Backbone, "features", lambda self, x, **o: replace(real(self, x, **o), patches=torch.ones(1, 4, 4, 8))
    )
    numbers = troodon.show_pca(backbone, tmp_path / "black.png", tmp_path / "out" / "a.png")
    assert numbers["explained_variance"] == [0, 0, 0]
    assert "there is no foreground" in capsys.readouterr().err


# Attention


@pytest.mark.parametrize("whole", [False, True])
def test_attention_has_a_map_for_each_token_and_head(backbone: Backbone, images: Path, tmp_path: Path, whole: bool):
    numbers = troodon.show_attention(backbone, images, tmp_path / "a.png", count=2, block=0, whole=whole)
    assert [one["token"] for one in numbers["images"]] == ["class token", "register 1", "register 2"] * 2
    assert numbers["block"] == 0
    pictures, _ = read_pictures(open_source(images), spread(6, 2), 3)
    maps = backbone.attention([p.pixels_HWC for p in pictures], block=0, keep_aspect=whole)
    for i, one in enumerate(numbers["images"]):
        weights_Nhw = maps[i // 3][:, i % 3]
        assert one["grid"] == list(weights_Nhw.shape[1:])
        assert one["patches"] == pytest.approx(weights_Nhw.sum((1, 2)).tolist(), abs=1e-5)
        assert one["max"] == pytest.approx(weights_Nhw.amax((1, 2)).tolist(), abs=1e-5)


def test_many_heads_take_several_rows(tmp_path: Path, images: Path):
    config = ViTConfig(dim=40, depth=1, heads=10, patch=4, grid=4)
    many = with_range(Backbone.random(config, Preprocessing(resize=16, crop=16)), None)
    one = replace(many, vit=Backbone.random(replace(config, heads=5), many.preprocessing).vit)
    troodon.show_attention(many, images / "red" / "0.png", tmp_path / "many.png")
    troodon.show_attention(one, images / "red" / "0.png", tmp_path / "one.png")
    (wide, tall), (narrow, low) = size_of(tmp_path / "many.png"), size_of(tmp_path / "one.png")
    assert wide > narrow
    assert tall > low + 112 * DENSITY


# Neighbours


def test_neighbours_of_an_image_begin_with_itself(backbone: Backbone, images: Path, tmp_path: Path):
    query = images / "red" / "1.png"
    numbers = troodon.show_neighbours(backbone, images, tmp_path / "n.png", query=query, k=3)
    (found,) = numbers["queries"]
    assert found["nearest"][0]["path"] == "images/red/1.png"
    assert found["nearest"][0]["score"] == pytest.approx(1, abs=1e-5)
    scores = [one["score"] for one in found["nearest"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 3
    assert numbers["images"] == 6


def test_embeddings_give_the_same_neighbours(backbone: Backbone, images: Path, tmp_path: Path):
    folder = troodon.embed(backbone, images, tmp_path / "emb", compute="fp32")
    by_images = troodon.show_neighbours(backbone, images, tmp_path / "a.png", query=images, k=4)
    by_vectors = troodon.show_neighbours(backbone, folder, tmp_path / "b.png", query=images, k=4)
    for a, b in zip(by_images["queries"], by_vectors["queries"], strict=True):
        assert a["label"] == b["label"] == a["nearest"][0]["label"] in ("red", "blue")
        assert [one["id"] for one in a["nearest"]] == [one["id"] for one in b["nearest"]]
        assert [one["score"] for one in a["nearest"]] == pytest.approx([one["score"] for one in b["nearest"]], abs=2e-3)
    with pytest.raises(UsageError, match="leave --size and --whole out"):
        troodon.show_neighbours(backbone, folder, tmp_path / "b.png", query=images / "red", size=32)


def test_an_image_that_is_gone_keeps_its_place(backbone: Backbone, images: Path, tmp_path: Path, capsys):
    folder = troodon.embed(backbone, images, tmp_path / "emb")
    (images / "blue" / "3.png").unlink()
    numbers = troodon.show_neighbours(backbone, folder, tmp_path / "b.png", query=images / "red" / "0.png", k=6)
    assert len(numbers["queries"][0]["nearest"]) == 6
    assert "images/blue/3.png: " in capsys.readouterr().err


# Matches


def test_matches_are_mutual_and_above_the_score():
    first = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 1, 0]])
    second = np.array([[0, 1, 0, 0.2], [1, 0, 0, 0.9], [0.9, 0, 0, 0], [0, 1, 0, 0]])
    i, j, score = mutual_nearest(first, second, 0.5)
    assert (i.tolist(), j.tolist()) == (
        [0, 1],
        [2, 3],
    )  # the third's nearest has a nearer one; the fourth is near to nothing
    assert score.tolist() == pytest.approx([1, 1])
    assert len(mutual_nearest(first, second[:2], 0.99)[0]) == 0


def test_an_image_matches_itself_in_place(backbone: Backbone, images: Path, tmp_path: Path):
    Image.open(images / "red" / "0.png").save(tmp_path / "again.png")
    data = [images / "red" / "0.png", tmp_path / "again.png"]
    numbers = troodon.show_matches(backbone, data, tmp_path / "m.png", lines=5)
    assert (numbers["drawn"], len(numbers["matches"])) == (5, 16)
    assert all(one["first"] == one["second"] for one in numbers["matches"])
    assert troodon.show_matches(backbone, data, tmp_path / "m.png", above=1)["above"] == 1
    apart = troodon.show_matches(
        backbone, [data[0], images / "blue" / "4.png"], tmp_path / "m.png", whole=True, above=0
    )
    assert [one["grid"] for one in apart["images"]] == [[4, 4], [5, 4]]
    assert all(m["second"][0] < 5 and m["second"][1] < 4 for m in apart["matches"])


def test_a_line_goes_from_patch_to_patch(backbone: Backbone, images: Path, tmp_path: Path):
    pair, view = [images / "red" / "2.png", images / "blue" / "3.png"], {"whole": True, "size": 24}
    numbers = troodon.show_matches(backbone, pair, tmp_path / "m.png", lines=1, above=-1, **view)
    best = numbers["matches"][0]
    page = np.asarray(Image.open(tmp_path / "m.png"))
    page = page[len(page) - (EDGE + 2 * GAP + CELL) * DENSITY :]  # below the scale, which has the same colour
    x = np.flatnonzero((page == SCALE[0]).all(-1).any(0)) / DENSITY - EDGE
    assert x.min() == pytest.approx((best["first"][1] + 0.5) / 6 * CELL * 24 / 40, abs=4)
    assert x.max() == pytest.approx(CELL + APART + (best["second"][1] + 0.5) / 6 * CELL, abs=4)


# The sheet and the page


def test_no_name_is_cut():
    name = f"a/{'very_long_' * 20}name {HOSTILE}"
    lines = wrap(name, 100)
    shown_name = name.replace("\x1b", "\\x1b").replace("\N{CJK UNIFIED IDEOGRAPH-732B}", "\\u732b")
    assert "".join(lines).replace(" ", "") == shown_name.replace(" ", "")
    alone = Sheet("t", [], [[Tile(Image.new("RGB", (10, 10)))]])
    assert draw(replace(alone, rows=[[Tile(Image.new("RGB", (10, 10)), name)]])).height > draw(alone).height + 300


def test_the_scale_gets_brighter():
    brightness = scale_colours(np.linspace(0, 1, 50)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(brightness) > 0).all()


def test_a_page_has_the_picture_and_its_numbers_and_names_are_text(backbone: Backbone, images: Path, tmp_path: Path):
    (images / "red" / "0.png").rename(images / "red" / HOSTILE)
    troodon.show_pca(backbone, images, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;script&gt;" in page
    assert "\x1b" not in page
    assert page.count("data:image/png") == 1
    troodon.show_neighbours(backbone, images, tmp_path / "b.html", query=images / "blue", k=2)
    assert '<td class="word">images/blue/4.png</td>' in (tmp_path / "b.html").read_text()


# The command


def test_the_command_prints_where_the_picture_is_or_its_numbers(
    backbone: Backbone, images: Path, tmp_path: Path, capsys
):
    backbone.save(tmp_path / "b")
    common = ["--backbone", str(tmp_path / "b")]
    out, _ = run("show", "pca", str(images), *common, "--out", str(tmp_path / "p.png"), capsys=capsys)
    assert out.strip() == str(tmp_path / "p.png")
    pair = [str(images / "red" / "0.png"), str(images / "red" / "1.png")]
    out, _ = run(
        "show", "matches", *pair, *common, "--size", "24", "--out", str(tmp_path / "m.png"), "--json", capsys=capsys
    )
    assert json.loads(out)["images"][0]["grid"] == [6, 6]
    size_of(tmp_path / "m.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pca"], "no images to show"),
        (["pca", "{images}/nothing"], "nothing"),
        (["pca", "{images}", "--out", "a.jpg"], "ends with .png, or a page that ends with .html"),
        (["pca", "{images}", "--out", "{images}/a.png"], "count as an image there"),
        (["pca", "{images}/red/0.png", "--out", "{images}/red/0.png"], "count as an image there"),
        (["pca", "{images}", "--count", "0"], "count 0"),
        (["pca", "{images}", "--size", "18"], "the nearest is 16 x 16"),
        (["pca", "{images}", "--size", "400000"], "memory does not hold 400000 x 400000 pixels"),
        (["pca", "{images}", "--size", "8", "8", "8"], "pixels of a side, or (height, width)"),
        (["pca", "{broken}"], "no image to show can be read: broken.png: "),
        (["attention", "{images}", "--block", "2"], "block 2: this network has the blocks 0 to 1"),
        (["neighbours", "{images}"], "no --query"),
        (["neighbours", "{images}", "--query", "{text}"], "no images among 1 file"),
        (["neighbours", "{images}", "--query", "{broken}"], "no image to show can be read: broken.png: "),
        (["neighbours", "{images}", "--query", "{images}/red/0.png", "--k", "0"], "k 0"),
        (["neighbours", "{images}", "--query", "{broken}", "--out", "{images}/a.png"], "count as an image there"),
        (["matches", "{images}/red/0.png"], "these are 1 image"),
        (["matches", "{images}"], "these are 6 images"),
        (["matches", "{images}/red/0.png", "{broken}"], "broken.png: "),
        (["matches", "{images}/red/0.png", "{images}/red/1.png", "--above", "2"], "above 2.0"),
    ],
)
def test_a_mistake_is_one_clear_line(backbone, images, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    backbone.save(tmp_path / "b")
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    before = sorted(tmp_path.rglob("*"))
    places = {"images": images, "text": tmp_path / "notes.txt", "broken": tmp_path / "broken.png"}
    words = [word.format(**places) for word in words]
    _, err = run("show", *words, "--backbone", "b", code=2, capsys=capsys)
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before
