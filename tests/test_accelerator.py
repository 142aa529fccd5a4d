"""What a step does on a GPU, seen without one: on tensors of a fake device, which have no values."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from troodon.learn import optim
from troodon.learn.config import OptimConfig, ParallelConfig
from troodon.learn.loop import broken_and_stop
from troodon.learn.parallel import prepare
from troodon.model import packing
from troodon.model.config import ViTConfig
from troodon.model.vit import ViT


class Operations(TorchDispatchMode):
    """Counts operations by name, and notes the kinds of devices of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.split("::")[1]] += 1
        result = func(*args, **(kwargs or {}))
        tensors = tree_leaves((args, kwargs, result))
        self.devices |= {x.device.type for x in tensors if isinstance(x, torch.Tensor)}
        return result


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of tensors on the CPU, which must be without values, takes the GPU's kernel."""

    def layout_of(groups: tuple, device: torch.device) -> packing.Layout:
        lengths = packing.Layout(groups).lengths
        return packing.Layout(groups, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))

    monkeypatch.setattr(packing, "layout_of", layout_of)


def test_norms_of_a_frozen_part_are_on_the_device(fake: FakeTensorMode) -> None:
    parts = {name: nn.ParameterList([torch.empty(4, 2, device="cuda")]) for name in ("backbone", "head")}
    student = nn.ModuleDict(parts)
    student["backbone"].requires_grad_(False)
    for parameter in student["head"].parameters():
        parameter.grad = torch.ones_like(parameter)
    norms = optim.clip(student, OptimConfig())
    assert {name: norm.device.type for name, norm in norms.items()} == dict.fromkeys(norms, "cuda")
    assert norms.keys() == {"grad_norm", "grad_norm_backbone", "grad_norm_head"}


def test_the_verdict_sends_nothing_to_the_device(fake: FakeTensorMode) -> None:
    terms = [{"dino": torch.ones((), device="cuda"), "koleo": torch.ones((), device="cuda")}]
    with Operations() as seen:
        verdict = broken_and_stop(terms, True)  # a copy would need CUDA, which a fake device has not
    assert (verdict.shape, verdict.device.type) == ((2,), "cuda")
    assert seen.devices == {"cuda"}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_attention_by_the_kernel_runs_again_only_where_all_does(fake, kernel, recompute: str) -> None:
    vit = ViT(ViTConfig(dim=32, depth=2, heads=4, patch=4, grid=4)).train()
    for block in vit.blocks:
        prepare(block, ParallelConfig(recompute=recompute))
    with Operations() as seen, torch.autocast("cpu", torch.bfloat16):
        (tokens,) = vit([torch.randn(2, 3, 16, 16)])
        tokens.cls_BD.float().sum().backward()
    assert seen.counts["_varlen_attn"] == {"none": 2, "selective": 2, "full": 4}[recompute]
