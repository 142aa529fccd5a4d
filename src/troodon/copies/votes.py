"""Images that share local features, without comparing all with all: candidates for a closer look.

Descriptors of the same place differ in a few of their 256 bits. Each table hashes some bits, drawn once (locality
sensitive hashing, Indyk and Motwani, 1998); images whose descriptors fall into one bucket get a vote. Every bucket is
bounded: of a large one, as that of a logo, only members near one another in order are paired.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from troodon.copies.hashes import near_hashes
from troodon.copies.local_features import SavedFeatures

# Shape suffixes: M descriptors, P pairs.

TABLES = 8
PER_IMAGE = 200  # descriptors that vote, of an image and of its mirror image
BASE_BITS = 26  # hashed bits for one image; each doubling of the images takes one more
MAX_BITS = 60
PART_BITS = 12  # hashed bits that say in which part of its table a descriptor is
IMAGES_PER_PART = 50_000  # of a table that are held in memory, on average: about 1.2 GB
IMAGES_PER_BLOCK = 64_000  # whose votes are added up at a time
MAX_BUCKET = 64  # members that are all paired
NEIGHBOURS = 8  # of a member of a larger bucket
AS_IS_OR_MIRRORED = -1  # the orientation of a pair found by its vectors
MIRRORED = 4  # the orientation of a mirror image; points find how it is turned
MAX_RADIUS = 8  # bits in which perceptual hashes of candidates differ; fewer among more images


class Pairs(NamedTuple):
    """Candidates: images i < j, the orientation of i (see verify.py) in which they are alike, and their votes."""

    i_P: ndarray  # int64
    j_P: ndarray  # int64
    orientation_P: ndarray  # int8
    votes_P: ndarray  # int64

    @staticmethod
    def concatenate(parts: "Iterable[Pairs]") -> "Pairs":
        return Pairs(*(np.concatenate(column) for column in zip(*(_NONE, *parts))))

    def take(self, chosen: ndarray) -> "Pairs":
        return Pairs(*(column[chosen] for column in self))


_NONE = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int8), np.zeros(0, np.int64))


def hashed_bits(images: int) -> int:
    """The number of bits for which the number of accidental votes of an image does not depend on their number."""
    return int(min(MAX_BITS, BASE_BITS + np.ceil(np.log2(max(images, 1)))))


def vote(
    features: SavedFeatures, active_N: ndarray, first_benchmark: int, table: int, part: int = 0, parts: int = 1
) -> Pairs:
    """The votes of one of TABLES hash tables; of the `parts` parts of its keys, one.

    `active_N` (bool) chooses images. Those from `first_benchmark` on are not compared with one another. Pairs come in
    the order of i, j and orientation, and a pair may come from several parts.
    """
    key_M, image_M, mirrored_M = _hashed(features, active_N, first_benchmark, table, part, parts)
    order = np.argsort(key_M, kind="stable")
    key_M, image_M, mirrored_M = key_M[order], image_M[order], mirrored_M[order]
    starts = np.flatnonzero(np.r_[True, key_M[1:] != key_M[:-1]][: len(key_M)])
    sizes = np.diff(np.r_[starts, len(key_M)])
    left, right = _paired(starts, sizes)
    # Two mirror images have the same votes as their originals. Mirrored or not, the earlier image is the left one.
    ok = ~(mirrored_M[left] & mirrored_M[right]) & (image_M[left] != image_M[right])
    left, right = left[ok], right[ok]
    i_P, j_P = image_M[left], image_M[right]
    orientation_P = np.where(mirrored_M[left] | mirrored_M[right], MIRRORED, 0).astype(np.int8)
    i_P, j_P = np.minimum(i_P, j_P), np.maximum(i_P, j_P)
    ok = i_P < first_benchmark
    return _count(Pairs(i_P[ok], j_P[ok], orientation_P[ok], np.ones(int(ok.sum()), np.int64)))


def _hashed(
    features: SavedFeatures, active_N: ndarray, first_benchmark: int, table: int, part: int, parts: int
) -> tuple[ndarray, ndarray, ndarray]:
    """Keys (M,) uint64 of the descriptors that vote, the image of each, and whether it is of the mirror image."""
    bits = np.random.default_rng(table).permutation(256)[: hashed_bits(int(active_N.sum()))]
    part_bits = bits[:PART_BITS]  # fewer to compute than the key, which only the descriptors of this part need
    keys, images, mirrors = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    for number in range(len(features.folders)):
        _, descriptor_N2K32, count_N2, *_ = features.load(number)
        start = number * features.size
        rows = np.flatnonzero(active_N[start : start + len(count_N2)])
        for mirrored in (0, 1):
            count_R = np.minimum(count_N2[rows, mirrored].astype(np.int64), PER_IMAGE)
            votes_RK = np.arange(PER_IMAGE) < count_R[:, None]
            chosen_M32 = descriptor_N2K32[rows, mirrored, :PER_IMAGE][votes_RK]
            image_M = np.repeat(start + rows, count_R)
            if parts > 1:
                mine_M = hash_keys(chosen_M32, part_bits) % np.uint64(parts) == part
                chosen_M32, image_M = chosen_M32[mine_M], image_M[mine_M]
            keys.append(hash_keys(chosen_M32, bits))
            images.append(image_M)
            mirrors.append(np.full(len(image_M), bool(mirrored)))
    return np.concatenate(keys), np.concatenate(images), np.concatenate(mirrors)


def hash_keys(descriptor_M32: ndarray, bits: ndarray) -> ndarray:
    """These bits, at most 64, of each descriptor (M, 32) uint8 as one number: (M,) uint64."""
    values = np.arange(256, dtype=np.uint64)
    share_BV = np.zeros((32, 256), np.uint64)  # what each value of each byte adds
    for position, bit in enumerate(bits.tolist()):
        share_BV[bit // 8] |= ((values >> np.uint64(7 - bit % 8)) & np.uint64(1)) << np.uint64(position)
    key_M = np.zeros(len(descriptor_M32), np.uint64)
    for byte in np.unique(bits // 8).tolist():
        key_M |= share_BV[byte][descriptor_M32[:, byte]]
    return key_M


def _paired(starts: ndarray, sizes: ndarray) -> tuple[ndarray, ndarray]:
    """Positions of both members of each pair within buckets: all pairs, or in large buckets those of neighbours."""
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for size in np.unique(sizes[(sizes > 1) & (sizes <= MAX_BUCKET)]).tolist():
        first = starts[sizes == size][:, None]
        a, b = np.triu_indices(size, 1)
        left.append((first + a).ravel())
        right.append((first + b).ravel())
    for start, size in zip(starts[sizes > MAX_BUCKET].tolist(), sizes[sizes > MAX_BUCKET].tolist()):
        for distance in range(1, NEIGHBOURS + 1):
            positions = np.arange(start, start + size - distance)
            left.append(positions)
            right.append(positions + distance)
    return np.concatenate(left), np.concatenate(right)


def _count(pairs: Pairs) -> Pairs:
    """Add up the votes of each pair, in the order of (i, j, orientation)."""
    order = np.lexsort((pairs.orientation_P, pairs.j_P, pairs.i_P))
    i_P, j_P, orientation_P, votes_P = pairs.take(order)
    changes = (np.diff(i_P) != 0) | (np.diff(j_P) != 0) | (np.diff(orientation_P) != 0)
    starts = np.flatnonzero(np.r_[True, changes][: len(i_P)])
    total_P = np.add.reduceat(votes_P, starts) if len(starts) else votes_P
    return Pairs(i_P[starts], j_P[starts], orientation_P[starts], total_P)


def add_votes(parts: Iterable[Pairs], least: int) -> Pairs:
    """Add up the votes of each pair of all parts, and take the pairs with `least` votes."""
    pairs = _count(Pairs.concatenate(parts))
    return pairs.take(pairs.votes_P >= least)


def most_voted(pairs: Pairs, limit: int, first_benchmark: int) -> tuple[Pairs, int]:
    """The pairs that are among the `limit` best of either image, by votes.

    Benchmark images do not choose, since any number of images may resemble one; each other image chooses as many of
    them as of the others. Also returns the number of pairs that are left out.
    """
    is_benchmark_P = pairs.j_P >= first_benchmark
    rank_P = np.full(len(pairs.i_P), limit)
    for of_kind in (is_benchmark_P, ~is_benchmark_P):
        image_R = np.r_[pairs.i_P[of_kind], pairs.j_P[of_kind]]
        other_R = np.r_[pairs.j_P[of_kind], pairs.i_P[of_kind]]
        rank_R = _rank(image_R, np.tile(pairs.votes_P[of_kind], 2), other_R)
        rank_R[image_R >= first_benchmark] = limit
        rank_P[of_kind] = rank_R.reshape(2, -1).min(0)
    chosen = pairs.take(rank_P < limit)
    return chosen, len(pairs.i_P) - len(chosen.i_P)


def alike_hashes(features: SavedFeatures, active_N: ndarray, first_benchmark: int) -> Pairs:
    """Pairs of active images whose perceptual hashes are near in any of eight orientations; their votes are the bits in
    which they agree."""
    parts = [features.load(number)[-1] for number in range(len(features.folders))]
    hash_N8 = np.concatenate(parts) if parts else np.zeros((0, 8), np.uint64)
    rows = np.flatnonzero(active_N & (hash_N8 != 0).any(1))
    hash_R, row_R = hash_N8[rows].ravel(), np.repeat(rows, 8)
    orientation_R = np.tile(np.arange(8, dtype=np.int8), len(rows))
    radius = int(np.clip(64 // max(1, np.ceil(np.log2(max(2, len(hash_R))))) - 1, 1, MAX_RADIUS))
    found = []
    for a, b, score in near_hashes(hash_R, radius):
        for i, j in ((a, b), (b, a)):  # i in some orientation, j as it is
            ok = (orientation_R[j] == 0) & (row_R[i] < row_R[j]) & (row_R[i] < first_benchmark)
            found.append(Pairs(row_R[i[ok]], row_R[j[ok]], orientation_R[i[ok]], np.round(score[ok] * 64).astype(int)))
    return Pairs.concatenate(found)


def _rank(group_P: ndarray, votes_P: ndarray, tie_P: ndarray) -> ndarray:
    """The rank of each pair among those of its group, by votes: (P,) int64, 0 for the best."""
    order = np.lexsort((tie_P, -votes_P, group_P))
    starts = np.flatnonzero(np.r_[True, np.diff(group_P[order]) != 0][: len(order)])
    rank_P = np.empty(len(order), np.int64)
    rank_P[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return rank_P
