"""Decoding: every mode gives upright 8-bit pixels, every broken file gives BadImage and nothing else."""

import csv
import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from troodon.images import decode as module
from troodon.images.decode import BadImage, decode, read_header


@pytest.fixture(autouse=True)
def pillow_warnings_as_for_users() -> None:
    """The module filters warnings of Pillow once, at import; pytest then puts its own filters before these."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def picture(height: int = 48, width: int = 64) -> Image.Image:
    """A smooth colour image that differs in every corner."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], -1)
    return Image.fromarray(rgb.astype(np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def small_files() -> dict[str, bytes]:
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "jpeg": encode(image, "JPEG", exif=exif),
        "progressive": encode(image, "JPEG", progressive=True),
        "png": encode(image, "PNG", exif=exif),
        "gif": encode(image.convert("P"), "GIF"),
        "webp": encode(image, "WEBP"),
        "tiff": encode(image, "TIFF"),
        "bmp": encode(image, "BMP"),
    }


def png_header(width: int, height: int) -> bytes:
    """A black 1-bit PNG with this size in its header, and no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refusal(data: bytes) -> BadImage:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert "\n" not in caught.value.reason
    return caught.value


# ---- pixels


@pytest.mark.parametrize(("mode", "format"), [("RGB", "PNG"), ("RGBX", "TIFF"), ("CMYK", "TIFF"), ("YCbCr", "TIFF")])
def test_colour_modes_give_the_same_picture(mode, format):
    got = decode(encode(picture().convert(mode), format)).astype(int)
    assert np.abs(got - np.asarray(picture())).max() <= 4


def test_lab_and_palette_are_converted():
    lab = encode(picture().convert("LAB"), "TIFF")
    assert read_header(lab).mode == "LAB"
    assert np.abs(decode(lab).astype(int) - np.asarray(picture())).mean() < 3
    palette = encode(picture().quantize(256), "PNG")
    assert read_header(palette).mode == "P"
    assert np.abs(decode(palette).astype(int) - np.asarray(picture())).mean() < 8


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_has_three_equal_channels(mode):
    grey = picture().convert(mode)
    got = decode(encode(grey, "PNG"))
    assert np.array_equal(got, np.repeat(np.asarray(grey.convert("L"))[:, :, None], 3, axis=2))
    assert got.flags.writeable
    assert got.flags.c_contiguous


def test_sixteen_bits_keep_the_high_byte():
    grey = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    got = decode(encode(Image.fromarray(grey), "PNG"))
    assert np.array_equal(got[:, :, 0], grey >> 8)
    assert (got.min(), got.max()) == (0, 255)
    assert np.array_equal(decode(encode(Image.fromarray(grey.astype(">u2")), "TIFF")), got)


@pytest.mark.parametrize(
    ("grey", "expected"),
    [
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 256, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-10, 0, 10]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 0.1, 0.2]], np.float32), [0, 26, 51]),
        (np.array([[100.0, 150.0, 200.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.5, np.inf]], np.float32), [0, 128, 255]),
        (np.array([[7.0, 7.0, 7.0]], np.float32), [0, 0, 0]),
    ],
)
def test_wide_greys_are_rescaled(grey, expected):
    assert decode(encode(Image.fromarray(grey), "TIFF"))[0, :, 0].tolist() == expected


def test_transparency_is_composited_on_white():
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    red.putpixel((1, 2), (0, 0, 0, 0))
    red.putpixel((2, 1), (0, 0, 0, 128))
    got = decode(encode(red, "PNG"))
    assert got[2, 1].tolist() == [255, 255, 255]
    assert got[1, 2].tolist() == [127, 127, 127]
    assert got[0, 0].tolist() == [255, 0, 0]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.putpixel((3, 3), 0)
    for format in ("PNG", "GIF"):
        got = decode(encode(palette, format, transparency=0))
        assert got[3, 3].tolist() == [255, 255, 255], format
        assert got[0, 0].tolist() == [0, 255, 0], format
    assert decode(encode(Image.new("LA", (2, 2), (0, 0)), "PNG")).min() == 255


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(data), upright)
    assert (read_header(data).height, read_header(data).width) == upright.shape[:2]
    if orientation == 6:  # what lay on the left now stands on top
        assert upright.shape[:2] == (64, 48)


def test_broken_exif_is_ignored():
    data = encode(picture(), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(decode(data), np.asarray(picture()))


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        got = decode(encode(frames[0], format, save_all=True, append_images=frames[1:]))
        assert got[0, 0, 0] > 240, format
        assert got[0, 0, 2] < 15, format


# ---- broken files


def test_awkward_files_decode_as_their_manifest_says(shared):
    with tarfile.open(shared("formats_robustness.tar")) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    failed = {}
    for row in csv.DictReader(io.StringIO(files["manifest.csv"].decode())):
        data = files[row["path"]]
        if row["status"] != "ok":
            failed[row["path"]] = (row["status"], refusal(data).status)
            continue
        header = read_header(data)
        expected = (row["format"], row["mode"], int(row["width"]), int(row["height"]))
        assert (header.format, header.mode, header.width, header.height) == expected, row["path"]
        assert decode(data).shape == (header.height, header.width, 3), row["path"]
    assert failed == {
        "files/corrupt_ukbench09268.jpg": ("corrupt", "not an image"),
        "files/text.jpg": ("corrupt", "not an image"),
        "files/zero_bytes.jpg": ("corrupt", "empty"),
        "files/truncated_half.jpg": ("truncated", "truncated"),
    }


def test_real_photos_of_one_scene_are_all_turned_the_same_way_up(shared):
    with tarfile.open(shared("formats_robustness.tar")) as tar:
        sky = [decode(tar.extractfile(f"files/exif_exif-rotn-{n}.jpg").read()) for n in (1, 3)]
    small = [np.asarray(Image.fromarray(x).resize((8, 8))).astype(float).ravel() for x in sky]
    assert np.corrcoef(small[0], small[1])[0, 1] > np.corrcoef(small[0], small[1][::-1])[0, 1]


def test_a_16_bit_photo_is_not_white(shared):
    with tarfile.open(shared("formats_robustness.tar")) as tar:
        assert decode(tar.extractfile("files/depth16.png").read()).mean() < 250


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
        (bytes(1000), "not an image"),
        (b"\xff\xd8\xff\xe0", "truncated"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50) + b"IEND\xaeB`\x82", "decode error"),
    ],
)
def test_non_images_have_a_status(data, status):
    bad = refusal(data)
    assert bad.status == status
    assert str(bad) == f"{status}: {bad.reason}"
    with pytest.raises(BadImage):
        read_header(data)


@pytest.mark.parametrize("kind", [*small_files(), "lzw", "avif", "jpeg2000"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
def test_an_incomplete_file_is_truncated(kind, part, monkeypatch):
    rare = {"lzw": ("TIFF", {"compression": "tiff_lzw"}), "avif": ("AVIF", {}), "jpeg2000": ("JPEG2000", {})}
    data = encode(picture(), rare[kind][0], **rare[kind][1]) if kind in rare else small_files()[kind]
    cut = data[: max(16, int(len(data) * part))]
    assert refusal(cut).status == "truncated"
    monkeypatch.setattr(module, "simplejpeg", None)
    assert refusal(cut).status == "truncated"


@pytest.mark.parametrize("warnings_are", ["error", "ignore"])  # as in these tests, and as for users
def test_an_image_too_large_is_refused_before_its_pixels_are_read(warnings_are, monkeypatch, recwarn):
    warnings.simplefilter(warnings_are)

    def load(self):
        raise AssertionError("the pixels were read")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for side in (10_001, 14_000, 100_000):  # above our limit, and above the one at which Pillow itself raises
        bad = refusal(png_header(side, side))
        assert bad.status == "too large"
        assert f"{side * side:,}" in bad.reason
    assert read_header(png_header(9_990, 10_000)).width == 9_990  # Pillow alone would warn, which is an error here


def test_out_of_memory_is_a_bad_image(monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert str(refusal(small_files()["bmp"])) == "too large: out of memory"


def test_bad_image_survives_pickling():
    bad = pickle.loads(pickle.dumps(BadImage("truncated", "too soon")))
    assert (bad.status, bad.reason) == ("truncated", "too soon")


@pytest.mark.parametrize("more", [["--files", "5000"], ["--files", "1500", "--seed", "1", "--slow"]])
def test_damaged_files_cause_no_crash_hang_or_leak(more):
    """In a separate process, since a decoder that crashes ends its process."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "tests.fuzz", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert sum(report["outcomes"].values()) == int(more[1])
    assert report["outcomes"].keys() >= {"ok", "truncated", "decode error", "not an image", "too large"}
    assert report["outcomes"]["ok"] < 0.6 * int(more[1])
    assert report["slowest_s"] < 30
    assert report["grown_mb"] < 50
    assert report["kinds"] >= 20


# ---- simplejpeg


def test_the_fast_decoder_gives_the_same_pixels_and_refusals(shared, monkeypatch):
    pytest.importorskip("simplejpeg")
    with tarfile.open(shared("photos_cc0_224.tar")) as tar:
        files = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")][:20]
    files += [encode(picture(), "JPEG", keep_rgb=True), encode(picture().convert("L"), "JPEG"), *small_files().values()]
    files += [data[: len(data) * part // 5] for data in files[:4] for part in range(1, 5)]
    files += [files[0][:-2], files[0] + b"trailing"]

    def outcome(data: bytes) -> str | bytes:
        try:
            return decode(data).tobytes()
        except BadImage as bad:
            return bad.status

    fast = [outcome(data) for data in files]
    monkeypatch.setattr(module, "simplejpeg", None)
    assert [outcome(data) for data in files] == fast


def test_the_fast_decoder_is_used_and_pillow_is_the_fallback(monkeypatch):
    fast = pytest.importorskip("simplejpeg")
    calls = []

    class Spy:
        @staticmethod
        def decode_jpeg(data, **size):
            calls.append(len(data))
            if len(calls) > 1:
                raise ValueError("not today")
            return fast.decode_jpeg(data, **size)

    monkeypatch.setattr(module, "simplejpeg", Spy)
    data = encode(picture(), "JPEG")
    assert np.array_equal(decode(data), decode(data))
    assert len(calls) == 2
    decode(encode(picture().convert("CMYK"), "JPEG"))
    assert len(calls) == 2  # not sizes


def test_pillow_is_silenced_when_the_module_is_imported():
    code = "import warnings, troodon.images.decode; warnings.warn_explicit('noise', UserWarning, 'x.py', 1, 'PIL.Any')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_many_threads_agree():
    files = [*small_files().values(), b"", b"text", png_header(50_000, 50_000)] * 20

    def outcome(data: bytes) -> str | bytes:
        try:
            return decode(data).tobytes()
        except BadImage as bad:
            return str(bad)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, files)) == [outcome(data) for data in files]


# ---- reduced JPEGs


@pytest.mark.parametrize("times", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(208, 168), (203, 161)])
def test_a_jpeg_is_decoded_at_a_reduced_size(size, times, orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 50).convert("RGB")
    data, sizes = encode(image, "JPEG", quality=95, exif=exif), []

    def shrink(height, width):
        sizes.append((height, width))
        return times

    whole, small = decode(data), decode(data, reduction=shrink)
    assert sizes == [whole.shape[:2]]
    assert small.shape == (*(-(-side // times) for side in whole.shape[:2]), 3)
    monkeypatch.setattr(module, "simplejpeg", None)
    assert np.array_equal(decode(data, reduction=lambda *_: times), small)
    if not size[0] % times and not size[1] % times:
        average = np.asarray(Image.fromarray(whole).reduce(times)).astype(float)
        assert np.abs(small - average).mean() < 4  # of 255; an area average is nearly what it is


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_other_formats_are_never_reduced(format):
    data = encode(picture(), format)
    assert np.array_equal(decode(data, reduction=lambda *_: 8), decode(data))
