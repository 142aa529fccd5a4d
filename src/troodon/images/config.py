"""What can be set about images on their way into shards. No torch here."""

from dataclasses import dataclass
from typing import Literal

from troodon.config import within


@dataclass(frozen=True)
class PackConfig:
    """What becomes of images on their way into shards."""

    side: int = 0
    """Pixels: pictures whose shorter side is longer are made smaller to this; 0 leaves all as they are."""
    encode: Literal["as-is", "jpeg", "png", "webp"] = "as-is"
    """Save every picture so; as-is: those that stay as large as they are keep their bytes, the others their kind."""
    quality: int = 92
    """Of JPEG and WebP, for pictures that are saved again."""
    shard_mb: int = 1000
    """Megabytes of a shard, about."""

    def __post_init__(self) -> None:
        within(self, "", 0, None, "side")
        within(self, "", 1, 100, "quality")
        within(self, "", 1, None, "shard_mb")
