"""The operations of fused.py as Triton kernels. A program has one row, or several in turn, in its registers."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape suffixes as in fused.py. In kernels: N channels of a row, padded to a power of 2, or numbers of a tile.
# `row + n >= n` is `row >= 0` in every lane: the interpreter cannot spread a truth.

TILE = 1024  # numbers
PROGRAMS = 512  # that add up the gradients of weights


@triton.jit
def _moments(x, inside, channels, eps):
    """x without its mean, and the inverse of its deviation."""
    centred = tl.where(inside, x - tl.sum(x, 0) / channels, 0.0)
    return centred, 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / channels + eps)


@triton.jit
def _norm_rows(x, tokens, weight, bias, rows, channels, eps, some: tl.constexpr, N: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    inside, token = n < channels, row
    if some:
        token = tl.load(tokens + row)
    centred, inverse = _moments(tl.load(x + token * channels + n, inside, 0.0).to(tl.float32), inside, channels, eps)
    normed = centred * inverse * tl.load(weight + n, inside, 0.0) + tl.load(bias + n, inside, 0.0)
    tl.store(rows + row * channels + n, normed.to(rows.dtype.element_ty), inside)


@triton.jit
def _norm_rows_gradient(
    gradient, of_rows, x, place, weight, total, of_weight, of_bias, tokens, channels, eps,
    some: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    first, n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    inside, weights = n < channels, tl.load(weight + n, n < channels, 0.0)
    weight_sum, bias_sum = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
    for token in range(first, tokens, tl.num_programs(0)):
        row, there = token, inside
        if some:
            row = tl.load(place + token).to(tl.int64)
            there = inside & (row + n >= n)  # nothing is read for a token that the branch did not see
        centred, inverse = _moments(tl.load(x + token * channels + n, there, 0.0), there, channels, eps)
        normed, of_row = centred * inverse, tl.load(of_rows + row * channels + n, there, 0.0).to(tl.float32)
        of_normed = of_row * weights
        less = tl.sum(of_normed, 0) / channels + normed * (tl.sum(of_normed * normed, 0) / channels)
        of_x = tl.where(there, (of_normed - less) * inverse, 0.0)
        before = tl.load(gradient + token * channels + n, inside, 0.0)
        tl.store(total + token * channels + n, before + of_x, inside)
        weight_sum += of_row * normed
        bias_sum += of_row
    tl.store(of_weight + first * channels + n, weight_sum, inside)
    tl.store(of_bias + first * channels + n, bias_sum, inside)


@triton.jit
def _add_rows(x, output, place, factor, total, channels, N: tl.constexpr):
    token, n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    row = tl.load(place + token).to(tl.int64)
    added = tl.load(output + row * channels + n, (n < channels) & (row + n >= n), 0.0).to(tl.float32)
    added *= tl.load(factor + row, row >= 0, 0.0)
    tl.store(total + token * channels + n, tl.load(x + token * channels + n, n < channels, 0.0) + added, n < channels)


@triton.jit
def _scaled_rows(x, tokens, factor, rows, channels, N: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    scaled = tl.load(x + tl.load(tokens + row) * channels + n, n < channels, 0.0) * tl.load(factor + row)
    tl.store(rows + row * channels + n, scaled.to(rows.dtype.element_ty), n < channels)


@triton.jit
def _gelu_gradient(x, of_gelu, of_x, gelu, count, N: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    v, upstream = tl.load(x + n, n < count, 0.0).to(tl.float32), tl.load(of_gelu + n, n < count, 0.0).to(tl.float32)
    below = 0.5 + 0.5 * tl.erf(v * 0.7071067811865476)  # of the normal distribution, whose density comes next
    slope = below + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
    tl.store(of_x + n, (upstream * slope).to(of_x.dtype.element_ty), n < count)
    tl.store(gelu + n, (v * below).to(gelu.dtype.element_ty), n < count)


@triton.jit
def _gated(x, of_gated, of_x, gated, channels, goes_back: tl.constexpr, N: tl.constexpr):
    """Forward; and with `goes_back` the gradient too. `channels` of the outcome."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    inside, first, second = n < channels, row * 2 * channels + n, row * 2 * channels + channels + n
    gate = tl.load(x + first, inside, 0.0).to(tl.float32)
    value, open_ = tl.load(x + second, inside, 0.0).to(tl.float32), 1.0 / (1.0 + tl.exp(-gate))
    tl.store(gated + row * channels + n, (gate * open_ * value).to(gated.dtype.element_ty), inside)
    if goes_back:
        upstream = tl.load(of_gated + row * channels + n, inside, 0.0).to(tl.float32)
        of_gate = upstream * value * open_ * (1.0 + gate * (1.0 - open_))
        tl.store(of_x + first, of_gate.to(of_x.dtype.element_ty), inside)
        tl.store(of_x + second, (upstream * gate * open_).to(of_x.dtype.element_ty), inside)


def norm_rows(
    x_TD: Tensor, tokens_K: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    count, channels = len(x_TD if tokens_K is None else tokens_K), x_TD.shape[1]
    rows_KD, is_some = x_TD.new_empty(count, channels, dtype=dtype), tokens_K is not None
    _run(_norm_rows, (count,), x_TD, tokens_K, weight_D, bias_D, rows_KD, channels, eps, is_some, _width(x_TD))
    return rows_KD


def norm_rows_gradient(
    gradient_TD: Tensor, of_rows_KD: Tensor, x_TD: Tensor, place_T: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    (count, channels), is_some = x_TD.shape, place_T is not None
    total_TD, of_both_2PD = x_TD.new_empty(x_TD.shape), weight_D.new_empty(2, min(PROGRAMS, count), channels)
    _run(_norm_rows_gradient, (of_both_2PD.shape[1],), gradient_TD, of_rows_KD, x_TD, place_T, weight_D, total_TD,
         *of_both_2PD, count, channels, eps, is_some, _width(x_TD))  # fmt: skip
    of_weight_D, of_bias_D = of_both_2PD.sum(1)
    return total_TD, of_weight_D, of_bias_D


def add_rows(x_TD: Tensor, output_KD: Tensor, place_T: Tensor, factor_K: Tensor) -> Tensor:
    total_TD, (count, channels) = x_TD.new_empty(x_TD.shape), x_TD.shape
    _run(_add_rows, (count,), x_TD, output_KD, place_T, factor_K, total_TD, channels, _width(x_TD))
    return total_TD


def scaled_rows(x_TD: Tensor, tokens_K: Tensor, factor_K: Tensor, dtype: torch.dtype) -> Tensor:
    rows_KD = x_TD.new_empty(len(tokens_K), x_TD.shape[1], dtype=dtype)
    _run(_scaled_rows, (len(rows_KD),), x_TD, tokens_K, factor_K, rows_KD, x_TD.shape[1], _width(x_TD))
    return rows_KD


def gelu_gradient(x_MC: Tensor, of_gelu_MC: Tensor) -> tuple[Tensor, Tensor]:
    (of_x_MC, gelu_MC), count = (x_MC.new_empty(x_MC.shape) for _ in range(2)), x_MC.numel()
    _run(_gelu_gradient, (triton.cdiv(count, TILE),), x_MC, of_gelu_MC, of_x_MC, gelu_MC, count, TILE)
    return of_x_MC, gelu_MC


def gated(x_MC: Tensor, of_gated_MC: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    *rows, channels = (*x_MC.shape[:-1], x_MC.shape[-1] // 2)
    of_x_MC, gated_MC = x_MC.new_empty(x_MC.shape if of_gated_MC is not None else 0), x_MC.new_empty(*rows, channels)
    grid, goes_back = (math.prod(rows), triton.cdiv(channels, TILE)), of_gated_MC is not None
    _run(_gated, grid, x_MC, of_gated_MC, of_x_MC, gated_MC, channels, goes_back, TILE)
    return (of_x_MC, gated_MC) if goes_back else gated_MC


gated_gradient = gated


def run(kernel, grid: tuple[int, ...], *given) -> None:
    """Launch so many programs, if it is any."""
    if math.prod(grid):
        kernel[grid](*given)


def _run(kernel, grid: tuple[int, ...], *given) -> None:
    run(kernel, grid, *(x.contiguous() if isinstance(x, Tensor) else x for x in given))


def _width(x_TD: Tensor) -> int:
    return triton.next_power_of_2(x_TD.shape[1])
