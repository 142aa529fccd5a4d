"""The recipe `auto`: from a look at the images, a device and a length, a config and the reasons for it.

docs/small-data.md has the evidence. It is of the smallest network, thousands of images and minutes of a processor;
the larger ones are the same method, and this rule says that they were not measured when it takes them.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from troodon.learn.config import PretrainConfig
from troodon.model.config import ViTConfig
from troodon.model.counts import flops
from troodon.recipes.lengths import for_steps
from troodon.recipes.own import SAME_SHADES, SMALL_CROPS, STRONG_COLOURS, WEAK_COLOURS, contrast_of_views, small
from troodon.text import duration
from troodon.views.config import PhotometricConfig

if TYPE_CHECKING:
    from troodon.images.look import Look

Device = Literal["cpu", "cuda"]
FLOPS_A_SECOND = {"cpu": 1e11, "cuda": 5e13}  # of a core or a device, while it trains such networks; rough
MINUTES = {"cpu": 10, "cuda": 60}  # of a run of which nothing else is said
EVEN_HUES = 0.95  # above it the hues of a set are as good as drawn by chance
FEW_HUES = 0.75  # below it the images are of one kind, which their shades tell apart
FEWEST = 8  # images a step
LEARNABLE = 100_000  # images, up to which released weights are the better start


class Size(NamedTuple):
    """A network, the sides of its crops with their shares of the run, and from how many FLOPs of training it is worth
    its cost."""

    name: str
    vit: ViTConfig
    crops: tuple[tuple[int, float], ...]
    inference_px: int
    batch: int
    worth: float
    is_measured: bool = False


SIZES = (
    Size("a ViT of 1 M parameters with patches of 8 pixels", small().vit, SMALL_CROPS, 64, 64, 0.0, is_measured=True),
    Size(
        "a ViT of 6 M parameters with patches of 8 pixels",
        replace(small().vit, dim=256, depth=6, heads=4, grid=6, mlp_width=1024, stem_width=384),
        ((24, 0.4), (32, 0.4), (48, 0.2)),
        96,
        128,
        3e15,
    ),
    Size(
        "a ViT-S with patches of 16 pixels",
        ViTConfig(dim=384, depth=12, heads=6, patch=16, grid=8, layer_scale=0.1, stem="convolutional"),
        ((64, 0.4), (96, 0.4), (128, 0.2)),
        224,
        256,
        3e16,
    ),
)


@dataclass(frozen=True)
class Choice:
    """A config, and a line for each choice that says why."""

    config: PretrainConfig
    reasons: tuple[str, ...]


def auto(steps: int = 4000) -> PretrainConfig:
    """What the images, the time and the device ask for: network, crops, batch, colours, objective, rates.

    Command: troodon pretrain auto --data photos/ --out RUN --minutes 10. It says what it chose and why; every choice
    can be set otherwise (--batch 32). Without images, as here, it is `small`. On Tiny-50, 11,500 images of 50 classes,
    after 5 minutes of one Xeon core without bf16 products, three seeds: k-NN 31.0 % (30.7 to 31.4) and linear 38.4 %
    (38.2 to 38.7); after 20 minutes 36.1 % (35.0 to 37.0) and 40.9 % (40.4 to 41.6). docs/small-data.md has the rule.
    """
    return small(steps)


def automatic(
    look: "Look", *, minutes: float = 0.0, steps: int | None = None, device: Device = "cpu", devices: int = 1
) -> Choice:
    """The config for a set of images, on `devices` cores or accelerators, for so many minutes or steps.

    Without a length it takes that of MINUTES.
    """
    if not steps:
        minutes = minutes or MINUTES[device]
    rate = devices * FLOPS_A_SECOND[device]
    size = [s for s in SIZES if _flops(s, minutes, steps, rate) >= s.worth][-1]
    batch = _batch(look.images, size.batch, devices if device == "cuda" else 1)
    colours, about_colours = _colours(look)
    vit = replace(size.vit, channels=look.channels)
    px, about_px = _in_use(look, size)
    config = contrast_of_views(vit, size.crops, batch=batch, photometric=colours, inference_px=px)
    config = for_steps(config, steps) if steps else replace(config, minutes=minutes)
    where = f"{devices} {'core' if device == 'cpu' else 'GPU'}{'s' * (devices > 1)}"
    length = f"{steps:,} steps" if steps else f"{duration(60 * minutes)} on {where}"
    evidence = "" if size.is_measured else "; the rule was not measured at this size"
    few = "" if batch >= size.batch else f", as there are only {look.images:,}"
    views, sides = config.crops.globals, ", then ".join(str(px) for px, _ in size.crops)
    released = f": for up to {LEARNABLE:,} photographs released weights are mostly the better start (--init NAME)"
    return Choice(
        config,
        (
            f"images       {look.images:,}, the shorter side mostly {look.side} pixels",
            f"start        random weights{released if look.images <= LEARNABLE else ''}",
            f"network      {size.name} after a convolutional stem, for {length}{evidence}",
            f"objective    contrast of {views} views of each image, {sides} pixels wide; small ones cost least",
            f"batch        {batch} images{few}",
            f"colours      {about_colours}",
            f"in use       it looks at images with {px} pixels, {about_px}",
        ),
    )


def adapting(config: PretrainConfig, name: str, images: int, minutes: float, steps: int | None) -> Choice:
    """The choice where there are weights to go on from: `config` is that of the recipe `adapt` for them."""
    config = for_steps(config, steps) if steps else replace(config, minutes=minutes) if minutes else config
    length = duration(60 * minutes) if config.minutes else f"{config.steps:,} steps"
    return Choice(
        config,
        (
            f"images       {images:,}",
            f"start        {name}: its weights know more than so many images teach, so they are adapted (recipe adapt)",
            f"length       {length}; where images have labels, the best weights are kept",
        ),
    )


def _batch(images: int, most: int, devices: int) -> int:
    """Images a step: `most`, or fewer of a set so small that most of it would be in each step; whole for devices."""
    batch = max(FEWEST, min(most, images // 4 // 8 * 8))
    return -(-batch // devices) * devices


def _in_use(look: "Look", size: Size) -> tuple[int, str]:
    """The side that images are looked at with, and why: no more pixels than most have, nor fewer than in crops."""
    patch, crop = size.vit.patch, size.crops[-1][0]
    px = min(size.inference_px, max(crop, -(-look.side // patch) * patch))
    return px, "as it sees more in them than in crops" if px > crop else "as most have no more"


def _flops(size: Size, minutes: float, steps: int | None, rate: float) -> float:
    """What a run of such a network computes in its length: a backward pass is as much as two forward passes."""
    if not steps:
        return 60 * minutes * rate
    of_crop = sum(share * flops(size.vit, (px // size.vit.patch,) * 2) for px, share in size.crops)
    return 3 * steps * size.batch * small().crops.globals * of_crop


def _colours(look: "Look") -> tuple[PhotometricConfig, str]:
    """Colour changes, and why."""
    if look.channels != 3:
        each = replace(WEAK_COLOURS, mean=(0.5,) * look.channels, std=(0.25,) * look.channels)
        return each, f"images have {look.channels} channels: brightness, contrast and sharpness change"
    if look.is_grey:
        return WEAK_COLOURS, "the images are grey: brightness, contrast and sharpness change"
    used = f"({look.hues:.2f} of 1)"
    if look.hues > EVEN_HUES:
        return STRONG_COLOURS, f"changed freely: hues are used evenly {used}, so they say little of what is shown"
    if look.hues > FEW_HUES:
        return WEAK_COLOURS, f"changed little: hues are used unevenly {used}, so they say something of what is shown"
    return SAME_SHADES, f"changed least, brightness too: few hues are used {used}, so shades say something as well"
