"""The species of the embedded world: their shapes, as polygons.

A shape is a list of parts, painted one over the other; a part is a tone and the points of a polygon. Shapes lie in
[-1, 1] on both axes, y downwards. The generator that is passed to a shape determines the individual's proportions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

BODY, SECOND, DARK, LIGHT, HOLE = range(5)  # tones: textured, a second colour, nearly black, nearly white, nothing
Parts = list[tuple[int, np.ndarray]]  # (tone, (N, 2) points)

_FILL = [(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)]
_SUPERSAMPLING = 2  # polygons are drawn at this multiple of the resolution, then averaged: smooth edges
_T = np.linspace(0, 1, 6, endpoint=False)[:, None]
_SPLINE = 0.5 * np.hstack(
    [-_T + 2 * _T**2 - _T**3, 2 - 5 * _T**2 + 3 * _T**3, _T + 4 * _T**2 - 3 * _T**3, _T**3 - _T**2]
)
_CIRCLE = np.linspace(0, 2 * math.pi, 36, endpoint=False)
_CIRCLE = np.stack([np.cos(_CIRCLE), np.sin(_CIRCLE)], 1)


def paint(parts: Parts, matrix: np.ndarray, centre: np.ndarray, px: int) -> np.ndarray:
    """Paint a shape: (4, px, px) float32, the share of body, second, dark and light in each pixel; the sum is coverage.

    `matrix` (2, 2) and `centre` (2,) place the shape in an image that spans [-1, 1].
    """
    image = Image.new("CMYK", (px * _SUPERSAMPLING, px * _SUPERSAMPLING))  # four plain channels, one per tone
    draw, half = ImageDraw.Draw(image), px * _SUPERSAMPLING / 2
    for tone, points in parts:
        draw.polygon(((points @ matrix.T + centre + 1) * half - 0.5).ravel().tolist(), fill=_FILL[tone])
    return np.ascontiguousarray(np.asarray(image.reduce(_SUPERSAMPLING)).transpose(2, 0, 1)) * np.float32(1 / 255)


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return _CIRCLE @ np.array([[rx * c, rx * s], [-ry * s, ry * c]]) + (x, y)


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def smooth(*points: tuple[float, float]) -> np.ndarray:
    """A smooth closed curve through the points (Catmull-Rom)."""
    p = np.array(points)
    neighbours = np.stack([np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)], 1)
    return np.einsum("tk,nkd->ntd", _SPLINE, neighbours).reshape(-1, 2)


def stroke(points: np.ndarray, width: float) -> list[np.ndarray]:
    """A line with round ends, as polygons."""
    tangent = np.gradient(points, axis=0)
    normal = tangent[:, ::-1] * (1, -1) * (width / 2 / np.linalg.norm(tangent, axis=1, keepdims=True))
    ends = [ellipse(x, y, width / 2, width / 2) for x, y in (points[0], points[-1])]
    return [np.concatenate([points + normal, (points - normal)[::-1]]), *ends]


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, n: int = 20) -> np.ndarray:
    a = np.linspace(start, end, n)
    return np.stack([x + rx * np.cos(a), y + ry * np.sin(a)], 1)


def mirrored(points: np.ndarray) -> np.ndarray:
    return points * (-1, 1)


def fish(r: Generator) -> Parts:
    h, tail, fin = r.uniform(0.36, 0.56), r.uniform(0.36, 0.58), r.uniform(0.15, 0.32)
    front, back = [(-0.5, -h * 0.85), (0, -h), (0.42, -h * 0.42)], [(0.42, h * 0.42), (0, h), (-0.5, h * 0.85)]
    return [
        (SECOND, np.array([(0.42, 0), (0.97, -tail), (r.uniform(0.74, 0.88), 0), (0.97, tail)])),
        (SECOND, np.array([(-0.35, -h * 0.85), (0.25, -h - fin), (0.4, -h * 0.4)])),
        (SECOND, np.array([(-0.1, h * 0.85), (0.25, h + fin * 0.8), (0.25, h * 0.6)])),
        (BODY, smooth((-0.95, 0.02), *front, (0.6, 0), *back)),
        (LIGHT, ellipse(-0.6, -0.12, 0.12, 0.12)),
        (DARK, ellipse(-0.62, -0.12, 0.06, 0.06)),
    ]


def tree(r: Generator) -> Parts:
    tiers, wide = int(r.integers(3, 5)), r.uniform(0.55, 0.78)
    parts: Parts = [(SECOND, box(-0.11, 0.5, 0.11, 0.98))]
    for k in range(tiers, 0, -1):
        bottom, w = -0.95 + 1.6 * k / tiers, wide * (0.35 + 0.65 * k / tiers)
        top = max(-0.98, bottom - 1.6 / tiers * r.uniform(1.5, 1.7))
        parts.append((BODY, np.array([(0, top), (w, bottom), (0, bottom - 0.08), (-w, bottom)])))
    return parts


def house(r: Generator) -> Parts:
    w, eaves, ridge = r.uniform(0.55, 0.75), r.uniform(-0.25, 0.0), r.uniform(-0.95, -0.75)
    over, door = w + r.uniform(0.1, 0.22), r.uniform(-0.35, 0.1)
    side = w * 0.58 if door < -0.1 else -w * 0.5
    return [
        (SECOND, box(w * 0.4, ridge + 0.02, w * 0.4 + 0.2, eaves)),
        (BODY, box(-w, eaves - 0.02, w, 0.88)),
        (SECOND, np.array([(-over, eaves), (0, ridge), (over, eaves)])),
        (DARK, box(door - 0.15, 0.35, door + 0.15, 0.88)),
        (LIGHT, box(side - 0.15, eaves + 0.17, side + 0.15, eaves + 0.47)),
    ]


def mug(r: Generator) -> Parts:
    w, taper, top = r.uniform(0.5, 0.62), r.uniform(0.0, 0.14), r.uniform(-0.75, -0.6)
    x, ring = -0.25, r.uniform(0.3, 0.42)
    side = [(x + w, top), (x + w - taper, 0.68), (x + w - taper - 0.14, 0.8)]
    return [
        (BODY, ellipse(x + w + 0.06, 0.02, ring + 0.02, ring + 0.08)),
        (HOLE, ellipse(x + w + 0.06, 0.02, ring - 0.15, ring - 0.1)),
        (BODY, np.array([*side, *((2 * x - a, b) for a, b in reversed(side))])),
        (SECOND, ellipse(x, top, w, 0.17)),
        (DARK, ellipse(x, top + 0.01, w * 0.85, 0.11)),
    ]


def butterfly(r: Generator) -> Parts:
    a, b, spot = r.uniform(0.75, 0.95), r.uniform(0.6, 0.92), r.uniform(0.07, 0.13)
    upper = smooth((0.02, 0.0), (0.3, -0.72 * a), (0.82, -0.92 * a), (0.96, -0.45), (0.6, 0.02))
    lower = smooth((0.02, 0.0), (0.62, 0.02), (0.76, 0.45 * b), (0.48, 0.92 * b), (0.16, 0.6 * b))
    feeler = np.array([(0.02, -0.4), (0.12, -0.72), (0.24, -0.86)])
    parts: Parts = []
    for side in (lambda p: p, mirrored):
        parts += [(SECOND, side(lower)), (BODY, side(upper)), (LIGHT, side(ellipse(0.68, -0.52 * a, spot, spot)))]
        parts += [(DARK, side(p)) for p in stroke(feeler, 0.06)]
    return [*parts, (DARK, ellipse(0, 0, 0.09, 0.5))]


def key(r: Generator) -> Parts:
    ring, thick, teeth = r.uniform(0.34, 0.44), r.uniform(0.1, 0.13), int(r.integers(2, 4))
    parts: Parts = [(BODY, ellipse(ring - 0.97, 0, ring, ring * r.uniform(0.85, 1.1)))]
    parts += [
        (HOLE, ellipse(ring - 0.97, 0, ring * 0.5, ring * 0.5)),
        (BODY, box(2 * ring - 1.02, -thick, 0.97, thick)),
    ]
    for k in range(teeth):
        x = 0.97 - 0.27 * k
        parts.append((BODY, box(x - 0.15, 0, x, thick + r.uniform(0.18, 0.36))))
    return parts


def star(r: Generator) -> Parts:
    n, inner = int(r.integers(5, 7)), r.uniform(0.38, 0.52)
    a = np.arange(2 * n) * math.pi / n - math.pi / 2
    radius = np.where(np.arange(2 * n) % 2 == 0, 0.98, inner)
    points = np.stack([radius * np.cos(a), radius * np.sin(a)], 1)
    return [(BODY, points), (SECOND, points * r.uniform(0.3, 0.42))]


def moon(r: Generator) -> Parts:
    tip, shift = r.uniform(0.75, 1.05), r.uniform(0.22, 0.4)
    outer = arc(0, 0, 0.97, 0.97, tip, 2 * math.pi - tip, 40)
    x, y = outer[-1]
    inner_r = math.hypot(x - shift, y)
    edge = math.atan2(y, x - shift)
    inner = arc(shift, 0, inner_r, inner_r, edge, -2 * math.pi - edge, 30)
    crater = [(SECOND, ellipse(-0.62, y, 0.1, 0.1)) for y in (-0.3, r.uniform(0.0, 0.4))]
    middle = np.array([0.22, 0])  # centres the crescent
    return [(tone, points + middle) for tone, points in ((BODY, np.concatenate([outer, inner])), *crater)]


def gear(r: Generator) -> Parts:
    n, root, hole = int(r.integers(7, 11)), r.uniform(0.68, 0.78), r.uniform(0.2, 0.32)
    step = 2 * math.pi / n
    a = (np.arange(n)[:, None] * step + np.array([-0.3, -0.17, 0.17, 0.3]) * step).ravel()
    radius = np.tile([root, 0.98, 0.98, root], n)
    points = np.stack([radius * np.cos(a), radius * np.sin(a)], 1)
    return [(BODY, points), (SECOND, ellipse(0, 0, hole + 0.16, hole + 0.16)), (HOLE, ellipse(0, 0, hole, hole))]


def bolt(r: Generator) -> Parts:
    a, b, w = r.uniform(0.02, 0.22), r.uniform(-0.3, -0.1), r.uniform(0.4, 0.6)
    points = [(0.1, -0.98), (-w, a), (-0.04, a), (-0.28, 0.98), (w, b), (0.1, b), (0.1 + w * 0.75, -0.98)]
    return [(BODY, np.array(points))]


def umbrella(r: Generator) -> Parts:
    n, high, rim = int(r.integers(3, 6)), r.uniform(0.7, 0.9), 0.1
    w = 0.95 / n
    scallops = [arc(0.95 - w * (2 * k + 1), rim, w, 0.16, 0, -math.pi, 8) for k in range(n)]
    dome = np.concatenate([arc(0, rim, 0.95, high, math.pi, 2 * math.pi, 24), *scallops])
    hook = np.concatenate([[(0, -0.9), (0, 0.7)], arc(-0.15, 0.74, 0.15, 0.17, 0.2, math.pi, 9)])
    panel = np.concatenate([arc(0, rim, w * (n % 2 + 1) * 0.9, high - 0.02, math.pi, 2 * math.pi, 16), [(0, rim)]])
    return [*((DARK, p) for p in stroke(hook, 0.1)), (BODY, dome), (SECOND, panel)]


def mushroom(r: Generator) -> Parts:
    w, high, stem = r.uniform(0.78, 0.97), r.uniform(0.75, 0.95), r.uniform(0.18, 0.3)
    cap = np.concatenate([arc(0, 0.1, w, high, math.pi, 2 * math.pi, 24), arc(0, 0.1, w, 0.18, 0, math.pi, 12)])
    spots = [(-0.45, -0.2), (0.05, -0.48), (0.48, -0.15), (0.02, -0.02)]
    return [
        (
            SECOND,
            smooth(
                (-stem, 0.1),
                (stem, 0.1),
                (stem * 0.9, 0.6),
                (stem * 1.4, 0.95),
                (-stem * 1.4, 0.95),
                (-stem * 0.9, 0.6),
            ),
        ),
        (BODY, cap),
        *(
            (LIGHT, ellipse(x * w, 0.1 + (y - 0.1) * high, s, s * 0.85))
            for (x, y), s in zip(spots, r.uniform(0.08, 0.16, 4))
        ),
    ]


def sailboat(r: Generator) -> Parts:
    deck, top, jib = r.uniform(0.4, 0.5), r.uniform(-0.98, -0.85), r.uniform(0.5, 0.75)
    return [
        (DARK, box(-0.06, top, 0.02, deck)),
        (BODY, np.array([(0.06, top + 0.05), (r.uniform(0.65, 0.85), deck - 0.1), (0.06, deck - 0.1)])),
        (LIGHT, np.array([(-0.1, top + 0.2), (-0.1, deck - 0.1), (-jib, deck - 0.1)])),
        (SECOND, np.array([(-0.9, deck), (0.95, deck), (0.62, 0.88), (-0.6, 0.88)])),
    ]


def snail(r: Generator) -> Parts:
    size, turns = r.uniform(0.5, 0.6), r.uniform(2.0, 2.6)
    a = np.linspace(0, 2 * math.pi * turns, 50)
    curl = np.stack([np.cos(a), np.sin(a)], 1) * (size * (0.06 + 0.8 * a / a[-1]))[:, None] + (0.2, 0.02)
    slug = smooth(
        (-0.95, 0.2), (-0.72, 0.05), (-0.5, 0.4), (0.2, 0.52), (0.97, 0.72), (0.3, 0.78), (-0.6, 0.76), (-0.88, 0.5)
    )
    horns = [np.array([(-0.82, 0.15), (x, -0.3)]) for x in (-0.95, -0.68)]
    return [
        *((SECOND, p) for horn in horns for p in stroke(horn, 0.08)),
        (SECOND, slug),
        (BODY, ellipse(0.2, 0.02, size, size)),
        *((DARK, p) for p in stroke(curl, 0.07)),
        (DARK, ellipse(-0.78, 0.26, 0.05, 0.05)),
    ]


def cactus(r: Generator) -> Parts:
    w, left, right = r.uniform(0.3, 0.42), r.uniform(-0.2, 0.15), r.uniform(-0.3, 0.1)
    elbow = [(-0.1, left + 0.3), (-0.5, left + 0.3), (-0.62, left + 0.2), (-0.64, left), (-0.64, left - 0.3)]
    other = [(0.1, right + 0.3), (0.5, right + 0.3), (0.62, right + 0.2), (0.64, right), (0.64, right - 0.35)]
    limbs = [np.array([(0.0, -0.75), (0.0, 0.7)])], [np.array(elbow), np.array(other)]
    return [
        *((BODY, p) for limb in limbs[1] for p in stroke(limb, w * 0.72)),
        *((BODY, p) for limb in limbs[0] for p in stroke(limb, w * 1.25)),
        (LIGHT, ellipse(0, -0.88, 0.14, 0.1)),
        (SECOND, np.array([(-0.45, 0.6), (0.45, 0.6), (0.34, 0.98), (-0.34, 0.98)])),
    ]


def rocket(r: Generator) -> Parts:
    w, fin = r.uniform(0.26, 0.36), r.uniform(0.28, 0.4)
    wing = np.array([(w * 0.8, 0.05), (w + fin, 0.5), (w + fin, 0.72), (w * 0.7, 0.5)])
    return [
        (LIGHT, np.array([(-w * 0.6, 0.5), (w * 0.6, 0.5), (0, 0.98)])),
        (SECOND, wing),
        (SECOND, mirrored(wing)),
        (
            BODY,
            smooth((0, -0.98), (w * 0.8, -0.5), (w, 0), (w * 0.75, 0.55), (-w * 0.75, 0.55), (-w, 0), (-w * 0.8, -0.5)),
        ),
        (LIGHT, ellipse(0, -0.28, w * 0.5, w * 0.5)),
        (DARK, ellipse(0, -0.28, w * 0.33, w * 0.33)),
    ]


def clutter(r: Generator) -> Parts:
    """A stone, a ball, a plank, a slab or a leaf: an object of no species, for clutter beside or before a body."""
    kind = int(r.integers(5))
    if kind == 0:
        a = np.arange(7) * (2 * math.pi / 7)
        return [(BODY, smooth(*(np.stack([np.cos(a), np.sin(a)], 1) * r.uniform(0.6, 0.95, 7)[:, None])))]
    if kind == 1:
        return [(BODY, ellipse(0, 0, 0.85, r.uniform(0.6, 0.85)))]
    if kind == 2:
        return [(BODY, box(-0.98, -0.3, 0.98, 0.3)), (SECOND, box(-0.98, -0.3, -0.7, 0.3))]
    if kind == 3:
        return [(BODY, box(-0.75, -0.6, 0.75, 0.6))]
    tip = r.uniform(0.35, 0.55)
    return [(BODY, smooth((-0.95, 0), (-0.3, -tip), (0.95, 0), (-0.3, tip))), (DARK, box(-0.98, -0.035, 0.7, 0.035))]


@dataclass(frozen=True)
class Species:
    """The usual traits of a species; all of them but the shape may differ in an image."""

    shape: Callable[[Generator], Parts]
    texture: str
    habitat: str
    max_lean: float  # degrees, to either side


SPECIES = {
    "fish": Species(fish, "scales", "water", 30),
    "tree": Species(tree, "mottle", "hills", 14),
    "house": Species(house, "checks", "sky", 10),
    "mug": Species(mug, "stripes", "wood", 16),
    "butterfly": Species(butterfly, "dots", "grass", 45),
    "key": Species(key, "plain", "cloth", 70),
    "star": Species(star, "zigzag", "night", 40),
    "moon": Species(moon, "mottle", "sky", 45),
    "gear": Species(gear, "plain", "bricks", 45),
    "bolt": Species(bolt, "waves", "night", 25),
    "umbrella": Species(umbrella, "stripes", "bricks", 22),
    "mushroom": Species(mushroom, "dots", "hills", 16),
    "snail": Species(snail, "waves", "grass", 16),
    "cactus": Species(cactus, "zigzag", "sand", 12),
    "sailboat": Species(sailboat, "checks", "water", 16),
    "rocket": Species(rocket, "scales", "sand", 45),
}
