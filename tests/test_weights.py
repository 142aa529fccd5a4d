"""Files of weights in every form that people have: what loads, with which rule for positions, and what is said."""

import argparse
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import troodon
from troodon.config import UsageError, fingerprint, to_dict
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.saved import SavedViT

State = dict[str, Tensor]
RELEASED = {"position_offset": 0.1, "position_antialias": False}
TINY = ViTConfig(dim=128, depth=2, heads=2, grid=4, **RELEASED)
WITH_REGISTERS = ViTConfig(dim=128, depth=2, heads=2, grid=4, registers=4)
GATED = ViTConfig(dim=128, depth=2, heads=2, grid=4, mlp="swiglu", **RELEASED)
IMAGES = torch.rand(2, 3, 28, 70, generator=torch.Generator().manual_seed(0))


def network(config: ViTConfig) -> Backbone:
    """A network whose tensors are all different, so that each must come to its place."""
    backbone = Backbone.random(config, Preprocessing(), seed=1)
    with torch.no_grad():
        for number, tensor in enumerate(backbone.vit.state_dict().values()):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    return Backbone.from_state_dict(backbone.vit.state_dict(), config, Preprocessing(), name="made")


def state_of(config: ViTConfig) -> State:
    return network(config).vit.state_dict()


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def assert_same(got: Backbone, config: ViTConfig) -> None:
    assert got.config == config
    expected = network(config).features(IMAGES)
    features = got.features(IMAGES)
    torch.testing.assert_close(features.cls, expected.cls)
    torch.testing.assert_close(features.patches, expected.patches)
    torch.testing.assert_close(features.registers, expected.registers)


def chunked(state: State) -> State:
    """Blocks as the trainer of DINOv2 keeps them: in two chunks, with the number of the whole network."""
    return {name.replace("blocks.0", "blocks.0.0").replace("blocks.1", "blocks.1.1"): t for name, t in state.items()}


def other(state: State) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


HEAD = {"dino_head.last_layer.weight_g": torch.ones(3, 1), "ibot_head.mlp.0.weight": torch.ones(2, 2)}
NESTED: dict[str, tuple[Callable[[State], object], str]] = {
    "plain": (lambda s: s, ""),
    "half": (lambda s: {n: t.double() for n, t in s.items()}, ""),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3}, ""),
    "model": (lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, ""),
    "student": (lambda s: {"student": s}, ""),
    "settings": (lambda s: {"model": s, "args": argparse.Namespace(lr=1.0)}, ""),
    "ddp": (lambda s: under("module.", s), ""),
    "compiled": (lambda s: under("_orig_mod.", s), ""),
    "blocks compiled": (lambda s: {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in s.items()}, ""),
    "backbone": (lambda s: under("backbone.", s), ""),
    "encoder": (lambda s: under("encoder.", s), ""),
    "chunks": (chunked, ""),
    "dino": (
        lambda s: {"student": under("module.backbone.", other(s)), "teacher": under("backbone.", s) | HEAD},
        "takes teacher.backbone; leaves student, teacher.dino_head, teacher.ibot_head",
    ),
    "teacher_checkpoint": (
        lambda s: {"teacher": under("backbone.", chunked(s)) | HEAD}, "leaves teacher.dino_head, teacher.ibot_head",
    ),
    "model_final.rank_0": (
        lambda s: {"model": under("student.backbone.", other(s)) | under("teacher.backbone.", s), "iteration": 9},
        "takes model.teacher.backbone; leaves model.student",
    ),
    "averaged": (
        lambda s: {"state_dict": other(s), "state_dict_ema": s}, "takes state_dict_ema; leaves state_dict",
    ),
    "linear classifier": (
        lambda s: under("backbone.", s) | {"linear_head.weight": torch.ones(5, 128)}, "leaves linear_head",
    ),
    "fine-tuned": (lambda s: s | {"head.weight": torch.ones(5, 128), "head.bias": torch.ones(5)}, "leaves head"),
}  # fmt: skip


@pytest.mark.parametrize("how", NESTED)
def test_the_network_is_found_wherever_it_lies_in_a_file(how, tmp_path, capsys):
    write, said = NESTED[how]
    torch.save(write(state_of(TINY)), tmp_path / "weights.pth")
    assert_same(troodon.load(tmp_path / "weights.pth"), TINY)
    assert capsys.readouterr().err == (f"{tmp_path / 'weights.pth'}: {said}\n" if said else "")


@pytest.mark.parametrize("name", ["a.pth", "a.PT", "a.bin", "a", "a.safetensors", "a.ckpt", "legacy.pth"])
@pytest.mark.parametrize("config", [TINY, WITH_REGISTERS, GATED])
def test_containers_are_told_by_what_is_in_them(name, config, tmp_path):
    state = state_of(config)
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=not name.startswith("legacy"))
    assert_same(troodon.load(tmp_path / name), config)


def test_weights_are_a_copy_of_the_file(tmp_path):
    torch.save(state_of(TINY), tmp_path / "a.pth")
    got = troodon.load(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(b"\0" * (tmp_path / "a.pth").stat().st_size)
    assert_same(got, TINY)


EIGHT = {  # dim, depth, heads, mlp as released; loaded with their own numbers of heads and MLPs, at depth 1
    "s": (384, "gelu"), "b": (768, "gelu"), "l": (1024, "gelu"), "g": (1536, "swiglu"),
}  # fmt: skip


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", EIGHT)
def test_the_released_shapes_are_recognised(size, registers, tmp_path):
    dim, mlp = EIGHT[size]
    config = ViTConfig(
        dim=dim, depth=1, heads=dim // 64, mlp=mlp, registers=registers, **({} if registers else RELEASED)
    )
    state = Backbone.random(config, Preprocessing()).vit.state_dict()
    torch.save(state, tmp_path / "a.pth")
    got = troodon.load(tmp_path / "a.pth")
    assert got.config == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in got.vit.state_dict().items())


def timm_of(state: State) -> State:
    """The same network as timm keeps it: see the comparison with timm itself in test_weights_oracles.py."""
    state = {name: tensor for name, tensor in state.items() if name != "mask_token"}
    state = {n.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2."): t for n, t in state.items()}
    if "register_tokens" in state:
        positions = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state |= {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return state


@pytest.mark.parametrize("config", [TINY, WITH_REGISTERS, GATED])
def test_timm_resizes_positions_exactly_and_with_antialias(config, tmp_path, capsys):
    save_file({n: t.contiguous() for n, t in timm_of(state_of(config)).items()}, tmp_path / "model.safetensors")
    sight = {"input_size": [3, 56, 56], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.875}
    description = {"architecture": "vit_small_patch14_dinov2", "pretrained_cfg": sight}
    (tmp_path / "config.json").write_text(json.dumps(description))
    got = troodon.load(tmp_path)
    assert (got.config.position_offset, got.config.position_antialias) == (0.0, True)
    assert got.preprocessing == Preprocessing(64, 56, (0.5,) * 3, (0.5,) * 3)
    assert "has no mask token" in capsys.readouterr().err
    square = torch.rand(1, 3, 56, 56)  # of the learned positions, which no rule changes
    torch.testing.assert_close(got.features(square).patches, network(config).features(square).patches)


def test_timm_may_keep_gate_and_value_apart(tmp_path):
    state = timm_of(state_of(GATED))
    for name in [n for n in state if ".mlp.fc1." in n]:
        gate, value = state.pop(name).chunk(2)
        state |= {name.replace("fc1", "fc1_g"): gate, name.replace("fc1", "fc1_x"): value}
    torch.save(state, tmp_path / "a.pth")
    square = torch.rand(1, 3, 56, 56)
    got = troodon.load(tmp_path / "a.pth").features(square)
    torch.testing.assert_close(got.patches, network(GATED).features(square).patches)


def test_a_vit_without_layer_scale_or_biases_is_the_same_network_with_ones_and_zeros(tmp_path, capsys):
    config = ViTConfig(dim=192, depth=1, heads=3, patch=8, grid=4, **RELEASED)
    plain = network(config).vit
    for name, tensor in plain.state_dict().items():
        if "gamma" in name or name.endswith("qkv.bias"):
            tensor.fill_("gamma" in name)
    state = {n: t for n, t in plain.state_dict().items() if "gamma" not in n and "qkv.bias" not in n}
    torch.save({n: t for n, t in state.items() if n != "mask_token"}, tmp_path / "dino_deitsmall8_pretrain.pth")
    got = troodon.load(tmp_path / "dino_deitsmall8_pretrain.pth")
    assert got.config == config
    assert torch.equal(got.features(IMAGES[..., :64, :64][:, :, :24]).cls, plain([IMAGES[:, :, :24, :64]])[0].cls_BD)
    said = capsys.readouterr().err
    assert "has no biases of attn.qkv: zeros; has no layer scale, as DINO's first version: ones" in said
    torch.save({n: t for n, t in state_of(TINY).items() if "gamma" not in n}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="128 channels: its number of heads is not known"):
        troodon.load(tmp_path / "a.pth")


def test_of_several_ranks_the_first_says_it(tmp_path, monkeypatch, capsys):
    torch.save(state_of(TINY) | {"head.weight": torch.ones(5, 128)}, tmp_path / "a.pth")
    for rank, said in (("1", ""), ("0", "leaves head")):
        monkeypatch.setenv("RANK", rank)
        troodon.load(tmp_path / "a.pth")
        assert capsys.readouterr().err == (f"{tmp_path / 'a.pth'}: {said}\n" if said else "")


def test_two_networks_of_one_rank_are_not_chosen_between(tmp_path):
    torch.save({"left": state_of(TINY), "right": state_of(TINY)}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"holds several networks \(left, right\); save one"):
        troodon.load(tmp_path / "a.pth")


def test_every_tensor_is_accounted_for(tmp_path):
    state = state_of(TINY)
    del state["norm.weight"]
    state |= {"norm.extra": torch.ones(1), "cls_token": torch.ones(1, 2, 128)}
    torch.save(state, tmp_path / "a.pth")
    expected = r"without norm\.weight; with the unknown norm\.extra; of another shape cls_token \(1, 2, 128\) instead"
    with pytest.raises(UsageError, match=expected):
        troodon.load(tmp_path / "a.pth")


def test_a_config_of_before_keeps_its_words_and_its_fingerprint(tmp_path):
    description = to_dict(TINY)
    assert description.keys() == {
        "dim", "depth", "heads", "patch", "grid", "registers", "mlp", "drop_path", "layer_scale", "position_offset",
        "position_antialias", "channels",
    }  # fmt: skip
    assert fingerprint(TINY) == "55e1724aaa62"
    wide = ViTConfig(dim=128, depth=1, heads=2, grid=4, mlp_width=100, norm_eps=1e-5)
    assert {name: to_dict(wide)[name] for name in ("mlp_width", "norm_eps")} == {"mlp_width": 100, "norm_eps": 1e-5}
    network(wide).save(tmp_path / "b")
    again = SavedViT.load(tmp_path / "b")
    assert (again.config, again.fingerprint) == (wide, network(wide).fingerprint)
    assert np.prod(again.vit.get_parameter("blocks.0.mlp.fc1.weight").shape) == 100 * 128
