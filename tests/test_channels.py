"""Images without exactly three channels, from their bytes to features, scores and thumbnails."""

import io
import random
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import troodon
from tests.test_crops import picture
from tests.test_decode import encode, refusal
from tests.test_pretrain import CONFIG
from troodon import verbs
from troodon.config import UsageError, from_dict
from troodon.curate.config import CurateConfig
from troodon.curate.pipeline import curate
from troodon.evaluate.baselines import BASELINES, ColourHistogram, RawPixels
from troodon.images import decode as module
from troodon.images.decode import BadImage, decode, read_header, to_grey, to_rgb
from troodon.images.reading import read_batches
from troodon.images.sources import open_source
from troodon.learn.pretrain import check, pretrain
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.report.thumbnails import thumbnail
from troodon.verbs.plans import before_training
from troodon.views import sheet
from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig
from troodon.views.crops import generator, multi_crop
from troodon.views.loader import Loader
from troodon.views.photometric import NEUTRAL, apply


def array(channels: int, seed: int = 0, height: int = 24, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def npy(x: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, x, version)
    return file.getvalue()


def header(text: str, version: int = 1, length: int | None = None) -> bytes:
    """A .npy file with this header, valid or not, and no data."""
    length = len(text) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", length) + text.encode()


def fill(folder: Path, channels: int, count: int = 20, classes: int = 1) -> Path:
    """Write arrays, or images for 1 and 4 channels; each class is brighter than the one before."""
    for i in range(count):
        home = folder / f"class{i % classes}"
        home.mkdir(parents=True, exist_ok=True)
        x = array(channels, i) // 2 + np.uint8(100 * (i % classes) // classes)
        if channels in (1, 4):
            Image.fromarray(x.squeeze()).save(home / f"{i:02d}.png")
        else:
            np.save(home / f"{i:02d}.npy", x)
    return folder


def config(channels: int):
    spread = {"mean": (0.4,) * channels, "std": (0.3,) * channels}
    vit = replace(CONFIG.vit, channels=channels)
    return replace(CONFIG, vit=vit, photometric=PhotometricConfig(**spread), steps=2)


# ---- decode


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_is_pillows_l_of_what_three_channels_show(format, mode):
    data = encode(Image.fromarray(picture(30, 40)).convert(mode), format)
    got = decode(data, 1)
    assert got.shape == (30, 40, 1)
    assert got.flags.writeable
    assert np.array_equal(got[:, :, 0], np.asarray(Image.fromarray(decode(data)).convert("L")))
    if mode == "L" and format == "PNG":
        assert np.array_equal(got[:, :, 0], np.asarray(Image.open(io.BytesIO(data))))


def test_wide_greys_and_orientation_hold_for_one_channel():
    wide = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    assert np.array_equal(decode(encode(Image.fromarray(wide), "PNG"), 1)[:, :, 0], wide >> 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(Image.fromarray(picture(30, 40)), "PNG", exif=exif)
    assert np.array_equal(decode(turned, 1), to_grey(decode(turned)))
    assert decode(turned, 1).shape == (40, 30, 1)


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("CMYK", "TIFF")])
def test_four_channels_are_read_unchanged(mode, format):
    x = array(4)
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    data = encode(Image.frombytes(mode, (20, 24), x.tobytes()), format, **options)
    assert np.array_equal(decode(data, 4), x)
    assert decode(data, 4).flags.writeable
    assert decode(data).shape == (24, 20, 3)


@pytest.mark.parametrize(
    ("image", "channels", "message"),
    [
        (Image.new("RGB", (4, 4)), 4, r"channels: 3 \(RGB\), wanted: 4"),
        (Image.new("L", (4, 4)), 4, r"channels: 1 \(L\), wanted: 4"),
        (Image.new("LA", (4, 4)), 2, r"channels: 2 \(LA\), wanted: 2"),
        (Image.new("RGBA", (4, 4)), 5, r"channels: 4 \(RGBA\), wanted: 5"),
    ],
)
def test_no_channel_is_added_or_dropped(image, channels, message):
    with pytest.raises(BadImage, match=f"decode error: {message}"):
        decode(encode(image, "PNG"), channels)


@pytest.mark.parametrize("colours", [2, 5])  # Pillow takes the first for RGB with something more, the other for nothing
def test_a_tiff_with_more_bands_suggests_npy(colours):
    bands = 5
    tags = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, bands, 200), (259, 3, 1, 1), (262, 3, 1, 2 if colours == 2 else 1)]
    tags += [(273, 4, 1, 300), (277, 3, 1, bands), (278, 3, 1, 2), (279, 4, 1, 4 * bands)]
    tags += [(338, 3, 2, 0)] if colours == 2 else []
    data = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    data = data.ljust(200, b"\0") + struct.pack("<5H", *[8] * bands)
    data = data.ljust(300, b"\0") + bytes(range(4 * bands))
    with pytest.raises(BadImage, match=r"convert it to \.npy"):
        decode(data, 5)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_arrays_are_read_unchanged(channels, version):
    x = array(channels)
    for data in (npy(x, version), npy(np.asfortranarray(x), version)):
        for requested in (channels, None):
            got = decode(data, requested)
            assert np.array_equal(got, x)
            assert got.flags.writeable
            assert got.flags.c_contiguous
        info = read_header(data)
        assert (info.format, info.mode, info.height, info.width) == ("NPY", f"{channels} x uint8", 24, 20)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_of_an_array_keep_the_high_byte(order):
    x = np.random.default_rng(0).integers(0, 65536, (6, 7, 5)).astype(order)
    assert np.array_equal(decode(npy(x), 5), (x >> 8).astype(np.uint8))
    assert np.array_equal(decode(npy(np.asfortranarray(x)), 5), (x >> 8).astype(np.uint8))


def test_a_two_dimensional_array_has_one_channel():
    x = array(1)[:, :, 0]
    assert np.array_equal(decode(npy(x), 1)[:, :, 0], x)
    assert str(refusal(npy(x))) == "decode error: channels: 1, wanted: 3"


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (npy(array(5)), "decode error", "channels: 5, wanted: 3"),
        (npy(array(3).astype(np.float32)), "decode error", "float32 where uint8 or uint16"),
        (npy(array(3).astype(np.int16)), "decode error", "int16 where"),
        (npy(array(3).astype(np.uint32)), "decode error", "uint32 where"),
        (npy(array(3) > 9), "decode error", "bool where"),
        (npy(np.zeros((2, 2), "u1,u1")), "decode error", "void16 where"),
        (npy(np.array([[None]])), "decode error", "object where"),
        (npy(array(3)[0, 0]), "decode error", r"shape \(3,\) where"),
        (npy(array(3)[None]), "decode error", r"shape \(1, 24, 20, 3\) where"),
        (npy(np.uint8(3)), "decode error", r"shape \(\) where"),
        (npy(array(3)[:0]), "decode error", r"shape \(0, 20, 3\) where"),
        (npy(array(3))[:-1], "truncated", "the last 1 bytes of an array of 1,440 are missing"),
        (npy(array(3))[:50], "truncated", "EOF"),
        (npy(array(3))[:6], "truncated", "EOF"),
        (npy(array(3), (3, 0)), "decode error", r"version 3\.0"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (9999999, 9999999, 3)}"), "too large", "pixels"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (9, 9, 99999999999999)}"), "decode error", "wanted"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (-9, -9, 3)}"), "decode error", "shape"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (9.5, 9, 3)}"), "decode error", "shape"),
        (header("{'descr': '|u1', 'shape': (9, 9, 3)}"), "decode error", "keys"),
        (
            header("{'descr': 'nonsense', 'fortran_order': False, 'shape': (9, 9, 3)}"),
            "decode error",
            "decode error: .",
        ),
        (header("{'descr': '|V2147483647', 'fortran_order': False, 'shape': (9, 9, 3)}"), "decode error", "void"),
        (header("[" * 900), "decode error", "decode error: ."),
        (header("-" * 900 + "1"), "decode error", "decode error: ."),
        (header("1" * 5000), "decode error", "large"),
        (header("{}", version=2, length=2**32 - 1), "truncated", "EOF"),
        (header("__import__('os').abort()"), "decode error", "decode error: ."),
    ],
)
def test_arrays_that_are_not_images_are_refused(data, status, message):
    bad = refusal(data)
    assert bad.status == status
    with pytest.raises(BadImage, match=message):
        decode(data)


def test_a_truncated_array_reports_its_missing_bytes():
    """Nothing of the size in the header is allocated before the bytes are known to exist."""
    claimed = header("{'descr': '|u1', 'fortran_order': False, 'shape': (9, 9, 99999999999999)}")
    with pytest.raises(BadImage, match="truncated: the last 8,099,999,999,999,919 bytes"):
        decode(claimed, None)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_arrays_give_an_array_or_bad_image(seed):
    draw = random.Random(seed)
    whole = (npy(array(5)), npy(np.asfortranarray(array(5)), (2, 0)), npy(array(5).astype(">u2") * 257))[seed]
    outcomes: dict[str, int] = {}
    for _ in range(300):
        broken = bytearray(whole)
        change = draw.choice(("flip", "cut", "digits", "drop"))
        if change == "flip":
            for _ in range(draw.randint(1, 4)):
                broken[draw.randrange(130)] ^= 1 << draw.randrange(8)
        elif change == "cut":
            del broken[draw.randrange(len(broken)) :]
        elif change == "digits":  # other sizes
            at = draw.choice([i for i in range(10, 120) if chr(broken[i]).isdigit()])
            broken[at] = ord(draw.choice("0123456789"))
        else:
            at = draw.randrange(120)
            del broken[at : at + draw.randint(1, 9)]
        results = []
        for channels in (5, None):
            try:
                got = decode(bytes(broken), channels)
                info = read_header(bytes(broken))
                assert (got.dtype, got.shape[:2]) == (np.uint8, (info.height, info.width))
                results.append(("ok", "no reason"))
            except BadImage as bad:
                results.append((bad.status, str(bad)))
        assert not any("\n" in reason for _, reason in results)
        status = results[0][0]
        outcomes[status] = outcomes.get(status, 0) + 1
    assert outcomes.keys() >= {"ok", "truncated", "decode error"}
    assert outcomes["ok"] < 200


def test_to_rgb_gives_three_channels():
    for channels in (1, 2, 3, 4, 5):
        x = array(channels)
        assert to_rgb(x).shape == (24, 20, 3)
        assert np.array_equal(to_rgb(x)[:, :, 2], x[:, :, 2 if channels > 2 else 0])


# ---- views


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 9])
def test_every_channel_is_cropped_as_it_would_be_alone(channels):
    x = np.concatenate([picture(60, 80, seed)[:, :, :1] for seed in range(channels)], axis=2)
    small = CropsConfig(16, local_px=8, locals=2)
    together = multi_crop(x, small, generator(0, 0, 0))
    assert together[0].shape == (2, channels, 16, 16)
    for c in range(channels):
        alone = multi_crop(x[:, :, c : c + 1], small, generator(0, 0, 0))
        for all_VCHW, one_V1HW in zip(together, alone, strict=True):
            assert torch.equal(all_VCHW[:, c : c + 1], one_V1HW)


def parameters(**changes: float) -> np.ndarray:
    names = ("brightness", "contrast", "saturation", "hue", "order", "grey", "sigma", "solarise")
    return np.array([[changes.get(name, neutral) for name, neutral in zip(names, NEUTRAL)]], np.float32)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_colour_operations_need_three_channels(channels):
    plain = PhotometricConfig(mean=(0.0,) * channels, std=(1.0,) * channels)
    x = torch.from_numpy(array(channels)).permute(2, 0, 1)[None].contiguous()
    as_is = apply(x, parameters(), plain)
    assert torch.equal(as_is, x / 255)
    assert torch.equal(apply(x, parameters(saturation=1.2, hue=0.1, grey=1.0), plain), as_is)
    got = apply(x, parameters(contrast=0.5), plain)
    torch.testing.assert_close(got, as_is * 0.5 + as_is.mean() * 0.5)
    torch.testing.assert_close(apply(x, parameters(brightness=0.5), plain), as_is * 0.5)
    torch.testing.assert_close(apply(x, parameters(solarise=1.0), plain), torch.minimum(as_is, 1 - as_is))
    blurred = apply(x, parameters(sigma=1.5), plain)
    for c in range(channels):
        one = replace(plain, mean=(0.0,), std=(1.0,))
        assert torch.equal(blurred[:, c : c + 1], apply(x[:, c : c + 1].contiguous(), parameters(sigma=1.5), one))
    normal = replace(plain, mean=tuple(range(channels)), std=(2.0,) * channels)
    wanted = (as_is - torch.arange(channels)[:, None, None]) / 2
    torch.testing.assert_close(apply(x, parameters(), normal), wanted)


def test_mean_and_std_need_one_number_per_channel():
    with pytest.raises(UsageError, match=r"photometric\.mean has 5 numbers and photometric\.std 3"):
        PhotometricConfig(mean=(0.5,) * 5)
    changes = {"photometric": {"mean": [0.1] * 5, "std": [0.2] * 5}, "vit": {"channels": 5}}
    assert len(from_dict(CONFIG, changes, source="settings").photometric.std) == 5


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_batches_and_their_sheet_have_the_channels(tmp_path, channels):
    index = open_source(fill(tmp_path / "images", channels, 8))
    made = config(channels)
    one = Loader(index, CONFIG.crops, made.photometric, MasksConfig(), 4, 4, 0, threads=1, channels=channels)
    batches = one.batches(0, torch.device("cpu"))
    batch = next(batches)
    batches.close()
    assert one.broken == {}
    assert batch.globals_GBCHW.shape == (2, 4, channels, 16, 16)
    assert batch.locals_VBCHW.shape == (2, 4, channels, 8, 8)
    sheet.draw_crops(one, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.mode == "RGB"
        crop = np.asarray(drawn)[18:34, -16:]  # of the last local crops, which stand at the right
        assert (crop.std(axis=2).max() == 0) == (channels == 1)


def test_read_batches_skips_images_with_other_channels(tmp_path):
    folder = fill(tmp_path / "images", 5, 6)
    np.save(folder / "class0" / "odd.npy", array(4))
    Image.fromarray(array(3)).save(folder / "class0" / "photo.png")
    broken: dict = {}
    got = list(
        read_batches(open_source(folder), 4, lambda images: [x.shape for x in images], channels=5, broken=broken)
    )
    assert [shape for _, shapes in got for shape in shapes] == [(24, 20, 5)] * 6
    assert sorted(str(bad) for bad in broken.values()) == [
        "decode error: channels: 3 (RGB), wanted: 5",
        "decode error: channels: 4, wanted: 5",
    ]


# ---- training and evaluation


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_a_run_learns_from_its_channels_and_its_backbone_reads_them(tmp_path, channels):
    folder = fill(tmp_path / "images", channels)
    index = open_source(folder)
    pretrain(config(channels), index, tmp_path / "run", before=before_training(index))
    assert (tmp_path / "run" / "pictures" / "crops.png").exists()
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
    backbone = troodon.load(tmp_path / "run")
    assert backbone.channels == channels
    paths = sorted(folder.rglob("*.*"))[:3]
    features = backbone.features(paths)
    assert features.cls.shape == (3, 32)
    assert features.cls.isfinite().all()
    arrays = [decode(path.read_bytes(), channels) for path in paths]
    torch.testing.assert_close(backbone.features(arrays).cls, features.cls)
    assert not torch.allclose(features.cls[0], features.cls[1], atol=1e-6)


@pytest.mark.parametrize(("channels", "known"), [(5, 3), (1, 3), (3, 5)])
def test_means_that_do_not_fit_the_channels_are_refused(tmp_path, channels, known):
    photometric = PhotometricConfig() if known == 3 else config(known).photometric
    wrong = replace(CONFIG, vit=replace(CONFIG.vit, channels=channels), photometric=photometric)
    message = rf"photometric.mean has {known} numbers for {channels} channels: set .* to {channels} numbers each"
    with pytest.raises(UsageError, match=message):
        check(wrong, open_source(fill(tmp_path / "images", 5, 2)), None, 1)


@pytest.fixture
def tiny() -> Backbone:
    sight = Preprocessing(18, 16, (0.4,) * 5, (0.3,) * 5)
    return Backbone.random(ViTConfig(dim=16, depth=2, heads=2, patch=4, grid=4, channels=5), sight)


def test_a_backbone_takes_only_its_channels(tiny):
    with pytest.raises(UsageError, match=r"shape \(24, 20, 3\): this network takes \(height, width, 5\)"):
        tiny.features([array(3)])
    with pytest.raises(UsageError, match="takes"):
        tiny.features([Image.fromarray(array(3))])
    released = replace(tiny, preprocessing=Preprocessing(18, 16))
    with pytest.raises(UsageError, match="3 means for 5 channels"):
        released.features([array(5)])
    assert released.features(torch.zeros(1, 5, 16, 16)).cls.shape == (1, 16)


def test_a_grey_backbone_takes_pictures_of_any_mode(tiny):
    network = replace(tiny.config, channels=1)
    one = Backbone.random(network, Preprocessing(18, 16, (0.4,), (0.3,)))
    colour = Image.fromarray(array(3))
    wanted = one.features([to_grey(array(3))]).cls
    for given in (colour, colour.convert("L"), to_grey(array(3))[:, :, 0]):
        torch.testing.assert_close(one.features([given]).cls, wanted)


def test_everything_that_reads_images_reads_arrays(tmp_path, tiny):
    """Scan, embed, evaluate, curate, thumbnails."""
    folder = fill(tmp_path / "images", 5, 24, classes=2)
    summary = verbs.scan(folder, tmp_path / "index", threads=1)
    assert (summary["ok"], summary["formats"], summary["modes"]) == (24, {"NPY": 24}, {"5 x uint8": 24})
    out = verbs.embed(tiny, folder, tmp_path / "e", threads=1)
    table = pq.read_table(out / "images.parquet")
    assert set(table["status"].to_pylist()) == {"ok"}
    assert set(table["width"].to_pylist()) == {20}
    assert len(open_source(tmp_path)) == 24  # the folder holds embeddings.npy too, which is no image

    tiny.save(tmp_path / "b")
    scores = verbs.evaluate("quick", tmp_path / "b", folder, tmp_path / "scores", threads=1)
    names = sorted({s["backbone"].split()[0] for s in scores})
    assert names == ["colour-histogram", "random", "raw-pixels"]
    for name in ("pca.png", "neighbours.png"):
        assert (tmp_path / "scores" / "pictures" / name).exists()

    index = open_source(folder)
    assert "data:image/jpeg" in str(thumbnail(index, 0))
    with pytest.raises(UsageError, match=r"threshold None: .* takes 5 channels; set it"):
        curate(CurateConfig(verify="none"), index.take([0, 1]), index.take([*range(2, 24)]), tiny, tmp_path / "s")
    chosen = curate(CurateConfig(), index.take([0]), index.take([*range(2, 24)]), tiny, tmp_path / "s")
    assert (chosen / "summary.json").exists()


def test_curation_calibrates_for_a_grey_backbone(tmp_path, tiny):
    network = replace(tiny.config, channels=1)
    one = Backbone.random(network, Preprocessing(18, 16, (0.4,), (0.3,)))
    index = open_source(fill(tmp_path / "images", 1, 12))
    settings = CurateConfig(verify="none", calibration_images=4, threads=1)
    out = curate(settings, index.take([0, 1]), index.take([*range(2, 12)]), one, tmp_path / "s")
    assert (out / "images.parquet").exists()


def test_files_too_large_to_be_an_image_are_not_read(tmp_path):
    with open(tmp_path / "features.npy", "wb") as file:
        file.truncate(2**32 + 1)  # takes no room on the disk
    with pytest.raises(OSError, match=r"4,294,967,297 bytes are more than the limit"):
        open_source(tmp_path).read(0)


# ---- baselines


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_the_histogram_of_other_channels_counts_each(channels):
    x = np.zeros((64, 64, channels), np.uint8)
    x[:16, :, -1] = 255
    found = (histogram := ColourHistogram(channels=channels)).features(histogram.prepare([x])).cls.square()
    assert found.shape == (1, 8 * channels)
    assert found.sum() == pytest.approx(1)
    per_channel = found.view(channels, 8) * channels
    assert per_channel[-1].tolist() == pytest.approx([0.75, *[0] * 6, 0.25], abs=0.02)
    assert per_channel[:-1, 0].tolist() == pytest.approx([1.0] * (channels - 1))


def test_raw_pixels_of_other_channels_are_pixels():
    x = array(5, height=16, width=16)
    pixels = RawPixels(channels=5)
    found = pixels.features(pixels.prepare([x])).cls[0]
    assert found.numpy() == pytest.approx(x.transpose(2, 0, 1).ravel() / 255 - x.mean() / 255, abs=1e-5)


def test_descriptors_of_colours_are_pillows():
    for baseline, mode in zip(BASELINES, ("HSV", "RGB"), strict=True):
        x = picture(50, 70)
        small = Image.fromarray(x).resize((baseline.side,) * 2, Image.Resampling.BILINEAR).convert(mode)
        assert np.array_equal((baseline.prepare([x])[0] * 255).round().permute(1, 2, 0).numpy(), np.asarray(small))


def test_array_headers_are_not_read_beyond_a_kilobyte(monkeypatch):
    monkeypatch.setattr(module, "MAX_NPY_HEADER", 10)
    assert refusal(npy(array(3))).status == "decode error"
