"""Charts as SVG, without scripts, fonts or a library. Colours are classes that page.css defines.

Small charts (`line_chart`, `histogram`) have a fixed aspect ratio and scale with their box. Long ones (`bar_chart`) are
laid out in per cent of the width, so that their text keeps its size on a telephone.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from troodon.report.markup import MINUS, SPACE, Content, Markup, h, number
from troodon.text import plural

WIDTH, HEIGHT = 320, 168
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22  # margins, in units of the drawing
POINTS = 240  # of a line, at most
TOOLTIPS = 48  # of a line, at most


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: stacked lengths, and perhaps an interval for their end."""

    name: str
    label: str  # shown at the right end
    parts: tuple[tuple[str, float], ...]  # (class of the colour, length)
    interval: tuple[float, float] | None = None


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round numbers from `low` to `high`, whose step is 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999) * power
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_text(values: Sequence[float], unit: str = "") -> list[str]:
    """The values as text, with equally many decimals; thousands as 10k, millions as 1M."""
    step = min((b - a for a, b in itertools.pairwise(values)), default=abs(values[0]) if values else 1.0) or 1.0
    largest = max((abs(v) for v in values), default=0.0)
    if largest and largest < 1e-2:
        return [number(v) for v in values]
    if largest >= 1e6 and step >= 1e4:
        out = [f"{v / 1e6:g}M" if v else "0" for v in values]
    elif largest >= 1e4 and step >= 100:
        out = [f"{v / 1e3:g}k" if v else "0" for v in values]
    else:
        out = [f"{v:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" for v in values]
    return [text.replace("-", MINUS) + unit for text in out]


def smooth_mean(y_N: np.ndarray, span: float) -> np.ndarray:
    """Exponential mean over about `span` values to both sides: without lag, and without bias at the ends."""
    keep = math.exp(-1 / span)

    def decayed_sum(values: np.ndarray) -> np.ndarray:
        total, out = 0.0, []
        for value in values:
            total = keep * total + float(value)
            out.append(total)
        return np.array(out)

    total, weight = (decayed_sum(v) + decayed_sum(v[::-1])[::-1] - v for v in (y_N, np.ones(len(y_N))))
    return total / weight


def line_chart(
    x_N: np.ndarray,
    y_N: np.ndarray,
    *,
    label: str,
    colour: str = "c1",
    unit: str = "",
    smooth: bool = True,
    floor: float | None = None,
    x_name: str = "step",
) -> Markup:
    """A line over steps: faint raw values with a bold running mean, or the values with dots (`smooth=False`).

    The vertical axis reaches down to `floor`, if it is given. Far outliers are cut off, and counted at the top.
    """
    drawn = smooth_mean(y_N, max(1.0, len(y_N) / 60)) if smooth and len(y_N) >= 20 else y_N
    low, high, above = _axis_range(y_N, drawn, floor)
    left, right = float(x_N[0]), float(x_N[-1])
    if left == right:
        left, right = left - 0.5, right + 0.5
    px = LEFT + (x_N - left) / (right - left) * (WIDTH - LEFT - RIGHT)
    py_of = lambda y: HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)  # noqa: E731

    inside = []
    if drawn is not y_N:
        inside.append(_path(*_thin(px, py_of(y_N)), f"raw {colour}"))
        chosen = _evenly_spaced(len(px), POINTS)
        inside.append(_path(px[chosen], py_of(drawn)[chosen], f"line {colour}"))
    else:
        inside.append(_path(*_thin(px, py_of(y_N)), f"line {colour}"))
        if len(y_N) <= 40:
            inside += [h("circle", cx=x, cy=y, r=2.6, class_=f"dot {colour}") for x, y in zip(px, py_of(y_N))]
    frame = h("svg", inside, x=LEFT, y=TOP - 4, width=WIDTH - LEFT - RIGHT + 4, height=HEIGHT - TOP - BOTTOM + 8,
              viewBox=f"{LEFT} {TOP - 4} {WIDTH - LEFT - RIGHT + 4} {HEIGHT - TOP - BOTTOM + 8}")  # fmt: skip
    at_x = ticks(left, right, 4, whole=True)
    scale = (WIDTH - LEFT - RIGHT) / (right - left)
    axes = _axes([(LEFT + (t - left) * scale, text) for t, text in zip(at_x, tick_text(at_x))], low, high, unit)
    more = (
        h("text", f"{plural(above, 'value')} above", x=WIDTH - RIGHT, y=TOP + 8, class_="tick end") if above else None
    )
    return _chart(label, axes, frame, more, _tooltips(x_N, y_N, px, x_name, unit))


def overlay_chart(
    lines: Sequence[tuple[str, str, np.ndarray, np.ndarray]],
    *,
    label: str,
    unit: str = "",
    floor: float | None = None,
    smooth: bool = True,
) -> Markup:
    """Several lines over steps, each (name, class of its colour, steps, values), as running means or the values."""
    drawn = [smooth_mean(y_N, max(1.0, len(y_N) / 60)) if smooth and len(y_N) >= 20 else y_N for *_, y_N in lines]
    every = np.concatenate(drawn)
    low, high, _ = _axis_range(every, every, floor)
    steps = np.concatenate([x_N for _, _, x_N, _ in lines])
    left, right = float(steps.min()), float(steps.max())
    if left == right:
        left, right = left - 0.5, right + 0.5
    scale, shapes = (WIDTH - LEFT - RIGHT) / (right - left), []
    for (name, colour, x_N, _), y_N in zip(lines, drawn, strict=True):
        chosen = _evenly_spaced(len(x_N), POINTS)
        px = LEFT + (x_N[chosen] - left) * scale
        py = HEIGHT - BOTTOM - (np.clip(y_N[chosen], low, high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        path = h("title", f"{name}: {number(float(y_N[-1]), 4)}{unit} at step {number(x_N[-1])}")
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(px, py))
        shapes.append(h("polyline", path, points=points, class_=f"line {colour}"))
        shapes.append(h("circle", cx=px[-1], cy=py[-1], r=2.6, class_=f"dot {colour}"))
    at_x = ticks(left, right, 4, whole=True)
    axes = _axes([(LEFT + (t - left) * scale, text) for t, text in zip(at_x, tick_text(at_x))], low, high, unit)
    return _chart(label, axes, shapes)


def histogram(
    counts: Sequence[int], edges: Sequence[float], *, label: str, unit: str = "", colour: str = "c1"
) -> Markup:
    """A histogram: `counts[i]` values lie between `edges[i]` and `edges[i + 1]`; columns are equally wide."""
    high = max(1.0, max(counts) * 1.05)
    wide, tall = (WIDTH - LEFT - RIGHT) / len(counts), HEIGHT - TOP - BOTTOM
    shapes = []
    for i, count in enumerate(counts):
        tooltip = h("title", f"{number(edges[i])} to {number(edges[i + 1])}{unit}: {number(count)}")
        top, length = HEIGHT - BOTTOM - count / high * tall, count / high * tall
        shapes.append(h("rect", x=LEFT + i * wide + 0.75, y=top, width=wide - 1.5, height=length, class_=colour))
        shapes.append(h("rect", tooltip, x=LEFT + i * wide, y=TOP, width=wide, height=tall, class_="hit"))
    every = max(1, math.ceil(len(edges) / 6))
    at_x = [(LEFT + i * wide, text) for i, text in enumerate(tick_text(edges)) if i % every == 0]
    return _chart(label, _axes(at_x, 0.0, high, "", whole=True), shapes)


def bar_chart(rows: Sequence[Bar], *, label: str, top: float, unit: str = "", scale: float = 1.0) -> Markup:
    """Horizontal bars from 0 to `top`, each with its name above it. The axis shows values times `scale`."""
    tall, shapes = 40, []
    end = tall * len(rows) + 4
    at = ticks(0, top * scale, 5)
    for value, text in zip(at, tick_text(at, unit)):
        x = _percent(value / scale, top)
        shapes.append(h("line", x1=x, x2=x, y1=0, y2=end, class_="rule"))
        side = "start" if value == 0 else "end" if value / scale > 0.97 * top else "middle"
        shapes.append(h("text", text, x=x, y=end + 15, class_=f"tick {side}"))
    for i, bar in enumerate(rows):
        y, before = i * tall, 0.0
        name = bar.name if len(bar.name) <= 34 else bar.name[:33] + "…"
        shapes.append(h("text", name, x=0, y=y + 15, class_="name"))
        shapes.append(h("text", bar.label, x="100%", y=y + 15, class_="says end"))
        for colour, length in bar.parts:
            shapes.append(
                h("rect", x=_percent(before, top), width=_percent(length, top), y=y + 21, height=12, class_=colour)
            )
            before += length
        if bar.interval:
            low, high = (_percent(v, top) for v in bar.interval)
            shapes.append(h("line", x1=low, x2=high, y1=y + 27, y2=y + 27, class_="whisker"))
            shapes += [h("line", x1=v, x2=v, y1=y + 23, y2=y + 31, class_="whisker") for v in (low, high)]
        tooltip = h("title", f"{bar.name}: {bar.label}")
        shapes.append(h("rect", tooltip, x=0, y=y + 2, width="100%", height=tall - 4, class_="hit"))
    description = f"{label}: " + "; ".join(f"{bar.name} {bar.label}" for bar in rows)
    return h("svg", shapes, class_="bars", width="100%", height=end + 20, role="img", aria_label=description)


def _chart(label: str, *content: Content) -> Markup:
    return h("svg", *content, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="chart", role="img", aria_label=label)


def _axes(at_x: list[tuple[float, str]], low: float, high: float, unit: str, *, whole: bool = False) -> list[Markup]:
    at_y, out = ticks(low, high, 4, whole=whole), []
    for value, text in zip(at_y, tick_text(at_y, unit)):
        y = HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        out.append(h("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="rule"))
        out.append(h("text", text, x=LEFT - 7, y=y + 3.5, class_="tick end"))
    out.append(h("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    for x, text in at_x:
        out.append(h("line", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis"))
        out.append(h("text", text, x=x, y=HEIGHT - BOTTOM + 16, class_="tick middle"))
    return out


def _tooltips(x_N: np.ndarray, y_N: np.ndarray, px: np.ndarray, x_name: str, unit: str) -> list[Markup]:
    """Invisible columns whose tooltips show the mean of the values in them."""
    out, parts = [], np.array_split(np.arange(len(x_N)), min(TOOLTIPS, len(x_N)))
    for i, part in enumerate(parts):
        left = LEFT if i == 0 else (px[parts[i - 1][-1]] + px[part[0]]) / 2
        right = WIDTH - RIGHT if i == len(parts) - 1 else (px[part[-1]] + px[parts[i + 1][0]]) / 2
        first, last = x_N[part[0]], x_N[part[-1]]
        where = number(first) if first == last else f"{number(first)} to {number(last)}"
        mean = f"{number(float(y_N[part].mean()), 4)}{unit}"
        tooltip = h("title", f"{x_name} {where}: {mean}" + (f" on average of {len(part)}" if len(part) > 1 else ""))
        out.append(h("rect", tooltip, x=left, y=TOP, width=right - left, height=HEIGHT - TOP - BOTTOM, class_="hit"))
    return out


def _axis_range(y_N: np.ndarray, drawn_N: np.ndarray, floor: float | None) -> tuple[float, float, int]:
    """Lower and upper end of the vertical axis, and the number of values above it."""
    low, high, above = float(y_N.min()), float(y_N.max()), 0
    if len(y_N) >= 50:
        p1, p98 = np.percentile(y_N, [1, 98])
        limit = max(float(p98 + (p98 - p1)), float(drawn_N.max()))
        if high > limit:
            high, above = limit, int((y_N > limit).sum())
    if floor is not None:
        low = min(floor, low)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == floor else low - pad), high + pad, above


def _thin(x_N: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: the lowest and the highest of each segment, in their order, so that no spike is lost."""
    if len(x_N) <= POINTS:
        return x_N, y_N
    chosen = set()
    for part in np.array_split(np.arange(len(x_N)), POINTS // 2):
        chosen |= {int(part[y_N[part].argmin()]), int(part[y_N[part].argmax()])}
    order = sorted(chosen)
    return x_N[order], y_N[order]


def _evenly_spaced(total: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int))


def _path(x_N: np.ndarray, y_N: np.ndarray, class_: str) -> Markup:
    return h("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in zip(x_N, y_N)), class_=class_)


def _percent(value: float, top: float) -> str:
    return f"{min(100.0, max(0.0, 100 * value / top)):.2f}%"


def describe_curve(name: str, x_N: np.ndarray, y_N: np.ndarray, unit: str = "") -> str:
    """What a curve shows, in words, for screen readers."""
    if len(y_N) == 1:
        return f"{name}: {number(float(y_N[0]))}{unit} at step {number(x_N[0])}"
    return (
        f"{name}, {plural(len(y_N), 'value')}: {number(float(y_N[0]))}{unit} at step {number(x_N[0])},{SPACE}"
        f"{number(float(y_N[-1]))}{unit} at step {number(x_N[-1])}"
    )
