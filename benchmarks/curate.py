"""Searches for near-duplicates, on vectors with planted copies: what each finds, how long it takes, what it costs.

    python benchmarks/curate.py [--quick] [--images 200000] [--faiss] [--components 50000000] [--no-exact]

Vectors of 384 channels: concepts of very different sizes, a fifth of the images in groups of copies, most of 2 to 4,
some of up to 50, eight of up to 2,000, with cosines from 0.55 to 0.995. Two rounds of inverted lists are compared with
the exact join of the same vectors in the same process, at a cosine of 0.6, where much is near the threshold. A copy is
found if it is joined to another image of its group; what can be found is what exact search within the group finds.
Originals are lost where nothing is kept of a group, at calibrated thresholds.
`join_recall` is against exact search (`rival` 1), `join_time` against the exact join.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy import ndarray

CHANNELS, THRESHOLD, ROUNDS = 384, 0.6, 2


def planted(images: int, seed: int = 0, channels: int = CHANNELS) -> tuple[ndarray, ndarray]:
    """Unit vectors (N, D) float16, and the group of copies (N,) that each belongs to, its own where it is alone."""
    random, share = np.random.default_rng(seed), images / 200_000
    spectrum = (np.arange(1, channels + 1) ** -0.35).astype(np.float32)  # a few directions hold most, as in features
    viral = [max(2, round(s * min(1, share))) for s in (100, 150, 200, 300, 500, 800, 1200, 2000)]
    kinds = [
        (random.integers(2, 5, round(9000 * share)), 0.55, 0.99),
        (random.integers(5, 50, round(200 * share)), 0.70, 0.99),
        (np.repeat(viral, max(1, round(share))), 0.85, 0.995),
    ]
    concepts = max(10, round(3000 * share))
    middle = _unit(random.standard_normal((concepts, channels), np.float32) * spectrum)
    weight = np.minimum(random.zipf(1.6, concepts).astype(float), 200)

    def pictures(count: int) -> ndarray:
        of = random.choice(concepts, count, p=weight / weight.sum())
        near = random.uniform(0.45, 0.70, (count, 1)).astype(np.float32)
        noise = _unit(random.standard_normal((count, channels), np.float32) * spectrum)
        return _unit(near * middle[of] + np.sqrt(1 - near**2) * noise)

    x_ND, group_N = np.empty((images, channels), np.float16), np.arange(images)
    mixed, at = random.permutation(images), 0
    for sizes, low, high in kinds:
        for size, original in zip(sizes.tolist(), pictures(len(sizes))):
            cosine = random.uniform(low, high, (size, 1)).astype(np.float32)
            cosine[0] = 1
            noise = random.standard_normal((size, channels), np.float32) * spectrum
            noise = _unit(noise - (noise @ original)[:, None] * original)
            x_ND[mixed[at : at + size]] = cosine * original + np.sqrt(1 - cosine**2) * noise
            group_N[mixed[at : at + size]] = mixed[at]
            at += size
    for start in range(at, images, 50_000):
        rest = mixed[start : start + 50_000]
        x_ND[rest] = pictures(len(rest))
    return x_ND, group_N


def _unit(x_ND: ndarray) -> ndarray:
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def found(label_N: ndarray, group_N: ndarray) -> int:
    """Merges within groups: images less pieces that the components leave of the groups."""
    return len(label_N) - len(np.unique(label_N * len(label_N) + group_N))


def findable(x_ND: ndarray, group_N: ndarray, threshold: float) -> int:
    """The same, if all pairs within a group are compared."""
    from troodon.curate.dedup import components
    from troodon.search.exact import above

    order = np.argsort(group_N, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group_N[order]) > 0])
    total = 0
    for members in np.split(order, starts[1:]):
        if len(members) > 1:
            total += len(members) - len(np.unique(components(len(members), above(x_ND[members], threshold))))
    return total


def lost(x_ND: ndarray, group_N: ndarray, threshold: float, edges: Callable, recheck: int) -> tuple[int, int]:
    """Groups of which nothing is kept, and copies kept beside another of their group, after two rounds."""
    from troodon.curate.dedup import near_duplicates

    nobody = np.zeros(len(x_ND), bool)
    verdict = near_duplicates(
        x_ND, threshold, np.arange(len(x_ND)), nobody, nobody, recheck, edges=edges, rounds=ROUNDS
    )
    kept = group_N[verdict.cause_N < 0]
    return len(np.unique(group_N)) - len(np.unique(kept)), len(kept) - len(np.unique(kept))


class Search:
    """One way to search, timed; its edges are those of both rounds."""

    def __init__(self, x_ND: ndarray, how: str, threshold: float):
        self.x_ND, self.how, self.threshold = x_ND, how, threshold

    def edges(self, rows: ndarray, turn: int):
        from troodon.search.join import near

        x_ND = self.x_ND if len(rows) == len(self.x_ND) else self.x_ND[rows]
        return near(x_ND, self.threshold, self.how, seed=turn)

    def run(self, rounds: int) -> tuple[float, ndarray]:
        """Seconds, and the component of each row."""
        from troodon.curate.dedup import components

        count, began = len(self.x_ND), time.perf_counter()
        label_N, rows = np.arange(count), np.arange(count)
        for turn in range(rounds):
            edges = ((rows[i], rows[j], score) for i, j, score in self.edges(rows, turn))
            label_N = components(count, edges, label_N)
            rows = np.unique(label_N)
            print(
                f"  {self.how}, round {turn + 1}: {time.perf_counter() - began:.1f} s, {len(rows):,} left", flush=True
            )
        return time.perf_counter() - began, label_N


def calibrated(x_ND: ndarray, group_N: ndarray) -> Callable[[float], float]:
    """The threshold that calibration gives for so many false merges an image, from vectors of no copies."""
    from troodon.curate.calibrate import tail
    from troodon.search.exact import unit

    originals = np.random.default_rng(0).permutation(np.unique(group_N))
    drawn = unit(x_ND[originals[:20_000]])
    return tail(drawn[:2000], drawn, len(originals))


def components_at(nodes: int, edges: int) -> None:
    """Our components, and numba's where it is installed (in this or the given Python), on random groups."""
    from troodon.curate.dedup import components

    random = np.random.default_rng(0)
    sizes = np.minimum(random.zipf(2.2, nodes // 5), 5000) + 1
    group = np.repeat(np.arange(len(sizes)), sizes)[: nodes // 5]
    start = np.searchsorted(group, group)
    place = random.permutation(nodes)
    later = np.flatnonzero(np.arange(len(group)) != start)
    earlier = start[later] + (random.random(len(later)) * (later - start[later])).astype(np.int64)
    more = random.integers(0, len(later), max(0, edges - len(later)))
    i, j = place[np.r_[later, later[more]]], place[np.r_[earlier, start[later[more]]]]
    mixed = random.permutation(len(i))
    i, j, expected = i[mixed], j[mixed], nodes - len(later)
    del mixed, more, later, earlier
    parts = ((i[at : at + 5_000_000], j[at : at + 5_000_000], None) for at in range(0, len(i), 5_000_000))
    began = time.perf_counter()
    assert len(np.unique(components(nodes, parts))) == expected
    print(
        f"components: {nodes:,} nodes, {len(i):,} edges: scipy by parts {time.perf_counter() - began:.1f} s, ", end=""
    )
    try:
        import numba
    except ImportError:
        return print("numba is not installed")

    @numba.njit
    def union(label, i, j):
        for e in range(len(i)):
            a, b = i[e], j[e]
            while label[a] != a:
                label[a] = label[label[a]]
                a = label[a]
            while label[b] != b:
                label[b] = label[label[b]]
                b = label[b]
            if a < b:
                label[b] = a
            elif b < a:
                label[a] = b
        for a in range(len(label)):
            while label[label[a]] != label[a]:
                label[a] = label[label[a]]

    union(np.arange(2), i[:0], j[:0])
    label, began = np.arange(nodes), time.perf_counter()
    union(label, i, j)
    assert len(np.unique(label)) == expected
    print(f"numba {time.perf_counter() - began:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 vectors")
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--no-exact", action="store_true", help="without the exact join: for a million and more")
    parser.add_argument("--faiss", action="store_true", help="also two rounds of faiss, in a process of its own")
    parser.add_argument("--only", choices=("lists", "faiss"), default="lists", help=argparse.SUPPRESS)
    parser.add_argument("--components", type=int, default=0, help="also components of so many edges")
    given = parser.parse_args()
    images = 20_000 if given.quick else given.images

    began = time.perf_counter()
    x_ND, group_N = planted(images)
    can = findable(x_ND, group_N, THRESHOLD)
    print(f"{images:,} x {CHANNELS}, {can:,} copies to find; made in {time.perf_counter() - began:.0f} s", flush=True)

    exact, exact_found = None, None
    if not given.no_exact and given.only == "lists":
        exact, label_N = Search(x_ND, "exact", THRESHOLD).run(1)
        exact_found = found(label_N, group_N)
    seconds, label_N = Search(x_ND, given.only, THRESHOLD).run(ROUNDS)
    recall = found(label_N, group_N) / can
    print(f"{given.only}: {seconds:.1f} s, recall {recall:.4f}; exact {exact and round(exact, 1)} s, {exact_found}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory until here {peak:.2f} GB")
    if given.only == "lists" and not given.no_exact:
        threshold_at = calibrated(x_ND, group_N)
        for rate in (0.01, 0.001):
            threshold = threshold_at(rate)
            gone, doubled = lost(x_ND, group_N, threshold, Search(x_ND, "lists", threshold).edges, 4)
            said = f"{gone:,} originals lost, {doubled:,} copies kept"
            print(f"calibrated to {rate:g} false merges an image, at {threshold:.3f}: {said}", flush=True)
    if given.components:
        components_at(given.components * 5 // 6, given.components)
    if given.faiss:  # it brings a second OpenMP, which is best kept from ours
        again = [sys.executable, __file__, "--images", str(images), "--only", "faiss"]
        subprocess.run(again, check=True)
    settings = {"images": images, "channels": CHANNELS, "threshold": THRESHOLD, "rounds": ROUNDS, "peak_gb": peak}
    print(json.dumps([
        {"name": "join_recall", "ours": recall, "rival": 1.0, "ratio": recall, "unit": "share of removable copies",
         "settings": settings},
        {"name": "join_time", "ours": seconds, "rival": exact, "ratio": exact and exact / seconds, "unit": "s",
         "settings": settings},
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
