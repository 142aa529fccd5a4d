"""The geometry of crops: against Pillow, against its definition, and on images of every shape."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from troodon.config import UsageError
from troodon.views.attacks import random_attack
from troodon.views.config import CropsConfig
from troodon.views.crops import NUMBERS_PER_CROP, generator, multi_crop, random_box

SMALL = CropsConfig(global_px=56, local_px=28, locals=3)
SHAPES = [(1, 1), (1, 50), (50, 1), (2, 3), (7, 7), (8, 2000), (2000, 8), (57, 40), (300, 301)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with hard black and white edges and some noise, on which bicubic resizing overshoots."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 9.0
    smooth = np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x)], -1) * 100 + 128
    noisy = smooth + random.normal(0, 10, smooth.shape)
    noisy[(y.astype(int) + x.astype(int)) % 5 == 0] = 255
    noisy[(y.astype(int) + x.astype(int)) % 7 == 0] = 0
    return noisy.clip(0, 255).astype(np.uint8)


def boxes(config: CropsConfig, image: np.ndarray, random: np.random.Generator) -> list[tuple[tuple, bool]]:
    """The boxes and flips that `multi_crop` draws from `random`, globals first."""
    numbers = random.random((2 + config.locals, NUMBERS_PER_CROP)).tolist()
    scales = [config.global_scale] * 2 + [config.local_scale] * config.locals
    return [
        (random_box(*image.shape[:2], scale, config.aspect, u), u[-1] < config.flip)
        for u, scale in zip(numbers, scales)
    ]


def test_generator_is_a_function_of_its_three_numbers() -> None:
    names = [(s, i, v) for s in (0, 1, 2) for i in (-1, 0, 1, 2**40) for v in (0, 1, 2)]
    draws = {generator(*name).random(4).tobytes() for name in names}
    assert len(draws) == len(names)
    assert all(generator(*name).random(4).tobytes() in draws for name in names)


def test_streams_of_neighbouring_visits_share_no_number() -> None:
    long = [set(generator(0, 5, visit).integers(2**63, size=5000).tolist()) for visit in range(4)]
    assert len(set.union(*long)) == 4 * 5000


def test_crops_are_pillows_crop_and_resize() -> None:
    image, flips = picture(211, 333), set()
    for visit in range(10):
        globals_GCHW, locals_VCHW = multi_crop(image, SMALL, generator(0, 0, visit))
        drawn = boxes(SMALL, image, generator(0, 0, visit))
        for crop_CHW, ((top, left, h, w), flip) in zip([*globals_GCHW, *locals_VCHW], drawn, strict=True):
            box = Image.fromarray(image[top : top + h, left : left + w])
            expected = np.asarray(box.resize(crop_CHW.shape[1:], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
            got = crop_CHW.numpy()[:, :, ::-1] if flip else crop_CHW.numpy()
            difference = np.abs(got.astype(int) - expected)
            assert difference.mean() < 0.1
            assert difference.max() <= 2
            flips.add(flip)
    assert flips == {True, False}


def test_flip_mirrors_the_same_box() -> None:
    image = picture(60, 80)
    never, always = (dataclasses.replace(SMALL, flip=p) for p in (0.0, 1.0))
    for plain, mirrored in zip(
        multi_crop(image, never, generator(0, 0, 0)), multi_crop(image, always, generator(0, 0, 0))
    ):
        assert torch.equal(plain.flip(-1), mirrored)
        assert not torch.equal(plain, mirrored)


def test_crops_are_contiguous_uint8_and_a_function_of_the_generator() -> None:
    image = picture(90, 70)
    globals_GCHW, locals_VCHW = multi_crop(image, SMALL, generator(3, 4, 5))
    assert (globals_GCHW.shape, locals_VCHW.shape) == ((2, 3, 56, 56), (3, 3, 28, 28))
    for x, again, other in zip(
        (globals_GCHW, locals_VCHW),
        multi_crop(image, SMALL, generator(3, 4, 5)),
        multi_crop(image, SMALL, generator(3, 4, 6)),
    ):
        assert x.dtype == torch.uint8
        assert x.is_contiguous()
        assert torch.equal(x, again)
        assert not torch.equal(x, other)


def test_the_number_of_locals_changes_no_other_crop() -> None:
    image = picture(90, 70)
    globals_GCHW, locals_VCHW = multi_crop(image, dataclasses.replace(SMALL, locals=8), generator(0, 1, 2))
    for count in (0, 1, 5):
        fewer_GCHW, fewer_VCHW = multi_crop(image, dataclasses.replace(SMALL, locals=count), generator(0, 1, 2))
        assert torch.equal(fewer_GCHW, globals_GCHW)
        assert torch.equal(fewer_VCHW, locals_VCHW[:count])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_crops_within_its_colours(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), (10, 130, 250), np.uint8)
    for visit in range(5):
        globals_GCHW, locals_VCHW = multi_crop(image, SMALL, generator(0, 0, visit))
        for x in (globals_GCHW, locals_VCHW):
            assert (x == torch.tensor([10, 130, 250], dtype=torch.uint8).view(3, 1, 1)).all()


def test_read_only_and_mirrored_arrays_are_accepted_and_not_changed() -> None:
    image = picture(40, 50)
    before = image.copy()
    expected = multi_crop(image, SMALL, generator(0, 0, 0))
    image.flags.writeable = False
    mirrored = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    for same in (image, mirrored):
        globals_GCHW, locals_VCHW = multi_crop(same, SMALL, generator(0, 0, 0))
        assert torch.equal(globals_GCHW, expected[0])
        assert torch.equal(locals_VCHW, expected[1])
    assert np.array_equal(image, before)


def test_threads_give_the_same_as_one_thread() -> None:
    image = picture(120, 100)

    def crops(visit: int) -> bytes:
        return b"".join(x.numpy().tobytes() for x in multi_crop(image, SMALL, generator(0, 0, visit)))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(crops, range(40))) == [crops(visit) for visit in range(40)]


def test_an_attack_precedes_the_crop_and_changes_nothing_else() -> None:
    image, whole = picture(90, 70), dataclasses.replace(SMALL, global_scale=(1.0, 1.0), aspect=(7 / 9, 7 / 9), flip=0.0)
    config = dataclasses.replace(whole, attack=1.0, attack_kinds=("flip",))
    plain_GCHW, _ = multi_crop(image, whole, generator(0, 0, 0))
    globals_GCHW, locals_VCHW = multi_crop(image, config, generator(0, 0, 0), random_attack)
    assert torch.equal(globals_GCHW, plain_GCHW.flip(-1))
    random = generator(0, 0, 0)
    random.integers(2**63, size=2)  # what the attacks are drawn from
    assert torch.equal(locals_VCHW, multi_crop(image, whole, random)[1])
    one, other = multi_crop(image, dataclasses.replace(config, attack_kinds=()), generator(0, 0, 0), random_attack)[0]
    assert not torch.equal(one, other)  # each crop has its own
    fewer = dataclasses.replace(config, attack_kinds=(), locals=0)
    assert torch.equal(multi_crop(image, fewer, generator(0, 0, 0), random_attack)[0], torch.stack([one, other]))


def test_the_attacked_share_is_as_configured_and_kinds_are_uniform() -> None:
    image, count = picture(48, 48), 2000
    half = dataclasses.replace(SMALL, attack=0.5, attack_kinds=("flip", "crop"))
    shapes = [random_attack(image, half, seed) for seed in range(count)]
    alone = np.mean([copy is image for copy in shapes])
    mirrored = np.mean([np.array_equal(copy, image[:, ::-1]) for copy in shapes])
    assert (alone, mirrored) == (pytest.approx(0.5, abs=0.04), pytest.approx(0.25, abs=0.04))


@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_every_shape_and_grey_ones_can_be_attacked(shape: tuple[int, int]) -> None:
    config = dataclasses.replace(SMALL, attack=1.0)
    for channels in (1, 3):
        image = picture(*shape)[:, :, :channels]
        for visit in range(12):
            globals_GCHW, _ = multi_crop(image, config, generator(0, 0, visit), random_attack)
            assert globals_GCHW.shape == (2, channels, 56, 56)


def test_a_large_image_is_reduced_before_an_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.asarray(Image.fromarray(picture(12, 16)).resize((800, 600), Image.Resampling.BICUBIC))
    config = dataclasses.replace(SMALL, attack=1.0, attack_kinds=("vignette",), locals=0)
    small = multi_crop(image, config, generator(0, 0, 0), random_attack)[0].float()
    widths: list[int] = []
    monkeypatch.setattr(
        "troodon.views.attacks.attack", lambda image, *_: widths.append(image.width) or np.asarray(image)
    )
    multi_crop(image, config, generator(0, 0, 0), random_attack)
    assert widths == [200, 200]
    monkeypatch.undo()
    monkeypatch.setattr("troodon.views.crops.MARGIN", 1e9)
    assert (
        0 < (multi_crop(image, config, generator(0, 0, 0), random_attack)[0].float() - small).abs().mean() < 3
    )  # of 255


def test_unknown_attacks_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"crops\.attack_kinds 'flipp': did you mean 'flip'"):
        CropsConfig(attack_kinds=("flipp",))


def test_boxes_have_the_areas_aspects_and_places_of_the_definition() -> None:
    count, side, scale, aspect = 4000, 4000, (0.05, 0.32), (3 / 4, 4 / 3)
    drawn = [
        random_box(side, side, scale, aspect, u)
        for u in np.random.default_rng(0).random((count, NUMBERS_PER_CROP)).tolist()
    ]
    top, left, h, w = np.array(drawn, dtype=float).T
    uniform = {
        "area": (h * w / side**2 - scale[0]) / (scale[1] - scale[0]),
        "aspect": (np.log(w / h) - math.log(aspect[0])) / (math.log(aspect[1]) - math.log(aspect[0])),
        "top": top / (side - h),
        "left": left / (side - w),
    }
    for name, values in uniform.items():
        assert values.min() > -0.002, name
        assert values.max() < 1.002, name
        for moment in (1, 2, 3):  # of a uniform number: 1 / (moment + 1); four standard errors
            error = 4 * math.sqrt((1 / (2 * moment + 1) - 1 / (moment + 1) ** 2) / count)
            assert abs((values**moment).mean() - 1 / (moment + 1)) < error, (name, moment)
    together = np.corrcoef(list(uniform.values())) - np.eye(4)
    assert np.abs(together).max() < 4 / math.sqrt(count)


def test_boxes_reach_every_position() -> None:
    numbers = np.random.default_rng(0).random((400, NUMBERS_PER_CROP)).tolist()
    places = {random_box(6, 6, (0.4, 0.5), (1.0, 1.0), u)[:2] for u in numbers}
    assert places == {(top, left) for top in range(3) for left in range(3)}


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((8, 2000), (0, 994, 8, 11)),  # 8 * 4/3 wide
        ((2000, 8), (994, 0, 11, 8)),  # 8 / (3/4) high
        ((1, 50), (0, 24, 1, 1)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_when_nothing_fits_the_central_box_within_the_aspect_range_is_taken(
    shape: tuple[int, int], box: tuple[int, ...]
) -> None:
    for u in np.random.default_rng(0).random((20, NUMBERS_PER_CROP)).tolist():
        assert random_box(*shape, (0.9, 1.0), (3 / 4, 4 / 3), u) == box
