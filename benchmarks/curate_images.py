"""Copies, leaks and look-alikes among real images: what each way to compare images finds.

    python benchmarks/curate_images.py --data FOLDER [--backbone RUN ...] [--parts PART ...] [--quick]

FOLDER holds neardup_cifar10_dev.tar, photos_cc0_224.tar and cls_tinyin50_64.tar. Ways to compare: eight by eight
pixels, an untrained ViT, the backbones given, these with pixels, each whitened; and perceptual hashes.

    judged     4,313 images of CIFAR-10 with 156 pairs that people call the same: average precision over all pairs
    attacked   photographs against copies of them, 24 kinds at four strengths: average precision over all pairs of a
               copy and a photograph, recall at the score that no wrong pair reaches, and the same by strength; and by
               kind the share of copies that lie nearer to their photograph than to any other
    pairs      photographs and attacked copies of 240 of them, de-duplicated by hashes and vectors: who is left
    leaks      attacked validation images hidden in a pool, curated against the validation set: what is left, by kind;
               by the network alone, with pixels, and then with disguises
    retrieval  half of 50 classes as curated, images of all classes and photographs as pool: precision, recall,
               collisions, by sample and by cluster; against as many drawn by chance
"""

import argparse
import csv
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy import ndarray
from PIL import Image

from troodon import run, verbs
from troodon.curate import space
from troodon.curate.config import CurateConfig
from troodon.curate.embed import embed
from troodon.curate.finder import Finder, Pixels
from troodon.curate.hashes import perceptual_hash
from troodon.curate.pipeline import curate
from troodon.images.decode import decode
from troodon.images.index import Index
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.search.exact import unit
from troodon.views.attacks import ATTACKS, attack

PARTS = ("judged", "pairs", "leaks", "retrieval")  # besides the attacked photographs
STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def average_precision(score_N: ndarray, right_N: ndarray) -> tuple[float, float]:
    """Of pairs with a score, and the recall at the score that no wrong one reaches. Equal scores count against us."""
    order = np.lexsort((right_N, -score_N))
    right = right_N[order]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    best_wrong = score_N[~right_N].max(initial=-np.inf)
    return float(precision[right].sum() / right.sum()), float((score_N[right_N] > best_wrong).mean())


def told(images: list[ndarray], how: Finder | None) -> ndarray:
    """Vectors or, without a finder, bits as +1 and -1, whose products count equal bits."""
    if how is not None:
        return how(images)
    hashes = np.array([perceptual_hash(image) or 0 for image in images], ">u8")
    return np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1).astype(np.float32) * 2 - 1


def spaced(how: Finder | None, base: ndarray) -> Callable[[ndarray], ndarray]:
    fitted = space.fit("whitened" if how is not None else "plain", base)
    return lambda x: unit(fitted(x))


def judged(data: Path, ways: dict[str, Finder | None]) -> None:
    tar = data / "neardup_cifar10_dev.tar"
    index = open_source(tar / "images")
    at = {Path(path).name: row for row, path in enumerate(index.column("path"))}
    with tarfile.open(tar) as pack:
        listed = list(csv.DictReader(io.TextIOWrapper(pack.extractfile("pairs.csv"))))
    images = [decode(index.read(row)) for row in range(len(index))]
    known = [(at[Path(p["path_a"]).name], at[Path(p["path_b"]).name], p["judgment"]) for p in listed]
    right = np.zeros((len(index), len(index)), bool)
    open_ = np.triu(np.ones_like(right), 1)
    for a, b, judgment in known:
        a, b = min(a, b), max(a, b)
        right[a, b] = judgment == "1"
        open_[a, b] = judgment == "1"
    for name, how in ways.items():
        x = told(images, how)
        mapped = spaced(how, x)(x)
        ap, recall = average_precision((mapped @ mapped.T)[open_], right[open_])
        print(
            f"judged     {name:<10} average precision {ap:.3f}, recall before the first wrong pair {recall:.3f}",
            flush=True,
        )


def attacked(data: Path, ways: dict[str, Finder | None], photos: int) -> list[float]:
    index, found = open_source(data / "photos_cc0_224.tar"), []
    images = [decode(index.read(row)) for row in range(len(index))]
    random = np.random.default_rng(0)
    copies, of, kinds, strengths = [], [], [], []
    for row in random.permutation(len(index))[:photos].tolist():
        for strength in STRENGTHS:
            for kind in ATTACKS:
                copies.append(attack(images[row], kind, random, strength))
                of.append(row)
                kinds.append(kind)
                strengths.append(strength)
    right = np.zeros((len(copies), len(index)), bool)
    right[np.arange(len(copies)), of] = True
    for name, how in ways.items():
        base = told(images, how)
        mapped = spaced(how, base)
        score = mapped(told(copies, how)) @ mapped(base).T
        ap, recall = average_precision(score.ravel(), right.ravel())
        by = [average_precision(score[s].ravel(), right[s].ravel())[1] for s in
              (np.array(strengths) == strength for strength in STRENGTHS)]  # fmt: skip
        shares = ", ".join(f"{strength:g}: {share:.2f}" for strength, share in zip(STRENGTHS, by))
        print(
            f"attacked   {name:<10} average precision {ap:.3f}, recall at no wrong pair {recall:.3f} ({shares})",
            flush=True,
        )
        nearest = score.argmax(1) == of
        by_kind = {kind: nearest[np.array(kinds) == kind].mean() for kind in ATTACKS}
        least = ", ".join(f"{kind} {share:.2f}" for kind, share in sorted(by_kind.items(), key=lambda item: item[1]))
        print(f"attacked   {name:<10} nearest is right {nearest.mean():.3f}; by kind: {least}", flush=True)
        found.append(ap)
    return found


def classes(data: Path) -> tuple[Index, ndarray]:
    index = open_source(data / "cls_tinyin50_64.tar" / "images" / "train")
    return index, np.array([Path(path).parent.name for path in index.column("path")])


def leaks(data: Path, home: Path, name: str, how: Any, hidden: int, seed: int) -> None:
    """Attacked validation images in a pool, and how many of them are left: by the network alone, with pixels, and then
    with disguises, which is what curation does."""
    index, _ = classes(data)
    benchmark = open_source(data / "cls_tinyin50_64.tar" / "images" / "val")
    random = np.random.default_rng(seed)
    folder, kinds = home / f"hidden-{name}-{seed}", sorted(ATTACKS)
    folder.mkdir()
    for i, row in enumerate(random.permutation(len(benchmark))[:hidden].tolist()):
        kind = kinds[i % len(kinds)]
        Image.fromarray(attack(decode(benchmark.read(row)), kind, random, 0.5)).save(folder / f"{kind}-{i:04d}.png")
    pool = Index.concat([index.take(np.sort(random.permutation(len(index))[:5000])), open_source(folder)]).unlabelled()
    beside = not isinstance(how, Pixels)
    ways = {"alone": (False, 0)} | ({"pixels": (True, 0)} if beside else {}) | {"disguises": (beside, 12)}
    for words, (pixels, disguises) in ways.items():
        config = CurateConfig(gather="all", pixels=pixels, disguises=disguises)
        out = curate(config, index.take([]), pool, how, home / f"leaks-{name}-{seed}-{words}", benchmark=benchmark)
        _left(f"{name}, {words}, {seed}", out, folder)


def _left(name: str, out: Path, folder: Path) -> None:
    rows = pq.read_table(out / "images.parquet").to_pylist()
    ours = [r for r in rows if r["path"].startswith(folder.name) and r["pool"] == "uncurated"]
    left = [r for r in ours if r["kept"]]
    other = [r for r in rows if r["pool"] == "uncurated" and not r["path"].startswith(folder.name)]
    wrongly = sum(r["stage"] == "benchmark" for r in other)
    by_kind: dict[str, list[bool]] = {}
    for r in ours:
        by_kind.setdefault(Path(r["path"]).name.partition("-")[0], []).append(r["kept"])
    worst = ", ".join(
        f"{kind} {np.mean(kept):.0%}"
        for kind, kept in sorted(by_kind.items(), key=lambda kv: -np.mean(kv[1]))
        if any(kept)
    )
    clean = sum(not any(kept) for kept in by_kind.values())
    threshold = run.read_json(out / "summary.json")["benchmark_threshold"]
    said = f"{len(left)} of {len(ours)} left at {threshold:.3f}, none of {clean} of {len(by_kind)} kinds; {worst}"
    print(f"leaks      {name:<24} {said}; {wrongly} of {len(other)} others went", flush=True)


def halves(data: Path, seed: int = 0, *others: Index) -> tuple[Index, Index, ndarray]:
    """Half of the classes are wanted, 40 images of each are known: these, the pool, and who of the pool is wanted.

    The pool is all other images of all classes, and then `others`, of which none is wanted.
    """
    index, label = classes(data)
    wanted, random = np.unique(label)[::2], np.random.default_rng(seed)
    rows = np.concatenate([random.permutation(np.flatnonzero(label == c))[:40] for c in wanted])
    rest = np.setdiff1d(np.arange(len(index)), rows)
    pool = Index.concat([index.take(rest), *others]).unlabelled()
    right = np.isin(np.arange(len(pool)), np.flatnonzero(np.isin(label[rest], wanted)))
    return index.take(np.sort(rows)), pool, right


def pairs(data: Path, home: Path, name: str, how: Any, copied: int = 240) -> None:
    """Photographs and attacked copies of some, de-duplicated: of how many pairs both stay, and what else went."""
    index, random = open_source(data / "photos_cc0_224.tar"), np.random.default_rng(0)
    folder, kinds, of = home / f"copies-{name}", sorted(ATTACKS), dict[str, str]()
    folder.mkdir()
    for i, row in enumerate(random.permutation(len(index))[:copied].tolist()):
        file = folder / f"{kinds[i % len(kinds)]}-{i:04d}.png"
        Image.fromarray(attack(decode(index.read(row)), kinds[i % len(kinds)], random, 0.5)).save(file)
        of[f"{folder.name}/{file.name}"] = index.path(row)
    pool = Index.concat([index, open_source(folder)]).unlabelled()
    for words, pixels in (("alone", False), ("pixels", True)):
        if pixels and isinstance(how, Pixels):
            continue
        config = CurateConfig(steps=("exact", "hash", "duplicate"), gather="all", pixels=pixels)
        out = curate(config, index.take([]), pool, how, home / f"pairs-{name}-{words}")
        rows = pq.read_table(out / "images.parquet").to_pylist()
        kept = {row["path"] for row in rows if row["kept"]}
        both = [Path(copy).name.partition("-")[0] for copy, original in of.items() if {copy, original} <= kept]
        wrong = sum(
            not row["kept"] and {row["path"], rows[row["cause"]]["path"]} not in [{*pair} for pair in of.items()]
            for row in rows
        )
        said = ", ".join(f"{kind} {both.count(kind)}" for kind in sorted(set(both), key=lambda k: -both.count(k)))
        print(f"pairs      {name + ', ' + words:<24} {len(both)} of {copied} copies beside their originals: {said}; "
              f"{wrong} other images went", flush=True)  # fmt: skip


def retrieval(data: Path, home: Path, name: str, how: Any) -> None:
    """What is gathered for the known images of `halves`, by each way to gather."""
    curated, uncurated, right = halves(data, 0, open_source(data / "photos_cc0_224.tar"))
    settings = {
        "sample, k 4": {"k": 4}, "sample, k 32": {"k": 32}, "sample, k 4, filled": {"collisions": "fill"},
        "cluster, > 0": {"gather": "cluster", "clusters": 500, "more_than": 0},
        "cluster, > 3": {"gather": "cluster", "clusters": 500, "more_than": 3},
    }  # fmt: skip
    seen = embed(how, Index.concat([curated, uncurated]), home / f"seen-{name}", batch=64, threads=0)
    for at, (words, changes) in enumerate(settings.items()):
        config = replace(CurateConfig(steps=("exact",)), **changes)
        out = home / f"retrieval-{name}-{at}"
        shutil.copytree(seen, home / f"{out.name}.work" / "embeddings")  # images are embedded once for all of these
        curate(config, curated, uncurated, how, out)
        table = pq.read_table(out / "images.parquet")
        kept = table["kept"].to_numpy()[len(curated) :]
        hits = pq.read_table(out / "hits.parquet")["row"].to_numpy()
        collide = f", {1 - len(np.unique(hits)) / len(hits):.2f} of hits collide" if len(hits) else ""
        print(f"retrieval  {name:<10} {words:<20} kept {kept.sum():>5}: precision {right[kept].mean():.3f} "
              f"(chance {right.mean():.3f}), recall {kept[right].mean():.3f}{collide}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, nargs="+", default=[], help="named by their folders")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="eight photographs, and no pools")
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3, help="of what is hidden among the pool's images, and how")
    given = parser.parse_args()
    torch.manual_seed(0)
    untrained = ViTConfig(dim=128, depth=4, heads=2, patch=8, grid=6, layer_scale=1.0)
    networks: dict[str, Any] = {"pixels": Pixels(3), "untrained": Backbone.random(untrained, Preprocessing(64, 64))}
    networks |= {path.name: verbs.load(path) for path in given.backbone}
    ways: dict[str, Finder | None] = {name: Finder(how, pixels=False) for name, how in networks.items()}
    ways |= {f"{name}, pixels": Finder(how) for name, how in networks.items() if name != "pixels"}
    ways["hash"] = None
    if "judged" in given.parts:
        judged(given.data, ways)
    found = attacked(given.data, ways, 8 if given.quick else given.photos)
    if not given.quick:
        with tempfile.TemporaryDirectory(prefix="troodon-images-") as folder:
            for name, how in networks.items():
                if "pairs" in given.parts:
                    pairs(given.data, Path(folder), name, how)
                if "leaks" in given.parts:
                    for seed in range(given.seeds):
                        leaks(given.data, Path(folder), name, how, 480, seed)
                if "retrieval" in given.parts:
                    retrieval(given.data, Path(folder), name, how)
    ours, hashes = found[-2:]  # what curation does with the last backbone; and hashes
    print(json.dumps([{"name": "attacked_average_precision", "ours": ours, "rival": hashes, "ratio": ours / hashes,
                       "unit": "average precision", "settings": {"rival": "perceptual hashes"}}]))  # fmt: skip


if __name__ == "__main__":
    main()
