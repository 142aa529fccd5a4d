"""The targets and cross-entropies of losses.py in chunks: logits and probabilities are never whole.

With 131,072 prototypes these matrices are the largest tensors of a step. Sinkhorn-Knopp and centring both end in a
softmax over prototypes of scaled logits minus a vector `column`, which describes the targets: any chunk of them follows
from it and from a product that is computed again. Libraries compute the products, fused.py what is between them.
losses.py is the specification.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from troodon.learn import fused
from troodon.learn.chunks import CACHED, prototypes_at_a_time, rows_at_a_time
from troodon.learn.losses import Ranks
from troodon.model.head import HeadOutput

# Shape suffixes: K prototypes, C of them in a chunk, D channels, M rows, R of them in a chunk; of a batch of B images
#                 (or B masked patches) V views of the student and G of the teacher.

ALL = slice(None)


@dataclass(frozen=True)
class Logits:
    """The product of rows (..., M, D) and prototypes (K, D), computed where a part of it is asked for, or kept.

    In fp32 where the library can: rounding to bf16 moves targets of temperature 0.04 by one per cent.
    """

    rows_MD: Tensor
    prototypes_KD: Tensor
    kept_MK: Tensor | None

    @staticmethod
    def of(rows_MD: Tensor, prototypes_KD: Tensor) -> "Logits":
        rows_MD, prototypes_KD = rows_MD.detach(), prototypes_KD.detach()
        few = rows_MD.shape[:-1].numel() * len(prototypes_KD) <= CACHED
        return Logits(rows_MD, prototypes_KD, product(rows_MD, prototypes_KD) if few else None)

    def part(self, rows: slice = ALL, prototypes: slice = ALL) -> Tensor:
        """(..., R, C): do not change it in place."""
        if self.kept_MK is not None:
            return self.kept_MK[..., rows, prototypes]
        return product(self.rows_MD[..., rows, :], self.prototypes_KD[prototypes])

    def split(self, counts: list[int]) -> "list[Logits]":
        """Parts with these numbers of rows."""
        kept = [None] * len(counts) if self.kept_MK is None else self.kept_MK.split(counts)
        return [Logits(rows, self.prototypes_KD, k) for rows, k in zip(self.rows_MD.split(counts), kept, strict=True)]

    def views(self, images: int) -> "Logits":
        """Rows (M, D) that come view after view, as (G, B, D)."""
        shape = (len(self.rows_MD) // images if images else 1, images)
        kept_MK = None if self.kept_MK is None else self.kept_MK.unflatten(0, shape)
        return Logits(self.rows_MD.unflatten(0, shape), self.prototypes_KD, kept_MK)


@dataclass(frozen=True)
class PrototypeTargets:
    """The teacher's targets of M rows: softmax(logits / temperature - column) over prototypes."""

    logits: Logits
    temperature: float
    column_K: Tensor

    def split(self, counts: list[int]) -> list["PrototypeTargets"]:
        """The targets of the parts of a step, which have these numbers of rows."""
        return [PrototypeTargets(logits, self.temperature, self.column_K) for logits in self.logits.split(counts)]

    def whole(self) -> Tensor:
        """(M, K): all targets, for health readings."""
        return F.softmax((self.logits.part().float() / self.temperature).sub_(self.column_K), dim=-1)


@torch.no_grad()
def sinkhorn(
    outputs: Sequence[HeadOutput], temperature: float, ranks: Ranks, rounds: int = 3
) -> list[PrototypeTargets]:
    """`losses.sinkhorn` of each output, one product and one sum over ranks a round, of all outputs together. Ranks may
    hold different numbers of rows.

    Only the first round needs the maximum over ranks: its sums lie within e^(length / temperature) of one, which fp32
    cannot hold below temperature 0.012. Later ones, relative to the round before, lie between 1 / K and the number of
    rows: where columns of positive numbers add up to one, rows add up to at most K, and are divided by that.
    """
    logits, sizes = [Logits.of(*output) for output in outputs], [len(output.prototypes_KD) for output in outputs]
    about_K = None
    for _ in range(rounds):
        columns = [None] * len(sizes) if about_K is None else about_K.split(sizes)
        sums_K = torch.cat([_column_sums(each, temperature, column_K) for each, column_K in zip(logits, columns)])
        about_K = ranks.largest(sums_K) if about_K is None else about_K
        about_K = about_K + ranks.total((sums_K - about_K).exp()).log()
    assert about_K is not None, "one round at least"
    return [PrototypeTargets(each, temperature, column_K) for each, column_K in zip(logits, about_K.split(sizes))]


def _column_sums(logits: Logits, temperature: float, column_K: Tensor | None) -> Tensor:
    """(K,): the logarithms of the sums over this rank's rows, each divided by its own sum after the first round."""
    (count, device), prototypes = (len(logits.rows_MD), logits.rows_MD.device), len(logits.prototypes_KD)
    sums_K = torch.full((prototypes,), -torch.inf, device=device)
    for rows in slices(count, rows_at_a_time(prototypes, device.type)):
        logits_RK = logits.part(rows)
        row_R = (sums_K.new_zeros(len(logits_RK)) if column_K is None
                 else fused.log_row_sums(logits_RK, temperature, column_K))  # fmt: skip
        sums_K = torch.logaddexp(sums_K, fused.log_column_sums(logits_RK, temperature, row_R))
    return sums_K


def centred(output: HeadOutput, temperature: float, centre_K: Tensor) -> PrototypeTargets:
    """`losses.centred`."""
    return PrototypeTargets(Logits.of(*output), temperature, centre_K / temperature)


@torch.no_grad()
def means(outputs: Sequence[HeadOutput], ranks: Ranks) -> list[Tensor]:
    """(K,) each: the mean of the logits over the rows of all ranks. It is linear in the rows, so these are summed, with
    their number, those of all outputs at once."""
    rows = [output.bottleneck_MD.float() for output in outputs]
    sums = [torch.cat([x.sum(0), torch.full((1,), float(len(x)), device=x.device)]) for x in rows]
    totals, found = ranks.total(torch.cat(sums)).split([len(x) for x in sums]), []
    for output, total in zip(outputs, totals, strict=True):
        mean_D = total[:-1] / total[-1].clamp(min=1.0)
        step = prototypes_at_a_time(len(mean_D), mean_D.device.type)
        found.append(torch.cat([part_CD.float() @ mean_D for part_CD in output.prototypes_KD.split(step)]))
    return found


def cross_entropies(
    student_VBD: Tensor, prototypes_KD: Tensor, targets: PrototypeTargets, temperature: float
) -> Tensor:
    """`losses.cross_entropies`, (V, G, B), of each student view with each teacher view; targets come view after view.

    Two products for the value, and four more for the gradient.
    """
    return _CrossEntropies.apply(student_VBD, prototypes_KD, targets, temperature)


class _CrossEntropies(torch.autograd.Function):
    """Forward in chunks of rows, whose log-sums are then known; these describe any chunk of prototypes, for backward,
    which so writes the gradient of each prototype once."""

    @staticmethod
    def forward(
        ctx, student_VBD: Tensor, prototypes_KD: Tensor, targets: PrototypeTargets, temperature: float
    ) -> Tensor:
        (views, images, _), device = student_VBD.shape, student_VBD.device
        student, teacher = Logits.of(student_VBD, prototypes_KD), targets.logits.views(images)
        teacher_views = len(teacher.rows_MD)
        pairs_VGB = student_VBD.new_empty(views, teacher_views, images, dtype=torch.float32)
        log_sum_VB, row_GB = pairs_VGB.new_empty(views, images), pairs_VGB.new_empty(teacher_views, images)
        step = rows_at_a_time(len(prototypes_KD), device.type) // max(views, teacher_views)
        for rows in slices(images, max(1, step)):
            pairs_VGB[..., rows], log_sum_VB[:, rows], row_GB[:, rows] = fused.cross_entropies(
                student.part(rows), temperature, teacher.part(rows), targets.temperature, targets.column_K
            )
        ctx.save_for_backward(student_VBD, prototypes_KD, log_sum_VB, row_GB)
        ctx.student, ctx.teacher, ctx.targets, ctx.temperature = student, teacher, targets, temperature
        return pairs_VGB

    @staticmethod
    def backward(ctx, gradient_VGB: Tensor):  # pyrefly: ignore[bad-override]
        student_VBD, prototypes_KD, log_sum_VB, row_GB = ctx.saved_tensors
        rows_MD, gradient_VGB = student_VBD.flatten(0, 1), gradient_VGB / ctx.temperature
        gradient_student = torch.zeros_like(rows_MD, dtype=torch.float32)
        gradient_prototypes = torch.empty_like(prototypes_KD)
        for chunk in slices(len(prototypes_KD), prototypes_at_a_time(len(rows_MD), rows_MD.device.type)):
            gradient_MC = fused.logit_gradients(
                ctx.student.part(prototypes=chunk), ctx.temperature, log_sum_VB,
                ctx.teacher.part(prototypes=chunk), ctx.targets.temperature, ctx.targets.column_K[chunk], row_GB,
                gradient_VGB, rows_MD.dtype,
            ).flatten(0, 1)  # fmt: skip
            gradient_student += product(gradient_MC, prototypes_KD[chunk].T)
            torch.mm(gradient_MC.T, rows_MD, out=gradient_prototypes[chunk])
        return gradient_student.view_as(student_VBD).to(student_VBD.dtype), gradient_prototypes, None, None


def product(x_MD: Tensor, y_KD: Tensor) -> Tensor:
    """(..., M, K): in fp32 where the library can."""
    rows_MD = x_MD.flatten(0, -2)
    if rows_MD.is_cuda and rows_MD.dtype != torch.float32:
        result = torch.mm(rows_MD, y_KD.T, out_dtype=torch.float32)
    else:
        result = rows_MD @ y_KD.T
    return result.view(*x_MD.shape[:-1], len(y_KD))


def slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
