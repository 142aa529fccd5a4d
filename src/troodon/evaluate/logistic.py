"""Logistic regression on frozen features: every strength of the penalty at once, chosen on held-out images.

The paper's 45 values of C (appendix B.3) are 45 problems of one shape, and L-BFGS is a few sums and products: so all
are solved side by side. Each has its own history, curvature and step, and stops when it has converged.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.evaluate.config import LogisticConfig
from troodon.evaluate.metrics import tag_precision
from troodon.evaluate.split import stratified

# Shape suffixes: N training images, M validation images, D channels (one of them constant), C classes,
#                 J problems (values of C), W weights of a problem.

HISTORY = 10  # pairs of steps and gradients that L-BFGS remembers
SHORTER = 20  # halvings of a step, at most
CHUNK = 2**25  # numbers of a block of logits
MEMORY = 2**29  # numbers that the problems solved together may take

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # weights and which problems -> values and gradients


@dataclass(frozen=True)
class Logistic:
    """What the J classifiers say."""

    strengths: tuple[float, ...]
    held_out_J: np.ndarray  # accuracy, or mean average precision, on held-out training images, trained without them
    logits_MC: Tensor  # of the chosen one, trained on all training images
    chosen: int
    chosen_on: str


def logistic(
    train_ND: np.ndarray, labels_N: np.ndarray, val_MD: np.ndarray, classes: int, config: LogisticConfig, seed: int
) -> Logistic:
    """Choose C on held-out images, then train on all. Where no class has two images, the largest C is taken.

    Labels are one class for each image (N,), or tags (N, C): 1 is there, 0 is not, -1 counts for nothing. Features are
    divided by the root of their mean square, one number for all, so that C means the same for every network; channels
    keep their proportions.
    """
    x_ND = torch.from_numpy(np.ascontiguousarray(train_ND)).float()
    size = x_ND.square().mean().sqrt().clamp_min(1e-12)
    x_ND, x_MD = x_ND / size, torch.from_numpy(np.ascontiguousarray(val_MD)).float() / size
    y_N = torch.from_numpy(labels_N).long()
    first_N = labels_N if labels_N.ndim == 1 else (labels_N > 0).argmax(1)
    held_N = torch.from_numpy(stratified(first_N, config.held_out, seed))
    strengths = config.strengths
    if held_N.any():
        model_JDC = solve(x_ND[~held_N], y_N[~held_N], classes, strengths, config.steps, config.tolerance)
        held_J = torch.tensor([judged(predict(x_ND[held_N], w), y_N[held_N]) for w in model_JDC])
        best = torch.nonzero(held_J == held_J.max()).flatten()
        chosen, on = int(best[len(best) // 2]), "held-out training images"  # the middle of those that tie
    else:
        held_J, chosen, on = torch.zeros(len(strengths)), len(strengths) - 1, "nothing (too few images to hold any out)"
    (model_DC,) = solve(x_ND, y_N, classes, (strengths[chosen],), config.steps, config.tolerance)
    return Logistic(strengths, held_J.numpy(), predict(x_MD, model_DC), chosen, on)


def judged(logits_MC: Tensor, labels_M: Tensor) -> float:
    """Accuracy; of tags, mean average precision over the classes that are there."""
    if labels_M.ndim == 1:
        return float((logits_MC.argmax(1) == labels_M).float().mean())
    return float(np.nanmean([steps for steps, _ in tag_precision(logits_MC.numpy(), labels_M.numpy())]))


def predict(x_MD: Tensor, model_DC: Tensor) -> Tensor:
    """Logits; the last row of the model is what is added."""
    return torch.addmm(model_DC[-1], x_MD, model_DC[:-1])


def solve(
    x_ND: Tensor, labels_N: Tensor, classes: int, strengths: tuple[float, ...], steps: int, tolerance: float
) -> Tensor:
    """Models (J, D + 1, C) that minimise the sum of cross-entropies times C, plus half the squared weights.

    Of tags, the cross-entropies of each class by itself: as many problems of two classes as there are classes. The
    penalty is scikit-learn's: not on what is added. One problem is done when no entry of its gradient, divided by C
    times the number of images, is above `tolerance`.
    """
    x_ND = torch.cat([x_ND, x_ND.new_ones(len(x_ND), 1)], 1)
    (images, dim), problems = x_ND.shape, len(strengths)
    penalty_J = 1 / (torch.tensor(strengths, dtype=torch.float64).to(x_ND.dtype) * images)
    kept_D1 = torch.ones(dim, 1)
    kept_D1[-1] = 0
    entropy = of_classes if labels_N.ndim == 1 else of_tags
    rows = max(1, CHUNK // (classes * problems))

    def loss(w_JW: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Value (J,) and gradient (J, W) of these problems; the mean over images, so that steps are of one size."""
        w_JDC = w_JW.view(-1, dim, classes)
        flat_DF = w_JDC.permute(1, 0, 2).reshape(dim, -1)
        value_J, slope_DF = x_ND.new_zeros(len(w_JDC)), torch.zeros_like(flat_DF)
        for x, y in zip(x_ND.split(rows), labels_N.split(rows)):
            value, error_NJC = entropy((x @ flat_DF).view(len(x), -1, classes), y)
            value_J += value
            slope_DF.addmm_(x.T, error_NJC.view(len(x), -1))
        slope_JDC = slope_DF.view(dim, -1, classes).permute(1, 0, 2) / images
        weight_J = penalty_J[which, None, None]
        held_JDC = w_JDC * kept_D1
        value_J = value_J / images + 0.5 * (weight_J * held_JDC.square()).sum((1, 2))
        return value_J, (slope_JDC + weight_J * held_JDC).reshape(len(w_JDC), -1)

    together = max(1, MEMORY // (dim * classes * (2 * HISTORY + 8)))
    solved = [
        _lbfgs(loss, which, x_ND.new_zeros(len(which), dim * classes), steps, tolerance)
        for which in torch.arange(problems).split(together)
    ]
    return torch.cat(solved).view(problems, dim, classes)


def of_classes(z_NJC: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of cross-entropies (J,), and its gradient in the logits."""
    log_NJC = z_NJC.log_softmax(-1)
    value_J = -log_NJC[torch.arange(len(z_NJC)), :, labels_N].sum(0)
    error_NJC = log_NJC.exp_()
    error_NJC[torch.arange(len(z_NJC)), :, labels_N] -= 1
    return value_J, error_NJC


def of_tags(z_NJC: Tensor, tags_NC: Tensor) -> tuple[Tensor, Tensor]:
    """The same of each class by itself, where it is known."""
    known_N1C, there_N1C = (tags_NC >= 0)[:, None].float(), (tags_NC > 0)[:, None].float()
    value_J = ((F.softplus(z_NJC) - z_NJC * there_N1C) * known_N1C).sum((0, 2))
    return value_J, (z_NJC.sigmoid() - there_N1C) * known_N1C


def _lbfgs(loss: Loss, which_J: Tensor, w_JW: Tensor, steps: int, tolerance: float) -> Tensor:
    """Minimise many smooth convex functions at once (Nocedal and Wright, algorithm 7.4; steps by halving)."""
    alive = torch.arange(len(w_JW))
    value_J, slope_JW = loss(w_JW, which_J)
    moves, slopes = [], []  # of each step kept, for the problems that are still alive
    done_JW = w_JW.clone()
    x, f, g = w_JW, value_J, slope_JW
    for _ in range(steps):
        going = g.abs().amax(1) > tolerance
        if not going.all():
            done_JW[alive] = x
            alive, x, f, g = alive[going], x[going], f[going], g[going]
            moves, slopes = [m[going] for m in moves], [s[going] for s in slopes]
        if not len(alive):
            break
        d = _direction(g, moves, slopes)
        fall_J = (d * g).sum(1)
        lost = fall_J >= 0  # rounding has turned it uphill: begin again from the gradient
        d[lost] = -g[lost]
        fall_J = (d * g).sum(1)
        t = torch.ones(len(x)) if moves else (1 / g.norm(dim=1)).clamp_max(1.0)
        waiting, nx, nf, ng = torch.ones(len(x), dtype=torch.bool), x.clone(), f.clone(), g.clone()
        for _ in range(SHORTER):
            at = torch.nonzero(waiting).flatten()
            tried = x[at] + t[at, None] * d[at]
            value, slope = loss(tried, which_J[alive[at]])
            good = value <= f[at] + 1e-4 * t[at] * fall_J[at] + 1e-7 * f[at].abs()
            chosen = at[good]
            nx[chosen], nf[chosen], ng[chosen] = tried[good], value[good], slope[good]
            waiting[chosen] = False
            if not waiting.any():
                break
            t[waiting] *= 0.5
        moves, slopes = [*moves, nx - x][-HISTORY:], [*slopes, ng - g][-HISTORY:]
        stuck = waiting.clone()  # no step makes it smaller: as small as float32 tells
        x, f, g = nx, nf, ng
        g[stuck] = 0
    done_JW[alive] = x
    return done_JW


def _direction(g_JW: Tensor, moves: list[Tensor], slopes: list[Tensor]) -> Tensor:
    """Minus the gradient times what is known of the inverse curvature; pairs without curvature play no part."""
    q, used = g_JW.clone(), []
    for s, y in zip(reversed(moves), reversed(slopes)):
        sy = (s * y).sum(1)
        good = sy > 1e-10 * y.square().sum(1)
        rho = torch.where(good, 1 / sy.clamp_min(1e-30), 0.0)
        a = rho * (s * q).sum(1)
        q -= a[:, None] * y
        used.append((s, y, rho, a))
    if moves:
        s, y = moves[-1], slopes[-1]
        yy = y.square().sum(1)
        scale = torch.where(yy > 0, (s * y).sum(1).clamp_min(1e-12) / yy.clamp_min(1e-30), 1.0)
        q *= scale[:, None]
    for s, y, rho, a in reversed(used):
        q += s * (a - rho * (y * q).sum(1))[:, None]
    return -q
