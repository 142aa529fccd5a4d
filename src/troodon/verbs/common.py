"""Shared by the verbs: from arguments to configs, backbones and lists of paths; ranks; lines of progress."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from tyro.conf import arg

from troodon import launch
from troodon.config import Range, UsageError, fingerprint, from_dict, from_yaml, pair, to_yaml
from troodon.devices import KINDS, check_device, choose_device
from troodon.learn.config import PretrainConfig
from troodon.recipes.lengths import for_steps
from troodon.rendezvous import RENDEZVOUS
from troodon.run import read_manifest, say, write_bytes

if TYPE_CHECKING:
    from numpy import ndarray

    from troodon.images.index import Index
    from troodon.model.backbone import Backbone

C = TypeVar("C")
LOCAL = 98 / 224  # side of a local crop, of that of a global one
Data = Any  # a path or URL of any source in images/sources.py, a dataset with len() and [row], or a list of these
Device = Annotated[str, arg(metavar="auto|cuda|cuda:N|mps|cpu")]
Paths = Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]")]


@dataclass(frozen=True)
class ReadImage:
    """Reads the values (H, W, C) of the image at a path, or in bytes, for a network of so many channels."""

    channels: int
    range: Range | None = None

    def __call__(self, image: str | Path | bytes) -> "ndarray":
        from troodon.images.containers import read_path
        from troodon.images.decode import as_bytes, decode_values

        is_bytes = isinstance(image, bytes | bytearray)
        data = bytes(image) if is_bytes else read_path(str(Path(image).expanduser()))
        values = decode_values(data, self.channels, range=self.range)
        return values.array if self.range or not values.window else as_bytes(values, self.channels)


def load(path: str | Path, *, range: Range | None = None, device: str = "cpu") -> "Backbone":
    """Load a backbone from a run, a backbone folder, weights of DINOv2 or DINOv3 in any file, or a name, such as
    dinov2_vits14 or hf:owner/name: see docs/weights.md.

    Its `features(images)` takes paths, bytes, uint8 (H, W, C) arrays, PIL images, or a prepared (B, C, H, W) tensor,
    and returns `.cls (B, D)`, `.patches (B, h, w, D)` and `.registers (B, R, D)`. UsageError for anything else.
    `range` gives the values of images of more than 8 bits that become black and white, in place of the backbone's own.
    `device` is where it computes: "auto" (a GPU, if there is one), "cuda", "cuda:1", "mps" or "cpu".
    """
    from troodon.model.weights import load_weights

    if device == "cpu":
        return with_range(load_weights(path), range)
    check_device(device)
    target = choose_device(device)  # before the weights are read
    return with_range(load_weights(path), range).to(target)


def with_range(backbone: "Backbone", range: Range | None) -> "Backbone":
    """The backbone, which reads paths, with this range of values; with its own if it is None."""
    preprocessing = backbone.preprocessing
    if range is not None and tuple(range) != preprocessing.range:
        preprocessing = replace(preprocessing, range=tuple(range))
        backbone = replace(backbone, preprocessing=preprocessing, fingerprint=fingerprint(backbone.fingerprint, range))
    return replace(backbone, read=ReadImage(backbone.channels, preprocessing.range))


@contextlib.contextmanager
def said_elsewhere() -> Iterator[None]:
    """What is done within is done again later or by another process, and said there; it is said here if it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except BaseException:
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def open_images(data: Data, range: Range | None = None, otherwise: Range | None = None) -> "Index":
    """The index of the images, with this range of values, or that of an index, or `otherwise` another one.

    It says where images lose much without one.
    """
    from troodon.images.sources import open_source
    from troodon.images.values import look_at

    with contextlib.nullcontext() if is_first() else said_elsewhere():
        index = open_source(*as_list(data)).with_range(range)
    index = index if index.range else index.with_range(otherwise)
    if is_first() and (line := look_at(index)):
        say(line)
    return index


def common_range(range: Range | None, *backbones: Any) -> Range | None:
    """The range, or that of the backbones' own preprocessing. UsageError if they have different ones."""
    own = {b.preprocessing.range for b in backbones if hasattr(b, "preprocessing") and b.preprocessing.range}
    if range is None and len(own) > 1:
        raise UsageError(f"the backbones have different ranges, {' and '.join(map(str, sorted(own)))}; set one --range")
    return range if range is not None else next(iter(own), None)


def range_before(out: Path, *backbones: Any) -> Range | None:
    """The range of the run that was begun in `out`; for a new run, that of the networks it starts or learns from."""
    manifest = read_manifest(out) or {"kind": None}
    if manifest["kind"] != "run":
        return common_range(None, *backbones)
    return tuple(manifest["settings"]["config"].get("range") or ()) or None


def resolve_config(
    recipe: str | C, default: C, named: Callable[[str], C], settings: dict | None = None, steps: object = None
) -> C:
    """The given config, that of a YAML file, or that of a recipe by `named(recipe)`; with `settings` changed.

    `steps`, or those among `settings`, come first: what a training counts in steps follows them, unless a setting says
    otherwise. A file that names no steps changes the default config of so many.
    """
    steps = (settings or {}).get("steps", steps)
    if isinstance(recipe, str) and recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise UsageError(f"{recipe}: no such recipe file")
        recipe = _from_file(default, Path(recipe), steps)
    elif isinstance(recipe, str):
        recipe = named(recipe)
    recipe = _for_steps(recipe, steps)
    return from_dict(recipe, settings, source="settings") if settings else recipe


def _from_file(default: C, path: Path, steps: object) -> C:
    import yaml

    from_yaml(default, path)  # UsageError for what is no config
    return from_yaml(_for_steps(default, (yaml.safe_load(path.read_text()) or {}).get("steps", steps)), path)


def _for_steps(config: Any, steps: object) -> Any:
    """The config of a training in so many steps, whatever it took before; any other config as it is, and words that are
    no number of steps."""
    try:
        number = int(str(steps))
    except ValueError:
        return config
    return replace(for_steps(config, number), minutes=0.0) if isinstance(config, PretrainConfig) else config


def write_config(config: object, path: Path) -> str:
    """Write a config as a recipe file; returns its path."""
    write_bytes(path, to_yaml(config).encode())
    return str(path)


def as_backbone(backbone: "str | Path | Backbone", range: Range | None = None) -> "Backbone":
    """A backbone, loaded where only its path is given, with this range of values; with its own if it is None."""
    if isinstance(backbone, str | Path):
        return load(backbone, range=range)
    return backbone if range is None else with_range(backbone, range)


def config_of_weights(init: "str | Path | Backbone") -> PretrainConfig:
    """The config of a run, with reuse "whole".

    For other weights only the network's, with reuse "backbone", and what images it knows: their pixels and colours.
    """
    if isinstance(init, str | Path) and (recorded := Path(init) / "config.yaml").is_file():
        return replace(from_yaml(PretrainConfig(), recorded), reuse="whole", minutes=0.0)
    backbone, default = as_backbone(init), PretrainConfig()
    seen, patch = backbone.preprocessing, backbone.config.patch
    side = min(*pair(default.crops.global_px), *pair(seen.crop))  # crops of as many pixels as it knows, if it knows few

    def whole(px: float) -> int:
        return max(1, round(px / patch)) * patch

    crops = replace(default.crops, global_px=whole(side), local_px=whole(side * LOCAL))
    colours = replace(default.photometric, mean=seen.mean, std=seen.std)
    return replace(default, vit=backbone.config, crops=crops, photometric=colours)


def on_device(
    backbone: "str | Path | Backbone", range: Range | None, device: str = "auto", kinds: tuple[str, ...] = KINDS
) -> "Backbone":
    """The backbone on the device, `choose_device` says which; with "auto", one that is loaded already stays.

    The device is looked at before the backbone is loaded: UsageError if it is not there.
    """
    check_device(device)
    target = choose_device(device, kinds)
    found = as_backbone(backbone, range)
    stays = found.device == target or (device == "auto" and not isinstance(backbone, str | Path))
    return found if stays else found.to(target)


def as_list(data: Data) -> list:
    """The given values as a list, also where there is one."""
    return list(data) if isinstance(data, list | tuple) else [data]


def require_some(paths: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The paths; UsageError where there are none."""
    if not paths:
        raise UsageError(f"no {what}: give at least one path")
    return paths


def require_paths(**arguments: Data) -> None:
    """UsageError for an argument that is no path: other processes could not open it."""
    for name, values in arguments.items():
        for value in as_list(values):
            if not isinstance(value, str | Path | None):
                kind = type(value).__name__
                raise UsageError(f"{name}: several processes need its path, not a {kind}; save it, and give the folder")


def check_devices(devices: str | int) -> None:
    """UsageError unless `devices` is "auto" or a number from 1."""
    if devices != "auto" and not (str(devices).isdecimal() and int(devices)):
        raise UsageError(f"devices {str(devices)!r}: a number or auto")


def launch_ranks(words: list[str], ranks: int, began: float | None = None) -> None:
    """Run the command `troodon WORDS` as ranks of this machine, one for each device.

    Raises what ended the first rank that failed: UsageError, Interrupted or RankFailed.
    """
    launch.raise_failure(launch.launch(words, ranks, began))


def is_first() -> bool:
    """Whether this process speaks for a command: it is not one of several ranks, or the first of those of others."""
    return RENDEZVOUS not in os.environ and os.environ.get("RANK", "0") == "0"


def suggest_next(*commands: str) -> None:
    """Print which commands may follow: once, also where several ranks run."""
    if is_first():
        say("next:" + "".join(f"\n  {command}" for command in commands))
