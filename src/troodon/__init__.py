"""Troodon: general visual features from unlabelled images, the whole DINOv2 system in one package.

    import troodon

    troodon.scan("photos/", "index")                             # formats, sizes, broken files, duplicates
    troodon.pretrain("small", "photos/", "runs/first")           # a run; the same call goes on where it stopped
    backbone = troodon.load("runs/first")                        # or a backbone folder, released DINOv2 weights, ...
    features = backbone.features(["a.jpg", "b.jpg"])             # .cls (B, D), .patches (B, h, w, D), .registers
    troodon.evaluate("mine", backbone, "labelled/", "scores")    # k-NN, linear classifiers, ..., with intervals

Each function is a verb, and `troodon VERB` does the same on the command line. `scan` looks at images, `pack` writes tar
shards, `show_crops` draws what a network is shown, and `show_pca`, `show_attention`, `show_neighbours` and
`show_matches` what a backbone sees. `embed` writes one vector per image. `dedup` finds copies, `curate` selects images,
`apply` carries a selection out on the disk, `calibrate` measures near-duplicates. `pretrain` and `distill` train.
`load` gives a `Backbone`, which turns images into `Features`, and `export` writes it for other libraries. `evaluate`
measures features, `leak` looks for a benchmark's images in training data, `compare` and `report` show results, and
`watch` shows a run while it trains. `explore` serves a page to look around among images. `demo` does all of it on a
small embedded world.

A mistake in an argument raises `UsageError`; a run that a signal stopped has saved everything and raises `Interrupted`.
"""

import importlib
import sys
import types

# Public names and their modules, which are imported when a name is used. Type checkers read __init__.pyi instead.
MODULES = {
    "Backbone": "model.backbone", "Features": "model.backbone", "Interrupted": "run", "UsageError": "config",
    "apply": "verbs", "calibrate": "verbs", "compare": "verbs", "curate": "verbs", "dedup": "verbs", "demo": "demo",
    "distill": "verbs", "embed": "verbs", "evaluate": "verbs", "explore": "verbs", "export": "verbs", "leak": "verbs",
    "load": "verbs", "pack": "verbs", "pretrain": "verbs", "report": "verbs", "scan": "verbs",
    "show_attention": "verbs", "show_crops": "verbs", "show_matches": "verbs",
    "show_neighbours": "verbs", "show_pca": "verbs", "watch": "verbs",
}  # fmt: skip
__all__ = list(MODULES)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("troodon")
    if name not in MODULES:
        raise AttributeError(f"module 'troodon' has no attribute {name!r}")
    return getattr(importlib.import_module(f"troodon.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"]


class _Package(types.ModuleType):
    """Keeps `troodon.evaluate` the verb when the folder of that name is imported, which would otherwise replace it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in MODULES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
