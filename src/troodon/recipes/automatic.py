"""The recipe `auto`: from a look at the images, a device and a length, a config and the reasons for it.

The evidence is in docs/small-data.md: what was measured are small networks on thousands of images and minutes of a
processor. Larger networks are those of the paper's recipes, with crops of the sizes that such networks are known to
need; between the two this rule interpolates, and says so.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from troodon.learn.config import PretrainConfig
from troodon.model.config import ViTConfig, flops
from troodon.recipes.own import STRONG_COLOURS, WEAK_COLOURS, contrast_of_views
from troodon.views.config import PhotometricConfig

if TYPE_CHECKING:
    from troodon.images.look import Look

Device = Literal["cpu", "cuda", "mps"]
FLOPS_A_SECOND = {"cpu": 5e10, "cuda": 5e13, "mps": 2e12}  # of a core or a device, while it trains; rough
MINUTES = {"cpu": 10, "cuda": 60, "mps": 30}  # of a run of which nothing else is said
EVEN_HUES = 0.95  # above it the hues of a set are as good as drawn by chance


class Size(NamedTuple):
    """A network, the sides of its crops with their shares of the run, and how much training it is worth, in FLOPs."""

    name: str
    vit: ViTConfig
    crops: tuple[tuple[int, float], ...]
    px: int  # at which the backbone looks at images
    worth: float
    is_measured: bool = False


SIZES = (
    Size(
        "a ViT of 0.9 M parameters with patches of 8 pixels",
        ViTConfig(dim=128, depth=4, heads=2, patch=8, grid=4, layer_scale=1.0, stem="convolutional"),
        ((16, 0.4), (24, 0.4), (32, 0.2)),
        64,
        0.0,
        is_measured=True,
    ),
    Size(
        "a ViT of 3 M parameters with patches of 8 pixels",
        ViTConfig(dim=192, depth=6, heads=3, patch=8, grid=6, layer_scale=1.0, stem="convolutional"),
        ((24, 0.4), (32, 0.4), (48, 0.2)),
        96,
        1e15,
    ),
    Size(
        "a ViT-S with patches of 16 pixels",
        ViTConfig(dim=384, depth=12, heads=6, patch=16, grid=8, layer_scale=0.1, stem="convolutional"),
        ((64, 0.4), (96, 0.4), (128, 0.2)),
        224,
        3e16,
    ),
)


@dataclass(frozen=True)
class Choice:
    """A config, and a line for each choice that says why."""

    config: PretrainConfig
    reasons: tuple[str, ...]


def automatic(
    look: "Look", *, minutes: float | None = None, steps: int | None = None, device: Device = "cpu", devices: int = 1
) -> Choice:
    """The config for a set of images, on `devices` cores or accelerators, for so many minutes or steps.

    Without a length it takes that of MINUTES.
    """
    if minutes is None and steps is None:
        minutes = MINUTES[device]
    batch = batch_of(look.images)
    rate = devices * FLOPS_A_SECOND[device]
    size = [s for s in SIZES if _flops(s, batch, minutes, steps, rate) >= s.worth][-1]
    colours, about_colours = _colours(look)
    config = contrast_of_views(size.vit, size.crops, batch=batch, photometric=colours, inference_px=size.px)
    if minutes is not None:
        config = replace(config, minutes=minutes)
    views, sides = config.crops.globals, ", then ".join(str(px) for px, _ in size.crops)
    length = f"{steps:,} steps" if minutes is None else f"{minutes:g} minutes on {devices} x {device}"
    evidence = "" if size.is_measured else " (not measured at this size: between what was, and the paper)"
    few = "" if batch == BATCH else f": a quarter of {look.images:,}, so that a step shows few of them twice"
    reasons = (
        f"network      {size.name}, after a convolutional stem, for {length}{evidence}",
        f"objective    contrast of {views} views of each image, of {sides} pixels: the small ones are cheap",
        f"batch        {batch} images{few}",
        f"colours      {about_colours}",
        f"in use       images are looked at with {size.px} pixels, more than in training",
    )
    return Choice(config, reasons)


BATCH = 64  # images; contrast with fewer is worse, with more no better in the same time


def batch_of(images: int) -> int:
    """Images a step: BATCH, or fewer of a set so small that a step would show many of them more than once."""
    return max(8, min(BATCH, images // 4 // 8 * 8))


def _flops(size: Size, batch: int, minutes: float | None, steps: int | None, rate: float) -> float:
    """What a run of such a network computes in its length: a backward pass is as much as two forward passes."""
    if minutes is not None:
        return 60 * minutes * rate
    of_crop = sum(share * flops(size.vit, (px // size.vit.patch,) * 2) for px, share in size.crops)
    return 3 * (steps or 0) * batch * 8 * of_crop


def _colours(look: "Look") -> tuple[PhotometricConfig, str]:
    """Colour changes, and why."""
    if look.is_grey:
        return WEAK_COLOURS, "the images are grey: only brightness, contrast and blur change"
    if look.hues > EVEN_HUES:
        return (
            STRONG_COLOURS,
            f"changed freely: hues are used evenly ({look.hues:.2f} of 1), so they say little of what is shown",
        )
    return WEAK_COLOURS, f"changed little: hues are used unevenly ({look.hues:.2f} of 1), so they say what is shown"
