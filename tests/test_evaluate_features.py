"""Features are computed once, for the right images and backbone. Baseline descriptors match their definitions."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluate_world import FakeBackbone, make_index
from troodon.config import UsageError
from troodon.evaluate import features
from troodon.evaluate.baselines import BASELINES, ColourHistogram, RawPixels
from troodon.evaluate.features import Reader, extract
from troodon.images.decode import decode
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig


def test_rows_match_the_index(tmp_path: Path) -> None:
    index, fake = make_index(tmp_path, ["red", "green", "blue"] * 4), FakeBackbone()
    extracted = extract(fake, index, blocks=2, reader=Reader(batch=5, threads=2))
    assert extracted.rows.tolist() == list(range(12))
    assert extracted.cls_NLD.shape == extracted.mean_NLD.shape == (12, 2, 3)
    for row in (0, 7, 11):
        alone = fake.features(fake.prepare([decode(index.read(row))]), blocks=2)
        assert extracted.cls_NLD[row] == pytest.approx(torch.stack([block.cls[0] for block in alone.blocks]).numpy())
        assert extracted.mean_NLD[row] == pytest.approx(torch.stack([block.mean[0] for block in alone.blocks]).numpy())
    assert (extracted.final_ND == extracted.cls_NLD[:, 1]).all()


def test_a_network_with_fewer_blocks_returns_all_of_them(tmp_path: Path) -> None:
    assert extract(FakeBackbone(), make_index(tmp_path, ["red"]), blocks=4).cls_NLD.shape == (1, 3, 3)


def test_a_real_backbone(tmp_path: Path) -> None:
    vit = ViTConfig(dim=32, depth=2, heads=2, patch=8, grid=4, layer_scale=1.0)
    backbone, index = Backbone.random(vit, Preprocessing(resize=32, crop=32)), make_index(tmp_path, ["red", "blue"])
    extracted = extract(backbone, index)
    direct = backbone.features([decode(index.read(row)) for row in (0, 1)])
    assert extracted.cls_NLD.shape == extracted.mean_NLD.shape == (2, 2, 32)
    assert extracted.final_ND == pytest.approx(direct.cls.numpy(), abs=1e-6)
    assert extracted.mean_NLD[:, -1] == pytest.approx(direct.patches.mean((1, 2)).numpy(), abs=1e-6)


def test_a_broken_image_is_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    index = make_index(tmp_path / "images", ["red", "green", "blue", "red"])
    whole = extract(FakeBackbone(), index)
    (tmp_path / "images" / "001.png").write_bytes((tmp_path / "images" / "001.png").read_bytes()[:100])
    (tmp_path / "images" / "003.png").unlink()
    for _ in range(2):  # computed, then from the cache
        extracted = extract(FakeBackbone(), index, reader=Reader(cache=tmp_path / "cache"))
        assert extracted.rows.tolist() == [0, 2]
        assert (extracted.cls_NLD == whole.cls_NLD[[0, 2]]).all()
        assert list(extracted.unreadable) == ["001.png", "003.png"]
        assert "truncated" in extracted.unreadable["001.png"]
    assert "2 of 4 images cannot be read and are skipped: 001.png, 003.png" in capsys.readouterr().err


def test_no_readable_image_is_an_error(tmp_path: Path) -> None:
    index = make_index(tmp_path, ["red"])
    (tmp_path / "000.png").write_bytes(b"not a picture")
    with pytest.raises(UsageError, match=r"none of the 1 images can be read: 000\.png"):
        extract(FakeBackbone(), index)
    with pytest.raises(UsageError, match="none of the 0 images"):
        extract(FakeBackbone(), index.take([]))


def test_features_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fake: its features are not finite"):
        extract(FakeBackbone(sharpness=float("nan")), make_index(tmp_path, ["red"]))


def test_cached_features_do_not_run_the_backbone(tmp_path: Path) -> None:
    index, fake = make_index(tmp_path / "images", ["red", "green", "blue"]), FakeBackbone()
    first = extract(fake, index, reader=Reader(cache=tmp_path / "cache"))
    assert fake.batches == 1
    second = extract(fake, index, reader=Reader(cache=tmp_path / "cache"))
    assert fake.batches == 1
    for name in ("cls_NLD", "mean_NLD", "rows"):
        a, b = getattr(first, name), getattr(second, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    assert second.backbone == "fake"


@pytest.mark.parametrize("change", ["backbone", "blocks", "order", "bytes", "damage"])
def test_cached_features_are_used_only_for_the_same_inputs(tmp_path: Path, change: str) -> None:
    index, fake, blocks = make_index(tmp_path / "images", ["red", "green", "blue"]), FakeBackbone(), 3
    extract(fake, index, blocks=blocks, reader=Reader(cache=tmp_path / "cache"))
    if change == "backbone":
        fake = FakeBackbone(fingerprint="f2", sharpness=2.0)
    elif change == "blocks":
        blocks = 2
    elif change == "order":
        index = index.take([2, 1, 0])
    elif change == "bytes":  # same name, same length, other pixels
        path, other = tmp_path / "images" / "000.png", make_index(tmp_path / "other", ["blue"])
        old, new = path.stat(), other.read(0)
        path.write_bytes(new[: old.st_size].ljust(old.st_size, b"\0"))
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    else:
        (cached,) = (tmp_path / "cache").iterdir()
        cached.write_bytes(cached.read_bytes()[:-50])
    before = fake.batches
    extracted = extract(fake, index, blocks=blocks, reader=Reader(cache=tmp_path / "cache"))
    assert fake.batches == before + 1
    fresh = extract(fake, index, blocks=blocks)
    assert np.array_equal(extracted.cls_NLD, fresh.cls_NLD)


def test_labels_are_not_part_of_the_cache_key(tmp_path: Path) -> None:
    index, other = (make_index(tmp_path, labels) for labels in (["grey", "x"], ["y", "grey"]))
    assert features.files_fingerprint(index, "label") != features.files_fingerprint(other, "label")
    os.utime(tmp_path / "000.png", ns=(1, 1))
    os.utime(tmp_path / "001.png", ns=(1, 1))
    assert features.files_fingerprint(index) == features.files_fingerprint(other)


def test_the_histogram_counts_colours() -> None:
    two_tone = np.zeros((64, 64, 3), np.uint8)
    two_tone[:16] = (255, 0, 0)  # a quarter is red, the rest black
    histogram = ColourHistogram()
    descriptors = histogram.features(histogram.prepare([two_tone, two_tone[::-1], 255 - two_tone])).cls
    assert descriptors.square().sum(1) == pytest.approx(torch.ones(3))
    assert sorted(descriptors[0].square().tolist(), reverse=True)[:2] == pytest.approx([0.75, 0.25], abs=0.02)
    assert torch.allclose(descriptors[0], descriptors[1], atol=1e-3)  # positions do not matter
    assert float(descriptors[0] @ descriptors[2]) < 0.2


def test_raw_pixels_are_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 180, (16, 16, 3), dtype=np.uint8)
    pixels = RawPixels()
    descriptors = pixels.features(pixels.prepare([image, image + 60])).cls
    expected = image.transpose(2, 0, 1).ravel() / 255 - image.mean() / 255
    assert descriptors[0].numpy() == pytest.approx(expected, abs=1e-5)
    assert descriptors[1].numpy() == pytest.approx(expected, abs=1e-5)  # brightness does not matter


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.name)
def test_descriptors_run_like_a_backbone(tmp_path: Path, baseline: ColourHistogram | RawPixels) -> None:
    extracted = extract(baseline, make_index(tmp_path, ["red", "blue", "red"]), blocks=4)
    assert extracted.cls_NLD.shape[:2] == (3, 1)
    assert extracted.mean_NLD.shape == (3, 1, 0)
    unit = extracted.final_ND / np.linalg.norm(extracted.final_ND, axis=1, keepdims=True)
    if baseline.name == "colour-histogram":
        assert unit[0] @ unit[2] > unit[0] @ unit[1]
