"""Colour changes of crops: jitter, grey, blur, solarisation and normalisation. Drawn per image on the CPU, applied to
whole batches on the training device (appendix B of https://arxiv.org/abs/2104.14294, as in the released DINOv2 models).

`draw_parameters` draws eight numbers per crop, which say what happens to it; `apply` applies them and draws nothing. An
operation with neutral numbers is skipped, and leaves the pixels unchanged to the last bit.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.views.config import PhotometricConfig

# Shape suffixes: N crops, P parameters of a crop, C channels (red, green, blue, if there are three), H and W pixels,
#                 n the crops of a batch that one operation changes, K taps of the blur.
# Pixels are float32 in [0, 1], and are clamped after every operation that can leave this range.

GLOBAL_1, GLOBAL_2, LOCAL = 0, 1, 2  # the roles of a crop, in the order of PhotometricConfig.blur

# The columns of the parameters. The first five are the jitter; ORDER selects a row of ORDERS.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARISE = range(8)
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
ORDERS = np.array(list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))))

BLUR_TAPS = 9  # pixels
LUMA = (0.299, 0.587, 0.114)  # grey of red, green, blue (ITU-R BT.601), as in Pillow's "L"
PIXELS_AT_ONCE = 1 << 17  # of one operation on a CPU, so that they stay in its cache: a third faster


def draw_parameters(config: PhotometricConfig, views: Sequence[int], random: np.random.Generator) -> np.ndarray:
    """Draw the parameters of each crop of one image: float32 (views, 8), columns as named above.

    `views` are the roles of the crops, for example `(GLOBAL_1, GLOBAL_2) + (LOCAL,) * 8`. Every crop uses equally many
    random numbers, so a crop does not depend on those after it. An operation that a crop does not get is exactly
    NEUTRAL.
    """
    probability_RP, low_P, high_P = _ranges(config)
    gate_NP, u_NP = np.moveaxis(random.random((len(views), 2, len(NEUTRAL))), 1, 0)
    gate_NP[:, :GREY] = gate_NP[:, :1]  # the jitter is applied as a whole
    value_NP = low_P + (high_P - low_P) * u_NP
    value_NP[:, ORDER] = np.floor(value_NP[:, ORDER])
    return np.where(gate_NP < probability_RP[list(views)], value_NP, NEUTRAL).astype(np.float32)


@functools.lru_cache
def _ranges(config: PhotometricConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each column: the probability of the operation by role, and the range of its value."""
    strength = (config.brightness, config.contrast, config.saturation)
    ranges = [(max(0.0, 1.0 - s), 1.0 + s) for s in strength]
    ranges += [(-config.hue, config.hue), (0, len(ORDERS)), (1, 1), config.blur_sigma, (1, 1)]
    probability = [
        (*(config.jitter,) * 5, config.grey, blur, config.solarise if role == GLOBAL_2 else 0.0)
        for role, blur in enumerate(config.blurs)
    ]
    return np.array(probability), *np.array(ranges, dtype=np.float64).T


def apply(
    crops_NCHW: Tensor, parameters_NP: np.ndarray | Tensor, config: PhotometricConfig, compiled: bool = False
) -> Tensor:
    """Apply the parameters: float32 (N, C, H, W), jittered, grey, blurred, solarised and normalised.

    `crops_NCHW` is uint8 on the training device. `parameters_NP` stays in host memory: it determines which crops each
    operation changes, and reading it from a device would mean to wait. Deterministic. If there are not three channels,
    they are not colours: saturation, hue and grey do nothing, and contrast is relative to the mean of all channels.

    `compiled` operations give the same up to rounding, nearly twice as fast on a CPU; compilation takes a minute.
    """
    channels = crops_NCHW.shape[1]
    parameters_NP = np.asarray(parameters_NP, dtype=np.float32)
    assert crops_NCHW.dtype == torch.uint8, crops_NCHW.dtype
    assert parameters_NP.shape == (len(crops_NCHW), len(NEUTRAL)), parameters_NP.shape
    assert len(config.mean) == len(config.std) == channels, (config.mean, config.std, channels)
    x_NCHW = crops_NCHW.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    at_once = max(1, PIXELS_AT_ONCE // math.prod(x_NCHW.shape[2:])) if x_NCHW.device.type == "cpu" else len(x_NCHW)
    for operation, rows, values in _to_device(_plan(parameters_NP, channels), x_NCHW.device):
        if compiled:
            operation = _compiled(operation)
        for rows_n, values_n in zip(rows.split(at_once), values.split(at_once)):
            changed_nCHW = operation(x_NCHW.index_select(0, rows_n), values_n[:, None, None, None])
            x_NCHW.index_copy_(0, rows_n, changed_nCHW)
    for c, (mean, std) in enumerate(zip(config.mean, config.std)):
        x_NCHW[:, c].sub_(mean).div_(std)
    return x_NCHW


Operation = Callable[[Tensor, Tensor], Tensor]  # of (n, C, H, W), which it may overwrite, and (n, 1, 1, 1)


def _plan(parameters_NP: np.ndarray, channels: int) -> list[tuple[Operation, np.ndarray, np.ndarray]]:
    """The operations in the order of application, each with the crops it changes and their parameters."""
    jitter = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
    order_N4 = ORDERS[parameters_NP[:, ORDER].astype(np.int64)]
    steps = [
        (column, operation, order_N4[:, place] == column) for place in range(4) for column, operation in jitter.items()
    ]
    steps += [(GREY, _grey, True), (SIGMA, _blur, True), (SOLARISE, _solarise, True)]
    plan: list[tuple[Operation, np.ndarray, np.ndarray]] = []
    for column, operation, is_due in steps:
        if channels != 3 and column in (SATURATION, HUE, GREY):
            continue
        rows = np.flatnonzero(is_due & (parameters_NP[:, column] != NEUTRAL[column]))
        if len(rows):
            plan.append((operation, rows, parameters_NP[rows, column]))
    return plan


@functools.cache
def _compiled(operation: Operation) -> Operation:
    return torch.compile(operation, dynamic=True)


def _to_device(
    plan: list[tuple[Operation, np.ndarray, np.ndarray]], device: torch.device
) -> list[tuple[Operation, Tensor, Tensor]]:
    """The plan with its arrays on the device: two transfers, which do not wait for the device's current work."""
    if not plan:
        return []
    operations, *arrays = zip(*plan)
    tensors = [torch.from_numpy(np.concatenate(parts)) for parts in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    sizes = [len(rows) for rows in arrays[0]]
    return list(zip(operations, *(tensor.to(device, non_blocking=True).split(sizes) for tensor in tensors)))


def _brightness(x_nCHW: Tensor, factor: Tensor) -> Tensor:
    return x_nCHW.mul_(factor).clamp_(0, 1)


def _contrast(x_nCHW: Tensor, factor: Tensor) -> Tensor:
    mean_nC11 = x_nCHW.mean((2, 3), keepdim=True)
    return x_nCHW.mul_(factor).add_((1 - factor) * _luma(mean_nC11)).clamp_(0, 1)


def _saturation(x_nCHW: Tensor, factor: Tensor) -> Tensor:
    grey_n1HW = _luma(x_nCHW).mul_(1 - factor)
    return x_nCHW.mul_(factor).add_(grey_n1HW).clamp_(0, 1)


def _hue(x_nCHW: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue in HSV by a fraction of the colour circle; value and chroma stay.

    In sixths of the circle, the hue is 1 + (g + b - r - minimum) / chroma from red, towards green where g > b: one
    formula for all six sectors, several times faster than a case for each.
    """
    r, g, b = x_nCHW.unbind(1)
    chroma, minimum = torch.maximum(r, g), torch.minimum(r, g)
    torch.minimum(minimum, b, out=minimum)
    torch.maximum(chroma, b, out=chroma).sub_(minimum)
    hue = (g + b).sub_(r).sub_(minimum).div_(chroma.clamp(min=1e-12)).add_(1)  # any value for grey, whose chroma is 0
    hue.copysign_(g - b).add_(6 * shift[:, 0])
    hue.sub_(torch.floor(hue / 6), alpha=6)  # now in [0, 6]
    for c, (centre, slope, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        weight = (hue - centre).abs_().mul_(slope).add_(offset).clamp_(0, 1)
        torch.addcmul(minimum, chroma, weight, out=x_nCHW[:, c])
    return x_nCHW


def _grey(x_nCHW: Tensor, _: Tensor) -> Tensor:
    return _luma(x_nCHW).expand_as(x_nCHW)


def _blur(x_nCHW: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of BLUR_TAPS x BLUR_TAPS pixels, mirrored at the border: by axis, as sums of shifted crops."""
    radius = BLUR_TAPS // 2
    tap_K = torch.arange(-radius, radius + 1, device=sigma.device)
    weight_nK = torch.exp(-0.5 * (tap_K / sigma.flatten()[:, None]) ** 2)
    weight_Kn111 = (weight_nK / weight_nK.sum(1, keepdim=True)).T[..., None, None, None]
    for axis, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        side, padded = x_nCHW.shape[axis], F.pad(x_nCHW, padding, mode="reflect")
        x_nCHW.mul_(weight_Kn111[radius])
        for k in range(radius):  # both taps at the same distance have the same weight
            pair = padded.narrow(axis, k, side) + padded.narrow(axis, BLUR_TAPS - 1 - k, side)
            x_nCHW.addcmul_(pair, weight_Kn111[k])
    return x_nCHW


def _solarise(x_nCHW: Tensor, _: Tensor) -> Tensor:
    """Invert pixels above 1/2: of 8-bit pixels, 128 and above."""
    return torch.minimum(x_nCHW, 1 - x_nCHW)


def _luma(x_nCHW: Tensor) -> Tensor:
    if x_nCHW.shape[1] != 3:
        return x_nCHW.mean(1, keepdim=True)
    r, g, b = x_nCHW.split(1, 1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])
