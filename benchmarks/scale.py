"""An index of a hundred million images: time to open, memory, and whether workers share it.

    python benchmarks/scale.py [--quick] [--images 100000000] [--workers 8] [--out FOLDER] [--record]

The index is synthetic: its tars do not exist, and nothing is decoded. Measured is the cost of a process that knows
where so many images lie. Each worker opens the index, then takes the rows of batches from all over it, as training
does, and reads the locations of their images. `ours` is our memory, `rival` that of a plain Python list of the paths,
extrapolated from a hundredth of them.

Memory has two parts: `own`, private to each process, and `mapped`, pages of the index file that the kernel shares among
all processes and may drop at any time.
"""

import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from measure import argument_parser, finish, result

ROWS = 1 << 20  # of the index, written at a time
SHARD = 10_000  # images in a tar


def write_index(folder: Path, images: int) -> None:
    """An index artifact of so many images, as Index.save leaves it."""
    from troodon import run
    from troodon.images.index import SCHEMA

    with run.publish(folder, "index", "synthetic", {}) as partial:
        (partial / "images.parquet").touch()
        with pa.OSFile(str(partial / "images.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for start in range(0, images, ROWS):
                row = np.arange(start, min(start + ROWS, images))
                tar = np.char.add(np.char.add("shards/", np.char.zfill((row // SHARD).astype(str), 5)), ".tar")
                path = np.char.add(np.char.add(tar, "/"), np.char.zfill(row.astype(str), 9))
                columns = [pa.array(path), pa.array(tar), pa.array(row % SHARD * 100_000), pa.array(row * 0 + 99_000)]
                columns = [c.cast(t) for c, t in zip(columns, SCHEMA.types)] + [pa.nulls(len(row), pa.string())] * 2
                writer.write_table(pa.table(columns, schema=SCHEMA), max_chunksize=1 << 16)


def memory() -> dict[str, float]:
    """MB of this process: `own` are anonymous pages, `mapped` pages of files, which all processes share."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
    own, mapped = (int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return {"own": own, "mapped": mapped}


def measure_worker(folder: Path, worker: int, workers: int, batches: int, results: multiprocessing.Queue) -> None:
    """Put the measurements of one worker into the queue: seconds to the first batch, time of a look-up, memory."""
    import torch

    from troodon.images.sources import open_source
    from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig
    from troodon.views.loader import Loader

    torch.zeros(1)
    before, began = memory(), time.perf_counter()
    index = open_source(folder)
    settings = CropsConfig(), PhotometricConfig(), MasksConfig()
    loader = Loader(index, *settings, patch=14, batch_size=256 * workers, seed=0, rank=worker, world_size=workers)
    first = [index.location(row) for row in loader.rows(0)]
    seconds = time.perf_counter() - began
    opened = memory()
    began = time.perf_counter()
    for batch in range(batches):
        for row in loader.rows(batch):
            index.location(row)
    per_image = (time.perf_counter() - began) / (batches * 256)
    after = memory()
    measured = {"seconds": seconds, "first": len(first), "us_an_image": per_image * 1e6}
    for name, moment in (("opened", opened), ("after", after)):
        measured |= {f"{name}_{kind}": moment[kind] - before[kind] for kind in before}
    results.put(measured)


def list_memory(images: int) -> float:
    """MB of a Python list of as many paths, extrapolated from a hundredth of them."""
    count = images // 100
    before = memory()["own"]
    paths = [f"shards/{row // SHARD:05d}.tar/{row:09d}" for row in range(count)]
    return (memory()["own"] - before) * images / len(paths)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="two million images, two workers")
    parser.add_argument("--images", type=int, default=100_000_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batches", type=int, default=40, help="batches of 256 images for each worker")
    parser.add_argument("--out", type=Path, help="folder that keeps the index; by default a temporary one")
    arguments = parser.parse_args()
    images, workers = (2_000_000, 2) if arguments.quick else (arguments.images, arguments.workers)
    home = arguments.out or Path(tempfile.mkdtemp(prefix="troodon-scale-"))
    try:
        folder = home / f"index-{images}"
        if not folder.exists():
            began = time.perf_counter()
            write_index(folder, images)
            print(f"{images:,} rows written in {time.perf_counter() - began:.0f} s")
        size = (folder / "images.arrow").stat().st_size
        print(f"index: {size / 1e9:.2f} GB, {size / images:.0f} bytes an image")
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        inputs = [(folder, worker, workers, arguments.batches, queue) for worker in range(workers)]
        children = [context.Process(target=measure_worker, args=each) for each in inputs]
        for child in children:
            child.start()
        measured = [queue.get() for _ in children]
        for child in children:
            child.join()
        for name in measured[0]:
            values = [each[name] for each in measured]
            print(f"{name:<14} largest {max(values):10.2f}   mean {sum(values) / len(values):10.2f}")
        plain = list_memory(images)
        settings = {"images": images, "workers": workers, "bytes": size}
        own, seconds = (max(each[name] for each in measured) for name in ("after_own", "seconds"))
        memory_result = result("index_memory", own, plain, "MB", **settings)
        memory_result["ratio"] = plain / max(own, 0.01)  # its own memory may be none
        finish([memory_result, result("index_start", seconds, None, "s", **settings)], arguments)
    finally:
        if arguments.out is None:
            shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
