"""What a step does, counted on tensors without numbers: for a small network, and for operations that are known."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from troodon.learn.cost import Cost
from troodon.learn.plan import grids


@pytest.fixture
def counting(run_script) -> SimpleNamespace:
    return SimpleNamespace(**run_script("counting.py", "counting"))


@pytest.fixture
def anatomy(run_script) -> SimpleNamespace:
    return SimpleNamespace(**run_script("anatomy.py", "anatomy"))


def test_bytes_of_known_operations(counting):
    """Reads what it takes and writes what it changes or returns; views are free; products are counted apart."""
    kilobyte = 4 * 256
    with counting.pretend_gpu() as mode:
        x, y, rows = (torch.empty(16, 16) for _ in range(3))
        index = torch.empty(4, dtype=torch.int64)
        cases = {
            "add": (lambda: x + y, 3),
            "in place": (lambda: x.mul_(2), 2),
            "fill": (lambda: x.zero_(), 1),
            "copy": (lambda: x.copy_(y), 2),
            "view": (lambda: x.T.unflatten(0, (4, 4))[0], 0),
            "expanded": (lambda: x + y[:1].expand(16, 16), 2 + 1 / 16),
            "some rows": (lambda: rows.index_select(0, index), 2 / 4 + 32 / kilobyte),
            "half": (lambda: x.bfloat16(), 1.5),
            "product": (lambda: x @ y, 0),
        }
        for name, (operation, passes) in cases.items():
            with counting.Counter(mode) as counter:
                operation()
            assert counter.counts.non_product_bytes == passes * kilobyte, name
        assert counter.counts.flops == 2 * 16**3
        assert counter.counts.product_bytes == 3 * kilobyte


def test_memory_is_that_of_tensors_that_live(counting):
    with counting.pretend_gpu() as mode, counting.Counter(mode) as counter:
        a = torch.empty(1000)
        b = a + 1
        del a
        c = b + 1
        assert counter.counts.peak_memory == 8000
        del b, c
        assert counter.live == 0


def test_a_wait_of_the_host_is_counted(counting, monkeypatch):
    """As this package's code would make it: a function that stands in a file of it."""
    waits = {
        "x.item()": 1,
        "x.to('cpu')": 1,
        "bool(x)": 1,
        "x.new_tensor(1.0)": 1,
        "torch.ones(3).to(x.device)": 1,
        "torch.ones(3).to(x.device, non_blocking=True)": 0,
        "torch.full((), 1.0, device=x.device)": 0,
        "x + 1": 0,
        "torch.ones(3).tolist()": 0,
    }
    with counting.pretend_gpu() as mode:
        x = torch.empty(())
        for code, expected in waits.items():
            with counting.Counter(mode) as counter:
                eval(compile(code, f"{counting.PACKAGE}learn/made_up.py", "eval"), {"x": x, "torch": torch})
            assert sum(counter.counts.host_reads.values()) == expected, code


def test_a_step_waits_for_the_verdict_alone_and_moves_few_bytes(anatomy):
    """By the paths for a GPU: one wait, three rounds of Sinkhorn-Knopp for each of two heads, whole logits never."""
    config = anatomy.quick_config()
    counts, collectives = anatomy.count_step(config, None)
    assert {place: n for place, n in counts.host_reads.items() if n} == {("learn/loop.py", "to"): 1}
    # Of three rounds for both heads, and the verdict; class tokens for KoLeo.
    assert collectives == {"maxima": 1, "sums": 3 + 1, "gathered rows": 1}
    assert counts.products["_varlen_attn"]
    # What is no product moves little, by the size of the products; and the loss, by the number of its logits.
    assert 0 < counts.non_product_bytes < 12 * counts.product_bytes
    ((wide, narrow, _),) = grids(config)
    uses = Cost(config, wide, narrow, "cuda", 2, 1).uses.values()
    logits = sum((use.student_rows + use.teacher_rows) * use.head.prototypes for use in uses)
    found = anatomy.numbers(counts, collectives, config.batch, anatomy.DEVICES["h100"])
    assert found["loss_bytes"][0] < 40 * logits


@pytest.mark.filterwarnings("ignore::UserWarning")  # of FSDP, about views
def test_sharding_is_counted(anatomy):
    """Of two machines: two blocks, what else the backbone has, and two heads. Each is gathered forward and back, and
    forward for the teacher; its gradient is summed inside of a machine, and then its shard between machines."""
    config = replace(anatomy.quick_config(), batch=4 * 16)
    counts, collectives = anatomy.count_step(config, None, 16)
    assert counts.collectives == {"_allgather_base_": 3 * 5, "_reduce_scatter_base_": 5, "allreduce_": 5}
    parameters = sum(Cost(config, *grids(config)[0][:2], "cuda", 2, 16).parameters.values())
    both, shard = 2 * parameters, parameters / 8  # gathered in bf16; gradients in fp32
    assert counts.collective_bytes == pytest.approx(3 * both + 4 * parameters + 4 * shard, rel=0.02)
    assert sum(collectives.values()) == 6
    assert not torch.distributed.is_initialized()


def test_a_step_of_a_small_recipe_waits_for_the_verdict_alone(anatomy):
    """Crops of mixed sizes, a convolutional stem, contrast and a projector."""
    counts, _ = anatomy.count_step(*anatomy.config_of("small", 4, 1))
    assert {place: n for place, n in counts.host_reads.items() if n} == {("learn/loop.py", "to"): 1}
