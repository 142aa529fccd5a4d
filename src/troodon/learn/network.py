"""The networks of training: a backbone with the heads and the linear maps that the objective needs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn

from troodon.model.config import HeadConfig, ViTConfig
from troodon.model.head import Head, HeadOutput
from troodon.model.vit import ViT

# Shape suffixes: M class tokens, or patches, of the whole batch, D channels, K prototypes.

NO_MAPS: Mapping[str, Sequence[int]] = MappingProxyType({})


class Network(nn.Module):
    """A backbone with a head for class tokens, one for patches, or one for both; with linear maps to the features of
    frozen teachers (see LinearMaps), and a projector for contrast (see Projector)."""

    def __init__(
        self,
        vit: ViTConfig,
        dino_head: HeadConfig | None,
        ibot_head: HeadConfig | None,
        maps: Mapping[str, Sequence[int]] = NO_MAPS,
        projector: Sequence[int] = (),
    ):
        super().__init__()
        self.backbone = ViT(vit)
        if dino_head is not None:
            self.dino_head = Head(vit.dim, dino_head)
        if ibot_head is not None:
            self.ibot_head = Head(vit.dim, ibot_head)
        if maps:
            self.maps = LinearMaps(vit.dim, maps)
        if projector:
            self.projector = Projector((vit.dim, *projector))

    @property
    def patch_head(self) -> Head:
        return self.ibot_head if "ibot_head" in self._modules else self.dino_head

    def heads(self, tokens: Mapping[str, Tensor], compute: torch.dtype) -> dict[str, HeadOutput]:
        """Outputs of the heads for class tokens "cls" (M, D) and for "patches" (M, D), in `compute`.

        A head that serves both runs once.
        """
        if len(tokens) > 1 and self.patch_head is self.dino_head:
            bottleneck_MD, prototypes_KD = self.dino_head(torch.cat([*tokens.values()])).to(compute)
            parts = bottleneck_MD.split([len(rows_MD) for rows_MD in tokens.values()])
            return {kind: HeadOutput(part_MD, prototypes_KD) for kind, part_MD in zip(tokens, parts, strict=True)}
        heads = {"cls": lambda: self.dino_head, "patches": lambda: self.patch_head}
        return {kind: heads[kind]()(rows_MD).to(compute) for kind, rows_MD in tokens.items()}

    def initialize(self) -> None:
        for part in self.children():
            part.initialize()


class LinearMaps(nn.Module):
    """Linear maps of a student's class token ("cls") and patches ("patches") to the channels of each frozen teacher."""

    def __init__(self, dim: int, widths: Mapping[str, Sequence[int]]):
        super().__init__()
        self.kinds = tuple(widths)
        for kind, teachers in widths.items():
            self.add_module(kind, nn.ModuleList(nn.Linear(dim, width) for width in teachers))

    @torch.no_grad()
    def initialize(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, **tokens: Tensor) -> dict[str, list[Tensor]]:
        """The mapped tokens, for each teacher."""
        return {kind: [layer(tokens[kind]) for layer in self.get_submodule(kind).children()] for kind in self.kinds}


class Projector(nn.Sequential):
    """An MLP whose hidden layers are normalised over the rows it is given (https://arxiv.org/abs/2002.05709, section
    4.2). Only training uses it, on whole steps, so it keeps no statistics."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        *hidden, last = pairwise(widths)
        for number, (before, after) in enumerate(hidden):
            self.add_module(f"linear{number}", nn.Linear(before, after, bias=False))
            self.add_module(f"norm{number}", nn.BatchNorm1d(after, track_running_stats=False))
            self.add_module(f"relu{number}", nn.ReLU())
        self.add_module("last", nn.Linear(*last))

    def initialize(self) -> None:
        for layer in self:
            if isinstance(layer, nn.Linear | nn.BatchNorm1d):
                layer.reset_parameters()
