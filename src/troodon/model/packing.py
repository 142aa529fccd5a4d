"""Sequences of different lengths, concatenated along one token axis.

Crops of every size go through the transformer as one pack, without padding: linear layers see one long axis,
attention and stochastic depth respect where each sequence begins and ends.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from troodon.dist import Share, send
from troodon.model import fused
from troodon.model.config import depth_group, depth_kept

# Shape suffixes: T tokens in the pack, D channels, N heads, H channels per head,
#                 B images in a group, L tokens per image of a group; with stochastic depth N branches,
#                 S sequences of the pack, V views of each of B images, C crops of images that are chosen from together.


DEPTH_STREAM = 2**64 - 3  # random numbers of stochastic depth, in place of an image's: see views.crops.generator
KERNEL_CAPABILITY = (8, 0)  # of the GPUs from which on there is the variable-length kernel
SHORT = 512  # tokens of a sequence up to which attention on a CPU makes its whole matrix


@dataclass(frozen=True)
class Layout:
    """How the token axis is divided: `groups` of `count` sequences of `length` tokens each."""

    groups: tuple[tuple[int, int], ...]  # (count, length), known on the host: no device sync
    offsets: Tensor | None = field(default=None, compare=False)  # where each sequence starts, for the GPU kernel
    rotation: Tensor | None = field(default=None, compare=False)  # of every token, with rotary positions: rotary.py

    @property
    def lengths(self) -> list[int]:
        return [length for count, length in self.groups for _ in range(count)]


@lru_cache(maxsize=256)  # the host waits for a transfer to the device: once for each layout, not in every block
def layout_of(groups: tuple[tuple[int, int], ...], device: torch.device) -> Layout:
    """The layout of these groups; on a GPU that has the kernel, with the cumulative starts (S + 1,) int32 it takes."""
    layout = Layout(groups)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < KERNEL_CAPABILITY:
        return layout
    with torch.inference_mode(False):  # training may use a layout that inference has made
        starts = torch.tensor([0, *layout.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Layout(groups, starts.to(device))


def makes_graph() -> bool:
    """Whether this call is not computed but recorded, by torch.compile, torch.export or a trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


Branch = Callable[[Tensor, Layout], Tensor]


def pack(groups: list[Tensor]) -> tuple[Tensor, Layout]:
    """[(B, L, D), ...] -> (T, D), and the layout that `unpack` takes."""
    x_TD = torch.cat([x_BLD.flatten(0, 1) for x_BLD in groups])
    shapes = tuple((x.shape[0], x.shape[1]) for x in groups)
    if makes_graph():  # shapes are symbols, which no cache and no kernel knows
        return x_TD, Layout(shapes)
    return x_TD, layout_of(shapes, x_TD.device)


def unpack(x_TD: Tensor, layout: Layout) -> list[Tensor]:
    """(T, D) -> [(B, L, D), ...]: views, in the order of packing."""
    parts = x_TD.split([count * length for count, length in layout.groups])
    return [x.unflatten(0, group) for x, group in zip(parts, layout.groups, strict=True)]


def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    """Softmax attention within each sequence of the pack, never across: (T, N, H).

    On a GPU in half precision by the variable-length kernel, if it takes heads of this width; elsewhere by group.
    """
    kernel = layout.offsets is not None and q_TNH.dtype in (torch.bfloat16, torch.float16) and q_TNH.shape[2] % 8 == 0
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
    place_T: Tensor | None = None  # on a GPU: of each token of the pack its place among these, negative if it has none
    factor_K: Tensor | None = None  # and of each of these its factor


def draw_kept(
    layout: Layout, drop: float, branches: int, device: torch.device, share: Share | None = None
) -> list[KeptSequences]:
    """Stochastic depth: the sequences that go through each of `branches` branches (https://arxiv.org/abs/2304.07193,
    section 5).

    Of the c crops of one size of `depth_group` neighbouring images of the step, k = max(int(c (1 - drop)), 1) go
    through a branch. Its output is scaled by c / k, so that the expectation is that of dropping with rate `drop`. The
    choice is a function of what `share` says of these images; so it is the same on any number of ranks. Where they are
    whole groups, the number kept is constant, and shapes stay. Without a `share`, torch's generator gives the seed, and
    each sequence is of an image of its own.

    Drawn on the host, and sent at once: the device is not waited for.
    """
    seed = 0 if share is not None else int(torch.randint(2**62, ()))
    chosen, scales = [], []
    for number, (count, _) in enumerate(layout.groups):
        kept_NS, scale = _choose(share or Share(seed, 0, count, range(count)), number, count, drop, branches)
        chosen.append(kept_NS)
        scales.append(scale)
    counts = np.stack([kept_NS.sum(1) for kept_NS in chosen], 1).tolist()
    kept_NS = np.concatenate(chosen, 1)
    _, sequence_K = kept_NS.nonzero()  # branch after branch
    lengths_S = np.array(layout.lengths)
    start_S = lengths_S.cumsum() - lengths_S
    length_K, start_K = lengths_S[sequence_K], start_S[sequence_K]
    sent_2K = torch.from_numpy(np.stack([start_K - (length_K.cumsum() - length_K), length_K]))
    shift_K, length_K = send(sent_2K, device)
    inner = [tuple((n, length) for n, (_, length) in zip(kept, layout.groups)) for kept in counts]
    sizes = [sum(n * length for n, length in groups) for groups in inner]
    tokens_T = shift_K.repeat_interleave(length_K, output_size=sum(sizes)) + torch.arange(sum(sizes), device=device)
    places = factors = [None] * branches
    if fused.applies(tokens_T):
        before_NS = (kept_NS * lengths_S).cumsum(1) - lengths_S  # kept tokens before a kept sequence
        shift_NS = send(torch.from_numpy(np.where(kept_NS, before_NS - start_S, -(2**30)).astype(np.int32)), device)
        length_S = send(torch.from_numpy(lengths_S), device)
        place_NT = shift_NS.repeat_interleave(length_S, 1, output_size=int(lengths_S.sum()))
        places = (place_NT + torch.arange(place_NT.shape[1], dtype=torch.int32, device=device)).unbind()
        scale_S = np.repeat(np.array(scales, np.float32), [count for count, _ in layout.groups])
        factor_T = send(torch.from_numpy(scale_S[sequence_K]), device)
        factors = factor_T.repeat_interleave(length_K, output_size=sum(sizes)).split(sizes)
    return [
        KeptSequences(of_branch_T, layout_of(groups, device), tuple(scales), place_T, factor_K)
        for of_branch_T, groups, place_T, factor_K in zip(tokens_T.split(sizes), inner, places, factors, strict=True)
    ]


def _choose(share: Share, kind: int, count: int, drop: float, branches: int) -> tuple[np.ndarray, float]:
    """Which of the `count` crops, of the size number `kind`, of a step's images each branch keeps: bool (N, V * B); and
    the factor of its output."""
    group, images = depth_group(share.size), share.images
    if not images:
        return np.zeros((branches, 0), bool), 1.0
    views, first = count // len(images), images.start // group
    crops = views * group
    keep = depth_kept(crops, drop)
    key, parts_NVB = np.array([share.seed & (2**64 - 1), DEPTH_STREAM], np.uint64), []
    for number in range(first, (images.stop - 1) // group + 1):
        counter = np.array([0, kind, number, share.batch], np.uint64)
        random = np.random.Generator(np.random.Philox(key=key, counter=counter))
        first_NK = random.random((branches, crops)).argpartition(keep - 1, 1)[:, :keep]
        np.put_along_axis(kept_NC := np.zeros((branches, crops), bool), first_NK, True, 1)
        parts_NVB.append(kept_NC.reshape(branches, views, group))
    skipped = images.start - first * group
    return np.concatenate(parts_NVB, 2)[:, :, skipped : skipped + len(images)].reshape(branches, count), crops / keep


def residual(
    x_TD: Tensor, norm: nn.LayerNorm, branch: Branch, layout: Layout, kept: KeptSequences | None, is_own: bool = False
) -> Tensor:
    """x + branch(norm(x)). The branch computes only the kept sequences. If x `is_own`, the sum may take its place.

    The gradient that arrives is changed in place: nothing else may hold it.
    """
    inner = layout if kept is None else kept.layout
    if kept is not None and layout.rotation is not None:
        inner = Layout(inner.groups, inner.offsets, layout.rotation.index_select(0, kept.tokens_T))
    if fused.applies(x_TD):
        weights, dtype = (norm.weight.float(), norm.bias.float()), fused.dtype_of_products(x_TD)
        x_TD, normed_KD = _Normed.apply(x_TD, *weights, norm.eps, dtype, kept and kept.tokens_T, kept and kept.place_T)
        output_KD = branch(normed_KD, inner)
        return x_TD + output_KD if kept is None else _Added.apply(x_TD, output_KD, kept)
    if kept is None:
        return x_TD + branch(norm(x_TD), layout)
    x_TD, chosen_TD = _Choose.apply(x_TD, kept.tokens_T)
    return _ScaledAdd.apply(x_TD, branch(norm(chosen_TD), inner), kept, is_own)


class _Normed(torch.autograd.Function):
    """On a GPU: all tokens, and those of a branch normalised, whose gradient is added to that of all in one pass."""

    @staticmethod
    def forward(
        ctx, x_TD, weight_D, bias_D, eps: float, dtype: torch.dtype, tokens_K, place_T
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_TD, place_T, weight_D)
        ctx.eps = eps
        return x_TD.view_as(x_TD), fused.norm_rows(x_TD, tokens_K, weight_D, bias_D, eps, dtype)

    @staticmethod
    def backward(ctx, gradient_TD: Tensor, of_rows_KD: Tensor):  # pyrefly: ignore[bad-override]
        gradients = fused.norm_rows_gradient(gradient_TD, of_rows_KD, *ctx.saved_tensors, ctx.eps)
        return *gradients, None, None, None, None


class _Added(torch.autograd.Function):
    """On a GPU: the stream, with the branch's output times its factors added to the kept tokens."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, output_KD: Tensor, kept: KeptSequences) -> Tensor:
        assert kept.place_T is not None, "draw_kept makes it on a GPU"
        assert kept.factor_K is not None
        ctx.save_for_backward(kept.tokens_T, kept.factor_K)
        ctx.dtype = output_KD.dtype
        return fused.add_rows(x_TD, output_KD, kept.place_T, kept.factor_K)

    @staticmethod
    def backward(ctx, gradient_TD: Tensor):  # pyrefly: ignore[bad-override]
        return gradient_TD, fused.scaled_rows(gradient_TD, *ctx.saved_tensors, ctx.dtype), None


class _Choose(torch.autograd.Function):
    """All tokens, and the kept ones. In the backward pass the gradient of these is added to that of all, in place."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens_T)
        return x_TD.view_as(x_TD), x_TD.index_select(0, tokens_T)

    @staticmethod
    def backward(ctx, gradient_TD: Tensor, of_chosen_TD: Tensor):  # pyrefly: ignore[bad-override]
        (tokens_T,) = ctx.saved_tensors
        if makes_graph():
            return gradient_TD.index_add(0, tokens_T, of_chosen_TD), None
        return gradient_TD.contiguous().index_add_(0, tokens_T, of_chosen_TD), None  # an expanded one is copied


class _ScaledAdd(torch.autograd.Function):
    """Adds the branch's scaled output to the kept sequences. Saves neither tensor for backward; index_add saves one."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, output_TD: Tensor, kept: KeptSequences, is_own: bool) -> Tensor:
        ctx.save_for_backward(kept.tokens_T)
        ctx.scales, ctx.dtype = kept.scales, output_TD.dtype
        ctx.sizes = sizes = [count * length for count, length in kept.layout.groups]
        x_TD = x_TD.detach() if is_own and not makes_graph() else x_TD.clone()
        parts = zip(kept.tokens_T.split(sizes), output_TD.split(sizes), kept.scales, strict=True)
        for tokens_T, part_TD, scale in parts:
            x_TD.index_add_(0, tokens_T, part_TD.to(x_TD.dtype), alpha=scale)
        return x_TD

    @staticmethod
    def backward(ctx, gradient_TD: Tensor):  # pyrefly: ignore[bad-override]
        (tokens_T,) = ctx.saved_tensors
        chosen_TD = gradient_TD.index_select(0, tokens_T)
        of_output_TD = chosen_TD if ctx.dtype == chosen_TD.dtype else torch.empty_like(chosen_TD, dtype=ctx.dtype)
        parts = zip(chosen_TD.split(ctx.sizes), of_output_TD.split(ctx.sizes), ctx.scales, strict=True)
        for chosen_part_TD, part_TD, scale in parts:
            torch.mul(chosen_part_TD, scale, out=part_TD)  # in one pass with the cast
        return gradient_TD, of_output_TD, None, None
