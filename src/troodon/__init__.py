"""Troodon: general visual features from unlabelled images."""

import importlib
import sys
import types

VERBS = (
    "calibrate", "compare", "curate", "demo", "distill", "embed", "evaluate", "leak", "load", "pack", "pretrain",
    "report", "scan", "show_crops",
)  # fmt: skip
__all__ = list(VERBS)


def __getattr__(name: str):
    """The verbs, imported when they are used: `import troodon` costs nothing."""
    if name in VERBS:
        return getattr(importlib.import_module("troodon.demo" if name == "demo" else "troodon.verbs"), name)
    raise AttributeError(f"module 'troodon' has no attribute {name!r}")


class _Package(types.ModuleType):
    """`troodon.evaluate` is the verb also once the folder of that name is imported, which would take its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in VERBS and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
