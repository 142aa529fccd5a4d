"""Searches for near-duplicates, on vectors with planted copies: recall, time and memory of each.

    python benchmarks/curate.py [--quick] [--images 200000] [--faiss] [--components 50000000] [--no-exact] [--record]

Vectors of 384 channels: concepts of very different sizes, a fifth of the images in groups of copies, most of 2 to 4,
some of up to 50, eight of up to 2,000, with cosines from 0.55 to 0.995. Two rounds of inverted lists are compared with
the exact join of the same vectors in the same process, at a cosine of 0.6, where many pairs are near the threshold. A
copy is found if it is joined to another image of its group. Recall is relative to exact search within each group.
Originals are lost where no image of a group is kept, at calibrated thresholds.
`join_recall` is against exact search (`rival` 1), `join_time` against the exact join.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy import ndarray

from measure import argument_parser, finish, result

CHANNELS, THRESHOLD, ROUNDS = 384, 0.6, 2


def planted(images: int, seed: int = 0, channels: int = CHANNELS) -> tuple[ndarray, ndarray]:
    """Unit vectors (N, D) float16, and the group of copies (N,) of each; an image without copies is a group of one."""
    random, scale = np.random.default_rng(seed), images / 200_000
    spectrum = (np.arange(1, channels + 1) ** -0.35).astype(np.float32)  # as in features: few directions hold most
    viral = [max(2, round(s * min(1, scale))) for s in (100, 150, 200, 300, 500, 800, 1200, 2000)]
    groups = [  # sizes, smallest and largest cosine
        (random.integers(2, 5, round(9000 * scale)), 0.55, 0.99),
        (random.integers(5, 50, round(200 * scale)), 0.70, 0.99),
        (np.repeat(viral, max(1, round(scale))), 0.85, 0.995),
    ]
    concepts = max(10, round(3000 * scale))
    centre = _normalise(random.standard_normal((concepts, channels), np.float32) * spectrum)
    weight = np.minimum(random.zipf(1.6, concepts).astype(float), 200)

    def draw_images(count: int) -> ndarray:
        concept = random.choice(concepts, count, p=weight / weight.sum())
        cosine = random.uniform(0.45, 0.70, (count, 1)).astype(np.float32)
        noise = _normalise(random.standard_normal((count, channels), np.float32) * spectrum)
        return _normalise(cosine * centre[concept] + np.sqrt(1 - cosine**2) * noise)

    x_ND, group_N = np.empty((images, channels), np.float16), np.arange(images)
    order, start = random.permutation(images), 0
    for sizes, low, high in groups:
        for size, original in zip(sizes.tolist(), draw_images(len(sizes))):
            cosine = random.uniform(low, high, (size, 1)).astype(np.float32)
            cosine[0] = 1
            noise = random.standard_normal((size, channels), np.float32) * spectrum
            noise = _normalise(noise - (noise @ original)[:, None] * original)
            x_ND[order[start : start + size]] = cosine * original + np.sqrt(1 - cosine**2) * noise
            group_N[order[start : start + size]] = order[start]
            start += size
    for first in range(start, images, 50_000):
        rest = order[first : first + 50_000]
        x_ND[rest] = draw_images(len(rest))
    return x_ND, group_N


def _normalise(x_ND: ndarray) -> ndarray:
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def found_copies(label_N: ndarray, group_N: ndarray) -> int:
    """Copies joined to their groups: images minus the pieces into which the components divide the groups."""
    return len(label_N) - len(np.unique(label_N * len(label_N) + group_N))


def findable_copies(x_ND: ndarray, group_N: ndarray, threshold: float) -> int:
    """The copies that are found if all pairs within each group are compared."""
    from troodon.curate.dedup import components
    from troodon.search.exact import iter_pairs_above

    order = np.argsort(group_N, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group_N[order]) > 0])
    total = 0
    for members in np.split(order, starts[1:]):
        if len(members) > 1:
            total += len(members) - len(np.unique(components(len(members), iter_pairs_above(x_ND[members], threshold))))
    return total


def lost_and_kept(x_ND: ndarray, group_N: ndarray, threshold: float, edges: Callable, recheck: int) -> tuple[int, int]:
    """Groups of which no image is kept, and copies kept beside another image of their group, after two rounds."""
    from troodon.curate.dedup import near_duplicates

    none = np.zeros(len(x_ND), bool)
    verdict = near_duplicates(
        x_ND, threshold, np.arange(len(x_ND)), none, none, recheck, find_edges=edges, rounds=ROUNDS
    )
    kept = group_N[verdict.cause_N < 0]
    return len(np.unique(group_N)) - len(np.unique(kept)), len(kept) - len(np.unique(kept))


class Search:
    """A timed search by one method; it joins near pairs over one or more rounds."""

    def __init__(self, x_ND: ndarray, method: str, threshold: float):
        self.x_ND, self.method, self.threshold = x_ND, method, threshold

    def edges(self, rows: ndarray, round_number: int):
        from troodon.search.join import near_pairs

        x_ND = self.x_ND if len(rows) == len(self.x_ND) else self.x_ND[rows]
        return near_pairs(x_ND, self.threshold, self.method, seed=round_number)

    def run(self, rounds: int) -> tuple[float, ndarray]:
        """The seconds taken, and the component of each row."""
        from troodon.curate.dedup import components

        count, start = len(self.x_ND), time.perf_counter()
        label_N, rows = np.arange(count), np.arange(count)
        for round_number in range(rounds):
            edges = ((rows[i], rows[j], score) for i, j, score in self.edges(rows, round_number))
            label_N = components(count, edges, label_N)
            rows = np.unique(label_N)
            elapsed = f"{time.perf_counter() - start:.1f} s"
            print(f"  {self.method}, round {round_number + 1}: {elapsed}, {len(rows):,} remain", flush=True)
        return time.perf_counter() - start, label_N


def calibrate(x_ND: ndarray, group_N: ndarray) -> Callable[[float], float]:
    """The function from false merges per image to the threshold, calibrated on vectors without copies."""
    from troodon.curate.calibrate import threshold_function
    from troodon.search.exact import l2_normalise

    originals = np.random.default_rng(0).permutation(np.unique(group_N))
    sample = l2_normalise(x_ND[originals[:20_000]])
    return threshold_function(sample[:2000], sample, len(originals))


def time_components(nodes: int, edges: int) -> None:
    """Time our connected components, and numba's where it is installed, on random groups."""
    from troodon.curate.dedup import components

    random = np.random.default_rng(0)
    sizes = np.minimum(random.zipf(2.2, nodes // 5), 5000) + 1
    group = np.repeat(np.arange(len(sizes)), sizes)[: nodes // 5]
    first = np.searchsorted(group, group)
    place = random.permutation(nodes)
    later = np.flatnonzero(np.arange(len(group)) != first)
    earlier = first[later] + (random.random(len(later)) * (later - first[later])).astype(np.int64)
    more = random.integers(0, len(later), max(0, edges - len(later)))
    i, j = place[np.r_[later, later[more]]], place[np.r_[earlier, first[later[more]]]]
    order = random.permutation(len(i))
    i, j, expected = i[order], j[order], nodes - len(later)
    del order, more, later, earlier
    parts = ((i[at : at + 5_000_000], j[at : at + 5_000_000], None) for at in range(0, len(i), 5_000_000))
    start = time.perf_counter()
    assert len(np.unique(components(nodes, parts))) == expected
    print(
        f"components: {nodes:,} nodes, {len(i):,} edges: scipy by parts {time.perf_counter() - start:.1f} s, ", end=""
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
    label, start = np.arange(nodes), time.perf_counter()
    union(label, i, j)
    assert len(np.unique(label)) == expected
    print(f"numba {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argument_parser(__doc__, packages=("scipy", "faiss-cpu", "numba"))
    parser.add_argument("--quick", action="store_true", help="20,000 vectors")
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--no-exact", action="store_true", help="skip the exact join: for a million vectors and more")
    parser.add_argument("--faiss", action="store_true", help="also run two rounds of faiss, in a separate process")
    parser.add_argument("--only", choices=("lists", "faiss"), default="lists", help=argparse.SUPPRESS)
    parser.add_argument("--components", type=int, default=0, help="also time the components of so many edges")
    arguments = parser.parse_args()
    images = 20_000 if arguments.quick else arguments.images

    start = time.perf_counter()
    x_ND, group_N = planted(images)
    findable = findable_copies(x_ND, group_N, THRESHOLD)
    print(f"{images:,} x {CHANNELS}, {findable:,} copies; made in {time.perf_counter() - start:.0f} s", flush=True)

    exact_seconds, exact_copies = None, None
    if not arguments.no_exact and arguments.only == "lists":
        exact_seconds, label_N = Search(x_ND, "exact", THRESHOLD).run(1)
        exact_copies = found_copies(label_N, group_N)
    seconds, label_N = Search(x_ND, arguments.only, THRESHOLD).run(ROUNDS)
    recall = found_copies(label_N, group_N) / findable
    exact = f"exact {exact_seconds:.1f} s, {exact_copies:,}" if exact_seconds else "no exact join"
    print(f"{arguments.only}: {seconds:.1f} s, recall {recall:.4f}; {exact}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory until here {peak:.2f} GB")
    if arguments.only == "lists" and not arguments.no_exact:
        threshold_at = calibrate(x_ND, group_N)
        for rate in (0.01, 0.001):
            threshold = threshold_at(rate)
            lost, kept = lost_and_kept(x_ND, group_N, threshold, Search(x_ND, "lists", threshold).edges, 4)
            counts = f"{lost:,} originals lost, {kept:,} copies kept"
            print(f"calibrated to {rate:g} false merges an image, at {threshold:.3f}: {counts}", flush=True)
    if arguments.components:
        time_components(arguments.components * 5 // 6, arguments.components)
    if arguments.faiss:  # it brings a second OpenMP runtime, which must not meet ours
        command = [sys.executable, __file__, "--images", str(images), "--only", "faiss"]
        subprocess.run(command, check=True)
    settings = {"images": images, "channels": CHANNELS, "threshold": THRESHOLD, "rounds": ROUNDS, "peak_gb": peak}
    finish([
        result("join_recall", recall, 1.0, "share of removable copies", more_is_better=True, **settings),
        result("join_time", seconds, exact_seconds, "s", **settings),
    ], arguments)  # fmt: skip


if __name__ == "__main__":
    main()
