"""Is it learning? Readings of a run, and what they mean in words."""

import math
from dataclasses import replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.learn.config import PretrainConfig
from troodon.learn.method import Method
from troodon.learn.schedules import Knobs
from troodon.views.batch import Batch

# Shape suffixes: B images of all ranks, K prototypes, D channels, M class tokens or masked patches of all ranks.

LOOKED_AT = 3  # readings


@torch.no_grad()
def read(method: Method, batch: Batch, knobs: Knobs) -> dict[str, Tensor]:
    """Numbers, () each, that tell a network that learns from one that collapses; the same on every rank.

    Of the teacher's targets, if heads give any, and of the average's features on this batch, which costs a forward pass
    of each.
    """
    (targets,) = method.targets([batch], replace(knobs, anchored=False, anchor=False))  # only looks: no anchor moves
    asked = targets.patches if targets.cls is None else targets.cls
    read = {} if asked is None else of_targets(asked.whole(), method)
    with method.autocast():
        (seen,) = method.average.backbone([batch.globals_GBCHW[0]])
    return read | of_features(method.ranks.gather(seen.cls_BD.float()))


def of_targets(targets_MK: Tensor, method: Method) -> dict[str, Tensor]:
    """From 0 to 1: the entropy of targets and that of the batch's mean target, over ln K; and how many different
    prototypes are the first choice of some row, of as many as could be."""
    total = method.ranks.total
    rows = total(torch.tensor(float(len(targets_MK)), device=targets_MK.device)).clamp(min=1.0)
    largest = math.log(targets_MK.shape[1])
    used_K = torch.zeros(targets_MK.shape[1], device=targets_MK.device).index_fill_(0, targets_MK.argmax(1), 1.0)
    return {
        "target_entropy": total(_entropy(targets_MK).sum()) / rows / largest,
        "mean_target_entropy": _entropy(total(targets_MK.sum(0)) / rows) / largest,
        "prototypes_used": (total(used_K) > 0).sum() / rows.clamp(max=targets_MK.shape[1]),
    }


def of_features(x_BD: Tensor) -> dict[str, Tensor]:
    """How far apart images are: of unit vectors, the mean cosine of two images, the effective rank of the centred
    matrix (https://arxiv.org/abs/2210.02885), and the mean distance to the nearest other image."""
    x_BD = F.normalize(x_BD, dim=-1)
    cosine_BB, count = x_BD @ x_BD.T, len(x_BD)
    values = torch.linalg.svdvals(x_BD - x_BD.mean(0))
    nearest_B = cosine_BB.clone().fill_diagonal_(-1.0).argmax(1)
    return {
        "feature_cosine": (cosine_BB.sum() - cosine_BB.trace()) / (count * (count - 1)),
        "effective_rank": _entropy(values / values.sum().clamp(min=1e-12)).exp(),
        "nearest_distance": (x_BD - x_BD[nearest_B]).norm(dim=1).mean(),
    }


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def verdict(records: list[dict], config: PretrainConfig) -> dict[str, str]:
    """What is wrong with the run that wrote these records, by name: what, the likely cause, and what to change.

    Looks at the medians of the last three readings after the warm-up: a single one says little. Thresholds lie between
    healthy and collapsed runs of the small recipes (docs/log.md).
    """
    said = {}
    if worse := _worse(records):
        said["worse"] = worse
    read = [r for r in records if "feature_cosine" in r and r["step"] >= config.schedules.lr.warmup][-LOOKED_AT:]
    if len(read) < LOOKED_AT:
        return said
    now = {name: median(r[name] for r in read) for name in read[0] if all(name in r for r in read)}
    if "target_entropy" in now:
        said |= _of_targets(now, config)
    if now["feature_cosine"] > 0.95 or now["effective_rank"] < 2:
        said["one direction"] = (
            f"features of different images are almost the same (mean cosine {now['feature_cosine']:.3f}, effective "
            f"rank {now['effective_rank']:.1f}): raise objective.koleo_weight, or lower schedules.lr.peak"
        )
    if now["grad_norm"] > 30 * config.optim.clip > 0:
        said["steep"] = (
            f"gradients are {now['grad_norm'] / config.optim.clip:.0f} times as long as optim.clip lets through: lower "
            "schedules.lr.peak, or make schedules.lr.warmup longer"
        )
    return said


def _of_targets(now: dict[str, float], config: PretrainConfig) -> dict[str, str]:
    said = {}
    of, least, loss = _loss(now, config)
    if now["mean_target_entropy"] < 0.2 or now["prototypes_used"] < 0.05:
        said["few prototypes"] = (
            f"almost all images get the same few prototypes (the entropy of the mean target is "
            f"{now['mean_target_entropy']:.0%} of ln K, {now['prototypes_used']:.1%} of prototypes are used): {of} "
            "says nothing, however low its loss. The targets are not spread: use objective.targets sinkhorn, or with "
            "centring a lower objective.centre_momentum; a higher schedules.momentum.peak helps both"
        )
    elif loss > 0.97 * least and now["target_entropy"] > 0.8:
        said["flat"] = (
            f"the loss of {of} is ln K ({loss:.2f} of {least:.2f}) and targets are nearly uniform (entropy "
            f"{now['target_entropy']:.0%} of ln K): they tell no image from another. Likely the teacher is too soft or "
            "was shaken: lower schedules.teacher_temperature, then schedules.lr.peak; a higher schedules.momentum.peak"
        )
    return said


def _loss(now: dict[str, float], config: PretrainConfig) -> tuple[str, float, float]:
    """The objective whose targets were read, ln K of its head, and the mean cross-entropy."""
    o = config.objective
    if o.dino_weight:
        total = now["dino_global"] + now.get("dino_local", 0.0)
        return "DINO", math.log(config.dino_head.prototypes), total / o.dino_weight
    head = config.dino_head if o.heads == "shared" else config.ibot_head
    return "iBOT", math.log(head.prototypes), now["ibot"] / o.ibot_weight / max(config.masks.share, 1e-9)


def _worse(records: list[dict]) -> str | None:
    """Whether the last k-NN is clearly below the first, of the weights that the run began with, or below its best."""
    read = [(r["step"], r["knn"]) for r in records if "knn" in r]
    if len(read) < 2:
        return None
    (_, last), (step, best) = read[-1], max(read, key=lambda pair: pair[1])
    if last > 0.9 * best:
        return None
    since = "before the first step" if step < 0 else f"at step {step + 1:,}"
    return (
        f"features got worse: k-NN {last:.1%}, and {best:.1%} {since}. Lower schedules.lr.peak, or optim.layer_decay "
        "towards 0.65 (earlier blocks move less), or stop where they were best"
    )
