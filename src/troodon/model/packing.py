"""Sequences of different lengths, laid end to end along one token axis.

A pack is how crops of every size go through the transformer in one call, without padding: linear layers
see one long axis, attention and stochastic depth respect where each sequence begins and ends.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Shape suffixes: T tokens in the pack, D channels, N heads, H channels per head,
#                 B images in a group, L tokens per image of a group, K images kept.


SHORT = 512  # tokens up to which attention may keep its whole matrix


@dataclass(frozen=True)
class Layout:
    """How the token axis is divided: `groups` of `count` sequences of `length` tokens each."""

    groups: tuple[tuple[int, int], ...]  # (count, length), known on the host: no device sync

    @property
    def lengths(self) -> list[int]:
        return [length for count, length in self.groups for _ in range(count)]

    def offsets(self, device: torch.device) -> Tensor:
        """Cumulative starts, (S + 1,) int32, as varlen attention kernels want them."""
        return torch.tensor([0, *self.lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


Branch = Callable[[Tensor, Layout], Tensor]


def pack(groups: list[Tensor]) -> tuple[Tensor, Layout]:
    """[(B, L, D), ...] -> (T, D) and the layout that undoes it."""
    x_TD = torch.cat([x_BLD.flatten(0, 1) for x_BLD in groups])
    return x_TD, Layout(tuple((x.shape[0], x.shape[1]) for x in groups))


def unpack(x_TD: Tensor, layout: Layout) -> list[Tensor]:
    """(T, D) -> [(B, L, D), ...]: views, in the order they were packed."""
    parts = x_TD.split([count * length for count, length in layout.groups])
    return [x.unflatten(0, group) for x, group in zip(parts, layout.groups, strict=True)]


def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    """Softmax attention within each sequence of the pack, never across: (T, N, H)."""
    if q_TNH.is_cuda and q_TNH.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        offsets, longest = layout.offsets(q_TNH.device), max(layout.lengths)
        out_TNH = varlen_attn(q_TNH, k_TNH, v_TNH, offsets, offsets, longest, longest)
        assert isinstance(out_TNH, Tensor)
        return out_TNH
    return _attend_by_group(q_TNH, k_TNH, v_TNH, layout)


def _attend_by_group(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    """The specification: one dense attention per group. Runs anywhere; the kernel is tested against it."""
    outputs = []
    for q, k, v in zip(*(unpack(x, layout) for x in (q_TNH, k_TNH, v_TNH)), strict=True):
        out_BNLH = _dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        outputs.append(out_BNLH.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _dense(q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor) -> Tensor:
    if q_BNLH.device.type == "cpu" and q_BNLH.dtype == torch.bfloat16 and q_BNLH.shape[2] <= SHORT:
        # The fused kernel is two to six times slower than three products here; see docs/log.md.
        scores_BNLL = q_BNLH @ k_BNLH.transpose(-1, -2) * q_BNLH.shape[-1] ** -0.5
        return scores_BNLL.softmax(-1).to(v_BNLH.dtype) @ v_BNLH
    return scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH)


def residual(x_TD: Tensor, branch: Branch, layout: Layout, drop: float) -> Tensor:
    """x + branch(x), with stochastic depth that saves the work (https://arxiv.org/abs/2304.07193, section 5).

    Of the b sequences of each group, k = max(int(b (1 - drop)), 1) chosen at random go through the branch;
    what they gain is scaled by b / k, so that the expectation is that of dropping with rate `drop`.
    """
    if drop == 0.0:
        return x_TD + branch(x_TD, layout)
    kept, groups = [], []
    start = 0
    for count, length in layout.groups:
        keep = max(int(count * (1.0 - drop)), 1)
        chosen_K = torch.randperm(count, device=x_TD.device)[:keep]
        positions_L = torch.arange(length, device=x_TD.device)
        kept.append((start + chosen_K[:, None] * length + positions_L).flatten())
        groups.append((keep, length))
        start += count * length
    gain_TD = branch(x_TD[torch.cat(kept)], Layout(tuple(groups)))
    scale = [count / keep for (count, _), (keep, _) in zip(layout.groups, groups, strict=True)]
    parts = gain_TD.split([keep * length for keep, length in groups])
    gain_TD = torch.cat([part * s for part, s in zip(parts, scale, strict=True)])
    return x_TD.index_add(0, torch.cat(kept), gain_TD.to(x_TD.dtype))
