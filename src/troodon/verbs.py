"""The verbs: what the command line and `import troodon` both call, with the same names and defaults.

Here, and only here, the parts that never import one another meet: a recipe becomes a config, a path becomes
an index or a backbone, training is lent a k-NN to watch itself by.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from troodon import recipes
from troodon.config import UsageError, from_dict, from_yaml, nearest
from troodon.curate.config import CurateConfig
from troodon.evaluate.config import EvaluateConfig, suite
from troodon.learn.config import PretrainConfig

if TYPE_CHECKING:
    from troodon.learn.recorder import Probe
    from troodon.model.backbone import Backbone

C = TypeVar("C")
Data = str | Path | Sequence[str | Path]  # a folder, an image, a tar, a path inside a tar, an artifact; or several

PROBED = 1000  # labelled images, at most, that the quick k-NN of a training run looks at


def load(path: str | Path) -> "Backbone":
    """A backbone from a run, a backbone folder, released DINOv2 weights (.pth), or a Hugging Face folder.

    Its `features(images)` takes paths, uint8 (H, W, 3) arrays, PIL images, or a prepared (B, 3, H, W) tensor, and
    gives `.cls (B, D)`, `.patches (B, h, w, D)` and `.registers (B, R, D)`. UsageError for anything else.
    """
    import dataclasses

    from troodon.data.decode import decode
    from troodon.model.backbone import open_weights

    return dataclasses.replace(open_weights(Path(path)), read=lambda image: decode(Path(image).read_bytes()))


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
    data: Data,
    out: str | Path,
    *,
    init: "str | Path | Backbone | None" = None,
    settings: dict | None = None,
    dry_run: bool = False,
) -> Path | None:
    """Learn features from unlabelled images; goes on where the run in `out` stopped. Returns the backbone's folder.

    `settings` changes the recipe: {"steps": 1000, "schedules": {"lr": {"peak": 1e-3}}}. `dry_run` only tells the plan.
    """
    config = configured(recipe, PretrainConfig(), recipes.pretrain, settings)
    from troodon import dist
    from troodon.data.sources import open_source
    from troodon.learn import pretrain as training
    from troodon.learn.plan import plan
    from troodon.run import say

    index = open_source(*_paths(data))
    start = None if init is None else _backbone(init)
    if dry_run:
        training.check(config, index, start)
        device = dist.device()
        say(plan(config, len(index), device, training.compute_dtype(config, device), dist.world()).render())
        return None
    return training.pretrain(config, index, Path(out), init=start, probe=quick_knn(index, config))


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
    others = [Backbone.random(untrained, ours.preprocessing, seed=config.seed), ColourHistogram(), RawPixels()]
    train, val = split(index, config.seed)
    return evaluating(
        [ours, *(others if baselines else [])],
        train,
        val,
        " + ".join(Path(p).name for p in _paths(data)),
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

    labels = np.array([label or "" for label in index.column("label")])
    rows = np.flatnonzero(labels != "")
    rows = np.sort(np.random.default_rng(config.seed).permutation(rows)[:PROBED])
    classes, codes = np.unique(labels[rows], return_inverse=True)
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


def _paths(data: Data) -> list[str | Path]:
    return [data] if isinstance(data, str | Path) else list(data)


def _progress(what: str):
    import time

    from troodon.run import say

    last = [time.monotonic()]

    def tell(done: int, total: int) -> None:
        if time.monotonic() - last[0] > 5:
            last[0] = time.monotonic()
            say(f"{what}: {done:,} of {total:,} images")

    return tell
