"""From files to batches: images a second and core, beside the classical pipeline; sources, start and memory.

    python benchmarks/loader.py [--quick] [--images 64] [--rounds 5] [--files 200000] [--batches 10000] [--parts ...]
                                [--record]

Parts:

    speed     JPEGs of 500 x 375 and of 4000 x 3000 to two crops of 224 and eight of 98 pixels, on one thread: ours with
              simplejpeg and with Pillow, beside the usual pipeline: for each crop, Pillow's random resized crop, flip,
              jitter, grey, blur and solarisation, and floats. Our loader draws the parameters of the colours, and the
              training device applies them to the whole batch; `and colours here` applies them on the same core
    sources   the same images in a folder, tar, zip, Parquet file and list: the same batches, to the bit
    start     a folder of many files: seconds until the first batch
    memory    many batches: growth of the process

Rounds alternate, and medians are reported. `ours` and `rival` are images a second of one core.
"""

import hashlib
import io
import itertools
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from measure import argument_parser, finish, result
from troodon.images import decode as decoder
from troodon.images.sources import open_source
from troodon.views import photometric
from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig
from troodon.views.loader import Loader

CROPS, COLOURS = CropsConfig(), PhotometricConfig()
SIZES = {"500x375": (500, 375), "4000x3000": (4000, 3000)}


def photo(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG with the detail of a photograph: noise of all scales, with a 1 / f spectrum."""
    random_phases = np.random.default_rng(seed)
    low = (min(size[0], 500), min(size[1], 375))
    fy, fx = np.fft.fftfreq(low[1])[:, None], np.fft.rfftfreq(low[0])[None]
    spectrum = 1 / np.maximum(np.hypot(fy, fx), 1 / max(low))
    planes = []
    for _ in range(3):
        phases = np.exp(2j * np.pi * random_phases.random(spectrum.shape)) * spectrum
        plane = np.fft.irfft2(phases, s=(low[1], low[0]))
        planes.append(128 + 45 * plane / plane.std())
    image = Image.fromarray(np.stack(planes, 2).clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


class UsualPipeline:
    """The usual pipeline: each crop by itself, from file to normalised floats."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def batch(self, images: int) -> list[torch.Tensor]:
        views = []
        for path in (self.paths[i % len(self.paths)] for i in range(images)):
            with Image.open(path) as file:
                image = file.convert("RGB")
            scales = [(224, CROPS.global_scale)] * 2 + [(98, CROPS.local_scale)] * CROPS.locals
            for number, (px, scale) in enumerate(scales):
                crop = self.colours(self.crop(image, px, scale), number)
                x_HWC = np.asarray(crop, np.float32) / 255
                views.append((x_HWC - np.float32(COLOURS.mean)) / np.float32(COLOURS.std))
        return [torch.from_numpy(np.ascontiguousarray(x_HWC.transpose(2, 0, 1))) for x_HWC in views]

    def crop(self, image: Image.Image, px: int, scale: tuple[float, float]) -> Image.Image:
        for _ in range(10):
            area = image.width * image.height * random.uniform(*scale)
            aspect = np.exp(random.uniform(*np.log(CROPS.aspect)))
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if w <= image.width and h <= image.height:
                break
        else:
            w = h = min(image.size)
        x, y = random.randint(0, image.width - w), random.randint(0, image.height - h)
        crop = image.crop((x, y, x + w, y + h)).resize((px, px), Image.Resampling.BICUBIC)
        return ImageOps.mirror(crop) if random.random() < CROPS.flip else crop

    def colours(self, crop: Image.Image, number: int) -> Image.Image:
        c = COLOURS
        if random.random() < c.jitter:
            jitter: list[Callable[[Image.Image], Image.Image]] = [
                lambda x: ImageEnhance.Brightness(x).enhance(random.uniform(1 - c.brightness, 1 + c.brightness)),
                lambda x: ImageEnhance.Contrast(x).enhance(random.uniform(1 - c.contrast, 1 + c.contrast)),
                lambda x: ImageEnhance.Color(x).enhance(random.uniform(1 - c.saturation, 1 + c.saturation)),
                self.hue,
            ]
            random.shuffle(jitter)
            for operation in jitter:
                crop = operation(crop)
        if random.random() < c.grey:
            crop = crop.convert("L").convert("RGB")
        if random.random() < c.blurs[min(number, 2)]:
            crop = crop.filter(ImageFilter.GaussianBlur(random.uniform(*c.blur_sigma)))
        if number == 1 and random.random() < c.solarise:
            crop = ImageOps.solarize(crop, 128)
        return crop

    def hue(self, crop: Image.Image) -> Image.Image:
        h, s, v = crop.convert("HSV").split()
        shifted = (np.asarray(h).astype(np.int16) + round(255 * random.uniform(-COLOURS.hue, COLOURS.hue))).astype(
            np.uint8
        )
        return Image.merge("HSV", (Image.fromarray(shifted), s, v)).convert("RGB")


def open_loader(source: object, images: int) -> Loader:
    return Loader(open_source(source), CROPS, COLOURS, MasksConfig(), 14, images, seed=0, threads=1)


def our_pipeline(folder: Path, images: int, *, fast: bool, colours: bool = False) -> Callable[[int], object]:
    """A function that makes the next batch as one worker does; with `colours` it also applies these."""
    loader, step = open_loader(folder, images), itertools.count()

    def batch(images: int) -> object:
        simplejpeg = decoder.simplejpeg
        decoder.simplejpeg = simplejpeg if fast else None
        try:
            partial = loader.load_partial(loader.positions(next(step)))
        finally:
            decoder.simplejpeg = simplejpeg
        if not colours:
            return partial
        numbers_VBP = partial.colours_BVP.numpy().swapaxes(0, 1)
        return [
            photometric.apply(crops.flatten(0, 1), numbers.reshape(-1, numbers.shape[-1]), COLOURS)
            for crops, numbers in ((partial.globals_GBCHW, numbers_VBP[:2]), (partial.locals_VBCHW, numbers_VBP[2:]))
        ]

    return batch


def speed(folder: Path, images: int, rounds: int) -> list[dict]:
    """Images a second of one core, for each pipeline and size of JPEG."""
    results = []
    for name, size in SIZES.items():
        count = images if name == "500x375" else max(8, images // 4)
        home = folder / name
        home.mkdir()
        paths = [home / f"{seed:03d}.jpg" for seed in range(count)]
        for seed, path in enumerate(paths):
            path.write_bytes(photo(size, seed % 8))
        pipelines = {"usual": UsualPipeline(paths).batch, "ours, Pillow": our_pipeline(home, count, fast=False)}
        if decoder.HAS_SIMPLEJPEG:
            pipelines["ours, simplejpeg"] = our_pipeline(home, count, fast=True)
        best = list(pipelines)[-1]
        pipelines["and colours here"] = our_pipeline(home, count, fast=decoder.HAS_SIMPLEJPEG, colours=True)
        seconds: dict[str, list[float]] = {kind: [] for kind in pipelines}
        for round_number in range(rounds + 1):
            for kind, batch in pipelines.items():
                start = time.process_time()
                batch(count)
                if round_number:  # the first is a warm-up
                    seconds[kind].append(time.process_time() - start)
        rate = {kind: count / statistics.median(s) for kind, s in seconds.items()}
        for kind in pipelines:
            print(f"  {name:<10} {kind:<18} {rate[kind]:8.1f} images/s   {rate[kind] / rate['usual']:5.2f} x")
        settings = {"jpeg": name, "pipeline": best, "images": count, "rounds": rounds}
        suffix = "" if name == "500x375" else f"_{name}"
        for title, kind in (("loader_images_per_core", best), ("loader_with_colours", "and colours here")):
            results.append(result(f"{title}{suffix}", rate[kind], rate["usual"], "images/s/core", more_is_better=True,
                                  **settings))  # fmt: skip
    return results


def sources(folder: Path) -> list[dict]:
    """The same images in each kind of source: how many sources give the same batches, to the bit."""
    home = folder / "photos"
    home.mkdir()
    files = {f"{i:02d}.jpg": photo((160, 120), i) for i in range(24)}
    for name, data in files.items():
        (home / name).write_bytes(data)
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with zipfile.ZipFile(folder / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    pq.write_table(pa.table({"image": list(files.values())}), folder / "photos.parquet", row_group_size=7)
    (folder / "photos.txt").write_text("".join(f"photos/{name}\n" for name in files))
    (folder / "photos.csv").write_text("path\n" + "".join(f"photos/{name}\n" for name in files))

    class Dataset:
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, row: int) -> dict:
            return {"image": {"bytes": list(files.values())[row]}}

    from troodon.images.config import PackConfig
    from troodon.images.pack import pack

    pack(open_source(home), folder / "packed", PackConfig(), 1)
    all_sources = [
        home,
        *(folder / f"photos.{e}" for e in ("tar", "zip", "parquet", "txt", "csv")),
        folder / "packed",
        Dataset(),
    ]
    hashes = {}
    for source in all_sources:
        digest = hashlib.sha256()
        batches = open_loader(source, 8).batches(0, torch.device("cpu"))
        for _ in range(4):
            batch = next(batches)
            for x in (batch.globals_GBCHW, batch.locals_VBCHW, batch.masks_NP):
                digest.update(x.numpy().tobytes())
        batches.close()
        hashes[source.name if isinstance(source, Path) else "dataset"] = digest.hexdigest()[:12]
    same = sum(value == hashes["photos"] for value in hashes.values())
    for name, value in hashes.items():
        print(f"  {name:<16} {value}")
    return [result("sources_same_batches", same, len(hashes), "places", more_is_better=True, places=list(hashes),
                   batches=4)]  # fmt: skip


def time_to_start(folder: Path, files: int) -> list[dict]:
    """Seconds to list a folder of so many files, and from its index to the first batch, in a separate process."""
    home, data = folder / "many", photo((160, 120), 0)
    for i in range(files):
        if i % 1000 == 0:
            (home / f"{i // 1000:04d}").mkdir(parents=True)
            first = home / f"{i // 1000:04d}" / "0.jpg"
            first.write_bytes(data)
        else:
            os.link(first, home / f"{i // 1000:04d}" / f"{i % 1000}.jpg")
    code = f"""
import time; start = time.perf_counter()
import torch
from troodon.views.config import *
from troodon.views.loader import Loader
from troodon.images.sources import open_source
loaded = time.perf_counter()
index = open_source({str(home)!r})
listed = time.perf_counter()
loader = Loader(index, CropsConfig(), PhotometricConfig(), MasksConfig(), 14, 64, seed=0)
batches = loader.batches(0, torch.device("cpu"))
next(batches)
print(loaded - start, listed - loaded, time.perf_counter() - listed)
import os; os._exit(0)
"""
    listing = """
import os, sys, time
start = time.perf_counter()
count = sum(len([os.stat(os.path.join(home, f)) for f in files]) for home, _, files in os.walk(sys.argv[1]))
print(time.perf_counter() - start)
"""
    output = [run_python(code) for _ in range(2)][-1]  # the second, when the kernel has cached the folder
    imports, listed, batch = map(float, output.split())
    walk = float(run_python(listing, str(home)))
    print(f"  {files:,} files: imports {imports:.2f} s, listing {listed:.2f} s, first batch {batch:.2f} s")
    print(f"  only os.walk and os.stat: {walk:.2f} s")
    settings = {"files": files, "imports_s": imports, "first_batch_s": batch, "rival": "os.walk and os.stat"}
    return [result("loader_start", listed, walk, "s", **settings)]


def run_python(code: str, *words: str) -> str:
    """The output of code in a new process."""
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout


def memory(folder: Path, batches: int) -> list[dict]:
    """MB by which the process grows from a tenth of the batches to the end."""
    home = folder / "small"
    home.mkdir()
    for i in range(64):
        (home / f"{i}.jpg").write_bytes(photo((96, 64), i))
    crops = CropsConfig(global_px=32, local_px=16, locals=2)
    loader = Loader(open_source(home), crops, COLOURS, MasksConfig(), 8, 16, seed=0, threads=2)
    iterator, settled = loader.batches(0, torch.device("cpu")), 0.0
    start = time.perf_counter()
    for number in range(batches):
        next(iterator)
        if number == batches // 10:
            settled = resident_memory()
    grown, seconds = resident_memory() - settled, time.perf_counter() - start
    iterator.close()
    print(f"  {batches:,} batches of 16 in {seconds:.0f} s: {settled:.0f} MB after a tenth, {grown:+.1f} MB since")
    return [result("loader_growth", grown, None, "MB", batches=batches)]


def resident_memory() -> float:
    """MB of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images, rounds, files and batches: under a minute")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--parts", nargs="+", default=["speed", "sources", "start", "memory"])
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.rounds, arguments.files, arguments.batches = 16, 3, 5_000, 300
    torch.set_num_threads(1)
    random.seed(0)
    parts = {
        "speed": lambda folder: speed(folder, arguments.images, arguments.rounds),
        "sources": sources,
        "start": lambda folder: time_to_start(folder, arguments.files),
        "memory": lambda folder: memory(folder, arguments.batches),
    }
    results = []
    for part in arguments.parts:
        print(part)
        with tempfile.TemporaryDirectory(prefix="troodon-loader-") as folder:
            results += parts[part](Path(folder))
    finish(results, arguments)


if __name__ == "__main__":
    main()
