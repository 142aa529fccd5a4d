"""One pass of a backbone for every protocol, against each protocol alone.

    python benchmarks/evaluate.py                      a ViT-S/14 of random weights on 600 made pictures of 224 px
    python benchmarks/evaluate.py --quick              on 48 of 98 px: under a minute on two cores
    python benchmarks/evaluate.py --data PACK --side 98 --compute bf16 --keep FOLDER --sides together knn
                                                       on labelled images, only two of the runs now; the same command
                                                       with other sides continues, and the last one ends with the result

Both sides give the same scores, which is asserted. The time of each protocol on cached features is printed as well.
`--record` appends the result to the records.
"""

import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from measure import argument_parser, finish, result
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


def made_benchmark(folder: Path, count: int, side: int) -> Benchmark:
    """Smooth pictures whose colours are shifted by class."""
    random = np.random.default_rng(0)
    shift = random.normal(0, 30, (CLASSES, 3))
    for i in range(count):
        low = random.integers(40, 216, (7, 7, 3)) + shift[i % CLASSES]
        picture = Image.fromarray(low.clip(0, 255).astype(np.uint8)).resize((side + 32, side), Image.Resampling.BICUBIC)
        path = folder / f"class_{i % CLASSES}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)
    return Benchmark("made", "label", open_source(str(folder)))


def open_benchmark(source: str) -> Benchmark:
    return Benchmark(Path(source).name, "label", open_source(source))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="few small pictures: under a minute")
    parser.add_argument("--images", type=int, default=600, help="number of made pictures")
    parser.add_argument("--data", help="labelled images in place of made ones")
    parser.add_argument("--side", type=int, default=224, help="pixels on the side of the network's input")
    parser.add_argument("--compute", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="the runs to time now")
    parser.add_argument("--keep", type=Path, help="folder that keeps the times")
    arguments = parser.parse_args()
    images, side = (48, 98) if arguments.quick else (arguments.images, arguments.side)
    suite._draw_pictures = lambda *_: None  # drawing pictures runs the network as well, and each side would draw them
    config = replace(SUITES["mine"], protocols=PROTOCOLS, ks=(5, 10), resamples=200)
    backbone = Backbone.random(replace(SMALL, layer_scale=1.0), Preprocessing(round(side * 8 / 7), side))
    if arguments.compute != "fp32":
        backbone = backbone.optimized(arguments.compute)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        made = Path(scratch) / "images"
        benchmark = open_benchmark(arguments.data) if arguments.data else made_benchmark(made, images, side)
        backbone.features(torch.zeros(8, 3, side, side))  # warm-up
        for name in arguments.sides:
            if not (folder / f"{name}.json").exists():
                protocols = PROTOCOLS if name == "together" else (name.rpartition(" ")[2],)
                for path in (folder / name, *([folder / "cache"] if name == "together" else [])):
                    shutil.rmtree(path, ignore_errors=True)  # of a side that was stopped before its time was kept
                cache = folder / "cache" if name == "together" or "kept" in name else None
                start = time.monotonic()
                settings = replace(config, protocols=protocols)
                scores = evaluate([backbone], [benchmark], settings, folder / name, reader=Reader(cache=cache))
                seconds = time.monotonic() - start
                write_json(folder / f"{name}.json", [seconds, [(s["protocol"], round(s["value"], 3)) for s in scores]])
                print(f"  {name:<16} {seconds:7.2f} s", file=sys.stderr)
        measured = {n: read_json(folder / f"{n}.json") for n in SIDES if (folder / f"{n}.json").exists()}
    if missing := [name for name in ("together", *PROTOCOLS) if name not in measured]:
        print(f"  not timed yet: {', '.join(missing)}", file=sys.stderr)
        return
    for name in measured:
        protocol = name.rpartition(" ")[2]
        expected = [score for score in measured["together"][1] if name == "together" or score[0] == protocol]
        assert measured[name][1] == expected, measured
    together, separately = measured["together"][0], sum(measured[protocol][0] for protocol in PROTOCOLS)
    count = len(benchmark.images)
    print(f"  {count} images of {side} px, {arguments.compute}, {torch.get_num_threads()} threads", file=sys.stderr)
    for protocol in PROTOCOLS:
        cached = measured.get(f"kept {protocol}")
        cached = f", {cached[0]:6.2f} s with cached features" if cached else ""
        print(f"  {protocol:<10} {measured[protocol][0]:7.2f} s alone{cached}", file=sys.stderr)
    network = "ViT-S/14, random"
    finish([result("suite_one_pass", together, separately, "s", images=count, side=side, network=network,
                 compute=arguments.compute, protocols=list(PROTOCOLS))], arguments)  # fmt: skip


if __name__ == "__main__":
    main()
