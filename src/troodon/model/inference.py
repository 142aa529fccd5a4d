"""A network that is used and not trained, made faster: in the precision that wins here, in batches that caches hold."""

import copy
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from troodon.model.vit import Mlp, ViT

# Shape suffixes: B images, C colours, H W pixels.

TOKENS_AT_ONCE = 4096  # on a processor: larger batches only fill memory
PACKS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
WINS = 1.1  # times as fast that low precision must be, to be worth its rounding


def faster(vit: ViT, compute: torch.dtype, *, compile: bool = False) -> ViT:
    """A copy for `features`: weights of products in `compute`, layer scale folded into the product before it.

    Norms, and the sum that runs through the blocks, stay in fp32. On a processor weights are packed; `compile` in its
    place compiles every block, for each new size of images once.
    """
    vit = copy.deepcopy(vit).eval().requires_grad_(False)
    blocks: Any = vit.blocks
    for block in blocks:
        last = block.mlp.fc2 if isinstance(block.mlp, Mlp) else block.mlp.w3
        for linear, scale in ((block.attn.proj, block.ls1), (last, block.ls2)):
            linear.weight.mul_(scale.gamma[:, None])
            linear.bias.mul_(scale.gamma)
        block.ls1 = block.ls2 = nn.Identity()
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.to(compute)
        if compile:
            block.forward = torch.compile(block.forward, dynamic=False)
        elif vit.cls_token.device.type == "cpu" and PACKS:
            attn, mlp = block.attn, block.mlp
            attn.qkv, attn.proj = Packed(attn.qkv), Packed(attn.proj)
            if isinstance(mlp, Mlp):
                block.mlp = nn.Sequential(Packed(mlp.fc1, "gelu"), Packed(mlp.fc2))
            else:
                mlp.w12, mlp.w3 = Packed(mlp.w12), Packed(mlp.w3)
    return vit


class Packed(nn.Module):
    """A linear layer, and what follows it in the same pass, with the weight laid out once as oneDNN's products read it.

    With it ViT-B embeds a sixth more images a second in fp32, and a tenth more in bf16 (docs/performance.md).
    """

    def __init__(self, linear: nn.Linear, activation: Literal["none", "gelu"] = "none"):
        super().__init__()
        self.dtype, self.activation, self.bias = linear.weight.dtype, activation, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), TOKENS_AT_ONCE)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, self.activation, [], "none")

    def __reduce__(self):  # packed weights can be neither copied nor sent to another process
        weight = self.packed.to_dense()
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=self.dtype, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return Packed, (linear, self.activation)


def autocast(device: torch.device, compute: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, compute, enabled=compute != torch.float32)


def pieces(images_BCHW: Tensor, vit: ViT) -> Iterator[Tensor]:
    """The batch as it goes through the network: whole on an accelerator, a few images at a time on a processor."""
    if vit.cls_token.device.type != "cpu":
        yield images_BCHW
        return
    patch = vit.config.patch
    tokens = 1 + vit.config.registers + images_BCHW.shape[2] // patch * (images_BCHW.shape[3] // patch)
    yield from images_BCHW.split(max(1, TOKENS_AT_ONCE // tokens))


@torch.inference_mode()
def chosen(vit: ViT, size: tuple[int, int], rounds: int = 3) -> torch.dtype:
    """bf16 where this device runs the network clearly faster with it, fp32 elsewhere: measured on two images of noise.

    In turns, and the best of each, so that other work on the machine harms neither.
    """
    device = vit.cls_token.device
    networks = {compute: faster(vit, compute) for compute in (torch.float32, torch.bfloat16)}
    images_BCHW = torch.randn(2, vit.config.channels, *size, device=device)
    best = dict.fromkeys(networks, float("inf"))
    for turn in range(1 + rounds):
        for compute, network in networks.items():
            start = time.perf_counter()
            with autocast(device, compute):
                (tokens,) = network([images_BCHW])
            tokens.cls_BD.sum().item()  # waits for the device
            if turn:
                best[compute] = min(best[compute], time.perf_counter() - start)
    return torch.bfloat16 if best[torch.float32] > WINS * best[torch.bfloat16] else torch.float32
