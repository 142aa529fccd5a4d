"""`dedup` and `apply`: copies are found without a network, one of each stays, and acting on it loses nothing."""

import errno
import os
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.test_report import read
from troodon import apply, cli, dedup, launch, report
from troodon.config import UsageError
from troodon.curate import pipeline
from troodon.images import carry_out
from troodon.images.sources import open_source
from troodon.report import copies
from troodon.run import read_manifest
from troodon.views.attacks import attack


def picture(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Discs and blocks on a soft ground: enough points to match, and unlike any other seed's."""
    random = np.random.default_rng(seed)
    low = Image.fromarray(random.integers(60, 200, (4, 5, 3), dtype=np.uint8)).resize((width, height), 3)
    image, (y, x) = np.asarray(low).copy(), np.mgrid[:height, :width]
    for _ in range(28):
        top, left, size = random.integers(0, height), random.integers(0, width), random.integers(5, 16)
        round_ = (y - top) ** 2 + (x - left) ** 2 < size**2
        square = (abs(y - top) < size * 0.8) & (abs(x - left) < size)
        image[round_ if random.random() < 0.5 else square] = random.integers(0, 255, 3)
    return image


COPIES = {"second/0-saved.jpg", "second/1.png", "second/2-small.png"}  # of 0, 1 and 2
KEPT = {f"first/{seed}.png" for seed in range(6)} | {"second/dark.png", "second/grey.png"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures, three copies of them, a dark picture, a grey one and a broken file, in two folders."""
    folder = tmp_path / "photos"
    for name in ("first", "second"):
        (folder / name).mkdir(parents=True)
    for seed in range(6):
        Image.fromarray(picture(seed)).save(folder / "first" / f"{seed}.png")
    Image.fromarray(picture(0)).save(folder / "second" / "0-saved.jpg", quality=80)
    shutil.copy(folder / "first" / "1.png", folder / "second")
    Image.fromarray(attack(picture(2), "shrink", np.random.default_rng(0), 0.5)).save(folder / "second" / "2-small.png")
    Image.fromarray(picture(7) // 20).save(folder / "second" / "dark.png")
    Image.fromarray(picture(8)).convert("L").save(folder / "second" / "grey.png")
    (folder / "second" / "broken.png").write_bytes(b"\x89PNG but not for long")
    return folder


def kept(selection: Path) -> set[str]:
    table = pq.read_table(selection / "images.parquet")
    return {path.partition("/")[2] for path, keep in zip(*(table[n].to_pylist() for n in ("path", "kept"))) if keep}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_one_of_each_picture_stays_and_every_list_says_so(photos, tmp_path, capsys):
    before = snapshot(photos)
    out = dedup(photos, tmp_path / "unique")
    assert kept(out) == KEPT
    assert snapshot(photos) == before
    rows = csv.read_csv(out / "selection.csv").to_pylist()
    assert {row["path"]: row["kept"] for row in rows} == {
        f"photos/{name}": name in KEPT for name in KEPT | COPIES | {"second/broken.png"}
    }
    causes = {row["path"]: row["cause"] for row in rows if row["cause"]}
    assert causes == {
        "photos/second/0-saved.jpg": "photos/first/0.png",
        "photos/second/1.png": "photos/first/1.png",
        "photos/second/2-small.png": "photos/first/2.png",
    }
    assert {row["path"] for row in rows if "brightness" in row["marks"]} == {"photos/second/dark.png"}
    for name, expected in (("kept.txt", KEPT), ("left_out.txt", COPIES)):
        assert set((out / name).read_text().splitlines()) == {str(photos / place) for place in expected}
    assert len(open_source(out)) == len(open_source(out / "kept.txt")) == len(KEPT)


def test_labels_stay_and_mixed_channels_are_compared(tmp_path):
    for split, label in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        folder = tmp_path / "data" / split / label
        folder.mkdir(parents=True)
        for seed in range(2):
            np.save(folder / f"{seed}.npy", np.dstack([picture(seed + 10 * ord(label)), picture(seed + 9)[..., :2]]))
    for name in ("train/a/grey.png", "val/b/grey.png"):
        Image.fromarray(picture(5)).convert("L").save(tmp_path / "data" / name)
    out = dedup(tmp_path / "data", tmp_path / "unique")
    table = pq.read_table(out / "images.parquet")
    assert set(table["label"].to_pylist()) == {"a", "b"}
    assert "decode" not in table["stage"].to_pylist()
    assert sum(table["kept"].to_pylist()) == 5


def test_the_same_command_does_nothing_and_another_is_refused(photos, tmp_path, capsys):
    words = ["dedup", str(photos), "--out", str(tmp_path / "unique")]
    assert cli.run(words) == launch.DONE
    first = capsys.readouterr().out
    assert "3 pictures more than once; 3 images left out" in first
    assert "1 brightness<0.06" in first
    before = snapshot(tmp_path / "unique")
    assert cli.run(words) == launch.DONE
    assert capsys.readouterr().out == first
    assert snapshot(tmp_path / "unique") == before
    assert cli.run([*words, "--candidates", "3"]) == launch.MISTAKE
    assert "candidates: 10 -> 3" in capsys.readouterr().err


def test_a_killed_command_goes_on(photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "gather", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dedup(photos, tmp_path / "unique")
    assert not (tmp_path / "unique").exists()
    done = snapshot(tmp_path / "unique.work" / "embeddings")
    out = dedup(photos, tmp_path / "unique")
    assert kept(out) == KEPT
    assert snapshot(out / "embeddings").items() >= done.items()


def test_preferred_folders_come_first_for_equal_and_for_edited_files(photos, tmp_path):
    out = dedup(photos, tmp_path / "unique", settings={"prefer": [str(photos / "second")]})
    assert kept(out) == (KEPT | COPIES) - {f"first/{seed}.png" for seed in range(3)}


def test_what_is_like_a_benchmark_is_left_out_and_the_benchmark_stays(photos, tmp_path):
    (tmp_path / "test").mkdir()
    Image.fromarray(picture(4)).save(tmp_path / "test" / "four.jpg", quality=70)
    Image.fromarray(picture(50)).save(tmp_path / "test" / "other.png")
    out = dedup(photos, tmp_path / "unique", benchmark=tmp_path / "test")
    assert kept(out) == KEPT - {"first/4.png"}
    apply(out, "move", tmp_path / "gone")
    assert names(tmp_path / "gone" / "photos") == COPIES | {"first/4.png"}
    assert names(tmp_path / "test") == {"four.jpg", "other.png"}
    page = read(report(out, tmp_path / "page.html"))
    assert "1 image of it in all" in page.text
    assert "of the benchmark" in page.text


def test_left_out_images_move_and_come_back(photos, tmp_path, capsys):
    before, target = snapshot(photos), tmp_path / "gone"
    words = ["dedup", str(photos), "--out", str(tmp_path / "unique"), "--apply", "move", str(target)]
    assert cli.run(words) == launch.DONE
    printed = capsys.readouterr()
    assert "moved 3 left-out images" in printed.out
    assert "1 image that cannot be read stays" in printed.out
    assert names(target / "photos") == COPIES
    assert names(photos) == KEPT | {"second/broken.png"}
    assert cli.run(words) == launch.DONE  # the images are gone from the data, and yet it is the same selection
    assert len(open_source(tmp_path / "unique")) == len(KEPT)
    page = read(report(tmp_path / "unique", tmp_path / "page.html"))
    assert not [span for span in page.of("span") if span.get("class") == "missing" and "broken" not in span["title"]]
    with pytest.raises(UsageError, match="undo that first"):
        apply(tmp_path / "unique", "move", tmp_path / "elsewhere")
    command = re.search(r"undo: troodon (.*)", printed.out)
    assert command
    assert cli.run(shlex.split(command[1])) == launch.DONE
    assert snapshot(photos) == before
    assert not target.exists()
    with pytest.raises(UsageError, match="nothing of it was moved"):
        apply(tmp_path / "unique", "undo")


@pytest.mark.parametrize("linked", [True, False])
def test_a_killed_move_goes_on_and_can_be_undone(photos, tmp_path, monkeypatch, linked):
    before, out, target = snapshot(photos), dedup(photos, tmp_path / "unique"), tmp_path / "gone"
    if not linked:  # as between two disks

        def other_disk(*_: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", other_disk)
    for action in ("move", "undo"):
        unlink, calls = os.unlink, []

        def killed(path: str, unlink=unlink, calls=calls) -> None:
            calls.append(path)
            if len(calls) == 2:  # the second file is in both places
                raise KeyboardInterrupt
            unlink(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                apply(out, "move", target)
        assert len(names(photos) | {name.removeprefix("photos/") for name in names(target)}) == len(before)
        apply(out, action, target if action == "move" else None)
        if action == "move":
            assert names(target / "photos") == COPIES
            assert names(photos) == KEPT | {"second/broken.png"}
            apply(out, "undo")
        assert snapshot(photos) == before
        assert not target.exists()


def test_a_moved_image_that_has_changed_comes_back_and_is_said(photos, tmp_path):
    out = dedup(photos, tmp_path / "unique")
    apply(out, "move", tmp_path / "gone")
    moved = tmp_path / "gone" / "photos" / "second" / "1.png"
    moved.write_bytes(moved.read_bytes() + b"edited")
    assert apply(out, "undo").endswith("; 1 of them has changed since")
    assert (photos / "second" / "1.png").read_bytes().endswith(b"edited")


def test_nothing_moves_unless_all_can(photos, tmp_path):
    out = dedup(photos, tmp_path / "unique")

    def refused(target: Path, match: str) -> None:
        before = snapshot(tmp_path)
        with pytest.raises(UsageError, match=match):
            apply(out, "move", target)
        assert snapshot(tmp_path) == before

    refused(photos / "gone", "lies in .*photos, where it would be found")
    there = tmp_path / "there" / "photos" / "second" / "1.png"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"mine")
    refused(tmp_path / "there", "1.png: is there, and is not overwritten")
    refused(there, "1.png: is a file; choose another folder")
    os.utime(photos / "first" / "3.png")
    refused(tmp_path / "gone", "3.png: has changed since the selection was made")
    (photos / "first" / "3.png").unlink()
    refused(tmp_path / "gone", "3.png: is gone since the selection was made")


def test_images_inside_a_tar_stay_there(photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, "photos")
    out = dedup(tmp_path / "photos.tar", tmp_path / "unique")
    assert kept(out) == {f"photos/{name}" for name in KEPT}
    assert f"{tmp_path}/photos.tar/photos/first/0.png" in (out / "kept.txt").read_text().splitlines()
    for action, what in (("move", "3 of 3 images to be moved"), ("links", "8 of 8 images to be linked")):
        with pytest.raises(UsageError, match=rf"{what} are no files of their own .*inside .*photos.tar.*troodon pack"):
            apply(out, action, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("link", "file", "match"), [("first", "second", "first/1[.]png is a link to it"), ("second", "first", "is a link;")]
)
def test_a_file_behind_a_kept_link_does_not_move(photos, tmp_path, link, file, match):
    (photos / link / "1.png").unlink()
    (photos / link / "1.png").symlink_to(photos / file / "1.png")
    out = dedup(photos, tmp_path / "unique")
    with pytest.raises(UsageError, match=match):
        apply(out, "move", tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_kept_images_are_linked_and_listed(photos, tmp_path, capsys):
    out = dedup(photos, tmp_path / "unique")
    for _ in range(2):
        apply(out, "links", tmp_path / "links")
        assert names(tmp_path / "links" / "photos") == KEPT
    assert len(open_source(tmp_path / "links")) == len(KEPT)
    assert all(path.resolve().is_relative_to(photos) for path in (tmp_path / "links").rglob("*.png"))
    (tmp_path / "links" / "mine.txt").touch()
    with pytest.raises(UsageError, match="is not empty"):
        apply(out, "links", tmp_path / "links")
    for _ in range(2):
        apply(out, "list", tmp_path / "list.txt")
        assert (tmp_path / "list.txt").read_bytes() == (out / "kept.txt").read_bytes()
    (tmp_path / "list.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there; choose a new file"):
        apply(out, "list", tmp_path / "list.txt")
    capsys.readouterr()
    assert cli.run(["dedup", str(photos), "--out", str(out), "--apply", "list", "-"]) == launch.DONE
    assert capsys.readouterr().out == (out / "kept.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--apply", "mvoe", "gone"], "mvoe"),
        (["--apply", "move"], "move: say where to, as in move FOLDER"),
        (["--apply", "move", "a", "b"], "one action and where to"),
        (["--apply", "undo", "gone"], "undo gone: it takes nothing else"),
        (["--benchmark", "missing"], "missing"),
        (["--benchmark", "photos/second", "--steps", "exact"], "the step benchmark"),
        (["--backbone", "missing"], "missing"),
        (["--copies", "missing.pt"], "missing.pt"),
        (["--prefer", "frist"], "frist"),
        (["--keep-by", "sharpnes"], "did you mean 'sharpness'"),
        (["--keep-by", "side", "--verify", "none"], "a closer look chooses by them"),
        (["--marks", "sharpnes<1"], "did you mean 'sharpness'"),
        (["--workers", "-1"], "workers -1"),
        (["--backend", "locl"], "local"),
        (["--threads", "-1"], "threads"),
        (["--range", "9", "2"], "range"),
        (["--gather", "sample"], "gather sample"),
        (["--tokens", "cls+mean"], "tokens cls+mean"),
        (["--steps", "exat"], "exat"),
        (["--candidates", "0"], "candidates"),
        (["--jsn"], "jsn"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_option_is_named_before_any_work(photos, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["dedup", "photos", "--out", "unique", *options]) == launch.MISTAKE
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"photos"}


def test_apply_needs_a_selection(photos, tmp_path, capsys):
    for folder, words in ((tmp_path, "no finished selection"), (tmp_path / "missing", "no finished selection")):
        assert cli.run(["apply", str(folder), "move", str(tmp_path / "gone")]) == launch.MISTAKE
        assert words in capsys.readouterr().err
    cli.run(["scan", str(photos), "--out", str(tmp_path / "index")])
    assert cli.run(["apply", str(tmp_path / "index"), "undo"]) == launch.MISTAKE
    assert "is an index, not a selection" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["my unique", "photos/my unique"])
def test_the_commands_it_suggests_run(photos, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["dedup", "photos", "--out", out]) == launch.DONE
    commands = re.findall(r"^  troodon (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert [shlex.split(command)[0] for command in commands] == ["report", "apply", "pretrain"]
    for command in commands[:2]:
        assert cli.run(shlex.split(command)) == launch.DONE
    assert cli.run([*shlex.split(commands[2]), "--dry-run"]) == launch.DONE
    assert names(tmp_path / "my unique-left-out" / "photos") == COPIES


def test_every_group_is_on_a_page(photos, tmp_path, monkeypatch):
    out = dedup(photos, tmp_path / "unique")
    whole = read(report(out, tmp_path / "page.html"))
    assert "3 groups in all: all are here" in whole.text
    alts = [image["alt"] for image in whole.of("img")]
    for name in COPIES:
        assert alts.count(f"photos/{name}") == 1
    assert alts.index("photos/first/2.png") < alts.index("photos/second/2-small.png")
    assert alts.index("photos/first/1.png") > alts.index("photos/second/0-saved.jpg")  # equal files come last
    assert "Marked images" in whole.text
    monkeypatch.setattr(copies, "FIRST_PICTURES", 2)
    monkeypatch.setattr(copies, "PICTURES", 2)
    pages = [read(report(out, tmp_path / "page.html"))]
    pages += [read(path) for path in sorted(tmp_path.glob("page_groups_*.html"))]
    assert len(pages) == 3
    assert "the first 1 are here, further ones on 2 pages" in pages[0].text
    shown = [image["alt"] for page in pages for image in page.of("img")]
    assert all(shown.count(f"photos/{name}") == 1 for name in COPIES)
    for page in pages:
        links = {link["href"] for link in page.of("a")} - {"#content"}
        assert all(link[0] == "#" or (tmp_path / link).exists() for link in links)
    monkeypatch.setattr(copies, "FIRST_PICTURES", 60)
    (tmp_path / "page_groups_009.html").write_text("mine")
    report(out, tmp_path / "page.html")
    assert [path.name for path in tmp_path.glob("page_groups_*.html")] == ["page_groups_009.html"]


def test_a_group_beside_which_there_is_no_room_is_counted(photos, tmp_path, monkeypatch):
    out = dedup(photos, tmp_path / "unique")
    monkeypatch.setattr(copies, "FIRST_PICTURES", 2)
    monkeypatch.setattr(copies, "MAX_PARTS", 0)
    page = read(report(out, tmp_path / "page.html"))
    assert "the first 1 are here; the others, from 2 on, are in selection.csv" in page.text


def test_a_disk_without_room_is_named_first(photos, tmp_path, monkeypatch):
    out = dedup(photos, tmp_path / "unique")
    monkeypatch.setattr(carry_out, "_device", lambda path: str(path).startswith(str(photos)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 5, 4))
    with pytest.raises(UsageError, match=r"gone: has 4 bytes left, and .* would be moved there"):
        apply(out, "move", tmp_path / "gone")
    assert read_manifest(out)
    assert not (out / carry_out.MOVES).exists()
