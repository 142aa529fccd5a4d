"""The targets and cross-entropies of losses.py in chunks of prototypes: logits and probabilities are never whole.

With 131,072 prototypes these matrices are the largest tensors of a step. The result of Sinkhorn-Knopp is a scaling of
rows and columns of exp(logits / temperature), and so is that of centring: two vectors describe it, and any chunk of the
targets follows from them and from a product that is computed again. losses.py is the specification.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from troodon.learn.chunks import CACHED, chunk_size
from troodon.learn.losses import Ranks, exp_of_negative
from troodon.model.head import HeadOutput

# Shape suffixes: K prototypes, C of them in a chunk, D channels, M rows; of a batch of B images (or B masked patches)
#                 V views of the student and G of the teacher.


class Logits:
    """The product of rows (M, D) and prototypes, a chunk (M, C) at a time, in fp32; do not change it in place."""

    def __init__(self, rows_MD: Tensor, prototypes_KD: Tensor, cache: dict[int, Tensor] | None = None):
        self.rows_MD, self.prototypes_KD, self.cache = rows_MD.detach(), prototypes_KD.detach(), cache
        if cache is None and len(rows_MD) * len(prototypes_KD) <= CACHED:
            self.cache = {}

    def chunks(self) -> Iterator[slice]:
        step, count = chunk_size(self.rows_MD.device.type), len(self.prototypes_KD)
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def __getitem__(self, chunk: slice) -> Tensor:
        if self.cache is None:
            return self._product(chunk).float()
        if chunk.start not in self.cache:
            self.cache[chunk.start] = self._product(chunk)
        return self.cache[chunk.start].float()

    def _product(self, chunk: slice) -> Tensor:
        return self.rows_MD @ self.prototypes_KD[chunk].T

    def split(self, counts: list[int]) -> "list[Logits]":
        """Parts with these numbers of rows."""
        caches: list[dict[int, Tensor]] = [{} for _ in counts]
        for start, logits_MC in (self.cache or {}).items():
            for cache, part_MC in zip(caches, logits_MC.split(counts), strict=True):
                cache[start] = part_MC
        parts = zip(self.rows_MD.split(counts), caches, strict=True)
        return [Logits(rows_MD, self.prototypes_KD, cache or None) for rows_MD, cache in parts]


@dataclass(frozen=True)
class PrototypeTargets:
    """The teacher's targets of M rows: exp(logits / temperature - column - row), which sums to one over prototypes."""

    logits: Logits
    temperature: float
    column_K: Tensor
    row_M: Tensor

    def __getitem__(self, chunk: slice) -> Tensor:
        """(M, C): a chunk of the targets."""
        log_q_MC = (self.logits[chunk] / self.temperature).sub_(self.column_K[chunk])
        return exp_of_negative(log_q_MC.sub_(self.row_M[:, None]))

    def split(self, counts: list[int]) -> list["PrototypeTargets"]:
        """The targets of the parts of a step, which have these numbers of rows."""
        parts = zip(self.logits.split(counts), self.row_M.split(counts), strict=True)
        return [PrototypeTargets(logits, self.temperature, self.column_K, row_M) for logits, row_M in parts]

    def whole(self) -> Tensor:
        """(M, K): all targets, for health readings."""
        return torch.cat([self[chunk] for chunk in self.logits.chunks()], dim=1)


@torch.no_grad()
def sinkhorn(output: HeadOutput, temperature: float, ranks: Ranks, rounds: int = 3) -> PrototypeTargets:
    """`losses.sinkhorn`, one product a round. Ranks may hold different numbers of rows."""
    logits = Logits(*output)
    row_M1 = logits.rows_MD.new_zeros(len(logits.rows_MD), 1, dtype=torch.float32)
    column_K = row_M1.new_empty(len(logits.prototypes_KD))
    for _ in range(rounds):
        log_sums = []
        for chunk in logits.chunks():
            log_q_MC = torch.sub(logits[chunk] / temperature, row_M1)
            highest_C = log_q_MC.amax(0) if len(row_M1) else log_q_MC.new_full(log_q_MC.shape[1:], -inf)
            highest_C = ranks.largest(highest_C)
            column_K[chunk] = highest_C + ranks.total(exp_of_negative(log_q_MC - highest_C).sum(0)).log()
            log_sums.append(_log_sum_exp(log_q_MC.sub_(column_K[chunk])))
        row_M1 = row_M1 + torch.stack(log_sums).logsumexp(0)[:, None]
    return PrototypeTargets(logits, temperature, column_K, row_M1[:, 0])


@torch.no_grad()
def centred(output: HeadOutput, temperature: float, centre_K: Tensor) -> PrototypeTargets:
    """`losses.centred`, in one product."""
    logits, column_K = Logits(*output), centre_K / temperature
    log_sums = [_log_sum_exp((logits[chunk] / temperature).sub_(column_K[chunk])) for chunk in logits.chunks()]
    return PrototypeTargets(logits, temperature, column_K, torch.stack(log_sums).logsumexp(0))


@torch.no_grad()
def mean(output: HeadOutput, ranks: Ranks) -> Tensor:
    """(K,): the mean of the logits over the rows of all ranks. It is linear in the rows, so these are summed."""
    rows_MD = output.bottleneck_MD.float()
    count = ranks.total(torch.full((), float(len(rows_MD)), device=rows_MD.device))
    mean_D = ranks.total(rows_MD.sum(0)) / count.clamp(min=1.0)
    return torch.cat(
        [
            prototypes_CD.float() @ mean_D
            for prototypes_CD in output.prototypes_KD.split(chunk_size(rows_MD.device.type))
        ]
    )


def cross_entropies(
    student_VBD: Tensor, prototypes_KD: Tensor, targets: PrototypeTargets, temperature: float
) -> Tensor:
    """`losses.cross_entropies`, (V, G, B), of each student view with each teacher view; targets come view after view.

    Two products for the value, and four more for the gradient.
    """
    return _CrossEntropies.apply(student_VBD, prototypes_KD, targets, temperature)


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_VBD: Tensor, prototypes_KD: Tensor, targets: PrototypeTargets, temperature: float
    ) -> Tensor:
        (views, images, _), logits = student_VBD.shape, Logits(student_VBD.flatten(0, 1), prototypes_KD)
        teacher_views = len(targets.row_M) // images if images else 1
        dot_VGB, log_sums = student_VBD.new_zeros(views, teacher_views, images, dtype=torch.float32), []
        for chunk in logits.chunks():
            scaled_VBC = (logits[chunk] / temperature).unflatten(0, (views, images))
            for g, target_BC in enumerate(targets[chunk].chunk(teacher_views)):
                dot_VGB[:, g] += (scaled_VBC * target_BC).sum(-1)
            log_sums.append(_log_sum_exp(scaled_VBC))
        log_sum_VB = torch.stack(log_sums).logsumexp(0)
        ctx.save_for_backward(student_VBD, prototypes_KD, log_sum_VB)
        ctx.targets, ctx.temperature, ctx.logits = targets, temperature, logits
        return log_sum_VB[:, None] - dot_VGB

    @staticmethod
    def backward(ctx, gradient_VGB: Tensor):  # pyrefly: ignore[bad-override]
        student_VBD, prototypes_KD, log_sum_VB = ctx.saved_tensors
        rows_MD, gradient_VGB = student_VBD.flatten(0, 1), gradient_VGB / ctx.temperature
        gradient_student = torch.zeros_like(rows_MD, dtype=torch.float32)
        gradient_prototypes = torch.empty_like(prototypes_KD)
        for chunk in ctx.logits.chunks():
            log_p_VBC = (ctx.logits[chunk] / ctx.temperature).unflatten(0, log_sum_VB.shape).sub_(log_sum_VB[..., None])
            gradient_logits_VBC = exp_of_negative(log_p_VBC).mul_(gradient_VGB.sum(1)[..., None])
            for g, target_BC in enumerate(ctx.targets[chunk].chunk(gradient_VGB.shape[1])):
                gradient_logits_VBC.addcmul_(gradient_VGB[:, g, :, None], target_BC, value=-1.0)
            gradient_logits_MC = gradient_logits_VBC.flatten(0, 1).to(rows_MD.dtype)
            gradient_student += gradient_logits_MC @ prototypes_KD[chunk]
            gradient_prototypes[chunk] = gradient_logits_MC.T @ rows_MD
        return gradient_student.view_as(student_VBD).to(student_VBD.dtype), gradient_prototypes, None, None


def _log_sum_exp(x: Tensor) -> Tensor:
    """Over the last dimension."""
    highest = x.amax(-1, keepdim=True)
    return exp_of_negative(x - highest).sum(-1).log() + highest[..., 0]
