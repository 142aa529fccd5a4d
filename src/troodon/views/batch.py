"""The batch of one training step: collated crops and masks, and nothing else."""

from dataclasses import dataclass

from torch import Tensor

from troodon.dist import Share, send

# Shape suffixes: G global and V local crops of each of B images, C colours, H W pixels,
#                 N = G * B global crops, P patches, M masked patches of the whole batch; 2: image, visit.


@dataclass(frozen=True, eq=False)
class Batch:
    """B images, each as G global and V local crops; the crops of one view are contiguous. A batch equals only itself.

    Masks stay on the host, whatever device the crops are on: the number of masked patches determines the shapes of a
    step, and reading it from a device would mean to wait for the device.
    """

    globals_GBCHW: Tensor
    locals_VBCHW: Tensor
    masks_NP: Tensor  # view-major; True where the student sees the mask token
    images_B2: Tensor | None = None  # on the host: each image's row in the index, and the number of its set of crops
    share: Share | None = None  # which images of the step these are

    def chunk(self, count: int) -> list["Batch"]:
        """Split the batch into `count` batches of equally many images."""
        masks_GBP = self.masks_NP.unflatten(0, self.globals_GBCHW.shape[:2])
        chunks = zip(*(x.chunk(count, 1) for x in (self.globals_GBCHW, self.locals_VBCHW, masks_GBP)), strict=True)
        images = [None] * count if self.images_B2 is None else self.images_B2.chunk(count)
        shares = [None] * count if self.share is None else self.share.chunk(count)
        return [
            Batch(wide, narrow, masks.flatten(0, 1), image, share)
            for (wide, narrow, masks), image, share in zip(chunks, images, shares)
        ]

    def masked_patches(self) -> tuple[Tensor, Tensor]:
        """(M,) indices of the masked patches in the flattened (N * P), and (M,) weights, on the device of the crops."""
        count_N1 = self.masks_NP.sum(1, keepdim=True).clamp(min=1)
        index_M = self.masks_NP.flatten().nonzero().squeeze(1)
        weight_M = (1.0 / count_N1).expand_as(self.masks_NP).flatten()[index_M]
        device = self.globals_GBCHW.device
        return send(index_M, device), send(weight_M, device)
