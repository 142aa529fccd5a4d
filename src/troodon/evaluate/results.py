"""The result of a protocol, and the settings that two scores must share to be compared."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from troodon import run
from troodon.config import to_dict

VERSION = 1  # of all protocols; increase it when a score changes for a reason that the recorded settings do not show


@dataclass(frozen=True)
class Result:
    """One metric of one protocol on one dataset, with its confidence interval."""

    protocol: str
    dataset: str
    metric: str
    value: float
    low: float
    high: float
    settings: dict  # everything that is reported
    like: dict  # the settings that another score must share to be compared with this one
    details: dict = field(default_factory=dict)


def versions() -> dict[str, str | None]:
    """Versions of the packages that influence scores: those that decode images and those that compute."""
    environment = run.environment()
    packages = ("torch", "numpy", "pillow", "simplejpeg")
    return {"troodon": environment["troodon"]} | {name: environment["packages"][name] for name in packages}


def releases(used: dict[str, str | None]) -> dict[str, str]:
    """The part of the versions that two scores must share: the numbers up to the first that is not 0, as 0.1 and 2.

    A later 2.x is compatible and changes at most a last digit; `compare` names it. simplejpeg is not included, because
    it gives the same pixels as Pillow.
    """
    matches = {name: re.match(r"(0\.)*\d+", used[name] or "") for name in used if name != "simplejpeg"}
    return {name: match[0] for name, match in matches.items() if match}


def view(backbone: Any) -> dict:
    """How images are preprocessed: preprocessing and compute dtype of a network, or the name of a descriptor."""
    preprocessing = getattr(backbone, "preprocessing", None)
    if preprocessing is None:
        return {"transform": backbone.name}
    return preprocessing.as_dict() | {
        "compute": str(getattr(backbone, "compute", torch.float32)).removeprefix("torch.")
    }


def likeness(backbone: Any, images: str, **settings: Any) -> dict:
    """`Result.like`: preprocessing, fingerprint of the images, and the settings of the protocol."""
    plain = {name: to_dict(s) if hasattr(s, "__dataclass_fields__") else s for name, s in settings.items()}
    return {"version": VERSION, "view": view(backbone), "images": images, **plain}
