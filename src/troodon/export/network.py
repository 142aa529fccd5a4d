"""A backbone as one graph for any number of images, of any size that patches divide."""

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from troodon.model.vit import Tokens, ViT

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Network(nn.Module):
    """The ViT as a function of one tensor (B, C, H, W) with named outputs, for graphs and for comparisons with them.

    "cls" (B, D), "patches" (B, h, w, D) and "registers" (B, R, D) are those of `features`. For each N of `blocks`,
    numbered from 0, "block_N_cls" and "block_N_patches" are those after that block: through the last norm, or as they
    are.
    """

    def __init__(self, vit: ViT, blocks: Sequence[int] = (), norm: bool = True):
        super().__init__()
        self.vit, self.blocks, self.norm = vit, sorted(set(blocks)), norm

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in their order."""
        of_blocks = [f"block_{number}_{tokens}" for number in self.blocks for tokens in ("cls", "patches")]
        return ["cls", "patches", "registers", *of_blocks]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        grid = [side // self.vit.config.patch for side in images.shape[2:]]
        last = len(self.vit.blocks) - 1
        raw = self.vit.after_blocks([images], sorted({*self.blocks, last}), norm=False)
        tokens = dict(zip(sorted({*self.blocks, last}), (group for (group,) in raw), strict=True))
        final = self._normed(tokens[last])
        outputs = {"cls": final.cls_BD, "patches": final.patches_BPD.unflatten(1, grid)}
        outputs["registers"] = final.registers_BRD
        for number in self.blocks:
            of_block = self._normed(tokens[number]) if self.norm else tokens[number]
            outputs[f"block_{number}_cls"] = of_block.cls_BD
            outputs[f"block_{number}_patches"] = of_block.patches_BPD.unflatten(1, grid)
        return outputs

    def _normed(self, tokens: Tokens) -> Tokens:
        return Tokens(*(self.vit.norm(part) for part in tokens))


def program(network: Network, dtype: str) -> ExportedProgram:
    """The graph, whose number of images, height and width are known only when it runs."""
    vit = copy.deepcopy(network.vit).cpu().eval().requires_grad_(False)
    for parameter in vit.parameters():  # buffers are periods of rotary positions, which stay in fp32
        parameter.data = parameter.data.to(DTYPES[dtype])
    network = Network(vit, network.blocks, network.norm).eval()
    patch = vit.config.patch
    example = torch.zeros(2, vit.config.channels, 3 * patch, 5 * patch, dtype=DTYPES[dtype])
    any_size = {0: Dim("images"), 2: patch * Dim("rows", min=2), 3: patch * Dim("columns", min=2)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(network, (example,), dynamic_shapes=(any_size,))
