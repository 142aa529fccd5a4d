"""The verbs: what the command line and `import troodon` both call, with the same names and defaults.

Here, and only here, the parts that never import one another meet: a recipe becomes a config, a path becomes
an index or a backbone, training is lent a k-NN to watch itself by.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from troodon import recipes
from troodon.config import UsageError, from_dict, from_yaml, nearest
from troodon.curate.config import CurateConfig
from troodon.evaluate.config import EvaluateConfig, suite
from troodon.learn.config import PretrainConfig
from troodon.slurm import SlurmConfig

if TYPE_CHECKING:
    from troodon.learn.recorder import Probe
    from troodon.model.backbone import Backbone

C = TypeVar("C")
Data = Any  # a path or URL of any place that sources.py knows, a data set with len() and [row]; or a list of these

PROBED = 1000  # labelled images, at most, that the quick k-NN of a training run looks at


def load(path: str | Path) -> "Backbone":
    """A backbone from a run, a backbone folder, released DINOv2 weights (.pth), or a Hugging Face folder.

    Its `features(images)` takes paths, uint8 (H, W, C) arrays, PIL images, or a prepared (B, C, H, W) tensor, and
    gives `.cls (B, D)`, `.patches (B, h, w, D)` and `.registers (B, R, D)`. UsageError for anything else.
    """
    import dataclasses

    from troodon.data.decode import decode
    from troodon.model.backbone import open_weights

    backbone = open_weights(Path(path))
    return dataclasses.replace(backbone, read=lambda image: decode(Path(image).read_bytes(), backbone.channels))


def scan(data: Data, out: str | Path | None = None, *, threads: int = 0) -> dict:
    """Look at every image once: formats, sizes, broken files with the reason, exact duplicates, label conflicts.

    Returns the summary; with `out`, also writes an index artifact there, which other verbs take as data.
    """
    from troodon.data import scan as scanning
    from troodon.data.sources import open_source

    paths = _paths(data)
    if out is not None:
        return scanning.scan_to(paths, Path(out), threads, _progress("scan"))
    return scanning.summarise(scanning.scan(open_source(*paths), threads, _progress("scan")))


def embed(
    backbone: "str | Path | Backbone",
    data: Data,
    out: str | Path,
    *,
    tokens: str = "cls",
    batch: int = 64,
    threads: int = 0,
) -> Path:
    """Write one vector per image: class tokens ("cls"), or these and mean patch tokens ("cls+mean")."""
    from troodon.curate.embed import embed as embedding
    from troodon.data.sources import open_source

    if tokens not in ("cls", "cls+mean"):
        raise nearest("tokens", tokens, ("cls", "cls+mean"))
    if batch < 1:
        raise UsageError(f"batch {batch}: must be 1 or more")
    return embedding(
        _backbone(backbone), open_source(*_paths(data)), Path(out), batch=batch, threads=threads, tokens=tokens
    )


def curate(
    recipe: str | CurateConfig,
    curated: Data,
    uncurated: Data,
    backbone: "str | Path | Backbone",
    out: str | Path,
    *,
    settings: dict | None = None,
) -> Path:
    """Select from the uncurated images, without copies, those that resemble the curated ones; copies no image."""
    from troodon.curate.pipeline import curate as curating
    from troodon.data.sources import open_source

    config = configured(recipe, CurateConfig(), recipes.curate, settings)
    pool = open_source(*_paths(uncurated)).unlabelled()
    return curating(config, open_source(*_paths(curated)), pool, _backbone(backbone), Path(out))


def pretrain(
    recipe: str | PretrainConfig,
    data: Data | None = None,
    out: str | Path | None = None,
    *,
    init: "str | Path | Backbone | None" = None,
    settings: dict | None = None,
    devices: str | int = "auto",
    dry_run: bool = False,
    images_per_second: float | None = None,
) -> Path | None:
    """Learn features from unlabelled images; goes on where the run in `out` stopped. Returns the backbone's folder.

    `settings` changes the recipe: {"steps": 1000, "schedules": {"lr": {"peak": 1e-3}}}.
    `devices` is how many of this machine's to train on, "auto" for all; on several, a process each, which read `data`
    and `init` by their paths. There, learn.pretrain.Interrupted, UsageError or RuntimeError is what ended the first.
    `dry_run` only tells the plan, also without `data` and `out`; as a number, `devices` then are accelerators that need
    not be here, and the time is told if these see `images_per_second` together.
    """
    config = configured(recipe, PretrainConfig(), beginning(init), settings)
    if devices != "auto" and not (str(devices).isdecimal() and int(devices)):
        raise UsageError(f"devices {str(devices)!r}: a number or auto")
    if images_per_second is not None and not (dry_run and 0 < images_per_second < float("inf")):
        raise UsageError(f"images_per_second {images_per_second}: is above 0, and for a dry run")
    if dry_run:
        return _tell_plan(config, data, init, devices, images_per_second)
    data, out = _given(data, out)
    from troodon import dist, launch
    from troodon.data.sources import open_source
    from troodon.learn import checkpoint
    from troodon.learn import pretrain as training

    ranks = dist.to_start(devices)
    if ranks > 1:
        _by_path(data, init)
    index = open_source(*_paths(data))
    start = None if init is None else _backbone(init)
    training.check(config, index, start, max(ranks, int(os.environ.get("WORLD_SIZE", 1))))
    if ranks > 1:
        del index, start  # each rank has its own
        with tempfile.TemporaryDirectory(prefix="troodon-") as folder:
            ended = launch.launch(_words(config, data, out, init, Path(folder)), ranks)
        if ended.code:
            kinds = {launch.MISTAKE: UsageError, launch.STOPPED: training.Interrupted}
            error = kinds.get(ended.code, launch.RankLost)(ended.said)
            error.add_note(ended.trace)
            raise error
        return Path(out) / "backbone"
    heads = None
    if config.reuse == "whole":
        if not isinstance(init, str | Path) or (first := start_of(init)).reuse != "whole":
            raise UsageError("reuse whole: takes the heads of a run, so --init must be one")
        heads = checkpoint.heads(Path(init), first)
    return training.pretrain(config, index, Path(out), init=start, heads=heads, probe=quick_knn(index, config))


def _tell_plan(
    config: PretrainConfig,
    data: Data | None,
    init: "str | Path | Backbone | None",
    devices: str | int,
    images_per_second: float | None,
) -> None:
    """Say what a run would take: on this machine, its speed measured; or on any number of accelerators."""
    from troodon.data.sources import open_source
    from troodon.learn.config import fits
    from troodon.learn.plan import plan, timed
    from troodon.run import say

    images = len(open_source(*_paths(data))) if data else None
    if init is not None:
        from troodon.learn.pretrain import same_network

        same_network(config, _backbone(init))
    if devices != "auto":  # without torch, which takes longer to load than all of this
        fits(config, int(devices))
        width = 4 if config.compute == "fp32" else 2
        return say(plan(config, images, "cuda", width, int(devices), images_per_second).render())
    from troodon import dist

    device, ranks = dist.device(), dist.to_start("auto")
    fits(config, ranks)
    compute = dist.compute_dtype(config.compute, device)
    planned = plan(config, images, device.type, compute.itemsize, ranks, images_per_second)
    return say((planned if images_per_second else timed(planned, device, compute)).render())


def beginning(init: "str | Path | Backbone | None") -> Callable[[str], PretrainConfig]:
    """The recipes of pretraining by name, those included that go on from `init`."""
    return lambda name: recipes.pretrain(name, lambda: None if init is None else start_of(init))


def start_of(init: "str | Path | Backbone") -> PretrainConfig:
    """The config of a run, with reuse "whole"; of other weights only the network is known, and reuse is "backbone"."""
    if not isinstance(init, str | Path):
        return PretrainConfig(vit=init.config)
    if (recorded := Path(init) / "config.yaml").is_file():
        return replace(from_yaml(PretrainConfig(), recorded), reuse="whole")
    return PretrainConfig(vit=load(init).config)


def submit(
    recipe: str | PretrainConfig,
    data: Data | None,
    out: str | Path | None,
    slurm: SlurmConfig,
    *,
    init: str | Path | None = None,
    settings: dict | None = None,
) -> str:
    """Have Slurm do what `pretrain` does, on `slurm.nodes` machines; returns the job's id. Mistakes are told first."""
    config = configured(recipe, PretrainConfig(), beginning(init), settings)
    data, out = _given(data, out)
    from troodon.data.sources import open_source
    from troodon.learn import pretrain as training
    from troodon.slurm import check, logs, submit

    check(slurm)
    _by_path(data, init)
    ranks = slurm.nodes * slurm.gpus_per_node
    training.check(config, open_source(*_paths(data)), None if init is None else _backbone(init), ranks)
    return submit(_words(config, data, out, init, logs(out)), out, slurm)


def _given(data: Data | None, out: str | Path | None) -> tuple[Data, str | Path]:
    """Both, or UsageError: only a dry run does without."""
    if data is not None and data != () and out is not None:
        return data, out
    missing = [f"--{name}" for name, value in (("data", data), ("out", out)) if value in (None, ())]
    raise UsageError(f"no {' and no '.join(missing)}; or give --dry-run to see what the run would take")


def _by_path(data: Data, init: object) -> None:
    """UsageError for what other processes could not open."""
    for name, values in (("data", _paths(data)), ("init", [] if init is None else [init])):
        for value in values:
            if not isinstance(value, str | Path):
                kind = type(value).__name__
                raise UsageError(f"{name}: several processes need its path, not a {kind}; save it, and give the folder")


def _words(config: PretrainConfig, data: Data, out: str | Path, init: object, folder: Path) -> list[str]:
    """The command line of a pretraining, for other processes; writes its settings, as they are now, into `folder`."""
    from troodon.config import fingerprint, to_yaml
    from troodon.run import write_bytes

    settings = folder / f"{fingerprint(config)}.yaml"
    write_bytes(settings, to_yaml(config).encode())
    start = [] if init is None else ["--init", str(init)]
    return ["pretrain", str(settings), "--data", *(str(path) for path in _paths(data)), "--out", str(out), *start]


def evaluate(
    name: str | EvaluateConfig,
    backbone: "str | Path | Backbone",
    data: Data,
    out: str | Path,
    *,
    baselines: bool = True,
    settings: dict | None = None,
    threads: int = 0,
    cache: str | Path | None = None,
) -> list[dict]:
    """Measure frozen features on labelled images, beside a random network, a colour histogram and raw pixels."""
    config = configured(name, EvaluateConfig(), suite, settings)
    import dataclasses

    from troodon.data.sources import open_source
    from troodon.evaluate.baselines import ColourHistogram, RawPixels
    from troodon.evaluate.suite import evaluate as evaluating
    from troodon.evaluate.suite import how_split, split
    from troodon.model.backbone import Backbone

    index = open_source(*_paths(data))
    ours = _backbone(backbone)
    # Layer scale 1: at the small values that training starts from, a random network hardly mixes its patches.
    untrained = dataclasses.replace(ours.config, layer_scale=1.0)
    trivial = [ColourHistogram(channels=ours.channels), RawPixels(channels=ours.channels)]
    others = [Backbone.random(untrained, ours.preprocessing, seed=config.seed), *trivial]
    train, val = split(index, config.seed)
    return evaluating(
        [ours, *(others if baselines else [])],
        train,
        val,
        " + ".join(Path(p).name if isinstance(p, str | Path) else type(p).__name__ for p in _paths(data)),
        config,
        Path(out),
        how=how_split(index, config.seed),
        threads=threads,
        cache=None if cache is None else Path(cache),
    )


def report(paths: Data, out: str | Path, *, title: str | None = None) -> Path:
    """One HTML page, which opens without a network, of all artifacts in the given folders."""
    from troodon.report.page import report as reporting

    return reporting([Path(p) for p in _paths(paths)], Path(out), title)


def quick_knn(index, config: PretrainConfig) -> "Probe | None":
    """A leave-one-out k-NN over some labelled images, to watch a run by; None where there are no labels."""
    import numpy as np
    import torch

    from troodon.evaluate.features import extract
    from troodon.evaluate.knn import quick

    if index.table["label"].null_count == len(index):  # of very many images, known without a look at them
        return None
    rows = np.flatnonzero(index.table["label"].is_valid().to_numpy())
    rows = np.sort(np.random.default_rng(config.seed).permutation(rows)[:PROBED])
    classes, codes = np.unique(index.take(rows).column("label"), return_inverse=True)
    if not config.probe_every or not 2 <= len(classes) <= len(rows) // 2:
        return None
    held = index.take(rows)

    def probe(backbone: "Backbone") -> float:
        features = extract(backbone, held, blocks=1, threads=config.threads)
        return quick(torch.from_numpy(features.final_ND), torch.from_numpy(codes[features.rows]))

    return probe


def configured(recipe: str | C, default: C, named: Callable[[str], C], settings: dict | None = None) -> C:
    """A config, a YAML file or the name of a recipe, with `settings` changed."""
    if isinstance(recipe, str) and recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise UsageError(f"{recipe}: no such recipe file")
        recipe = from_yaml(default, Path(recipe))
    elif isinstance(recipe, str):
        recipe = named(recipe)
    return from_dict(recipe, settings, source="settings") if settings else recipe


def _backbone(backbone: "str | Path | Backbone") -> "Backbone":
    return load(backbone) if isinstance(backbone, str | Path) else backbone


def _paths(data: Data) -> list:
    return list(data) if isinstance(data, list | tuple) else [data]


def _progress(what: str):
    import time

    from troodon.run import say

    last = [time.monotonic()]

    def tell(done: int, total: int) -> None:
        if time.monotonic() - last[0] > 5:
            last[0] = time.monotonic()
            say(f"{what}: {done:,} of {total:,} images")

    return tell
