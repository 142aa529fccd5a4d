import numpy as np
import pytest
from PIL import Image

from troodon.config import UsageError
from troodon.views.attacks import ALL_ATTACKS, ATTACKS, attack, random_attack
from troodon.views.config import ALL_ATTACK_KINDS, ATTACK_KINDS, CropsConfig
from troodon.views.crops import generator, multi_crop
from troodon.world.scene import render

IMAGES = [render(1, k, px=64).image for k in range(3)]
RESIZED = {"shrink", "enlarge", "stretch", "crop", "tight_crop", "pad", "screenshot"}
# What seeds 0 to 4 draw, since the first runs with attacks.
RECORDED = [("vignette", 0.528), ("noise", 0.994), ("grey", 0.236), ("sticker", 0.79), ("gamma", 0.081)]
ALWAYS_THE_SAME = {"flip", "vertical_flip", "quarter_turn"}  # at every strength


def gist(image: np.ndarray, side: int = 12) -> np.ndarray:
    """A small grey thumbnail without its mean: attacks change it little."""
    x = np.asarray(Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.BOX), float)
    return (x - x.mean()).ravel() / (np.linalg.norm(x - x.mean()) + 1e-9)


@pytest.mark.parametrize("shape", [(16, 16), (16, 2000), (2000, 16), (33, 64)])
def test_every_shape_gives_an_image(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for kind in ALL_ATTACKS:
        for strength in (0.01, 0.3, 1.0):
            for seed in range(3):
                assert min(attack(image, kind, np.random.default_rng(seed), strength).shape[:2]) >= 8, kind


@pytest.mark.parametrize("kind", ALL_ATTACKS)
def test_an_attack_changes_the_picture_but_leaves_it_similar(kind):
    for n, image in enumerate(IMAGES):
        before = image.copy()
        copy = attack(image, kind, np.random.default_rng(n), 0.5)
        assert copy.dtype == np.uint8
        assert copy.ndim == 3
        assert copy.shape[2] == 3
        assert min(copy.shape[:2]) >= 8
        assert (image == before).all()  # the original is left alone
        assert copy.shape != image.shape or (copy != image).any()
        assert (copy.shape == image.shape) or kind in RESIZED | {"rotate", "mix"}

        if kind == "tight_crop":  # it may have little in common with a thumbnail of the whole
            assert is_part(copy, image)
            continue
        seen = copy if kind != "inset" else located(copy, image)
        turns = (0, 1, 2, 3) if kind in ("quarter_turn", "vertical_flip") else (0,)
        turned = [np.ascontiguousarray(np.rot90(x, k)) for x in (seen, seen[:, ::-1]) for k in turns]
        same = max(gist(image) @ gist(y) for y in turned)
        others = [gist(x) @ gist(y) for x in IMAGES if x is not image for y in turned]
        assert same > max(others), kind
        if kind not in ("pad", "screenshot", "rotate", "mix", "crop", "text", "sticker", "vignette", "perspective"):
            assert same > 0.85, kind


@pytest.mark.parametrize("kind", ALL_ATTACKS)
def test_an_attack_is_a_function_of_its_arguments(kind):
    once, again, other = (attack(IMAGES[0], kind, np.random.default_rng(s), 0.6) for s in (5, 5, 6))
    assert once.shape == again.shape
    assert (once == again).all()
    assert kind in ALWAYS_THE_SAME or once.shape != other.shape or (once != other).any()


@pytest.mark.parametrize("kind", sorted(ALL_ATTACKS.keys() - ALWAYS_THE_SAME - {"mix", "enlarge"}))
def test_a_stronger_attack_changes_more(kind):
    def change(strength: float) -> float:
        total = 0.0
        for n in range(12):
            image = IMAGES[n % len(IMAGES)]
            copy = Image.fromarray(attack(image, kind, np.random.default_rng(n), strength))
            total += np.abs(np.asarray(copy.resize((64, 64), Image.Resampling.BICUBIC), float) - image).mean()
        return total

    assert change(0.1) < change(1.0)


def test_a_resave_is_nearly_equal():
    for image in IMAGES:
        copy = attack(image, "resave", np.random.default_rng(0), 1.0)
        assert copy.shape == image.shape
        assert 0 < np.abs(copy.astype(int) - image).mean() < 6


def test_sizes_follow_the_strength():
    random = np.random.default_rng
    assert attack(IMAGES[0], "shrink", random(0), 1.0).shape[0] < 0.55 * 64
    assert attack(IMAGES[0], "enlarge", random(0), 1.0).shape[0] > 1.9 * 64
    for n in range(20):
        height, width, _ = attack(IMAGES[0], "crop", random(n), 1.0).shape
        assert 0.66 < height * width / 64**2 < 0.78
        height, width, _ = attack(IMAGES[0], "tight_crop", random(n), 1.0).shape
        assert 0.36 < height * width / 64**2 < 0.48


def is_part(copy: np.ndarray, image: np.ndarray) -> bool:
    h, w, _ = copy.shape
    places = ((y, x) for y in range(len(image) - h + 1) for x in range(image.shape[1] - w + 1))
    return any(np.array_equal(image[y : y + h, x : x + w], copy) for y, x in places)


def located(copy: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The part of a picture in which an image, that takes 70 % of its sides, was pasted."""
    side = round(0.7 * len(image))
    small = np.asarray(Image.fromarray(image).resize((side, side)), float)
    places = [(y, x) for y in range(len(copy) - side + 1) for x in range(len(copy) - side + 1)]
    parts = [copy[y : y + side, x : x + side] for y, x in places]
    return min(parts, key=lambda part: np.abs(part - small).mean())


def test_an_inset_is_pasted_into_another_picture_each_time():
    plain = np.full((64, 64, 3), 255, np.uint8)
    copies = [attack(plain, "inset", np.random.default_rng(seed), 1.0) for seed in range(8)]
    white = [(copy == 255).all(2) for copy in copies]
    assert all(0.2 < one.mean() < 0.45 for one in white)  # a quarter to a third, and what is white beside it
    assert len({one.tobytes() for one in white}) == len(white)  # elsewhere
    grounds = [copy[~one].std() for copy, one in zip(copies, white)]
    assert min(grounds) > 5


def test_turns_and_flips_lose_nothing():
    image = IMAGES[0][:40]
    turns = [attack(image, "quarter_turn", np.random.default_rng(seed), 0.5) for seed in range(20)]
    found = [next(k for k in range(4) if np.array_equal(np.rot90(image, k), turned)) for turned in turns]
    assert set(found) == {1, 2, 3}
    assert np.array_equal(attack(image, "vertical_flip", np.random.default_rng(0), 0.5), image[::-1])


def test_a_perspective_leaves_no_empty_corner():
    plain = np.full((50, 70, 3), 200, np.uint8)
    for seed in range(10):
        assert (attack(plain, "perspective", np.random.default_rng(seed), 1.0) == 200).all()
    lines = np.zeros((60, 90, 3), np.uint8)
    lines[:, 30] = lines[20] = 255
    for seed in range(5):  # straight lines stay straight, and do not stay parallel to the sides
        copy = attack(lines, "perspective", np.random.default_rng(seed), 1.0)[..., 0].astype(float)
        y, x = np.nonzero(copy > 60)
        upright = np.abs(x - np.polyval(np.polyfit(*(np.arange(60), copy[:, :60].argmax(1)), 1), y)) < 3
        assert upright.sum() > 40


def test_any_image_type_is_accepted_and_not_changed():
    for mode in ("L", "RGB", "RGBA"):
        flat = Image.new(mode, (33, 17), 128)
        before = flat.tobytes()
        for kind in ATTACKS:
            assert attack(flat, kind, np.random.default_rng(0), 1.0).shape[2] == 3
        assert flat.tobytes() == before


def test_unknown_attacks_and_strengths_are_refused():
    with pytest.raises(UsageError, match="did you mean 'sharpen'"):
        attack(IMAGES[0], "sharpn", np.random.default_rng(0), 0.5)
    with pytest.raises(UsageError, match=r"strength 1\.5"):
        attack(IMAGES[0], "blur", np.random.default_rng(0), 1.5)


def test_runs_that_name_no_kinds_draw_as_ever(monkeypatch):
    drawn: list[tuple[str, float]] = []
    monkeypatch.setattr("troodon.views.attacks.attack", lambda image, kind, random, strength: drawn.append(
        (kind, round(strength, 3))) or np.asarray(image))  # fmt: skip
    for kinds in ((), ATTACK_KINDS, ALL_ATTACK_KINDS):
        for seed in range(5):
            random_attack(IMAGES[0], CropsConfig(attack=1.0, attack_kinds=kinds), seed)
    assert drawn[:5] == drawn[5:10] == RECORDED
    assert {kind for kind, _ in drawn[10:]} - set(ATTACK_KINDS)
    assert list(ATTACKS) == list(ATTACK_KINDS)  # calibration and the embedded world number them
    assert len(ATTACK_KINDS) == 24


def test_a_crop_of_a_turned_picture_is_not_distorted():
    """A box of the original, scaled to a copy that lies on its side, would be four times as wide in relation."""
    squares = np.kron(np.indices((8, 16)).sum(0) % 2, np.ones((16, 16))) * 255
    image = np.repeat(squares[..., None], 3, 2).astype(np.uint8)
    config = CropsConfig(global_px=64, global_scale=(0.3, 0.4), locals=0, aspect=(1.0, 1.0), attack=1.0,
                         attack_kinds=("quarter_turn",))  # fmt: skip
    for visit in range(10):
        globals_GCHW, _ = multi_crop(image, config, generator(0, 0, visit), random_attack)
        for crop_HW in globals_GCHW[:, 0].numpy() > 127:
            down, across = (np.mean((np.diff(x.astype(int), axis=0) != 0).sum(0)) for x in (crop_HW, crop_HW.T))
            assert abs(down - across) <= 1.5
