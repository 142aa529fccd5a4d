"""Does the network learn? Health readings of a run, and their verdict in words."""

import math
from dataclasses import replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.learn.config import PretrainConfig
from troodon.learn.method import Method
from troodon.learn.objective import CLS_TARGETS
from troodon.learn.schedules import ScheduledValues
from troodon.views.batch import Batch

# Shape suffixes: B images of all ranks, K prototypes, D channels, M class tokens or masked patches of all ranks.

READINGS = 3  # that a verdict looks at


@torch.no_grad()
def read(method: Method, parts: list[Batch], scheduled: ScheduledValues) -> dict[str, Tensor]:
    """Readings, () each, that tell a network that learns from one that collapses; the same on every rank.

    They describe the teacher's prototype targets, if there are any, and the EMA's features of this batch, of which
    memory holds a part at a time. They cost a forward pass of each.
    """
    targets = method.targets(parts, replace(scheduled, anchored=False, new_anchor=False))  # no anchor changes
    of_parts = [part.patches if part.cls is None else part.cls for part in targets]
    wholes = [prototype_targets.whole() for prototype_targets in of_parts if prototype_targets is not None]
    targets_MK = wholes[0] if len(wholes) == 1 else torch.cat(wholes) if wholes else None  # one is large enough
    readings = {} if targets_MK is None else target_readings(targets_MK, method)
    with method.autocast():
        features = [method.ema.backbone([part.globals_GBCHW[0]])[0].cls_BD.float() for part in parts]
    return readings | feature_readings(method.ranks.gather(torch.cat(features)))


def target_readings(targets_MK: Tensor, method: Method) -> dict[str, Tensor]:
    """From 0 to 1: the mean entropy of the targets and the entropy of their mean, over ln K; and the number of
    prototypes that are the first choice of some row, over the largest number possible."""
    total = method.ranks.total
    rows = total(torch.tensor(float(len(targets_MK)), device=targets_MK.device)).clamp(min=1.0)
    largest = math.log(targets_MK.shape[1])
    used_K = torch.zeros(targets_MK.shape[1], device=targets_MK.device).index_fill_(0, targets_MK.argmax(1), 1.0)
    return {
        "target_entropy": total(_entropy(targets_MK).sum()) / rows / largest,
        "mean_target_entropy": _entropy(total(targets_MK.sum(0)) / rows) / largest,
        "prototypes_used": (total(used_K) > 0).sum() / rows.clamp(max=targets_MK.shape[1]),
    }


def feature_readings(x_BD: Tensor) -> dict[str, Tensor]:
    """How far apart images are, as unit vectors: the mean cosine of two images, the effective rank of the centred
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
    """Alarms of the run that wrote these records, by name: what is wrong, the likely cause, and what to change.

    They follow from the medians of the last three readings after the warm-up, as a single one says little. Thresholds
    lie between healthy and collapsed runs of the small recipes (docs/log.md).
    """
    alarms = {}
    if worse := _worse(records):
        alarms["worse"] = worse
    last = [r for r in records if "feature_cosine" in r and r["step"] >= config.schedules.lr.warmup][-READINGS:]
    if len(last) < READINGS:
        return alarms
    now = {name: median(r[name] for r in last) for name in last[0] if all(name in r for r in last)}
    if "target_entropy" in now:
        alarms |= _target_alarms(now, config)
    if now["feature_cosine"] > 0.95 or now["effective_rank"] < 2:
        alarms["one direction"] = (
            f"features of different images are almost the same (mean cosine {now['feature_cosine']:.3f}, effective "
            f"rank {now['effective_rank']:.1f}): raise the weight of koleo in objective.terms, or lower "
            "schedules.lr.peak"
        )
    if now["grad_norm"] > 30 * config.optim.clip > 0:
        alarms["steep"] = (
            f"the gradient norm is {now['grad_norm'] / config.optim.clip:.0f} times optim.clip: lower "
            "schedules.lr.peak, or make schedules.lr.warmup longer"
        )
    return alarms


def _target_alarms(now: dict[str, float], config: PretrainConfig) -> dict[str, str]:
    term, ln_k, loss = _loss(now, config)
    if now["mean_target_entropy"] < 0.2 or now["prototypes_used"] < 0.05:
        text = (
            f"almost all images get the same few prototypes (the entropy of the mean target is "
            f"{now['mean_target_entropy']:.0%} of ln K, {now['prototypes_used']:.1%} of prototypes are used): {term} "
            "teaches nothing, however low its loss. The targets are not balanced: use objective.targets sinkhorn, or "
            "with centring a lower objective.centre_momentum; a higher schedules.ema_momentum.peak helps both"
        )
        return {"few prototypes": text}
    if loss > 0.97 * ln_k and now["target_entropy"] > 0.8:
        text = (
            f"the loss of {term} is ln K ({loss:.2f} of {ln_k:.2f}) and targets are nearly uniform (entropy "
            f"{now['target_entropy']:.0%} of ln K): they do not tell images apart. Likely the teacher is too soft or "
            "changes too fast: lower schedules.teacher_temperature, then schedules.lr.peak; a higher "
            "schedules.ema_momentum.peak"
        )
        return {"flat": text}
    return {}


def _loss(now: dict[str, float], config: PretrainConfig) -> tuple[str, float, float]:
    """The term whose targets were read, ln K of its head, and the mean cross-entropy."""
    objective = config.objective
    if CLS_TARGETS in objective.needs:
        total = now["dino_global"] + now.get("dino_local", 0.0)
        return "DINO", math.log(config.dino_head.prototypes), total / objective.weight("dino")
    head = config.dino_head if objective.heads == "shared" else config.ibot_head
    name = "ibot" if objective.weight("ibot") else "ibot_visible"
    crops = config.masks.share if name == "ibot" and config.masks.share else 1.0  # that the loss is a mean over
    return "iBOT", math.log(head.prototypes), now[name] / objective.weight(name) / crops


def _worse(records: list[dict]) -> str | None:
    """The alarm if the last k-NN is clearly below the best one; the first is of the weights that the run began with."""
    readings = [(r["step"], r["knn"]) for r in records if "knn" in r]
    if len(readings) < 2:
        return None
    (_, last), (step, best) = readings[-1], max(readings, key=lambda reading: reading[1])
    if last > 0.9 * best:
        return None
    since = "before the first step" if step < 0 else f"at step {step + 1:,}"
    return (
        f"features got worse: k-NN {last:.1%}, and {best:.1%} {since}. Lower schedules.lr.peak, or optim.layer_decay "
        "towards 0.65 (earlier blocks learn more slowly), or stop where they were best"
    )
