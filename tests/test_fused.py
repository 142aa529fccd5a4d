"""What a block does between its products on a GPU, here on a processor: by plain torch, and by Triton's interpreter."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.triton_compiler import output_of
from troodon.learn.parallel import prepare
from troodon.model import fused, vit
from troodon.model.config import ViTConfig
from troodon.model.packing import draw_kept
from troodon.model.vit import ViT

NAMES = ("norm_rows", "norm_rows_gradient", "add_rows", "scaled_rows", "gelu_gradient", "gated", "gated_gradient")
TINY = ViTConfig(dim=48, depth=1, heads=2, patch=4, grid=2, registers=1, layer_scale=0.5, drop_path=0.4)


def as_on_a_gpu(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on networks compute so, by plain torch or by the kernels."""
    if form == "kernels":
        kernels = pytest.importorskip("troodon.model.kernels", reason="needs triton", exc_type=ImportError)
        for name in NAMES:
            monkeypatch.setattr(fused, name, getattr(kernels, name))
        passes = {F.gelu: (F.gelu, kernels.gelu_gradient), vit.gated: (kernels.gated, kernels.gated_gradient)}
        monkeypatch.setattr(vit, "PASSES", passes)
    monkeypatch.setattr(fused, "applies", lambda x: True)


FORMS = pytest.mark.parametrize("form", ["torch", "kernels"])


def cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """Arguments of every operation: odd sizes, all and some tokens, no rows."""
    torch.manual_seed(0)
    for tokens, channels, some in ((7, 24, 4), (29, 130, 17), (5, 3, 0), (0, 8, 0)):
        x, weight, bias = torch.randn(tokens, channels), torch.randn(channels), torch.randn(channels)
        chosen = torch.randperm(tokens)[:some].sort().values
        place = torch.full((tokens,), -(2**30), dtype=torch.int32)
        place[chosen] = torch.arange(some, dtype=torch.int32)
        rows, factor = torch.randn(some, channels, dtype=dtype), torch.rand(some)
        yield "norm_rows", (x, chosen, weight, bias, 1e-6, dtype)
        yield "norm_rows", (x, None, weight, bias, 1e-6, dtype)
        yield "norm_rows_gradient", (torch.randn_like(x), rows, x, place, weight, 1e-6)
        yield "norm_rows_gradient", (torch.randn_like(x), x.to(dtype), x, None, weight, 1e-6)
        yield "add_rows", (x, rows, place, factor)
        yield "scaled_rows", (x, chosen, factor, dtype)
        of_mlp = torch.randn(some, 2 * channels, dtype=dtype)
        yield "gelu_gradient", (of_mlp, torch.randn_like(of_mlp))
        yield "gated", (of_mlp,)
        yield "gated_gradient", (of_mlp, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_plain_torch(dtype, monkeypatch):
    kernels = pytest.importorskip("troodon.model.kernels", reason="needs triton", exc_type=ImportError)
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    monkeypatch.setattr(kernels, "TILE", 128)
    near = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    seen = set()
    for name, given in cases(dtype):
        ours, theirs = getattr(kernels, name)(*given), getattr(fused, name)(*given)
        torch.testing.assert_close(ours, theirs, **near, msg=lambda text, name=name: f"{name}: {text}")
        seen.add(name)
    assert seen == set(NAMES)


def test_tensors_without_numbers_have_the_shapes():
    for name, given in cases(torch.bfloat16):
        torch.library.opcheck(getattr(torch.ops.troodon, name).default, given, test_utils="test_faketensor")


def gradients(network: ViT) -> list[Tensor]:
    """A number that depends on all tokens, and its gradients by all parameters and by a group of images."""
    torch.manual_seed(1)
    images = [torch.randn(3, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 4, 8)]
    masks = [torch.rand(3, 4) > 0.5, None]
    torch.manual_seed(2)  # of stochastic depth
    loss = sum((x.sin().square().sum() for tokens in network(images, masks) for x in tokens), torch.zeros(()))
    loss.backward()
    found = [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None), images[0].grad]
    network.zero_grad()
    assert len(found) == 2 + len([*network.parameters()])
    return found


def made(mlp: str = "gelu", drop_path: float = 0.4, positions: str = "learned") -> ViT:
    torch.manual_seed(0)
    network = ViT(dataclasses.replace(TINY, mlp=mlp, drop_path=drop_path, positions=positions))
    network.initialize()
    for name, parameter in network.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return network


def near(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * float(b.abs().max()))


@FORMS
@pytest.mark.parametrize(
    ("mlp", "positions", "drop_path"), [("gelu", "learned", 0.4), ("swiglu", "rotary", 0.4), ("swiglu", "learned", 0.0)]
)
def test_a_network_on_a_gpu_computes_what_it_does_on_a_processor(form, mlp, positions, drop_path, monkeypatch):
    """In value and gradient, and without gradients, in fp32."""
    network, x_BCHW = made(mlp, drop_path, positions), torch.rand(2, 3, 8, 8)
    expected, quiet = gradients(network), network.eval().requires_grad_(False)(x_BCHW)
    as_on_a_gpu(form, monkeypatch)
    near([network(x_BCHW)], [quiet])
    near(gradients(network.train().requires_grad_()), expected)


@FORMS
def test_the_stream_stays_in_fp32_and_products_get_their_dtype(form, monkeypatch):
    as_on_a_gpu(form, monkeypatch)
    network, seen = made(), []
    for layer in (network.blocks[0].attn, network.blocks[0].mlp, network.norm):
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network([torch.randn(2, 3, 4, 8)])
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.filterwarnings("ignore")  # of torch, by its compiler
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_blocks_are_recomputed_and_compiled(monkeypatch, recompute):
    """Compiled in one graph, forward and back, with the operations in it."""
    expected = gradients(made())
    as_on_a_gpu("torch", monkeypatch)
    compiler = torch.compile
    for compiled in (False, True):
        monkeypatch.setattr(torch, "compile", lambda f, **_: compiler(f, backend="aot_eager", fullgraph=True))
        torch.compiler.reset()
        network = made()
        for block in network.blocks:
            prepare(block, recompute, compiled)
        near(gradients(network), expected)
    torch.compiler.reset()


def test_each_kept_token_knows_its_place(monkeypatch):
    as_on_a_gpu("torch", monkeypatch)
    x_TD, layout = made().packed([torch.zeros(5, 3, 16, 16), torch.zeros(6, 3, 8, 8)])
    for kept in draw_kept(layout, 0.4, 4, x_TD.device):
        assert kept.place_T is not None
        assert kept.factor_K is not None
        assert torch.equal(kept.place_T[kept.tokens_T], torch.arange(len(kept.tokens_T), dtype=torch.int32))
        assert int((kept.place_T >= 0).sum()) == len(kept.tokens_T)
        assert len(kept.place_T) == len(x_TD)
        scales = [scale for (n, length), scale in zip(kept.layout.groups, kept.scales) for _ in range(n * length)]
        assert kept.factor_K.tolist() == pytest.approx(scales)


@pytest.mark.slow
def test_kernels_compile_for_gpus():
    assert len(output_of(COMPILE)) == 6


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from troodon.model import kernels

values = {"some": True, "goes_back": True, "N": 1024}
numbers = {"channels": "i32", "count": "i32", "eps": "fp32"}
low = ("rows", "of_rows", "output", "of_gelu", "of_x", "gelu", "of_gated", "gated")
for name in ("_norm_rows", "_norm_rows_gradient", "_add_rows", "_scaled_rows", "_gelu_gradient", "_gated"):
    kernel = getattr(kernels, name)
    types = {n: "constexpr" if n in values else numbers.get(n, "*bf16" if n in low else "*fp32")
             for n in kernel.arg_names}
    types |= {n: kind for n, kind in (("tokens", "*i64"), ("place", "*i32")) if n in types}
    types |= {"tokens": "i32"} if name == "_norm_rows_gradient" else {}
    constants = {(i,): values[n] for i, n in enumerate(kernel.arg_names) if n in values}
    triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    print(name)
"""
