"""An index of a hundred million images: how long it takes to open, what it costs in memory, and that workers share it.

    python benchmarks/scale.py [--quick] [--images 100000000] [--workers 8] [--out FOLDER]

The index is synthetic: its images lie in tars that are not there, and nothing is decoded; what is measured is what a
process pays for knowing where so many images lie. Each worker opens the index, then asks for the rows of batches all
over it, as training does, and reads where these lie. `ours` is our memory, `rival` that of one plain Python list of the
paths, from a hundredth as many and multiplied.

Memory is told in two parts: `own`, which each process has for itself, and `mapped`, pages of the index file that the
kernel keeps for all of them and may drop at any time.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

BATCH = 1 << 20
SHARD = 10_000


def write(folder: Path, images: int) -> None:
    """An artifact of so many images; as Index.save would leave it."""
    from troodon import run
    from troodon.images.index import SCHEMA

    with run.publish(folder, "index", "synthetic", {}) as partial:
        (partial / "images.parquet").touch()
        with pa.OSFile(str(partial / "images.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for start in range(0, images, BATCH):
                row = np.arange(start, min(start + BATCH, images))
                tar = np.char.add(np.char.add("shards/", np.char.zfill((row // SHARD).astype(str), 5)), ".tar")
                path = np.char.add(np.char.add(tar, "/"), np.char.zfill(row.astype(str), 9))
                columns = [pa.array(path), pa.array(tar), pa.array(row % SHARD * 100_000), pa.array(row * 0 + 99_000)]
                columns = [c.cast(t) for c, t in zip(columns, SCHEMA.types)] + [pa.nulls(len(row), pa.string())] * 2
                writer.write_table(pa.table(columns, schema=SCHEMA), max_chunksize=1 << 16)


def memory() -> dict[str, float]:
    """MB of this process: `own`, anonymous pages; `mapped`, pages of files, which all processes share."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
    own, mapped = (int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return {"own": own, "mapped": mapped}


def work(folder: Path, worker: int, workers: int, batches: int, answer: multiprocessing.Queue) -> None:
    import torch

    from troodon.images.sources import open_source
    from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig
    from troodon.views.loader import Loader

    torch.zeros(1)
    before, began = memory(), time.perf_counter()
    index = open_source(folder)
    settings = CropsConfig(), PhotometricConfig(), MasksConfig()
    loader = Loader(index, *settings, patch=14, images=256 * workers, seed=0, rank=worker, world=workers)
    first = [index.where(row) for row in loader.rows(0)]
    seconds = time.perf_counter() - began
    opened = memory()
    began = time.perf_counter()
    for batch in range(batches):
        for row in loader.rows(batch):
            index.where(row)
    each = (time.perf_counter() - began) / (batches * 256)
    after = memory()
    told = {"seconds": seconds, "first": len(first), "us_an_image": each * 1e6}
    for name, moment in (("opened", opened), ("after", after)):
        told |= {f"{name}_{kind}": moment[kind] - before[kind] for kind in before}
    answer.put(told)


def listed(images: int) -> float:
    """MB of a Python list of as many paths, from a hundredth of them."""
    few = images // 100
    before = memory()["own"]
    paths = [f"shards/{row // SHARD:05d}.tar/{row:09d}" for row in range(few)]
    return (memory()["own"] - before) * images / len(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two million images, two workers")
    parser.add_argument("--images", type=int, default=100_000_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batches", type=int, default=40, help="of 256 images for each worker")
    parser.add_argument("--out", type=Path, help="where to put the index; else a folder that is removed")
    given = parser.parse_args()
    images, workers = (2_000_000, 2) if given.quick else (given.images, given.workers)
    home = given.out or Path(tempfile.mkdtemp(prefix="troodon-scale-"))
    try:
        folder = home / f"index-{images}"
        if not folder.exists():
            began = time.perf_counter()
            write(folder, images)
            print(f"{images:,} rows written in {time.perf_counter() - began:.0f} s")
        size = (folder / "images.arrow").stat().st_size
        print(f"index: {size / 1e9:.2f} GB, {size / images:.0f} bytes an image")
        context = multiprocessing.get_context("spawn")
        answer = context.Queue()
        arguments = [(folder, worker, workers, given.batches, answer) for worker in range(workers)]
        children = [context.Process(target=work, args=each) for each in arguments]
        for child in children:
            child.start()
        told = [answer.get() for _ in children]
        for child in children:
            child.join()
        for name in told[0]:
            values = [one[name] for one in told]
            print(f"{name:<14} largest {max(values):10.2f}   mean {sum(values) / len(values):10.2f}")
        plain = listed(images)
        settings = {"images": images, "workers": workers, "bytes": size}
        own, seconds = (max(one[name] for one in told) for name in ("after_own", "seconds"))
        print(json.dumps([
            {"name": "index_memory", "ours": own, "rival": plain, "ratio": plain / max(own, 0.01), "unit": "MB",
             "settings": settings},
            {"name": "index_start", "ours": seconds, "rival": None, "ratio": None, "unit": "s",
             "settings": settings},
        ]))  # fmt: skip
    finally:
        if given.out is None:
            shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
