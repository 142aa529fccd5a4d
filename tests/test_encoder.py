"""The encoder of copies: network and pixel vectors, spaces, and attacked copies of benchmark images."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from troodon.config import UsageError
from troodon.curate import embed as embedding
from troodon.curate import pipeline, space
from troodon.curate.calibrate import calibrate
from troodon.curate.config import CurateConfig
from troodon.curate.encoder import MAX_FRAME, CopyEncoder, PixelBackbone, frame_fractions
from troodon.images.decode import to_grey
from troodon.images.index import SCHEMA, Index
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.search.exact import l2_normalise
from troodon.views.attacks import ATTACKS, BENCHMARK_ATTACKS, attack, attacked_copies

from .test_curate import QUICK, picture, png, rows, write
from .test_curate import Pixels as Colours

NO_IMAGES = Index(SCHEMA.empty_table())
QUICK_ALL = replace(QUICK, gather="all")


def backbone(channels: int = 3) -> Backbone:
    config = ViTConfig(dim=32, depth=1, heads=2, patch=8, grid=3, layer_scale=1.0, channels=channels)
    torch.manual_seed(0)
    return Backbone.random(config, Preprocessing(24, 24, (0.5,) * channels, (0.25,) * channels))


def test_pixels_ignore_brightness_and_contrast_and_nearly_ignore_mirroring():
    images = [picture(seed) for seed in range(4)]
    encoder = CopyEncoder(PixelBackbone(3), pixels=False)
    x, darker, flatter = (
        l2_normalise(encoder(some)) for some in (images, [i // 2 for i in images], [i // 2 + 100 for i in images])
    )
    assert x.shape == (4, 288)
    assert np.einsum("nd,nd->n", x, darker).min() > 0.995
    assert np.einsum("nd,nd->n", x, flatter).min() > 0.995
    assert np.einsum("nd,nd->n", x, l2_normalise(encoder([i[:, ::-1] for i in images]))).min() > 0.7
    assert (x @ x.T)[~np.eye(4, dtype=bool)].max() < 0.6
    assert not encoder([np.full((20, 30, 3), 77, np.uint8)]).any()  # one colour


def test_a_frame_is_ignored_and_a_sky_is_not():
    encoder, original = CopyEncoder(PixelBackbone(3), pixels=False), picture(5)
    x = l2_normalise(encoder([original]))[0]
    framed = [
        np.pad(original, ((a, a), (b, b), (0, 0)), constant_values=c)
        for a, b, c in ((9, 9, 0), (8, 0, 255), (0, 7, 90))
    ]
    noisy = np.clip(framed[2] + np.random.default_rng(0).normal(0, 3, framed[2].shape), 0, 255).astype(np.uint8)
    for image in (*framed, noisy):
        assert l2_normalise(encoder([image]))[0] @ x > 0.9
    below = np.pad(original, ((24, 0), (0, 0), (0, 0)), constant_values=230)
    assert frame_fractions(Image.fromarray(below)) == (0, 0)
    assert l2_normalise(encoder([below]))[0] @ x < 0.6
    one_colour = np.full((20, 20, 3), 9, np.uint8)
    assert frame_fractions(Image.fromarray(one_colour)) == (MAX_FRAME / 32, MAX_FRAME / 32)
    assert not encoder([one_colour]).any()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_network_and_pixel_vectors_are_concatenated_and_stored(channels, tmp_path):
    random = np.random.default_rng(0)
    images = [random.integers(0, 255, (30, 24 + n, channels), dtype=np.uint8) for n in range(5)]
    for n, image in enumerate(images):
        np.save(tmp_path / f"{n}.npy", image)
    network, width = backbone(channels), 288 if channels > 2 else 96
    x = CopyEncoder(network, "cls+mean")(images, batch=2)
    assert x.shape == (5, 64 + width)
    for part in (x[:, :32], x[:, 32:64], x[:, 64:]):
        np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(CopyEncoder(network, "cls+mean", pixels=False)(images, batch=2), x[:, :64])
    index = open_source(tmp_path)
    folder = embedding.embed(
        network, index, tmp_path / "e", batch=2, threads=1, tokens="cls+mean", pixels=True
    )  # fmt: skip
    stored = CopyEncoder(network, "cls+mean").load_vectors(folder)
    assert len(stored) == 5
    np.testing.assert_allclose(stored[:], x, atol=1e-3)
    np.testing.assert_array_equal(stored[np.array([3, 1])], stored[:][[3, 1]])
    if channels == 1:
        shown = [picture(seed) for seed in range(3)]
        np.testing.assert_array_equal(CopyEncoder(network).match_channels(shown), [to_grey(i) for i in shown])


def test_a_copy_descriptor_is_used_without_pixels():
    assert CopyEncoder.create(backbone(), "cls", pixels=True).pixels
    assert not CopyEncoder.create(backbone(), "cls", pixels=False).pixels

    class ForCopies(Colours):
        for_copies = True

    assert not CopyEncoder.create(ForCopies(), "cls", pixels=True).pixels
    assert (
        len({CopyEncoder(backbone(), tokens, p).fingerprint for tokens in ("cls", "cls+mean") for p in (True, False)})
        == 4
    )


def test_a_space_is_fitted_to_some_rows_of_a_matrix_in_blocks(monkeypatch):
    x = np.random.default_rng(0).standard_normal((300, 12)).astype(np.float32)
    some = np.arange(0, 300, 2)
    expected = space.fit("whitened", x[some])
    monkeypatch.setattr(space, "BLOCK", 7)
    fitted = space.fit("whitened", x, some)
    np.testing.assert_allclose(np.abs(fitted.matrix_DK), np.abs(expected.matrix_DK), rtol=1e-3)


def test_spaces_are_saved_and_loaded(tmp_path):
    x = np.random.default_rng(0).standard_normal((30, 12)).astype(np.float32)
    for kind in ("plain", "centred", "whitened"):
        fitted = space.fit(kind, x)
        fitted.save(tmp_path / f"{kind}.npz")
        np.testing.assert_array_equal(space.Space.load(tmp_path / f"{kind}.npz")(x), fitted(x))


def test_attacked_copies_depend_only_on_the_image():
    assert {kind for kind, _ in BENCHMARK_ATTACKS} <= ATTACKS.keys()
    first, again = attacked_copies(picture(1), 16), attacked_copies(picture(1).copy(), 16)
    assert len(first) == len(BENCHMARK_ATTACKS) == 16
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(a.shape == picture(1).shape and np.array_equal(a, picture(1)) for a in first)
    assert all(np.array_equal(a, b) for a, b in zip(first, attacked_copies(picture(1), 8)))
    with pytest.raises(UsageError, match="benchmark_attacks 17"):
        CurateConfig(benchmark_attacks=17)


def test_calibration_accounts_for_attacked_copies():
    pool = [picture(seed) for seed in range(150)]
    encoder = CopyEncoder(Colours(), pixels=False)
    fitted = space.fit("whitened", x := encoder(pool))

    def calibrated(attacks: int):
        random = np.random.default_rng(0)
        return calibrate(
            lambda some: fitted(encoder(some)),
            pool[:30],
            random,
            others_MD=fitted(x),
            benchmark_attacks=attacks,
            benchmark_false_merges=1.0,
        )

    without, with_copies = calibrated(0), calibrated(8)
    assert calibrate(lambda some: fitted(encoder(some)), pool[:5], np.random.default_rng(0)).benchmark_threshold is None
    assert with_copies.threshold == without.threshold  # within the pool, images are not attacked
    assert with_copies.benchmark_threshold > without.benchmark_threshold  # more comparisons, more false merges
    assert with_copies.benchmark_recall > without.benchmark_recall > 0.5


@pytest.fixture(scope="module")
def hidden(tmp_path_factory) -> tuple[Index, Index]:
    """Sixty pictures and forty copies (padded, mirrored, rotated, sticker, window) of eight benchmark images."""
    root, random = tmp_path_factory.mktemp("hidden"), np.random.default_rng(7)
    copies = {
        f"{kind}-{n}.png": png(attack(picture(300 + n), kind, random, 0.5))
        for kind in ("pad", "flip", "rotate", "sticker", "screenshot") for n in range(8)
    }  # fmt: skip
    write(root / "pool", {f"{n}.png": png(picture(n)) for n in range(60)} | copies)
    write(root / "benchmark", {f"{n}.png": png(picture(300 + n)) for n in range(8)} | {"broken.png": b"no"})
    return open_source(root / "pool"), open_source(root / "benchmark")


def leaked(hidden, out, network, **changes) -> tuple[int, int, dict]:
    """The number of dropped copies, the number of other dropped images, and the ledger by name."""
    config = replace(QUICK_ALL, steps=("benchmark",), verify="none", benchmark_false_merges=0.05, **changes)
    out = pipeline.curate(config, NO_IMAGES, hidden[0], network, out, benchmark=hidden[1])
    ledger = rows(out)
    dropped = {name for name, row in ledger.items() if row["stage"] == "benchmark" and row["pool"] == "uncurated"}
    copies = {name for name in dropped if "-" in name}
    return len(copies), len(dropped - copies), ledger


def test_attacked_copies_of_a_benchmark_find_more_leaks(hidden, tmp_path):
    without, wrong, _ = leaked(hidden, tmp_path / "without", Colours(), benchmark_attacks=0, pixels=False)
    assert without < 34
    assert wrong <= 5
    found, wrong, ledger = leaked(hidden, tmp_path / "with", Colours(), pixels=False)
    assert found >= 38 > without
    assert wrong <= 5
    assert ledger["flip-3.png"]["cause"] == next(r["at"] for r in ledger.values() if r["path"] == "benchmark/3.png")


def test_pixels_help_a_weak_network(hidden, tmp_path):
    alone, _, _ = leaked(hidden, tmp_path / "alone", backbone(), pixels=False)
    both, wrong, _ = leaked(hidden, tmp_path / "both", backbone())
    assert both > alone + 5
    assert both >= 36
    assert wrong <= 5


def test_a_pool_without_a_readable_image_has_no_leaks(hidden, tmp_path):
    write(tmp_path / "pool", {f"{n}.png": b"no picture" for n in range(3)})
    pool = open_source(tmp_path / "pool")
    out = pipeline.curate(QUICK_ALL, NO_IMAGES, pool, Colours(), tmp_path / "s", benchmark=hidden[1])
    assert not any(row["kept"] for row in rows(out).values())


def test_images_of_many_channels_have_no_attacked_copies(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (9, 24, 24, 5), dtype=np.uint8)
    for name, some in (("pool", images), ("benchmark", images[:2])):
        (tmp_path / name).mkdir()
        for n, image in enumerate(some):
            np.save(tmp_path / name / f"{name}-{n}.npy", image)
    config = CurateConfig(gather="all", threshold=0.99, benchmark_threshold=0.99, duplicate_space="plain")
    out = pipeline.curate(config, NO_IMAGES, open_source(tmp_path / "pool"), backbone(5), tmp_path / "s",
                          benchmark=open_source(tmp_path / "benchmark"))  # fmt: skip
    assert pq.read_table(out / "images.parquet").num_rows == 11
    assert sum(r["stage"] == "benchmark" and r["pool"] == "uncurated" for r in rows(out).values()) == 2
