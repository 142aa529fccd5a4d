"""The same network and objective written the usual way, to measure against. Not a benchmark itself.

A forward pass for each crop size; stochastic depth that computes all sequences and multiplies those that are dropped by
zero; logits, targets and probabilities whole. Weights, optimiser, average and loop are ours, so that the two differ by
nothing else, and give the same losses where nothing is dropped.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from troodon.learn import losses
from troodon.learn.method import Branch, Method
from troodon.learn.schedules import Knobs
from troodon.model.head import Answer, Prototypes
from troodon.model.vit import Block, Mlp, Tokens, ViT, gated

# Shape suffixes: B crops of one size, L tokens of each, N heads, D channels; K prototypes, M rows, V G views.


def forward(vit: ViT, groups: list[Tensor], masks: list[Tensor | None] | None = None) -> list[Tokens]:
    """What `ViT.forward` gives, one crop size after another."""
    found, drop = [], vit.config.drop_path if vit.training else 0.0
    for images, mask in zip(groups, masks or [None] * len(groups), strict=True):
        x_BLD = vit.embed(images, mask)
        for block in vit.blocks:
            x_BLD = x_BLD + dropped(block.ls1(attention(block, block.norm1(x_BLD))), drop)
            x_BLD = x_BLD + dropped(block.ls2(mlp(block.mlp, block.norm2(x_BLD))), drop)
        found.append(vit.split(vit.norm(x_BLD)))
    return found


def attention(block: Block, x_BLD: Tensor) -> Tensor:
    qkv = block.attn.qkv(x_BLD).unflatten(-1, (3, block.attn.heads, -1))
    q_BNLH, k_BNLH, v_BNLH = qkv.permute(2, 0, 3, 1, 4)
    return block.attn.proj(F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH).transpose(1, 2).flatten(2))


def mlp(layers: nn.Module, x_BLD: Tensor) -> Tensor:
    if isinstance(layers, Mlp):
        return layers.fc2(F.gelu(layers.fc1(x_BLD)))
    return layers.w3(gated(layers.w12(x_BLD)))


def directed(layer: Prototypes) -> Tensor:
    return layer.weight_g * (layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True))


def dropped(x_BLD: Tensor, drop: float) -> Tensor:
    """The reference of stochastic depth: each sequence is multiplied by zero, or by one over the share that stays."""
    if not drop:
        return x_BLD
    return x_BLD * x_BLD.new_empty(len(x_BLD), 1, 1).bernoulli_(1.0 - drop).div_(1.0 - drop)


def made_usual(branch: Branch) -> Branch:
    branch.backbone.forward = partial(forward, branch.backbone)
    for layer in [m for m in branch.modules() if isinstance(m, Prototypes)]:
        layer.forward = partial(directed, layer)
    return branch


class UsualMethod(Method):
    """The objective with its matrices."""

    def __init__(self, config, student: Branch, average: Branch, **how):
        super().__init__(config, made_usual(student), made_usual(average), **how)

    def _targets(self, name: str, rows: list[Tensor], prototypes_KD: Tensor, knobs: Knobs) -> list[Tensor]:
        with self.autocast():
            logits_MK = Answer(torch.cat(rows), prototypes_KD).logits()
        if self.config.targets == "sinkhorn":
            targets_MK = losses.sinkhorn(logits_MK, knobs.teacher_temperature, self.ranks)
        else:
            mean_K = logits_MK.float().mean(0)
            self._next_centres[name] = self.centres[name].lerp(mean_K, 1.0 - self.config.centre_momentum)
            targets_MK = losses.centred(logits_MK, knobs.teacher_temperature, self.centres[name])
        return [*targets_MK.split([len(part) for part in rows])]

    def _cross_entropies(self, answer: Answer, images: int, targets: Tensor) -> Tensor:
        with self.autocast():
            logits_MK = answer.logits()
        student_VBK, teacher_GBK = (x.unflatten(0, (-1, images)) for x in (logits_MK, targets))
        return losses.cross_entropies(student_VBK, teacher_GBK, self.config.student_temperature)
