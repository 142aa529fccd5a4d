"""Settings of crops, colour changes and masks. No torch here."""

import math
from bisect import bisect
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from troodon.config import UsageError, nearest, pair, within

Size = tuple[int, int]  # height and width, in pixels


ATTACK_KINDS = (  # the functions of attacks.py, in the order in which they are numbered
    "resave", "jpeg", "blur", "sharpen", "noise", "text", "sticker",
    "shrink", "enlarge", "stretch", "crop", "pad", "flip", "rotate", "screenshot",
    "brightness", "contrast", "saturation", "hue", "grey", "gamma", "posterise", "vignette",
    "mix",
)  # fmt: skip
# Further ones, for training that names them. They are none of those above, from which recorded runs and calibration
# draw by number.
FURTHER_ATTACK_KINDS = ("tight_crop", "quarter_turn", "vertical_flip", "inset", "perspective")
ALL_ATTACK_KINDS = ATTACK_KINDS + FURTHER_ATTACK_KINDS


@dataclass(frozen=True)
class CropsConfig:
    """Multi-crop views of one image (https://arxiv.org/abs/2006.09882, https://arxiv.org/abs/2304.07193)."""

    global_px: int | Size = 224
    """Side of a global crop, in pixels; or its height and width."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Share of the image's area that a global crop covers."""
    local_px: int | Size = 98
    """Side of a local crop, in pixels; or its height and width."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Share of the image's area that a local crop covers."""
    locals: int = 8
    """Local crops per image."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the aspect ratio (width over height) of the box, drawn log-uniformly; relative to that of the crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    attack: float = 0.0
    """Probability that the image is attacked before a global crop is taken, as images are changed on the web: with a
    kind and a strength drawn for each crop (see views/attacks.py). Only for colour and grey images."""
    attack_kinds: tuple[str, ...] = ()
    """Kinds of attacks to draw from; if empty, all but tight_crop, quarter_turn, vertical_flip, inset and
    perspective."""
    visits: int = 0
    """Number of different sets of crops and colours of an image, which its visits use in turn; 0: new ones at every
    visit. With few, what a frozen teacher computes can be cached."""
    mixed: tuple[tuple[int, int, float], ...] = ()
    """Side of global crops, side of local crops, weight: each step has one of these pairs, in place of global_px and
    local_px, so often as the weights say (high-resolution training, https://arxiv.org/abs/2508.10104). Empty: none."""
    globals: int = 2
    """Global crops per image."""
    mixed_by: Literal["chance", "progress"] = "chance"
    """Whether each step draws its pair of `mixed` by chance; or the run goes through them in their order, each for its
    share, such as small crops first and larger ones last."""

    LATER = ("globals", "mixed_by")

    def __post_init__(self) -> None:
        within(self, "crops.", 1, None, "global_px", "local_px")
        within(self, "crops.", 0, None, "locals", "visits")
        within(self, "crops.", 2, None, "globals")
        within(self, "crops.", 0, 1, "global_scale", "local_scale", "flip", "attack")
        _ranges(self, "crops.", "global_scale", "local_scale", "aspect")
        if min(self.aspect) <= 0:
            raise UsageError(f"crops.aspect {min(self.aspect)}: must be above 0")
        for unknown in [kind for kind in self.attack_kinds if kind not in ALL_ATTACK_KINDS]:
            raise nearest("crops.attack_kinds", unknown, ALL_ATTACK_KINDS)
        for wide, narrow, weight in self.mixed:
            if min(wide, narrow) < 1 or not 0 < weight < math.inf:
                reason = "sides must be 1 or more, and the weight above 0"
                raise UsageError(f"crops.mixed {wide} {narrow} {weight:g}: {reason}")

    def sizes(self) -> tuple[tuple[Size, Size, float], ...]:
        """All sizes that a step may have: size of global crops, size of local crops, probability."""
        total = sum(weight for *_, weight in self.mixed)
        mixed = tuple((pair(wide), pair(narrow), weight / total) for wide, narrow, weight in self.mixed)
        return mixed or ((pair(self.global_px), pair(self.local_px), 1.0),)

    def pick_size(self, u: float) -> "CropsConfig":
        """The settings of one step, with the size of `mixed` that `u` picks, from 0 to 1: drawn uniformly, or the share
        of the run that is over."""
        if not self.mixed:
            return self
        edges = list(accumulate(weight for *_, weight in self.mixed))
        wide, narrow, _ = self.mixed[bisect(edges[:-1], u * edges[-1])]
        return replace(self, global_px=wide, local_px=narrow, mixed=())


BLURS = {"released": (0.0, 0.9, 0.5), "paper": (1.0, 0.1, 0.5)}


@dataclass(frozen=True)
class PhotometricConfig:
    """Colour changes of a crop. The defaults are those of the released models' training."""

    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """Largest shift of the hue, as a fraction of the colour circle."""
    grey: float = 0.2
    """Probability of conversion to grey."""
    blur: Literal["released", "paper"] | tuple[float, float, float] = "released"
    """Probability of a Gaussian blur of the first global, the second global and local crops; or a name: `released` is
    0 0.9 0.5, with which the released models were trained, and `paper` is 1 0.1 0.5, which the paper gives. Further
    global crops are treated as the first and the second in turn."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the crop."""
    solarise: float = 0.2
    """Probability of solarisation, of the second global crop only, and of every second one after it."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, from 0 to 1, subtracted at the end. Without exactly 3 channels, saturation, hue and grey do
    nothing, and contrast is relative to the mean of all channels."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, by which the result is divided."""

    def __post_init__(self) -> None:
        within(self, "photometric.", 0, 1, "jitter", "grey", "solarise", *(["blur"] if self.blur not in BLURS else []))
        within(self, "photometric.", 0, None, "brightness", "contrast", "saturation")
        within(self, "photometric.", 0, 0.5, "hue")
        within(self, "photometric.", 0.01, None, "blur_sigma", "std")
        _ranges(self, "photometric.", "blur_sigma")
        if len(self.mean) != len(self.std):
            counts = f"photometric.mean has {len(self.mean)} numbers and photometric.std {len(self.std)}"
            raise UsageError(f"{counts}: give one number for every channel in each")

    @property
    def blurs(self) -> tuple[float, float, float]:
        """The probabilities that `blur` stands for."""
        return self.blur if isinstance(self.blur, tuple) else BLURS[self.blur]


@dataclass(frozen=True)
class MasksConfig:
    """Block masks of the global crops for the patch objective (https://arxiv.org/abs/2106.08254)."""

    share: float = 0.5
    """Share of the global crops that get a mask."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Range of the share of a crop's patches that are masked."""

    def __post_init__(self) -> None:
        within(self, "masks.", 0, 1, "share", "ratio")
        _ranges(self, "masks.", "ratio")


def _ranges(config: object, section: str, *names: str) -> None:
    for name in names:
        low, high = getattr(config, name)
        if low > high:
            raise UsageError(f"{section}{name} {low} {high}: the lower end comes first: {high} {low}")
