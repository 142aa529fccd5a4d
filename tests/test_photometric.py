"""Colour changes: each operation against Pillow or its definition, and the probabilities and ranges of all."""

import colorsys
import math
import shutil

import numpy as np
import pytest
import scipy.ndimage
import torch

from tests import fidelity
from troodon.views import photometric
from troodon.views.config import PhotometricConfig
from troodon.views.photometric import GLOBAL_1, GLOBAL_2, HUE, LOCAL, NEUTRAL, ORDERS, apply, draw_parameters

COLUMNS = ("brightness", "contrast", "saturation", "hue", "order", "grey", "sigma", "solarise")
PLAIN = PhotometricConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
VIEWS = (GLOBAL_1, GLOBAL_2, LOCAL, LOCAL)


def picture(side: int = 48, seed: int = 0) -> np.ndarray:
    """Many hues, greys, black and white, noise: uint8 (side, side, 3)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    image = np.stack([np.sin(5 * x + y), np.cos(4 * y - x), np.sin(3 * x * y + 1)], -1) * 127 + 128
    image += random.normal(0, 15, image.shape)
    image[:6, :6], image[:6, 6:12], image[:6, 12:18] = 0, 255, 77
    return image.clip(0, 255).astype(np.uint8)


def parameters(**changes: float) -> np.ndarray:
    return np.array([[changes.get(name, neutral) for name, neutral in zip(COLUMNS, NEUTRAL)]], np.float32)


def levels(image_HWC: np.ndarray, parameters_NP: np.ndarray) -> np.ndarray:
    """The results of `apply` on one image, before normalisation, in 8-bit levels: (N, H, W, 3) floats."""
    crops_NCHW = torch.from_numpy(image_HWC).permute(2, 0, 1).expand(len(parameters_NP), -1, -1, -1)
    return apply(crops_NCHW, parameters_NP, PLAIN).permute(0, 2, 3, 1).numpy() * 255


def test_neutral_parameters_only_normalise_to_the_last_bit() -> None:
    config, crops_NCHW = PhotometricConfig(), torch.randint(0, 256, (5, 3, 17, 23), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    expected = (crops_NCHW.float() / 255 - mean) / std
    neutral = np.repeat(parameters(), 5, 0)
    assert torch.equal(apply(crops_NCHW, neutral, config), expected)
    # Beside others that are changed, too.
    neutral[[1, 3]] = parameters(brightness=1.3, contrast=0.7, saturation=1.1, hue=0.1, sigma=1, solarise=1)
    changed = apply(crops_NCHW, neutral, config)
    assert torch.equal(changed[[0, 2, 4]], expected[[0, 2, 4]])
    assert (changed[[1, 3]] - expected[[1, 3]]).abs().flatten(1).mean(1).min() > 0.1


def test_every_operation_matches_pillow_or_its_definition() -> None:
    """Bounds in levels of 256: Pillow truncates or rounds to integer levels where ours keeps fractions."""
    bounds = {
        "crop to 224": (0.1, 2), "crop to 98": (0.1, 2), "crop of a smaller JPEG": (4, 60), "brightness": (0.55, 1),
        "contrast": (0.7, 2), "saturation": (0.7, 2), "hue (definition)": (1e-3, 0.01), "grey": (0.3, 0.51),
        "blur (definition)": (1e-3, 0.01), "solarise": (1e-4, 1e-3),
    }  # fmt: skip
    differences = fidelity.differences([fidelity.synthetic_image()])
    assert differences.keys() == bounds.keys()
    for name, (mean, largest) in differences.items():
        assert mean < bounds[name][0], name
        assert largest < bounds[name][1] + 1e-6, name


@pytest.mark.parametrize(
    "change", [{"brightness": 0.9}, {"contrast": 0.9}, {"saturation": 1.2}, {"hue": 0.1}, {"grey": 1}, {"sigma": 1}]
)
def test_every_operation_does_something(change: dict[str, float]) -> None:
    image = picture()
    assert np.abs(levels(image, parameters(**change))[0] - image).mean() > 1


def reference(image_HWC: np.ndarray, p: np.ndarray) -> np.ndarray:
    """All operations on one crop, from their definitions, in float levels."""
    x = image_HWC / 255

    def grey(x: np.ndarray) -> np.ndarray:
        return (x @ np.array([0.299, 0.587, 0.114]))[..., None]

    for column in ORDERS[int(p[4])]:
        f = float(p[column])
        if column == 3:
            hsv = (colorsys.rgb_to_hsv(*c) for c in x.reshape(-1, 3))
            x = np.reshape([colorsys.hsv_to_rgb((h + f) % 1, s, v) for h, s, v in hsv], x.shape)
        else:
            base = (0.0, grey(x).mean(), grey(x))[column]
            x = np.clip(f * x + (1 - f) * base, 0, 1)
    if p[5]:
        x = np.repeat(grey(x), 3, -1)
    if p[6]:
        taps = np.exp(-0.5 * (np.arange(-4, 5) / p[6]) ** 2)
        for axis in (0, 1):
            x = scipy.ndimage.correlate1d(x, taps / taps.sum(), axis=axis, mode="mirror")
    if p[7]:
        x = np.where(x >= 0.5, 1 - x, x)
    return x * 255


def test_a_batch_follows_the_order_of_each_of_its_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    image, random = picture(14), np.random.default_rng(0)
    all_orders = np.repeat(parameters(brightness=1.4, contrast=0.6, saturation=1.2, hue=0.1), 24, 0)
    all_orders[:, COLUMNS.index("order")] = range(24)
    drawn = [draw_parameters(PLAIN, VIEWS, random) for _ in range(12)]
    batch = np.concatenate([all_orders, *drawn])
    got = levels(image, batch)
    for crop, p in zip(got, batch, strict=True):
        assert np.abs(crop - reference(image, p)).max() < 0.02, p
    # The test would not see an order that is ignored if orders made no difference.
    apart = np.abs(got[:24, None] - got[None, :24]).mean((2, 3, 4))
    assert (apart > 0.05).mean() > 0.8
    monkeypatch.setattr(photometric, "PIXELS_AT_ONCE", 500)  # two crops at a time
    assert np.abs(levels(image, batch) - got).max() < 1e-3


def test_apply_is_deterministic_and_does_not_change_its_arguments() -> None:
    crops_NCHW = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    parameters_NP = np.concatenate(
        [draw_parameters(PhotometricConfig(), VIEWS, np.random.default_rng(i)) for i in range(10)]
    )
    before = crops_NCHW.clone(), parameters_NP.copy()
    first = apply(crops_NCHW, parameters_NP, PhotometricConfig())
    assert torch.equal(first, apply(crops_NCHW, parameters_NP, PhotometricConfig()))
    assert torch.equal(first, apply(crops_NCHW, torch.from_numpy(parameters_NP), PhotometricConfig()))
    channels_last = crops_NCHW.contiguous(memory_format=torch.channels_last)
    assert torch.equal(first, apply(channels_last, parameters_NP, PhotometricConfig()))
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    assert torch.equal(crops_NCHW, before[0])
    assert np.array_equal(parameters_NP, before[1])


def test_an_empty_batch_stays_empty() -> None:
    none = draw_parameters(PhotometricConfig(), (), np.random.default_rng(0))
    assert none.shape == (0, 8)
    assert apply(torch.empty((0, 3, 8, 8), dtype=torch.uint8), none, PhotometricConfig()).shape == (0, 3, 8, 8)


def assert_share(happened: np.ndarray, probability: float) -> None:
    """Assert that the share is as expected, within four standard errors; exactly, if that is 0 or 1."""
    error = 4 * math.sqrt(probability * (1 - probability) / happened.size)
    assert abs(happened.mean() - probability) <= error, (happened.mean(), probability)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert low - 1e-6 <= values.min()
    assert values.max() <= high + 1e-6
    for moment in (1, 2):
        error = 4 * math.sqrt((1 / (2 * moment + 1) - 1 / (moment + 1) ** 2) / values.size)
        assert abs((((values - low) / (high - low)) ** moment).mean() - 1 / (moment + 1)) < error


@pytest.fixture(scope="module")
def drawn_INP() -> np.ndarray:
    random = np.random.default_rng(7)
    return np.stack([draw_parameters(PhotometricConfig(), VIEWS, random) for _ in range(4000)])


def test_probabilities_and_ranges_of_the_jitter(drawn_INP: np.ndarray) -> None:
    jitter_MP = drawn_INP.reshape(-1, 8)
    happened = jitter_MP[:, 0] != 1
    assert_share(happened, 0.8)
    neutral = jitter_MP[~happened]
    assert (neutral[:, :5] == NEUTRAL[:5]).all()
    jitter_MP = jitter_MP[happened]
    assert (jitter_MP[:, :4] != NEUTRAL[:4]).all()  # as a whole or not at all
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert_uniform(jitter_MP[:, column], low, high)
    counts = np.bincount(jitter_MP[:, 4].astype(int), minlength=24)
    assert len(counts) == 24
    expected = len(jitter_MP) / 24
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 23 + 4 * math.sqrt(2 * 23)
    assert len({tuple(order) for order in ORDERS}) == 24


def test_probabilities_of_grey_blur_and_solarisation_by_role(drawn_INP: np.ndarray) -> None:
    grey, sigma, solarise = (drawn_INP[..., column] for column in (5, 6, 7))
    assert_share(grey == 1, 0.2)
    for view, (blur, solarised) in enumerate([(0.0, 0.0), (0.9, 0.2), (0.5, 0.0), (0.5, 0.0)]):  # as released
        assert_share(sigma[:, view] > 0, blur)
        assert_share(solarise[:, view] == 1, solarised)
    assert_uniform(sigma[sigma > 0], 0.1, 2.0)
    assert set(np.unique(grey)) == set(np.unique(solarise)) == {0.0, 1.0}


def test_the_papers_blur() -> None:
    config, random = PhotometricConfig(blur=(1.0, 0.1, 0.5)), np.random.default_rng(0)
    sigma = np.stack([draw_parameters(config, VIEWS, random) for _ in range(2000)])[..., 6]
    for view, probability in enumerate((1.0, 0.1, 0.5, 0.5)):
        assert_share(sigma[:, view] > 0, probability)


def test_draws_are_independent(drawn_INP: np.ndarray) -> None:
    happened = np.concatenate([drawn_INP[:, view] != NEUTRAL for view in (1, 2)], 1)[:, [0, 5, 6, 7, 8, 13, 14]]
    values = drawn_INP[(drawn_INP[:, 1, 0] != 1) & (drawn_INP[:, 1, 6] > 0)][:, 1, [0, 1, 2, 3, 4, 6]]
    for table in (happened, values):
        together = np.corrcoef(table.T.astype(float))
        assert np.abs(together - np.eye(len(together))).max() < 4.5 / math.sqrt(len(table))


def test_draws_are_a_function_of_the_generator_and_later_crops_change_nothing() -> None:
    config = PhotometricConfig()
    many = draw_parameters(config, (GLOBAL_1, GLOBAL_2) + (LOCAL,) * 8, np.random.default_rng(1))
    few = draw_parameters(config, (GLOBAL_1, GLOBAL_2), np.random.default_rng(1))
    assert many.dtype == np.float32
    assert np.array_equal(many[:2], few)
    assert not np.array_equal(few, draw_parameters(config, (GLOBAL_1, GLOBAL_2), np.random.default_rng(2)))


def test_strength_zero_and_probability_zero_are_neutral() -> None:
    config = PhotometricConfig(brightness=0, contrast=0, saturation=0, hue=0, grey=0, blur=(0, 0, 0), solarise=0)
    drawn_NP = draw_parameters(config, VIEWS * 50, np.random.default_rng(0))
    drawn_NP[:, 4] = 0
    assert (drawn_NP == NEUTRAL).all()
    strong = draw_parameters(PhotometricConfig(brightness=1.5, jitter=1.0), VIEWS * 50, np.random.default_rng(0))
    assert strong[:, 0].min() >= 0  # never below black


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_compiled_operations_give_the_same() -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("compiling needs a C++ compiler")
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 24, 24), dtype=np.uint8))
    neutral = np.tile(np.array(NEUTRAL, np.float32), (6, 1))
    neutral[:, HUE] = [0.1, -0.1, 0.05, 0.02, 0.3, 0.0]
    eager = apply(crops, neutral, PhotometricConfig())
    try:
        compiled = apply(crops, neutral, PhotometricConfig(), compiled=True)
    except torch._dynamo.exc.BackendCompilerFailed as error:  # as where torch lies in a path with a space
        pytest.skip(f"torch cannot compile here: {str(error).splitlines()[0]}")
    assert (eager - compiled).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_gpu_and_cpu_agree() -> None:
    crops_NCHW = torch.randint(0, 256, (80, 3, 32, 32), dtype=torch.uint8)
    parameters_NP = np.concatenate(
        [draw_parameters(PhotometricConfig(), VIEWS, np.random.default_rng(i)) for i in range(20)]
    )
    there = apply(crops_NCHW.cuda(), parameters_NP, PhotometricConfig()).cpu()
    assert torch.allclose(there, apply(crops_NCHW, parameters_NP, PhotometricConfig()), atol=1e-4)
