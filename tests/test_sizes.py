"""Crops that are not square, and steps of several resolutions: from the settings to the batches."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

import troodon
from tests.test_crops import picture
from tests.test_loader import index, same, take  # noqa: F401  # `index` is a fixture
from tests.test_pretrain import CONFIG, images  # noqa: F401  # `images` is a fixture
from troodon.config import UsageError, from_dict, from_yaml, pair, parse, to_yaml
from troodon.images.sources import open_source
from troodon.learn import plan as planning
from troodon.learn.pretrain import check, pretrain
from troodon.learn.recorder import preprocessing
from troodon.model import preprocess
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.views import sheet
from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig
from troodon.views.crops import generator, multi_crop
from troodon.views.loader import Loader

WIDE = CropsConfig(global_px=(16, 32), local_px=(12, 8), locals=3)
MIXED = CropsConfig(locals=3, mixed=((16, 8, 3.0), (32, 12, 1.0)))


@dataclass(frozen=True)
class Whole:
    crops: CropsConfig = CropsConfig()
    photometric: PhotometricConfig = PhotometricConfig()


def make_loader(index, crops: CropsConfig, **changes) -> Loader:  # noqa: F811
    settings = {"patch": 4, "batch_size": 4, "seed": 7, "threads": 2}
    return Loader(index, crops, PhotometricConfig(), MasksConfig(), **(settings | changes))


# ---- settings


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"global_px": 96}, {"global_px": 96}),
        ({"global_px": [224, 336], "local_px": [98, 140]}, {"global_px": (224, 336), "local_px": (98, 140)}),
        ({"mixed": [[256, 112, 0.5], [512, 224, 0.5]]}, {"mixed": ((256, 112, 0.5), (512, 224, 0.5))}),
    ],
)
def test_sizes_are_written_in_yaml_and_on_the_command_line(tmp_path, written, read):
    expected = Whole(replace(CropsConfig(), **read))
    assert from_dict(Whole(), {"crops": written}, source="settings") == expected
    (tmp_path / "a.yaml").write_text(to_yaml(expected))
    assert from_yaml(Whole(), tmp_path / "a.yaml") == expected
    assert from_yaml(expected, tmp_path / "a.yaml") == expected
    words = []
    for name, value in written.items():
        words += [f"--crops.{name.replace('_', '-')}", *map(str, np.ravel(value))]
    words = [word.removesuffix(".0") for word in words]  # whole numbers, as people write them
    assert parse(Whole, words, prog="x") == expected


def test_one_size_replaces_two():
    wide = Whole(CropsConfig(global_px=(224, 336)))
    assert from_dict(wide, {"crops": {"global_px": 224}}, source="settings") == Whole()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_px": (0, 3)}, "crops.global_px 0: must be 1 or more"),
        ({"mixed": ((16, 0, 1.0),)}, "crops.mixed 16 0 1: sides must be 1 or more"),
        ({"mixed": ((16, 8, 0.0),)}, "crops.mixed 16 8 0: .* the weight above 0"),
        ({"mixed": ((16, 8, math.nan),)}, "the weight above 0"),
        ({"mixed": ((16, 8, math.inf),)}, "the weight above 0"),
    ],
)
def test_invalid_sizes_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        CropsConfig(**change)


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        (CropsConfig(18, local_px=8), "crops.global_px 18 does not divide into patches of 4; the nearest is 16"),
        (CropsConfig((16, 21), local_px=8), "crops.global_px 16 21 does not .* the nearest is 16 20"),
        (CropsConfig(16, local_px=(2, 8)), "crops.local_px 2 8 does not .* the nearest is 4 8"),
        (replace(MIXED, global_px=16, mixed=((16, 8, 1.0), (30, 8, 1.0))), "crops.mixed 30 does not .* 32"),
        (replace(MIXED, global_px=16, mixed=((16, 9, 1.0),)), "crops.mixed 9 does not .* the nearest is 8"),
        (replace(MIXED, global_px=22), "crops.global_px 22 does not .* the nearest is 24"),  # evaluation needs it
    ],
)
def test_every_size_must_divide_into_patches(images, crops, message):  # noqa: F811
    with pytest.raises(UsageError, match=message):
        check(replace(CONFIG, crops=crops), open_source(images), None, 1)


def test_the_size_that_mixed_does_not_use_may_be_anything(images):  # noqa: F811
    check(replace(CONFIG, crops=replace(MIXED, global_px=16, local_px=97)), open_source(images), None, 1)


def test_sizes_lists_every_one_with_its_probability():
    assert CropsConfig().sizes() == (((224, 224), (98, 98), 1.0),)
    assert WIDE.sizes() == (((16, 32), (12, 8), 1.0),)
    assert MIXED.sizes() == (((16, 16), (8, 8), 0.75), ((32, 32), (12, 12), 0.25))
    assert (pair(3), pair((3, 4))) == ((3, 3), (3, 4))


def test_pick_size_draws_by_weight():
    assert WIDE.pick_size(0.9) is WIDE
    sides = [(MIXED.pick_size(u).global_px, MIXED.pick_size(u).local_px) for u in (0.0, 0.7499, 0.75, 1 - 2**-53)]
    assert sides == [(16, 8), (16, 8), (32, 12), (32, 12)]
    assert MIXED.pick_size(0.9).mixed == ()
    assert replace(MIXED.pick_size(0.9), global_px=1, local_px=1) == replace(MIXED, global_px=1, local_px=1, mixed=())


# ---- crops


def test_crops_have_the_configured_height_and_width():
    image = picture(57, 80)
    wide, narrow = multi_crop(image, WIDE, generator(0, 0, 0))
    assert (wide.shape, narrow.shape) == ((2, 3, 16, 32), (3, 3, 12, 8))
    for x, again in zip((wide, narrow), multi_crop(image, WIDE, generator(0, 0, 0)), strict=True):
        assert x.is_contiguous()
        assert torch.equal(x, again)
    square = multi_crop(image, CropsConfig((16, 16), local_px=(8, 8)), generator(0, 0, 0))
    for x, same_as in zip(square, multi_crop(image, CropsConfig(16, local_px=8), generator(0, 0, 0)), strict=True):
        assert torch.equal(x, same_as)


@pytest.mark.parametrize("size", [(48, 48), (32, 96), (96, 32)])
def test_a_crop_is_stretched_as_the_settings_say_whatever_its_shape(size):
    """On ramps, the difference between neighbouring pixels gives the scale of each direction."""
    ramp = np.arange(252, dtype=np.uint8)
    image = np.stack([*np.meshgrid(ramp, ramp), np.zeros((252, 252), np.uint8)], axis=2)
    config = CropsConfig(size, locals=0, aspect=(0.5, 2.0))
    config = replace(config, global_scale=(0.1, 0.15))
    logs = []
    for visit in range(150):
        for crop_CHW in multi_crop(image, config, generator(0, 0, visit))[0].double():
            rows, columns = size
            across = (crop_CHW[0, :, -4] - crop_CHW[0, :, 3]).mean().abs() / (columns - 7)
            down = (crop_CHW[1, -4] - crop_CHW[1, 3]).mean() / (rows - 7)
            logs.append(math.log2(across / down))
    assert min(logs) > -1.08
    assert max(logs) < 1.08
    assert abs(np.mean(logs)) < 4 / math.sqrt(3 * len(logs))
    assert np.std(logs) == pytest.approx(1 / math.sqrt(3), rel=0.12)  # of uniform numbers in [-1, 1]


# ---- batches


def test_batches_of_oblong_crops(index, tmp_path):  # noqa: F811
    loader = make_loader(index, WIDE)
    (batch,) = take(loader, 0, 1)
    assert batch.globals_GBCHW.shape == (2, 4, 3, 16, 32)
    assert batch.locals_VBCHW.shape == (3, 4, 3, 12, 8)
    assert batch.masks_NP.shape == (8, 4 * 8)
    assert batch.masks_NP.any()
    times = round(sheet.SHEET_WIDTH / (2 * 32 + 3 * 8 + 16))
    for rows in (1, 2):
        sheet.draw_crops(loader, tmp_path / f"{rows}.png", rows=rows)
        with Image.open(tmp_path / f"{rows}.png") as drawn:
            assert drawn.height == 12 + 2 * sheet.GAP + rows * (16 * times + sheet.GAP)
            assert drawn.width > times * (2 * 32 + 3 * 8) + 6 * sheet.GAP


def test_the_sheet_darkens_the_patches_that_are_masked(index):  # noqa: F811
    """The mask matches the patches of the network, also if the crop is not square."""
    (batch,) = take(make_loader(index, WIDE), 0, 1)
    white = torch.ones(3, 16, 32) * 100  # whatever the colours
    for mask_P in batch.masks_NP:
        drawn = np.asarray(sheet._draw_crop(white, PhotometricConfig(), 3, mask_P))
        mask = mask_P.view(4, 8).numpy()
        assert np.array_equal(drawn[:, :, 0] < 200, mask.repeat(12, 0).repeat(12, 1))


def test_a_batch_has_one_size_drawn_by_weight_from_seed_and_number(index):  # noqa: F811
    loader = make_loader(index, MIXED)
    sides = [loader.crops_of(batch).global_px for batch in range(400)]
    assert abs(sides.count(32) - 100) < 4 * math.sqrt(400 * 0.25 * 0.75)
    assert sides != [make_loader(index, MIXED, seed=8).crops_of(batch).global_px for batch in range(400)]
    for rank in range(4):
        assert sides == [
            make_loader(index, MIXED, rank=rank, world_size=4).crops_of(batch).global_px for batch in range(400)
        ]
    six = take(loader, 0, 6)
    assert [b.globals_GBCHW.shape[-1] for b in six] == sides[:6]
    assert {b.locals_VBCHW.shape[-1] for b in six} == {8, 12}
    assert all(b.masks_NP.shape == (8, (b.globals_GBCHW.shape[-1] // 4) ** 2) for b in six)
    assert all(same(a, b) for a, b in zip(six[3:], take(make_loader(index, MIXED, threads=1), 3, 3), strict=True))


def test_ranks_take_slices_of_a_batch_of_mixed_sizes(index):  # noqa: F811
    loader = make_loader(index, MIXED)
    for number in (next(b for b in range(99) if loader.crops_of(b).global_px == side) for side in (16, 32)):
        (whole,) = take(loader, number, 1)
        parts = [take(make_loader(index, MIXED, rank=r, world_size=2), number, 1)[0] for r in range(2)]
        assert torch.equal(torch.cat([p.globals_GBCHW for p in parts], 1), whole.globals_GBCHW)
        assert torch.equal(torch.cat([p.locals_VBCHW for p in parts], 1), whole.locals_VBCHW)


def test_one_size_in_the_mix_is_that_size_alone(index):  # noqa: F811
    """The draw of the size changes no other random numbers."""
    alone = take(make_loader(index, CropsConfig(16, local_px=8, locals=3)), 0, 3)
    mixed = take(make_loader(index, replace(MIXED, mixed=((16, 8, 5.0),))), 0, 3)
    assert all(same(a, b) for a, b in zip(alone, mixed, strict=True))


def test_rows_name_the_images_of_a_rank(index):  # noqa: F811
    whole = [row for batch in range(13) for row in make_loader(index, WIDE).rows(batch)]
    assert sorted(whole) == sorted([*range(13)] * 4)
    assert sorted(whole[:13]) == [*range(13)]
    parts = [make_loader(index, WIDE, rank=rank, world_size=2).rows(3) for rank in range(2)]
    assert parts[0] + parts[1] == whole[12:16]
    loader = make_loader(index, replace(WIDE, locals=0))
    for place, row in enumerate(loader.rows(0)):
        if row not in (4, 5):  # which are broken, and replaced
            only = make_loader(index.take([row]), loader.crops)
            assert only.rows(0) == [0] * 4
            image = troodon.images.decode.decode(index.read(row))
            assert torch.equal(loader.load_views(place)[0], multi_crop(image, loader.crops, generator(7, row, 0))[0])


# ---- backbones


def test_preprocessing_covers_the_crop_without_distortion():
    ramp = np.zeros((90, 160, 3), np.uint8)
    ramp[:, :, 0] = np.arange(160)
    ramp[:, :, 1] = np.arange(90)[:, None]
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    for crop, resize in (((28, 56), 32), ((56, 28), 32), ((40, 44), 40)):
        x_CHW = preprocess.crop(ramp, Preprocessing(resize=resize, crop=crop, **plain)) * 255
        assert x_CHW.shape == (3, *crop)
        tall, wide = (side * resize / min(crop) for side in crop)
        scale = max(tall / 90, wide / 160)
        for channel, axis, whole, side in ((0, 1, 160, crop[1]), (1, 0, 90, crop[0])):
            line = x_CHW[channel].mean(1 - axis)
            step = (line[-4] - line[3]) / (side - 7)
            assert step == pytest.approx(1 / scale, rel=0.03)
            assert line[side // 2 - 1 : side // 2 + 1].mean() == pytest.approx((whole - 1) / 2, abs=1.5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (8, 900), (900, 8), (300, 301)])
@pytest.mark.parametrize("crop", [28, (28, 56), (84, 14)])
def test_images_of_every_shape_fill_the_crop(shape, crop):
    p = Preprocessing(resize=32, crop=crop)
    x_CHW = preprocess.crop(np.full((*shape, 3), 255, np.uint8), p)
    white = (1 - torch.tensor(p.mean)) / torch.tensor(p.std)
    assert torch.allclose(x_CHW, white[:, None, None].expand(3, *pair(crop)), atol=0.02)


def test_the_middle_of_an_image_much_longer_than_the_crop_is_seen():
    for axis, crop in ((1, (28, 56)), (0, (56, 28))):
        image = np.zeros((6, 3000, 3) if axis else (3000, 6, 3), np.uint8)
        image[(slice(None), slice(1498, 1502)) if axis else slice(1498, 1502)] = 255
        p = Preprocessing(resize=32, crop=crop)
        line = preprocess.crop(image, p).mean(0).mean(1 - axis)
        above = line - line.min()
        assert (above * torch.arange(56)).sum() / above.sum() == pytest.approx(27.5, abs=0.1)
        assert above[24:32].min() > 1


def test_a_backbone_of_oblong_images_is_saved_and_loaded(tmp_path):
    sight = Preprocessing(resize=32, crop=(28, 56))
    network = ViTConfig(dim=16, depth=1, heads=2, patch=14, grid=4)
    Backbone.random(network, sight).save(tmp_path / "b")
    again = troodon.load(tmp_path / "b")
    assert again.preprocessing == sight
    Image.fromarray(picture(40, 60)).save(tmp_path / "a.png")
    assert again.features([tmp_path / "a.png"]).patches.shape == (1, 2, 4, 16)


@pytest.mark.parametrize("crops", [WIDE, replace(MIXED, global_px=24, local_px=97, locals=2)])
def test_a_run_of_such_crops_trains(images, tmp_path, crops, monkeypatch):  # noqa: F811
    """The plan counts the tokens of a mean step; the backbone takes images of global_px."""
    monkeypatch.setattr(planning, "product_rate", lambda device, dtype: 1e9)
    config = replace(CONFIG, crops=crops, steps=4)
    pretrain(config, open_source(images), tmp_path / "run")
    sight = Backbone.load(tmp_path / "run" / "backbone").preprocessing
    assert sight == preprocessing(config)
    assert (sight.resize, sight.crop) == ((27, 24) if crops.mixed else (18, (16, 32)))
    path = sorted(images.iterdir())[0]
    grid = (6, 6) if crops.mixed else (4, 8)
    assert troodon.load(tmp_path / "run").features([path]).patches.shape == (1, *grid, 32)
    plan = planning.plan(config, 20, "cpu", 4, 1)
    of_mixed = 0.75 * (2 * 17 + 2 * 5) + 0.25 * (2 * 65 + 2 * 10)
    assert plan.tokens == 8 * (of_mixed if crops.mixed else 2 * 33 + 3 * 7)
