"""Rates of one core in each stage of curation: those behind docs/scale.md.

OMP_NUM_THREADS=1 python benchmarks/rates.py [--quick] [--record]

read       JPEGs of 640 x 480 through the stage `embed` with a network that costs nothing: decoded, resized to 224,
           hashed twice; `rival` is decoding alone. Images a second
hashes     pairs of perceptual hashes compared, in bands as full as those of 1.3 billion images, 490 each; `rival` is
           the bare comparison. Pairs a second
join       cosines above a threshold, by exact tiles, of vectors of 512 channels: the cost of benchmarks for a pool
assign     the nearest of 8,192 centroids, 1,280 channels
retrieve   the nearest 4 of 65,536, 1,280 channels. These three in products and sums a second; `rival` is a bare
           matrix product of the same size

The process binds itself to one core, where the system allows it; OMP_NUM_THREADS=1 is needed all the same.
"""

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from measure import argument_parser, finish, median_seconds, result
from troodon.copies.hashes import near_hashes
from troodon.curate.embed import embed
from troodon.images.decode import decode
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.search.exact import iter_pairs_above, l2_normalise, top_k
from troodon.search.inverted_lists import nearest_centroids

BAND_SIZE = 490  # images that share a band of their hashes, of 1.3 billion


def photograph(random: np.random.Generator) -> bytes:
    """A picture with as much detail as a photograph: a JPEG of about 100 kB."""
    sizes = [(640 // side, 480 // side) for side in (160, 40, 10, 2)]
    layers = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    resized = [np.asarray(layer.resize((640, 480), Image.Resampling.BICUBIC), np.float32) for layer in layers]
    pixels = sum(weight * layer for weight, layer in zip((0.4, 0.3, 0.2, 0.1), resized))
    file = io.BytesIO()
    Image.fromarray(np.uint8(pixels)).save(file, "JPEG", quality=90)
    return file.getvalue()


def read(images: int, rounds: int) -> dict:
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="troodon-rates-") as folder:
        home = Path(folder)
        (home / "images").mkdir()
        for i in range(images):
            (home / "images" / f"{i}.jpg").write_bytes(photograph(random))
        index, numbers = open_source(home / "images"), iter(range(100))
        network = ViTConfig(dim=32, depth=1, heads=1, patch=56, grid=4)
        backbone = Backbone.random(network, Preprocessing(resize=224, crop=224))

        def embed_all() -> None:
            embed(backbone, index, home / f"embeddings-{next(numbers)}", batch=64, threads=1)

        def decode_all() -> None:
            for row in range(images):
                decode(index.read(row))

        size = sum(len(index.read(row)) for row in range(images)) / images
        ours, rival = (images / s for s in median_seconds([embed_all, decode_all], rounds))
    return result("read", ours, rival, "images a second", more_is_better=True, images=images, bytes=size)


def hashes(images: int, rounds: int) -> dict:
    random = np.random.default_rng(0)
    bands = random.integers(0, max(1, images // BAND_SIZE), (3, images)).astype(np.uint64)
    hash_N = bands[0] | bands[1] << np.uint64(21) | bands[2] << np.uint64(42)
    pairs = 3 * images * min(images, BAND_SIZE) / 2
    square = random.integers(0, 2**63, (2, BAND_SIZE, 1)).astype(np.uint64)

    def ours() -> None:
        for _ in near_hashes(hash_N, 2):
            pass

    def compare() -> None:
        for _ in range(3 * images // BAND_SIZE // 2):
            np.nonzero(np.bitwise_count(square[0] ^ square[1].T) <= 2)

    rates = (pairs / s for s in median_seconds([ours, compare], rounds))
    return result("hashes", *rates, "pairs a second", more_is_better=True, images=images)


def products(name: str, search: Callable, x_QD: np.ndarray, y_ND: np.ndarray, rounds: int) -> dict:
    """A search that compares all of x with all of y, beside their product in blocks of 4,096 rows."""
    x, y = l2_normalise(x_QD), l2_normalise(y_ND)

    def multiply() -> None:
        for p in range(0, len(x), 4096):
            for q in range(0, len(y), 4096):
                x[p : p + 4096] @ y[q : q + 4096].T

    operations = 2 * len(x) * len(y) * x.shape[1]
    rates = (operations / s for s in median_seconds([lambda: search(x_QD, y_ND), multiply], rounds))
    shape = {"rows": len(x), "against": len(y), "channels": x.shape[1]}
    return result(name, *rates, "products and sums a second", more_is_better=True, **shape)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="an eighth of everything, one round: shows that it runs")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # decoding uses a thread of its own
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    divisor, rounds = (8, 1) if arguments.quick else (1, 3)
    random = np.random.default_rng(0)

    def vectors(count: int, channels: int) -> np.ndarray:
        return l2_normalise(random.standard_normal((count // divisor, channels), np.float32)).astype(np.float16)

    def join(x_QD: np.ndarray, y_ND: np.ndarray) -> None:
        for _ in iter_pairs_above(x_QD, 0.45, y_ND):
            pass

    centroids = np.rint(vectors(8192, 1280).astype(np.float32) * 4000)
    finish([
        read(512 // divisor, rounds),
        hashes(BAND_SIZE * 512 // divisor, rounds),
        products("join", join, vectors(8192, 512), vectors(32_768, 512), rounds),
        products("assign", lambda x, y: nearest_centroids(x, y, 1), vectors(8192, 1280), centroids, rounds),
        products("retrieve", lambda x, y: top_k(x, y, 4), vectors(4096, 1280), vectors(65_536, 1280), rounds),
    ], arguments)  # fmt: skip


if __name__ == "__main__":
    main()
