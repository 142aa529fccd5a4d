"""Spherical k-means (cosine similarity) on frozen features."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: N images, D channels, K clusters.

CHUNK = 8192  # images that are assigned at a time


def kmeans(x_ND: Tensor, clusters: int, iterations: int, seed: int) -> Tensor:
    """The cluster (N,) of each image by spherical k-means with k-means++ initialisation. An empty cluster takes the
    image that is farthest from its centroid. Deterministic: the result depends on the arguments only."""
    x_ND = F.normalize(x_ND.float(), dim=1)
    random = torch.Generator().manual_seed(seed)
    clusters = min(clusters, len(x_ND))
    centroid_KD = _kmeans_plus_plus(x_ND, clusters, random)
    previous_N = None
    for _ in range(iterations):
        cluster_N, score_N = assign(x_ND, centroid_KD)
        if previous_N is not None and torch.equal(cluster_N, previous_N):
            break
        previous_N = cluster_N
        centroid_KD = torch.zeros_like(centroid_KD).index_add_(0, cluster_N, x_ND)
        empty = torch.nonzero(torch.bincount(cluster_N, minlength=clusters) == 0).flatten()
        centroid_KD[empty] = x_ND[score_N.argsort()[: len(empty)]]
        centroid_KD = F.normalize(centroid_KD, dim=1)
    return assign(x_ND, centroid_KD)[0]


def assign(x_ND: Tensor, centroid_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each image (N,), and its cosine."""
    chunks = [(x @ centroid_KD.T).max(1) for x in x_ND.split(CHUNK)]
    return torch.cat([chunk.indices for chunk in chunks]), torch.cat([chunk.values for chunk in chunks])


def _kmeans_plus_plus(x_ND: Tensor, clusters: int, random: torch.Generator) -> Tensor:
    """Initial centroids. Each is drawn with a probability proportional to its distance from the previous ones."""
    chosen = [int(torch.randint(len(x_ND), (1,), generator=random))]
    distance_N = (1 - x_ND @ x_ND[chosen[0]]).clamp_min(0)
    for _ in range(clusters - 1):
        weight_N = distance_N if distance_N.sum() > 0 else torch.ones_like(distance_N)
        chosen.append(int(torch.multinomial(weight_N, 1, generator=random)))
        distance_N = torch.minimum(distance_N, (1 - x_ND @ x_ND[chosen[-1]]).clamp_min(0))
    return x_ND[chosen]
