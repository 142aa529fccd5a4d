"""One picture of the embedded world: a body of some species in some habitat, with its mask and its depth.

Of a picture's class only the shape is certain; texture and habitat are likely; colours say nothing. So what helps here
is what helps on photographs: form first, then context.
"""

import colorsys
import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from PIL import Image, ImageFilter

from troodon.config import UsageError
from troodon.world.shapes import SPECIES, Parts, paint, thing
from troodon.world.surfaces import HABITATS, TEXTURES

# Everything below happens in a picture that spans [-1, 1] on both axes, x to the right, y downwards.

_SS = 2  # supersampling of every surface; outlines get twice that
_F32 = np.float32


@dataclass(frozen=True)
class WorldConfig:
    """How hard the world is, and how much of it `write` puts on the disk."""

    px: int = 64
    """Side of a picture, in pixels."""
    classes: int = 12
    """How many species live here, 2 to 16. Fewer is easier."""
    texture_fidelity: float = 0.7
    """Share of individuals that wear their species' texture; the others wear any. Higher is easier."""
    habitat_fidelity: float = 0.5
    """Share of pictures taken in the species' own habitat. Higher is easier, by context alone."""
    scale: tuple[float, float] = (0.35, 0.8)
    """Range of a body's size over the picture's side. Larger is easier."""
    lean: float = 1.0
    """Multiplies how far bodies lean to either side; 0 keeps them upright. Lower is easier, for pixels above all."""
    clutter: float = 0.4
    """Probability that some other thing lies beside or before the body. Lower is easier."""

    curated: int = 25
    """Labelled pictures per species in the small curated set."""
    clean: int = 2000
    """On-topic pictures in the anonymous pool."""
    copies: int = 300
    """Near-duplicates in the pool, of pool pictures and of curated ones."""
    off_topic: int = 600
    """Pictures in the pool that are not of this world."""
    broken: int = 8
    """Files in the pool that cannot be read."""
    train: int = 60
    """Evaluation: labelled pictures per species to fit on."""
    val: int = 40
    """Evaluation: labelled pictures per species to score on."""
    dense: int = 60
    """Pictures that come with their mask and depth."""
    poses: int = 2
    """Pictures of each individual, in different poses, places and light."""

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= len(SPECIES):
            raise UsageError(f"classes: {self.classes} species; the world has from 2 to {len(SPECIES)}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(f"scale: {self.scale}; two numbers in (0, 1], the smaller first")
        for name in ("texture_fidelity", "habitat_fidelity", "clutter"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}: {getattr(self, name)} is a probability, from 0 to 1")
        for name, least in (("px", 16), ("poses", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}: {getattr(self, name)} is too small; at least {least}")

    def species(self) -> tuple[str, ...]:
        """Names of the species; a label is a place in this list."""
        return tuple(SPECIES)[: self.classes]


@dataclass(frozen=True)
class Picture:
    image: ndarray  # (H, W, 3) uint8
    label: int  # place in WorldConfig.species()
    identity: int  # which individual of this species
    mask: ndarray  # (H, W) uint8: 0 background, 1 body, 2 another thing, beside or before it
    depth: ndarray  # (H, W) float32, metres from the camera


DEFAULT = WorldConfig()


@dataclass(frozen=True)
class _Pose:
    matrix: ndarray  # (2, 2) from the body's coordinates to the picture's
    centre: ndarray  # (2,)
    scale: float  # half the body's extent, which is also its size over the picture's side


def render(
    seed: int,
    image: int,
    *,
    label: int | None = None,
    identity: int | None = None,
    px: int = 64,
    config: WorldConfig = DEFAULT,
) -> Picture:
    """Picture number `image` of world `seed`: a pure function of its arguments.

    `label` is drawn if not given, or follows from the identity (identity modulo classes). An individual is known by
    (seed, label, identity): it keeps its proportions, colours and texture wherever it is seen. Without `identity`
    the picture shows one of its own.
    """
    r = np.random.default_rng([seed, 0, image])
    drawn = int(r.integers(config.classes))
    if label is None:
        label = drawn if identity is None else identity % config.classes
    if identity is None:
        identity = label + config.classes * image
    kind = SPECIES[config.species()[label]]

    own = np.random.default_rng([seed, 1, label, identity])  # what belongs to the individual, not to the picture
    others = [SPECIES[name] for name in config.species()]
    texture = _usual(own, kind.texture, [s.texture for s in others], config.texture_fidelity)
    parts, colours, hue = kind.shape(own), *_palette(own)

    pose = _pose(r, math.radians(kind.turn * config.lean), config.scale)
    light = (math.cos(a := r.uniform(math.pi, 2 * math.pi)), math.sin(a))  # towards the light, which is above
    habitat = _usual(r, kind.habitat, [s.habitat for s in others], config.habitat_fidelity)
    canvas, far = _background(r, HABITATS[habitat], hue, 0.9 / pose.scale, px)

    clutter, before = r.random() < config.clutter, r.random() < 0.4
    mask, depth = np.zeros((px, px), np.uint8), far
    if clutter and not before:
        mask, depth = _add_thing(r, canvas, mask, depth, pose, light, before)
    layer = _layer(parts, pose, colours, TEXTURES[texture], own, light, px)
    mask, depth = _put(canvas, mask, depth, layer, 1, 0.9 / pose.scale, pose.scale, light)
    if clutter and before:
        mask, depth = _add_thing(r, canvas, mask, depth, pose, light, before)
    return Picture(_develop(r, canvas, light), label, identity, mask, depth)


def _usual(r: Generator, own: str, all_: list[str], fidelity: float) -> str:
    """One's own with this probability, else anyone's: the share of each over the world stays the same."""
    faithful, other = r.random() < fidelity, all_[int(r.integers(len(all_)))]
    return own if faithful else other


def _pose(r: Generator, turn: float, scale: tuple[float, float]) -> _Pose:
    s, a = r.uniform(*scale), r.uniform(-turn, turn)
    squash = np.diag([r.uniform(0.82, 1.0) * (1 if r.random() < 0.5 else -1), r.uniform(0.92, 1.0)])
    matrix = s * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) @ squash
    return _Pose(matrix, r.uniform(-1, 1, 2) * (1 - s) * 1.05, s)  # a few stick out of the picture a little


def _colour(hue: float, saturation: float, value: float) -> ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, min(saturation, 1.0), min(value, 1.0)), _F32)


def _palette(r: Generator) -> tuple[ndarray, float]:
    """(5, 3) colours of a body: two of its texture, second, dark, light; and its hue. Nothing here knows the class."""
    hue, saturation, value = r.random(), r.uniform(0.55, 0.9), r.uniform(0.7, 1.0)
    how, away = int(r.integers(3)), r.choice([-1, 1]) * r.uniform(0.25, 0.5)
    partner = (
        _colour(hue + r.uniform(-0.05, 0.05), saturation, value * 0.5),
        _colour(hue + r.uniform(-0.08, 0.08), saturation * 0.25, 1.0),
        _colour(hue + away, saturation * 0.8, value * 0.85),
    )[how]
    second = _colour(hue - away + r.uniform(-0.1, 0.1), r.uniform(0.4, 0.8), r.uniform(0.45, 0.95))
    dark, pale = _colour(hue, 0.5, 0.15), _colour(hue + 0.1, 0.08, 0.98)
    return np.stack([_colour(hue, saturation, value), partner, second, dark, pale]), hue


@functools.cache
def _grid(px: int) -> tuple[ndarray, ndarray]:
    """x (1, px) and y (px, 1) of the pixels' centres."""
    line = ((np.arange(px) + 0.5) * (2 / px) - 1).astype(_F32)
    return line[None], line[:, None]


def _background(r: Generator, habitat, hue: float, body_m: float, px: int) -> tuple[ndarray, ndarray]:
    """(3, S, S) canvas, supersampled, and the (px, px) depth in metres of a tilted plane behind the body."""
    x, y = _grid(px * _SS)
    slope_x, slope_y, near = r.uniform(-0.12, 0.12), r.uniform(0.05, 0.4), r.uniform(1.12, 1.6)
    closeness = 1 + slope_x * x + slope_y * y  # over that of the middle: what a plane in perspective looks like
    z = 1 / closeness
    zoom, shift = r.uniform(0.8, 1.25), r.uniform(-3, 3)
    t = habitat((x * z + shift) * _F32(zoom), (y * z) * _F32(zoom), r)

    base, value = hue + r.uniform(0.2, 0.8), r.uniform(0.35, 0.9)
    step = r.uniform(0.24, 0.42) * (1 if value < 0.6 else -1)
    a = _colour(base, r.uniform(0.15, 0.6), value)
    b = _colour(base + r.uniform(-0.16, 0.16), r.uniform(0.1, 0.55), value + step)
    if r.random() < 0.5:
        a, b = b, a
    depth = _shrink(z) * _F32(body_m * near * closeness.max())
    return a[:, None, None] + (b - a)[:, None, None] * t, depth


def _shrink(x: ndarray) -> ndarray:
    """Mean of every _SS x _SS block of the last two axes."""
    rows = x[..., 0::2, :] + x[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) * _F32(0.25)


@dataclass(frozen=True)
class _Layer:
    colour: ndarray  # (3, S, S), already multiplied by the cover
    cover: ndarray  # (S, S) in [0, 1]
    small: ndarray  # (px, px) the same cover
    height: ndarray  # (px, px) in [0, 1]: 0 at the outline, 1 well inside


def _layer(parts: Parts, pose: _Pose, colours: ndarray, texture, r: Generator, light, px: int) -> _Layer:
    weights = paint(parts, pose.matrix, pose.centre, px * _SS)  # body, second, dark, light
    x, y = _grid(px * _SS)
    (a, b), (c, d) = np.linalg.inv(pose.matrix).tolist()
    cx, cy = pose.centre.tolist()
    t = texture(a * (x - cx) + b * (y - cy), c * (x - cx) + d * (y - cy), r)
    cover = weights.sum(0)
    small = _shrink(cover)
    blur = _blurred(small, 0.055 * pose.scale * px + 0.6)
    height = np.clip(2 * blur - 1, 0, 1) * small

    colour = np.einsum("kc,kyx->cyx", colours[[0, 2, 3, 4]], weights)  # not tensordot: its sums may follow the threads
    colour += (colours[1] - colours[0])[:, None, None] * (t * weights[0])
    slope = np.zeros_like(blur)
    slope[1:-1, 1:-1] = (blur[1:-1, :-2] - blur[1:-1, 2:]) * light[0] + (blur[:-2, 1:-1] - blur[2:, 1:-1]) * light[1]
    colour *= _grown(np.clip(0.85 + 0.22 * height - (0.06 * px * pose.scale) * slope, 0.35, 1.5))
    return _Layer(colour, cover, small, height)


def _blurred(x: ndarray, radius: float) -> ndarray:
    image = Image.fromarray((np.clip(x, 0, 1) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image) * _F32(1 / 255)


def _grown(x: ndarray) -> ndarray:
    """(px, px) to (S, S), bilinear."""
    size = (x.shape[1] * _SS, x.shape[0] * _SS)
    return np.asarray(Image.fromarray(x.astype(_F32)).resize(size, Image.Resampling.BILINEAR))


def _put(canvas, mask, depth, layer: _Layer, mark: int, metres: float, scale: float, light) -> tuple[ndarray, ndarray]:
    """Paint a layer and its soft shadow on the canvas, in place; return the mask and the depth with it."""
    px = len(mask)
    shift = [-round(v * 0.09 * scale * px) for v in light]
    shadow = Image.new("L", (px, px))
    shadow.paste(Image.fromarray((layer.small * 140).astype(np.uint8)), tuple(shift))
    shadow = np.asarray(shadow.filter(ImageFilter.GaussianBlur(0.035 * px * scale + 0.5))) * _F32(1 / 255)
    canvas *= _grown(1 - shadow)
    canvas *= 1 - layer.cover
    canvas += layer.colour
    inside = layer.small >= 0.5
    body = _F32(metres) * (1 - _F32(0.12 * scale) * np.sqrt(layer.height))
    return np.where(inside, np.uint8(mark), mask), np.where(inside, body, depth)


def _add_thing(r: Generator, canvas, mask, depth, pose: _Pose, light, before: bool) -> tuple[ndarray, ndarray]:
    """A thing of no species: small and beside the body, or before its rim."""
    size = r.uniform(0.2, 0.34) * (pose.scale + 0.25)
    way, reach = r.uniform(0, 2 * math.pi), pose.scale * r.uniform(0.65, 0.9) if before else pose.scale + size
    centre = np.clip(pose.centre + reach * np.array([math.cos(way), math.sin(way)]), -0.97, 0.97)
    a = r.uniform(0, math.pi)
    place = _Pose(size * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]), centre, size)
    texture = list(TEXTURES.values())[int(r.integers(len(TEXTURES)))]
    layer = _layer(thing(r), place, _palette(r)[0], texture, r, light, len(mask))
    metres = 0.9 / pose.scale * (0.85 if before else 1.08)
    return _put(canvas, mask, depth, layer, 2, metres, size, light)


def _develop(r: Generator, canvas: ndarray, light: tuple[float, float]) -> ndarray:
    """Light from one side, exposure, a little sensor noise, and eight bits: (H, W, 3)."""
    image = _shrink(canvas)
    x, y = _grid(image.shape[1])
    fall = r.uniform(0.0, 0.22)
    image *= r.uniform(0.82, 1.12) * (1 + (fall * light[0]) * x + (fall * light[1]) * y)
    image += r.standard_normal(image.shape, _F32) * _F32(r.uniform(0.002, 0.02))
    return np.ascontiguousarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
