"""What one training step sees: crops and masks, already collated, and nothing else."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

# Shape suffixes: G global and V local crops of each of B images, C colours, H W pixels,
#                 N = G * B global crops, P patches, M masked patches of the whole batch.


@dataclass(frozen=True, eq=False)
class Batch:
    """B images, each seen as G global and V local crops; crops of one view are contiguous. Only itself is its equal."""

    globals_GBCHW: Tensor
    locals_VBCHW: Tensor
    masks_NP: Tensor  # view-major; True where the student sees the mask token

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def parts(self, count: int) -> list["Batch"]:
        """The batch cut into `count` smaller ones of as many images each."""
        masks_GBP = self.masks_NP.unflatten(0, self.globals_GBCHW.shape[:2])
        pieces = zip(*(x.chunk(count, 1) for x in (self.globals_GBCHW, self.locals_VBCHW, masks_GBP)), strict=True)
        return [Batch(wide, narrow, masks.flatten(0, 1)) for wide, narrow, masks in pieces]

    def masked(self) -> tuple[Tensor, Tensor]:
        """(M,) indices of the masked patches in the flattened (N * P), and their (M,) weights."""
        count_N1 = self.masks_NP.sum(1, keepdim=True).clamp(min=1)
        index_M = self.masks_NP.flatten().nonzero().squeeze(1)
        return index_M, (1.0 / count_N1).expand_as(self.masks_NP).flatten()[index_M]
