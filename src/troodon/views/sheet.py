"""The sheet people check before training: what the network is shown."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from troodon.images.decode import to_rgb
from troodon.run import write_bytes
from troodon.views.config import PhotometricConfig
from troodon.views.crops import MultiCrop
from troodon.views.loader import Loader

GAP = 6  # pixels between pictures
WIDE = 900  # pixels of the sheet, about, if its crops are small
COLOURS = ("#d62728", "#1f77b4", "#2ca02c")  # of the boxes of the first and the second global crop, and of local ones


def draw_crops(loader: Loader, path: Path, batch: int = 0, rows: int = 8) -> None:
    """A PNG of the first images of a batch, a row each: the image with its boxes, its global crops, their masked
    patches grey, then its local crops.

    Of other than three channels it shows the first three, or the first as grey.
    """
    rows = min(rows, loader.batch_size // loader.world_size)
    seen = loader.preview(batch, rows)
    views, images = seen.globals_GBCHW.shape[:2]
    masks_GBP = seen.masks_NP.unflatten(0, (views, images))
    (tall, wide), (low, narrow) = (crops.shape[-2:] for crops in (seen.globals_GBCHW, seen.locals_VBCHW))
    locals_ = len(seen.locals_VBCHW)
    times = max(1, round(WIDE / (views * wide + locals_ * narrow + tall)))
    height = times * (max(tall, low) if locals_ else tall)
    columns = ["image", "global 1", "global 2", *(f"local {i + 1}" for i in range(locals_))]
    pictures = [_boxed(*loader.load(p)[:2], round(1.5 * height), height) for p in loader.positions(batch)[:rows]]
    widths = [max(p.width for p in pictures), *[times * wide] * views, *[times * narrow] * locals_]
    font = ImageFont.load_default(12)
    top = 12 + 2 * GAP
    out = Image.new("RGB", (sum(widths) + GAP * (len(widths) + 1), top + rows * (height + GAP)), "white")
    pen = ImageDraw.Draw(out)
    lefts = [GAP + sum(widths[:i]) + GAP * i for i in range(len(widths))]
    for left, name, width in zip(lefts, columns, widths):
        if pen.textlength(name, font) <= width + GAP:
            pen.text((left, GAP), name, "black", font)
    for row, picture in enumerate(pictures):
        masked = zip(seen.globals_GBCHW[:, row], masks_GBP[:, row])
        crops = [_crop(crop_CHW, loader.photometric, times, mask_P) for crop_CHW, mask_P in masked]
        crops += [_crop(crop_CHW, loader.photometric, times) for crop_CHW in seen.locals_VBCHW[:, row]]
        for left, one in zip(lefts, [picture, *crops]):
            out.paste(one, (left, top + row * (height + GAP)))
    buffer = BytesIO()
    out.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _crop(
    crop_CHW: torch.Tensor, colours: PhotometricConfig, times: int, mask_P: torch.Tensor | None = None
) -> Image.Image:
    """A view as a picture, `times` larger; its masked patches grey."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (colours.mean, colours.std))
    x_HWC = ((crop_CHW.float() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    if mask_P is not None:
        patch = round((x_HWC.shape[0] * x_HWC.shape[1] / len(mask_P)) ** 0.5)
        mask_hw = mask_P.unflatten(0, (x_HWC.shape[0] // patch, -1))
        hidden_HW = mask_hw.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        x_HWC[hidden_HW] = x_HWC[hidden_HW] // 4 + 96
    picture = Image.fromarray(to_rgb(x_HWC.numpy()))
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)


def _boxed(image_HWC: np.ndarray, views: MultiCrop, width: int, height: int) -> Image.Image:
    """The image, as large as fits, with the boxes of its crops; thin ones are local."""
    picture = Image.fromarray(to_rgb(np.ascontiguousarray(image_HWC)))
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    pen, (tall, wide) = ImageDraw.Draw(picture), views.size
    y, x = (size[1] - 1) / tall, (size[0] - 1) / wide
    for number, (top, left, h, w) in reversed(list(enumerate(views.boxes))):
        corners = (left * x, top * y, (left + w) * x, (top + h) * y)
        pen.rectangle(corners, outline=COLOURS[min(number, 2)], width=2 if number < 2 else 1)
    return picture
