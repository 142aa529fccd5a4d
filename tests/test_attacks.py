import numpy as np
import pytest
from PIL import Image

from troodon.config import UsageError
from troodon.views.attacks import ATTACKS, attack
from troodon.world.scene import render

IMAGES = [render(1, k, px=64).image for k in range(3)]
RESIZED = {"shrink", "enlarge", "stretch", "crop", "pad", "screenshot"}


def gist(image: np.ndarray, side: int = 12) -> np.ndarray:
    """A small grey thumbnail without its mean: attacks change it little."""
    x = np.asarray(Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.BOX), float)
    return (x - x.mean()).ravel() / (np.linalg.norm(x - x.mean()) + 1e-9)


@pytest.mark.parametrize("shape", [(16, 16), (16, 2000), (2000, 16), (33, 64)])
def test_every_shape_gives_an_image(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for kind in ATTACKS:
        for strength in (0.01, 0.3, 1.0):
            for seed in range(3):
                assert min(attack(image, kind, np.random.default_rng(seed), strength).shape[:2]) >= 8, kind


@pytest.mark.parametrize("kind", ATTACKS)
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

        mirrored = np.ascontiguousarray(copy[:, ::-1])
        same = max(gist(image) @ gist(copy), gist(image) @ gist(mirrored))
        others = [gist(x) @ gist(y) for x in IMAGES if x is not image for y in (copy, mirrored)]
        assert same > max(others), kind
        if kind not in ("pad", "screenshot", "rotate", "mix", "crop", "text", "sticker", "vignette"):
            assert same > 0.85, kind


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_attack_is_a_function_of_its_arguments(kind):
    once, again, other = (attack(IMAGES[0], kind, np.random.default_rng(s), 0.6) for s in (5, 5, 6))
    assert once.shape == again.shape
    assert (once == again).all()
    assert kind == "flip" or once.shape != other.shape or (once != other).any()


@pytest.mark.parametrize("kind", sorted(ATTACKS.keys() - {"flip", "mix", "enlarge"}))
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
