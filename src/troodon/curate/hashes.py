"""Perceptual hashes: 64 bits that survive a resize or a resave, found without a network.

A bit for each of the 64 lowest frequencies of the cosine transform of 32 by 32 grey pixels, whether it is above their
median. Copies differ in a few bits; pairs within a radius r are found by cutting hashes into r + 1 bands, one of which
they must share. A picture of one colour has none.
"""

from collections.abc import Iterator

import numpy as np
from numpy import ndarray
from PIL import Image
from scipy.fft import dct

SIDE, KEPT = 32, 8
FLAT = 1.0  # mean size of the coefficients, in levels of 255, below which there is nothing to see
CROWD = 1000  # images that share a band, above which pairs are sought in blocks
_BASIS = dct(np.eye(SIDE), norm="ortho", axis=0)[:KEPT].astype(np.float32)


def perceptual_hash(image_HWC: ndarray) -> int | None:
    """64 bits of uint8 pixels (H, W, C) in grey or colour; None for a picture of one colour."""
    channels = image_HWC.shape[2]
    picture = Image.fromarray(image_HWC[..., 0] if channels < 3 else image_HWC[..., :3])
    small = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    low = (_BASIS @ small @ _BASIS.T).ravel()
    low[0] = 0  # the mean says nothing of what is to be seen
    if np.abs(low).mean() < FLAT * SIDE / KEPT:
        return None
    return int(np.packbits(low > np.median(low)).view(">u8")[0])


def near_hashes(hash_N: ndarray, radius: int) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
    """Edges i < j between hashes (N,) uint64 that differ in at most `radius` bits; the score is 1 - bits / 64."""
    bands = radius + 1
    edges = np.linspace(0, 64, bands + 1).astype(int)
    for at in range(bands):
        shift, width = np.uint64(edges[at]), edges[at + 1] - edges[at]
        band_N = (hash_N >> shift) & np.uint64(2**width - 1)
        order = np.argsort(band_N, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(band_N[order]) > 0][: len(order)])
        for members in np.split(order, starts[1:]):
            for start in range(0, len(members) if len(members) > 1 else 0, CROWD):
                ours = members[start : start + CROWD]
                bits = np.bitwise_count(hash_N[ours][:, None] ^ hash_N[members[start:]][None])
                i, j = np.nonzero(bits <= radius)
                i, j, bits = ours[i], members[start:][j], bits[i, j]
                once = i < j
                for before in range(at):  # a pair that shares an earlier band came from there
                    low, high = np.uint64(edges[before]), edges[before + 1] - edges[before]
                    once &= (((hash_N[i] ^ hash_N[j]) >> low) & np.uint64(2**high - 1)) != 0
                yield i[once], j[once], (1 - bits[once] / 64).astype(np.float32)
