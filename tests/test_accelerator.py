"""What a step does on a GPU, seen without one: on tensors of a fake device, which have no values."""

import functools
import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_plan import batch
from troodon import dist
from troodon.config import from_dict
from troodon.learn import engine, health, optim
from troodon.learn.config import OptimConfig, ParallelConfig, PretrainConfig
from troodon.learn.loop import broken_and_stop
from troodon.learn.method import Method
from troodon.learn.parallel import _expect_shapes, build, compiles, first_weights, prepare, reduce_between_machines
from troodon.model import packing
from troodon.model.config import HeadConfig, ViTConfig
from troodon.model.vit import ViT
from troodon.views.config import CropsConfig

CONFIG = PretrainConfig(
    vit=ViTConfig(dim=32, depth=2, heads=2, patch=4, grid=4, layer_scale=0.5),
    dino_head=HeadConfig(96, 32, 16),
    ibot_head=HeadConfig(80, 32, 16),
    crops=CropsConfig(global_px=16, local_px=8, locals=2),
    batch=4,
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
        prepare(block, recompute)
    with Operations() as seen, torch.autocast("cpu", torch.bfloat16):
        (tokens,) = vit([torch.randn(2, 3, 16, 16)])
        tokens.cls_BD.float().sum().backward()
    assert seen.counts["_varlen_attn"] == {"none": 2, "selective": 2, "full": 4}[recompute]


@pytest.fixture
def with_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")


def test_blocks_are_compiled_on_a_gpu_where_shapes_stay(with_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto: where there is a GPU and what compiling needs; and not where each step has other shapes."""
    even = replace(CONFIG, batch=48, parallel=ParallelConfig(accumulate=3))
    deep = replace(even, vit=replace(CONFIG.vit, drop_path=0.3))  # in groups of 12, of which 16 are no multiple
    assert [compiles(config, device) for config in (even, deep) for device in (CPU, CUDA)] == [
        False,
        True,
        False,
        False,
    ]
    for value, expected in (("always", True), ("never", False)):
        assert compiles(replace(deep, parallel=ParallelConfig(accumulate=3, compile=value)), CPU) is expected
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not compiles(even, CUDA)


@pytest.mark.parametrize(("recorded", "read"), [(True, "always"), (False, "never"), ("auto", "auto")])
def test_the_flag_of_earlier_versions_is_read(recorded: object, read: str) -> None:
    made = from_dict(PretrainConfig(), {"parallel": {"compile": recorded, "accumulate": 2}}, source="run.json")
    assert made.parallel == ParallelConfig(accumulate=2, compile=read)


def test_crops_of_many_sizes_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """More graphs of a block than the compiler's own limit of eight."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    limits = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    before = {name: getattr(limits, name) for name in names}
    torch._dynamo.reset()
    vit = ViT(replace(CONFIG.vit, depth=1))
    vit.initialize()
    for block in vit.blocks:
        prepare(block, "none", compiled=True)
    with limits.patch(before | {"fail_on_recompile_limit_hit": True}), torch.no_grad():  # all are restored after it
        _expect_shapes(12)
        for images in range(2, 14):
            vit([torch.zeros(images, 3, 16, 16)])
    torch._dynamo.reset()


@contextmanager
def imagined_ranks(count: int) -> Iterator[None]:
    """Be rank zero of a group whose other ranks are not there, and whose messages change nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def sharded_method(config: PretrainConfig) -> Method:
    weights = first_weights(config, None)
    return Method(config.objective, *(build(config, weights, CPU, torch.float32) for _ in range(2)))


def test_networks_that_do_not_learn_remember_no_forward_passes() -> None:
    with imagined_ranks(2):
        method = sharded_method(CONFIG)
        for _ in range(3):
            method.targets([batch(CONFIG)], CONFIG.schedules.at(50, 100))
        states = [part._get_fsdp_state() for part in method.ema.modules() if hasattr(part, "_get_fsdp_state")]
        assert len(states) == 2 + 1 + 2  # blocks, backbone and heads
        assert not any(state._comm_ctx.post_forward_order for state in states)
        assert not any(group._post_forward_indices for state in states for group in state._fsdp_param_groups)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_machines_hold_replicas_and_sum_gradients_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of two ranks: shards are halves, and parts of a step wait for the last one to cross machines."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with imagined_ranks(4):
        method = sharded_method(CONFIG)
        weight = method.student.backbone.blocks[0].mlp.fc1.weight
        assert (tuple(weight.device_mesh.shape), weight.to_local().shape[0]) == ((2, 2), weight.shape[0] // 2)
        sums: list[int] = []
        reduce = torch.distributed.all_reduce
        monkeypatch.setattr(
            torch.distributed, "all_reduce", lambda x, **more: sums.append(x.numel()) or reduce(x, **more)
        )
        for is_due in (False, True):
            (targets,) = method.targets([batch(CONFIG)], CONFIG.schedules.at(50, 100))
            reduce_between_machines(method.student, is_due)
            torch.stack([*method.losses(batch(CONFIG), targets).values()]).sum().backward()
            assert len(sums) == (5 if is_due else 0)  # blocks, backbone and heads


def test_ranks_wait_longer_for_one_than_its_quick_readings_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    joined: list[dict] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **how: joined.append(how))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    with dist.process_group():
        pass
    assert joined[0]["timeout"].total_seconds() >= 1800


def test_processors_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a machine of 64, by affinity 8, by the quota of a container two and a half."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(dist, "QUOTA", tmp_path / "cpu.max")
    assert dist.processors() == 8
    for quota, expected in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota)
        assert dist.processors() == expected


def test_what_is_sent_to_a_gpu_is_pinned() -> None:
    """A copy from other memory would wait for the device."""

    class Host:
        pinned = False

        def pin_memory(self) -> "Host":
            self.pinned = True
            return self

        def to(self, device: torch.device, non_blocking: bool) -> tuple[bool, bool]:
            return self.pinned, non_blocking

    assert [dist.send(Host(), device) for device in (CUDA, CPU)] == [(True, True), (False, True)]  # type: ignore


def test_processes_read_for_a_gpu_where_they_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def processes(device: torch.device, **settings: Any) -> int:
        return engine._processes(replace(CONFIG, **settings), 6, device, 1)

    monkeypatch.setattr(engine, "SHARED_MEMORY", tmp_path)
    assert processes(CUDA) == 0  # a script of a user, which would run in each of them
    monkeypatch.setattr(engine, "current_command", ["pretrain"])
    assert (processes(CUDA), processes(CPU)) == (6, 0)
    assert (processes(CUDA, processes=0), processes(CPU, processes=2)) == (0, 2)
    free = shutil.disk_usage(tmp_path)._replace(free=4 * 4 * 3 * (2 * 16**2 + 2 * 8**2) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert processes(CUDA) == 0


def test_health_is_read_of_the_parts_of_a_step() -> None:
    """A batch whose parts go through one after another would not fit as a whole."""
    weights, seen, scheduled = first_weights(CONFIG, None), batch(CONFIG), CONFIG.schedules.at(50, 100)
    method = Method(CONFIG.objective, *(build(CONFIG, weights, CPU, torch.float32) for _ in range(2)))
    images: list[int] = []
    method.ema.backbone.register_forward_pre_hook(lambda _, groups: images.append(len(groups[0][0])))
    whole = health.read(method, seen.chunk(1), scheduled)
    assert images == [8, 4]
    images.clear()
    parts = health.read(method, seen.chunk(2), scheduled)
    assert images == [4, 4, 2, 2]
    assert {n: x.item() for n, x in parts.items()} == pytest.approx({n: x.item() for n, x in whole.items()}, rel=1e-5)
