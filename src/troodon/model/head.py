"""Projection head: an MLP, a normalised bottleneck, and cosine prototypes (https://arxiv.org/abs/2104.14294)."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from troodon.model.config import HeadConfig

# Shape suffixes: K prototypes, D channels of the bottleneck, M rows: whatever dimensions come before the channels.


class Answer(NamedTuple):
    """What a head says, before the last product: the logits are large, and need not be made at once."""

    rows_MD: Tensor  # of length one
    prototypes_KD: Tensor

    def logits(self) -> Tensor:
        """(M, K): cosines with the prototypes, times their lengths."""
        return F.linear(self.rows_MD, self.prototypes_KD)

    def to(self, dtype: torch.dtype) -> "Answer":
        return Answer(self.rows_MD.to(dtype), self.prototypes_KD.to(dtype))


class Prototypes(nn.Module):
    """Directions with a length of their own, both learned (weight normalisation)."""

    def __init__(self, prototypes: int, bottleneck: int):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck))  # the names of the released weights
        self.weight_g = nn.Parameter(torch.empty(prototypes, 1))

    def forward(self) -> Tensor:
        return self.weight_g * (self.weight_v / self.weight_v.norm(dim=1, keepdim=True))


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

    def forward(self, x: Tensor) -> Answer:
        """(..., dim) -> rows (..., D) and the prototypes (K, D)."""
        return Answer(F.normalize(self.mlp(x), dim=-1), self.last_layer())
