"""Features of frozen teachers on one scale: running moments of their channels."""

import torch
from torch import Tensor

from troodon.learn.losses import Ranks

# Shape suffixes: M class tokens, or patches, of the whole batch, D channels.

SETTLED = 100.0  # steps over which moments are plain means; later they are moving averages of this length
EPS = 1e-6


def moments(rows_MD: Tensor, before_3D: Tensor, ranks: Ranks) -> Tensor:
    """(3, D): number of steps, means and mean squares of the channels, over the rows of all steps and ranks so far.

    In fp64: a deviation may be a thousandth of the mean, and is a small difference of squares.
    """
    rows_MD = rows_MD.double()
    count = ranks.total(rows_MD.new_full((), len(rows_MD))).clamp(min=1.0)
    now_2D = ranks.total(torch.stack([rows_MD.sum(0), rows_MD.square().sum(0)])) / count
    steps_D = before_3D[0] + 1.0
    return torch.cat([steps_D[None], before_3D[1:].lerp(now_2D, 1.0 / steps_D.clamp(max=SETTLED))])


def standardised(rows_MD: Tensor, moments_3D: Tensor) -> Tensor:
    """The same rows with mean 0 and standard deviation 1 in every channel."""
    _, mean_D, square_D = moments_3D
    deviation_D = (square_D - mean_D.square()).clamp(min=EPS**2).sqrt()
    return (rows_MD.float() - mean_D.float()) / deviation_D.float()
