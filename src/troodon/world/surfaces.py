"""The surfaces of the embedded world: textures of its species, and the habitats behind them.

A surface is a function (x, y, generator) -> t: float32 coordinates in, values in [0, 1] out, one per pixel, which mix
two colours. About half of the values of a surface are below 1/2, so that colours say nothing about the class.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy import ndarray
from numpy.random import Generator

Surface = Callable[[ndarray, ndarray, Generator], ndarray]

_TILE = 512  # side of the noise tile
_BUMP = 32  # width of one bump of noise, in cells of the tile
_F32 = np.float32


@functools.cache
def _tiles() -> tuple[ndarray, ndarray]:
    """Smooth noise and white noise that repeat after _TILE cells, with values uniform in [0, 1]."""
    white = np.random.default_rng(20230414).standard_normal((_TILE, _TILE))
    f = np.fft.fftfreq(_TILE)
    low = np.exp(-((f[:, None] ** 2 + f[None] ** 2) * (_BUMP * 0.9) ** 2))
    smooth = np.fft.ifft2(np.fft.fft2(white) * low).real
    return _to_uniform(smooth), _to_uniform(white)


def _to_uniform(x: ndarray) -> ndarray:
    ranks = np.empty(x.size, _F32)
    ranks[x.ravel().argsort(kind="stable")] = np.linspace(0, 1, x.size, dtype=_F32)
    return ranks.reshape(x.shape)


def _noise(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    """Smooth noise with about one bump per unit."""
    a, b = r.uniform(0, _TILE, 2).tolist()
    row = (y * _BUMP + (a + 64 * _TILE)).astype(np.int32) & (_TILE - 1)
    column = (x * _BUMP + (b + 64 * _TILE)).astype(np.int32) & (_TILE - 1)
    return _tiles()[0].ravel()[row * _TILE + column]


def _cell_noise(column: ndarray, row: ndarray, r: Generator) -> ndarray:
    """One random value per whole (column, row)."""
    at = int(r.integers(_TILE * _TILE))
    return _tiles()[1].ravel()[(row.astype(np.int32) * 517 + column.astype(np.int32) * 11 + at) & (_TILE * _TILE - 1)]


def _rotate(x: ndarray, y: ndarray, angle: float) -> tuple[ndarray, ndarray]:
    c, s = math.cos(angle), math.sin(angle)
    return c * x + s * y, c * y - s * x


def _to_two_levels(wave: ndarray, k: float) -> ndarray:
    """Turn a wave in [-1, 1] into two levels with soft edges."""
    return np.clip(wave * (k / 2) + 0.5, 0, 1)


def _split_fraction(x: ndarray) -> tuple[ndarray, ndarray]:
    whole = np.floor(x)
    return whole, x - whole


# Textures, in the coordinates of the body, which spans about [-1, 1].


def plain(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    u, _ = _rotate(x, y, r.uniform(0, 2 * math.pi))
    return np.clip(u * 0.45 + 0.5, 0, 1)


def stripes(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    u, _ = _rotate(x, y, r.choice([0.0, 1.57, r.uniform(0, 3.1)]))
    return _to_two_levels(np.sin(u * r.uniform(9, 15)), 4)


def checks(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    u, v = _rotate(x, y, r.choice([0.0, 0.785]))
    f = r.uniform(8, 12)
    return _to_two_levels(np.sin(u * f) * np.sin(v * f), 8)


def dots(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    f = r.uniform(2.2, 3.4)
    row, v = _split_fraction(y * (f * 1.15))
    _, u = _split_fraction(x * f + 0.5 * (row % 2))
    return _to_two_levels(0.33 + r.uniform(-0.04, 0.06) - np.hypot(u - 0.5, v - 0.5), 12)


def waves(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    u, v = _rotate(x, y, r.uniform(-0.5, 0.5))
    return _to_two_levels(np.sin(v * r.uniform(10, 15) + r.uniform(1.6, 2.6) * np.sin(u * r.uniform(5, 8))), 3)


def zigzag(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    u, v = _rotate(x, y, r.choice([0.0, 1.57]))
    f = r.uniform(1.6, 2.6)
    _, tooth = _split_fraction(u * f)
    _, band = _split_fraction(v * (f * 0.9) + np.abs(tooth - 0.5))
    return _to_two_levels(np.abs(band - 0.5) - 0.25, 14)


def scales(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    f = r.uniform(3.0, 4.5)
    row, v = _split_fraction(y * f)
    _, u = _split_fraction(x * f * 0.8 + 0.5 * (row % 2))
    bow = v + 2.0 * (u - 0.5) ** 2  # 1 along the lower edge of a scale
    return np.clip(1.6 * np.abs(np.where(bow > 1, bow - 1, bow) - 0.45), 0, 1)


def mottle(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    f = r.uniform(2.0, 3.2)
    return _to_two_levels(_noise(x * f, y * f, r) - 0.5, 14)


# Habitats, in the coordinates of the tilted plane behind the body, about [-1, 1] across the image.


def sky(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    cloud = _noise(x * 1.3, y * 2.6, r) + 0.35 * _noise(x * 4, y * 6, r)
    return np.clip(cloud * 1.1 - 0.25 + 0.25 * y, 0, 1)


def grass(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    lean = r.uniform(-0.25, 0.25)
    blades = _noise((x + lean * y) * 9, y * 1.8, r) + 0.6 * _noise((x - lean * y) * 17, y * 3.5, r)
    return np.clip(blades * 0.8 - 0.12, 0, 1)


def bricks(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    f = r.uniform(2.6, 3.8)
    row, v = _split_fraction(y * f)
    column, u = _split_fraction(x * (f * 0.5) + 0.5 * (row % 2))
    joint = np.minimum(np.minimum(u, 1 - u) * 2, np.minimum(v, 1 - v))
    return np.where(joint < 0.07, _F32(0.97), 0.1 + 0.55 * _cell_noise(column, row, r))


def water(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    swell = _noise(x * 1.5, y * 3.5, r)
    return np.clip(
        0.5 + 0.5 * np.sin(y * r.uniform(11, 16) + 9 * swell + r.uniform(0, 6)) * (0.35 + 0.65 * swell), 0, 1
    )


def wood(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    f = r.uniform(1.2, 1.8)
    plank, v = _split_fraction(y * f)
    tone = _cell_noise(plank, plank, r)
    grain = np.sin(v * 16 + 10 * _noise(x * 0.7 + tone * 9, y * 1.6, r))
    return np.where(np.minimum(v, 1 - v) < 0.03, _F32(0.0), np.clip(0.3 + 0.4 * tone + 0.25 * grain, 0, 1))


def sand(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    u, v = _rotate(x, y, r.uniform(-0.4, 0.4))
    dune = np.sin(v * r.uniform(5, 8) + 3 * _noise(u, v, r))
    return np.clip(0.5 + 0.22 * dune + 0.6 * (_cell_noise(x * 48, y * 48, r) - 0.5), 0, 1)


def hills(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    t = np.full_like(x, r.uniform(0.85, 1.0))
    for level in (-0.55, -0.15, 0.25, 0.65):
        f, g, p, q = r.uniform(1.2, 3.0), r.uniform(3.0, 6.5), *r.uniform(0, 6, 2).tolist()
        ridge = level + 0.16 * np.sin(x * f + p) + 0.07 * np.sin(x * g + q)
        t = np.where(y > ridge, _F32(0.4 - 0.62 * level) + 0.25 * (y - ridge), t)
    return np.clip(t, 0, 1)


def night(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    f = r.uniform(1.8, 2.6)
    column, u = _split_fraction(x * f)
    row, v = _split_fraction(y * f)
    size = 0.1 + 0.3 * _cell_noise(column, row, r)
    room = 1 - 2 * size  # a lamp lies completely inside its cell, at a random place
    away = np.hypot(u - size - room * _cell_noise(column, row, r), v - size - room * _cell_noise(row, column, r))
    return np.clip(0.15 * (1 + y) + _to_two_levels(size - away, 16) * (0.35 + 0.65 * _cell_noise(row, column, r)), 0, 1)


def cloth(x: ndarray, y: ndarray, r: Generator) -> ndarray:
    u, v = _rotate(x, y, r.choice([0.0, 0.785]))
    f, g = r.uniform(4.5, 7.5, 2).tolist()
    return (
        0.5
        + 0.25 * (_to_two_levels(np.sin(u * f), 6) + _to_two_levels(np.sin(v * g), 6) - 1)
        + 0.2 * np.sin(u * f * 3) * np.sin(v * g * 3)
    )


TEXTURES: dict[str, Surface] = {f.__name__: f for f in (plain, stripes, checks, dots, waves, zigzag, scales, mottle)}
HABITATS: dict[str, Surface] = {f.__name__: f for f in (sky, grass, bricks, water, wood, sand, hills, night, cloth)}
