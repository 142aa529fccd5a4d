"""A map of images: two coordinates for each, such that near images lie near one another.

The k nearest neighbours of each image pull it, by weights that even out how densely images lie, and images drawn at
random push it away: UMAP (https://arxiv.org/abs/1802.03426) with a = b = 1, but all forces of a step act at once. The
first two principal components are the start.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from troodon.config import fingerprint
from troodon.progress import Progress, watched
from troodon.run import say, write_bytes
from troodon.search.exact import l2_normalise
from troodon.search.inverted_lists import kmeans, nearest_centroids

# Shape suffixes: N images, D channels, k neighbours, B rows of a block, C candidates.

VERSION = 1  # of what this file computes
NEIGHBOURS = 15
STEPS = 500
PUSHES = 5  # images drawn in each step, which an image and they push from one another
PUSH = 2.0  # strength of each push; the pulls of one image have a total of log2(k)
RATE, MOMENTUM, CLIP = 0.5, 0.5, 4.0  # of the places; the largest force of one step
START = 0.3  # spread of the places at the start
MAX_EXACT = 20_000  # more images are searched by lists; a GPU compares all
LIST_ROWS, PROBES = 500, 10  # images in a list, and lists that a list is compared with
BLOCK = 2048


@dataclass(frozen=True)
class Layout:
    """The places of N images on the map, and the nearest neighbours that they were computed from."""

    place_N2: ndarray  # float32, nan for an image without a vector
    row_Nk: ndarray  # int32, -1 where there is no neighbour
    score_Nk: ndarray  # float32, cosine

    def save(self, file: Path, name: str) -> None:
        data = io.BytesIO()
        np.savez(data, place=self.place_N2, row=self.row_Nk, score=self.score_Nk, name=np.array(name))
        write_bytes(file, data.getvalue())

    @staticmethod
    def load(file: Path, name: str) -> "Layout | None":
        """The layout of this name; None if the file is missing, damaged or of another name."""
        try:
            with open(file, "rb") as stream, np.load(stream) as arrays:
                if str(arrays["name"]) != name:
                    return None
                return Layout(arrays["place"], arrays["row"], arrays["score"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


def layout_of(x_ND: ndarray, has_vector_N: ndarray, file: Path, vectors: str, device: Any = None) -> Layout:
    """The layout of the images that have a vector, from `file`, or computed and written there.

    `vectors` is the fingerprint of the vectors.
    """
    name = fingerprint(vectors, VERSION, NEIGHBOURS, STEPS)
    if (found := Layout.load(file, name)) is not None and len(found.place_N2) == len(x_ND):
        return found
    rows = np.flatnonzero(has_vector_N)
    say(f"explore: lays out {len(rows):,} images; the next time they are there at once")
    row_Mk, score_Mk = nearest_neighbours(x_ND[rows], NEIGHBOURS, device)
    place_M2 = arrange(start_of(x_ND[rows]), row_Mk, score_Mk, device)
    count, k = len(x_ND), row_Mk.shape[1]
    layout = Layout(
        np.full((count, 2), np.nan, np.float32), np.full((count, k), -1, np.int32), np.zeros((count, k), np.float32)
    )
    layout.place_N2[rows], layout.score_Nk[rows] = place_M2, score_Mk
    layout.row_Nk[rows] = np.where(row_Mk < 0, -1, rows[row_Mk])
    try:
        layout.save(file, name)
    except OSError as error:
        say(f"explore: the layout is not kept: {file}: {error.strerror}")
    return layout


def nearest_neighbours(x_ND: ndarray, k: int, device: Any = None, seed: int = 0) -> tuple[ndarray, ndarray]:
    """The k nearest other rows of each row (N, k) int32, -1 where there are fewer, and their cosines, best first.

    Exact up to MAX_EXACT rows or on a GPU. More rows go into lists by k-means; a list is compared with the PROBES lists
    nearest to its centre, which finds nearly all.
    """
    count, k = len(x_ND), min(k, max(0, len(x_ND) - 1))
    row_Nk, score_Nk = np.full((count, k), -1, np.int32), np.full((count, k), -np.inf, np.float32)
    if not k:
        return row_Nk, np.zeros((count, k), np.float32)
    whole = None
    if device is not None or count <= MAX_EXACT:
        whole = torch.from_numpy(l2_normalise(x_ND)).to(device or "cpu")
        all_rows = np.arange(count)
        tasks = ((all_rows[start : start + BLOCK], all_rows) for start in range(0, count, BLOCK))
    else:
        tasks = _lists(x_ND, seed)
    with Progress("neighbours", "images", count) as progress:
        for rows_B, rows_C in tasks:
            x_CD = torch.from_numpy(l2_normalise(x_ND[rows_C])) if whole is None else whole
            for start in range(0, len(rows_B), BLOCK):
                rows = rows_B[start : start + BLOCK]
                x_BD = (
                    whole[torch.from_numpy(rows)] if whole is not None else torch.from_numpy(l2_normalise(x_ND[rows]))
                )
                s_BC = x_BD @ x_CD.T
                own = torch.from_numpy(np.searchsorted(rows_C, rows)).to(s_BC.device)
                s_BC[torch.arange(len(rows), device=s_BC.device), own] = -torch.inf
                best = s_BC.topk(min(k, len(rows_C) - 1), dim=1)
                found = best.indices.shape[1]
                row_Nk[rows, :found] = rows_C[best.indices.cpu().numpy()]
                score_Nk[rows, :found] = best.values.cpu().numpy()
            progress.add(len(rows_B))
    return row_Nk, np.clip(score_Nk, -1, 1)


def _lists(x_ND: ndarray, seed: int) -> Any:
    """The rows of each list, and those that they are compared with, sorted."""
    centroids_LD = kmeans(x_ND, len(x_ND) // LIST_ROWS, seed)
    list_N = nearest_centroids(x_ND, centroids_LD, 1)[1][:, 0]
    order = np.argsort(list_N, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(list_N, minlength=len(centroids_LD)))[:-1])
    near_LP = nearest_centroids(centroids_LD, centroids_LD, PROBES + 1)[1]
    for number, rows in enumerate(members):
        if len(rows):
            yield rows, np.sort(np.concatenate([members[n] for n in {number, *near_LP[number].tolist()}]))


def start_of(x_ND: ndarray, sample: int = 20_000, seed: int = 0) -> ndarray:
    """The first two principal components of each row (N, 2), of a small spread."""
    if len(x_ND) < 2 or x_ND.shape[1] < 2:
        return np.zeros((len(x_ND), 2), np.float32)
    drawn = np.sort(np.random.default_rng(seed).permutation(len(x_ND))[:sample])
    x_BD = l2_normalise(x_ND[drawn]).astype(np.float64)
    mean_D = x_BD.mean(0)
    _, axes_D2 = np.linalg.eigh((x_BD - mean_D).T @ (x_BD - mean_D))
    axes_D2 = axes_D2[:, :-3:-1]
    axes_D2 *= np.sign(axes_D2[np.abs(axes_D2).argmax(0), [0, 1]])
    parts = [(l2_normalise(x_ND[a : a + 65_536]) - mean_D) @ axes_D2 for a in range(0, len(x_ND), 65_536)]
    place_N2 = np.concatenate(parts)
    return (place_N2 / max(place_N2.std(), 1e-9)).astype(np.float32)


def weights_of(score_Nk: ndarray) -> ndarray:
    """How strongly each neighbour pulls (N, k) float32: exp(-(d - d of the first) / s) of the distance d = 1 - cosine,
    where s is chosen for each image such that the sum is log2(k) (UMAP, section 3.1)."""
    far_Nk = 1 - score_Nk.astype(np.float64)
    far_Nk -= far_Nk.min(1, keepdims=True)
    low_N1, high_N1, total = np.zeros((len(far_Nk), 1)), np.full((len(far_Nk), 1), 4.0), np.log2(far_Nk.shape[1] + 1e-9)
    for _ in range(24):
        middle_N1 = (low_N1 + high_N1) / 2
        is_high_N1 = np.exp(-far_Nk / np.maximum(middle_N1, 1e-9)).sum(1, keepdims=True) > total
        high_N1, low_N1 = np.where(is_high_N1, middle_N1, high_N1), np.where(is_high_N1, low_N1, middle_N1)
    return np.exp(-far_Nk / np.maximum(high_N1, 1e-9)).astype(np.float32)


def arrange(start_N2: ndarray, row_Nk: ndarray, score_Nk: ndarray, device: Any = None, seed: int = 0) -> ndarray:
    """Move the places (N, 2), such that neighbours lie near one another and others do not."""
    count, k = row_Nk.shape
    if count < 3 or not k:
        return start_N2
    y_N2 = torch.from_numpy(start_N2 * np.float32(START)).to(device or "cpu")
    near_kN = torch.from_numpy(np.where(row_Nk < 0, np.arange(count)[:, None], row_Nk).T.astype(np.int64)).to(
        y_N2.device
    )
    weight_kN1 = torch.from_numpy(np.ascontiguousarray(weights_of(score_Nk).T[..., None])).to(y_N2.device)
    generator = torch.Generator(y_N2.device).manual_seed(seed)
    step_N2 = torch.zeros_like(y_N2)
    for step in watched(range(1, STEPS + 1), "map", "steps"):
        force_N2 = _force(y_N2, near_kN, weight_kN1, generator).clamp_(-CLIP, CLIP)
        step_N2.mul_(MOMENTUM).add_(force_N2)
        y_N2.add_(step_N2, alpha=RATE * (1 - step / STEPS))
    y_N2 -= y_N2.mean(0)
    return (y_N2 / y_N2.std()).cpu().numpy()


def _force(y_N2: Tensor, near_kN: Tensor, weight_kN1: Tensor, generator: torch.Generator) -> Tensor:
    """The sum of what pulls and pushes each place."""
    k, count = near_kN.shape
    near = near_kN.reshape(-1)
    pull_kN2 = y_N2[near].view(k, count, 2) - y_N2
    pull_kN2 *= weight_kN1 / (1 + (pull_kN2 * pull_kN2).sum(-1, keepdim=True))
    force_N2 = pull_kN2.sum(0)
    force_N2.index_add_(0, near, pull_kN2.view(-1, 2), alpha=-1)
    order = torch.randperm(count, generator=generator, device=y_N2.device)
    shuffled_N2, pushed_N2 = y_N2[order], torch.zeros_like(y_N2)
    for shift in range(1, PUSHES + 1):
        push_N2 = shuffled_N2 - shuffled_N2.roll(shift, 0)
        squared_N1 = (push_N2 * push_N2).sum(-1, keepdim=True)
        push_N2 /= (squared_N1 + 1e-3) * (1 + squared_N1)
        pushed_N2 += push_N2
        pushed_N2 -= push_N2.roll(-shift, 0)
    force_N2[order] += pushed_N2 * PUSH
    return force_N2
