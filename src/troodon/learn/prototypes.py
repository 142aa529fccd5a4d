"""The same losses as in losses.py, streamed over prototypes: logits, targets and probabilities are never whole.

With 131,072 prototypes these matrices are the largest tensors of a step. But the result of Sinkhorn-Knopp is a scaling
of rows and columns of exp(logits / temperature), and so is that of centring: two vectors say all of it, and any chunk
of the targets follows from them and from a product that is made again. losses.py is the specification.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from troodon.learn.cost import KEPT, chunk_of
from troodon.learn.losses import Ranks, exp_of_negative
from troodon.model.head import Answer

# Shape suffixes: K prototypes, C of them in a chunk, D channels, M rows; of a batch of B images (or B masked patches)
#                 V views of the student and G of the teacher.


class Logits:
    """The product of rows (M, D) and prototypes, a chunk (M, C) at a time, in fp32; not to be changed in place."""

    def __init__(self, rows_MD: Tensor, prototypes_KD: Tensor, kept: dict[int, Tensor] | None = None):
        self.rows_MD, self.prototypes_KD, self.kept = rows_MD.detach(), prototypes_KD.detach(), kept
        if kept is None and len(rows_MD) * len(prototypes_KD) <= KEPT:
            self.kept = {}

    def chunks(self) -> Iterator[slice]:
        step, count = chunk_of(self.rows_MD.device.type), len(self.prototypes_KD)
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def __getitem__(self, chunk: slice) -> Tensor:
        if self.kept is None:
            return self._product(chunk).float()
        if chunk.start not in self.kept:
            self.kept[chunk.start] = self._product(chunk)
        return self.kept[chunk.start].float()

    def _product(self, chunk: slice) -> Tensor:
        return self.rows_MD @ self.prototypes_KD[chunk].T

    def split(self, counts: list[int]) -> "list[Logits]":
        """Those of so many rows each."""
        kept: list[dict[int, Tensor]] = [{} for _ in counts]
        for start, logits_MC in (self.kept or {}).items():
            for few, rows_MC in zip(kept, logits_MC.split(counts), strict=True):
                few[start] = rows_MC
        rows = self.rows_MD.split(counts)
        return [Logits(r, self.prototypes_KD, few or None) for r, few in zip(rows, kept, strict=True)]


@dataclass(frozen=True)
class Scaled:
    """What the teacher says of M rows: exp(logits / temperature - column - row), which sums to one over prototypes."""

    logits: Logits
    temperature: float
    column_K: Tensor
    row_M: Tensor

    def __getitem__(self, chunk: slice) -> Tensor:
        """(M, C): a chunk of them."""
        log_q_MC = (self.logits[chunk] / self.temperature).sub_(self.column_K[chunk])
        return exp_of_negative(log_q_MC.sub_(self.row_M[:, None]))

    def split(self, counts: list[int]) -> list["Scaled"]:
        """Those of the parts of a step, which have so many rows each."""
        parts = zip(self.logits.split(counts), self.row_M.split(counts), strict=True)
        return [Scaled(logits, self.temperature, self.column_K, row_M) for logits, row_M in parts]

    def whole(self) -> Tensor:
        """(M, K), for those who look at all of them."""
        return torch.cat([self[chunk] for chunk in self.logits.chunks()], dim=1)


@torch.no_grad()
def sinkhorn(answer: Answer, temperature: float, ranks: Ranks, rounds: int = 3) -> Scaled:
    """`losses.sinkhorn`, one product a round. Ranks may hold different numbers of rows."""
    logits = Logits(*answer)
    row_M1 = logits.rows_MD.new_zeros(len(logits.rows_MD), 1, dtype=torch.float32)
    column_K = row_M1.new_empty(len(logits.prototypes_KD))
    for _ in range(rounds):
        found = []
        for chunk in logits.chunks():
            log_q_MC = torch.sub(logits[chunk] / temperature, row_M1)
            highest_C = log_q_MC.amax(0) if len(row_M1) else log_q_MC.new_full(log_q_MC.shape[1:], -inf)
            highest_C = ranks.largest(highest_C)
            column_K[chunk] = highest_C + ranks.total(exp_of_negative(log_q_MC - highest_C).sum(0)).log()
            found.append(_log_sum_exp(log_q_MC.sub_(column_K[chunk])))
        row_M1 = row_M1 + torch.stack(found).logsumexp(0)[:, None]
    return Scaled(logits, temperature, column_K, row_M1[:, 0])


@torch.no_grad()
def centred(answer: Answer, temperature: float, centre_K: Tensor) -> Scaled:
    """`losses.centred`, in one product."""
    logits, column_K = Logits(*answer), centre_K / temperature
    found = [_log_sum_exp((logits[chunk] / temperature).sub_(column_K[chunk])) for chunk in logits.chunks()]
    return Scaled(logits, temperature, column_K, torch.stack(found).logsumexp(0))


@torch.no_grad()
def mean(answer: Answer, ranks: Ranks) -> Tensor:
    """(K,): the mean of the logits over the rows of all ranks. It is linear in the rows: they are what is summed."""
    rows_MD = answer.rows_MD.float()
    count = ranks.total(torch.full((), float(len(rows_MD)), device=rows_MD.device))
    mean_D = ranks.total(rows_MD.sum(0)) / count.clamp(min=1.0)
    return torch.cat(
        [prototypes_CD.float() @ mean_D for prototypes_CD in answer.prototypes_KD.split(chunk_of(rows_MD.device.type))]
    )


def cross_entropies(student_VBD: Tensor, prototypes_KD: Tensor, targets: Scaled, temperature: float) -> Tensor:
    """`losses.cross_entropies`, (V, G, B): of every view of the student with every view of the teacher, whose targets
    come view after view. Four products for the gradient, besides the two for the value."""
    return _CrossEntropies.apply(student_VBD, prototypes_KD, targets, temperature)


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_VBD: Tensor, prototypes_KD: Tensor, targets: Scaled, temperature: float) -> Tensor:
        (views, images, _), logits = student_VBD.shape, Logits(student_VBD.flatten(0, 1), prototypes_KD)
        taught = len(targets.row_M) // images if images else 1
        dot_VGB, found = student_VBD.new_zeros(views, taught, images, dtype=torch.float32), []
        for chunk in logits.chunks():
            scaled_VBC = (logits[chunk] / temperature).unflatten(0, (views, images))
            for g, target_BC in enumerate(targets[chunk].chunk(taught)):
                dot_VGB[:, g] += (scaled_VBC * target_BC).sum(-1)
            found.append(_log_sum_exp(scaled_VBC))
        log_sum_VB = torch.stack(found).logsumexp(0)
        ctx.save_for_backward(student_VBD, prototypes_KD, log_sum_VB)
        ctx.targets, ctx.temperature, ctx.logits = targets, temperature, logits
        return log_sum_VB[:, None] - dot_VGB

    @staticmethod
    def backward(ctx, gradient_VGB: Tensor):  # pyrefly: ignore[bad-override]
        student_VBD, prototypes_KD, log_sum_VB = ctx.saved_tensors
        rows_MD, gradient_VGB = student_VBD.flatten(0, 1), gradient_VGB / ctx.temperature
        of_student = torch.zeros_like(rows_MD, dtype=torch.float32)
        of_prototypes = torch.empty_like(prototypes_KD)
        for chunk in ctx.logits.chunks():
            log_p_VBC = (ctx.logits[chunk] / ctx.temperature).unflatten(0, log_sum_VB.shape).sub_(log_sum_VB[..., None])
            of_logits_VBC = exp_of_negative(log_p_VBC).mul_(gradient_VGB.sum(1)[..., None])
            for g, target_BC in enumerate(ctx.targets[chunk].chunk(gradient_VGB.shape[1])):
                of_logits_VBC.addcmul_(gradient_VGB[:, g, :, None], target_BC, value=-1.0)
            of_logits_MC = of_logits_VBC.flatten(0, 1).to(rows_MD.dtype)
            of_student += of_logits_MC @ prototypes_KD[chunk]
            of_prototypes[chunk] = of_logits_MC.T @ rows_MD
        return of_student.view_as(student_VBD).to(student_VBD.dtype), of_prototypes, None, None


def _log_sum_exp(x: Tensor) -> Tensor:
    """Over the last dimension."""
    highest = x.amax(-1, keepdim=True)
    return exp_of_negative(x - highest).sum(-1).log() + highest[..., 0]
