"""Images as they are embedded in the page: thumbnails, and pictures from artifacts."""

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from troodon.images.decode import BadImage, decode, to_rgb
from troodon.images.index import Index
from troodon.report.markup import Content, Markup, data_uri, h

SIDE = 96  # pixels of a thumbnail's longer side
PICTURE = 1400  # pixels of an embedded picture's longer side, at most
BUDGET = 400_000  # bytes of an embedded picture; more is recompressed


@dataclass(frozen=True)
class Frame:
    """How a thumbnail is shown: `kept` ones have a frame; `caption` stands below."""

    caption: Content = None
    kept: bool = False


def thumbnail(index: Index, row: int, frame: Frame = Frame(), side: int = SIDE) -> Markup:
    """A thumbnail of row `row` of the index, its longer side `side` pixels at most; a grey box if the image is missing
    or broken."""
    path = index.path(row)
    try:
        source, longest = jpeg(to_rgb(index.decode(row, None, functools.partial(_smaller, side))), side)
    except (OSError, BadImage) as error:
        reason = error.reason if isinstance(error, BadImage) else "the file is gone or was cut short"
        image = h("span", class_="missing", role="img", aria_label=f"{path}: {reason}", title=f"{path}: {reason}")
    else:
        # Very small images are enlarged without interpolation.
        image = h("img", src=source, alt=path, title=path, class_="tiny" if longest <= 40 else None)
    below = h("figcaption", frame.caption) if frame.caption is not None else None
    return h("figure", h("span", image, class_="box"), below, class_="thumb kept" if frame.kept else "thumb")


def _smaller(side: int, height: int, width: int) -> int:
    return next((times for times in (8, 4, 2) if max(height, width) >= 2 * times * side), 1)


def jpeg(pixels_HWC: np.ndarray, side: int = SIDE) -> tuple[str, int]:
    """A data URI of the image, whose longer side is `side` pixels at most, and the longer side of the original."""
    image = Image.fromarray(pixels_HWC)
    longest = max(image.size)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80, optimize=True)
    return data_uri(out.getvalue(), "jpeg"), longest


def picture(path: Path, alt: str) -> Markup | None:
    """A picture from an artifact, scaled and recompressed if it is very large. None if it cannot be read."""
    try:
        data = path.read_bytes()
        if len(data) <= BUDGET:
            decode(data)  # a broken picture is not embedded
            return h("img", src=data_uri(data, "png"), alt=alt, class_="picture")
        image = Image.fromarray(decode(data))
    except (OSError, BadImage):
        return None
    image.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    for quality in (88, 75, 60):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality, optimize=True)
        if out.tell() <= BUDGET:
            break
    return h("img", src=data_uri(out.getvalue(), "jpeg"), alt=alt, class_="picture")


def spread(rows: list, count: int) -> list:
    """`count` rows, evenly spaced, from the first to the last."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / max(1, count - 1))] for i in range(count)]
