"""The vision transformer of DINOv2 (https://arxiv.org/abs/2304.07193, appendix B).

Pre-norm blocks with layer scale, learned positions resized to the crop, optional register
tokens (https://arxiv.org/abs/2309.16588). All crops of a batch run as one pack. Parameters have the
names of the released weights, so that these load unchanged.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from troodon.config import UsageError
from troodon.dist import Share
from troodon.model import fused
from troodon.model.config import ViTConfig
from troodon.model.packing import KeptSequences, Layout, attend, draw_kept, makes_graph, pack, residual, unpack
from troodon.model.positions import resize_by_products
from troodon.model.rotary import RotaryPositions, turned
from troodon.model.stem import STEMS

# Shape suffixes, besides those of packing.py: B images, C colours, P patches, R registers,
#                                              h w rows and columns of patches.


class Tokens(NamedTuple):
    """Output tokens of one group of images of one size, after the last norm.

    A tuple, in which FSDP finds the tensors whose gradients it waits for; torch 2.11 does not look into dataclasses.
    """

    cls_BD: Tensor
    registers_BRD: Tensor
    patches_BPD: Tensor


class LayerNorm(nn.LayerNorm):
    """LayerNorm in fp32, whatever the dtype of its weights: FSDP gathers them in that of the products."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


UNSCALED = nn.Identity()


class KeysWithoutBias(nn.Linear):
    """Queries, keys and values, of which keys have no bias: a third of it stays zero, as in DINOv3's weights."""

    def forward(self, input: Tensor) -> Tensor:
        queries, keys, values = self.bias.chunk(3)
        return F.linear(input, self.weight, torch.cat([queries, torch.zeros_like(keys), values]))


class LayerScale(nn.Module):
    """A learned factor per channel (https://arxiv.org/abs/2103.17239)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.initial = config.layer_scale
        self.gamma = nn.Parameter(torch.empty(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def last_linear(
    x: Tensor, linear: nn.Linear, scale: nn.Module, activation: Callable[[Tensor], Tensor] = UNSCALED
) -> Tensor:
    """scale(linear(activation(x))), the end of a branch. In training and on a GPU the scale goes into the weight, which
    is smaller than the output; only x is saved for the backward pass, which computes the activation again."""
    is_plain = type(linear) is nn.Linear and isinstance(scale, LayerScale)  # and not an adapter around it
    is_whole = makes_graph() or not torch.is_grad_enabled()  # a compiler decides what to save
    if not is_plain or (is_whole and not fused.applies(x)):
        return scale(linear(activation(x)))
    return _LastLinear.apply(x, linear.weight, linear.bias, scale.gamma, activation)


class _LastLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, gamma)
        ctx.activation = activation
        # Autocast has given x the dtype of products.
        if fused.applies(x) and activation in PASSES:
            activation, _ = PASSES[activation]
        return F.linear(activation(x), (weight * gamma[:, None]).to(x.dtype), (bias * gamma).to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyrefly: ignore[bad-override]
        x, weight, bias, gamma = ctx.saved_tensors
        of_y = gradient @ (weight * gamma[:, None]).to(x.dtype)
        if ctx.activation is UNSCALED:
            of_x, y = of_y, x
        elif fused.applies(x) and ctx.activation in PASSES:
            of_x, y = PASSES[ctx.activation][1](x, of_y)
        else:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = ctx.activation(x)
            (of_x,) = torch.autograd.grad(y, x, of_y)
        rows = gradient.flatten(0, -2)
        of_product, of_sum = rows.T @ y.detach().flatten(0, -2), rows.sum(0)  # of the scaled weight and bias
        of_gamma = torch.linalg.vecdot(of_product.to(weight.dtype), weight) + of_sum * bias
        return of_x, of_product * gamma[:, None], of_sum * gamma, of_gamma, None


class Attention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = (nn.Linear if config.positions == "learned" else KeysWithoutBias)(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x_TD: Tensor, layout: Layout, scale: nn.Module = UNSCALED) -> Tensor:
        return last_linear(attend(*self.heads_of(x_TD, layout), layout).flatten(1), self.proj, scale)

    def heads_of(self, x_TD: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (T, N, H) of the tokens."""
        q_TNH, k_TNH, v_TNH = self.qkv(x_TD).unflatten(-1, (3, self.heads, -1)).unbind(1)
        if layout.rotation is None:
            return q_TNH, k_TNH, v_TNH
        return turned(q_TNH, layout.rotation), turned(k_TNH, layout.rotation), v_TNH

    def weights(self, x_TD: Tensor, layout: Layout, first: int) -> list[Tensor]:
        """The attention of the first tokens of each sequence to all of its tokens: (B, N, first, L) for each group."""
        queries_keys = (unpack(x_TNH.float(), layout) for x_TNH in self.heads_of(x_TD, layout)[:2])
        return [
            (q.transpose(1, 2)[:, :, :first] @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5).softmax(-1)
            for q, k in zip(*queries_keys, strict=True)
        ]


class Mlp(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, config.dim)

        self.activation: Callable[[Tensor], Tensor] = F.gelu

    def forward(self, x: Tensor, scale: nn.Module = UNSCALED) -> Tensor:
        return last_linear(self.fc1(x), self.fc2, scale, self.activation)


class SwiGLU(nn.Module):
    """The gated MLP of the giant model (https://arxiv.org/abs/2002.05202): gate first, then value."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.w12 = nn.Linear(config.dim, 2 * config.mlp_hidden)
        self.w3 = nn.Linear(config.mlp_hidden, config.dim)

    def forward(self, x: Tensor, scale: nn.Module = UNSCALED) -> Tensor:
        return last_linear(self.w12(x), self.w3, scale, gated)


def gated(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


# Of activations, on a GPU: the same in one pass, and their gradient with their outcome once more.
PASSES = {F.gelu: (F.gelu, fused.gelu_gradient), gated: (fused.gated, fused.gated_gradient)}


class Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config)
        self.norm2 = LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = {"gelu": Mlp, "swiglu": SwiGLU}[config.mlp](config)
        self.ls2 = LayerScale(config)

    def forward(
        self, x_TD: Tensor, layout: Layout, kept: Sequence[KeptSequences | None] = (None, None), first: int = 0
    ) -> Tensor:
        """With `first`, only the so many first tokens of each sequence, which spares the others the MLP."""
        kept_attention, kept_mlp = kept
        x_TD = residual(x_TD, self.norm1, lambda x, inner: self.attn(x, inner, self.ls1), layout, kept_attention)
        if first:
            x_TD = torch.cat([x_BLD[:, :first].flatten(0, 1) for x_BLD in unpack(x_TD, layout)])
        return residual(x_TD, self.norm2, lambda x, _: self.mlp(x, self.ls2), layout, kept_mlp, is_own=True)


class ViT(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, config.dim))
        else:
            self.rope_embed = RotaryPositions(config)
        if config.registers:
            self.register_tokens = nn.Parameter(torch.empty(1, config.registers, config.dim))
        self.mask_token = nn.Parameter(torch.empty(1, config.dim))
        self.patch_embed = STEMS[config.stem](config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set every parameter, so that a model built on the meta device is complete."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif module is self.patch_embed:
                module.initialize()
            elif isinstance(module, LayerScale):
                module.gamma.fill_(module.initial)
        if self.config.positions == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=self.patch_embed.position_std)
        else:
            self.rope_embed.initialize()
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.config.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)

    @overload
    def forward(self, images: Tensor) -> Tensor: ...

    @overload
    def forward(
        self,
        images: list[Tensor],
        masks: list[Tensor | None] | None = None,
        share: Share | None = None,
        patches: bool = True,
    ) -> list[Tokens]: ...

    def forward(self, images, masks=None, share=None, patches=True):  # pyrefly: ignore[bad-override]
        """Class tokens (B, D) of a tensor (B, C, H, W); of a list of tensors, one for each crop size, all tokens.

        In a list, a mask (B, P) replaces patches by the mask token, and `share` says which images of a step these are,
        for stochastic depth. Where `patches` are not asked for, there may be none, which costs less.
        """
        if isinstance(images, Tensor):
            cls_BD = self.after_blocks([images], [len(self.blocks) - 1])[0][0].cls_BD
            waits = torch.is_grad_enabled() and self.mask_token.requires_grad  # DDP waits for every gradient
            return cls_BD + 0.0 * self.mask_token.sum() if waits else cls_BD
        return self.after_blocks(images, [len(self.blocks) - 1], masks, share=share, patches=patches)[0]

    def after_blocks(
        self,
        groups: list[Tensor],
        blocks: Sequence[int],
        masks: list[Tensor | None] | None = None,
        norm: bool = True,
        share: Share | None = None,
        patches: bool = True,
    ) -> list[list[Tokens]]:
        """The tokens after each of these blocks, numbered from 0 and ascending: through the last norm, or as they are.

        Blocks after the last of these do not run. Without `patches`, and without stochastic depth, that one computes no
        more of them than others attend to.
        """
        if isinstance(groups, Tensor):
            raise UsageError("a ViT takes a list of tensors (B, C, H, W), one for each size: vit([images])")
        x_TD, layout = self.packed(groups, masks)
        drop, branches, outputs = self.config.drop_path if self.training else 0.0, 2 * len(self.blocks), []
        kept = draw_kept(layout, drop, branches, x_TD.device, share) if drop else [None] * branches
        for number, block in zip(range(blocks[-1] + 1), self.blocks):
            first = 0 if patches or drop or number < blocks[-1] else 1 + self.config.registers
            x_TD = block(x_TD, layout, kept[2 * number : 2 * number + 2], first)
            layout = Layout(tuple((count, first) for count, _ in layout.groups)) if first else layout
            if number in blocks:
                output_TD = self.norm(x_TD) if norm else x_TD
                outputs.append([self.split(x_BLD) for x_BLD in unpack(output_TD, layout)])
        return outputs

    def packed(self, groups: list[Tensor], masks: list[Tensor | None] | None = None) -> tuple[Tensor, Layout]:
        """The tokens of all images before the first block (T, D), and their layout."""
        x_TD, layout = pack([self.embed(x, m) for x, m in zip(groups, masks or [None] * len(groups), strict=True)])
        if self.config.positions == "learned":
            return x_TD, layout
        others, rotations = 1 + self.config.registers, []
        for images_BCHW in groups:
            count, _, height, width = images_BCHW.shape
            rotation_L2F = self.rope_embed((height // self.config.patch, width // self.config.patch), others)
            rotations.append(rotation_L2F[None].expand(count, -1, -1, -1).flatten(0, 1))
        return x_TD, Layout(layout.groups, layout.offsets, torch.cat(rotations))

    def embed(self, images_BCHW: Tensor, mask_BP: Tensor | None) -> Tensor:
        """Class token, registers and patches of each image before the first block: (B, 1 + R + P, D)."""
        patch, (height, width) = self.config.patch, images_BCHW.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"an image of {width} x {height} pixels does not divide into patches of {patch}")
        x_BPD = self.patch_embed(images_BCHW)
        if mask_BP is not None:
            x_BPD = torch.where(mask_BP[..., None], self.mask_token.to(x_BPD.dtype), x_BPD)
        prefix = self.cls_token
        if self.config.positions == "learned":
            cls, positions = resize_positions(self.pos_embed, (height // patch, width // patch), self.config)
            prefix, x_BPD = prefix + cls, x_BPD + positions
        if self.config.registers:  # registers have no position
            prefix = torch.cat([prefix, self.register_tokens], dim=1)
        return torch.cat([prefix.expand(x_BPD.shape[0], -1, -1), x_BPD], dim=1)

    def split(self, x_BLD: Tensor) -> Tokens:
        registers = self.config.registers
        cls, registers, patches = x_BLD.split([1, registers, x_BLD.shape[1] - 1 - registers], dim=1)
        return Tokens(cls[:, 0], registers, patches)


def resize_positions(positions: Tensor, grid: tuple[int, int], config: ViTConfig) -> tuple[Tensor, Tensor]:
    """Positions for the class token (1, 1, D) and for a grid of patches (1, h * w, D), bicubic from the learned grid.

    The released weights were trained with a scale of (grid + 0.1) / learned in place of the exact
    one (facebookresearch/dino issue 8); `position_offset` reproduces it to the last bit.
    """
    cls, learned = positions[:, :1], positions[:, 1:]
    if makes_graph():  # sizes are not known yet
        square = learned[0].float().unflatten(0, (config.grid, config.grid))
        resized = resize_by_products(square, grid, config.position_offset, config.position_antialias)
        return cls, resized.flatten(0, 1)[None].to(positions.dtype)
    if grid == (config.grid, config.grid):
        return cls, learned
    image = learned.float().unflatten(1, (config.grid, config.grid)).permute(0, 3, 1, 2)
    if config.position_offset:
        how: dict[str, Any] = {"scale_factor": tuple((side + config.position_offset) / config.grid for side in grid)}
    else:
        how = {"size": tuple(grid)}
    image = F.interpolate(image, mode="bicubic", antialias=config.position_antialias, **how)
    return cls, image.flatten(2).transpose(1, 2).to(positions.dtype)


def regrid(state: dict[str, Tensor], config: ViTConfig, grid: int) -> dict[str, Tensor]:
    """The weights with learned positions resized from the grid of `config` to `grid` x `grid` patches."""
    if config.positions != "learned":
        return state
    cls, patches = resize_positions(state["pos_embed"], (grid, grid), config)
    return state | {"pos_embed": torch.cat([cls, patches], dim=1)}
