"""Pools that are de-duplicated as a whole: the parts pairs, leaks, scenes and world of curate_images.py."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy import ndarray
from PIL import Image

from measure import result
from pack import Decisions, by_curation, by_hashes, rival_name
from troodon import run
from troodon.curate.config import CurateConfig
from troodon.curate.encoder import PixelBackbone
from troodon.curate.pipeline import curate
from troodon.demo import EMBEDDED_WORLD
from troodon.images.decode import decode
from troodon.images.index import Index
from troodon.images.sources import open_source
from troodon.views.attacks import ATTACKS, attack
from troodon.world.scene import WorldConfig
from troodon.world.write import write_world

VERIFY = ("none", "geometric")
WORLD_SEED = 1  # bounds were chosen with 0


def training_images(data: Path) -> tuple[Index, ndarray]:
    """The training images of 50 classes, and their labels."""
    index = open_source(data / "cls_tinyin50_64.tar" / "images" / "train")
    return index, np.array([Path(path).parent.name for path in index.column("path")])


def leaks(data: Path, home: Path, name: str, backbone: Any, others: int, seed: int, hidden: int = 480) -> list[dict]:
    """Hide attacked validation images in a pool and report how many remain, as curation compares them."""
    index, _ = training_images(data)
    benchmark = open_source(data / "cls_tinyin50_64.tar" / "images" / "val")
    random = np.random.default_rng(seed)
    folder, kinds = home / f"hidden-{name}-{seed}", sorted(ATTACKS)
    folder.mkdir()
    for i, row in enumerate(random.permutation(len(benchmark))[:hidden].tolist()):
        kind = kinds[i % len(kinds)]
        Image.fromarray(attack(decode(benchmark.read(row)), kind, random, 0.5)).save(folder / f"{kind}-{i:04d}.png")
    drawn = index.take(np.sort(random.permutation(len(index))[:others]))
    pool = Index.concat([drawn, open_source(folder)]).without_labels()
    found: dict[str, tuple[int, int]] = {}
    for way in VERIFY:
        config = CurateConfig(gather="all", verify=way, pixels=not isinstance(backbone, PixelBackbone))
        out = curate(config, index.take([]), pool, backbone, home / f"leaks-{name}-{seed}-{way}", benchmark=benchmark)
        found[way] = _report_leaks(f"{name}, {way}, {seed}", out, folder)
    settings = {"network": name, "seed": seed, "hidden": hidden, "others": others, "rival": "--verify none"}
    return [result(what, ours, cosine, "images", **settings)
            for what, cosine, ours in zip(("leaks_left", "leaks_others_lost"), *found.values())]  # fmt: skip


def _report_leaks(name: str, out: Path, folder: Path) -> tuple[int, int]:
    """Print and return how many hidden images remain, and how many others were dropped as if they were leaks."""
    rows = pq.read_table(out / "images.parquet").to_pylist()
    hidden = [r for r in rows if r["path"].startswith(folder.name) and r["pool"] == "uncurated"]
    remaining = [r for r in hidden if r["kept"]]
    others = [r for r in rows if r["pool"] == "uncurated" and not r["path"].startswith(folder.name)]
    wrong = sum(r["stage"] == "benchmark" for r in others)
    by_kind: dict[str, list[bool]] = {}
    for r in hidden:
        by_kind.setdefault(Path(r["path"]).name.partition("-")[0], []).append(r["kept"])
    worst = ", ".join(
        f"{kind} {np.mean(kept):.0%}"
        for kind, kept in sorted(by_kind.items(), key=lambda kv: -np.mean(kv[1]))
        if any(kept)
    )
    clean = sum(not any(kept) for kept in by_kind.values())
    threshold = run.read_json(out / "summary.json")["benchmark_threshold"]
    counts = f"{len(remaining)} of {len(hidden)} remain at {threshold:.3f}, none of {clean} of {len(by_kind)} kinds"
    print(f"leaks      {name:<24} {counts}; {worst}; {wrong} of {len(others)} others dropped", flush=True)
    return len(remaining), wrong


def pairs(data: Path, home: Path, name: str, backbone: Any, copied: int = 240) -> list[dict]:
    """De-duplicate photographs and attacked copies; report how many pairs remain whole, and what else is dropped."""
    index, random = open_source(data / "photos_cc0_224.tar"), np.random.default_rng(0)
    folder, kinds, originals = home / f"copies-{name}", sorted(ATTACKS), dict[str, str]()
    folder.mkdir()
    for i, row in enumerate(random.permutation(len(index))[:copied].tolist()):
        file = folder / f"{kinds[i % len(kinds)]}-{i:04d}.png"
        Image.fromarray(attack(decode(index.read(row)), kinds[i % len(kinds)], random, 0.5)).save(file)
        originals[f"{folder.name}/{file.name}"] = index.path(row)
    pool, found = Index.concat([index, open_source(folder)]).without_labels(), []
    for way, steps in zip(VERIFY, (("exact", "hash", "duplicate"), ("exact", "duplicate"))):
        pixels = not isinstance(backbone, PixelBackbone)
        config = CurateConfig(steps=steps, gather="all", verify=way, pixels=pixels)
        out = curate(config, index.take([]), pool, backbone, home / f"pairs-{name}-{way}")
        rows = pq.read_table(out / "images.parquet").to_pylist()
        kept = {row["path"] for row in rows if row["kept"]}
        both = [Path(copy).name.partition("-")[0] for copy, original in originals.items() if {copy, original} <= kept]
        right = {frozenset(pair) for pair in originals.items()}
        dropped = [(row["path"], rows[row["cause"]]["path"], row["score"]) for row in rows if not row["kept"]]
        wrong = [(*pair, score) for *pair, score in dropped if frozenset(pair) not in right]
        by_kind = ", ".join(f"{kind} {both.count(kind)}" for kind in sorted(set(both), key=lambda k: -both.count(k)))
        print(f"pairs      {name + ', ' + way:<24} {len(both)} of {copied} copies beside their originals: {by_kind}; "
              f"{len(wrong)} other images dropped{_listed(wrong)}", flush=True)  # fmt: skip
        found.append((len(both), len(wrong)))
    (cosine, cosine_wrong), (ours, ours_wrong) = found
    return [result("pairs_left", ours, cosine, f"of {copied} pairs", network=name, wrong=ours_wrong,
                   rival_wrong=cosine_wrong, rival="--verify none")]  # fmt: skip


def scenes(data: Path, home: Path) -> list[dict]:
    """De-duplicate frames of videos and views of objects; report how many are joined, and to what."""
    results = []
    for name in ("seg_camvid_dev", "retr_eth80_dev"):
        index = open_source(data / f"{name}.tar" / "images").without_labels()
        stems = [Path(path).stem for path in index.column("path")]
        cosine = CurateConfig(steps=("exact", "duplicate"), gather="all", verify="none", pixels=False)
        ways = {
            "geometric": by_curation(index, home / f"scenes-{name}"),
            "none": by_curation(index, home / f"scenes-{name}-none", cosine),
            "pHash": by_hashes(index),
        }
        joined = {way: _joined(stems, decisions) for way, decisions in ways.items()}
        for way, pairs in joined.items():
            same = sum(re.split("[-_]", a)[0] == re.split("[-_]", b)[0] for a, b, _ in pairs)
            print(f"scenes     {name}, {way:<10} {len(pairs)} of {len(stems)} joined to another, {same} of them of the "
                  f"same video or object{_listed(pairs)}", flush=True)  # fmt: skip
        ours, rival = len(joined["geometric"]), len(joined["pHash"])
        results.append(result("scenes_joined", ours, rival, f"of {len(stems)} images", pack=name,
                              by_cosine=len(joined["none"]), rival=rival_name()))  # fmt: skip
    return results


def _joined(stems: list[str], decisions: Decisions) -> list[tuple[str, str, float]]:
    """The dropped images, those that they are dropped for, and the scores."""
    return [(stems[row], stems[decisions.cause_N[row]], float(decisions.score_N[row]))
            for row in np.flatnonzero(~decisions.kept_N).tolist() if decisions.cause_N[row] >= 0]  # fmt: skip


def world(home: Path) -> list[dict]:
    """De-duplicate the pool of the embedded world; report precision and recall."""
    write_world(home / "world", WORLD_SEED, WorldConfig(**EMBEDDED_WORLD))
    index = open_source(home / "world" / "uncurated").without_labels()
    truth = {Path(row["path"]).name: row for row in pq.read_table(home / "world" / "truth.parquet").to_pylist()}
    rows = [truth[Path(path).name] for path in index.column("path")]
    readable = np.array([row["role"] != "broken" for row in rows])
    index = index.take(np.flatnonzero(readable))
    rows = [row for row, is_readable in zip(rows, readable) if is_readable]
    family_N = np.unique([row["original"] or row["path"] for row in rows], return_inverse=True)[1]
    scores = {}
    for way, decisions in {"curate": by_curation(index, home / "world-out"), "phash": by_hashes(index)}.items():
        scores[way] = precision, recall = _precision_recall(decisions, family_N)
        wrong = Counter(rows[row]["role"] for row in _wrong(decisions, family_N))
        print(f"world      {way:<10} {(~decisions.kept_N).sum()} of {len(rows)} dropped: precision {precision:.1f} %, "
              f"recall {recall:.1f} %; wrongly dropped: {dict(wrong)}", flush=True)  # fmt: skip
    settings = {"images": len(rows), "world": WORLD_SEED, "rival": rival_name()}
    return [result(name, ours, rival, "%", more_is_better=True, **settings)
            for name, ours, rival in zip(("world_precision", "world_recall"), *scores.values())]  # fmt: skip


def _wrong(decisions: Decisions, family_N: ndarray) -> list[int]:
    """The images that are dropped for one of another family."""
    dropped = np.flatnonzero(~decisions.kept_N).tolist()
    return [row for row in dropped if family_N[decisions.stands_for(row)] != family_N[row]]


def _precision_recall(decisions: Decisions, family_N: ndarray) -> tuple[float, float]:
    """Percentages: of the dropped images, and of those beyond one a family, those dropped for one of their family."""
    dropped = np.flatnonzero(~decisions.kept_N)
    right = np.setdiff1d(dropped, _wrong(decisions, family_N))
    beyond = np.bincount(family_N) - 1
    found = np.minimum(np.bincount(family_N[right], minlength=len(beyond)), beyond)
    return 100 * len(right) / max(1, len(dropped)), 100 * found.sum() / max(1, beyond.sum())


def _listed(pairs: list[tuple[str, str, float]], limit: int = 10) -> str:
    """Some of the images that are dropped, with their causes and scores."""
    texts = [f"{Path(a).name} for {Path(b).name} ({score:.2f})" for a, b, score in pairs[:limit]]
    return f": {', '.join(texts)}{', ...' if len(pairs) > limit else ''}" if pairs else ""
