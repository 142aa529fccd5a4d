"""De-duplication of a pack of images with ground truth, against pHash: the part `pack` of curate_images.py.

A pack is a tar with images/ and ground_truth.csv, whose columns are path, cluster, role (original, copy or distractor),
transform, level and source_photo. Images of one cluster are copies of one another, and of no other image. Ours is
`curate` without any network: 8 x 8 pixels, steps exact and duplicate, the closer look. The rival is pHash of the
package ImageHash (pip install 'troodon[bench]'): pairs within 10 of 64 bits are joined, and the largest image of each
group is kept. Without that package our own perceptual hash stands in for it, and the row says so.

    copies_removed      copies beyond one a cluster that are gone, in %
    distinct_removed    clusters of which no image is kept; `wrong_causes` in the settings are images dropped for an
                        image of another cluster
    original_kept       clusters with copies that keep the original or a file with its pixels, in %
    seconds             from files to decisions
    processor_seconds   the same of all threads together, which other work on the machine does not change
"""

import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy import ndarray
from PIL import Image

from measure import result
from troodon.copies.hashes import near_hashes, perceptual_hash
from troodon.curate.config import CurateConfig
from troodon.curate.dedup import components
from troodon.curate.encoder import PixelBackbone
from troodon.curate.pipeline import curate
from troodon.images.decode import decode
from troodon.images.index import Index
from troodon.images.sources import open_source

BITS = 10  # in which hashes of copies differ, at most
CONFIG = CurateConfig(gather="all", steps=("exact", "duplicate"), verify="geometric", pixels=False)


@dataclass(frozen=True)
class Pack:
    """The images of a pack, and what is true of each."""

    index: Index
    rows: list[dict[str, str]]  # of ground_truth.csv, in the order of the index

    @staticmethod
    def open(path: Path, quick: bool) -> "Pack":
        """Open a pack; `quick` draws a third of its clusters, and those that it needs to have every transform."""
        index = open_source(path / "images").without_labels()
        with tarfile.open(path) as tar:
            listed = list(csv.DictReader(io.TextIOWrapper(tar.extractfile("ground_truth.csv"))))
        row_of = {Path(name).name: row for row, name in enumerate(index.column("path"))}
        rows = sorted(listed, key=lambda row: row_of[Path(row["path"]).name])
        assert [row_of[Path(row["path"]).name] for row in rows] == list(range(len(index))), "files and rows differ"
        if not quick:
            return Pack(index, rows)
        chosen = third_of_clusters(rows)
        return Pack(index.take(np.array(chosen)), [rows[row] for row in chosen])

    def clusters(self) -> list[list[int]]:
        members: dict[str, list[int]] = {}
        for row, truth in enumerate(self.rows):
            members.setdefault(truth["cluster"], []).append(row)
        return list(members.values())

    def original_pixels(self) -> set[int]:
        """The images that have the pixels of an original: it and its exact copies."""
        found = set()
        for members in self.clusters():
            digests = {row: hashlib.sha256(decode(self.index.read(row)).tobytes()).digest() for row in members[1:]}
            if digests:
                digests[members[0]] = hashlib.sha256(decode(self.index.read(members[0])).tobytes()).digest()
                originals = {digests[row] for row in members if self.rows[row]["role"] == "original"}
                found |= {row for row in members if digests[row] in originals}
        return found


def third_of_clusters(rows: list[dict[str, str]]) -> list[int]:
    """The images of a third of the clusters, and of those that have a transform that these lack."""
    transforms: dict[str, set[str]] = {}
    for row in rows:
        transforms.setdefault(row["cluster"], set()).add(row["transform"])
    names = sorted(transforms, key=lambda name: (len(transforms[name]) == 1, name))  # those with copies first
    is_drawn = np.random.default_rng(0).random(len(names)) < 1 / 3
    drawn, seen = set(), set()
    for name in [*np.array(names)[is_drawn].tolist(), *names]:
        if name in np.array(names)[is_drawn] or transforms[name] - seen:
            drawn.add(name)
            seen |= transforms[name]
    return [row for row, truth in enumerate(rows) if truth["cluster"] in drawn]


@dataclass(frozen=True)
class Decisions:
    """What a way to de-duplicate decides about N images."""

    kept_N: ndarray  # bool
    cause_N: ndarray  # int64, the image for which it is dropped; -1 for none
    score_N: ndarray  # float, how well it agrees with its cause
    seconds: float
    processor_seconds: float

    def stands_for(self, row: int) -> int:
        """The kept image at the end of the causes of a dropped one; -1 for none."""
        while row >= 0 and not self.kept_N[row]:
            row = int(self.cause_N[row])
        return row


def by_curation(index: Index, home: Path, config: CurateConfig = CONFIG) -> Decisions:
    start, processor = time.perf_counter(), time.process_time()
    out = curate(config, index.take([]), index, PixelBackbone(3), home)
    seconds = time.perf_counter() - start, time.process_time() - processor
    table = pq.read_table(out / "images.parquet")
    return Decisions(*(table[name].to_numpy() for name in ("kept", "cause", "score")), *seconds)


def by_hashes(index: Index) -> Decisions:
    """Join pairs of near hashes, and keep the image of each group with the most pixels, then with the most bytes."""
    start, processor, hash_of = time.perf_counter(), time.process_time(), rival_hash()
    hashes, sizes = np.zeros(len(index), np.uint64), []
    is_hashed = np.zeros(len(index), bool)
    for row in range(len(index)):
        data = index.read(row)
        with Image.open(io.BytesIO(data)) as picture:
            sizes.append((picture.width * picture.height, len(data), -row))
            value = hash_of(picture)
        is_hashed[row], hashes[row] = value is not None, value or 0
    rows = np.flatnonzero(is_hashed)
    edges = [(rows[i], rows[j], score) for i, j, score in near_hashes(hashes[rows], BITS)]
    label_N = components(len(index), edges)
    cause_N = np.full(len(index), -1, np.int64)
    for label in np.flatnonzero(np.bincount(label_N) > 1):
        members = np.flatnonzero(label_N == label)
        largest = max(members.tolist(), key=sizes.__getitem__)
        cause_N[members[members != largest]] = largest
    seconds = time.perf_counter() - start, time.process_time() - processor
    score_N = 1 - np.bitwise_count(hashes ^ hashes[cause_N]) / 64
    return Decisions(cause_N < 0, cause_N, score_N, *seconds)


def rival_hash() -> Callable[[Image.Image], int | None]:
    """pHash of ImageHash, or our own perceptual hash where it is not installed."""
    if importlib.util.find_spec("imagehash") is None:
        return lambda picture: perceptual_hash(np.asarray(picture.convert("RGB")))
    import imagehash

    return lambda picture: int(str(imagehash.phash(picture)), 16)


def rival_name() -> str:
    if importlib.util.find_spec("imagehash") is None:
        return f"own perceptual hash, {BITS} bits (ImageHash is not installed)"
    return f"ImageHash {importlib.metadata.version('imagehash')} phash, {BITS} bits"


@dataclass(frozen=True)
class Score:
    """How decisions agree with the truth."""

    copies_removed: float  # %
    distinct_removed: int
    original_kept: float  # %
    missed: list[int]  # images that are kept beyond one of their cluster
    wrong: list[int]  # images dropped for an image of another cluster
    instead: list[int]  # images that are kept where the original of their cluster is not, nor its pixels


def score(pack: Pack, decisions: Decisions, originals: set[int]) -> Score:
    missed, instead, lost, with_copies, beyond, original_kept = [], [], 0, 0, 0, 0
    for members in pack.clusters():
        kept = [row for row in members if decisions.kept_N[row]]
        kept.sort(key=lambda row: row not in originals)  # the others are beyond this one
        lost += not kept
        missed += kept[1:]
        beyond += len(members) - 1
        if len(members) > 1:
            with_copies += 1
            original_kept += bool(originals.intersection(kept))
            instead += [row for row in kept[:1] if row not in originals]
    cluster = [row["cluster"] for row in pack.rows]
    ends = {row: decisions.stands_for(row) for row in np.flatnonzero(~decisions.kept_N).tolist()}
    wrong = [row for row, end in ends.items() if end >= 0 and cluster[end] != cluster[row]]
    removed = 100 * (1 - len(missed) / beyond) if beyond else 100.0
    return Score(removed, lost, 100 * original_kept / max(with_copies, 1), missed, wrong, instead)


def report(pack: Pack, way: str, decisions: Decisions, found: Score) -> None:
    """Print what is missed, by level and by transform, and every wrong decision."""
    copies = [row for row in pack.rows if row["role"] == "copy"]
    print(f"pack       {way:<10} copies removed {found.copies_removed:.2f} %, original kept {found.original_kept:.2f} "
          f"%, {found.distinct_removed} clusters lost, {len(found.wrong)} images dropped for one of another cluster, "
          f"{decisions.seconds:.1f} s", flush=True)  # fmt: skip
    for column in ("level", "transform"):
        missed, total = Counter(pack.rows[row][column] for row in found.missed), Counter(row[column] for row in copies)
        shares = ", ".join(f"{name} {count} of {total[name]}" for name, count in missed.most_common())
        print(f"pack       {way:<10} missed by {column}: {shares or 'none'}", flush=True)
    kept = Counter(pack.rows[row]["transform"] for row in found.instead)
    shares = ", ".join(f"{name} {count}" for name, count in kept.most_common())
    print(f"pack       {way:<10} kept instead of the original: {shares or 'none'}", flush=True)
    for row in found.wrong:
        cause = decisions.stands_for(row)
        (path, what), (other, other_what) = ((pack.rows[k]["path"], pack.rows[k]["transform"]) for k in (row, cause))
        print(f"pack       {way:<10} wrong: {path} ({what}) for {other} ({other_what}), "
              f"agreement {decisions.score_N[row]:.3f}", flush=True)  # fmt: skip


def pack_results(path: Path, home: Path, quick: bool) -> list[dict]:
    """De-duplicate a pack both ways, print how, and return the rows."""
    pack = Pack.open(path, quick)
    originals = pack.original_pixels()
    ours, rival = by_curation(pack.index, home / f"pack-{path.stem}"), by_hashes(pack.index)
    one, other = (score(pack, decisions, originals) for decisions in (ours, rival))
    report(pack, "curate", ours, one)
    report(pack, "phash", rival, other)
    settings = {
        "pack": path.stem, "images": len(pack.index), "clusters": len(pack.clusters()), "rival": rival_name(),
        "backbone": "pixels", "verify": CONFIG.verify, "wrong_causes": len(one.wrong),
        "rival_wrong_causes": len(other.wrong),
    }  # fmt: skip
    return [
        result("copies_removed", one.copies_removed, other.copies_removed, "%", more_is_better=True, **settings),
        result("distinct_removed", one.distinct_removed, other.distinct_removed, "clusters", **settings),
        result("original_kept", one.original_kept, other.original_kept, "%", more_is_better=True, **settings),
        result("seconds", ours.seconds, rival.seconds, "s", **settings),
        result("processor_seconds", ours.processor_seconds, rival.processor_seconds, "s", **settings),
    ]
