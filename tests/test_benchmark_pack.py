"""A pack of images with ground truth is de-duplicated by `curate` and by pHash, and the truth decides who is right."""

import csv
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

EDITS = {
    "same_bytes": ("exact", lambda im: im),
    "hflip": ("hard", ImageOps.mirror),
    "crop_30": ("medium", lambda im: im.crop((20, 15, 270, 190))),
}
COLUMNS = ("path", "cluster", "role", "transform", "level", "source_photo")


def scene(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((300, 220))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        (x, y), (w, h) = random.integers(0, 300, 2), random.integers(4, 30, 2)
        draw.rectangle((x - w, y - h, x + w, y + h), tuple(random.integers(0, 256, 3).tolist()))
    return image


def write_pack(path: Path, with_copies: int, without: int) -> list[dict[str, str]]:
    """A pack of scenes, of which the first have copies; names tell nothing."""
    files: list[tuple[dict[str, str], Image.Image]] = []
    for cluster in range(with_copies + without):
        original = scene(cluster)
        versions = [("original" if cluster < with_copies else "distractor", "none", "none", original)]
        if cluster < with_copies:
            versions += [("copy", name, level, edit(original)) for name, (level, edit) in EDITS.items()]
        for role, transform, level, image in versions:
            suffix = "jpg" if transform in ("hflip", "crop_30") else "png"
            name = f"images/{99 - len(files) * 7 % 97:03d}.{suffix}"
            row = dict(zip(COLUMNS, (name, str(cluster), role, transform, level, f"{cluster}.png")))
            files.append((row, image))
    with tarfile.open(path, "w") as tar:
        for row, image in files:
            image.save(data := io.BytesIO(), "PNG" if row["path"].endswith("png") else "JPEG", quality=60)
            _add(tar, row["path"], data.getvalue())
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS)
        writer.writeheader()
        writer.writerows(row for row, _ in files)
        _add(tar, "ground_truth.csv", table.getvalue().encode())
    return [row for row, _ in files]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_a_pack_is_measured_without_other_data(tmp_path, run_script, monkeypatch, capsys):
    write_pack(tmp_path / "made.tar", 4, 8)
    arguments = ["curate_images.py", "--parts", "pack", "--pack", str(tmp_path / "made.tar"), "--quick"]
    monkeypatch.setattr(sys, "argv", arguments)
    run_script("curate_images.py", "__main__")
    *lines, last = capsys.readouterr().out.splitlines()
    rows = {row["name"]: row for row in json.loads(last)}
    assert list(rows) == ["copies_removed", "distinct_removed", "original_kept", "seconds", "processor_seconds"]
    assert [rows[name]["ours"] for name in list(rows)[:3]] == [100.0, 0, 100.0]
    assert rows["copies_removed"]["rival"] < 100  # its hashes know no mirror
    settings = rows["seconds"]["settings"]
    assert settings["pack"] == "made"
    assert settings["quick"]
    assert 4 < settings["images"] < 24  # a third of the clusters, and every transform
    assert "10 bits" in settings["rival"]
    assert any("phash" in line and "hflip" in line for line in lines)


def test_parts_that_need_data_ask_for_it(run_script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["curate_images.py", "--parts", "pack", "judged", "--pack", "made.tar"])
    with pytest.raises(SystemExit):
        run_script("curate_images.py", "__main__")
    assert "--data FOLDER is needed" in capsys.readouterr().err


def test_the_truth_counts_what_is_missed_lost_and_wrong(tmp_path, run_script):
    names = run_script("pack.py", "pack")
    rows = write_pack(tmp_path / "made.tar", 2, 2)
    pack = names["Pack"].open(tmp_path / "made.tar", quick=False)
    assert sorted(row["path"] for row in rows) == [row["path"] for row in pack.rows]
    at = {(row["cluster"], row["transform"]): number for number, row in enumerate(pack.rows)}
    originals = pack.original_pixels()
    assert originals == {at[c, t] for c in "01" for t in ("none", "same_bytes")}

    # The first cluster keeps the original's twin and a crop; the second a crop only; a distractor goes for the first.
    causes = {
        ("0", "none"): ("0", "same_bytes"), ("0", "hflip"): ("0", "none"), ("1", "none"): ("1", "crop_30"),
        ("1", "same_bytes"): ("1", "hflip"), ("1", "hflip"): ("0", "hflip"), ("2", "none"): ("1", "hflip"),
    }  # fmt: skip
    cause_N = np.full(len(pack.rows), -1)
    for dropped, cause in causes.items():
        cause_N[at[dropped]] = at[cause]
    decisions = names["Decisions"](cause_N < 0, cause_N, np.ones(len(cause_N)), 1.0, 1.0)
    found = names["score"](pack, decisions, originals)
    assert found.copies_removed == pytest.approx(100 * 5 / 6)
    assert found.distinct_removed == 1
    assert found.original_kept == 50.0
    assert found.instead == [at["1", "crop_30"]]
    assert found.missed == [at["0", "crop_30"]]
    assert found.wrong == sorted([at["1", "hflip"], at["1", "same_bytes"], at["2", "none"]])
    assert decisions.stands_for(at["2", "none"]) == at["0", "same_bytes"]


def test_a_quick_pack_has_every_transform(run_script):
    names = run_script("pack.py", "pack")
    rows = [{"cluster": str(c), "transform": t} for c in range(30) for t in ("none", f"edit{c % 29}")[: 1 + (c < 29)]]
    chosen = names["third_of_clusters"](rows)
    assert {rows[row]["transform"] for row in chosen} == {row["transform"] for row in rows}
    plain = [{"cluster": str(c), "transform": "none"} for c in range(300)]
    assert 70 < len(names["third_of_clusters"](plain)) < 130
