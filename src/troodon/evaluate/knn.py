"""Weighted k-nearest-neighbour classification (https://arxiv.org/abs/1805.01978, section 3.4; paper, section 7.1)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.devices import accelerator
from troodon.search.exact import top_k

# Shape suffixes: N training images, M images to classify, D channels, C classes, K the largest k.

CHUNK = 1024  # images classified at a time, where neighbours are found by a plain matrix product


def usable_ks(ks: Sequence[int], images: int) -> dict[int, list[int]]:
    """Map each k that is possible with so many training images to the configured values that it stands for."""
    usable: dict[int, list[int]] = {}
    for k in sorted(set(ks)):
        usable.setdefault(min(k, images), []).append(k)
    return usable


def knn(
    train_ND: Tensor, train_labels_N: Tensor, val_MD: Tensor, ks: Sequence[int], temperature: float, device: Any = None
) -> dict[int, Tensor]:
    """For each k, the predicted label (M,) of each image: the class with the largest vote of its k nearest neighbours.

    Features are normalised here. The weight of a neighbour is softmax(cosine / temperature) over the k nearest. A k
    beyond the number of training images uses all of them. Labels are any integers; ties go to the smallest. `device`
    is that of the products, if not the tensors'; it does not change the result.
    """
    device = accelerator(val_MD.device if device is None else device)
    score_MK, row_MK = top_k(val_MD.cpu().numpy(), train_ND.cpu().numpy(), max(ks), device=device)
    row_MK = torch.from_numpy(row_MK).to(train_labels_N.device)
    return vote(torch.from_numpy(score_MK).to(row_MK.device), train_labels_N[row_MK], ks, temperature)


def knn_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    val_MD: Tensor | None = None,
    val_labels_M: Tensor | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """k-NN accuracy in [0, 1], fast enough to monitor training; without validation images, leave-one-out.

    Runs on the device of the tensors. Neighbours are found by one plain matrix product: `knn` is exact to the last bit,
    but slow on features that have collapsed to one point, which is when this accuracy matters most.
    """
    if val_MD is None:
        return leave_one_out(train_ND, train_labels_N, [k], temperature)[k]
    assert val_labels_M is not None, "validation images need labels"
    train_ND, val_MD, correct = F.normalize(train_ND.float(), dim=-1), F.normalize(val_MD.float(), dim=-1), 0
    for x_MD, labels_M in zip(val_MD.split(CHUNK), val_labels_M.split(CHUNK), strict=True):
        score_MK, row_MK = (x_MD @ train_ND.T).topk(min(k, len(train_ND)), dim=1)
        correct += int((vote(score_MK, train_labels_N[row_MK], [k], temperature)[k] == labels_M).sum())
    return correct / len(val_MD)


def leave_one_out(
    x_ND: Tensor, labels_N: Tensor, ks: Sequence[int], temperature: float, rows: Tensor | None = None
) -> dict[int, float]:
    """For each k, the k-NN accuracy on these rows (default: all), each classified by all other images."""
    assert len(x_ND) > 1, "leave-one-out needs two images"
    rows = torch.arange(len(x_ND), device=x_ND.device) if rows is None else rows
    x_ND, correct = F.normalize(x_ND.float(), dim=-1), dict.fromkeys(ks, 0)
    for rows_M in rows.split(CHUNK):
        cosine_MN = x_ND[rows_M] @ x_ND.T
        cosine_MN.scatter_(1, rows_M[:, None], -2.0)  # an image is not its own neighbour
        score_MK, row_MK = cosine_MN.topk(min(max(ks), len(x_ND) - 1), dim=1)
        for k, winner_M in vote(score_MK, labels_N[row_MK], ks, temperature).items():
            correct[k] += int((winner_M == labels_N[rows_M]).sum())
    return {k: count / len(rows) for k, count in correct.items()}


def vote(score_MK: Tensor, labels_MK: Tensor, ks: Sequence[int], temperature: float) -> dict[int, Tensor]:
    """The winning label (M,) for each k, of neighbours sorted nearest first. Each neighbour is counted once for all k.

    The denominator of the softmax is the same for all classes of an image, so it does not change the winner.
    """
    classes_C, codes_MK = labels_MK.unique(return_inverse=True)
    weight_MK = ((score_MK - score_MK[:, :1]).float() / temperature).exp()
    votes_MC = weight_MK.new_zeros(len(score_MK), len(classes_C))
    winners, counted = {}, 0
    for k in sorted(set(ks)):
        end = min(k, score_MK.shape[1])
        votes_MC.scatter_add_(1, codes_MK[:, counted:end], weight_MK[:, counted:end])
        winners[k], counted = classes_C[votes_MC.argmax(1)], end
    return winners
