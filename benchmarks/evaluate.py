"""One pass of a backbone for every protocol, against each protocol alone.

    python benchmarks/evaluate.py                      a ViT-S/14 of random weights on 600 made pictures of 224 px
    python benchmarks/evaluate.py --images 14000       the same on as many (hours on a processor)
    python benchmarks/evaluate.py --quick              on 48 of 98 px: under a minute on two cores

Both sides give the same scores, which is asserted. What a protocol costs when the features are there is told besides.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from troodon.data.benchmarks import Benchmark
from troodon.data.sources import open_source
from troodon.evaluate import suite
from troodon.evaluate.config import SUITES, Protocol
from troodon.evaluate.features import Reader
from troodon.evaluate.suite import evaluate
from troodon.model.backbone import Backbone
from troodon.model.config import SMALL, Preprocessing

PROTOCOLS: tuple[Protocol, ...] = ("knn", "linear", "logistic", "kmeans")
CLASSES = 8


def pictures(folder: Path, count: int, side: int) -> Benchmark:
    """Smooth pictures whose colours lean to those of their class."""
    random = np.random.default_rng(0)
    lean = random.normal(0, 30, (CLASSES, 3))
    for i in range(count):
        small = random.integers(40, 216, (7, 7, 3)) + lean[i % CLASSES]
        picture = Image.fromarray(small.clip(0, 255).astype(np.uint8)).resize(
            (side + 32, side), Image.Resampling.BICUBIC
        )
        path = folder / f"class_{i % CLASSES}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)
    return Benchmark("made", "label", open_source(str(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few small pictures: under a minute")
    parser.add_argument("--images", type=int, default=600)
    asked = parser.parse_args()
    images, side = (48, 98) if asked.quick else (asked.images, 224)
    suite._draw = lambda *_: None  # pictures run the network too, and would be drawn four times by those alone
    config = replace(SUITES["mine"], protocols=PROTOCOLS, ks=(5, 10), resamples=200)
    backbone = Backbone.random(replace(SMALL, layer_scale=1.0), Preprocessing(round(side * 8 / 7), side))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        benchmark = pictures(folder / "images", images, side)
        with torch.inference_mode():
            backbone.features(torch.zeros(8, 3, side, side))  # warm

        def timed(name: str, protocols: tuple[Protocol, ...], cache: Path | None = None) -> tuple[float, list[dict]]:
            start = time.monotonic()
            only = replace(config, protocols=protocols)
            scores = evaluate([backbone], [benchmark], only, folder / name, reader=Reader(cache=cache))
            return time.monotonic() - start, scores

        alone = {protocol: timed(f"alone-{protocol}", (protocol,)) for protocol in PROTOCOLS[:2]}
        together, scores = timed("together", PROTOCOLS, folder / "cache")
        alone |= {protocol: timed(f"alone-{protocol}", (protocol,)) for protocol in PROTOCOLS[2:]}
        again = {protocol: timed(f"again-{protocol}", (protocol,), folder / "cache")[0] for protocol in PROTOCOLS}
    kept = [(s["protocol"], round(s["value"], 3)) for s in scores]
    assert kept == [(s["protocol"], round(s["value"], 3)) for _, found in alone.values() for s in found], kept
    separately = sum(seconds for seconds, _ in alone.values())
    threads = torch.get_num_threads()
    print(f"  {images} images of {side} px, {threads} threads, torch {torch.__version__}", file=sys.stderr)
    for protocol in PROTOCOLS:
        said = f"{alone[protocol][0]:7.2f} s alone, {again[protocol]:6.2f} s where the features are kept"
        print(f"  {protocol:<10} {said}", file=sys.stderr)
    print(f"  together   {together:7.2f} s, one after another {separately:.2f} s", file=sys.stderr)
    settings = {"images": images, "side": side, "network": "ViT-S/14, random", "protocols": list(PROTOCOLS),
                "threads": threads}  # fmt: skip
    row = {"name": "suite_one_pass", "ours": round(together, 3), "rival": round(separately, 3),
           "ratio": round(separately / together, 3), "unit": "s", "settings": settings}  # fmt: skip
    print(json.dumps([row]))


if __name__ == "__main__":
    main()
