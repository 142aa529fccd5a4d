"""What a protocol hands to the suite, and what a score must share with another to be compared with it."""

from dataclasses import dataclass, field
from typing import Any

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


def view(backbone: Any) -> dict:
    """How images come to the network: of a network its preprocessing, of a descriptor its name."""
    preprocessing = getattr(backbone, "preprocessing", None)
    return {"transform": backbone.name} if preprocessing is None else to_dict(preprocessing)


def likeness(backbone: Any, images: str, **settings: Any) -> dict:
    """The parts of `Result.like`: how images are seen, which they are, and the settings of the protocol."""
    plain = {name: to_dict(s) if hasattr(s, "__dataclass_fields__") else s for name, s in settings.items()}
    return {"version": VERSION, "view": view(backbone), "images": images, **plain}
