"""Copies are verified by a closer look, look-alikes stay, and the original of a group is kept."""

import csv
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from troodon import run
from troodon.config import UsageError
from troodon.copies import compare, keeper, local_features, verify, votes
from troodon.copies.local_features import SavedFeatures, save_features
from troodon.curate import closer_look, copies, pipeline
from troodon.curate.backends import ProcessPool
from troodon.curate.config import CurateConfig
from troodon.curate.encoder import PixelBackbone
from troodon.curate.groups import Matches, resolve
from troodon.images.index import Index
from troodon.images.sources import open_source
from troodon.report.copies import doubtful_figure
from troodon.world.offtopic import render_offtopic

CONFIG = CurateConfig(gather="all", steps=("exact", "duplicate"), threads=2, batch=16)


def scene(seed: int, width: int = 300, height: int = 220) -> Image.Image:
    """A picture with a sky, a ground and things in it; no two seeds show the same."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(45):
        x, y = random.integers(0, width), random.integers(0, height)
        w, h = random.integers(8, 60, 2)
        colour = tuple(random.integers(0, 256, 3).tolist())
        (draw.rectangle if random.random() < 0.5 else draw.ellipse)(
            (x - w // 2, y - h // 2, x + w // 2, y + h // 2), colour
        )
    return image


def crop(image: Image.Image, left: float, top: float, share: float) -> Image.Image:
    w, h = image.size
    return image.crop((int(w * left), int(h * top), int(w * (left + share)), int(h * (top + share))))


def inset(image: Image.Image) -> Image.Image:
    ground = scene(999).filter(ImageFilter.GaussianBlur(1))
    ground.paste(image.resize((180, 132)), (50, 40))
    return ground


def written(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).text((20, 150), "SALE 50 %", "white", font_size=48, stroke_width=2, stroke_fill="black")
    return image


EDITS = {
    "crop": lambda im: crop(im, 0.1, 0.15, 0.7),
    "flip": ImageOps.mirror,
    "turn": lambda im: im.transpose(Image.Transpose.ROTATE_90),
    "tilt": lambda im: im.rotate(6),
    "pad": lambda im: ImageOps.expand(im, 40, "black"),
    "inset": inset,
    "text": written,
    "grey": lambda im: im.convert("L").convert("RGB"),
    "bright": lambda im: im.point([min(255, int(v * 1.4)) for v in range(256)] * 3),
    "small": lambda im: im.resize((90, 66)),
    "wide": lambda im: im.resize((360, 220)),
    "blur": lambda im: im.filter(ImageFilter.GaussianBlur(2)),
}


def features(image: Image.Image) -> local_features.LocalFeatures:
    return local_features.local_features(np.asarray(image))


# Two images


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_copy_is_verified_and_located(edit):
    original = scene(1)
    match = verify.verify(features(EDITS[edit](original)), features(original), 4 if edit == "flip" else 0)
    assert match is not None
    assert match.agreement > 0.7
    middle = match.map_33 @ [0.5, 0.5, 1]
    expected = {"crop": (0.45, 0.5), "inset": ((150 - 50) / 180, (110 - 40) / 132)}.get(edit, (0.5, 0.5))
    assert middle[:2] == pytest.approx(expected, abs=0.03)


def grainy(seed: int) -> Image.Image:
    """A small picture whose finest detail is most of its detail."""
    picture = np.asarray(scene(seed, 64, 48), np.float32)
    grain = np.random.default_rng(seed).normal(0, 40, picture.shape)
    return Image.fromarray(np.clip(picture + grain, 0, 255).astype(np.uint8))


def test_small_pictures_without_their_finest_detail_are_copies():
    pictures = [grainy(seed) for seed in range(2)]
    blurred = [features(picture.filter(ImageFilter.GaussianBlur(1.2))) for picture in pictures]
    found = [[verify.verify(features(a), b) is not None for b in blurred] for a in pictures]
    assert found == np.eye(2, dtype=bool).tolist()


def test_other_pictures_are_not_copies():
    pictures = [features(scene(seed)) for seed in range(12)]
    pairs = [(i, j, o) for i in range(12) for j in range(i) for o in (0, 4)]
    assert not [pair for pair in pairs if verify.verify(pictures[pair[0]], pictures[pair[1]], pair[2])]


def test_things_of_one_shape_on_white_are_not_copies(shared):
    index = open_source(shared("cls_caltech20_112.tar") / "images")
    row_of = {"/".join(Path(path).parts[-2:]): row for row, path in enumerate(index.column("path"))}

    def is_copy(kind: str, one: int, other: int) -> bool:
        rows = [row_of[f"{kind}/image_{number:04d}.jpg"] for number in (one, other)]
        found = (local_features.local_features(index.decode(row)) for row in rows)
        return verify.verify(*found, votes.AS_IS_OR_MIRRORED) is not None

    assert not is_copy("grand_piano", 98, 64)
    assert not is_copy("Motorbikes", 53, 689)
    assert is_copy("grand_piano", 2, 7)  # another light on the same picture


def test_a_shared_logo_or_ground_makes_no_copy():
    grounds = []
    for seed in (1, 2):
        image = scene(seed)
        image.paste(scene(50, 120, 90), (10, 10))  # the same thing in both
        grounds.append(features(image))
    assert verify.verify(*grounds) is None
    objects = []
    for seed in (3, 4):
        image = scene(60)
        image.paste(scene(seed, 190, 150), (60, 35))  # other things on the same ground
        objects.append(features(image))
    assert verify.verify(*objects) is None


def test_charts_and_gradients_of_different_content_are_no_copies():
    """Charts share axes and a ground, gradients everything but their levels; of 100 pairs some are near enough."""
    drawn: dict[str, list] = {"pie": [], "bars": [], "lines": [], "gradient": []}
    for number in range(120):
        picture, kind = render_offtopic(0, number)
        if kind in drawn and len(drawn[kind]) < 10:
            drawn[kind].append(features(Image.fromarray(picture)))
    pairs = [(a, b) for of_kind in drawn.values() for n, a in enumerate(of_kind) for b in of_kind[:n]]
    assert len(pairs) > 100
    joined = [pair for pair in pairs if verify.verify(*pair) is not None]
    assert len(joined) <= 0.02 * len(pairs)


def test_a_covered_copy_of_a_small_picture_on_white_is_a_copy():
    def on_white(seed: int, sticker: bool) -> local_features.LocalFeatures:
        image = Image.new("RGB", (64, 64), "white")
        image.paste(scene(seed).resize((40, 64)), (0, 0))
        if sticker:
            image.paste(scene(seed + 100, 24, 24), (20, 20))
        return features(image)

    pairs = [[verify.verify(on_white(a, False), on_white(b, True)) is not None for b in range(5)] for a in range(5)]
    assert pairs == np.eye(5, dtype=bool).tolist()


def covered_mostly(image: Image.Image, seed: int = 77) -> Image.Image:
    """Another picture lies over five eighths of it."""
    image, top = image.copy(), image.height * 3 // 8
    image.paste(scene(seed, image.width, image.height - top), (0, top))
    return image


def test_a_pair_that_agrees_in_part_is_doubtful():
    pictures = [scene(seed, 64, 64) for seed in range(4)]
    lower = [features(covered_mostly(picture)) for picture in pictures]
    looks = [[verify.look(features(a), b) for b in lower] for a in pictures]
    assert [[found is not None for found in row] for row in looks] == np.eye(4, dtype=bool).tolist()
    assert {looks[k][k].doubt for k in range(4)} == {verify.IN_PART}
    assert not [k for k in range(4) if verify.verify(features(pictures[k]), lower[k]) is not None]


def test_tables_of_one_layout_are_no_copies():
    """They share lines and most of the ground; their words match one another, but in other places."""
    tables = [
        features(Image.fromarray(p)) for p, kind in (render_offtopic(0, n) for n in range(250)) if kind == "sheet"
    ]
    pairs = [(a, b) for n, a in enumerate(tables) for b in tables[:n]]
    assert len(pairs) > 200
    assert not [pair for pair in pairs if verify.verify(*pair) is not None]


def test_frames_alike_make_no_copies():
    """Dark pictures in white frames: the edges of these have most of the structure."""
    dark = [scene(seed).point([v // 10 for v in range(256)] * 3) for seed in range(6)]
    framed = [features(ImageOps.expand(image, 40, "white")) for image in dark]
    pairs = [(a, b) for n, a in enumerate(framed) for b in framed[:n]]
    assert not [pair for pair in pairs if verify.verify(*pair) is not None]
    assert all(verify.verify(features(image), one) is not None for image, one in zip(dark, framed))


def test_a_frame_is_a_frame_only_if_the_picture_begins_at_it():
    white = Image.new("RGB", (300, 220), "white")
    ImageDraw.Draw(white).ellipse((80, 60, 220, 160), "red")
    assert max(compare.frame(features(white).thumbnail_GG)) == 0
    assert compare.frame(features(EDITS["pad"](scene(1))).thumbnail_GG) == pytest.approx(
        (40 / 380, 40 / 380, 40 / 300, 40 / 300), abs=0.02
    )


# Candidates


def saved(images: list[Image.Image], folder: Path, size: int = 7) -> SavedFeatures:
    folders = []
    for start in range(0, len(images), size):
        part = folder / f"{start:03d}"
        part.mkdir(parents=True)
        save_features([features(image) for image in images[start : start + size]], part)
        folders.append(part)
    return SavedFeatures(tuple(folders), size)


def test_images_that_share_local_features_are_candidates(tmp_path):
    originals = [scene(seed) for seed in range(10)]
    edited = [edit(originals[k % 10]) for k, edit in enumerate(EDITS.values())]
    store, count = saved([*originals, *edited], tmp_path), 10 + len(EDITS)
    tables = [votes.vote(store, np.ones(count, bool), count, table) for table in range(votes.TABLES)]
    pairs, _ = votes.most_voted(votes.add_votes(tables, 2), 3, count)
    found = set(zip(pairs.i_P.tolist(), pairs.j_P.tolist()))
    assert {(k % 10, 10 + k) for k in range(len(EDITS))} <= found
    thirds = [votes.vote(store, np.ones(count, bool), count, 0, part, 3) for part in range(3)]
    assert all(0 < len(third.i_P) < len(tables[0].i_P) for third in thirds)
    for one, other in zip(votes.add_votes(thirds, 1), tables[0]):
        np.testing.assert_array_equal(one, other)


def test_a_bucket_of_very_many_members_is_bounded_and_connected():
    starts, sizes = np.array([0, 5]), np.array([5, 1000])
    left, right = votes._paired(starts, sizes)
    assert len(left) == 10 + sum(1000 - d for d in range(1, votes.NEIGHBOURS + 1))
    assert set(range(5, 1005)) == {*left[left >= 5].tolist(), *right[right >= 5].tolist()}


def test_images_of_a_benchmark_are_not_compared_with_one_another(tmp_path):
    images = [scene(1), EDITS["small"](scene(1)), EDITS["pad"](scene(1))]
    store = saved(images, tmp_path)
    pairs = votes.Pairs.concatenate(votes.vote(store, np.ones(3, bool), 1, table) for table in range(votes.TABLES))
    assert set(zip(pairs.i_P.tolist(), pairs.j_P.tolist())) == {(0, 1), (0, 2)}


def test_hashes_find_what_is_mirrored_and_turned(tmp_path):
    images = [scene(1), EDITS["flip"](scene(1)), EDITS["turn"](scene(1)), scene(2)]
    pairs = votes.alike_hashes(saved(images, tmp_path), np.ones(4, bool), 4)
    found = {(i, j): o for i, j, o, _ in zip(*(column.tolist() for column in pairs))}
    assert found == {(0, 1): 4, (0, 2): 3, (1, 2): found[1, 2]}


# Which one is kept


def traits(image: Image.Image, **changes) -> keeper.Traits:
    x = np.asarray(image)
    picture = local_features.thumbnail(x, keeper.PICTURE)
    grey = local_features.grey(x)
    known = {"detail": closer_look.detail(grey), "sharpness": 1.0}
    return keeper.Traits(picture, *image.size, **(known | changes))


def kept(*images: Image.Image, **changes) -> tuple[int, str]:
    """The number of the kept image, and why it is better than the next."""
    found = [features(image) for image in images]
    matches = Matches(len(images))
    for i in range(len(images)):
        for j in range(i):
            for orientation in (0, 4):
                if (match := verify.verify(found[j], found[i], orientation)) is not None:
                    matches.add(j, i, match)
                    break
    order, reasons = keeper.rank(
        [traits(image, **{k: v[n] for k, v in changes.items()}) for n, image in enumerate(images)],
        matches.maps_to_one(range(len(images))),
    )
    return order[0], reasons[order[1]]


@pytest.mark.parametrize("seed", range(3))
def test_the_original_of_many_copies_is_kept(seed):
    original = scene(seed)
    copied = [edit(original) for edit in EDITS.values()]
    assert kept(*copied[:6], original, *copied[6:])[0] == 6


@pytest.mark.parametrize("edit", ["crop", "pad", "inset", "text", "grey", "small"])
@pytest.mark.parametrize("seed", range(3))
def test_the_original_of_a_pair_is_kept(edit, seed):
    original, copy = scene(seed), EDITS[edit](scene(seed))
    assert kept(original, copy)[0] == 0
    number, reason = kept(copy, original)
    assert number == 1
    assert reason == {
        "crop": "which shows more", "pad": "which has no frame", "inset": "which is not pasted into another picture",
        "text": "which is not written on", "grey": "which is not grey", "small": "which has more detail",
    }[edit]  # fmt: skip


def test_an_enlarged_picture_has_no_more_detail():
    original = scene(1).filter(ImageFilter.GaussianBlur(0.7))  # as a lens does
    enlarged = original.resize((600, 440), Image.Resampling.BICUBIC)
    assert traits(enlarged).pixels == pytest.approx(traits(original).pixels, rel=keeper.SAME_DETAIL)


def test_equal_pictures_are_told_by_how_they_were_saved():
    image = scene(1)
    assert kept(image, image, fineness=[-5000.0, -300.0]) == (1, "which was saved finer")
    assert kept(image, image, dated=[False, True]) == (1, "which has a capture date")
    assert kept(image, image, name=["beach (1).jpg", "beach.jpg"]) == (1, "which has a plain name")
    assert kept(image, image, length=[10, 20]) == (1, "which has more bytes")
    assert kept(image, image, preferred=[0, 1], length=[20, 10]) == (1, "which is preferred")
    assert kept(image, image, score=[0.1, 0.2], length=[20, 10]) == (1, "which has the better score")
    assert kept(image, image) == (0, "which comes first")


def test_every_dropped_image_matches_the_kept_one():
    """A chain of copies does not drop an image that is no copy of the one that stays."""
    matches, match = Matches(4), verify.Match(np.eye(3), 30, 0.9, (1.0, 1.0))
    for i in range(3):
        matches.add(i, i + 1, match)
    verdict = resolve(matches, lambda rows: [traits(scene(1)) for _ in rows], lambda *_: None, np.zeros(4, bool))
    assert verdict.cause_N.tolist() == [-1, 0, -1, 2]


# The whole


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """Ten scenes; all edits of the first two, some of others, one file twice."""
    folder = tmp_path_factory.mktemp("copies") / "pool"
    folder.mkdir()
    for seed in range(10):
        scene(seed).save(folder / f"{seed}.png")
    for name, edit in EDITS.items():
        for seed in (0, 1):
            edit(scene(seed)).save(folder / f"{seed}-{name}.jpg", quality=90)
    scene(2).save(folder / "2-saved.jpg", quality=60)
    (folder / "3-same.png").write_bytes((folder / "3.png").read_bytes())
    return folder


def select(folder: Path, out: Path, config: CurateConfig = CONFIG, **named) -> Path:
    index = open_source(folder).without_labels()
    return pipeline.curate(config, index.take([]), index, PixelBackbone(3), out, **named)


@pytest.fixture(scope="module")
def selection(pool, tmp_path_factory) -> Path:
    return select(pool, tmp_path_factory.mktemp("made") / "selection")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "timings.json"}


def names(folder: Path) -> set[str]:
    return {Path(r["path"]).name for r in pq.read_table(folder / "images.parquet").to_pylist() if r["kept"]}


def test_originals_stay_and_copies_go(selection):
    assert names(selection) == {f"{seed}.png" for seed in range(10)}
    ledger = pq.read_table(selection / "images.parquet").to_pylist()
    dropped = [row for row in ledger if row["stage"] == "duplicate"]
    assert len(dropped) == 2 * len(EDITS) + 1
    for row in dropped:
        assert Path(row["path"]).name[0] == Path(ledger[row["cause"]]["path"]).name[0]
        assert row["reason"].startswith(f"copy, pixels agree {row['score']:.2f}; of that one, which ")
    summary = run.read_json(selection / "summary.json")
    assert summary["search"]["verified"] >= len(dropped)
    assert summary["calibration"] is None


@pytest.mark.parametrize("at", ["look", "decide", "duplicates"])
def test_a_killed_run_continues_to_the_same_bytes(at, pool, selection, tmp_path, monkeypatch):
    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        where, name = {
            "look": (closer_look, "look"), "decide": (closer_look, "resolve"),
            "duplicates": (pipeline, "remove_leaks"),
        }[at]  # fmt: skip
        patch.setattr(where, name, kill)
        with pytest.raises(KeyboardInterrupt):
            select(pool, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(closer_look, "local_features", kill)  # is not done again
        assert contents(select(pool, tmp_path / "out")) == contents(selection)


def test_workers_change_nothing(pool, selection, tmp_path):
    workers = ProcessPool(2)
    try:
        out = select(pool, tmp_path / "out", replace(CONFIG, threads=1), backend=workers)
    finally:
        workers.close()
    assert contents(out) == contents(selection)


def test_tables_in_parts_change_nothing(pool, selection, tmp_path, monkeypatch):
    parts, vote = set(), closer_look.vote
    monkeypatch.setattr(closer_look, "IMAGES_PER_PART", 7)
    monkeypatch.setattr(closer_look, "IMAGES_PER_BLOCK", 5)
    monkeypatch.setattr(closer_look, "vote", lambda *inputs: parts.add(inputs[4:]) or vote(*inputs))
    assert contents(select(pool, tmp_path / "out")) == contents(selection)
    assert len(parts) > 3


def test_a_preferred_folder_and_a_score_decide(pool, tmp_path):
    (tmp_path / "pool" / "mine").mkdir(parents=True)
    scene(0).save(tmp_path / "pool" / "a.png")
    EDITS["small"](scene(0)).save(tmp_path / "pool" / "mine" / "b.png")
    for settings, expected in (
        ({}, "a.png"), ({"prefer": ("pool/mine",)}, "b.png"), ({"prefer": (str(tmp_path / "pool" / "mine"),)}, "b.png"),
        ({"keep_by": "side"}, "a.png"), ({"keep_by": "tests.test_closer_look:smallest"}, "b.png"),
    ):  # fmt: skip
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        select(tmp_path / "pool", out, replace(CONFIG, **settings))
        assert names(out) == {expected}


def smallest(image_HWC: np.ndarray) -> float:
    return -float(image_HWC.shape[0])


def test_edited_images_of_a_benchmark_leak_and_look_alikes_stay(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "benchmark").mkdir()
    for seed in range(6):
        scene(seed).save(tmp_path / "benchmark" / f"{seed}.png")
        scene(100 + seed).save(tmp_path / "pool" / f"other-{seed}.png")
    for k, (name, edit) in enumerate(EDITS.items()):
        edit(scene(k % 6)).save(tmp_path / "pool" / f"{name}.png")
    config = replace(CONFIG, steps=("benchmark",))
    out = select(tmp_path / "pool", tmp_path / "out", config, benchmark=open_source(tmp_path / "benchmark"))
    ledger = pq.read_table(out / "images.parquet").to_pylist()
    assert names(out) == {f"other-{seed}.png" for seed in range(6)}
    flip = next(row for row in ledger if row["path"].endswith("flip.png"))
    assert ledger[flip["cause"]]["path"] == "benchmark/1.png"
    assert flip["reason"].startswith("copy of a benchmark image, pixels agree ")


def test_what_is_perhaps_a_copy_stays_and_is_listed_and_is_a_leak(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "benchmark").mkdir()
    for seed in range(4):
        scene(seed, 64, 64).save(tmp_path / "benchmark" / f"{seed}.png")
        scene(100 + seed, 64, 64).save(tmp_path / "pool" / f"other-{seed}.png")
    scene(3, 64, 64).resize((80, 80)).save(tmp_path / "pool" / "sure.png")
    covered_mostly(scene(0, 64, 64), 78).save(tmp_path / "pool" / "covered.png")
    covered_mostly(scene(100, 64, 64)).save(tmp_path / "pool" / "of-other-0.png")
    covered_mostly(scene(100, 64, 64)).resize((56, 56)).save(tmp_path / "pool" / "smaller-of-other-0.png")  # goes
    out = select(tmp_path / "pool", tmp_path / "out", replace(CONFIG, steps=("exact", "duplicate", "benchmark")),
                 benchmark=open_source(tmp_path / "benchmark"))  # fmt: skip
    assert names(out) == {"of-other-0.png", *(f"other-{seed}.png" for seed in range(4))}
    ledger = {Path(row["path"]).name: row for row in pq.read_table(out / "images.parquet").to_pylist()}
    doubt = f"perhaps a copy of a benchmark image: {verify.IN_PART}, agreement "
    assert ledger["covered.png"]["reason"].startswith(doubt)
    assert ledger["sure.png"]["reason"].startswith("copy of a benchmark image, pixels agree ")
    assert run.read_json(out / "summary.json")["perhaps_leaks"] == 1
    paths, pairs = list(ledger), pq.read_table(out / "doubtful.parquet").to_pylist()
    assert [({paths[p["row"]], paths[p["other"]]}, p["why"]) for p in pairs] == [
        ({"other-0.png", "of-other-0.png"}, verify.IN_PART)
    ]
    page = str(doubtful_figure(Index.load(out / "images.parquet"), out))
    assert "1 pair of kept images nearly passed for copies: all are here" in page
    assert verify.IN_PART in page


def test_real_copies_are_found_and_originals_kept(shared, tmp_path):
    """Eight photographs with nine edited copies each, among forty others."""
    tar = shared("neardup_cc0_dev.tar")
    with tarfile.open(tar) as pack:
        truth = list(csv.DictReader(io.TextIOWrapper(pack.extractfile("ground_truth.csv"))))
    copied = sorted({row["cluster"] for row in truth if row["role"] == "copy"}, key=int)[:8]
    others = [row for row in truth if row["role"] == "distractor"][:40]
    chosen = {row["path"]: row for row in truth if row["cluster"] in copied} | {row["path"]: row for row in others}
    index = open_source(tar / "images")
    at = [k for k, path in enumerate(index.column("path")) if f"images/{Path(path).name}" in chosen]
    assert len(at) == 120
    pool = index.take(at).without_labels()
    out = pipeline.curate(CONFIG, pool.take([]), pool, PixelBackbone(3), tmp_path / "out")
    ledger = pq.read_table(out / "images.parquet").to_pylist()
    known = [chosen[f"images/{Path(row['path']).name}"] for row in ledger]
    dropped = [(row, mine) for row, mine in zip(ledger, known) if not row["kept"]]
    assert len(dropped) >= 0.95 * 72
    assert all(mine["cluster"] == known[row["cause"]]["cluster"] for row, mine in dropped)
    same = ("none", "same_bytes", "png_same_pixels")
    kept = {mine["cluster"] for row, mine in zip(ledger, known) if row["kept"] and mine["transform"] in same}
    assert len(kept.intersection(copied)) >= 7


def test_many_copies_of_one_picture_are_one(tmp_path):
    """More than an image is compared with at once."""
    (tmp_path / "pool").mkdir()
    for k in range(40):
        scene(0).resize((200 + 2 * k, 150 + k)).save(tmp_path / "pool" / f"{k:02d}.jpg", quality=80)
    scene(1).save(tmp_path / "pool" / "other.png")
    out = select(tmp_path / "pool", tmp_path / "out", replace(CONFIG, candidates=4))
    assert len(names(out)) == 2


def test_how_a_file_was_saved_is_read():
    fine, coarse = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif.get_ifd(closer_look.EXIF)[closer_look.CAPTURE_DATE] = "2020:01:01 10:00:00"
    scene(1).save(fine, "JPEG", quality=95, exif=exif)
    scene(1).save(coarse, "JPEG", quality=30)
    assert closer_look.saved_how(fine.getvalue())[0] > closer_look.saved_how(coarse.getvalue())[0]
    assert closer_look.saved_how(fine.getvalue())[1]
    assert not closer_look.saved_how(coarse.getvalue())[1]
    assert closer_look.saved_how(b"no") == (0.0, False)


def test_settings_of_a_benchmark_are_named_where_there_is_none(tmp_path, capsys):
    (tmp_path / "pool").mkdir()
    scene(1).save(tmp_path / "pool" / "a.png")
    steps: tuple = ("exact", "duplicate", "benchmark")
    config, warning = replace(CONFIG, steps=steps, benchmark_mode="component"), "benchmark_mode component: read with"
    select(tmp_path / "pool", tmp_path / "without", config)
    assert f"warning: {warning} --benchmark only" in capsys.readouterr().err
    select(tmp_path / "pool", tmp_path / "with", config, benchmark=open_source(tmp_path / "pool").without_labels())
    assert warning not in capsys.readouterr().err


def test_candidates_by_vectors_are_the_nearest():
    edges = [(np.array([0, 0, 0]), np.array([1, 2, 3]), np.array([0.5, 0.9, 0.7], np.float32))]
    pairs = copies.nearest_pairs(iter(edges), 1, 10)
    assert sorted({(i, j) for i, j in zip(pairs.i_P.tolist(), pairs.j_P.tolist())}) == [(0, 1), (0, 2), (0, 3)]
    assert set(pairs.orientation_P.tolist()) == {votes.AS_IS_OR_MIRRORED}


def test_settings_of_the_other_way_to_decide_are_named(tmp_path, capsys):
    small = tmp_path / "pool"
    small.mkdir()
    scene(1).save(small / "a.png")
    select(small, tmp_path / "out", replace(CONFIG, benchmark_attacks=3, benchmark_false_merges=0.1))
    warnings = capsys.readouterr().err
    assert "warning: benchmark_attacks 3: read with --verify none only" in warnings
    assert "warning: benchmark_false_merges 0.1: read with --verify none only" in warnings
    changed = replace(CONFIG, k=7, hash_radius=5, levels=(9,), clusters=3, large=2, retrieve_space="plain")
    assert [warning.partition(" ")[0] for warning in changed.unread()] == [
        "hash_radius", "k", "clusters", "large", "levels", "retrieve_space"
    ]  # fmt: skip
    assert replace(changed, steps=("hash",), gather="auto").unread() == ["levels (9,): read with --gather balance only"]
    with pytest.raises(UsageError, match="prefer, keep_by: a closer look chooses by them"):
        select(small, tmp_path / "other", replace(CONFIG, verify="none", keep_by="side"))
