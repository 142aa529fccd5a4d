"""Shards: the same bytes at other locations, verified after writing; resized images that keep their format."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from troodon import cli, launch, pack, run
from troodon.config import UsageError
from troodon.images import pack as module
from troodon.images.decode import decode, read_header
from troodon.images.sources import open_source


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB", format: str = "JPEG", **more) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[:, :, :3])).convert(mode).save(out, format, **more)
    return out.getvalue()


@pytest.fixture
def photos(tmp_path) -> Path:
    files = {
        "train/1/a.jpg": picture(0),
        "train/1/a.png": picture(1, format="PNG"),  # the same sample, if only the name is asked
        "train/2/b.c.jpeg": picture(2, (90, 60)),
        "val/2/misnamed.png": picture(3),
        "val/1/broken.jpg": b"no picture",
        "val/1/grey.png": picture(4, (64, 80), "L", "PNG"),
    }
    for name, data in files.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(data)
    return tmp_path / "photos"


def test_packed_bytes_are_the_same_in_the_same_order(photos, tmp_path):
    summary = pack(photos, tmp_path / "out", threads=2)
    before, after = open_source(photos), open_source(tmp_path / "out")
    assert summary["images"] == len(before) == 6
    for column in ("path", "label", "split", "length"):
        assert after.column(column) == before.column(column)
    assert [after.read(row) for row in range(6)] == [before.read(row) for row in range(6)]
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.tar")) == summary["bytes"]


def test_other_readers_see_samples_with_their_classes(photos, tmp_path):
    pack(photos, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        names = [m.name for m in tar if m.isfile()]
        classes = {n: tar.extractfile(n).read() for n in names if n.endswith(".cls")}
    assert names == [
        "photos/train/1/a.jpg", "photos/train/1/a.cls", "photos/train/1/a_1.png", "photos/train/1/a_1.cls",
        "photos/train/2/b_c.jpg", "photos/train/2/b_c.cls", "photos/val/1/broken.jpg", "photos/val/1/broken.cls",
        "photos/val/1/grey.png", "photos/val/1/grey.cls", "photos/val/2/misnamed.jpg", "photos/val/2/misnamed.cls",
    ]  # fmt: skip
    assert classes["photos/train/2/b_c.cls"] == b"2"
    plain = tmp_path / "alone.tar"  # and ours, without the index
    (tmp_path / "out" / "00000.tar").rename(plain)
    index = open_source(plain)
    assert index.column("label") == ["1", "1", "2", "1", "1", "2"]
    assert index.column("split") == ["train"] * 3 + ["val"] * 3


def test_many_shards_are_one_index(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_plan", lambda *_: 2)
    assert pack(photos, tmp_path / "out")["shards"] == 3
    monkeypatch.undo()
    pack(photos, tmp_path / "one")
    many, one = open_source(tmp_path / "out"), open_source(tmp_path / "one")
    assert [Path(c).name for c in many.column("container")] == [f"{i:05}.tar" for i in (0, 0, 1, 1, 2, 2)]
    assert [many.read(r) for r in range(6)] == [one.read(r) for r in range(6)]


def test_the_size_of_a_shard_is_approximately_as_configured(tmp_path):
    (tmp_path / "x").mkdir()
    for number in range(60):
        (tmp_path / "x" / f"{number}.png").write_bytes(picture(number, (200, 200), format="PNG"))
    summary = pack(tmp_path / "x", tmp_path / "out", settings={"shard_mb": 1})
    sizes = [file.stat().st_size for file in sorted((tmp_path / "out").glob("*.tar"))]
    assert summary["shards"] == len(sizes) == 8
    assert all(0.9e6 < size < 1.1e6 for size in sizes[:-1])


def test_resized_images_keep_their_format(photos, tmp_path):
    np.save(photos / "train/2/five.npy", np.random.default_rng(0).integers(0, 256, (50, 70, 5), dtype=np.uint8))
    summary = pack(photos, tmp_path / "out", settings={"side": 32})
    assert (summary["images"], summary["left_out"]) == (6, 1)
    skipped = json.loads((tmp_path / "out" / "left_out.json").read_text())
    assert [(e["path"], e["status"]) for e in skipped] == [("photos/val/1/broken.jpg", "not an image")]
    index = open_source(tmp_path / "out")
    packed = {
        index.path(r).removeprefix("photos/"): (index.read(r), read_header(index.read(r))) for r in range(len(index))
    }
    assert packed["train/1/a.jpg"][0] == (photos / "train/1/a.jpg").read_bytes()  # its shorter side is 30
    large, grey, five = (packed[n][1] for n in ("train/2/b.c.jpeg", "val/1/grey.png", "train/2/five.npy"))
    assert (large.format, large.width, large.height) == ("JPEG", 48, 32)
    assert (grey.format, grey.mode, grey.width, grey.height) == ("PNG", "L", 32, 40)
    assert (five.format, five.channels, five.width, five.height) == ("NPY", 5, 45, 32)


def test_resized_images_look_the_same(tmp_path):
    y, x = np.mgrid[0:600, 0:800] / 100
    smooth = (np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2) * 120 + 128).astype(np.uint8)
    (tmp_path / "x").mkdir()
    Image.fromarray(smooth).save(tmp_path / "x" / "1.jpg", quality=95)
    pack(tmp_path / "x", tmp_path / "out", settings={"side": 60})
    small = decode(open_source(tmp_path / "out").read(0))
    expected = np.asarray(Image.fromarray(smooth).resize((80, 60), Image.Resampling.BICUBIC), np.float64)
    assert small.shape == (60, 80, 3)
    assert np.abs(small - expected).mean() < 2


def test_all_images_can_be_encoded_in_one_format(photos, tmp_path):
    pack(photos, tmp_path / "out", settings={"encode": "webp", "quality": 50})
    index = open_source(tmp_path / "out")
    assert {read_header(index.read(r)).format for r in range(len(index))} == {"WEBP"}
    assert read_header(index.read(0)).width == 40


def test_a_killed_run_resumes_with_the_next_shard(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_plan", lambda *_: 2)
    write, written = module._write_shard, []

    def stopping(index, items, folder, container, progress):
        if container == "00001.tar":
            raise KeyboardInterrupt
        write(index, items, folder, container, progress)

    monkeypatch.setattr(module, "_write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack(photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "_write_shard", lambda *a: written.append(a[3]) or write(*a))
    pack(photos, tmp_path / "out")
    assert written == ["00001.tar", "00002.tar"]
    pack(photos, tmp_path / "out")
    assert written == ["00001.tar", "00002.tar"]
    assert not (tmp_path / "out.parts").exists()
    with pytest.raises(UsageError, match="side: 0 -> 20"):
        pack(photos, tmp_path / "out", settings={"side": 20})


def test_a_shard_that_was_written_wrongly_does_not_count(photos, tmp_path, monkeypatch):
    add = module._add
    monkeypatch.setattr(module, "_add", lambda tar, file, name, data: add(tar, file, name, bytes(len(data))))
    with pytest.raises(OSError, match="was not written correctly"):
        pack(photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_reported_before_anything_is_written(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UsageError, match="the disk has"):
        pack(photos, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_python_datasets_are_packed(tmp_path):
    class Pictures:
        classes, targets = ("cat", "dog"), (1, 0, 1)

        def __len__(self):
            return 3

        def __getitem__(self, row):
            return Image.fromarray(np.full((8, 9, 3), (10, 100, 200)[row], np.uint8)), self.targets[row]

    pack(Pictures(), tmp_path / "out", settings={"encode": "png"})
    index = open_source(tmp_path / "out")
    assert index.column("label") == ["dog", "cat", "dog"]
    assert [int(decode(index.read(r)).mean()) for r in range(3)] == [10, 100, 200]


def test_the_command_packs_a_real_dataset_that_trains_as_before(shared, tmp_path, capsys):
    source = shared("photos_cc0_224.tar")
    assert cli.run(["pack", str(source), "--out", str(tmp_path / "out"), "--side", "64"]) == launch.DONE
    out, err = capsys.readouterr()
    assert out.startswith("560 images in 1 shard")
    assert "next:" in err
    table = pq.read_table(tmp_path / "out" / "images.parquet")
    assert len(table) == 560
    assert run.read_manifest(tmp_path / "out")["kind"] == "index"
    sizes = {min(decode(open_source(tmp_path / "out").read(r)).shape[:2]) for r in range(0, 560, 70)}
    assert sizes == {64}
    for words, message in (
        (["--side", "-1"], "side -1"),
        (["--encode", "jpg"], "jpeg"),
        (["--quality", "0"], "quality 0"),
        (["--shard-mb", "0"], "shard_mb 0"),
    ):
        assert cli.run(["pack", str(source), "--out", str(tmp_path / "x"), *words]) == launch.MISTAKE
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
