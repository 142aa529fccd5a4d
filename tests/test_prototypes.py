"""The losses streamed over prototypes: equal to their plain form, on any number of ranks, and without its matrices."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from benchmarks.measure import peak_memory
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import parity
from tests.ranks import on_ranks
from tests.triton_compiler import output_of
from troodon import dist
from troodon.learn import chunks, fused, losses, prototypes
from troodon.learn.losses import ALONE, Ranks
from troodon.model.head import HeadOutput

OPERATIONS = ("log_row_sums", "log_column_sums", "cross_entropies", "logit_gradients")


@pytest.fixture(params=["kept", "made again", "one chunk", "kernels"])
def form(request, monkeypatch):
    """Whether logits are kept, and how many come at a time; the last chunk is shorter than the others."""
    monkeypatch.setattr(prototypes, "CACHED", 0 if request.param == "made again" else 1 << 26)
    if request.param != "one chunk":
        in_chunks(monkeypatch)
    if request.param == "kernels":
        kernels = pytest.importorskip("troodon.learn.kernels", reason="needs triton", exc_type=ImportError)
        for name in OPERATIONS:
            monkeypatch.setattr(fused, name, getattr(kernels, name))


def in_chunks(patch) -> None:
    """Of 7 rows with all prototypes, or of 280 logits with all rows."""
    patch.setattr(chunks, "ROWS_ON_PROCESSOR", 7)
    patch.setattr(chunks, "ON_PROCESSOR", 280)


def answer(rows: int, seed: int, count: int = 40, length: float = 1.0) -> HeadOutput:
    torch.manual_seed(seed)
    return HeadOutput(F.normalize(torch.randn(rows, 16), dim=-1), length * F.normalize(torch.randn(count, 16), dim=-1))


def near(ours, theirs):
    """To 1e-5 of the largest."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(("temperature", "length"), [(0.1, 1.0), (0.07, 1.0), (0.005, 1.0), (0.04, 10.0)])
def test_targets_are_those_of_the_plain_form(form, temperature, length):
    given = answer(24, 0, length=length)
    (scaled,) = prototypes.sinkhorn([given], temperature, ALONE)
    plain = losses.sinkhorn(given.logits(), temperature, ALONE)
    torch.testing.assert_close(scaled.whole(), plain, rtol=1e-4, atol=1e-6)  # exponents are as large as 250
    for part, whole in zip(scaled.split([10, 0, 14]), plain.split([10, 0, 14]), strict=True):
        torch.testing.assert_close(part.whole(), whole, rtol=1e-4, atol=1e-6)
    centre = torch.randn(40) / 10
    near(prototypes.centred(given, temperature, centre).whole(), losses.centred(given.logits(), temperature, centre))
    near(prototypes.means([given], ALONE)[0], given.logits().mean(0))


@pytest.mark.parametrize(("views", "taught", "temperature"), [(5, 2, 0.05), (2, 2, 0.1), (1, 1, 0.005), (3, 2, 0.005)])
def test_values_and_gradients_are_those_of_the_plain_form(form, views, taught, temperature):
    images = 6
    teacher, weight = answer(taught * images, 1), torch.rand(views, taught, images)
    teacher.bottleneck_MD[1] = teacher.bottleneck_MD[0]
    results = []
    for streamed in (True, False):
        rows_MD, prototypes_KD = (x.requires_grad_() for x in answer(views * images, 2))
        if streamed:
            (targets,) = prototypes.sinkhorn([teacher], temperature, ALONE)
            pairs = prototypes.cross_entropies(rows_MD.unflatten(0, (views, images)), prototypes_KD, targets, 0.1)
        else:
            targets_GBK = losses.sinkhorn(teacher.logits(), temperature, ALONE).unflatten(0, (taught, images))
            logits_VBK = HeadOutput(rows_MD, prototypes_KD).logits().unflatten(0, (views, images))
            pairs = losses.cross_entropies(logits_VBK, targets_GBK, 0.1)
        (pairs * weight).sum().backward()
        results.append((pairs.detach(), rows_MD.grad, prototypes_KD.grad))
    for ours, theirs in zip(*results, strict=True):
        near(ours, theirs)


def test_no_rows_are_no_loss_and_no_gradient(form):
    (targets,) = prototypes.sinkhorn([answer(0, 1)], 0.05, ALONE)
    rows_MD, prototypes_KD = (x.requires_grad_() for x in answer(0, 2))
    pairs = prototypes.cross_entropies(rows_MD[None], prototypes_KD, targets, 0.1)[0, 0]
    losses.ibot(pairs, torch.zeros(0), 4).backward()
    assert prototypes_KD.grad.abs().max() == 0


def test_low_precision_is_near():
    teacher, student = answer(30, 1), answer(30, 2)
    exact, low = (
        prototypes.cross_entropies(
            student.to(dtype).bottleneck_MD[None], student.to(dtype).prototypes_KD,
            prototypes.sinkhorn([teacher.to(dtype)], 0.07, ALONE)[0], 0.1,
        )
        for dtype in (torch.float32, torch.bfloat16)
    )  # fmt: skip
    torch.testing.assert_close(low, exact, rtol=0.02, atol=0.02)


def test_ranks_with_different_numbers_of_rows_are_one():
    whole = prototypes.sinkhorn([answer(10, 3)], 0.05, ALONE)[0].whole()
    for parts in zip(*on_ranks(2, _share, ([3, 7], [10, 0])), strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)


def _share(divisions):
    prototypes.CACHED, chunks.ROWS_ON_PROCESSOR, found = 0, 2, []
    rows_MD, prototypes_KD = answer(10, 3)
    ranks = Ranks(dist.sum_over_ranks, dist.max_over_ranks, dist.all_gather)
    for counts in divisions:
        mine = HeadOutput(rows_MD.split(counts)[dist.rank()], prototypes_KD)
        near(prototypes.means([mine], ranks)[0], (rows_MD @ prototypes_KD.T).mean(0))
        found.append(prototypes.sinkhorn([mine], 0.05, ranks)[0].whole())
    return found


def test_ranks_speak_once_a_round_however_many_chunks_and_heads_there_are(monkeypatch):
    """And once more in the first, whose sums have no bound that fp32 holds; of centring, once in all."""
    in_chunks(monkeypatch)
    spoken = []

    def counted(name):
        return lambda x: spoken.append((name, len(x))) or x

    ranks, both = Ranks(*map(counted, ("total", "largest", "gather"))), [answer(24, 0), answer(9, 1, count=30)]
    together = prototypes.sinkhorn(both, 0.05, ranks)
    assert spoken == [("largest", 70), *[("total", 70)] * 3]
    for ours, output in zip(together, both, strict=True):
        torch.testing.assert_close(ours.whole(), losses.sinkhorn(output.logits(), 0.05, ALONE), rtol=1e-4, atol=1e-6)
    spoken.clear()
    for ours, output in zip(prototypes.means(both, ranks), both, strict=True):
        near(ours, output.logits().mean(0))
    assert spoken == [("total", 2 * (16 + 1))]


def test_the_loss_reads_logits_a_few_times(monkeypatch):
    """All that is no product, on tensors without numbers: 5 times for Sinkhorn-Knopp, and once for each of student and
    teacher forward and backward."""
    monkeypatch.setattr(prototypes, "CACHED", 0)
    for name, value in (("ON_PROCESSOR", 2**24), ("PROTOTYPES_ON_PROCESSOR", 9999), ("ROWS_ON_PROCESSOR", 999)):
        monkeypatch.setattr(chunks, name, value)
    rows, count, dim = 2000, 30_000, 64
    with FakeTensorMode(), Moved() as moved:
        x, w = (torch.empty(n, dim, dtype=torch.bfloat16) for n in (rows, count))
        (targets,) = prototypes.sinkhorn([HeadOutput(x, w)], 0.05, ALONE)
        context = SimpleNamespace(save_for_backward=lambda *saved: setattr(context, "saved_tensors", saved))
        prototypes._CrossEntropies.forward(context, x[None], w, targets, 0.1)
        prototypes._CrossEntropies.backward(context, torch.empty(1, 1, rows))
    assert moved.bytes / (rows * count) == pytest.approx(2 * (5 + 2 + 2) + 2, rel=0.05)  # in bf16, and the gradient


class Moved(TorchDispatchMode):
    """Bytes of tensors that operations besides products and views take and give."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        is_view = any(returned.alias_info and not returned.alias_info.is_write for returned in function._schema.returns)
        if function.namespace != "prim" and function._opname != "mm" and not is_view:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
        return result


def test_golden_numbers_hold_however_they_are_streamed(shared, form):
    lines = list(parity.compare(shared("step_sinkhorn_separate.npz", "golden")))
    assert [line for line in lines if not line.holds] == []


def test_memory_does_not_grow_with_rows_times_prototypes(monkeypatch):
    monkeypatch.setattr(prototypes, "CACHED", 0)
    monkeypatch.setattr(chunks, "ROWS_ON_PROCESSOR", 16)
    monkeypatch.setattr(chunks, "ON_PROCESSOR", 512 * 256)
    peaks = []
    for rows, count in ((64, 4096), (512, 4096), (512, 8192)):
        teacher, student = answer(rows, 1, count), answer(rows, 2, count)
        student.prototypes_KD.requires_grad_()

        def learn(teacher=teacher, student=student):
            (targets,) = prototypes.sinkhorn([teacher], 0.05, ALONE)
            prototypes.cross_entropies(
                student.bottleneck_MD[None], student.prototypes_KD, targets, 0.1
            ).sum().backward()

        peaks.append(peak_memory(learn))
    whole, chunk = 4 * 512 * 8192, 4 * 512 * 256
    assert peaks[2] - peaks[1] < 4 * 4096 * 20  # the gradient of 4096 more prototypes, and their columns
    assert peaks[1] - peaks[0] < 6 * chunk
    assert peaks[2] < whole / 4


@pytest.mark.slow
def test_kernels_compile_for_gpus():
    assert output_of(COMPILE) == ["_row_sums", "_column_sums", "_cross_entropies", "_logit_gradients"]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from troodon.learn import kernels

sizes = {"views": 10, "teacher_views": 2, "V": 16, "M": 32, "N": 128}
for name in ("_row_sums", "_column_sums", "_cross_entropies", "_logit_gradients"):
    kernel = getattr(kernels, name)
    types = {n: "constexpr" if n in sizes else "fp32" if "temperature" in n else "*fp32" for n in kernel.arg_names}
    types |= {n: "i32" for n in types if "stride" in n or n in ("images", "prototypes")}
    types |= {"rows": "i32"} if name == "_column_sums" else {}
    constants = {(i,): sizes[n] for i, n in enumerate(kernel.arg_names) if n in sizes}
    triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    print(name)
"""
