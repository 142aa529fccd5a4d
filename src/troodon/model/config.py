"""What a network is made of, in numbers. No torch here."""

import math
from dataclasses import dataclass
from typing import Literal

from troodon.config import Range, UsageError, check_range, to_dict, within


@dataclass(frozen=True)
class ViTConfig:
    """The vision transformer (https://arxiv.org/abs/2304.07193, appendix B)."""

    dim: int = 384
    """Channels of a token."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 6
    """Attention heads of a block."""
    patch: int = 14
    """Side of a patch, in pixels."""
    grid: int = 37
    """Patches on a side of the grid on which positions are learned (518 pixels / 14)."""
    registers: int = 0
    """Register tokens (https://arxiv.org/abs/2309.16588)."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    drop_path: float = 0.0
    """Share of the sequences that skip a branch in training; the same for every block."""
    layer_scale: float = 1e-5
    """Initial value of LayerScale."""
    position_offset: float = 0.0
    """Added to the grid when positions are resized: 0.1 in the released models without registers."""
    position_antialias: bool = True
    """Antialias when positions are resized: no in the released models without registers."""
    channels: int = 3
    """Colours of an image."""
    mlp_width: int | None = None
    """Channels inside the MLP; 4 times the outside if left out, and two thirds of that, rounded up to 8, if gated."""
    norm_eps: float = 1e-6
    """Added to the variance in LayerNorm."""
    positions: Literal["learned", "rope"] = "learned"
    """Learned, and resized to the grid; or rotary, as in DINOv3 (https://arxiv.org/abs/2508.10104), without `grid`."""

    stem: Literal["linear", "convolutional"] = "linear"
    """What makes a vector of a patch: one linear map of its pixels; or 3 x 3 convolutions of stride 2 with batch
    normalisation, which learn much faster from few images (https://arxiv.org/abs/2106.14881), for patches of 2, 4, 8,
    16 or 32 pixels."""
    stem_width: int | None = None
    """Channels after the last convolution of such a stem, each of which has twice those of the one before; as many as a
    token if left out."""

    LATER = ("mlp_width", "norm_eps", "positions", "stem", "stem_width")

    def __post_init__(self) -> None:
        within(self, "vit.", 1, None, "dim", "depth", "heads", "patch", "grid", "channels", "mlp_width", "stem_width")
        within(self, "vit.", 0, None, "registers", "layer_scale", "position_offset", "norm_eps")
        if self.dim % self.heads:
            near = max(1, round(self.dim / self.heads)) * self.heads
            raise UsageError(f"vit.dim {self.dim} is not a multiple of vit.heads {self.heads}; the nearest is {near}")
        if self.positions == "rope" and self.dim // self.heads % 4:
            near = f"vit.dim {max(1, round(self.dim / self.heads / 4)) * 4 * self.heads}"
            raise UsageError(f"vit.positions rope: {self.dim // self.heads} channels a head do not divide by 4; {near}")
        if self.stem == "convolutional" and (self.patch & (self.patch - 1) or self.patch == 1):
            near = 2 ** max(1, round(math.log2(self.patch)))
            raise UsageError(
                f"vit.stem convolutional halves sides: vit.patch {self.patch} is no power of 2; set {near}"
            )
        if self.stem_width is not None and self.stem == "linear":
            raise UsageError(f"vit.stem_width {self.stem_width} is of a convolutional stem: set vit.stem convolutional")
        if not 0.0 <= self.drop_path < 1.0:
            raise UsageError(f"vit.drop_path {self.drop_path} is not in [0, 1)")

    @property
    def mlp_hidden(self) -> int:
        """Channels inside the MLP."""
        if self.mlp_width is not None:
            return self.mlp_width
        return 4 * self.dim if self.mlp == "gelu" else (int(4 * self.dim * 2 / 3) + 7) // 8 * 8


@dataclass(frozen=True)
class HeadConfig:
    """The projection head: an MLP, a normalised bottleneck, and cosine prototypes."""

    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3

    def __post_init__(self) -> None:
        within(self, "head: ", 1, None, "prototypes", "hidden", "bottleneck", "layers")


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image to the network's input: resize, centre `crop`, normalise."""

    resize: int = 256
    """Pixels of the shorter side. If `crop` is not square, the image is made to cover a box of its shape whose shorter
    side has as many."""
    crop: int | tuple[int, int] = 224
    """Pixels on a side of what the network sees; or its height and width."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    range: Range | None = None
    """Values of images of more than 8 bits that become 0 and 255; None: by their type (troodon/pixels.py)."""

    def __post_init__(self) -> None:
        check_range(self.range)

    def as_dict(self) -> dict:
        """What is recorded: a range only where there is one."""
        return {name: value for name, value in to_dict(self).items() if value is not None}


SMALL = ViTConfig(dim=384, depth=12, heads=6)
BASE = ViTConfig(dim=768, depth=12, heads=12)
LARGE = ViTConfig(dim=1024, depth=24, heads=16)
GIANT = ViTConfig(dim=1536, depth=40, heads=24, mlp="swiglu")


def depth_group(images: int) -> int:
    """The images of a step among which stochastic depth chooses: all of them, halved as long as at least 12 are left.

    So 1, 2, 4, ... ranks or parts with whole groups each have as many sequences at every step.
    """
    while images % 2 == 0 and images >= 24:
        images //= 2
    return images


def depth_kept(crops: int, drop: float) -> int:
    """How many of a group's crops go through a branch."""
    return max(int(crops * (1.0 - drop)), min(crops, 1))


def stem_widths(config: ViTConfig) -> tuple[int, ...]:
    """Channels after each convolution of a convolutional stem: doubled each time, up to `stem_width`."""
    halvings, last = config.patch.bit_length() - 1, config.stem_width or config.dim
    return tuple(max(8, last >> (halvings - number)) for number in range(1, halvings + 1))
