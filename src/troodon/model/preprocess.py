"""From pixels to the network's input: resized, cropped or whole, normalised; and put together to batches."""

import dataclasses
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.config import UsageError, pair
from troodon.model.config import Preprocessing

# Shape suffixes: B images, C colours, H W pixels.

LONGEST = 4  # the longer side of what is resized is at most as many times the shorter one that is shown


def with_size(p: Preprocessing, size: int | Sequence[int] | None, patch: int) -> Preprocessing:
    """This preprocessing for crops of another size, a side or (height, width) in pixels; `resize` is scaled along.

    UsageError for what is no size, or does not divide into patches.
    """
    if size is None:
        return p
    sides = [size, size] if isinstance(size, Integral) else list(size) if isinstance(size, Sequence) else []
    if len(sides) != 2 or not all(isinstance(side, Integral) and side > 0 for side in sides):
        raise UsageError(f"size {size!r}: pixels of a side, or (height, width)")
    check_divides(sides, patch, "size")
    height, width = sides
    resize = round(p.resize * min(sides) / min(pair(p.crop)))
    return dataclasses.replace(p, resize=resize, crop=height if height == width else (height, width))


def check_divides(sides: Sequence[int], patch: int, what: str) -> None:
    """UsageError for a height and a width in pixels that do not divide into patches; it names the nearest that do."""
    if any(side % patch or not side for side in sides):
        size, near = (" x ".join(map(str, s)) for s in (sides, [max(1, round(s / patch)) * patch for s in sides]))
        raise UsageError(f"{what} of {size} pixels does not divide into patches of {patch}; the nearest is {near}")


def crop(image_HWC: np.ndarray, p: Preprocessing, out: Tensor | None = None) -> Tensor:
    """uint8 (H, W, C) -> (C, *crop): resized to cover the crop, cut to its middle, normalised; into `out`, if any."""
    crop_h, crop_w = pair(p.crop)
    height, width = image_HWC.shape[:2]
    # What a long image has beyond these is never shown, and is cut before resizing.
    tallest, widest = max(1, LONGEST * width * crop_h // crop_w), max(1, LONGEST * height * crop_w // crop_h)
    top, left = max(0, height - tallest) // 2, max(0, width - widest) // 2
    image_HWC = image_HWC[top : top + tallest, left : left + widest]
    height, width = image_HWC.shape[:2]
    cover = [side * p.resize / min(crop_h, crop_w) for side in (crop_h, crop_w)]
    scale = max(cover[0] / height, cover[1] / width)
    size = [max(round(cover[0]), round(height * scale)), max(round(cover[1]), round(width * scale))]
    x_CHW = _resized(image_HWC, size)
    top, left = (size[0] - crop_h) // 2, (size[1] - crop_w) // 2
    return _normalised(x_CHW[:, top : top + crop_h, left : left + crop_w], p, out)


def whole(image_HWC: np.ndarray, p: Preprocessing, patch: int) -> Tensor:
    """uint8 (H, W, C) -> (C, h, w): all of the image at its own aspect, each side rounded to whole patches.

    The shorter side is that of the crop, unless the longer one would have more than LONGEST times as many pixels.
    """
    short, sides = min(pair(p.crop)), image_HWC.shape[:2]
    scale = min(short / min(sides), LONGEST * short / max(sides))
    return _normalised(_resized(image_HWC, [max(1, round(side * scale / patch)) * patch for side in sides]), p)


def joined(parts: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """Prepared images (B, C, H, W) of several threads as one batch, on the device if there is one.

    For a GPU it is called beside the network, from another thread: the copy starts from pinned memory, on a stream of
    its own, and has ended when the batch is returned.
    """
    if device is None or device.type != "cuda":
        batch = parts[0] if len(parts) == 1 else torch.from_numpy(np.concatenate([part.numpy() for part in parts]))
        return batch if device is None else batch.to(device)
    pinned = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype, pin_memory=True)
    np.concatenate([part.numpy() for part in parts], out=pinned.numpy())
    copies = torch.cuda.Stream(device)
    with torch.cuda.stream(copies):
        batch = pinned.to(device, non_blocking=True)
    copies.synchronize()
    batch.record_stream(torch.cuda.default_stream(device))  # keeps its memory until the network has read it
    return batch


def stacked(images: Sequence[Tensor], device: torch.device) -> Tensor:
    """Prepared images (C, H, W) as one batch (B, C, H, W), in pinned memory if it is to go to a GPU."""
    if device.type != "cuda":
        return torch.stack(list(images))
    batch = torch.empty(len(images), *images[0].shape, dtype=images[0].dtype, pin_memory=True)
    return torch.stack(list(images), out=batch)


def _resized(image_HWC: np.ndarray, size: list[int]) -> Tensor:
    is_plain = image_HWC.flags.writeable and image_HWC.flags.c_contiguous
    x_CHW = torch.from_numpy(image_HWC if is_plain else np.array(image_HWC)).permute(2, 0, 1)
    if size == list(image_HWC.shape[:2]):
        return x_CHW
    return F.interpolate(x_CHW[None], size=size, mode="bicubic", antialias=True)[0]


def _normalised(x_CHW: Tensor, p: Preprocessing, out: Tensor | None = None) -> Tensor:
    """By numpy, which starts no threads of its own: this runs in threads, and torch would start some in each."""
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (p.mean, p.std))
    out_CHW = np.empty(x_CHW.shape, np.float32) if out is None else out.numpy()
    np.divide(np.ascontiguousarray(x_CHW.numpy()), np.float32(255), out=out_CHW)  # twice as fast, copied first
    out_CHW -= mean
    out_CHW /= std
    return torch.from_numpy(out_CHW)
