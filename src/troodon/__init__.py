"""Troodon: general visual features from unlabelled images."""

import importlib

VERBS = ("curate", "demo", "distill", "embed", "evaluate", "load", "pack", "pretrain", "report", "scan", "show_crops")
__all__ = list(VERBS)


def __getattr__(name: str):
    """The verbs, imported when they are used: `import troodon` costs nothing."""
    if name in VERBS:
        return getattr(importlib.import_module("troodon.demo" if name == "demo" else "troodon.verbs"), name)
    raise AttributeError(f"module 'troodon' has no attribute {name!r}")
