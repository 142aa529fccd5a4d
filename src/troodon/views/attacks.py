"""Attacks: changes that make a near-duplicate of an image, as they happen to images on the web.

An attack is a function (image (H, W, 3) uint8, generator, strength in (0, 1]) -> image (h, w, 3) uint8. Strength 0.25
is mild, 1 is strong; each docstring gives the setting at strength 0 and at 1. Signs and places are random.
The kinds follow the Copydays set (Jegou and others, 2008) and the image similarity challenge
(https://arxiv.org/abs/2106.09672).
"""

import functools
import io
import math
import zlib
from collections.abc import Callable

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from troodon.config import UsageError, nearest
from troodon.images.decode import to_grey, to_rgb
from troodon.views.config import ALL_ATTACK_KINDS, ATTACK_KINDS, CropsConfig

Attack = Callable[[Image.Image, Generator, float], Image.Image]
MIN_ATTACK_PX = 16  # an image whose shorter side is shorter is not attacked
_BICUBIC = Image.Resampling.BICUBIC
_WORDS = ("sale", "new", "hello", "2019", "best", "photo", "of the", "day", "follow", "50%", "breaking", "news", "live")


def attack(image: Image.Image | ndarray, kind: str, random: Generator, strength: float) -> ndarray:
    """A near-duplicate of `image`, (h, w, 3) uint8; its size may differ. Raises UsageError for an unknown kind."""
    if kind not in ALL_ATTACKS:
        raise nearest("attack", kind, ALL_ATTACKS)
    return ALL_ATTACKS[kind](image, random, strength)


def _on_arrays(function: Attack) -> Callable[[Image.Image | ndarray, Generator, float], ndarray]:
    @functools.wraps(function)
    def wrapped(image: Image.Image | ndarray, random: Generator, strength: float) -> ndarray:
        if not 0 < strength <= 1:
            raise UsageError(f"strength {strength}: must be in (0, 1]; 0.25 is mild, 1 is strong")
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        copy = picture.convert("RGB")  # this copies RGB images too: attacks may draw on the result
        return np.array(function(copy, random, strength).convert("RGB"))

    return wrapped


def _sign(r: Generator) -> int:
    return 1 if r.random() < 0.5 else -1


def _vary(r: Generator, strength: float) -> float:
    """The strength, varied slightly, so that two copies of one image differ."""
    return min(1.0, strength * r.uniform(0.85, 1.15))


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def _scale(image: Image.Image, x: float, y: float) -> Image.Image:
    size = (max(8, round(image.width * x)), max(8, round(image.height * y)))
    return image.resize(size, _BICUBIC)


def resave(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Saved again as JPEG, hardly visible: quality 97 to 90."""
    return _jpeg(image, round(97 - 7 * _vary(r, strength)))


def jpeg(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Saved as a JPEG of low quality: 60 to 8."""
    return _jpeg(image, round(60 - 52 * _vary(r, strength)))


def shrink(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Both sides times 1 to 0.4."""
    f = 1 - 0.6 * _vary(r, strength)
    return _scale(image, f, f)


def enlarge(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Both sides times 1 to 2.5."""
    f = 1 + 1.5 * _vary(r, strength)
    return _scale(image, f, f)


def stretch(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Width over height times 1 to 1.5, or its inverse."""
    f = (1 + 0.5 * _vary(r, strength)) ** (_sign(r) / 2)
    return _scale(image, f, 1 / f)


def crop(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Keep 95 to 70 % of the area, anywhere, with the aspect ratio changed by 5 % at most."""
    return _crop(image, r, 0.95 - 0.25 * _vary(r, strength))


def _crop(image: Image.Image, r: Generator, share: float) -> Image.Image:
    """Keep this share of the area."""
    side, aspect = math.sqrt(share), r.uniform(0.975, 1.025)
    w, h = round(image.width * min(1, side * aspect)), round(image.height * min(1, side / aspect))
    x, y = int(r.integers(image.width - w + 1)), int(r.integers(image.height - h + 1))
    return image.crop((x, y, x + w, y + h))


def pad(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """A border of one colour, 2 to 20 % of the side; on all sides, or above and below."""
    edge = round(max(image.size) * (0.02 + 0.18 * _vary(r, strength))) or 1
    colour = _colours(r)[0] if r.random() < 0.4 else [(0, 0, 0), (255, 255, 255)][int(r.integers(2))]
    return ImageOps.expand(image, (edge if r.random() < 0.6 else 0, edge), colour)


def flip(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Left and right exchanged, at every strength."""
    return ImageOps.mirror(image)


def rotate(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Rotated by 1 to 20 degrees, either way; corners black, or cropped if enough remains."""
    degrees = 1 + 19 * _vary(r, strength)
    rotated = image.rotate(_sign(r) * degrees, _BICUBIC)
    if r.random() < 0.5:
        return rotated
    a = math.radians(degrees)
    keep = 1 / (math.cos(a) + math.sin(a) * max(image.size) / min(image.size))
    dx, dy = image.width * (1 - keep) / 2, image.height * (1 - keep) / 2
    left, top, right, bottom = math.ceil(dx), math.ceil(dy), math.floor(image.width - dx), math.floor(image.height - dy)
    return rotated.crop((left, top, right, bottom)) if min(right - left, bottom - top) >= 8 else rotated


def brightness(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Values times 1 to 1.6, or 1 to 0.4."""
    s = _vary(r, strength)
    return ImageEnhance.Brightness(image).enhance(1 + 0.6 * s if r.random() < 0.5 else 1 - 0.6 * s)


def contrast(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Distance from the mean grey times 1 to 2, or 1 to 0.35."""
    s = _vary(r, strength)
    return ImageEnhance.Contrast(image).enhance(1 + s if r.random() < 0.5 else 1 - 0.65 * s)


def saturation(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Distance from grey times 1 to 2.2, or 1 to 0.2."""
    s = _vary(r, strength)
    return ImageEnhance.Color(image).enhance(1 + 1.2 * s if r.random() < 0.5 else 1 - 0.8 * s)


def hue(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """All hues shifted by 2 to 29 degrees of the colour circle, either way."""
    h, s, v = image.convert("HSV").split()
    shift = _sign(r) * round(1.5 + 19 * _vary(r, strength))
    return Image.merge("HSV", (h.point([(k + shift) % 256 for k in range(256)]), s, v)).convert("RGB")


def grey(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Colours moved 50 to 100 % of the way to grey."""
    return Image.blend(image, image.convert("L").convert("RGB"), 0.5 + 0.5 * _vary(r, strength))


def gamma(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Values to the power of 1 to 2.2, or its inverse."""
    power = (1 + 1.2 * _vary(r, strength)) ** _sign(r)
    return image.point([round(255 * (k / 255) ** power) for k in range(256)] * 3)


def blur(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Gaussian, deviation 0.3 to 3 % of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) * (0.003 + 0.027 * _vary(r, strength))))


def sharpen(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Unsharp mask, radius 1.5 pixels, 60 to 300 %."""
    return image.filter(ImageFilter.UnsharpMask(1.5, round(60 + 240 * _vary(r, strength)), 0))


def noise(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Gaussian noise, deviation 3 to 30 levels of 255."""
    x = np.asarray(image, np.float32)
    x = x + r.standard_normal(x.shape, np.float32) * np.float32(3 + 27 * _vary(r, strength))
    return Image.fromarray(np.clip(x + 0.5, 0, 255).astype(np.uint8))


def text(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """One to three lines of outlined text, 8 to 18 % of the height each."""
    s = _vary(r, strength)
    size = max(7, round(image.height * (0.08 + 0.1 * s)))
    light, dark = _colours(r)
    draw, y = ImageDraw.Draw(image), r.uniform(0.0, 0.6) * image.height
    for _ in range(1 + int(2.4 * s)):
        line = " ".join(_WORDS[int(k)] for k in r.integers(len(_WORDS), size=2))
        draw.text((r.uniform(0.01, 0.2) * image.width, y), line, light, font(size), stroke_width=1, stroke_fill=dark)
        y += size * 1.2
    return image


def sticker(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """One to three round or square logos, 12 to 30 % of the side each."""
    s = _vary(r, strength)
    draw, side = ImageDraw.Draw(image), min(image.size)
    for _ in range(1 + int(2.4 * s)):
        d = side * (0.12 + 0.18 * s)
        x, y = r.uniform(0, 1, 2) * (np.array(image.size) - d)
        fill, ink = _colours(r)[:: _sign(r)]
        shape = draw.ellipse if r.random() < 0.5 else draw.rectangle
        shape((x, y, x + d, y + d), fill, ink, max(1, round(d * 0.06)))
        draw.text((x + d * 0.3, y + d * 0.18), "TKO&R?!"[int(r.integers(7))], ink, font(round(d * 0.6)))
    return image


def posterise(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """16 to 3 levels per channel."""
    levels = round(16 - 13 * _vary(r, strength))
    return image.point([round(255 * min(int(k * levels / 256), levels - 1) / (levels - 1)) for k in range(256)] * 3)


def vignette(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Corners darkened by 25 to 85 %."""
    x, y = np.linspace(-1, 1, image.width, dtype=np.float32), np.linspace(-1, 1, image.height, dtype=np.float32)
    fall = np.float32(0.25 + 0.6 * _vary(r, strength)) * (x[None] ** 2 + y[:, None] ** 2) / 2
    return Image.fromarray((np.asarray(image) * (1 - fall)[..., None]).astype(np.uint8))


def screenshot(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Framed by a window: a title bar, a margin and buttons, 10 to 35 % of the side in all."""
    edge = max(2, round(min(image.size) * (0.1 + 0.25 * _vary(r, strength)) / 2.6))
    light, dark = _colours(r)[:: _sign(r)]
    framed = ImageOps.expand(image, (edge // 2, edge, edge // 2, edge), light)
    draw, e = ImageDraw.Draw(framed), edge
    for k in range(3):
        draw.ellipse((e * (0.3 + 0.7 * k), e * 0.3, e * (0.7 + 0.7 * k), e * 0.7), dark)
    draw.text((e * 0.5, framed.height - e * 0.95), "like  share  save", dark, font(round(e * 0.7)))
    return framed


def mix(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Two other attacks, one after the other, each at 60 % of the strength."""
    kinds = sorted(ATTACKS.keys() - {"mix", "resave"})
    for k in r.choice(len(kinds), 2, replace=False).tolist():
        image = Image.fromarray(ATTACKS[kinds[k]](image, r, strength * 0.6))
    return image


def tight_crop(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Keep 70 to 40 % of the area, anywhere, with the aspect ratio changed by 5 % at most."""
    return _crop(image, r, 0.7 - 0.3 * _vary(r, strength))


def quarter_turn(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Turned by 90 degrees, either way, or by 180, at every strength."""
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return image.transpose(turns[int(r.integers(3))])


def vertical_flip(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Top and bottom exchanged, at every strength."""
    return ImageOps.flip(image)


def inset(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """Pasted anywhere into another picture, of which it takes 90 to 50 % of both sides."""
    share = 0.9 - 0.4 * _vary(r, strength)
    small, ground = _scale(image, share, share), _made_picture(image.size, r)
    x, y = (int(r.integers(max(0, whole - part) + 1)) for whole, part in zip(ground.size, small.size))
    ground.paste(small, (x, y))
    return ground


def _made_picture(size: tuple[int, int], r: Generator) -> Image.Image:
    """A picture of nothing: fields of colour, each half as large as the one before and weaker, as in photographs, and
    some shapes in front of them."""
    x_HWC = np.zeros((size[1], size[0], 3), np.float32)
    for level in range(1, 7):
        grid = Image.fromarray(r.integers(0, 256, (2**level, 2**level, 3), np.uint8))
        x_HWC += (np.asarray(grid.resize(size, _BICUBIC), np.float32) - 127.5) / level
    x_HWC = x_HWC.mean(2, keepdims=True) + x_HWC * r.uniform(0.1, 0.6)  # brightness differs more than colour
    x_HWC = x_HWC * r.uniform(0.3, 1.0) + r.uniform(60, 190) + r.uniform(-40, 40, 3)
    picture = Image.fromarray(np.clip(x_HWC, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(r.integers(8))):
        (left, top), (w, h) = r.uniform(-0.2, 1, 2) * size, r.uniform(0.05, 0.5, 2) * size
        shape = draw.ellipse if r.random() < 0.5 else draw.rectangle
        shape((left, top, left + w, top + h), tuple(r.integers(0, 256, 3).tolist()))
    return picture


def perspective(image: Image.Image, r: Generator, strength: float) -> Image.Image:
    """As photographed at a slant: each corner is taken from up to 2 to 22 % of the sides further inside."""
    inwards_42 = r.uniform(0, 0.02 + 0.2 * _vary(r, strength), (4, 2))
    corners_42 = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], float)
    to_42, from_42 = corners_42 * image.size, (corners_42 + inwards_42 * (1 - 2 * corners_42)) * image.size
    # For each corner: (a x + b y + c) / (g x + h y + 1) and (d x + e y + f) / (g x + h y + 1) are where it comes from.
    rows, places = [], []
    for (x, y), (u, v) in zip(to_42, from_42):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
        places += [u, v]
    coefficients = np.linalg.solve(np.array(rows), np.array(places)).tolist()
    return image.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, _BICUBIC)


def _colours(r: Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A light colour and a dark one."""
    return tuple(r.integers(190, 256, 3).tolist()), tuple(r.integers(0, 80, 3).tolist())


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, the same on all machines; six pixels at least."""
    return ImageFont.load_default(max(size, 6))


_GEOMETRY = (shrink, enlarge, stretch, crop, pad, flip, rotate, screenshot)
_COLOUR = (brightness, contrast, saturation, hue, grey, gamma, posterise, vignette)
_DETAIL = (resave, jpeg, blur, sharpen, noise, text, sticker)

ATTACKS: dict[str, Callable[[Image.Image | ndarray, Generator, float], ndarray]] = {
    f.__name__: _on_arrays(f) for f in (*_DETAIL, *_GEOMETRY, *_COLOUR, mix)
}
# Training that names them may draw from these too.
ALL_ATTACKS = ATTACKS | {
    f.__name__: _on_arrays(f) for f in (tight_crop, quarter_turn, vertical_flip, inset, perspective)
}
assert tuple(ATTACKS) == ATTACK_KINDS, "views/config.py lists the attacks"
assert tuple(ALL_ATTACKS) == ALL_ATTACK_KINDS, "views/config.py lists the attacks"

# The attacks whose copies are missed most if images are compared without attacked copies, with their strengths. The
# first ones matter most: after twelve, hardly any more copies are found.
BENCHMARK_ATTACKS = (
    ("rotate", 0.5), ("sticker", 0.5), ("screenshot", 0.5), ("text", 0.5), ("crop", 0.5), ("rotate", 0.35),
    ("flip", 1.0), ("sticker", 0.65), ("rotate", 0.65), ("text", 0.65), ("screenshot", 0.65), ("mix", 0.5),
    ("pad", 0.5), ("crop", 0.65), ("grey", 0.8), ("stretch", 0.5),
)  # fmt: skip


def random_attack(image_HWC: ndarray, config: CropsConfig, seed: int, reduction: int = 1) -> ndarray:
    """With probability `config.attack`, a near-duplicate of the image, made from a copy reduced by `reduction`.

    uint8 (h, w, C), C being 1 or 3, of another size; else the image itself, also if it is only a few pixels wide or
    high.
    """
    random = np.random.Generator(np.random.Philox(seed))
    if random.random() >= config.attack or min(image_HWC.shape[:2]) < MIN_ATTACK_PX * reduction:
        return image_HWC
    kinds = config.attack_kinds or ATTACK_KINDS
    kind, strength = kinds[int(random.integers(len(kinds)))], 1.0 - random.random()
    copy_HW3 = attack(Image.fromarray(to_rgb(image_HWC)).reduce(reduction), kind, random, strength)
    return copy_HW3 if image_HWC.shape[2] == 3 else to_grey(copy_HW3)


def attacked_copies(image: ndarray, count: int) -> list[ndarray]:
    """Copies of the image (H, W, 3) uint8 under the first `count` BENCHMARK_ATTACKS; the same at every call."""
    random = np.random.default_rng(zlib.crc32(image.tobytes()))
    return [attack(image, kind, random, strength) for kind, strength in BENCHMARK_ATTACKS[:count]]
