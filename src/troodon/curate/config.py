"""What can be set about curation. No torch here."""

from dataclasses import dataclass
from typing import Literal

from troodon.config import UsageError, within

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
        within(self, "", -1, 1, "threshold", "minimum")
        within(self, "", 1, None, "k", "batch", "recheck_above", "calibration_images")
        within(self, "", 0, None, "threads", "seed")
        if not self.false_merges > 0:
            raise UsageError(f"false_merges {self.false_merges}: must be above 0; 0.01 is one image in a hundred")
