"""The difference of each pixel operation from Pillow or, where Pillow rounds in between, from the definition.

    python -m tests.fidelity [SOURCE ...]

Prints the mean and the largest difference in levels of 256, over the images of the sources (or one synthetic image),
for crops at 224 and 98 pixels, JPEGs decoded at a smaller scale, and each colour operation over its range.
"""

import colorsys
import io
import sys
from collections.abc import Iterator

import numpy as np
import scipy.ndimage
import torch
from PIL import Image, ImageEnhance, ImageOps

from troodon.images.decode import decode
from troodon.images.sources import open_source
from troodon.views.config import CropsConfig, PhotometricConfig
from troodon.views.crops import MultiCrop, generator, multi_crop
from troodon.views.photometric import NEUTRAL, apply

PLAIN = PhotometricConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
COLUMNS = ("brightness", "contrast", "saturation", "hue", "order", "grey", "sigma", "solarise")


def changed(image_HWC: np.ndarray, **changes: float) -> np.ndarray:
    """The result of `apply` on an image: (H, W, 3) floats in levels."""
    parameters_NP = np.array([[changes.get(name, neutral) for name, neutral in zip(COLUMNS, NEUTRAL)]], np.float32)
    crops_NCHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
    return apply(crops_NCHW, parameters_NP, PLAIN)[0].permute(1, 2, 0).numpy() * 255


def hue_shifted(image_HWC: np.ndarray, turns: float) -> np.ndarray:
    """The hue shifted by its definition, for every colour that occurs, in levels."""
    colours_K3, inverse = np.unique(image_HWC.reshape(-1, 3), axis=0, return_inverse=True)
    shifted = []
    for r, g, b in colours_K3 / 255:
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        shifted.append(colorsys.hsv_to_rgb((h + turns) % 1, s, v))
    return (np.array(shifted)[inverse] * 255).reshape(image_HWC.shape)


def blurred(image_HWC: np.ndarray, sigma: float) -> np.ndarray:
    taps_K = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    x_HWC = image_HWC.astype(np.float64)
    for axis in (0, 1):
        x_HWC = scipy.ndimage.correlate1d(x_HWC, taps_K / taps_K.sum(), axis=axis, mode="mirror")
    return x_HWC


def enhanced(kind: type, image_HWC: np.ndarray, factor: float) -> np.ndarray:
    return np.asarray(kind(Image.fromarray(image_HWC)).enhance(factor))


def crops(image_HWC: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Ours and Pillow's crops of the same boxes: of the whole image, and of a JPEG decoded at a smaller scale."""
    config = CropsConfig(flip=0.0, locals=2)
    views = MultiCrop(config, generator(0, 0, 0))
    views.draw_boxes(*image_HWC.shape[:2])
    ours = multi_crop(image_HWC, config, generator(0, 0, 0))
    for name, crops_VCHW, boxes in (
        ("crop to 224", ours[0], views.boxes[:2]),
        ("crop to 98", ours[1], views.boxes[2:]),
    ):
        for crop_CHW, (top, left, h, w) in zip(crops_VCHW, boxes):
            box = Image.fromarray(image_HWC[top : top + h, left : left + w])
            expected = box.resize(crop_CHW.shape[:0:-1], Image.Resampling.BICUBIC)
            yield name, crop_CHW.permute(1, 2, 0).numpy(), np.asarray(expected)
    large = Image.fromarray(image_HWC).resize(
        (image_HWC.shape[1] * 6, image_HWC.shape[0] * 6), Image.Resampling.BICUBIC
    )
    out = io.BytesIO()
    large.save(out, "JPEG", quality=95)
    small, whole = MultiCrop(config, generator(0, 0, 1)), MultiCrop(config, generator(0, 0, 1))
    less, pixels = decode(out.getvalue(), 3, small.draw_boxes), decode(out.getvalue(), 3)
    whole.draw_boxes(*pixels.shape[:2])
    if less.shape != pixels.shape:
        for ours_CHW, wanted_CHW in zip(small.crop(less)[0], whole.crop(pixels)[0]):
            yield "crop of a smaller JPEG", ours_CHW.numpy(), wanted_CHW.numpy()


def colours(image_HWC: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for factor in (0.6, 0.9, 1.4):
        for name, kind in (("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast)):
            yield name, changed(image_HWC, **{name: factor}), enhanced(kind, image_HWC, factor)
    for factor in (0.8, 0.95, 1.2):
        yield "saturation", changed(image_HWC, saturation=factor), enhanced(ImageEnhance.Color, image_HWC, factor)
    for turns in (-0.1, 0.03, 0.1, 0.5):
        yield "hue (definition)", changed(image_HWC, hue=turns), hue_shifted(image_HWC, turns)
    picture = Image.fromarray(image_HWC)
    yield "grey", changed(image_HWC, grey=1), np.asarray(picture.convert("L").convert("RGB"))
    for sigma in (0.1, 0.5, 2.0):
        yield "blur (definition)", changed(image_HWC, sigma=sigma), blurred(image_HWC, sigma)
    yield "solarise", changed(image_HWC, solarise=1), np.asarray(ImageOps.solarize(picture, 128))


def differences(images: list[np.ndarray]) -> dict[str, tuple[float, float]]:
    """The mean and the largest difference of each operation, in levels."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for image_HWC in images:
        for name, ours, expected in (*crops(image_HWC), *colours(image_HWC)):
            off = np.abs(ours.astype(np.float64) - expected)
            errors.setdefault(name, []).append((float(off.mean()), float(off.max())))
    return {name: (float(np.mean([m for m, _ in o])), max(x for _, x in o)) for name, o in errors.items()}


def synthetic_image(height: int = 240, width: int = 320) -> np.ndarray:
    """Many hues, greys, black and white, edges and noise: uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width] / height
    image = np.stack([np.sin(9 * x + y), np.cos(7 * y - x), np.sin(5 * x * y + 1)], -1) * 127 + 128
    image += np.random.default_rng(0).normal(0, 15, image.shape)
    image[:20, :20], image[:20, 20:40], image[:20, 40:60] = 0, 255, 77
    return image.clip(0, 255).astype(np.uint8)


def main() -> None:
    images = [synthetic_image()]
    if sources := sys.argv[1:]:
        index = open_source(*sources)
        images = [decode(index.read(row)) for row in np.linspace(0, len(index) - 1, 20).astype(int)]
    for name, (mean, largest) in differences(images).items():
        print(f"{name:<24} mean {mean:7.4f}   largest {largest:7.3f}")


if __name__ == "__main__":
    main()
