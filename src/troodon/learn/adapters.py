"""Low-rank adapters: the weights of a backbone stay, and small products beside its linear layers learn (LoRA,
https://arxiv.org/abs/2106.09685). What is saved for use is an ordinary backbone, with the products added."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from troodon.model.vit import ViT


class LowRank(nn.Module):
    """A linear layer and two factors of a product that is added to its weight. Parameters keep their names."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.kind: Any = type(linear)
        self.weight, self.bias = linear.weight, linear.bias
        self.down = nn.Parameter(torch.empty(rank, linear.in_features).uniform_(-1, 1) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.kind.forward(self, x) + F.linear(F.linear(x, self.down), self.up)


def add(vit: ViT, rank: int) -> None:
    """Put adapters, which change nothing yet, around the linear layers of all blocks. No adapters for rank 0."""
    for name, layer in [*vit.blocks.named_modules()] if rank else ():
        if isinstance(layer, nn.Linear):
            vit.blocks.set_submodule(name, LowRank(layer, rank))


def freeze_others(vit: ViT) -> None:
    """Only adapters learn, and the mask token, which is no part of features."""
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(name.endswith((".down", ".up", "mask_token")))


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an ordinary network with the same features; the same weights, where there are no adapters."""
    layers = [name.removesuffix(".down") for name in state if name.endswith(".down")]
    added = {f"{name}.weight": state[f"{name}.weight"] + state[f"{name}.up"] @ state[f"{name}.down"] for name in layers}
    return {name: w for name, w in (state | added).items() if not name.endswith((".down", ".up"))}
