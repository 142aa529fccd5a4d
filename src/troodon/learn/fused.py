"""What the loss does between its products: four operations that pass over logits, and leave them as they are.

On a CUDA device each is one kernel (kernels.py), which reads every logit once. What stands here is the same in plain
torch, for other devices and without Triton, in blocks that fit into the caches of a processor.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from troodon.model.fused import register

# Shape suffixes: V views of the student and G of the teacher, B images (or patches), M rows,
#                 K prototypes, of a chunk or all, and C of them in a block.

BLOCK = 1 << 18  # logits


@torch.library.custom_op("troodon::log_row_sums", mutates_args=())
def log_row_sums(logits_MK: Tensor, temperature: float, column_K: Tensor) -> Tensor:
    """(M,): log sum_k exp(logits / temperature - column). M may be several dimensions."""
    blocks = _blocks(logits_MK)
    sums = [_log_sum_exp(_scaled(logits_MK[..., block], temperature, column_K[block]), -1) for block in blocks]
    return torch.stack(sums).logsumexp(0)


@torch.library.custom_op("troodon::log_column_sums", mutates_args=())
def log_column_sums(logits_MK: Tensor, temperature: float, row_M: Tensor) -> Tensor:
    """(K,): log sum_m exp(logits / temperature - row)."""
    blocks, row_M1 = _blocks(logits_MK), row_M[:, None]
    return torch.cat([_log_sum_exp(_scaled(logits_MK[:, block], temperature, row_M1), 0) for block in blocks])


@torch.library.custom_op("troodon::cross_entropies", mutates_args=())
def cross_entropies(
    student_VBK: Tensor, temperature: float, teacher_GBK: Tensor, teacher_temperature: float, column_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(V, G, B): of softmax(student / temperature), for the targets softmax(teacher / teacher_temperature - column).

    Also the logarithms of what both softmaxes divide by, (V, B) and (G, B).
    """
    row_GB = log_row_sums(teacher_GBK, teacher_temperature, column_K)
    dot_VGB, sums = row_GB.new_zeros(len(student_VBK), *row_GB.shape), []
    for block in _blocks(student_VBK):
        scaled_VBC = student_VBK[..., block].float() / temperature
        target_GBC = _scaled(teacher_GBK[..., block], teacher_temperature, column_K[block])
        for g, target_BC in enumerate(_exp_of_negative_(target_GBC.sub_(row_GB[..., None]))):
            dot_VGB[:, g] += (scaled_VBC * target_BC).sum(-1)
        sums.append(_log_sum_exp(scaled_VBC, -1))
    log_sum_VB = torch.stack(sums).logsumexp(0)
    return log_sum_VB[:, None] - dot_VGB, log_sum_VB, row_GB


@torch.library.custom_op("troodon::logit_gradients", mutates_args=())
def logit_gradients(
    student_VBK: Tensor, temperature: float, log_sum_VB: Tensor,
    teacher_GBK: Tensor, teacher_temperature: float, column_K: Tensor, row_GB: Tensor,
    gradient_VGB: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(V, B, K): temperature times the gradient by the student's logits, from that by the cross-entropies."""
    scaled_VBK = (student_VBK.float() / temperature).sub_(log_sum_VB[..., None])
    gradient_VBK = _exp_of_negative_(scaled_VBK).mul_(gradient_VGB.sum(1)[..., None])
    target_GBK = _scaled(teacher_GBK, teacher_temperature, column_K).sub_(row_GB[..., None])
    for g, target_BK in enumerate(_exp_of_negative_(target_GBK)):
        gradient_VBK.addcmul_(gradient_VGB[:, g, :, None], target_BK, value=-1.0)
    return gradient_VBK.to(dtype)


def _blocks(logits_MK: Tensor) -> Iterator[slice]:
    count = logits_MK.shape[-1]
    step = max(64, BLOCK * count // max(1, logits_MK.numel()))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _scaled(logits: Tensor, temperature: float, less: Tensor) -> Tensor:
    """logits / temperature - less, in one pass."""
    return torch.add(-less, logits, alpha=1.0 / temperature)


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """Changes `x`."""
    highest = x.amax(dim, keepdim=True)
    return _exp_of_negative_(x.sub_(highest)).sum(dim).log_().add_(highest.squeeze(dim))


def _exp_of_negative_(x: Tensor) -> Tensor:
    """`losses.exp_of_negative`, in place."""
    return x.clamp_(min=-80.0).exp_()


def _kernels() -> ModuleType:
    from troodon.learn import kernels

    return kernels


def _shapes_of_pairs(student_VBK, _, teacher_GBK, __, column_K):
    (views, images), row = student_VBK.shape[:2], column_K.new_empty(teacher_GBK.shape[:2])
    return row.new_empty(views, *row.shape), row.new_empty(views, images), row


register(log_row_sums, _kernels, lambda logits, _, column: column.new_empty(logits.shape[:-1]))
register(log_column_sums, _kernels, lambda logits, _, row: row.new_empty(logits.shape[-1]))
register(cross_entropies, _kernels, _shapes_of_pairs)
register(logit_gradients, _kernels, lambda *given: given[0].new_empty(given[0].shape, dtype=given[-1]))
