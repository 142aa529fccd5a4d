"""One pass of a backbone for every protocol, against each protocol alone.

    python benchmarks/evaluate.py                      a ViT-S/14 of random weights on 600 made pictures of 224 px
    python benchmarks/evaluate.py --quick              on 48 of 98 px: under a minute on two cores
    python benchmarks/evaluate.py --data PACK --side 98 --compute bf16 --keep FOLDER --sides together knn
                                                       on labelled images, two of the sides now; the same command with
                                                       other sides goes on, and the last one ends with the line

Both sides give the same scores, which is asserted. What a protocol costs when the features are there is told besides.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from measure import finish, line
from troodon.evaluate import suite
from troodon.evaluate.config import SUITES, Protocol
from troodon.evaluate.features import Reader
from troodon.evaluate.sets.benchmark import Benchmark
from troodon.evaluate.suite import evaluate
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import SMALL, Preprocessing
from troodon.run import read_json, write_json

PROTOCOLS: tuple[Protocol, ...] = ("knn", "linear", "logistic", "kmeans")
SIDES = ["together", *PROTOCOLS, *(f"kept {protocol}" for protocol in PROTOCOLS)]
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


def open_labels(place: str) -> Benchmark:
    return Benchmark(Path(place).name, "label", open_source(place))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few small pictures: under a minute")
    parser.add_argument("--images", type=int, default=600, help="pictures that are made")
    parser.add_argument("--data", help="labelled images in their place")
    parser.add_argument("--side", type=int, default=224, help="pixels that the network sees")
    parser.add_argument("--compute", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="what is timed now")
    parser.add_argument("--keep", type=Path, help="a folder for what has been timed")
    asked = parser.parse_args()
    images, side = (48, 98) if asked.quick else (asked.images, asked.side)
    suite._draw = lambda *_: None  # pictures run the network too, and would be drawn by every side
    config = replace(SUITES["mine"], protocols=PROTOCOLS, ks=(5, 10), resamples=200)
    backbone = Backbone.random(replace(SMALL, layer_scale=1.0), Preprocessing(round(side * 8 / 7), side))
    if asked.compute != "fp32":
        backbone = backbone.faster(asked.compute)
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.keep or Path(scratch)
        benchmark = open_labels(asked.data) if asked.data else pictures(Path(scratch) / "images", images, side)
        backbone.features(torch.zeros(8, 3, side, side))  # warm
        for name in asked.sides:
            if not (folder / f"{name}.json").exists():
                protocols = PROTOCOLS if name == "together" else (name.rpartition(" ")[2],)
                for left in (folder / name, *([folder / "cache"] if name == "together" else [])):
                    shutil.rmtree(left, ignore_errors=True)  # of a side that was ended before its time was kept
                cache = folder / "cache" if name == "together" or "kept" in name else None
                start = time.monotonic()
                only = replace(config, protocols=protocols)
                scores = evaluate([backbone], [benchmark], only, folder / name, reader=Reader(cache=cache))
                seconds = time.monotonic() - start
                write_json(folder / f"{name}.json", [seconds, [(s["protocol"], round(s["value"], 3)) for s in scores]])
                print(f"  {name:<16} {seconds:7.2f} s", file=sys.stderr)
        found = {n: read_json(folder / f"{n}.json") for n in SIDES if (folder / f"{n}.json").exists()}
    if missing := [name for name in ("together", *PROTOCOLS) if name not in found]:
        print(f"  to be timed yet: {', '.join(missing)}", file=sys.stderr)
        return
    for name in found:
        said = [score for score in found["together"][1] if name == "together" or score[0] == name.rpartition(" ")[2]]
        assert found[name][1] == said, found
    together, separately = found["together"][0], sum(found[protocol][0] for protocol in PROTOCOLS)
    count = len(benchmark.images)
    print(f"  {count} images of {side} px, {asked.compute}, {torch.get_num_threads()} threads", file=sys.stderr)
    for protocol in PROTOCOLS:
        kept = f", {found[f'kept {protocol}'][0]:6.2f} s where features are kept" if f"kept {protocol}" in found else ""
        print(f"  {protocol:<10} {found[protocol][0]:7.2f} s alone{kept}", file=sys.stderr)
    network = "ViT-S/14, random"
    finish([line("suite_one_pass", together, separately, "s", images=count, side=side, network=network,
                 compute=asked.compute, protocols=list(PROTOCOLS))])  # fmt: skip


if __name__ == "__main__":
    main()
