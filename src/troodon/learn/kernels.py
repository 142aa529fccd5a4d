"""The operations of fused.py as Triton kernels, each of which reads every logit once.

A sum of exponentials is kept as a maximum so far and a sum relative to it, for each lane of a tile, so that no logit is
too large and no maximum is computed beforehand. Lanes are joined at the end of a row or a column.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from troodon.model.kernels import run

# Shape suffixes as in fused.py. In kernels: V views, padded to a power of 2, and N prototypes of a tile.

LOGITS = 4096  # of a tile
LEAST = tl.constexpr(-1e30)  # the maximum of nothing: finite, because the difference of two infinities is no number


@triton.jit
def _with(highest, total, x):
    """A maximum and a sum of exp(. - maximum), with `x` added."""
    higher = tl.maximum(highest, x)
    return higher, total * tl.exp(highest - higher) + tl.exp(x - higher)


@triton.jit
def _joined(highest, total, axis: tl.constexpr):
    """The logarithm of the sum over lanes."""
    overall = tl.max(highest, axis)
    return overall + tl.log(tl.sum(total * tl.exp(highest - tl.expand_dims(overall, axis)), axis))


@triton.jit
def _row_sums(logits, row_stride, temperature, column, sums, prototypes, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    highest, total = tl.full((1, N), LEAST, tl.float32), tl.zeros((1, N), tl.float32)
    for start in range(0, prototypes, N):
        k = start + tl.arange(0, N)
        x = tl.load(logits + row * row_stride + k, k < prototypes, -float("inf")).to(tl.float32) / temperature
        highest, total = _with(highest, total, (x - tl.load(column + k, k < prototypes, 0.0))[None, :])
    tl.store(sums + row + tl.arange(0, 1), _joined(highest, total, 1))


@triton.jit
def _column_sums(logits, row_stride, temperature, row, sums, rows, prototypes, M: tl.constexpr, N: tl.constexpr):
    k = tl.program_id(0) * N + tl.arange(0, N)
    highest, total = tl.full((M, N), LEAST, tl.float32), tl.zeros((M, N), tl.float32)
    for start in range(0, rows, M):
        m = start + tl.arange(0, M)
        real, where = (m < rows)[:, None], logits + m.to(tl.int64)[:, None] * row_stride + k[None, :]
        x = tl.load(where, real & (k < prototypes)[None, :], 0.0).to(tl.float32) / temperature
        x -= tl.load(row + m, m < rows, 0.0)[:, None]
        highest, total = _with(highest, total, tl.where(real, x, -float("inf")))
    tl.store(sums + k, _joined(highest, total, 0), k < prototypes)


@triton.jit
def _cross_entropies(
    student, view_stride, row_stride, temperature, teacher, teacher_view_stride, teacher_row_stride,
    teacher_temperature, column, pairs, log_sums, rows, images, prototypes,
    views: tl.constexpr, teacher_views: tl.constexpr, V: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """All student views of an image with one teacher view."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = tl.arange(0, V)
    student += v.to(tl.int64)[:, None] * view_stride + b * row_stride
    teacher += g * teacher_view_stride + b * teacher_row_stride
    highest, total, dot = tl.full((V, N), LEAST, tl.float32), tl.zeros((V, N), tl.float32), tl.zeros((V, N), tl.float32)
    highest_target, total_target = tl.full((1, N), LEAST, tl.float32), tl.zeros((1, N), tl.float32)
    for start in range(0, prototypes, N):
        k = start + tl.arange(0, N)
        inside = (k < prototypes)[None, :]
        s = tl.load(student + k[None, :], inside & (v < views)[:, None], 0.0).to(tl.float32) / temperature
        x = tl.load(teacher + k[None, :], inside, -float("inf")).to(tl.float32) / teacher_temperature
        x -= tl.load(column + k, k < prototypes, 0.0)[None, :]
        before = highest_target
        highest_target, total_target = _with(highest_target, total_target, x)
        dot = dot * tl.exp(before - highest_target) + tl.exp(x - highest_target) * s
        highest, total = _with(highest, total, tl.where(inside, s, -float("inf")))
    row, log_sum = _joined(highest_target, total_target, 1), _joined(highest, total, 1)
    mean = tl.sum(dot * tl.exp(highest_target - row[:, None]), 1)
    tl.store(pairs + (v * teacher_views + g) * images + b, log_sum - mean, v < views)
    tl.store(rows + g * images + b + tl.arange(0, 1), row)
    tl.store(log_sums + v * images + b, log_sum, v < views)  # the same for every g


@triton.jit
def _logit_gradients(
    student, view_stride, row_stride, temperature, log_sums, teacher, teacher_view_stride, teacher_row_stride,
    teacher_temperature, column, rows, pairs, gradients, images, prototypes,
    views: tl.constexpr, teacher_views: tl.constexpr, V: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A tile of all student views of an image."""
    b, k, v = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, V)
    real, inside = v < views, k < prototypes
    both = real[:, None] & inside[None, :]
    s = tl.load(student + v.to(tl.int64)[:, None] * view_stride + b * row_stride + k[None, :], both, 0.0)
    p = tl.exp(s.to(tl.float32) / temperature - tl.load(log_sums + v * images + b, real, 0.0)[:, None])
    minus_column, gradient = -tl.load(column + k, inside, 0.0), tl.zeros((V, N), tl.float32)
    for g in tl.static_range(teacher_views):
        x = tl.load(teacher + g * teacher_view_stride + b * teacher_row_stride + k, inside, 0.0).to(tl.float32)
        q = tl.exp(x / teacher_temperature + minus_column - tl.load(rows + g * images + b))
        weight = tl.load(pairs + (v * teacher_views + g) * images + b, real, 0.0)
        gradient += weight[:, None] * (p - q[None, :])
    where = gradients + (v * images + b).to(tl.int64)[:, None] * prototypes + k[None, :]
    tl.store(where, gradient.to(gradients.dtype.element_ty), both)


def log_row_sums(logits_MK: Tensor, temperature: float, column_K: Tensor) -> Tensor:
    count, prototypes = logits_MK.shape
    sums_M = column_K.new_empty(count)
    run(_row_sums, (count,), logits_MK, logits_MK.stride(0), temperature, column_K, sums_M, prototypes, LOGITS // 2)
    return sums_M


def log_column_sums(logits_MK: Tensor, temperature: float, row_M: Tensor) -> Tensor:
    (count, prototypes), tile = logits_MK.shape, (LOGITS // 128, 128)
    sums_K = row_M.new_empty(prototypes)
    run(_column_sums, (triton.cdiv(prototypes, 128),), logits_MK, logits_MK.stride(0), temperature, row_M, sums_K,
        count, prototypes, *tile)  # fmt: skip
    return sums_K


def cross_entropies(
    student_VBK: Tensor, temperature: float, teacher_GBK: Tensor, teacher_temperature: float, column_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (views, images, prototypes), teacher_views = student_VBK.shape, len(teacher_GBK)
    pairs_VGB = column_K.new_empty(views, teacher_views, images)
    log_sum_VB, row_GB = column_K.new_empty(views, images), column_K.new_empty(teacher_views, images)
    tile = triton.next_power_of_2(views)
    run(_cross_entropies, (images, teacher_views), student_VBK, *student_VBK.stride()[:2], temperature, teacher_GBK,
        *teacher_GBK.stride()[:2], teacher_temperature, column_K, pairs_VGB, log_sum_VB, row_GB, images, prototypes,
        views, teacher_views, tile, max(32, LOGITS // 2 // tile))  # fmt: skip
    return pairs_VGB, log_sum_VB, row_GB


def logit_gradients(
    student_VBK: Tensor, temperature: float, log_sum_VB: Tensor,
    teacher_GBK: Tensor, teacher_temperature: float, column_K: Tensor, row_GB: Tensor,
    gradient_VGB: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    (views, images, prototypes), teacher_views = student_VBK.shape, len(teacher_GBK)
    gradient_VBK, views_of_tile = student_VBK.new_empty(student_VBK.shape, dtype=dtype), triton.next_power_of_2(views)
    tile = max(32, LOGITS // views_of_tile)
    run(_logit_gradients, (images, triton.cdiv(prototypes, tile)), student_VBK, *student_VBK.stride()[:2], temperature,
        log_sum_VB, teacher_GBK, *teacher_GBK.stride()[:2], teacher_temperature, column_K, row_GB,
        gradient_VGB.contiguous(), gradient_VBK, images, prototypes, views, teacher_views, views_of_tile,
        tile)  # fmt: skip
    return gradient_VBK
