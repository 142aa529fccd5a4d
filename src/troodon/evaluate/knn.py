"""Weighted k-nearest-neighbour classification (https://arxiv.org/abs/1805.01978, section 3.4; paper, section 7.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.search.exact import top_k

# Shape suffixes: N training images, M images to classify, D channels, C classes, K the largest k.


def used_ks(ks: Sequence[int], images: int) -> dict[int, list[int]]:
    """k that can be used with so many training images -> the k that asked for it."""
    used: dict[int, list[int]] = {}
    for k in sorted(set(ks)):
        used.setdefault(min(k, images), []).append(k)
    return used


def knn(
    train_ND: Tensor, train_labels_N: Tensor, val_MD: Tensor, ks: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """For each k, the predicted label (M,) of each image: the class with the largest vote of its k nearest.

    Features are L2-normalised here; a neighbour's vote is softmax(cosine / temperature) over the k nearest. A k
    beyond the number of training images takes them all. Labels are any integers; equal votes go to the smallest.
    """
    deepest = min(max(ks), len(train_ND))
    score_MK, row_MK = top_k(_unit(val_MD), _unit(train_ND), deepest)
    return vote(score_MK, train_labels_N[row_MK], ks, temperature)


def quick(
    train_ND: Tensor,
    train_labels_N: Tensor,
    val_MD: Tensor | None = None,
    val_labels_M: Tensor | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """k-NN accuracy in [0, 1], cheap enough to watch training by; without validation images, leave-one-out."""
    if val_MD is not None:
        return (knn(train_ND, train_labels_N, val_MD, [k], temperature)[k] == val_labels_M).float().mean().item()
    others = min(k, len(train_ND) - 1)
    assert others >= 1, "leave-one-out needs two images"
    score_MK, row_MK = top_k(_unit(train_ND), _unit(train_ND), others + 1)
    # Drop each image from its own neighbours; where copies of it crowded it out, drop the farthest instead.
    itself_MK = row_MK == torch.arange(len(row_MK), device=row_MK.device)[:, None]
    itself_MK[:, -1] |= ~itself_MK.any(1)
    score_MK, row_MK = (x[~itself_MK].unflatten(0, (-1, others)) for x in (score_MK, row_MK))
    predicted_M = vote(score_MK, train_labels_N[row_MK], [others], temperature)[others]
    return (predicted_M == train_labels_N).float().mean().item()


def vote(score_MK: Tensor, labels_MK: Tensor, ks: Sequence[int], temperature: float) -> dict[int, Tensor]:
    """The winning label (M,) for each k, of neighbours sorted nearest first; each is counted once for all k.

    The softmax's denominator is the same for every class of an image, so it cannot change who wins.
    """
    classes_C, codes_MK = labels_MK.unique(return_inverse=True)
    weight_MK = ((score_MK - score_MK[:, :1]).float() / temperature).exp()
    votes_MC = weight_MK.new_zeros(len(score_MK), len(classes_C))
    winners, counted = {}, 0
    for k in sorted(set(ks)):
        until = min(k, score_MK.shape[1])
        votes_MC.scatter_add_(1, codes_MK[:, counted:until], weight_MK[:, counted:until])
        winners[k], counted = classes_C[votes_MC.argmax(1)], until
    return winners


def _unit(x_ND: Tensor) -> Tensor:
    return F.normalize(x_ND.float(), dim=-1)
