"""Bicubic resizing as two matrix products, for a network whose image size is not known when its graph is made."""

import torch
from torch import Tensor

# Shape suffixes: N learned positions on a side, S positions wanted on it, h w rows and columns, D channels.

OUTSIDE = 2  # positions beyond each end of the learned ones that a bicubic kernel reaches


def resize_by_products(learned_NND: Tensor, grid: tuple[int, int], offset: float, antialias: bool) -> Tensor:
    """(N, N, D) -> (h, w, D), as `F.interpolate` with the scale (grid + offset) / N, to a few units of the last digit.

    Unlike that function it works with sizes that `torch.export` and ONNX only know when the network runs. A grid that
    is the learned one stays as it is.
    """
    count, device = learned_NND.shape[0], learned_NND.device
    h, w = (torch.arange(side, device=device, dtype=torch.float32) for side in grid)
    same_h, same_w = (torch.scalar_tensor(side, device=device) == count for side in grid)
    if not antialias:  # an antialiased resize leaves alone each axis that keeps its length; a plain one needs both
        same_h = same_w = same_h & same_w
    rows_hN = _weights(h, count, torch.where(same_h, 0.0, offset), antialias)
    columns_wN = _weights(w, count, torch.where(same_w, 0.0, offset), antialias)
    rows_hND = (rows_hN @ learned_NND.flatten(1)).unflatten(1, (count, -1))
    return columns_wN @ rows_hND


def _weights(wanted_S: Tensor, count: int, offset: Tensor, antialias: bool) -> Tensor:
    """What each learned position contributes to each wanted one: (S, N). Past the ends, the last position repeats."""
    scale = count / (wanted_S.shape[0] + offset)
    learned = torch.arange(-OUTSIDE, count + OUTSIDE, device=wanted_S.device, dtype=torch.float32)
    distance_SN = learned + 0.5 - (scale * (wanted_S + 0.5))[:, None]
    if antialias:
        inside_SN = _kernel(distance_SN / scale.clamp(min=1.0), -0.5)[:, OUTSIDE : OUTSIDE + count]
        return inside_SN / inside_SN.sum(1, keepdim=True)
    weights_SN = _kernel(distance_SN, -0.75)
    nearest_NN = learned.clamp(0, count - 1)[:, None] == torch.arange(count, device=wanted_S.device)
    return weights_SN @ nearest_NN.float()


def _kernel(distance: Tensor, a: float) -> Tensor:
    """The cubic convolution kernel (Keys 1981)."""
    d = distance.abs()
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))
