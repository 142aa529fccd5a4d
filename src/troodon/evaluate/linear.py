"""Linear classifiers on frozen features: all settings are trained together (DINOv2, appendix B.3).

A setting is a slice of the features (the blocks, with or without the mean patch token) and a learning rate. Classifiers
with the same slice form one wide matrix. A step is two matrix products per slice, with the explicit gradient of softmax
regression.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.evaluate.config import LinearConfig
from troodon.evaluate.features import FrozenFeatures
from troodon.evaluate.split import stratified
from troodon.progress import watched

# Shape suffixes: N training images, M validation images, B images of a step, F channels of all features concatenated,
#                 S channels of a slice, L blocks, D channels of a token, R learning rates, H classifiers, C classes.

MOMENTUM = 0.9
INITIAL = 0.01  # standard deviation of the initial weights
CHUNK = 4096  # images classified at a time


@dataclass(frozen=True)
class Slice:
    """The channels [first, last) of the concatenated features, and their meaning."""

    blocks: int
    pooling: str
    first: int
    last: int


@dataclass(frozen=True)
class LinearClassifiers:
    """Results of the H classifiers of one seed. `settings` are (blocks, pooling, learning rate), in order."""

    settings: list[tuple[int, str, float]]
    held_out_H: Tensor  # accuracy on the held-out training images, after training without them
    predicted_HM: Tensor  # classes of the validation images, after training on all training images
    chosen: int  # best on the held-out images
    chosen_on: str
    steps: int
    batch: int


def train_classifiers(
    train: FrozenFeatures,
    labels_N: np.ndarray,
    val: FrozenFeatures,
    classes: int,
    config: LinearConfig,
    seed: int,
    allowed_MC: np.ndarray | None = None,
) -> LinearClassifiers:
    """Train every classifier twice: without the held-out images to choose one, and on all images to classify.

    `labels_N` are in [0, classes); `allowed_MC` masks the classes that may be predicted. Deterministic: the result
    depends on the arguments only. If no class has two images, the choice is made on the training images, and
    `chosen_on` says so.
    """
    slices = list_slices(train, config)
    x_NF, x_MF = concatenate(train), concatenate(val)
    if config.scale == "standardise":
        x_NF, x_MF = standardise(x_NF, x_MF)
    labels = torch.from_numpy(labels_N).long()
    held_out_N = torch.from_numpy(stratified(labels_N, config.held_out, seed))
    chosen_on = "held-out training images" if held_out_N.any() else "the training images (too few to hold any out)"

    fit_N = ~held_out_N
    choose_N = held_out_N if held_out_N.any() else fit_N
    model, _, _ = fit(x_NF[fit_N], labels[fit_N], slices, classes, config, seed)
    held_out_H, loss_H = accuracy_and_loss(x_NF[choose_N], labels[choose_N], slices, model, config)
    model, steps, batch = fit(x_NF, labels, slices, classes, config, seed)
    chunks = logits(x_MF, slices, model, config)
    if allowed_MC is not None:
        forbidden = (~torch.from_numpy(allowed_MC)).split(CHUNK)
        chunks = [z_HMC.masked_fill(not_MC, -math.inf) for z_HMC, not_MC in zip(chunks, forbidden, strict=True)]
    tied_H = held_out_H == held_out_H.max()  # with few images many classifiers tie: the lowest loss decides
    return LinearClassifiers(
        settings=[(s.blocks, s.pooling, rate) for s in slices for rate in config.rates],
        held_out_H=held_out_H,
        predicted_HM=torch.cat([z_HMC.argmax(-1) for z_HMC in chunks], dim=1),
        chosen=int(torch.where(tied_H, loss_H, math.inf).argmin()),
        chosen_on=chosen_on,
        steps=steps,
        batch=batch,
    )


def list_slices(features: FrozenFeatures, config: LinearConfig) -> list[Slice]:
    """The slices that these features have: at most their number of blocks, and a mean only if they have patches."""
    _, L, D = features.cls_NLD.shape
    width = features.mean_NLD.shape[-1]
    blocks = sorted({min(b, L) for b in config.blocks})
    pooling = [p for p in config.pooling if p == "cls" or width] or ["cls"]
    return [Slice(b, p, (L - b) * D, L * D + (width if p == "cls+mean" else 0)) for b in blocks for p in pooling]


def concatenate(features: FrozenFeatures) -> Tensor:
    """Class tokens, first to last block, then the mean patch token of the last, so that every slice is contiguous."""
    cls_NF = torch.from_numpy(features.cls_NLD).float().flatten(1)
    return torch.cat([cls_NF, torch.from_numpy(features.mean_NLD[:, -1]).float()], dim=1)


def standardise(x_NF: Tensor, x_MF: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise both by mean and deviation of the first; a channel that is constant there becomes 0 in both."""
    x_NF, mean_F = x_NF.double(), x_NF.double().mean(0)
    deviation_F = (x_NF - mean_F).square().mean(0).sqrt()
    # The deviation of a constant channel is rounding error: one part in ten million of its size.
    factor_F = torch.where(deviation_F > 1e-7 * mean_F.abs(), 1 / deviation_F.clamp_min(1e-300), 0.0)
    return ((x_NF - mean_F) * factor_F).float(), ((x_MF.double() - mean_F) * factor_F).float()


def fit(
    x_NF: Tensor, labels_N: Tensor, slices: list[Slice], classes: int, config: LinearConfig, seed: int
) -> tuple[list[tuple[Tensor, Tensor]], int, int]:
    """Weights (S, R * C) and biases (R * C,) of each slice, the number of steps and the batch size.

    SGD with momentum, no weight decay, cosine schedule of the learning rates from rate * batch / 256 to 0.
    """
    images, rates = len(x_NF), len(config.rates)
    batch = min(config.batch, images)
    steps = min(max(config.epochs * images // batch, config.least_steps), config.most_steps)
    random = torch.Generator().manual_seed(seed)
    model = [(INITIAL * torch.randn(s.last - s.first, rates * classes, generator=random)) for s in slices]
    model = [(w_SH, w_SH.new_zeros(rates * classes)) for w_SH in model]
    # Momentum is linear in the gradient: the rate of each classifier is applied before it, and the cosine after it.
    momentum = [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in model]
    rate_R1 = torch.tensor(config.rates)[:, None] * (batch / 256)
    epochs = -(-steps * batch // images)
    order = torch.cat([torch.randperm(images, generator=random) for _ in range(epochs)])
    for step in watched(range(steps), "linear", "steps"):
        rows_B = order[step * batch : (step + 1) * batch]
        x_BF, target_B1C = x_NF[rows_B], F.one_hot(labels_N[rows_B], classes).float()[:, None]
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for s, (w, b), (mw, mb) in zip(slices, model, momentum, strict=True):
            x_BS = x_BF[:, s.first : s.last]
            p_BRC = torch.addmm(b, x_BS, w).unflatten(1, (rates, classes)).softmax(-1)
            gradient_BH = ((p_BRC - target_B1C) * (rate_R1 / batch)).flatten(1)
            torch.addmm(mw, x_BS.T, gradient_BH, beta=MOMENTUM, out=mw)
            mb.mul_(MOMENTUM).add_(gradient_BH.sum(0))
            w.sub_(mw, alpha=cosine)
            b.sub_(mb, alpha=cosine)
    return model, steps, batch


def logits(x_NF: Tensor, slices: list[Slice], model: list, config: LinearConfig) -> list[Tensor]:
    """Chunks of (H, images, C), in the order of slices, then rates. Logits of diverged classifiers are 0."""
    rates = len(config.rates)
    return [
        torch.cat(
            [
                torch.addmm(b, x[:, s.first : s.last], w).unflatten(1, (rates, -1)).transpose(0, 1).nan_to_num(0, 0, 0)
                for s, (w, b) in zip(slices, model, strict=True)
            ]
        )
        for x in x_NF.split(CHUNK)
    ]


def accuracy_and_loss(
    x_NF: Tensor, labels_N: Tensor, slices: list[Slice], model: list, config: LinearConfig
) -> tuple[Tensor, Tensor]:
    """Accuracy and cross-entropy (H,) of each classifier."""
    correct_H = loss_H = torch.zeros(len(slices) * len(config.rates))
    for z_HNC, labels in zip(logits(x_NF, slices, model, config), labels_N.split(CHUNK), strict=True):
        correct_H = correct_H + (z_HNC.argmax(-1) == labels).float().sum(1)
        loss_H = loss_H - z_HNC.log_softmax(-1)[:, torch.arange(len(labels)), labels].sum(1)
    return correct_H / len(x_NF), loss_H / len(x_NF)
