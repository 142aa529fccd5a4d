"""Sequences of different lengths, concatenated along one token axis.

Crops of every size go through the transformer as one pack, without padding: linear layers see one long axis,
attention and stochastic depth respect where each sequence begins and ends.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Shape suffixes: T tokens in the pack, D channels, N heads, H channels per head,
#                 B images in a group, L tokens per image of a group; K images kept of it by each of N branches.


SHORT = 512  # tokens of a sequence up to which attention on a CPU makes its whole matrix


@dataclass(frozen=True)
class Layout:
    """How the token axis is divided: `groups` of `count` sequences of `length` tokens each."""

    groups: tuple[tuple[int, int], ...]  # (count, length), known on the host: no device sync
    offsets: Tensor | None = field(default=None, compare=False)  # where each sequence starts, for the GPU kernel

    @property
    def lengths(self) -> list[int]:
        return [length for count, length in self.groups for _ in range(count)]


@lru_cache(maxsize=256)  # the host waits for a transfer to the device: once for each layout, not in every block
def layout_of(groups: tuple[tuple[int, int], ...], device: torch.device) -> Layout:
    """The layout of these groups; on a GPU with the cumulative starts (S + 1,) int32 that its kernel takes."""
    layout = Layout(groups)
    if device.type != "cuda":
        return layout
    with torch.inference_mode(False):  # training may use a layout that inference has made
        starts = torch.tensor([0, *layout.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Layout(groups, starts.to(device))


Branch = Callable[[Tensor, Layout], Tensor]


def pack(groups: list[Tensor]) -> tuple[Tensor, Layout]:
    """[(B, L, D), ...] -> (T, D), and the layout that `unpack` takes."""
    x_TD = torch.cat([x_BLD.flatten(0, 1) for x_BLD in groups])
    return x_TD, layout_of(tuple((x.shape[0], x.shape[1]) for x in groups), x_TD.device)


def unpack(x_TD: Tensor, layout: Layout) -> list[Tensor]:
    """(T, D) -> [(B, L, D), ...]: views, in the order of packing."""
    parts = x_TD.split([count * length for count, length in layout.groups])
    return [x.unflatten(0, group) for x, group in zip(parts, layout.groups, strict=True)]


def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    """Softmax attention within each sequence of the pack, never across: (T, N, H).

    On a GPU in half precision by the variable-length kernel; elsewhere group by group.
    """
    kernel = q_TNH.is_cuda and q_TNH.dtype in (torch.bfloat16, torch.float16)
    return (by_kernel if kernel else by_group)(q_TNH, k_TNH, v_TNH, layout)


def by_kernel(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    """All sequences in one call, without padding or copies."""
    from torch.nn.attention.varlen import varlen_attn

    assert layout.offsets is not None, "layout_of makes offsets on a GPU"
    longest = max(length for _, length in layout.groups)
    out_TNH = varlen_attn(q_TNH, k_TNH, v_TNH, layout.offsets, layout.offsets, longest, longest)
    assert isinstance(out_TNH, Tensor)
    return out_TNH


def by_group(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    """The specification: one dense attention per group. Runs on any device; the kernel is tested against it."""
    outputs = []
    for q, k, v in zip(*(unpack(x, layout) for x in (q_TNH, k_TNH, v_TNH)), strict=True):
        out_BNLH = _dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        outputs.append(out_BNLH.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _dense(q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor) -> Tensor:
    if q_BNLH.device.type == "cpu" and q_BNLH.dtype == torch.bfloat16 and q_BNLH.shape[2] <= SHORT:
        # The fused kernel is two to six times slower than three products here; see docs/log.md.
        scores_BNLL = q_BNLH @ k_BNLH.transpose(-1, -2) * q_BNLH.shape[-1] ** -0.5
        return scores_BNLL.softmax(-1).to(v_BNLH.dtype) @ v_BNLH
    return scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH)


class KeptSequences(NamedTuple):
    """The sequences of a pack that go through a residual branch under stochastic depth."""

    tokens_T: Tensor  # positions of their tokens in the pack
    layout: Layout  # of these tokens
    scales: tuple[float, ...]  # of each group: factor of the branch's output


def draw_kept(layout: Layout, drop: float, branches: int, device: torch.device) -> list[KeptSequences]:
    """Stochastic depth: the sequences that go through each of `branches` branches (https://arxiv.org/abs/2304.07193,
    section 5).

    Of the b sequences of each group, k = max(int(b (1 - drop)), 1) chosen at random go through a branch. Its output is
    scaled by b / k, so that the expectation is that of dropping with rate `drop`. The number is constant: shapes stay.
    """
    tokens, groups, scales, start = [], [], [], 0
    for count, length in layout.groups:
        keep = max(int(count * (1.0 - drop)), min(count, 1))
        chosen_NK = torch.rand(branches, count, device=device).argsort(1)[:, :keep]
        tokens_NKL = start + chosen_NK[:, :, None] * length + torch.arange(length, device=device)
        tokens.append(tokens_NKL.flatten(1))
        groups.append((keep, length))
        scales.append(count / max(keep, 1))
        start += count * length
    inner = layout_of(tuple(groups), device)
    return [KeptSequences(tokens_T, inner, tuple(scales)) for tokens_T in torch.cat(tokens, 1).unbind()]


def residual(x_TD: Tensor, branch: Branch, layout: Layout, kept: KeptSequences | None) -> Tensor:
    """x + branch(x). The branch computes only the kept sequences."""
    if kept is None:
        return x_TD + branch(x_TD, layout)
    output_TD = branch(x_TD.index_select(0, kept.tokens_T), kept.layout).to(x_TD.dtype)
    return _ScaledAdd.apply(x_TD, output_TD, kept)


class _ScaledAdd(torch.autograd.Function):
    """Adds the branch's scaled output to the kept sequences. Saves neither tensor for backward; index_add saves one."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, output_TD: Tensor, kept: KeptSequences) -> Tensor:
        ctx.save_for_backward(kept.tokens_T)
        ctx.scales = kept.scales
        ctx.sizes = sizes = [count * length for count, length in kept.layout.groups]
        x_TD = x_TD.clone()
        parts = zip(kept.tokens_T.split(sizes), output_TD.split(sizes), kept.scales, strict=True)
        for tokens_T, part_TD, scale in parts:
            x_TD.index_add_(0, tokens_T, part_TD, alpha=scale)
        return x_TD

    @staticmethod
    def backward(ctx, gradient_TD: Tensor):  # pyrefly: ignore[bad-override]
        (tokens_T,) = ctx.saved_tensors
        of_output_TD = gradient_TD.index_select(0, tokens_T)
        for part_TD, scale in zip(of_output_TD.split(ctx.sizes), ctx.scales, strict=True):
            part_TD.mul_(scale)
        return gradient_TD, of_output_TD, None
