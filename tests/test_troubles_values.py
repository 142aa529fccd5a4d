"""Pictures keep their values, in whatever form and file they come, and what cannot be meant is refused by name."""

import copy
import io
import json
import pickle
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import troodon
from tests.test_pretrain import CONFIG as TINY
from troodon import cli
from troodon.config import UsageError
from troodon.images.decode import BadImage, decode, decode_values, read_header
from troodon.images.sources import open_source
from troodon.images.values import look_at
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.pillow import of_pillow, upright

VIT = ViTConfig(dim=64, depth=2, heads=1, patch=14, grid=4, registers=2, layer_scale=1.0)
SIGHT = Preprocessing(64, 56)


@pytest.fixture
def net(tmp_path) -> Backbone:
    Backbone.random(VIT, SIGHT).save(tmp_path / "net")
    return troodon.load(tmp_path / "net")


@pytest.fixture
def rgb() -> np.ndarray:
    grey = np.linspace(0, 255, 80 * 60).reshape(60, 80)
    return np.dstack([grey, grey[::-1], grey[:, ::-1]]).astype(np.uint8)


def grey_16(top: int = 65535) -> np.ndarray:
    return np.linspace(0, top, 80 * 60).round().astype(np.uint16).reshape(60, 80)


def same(a: troodon.Features, b: troodon.Features) -> None:
    torch.testing.assert_close(a.cls, b.cls, rtol=1e-4, atol=1e-5)


def png_16(rgb: np.ndarray) -> bytes:
    """A PNG of 16-bit colours, which Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width, _ = rgb.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(bands: int, extra: int | None) -> bytes:
    """A TIFF of 2 x 2 pixels with the samples 0, 1, 2, ...: red, green, blue and more, which `extra` says is alpha."""
    tags = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, bands, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 300)]
    tags += [(277, 3, 1, bands), (278, 3, 1, 2), (279, 4, 1, 4 * bands)]
    tags += [] if extra is None else [(338, 3, bands - 3, extra)]
    data = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (data.ljust(200, b"\0") + struct.pack(f"<{bands}H", *[8] * bands)).ljust(300, b"\0") + bytes(
        range(4 * bands)
    )


# ---- one picture, one answer


@pytest.mark.parametrize(
    "name", ["16bit.png", "16bit.tif", "alpha.png", "turned.jpg", "float.tif", "palette.gif", "16.pgm"]
)
def test_a_picture_is_the_same_as_path_bytes_and_pil_image(net, rgb, tmp_path, name):
    """The same picture is given as path, bytes or PIL image | Its features are the same."""
    path, exif = tmp_path / name, Image.Exif()
    exif[0x112] = 6
    alpha = np.dstack([rgb, (rgb[:, :, 0] > 128) * np.uint8(255)])
    pictures = {"16bit": Image.fromarray(grey_16()), "alpha": Image.fromarray(alpha), "turned": Image.fromarray(rgb)}
    pictures |= {"float": Image.fromarray(grey_16().astype(np.float32)), "palette": Image.fromarray(rgb).quantize(16)}
    if name == "16.pgm":
        path.write_bytes(b"P5 80 60 65535\n" + grey_16(300).astype(">u2").tobytes())
    else:
        pictures[path.stem].save(path, **({"exif": exif} if "turned" in name else {}))
    expected = net.features([path])
    same(net.features([path.read_bytes()]), expected)
    with Image.open(path) as image:
        same(net.features([image]), expected)
    same(net.features([decode(path.read_bytes())]), expected)
    assert net._pixels(path).std() > 0 or name == "16.pgm"


def test_arrays_are_converted_by_a_stated_rule(net, rgb, capsys):
    """An array has floats in [0, 1], 16 bits or booleans | It is converted as a file would be."""
    same(net.features([rgb.astype(np.float32) / 255]), net.features([rgb]))
    same(net.features([rgb.astype(np.uint16) << 8]), net.features([rgb]))
    same(net.features([rgb.astype(np.int64)]), net.features([rgb]))
    same(net.features([rgb > 99]), net.features([(rgb > 99) * np.uint8(255)]))
    same(net.features([grey_16()]), net.features([Image.fromarray(grey_16())]))
    assert net.prepare([rgb.astype(np.uint16) << 8]).equal(net.prepare([rgb]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.full((9, 9, 3), 200.0), "an array of float64 with values from 200 to 200: give uint8, floats in"),
        (np.full((9, 9, 3), -0.5), "with values from -0.5"),
        (np.full((9, 9, 3), 300), "an array of int64 with values from 300 to 300"),
        (np.zeros((3, 9, 9), np.uint8), r"shape \(3, 9, 9\): this network takes \(height, width, 3\)"),
        (np.zeros((9, 9, 4), np.uint8), "this network takes"),
        (np.array([["a"]]), "an image is uint8"),
        (np.zeros((0, 9, 3), np.uint8), "an image is uint8"),
        (torch.full((1, 3, 56, 56), 300), "an array of int64 with values from 300 to 300"),
        (torch.zeros(3, 56, 56, 3, dtype=torch.uint8), r"shape \(56, 3, 56\): this network takes"),
        (torch.zeros(1, 1, 56, 56), r"shape \(1, 1, 56, 56\): this network takes \(batch, 3, height, width\)"),
        (torch.zeros(56, 56), "this network takes"),
        (torch.zeros(1, 3, 50, 56), "50 x 56 pixels does not divide into patches of 14; the nearest is 56 x 56"),
        (7, "an image is uint8"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_value(net, given, message):
    """An array or tensor has values, a type or channels of no picture | One line names these, and what is taken."""
    with pytest.raises(UsageError, match=message):
        net.features(given if isinstance(given, torch.Tensor) else [given])


def test_one_picture_needs_no_list(net, rgb, tmp_path):
    """features() is given one path, picture, array or tensor, not a list | It is a list of one."""
    Image.fromarray(rgb).save(tmp_path / "a.png")
    expected = net.features([rgb])
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(rgb), rgb, net.prepare(rgb)[0]):
        same(net.features(given), expected)
    same(net.features(net.prepare(rgb).double()), expected)
    assert net.features(net.prepare(rgb).half()).cls.dtype == torch.float32


def test_no_picture_gives_no_features(net):
    """features() is given an empty list | It returns empty features of the right shapes."""
    got, one = net.features([], blocks=2), net.features(torch.zeros(1, 3, 56, 56), blocks=2)
    for a, b in ((got.cls, one.cls), (got.patches, one.patches), (got.registers, one.registers), (got.mean, one.mean)):
        assert a.shape[0] == 0
        assert a.shape[1:] == b.shape[1:]
    assert len(got.blocks) == 2
    assert got.rows == []
    assert net.features(torch.zeros(0, 3, 28, 56)).patches.shape == (0, 2, 4, 64)


def test_a_broken_file_is_named_or_left_out(net, rgb, tmp_path, capsys):
    """One of the files given to features() is broken | It is named, or left out with on_error="skip"."""
    Image.fromarray(rgb).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"abc")
    paths = [tmp_path / "a.png", tmp_path / "bad.png", tmp_path / "gone.png", tmp_path / "a.png"]
    with pytest.raises(UsageError, match=r"bad\.png: not an image"):
        net.features(paths)
    with pytest.raises(UsageError, match=r"gone\.png: No such file"):
        net.features(paths[2])
    got = net.features(paths, on_error="skip")
    assert got.rows == [0, 3]
    assert got.cls.shape == (2, 64)
    assert "2 of 4 images left out" in capsys.readouterr().err
    assert net.features(paths[1:2], on_error="skip").cls.shape == (0, 64)
    with pytest.raises(UsageError, match="did you mean 'skip'"):
        net.features(paths, on_error="skp")
    with pytest.raises(UsageError, match="blocks 3: this network has 2"):
        net.features(paths, blocks=3)


# ---- a backbone is an ordinary object


def test_features_are_ordinary_tensors(net):
    """A head is trained on features, or they are changed in place | They are ordinary tensors."""
    features, head = net.features(torch.randn(4, 3, 56, 56)), torch.nn.Linear(64, 2)
    torch.nn.functional.cross_entropy(head(features.cls), torch.tensor([0, 1, 0, 1])).backward()
    assert head.weight.grad.abs().sum() > 0
    for x in (features.cls, features.patches, features.registers):
        x.div_(x.norm(dim=-1, keepdim=True))
        (torch.nn.Parameter(x) ** 2).sum().backward()
        x.mul_(torch.ones(64, requires_grad=True))


def test_a_backbone_is_copied_sent_and_moved(net, rgb, tmp_path):
    """A backbone is pickled, copied, or moved to a device | The copy gives the same features; the first one stays."""
    Image.fromarray(rgb).save(tmp_path / "a.png")
    expected = net.features(tmp_path / "a.png")
    for other in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net), copy.copy(net), net.to("cpu")):
        same(other.features(tmp_path / "a.png"), expected)
    assert net.to("meta").device.type == "meta"
    assert net.device.type == "cpu"
    with pytest.raises(UsageError, match=r"optimized\('bf16'\)"):
        net.to(torch.bfloat16)
    with pytest.raises(UsageError, match="device 'cudda': not on this machine"):
        net.to("cudda")


def test_save_removes_nothing_of_others(net, tmp_path):
    """A backbone is saved into a folder that holds other things | It is refused, and nothing is removed."""
    for name, folder in (("thesis.txt", tmp_path / "models"), ("model.safetensors", tmp_path / "theirs")):
        folder.mkdir()
        (folder / name).write_text("three years of work")
        with pytest.raises(UsageError, match=name):
            net.save(folder)
        assert [path.name for path in folder.iterdir()] == [name]
    with pytest.raises(UsageError, match="is a file"):
        net.save(tmp_path / "models" / "thesis.txt")
    net.save(str(tmp_path / "text"))
    net.save(tmp_path / "text")  # a backbone is replaced
    assert Backbone.load(str(tmp_path / "text")).fingerprint == net.fingerprint
    (tmp_path / "text" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        net.save(tmp_path / "text")
    assert (tmp_path / "text" / "model.safetensors").exists()


# ---- files


def test_pgm_is_scaled_by_its_own_maximum():
    """A PGM has 16 bits, or a maximum such as 4095 | It is scaled by its own maximum, whatever its brightest pixel."""
    for top in (255, 256):
        data = b"P5 16 16 65535\n" + np.linspace(0, top, 256).astype(">u2").tobytes()
        assert decode(data).max() == top >> 8
    data = b"P5 16 16 4095\n" + np.linspace(0, 4095, 256).astype(">u2").tobytes()
    assert np.array_equal(decode(data)[:, :, 0].ravel(), np.arange(256))


def test_a_fourth_sample_of_a_tiff_is_a_channel():
    """A TIFF has near infrared beside its colours | It is a channel, not transparency."""
    for extra in (None, 0):
        data = tiff(4, extra)
        assert read_header(data).channels == 4
        assert np.array_equal(decode(data, 4).ravel(), np.arange(16))
        assert np.array_equal(decode(data, 3), np.arange(16, dtype=np.uint8).reshape(2, 2, 4)[:, :, :3])
    assert decode(tiff(4, 2), 3).min() > 230  # alpha of 3 in 255: nearly white
    assert read_header(tiff(5, 0)).channels == 5
    with pytest.raises(BadImage, match=r"channels: 5 .*convert it to \.npy"):
        decode(tiff(5, 0), 4)


def test_a_png_with_much_text_is_read(rgb):
    """A PNG has megabytes of metadata | It is read."""
    text, out = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text("log", "x" * 3_000_000, zip=True)
    Image.fromarray(rgb).save(out, "PNG", pnginfo=text)
    assert np.array_equal(decode(out.getvalue()), rgb)


def test_the_largest_size_can_be_set(rgb, monkeypatch):
    """An image has more than 100 megapixels | The message names TROODON_MAX_MEGAPIXELS, which sets the limit."""
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG")
    monkeypatch.setenv("TROODON_MAX_MEGAPIXELS", "0.001")
    with pytest.raises(BadImage, match=r"4,800 pixels are more than the limit of 1,000, .* TROODON_MAX_MEGAPIXELS"):
        decode(out.getvalue())
    monkeypatch.setenv("TROODON_MAX_MEGAPIXELS", "many")
    with pytest.raises(UsageError, match="TROODON_MAX_MEGAPIXELS 'many': a number of megapixels"):
        decode(out.getvalue())
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    monkeypatch.setenv("TROODON_MAX_MEGAPIXELS", "500")
    assert read_header(huge.getvalue()).width == 20_000


# ---- values of more than 8 bits


def smooth(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed).random((6, 6), dtype=np.float32)
    return np.asarray(Image.fromarray(random).resize((64, 64), Image.Resampling.BICUBIC)).clip(0, 1)


@pytest.fixture
def ct(tmp_path) -> Path:
    """12 images of 12 bits in files of 16."""
    (tmp_path / "ct").mkdir()
    for i in range(12):
        Image.fromarray((smooth(i) * 4095).astype(np.uint16)).save(tmp_path / "ct" / f"{i:02d}.png")
    return tmp_path / "ct"


def levels(data: bytes, channels: int = 3, **options) -> int:
    return len(np.unique(decode(data, channels, **options)))


def run(*words: object) -> int:
    return cli.run([str(word) for word in words])


ADVICE = "12 images of 16 bits use 16 of 256 levels; set --range 0 4095"


def test_a_range_keeps_the_levels_of_images_of_more_than_8_bits():
    """Files of 16 bits hold 12, or float data | A range maps their values to all levels; images of 8 bits stay."""
    values = (smooth(0) * 4095).astype(np.uint16)
    for format in ("PNG", "TIFF"):
        out = io.BytesIO()
        Image.fromarray(values).save(out, format)
        assert levels(out.getvalue()) <= 16
        got = decode(out.getvalue(), 1, range=(0, 4095))[:, :, 0]
        assert np.array_equal(got, (values / 4095 * 255).round())
    for array in (np.repeat(values[:, :, None], 12, 2), values.astype(np.float32)[:, :, None], values.astype(np.int16)):
        out = io.BytesIO()
        np.save(out, array)
        got = decode(out.getvalue(), 12 if array.ndim == 3 and array.shape[2] == 12 else 1, range=(1000, 2000))
        assert np.array_equal(got[:, :, 0], ((values.clip(1000, 2000) - 1000.0) / 1000 * 255).round())
    out = io.BytesIO()
    np.save(out, values.astype(np.float32))
    with pytest.raises(BadImage, match="float32 where uint8 or uint16 is wanted; set --range"):
        decode(out.getvalue(), 1)
    out = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(out, "PNG")
    assert np.array_equal(decode(out.getvalue(), range=(0, 4095)), decode(out.getvalue()))


def opencv(values: np.ndarray, suffix: str) -> bytes:
    """A file that OpenCV writes; of colours, with blue first."""
    return cv2.imencode(suffix, values[:, :, [2, 1, 0, 3][: values.shape[2]]])[1].tobytes()


def colours_16(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4096, (5, 7, channels)).astype(np.uint16)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colours_of_16_bits_are_read_whole(suffix, tmp_path, net):
    """A PNG or TIFF has colours of 16 bits | All bits are read: a range keeps the levels, and scan tells the values."""
    values = colours_16(3)
    data = opencv(values, suffix)
    assert np.array_equal(decode(data), values >> 8)
    assert np.array_equal(decode(data, range=(0, 4095)), (values / 4095 * 255).round())
    (tmp_path / f"a{suffix}").write_bytes(data)
    used = troodon.scan(tmp_path / f"a{suffix}")["values"]
    assert (used["types"], used["max"]) == ({"uint16": 1}, values.max())
    assert "use 16 of 256 levels; set --range 0 4095" in used["advice"].replace("uses", "use")
    with Image.open(tmp_path / f"a{suffix}") as image:
        same(net.features([image]), net.features([tmp_path / f"a{suffix}"]))


def test_colours_of_16_bits_are_turned_once_and_composited():
    """Colours of 16 bits are transparent, or turned by EXIF | They are composited on white, and turned once."""
    values = colours_16(4)
    values[:, :, 3] = 65535
    values[2, 3, 3], values[1, 1, 3] = 0, 13107
    got = decode(opencv(values, ".png"), range=(0, 65535))
    assert got[2, 3].tolist() == [255, 255, 255]
    assert np.abs(got[1, 1] - (values[1, 1, :3] * 0.2 + 65535 * 0.8) / 257).max() <= 1
    assert np.array_equal(got[0, 0], (values[0, 0, :3] / 257).round())
    assert np.array_equal(decode(opencv(values, ".png"), 4, range=(0, 65535)), (values / 257).round())
    for turn in range(1, 9):
        wanted = upright(colours_16(3), turn)
        for data in (tiff_of(colours_16(3), turn), with_exif(opencv(colours_16(3), ".png"), turn)):
            assert np.array_equal(decode_values(data).array, wanted)
            header = read_header(data)
            assert (header.height, header.width, header.is_deep) == (*wanted.shape[:2], True)


def with_exif(png: bytes, turn: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    body = exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    return png[:33] + chunk + png[33:]


def tiff_of(values: np.ndarray, turn: int = 1, planar: bool = False, order: str = "<") -> bytes:
    """An uncompressed TIFF of colours, or of channels one after the other."""
    height, width, channels = values.shape
    bits, kind = 8 * values.dtype.itemsize, "uif".index(values.dtype.kind) + 1
    layout = values.transpose(2, 0, 1) if planar else values
    pixels = layout.astype(values.dtype.newbyteorder(order)).tobytes()
    parts = channels if planar else 1
    size = len(pixels) // parts
    lists = [[bits] * channels, [400 + i * size for i in range(parts)], [size] * parts, [0] * max(0, channels - 3)]
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, lists[0]), (259, 3, [1]), (262, 3, [2]), (273, 4, lists[1])]
    tags += [(274, 3, [turn]), (277, 3, [channels]), (278, 4, [height]), (279, 4, lists[2]), (284, 3, [1 + planar])]
    tags += [(338, 3, lists[3])] * (channels > 3) + [(339, 3, [kind] * channels)]
    data = bytearray(struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags)).ljust(400, b"\0"))
    for number, (tag, type, numbers) in enumerate(tags):
        packed = struct.pack(f"{order}{len(numbers)}{'H' if type == 3 else 'I'}", *numbers)
        at = 10 + 12 * number
        struct.pack_into(f"{order}HHI", data, at, tag, type, len(numbers))
        if len(packed) > 4:
            where = {258: 210, 273: 240, 279: 290, 338: 340, 339: 360}[tag]
            struct.pack_into(f"{order}I", data, at + 8, where)
            data[where : where + len(packed)] = packed
        else:
            data[at + 8 : at + 8 + len(packed)] = packed
    return bytes(data) + pixels


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_tiffs_of_floats_in_colours_are_read(dtype):
    """A TIFF has three or four channels of floats or signed numbers | OpenCV reads it, and a range applies."""
    for channels in (3, 4):
        values = (colours_16(channels).astype(np.float64) - 100).astype(dtype)
        data = tiff_of(values)
        assert np.array_equal(decode_values(data, None).array, values)
        header = read_header(data)
        assert (header.mode, header.channels, header.is_deep) == (f"{channels} x {np.dtype(dtype)}", channels, True)
        got = decode(data, channels, range=(-100, 3995))
        assert np.abs(got - colours_16(channels) / 4095 * 255).max() <= 0.51
    assert decode(tiff_of(np.full((2, 2, 3), 0.5, np.float32))).tolist() == [[[128] * 3] * 2] * 2


def test_tiffs_that_would_be_read_wrong_are_broken_images():
    """A TIFF has 16-bit channels one after the other, or more than four | It is broken, and the reason says why."""
    for data, said in (
        (tiff_of(colours_16(3), planar=True), "PlanarConfiguration 2"),
        (tiff_of(colours_16(3).astype(np.float32), planar=True), "PlanarConfiguration 2"),
        (tiff_of(colours_16(5)), r"a TIFF of 5 channels of uint16: convert it to \.npy"),
    ):
        for range in (None, (0, 4095)):
            with pytest.raises(BadImage, match=f"decode error: .*{said}"):
                decode(data, range=range)
    assert np.array_equal(decode(tiff_of(colours_16(3).astype(np.uint8), planar=True)), colours_16(3).astype(np.uint8))


def test_compressed_tiffs_of_the_other_byte_order_keep_their_values():
    """A grey TIFF of signed numbers or floats is compressed and big-endian | Its values are those of the file."""
    for array in (smooth(0).astype(np.float32) * 100, (smooth(0) * 3000).astype(np.int16)):
        assert np.array_equal(decode_values(big_endian(array), 1).array[:, :, 0], array)


def big_endian(array: np.ndarray) -> bytes:
    """A big-endian grey TIFF, deflated."""
    data = bytearray(tiff_of(np.repeat(array[:, :, None], 1, 2), order=">"))
    pixels = zlib.compress(bytes(data[400:]))
    changed = {259: ("H", 8), 262: ("H", 1), 279: ("I", len(pixels))}
    for at in range(10, 10 + 12 * 12, 12):
        (tag,) = struct.unpack_from(">H", data, at)
        if tag in changed:
            struct.pack_into(f">{changed[tag][0]}", data, at + 8, changed[tag][1])
    return bytes(data[:400]) + pixels


def test_colours_of_16_bits_in_memory_take_no_range():
    """A PIL image or PPM has colours of 16 bits, of which Pillow keeps 8 | A range is refused, with what to give."""
    with pytest.raises(BadImage, match=r"keeps the high byte .* path or the bytes of a PNG or TIFF"):
        decode(b"P6 2 1 4095\n" + np.arange(6).astype(">u2").tobytes(), range=(0, 4095))
    with pytest.raises(BadImage, match="keeps the high byte"), Image.open(io.BytesIO(png_16(colours_16(3)))) as image:
        of_pillow(image, 3, (0, 4095))


def test_scan_tells_which_values_are_used(ct, tmp_path, capsys):
    """Images of 16 bits use a small part of their range | scan tells the values, and which range to set."""
    run("scan", ct)
    out = capsys.readouterr().out
    assert ADVICE in out
    assert "uint16 12: 0 to 40" in out
    run("scan", ct, "--out", tmp_path / "index", "--range", 0, 4095)
    out = capsys.readouterr().out
    assert "of which 0 to 4095 are shown" in out
    assert ADVICE not in out
    index = open_source(tmp_path / "index")
    assert index.range == (0, 4095)
    assert pickle.loads(pickle.dumps(index)).range == index.take([1]).range == (0, 4095)
    assert len(np.unique(index.decode(0, 1))) > 200
    assert index.content_hash() != open_source(ct).content_hash() == open_source(ct).content_hash()
    assert run("scan", ct, "--range", 4095, 0) == 2
    assert "range 4095 0: two numbers, the smaller one first" in capsys.readouterr().err


def test_floats_that_are_each_scaled_by_themselves_are_told(tmp_path, capsys):
    """Float images are each scaled by their own minimum and maximum | scan says so, and names the range of the set."""
    for i in range(3):
        Image.fromarray(smooth(i) * 100 * (i + 1)).save(tmp_path / f"{i}.tif")
    summary = troodon.scan(tmp_path)
    assert "3 images of float32: each is scaled by its own values; set --range 0 " in summary["values"]["advice"]
    for i in range(3):  # in [0, 1], all by one rule
        Image.fromarray(smooth(i)).save(tmp_path / f"{i}.tif")
    assert troodon.scan(tmp_path)["values"]["advice"] == ""


def test_embeddings_follow_the_range_and_so_does_python(ct, net, tmp_path, capsys):
    """Images of 12 bits are embedded | A line names the range to set; with it, all levels count, as in Python."""
    run("embed", "--backbone", tmp_path / "net", "--data", ct, "--out", tmp_path / "plain", "--compute", "fp32")
    assert ADVICE in capsys.readouterr().err
    run(
        "embed",
        "--backbone",
        tmp_path / "net",
        "--data",
        ct,
        "--out",
        tmp_path / "e",
        "--compute",
        "fp32",
        "--range",
        0,
        4095,
    )
    assert "--range" not in capsys.readouterr().err
    plain, vectors = np.load(tmp_path / "plain" / "embeddings.npy"), np.load(tmp_path / "e" / "embeddings.npy")
    ranged = troodon.load(tmp_path / "net", range=(0, 4095))
    cls = torch.nn.functional.normalize(ranged.features(sorted(ct.iterdir())).cls).numpy()
    np.testing.assert_allclose(vectors, cls, atol=2e-3)
    assert np.abs(vectors - plain).max() > 0.01
    assert ranged.fingerprint != net.fingerprint
    assert open_source(tmp_path / "e").range == (0, 4095)
    assert capsys.readouterr().err == ""
    net.features(sorted(ct.iterdir()))
    assert ADVICE in capsys.readouterr().err
    net.features([np.asarray(Image.open(path)) for path in sorted(ct.iterdir())])
    assert ADVICE in capsys.readouterr().err


def test_a_trained_backbone_keeps_the_range(ct, tmp_path, capsys):
    """A network is trained with a range | Its backbone records it, and reads all images by it."""
    settings = {"steps": 1, "range": [0, 4095]}
    troodon.pretrain(TINY, ct, tmp_path / "run", settings=settings)
    assert "--range" not in capsys.readouterr().err
    backbone = troodon.load(tmp_path / "run")
    assert backbone.preprocessing.range == (0, 4095)
    assert len(np.unique(backbone._pixels(ct / "00.png"))) > 200
    backbone.save(tmp_path / "copy")
    assert Backbone.load(tmp_path / "copy").preprocessing.range == (0, 4095)
    troodon.scan(ct, tmp_path / "index", range=(0, 4095))
    troodon.pretrain(TINY, tmp_path / "index", tmp_path / "second", settings={"steps": 1})
    assert troodon.load(tmp_path / "second").preprocessing.range == (0, 4095)
    troodon.pretrain(TINY, ct, tmp_path / "third", settings={"steps": 1})
    assert ADVICE in capsys.readouterr().err
    assert "range" not in json.loads((tmp_path / "third" / "backbone" / "backbone.json").read_text())["preprocessing"]


def test_ranges_that_differ_are_refused(ct, net, tmp_path):
    """Two sets, or two backbones, have different ranges | One line asks for one range."""
    for name, top in (("a", 4095), ("b", 1000)):
        troodon.scan(ct, tmp_path / name, range=(0, top))
    with pytest.raises(UsageError, match="the sets have different ranges"):
        open_source(tmp_path / "a", tmp_path / "b")
    backbones = [troodon.load(tmp_path / "net", range=(0, top)) for top in (4095, 1000)]
    with pytest.raises(UsageError, match="the backbones have different ranges"):
        troodon.evaluate("quick", backbones, ct, tmp_path / "scores")


def test_a_pack_keeps_the_range(ct, tmp_path):
    """Images with a range are packed, as they are or resized | The range goes with them."""
    troodon.scan(ct, tmp_path / "index", range=(0, 4095))
    wanted = open_source(tmp_path / "index").decode(3)
    for name, settings in (("same", {}), ("png", {"encode": "png"})):
        troodon.pack(tmp_path / "index", tmp_path / name, settings=settings)
        assert np.array_equal(open_source(tmp_path / name).decode(3), wanted)


def test_a_python_dataset_gives_the_same_values_as_files(ct):
    """A Python dataset has PIL images of 16 bits | They are converted as the same files, by the same range."""
    pictures = [Image.open(path) for path in sorted(ct.iterdir())]
    for range in (None, (0, 4095)):
        ours, files = (open_source(place).with_range(range) for place in (pictures, ct))
        assert np.array_equal(ours.decode(5), files.decode(5))
    assert "use 16 of 256 levels" in look_at(open_source(pictures))


def test_a_vit_takes_a_batch(net):
    """A batch of images is given to Backbone.vit, as to other networks | It returns the class tokens."""
    images = torch.randn(2, 3, 56, 56)
    assert torch.equal(net.vit(images), net.vit([images])[0].cls_BD)
    with pytest.raises(UsageError, match=r"vit\(\[images\]\)"):
        net.vit.after_blocks(images, [0])
