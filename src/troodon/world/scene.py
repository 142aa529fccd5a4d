"""One picture of the embedded world: a body of some species in some habitat, with its mask and its depth.

The shape always belongs to the class; texture and habitat often do; colours say nothing. So features that help here are
those that help on photographs: shape first, then context.
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
from troodon.world.shapes import SPECIES, Parts, clutter, paint
from troodon.world.surfaces import HABITATS, TEXTURES

# A picture spans [-1, 1] on both axes, x to the right, y downwards.

_SUPERSAMPLING = 2  # of surfaces; outlines have twice that
_F32 = np.float32


@dataclass(frozen=True)
class WorldConfig:
    """The difficulty of the world, and how many pictures `write_world` writes."""

    px: int = 64
    """Side of a picture, in pixels."""
    classes: int = 12
    """Number of species, 2 to 16. Fewer is easier."""
    texture_fidelity: float = 0.7
    """Share of individuals with the texture of their species; the others have any. Higher is easier."""
    habitat_fidelity: float = 0.5
    """Share of pictures in the habitat of the species. Higher is easier, by context alone."""
    scale: tuple[float, float] = (0.35, 0.8)
    """Range of the size of a body relative to the side of the picture. Larger is easier."""
    lean: float = 1.0
    """Multiplies the angle by which bodies lean; 0 keeps them upright. Lower is easier, above all for raw pixels."""
    clutter: float = 0.4
    """Probability of another object beside or before the body. Lower is easier."""

    curated: int = 25
    """Labelled pictures per species in the small curated set."""
    clean: int = 2000
    """On-topic pictures in the anonymous pool."""
    copies: int = 300
    """Near-duplicates in the pool, of pictures of the pool and of curated ones."""
    off_topic: int = 600
    """Pictures in the pool that do not show a species."""
    broken: int = 8
    """Files in the pool that cannot be read."""
    train: int = 60
    """Evaluation: labelled pictures per species for training classifiers."""
    val: int = 40
    """Evaluation: labelled pictures per species for the scores."""
    dense: int = 60
    """Pictures with mask and depth."""
    poses: int = 2
    """Pictures of each individual, with different poses, places and light."""

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= len(SPECIES):
            raise UsageError(f"classes: {self.classes} species; must be 2 to {len(SPECIES)}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(f"scale: {self.scale}; must be two numbers in (0, 1], the smaller first")
        for name in ("texture_fidelity", "habitat_fidelity", "clutter"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}: {getattr(self, name)}; must be a probability, from 0 to 1")
        for name, minimum in (("px", 16), ("poses", 1)):
            if getattr(self, name) < minimum:
                raise UsageError(f"{name}: {getattr(self, name)} is too small; must be at least {minimum}")

    def species(self) -> tuple[str, ...]:
        """Names of the species; a label is an index into it."""
        return tuple(SPECIES)[: self.classes]


@dataclass(frozen=True)
class Picture:
    image: ndarray  # (H, W, 3) uint8
    label: int  # index into WorldConfig.species()
    identity: int  # the individual of this species
    mask: ndarray  # (H, W) uint8: 0 background, 1 body, 2 another object, beside or before it
    depth: ndarray  # (H, W) float32, metres from the camera


DEFAULT = WorldConfig()


@dataclass(frozen=True)
class _Pose:
    matrix: ndarray  # (2, 2), from body to picture coordinates
    centre: ndarray  # (2,)
    scale: float  # half the extent of the body, which is also its size relative to the picture's side


def render(
    seed: int,
    image: int,
    *,
    label: int | None = None,
    identity: int | None = None,
    px: int = 64,
    config: WorldConfig = DEFAULT,
) -> Picture:
    """Render picture number `image` of world `seed`: a pure function of its arguments.

    Without `label`, it follows from the identity (identity modulo classes), or is drawn. (seed, label, identity)
    determine an individual: its proportions, colours and texture are the same in all pictures. Without `identity` the
    picture shows an individual of its own.
    """
    r = np.random.default_rng([seed, 0, image])
    random_label = int(r.integers(config.classes))
    if label is None:
        label = random_label if identity is None else identity % config.classes
    if identity is None:
        identity = label + config.classes * image
    kind = SPECIES[config.species()[label]]

    individual = np.random.default_rng([seed, 1, label, identity])  # draws what is the same in all of its pictures
    species = [SPECIES[name] for name in config.species()]
    texture = _draw_trait(individual, kind.texture, [s.texture for s in species], config.texture_fidelity)
    parts, colours, hue = kind.shape(individual), *_palette(individual)

    pose = _pose(r, math.radians(kind.max_lean * config.lean), config.scale)
    light = (math.cos(a := r.uniform(math.pi, 2 * math.pi)), math.sin(a))  # towards the light, which comes from above
    habitat = _draw_trait(r, kind.habitat, [s.habitat for s in species], config.habitat_fidelity)
    canvas, depth = _background(r, HABITATS[habitat], hue, 0.9 / pose.scale, px)

    has_clutter, is_before = r.random() < config.clutter, r.random() < 0.4
    mask = np.zeros((px, px), np.uint8)
    if has_clutter and not is_before:
        mask, depth = _add_clutter(r, canvas, mask, depth, pose, light, is_before)
    layer = _layer(parts, pose, colours, TEXTURES[texture], individual, light, px)
    mask, depth = _composite(canvas, mask, depth, layer, 1, 0.9 / pose.scale, pose.scale, light)
    if has_clutter and is_before:
        mask, depth = _add_clutter(r, canvas, mask, depth, pose, light, is_before)
    return Picture(_expose(r, canvas, light), label, identity, mask, depth)


def _draw_trait(r: Generator, usual: str, all_traits: list[str], fidelity: float) -> str:
    """The usual trait with probability `fidelity`, else any: the share of each trait in the world stays the same."""
    is_usual, other = r.random() < fidelity, all_traits[int(r.integers(len(all_traits)))]
    return usual if is_usual else other


def _pose(r: Generator, max_lean: float, scale: tuple[float, float]) -> _Pose:
    s, a = r.uniform(*scale), r.uniform(-max_lean, max_lean)
    squash = np.diag([r.uniform(0.82, 1.0) * (1 if r.random() < 0.5 else -1), r.uniform(0.92, 1.0)])
    matrix = s * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) @ squash
    return _Pose(matrix, r.uniform(-1, 1, 2) * (1 - s) * 1.05, s)  # a few bodies extend slightly beyond the picture


def _colour(hue: float, saturation: float, value: float) -> ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, min(saturation, 1.0), min(value, 1.0)), _F32)


def _palette(r: Generator) -> tuple[ndarray, float]:
    """(5, 3) colours of a body: two of its texture, second, dark, light; and its hue. Independent of the class."""
    hue, saturation, value = r.random(), r.uniform(0.55, 0.9), r.uniform(0.7, 1.0)
    variant, hue_shift = int(r.integers(3)), r.choice([-1, 1]) * r.uniform(0.25, 0.5)
    partner = (
        _colour(hue + r.uniform(-0.05, 0.05), saturation, value * 0.5),
        _colour(hue + r.uniform(-0.08, 0.08), saturation * 0.25, 1.0),
        _colour(hue + hue_shift, saturation * 0.8, value * 0.85),
    )[variant]
    second = _colour(hue - hue_shift + r.uniform(-0.1, 0.1), r.uniform(0.4, 0.8), r.uniform(0.45, 0.95))
    dark, light = _colour(hue, 0.5, 0.15), _colour(hue + 0.1, 0.08, 0.98)
    return np.stack([_colour(hue, saturation, value), partner, second, dark, light]), hue


@functools.cache
def _grid(px: int) -> tuple[ndarray, ndarray]:
    """x (1, px) and y (px, 1) of the pixel centres."""
    line = ((np.arange(px) + 0.5) * (2 / px) - 1).astype(_F32)
    return line[None], line[:, None]


def _background(r: Generator, habitat, hue: float, body_m: float, px: int) -> tuple[ndarray, ndarray]:
    """The supersampled canvas (3, S, S) and the depth (px, px), in metres, of a tilted plane behind the body."""
    x, y = _grid(px * _SUPERSAMPLING)
    slope_x, slope_y, near = r.uniform(-0.12, 0.12), r.uniform(0.05, 0.4), r.uniform(1.12, 1.6)
    inverse_depth = 1 + slope_x * x + slope_y * y  # relative to the centre: linear for a plane in perspective
    z = 1 / inverse_depth
    zoom, shift = r.uniform(0.8, 1.25), r.uniform(-3, 3)
    t = habitat((x * z + shift) * _F32(zoom), (y * z) * _F32(zoom), r)

    base, value = hue + r.uniform(0.2, 0.8), r.uniform(0.35, 0.9)
    step = r.uniform(0.24, 0.42) * (1 if value < 0.6 else -1)
    a = _colour(base, r.uniform(0.15, 0.6), value)
    b = _colour(base + r.uniform(-0.16, 0.16), r.uniform(0.1, 0.55), value + step)
    if r.random() < 0.5:
        a, b = b, a
    depth = _downsample(z) * _F32(body_m * near * inverse_depth.max())
    return a[:, None, None] + (b - a)[:, None, None] * t, depth


def _downsample(x: ndarray) -> ndarray:
    """The mean of each _SUPERSAMPLING x _SUPERSAMPLING block of the last two axes."""
    rows = x[..., 0::2, :] + x[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) * _F32(0.25)


@dataclass(frozen=True)
class _Layer:
    colour: ndarray  # (3, S, S), premultiplied by the cover
    cover: ndarray  # (S, S) in [0, 1]
    small: ndarray  # (px, px), the same cover
    height: ndarray  # (px, px) in [0, 1]: 0 at the outline, 1 well inside


def _layer(parts: Parts, pose: _Pose, colours: ndarray, texture, r: Generator, light, px: int) -> _Layer:
    weights = paint(parts, pose.matrix, pose.centre, px * _SUPERSAMPLING)  # body, second, dark, light
    x, y = _grid(px * _SUPERSAMPLING)
    (a, b), (c, d) = np.linalg.inv(pose.matrix).tolist()
    cx, cy = pose.centre.tolist()
    t = texture(a * (x - cx) + b * (y - cy), c * (x - cx) + d * (y - cy), r)
    cover = weights.sum(0)
    small = _downsample(cover)
    blur = _blur(small, 0.055 * pose.scale * px + 0.6)
    height = np.clip(2 * blur - 1, 0, 1) * small

    colour = np.einsum("kc,kyx->cyx", colours[[0, 2, 3, 4]], weights)  # tensordot may depend on the threads
    colour += (colours[1] - colours[0])[:, None, None] * (t * weights[0])
    slope = np.zeros_like(blur)
    slope[1:-1, 1:-1] = (blur[1:-1, :-2] - blur[1:-1, 2:]) * light[0] + (blur[:-2, 1:-1] - blur[2:, 1:-1]) * light[1]
    colour *= _upsample(np.clip(0.85 + 0.22 * height - (0.06 * px * pose.scale) * slope, 0.35, 1.5))
    return _Layer(colour, cover, small, height)


def _blur(x: ndarray, radius: float) -> ndarray:
    image = Image.fromarray((np.clip(x, 0, 1) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image) * _F32(1 / 255)


def _upsample(x: ndarray) -> ndarray:
    """Resize (px, px) to (S, S), bilinear."""
    size = (x.shape[1] * _SUPERSAMPLING, x.shape[0] * _SUPERSAMPLING)
    return np.asarray(Image.fromarray(x.astype(_F32)).resize(size, Image.Resampling.BILINEAR))


def _composite(
    canvas, mask, depth, layer: _Layer, mask_value: int, metres: float, scale: float, light
) -> tuple[ndarray, ndarray]:
    """Paint a layer and its soft shadow on the canvas, in place; return the new mask and depth."""
    px = len(mask)
    shift = [-round(v * 0.09 * scale * px) for v in light]
    shadow = Image.new("L", (px, px))
    shadow.paste(Image.fromarray((layer.small * 140).astype(np.uint8)), tuple(shift))
    shadow = np.asarray(shadow.filter(ImageFilter.GaussianBlur(0.035 * px * scale + 0.5))) * _F32(1 / 255)
    canvas *= _upsample(1 - shadow)
    canvas *= 1 - layer.cover
    canvas += layer.colour
    inside = layer.small >= 0.5
    body = _F32(metres) * (1 - _F32(0.12 * scale) * np.sqrt(layer.height))
    return np.where(inside, np.uint8(mask_value), mask), np.where(inside, body, depth)


def _add_clutter(r: Generator, canvas, mask, depth, pose: _Pose, light, is_before: bool) -> tuple[ndarray, ndarray]:
    """Add an object of no species: small and beside the body, or before its edge."""
    size = r.uniform(0.2, 0.34) * (pose.scale + 0.25)
    direction = r.uniform(0, 2 * math.pi)
    distance = pose.scale * r.uniform(0.65, 0.9) if is_before else pose.scale + size
    centre = np.clip(pose.centre + distance * np.array([math.cos(direction), math.sin(direction)]), -0.97, 0.97)
    a = r.uniform(0, math.pi)
    clutter_pose = _Pose(size * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]), centre, size)
    texture = list(TEXTURES.values())[int(r.integers(len(TEXTURES)))]
    layer = _layer(clutter(r), clutter_pose, _palette(r)[0], texture, r, light, len(mask))
    metres = 0.9 / pose.scale * (0.85 if is_before else 1.08)
    return _composite(canvas, mask, depth, layer, 2, metres, size, light)


def _expose(r: Generator, canvas: ndarray, light: tuple[float, float]) -> ndarray:
    """Add light from one side, exposure and slight sensor noise; convert to eight bits: (H, W, 3)."""
    image = _downsample(canvas)
    x, y = _grid(image.shape[1])
    falloff = r.uniform(0.0, 0.22)
    image *= r.uniform(0.82, 1.12) * (1 + (falloff * light[0]) * x + (falloff * light[1]) * y)
    image += r.standard_normal(image.shape, _F32) * _F32(r.uniform(0.002, 0.02))
    return np.ascontiguousarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
