"""Heads on feature maps: a linear layer, or the convolutions of DPT (https://arxiv.org/abs/2103.13413)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shape suffixes: B windows, L blocks, D channels of a block, C output channels, h w patches.

WIDTH = 128  # hidden channels of the convolutional head


class LinearHead(nn.Module):
    """Batch norm and a linear layer on the concatenated blocks of each patch; with `cls`, also on the class tokens."""

    def __init__(self, blocks: int, dim: int, out: int, cls: bool):
        super().__init__()
        self.cls = cls
        channels = blocks * dim * (2 if cls else 1)
        self.norm = nn.BatchNorm2d(channels)
        self.layer = nn.Conv2d(channels, out, 1)
        nn.init.normal_(self.layer.weight, std=0.01)
        nn.init.zeros_(self.layer.bias)  # pyrefly: ignore[bad-argument-type]

    def forward(self, maps_BLDhw: Tensor, cls_BLD: Tensor) -> Tensor:
        """(B, C, h, w)."""
        x_BFhw = maps_BLDhw.flatten(1, 2)
        if self.cls:
            cls_BF = cls_BLD.flatten(1)[:, :, None, None]
            x_BFhw = torch.cat([x_BFhw, cls_BF.expand(-1, -1, *x_BFhw.shape[2:])], 1)
        return self.layer(self.norm(x_BFhw))


class DPTHead(nn.Module):
    """Convolutions on four blocks, as in DPT: later blocks are read at coarser resolutions; then all are fused, coarse
    to fine, up to twice the resolution of the patches. Class tokens are concatenated to the patches of their block."""

    def __init__(self, blocks: int, dim: int, out: int, cls: bool):
        super().__init__()
        self.read = nn.ModuleList(nn.Linear(2 * dim, WIDTH) for _ in range(blocks))
        self.norm = nn.ModuleList(nn.BatchNorm2d(2 * dim) for _ in range(blocks))
        self.fuse = nn.ModuleList(_Residual() for _ in range(blocks))
        self.last = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, out, 1))

    def forward(self, maps_BLDhw: Tensor, cls_BLD: Tensor) -> Tensor:
        """(B, C, 2 h, 2 w)."""
        blocks, (h, w) = maps_BLDhw.shape[1], maps_BLDhw.shape[-2:]
        scales = [2.0, 1.0, 0.5, 0.5][-blocks:] if blocks > 1 else [1.0]
        fused = None
        for i in reversed(range(blocks)):
            cls_BDhw = cls_BLD[:, i, :, None, None].expand(-1, -1, h, w)
            x = self.norm[i](torch.cat([maps_BLDhw[:, i], cls_BDhw], 1))
            x = self.read[i](x.movedim(1, -1)).movedim(-1, 1)
            size = (max(1, round(scales[i] * h)), max(1, round(scales[i] * w)))
            x = F.interpolate(x, size=size, mode="bilinear")
            if fused is not None:
                x = x + F.interpolate(fused, size=size, mode="bilinear")
            fused = self.fuse[i](x)
        assert fused is not None
        return self.last(F.interpolate(fused, size=(2 * h, 2 * w), mode="bilinear"))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
