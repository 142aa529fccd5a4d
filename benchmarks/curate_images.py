"""Copies, leaks and look-alikes among real images: what each way to compare images finds.

    python benchmarks/curate_images.py --data FOLDER [--backbone RUN ...] [--parts PART ...] [--quick] [--record]
    python benchmarks/curate_images.py --parts pack --pack FILE ... [--quick] [--record]

FOLDER holds neardup_cifar10_dev.tar, photos_cc0_224.tar, cls_tinyin50_64.tar, seg_camvid_dev.tar, retr_eth80_dev.tar.
Ways to compare: 8 x 8 pixels, an untrained ViT, the backbones given, these with pixels, each whitened; perceptual
hashes; and the closer look at two images, by which `curate --verify geometric` decides.

    pack       a tar with ground truth, de-duplicated without any network, against pHash (pack.py)
    judged     4,313 images of CIFAR-10 with 156 pairs that people judge the same: average precision over all pairs. By
               the closer look: how many of these pairs are accepted, of 18 judged similar, and of other candidates
    attacked   photographs against copies of them, 24 kinds at four strengths: average precision over all pairs of a
               copy and a photograph, recall at the score that no wrong pair reaches, and the same by strength; and by
               kind, with five further kinds, the average precision and the share of copies that lie nearer to their
               photograph than to any other. By the closer look: the share of copies that are accepted as copies of
               their photograph, of these the share that votes and hashes propose, and how many other photographs are
    pairs      photographs and attacked copies of 240 of them, de-duplicated: which pairs remain, with --verify none
               (by hashes and vectors) and geometric (pools.py, as the next three)
    leaks      attacked validation images hidden in a pool, curated against the validation set: which remain, by kind;
               with --verify none and geometric
    scenes     frames of videos and views of objects, de-duplicated by the closer look, the cosine and pHash: other
               shots of one scene are not copies; how many are joined
    world      the pool of the embedded world, which has charts, tables and things drawn alike: precision and recall of
               what is dropped, against pHash
    retrieval  half of 50 classes as curated, images of all classes and photographs as pool: precision, recall,
               collisions, by sample and by cluster; against as many images drawn by chance
"""

import argparse
import csv
import io
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy import ndarray
from PIL import Image

from measure import CORES, argument_parser, finish, result
from pack import BITS, pack_results, rival_hash, rival_name
from pools import leaks, pairs, scenes, training_images, world
from troodon import verbs
from troodon.copies.hashes import near_hashes, perceptual_hash
from troodon.copies.local_features import SavedFeatures, local_features, save_features
from troodon.copies.verify import ORIENTATIONS, verify
from troodon.copies.votes import TABLES, Pairs, add_votes, alike_hashes, most_voted, vote
from troodon.curate import space
from troodon.curate.closer_look import MIN_VOTES
from troodon.curate.config import CurateConfig
from troodon.curate.embed import embed
from troodon.curate.encoder import CopyEncoder, PixelBackbone
from troodon.curate.pipeline import curate
from troodon.images.decode import decode
from troodon.images.index import Index
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.search.exact import l2_normalise
from troodon.views.attacks import attack
from troodon.views.config import ALL_ATTACK_KINDS, ATTACK_KINDS, FURTHER_ATTACK_KINDS

PARTS = ("pack", "judged", "attacked", "pairs", "leaks", "scenes", "world", "retrieval")
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


class Looks:
    """The closer look at pairs of some images. Those from `first` on are not compared with one another."""

    def __init__(self, images: list[ndarray], first: int, home: Path):
        with ThreadPoolExecutor(CORES) as pool:
            found = list(pool.map(local_features, images))
        home.mkdir()
        save_features(found, home)
        self.features, self.first = SavedFeatures((home,), len(images)), first
        self.reader = self.features.reader()

    def candidates(self, limit: int = 0) -> dict[tuple[int, int], set[int]]:
        """The pairs that votes and hashes propose, with orientations: of each image so many, or all."""
        active_N = np.ones(len(self.features), bool)
        voted = (vote(self.features, active_N, self.first, table) for table in range(TABLES))
        pairs = add_votes(voted, MIN_VOTES)
        if limit:
            pairs, _ = most_voted(pairs, limit, self.first)
        pairs = Pairs.concatenate([pairs, alike_hashes(self.features, active_N, self.first)])
        found: dict[tuple[int, int], set[int]] = {}
        for i, j, orientation in zip(*(column.tolist() for column in pairs[:3])):
            found.setdefault((i, j), set()).add(orientation)
        return found

    def accepts(self, i: int, j: int, orientations: Iterable[int]) -> bool:
        return any(verify(self.reader[i], self.reader[j], orientation) for orientation in sorted(orientations))


def judged_pairs(data: Path, encoders: dict[str, CopyEncoder | None], home: Path, quick: bool) -> list[dict]:
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
    return looks_at_judged(images, judgements, home, quick)


def looks_at_judged(
    images: list[ndarray], judgements: list[tuple[int, int, str]], home: Path, quick: bool
) -> list[dict]:
    """Report how many pairs of each judgement are accepted, and of all others; `quick` looks at no others."""
    listed = {(min(a, b), max(a, b)): judgment for a, b, judgment in judgements}
    rows = sorted({row for pair in listed for row in pair}) if quick else range(len(images))
    place = {row: number for number, row in enumerate(rows)}
    looks = Looks([images[row] for row in rows], len(rows), home / "judged")
    accepted, total = Counter[str](), Counter(listed.values())
    for (a, b), judgment in listed.items():
        accepted[judgment] += looks.accepts(place[a], place[b], (0, 4))
    near = near_pairs(images, rows)
    by_hash = Counter(listed[pair] for pair in near & listed.keys())
    counts = ", ".join(f"{accepted[name]} of {total[name]} pairs judged {name}" for name in sorted(total))
    joined = None
    of_others = "others not looked at"
    if not quick:
        others = {
            pair: found for pair, found in looks.candidates(CurateConfig().candidates).items() if pair not in listed
        }
        joined = sum(looks.accepts(*pair, orientations) for pair, orientations in others.items())
        of_others = f"{joined} of {len(others):,} other candidates"
    print(f"judged     {'closer look':<10} accepts {counts}; {of_others}; pHash {dict(by_hash)}", flush=True)
    settings = {"rival": rival_name(), "others": joined, "rival_others": len(near - listed.keys())}
    return [result("judged_joined", accepted[name], by_hash[name], f"of {total[name]} pairs",
                   more_is_better=name == "1", judgement=name, **settings) for name in sorted(total)]  # fmt: skip


def near_pairs(images: list[ndarray], rows: Iterable[int]) -> set[tuple[int, int]]:
    """The pairs (i, j), i < j, of these images that pHash joins."""
    hash_of, chosen = rival_hash(), np.array(list(rows))
    values = [hash_of(Image.fromarray(images[row])) or 0 for row in chosen.tolist()]
    found = near_hashes(np.array(values, np.uint64), BITS)
    return {pair for i, j, _ in found for pair in zip(chosen[i].tolist(), chosen[j].tolist())}


@dataclass(frozen=True)
class AttackedCopies:
    """Attacked copies of photographs: pixels, the photograph, kind and strength of each."""

    images: list[ndarray]
    originals: ndarray  # int64
    kinds: ndarray  # str
    strengths: ndarray  # float

    @staticmethod
    def of(images: list[ndarray], photos: int) -> "AttackedCopies":
        """Copies of as many photographs: those of the first 24 kinds, which the summary counts, and then the others."""
        random = np.random.default_rng(0)
        rows = random.permutation(len(images))[:photos].tolist()
        columns = [
            (attack(images[row], kind, random, strength), row, kind, strength)
            for kinds in (ATTACK_KINDS, FURTHER_ATTACK_KINDS)
            for row in rows
            for strength in STRENGTHS
            for kind in kinds
        ]
        copies, originals, names, strengths = zip(*columns)
        return AttackedCopies(list(copies), np.array(originals), np.array(names), np.array(strengths))

    def by_kind(self, value: Callable[[ndarray], float], digits: int = 2) -> str:
        """A value of the copies of each kind, the worst first."""
        values = {kind: value(self.kinds == kind) for kind in ALL_ATTACK_KINDS}
        return ", ".join(f"{kind} {values[kind]:.{digits}f}" for kind in sorted(values, key=values.__getitem__))


def attacked_photographs(data: Path, encoders: dict[str, CopyEncoder | None], photos: int, home: Path) -> list[dict]:
    """Rows: average precision of the last backbone with pixels beside hashes; and the closer look."""
    index, precisions = open_source(data / "photos_cc0_224.tar"), []
    images = [decode(index.read(row)) for row in range(len(index))]
    copies = AttackedCopies.of(images, photos)
    right = np.arange(len(index)) == copies.originals[:, None]
    is_counted = np.isin(copies.kinds, ATTACK_KINDS)
    for name, encoder in encoders.items():
        base = describe(images, encoder)
        transform = fit_space(encoder, base)
        score = transform(describe(copies.images, encoder)) @ transform(base).T

        def precision_recall(chosen: ndarray, score: ndarray = score) -> tuple[float, float]:
            return average_precision(score[chosen].ravel(), right[chosen].ravel())

        ap, recall = precision_recall(is_counted)
        by_strength = [precision_recall(is_counted & (copies.strengths == strength))[1] for strength in STRENGTHS]
        shares = ", ".join(f"{strength:g}: {share:.2f}" for strength, share in zip(STRENGTHS, by_strength))
        print(
            f"attacked   {name:<10} average precision {ap:.3f}, recall at no wrong pair {recall:.3f} ({shares})",
            flush=True,
        )
        nearest = score.argmax(1) == copies.originals
        by_kind = copies.by_kind(lambda chosen, nearest=nearest: nearest[chosen].mean())
        print(f"attacked   {name:<10} nearest is right {nearest[is_counted].mean():.3f}; by kind: {by_kind}")
        by_kind = copies.by_kind(lambda chosen, measure=precision_recall: measure(chosen)[0], 3)
        print(f"attacked   {name:<10} average precision by kind: {by_kind}", flush=True)
        precisions.append(ap)
    ours, hashes = precisions[-2:]
    row = result("attacked_average_precision", ours, hashes, "average precision", more_is_better=True,
                 rival="perceptual hashes")  # fmt: skip
    return [row, looks_at_attacked(images, copies, home)]


def looks_at_attacked(images: list[ndarray], copies: AttackedCopies, home: Path) -> dict:
    """Report by kind and strength which copies the closer look accepts, and how many other photographs."""
    looks = Looks(images + copies.images, len(images), home / "attacked")
    candidates = {pair: found for pair, found in looks.candidates().items() if pair[1] >= len(images)}
    own = [(row, len(images) + number) for number, row in enumerate(copies.originals.tolist())]
    accepted = np.array([looks.accepts(*pair, range(len(ORIENTATIONS))) for pair in own])
    proposed = np.array([pair in candidates for pair in own])
    others = {pair: found for pair, found in candidates.items() if pair[0] != copies.originals[pair[1] - len(images)]}
    wrong = [(i, int(copies.originals[j - len(images)])) for (i, j), o in others.items() if looks.accepts(i, j, o)]
    print(f"attacked   closer look accepts {accepted.mean():.4f} of {len(own):,} copies; votes and hashes propose "
          f"{proposed[accepted].mean():.4f} of these, and {len(others):,} other pairs of a copy and a photograph, of "
          f"which it accepts {len(wrong)}, of the photographs {sorted(set(wrong))}")  # fmt: skip
    for kind in ALL_ATTACK_KINDS:
        chosen = copies.kinds == kind
        by_strength = ", ".join(f"{strength:g}: {accepted[chosen & (copies.strengths == strength)].mean():.2f}"
                                for strength in STRENGTHS)  # fmt: skip
        if not accepted[chosen].all():
            print(f"attacked   closer look {kind:<13} {accepted[chosen].mean():.3f} ({by_strength})", flush=True)
    print("attacked   closer look accepts all copies of the other kinds", flush=True)
    near = {pair for pair in near_pairs(images + copies.images, range(len(images) + len(copies.images)))
            if pair[0] < len(images) <= pair[1]}  # fmt: skip
    by_hash = len(near.intersection(own))
    return result("attacked_found", 100 * accepted.mean(), 100 * by_hash / len(own), "%", more_is_better=True,
                  copies=len(own), wrong=len(wrong), rival=rival_name(), rival_wrong=len(near) - by_hash)  # fmt: skip


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


def retrieval(data: Path, home: Path, name: str, backbone: Any) -> list[dict]:
    """Report what each way to gather finds for the known images of `split_classes`."""
    curated, uncurated, right = split_classes(data, 0, open_source(data / "photos_cc0_224.tar"))
    settings = {
        "sample, k 4": {"k": 4}, "sample, k 32": {"k": 32}, "sample, k 4, filled": {"collisions": "fill"},
        "cluster, > 0": {"gather": "cluster", "clusters": 500, "more_than": 0},
        "cluster, > 3": {"gather": "cluster", "clusters": 500, "more_than": 3},
    }  # fmt: skip
    embeddings = embed(backbone, Index.concat([curated, uncurated]), home / f"embeddings-{name}", batch=64, threads=0)
    results = []
    for number, (way, changes) in enumerate(settings.items()):
        config = replace(CurateConfig(steps=("exact",), pixels=False), **changes)
        out = home / f"retrieval-{name}-{number}"
        shutil.copytree(embeddings, home / f"{out.name}.work" / "embeddings")  # images are embedded once for all ways
        curate(config, curated, uncurated, backbone, out)
        table = pq.read_table(out / "images.parquet")
        kept = table["kept"].to_numpy()[len(curated) :]
        hits = pq.read_table(out / "hits.parquet")["row"].to_numpy()
        collide = f", {1 - len(np.unique(hits)) / len(hits):.2f} of hits collide" if len(hits) else ""
        print(f"retrieval  {name:<10} {way:<20} kept {kept.sum():>5}: precision {right[kept].mean():.3f} "
              f"(chance {right.mean():.3f}), recall {kept[right].mean():.3f}{collide}", flush=True)  # fmt: skip
        results.append(result("retrieval_precision", 100 * right[kept].mean(), 100 * right.mean(), "%", network=name,
                              more_is_better=True, rival="chance", way=way, kept=int(kept.sum()),
                              recall=float(kept[right].mean())))  # fmt: skip
    return results


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder of the packs that all parts but `pack` need")
    parser.add_argument("--pack", type=Path, nargs="+", help="packs of the part `pack`; by default neardup_cc0_dev.tar")
    parser.add_argument("--backbone", type=Path, nargs="+", default=[], help="backbones, named by their folders")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="a third of a pack, eight photographs, and no pools")
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--pool", type=int, default=5000, help="other images in the pools of leaks")
    parser.add_argument("--seeds", type=int, default=3, help="draws of hidden images and their attacks")
    arguments = parser.parse_args()
    if arguments.data is None and (arguments.pack is None or set(arguments.parts) != {"pack"}):
        parser.error("--data FOLDER is needed by all parts but `--parts pack --pack FILE`")
    results = []
    with tempfile.TemporaryDirectory(prefix="troodon-images-") as folder:
        if "pack" in arguments.parts:
            for path in arguments.pack or [arguments.data / "neardup_cc0_dev.tar"]:
                results += pack_results(path, Path(folder), arguments.quick)
        if set(arguments.parts) != {"pack"}:
            results += run_parts(arguments, Path(folder))
    finish(results, arguments)


def run_parts(arguments: argparse.Namespace, home: Path) -> list[dict]:
    """Run the parts that compare by networks; returns rows."""
    data, parts = arguments.data, arguments.parts
    torch.manual_seed(0)
    untrained = ViTConfig(dim=128, depth=4, heads=2, patch=8, grid=6, layer_scale=1.0)
    networks: dict[str, Any] = {"pixels": PixelBackbone(3)}
    networks["untrained"] = Backbone.random(untrained, Preprocessing(64, 64))
    networks |= {path.name: verbs.load(path) for path in arguments.backbone}
    encoders: dict[str, CopyEncoder | None] = {}
    encoders |= {name: CopyEncoder(network, pixels=False) for name, network in networks.items()}
    encoders |= {f"{name}, pixels": CopyEncoder(network) for name, network in networks.items() if name != "pixels"}
    encoders["hash"] = None
    del networks["untrained"]  # pools are compared by pixels, or by what was trained
    results = []
    if "judged" in parts:
        results += judged_pairs(data, encoders, home, arguments.quick)
    if "attacked" in parts:
        results += attacked_photographs(data, encoders, 8 if arguments.quick else arguments.photos, home)
    if arguments.quick:
        return results
    if "scenes" in parts:
        results += scenes(data, home)
    if "world" in parts:
        results += world(home)
    for name, network in networks.items():
        if "pairs" in parts:
            results += pairs(data, home, name, network)
        if "leaks" in parts:
            for seed in range(arguments.seeds):
                results += leaks(data, home, name, network, arguments.pool, seed)
        if "retrieval" in parts:
            results += retrieval(data, home, name, network)
    return results


if __name__ == "__main__":
    main()
