"""What a block does between its products on a GPU: operations that pass over its tokens once.

On a CUDA device each is one kernel (kernels.py); what stands here is the same in plain torch. Sums are in fp32,
whatever the dtype of products. A processor, whose caches hold such passes, keeps torch's own operations (packing.py,
vit.py).
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: T tokens of the stream, K of them that go through a branch, D channels, M rows of the MLP,
#                 C its channels. `place_T` is the row of each token among those of the branch; negative for the others.


def applies(x: Tensor) -> bool:
    """Whether a network computes with these: on a GPU, compiled or not, but not where a graph is written down."""
    return x.device.type == "cuda" and not torch.compiler.is_exporting() and not torch.jit.is_tracing()


def dtype_of_products(x: Tensor) -> torch.dtype:
    """What autocast makes of x before a product."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@torch.library.custom_op("troodon::norm_rows", mutates_args=())
def norm_rows(
    x_TD: Tensor, tokens_K: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """(K, D): layer normalisation of these tokens, or of all, in `dtype`."""
    x_KD = x_TD.clone() if tokens_K is None else x_TD.index_select(0, tokens_K)
    return F.layer_norm(x_KD, weight_D.shape, weight_D, bias_D, eps).to(dtype)


@torch.library.custom_op("troodon::norm_rows_gradient", mutates_args=())
def norm_rows_gradient(
    gradient_TD: Tensor, of_rows_KD: Tensor, x_TD: Tensor, place_T: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient by x, added to that of the stream (T, D), and those by weight and bias (D,) each."""
    x_KD, of_rows_KD = x_TD if place_T is None else x_TD[place_T >= 0], of_rows_KD.float()
    centred_KD = x_KD - x_KD.mean(1, keepdim=True)
    inverse_K1 = (centred_KD.square().mean(1, keepdim=True) + eps).rsqrt()
    normed_KD = centred_KD * inverse_K1
    of_normed_KD = of_rows_KD * weight_D
    of_x_KD = of_normed_KD - of_normed_KD.mean(1, keepdim=True)
    of_x_KD = (of_x_KD - normed_KD * (of_normed_KD * normed_KD).mean(1, keepdim=True)) * inverse_K1
    total_TD = gradient_TD.clone()
    total_TD[slice(None) if place_T is None else place_T >= 0] += of_x_KD
    return total_TD, (of_rows_KD * normed_KD).sum(0), of_rows_KD.sum(0)


@torch.library.custom_op("troodon::add_rows", mutates_args=())
def add_rows(x_TD: Tensor, output_KD: Tensor, place_T: Tensor, factor_K: Tensor) -> Tensor:
    """(T, D): x, with the branch's output times a factor added where the branch was computed."""
    total_TD = x_TD.clone()
    total_TD[place_T >= 0] += output_KD * factor_K[:, None]
    return total_TD


@torch.library.custom_op("troodon::scaled_rows", mutates_args=())
def scaled_rows(x_TD: Tensor, tokens_K: Tensor, factor_K: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, D): these tokens times their factors, in `dtype`."""
    return (x_TD.index_select(0, tokens_K) * factor_K[:, None]).to(dtype)


@torch.library.custom_op("troodon::gelu_gradient", mutates_args=())
def gelu_gradient(x_MC: Tensor, of_gelu_MC: Tensor) -> tuple[Tensor, Tensor]:
    """(M, C) each: the gradient by x, from that by GELU(x), and GELU(x) once more."""
    return torch.ops.aten.gelu_backward(of_gelu_MC, x_MC), F.gelu(x_MC)


@torch.library.custom_op("troodon::gated", mutates_args=())
def gated(x_MC: Tensor) -> Tensor:
    """(M, C / 2): the second half of the channels, gated by SiLU of the first."""
    gate, value = x_MC.float().chunk(2, dim=-1)
    return (F.silu(gate) * value).to(x_MC.dtype)


@torch.library.custom_op("troodon::gated_gradient", mutates_args=())
def gated_gradient(x_MC: Tensor, of_gated_MC: Tensor) -> tuple[Tensor, Tensor]:
    """(M, C): the gradient by x, from that by gated(x); and (M, C / 2): gated(x) once more."""
    (gate, value), of_gated_MC = x_MC.float().chunk(2, dim=-1), of_gated_MC.float()
    of_gate = torch.ops.aten.silu_backward(of_gated_MC * value, gate)
    return torch.cat([of_gate, of_gated_MC * F.silu(gate)], -1).to(x_MC.dtype), (F.silu(gate) * value).to(x_MC.dtype)


def register(operation, kernels: Callable[[], ModuleType], shapes: Callable) -> None:
    """On CUDA devices, the function of this name in the module that `kernels` imports, or plain torch without Triton;
    `shapes` of its arguments is what tensors without numbers give."""
    plain, name = operation._init_fn, operation._name.removeprefix("troodon::")

    def by_kernel(*given):
        try:
            function = getattr(kernels(), name)
        except ImportError:  # as on Windows
            function = plain
        return function(*given)

    operation.register_kernel("cuda")(by_kernel)
    operation.register_fake(shapes)


def _kernels() -> ModuleType:
    from troodon.model import kernels

    return kernels


def _half(x_MC: Tensor) -> Tensor:
    return x_MC.new_empty(*x_MC.shape[:-1], x_MC.shape[-1] // 2)


def _of_rows(x_TD: Tensor, tokens_K: Tensor | None, *others) -> Tensor:
    return x_TD.new_empty(len(x_TD if tokens_K is None else tokens_K), x_TD.shape[1], dtype=others[-1])


register(norm_rows, _kernels, _of_rows)
register(norm_rows_gradient, _kernels, lambda *of: tuple(torch.empty_like(x) for x in (of[0], of[4], of[4])))
register(add_rows, _kernels, lambda x, *_: torch.empty_like(x))
register(scaled_rows, _kernels, _of_rows)
register(gelu_gradient, _kernels, lambda x, _: (torch.empty_like(x), torch.empty_like(x)))
register(gated, _kernels, _half)
register(gated_gradient, _kernels, lambda x, _: (torch.empty_like(x), _half(x)))
