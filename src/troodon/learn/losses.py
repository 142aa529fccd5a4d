"""The losses of DINOv2 as functions of tensors: no state, no config, no device, no logging.

`Ranks` reduces a tensor over all ranks that share the batch; `ALONE` is the identity, for one rank, with which each
loss can be tested in a plain process. prototypes.py computes the same targets and cross-entropies without matrices of
M x K.
"""

from collections.abc import Callable
from math import inf, log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: V student views, G teacher (global) views, B images, K prototypes, D channels,
#                 M rows: masked patches or class tokens of the whole batch, N crops, P patches.


class Ranks(NamedTuple):
    """Collectives over all ranks: the sum and the maximum of a tensor, and the rows of all ranks, in their order."""

    total: Callable[[Tensor], Tensor]
    largest: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]


ALONE = Ranks(lambda x: x, lambda x: x, lambda x: x)


@torch.no_grad()
def sinkhorn(logits_MK: Tensor, temperature: float, ranks: Ranks, rounds: int = 3) -> Tensor:
    """Teacher targets with every prototype used equally (https://arxiv.org/abs/2006.09882, section 3.1).

    Columns and rows of exp(logits / temperature) are normalised in turn, in the log domain, so that no logit is too
    large. Ranks may hold different numbers of rows. Rows of the result sum to one.
    """
    log_q_MK = logits_MK.float() / temperature
    for _ in range(rounds):
        highest_K = ranks.largest(log_q_MK.amax(0) if len(log_q_MK) else log_q_MK.new_full(log_q_MK.shape[1:], -inf))
        column_K = highest_K + ranks.total(exp_of_negative(log_q_MK - highest_K).sum(0)).log()
        log_q_MK = (log_q_MK - column_K).log_softmax(1)
    return exp_of_negative(log_q_MK)


def exp_of_negative(x: Tensor) -> Tensor:
    """exp of numbers <= 0, but at least e^-80: smaller ones add nothing in fp32, and take a CPU 50 times longer."""
    return x.clamp(min=-80.0).exp_()


@torch.no_grad()
def centred(logits_MK: Tensor, temperature: float, centre_K: Tensor) -> Tensor:
    """Teacher targets centred and sharpened (https://arxiv.org/abs/2104.14294, section 3.1)."""
    return F.softmax((logits_MK.float() - centre_K) / temperature, dim=-1)


def cross_entropies(student_VBK: Tensor, teacher_GBK: Tensor, temperature: float) -> Tensor:
    """(V, G, B): cross-entropy -sum_k target_k log softmax(logits / temperature)_k of each student and teacher view."""
    log_p_VBK = F.log_softmax(student_VBK.float() / temperature, dim=-1)
    return torch.stack([-(log_p_VBK * teacher_BK).sum(-1) for teacher_BK in teacher_GBK], dim=1)


def dino(pairs_VGB: Tensor, *, same_views: bool) -> Tensor:
    """Image-level loss: the mean cross-entropy over (student view, teacher view) pairs of one image.

    If the student views are the teacher's own views, a view does not predict itself.
    """
    loss_VG = pairs_VGB.mean(-1)
    if same_views:
        loss_VG = loss_VG.masked_fill(torch.eye(len(loss_VG), dtype=torch.bool, device=loss_VG.device), 0.0)
        return loss_VG.sum() / (loss_VG.numel() - len(loss_VG))
    return loss_VG.mean()


def ibot(pairs_M: Tensor, weight_M: Tensor, crops: int) -> Tensor:
    """Patch-level loss: weighted cross-entropies of patches (https://arxiv.org/abs/2111.07832, section 3.1).

    `weight_M` is one over the masked patches of each patch's crop. A crop without masked patches adds zero, and counts
    in `crops`.
    """
    return (pairs_M * weight_M).sum() / crops


def koleo(features_BD: Tensor, eps: float = 1e-8) -> Tensor:
    """KoLeo: minus the mean log distance to the nearest neighbour (https://arxiv.org/abs/1806.03198).

    Always in fp32: in fp16 both eps vanish, and one duplicate image makes it infinite.
    """
    x_BD = F.normalize(features_BD.float(), dim=-1, eps=eps)
    with torch.no_grad():
        nearest_B = (x_BD @ x_BD.T).fill_diagonal_(-1.0).argmax(1)
    return -torch.log(F.pairwise_distance(x_BD, x_BD[nearest_B], eps=eps) + eps).mean()


def kde(features_BD: Tensor, concentration: float = 5.0) -> Tensor:
    """The mean log density of the other images at each one, on the unit sphere, by a von Mises-Fisher kernel over its
    peak's height: 0 if all are equal (https://arxiv.org/abs/2408.00738). KoLeo, but near-duplicates do not decide."""
    x_BD = F.normalize(features_BD.float(), dim=-1)
    near_BB = (concentration * (x_BD @ x_BD.T - 1.0)).fill_diagonal_(-inf)
    return near_BB.logsumexp(1).mean() - log(len(x_BD) - 1)


def contrast(features_VBD: Tensor, temperature: float) -> Tensor:
    """NT-Xent: each view of B images finds each other view of its image among those of other images. The mean
    cross-entropy of cosines / temperature (https://arxiv.org/abs/2002.05709, section 2.1, of two views; for copies
    https://arxiv.org/abs/2202.10261, section 3.3). It is ln(V (B - 1) + 1) if all views are equal."""
    views, images = features_VBD.shape[:2]
    x_ND = F.normalize(features_VBD.float(), dim=-1).flatten(0, 1)
    logits_NVB = (x_ND @ x_ND.T / temperature).unflatten(1, (views, images))
    place = torch.arange(views * images, device=x_ND.device)
    positives_NV = logits_NVB[place, :, place % images]
    is_own_NB = place[:, None] % images == place[:images]
    others_N1 = logits_NVB.masked_fill(is_own_NB[:, None], -inf).flatten(1).logsumexp(1, keepdim=True)
    loss_NV = torch.logaddexp(others_N1, positives_NV) - positives_NV
    others_NV = place[: views - 1] + (place[: views - 1] >= place[:, None] // images)  # all views but the row's own
    return loss_NV.gather(1, others_NV).mean()


def cosine_distance(x_MD: Tensor, y_MD: Tensor) -> Tensor:
    """One minus the cosine, the mean over rows."""
    return (1.0 - F.cosine_similarity(x_MD.float(), y_MD.float(), dim=-1)).mean()


def smooth_l1(x_MD: Tensor, y_MD: Tensor) -> Tensor:
    """Smooth L1 with beta 1, the mean over all numbers."""
    return F.smooth_l1_loss(x_MD.float(), y_MD.float())


def gram(patches_NPD: Tensor, anchor_NPD: Tensor) -> Tensor:
    """Gram anchoring: the mean squared difference of the cosines between patches of a crop and those of the anchor's
    (https://arxiv.org/abs/2508.10104, section 4.2)."""
    x_NPD, y_NPD = (F.normalize(p.float(), dim=-1) for p in (patches_NPD, anchor_NPD))
    return (x_NPD @ x_NPD.mT - y_NPD @ y_NPD.mT).square().mean()
