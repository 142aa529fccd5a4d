"""The ViT as others use one: a tensor in, class tokens out; in DDP, compiled, traced, and as a graph for any size."""

import dataclasses
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import on_ranks
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.positions import resize_by_products
from troodon.model.vit import ViT

PLAIN = ViTConfig(dim=64, depth=2, heads=2, patch=14, grid=4, layer_scale=0.5)
RELEASED = dataclasses.replace(PLAIN, depth=1, position_offset=0.1, position_antialias=False)
GATED = dataclasses.replace(PLAIN, depth=1, mlp="swiglu", registers=2, channels=1)
ROTARY = dataclasses.replace(PLAIN, depth=1, positions="rope", norm_eps=1e-5, registers=1)
NETWORKS = pytest.mark.parametrize(
    "config", [PLAIN, RELEASED, GATED, ROTARY], ids=["plain", "released", "gated", "rotary"]
)
SIZES = ((2, 28, 42), (1, 28, 42), (3, 56, 56), (2, 42, 28), (5, 28, 140))


def made(config: ViTConfig) -> Backbone:
    """A network in which every parameter counts, positions too."""
    backbone = Backbone.random(config, Preprocessing(64, 56, (0.5,) * config.channels, (0.2,) * config.channels))
    generator = torch.Generator().manual_seed(1)
    for parameter in backbone.vit.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return backbone


def images(config: ViTConfig, size: tuple[int, int, int]) -> Tensor:
    count, height, width = size
    return torch.randn(count, config.channels, height, width, generator=torch.Generator().manual_seed(2))


def assert_same_at_all_sizes(run, vit: ViT) -> None:
    for size in SIZES:
        x_BCHW = images(vit.config, size)
        torch.testing.assert_close(run(x_BCHW), vit(x_BCHW), atol=2e-5, rtol=1e-5)


@NETWORKS
def test_a_tensor_gives_class_tokens_and_a_list_all_tokens(config):
    vit, x_BCHW = made(config).vit, images(config, (2, 28, 42))
    assert isinstance(vit, torch.nn.Module)
    (tokens,) = vit([x_BCHW])
    assert torch.equal(vit(x_BCHW), tokens.cls_BD)
    assert tokens.patches_BPD.shape == (2, 6, 64)


@NETWORKS
def test_one_exported_graph_serves_any_number_of_images_of_any_size(config):
    vit = made(config).vit
    for rows, columns in ((Dim.AUTO, Dim.AUTO), (14 * Dim("rows", min=2), 14 * Dim("columns", min=2))):
        shapes = ({0: Dim.AUTO if rows is Dim.AUTO else Dim("images"), 2: rows, 3: columns},)
        graph = torch.export.export(vit, (images(config, (2, 28, 42)),), dynamic_shapes=shapes)
        assert_same_at_all_sizes(graph.module(), vit)


@NETWORKS
def test_it_compiles_whole_and_traces(config):
    torch.compiler.reset()  # graphs of other networks count against the limit
    vit = made(config).vit
    assert_same_at_all_sizes(torch.compile(vit, fullgraph=True, backend="eager"), vit)
    x_BCHW = images(config, (2, 28, 42))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(vit, x_BCHW)
    torch.testing.assert_close(traced(x_BCHW), vit(x_BCHW), atol=2e-5, rtol=1e-5)


def _two_steps_in_ddp() -> list[Tensor]:
    vit = made(PLAIN).vit.requires_grad_(True)
    network = DistributedDataParallel(vit)
    for _ in range(2):  # the second step fails where the first left a gradient out
        network(images(PLAIN, (2, 28, 42))).square().sum().backward()
    return [parameter.grad for parameter in vit.parameters()]


def test_it_learns_in_ddp():
    for gradients in on_ranks(2, _two_steps_in_ddp):
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert gradients[0].abs().max() > 0


@pytest.mark.parametrize(("offset", "antialias"), [(0.0, False), (0.0, True), (0.1, False), (0.1, True)])
def test_positions_by_products_are_those_of_interpolate(offset, antialias):
    for count, grid in itertools.product((2, 4, 16, 37), ((16, 23), (37, 5), (4, 9), (50, 70), (1, 1))):
        learned_NND = 0.25 * torch.randn(count, count, 8, generator=torch.Generator().manual_seed(3))
        size = {"scale_factor": tuple((side + offset) / count for side in grid)} if offset else {"size": grid}
        image = learned_NND.permute(2, 0, 1)[None]
        expected = F.interpolate(image, mode="bicubic", antialias=antialias, **size)[0].permute(1, 2, 0)
        got = resize_by_products(learned_NND, grid, offset, antialias)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        own = resize_by_products(learned_NND, (count, count), offset, antialias)
        torch.testing.assert_close(own, learned_NND, atol=1e-6, rtol=0)
