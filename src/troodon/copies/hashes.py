"""Perceptual hashes: 64 bits that survive resizing and saving again, computed without a network.

The cosine transform of 32 by 32 grey pixels gives one bit for each of its 64 lowest frequencies: whether the
coefficient is above their median. Copies differ in a few bits. To find pairs within a radius r, hashes are cut into
r + 1 bands, of which such a pair shares at least one. A picture of one colour has no hash.
"""

from collections.abc import Iterator

import numpy as np
from numpy import ndarray
from PIL import Image
from scipy.fft import dct

SIDE, FREQUENCIES = 32, 8
MIN_COEFFICIENT = 1.0  # minimum mean size of the coefficients, in levels of 255; below it a picture is of one colour
BLOCK = 1000  # images with the same band that are compared in one block
_BASIS = dct(np.eye(SIDE), norm="ortho", axis=0)[:FREQUENCIES].astype(np.float32)


def perceptual_hash(image_HWC: ndarray) -> int | None:
    """Compute 64 bits from uint8 pixels (H, W, C) in grey or colour; None for a picture of one colour."""
    channels = image_HWC.shape[2]
    picture = Image.fromarray(image_HWC[..., 0] if channels < 3 else image_HWC[..., :3])
    small = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    low = (_BASIS @ small @ _BASIS.T).ravel()
    low[0] = 0  # the mean does not describe the content
    if np.abs(low).mean() < MIN_COEFFICIENT * SIDE / FREQUENCIES:
        return None
    return int(np.packbits(low > np.median(low)).view(">u8")[0])


def near_hashes(hash_N: ndarray, radius: int) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
    """Yield edges i < j between hashes (N,) uint64 that differ in at most `radius` bits; the score is 1 - bits / 64."""
    bands = radius + 1
    edges = np.linspace(0, 64, bands + 1).astype(int)
    for band in range(bands):
        shift, width = np.uint64(edges[band]), edges[band + 1] - edges[band]
        band_N = (hash_N >> shift) & np.uint64(2**width - 1)
        order = np.argsort(band_N, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(band_N[order]) > 0][: len(order)])
        for members in np.split(order, starts[1:]):
            for start in range(0, len(members) if len(members) > 1 else 0, BLOCK):
                block = members[start : start + BLOCK]
                bits = np.bitwise_count(hash_N[block][:, None] ^ hash_N[members[start:]][None])
                i, j = np.nonzero(bits <= radius)
                i, j, bits = block[i], members[start:][j], bits[i, j]
                is_new = i < j
                for earlier in range(band):  # pairs that share an earlier band have been yielded
                    shift, width = np.uint64(edges[earlier]), edges[earlier + 1] - edges[earlier]
                    is_new &= (((hash_N[i] ^ hash_N[j]) >> shift) & np.uint64(2**width - 1)) != 0
                yield i[is_new], j[is_new], (1 - bits[is_new] / 64).astype(np.float32)
