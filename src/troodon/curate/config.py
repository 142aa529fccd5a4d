"""What can be set about curation. No torch here."""

from dataclasses import dataclass
from typing import Literal

from troodon.config import UsageError

Space = Literal["plain", "centred", "whitened"]


@dataclass(frozen=True)
class CurateConfig:
    """From a pool of images to a selection (https://arxiv.org/abs/2304.07193, section 3)."""

    tokens: Literal["cls", "cls+mean"] = "cls"
    """What stands for an image: its class token, or that and the mean of its patches."""
    within_curated: Literal["keep", "drop"] = "keep"
    """Duplicates among the curated images themselves: keep every readable one, or drop them too."""
    duplicate_space: Space = "whitened"
    """How embeddings are compared to find near-duplicates (see space.py)."""
    threshold: float | None = None
    """Cosine above which two images are near-duplicates; none: calibrated on the images themselves."""
    false_merges: float = 0.01
    """Calibration: how many other images, on average, one image may be wrongly taken for a copy of."""
    calibration_images: int = 250
    """Calibration: images that are drawn, attacked, and compared."""
    recheck_above: int = 4
    """Groups of more near-duplicates than this may be chains: each member must resemble the kept one itself."""
    retrieve_space: Space = "whitened"
    """How embeddings are compared to retrieve."""
    k: int = 4
    """Uncurated images to retrieve for each curated one."""
    minimum: float = -1.0
    """Cosine below which nothing is retrieved."""
    collisions: Literal["unique", "multiplicity"] = "unique"
    """An image retrieved several times counts once, or as often as it was retrieved (its weight)."""
    batch: int = 64
    """Images that the backbone sees at once."""
    threads: int = 0
    """Threads that read and decode; 0: as many as there are cores, up to 16."""
    seed: int = 0
    """Of the images drawn for calibration, and of the attacks on them."""

    def __post_init__(self) -> None:
        _within("threshold", self.threshold, -1, 1)
        _within("minimum", self.minimum, -1, 1)
        for name in ("k", "batch", "recheck_above", "calibration_images"):
            _within(name, getattr(self, name), 1, None)
        _within("threads", self.threads, 0, None)
        if not self.false_merges > 0:
            raise UsageError(f"false_merges {self.false_merges}: must be above 0; 0.01 is one image in a hundred")


def _within(name: str, value: float | None, low: float, high: float | None) -> None:
    if value is not None and not (low <= value and (high is None or value <= high)):
        raise UsageError(f"{name} {value}: must be " + (f"{low} or more" if high is None else f"from {low} to {high}"))
