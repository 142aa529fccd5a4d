"""What a protocol hands to the suite, and what a score must share with another to be compared with it."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from troodon import run
from troodon.config import to_dict

VERSION = 1  # of all protocols; goes up when a number would change by other than the settings that are recorded


@dataclass(frozen=True)
class Result:
    """One number of one protocol on one set of data, with its interval."""

    protocol: str
    dataset: str
    metric: str
    value: float
    low: float
    high: float
    settings: dict  # all that is told
    like: dict  # what another score must share to be compared with this one
    details: dict = field(default_factory=dict)


def versions() -> dict[str, str | None]:
    """Of the packages that numbers come from: those that see images and those that compute."""
    found = run.environment()
    return {"troodon": found["troodon"]} | {n: found["packages"][n] for n in ("torch", "numpy", "pillow", "simplejpeg")}


def releases(used: dict[str, str | None]) -> dict[str, str]:
    """What two scores must share of their versions: the numbers up to the first that is not 0, as with 0.1 and 2.

    A later 2.x keeps its promises and moves a last digit at most; compare names it. simplejpeg gives Pillow's pixels.
    """
    known = {name: re.match(r"(0\.)*\d+", used[name] or "") for name in used if name != "simplejpeg"}
    return {name: match[0] for name, match in known.items() if match}


def view(backbone: Any) -> dict:
    """How images are seen: by a network its preprocessing and what it computes in, by a descriptor its name."""
    preprocessing = getattr(backbone, "preprocessing", None)
    if preprocessing is None:
        return {"transform": backbone.name}
    return to_dict(preprocessing) | {"compute": str(getattr(backbone, "compute", torch.float32)).removeprefix("torch.")}


def likeness(backbone: Any, images: str, **settings: Any) -> dict:
    """The parts of `Result.like`: how images are seen, which they are, and the settings of the protocol."""
    plain = {name: to_dict(s) if hasattr(s, "__dataclass_fields__") else s for name, s in settings.items()}
    return {"version": VERSION, "view": view(backbone), "images": images, **plain}
