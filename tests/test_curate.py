"""Curation drops copies, keeps look-alikes of curated images, and records every image in the ledger."""

import csv
import io
import shutil
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from troodon import run
from troodon.config import UsageError
from troodon.curate import dedup, gather, pipeline, space, thresholds
from troodon.curate import embed as embedding
from troodon.curate.calibrate import calibrate
from troodon.curate.config import CurateConfig
from troodon.curate.dedup import components, find_identical, keep_order, near_duplicates
from troodon.curate.encoder import CopyEncoder
from troodon.curate.retrieve import Hits, best_hits, retrieve
from troodon.images.index import SCHEMA, Index
from troodon.images.sources import open_source
from troodon.progress import Progress
from troodon.search.exact import l2_normalise, pairs_above
from troodon.views.attacks import attack

# Random pictures have no look-alikes, so the threshold can aim at almost no false merges.
QUICK = CurateConfig(verify="none", calibration_images=40, false_merges=1e-6, threads=2, batch=16)


@dataclass(frozen=True)
class Pixels:
    """A backbone whose features are eight by eight pixels, and which counts its images."""

    name: str = "pixels"
    channels: int = 3
    fingerprint: str = "0"
    seen: list = field(default_factory=list)

    def prepare(self, images) -> Tensor:
        parts = [torch.from_numpy(np.array(i)).permute(2, 0, 1)[None].float() / 255 for i in images]
        return torch.cat([F.interpolate(p, (8, 8), mode="bilinear", antialias=True) for p in parts])

    def features(self, images: Tensor, blocks: int = 1) -> SimpleNamespace:
        self.seen.append(len(images))
        return SimpleNamespace(cls=images.flatten(1), patches=images.permute(0, 2, 3, 1))


@dataclass(frozen=True)
class HalfPrecision(Pixels):
    compute: torch.dtype = torch.bfloat16


def picture(seed: int) -> np.ndarray:
    """A smooth picture, like no other, 60 by 48."""
    low = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(low).resize((60, 48), Image.Resampling.BICUBIC))


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Index:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return open_source(folder) if files else Index(SCHEMA.empty_table())


@pytest.fixture(scope="module")
def pools(tmp_path_factory) -> tuple[Index, Index]:
    """10 curated images, 2 of them the same and 1 broken; 92 uncurated ones, with every kind of trouble."""
    random, root = np.random.default_rng(5), tmp_path_factory.mktemp("pools")
    curated = {f"c{i}.png": png(picture(i)) for i in range(8)} | {"c8.png": png(picture(7)), "c9.png": b"no image"}
    uncurated = {f"u{i:02d}.png": png(picture(100 + i)) for i in range(60)}
    uncurated |= {f"v{i:02d}.png": png(attack(picture(100 + i), "shrink", random, 0.5)) for i in range(20)}
    uncurated["w0-same-as-u00.png"] = uncurated["u00.png"]
    uncurated["w1-same-as-v00.png"] = uncurated["v00.png"]  # a duplicate of a duplicate
    uncurated["w2-same-as-c1.png"] = curated["c1.png"]
    uncurated["w3-like-c2.png"] = png(np.repeat(np.repeat(picture(2), 2, 0), 2, 1))  # larger than the curated one
    uncurated |= {"x0.png": b"", "x1.png": png(picture(1))[:600], "x2.jpg": b"<html>"}
    uncurated |= {f"y{i}.png": png((0.3 * picture(i) + 0.7 * picture(200 + i)).astype(np.uint8)) for i in range(3)}
    small = attack(picture(300), "shrink", random, 0.2)
    uncurated |= {"z0.png": png(small), "z1.jpg": png(picture(300), "JPEG")}  # fewer pixels in more bytes
    assert len(uncurated["z0.png"]) > len(uncurated["z1.jpg"])
    return write(root / "curated", curated), write(root / "uncurated", uncurated)


@pytest.fixture(scope="module")
def selection(pools, tmp_path_factory) -> Path:
    return pipeline.curate(QUICK, *pools, Pixels(), tmp_path_factory.mktemp("made") / "selection")


def rows(folder: Path) -> dict[str, dict]:
    table = pq.read_table(folder / "images.parquet").to_pylist()
    return {Path(row["path"]).name: row | {"at": at} for at, row in enumerate(table)}


def files(folder: Path) -> dict[str, bytes]:
    contents = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in contents.items() if not name.endswith("timings.json")}


# The whole


def test_the_ledger_has_a_row_for_every_image_and_balances(selection, pools):
    table, summary = pq.read_table(selection / "images.parquet"), run.read_json(selection / "summary.json")
    assert table["path"].to_pylist() == pools[0].column("path") + pools[1].column("path")
    assert table["pool"].to_pylist() == ["curated"] * len(pools[0]) + ["uncurated"] * len(pools[1])
    remaining = len(table)
    for stage in summary["stages"]:
        assert stage["in"] == remaining
        remaining = stage["out"]
        dropped = [r for r in table.to_pylist() if r["stage"] == stage["name"] and not r["kept"]]
        assert len(dropped) == stage["dropped"] == stage["in"] - stage["out"]
        assert all(r["reason"] for r in dropped)
    assert remaining == summary["kept"] == sum(table["kept"].to_pylist())
    assert [s["name"] for s in summary["stages"]] == ["decode", "exact", "duplicate", "retrieve"]
    assert summary["curated"] == {"in": 10, "kept": 9}
    assert {k for r in table.to_pylist() if not r["kept"] for k in [r["weight"]]} == {0.0}


def test_every_image_has_the_right_reason(selection):
    ledger = rows(selection)
    name_of = {row["at"]: name for name, row in ledger.items()}

    def decision(name: str) -> tuple:
        row = ledger[name]
        return row["stage"], row["kept"], name_of.get(row["cause"])

    assert decision("c0.png") == decision("c8.png") == ("curated", True, None)
    assert (
        decision("c9.png") == decision("x0.png") == decision("x1.png") == decision("x2.jpg") == ("decode", False, None)
    )
    assert ledger["x0.png"]["reason"] == "empty: 0 bytes"
    assert ledger["x1.png"]["reason"].startswith("truncated")
    assert decision("w0-same-as-u00.png") == ("exact", False, "u00.png")
    assert decision("w1-same-as-v00.png") == ("exact", False, "v00.png")
    assert decision("w2-same-as-c1.png") == ("exact", False, "c1.png")
    assert decision("w3-like-c2.png") == ("duplicate", False, "c2.png")
    for i in range(20):  # the larger one stays
        assert decision(f"v{i:02d}.png") == ("duplicate", False, f"u{i:02d}.png")
        assert ledger[f"v{i:02d}.png"]["reason"] == f"near-duplicate, cosine {ledger[f'v{i:02d}.png']['score']:.2f}"
    assert decision("z0.png") == ("duplicate", False, "z1.jpg")
    for i in range(3):  # a curated image shines through
        assert decision(f"y{i}.png") == ("retrieve", True, f"c{i}.png")
    kept = [r for r in ledger.values() if r["kept"] and r["pool"] == "uncurated"]
    assert all(r["reason"].startswith("nearest ") and name_of[r["cause"]].startswith("c") for r in kept)
    lost = [r for r in ledger.values() if r["stage"] == "retrieve" and not r["kept"]]
    assert {(r["reason"], r["cause"]) for r in lost} == {("not among the 4 nearest of any curated image", -1)}
    assert len(kept) + len(lost) == 60 + 3 + 1


def test_other_tables_agree_with_the_ledger(selection):
    ledger, hits = pq.read_table(selection / "images.parquet").to_pylist(), pq.read_table(selection / "hits.parquet")
    assert sorted(set(hits["row"].to_pylist())) == [
        i for i, r in enumerate(ledger) if r["kept"] and r["pool"] == "uncurated"
    ]
    assert sorted(hits["query"].to_pylist()) == sorted(4 * [i for i, r in enumerate(ledger) if r["stage"] == "curated"])
    groups = pq.read_table(selection / "groups.parquet").to_pylist()
    assert {g["row"]: g["group"] for g in groups if not g["kept"]} == {
        i: r["cause"] for i, r in enumerate(ledger) if r["stage"] == "duplicate"
    }
    assert all(sum(g["group"] == h["group"] for g in groups) >= 2 for h in groups)
    assert all(g["score"] == 1 for g in groups if g["row"] == g["group"])
    x, images = embedding.load_embeddings(selection / "embeddings")
    assert images["path"].to_pylist() == [r["path"] for r in ledger]
    assert x.dtype == np.float16
    assert [s == "ok" for s in images["status"].to_pylist()] == np.any(x != 0, 1).tolist()
    expected = l2_normalise(Pixels().prepare([picture(3)]).flatten(1).numpy())
    np.testing.assert_array_equal(x[3], expected[0].astype(np.float16))


def test_the_selection_opens_as_the_kept_images(selection):
    ledger = rows(selection).values()
    assert open_source(selection).column("path") == [r["path"] for r in ledger if r["kept"]]


def test_a_finished_run_does_nothing_and_another_is_refused(selection, pools):
    before, backbone = files(selection), Pixels()
    assert pipeline.curate(replace(QUICK, batch=3, threads=1), *pools, backbone, selection) == selection
    assert not backbone.seen
    with pytest.raises(UsageError, match="k: 4 -> 5"):
        pipeline.curate(replace(QUICK, k=5), *pools, backbone, selection)
    with pytest.raises(UsageError, match="weights: 0 -> 1"):
        pipeline.curate(QUICK, *pools, Pixels(fingerprint="1"), selection)
    with pytest.raises(UsageError, match="images"):
        pipeline.curate(QUICK, pools[0], pools[1].take(range(50)), backbone, selection)
    assert files(selection) == before


@pytest.mark.parametrize("at", ["second unit", "duplicates", "calibration", "hits", "end"])
def test_a_killed_run_continues_to_the_same_bytes(selection, pools, tmp_path, monkeypatch, at):
    out, backbone = tmp_path / "selection", Pixels()
    config = replace(QUICK, partition_size=48)  # a multiple of the batch: the backbone sees the same batches

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at == "second unit":
            features, calls = Pixels.features, []
            patch.setattr(Pixels, "features", lambda *a: kill() if len(calls) > 3 else calls.append(0) or features(*a))
        else:
            where, name = {
                "duplicates": (pipeline, "prepare_comparison"),
                "calibration": (thresholds, "calibrate"),
                "hits": (pipeline, "gather"),
                "end": (pipeline, "_link"),
            }[at]
            patch.setattr(where, name, kill)
        with pytest.raises(KeyboardInterrupt):
            pipeline.curate(config, *pools, backbone, out)
    assert not out.exists()
    if at == "end":
        monkeypatch.setattr(gather, "top_k", kill)  # is not done again
    before = sum(backbone.seen)
    pipeline.curate(replace(config, threads=1), *pools, backbone, out)
    readable = 9 + 89
    again = {"second unit": readable - 47 + 160, "duplicates": 160, "calibration": 160}.get(at, 0)
    assert sum(backbone.seen) - before == again  # nothing is embedded twice
    assert files(out) == files(selection)
    assert [p.name for p in tmp_path.iterdir()] == ["selection"]


def test_neither_batch_nor_threads_are_part_of_the_result(selection, pools, tmp_path):
    out = pipeline.curate(replace(QUICK, batch=7, threads=1), *pools, Pixels(), tmp_path / "selection")
    assert files(out) == files(selection)


def test_settings_reach_the_result(pools, selection, tmp_path):
    config = replace(QUICK, threshold=0.9, within_curated="drop", k=50, collisions="multiplicity", tokens="cls+mean")
    out = pipeline.curate(replace(config, min_similarity=0.05), *pools, Pixels(), tmp_path / "a")
    ledger, hits = rows(out), pq.read_table(out / "hits.parquet")
    assert run.read_json(out / "summary.json")["threshold"] == 0.9
    assert run.read_json(out / "summary.json")["calibration"] is None
    assert (ledger["c8.png"]["stage"], ledger["c8.png"]["cause"]) == ("exact", ledger["c7.png"]["at"])
    assert 0.05 <= min(hits["score"].to_pylist()) < 0.1
    times = np.bincount(hits["row"].to_numpy(), minlength=len(ledger))
    assert times.max() > 1
    for row in ledger.values():
        assert row["weight"] == (row["kept"] if row["pool"] == "curated" else times[row["at"]])
    assert any("or more" in row["reason"] for row in ledger.values())
    assert np.load(out / "embeddings" / "embeddings.npy").shape[1] == 192 + 3


# Pools with little in them


def test_pools_without_duplicates_or_survivors(tmp_path):
    one = write(tmp_path / "one", {"a.png": png(picture(0))})
    others = write(tmp_path / "others", {f"{i}.png": png(picture(50 + i)) for i in range(5)})
    copies = write(tmp_path / "copies", {"a.png": png(picture(0)), "b.png": b""})
    nothing = Index(SCHEMA.empty_table())

    out = pipeline.curate(replace(QUICK, k=100), one, others, Pixels(), tmp_path / "all")
    assert [r["kept"] for r in rows(out).values()] == [True] * 6
    assert pq.read_table(out / "groups.parquet").num_rows == 0
    assert run.read_json(out / "summary.json")["calibration"] is None  # of six images
    for name, uncurated in (("copies-only", copies), ("no-pool", nothing)):
        out = pipeline.curate(QUICK, one, uncurated, Pixels(), tmp_path / name)
        assert [r["kept"] for r in pq.read_table(out / "images.parquet").to_pylist()] == [True] + [False] * len(
            uncurated
        )
        assert pq.read_table(out / "hits.parquet").num_rows == 0
    assert len(open_source(out)) == 1


def test_curated_images_must_exist_and_be_readable(tmp_path):
    good = write(tmp_path / "good", {"a.png": png(picture(0))})
    broken = write(tmp_path / "broken", {"a.png": b"", "b.png": b"text"})
    with pytest.raises(UsageError, match="no curated images"):
        pipeline.curate(QUICK, Index(SCHEMA.empty_table()), good, Pixels(), tmp_path / "s")
    for uncurated in (good, broken):
        with pytest.raises(
            UsageError, match=r"none of the 2 curated images can be read; .*a.png, is empty \(0 bytes\)"
        ):
            pipeline.curate(QUICK, broken, uncurated, Pixels(), tmp_path / f"s{len(uncurated)}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"k": 0}, "k 0: must be 1 or more"), ({"threshold": 1.5}, "threshold 1.5"), ({"false_merges": 0}, "above 0")],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        CurateConfig(**changes)


# Near-duplicates, on vectors


def chain(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


def verdict(x, threshold=0.9, curated=(), recheck=4, rank=None, protected=True):
    mask = np.isin(np.arange(len(x)), curated)
    rank = np.arange(len(x)) if rank is None else np.asarray(rank)
    return near_duplicates(x, threshold, rank, mask, mask & protected, recheck)


def planted(count: int, channels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors; a third are copies, cosine 0.8 and more with an original, in groups of 2 to 30."""
    random, parts, group = np.random.default_rng(seed), [], []
    while len(group) < count // 3:
        size, original = int(random.integers(2, 31)), l2_normalise(random.standard_normal((1, channels)))
        noise = random.standard_normal((size, channels))
        noise = l2_normalise(noise - (noise @ original.T) * original)
        cosine = random.uniform(0.9, 0.99, (size, 1))
        cosine[0] = 1
        parts.append(cosine * original + np.sqrt(1 - cosine**2) * noise)
        group += [len(parts)] * size
    rest = count - len(group)
    x = l2_normalise(np.concatenate([*parts, random.standard_normal((rest, channels))]))
    group = np.r_[group, -np.arange(1, rest + 1)]
    mixed = random.permutation(count)
    return x[mixed], group[mixed]


@pytest.mark.parametrize("recheck", [1, 4, 1000])
def test_planted_duplicates_are_all_found_and_no_original_is_lost(recheck):
    x, group = planted(3000, 64, seed=0)
    v = verdict(x, threshold=0.75, recheck=recheck)
    kept = v.cause_N < 0
    assert len(np.unique(group[kept])) == len(np.unique(group)) == kept.sum()
    np.testing.assert_array_equal(group[v.cause_N[~kept]], group[~kept])
    assert (v.score_N[~kept] > 0.75).all()
    assert (kept[v.cause_N[~kept]]).all()


def test_large_groups_are_rechecked_against_chaining():
    x = chain(0, 20, 41, 60, 82, 100)  # neighbours resemble each other (0.93), ends do not
    loose, strict = verdict(x, recheck=6), verdict(x, recheck=5)
    assert loose.cause_N.tolist() == [-1, 0, 0, 0, 0, 0]
    assert loose.group_N.tolist() == [0] * 6
    assert strict.cause_N.tolist() == [-1, 0, -1, 2, -1, 4]
    assert strict.group_N.tolist() == [0, 0, 2, 2, 4, 4]
    np.testing.assert_allclose(strict.score_N[[1, 3, 5]], np.cos(np.radians([20, 19, 18])), atol=1e-6)
    assert np.isnan(strict.score_N[[0, 2, 4]]).all()


def test_rechecking_in_blocks_is_rechecking_in_order(monkeypatch):
    x = l2_normalise(np.random.default_rng(3).standard_normal((400, 4)))
    whole = verdict(x, threshold=0.7)
    monkeypatch.setattr(dedup, "BLOCK", 7)
    np.testing.assert_array_equal(verdict(x, threshold=0.7).cause_N, whole.cause_N)
    matrix, stays = x @ x.T, list[int]()
    for row in range(len(x)):  # one by one
        if not (matrix[row, stays] > 0.7).any():
            stays.append(row)
    assert np.flatnonzero(whole.cause_N < 0).tolist() == stays


def test_curated_images_are_kept_and_are_causes():
    x = chain(0, 4, 10, 90)
    assert verdict(x, curated=[1, 3], rank=[2, 0, 3, 1]).cause_N.tolist() == [1, -1, 1, -1]
    both = verdict(x, curated=[0, 2], rank=[0, 2, 1, 3])
    assert both.cause_N.tolist() == [-1, 0, -1, -1]
    assert both.group_N.tolist() == [0, 0, 0, -1]
    assert verdict(x, curated=[0, 2], rank=[0, 2, 1, 3], protected=False).cause_N.tolist() == [-1, 0, 0, -1]
    # In a chain: 50 goes for the curated 25 although 60, which stays, is nearer.
    x = chain(0, 25, 50, 60, 85)
    long = verdict(x, threshold=0.88, curated=[1], rank=[1, 0, 4, 2, 3])
    assert long.cause_N.tolist() == [1, -1, 1, -1, 3]


def test_the_keep_rule():
    curated = np.array([False, False, True, False, False, False])
    area, size = np.array([100, 400, 1, 400, 400, 9]), np.array([9, 5, 1, 7, 7, 9])
    assert np.argsort(keep_order(curated, area, size)).tolist() == [2, 3, 4, 1, 0, 5]


def test_identical_files():
    rank = np.array([3, 1, 2, 0, 4])
    none = np.zeros(5, bool)
    assert find_identical(list("abaab"), rank, none).tolist() == [3, -1, 3, -1, 1]
    assert find_identical(list("abaab"), rank, np.array([1, 0, 0, 1, 0], bool)).tolist() == [-1, -1, 3, -1, 1]
    assert find_identical([], rank[:0], none[:0]).tolist() == []


def test_components_do_not_depend_on_the_parts_of_the_graph():
    random, n = np.random.default_rng(0), 600
    i, j = random.integers(0, n, (2, 450))
    least = np.arange(n)
    for _ in range(n):  # spread the lowest number along the edges until nothing changes
        before = least.copy()
        np.minimum.at(least, i, least[j])
        np.minimum.at(least, j, least[i])
        if np.array_equal(least, before):
            break
    assert 50 < len(set(least.tolist())) < 400
    for parts in (1, 7, 450):
        order = random.permutation(450)
        edges = [(i[p], j[p], None) for p in np.array_split(order, parts)]
        np.testing.assert_array_equal(components(n, edges), least)
    assert components(3, []).tolist() == [0, 1, 2]


# Spaces, calibration, retrieval


def test_whitening_equalises_variances_and_separates_copies():
    random = np.random.default_rng(0)
    x = random.standard_normal((2000, 48)) * np.geomspace(1, 0.05, 48) + 12  # one direction for all
    copies = x[:200] + random.standard_normal((200, 48)) * 0.05 * np.geomspace(1, 0.05, 48)
    margins = {}
    for kind in ("plain", "centred", "whitened"):
        mapped = space.fit(kind, x.astype(np.float16))
        a, b = l2_normalise(mapped(x[:200])), l2_normalise(mapped(copies))
        others = a @ l2_normalise(mapped(x[200:])).T
        margins[kind] = float(np.median((a * b).sum(1)) - np.quantile(others.max(1), 0.9))
    assert margins["plain"] < 0.02
    assert margins["whitened"] > margins["centred"] > margins["plain"]
    assert margins["whitened"] > 0.3
    for rows_ in (0, 1, 2):
        assert np.isfinite(space.fit("whitened", x[:rows_])(x[:rows_])).all()
    assert np.isfinite(space.fit("whitened", np.ones((9, 4)))(np.ones((9, 4)))).all()


def pictures(count: int, first: int = 0) -> list[np.ndarray]:
    return [picture(seed) for seed in range(first, first + count)]


def test_calibration_separates_copies_from_look_alikes():
    images, pool = pictures(60), pictures(400)
    x = CopyEncoder(Pixels(), pixels=False)(pool)
    mapped = space.fit("whitened", x)

    def encode(batch):
        return mapped(CopyEncoder(Pixels(), pixels=False)(batch))

    vectors_ = mapped(x)
    result = calibrate(encode, images, np.random.default_rng(0), others_MD=vectors_, false_merges=0.02)
    assert len(pairs_above(vectors_, result.threshold)[0]) * 2 / 400 <= 0.05  # measured on all, not extrapolated
    assert result.recall["resave"] == result.recall["shrink"] == result.recall["noise"] == 1
    assert result.recall["flip"] < 0.2
    assert [t["threshold"] for t in result.table] == sorted(t["threshold"] for t in result.table)
    assert result.copies == 240
    # If half of the pool is copied once, the threshold hardly changes.
    copies = [attack(image, "jpeg", np.random.default_rng(1), 0.5) for image in pool[:200]]
    mixed = np.concatenate([vectors_, encode(copies)])
    again = calibrate(encode, images, np.random.default_rng(0), others_MD=mixed, false_merges=0.02)
    assert abs(again.threshold - result.threshold) < 0.1
    assert again.recall["shrink"] == 1


def test_real_near_duplicates_are_found_by_cosine(shared, tmp_path):
    """156 pairs in CIFAR-10 that people call the same shot; among 4,313 images, seen as eight by eight pixels."""
    tar = shared("neardup_cifar10_dev.tar")
    index = open_source(tar / "images")
    row = {Path(path).name: at for at, path in enumerate(index.column("path"))}
    with tarfile.open(tar) as pack:
        listed = list(csv.DictReader(io.TextIOWrapper(pack.extractfile("pairs.csv"))))
    pairs = [(row[Path(p["path_a"]).name], row[Path(p["path_b"]).name], p["judgment"]) for p in listed]

    config = CurateConfig(verify="none", within_curated="drop", threads=2)
    out = pipeline.curate(config, index.take(range(200)), index.take(range(200, len(index))), Pixels(), tmp_path / "s")
    groups = pq.read_table(out / "groups.parquet").to_pydict()
    group = dict(zip(groups["row"], groups["group"], strict=True))
    same = [(a, b) for a, b, judgment in pairs if judgment == "1"]
    assert len(same) == 156
    assert np.mean([a in group and group[a] == group.get(b) for a, b in same]) > 0.8  # 0.82; plain cosines: 0.37
    known = {image for a, b, _ in pairs for image in (a, b)}
    stages = pq.read_table(out / "images.parquet")["stage"].to_pylist()
    dropped = [image for image, stage in enumerate(stages) if stage == "duplicate" and image not in known]
    assert len(dropped) < 0.01 * len(index)  # 20, some of them true duplicates that nobody has judged


def test_calibration_of_a_collapsed_network_merges_nothing():
    result = calibrate(lambda images: np.ones((len(images), 4)), pictures(30), np.random.default_rng(0))
    assert result.threshold == 1.0
    assert calibrate(lambda images: np.eye(2)[: len(images)], pictures(2), np.random.default_rng(0)).threshold == 1.0


def test_retrieval_is_nearest_first_with_a_minimum():
    x = chain(0, 1, 30, 90, 2, 31)
    hits = retrieve(x, queries=np.array([0, 2]), candidates=np.array([1, 3, 4, 5]), k=2)
    assert list(zip(hits.query_H.tolist(), hits.rank_H.tolist(), hits.row_H.tolist())) == [
        (0, 1, 1),
        (0, 2, 4),
        (2, 1, 5),
        (2, 2, 4),
    ]
    high = retrieve(x, queries=np.array([0, 2]), candidates=np.array([1, 3, 4, 5]), k=2, min_similarity=0.9995)
    assert high.row_H.tolist() == [1, 5]
    times, best = best_hits(hits, 6)
    assert times.tolist() == [0, 1, 0, 0, 2, 1]
    assert best.tolist() == [-1, 0, -1, -1, 1, 2]
    ties = Hits(np.array([7, 3]), np.array([1, 1]), np.array([0, 0]), np.array([0.5, 0.5]))
    assert best_hits(ties, 1)[1].tolist() == [1]


def test_embedding_prints_its_progress(capsys):
    progress = Progress("embed", "images", 1000, interval=0)
    progress.add(10)
    assert "embed: 10 of 1,000 images" in capsys.readouterr().err


def test_a_unit_without_readable_images(tmp_path):
    index = write(tmp_path / "i", {"a.png": b"", "b.png": b"", "c.png": png(picture(0)), "d.png": png(picture(1))})
    x, images = embedding.load_embeddings(
        embedding.embed(Pixels(), index, tmp_path / "e", batch=2, threads=1, partition_size=2)
    )
    assert x.shape == (4, 192)
    assert np.any(x != 0, 1).tolist() == [False, False, True, True]
    assert images["status"].to_pylist() == ["empty", "empty", "ok", "ok"]


def test_embeddings_are_computed_once(pools, tmp_path):
    backbone = Pixels()
    out = embedding.embed(backbone, pools[0], tmp_path / "e", batch=4, threads=1)
    table = pq.read_table(out / "images.parquet")
    assert table["status"].to_pylist() == ["ok"] * 9 + ["not an image"]
    assert (table["width"][0].as_py(), table["height"][0].as_py()) == (60, 48)
    assert table["sha256"][7] == table["sha256"][8]
    embedding.embed(backbone, pools[0], out, batch=4, threads=1)
    assert sum(backbone.seen) == 9
    with pytest.raises(UsageError, match="tokens"):
        embedding.embed(backbone, pools[0], out, batch=4, threads=1, tokens="cls+mean")
    with pytest.raises(UsageError, match="compute"):
        embedding.embed(HalfPrecision(), pools[0], out, batch=4, threads=1)
    shutil.rmtree(out)
