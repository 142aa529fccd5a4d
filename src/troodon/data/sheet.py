"""The sheet people check before training: what the network is shown."""

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from troodon.data.batch import Batch
from troodon.data.config import PhotometricConfig
from troodon.data.decode import shown
from troodon.run import write_bytes

GAP = 2  # pixels between pictures


def draw(batch: Batch, colours: PhotometricConfig, path: Path, rows: int = 8) -> None:
    """A PNG with a row per image: its global crops, their masked patches grey, then its local crops.

    Of other than three channels it shows the first three, or the first as grey.
    """
    mean, std = (torch.tensor(v)[:, None, None] for v in (colours.mean, colours.std))

    def picture(crop_CHW: torch.Tensor, mask_P: torch.Tensor | None = None) -> Image.Image:
        x_HWC = ((crop_CHW.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        if mask_P is not None:
            patch = round((x_HWC.shape[0] * x_HWC.shape[1] / len(mask_P)) ** 0.5)
            mask_hw = mask_P.cpu().unflatten(0, (x_HWC.shape[0] // patch, -1))
            hidden_HW = mask_hw.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
            x_HWC[hidden_HW] = x_HWC[hidden_HW] // 4 + 96
        return Image.fromarray(shown(x_HWC.numpy()))

    views, images = batch.globals_GBCHW.shape[:2]
    masks_GBP = batch.masks_NP.unflatten(0, (views, images))
    (tall, big), (low, small) = (crops.shape[-2:] for crops in (batch.globals_GBCHW, batch.locals_VBCHW))
    height = GAP + (max(tall, low) if len(batch.locals_VBCHW) else tall)
    rows = min(rows, images)
    width = views * (big + GAP) + len(batch.locals_VBCHW) * (small + GAP)
    out = Image.new("RGB", (width, rows * height), "white")
    for row in range(rows):
        left, top = 0, row * height
        for view in range(views):
            out.paste(picture(batch.globals_GBCHW[view, row], masks_GBP[view, row]), (left, top))
            left += big + GAP
        for crop in batch.locals_VBCHW[:, row]:
            out.paste(picture(crop), (left, top))
            left += small + GAP
    scale = max(1, round(900 / width))
    if scale > 1:
        out = out.resize((out.width * scale, out.height * scale), Image.Resampling.NEAREST)
    buffer = BytesIO()
    out.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
