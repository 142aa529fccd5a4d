"""Equal to the reference implementation: golden files, and the initial loss that can be worked out by hand."""

import math

import pytest
import torch

from tests import parity
from troodon.learn import losses
from troodon.learn.losses import ALONE
from troodon.model.config import HeadConfig
from troodon.model.head import Head


@pytest.mark.parametrize("name", ["forward_interp.npz", "step_sinkhorn_separate.npz"])
def test_golden_numbers_hold(shared, name):
    lines = list(parity.compare(shared(name, "golden")))
    assert len(lines) > 20
    assert [line for line in lines if not line.holds] == []


def test_a_wrong_network_is_told(shared, tmp_path):
    import numpy as np

    with np.load(shared("forward_interp.npz", "golden")) as file:
        golden = dict(file)
    golden["offset/state/blocks.1.mlp.fc1.weight"] = golden["offset/state/blocks.1.mlp.fc1.weight"] * 1.01
    np.savez(tmp_path / "wrong.npz", **golden)
    assert parity.main([str(tmp_path / "wrong.npz")]) == 1


@pytest.mark.parametrize(("prototypes", "bottleneck"), [(65_536, 256), (131_072, 384)])
def test_initial_dino_loss_is_ln_k_plus_100_over_2_bottlenecks(prototypes, bottleneck):
    torch.manual_seed(0)
    head = Head(64, HeadConfig(prototypes, 128, bottleneck))
    head.initialize()
    x = torch.randn(96, 64)
    with torch.no_grad():
        student, teacher = head(x).logits(), losses.sinkhorn(head(x.roll(1, 0)).logits(), 0.04, ALONE)
        loss = losses.cross_entropies(student[None], teacher[None], 0.1).mean()
    assert loss == pytest.approx(math.log(prototypes) + 100 / (2 * bottleneck), abs=0.04)  # of one draw of the weights
