"""What the verbs share: how images, backbones and recipes are named, and what people are told."""

import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from tyro.conf import arg

from troodon.config import UsageError, from_dict, from_yaml
from troodon.run import RENDEZVOUS, say

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone

C = TypeVar("C")
Data = Any  # a path or URL of any place that sources.py knows, a data set with len() and [row]; or a list of these
Images = Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]")]


def load(path: str | Path) -> "Backbone":
    """A backbone from a run, a backbone folder, released DINOv2 weights (.pth), or a Hugging Face folder.

    Its `features(images)` takes paths, uint8 (H, W, C) arrays, PIL images, or a prepared (B, C, H, W) tensor, and
    gives `.cls (B, D)`, `.patches (B, h, w, D)` and `.registers (B, R, D)`. UsageError for anything else.
    """
    import dataclasses

    from troodon.images.decode import decode
    from troodon.model.backbone import open_weights

    backbone = open_weights(Path(path))
    return dataclasses.replace(backbone, read=lambda image: decode(Path(image).read_bytes(), backbone.channels))


def configured(recipe: str | C, default: C, named: Callable[[str], C], settings: dict | None = None) -> C:
    """A config, a YAML file or the name of a recipe, with `settings` changed."""
    if isinstance(recipe, str) and recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise UsageError(f"{recipe}: no such recipe file")
        recipe = from_yaml(default, Path(recipe))
    elif isinstance(recipe, str):
        recipe = named(recipe)
    return from_dict(recipe, settings, source="settings") if settings else recipe


def opened(backbone: "str | Path | Backbone") -> "Backbone":
    return load(backbone) if isinstance(backbone, str | Path) else backbone


def paths_of(data: Data) -> list:
    return list(data) if isinstance(data, list | tuple) else [data]


def some(paths: tuple[str, ...], what: str) -> tuple[str, ...]:
    if not paths:
        raise UsageError(f"no {what}: give at least one path")
    return paths


def progress(what: str):
    last = [time.monotonic()]

    def tell(done: int, total: int) -> None:
        if time.monotonic() - last[0] > 5:
            last[0] = time.monotonic()
            say(f"{what}: {done:,} of {total:,} images")

    return tell


def quoted(path: str) -> str:
    return shlex.quote(path)


def suggest(*commands: str) -> None:
    if RENDEZVOUS in os.environ or os.environ.get("RANK", "0") != "0":
        return  # one of several processes: whoever launched them says it, or the first of them
    say("next:" + "".join(f"\n  {c}" for c in commands))
