"""Some images of an index, and what a backbone is shown of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from troodon.config import pair
from troodon.images.decode import BadImage, to_rgb
from troodon.images.index import Index
from troodon.model.backbone import Backbone
from troodon.model.preprocess import crop, whole, with_size


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as it was read."""

    path: str
    label: str | None
    pixels_HWC: np.ndarray


@dataclasses.dataclass(frozen=True)
class View:
    """What of an image the network is shown: its crop, of this size; or all of it, with a shorter side of this size."""

    size: Any = None  # pixels of a side, or (height, width); None: that of the backbone
    whole: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The same, as `Backbone.features` takes it."""
        return {"size": self.size, "keep_aspect": self.whole}

    def sizes(self, backbone: Backbone) -> str:
        """In words."""
        height, width = pair(with_size(backbone.preprocessing, self.size, backbone.config.patch).crop)
        shorter = f"whole images, {min(height, width)} pixels on the shorter side"
        return f"{shorter if self.whole else f'{height} x {width} pixels'}, patches of {backbone.config.patch}"


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` rows, spread evenly over them, in their order."""
    if count <= limit:
        return list(range(count))
    return [int((i + 0.5) * count / limit) for i in range(limit)]


def read_pictures(index: Index, rows: Sequence[int], channels: int) -> tuple[list[Picture], list[str]]:
    """The readable images among these rows, and why the others are not."""
    pictures, broken = [], []
    for row in rows:
        try:
            picture = Picture(index.path(row), index.table["label"][row].as_py(), index.decode(row, channels))
        except (BadImage, OSError) as error:
            broken.append(f"{index.path(row)}: {error}")
        else:
            pictures.append(picture)
    return pictures, broken


def shown(backbone: Backbone, picture: Picture, view: View, side: int) -> Image.Image:
    """The part of an image that the network is shown, sharp enough for a longer side of so many pixels."""
    p, patch = with_size(backbone.preprocessing, view.size, backbone.config.patch), backbone.config.patch
    times = -(-side // max(pair(p.crop)))
    height, width = (times * length for length in pair(p.crop))
    plain = (0.0,) * len(p.mean), (1.0,) * len(p.mean)  # the values stay pixels
    p = dataclasses.replace(p, resize=times * p.resize, crop=(height, width), mean=plain[0], std=plain[1])
    x_CHW = whole(picture.pixels_HWC, p, times * patch) if view.whole else crop(picture.pixels_HWC, p)
    return Image.fromarray(to_rgb((x_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()))


def enlarged(colours_hw3: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Colours of patches as a picture of this width and height, in which each patch keeps its corners."""
    return Image.fromarray(np.ascontiguousarray(colours_hw3)).resize(size, Image.Resampling.NEAREST)
