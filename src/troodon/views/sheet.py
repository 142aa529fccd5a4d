"""A contact sheet of crops, for a check before training: what the network is shown."""

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

GAP = 6  # pixels between images
SHEET_WIDTH = 900  # pixels, about, if the crops are small
BOX_COLOURS = ("#d62728", "#1f77b4", "#2ca02c")  # of the first and the second global crop, and of local crops


def draw_crops(loader: Loader, path: Path, batch: int = 0, rows: int = 8) -> None:
    """Write a PNG with a row for each of the first images of a batch: the image with its boxes, its global crops with
    masked patches in grey, and its local crops.

    Of more than three channels it shows the first three, of fewer the first as grey.
    """
    rows = min(rows, loader.batch_size // loader.world_size)
    preview = loader.preview(batch, rows)
    views, images = preview.globals_GBCHW.shape[:2]
    masks_GBP = preview.masks_NP.unflatten(0, (views, images))
    (tall, wide), (low, narrow) = (crops.shape[-2:] for crops in (preview.globals_GBCHW, preview.locals_VBCHW))
    locals_ = len(preview.locals_VBCHW)
    scale = max(1, round(SHEET_WIDTH / (views * wide + locals_ * narrow + tall)))
    height = scale * (max(tall, low) if locals_ else tall)
    columns = ["image", *(f"global {i + 1}" for i in range(views)), *(f"local {i + 1}" for i in range(locals_))]
    pictures = [_draw_boxes(*loader.load(p)[:2], round(1.5 * height), height) for p in loader.positions(batch)[:rows]]
    widths = [max(p.width for p in pictures), *[scale * wide] * views, *[scale * narrow] * locals_]
    font = ImageFont.load_default(12)
    top = 12 + 2 * GAP
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(widths) + 1), top + rows * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [GAP + sum(widths[:i]) + GAP * i for i in range(len(widths))]
    for left, name, width in zip(lefts, columns, widths):
        if draw.textlength(name, font) <= width + GAP:
            draw.text((left, GAP), name, "black", font)
    for row, picture in enumerate(pictures):
        masked = zip(preview.globals_GBCHW[:, row], masks_GBP[:, row])
        crops = [_draw_crop(crop_CHW, loader.photometric, scale, mask_P) for crop_CHW, mask_P in masked]
        crops += [_draw_crop(crop_CHW, loader.photometric, scale) for crop_CHW in preview.locals_VBCHW[:, row]]
        for left, tile in zip(lefts, [picture, *crops]):
            sheet.paste(tile, (left, top + row * (height + GAP)))
    buffer = BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _draw_crop(
    crop_CHW: torch.Tensor, colours: PhotometricConfig, scale: int, mask_P: torch.Tensor | None = None
) -> Image.Image:
    """A view as an image, `scale` times larger, with masked patches in grey."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (colours.mean, colours.std))
    x_HWC = ((crop_CHW.float() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    if mask_P is not None:
        patch = round((x_HWC.shape[0] * x_HWC.shape[1] / len(mask_P)) ** 0.5)
        mask_hw = mask_P.unflatten(0, (x_HWC.shape[0] // patch, -1))
        hidden_HW = mask_hw.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        x_HWC[hidden_HW] = x_HWC[hidden_HW] // 4 + 96
    picture = Image.fromarray(to_rgb(x_HWC.numpy()))
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)


def _draw_boxes(image_HWC: np.ndarray, views: MultiCrop, width: int, height: int) -> Image.Image:
    """The image, as large as fits, with the boxes of its crops; thin boxes are local."""
    picture = Image.fromarray(to_rgb(np.ascontiguousarray(image_HWC)))
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    draw, (tall, wide) = ImageDraw.Draw(picture), views.size
    y, x = (size[1] - 1) / tall, (size[0] - 1) / wide
    for number, (top, left, h, w) in reversed(list(enumerate(views.boxes))):
        corners = (left * x, top * y, (left + w) * x, (top + h) * y)
        draw.rectangle(corners, outline=BOX_COLOURS[min(number, 2)], width=2 if number < 2 else 1)
    return picture
