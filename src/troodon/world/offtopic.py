"""Off-topic images of the embedded world, as a crawl would find: pages, charts, codes, mazes, windows. All seeded."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from troodon.views.attacks import font

Ink = tuple[int, ...]
_SYLLABLES = ("ba", "bel", "da", "do", "lan", "lo", "lin", "ma", "mar", "mi", "ne", "nor", "ra", "sol", "va")


def render_offtopic(seed: int, image: int, px: int = 64) -> tuple[np.ndarray, str]:
    """((px, px, 3) uint8, kind) of off-topic image number `image`: a pure function of its arguments."""
    r = np.random.default_rng([seed, 2, image])
    kind = sorted(KINDS)[int(r.integers(len(KINDS)))]
    paper, ink = _paper_and_ink(r)
    if r.random() < 0.25:  # dark mode
        paper, ink = ink, paper
    side = 2 * px
    canvas = Image.new("RGB", (side, side), paper)
    replacement = KINDS[kind](canvas, ImageDraw.Draw(canvas), side, ink, r)
    return np.asarray((replacement or canvas).reduce(2)).copy(), kind


def words(r: Generator, n: int, max_syllables: int = 3) -> str:
    """`n` random words of up to `max_syllables` syllables, in no language."""
    counts = r.integers(1, max_syllables + 1, n)
    syllables = r.choice(_SYLLABLES, int(counts.sum())).tolist()
    ends = np.cumsum(counts).tolist()
    return " ".join("".join(syllables[a:b]) for a, b in zip([0, *ends[:-1]], ends))


def _vivid(r: Generator) -> Ink:
    hue = np.clip(np.abs((r.random() + np.array([0, 1 / 3, 2 / 3])) % 1 * 6 - 3) - 1, 0, 1)
    return tuple(int(v) for v in (255 * (1 - r.uniform(0.5, 0.9) * (1 - hue)) * r.uniform(0.6, 1.0)))


def _paper_and_ink(r: Generator) -> tuple[Ink, Ink]:
    """A light and a dark colour: white and black half of the time, else tinted."""
    tint = r.random() >= 0.5
    pale = r.integers(205, 256, 3) if tint else np.full(3, 250)
    dark = r.integers(0, 110, 3) if tint else np.full(3, 20)
    return tuple(pale.tolist()), tuple(dark.tolist())


def page(canvas: Image.Image, draw: ImageDraw.ImageDraw, side: int, ink: Ink, r: Generator) -> None:
    size = int(side * r.uniform(0.07, 0.13))
    margin, y = side * r.uniform(0.04, 0.1), side * 0.06
    if r.random() < 0.6:
        draw.text((margin, y), words(r, 2).title(), ink, font(int(size * 1.6)))
        y += size * 2.2
    while y < side * 0.93:
        if r.random() < 0.88:  # else a paragraph ends
            draw.text((margin, y), words(r, 9), ink, font(size))
        y += size * 1.35
    draw.rectangle((side - margin, 0, side, side), canvas.getpixel((0, 0)))


def _axes(draw: ImageDraw.ImageDraw, side: int, ink: Ink, r: Generator) -> None:
    for k in range(int(r.integers(0, 5))):
        y = side * (0.2 + 0.16 * k)
        draw.line((side * 0.12, y, side * 0.95, y), tuple((np.array(ink) // 2 + 90).tolist()), 1)
    draw.line((side * 0.12, side * 0.08, side * 0.12, side * 0.88, side * 0.95, side * 0.88), ink, max(2, side // 60))
    draw.text((side * 0.3, side * 0.01), words(r, 2), ink, font(side // 13))


def bars(canvas: Image.Image, draw: ImageDraw.ImageDraw, side: int, ink: Ink, r: Generator) -> None:
    _axes(draw, side, ink, r)
    n, colours = int(r.integers(3, 9)), [_vivid(r) for _ in range(int(r.integers(1, 4)))]
    step = side * 0.8 / n
    for k, height in enumerate(r.uniform(0.1, 0.72, n)):
        x = side * 0.14 + step * k
        draw.rectangle((x, side * (0.88 - height), x + step * 0.7, side * 0.88 - 2), colours[k % len(colours)])


def lines(canvas: Image.Image, draw: ImageDraw.ImageDraw, side: int, ink: Ink, r: Generator) -> None:
    _axes(draw, side, ink, r)
    n = int(r.integers(5, 25))
    for _ in range(int(r.integers(1, 4))):
        y = np.clip(r.uniform(0.3, 0.7) + r.normal(0, 0.25 / n**0.5, n).cumsum(), 0.12, 0.85)
        points = np.stack([np.linspace(0.13, 0.93, n), y], 1) * side
        draw.line(points.ravel().tolist(), _vivid(r), max(2, side // 40), joint="curve")


def pie(canvas: Image.Image, draw: ImageDraw.ImageDraw, side: int, ink: Ink, r: Generator) -> None:
    cuts = np.concatenate([[0], np.sort(r.uniform(0, 360, int(r.integers(2, 6)))), [360]]) + r.uniform(0, 360)
    for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist()):
        draw.pieslice((side * 0.12, side * 0.18, side * 0.84, side * 0.9), a, b, _vivid(r), ink, max(1, side // 70))
    draw.text((side * 0.1, side * 0.03), words(r, 3), ink, font(side // 11))


def code(canvas: Image.Image, draw: ImageDraw.ImageDraw, side: int, ink: Ink, r: Generator) -> Image.Image:
    n = int(r.choice([21, 25, 29]))
    cells = r.random((n + 4, n + 4)) < 0.5
    cells[:2], cells[-2:], cells[:, :2], cells[:, -2:] = False, False, False, False
    eye = np.pad(np.pad(np.pad(np.ones((3, 3), bool), 1), 1, constant_values=True), 1)
    for y, x in ((1, 1), (1, n - 6), (n - 6, 1)):
        cells[y : y + 9, x : x + 9] = eye
    colours = np.array([canvas.getpixel((0, 0)), ink], np.uint8)
    return Image.fromarray(colours[cells.astype(int)]).resize((side, side), Image.Resampling.NEAREST)


def maze(canvas: Image.Image, draw: ImageDraw.ImageDraw, side: int, ink: Ink, r: Generator) -> None:
    n = int(r.integers(7, 14))
    step, width = side * 0.92 / n, max(2, side // 50)
    edge, down = side * 0.04, r.random((n, n)) < 0.5
    for row in range(n):
        for column in range(n):  # every cell keeps one of two walls: no walls cross
            x, y = edge + column * step, edge + row * step
            draw.line((x, y, x, y + step) if down[row, column] else (x, y, x + step, y), ink, width)
    draw.rectangle((edge, edge, side - edge, side - edge), outline=ink, width=width)


def gradient(canvas: Image.Image, draw: ImageDraw.ImageDraw, side: int, ink: Ink, r: Generator) -> Image.Image:
    corners = r.integers(0, 256, (int(r.integers(1, 3)), 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((side, side), Image.Resampling.BICUBIC)


def static(canvas: Image.Image, draw: ImageDraw.ImageDraw, side: int, ink: Ink, r: Generator) -> Image.Image:
    n = side // int(r.choice([2, 2, 4, 8]))
    noise = r.integers(0, 256, (n, n, int(r.choice([1, 3]))), dtype=np.uint8)
    return Image.fromarray(np.broadcast_to(noise, (n, n, 3)).copy()).resize((side, side), Image.Resampling.NEAREST)


def window(canvas: Image.Image, draw: ImageDraw.ImageDraw, side: int, ink: Ink, r: Generator) -> None:
    bar, accent = side * r.uniform(0.1, 0.16), _vivid(r)
    draw.rectangle((0, 0, side, bar), accent)
    for k in range(3):
        x = side * 0.05 + k * bar * 0.6
        draw.ellipse((x, bar * 0.3, x + bar * 0.4, bar * 0.7), [(237, 106, 94), (245, 191, 79), (98, 197, 84)][k])
    left = side * r.uniform(0.0, 0.35)
    draw.rectangle((0, bar, left, side), tuple((np.array(accent) * 0.4 + 140).astype(int).clip(0, 255).tolist()))
    size, y = int(side * 0.075), bar * 1.4
    while y < side * 0.9:
        if r.random() < 0.3:
            draw.rounded_rectangle((left + side * 0.06, y, left + side * 0.4, y + size * 1.5), size // 2, accent)
            y += size * 0.8
        else:
            draw.text((left + side * 0.06, y), words(r, 4), ink, font(size))
        y += size * 1.5


def sheet(canvas: Image.Image, draw: ImageDraw.ImageDraw, side: int, ink: Ink, r: Generator) -> None:
    rows, columns = int(r.integers(6, 11)), int(r.integers(3, 5))
    high, wide = side / rows, side / columns
    draw.rectangle((0, 0, side, high), _vivid(r))
    for row in range(rows):
        for column in range(columns):
            text = words(r, 1, 2) if row == 0 or column == 0 else str(int(r.integers(1, 9999)))
            draw.text((column * wide + 3, row * high + high * 0.1), text, ink, font(int(high * 0.6)))
        draw.line((0, row * high, side, row * high), ink, 1)
    for column in range(1, columns):
        draw.line((column * wide, 0, column * wide, side), ink, 1)


KINDS: dict[str, Callable[..., Image.Image | None]] = {
    f.__name__: f for f in (page, bars, lines, pie, code, maze, gradient, static, window, sheet)
}
