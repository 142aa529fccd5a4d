"""The convolutional stem: its size, its statistics on any number of ranks, its export, and what refuses it."""

from dataclasses import replace

import pytest
import torch

from tests.ranks import on_ranks
from troodon import dist
from troodon.config import UsageError
from troodon.learn.cost import backbone_parameters
from troodon.model.backbone import Backbone
from troodon.model.channels import with_channels
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.stem import BatchNorm
from troodon.model.vit import ViT

TINY = ViTConfig(dim=32, depth=1, heads=2, patch=8, grid=4, stem="convolutional")


def network(config: ViTConfig = TINY) -> ViT:
    torch.manual_seed(0)
    vit = ViT(config)
    vit.initialize()
    return vit


OTHERS = [replace(TINY, patch=16, dim=24, channels=1), replace(TINY, stem_width=80), replace(TINY, stem="linear")]


@pytest.mark.parametrize("config", [TINY, *OTHERS])
def test_the_plan_counts_every_parameter_of_the_stem(config):
    assert backbone_parameters(config) == sum(p.numel() for p in network(config).parameters())


def test_each_patch_gets_a_vector_from_what_is_around_it():
    vit, image = network().eval(), torch.randn(1, 3, 32, 48)
    before = vit.patch_embed(image)
    assert before.shape == (1, 4 * 6, 32)
    image[:, :, :8, :8] += 1
    changed = (vit.patch_embed(image) - before).abs().sum(2)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [0, 1, 6, 7]  # its own patch, and its neighbours by their padding


def test_a_patch_that_is_no_power_of_2_is_refused():
    with pytest.raises(UsageError, match="patch 14 is no power of 2; set 16"):
        replace(TINY, patch=14)


def test_a_stem_can_be_wider_than_a_token_and_a_linear_one_has_no_width():
    widths = [c.out_channels for c in network(replace(TINY, stem_width=80)).patch_embed.convolutions]
    assert widths == [20, 40, 80]
    with pytest.raises(UsageError, match="stem_width 80 is of a convolutional stem: set vit"):
        replace(TINY, stem_width=80, stem="linear")


def norm() -> BatchNorm:
    layer = BatchNorm(4)
    layer.initialize()
    return layer


def test_batch_norm_is_torchs():
    ours, theirs, x = norm(), torch.nn.BatchNorm2d(4), 3 * torch.randn(5, 4, 2, 3) + 1
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_batch_norm_that_does_not_learn_keeps_its_statistics():
    layer = norm().requires_grad_(False)
    layer(torch.randn(5, 4, 2, 3) + 7)
    assert layer.running_mean.tolist() == [0, 0, 0, 0]


def of_one_rank() -> list[list[float]]:
    torch.manual_seed(3)
    x, weights = torch.randn(4, 4, 2, 3) * 2 + 1, torch.randn(4, 4, 2, 3)
    first = dist.rank() * (4 // dist.world_size())
    layer, mine = norm(), x[first : first + 4 // dist.world_size()].clone().requires_grad_()
    (layer(mine) * weights[first : first + len(mine)]).sum().backward()
    gradient = dist.all_gather(mine.grad)
    for parameter in (layer.weight, layer.bias):
        parameter.grad = dist.sum_over_ranks(parameter.grad)
    return [t.flatten().tolist() for t in (gradient, layer.weight.grad, layer.running_mean, layer.running_var)]


def test_batch_norm_on_two_ranks_is_that_on_one():
    alone = of_one_rank()
    for results in on_ranks(2, of_one_rank):
        for got, expected in zip(results, alone, strict=True):
            torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_other_channels_are_refused():
    backbone = Backbone.from_state_dict(network().state_dict(), TINY, Preprocessing(), name="mine", digest="1")
    with pytest.raises(UsageError, match="mine: its convolutional stem is for 3 channels"):
        with_channels(backbone, (0.5,), (0.5,))
