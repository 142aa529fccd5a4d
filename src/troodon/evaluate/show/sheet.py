"""A sheet of pictures: a title, notes, and a grid of tiles with text below them, at twice the size it is read at."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from troodon.text import printable

# Lengths are as a page shows them; the picture has DENSITY pixels for each. Shape suffixes: h w any size.

DENSITY = 2
EDGE, GAP, LINE = 16, 8, 15
TITLE, TEXT = 19, 12  # sizes of letters
MIN_WIDTH = 560
WHITE, INK, GREY = (255, 255, 255), (34, 34, 40), (92, 92, 102)
# Dark blue to yellow by way of green (the ends and quarters of viridis): brighter is more, also without colours.
SCALE = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)


@dataclass(frozen=True)
class Tile:
    """A picture, scaled to fit its cell without a change of its aspect, and the text below it, which may wrap."""

    picture: Image.Image
    text: str = ""
    frame: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Sheet:
    """What stands on a sheet; a row may leave cells empty, and `heads` are the titles of columns."""

    title: str
    notes: Sequence[str]
    rows: Sequence[Sequence[Tile | None]]
    cell: int = 168  # the side of a cell
    heads: Sequence[str] = ()
    scale: tuple[str, str] | None = None  # what the ends of the scale of colours mean
    swatches: Sequence[tuple[tuple[int, int, int], str]] = field(default_factory=tuple)  # what single colours mean


def scale_colours(values: np.ndarray) -> np.ndarray:
    """Values from 0 to 1, of any shape, as colours of the scale: uint8 (..., 3)."""
    at = np.clip(values, 0, 1)
    return (
        np.stack([np.interp(at, np.linspace(0, 1, len(SCALE)), SCALE[:, i]) for i in range(3)], -1).round().astype("u1")
    )


def in_cell(size: tuple[int, int], cell: int) -> tuple[int, int]:
    """The pixels (width, height) of a picture of this size in a cell of this side."""
    longest = max(size)
    width, height = (max(1, round(side * cell * DENSITY / longest)) for side in size)
    return width, height


def draw(sheet: Sheet) -> Image.Image:
    """The sheet as a picture, as wide as its columns need; no text is cut, but wrapped."""
    columns = max(map(len, sheet.rows), default=1)
    width = max(MIN_WIDTH, 2 * EDGE + columns * sheet.cell + (columns - 1) * GAP)
    inner = width - 2 * EDGE
    texts = [[wrap(tile.text, sheet.cell) if tile else [] for tile in row] for row in sheet.rows]
    heights = [_row_height(row, lines, sheet.cell) + 2 * GAP for row, lines in zip(sheet.rows, texts, strict=True)]
    title = wrap(sheet.title, inner, TITLE)
    notes = [line for note in sheet.notes for line in wrap(note, inner)]
    head = EDGE + len(title) * (TITLE + 6) + len(notes) * LINE + GAP
    legend = (LINE + GAP) * bool(sheet.scale or sheet.swatches)
    height = head + legend + LINE * bool(sheet.heads) + sum(heights) + EDGE
    page = Image.new("RGB", (width * DENSITY, height * DENSITY), WHITE)
    y = _write(page, EDGE, EDGE, title, TITLE, INK)
    y = _write(page, EDGE, y, notes, TEXT, GREY) + GAP
    if legend:
        _legend(page, y, sheet)
        y += legend
    lefts = [EDGE + i * (sheet.cell + GAP) for i in range(columns)]
    for left, text in zip(lefts, sheet.heads):
        _write(page, left, y, [text], TEXT, INK)
    y += LINE * bool(sheet.heads)
    for row, lines, down in zip(sheet.rows, texts, heights, strict=True):
        for left, tile, text in zip(lefts, row, lines):
            if tile is not None:
                _paste(page, left, y, tile, sheet.cell)
                _write(page, left, y + _tile_height(tile, sheet.cell) + 2, text, TEXT, GREY)
        y += down
    return page


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG, which says that it has twice the usual pixels for each inch."""
    data = io.BytesIO()
    picture.save(data, "PNG", dpi=(72 * DENSITY, 72 * DENSITY))
    return data.getvalue()


def wrap(text: str, width: int, size: int = TEXT) -> list[str]:
    """The lines of a text no wider than `width`; words too long for one, such as names of files, are broken.

    Characters that the font does not have, or that do not print, are written out, as \\xe9.
    """
    font, lines = _font(size), []
    shown = "".join(c if _has(c) else c.encode("unicode_escape").decode() for c in printable(text))
    for word in shown.split():
        line = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(line) <= width * DENSITY:
            lines[-1] = line
            continue
        while font.getlength(word) > width * DENSITY:
            fits = max(1, sum(font.getlength(word[: n + 1]) <= width * DENSITY for n in range(len(word))))
            at = max((word.rfind(mark, 0, fits) + 1 for mark in "/_-"), default=0) or fits
            lines.append(word[:at])
            word = word[at:]
        lines.append(word)
    return lines


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size * DENSITY)
    assert isinstance(font, ImageFont.FreeTypeFont)  # which every wheel of Pillow can draw
    return font


@cache
def _has(character: str) -> bool:
    """Whether the font has a glyph for the character, other than that of characters it lacks."""
    drawn = []
    for one in (character, "\U0010ffff"):
        glyph = Image.new("L", (3 * TEXT * DENSITY, 3 * TEXT * DENSITY))
        ImageDraw.Draw(glyph).text((TEXT, TEXT), one, fill=255, font=_font(TEXT))
        drawn.append(glyph.tobytes())
    return drawn[0] != drawn[1]


def _row_height(row: Sequence[Tile | None], texts: Sequence[Sequence[str]], cell: int) -> int:
    return max((_tile_height(tile, cell) + LINE * len(text) for tile, text in zip(row, texts) if tile), default=0)


def _tile_height(tile: Tile, cell: int) -> int:
    return -(-in_cell(tile.picture.size, cell)[1] // DENSITY)


def _paste(page: Image.Image, x: int, y: int, tile: Tile, cell: int) -> None:
    size, (left, top) = in_cell(tile.picture.size, cell), (x * DENSITY, y * DENSITY)
    page.paste(tile.picture.resize(size, Image.Resampling.LANCZOS), (left, top))
    if tile.frame is not None:
        box = (left, top, left + size[0] - 1, top + size[1] - 1)
        ImageDraw.Draw(page).rectangle(box, outline=tile.frame, width=3 * DENSITY)


def _write(page: Image.Image, x: int, y: int, lines: Sequence[str], size: int, ink: tuple) -> int:
    """Write lines from this corner; returns where the next one starts."""
    step = TITLE + 6 if size == TITLE else LINE
    for i, line in enumerate(lines):
        ImageDraw.Draw(page).text((x * DENSITY, (y + i * step) * DENSITY), line, fill=ink, font=_font(size))
    return y + len(lines) * step


def _legend(page: Image.Image, y: int, sheet: Sheet) -> None:
    x, length = EDGE, 120
    if sheet.scale:
        low, high = sheet.scale
        _write(page, x, y, [low], TEXT, INK)
        x += _length(low) + 6
        bar = np.broadcast_to(scale_colours(np.linspace(0, 1, length * DENSITY)), (11 * DENSITY, length * DENSITY, 3))
        page.paste(Image.fromarray(np.ascontiguousarray(bar)), (x * DENSITY, (y + 2) * DENSITY))
        _write(page, x + length + 6, y, [high], TEXT, INK)
    for colour, text in sheet.swatches:
        ImageDraw.Draw(page).rectangle([v * DENSITY for v in (x, y + 2, x + 11, y + 13)], fill=colour)
        _write(page, x + 17, y, [text], TEXT, INK)
        x += 17 + _length(text) + 18


def _length(text: str) -> int:
    return -(-int(_font(TEXT).getlength(text)) // DENSITY)
