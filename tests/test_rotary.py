"""Rotary positions in a pack, with masks and stochastic depth; and networks with them, which learn and teach."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import troodon
from tests.test_distill import STUDENT, images
from tests.test_pretrain import CONFIG, weights
from troodon import cli, distill, pretrain
from troodon.config import UsageError
from troodon.learn import cost
from troodon.learn.objective import ObjectiveConfig
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.packing import KeptSequences, layout_of, residual
from troodon.model.rotary import RotaryPositions, periods, turned
from troodon.model.vit import ViT

__all__ = ["images"]  # a fixture
TINY = ViTConfig(dim=32, depth=2, heads=2, patch=4, registers=2, layer_scale=1.0, positions="rope")
GROUPS = [(3, 16, 16), (2, 8, 20), (1, 4, 4)]


def made(config: ViTConfig = TINY) -> ViT:
    vit = ViT(config)
    vit.initialize()
    with torch.no_grad():
        for number, parameter in enumerate(vit.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return vit


def pictures() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, height, width, generator=draw) for count, height, width in GROUPS]


def test_a_turn_keeps_lengths_and_sees_only_differences_of_places():
    rotary = RotaryPositions(TINY)
    rotary.initialize()
    assert torch.equal(rotary.periods, torch.tensor([1.0, 100**0.25, 10.0, 100**0.75]))
    rotation_L2F = rotary((4, 8), 3)
    assert rotation_L2F.shape == (3 + 32, 2, 8)
    q_LNH, k_LNH = torch.randn(2, 1, 2, 16).expand(2, 35, 2, 16)
    q, k = turned(q_LNH, rotation_L2F), turned(k_LNH, rotation_L2F)
    torch.testing.assert_close(q.norm(dim=-1), q_LNH.norm(dim=-1))
    assert torch.equal(q[:3], q_LNH[:3])  # the class token and the registers do not turn
    scores_hwhw = (q[3:, 0] @ k[3:, 0].T).unflatten(1, (4, 8)).unflatten(0, (4, 8))
    torch.testing.assert_close(scores_hwhw[0, 0, 2, 3], scores_hwhw[1, 4, 3, 7])
    assert not torch.isclose(scores_hwhw[0, 0, 2, 3], scores_hwhw[0, 0, 3, 2])
    torch.testing.assert_close(periods(4, base=16.0), torch.tensor([1.0, 2.0, 4.0, 8.0]))


def test_places_are_relative_to_the_image():
    rotary = RotaryPositions(TINY)
    rotary.initialize()
    small, large = rotary((1, 2), 0), rotary((3, 6), 0).unflatten(0, (3, 6))
    torch.testing.assert_close(small[0], large[1, 1])  # the middle of each half
    torch.testing.assert_close(small[1], large[1, 4])
    torch.testing.assert_close(small[1, 0], torch.tensor([1.0] * 4 + [-1.0, 0.5458, 0.9511, 0.9951]), atol=1e-4, rtol=0)


def test_images_of_all_sizes_in_one_pack_are_as_alone():
    vit, groups = made(), pictures()
    masks = [torch.rand(x.shape[0], x.shape[2] * x.shape[3] // 16) < 0.3 for x in groups]
    for x, mask, tokens in zip(groups, masks, vit(groups, masks), strict=True):
        for row in range(len(x)):
            (alone,) = vit([x[row : row + 1]], [mask[row : row + 1]])
            for together, single in zip(tokens, alone, strict=True):
                torch.testing.assert_close(together[row : row + 1], single)


def test_places_matter():
    vit, x = made(), torch.randn(1, 3, 16, 16)
    (straight,), (mirrored,) = vit([x]), vit([x.flip(3)])
    assert (straight.cls_BD - mirrored.cls_BD).abs().max() > 1e-3


def test_stochastic_depth_turns_the_tokens_that_it_keeps():
    vit, groups = made(), pictures()
    x_TD, layout = vit.packed(groups)
    block = vit.blocks[0]
    chosen = [[0, 2], [1], [0]]
    parts, start = [], 0
    for rows, (count, length) in zip(chosen, layout.groups, strict=True):
        parts += [torch.arange(length) + start + row * length for row in rows]
        start += count * length
    inner = tuple((len(rows), length) for rows, (_, length) in zip(chosen, layout.groups, strict=True))
    kept = KeptSequences(torch.cat(parts), layout_of(inner, x_TD.device), (1.0,) * 3)
    got = residual(x_TD, torch.nn.Identity(), lambda x, layout: block.attn(x, layout), layout, kept)
    few_TD, few = vit.packed([x[rows] for x, rows in zip(groups, chosen, strict=True)])
    expected = x_TD.index_add(0, kept.tokens_T, block.attn(few_TD, few))
    torch.testing.assert_close(got, expected)


def test_keys_have_no_bias_whatever_they_learn():
    vit = made()
    qkv = vit.blocks[0].attn.qkv
    before = vit(pictures())[0].cls_BD
    with torch.no_grad():
        qkv.bias[32:64] += 1.0
    torch.testing.assert_close(vit(pictures())[0].cls_BD, before)
    before.sum().backward()
    assert not qkv.bias.grad[32:64].any()
    assert qkv.bias.grad[64:].any()


def test_inference_is_the_same(tmp_path):
    plain = Backbone.from_state_dict(made().state_dict(), TINY, Preprocessing(16, 16), name="made")
    with torch.no_grad():
        for block in plain.vit.blocks:
            block.attn.qkv.bias[32:64] = 0.0  # as it is after training and loading
    x = torch.randn(2, 3, 16, 24)
    exact = plain.features(x)
    for compute, tolerance in (("fp32", 1e-5), ("bf16", 2e-2)):
        got = plain.optimized(compute).features(x)
        assert (got.patches - exact.patches).norm() <= tolerance * exact.patches.norm()
    plain.save(tmp_path / "b")
    again = troodon.load(tmp_path / "b")
    assert again.config == TINY
    assert torch.equal(again.features(x).cls, exact.cls)


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_a_compiled_block_is_the_same():
    vit, x = made(replace(TINY, drop_path=0.5)), torch.randn(4, 3, 16, 16)
    torch.manual_seed(0)
    (plain,) = vit([x])
    for block in vit.blocks:
        block.compile(dynamic=False, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    torch.testing.assert_close(vit([x])[0].cls_BD, plain.cls_BD)


def test_the_parameters_are_counted():
    for config in (TINY, replace(TINY, mlp="swiglu", mlp_width=72), replace(TINY, positions="learned", grid=4)):
        assert cost.backbone_parameters(config) == sum(p.numel() for p in ViT(config).parameters())


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match=r"vit\.positions rope: 6 channels a head do not divide by 4; vit\.dim 16"):
        ViTConfig(dim=12, heads=2, positions="rope")


ROPE = replace(CONFIG, vit=replace(CONFIG.vit, positions="rope", registers=1, drop_path=0.2))


def test_a_network_with_rotary_positions_learns_and_teaches(images, tmp_path, capsys):
    pretrain(ROPE, images, tmp_path / "once", settings={"steps": 4})
    learned = weights(tmp_path / "once")
    assert torch.equal(learned["rope_embed.periods"], periods(len(learned["rope_embed.periods"])))
    width = ROPE.vit.dim
    assert not any(t[width : 2 * width].any() for name, t in learned.items() if name.endswith("qkv.bias"))
    features = ObjectiveConfig(terms=(("cls_features", 1.0), ("patch_features", 0.5)))
    student = replace(STUDENT, objective=features, steps=2)
    distill(student, tmp_path / "once", images, tmp_path / "student")
    assert troodon.load(tmp_path / "student").config.positions == "learned"
    capsys.readouterr()
    out = tmp_path / "out"
    assert cli.run(["export", str(tmp_path / "once"), "--to", "timm", "--out", f"{out}.safetensors"]) == 2
    assert (
        "--to timm: Troodon writes no rotary positions under its names; --to huggingface, onnx, torch"
        in capsys.readouterr().err
    )
