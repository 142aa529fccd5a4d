"""What only a GPU can show: kernels against a CPU, steps that wait for nothing, sharding on an NCCL mesh of one.

`pytest -m gpu tests/test_gpu.py` on a machine with one. What hides a GPU from all other tests is tested at the end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from PIL import Image
from torch.distributed.tensor import DTensor

from tests.conftest import only_gpu
from tests.test_fused import cases
from tests.test_plan import batch
from troodon.learn import optim, parallel, prototypes
from troodon.learn.clock import Clock
from troodon.learn.config import ObjectiveConfig, ParallelConfig, PretrainConfig
from troodon.learn.loop import Learner, train
from troodon.learn.losses import ALONE
from troodon.learn.method import Method
from troodon.model import fused, packing
from troodon.model.config import HeadConfig, ViTConfig
from troodon.model.head import HeadOutput
from troodon.views.batch import Batch
from troodon.views.config import CropsConfig

GPU, CPU = torch.device("cuda"), torch.device("cpu")
CONFIG = PretrainConfig(
    vit=ViTConfig(dim=128, depth=2, heads=2, patch=8, grid=4, layer_scale=0.5, drop_path=0.3),
    dino_head=HeadConfig(1024, 128, 64),
    ibot_head=HeadConfig(1024, 128, 64),
    crops=CropsConfig(global_px=32, local_px=16, locals=4),
    batch=12,
    steps=100,
)


def made_batch(config: PretrainConfig, device: torch.device) -> Batch:
    torch.manual_seed(0)
    made = batch(config)
    return Batch(made.globals_GBCHW.to(device), made.locals_VBCHW.to(device), made.masks_NP, share=made.share)


class Trained:
    """A method on a device, with its optimiser and the terms of its steps."""

    def __init__(self, config: PretrainConfig, device: torch.device, compute: torch.dtype):
        weights = parallel.first_weights(config, None, None)
        student, ema = (parallel.build(config, weights, device, compute) for _ in range(2))
        self.config, self.method = config, Method(config.objective, student, ema, compute=compute)
        self.optimizer, self.step = optim.adamw(student, config.vit.depth, config.optim), 50
        self.batch, self.terms = made_batch(config, device), []

    def take(self, steps: int) -> "Trained":
        learner = Learner(self.method, self.optimizer, self.config.schedules, self.config.optim,
                          lambda _, __, terms: self.terms.append(terms))  # fmt: skip
        for _ in range(steps):
            self.step = train(
                [learner], iter([self.batch]), first_step=self.step, clock=Clock.of_steps(self.config.steps),
                accumulate=1, stop_requested=lambda: True,
            )  # fmt: skip
        return self

    def losses(self) -> list[dict[str, float]]:
        return [{name: term.item() for name, term in terms.items()} for terms in self.terms]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_is_dense_attention(dtype):
    """In value and gradient, with lengths that are no multiples of anything."""
    torch.manual_seed(0)
    groups = ((3, 197), (5, 37), (1, 1))
    layout = packing.layout_of(groups, GPU)
    tokens = sum(count * length for count, length in groups)
    q, k, v = (torch.randn(tokens, 4, 64, device=GPU, dtype=dtype, requires_grad=True) for _ in range(3))
    upstream = torch.randn(tokens, 4, 64, device=GPU, dtype=dtype)
    by_kernel = packing.by_kernel(q, k, v, layout)
    gradients = torch.autograd.grad(by_kernel, (q, k, v), upstream)
    precise = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = packing.by_group(*precise, layout)
    expected_gradients = torch.autograd.grad(expected, precise, upstream.float())
    for ours, theirs in zip((by_kernel, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 130, 4900])
def test_the_loss_is_that_of_a_cpu(rows):
    """Targets and cross-entropies with their gradients, by the kernels, beside plain torch in fp32."""
    torch.manual_seed(0)
    parts = [torch.nn.functional.normalize(torch.randn(count, 64), dim=-1) for count in (rows, 8192, rows)]

    def values(device: torch.device) -> list[torch.Tensor]:
        teacher, directions, student = (part.to(device) for part in parts)
        student, learned = student.requires_grad_(), directions.clone().requires_grad_()
        (targets,) = prototypes.sinkhorn([HeadOutput(teacher, directions)], 0.07, ALONE)
        loss = prototypes.cross_entropies(student[None], learned, targets, 0.1)
        gradients = torch.autograd.grad(loss.mean(), (student, learned))
        return [x.detach().cpu() for x in (loss, *gradients)]

    for ours, theirs in zip(values(GPU), values(CPU), strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_block_does_between_products_is_that_of_a_cpu(dtype):
    near = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for name, given in cases(dtype):
        operation = getattr(fused, name)
        ours = operation(*(x.to(GPU) if isinstance(x, torch.Tensor) else x for x in given))
        torch.testing.assert_close(
            ours, operation(*given), check_device=False, msg=lambda text, name=name: f"{name}: {text}", **near
        )


@pytest.mark.gpu
@pytest.mark.parametrize("targets", ["sinkhorn", "centring"])
def test_three_steps_in_fp32_are_those_of_a_cpu(targets):
    objective = ObjectiveConfig(targets=targets, heads="shared" if targets == "centring" else "separate")
    config = replace(CONFIG, objective=objective)
    ours, theirs = (Trained(config, device, torch.float32).take(3).losses() for device in (GPU, CPU))
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["never", "always"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_waits_for_nothing_but_the_verdict(compile, recompute):
    """Which it waits for by an event: after the first step, any other wait of the host is an error. The losses are
    those of a CPU in fp32, as far as bf16 is."""
    config = replace(CONFIG, parallel=ParallelConfig(compile=compile, recompute=recompute))
    trained = Trained(config, GPU, torch.bfloat16).take(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained.take(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = Trained(CONFIG, CPU, torch.float32).take(3).losses()
    for ours, theirs in zip(trained.losses(), expected, strict=True):
        losses = [name for name in theirs if not name.startswith("grad_norm")]
        assert [ours[name] for name in losses] == pytest.approx([theirs[name] for name in losses], rel=0.05, abs=0.02)


class _Several(int):
    """One rank, which counts as several: sharding is for more than one."""

    def __gt__(self, other: object) -> bool:
        return True


@pytest.fixture
def mesh_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process group of NCCL with one rank, on which networks are sharded."""
    torch.cuda.set_device(0)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    monkeypatch.setattr(parallel.dist, "world_size", lambda: _Several(1))
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["never", "always"])
def test_sharded_on_a_mesh_of_one_is_unsharded(compile, mesh_of_one, monkeypatch):
    config = replace(CONFIG, parallel=ParallelConfig(compile=compile))
    sharded = Trained(config, GPU, torch.bfloat16)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.method.student.parameters())
    monkeypatch.setattr(parallel.dist, "world_size", lambda: 1)
    plain = Trained(CONFIG, GPU, torch.bfloat16)
    for a, b in zip(sharded.take(3).losses(), plain.take(3).losses(), strict=True):
        assert a == pytest.approx(b, rel=0.02, abs=0.02)


@pytest.mark.gpu
def test_a_run_goes_on_from_its_checkpoint_and_on_a_cpu(tmp_path):
    """A real run from files: one that stopped goes on, on the GPU and then where there is none."""
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for number in range(80):
        Image.effect_noise((64, 64), 20 + number).convert("RGB").save(photos / f"{number}.jpg")
    words = ["pretrain", "demo_dino", "--data", str(photos), "--out", str(run), "--steps", "40"]
    words += ["--checkpoint-every", "4"]

    def pretrain(stop_after: int, environment: dict[str, str]) -> int:
        """The last checkpoint, once the run has had one after this step and was asked to stop, or has ended."""
        process = subprocess.Popen([sys.executable, "-m", "troodon.cli", *words], env=os.environ | environment)
        while process.poll() is None:
            time.sleep(0.1)
            if stop_after and (run / "checkpoints" / f"{stop_after:06d}").exists():
                process.send_signal(signal.SIGINT)
                break
        assert process.wait(100) in (0, 130)
        return max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())

    first = pretrain(4, {})
    second = pretrain(first // 4 * 4 + 4, {})
    third = pretrain(0, {"CUDA_VISIBLE_DEVICES": ""})
    assert 4 <= first <= second <= third == 40


@pytest.mark.parametrize(
    ("markers", "shown"),
    [("gpu", True), ("", False), ("not slow", False), ("not slow and not gpu", False), ("gpu and not slow", True)],
)
def test_a_gpu_is_shown_to_its_own_tests_alone(markers, shown):
    assert only_gpu(markers) is shown


def test_no_other_test_sees_a_gpu(request):
    if not only_gpu(request.config.option.markexpr):
        assert not torch.cuda.is_available()


def test_every_recipe_takes_three_steps_at_toy_size(run_script):
    """What the command for the day with a GPU does first, here without one: losses in bf16 are near those in fp32."""
    parts = SimpleNamespace(**run_script("gpu_parts.py", "parts"))
    rows = parts.runs(gpu=False)
    assert [row["settings"]["recipe"] for row in rows] == ["vitl16_short", "vitl14", "heads", "gram", "distill"]
    for row in rows:
        assert row["ours"], row["settings"]["error"]
        assert row["settings"]["largest_difference"] < 0.1


def test_a_part_that_fails_or_takes_too_long_costs_no_other(run_script, tmp_path, capsys):
    gpu = SimpleNamespace(**run_script("gpu.py", "gpu"))
    row = json.dumps([{"name": "speed", "ours": 1.0}])
    code = {
        "good": f"print('first'); print('''{row}''')",
        "bad": "raise SystemExit(3)",
        "long": "import time; time.sleep(60)",
    }
    listed = [gpu.Command(part, ("-S", "-c", text), 2.0) for part, text in code.items()]
    late = gpu.Command("late", ("-c", "print(1)"), 2.0)
    ended = gpu.run_all([*listed, listed[0]], 60.0, tmp_path, "abc", "toy")
    assert [each["ended"] for each in ended] == ["done", "failed with exit code 3", "stopped after 2 s", "done"]
    assert gpu.run_all([late], 1.0, tmp_path / "none", "abc", "toy")[0]["ended"] == "no time left"
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["part"] for part in written["parts"]] == ["good", "bad", "long", "good"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(each["name"], each["machine"], each["commit"]) for each in rows] == [("speed", "toy", "abc")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("part", ["steps", "loss", "fed", "embedding", "learning"])
def test_every_part_ends_well_at_toy_size(run_script, part):
    """Besides those that stand above."""
    gpu = SimpleNamespace(**run_script("gpu.py", "gpu"))
    for command in gpu.commands(gpu=False):
        if command.part == part:
            ended = gpu.run(command, 200.0)
            assert ended["ended"] == "done", ended["errors"]
            assert ended["rows"]
            assert all(row["ours"] is not None for row in ended["rows"])  # of five pictures, none may be right


@pytest.mark.parametrize("gpu", [False, True])
def test_every_part_is_a_script_that_is_there(run_script, gpu):
    """The most valuable parts come first, and together they fit into ten minutes but for learning."""
    listed = SimpleNamespace(**run_script("gpu.py", "gpu")).commands(gpu)
    order = ["tests", "runs", "steps", "loss", "fed", "embedding", "learning"]
    assert [*dict.fromkeys(command.part for command in listed)] == order
    for command in listed:
        assert Path(next(word for word in command.words if word.endswith(".py"))).is_file()
