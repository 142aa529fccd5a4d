"""Settings of `troodon pack`. No torch here."""

from dataclasses import dataclass
from typing import Literal

from troodon.config import within


@dataclass(frozen=True)
class PackConfig:
    """How `pack` writes images into shards."""

    side: int = 0
    """Pixels: images whose shorter side is longer are resized to this; 0 resizes none."""
    encode: Literal["as-is", "jpeg", "png", "webp"] = "as-is"
    """Encode every image in this format. as-is: images that are not resized keep their bytes, the others their kind."""
    quality: int = 92
    """Quality of JPEG and WebP, for images that are encoded again."""
    shard_mb: int = 1000
    """Approximate size of a shard, in megabytes."""

    def __post_init__(self) -> None:
        within(self, "", 0, None, "side")
        within(self, "", 1, 100, "quality")
        within(self, "", 1, None, "shard_mb")
