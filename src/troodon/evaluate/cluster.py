"""Clustering of frozen features: do groups that nobody named agree with the classes? (k-means, cosine.)"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: N images, D channels, K clusters.

CHUNK = 8192  # images assigned at a time


def kmeans(x_ND: Tensor, clusters: int, rounds: int, seed: int) -> Tensor:
    """The cluster (N,) of each image by spherical k-means: started by k-means++, a cluster that empties gets the image
    that fits its own worst. A function of its arguments only."""
    x_ND = F.normalize(x_ND.float(), dim=1)
    random = torch.Generator().manual_seed(seed)
    clusters = min(clusters, len(x_ND))
    centre_KD = _spread(x_ND, clusters, random)
    before = None
    for _ in range(rounds):
        near_N, score_N = assigned(x_ND, centre_KD)
        if before is not None and torch.equal(near_N, before):
            break
        before = near_N
        centre_KD = torch.zeros_like(centre_KD).index_add_(0, near_N, x_ND)
        empty = torch.nonzero(torch.bincount(near_N, minlength=clusters) == 0).flatten()
        centre_KD[empty] = x_ND[score_N.argsort()[: len(empty)]]
        centre_KD = F.normalize(centre_KD, dim=1)
    return assigned(x_ND, centre_KD)[0]


def assigned(x_ND: Tensor, centre_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each image (N,), and its cosine."""
    best = [(x @ centre_KD.T).max(1) for x in x_ND.split(CHUNK)]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


def _spread(x_ND: Tensor, clusters: int, random: torch.Generator) -> Tensor:
    """First centres, each drawn with a chance that grows with how far an image is from those before it."""
    chosen = [int(torch.randint(len(x_ND), (1,), generator=random))]
    far_N = (1 - x_ND @ x_ND[chosen[0]]).clamp_min(0)
    for _ in range(clusters - 1):
        weight_N = far_N if far_N.sum() > 0 else torch.ones_like(far_N)
        chosen.append(int(torch.multinomial(weight_N, 1, generator=random)))
        far_N = torch.minimum(far_N, (1 - x_ND @ x_ND[chosen[-1]]).clamp_min(0))
    return x_ND[chosen]
