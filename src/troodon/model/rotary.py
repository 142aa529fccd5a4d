"""Rotary positions of patches, as DINOv3 has them: channels of queries and keys turn with the place of their patch.

RoPE: https://arxiv.org/abs/2104.09864. On the two axes of an image: https://arxiv.org/abs/2508.10104, section 3.2.
"""

import math

import torch
from torch import Tensor, nn

from troodon.model.config import ViTConfig

# Shape suffixes: T tokens of a pack, N heads, H channels per head, L tokens of an image, F = H / 2 angles of a token,
#                 Q = H / 4 periods.

BASE = 100.0  # the longest period, in units of half an image


class RotaryPositions(nn.Module):
    """Turns of the tokens of an image: of patches by their place, of the class token and the registers by none.

    A patch lies at (y, x) in (-1, 1), whatever the size and shape of the image. A quarter of the channels of a head
    turns with y and a quarter with x, one channel for each period; the other half are their partners.
    """

    periods: Tensor

    def __init__(self, config: ViTConfig):
        super().__init__()
        # In the state, since those of released weights were rounded to bf16.
        self.register_buffer("periods", torch.empty(config.dim // config.heads // 4))

    def initialize(self) -> None:
        self.periods.copy_(periods(len(self.periods), device=self.periods.device))

    def forward(self, grid: tuple[int, int], others: int) -> Tensor:
        """(L, 2, F): cosines and sines for `others` tokens without a place, and then for those of a grid of patches."""
        sides = [torch.arange(side, device=self.periods.device, dtype=torch.float32) for side in grid]
        y_h, x_w = ((2 * place + 1) / side - 1 for place, side in zip(sides, grid, strict=True))
        turns_hQ, turns_wQ = (2 * math.pi * place[:, None] / self.periods.float() for place in (y_h, x_w))
        rows_hwQ = turns_hQ[:, None].expand(-1, grid[1], -1)
        columns_hwQ = turns_wQ[None].expand(grid[0], -1, -1)
        turns_PF = torch.cat([rows_hwQ, columns_hwQ], dim=-1).flatten(0, 1)
        turns_LF = torch.cat([turns_PF.new_zeros(others, turns_PF.shape[1]), turns_PF])
        return torch.stack([turns_LF.cos(), turns_LF.sin()], dim=1)


def periods(count: int, base: float = BASE, device: torch.device | None = None) -> Tensor:
    """Periods from 1 to nearly `base`, in geometric progression."""
    return base ** (torch.arange(count, device=device, dtype=torch.float32) / count)


def turned(x_TNH: Tensor, rotation_T2F: Tensor) -> Tensor:
    """Queries or keys, of which the first and the second half of the channels turn as pairs; in fp32."""
    cosine_T1F, sine_T1F = rotation_T2F[:, :, None].unbind(1)
    a_TNF, b_TNF = x_TNH.float().chunk(2, dim=-1)
    pairs = a_TNF * cosine_T1F - b_TNF * sine_T1F, b_TNF * cosine_T1F + a_TNF * sine_T1F
    return torch.cat(pairs, dim=-1).to(x_TNH.dtype)
