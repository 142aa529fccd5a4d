"""From files to vectors with a network of no cost: what reading, decoding and preparing leave of the host.

Part of embed.py, as `--pipeline`. `pipeline` is what every verb does for vectors of files, as `evaluate` and `features`
of paths: the file is read, decoded, resized, cropped, normalised and put into batches, by one thread for each core.
`pipeline_embed` is a unit of the stage `embed`, which also hashes the bytes and the picture, and writes its files. The
rival only decodes the same bytes by the same decoder and resizes them once, also by one thread for each core. All run
in turns. `per_core` counts the seconds that processors worked for each, so that it holds on a busy machine too;
`per_second` those that passed.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from measure import CORES, median_seconds, result
from rates import photograph
from troodon.curate.embed import _EmbedUnit, encoder
from troodon.images.decode import decode
from troodon.images.reading import read_batches
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.preprocess import joined


class Free:
    """A backbone that prepares images as any other does, and whose features cost nothing."""

    name, fingerprint, channels = "free", "free", 3

    def __init__(self) -> None:
        config = ViTConfig(patch=14, dim=64, depth=1, heads=1)
        self.backbone = Backbone.random(config, Preprocessing())

    def prepare(self, images: list[np.ndarray]) -> torch.Tensor:
        return self.backbone.prepare(images)

    def features(self, images_BCHW: torch.Tensor, blocks: int = 1) -> SimpleNamespace:
        return SimpleNamespace(cls=images_BCHW[:, 0, 0, :32])


def pipeline(images: int, rounds: int, cores: int = 0, batch: int = 64) -> list[dict]:
    """Images a second, in all and for each core: by ours, and by decoding and one resize alone."""
    cores, random = cores or CORES, np.random.default_rng(0)
    torch.set_num_threads(1)  # each thread is one core's work, on both sides
    with tempfile.TemporaryDirectory(prefix="troodon-pipeline-") as folder:
        home = Path(folder)
        (home / "images").mkdir()
        for i in range(images):
            (home / "images" / f"{i:05}.jpg").write_bytes(photograph(random))
        index, numbers = open_source(home / "images"), iter(range(10_000))
        free = Free()
        unit = _EmbedUnit({"embeddings": encoder(free, "cls")}, index, {}, batch, cores)
        size = Preprocessing().resize

        def embed_all() -> None:
            place = home / f"unit-{next(numbers)}"
            place.mkdir()
            unit((0, images), place)

        def read_all() -> None:
            for _, batch_BCHW in read_batches(index, batch, free.prepare, join=joined, threads=cores):
                free.features(batch_BCHW)

        def decode_and_resize(data: bytes) -> tuple[int, ...]:
            x_CHW = torch.from_numpy(decode(data)).permute(2, 0, 1)
            short = min(x_CHW.shape[1:])
            to = [round(side * size / short) for side in x_CHW.shape[1:]]
            return torch.nn.functional.interpolate(x_CHW[None], to, mode="bicubic", antialias=True).shape

        data = [index.read(row) for row in range(images)]

        def rival() -> None:
            with ThreadPoolExecutor(cores) as pool:
                list(pool.map(decode_and_resize, data))

        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        worked: dict[str, list[float]] = {"pipeline": [], "pipeline_embed": [], "rival": []}

        def counted(side: str, function: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                start = time.process_time()
                function()
                worked[side].append(time.process_time() - start)

            return run

        sides = zip(worked, (read_all, embed_all, rival), strict=True)
        passed = median_seconds([counted(side, function) for side, function in sides], rounds)
    per_second = dict(zip(worked, (images / seconds for seconds in passed), strict=True))
    # The first round warms up.
    per_core = {side: images / statistics.median(seconds[1:]) for side, seconds in worked.items()}
    settings = {"images": images, "cores": cores, "batch": batch, "bytes": sum(map(len, data)) / images}
    return [
        result(f"{side}_images_per_{per}", rates[side], rates["rival"], "images/s", more_is_better=True, **settings)
        for side in ("pipeline", "pipeline_embed")
        for per, rates in (("second", per_second), ("core", per_core))
    ]
