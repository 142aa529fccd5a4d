"""Faster inference: the precision that is faster on this device, packed weights, batches that fit the caches."""

import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from troodon.model.vit import UNSCALED, ViT

# Shape suffixes: B images, C colours, H W pixels, T tokens of the pack, D channels, N heads, Q tokens that attend,
#                 L tokens of an image, R registers, h w rows and columns of patches.

TOKENS_AT_ONCE = 4096  # on a CPU: larger batches only use more memory
TOKENS_ON_DEVICE = 2**16  # of pictures that are read here; prepared images go through an accelerator as they come
CAN_PACK = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SPEEDUP = 1.1  # bf16 is chosen if it is at least this many times as fast as fp32: else its rounding is not worth it


def optimized(vit: ViT, compute: torch.dtype, *, compile: bool = False) -> ViT:
    """A copy for inference: linear weights in `compute`, layer scale folded into the linear layer before it.

    Norms and the residual stream stay in fp32. On a CPU weights are packed; with `compile` every block is compiled
    instead, once for each new image size.
    """
    vit = copy.deepcopy(vit).eval().requires_grad_(False)
    blocks: Any = vit.blocks
    for block in blocks:
        last = block.mlp.fc2 if vit.config.mlp == "gelu" else block.mlp.w3
        for linear, scale in ((block.attn.proj, block.ls1), (last, block.ls2)):
            linear.weight.mul_(scale.gamma[:, None])
            linear.bias.mul_(scale.gamma)
        block.ls1 = block.ls2 = nn.Identity()
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.to(compute)
        if compile:
            block.compile(dynamic=False)  # copies, and those in other processes, are not compiled
        elif vit.cls_token.device.type == "cpu" and CAN_PACK:
            attn, mlp = block.attn, block.mlp
            attn.qkv, attn.proj = Packed(attn.qkv), Packed(attn.proj)
            if vit.config.mlp == "gelu":
                mlp.fc1, mlp.activation, mlp.fc2 = Packed(mlp.fc1, "gelu"), UNSCALED, Packed(mlp.fc2)
            else:
                mlp.w12, mlp.w3 = Packed(mlp.w12), Packed(mlp.w3)
    return vit


class Packed(nn.Module):
    """A linear layer, fused with its activation, whose weight is stored once in the layout of oneDNN's products.

    ViT-B embeds a sixth more images a second in fp32 with it, and a tenth more in bf16 (docs/performance.md).
    """

    def __init__(self, linear: nn.Linear, activation: Literal["none", "gelu"] = "none"):
        super().__init__()
        self.dtype, self.activation, self.bias = linear.weight.dtype, activation, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), TOKENS_AT_ONCE)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, self.activation, [], "none")

    def __reduce__(self):  # packed weights cannot be copied or sent to another process
        weight = self.packed.to_dense()
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=self.dtype, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return Packed, (linear, self.activation)


def autocast(device: torch.device, compute: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, compute, enabled=compute != torch.float32)


def images_at_once(vit: ViT, size: Sequence[int]) -> int:
    """How many images of this height and width go through the network together."""
    patch, limit = vit.config.patch, TOKENS_AT_ONCE if vit.cls_token.device.type == "cpu" else TOKENS_ON_DEVICE
    return max(1, limit // (1 + vit.config.registers + size[0] // patch * (size[1] // patch)))


def minibatches(images_BCHW: Tensor, vit: ViT) -> Iterator[Tensor]:
    """The batch as it goes through the network: whole on an accelerator, a few images at a time on a CPU."""
    is_cpu = vit.cls_token.device.type == "cpu"
    yield from images_BCHW.split(images_at_once(vit, images_BCHW.shape[2:])) if is_cpu else [images_BCHW]


def attention(vit: ViT, images_BCHW: Tensor, block: int) -> Tensor:
    """The attention of class token and registers to the patches in the block of this number: (B, N, 1 + R, h, w)."""
    x_TD, layout = vit.packed([images_BCHW])
    blocks: Any = vit.blocks
    for earlier in blocks[:block]:
        x_TD = earlier(x_TD, layout)
    first = 1 + vit.config.registers
    (weights_BNQL,) = blocks[block].attn.weights(blocks[block].norm1(x_TD), layout, first)
    return weights_BNQL[..., first:].unflatten(-1, (-1, images_BCHW.shape[3] // vit.config.patch))


@torch.inference_mode()
def fastest_dtype(vit: ViT, size: tuple[int, int], rounds: int = 3) -> torch.dtype:
    """bf16 if this device runs the network clearly faster with it, else fp32; measured on two images of noise.

    Both run in turns, and the best time of each counts, so that other work on the machine affects neither.
    """
    device = vit.cls_token.device
    networks = {compute: optimized(vit, compute) for compute in (torch.float32, torch.bfloat16)}
    images_BCHW = torch.randn(2, vit.config.channels, *size, device=device)
    best = dict.fromkeys(networks, float("inf"))
    for round_ in range(1 + rounds):
        for compute, network in networks.items():
            start = time.perf_counter()
            with autocast(device, compute):
                (tokens,) = network([images_BCHW])
            tokens.cls_BD.sum().item()  # wait for the device
            if round_:
                best[compute] = min(best[compute], time.perf_counter() - start)
    return torch.bfloat16 if best[torch.float32] > SPEEDUP * best[torch.bfloat16] else torch.float32
