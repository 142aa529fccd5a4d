"""Projection head: an MLP, a normalised bottleneck, and cosine prototypes (https://arxiv.org/abs/2104.14294)."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from troodon.model.config import HeadConfig

# Shape suffixes: K prototypes, D channels of the bottleneck, M rows: whatever dimensions come before the channels.

ROWS = 4096  # prototypes at a time in the backward pass, so that no second whole matrix is made


class HeadOutput(NamedTuple):
    """The two factors of a head's logits: the logits are large, and need not be made at once."""

    bottleneck_MD: Tensor  # of length one
    prototypes_KD: Tensor

    def logits(self) -> Tensor:
        """(M, K): cosines with the prototypes, times their lengths."""
        return F.linear(self.bottleneck_MD, self.prototypes_KD)

    def to(self, dtype: torch.dtype) -> "HeadOutput":
        return HeadOutput(self.bottleneck_MD.to(dtype), self.prototypes_KD.to(dtype))


class Prototypes(nn.Module):
    """Directions with a length of their own, both learned (weight normalisation)."""

    def __init__(self, prototypes: int, bottleneck: int):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck))  # the names of the released weights
        self.weight_g = nn.Parameter(torch.empty(prototypes, 1))

    def forward(self) -> Tensor:
        return _WeightNorm.apply(self.weight_v, self.weight_g)


class _WeightNorm(torch.autograd.Function):
    """length * v / |v|. The backward pass keeps only the input, and makes no matrix besides the gradient."""

    @staticmethod
    def forward(ctx, v_KD: Tensor, length_K1: Tensor) -> Tensor:
        norm_K1 = v_KD.norm(dim=1, keepdim=True)
        ctx.save_for_backward(v_KD, length_K1, norm_K1)
        return (v_KD / norm_K1).mul_(length_K1)

    @staticmethod
    def backward(ctx, gradient_KD: Tensor):  # pyrefly: ignore[bad-override]
        v_KD, length_K1, norm_K1 = ctx.saved_tensors
        pairs = zip(gradient_KD.split(ROWS), v_KD.split(ROWS), strict=True)
        along_K1 = torch.cat([(gradient * v).sum(1, keepdim=True) for gradient, v in pairs]) / norm_K1
        across_KD = torch.addcmul(gradient_KD, v_KD, along_K1 / norm_K1, value=-1.0)
        return across_KD.mul_(length_K1 / norm_K1), along_K1


class Head(nn.Module):
    def __init__(self, dim: int, config: HeadConfig):
        super().__init__()
        widths = [dim, *[config.hidden] * (config.layers - 1), config.bottleneck]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(config.prototypes, config.bottleneck)

    @torch.no_grad()
    def initialize(self) -> None:
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.kaiming_uniform_(self.last_layer.weight_v, a=5**0.5)
        nn.init.ones_(self.last_layer.weight_g)

    def forward(self, x: Tensor) -> HeadOutput:
        """(..., dim) -> bottleneck vectors (..., D) and the prototypes (K, D)."""
        return HeadOutput(F.normalize(self.mlp(x), dim=-1), self.last_layer())
