"""The network: packs, stochastic depth, positions, numbers of parameters and of operations."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from troodon.dist import Share
from troodon.model.config import BASE, GIANT, LARGE, SMALL, ViTConfig, depth_group
from troodon.model.counts import flops
from troodon.model.head import Prototypes
from troodon.model.packing import Layout, attend, by_group, by_kernel, draw_kept, layout_of, pack, residual, unpack
from troodon.model.vit import Mlp, SwiGLU, ViT, gated, resize_positions

TINY = ViTConfig(dim=32, depth=3, heads=2, patch=4, grid=4, registers=2, layer_scale=0.5)


def network(config: ViTConfig) -> ViT:
    torch.manual_seed(0)
    vit = ViT(config)
    vit.initialize()
    return vit


def test_a_pack_gives_what_each_crop_size_alone_gives():
    vit = network(TINY).eval()
    wide, narrow = torch.randn(3, 3, 16, 16), torch.randn(5, 3, 8, 12)
    together = vit([wide, narrow])
    for tokens, images in zip(together, (wide, narrow), strict=True):
        (alone,) = vit([images])
        torch.testing.assert_close(tokens.cls_BD, alone.cls_BD)
        torch.testing.assert_close(tokens.patches_BPD, alone.patches_BPD)
        torch.testing.assert_close(tokens.registers_BRD, alone.registers_BRD)


def test_attention_does_not_cross_sequences():
    layout = Layout(((2, 3), (1, 4)))
    q, k, v = (torch.randn(10, 2, 8) for _ in range(3))
    before = attend(q, k, v, layout)
    k[3:6], v[3:6] = 7.0, 7.0  # the second sequence
    after = attend(q, k, v, layout)
    torch.testing.assert_close(before[:3], after[:3])
    torch.testing.assert_close(before[6:], after[6:])
    assert (before[3:6] - after[3:6]).abs().max() > 0.1


def test_attention_in_bf16_is_that_of_fp32():
    torch.manual_seed(0)
    layout = Layout(((2, 30), (3, 7)))
    q, k, v = (torch.randn(81, 2, 16) for _ in range(3))
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout)
    torch.testing.assert_close(half.float(), attend(q, k, v, layout), atol=0.03, rtol=0.03)


def test_pack_and_unpack_are_inverse():
    groups = [torch.randn(2, 5, 3), torch.randn(4, 2, 3)]
    for a, b in zip(groups, unpack(*pack(groups)), strict=True):
        assert torch.equal(a, b)


norm = torch.nn.Identity()  # of branches whose norm does not matter


def test_stochastic_depth_works_on_few_sequences():
    x, layout = pack([torch.randn(8, 3, 4), torch.randn(5, 2, 4)])
    for kept in draw_kept(layout, 0.4, 3, x.device):
        assert kept.layout.groups == ((4, 3), (3, 2))  # max(int(b * 0.6), 1) of each group, whole sequences
        assert kept.scales == (2.0, 5 / 3)
        seen = []
        out = residual(x, norm, lambda y, inner, seen=seen: seen.append(inner) or 2.0 * y, layout, kept)
        assert seen == [kept.layout]
        for y, z, gains in zip(unpack(out, layout), unpack(x, layout), ([0, 4], [0, 10 / 3]), strict=True):
            gained_B = ((y - z) / z).flatten(1).mean(1).sort().values
            expected = [gains[0]] * (len(y) // 2) + [gains[1]] * (len(y) - len(y) // 2)
            assert gained_B.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("groups", [((8, 3), (5, 2)), ((10, 3), (20, 2)), ((1, 4),)])
def test_stochastic_depth_has_the_expectation_and_the_gradients_of_its_masked_form(groups):
    """Over 3,000 draws, against the same branch on all sequences, multiplied by what each draw gives them."""
    torch.manual_seed(0)
    x, layout = pack([torch.randn(*group, 4) for group in groups])
    weight = torch.randn(4, 4).requires_grad_()
    x.requires_grad_()

    def branch(y, _):
        return (y @ weight).tanh()

    def gradients(out):
        return torch.autograd.grad(out.square().sum(), (x, weight))

    mean, count = torch.zeros_like(x), 3000
    for number, kept in enumerate(draw_kept(layout, 0.4, count, x.device)):
        ours = residual(x, norm, branch, layout, kept)
        mean += ours.detach() / count
        if number < 3:
            factor_T1 = torch.zeros(len(x), 1)
            for tokens, scale in zip(kept.tokens_T.split([b * n for b, n in kept.layout.groups]), kept.scales):
                factor_T1[tokens] = scale
            masked = x + factor_T1 * branch(x, layout)
            torch.testing.assert_close(ours, masked)
            for a, b in zip(gradients(ours), gradients(masked), strict=True):
                torch.testing.assert_close(a, b)
    torch.testing.assert_close(mean, (x + branch(x, layout)).detach(), atol=0.06, rtol=0.0)


def kept_crops(share: Share, views: tuple[int, ...], branches: int) -> list[set[tuple[int, int, int]]]:
    """Which (size, view, image of the step) each branch keeps of crops of one and of two tokens, and so on."""
    layout = Layout(tuple((count * len(share.images), length) for length, count in enumerate(views, start=1)))
    owner = [
        (size, view, image)
        for size, (count, length) in enumerate(zip(views, range(1, 9)))
        for view in range(count)
        for image in share.images
        for _ in range(length)
    ]
    drawn = draw_kept(layout, 0.4, branches, torch.device("cpu"), share)
    for kept in drawn:
        assert len(kept.tokens_T) == sum(n * length for n, length in kept.layout.groups)
    return [{owner[token] for token in kept.tokens_T.tolist()} for kept in drawn]


def test_stochastic_depth_is_drawn_by_image_whatever_rank_has_it():
    """Each rank and each part of one draws what the whole batch draws for its images."""
    whole = Share(7, 3, 96, range(96))  # in groups of 12
    drawn = kept_crops(whole, (2, 5), 6)
    assert len({frozenset(kept) for kept in drawn}) == 6
    for kept in drawn:
        for first in range(0, 96, 12):
            of_group = [size for size, _, image in kept if first <= image < first + 12]
            assert [of_group.count(0), of_group.count(1)] == [14, 36]  # int(24 * 0.6), 60 * 0.6
    for count in (2, 8, 12, 96):  # of which the last two cut groups
        parts = [kept_crops(share, (2, 5), 6) for share in whole.chunk(count)]
        assert [set().union(*of_branch) for of_branch in zip(*parts)] == drawn
    assert kept_crops(whole._replace(batch=4), (2, 5), 6) != drawn != kept_crops(whole._replace(seed=8), (2, 5), 6)


@pytest.mark.parametrize(("batch", "group"), [(2048, 16), (3072, 12), (64, 16), (24, 12), (22, 22), (6, 6), (45, 45)])
def test_groups_of_stochastic_depth_suit_powers_of_two(batch, group):
    assert depth_group(batch) == group


def test_drop_path_is_for_training_only():
    vit = network(dataclasses.replace(TINY, drop_path=0.5))
    images = torch.randn(6, 3, 16, 16)
    assert not torch.equal(vit([images])[0].cls_BD, vit([images])[0].cls_BD)
    vit.eval()
    assert torch.equal(vit([images])[0].cls_BD, vit([images])[0].cls_BD)


def test_masked_patches_are_not_seen():
    vit = network(TINY).eval()
    images = torch.randn(1, 3, 16, 16)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    changed = images.clone()
    changed[..., 4:8, 4:8] = 9.0  # patch 5: second row, second column
    (a,), (b,) = vit([images], [mask]), vit([changed], [mask])
    torch.testing.assert_close(a.cls_BD, b.cls_BD)
    (c,) = vit([changed])
    assert (a.cls_BD - c.cls_BD).abs().max() > 1e-4


def test_positions_at_their_own_grid_are_untouched_and_otherwise_resized():
    positions = torch.randn(1, 17, 32)
    cls, patches = resize_positions(positions, (4, 4), TINY)
    assert torch.equal(torch.cat([cls, patches], 1), positions)
    assert resize_positions(positions, (3, 7), TINY)[1].shape == (1, 21, 32)
    flat = resize_positions(torch.ones(1, 17, 32), (6, 5), TINY)[1]
    torch.testing.assert_close(flat, torch.ones(1, 30, 32))


def test_an_image_that_patches_do_not_divide_is_refused_by_name():
    with pytest.raises(ValueError, match="18 x 16 pixels does not divide into patches of 4"):
        network(TINY)([torch.randn(1, 3, 16, 18)])


@pytest.mark.parametrize(
    ("config", "millions"), [(SMALL, 22.1), (BASE, 86.6), (LARGE, 304.4), (dataclasses.replace(GIANT), 1136.5)]
)
def test_sizes_have_the_published_numbers_of_parameters(config, millions):
    with torch.device("meta"):
        vit = ViT(config)
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, rel=0.002)
    assert config.dim // config.heads == 64


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_flops_are_those_that_torch_counts(mlp):
    config = dataclasses.replace(TINY, mlp=mlp)
    vit = network(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit([torch.randn(1, 3, 20, 12)])
    # Attention's products are counted by hand where the fused kernel hides them from the counter.
    tokens = 1 + config.registers + 15
    attention = 2 * config.depth * 2 * tokens * tokens * config.dim
    resizing = 0
    assert flops(config, (5, 3)) in (counter.get_total_flops(), counter.get_total_flops() + attention + resizing)


def test_every_parameter_is_initialised():
    with torch.device("meta"):
        vit = ViT(TINY)
    vit = vit.to_empty(device="cpu")
    for p in vit.parameters():
        torch.nn.init.constant_(p, float("nan"))
    vit.initialize()
    assert [n for n, p in vit.named_parameters() if not p.isfinite().all()] == []


def whole_matrix(q, k, v, layout):
    """Attention over all of the pack at once, masked between sequences."""
    lengths = torch.tensor(layout.lengths)
    owner_T = torch.arange(len(lengths)).repeat_interleave(lengths).to(q.device)
    scores = torch.einsum("tnh,snh->nts", q.float(), k.float()) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(owner_T[:, None] != owner_T, float("-inf"))
    return torch.einsum("nts,snh->tnh", scores.softmax(-1), v.float())


@pytest.mark.parametrize(
    ("form", "device", "dtype"),
    [
        (by_group, "cpu", torch.float32),
        (by_group, "cpu", torch.bfloat16),
        pytest.param(by_group, "cuda", torch.float32, marks=pytest.mark.gpu),
        pytest.param(by_group, "cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param(by_kernel, "cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_every_form_of_attention_is_the_same_in_value_and_gradient(form, device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    layout = layout_of(((3, 65), (8, 17)), torch.device(device))
    tokens, results = sum(layout.lengths), []
    given = [torch.randn(tokens, 4, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(4)]
    for attention in (form, whole_matrix):
        out = attention(*given[:3], layout).float()
        results.append([out, *torch.autograd.grad((out * given[3]).sum(), given[:3])])
    tolerance = 1e-4 if dtype == torch.float32 and device == "cpu" else 3e-2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("low", [False, True])
def test_what_the_backward_pass_makes_again_has_the_gradients_of_its_plain_form(mlp, low):
    """The MLP, whose activation is not kept, and prototypes, whose directions are not."""
    torch.manual_seed(0)
    layers = {"gelu": Mlp, "swiglu": SwiGLU}[mlp](dataclasses.replace(TINY, mlp=mlp))
    head = Prototypes(48, 16)
    for p in [*layers.parameters(), *head.parameters()]:
        torch.nn.init.normal_(p, std=0.5)
    x, gradients = torch.randn(6, 32, requires_grad=True), []
    first, activation, last = (
        (layers.fc1, torch.nn.functional.gelu, layers.fc2) if mlp == "gelu" else (layers.w12, gated, layers.w3)
    )
    for ours in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = layers(x) if ours else last(activation(first(x)))
            w = head() if ours else head.weight_g * head.weight_v / head.weight_v.norm(dim=1, keepdim=True)
        loss = y.float().square().sum() + (w * torch.linspace(-1, 1, 16)).pow(3).sum()
        gradients.append(torch.autograd.grad(loss, [x, *layers.parameters(), *head.parameters()]))
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2 if low else 1e-5, atol=2e-2 * float(b.abs().max()) if low else 1e-4)


@pytest.mark.parametrize("change", [{}, {"positions": "rotary", "dim": 64}, {"registers": 0}, {"drop_path": 0.4}])
def test_without_patches_class_tokens_and_gradients_are_the_same_for_less(change):
    config = dataclasses.replace(TINY, **change)
    crops, share = [torch.randn(6, 3, 16, 16), torch.randn(6, 3, 8, 12)], Share(3, 0, 6, range(6))
    found = []
    for patches in (True, False):
        vit, rows = network(config).train(), []
        hook = vit.blocks[-1].mlp.fc1.register_forward_hook(lambda *of, rows=rows: rows.append(len(of[1][0])))
        tokens = vit(crops, share=share, patches=patches)
        hook.remove()
        (tokens[0].cls_BD.square().sum() + (tokens[1].cls_BD * tokens[1].registers_BRD.sum(1)).sum()).backward()
        gradients = [p.grad for p in vit.parameters() if p.grad is not None]
        found.append(([*(t.cls_BD for t in tokens), *(t.registers_BRD for t in tokens), *gradients], rows))
    (whole, all_rows), (spared, rows) = found
    torch.testing.assert_close(spared, whole)
    assert rows == ([12 * (1 + config.registers)] if not config.drop_path else all_rows)
    assert rows <= all_rows
