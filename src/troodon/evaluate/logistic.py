"""Logistic regression on frozen features: all penalty strengths at once, one chosen on held-out images.

The 45 values of C of DINOv2 (appendix B.3) are 45 problems of the same shape, and L-BFGS is a few sums and products. So
all are solved together. Each has its own history, curvature and step size, and stops when it has converged.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.evaluate.config import LogisticConfig
from troodon.evaluate.metrics import tag_average_precision
from troodon.evaluate.split import stratified
from troodon.progress import watched

# Shape suffixes: N training images, M validation images, D channels (one of them constant), C classes,
#                 J problems (values of C), W weights of a problem.

HISTORY = 10  # pairs of steps and gradient changes in the L-BFGS history
MAX_HALVINGS = 20  # maximum number of halvings of a step
CHUNK = 2**25  # numbers in a chunk of logits
MAX_NUMBERS = 2**29  # numbers in memory for the problems that are solved together

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # weights and their problems -> values and gradients


@dataclass(frozen=True)
class LogisticClassifiers:
    """Results of the J classifiers."""

    strengths: tuple[float, ...]
    held_out_J: (
        np.ndarray
    )  # accuracy, or mean average precision, on held-out training images, after training without them
    logits_MC: Tensor  # of the chosen classifier, after training on all training images
    chosen: int
    chosen_on: str


def logistic(
    train_ND: np.ndarray, labels_N: np.ndarray, val_MD: np.ndarray, classes: int, config: LogisticConfig, seed: int
) -> LogisticClassifiers:
    """Choose C on held-out images, then train on all images. If no class has two images, the largest C is used.

    Labels are one class per image (N,), or tags (N, C): 1 present, 0 absent, -1 ignored. Features are divided by their
    root mean square, one number for all channels, so that C means the same for every network.
    """
    x_ND = torch.from_numpy(np.ascontiguousarray(train_ND)).float()
    size = x_ND.square().mean().sqrt().clamp_min(1e-12)
    x_ND, x_MD = x_ND / size, torch.from_numpy(np.ascontiguousarray(val_MD)).float() / size
    y_N = torch.from_numpy(labels_N).long()
    stratify_N = labels_N if labels_N.ndim == 1 else (labels_N > 0).argmax(1)
    held_out_N = torch.from_numpy(stratified(stratify_N, config.held_out, seed))
    strengths = config.strengths
    if held_out_N.any():
        model_JDC = solve(x_ND[~held_out_N], y_N[~held_out_N], classes, strengths, config.steps, config.tolerance)
        held_out_J = torch.tensor([held_out_score(predict(x_ND[held_out_N], w), y_N[held_out_N]) for w in model_JDC])
        tied = torch.nonzero(held_out_J == held_out_J.max()).flatten()
        chosen, chosen_on = int(tied[len(tied) // 2]), "held-out training images"  # the middle one of ties
    else:
        held_out_J, chosen = torch.zeros(len(strengths)), len(strengths) - 1
        chosen_on = "nothing (too few images to hold any out)"
    (model_DC,) = solve(x_ND, y_N, classes, (strengths[chosen],), config.steps, config.tolerance)
    return LogisticClassifiers(strengths, held_out_J.numpy(), predict(x_MD, model_DC), chosen, chosen_on)


def held_out_score(logits_MC: Tensor, labels_M: Tensor) -> float:
    """Accuracy; for tags, mean average precision over the classes that are present."""
    if labels_M.ndim == 1:
        return float((logits_MC.argmax(1) == labels_M).float().mean())
    return float(np.nanmean([steps for steps, _ in tag_average_precision(logits_MC.numpy(), labels_M.numpy())]))


def predict(x_MD: Tensor, model_DC: Tensor) -> Tensor:
    """Logits (M, C). The last row of the model is the bias."""
    return torch.addmm(model_DC[-1], x_MD, model_DC[:-1])


def solve(
    x_ND: Tensor, labels_N: Tensor, classes: int, strengths: tuple[float, ...], steps: int, tolerance: float
) -> Tensor:
    """Models (J, D + 1, C) that minimise the sum of cross-entropies times C, plus half the squared weights.

    For tags, the binary cross-entropies of the classes: one problem of two classes for each class. As in scikit-learn,
    the bias is not penalised. A problem has converged when no entry of its gradient, divided by C times the number of
    images, exceeds `tolerance`.
    """
    x_ND = torch.cat([x_ND, x_ND.new_ones(len(x_ND), 1)], 1)
    (images, dim), problems = x_ND.shape, len(strengths)
    penalty_J = 1 / (torch.tensor(strengths, dtype=torch.float64).to(x_ND.dtype) * images)
    penalised_D1 = torch.ones(dim, 1)
    penalised_D1[-1] = 0
    entropy = cross_entropy if labels_N.ndim == 1 else binary_cross_entropy
    rows = max(1, CHUNK // (classes * problems))

    def loss(w_JW: Tensor, problems_J: Tensor) -> tuple[Tensor, Tensor]:
        """Value (J,) and gradient (J, W) of these problems: means over images, so that step sizes are comparable."""
        w_JDC = w_JW.view(-1, dim, classes)
        flat_DF = w_JDC.permute(1, 0, 2).reshape(dim, -1)
        value_J, gradient_DF = x_ND.new_zeros(len(w_JDC)), torch.zeros_like(flat_DF)
        for x, y in zip(x_ND.split(rows), labels_N.split(rows)):
            value, error_NJC = entropy((x @ flat_DF).view(len(x), -1, classes), y)
            value_J += value
            gradient_DF.addmm_(x.T, error_NJC.view(len(x), -1))
        gradient_JDC = gradient_DF.view(dim, -1, classes).permute(1, 0, 2) / images
        weight_J = penalty_J[problems_J, None, None]
        penalised_JDC = w_JDC * penalised_D1
        value_J = value_J / images + 0.5 * (weight_J * penalised_JDC.square()).sum((1, 2))
        return value_J, (gradient_JDC + weight_J * penalised_JDC).reshape(len(w_JDC), -1)

    at_once = max(1, MAX_NUMBERS // (dim * classes * (2 * HISTORY + 8)))
    solved = [
        _lbfgs(loss, problems_J, x_ND.new_zeros(len(problems_J), dim * classes), steps, tolerance)
        for problems_J in torch.arange(problems).split(at_once)
    ]
    return torch.cat(solved).view(problems, dim, classes)


def cross_entropy(z_NJC: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of cross-entropies (J,), and its gradient with respect to the logits."""
    log_NJC = z_NJC.log_softmax(-1)
    value_J = -log_NJC[torch.arange(len(z_NJC)), :, labels_N].sum(0)
    error_NJC = log_NJC.exp_()
    error_NJC[torch.arange(len(z_NJC)), :, labels_N] -= 1
    return value_J, error_NJC


def binary_cross_entropy(z_NJC: Tensor, tags_NC: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of binary cross-entropies (J,) over the known tags, and its gradient with respect to the logits."""
    valid_N1C, present_N1C = (tags_NC >= 0)[:, None].float(), (tags_NC > 0)[:, None].float()
    value_J = ((F.softplus(z_NJC) - z_NJC * present_N1C) * valid_N1C).sum((0, 2))
    return value_J, (z_NJC.sigmoid() - present_N1C) * valid_N1C


def _lbfgs(loss: Loss, problems_J: Tensor, w_JW: Tensor, steps: int, tolerance: float) -> Tensor:
    """Minimise many smooth convex functions at once (Nocedal and Wright, algorithm 7.4; backtracking by halving)."""
    active_rows = torch.arange(len(w_JW))
    value_J, gradient_JW = loss(w_JW, problems_J)
    moves, gradient_changes = [], []  # the history, for the problems that are still active
    solved_JW = w_JW.clone()
    x, f, g = w_JW, value_J, gradient_JW
    for _ in watched(range(steps), "logistic", "steps"):
        active = g.abs().amax(1) > tolerance
        if not active.all():
            solved_JW[active_rows] = x
            active_rows, x, f, g = active_rows[active], x[active], f[active], g[active]
            moves, gradient_changes = [m[active] for m in moves], [s[active] for s in gradient_changes]
        if not len(active_rows):
            break
        d = _direction(g, moves, gradient_changes)
        descent_J = (d * g).sum(1)
        uphill = descent_J >= 0  # because of rounding: restart from the gradient
        d[uphill] = -g[uphill]
        descent_J = (d * g).sum(1)
        t = torch.ones(len(x)) if moves else (1 / g.norm(dim=1)).clamp_max(1.0)
        waiting, nx, nf, ng = torch.ones(len(x), dtype=torch.bool), x.clone(), f.clone(), g.clone()
        for _ in range(MAX_HALVINGS):
            rows = torch.nonzero(waiting).flatten()
            candidate = x[rows] + t[rows, None] * d[rows]
            value, gradient = loss(candidate, problems_J[active_rows[rows]])
            sufficient = value <= f[rows] + 1e-4 * t[rows] * descent_J[rows] + 1e-7 * f[rows].abs()
            chosen = rows[sufficient]
            nx[chosen], nf[chosen], ng[chosen] = candidate[sufficient], value[sufficient], gradient[sufficient]
            waiting[chosen] = False
            if not waiting.any():
                break
            t[waiting] *= 0.5
        moves, gradient_changes = [*moves, nx - x][-HISTORY:], [*gradient_changes, ng - g][-HISTORY:]
        stuck = waiting.clone()  # no step decreases the value: it is minimal at float32 precision
        x, f, g = nx, nf, ng
        g[stuck] = 0
    solved_JW[active_rows] = x
    return solved_JW


def _direction(g_JW: Tensor, moves: list[Tensor], gradient_changes: list[Tensor]) -> Tensor:
    """Minus the gradient times the estimate of the inverse Hessian. Pairs without positive curvature are not used."""
    q, pairs = g_JW.clone(), []
    for s, y in zip(reversed(moves), reversed(gradient_changes)):
        sy = (s * y).sum(1)
        positive = sy > 1e-10 * y.square().sum(1)
        rho = torch.where(positive, 1 / sy.clamp_min(1e-30), 0.0)
        a = rho * (s * q).sum(1)
        q -= a[:, None] * y
        pairs.append((s, y, rho, a))
    if moves:
        s, y = moves[-1], gradient_changes[-1]
        yy = y.square().sum(1)
        scale = torch.where(yy > 0, (s * y).sum(1).clamp_min(1e-12) / yy.clamp_min(1e-30), 1.0)
        q *= scale[:, None]
    for s, y, rho, a in reversed(pairs):
        q += s * (a - rho * (y * q).sum(1))[:, None]
    return -q
