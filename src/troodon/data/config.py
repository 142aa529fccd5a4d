"""What can be set about what the network sees. No torch here."""

from dataclasses import dataclass

from troodon.config import UsageError, within


@dataclass(frozen=True)
class CropsConfig:
    """Multi-crop views of one image (https://arxiv.org/abs/2006.09882, https://arxiv.org/abs/2304.07193)."""

    global_px: int = 224
    """Side of a global crop, in pixels."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Share of the image's area that a global crop covers."""
    local_px: int = 98
    """Side of a local crop, in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Share of the image's area that a local crop covers."""
    locals: int = 8
    """Local crops per image; there are always two global ones."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a crop's width over its height, drawn log-uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        within(self, "crops.", 1, None, "global_px", "local_px")
        within(self, "crops.", 0, None, "locals")
        within(self, "crops.", 0, 1, "global_scale", "local_scale", "flip")
        _ranges(self, "crops.", "global_scale", "local_scale", "aspect")
        if min(self.aspect) <= 0:
            raise UsageError(f"crops.aspect {min(self.aspect)}: must be above 0")


@dataclass(frozen=True)
class PhotometricConfig:
    """Colour changes of a view. Defaults are what the released models were trained with."""

    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """Largest shift of the hue, in turns of the colour circle."""
    grey: float = 0.2
    """Probability of losing all colour."""
    blur: tuple[float, float, float] = (0.0, 0.9, 0.5)
    """Probability of a Gaussian blur: first global, second global, local crops. The paper says 1.0 0.1 0.5."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the crop."""
    solarise: float = 0.2
    """Probability of solarisation, of the second global crop only."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        within(self, "photometric.", 0, 1, "jitter", "grey", "blur", "solarise")
        within(self, "photometric.", 0, None, "brightness", "contrast", "saturation")
        within(self, "photometric.", 0, 0.5, "hue")
        within(self, "photometric.", 0.01, None, "blur_sigma", "std")
        _ranges(self, "photometric.", "blur_sigma")


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
