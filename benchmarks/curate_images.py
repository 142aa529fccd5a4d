"""Copies, leaks and look-alikes among real images: what each way to compare images finds.

    python benchmarks/curate_images.py --data FOLDER [--backbone RUN ...] [--parts PART ...] [--quick] [--record]

FOLDER holds neardup_cifar10_dev.tar, photos_cc0_224.tar and cls_tinyin50_64.tar. Ways to compare: 8 x 8 pixels, an
untrained ViT, the backbones given, these with pixels, each whitened; and perceptual hashes.

    judged     4,313 images of CIFAR-10 with 156 pairs that people judge the same: average precision over all pairs
    attacked   photographs against copies of them, 24 kinds at four strengths: average precision over all pairs of a
               copy and a photograph, recall at the score that no wrong pair reaches, and the same by strength; and by
               kind the share of copies that lie nearer to their photograph than to any other
    pairs      photographs and attacked copies of 240 of them, de-duplicated by hashes and vectors: which pairs remain
    leaks      attacked validation images hidden in a pool, curated against the validation set: which remain, by kind;
               by the network alone, with pixels, and then with attacked copies of the validation set
    retrieval  half of 50 classes as curated, images of all classes and photographs as pool: precision, recall,
               collisions, by sample and by cluster; against as many images drawn by chance
"""

import csv
import io
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

from measure import argument_parser, finish, result
from troodon import run, verbs
from troodon.curate import space
from troodon.curate.config import CurateConfig
from troodon.curate.embed import embed
from troodon.curate.encoder import CopyEncoder, PixelBackbone
from troodon.curate.hashes import perceptual_hash
from troodon.curate.pipeline import curate
from troodon.images.decode import decode
from troodon.images.index import Index
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.search.exact import l2_normalise
from troodon.views.attacks import ATTACKS, attack

PARTS = ("judged", "pairs", "leaks", "retrieval")  # besides the attacked photographs
STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def average_precision(score_N: ndarray, right_N: ndarray) -> tuple[float, float]:
    """Average precision of scored pairs, and recall at the score that no wrong pair reaches. Ties count against us."""
    order = np.lexsort((right_N, -score_N))
    right = right_N[order]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    best_wrong = score_N[~right_N].max(initial=-np.inf)
    return float(precision[right].sum() / right.sum()), float((score_N[right_N] > best_wrong).mean())


def describe(images: list[ndarray], encoder: CopyEncoder | None) -> ndarray:
    """Vectors or, without an encoder, bits of hashes as +1 and -1, whose products count equal bits."""
    if encoder is not None:
        return encoder(images)
    hashes = np.array([perceptual_hash(image) or 0 for image in images], ">u8")
    return np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1).astype(np.float32) * 2 - 1


def fit_space(encoder: CopyEncoder | None, base: ndarray) -> Callable[[ndarray], ndarray]:
    """The map of vectors to unit length, whitened by those of `base` unless they are hashes."""
    transform = space.fit("whitened" if encoder is not None else "plain", base)
    return lambda x: l2_normalise(transform(x))


def judged_pairs(data: Path, encoders: dict[str, CopyEncoder | None]) -> None:
    tar = data / "neardup_cifar10_dev.tar"
    index = open_source(tar / "images")
    row_of = {Path(path).name: row for row, path in enumerate(index.column("path"))}
    with tarfile.open(tar) as pack:
        listed = list(csv.DictReader(io.TextIOWrapper(pack.extractfile("pairs.csv"))))
    images = [decode(index.read(row)) for row in range(len(index))]
    judgements = [(row_of[Path(p["path_a"]).name], row_of[Path(p["path_b"]).name], p["judgment"]) for p in listed]
    right = np.zeros((len(index), len(index)), bool)
    is_compared = np.triu(np.ones_like(right), 1)
    for a, b, judgment in judgements:
        a, b = min(a, b), max(a, b)
        right[a, b] = judgment == "1"
        is_compared[a, b] = judgment == "1"
    for name, encoder in encoders.items():
        x = describe(images, encoder)
        mapped = fit_space(encoder, x)(x)
        ap, recall = average_precision((mapped @ mapped.T)[is_compared], right[is_compared])
        print(
            f"judged     {name:<10} average precision {ap:.3f}, recall before the first wrong pair {recall:.3f}",
            flush=True,
        )


def attacked_photographs(data: Path, encoders: dict[str, CopyEncoder | None], photos: int) -> list[float]:
    """The average precision of each encoder."""
    index, precisions = open_source(data / "photos_cc0_224.tar"), []
    images = [decode(index.read(row)) for row in range(len(index))]
    random = np.random.default_rng(0)
    copies, originals, kinds, strengths = [], [], [], []
    for row in random.permutation(len(index))[:photos].tolist():
        for strength in STRENGTHS:
            for kind in ATTACKS:
                copies.append(attack(images[row], kind, random, strength))
                originals.append(row)
                kinds.append(kind)
                strengths.append(strength)
    right = np.zeros((len(copies), len(index)), bool)
    right[np.arange(len(copies)), originals] = True
    for name, encoder in encoders.items():
        base = describe(images, encoder)
        transform = fit_space(encoder, base)
        score = transform(describe(copies, encoder)) @ transform(base).T
        ap, recall = average_precision(score.ravel(), right.ravel())
        by_strength = [average_precision(score[s].ravel(), right[s].ravel())[1] for s in
              (np.array(strengths) == strength for strength in STRENGTHS)]  # fmt: skip
        shares = ", ".join(f"{strength:g}: {share:.2f}" for strength, share in zip(STRENGTHS, by_strength))
        print(
            f"attacked   {name:<10} average precision {ap:.3f}, recall at no wrong pair {recall:.3f} ({shares})",
            flush=True,
        )
        nearest = score.argmax(1) == originals
        by_kind = {kind: nearest[np.array(kinds) == kind].mean() for kind in ATTACKS}
        worst_first = ", ".join(f"{kind} {by_kind[kind]:.2f}" for kind in sorted(by_kind, key=by_kind.__getitem__))
        print(f"attacked   {name:<10} nearest is right {nearest.mean():.3f}; by kind: {worst_first}", flush=True)
        precisions.append(ap)
    return precisions


def training_images(data: Path) -> tuple[Index, ndarray]:
    """The training images of 50 classes, and their labels."""
    index = open_source(data / "cls_tinyin50_64.tar" / "images" / "train")
    return index, np.array([Path(path).parent.name for path in index.column("path")])


def leaks(data: Path, home: Path, name: str, backbone: Any, hidden: int, seed: int) -> None:
    """Hide attacked validation images in a pool and report how many remain: by the network alone, with pixels, and then
    with attacked copies of the validation set, as curation does."""
    index, _ = training_images(data)
    benchmark = open_source(data / "cls_tinyin50_64.tar" / "images" / "val")
    random = np.random.default_rng(seed)
    folder, kinds = home / f"hidden-{name}-{seed}", sorted(ATTACKS)
    folder.mkdir()
    for i, row in enumerate(random.permutation(len(benchmark))[:hidden].tolist()):
        kind = kinds[i % len(kinds)]
        Image.fromarray(attack(decode(benchmark.read(row)), kind, random, 0.5)).save(folder / f"{kind}-{i:04d}.png")
    drawn = index.take(np.sort(random.permutation(len(index))[:5000]))
    pool = Index.concat([drawn, open_source(folder)]).without_labels()
    has_pixels = not isinstance(backbone, PixelBackbone)
    ways = {"alone": (False, 0)} | ({"pixels": (True, 0)} if has_pixels else {})
    ways |= {"attacked copies": (has_pixels, 12)}
    for way, (pixels, benchmark_attacks) in ways.items():
        config = CurateConfig(gather="all", pixels=pixels, benchmark_attacks=benchmark_attacks)
        out = curate(config, index.take([]), pool, backbone, home / f"leaks-{name}-{seed}-{way}", benchmark=benchmark)
        _report_leaks(f"{name}, {way}, {seed}", out, folder)


def _report_leaks(name: str, out: Path, folder: Path) -> None:
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


def split_classes(data: Path, seed: int = 0, *others: Index) -> tuple[Index, Index, ndarray]:
    """Half of the classes are wanted, 40 images of each are known: these, the pool, and which of the pool is wanted.

    The pool is all other images of all classes, and then `others`, of which none is wanted.
    """
    index, label = training_images(data)
    wanted, random = np.unique(label)[::2], np.random.default_rng(seed)
    rows = np.concatenate([random.permutation(np.flatnonzero(label == c))[:40] for c in wanted])
    rest = np.setdiff1d(np.arange(len(index)), rows)
    pool = Index.concat([index.take(rest), *others]).without_labels()
    right = np.isin(np.arange(len(pool)), np.flatnonzero(np.isin(label[rest], wanted)))
    return index.take(np.sort(rows)), pool, right


def pairs(data: Path, home: Path, name: str, backbone: Any, copied: int = 240) -> None:
    """De-duplicate photographs and attacked copies; report how many pairs remain whole, and what else is dropped."""
    index, random = open_source(data / "photos_cc0_224.tar"), np.random.default_rng(0)
    folder, kinds, originals = home / f"copies-{name}", sorted(ATTACKS), dict[str, str]()
    folder.mkdir()
    for i, row in enumerate(random.permutation(len(index))[:copied].tolist()):
        file = folder / f"{kinds[i % len(kinds)]}-{i:04d}.png"
        Image.fromarray(attack(decode(index.read(row)), kinds[i % len(kinds)], random, 0.5)).save(file)
        originals[f"{folder.name}/{file.name}"] = index.path(row)
    pool = Index.concat([index, open_source(folder)]).without_labels()
    for way, pixels in (("alone", False), ("pixels", True)):
        if pixels and isinstance(backbone, PixelBackbone):
            continue
        config = CurateConfig(steps=("exact", "hash", "duplicate"), gather="all", pixels=pixels)
        out = curate(config, index.take([]), pool, backbone, home / f"pairs-{name}-{way}")
        rows = pq.read_table(out / "images.parquet").to_pylist()
        kept = {row["path"] for row in rows if row["kept"]}
        both = [Path(copy).name.partition("-")[0] for copy, original in originals.items() if {copy, original} <= kept]
        wrong = sum(
            not row["kept"] and {row["path"], rows[row["cause"]]["path"]} not in [{*pair} for pair in originals.items()]
            for row in rows
        )
        by_kind = ", ".join(f"{kind} {both.count(kind)}" for kind in sorted(set(both), key=lambda k: -both.count(k)))
        print(f"pairs      {name + ', ' + way:<24} {len(both)} of {copied} copies beside their originals: {by_kind}; "
              f"{wrong} other images dropped", flush=True)  # fmt: skip


def retrieval(data: Path, home: Path, name: str, backbone: Any) -> None:
    """Report what each way to gather finds for the known images of `split_classes`."""
    curated, uncurated, right = split_classes(data, 0, open_source(data / "photos_cc0_224.tar"))
    settings = {
        "sample, k 4": {"k": 4}, "sample, k 32": {"k": 32}, "sample, k 4, filled": {"collisions": "fill"},
        "cluster, > 0": {"gather": "cluster", "clusters": 500, "more_than": 0},
        "cluster, > 3": {"gather": "cluster", "clusters": 500, "more_than": 3},
    }  # fmt: skip
    embeddings = embed(backbone, Index.concat([curated, uncurated]), home / f"embeddings-{name}", batch=64, threads=0)
    for number, (way, changes) in enumerate(settings.items()):
        config = replace(CurateConfig(steps=("exact",)), **changes)
        out = home / f"retrieval-{name}-{number}"
        shutil.copytree(embeddings, home / f"{out.name}.work" / "embeddings")  # images are embedded once for all ways
        curate(config, curated, uncurated, backbone, out)
        table = pq.read_table(out / "images.parquet")
        kept = table["kept"].to_numpy()[len(curated) :]
        hits = pq.read_table(out / "hits.parquet")["row"].to_numpy()
        collide = f", {1 - len(np.unique(hits)) / len(hits):.2f} of hits collide" if len(hits) else ""
        print(f"retrieval  {name:<10} {way:<20} kept {kept.sum():>5}: precision {right[kept].mean():.3f} "
              f"(chance {right.mean():.3f}), recall {kept[right].mean():.3f}{collide}", flush=True)  # fmt: skip


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, nargs="+", default=[], help="backbones, named by their folders")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="eight photographs, and no pools")
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3, help="draws of hidden images and their attacks")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    untrained = ViTConfig(dim=128, depth=4, heads=2, patch=8, grid=6, layer_scale=1.0)
    networks: dict[str, Any] = {"pixels": PixelBackbone(3)}
    networks["untrained"] = Backbone.random(untrained, Preprocessing(64, 64))
    networks |= {path.name: verbs.load(path) for path in arguments.backbone}
    encoders: dict[str, CopyEncoder | None] = {}
    encoders |= {name: CopyEncoder(network, pixels=False) for name, network in networks.items()}
    encoders |= {f"{name}, pixels": CopyEncoder(network) for name, network in networks.items() if name != "pixels"}
    encoders["hash"] = None
    if "judged" in arguments.parts:
        judged_pairs(arguments.data, encoders)
    precisions = attacked_photographs(arguments.data, encoders, 8 if arguments.quick else arguments.photos)
    if not arguments.quick:
        with tempfile.TemporaryDirectory(prefix="troodon-images-") as folder:
            for name, network in networks.items():
                if "pairs" in arguments.parts:
                    pairs(arguments.data, Path(folder), name, network)
                if "leaks" in arguments.parts:
                    for seed in range(arguments.seeds):
                        leaks(arguments.data, Path(folder), name, network, 480, seed)
                if "retrieval" in arguments.parts:
                    retrieval(arguments.data, Path(folder), name, network)
    ours, hashes = precisions[-2:]  # the last backbone with pixels, as in curation; and hashes
    finish([result("attacked_average_precision", ours, hashes, "average precision", more_is_better=True,
                   rival="perceptual hashes")], arguments)  # fmt: skip


if __name__ == "__main__":
    main()
