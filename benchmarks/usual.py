"""The same network and objective written the usual way, as a rival. Not a benchmark itself.

A forward pass for each crop size; stochastic depth that computes all sequences and multiplies the dropped ones by zero;
full matrices of logits, targets and probabilities. Weights, optimiser, EMA and loop are ours, so the sides differ in
nothing else, and give the same losses where nothing is dropped.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from troodon.learn import losses
from troodon.learn.method import CENTRES, Method
from troodon.learn.network import Network
from troodon.learn.schedules import ScheduledValues
from troodon.learn.terms import Comparison
from troodon.model.head import HeadOutput, Prototypes
from troodon.model.vit import Block, Mlp, Tokens, ViT, gated

# Shape suffixes: B crops of one size, L tokens of each, N heads, D channels; K prototypes, M rows, V G views.


def forward(vit: ViT, groups: list[Tensor], masks: list[Tensor | None] | None = None, *_: object) -> list[Tokens]:
    """The tokens of `ViT.forward`, one crop size after another."""
    tokens, drop = [], vit.config.drop_path if vit.training else 0.0
    for images, mask in zip(groups, masks or [None] * len(groups), strict=True):
        x_BLD = vit.embed(images, mask)
        for block in vit.blocks:
            x_BLD = x_BLD + drop_sequences(block.ls1(attention(block, block.norm1(x_BLD))), drop)
            x_BLD = x_BLD + drop_sequences(block.ls2(mlp(block.mlp, block.norm2(x_BLD))), drop)
        tokens.append(vit.split(vit.norm(x_BLD)))
    return tokens


def attention(block: Block, x_BLD: Tensor) -> Tensor:
    qkv = block.attn.qkv(x_BLD).unflatten(-1, (3, block.attn.heads, -1))
    q_BNLH, k_BNLH, v_BNLH = qkv.permute(2, 0, 3, 1, 4)
    return block.attn.proj(F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH).transpose(1, 2).flatten(2))


def mlp(layers: nn.Module, x_BLD: Tensor) -> Tensor:
    if isinstance(layers, Mlp):
        return layers.fc2(F.gelu(layers.fc1(x_BLD)))
    return layers.w3(gated(layers.w12(x_BLD)))


def prototype_directions(layer: Prototypes) -> Tensor:
    return layer.weight_g * (layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True))


def drop_sequences(x_BLD: Tensor, drop: float) -> Tensor:
    """Stochastic depth as usual: each sequence is multiplied by zero, or by one over the share that is kept."""
    if not drop:
        return x_BLD
    return x_BLD * x_BLD.new_empty(len(x_BLD), 1, 1).bernoulli_(1.0 - drop).div_(1.0 - drop)


def make_usual(network: Network) -> Network:
    """Replace the forward passes of a network by the usual ones."""
    network.backbone.forward = partial(forward, network.backbone)
    for layer in [m for m in network.modules() if isinstance(m, Prototypes)]:
        layer.forward = partial(prototype_directions, layer)
    return network


class UsualComparison(Comparison):
    """Cross-entropies from full matrices."""

    def cross_entropies(self, kind: str, count: int, targets: Tensor) -> Tensor:
        logits_MK = self.student.heads[kind].logits()
        student_VBK, teacher_GBK = (x.unflatten(0, (-1, count)) for x in (logits_MK, targets))
        return losses.cross_entropies(student_VBK, teacher_GBK, self.config.student_temperature)


class UsualMethod(Method):
    """The objective with full matrices."""

    comparison = UsualComparison

    def __init__(self, config, student: Network, ema: Network, **settings):
        super().__init__(config, make_usual(student), make_usual(ema), **settings)

    def _prototype_targets(
        self, outputs: list[dict[str, HeadOutput]], scheduled: ScheduledValues
    ) -> dict[str, list[Tensor]]:
        targets = {}
        for kind in outputs[0]:
            logits_MK = torch.cat([output[kind].logits() for output in outputs])
            if self.config.targets == "sinkhorn":
                targets_MK = losses.sinkhorn(logits_MK, scheduled.teacher_temperature, self.ranks)
            else:
                name, mean_K = CENTRES[kind], logits_MK.float().mean(0)
                self._next_centres[name] = self.centres[name].lerp(mean_K, 1.0 - self.config.centre_momentum)
                targets_MK = losses.centred(logits_MK, scheduled.teacher_temperature, self.centres[name])
            targets[kind] = [*targets_MK.split([len(output[kind].bottleneck_MD) for output in outputs])]
        return targets
