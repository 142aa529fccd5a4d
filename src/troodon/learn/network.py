"""The networks of training: a backbone with the heads and the linear maps that the objective needs."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from troodon.model.config import HeadConfig, ViTConfig
from troodon.model.head import Head, HeadOutput
from troodon.model.vit import ViT

# Shape suffixes: M class tokens, or patches, of the whole batch, D channels, K prototypes.

NO_MAPS: Mapping[str, Sequence[int]] = MappingProxyType({})


class Network(nn.Module):
    """A backbone with a head for class tokens, one for patches, or one for both; and with linear maps to the features
    of frozen teachers (see LinearMaps)."""

    def __init__(
        self,
        vit: ViTConfig,
        dino_head: HeadConfig | None,
        ibot_head: HeadConfig | None,
        maps: Mapping[str, Sequence[int]] = NO_MAPS,
    ):
        super().__init__()
        self.backbone = ViT(vit)
        if dino_head is not None:
            self.dino_head = Head(vit.dim, dino_head)
        if ibot_head is not None:
            self.ibot_head = Head(vit.dim, ibot_head)
        if maps:
            self.maps = LinearMaps(vit.dim, maps)

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
