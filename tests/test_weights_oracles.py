"""The same features, and gradients, as the libraries that weights come from: transformers and timm.

timm is in no extra, since it needs torchvision, which does not import beside a torch without CUDA: a stub lets it.
"""

import json
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import troodon
from troodon.config import UsageError
from troodon.model.backbone import Backbone
from troodon.model.layouts import complete, find_network

SIZES = ((224, 224), (518, 518), (98, 154))


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    """transformers (Apache-2.0) as an oracle; the test is skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    """timm (Apache-2.0) as an oracle; the test is skipped where it is not installed."""
    if not find_spec("timm") or not find_spec("torchvision"):
        pytest.skip("needs timm and torchvision, which are in no extra")
    global library  # operations last as long as their library
    library = torch.library.Library("torchvision", "DEF")
    for operation in ("nms", "qnms"):  # which torchvision registers, and does not have without CUDA
        library.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("timm")


def made(model: Any) -> Any:
    """The model with all its parameters drawn, so that none is zero and positions matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(size: tuple[int, int], count: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest number."""
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_same_tokens(backbone: Backbone, expected_BLD: Tensor, x_BCHW: Tensor) -> None:
    f = backbone.features(x_BCHW)
    assert_close(torch.cat([f.cls[:, None], f.registers, f.patches.flatten(1, 2)], dim=1), expected_BLD)


def assert_same_gradients(backbone: Backbone, model: Any, x_BCHW: Tensor, masks: Tensor | None = None) -> None:
    """Gradients of all tokens, by the image and by every parameter."""
    vit, (ours, theirs) = backbone.vit.requires_grad_(True), (x_BCHW.clone().requires_grad_() for _ in range(2))
    (tokens,) = vit([ours], [masks])
    tokens_BLD = torch.cat([tokens.cls_BD[:, None], tokens.registers_BRD, tokens.patches_BPD], dim=1)
    weights_BLD = torch.randn(tokens_BLD.shape, generator=torch.Generator().manual_seed(2))
    (tokens_BLD * weights_BLD).sum().backward()
    output_BLD = model(theirs, bool_masked_pos=masks).last_hidden_state
    assert_close(tokens_BLD, output_BLD)
    (output_BLD * weights_BLD).sum().backward()
    assert_close(ours.grad, theirs.grad)
    layout = find_network({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, "gradients")
    complete(layout, "gradients")
    for name, parameter in vit.named_parameters():
        if name != "mask_token" or masks is not None:
            assert_close(parameter.grad, layout.state[name])


WIDTHS = {"small": 384, "base": 768, "large": 1024, "giant": 1536}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", WIDTHS)
def test_dinov2_of_transformers(size, registers, transformers, tmp_path):
    dim = WIDTHS[size]
    numbers = {
        "hidden_size": dim, "num_attention_heads": dim // 64, "num_hidden_layers": 2 if dim < 1000 else 1,
        "image_size": 518, "patch_size": 14, "use_swiglu_ffn": size == "giant",
    }  # fmt: skip
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**numbers, num_register_tokens=registers)
        model = made(transformers.Dinov2WithRegistersModel(config))
    else:
        model = made(transformers.Dinov2Model(transformers.Dinov2Config(**numbers)))
    model.save_pretrained(tmp_path)
    backbone = troodon.load(tmp_path)
    for side in SIZES:
        with torch.no_grad():
            assert_same_tokens(backbone, model(images(side)).last_hidden_state, images(side))
    masks = torch.rand(2, 77, generator=torch.Generator().manual_seed(3)) < 0.3
    assert_same_gradients(backbone, model, images(SIZES[-1], 2), masks)


TINY = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "image_size": 56, "patch_size": 14}


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": False},
        {"layer_norm_eps": 1e-3},
        {"mlp_ratio": 3},
        {"mlp_ratio": 2, "use_swiglu_ffn": True},
        {"use_mask_token": False},
        {"layerscale_value": 0.1, "drop_path_rate": 0.3},
        {"num_attention_heads": 8},
        {"num_channels": 4, "patch_size": 8, "image_size": 64},
        {"image_size": [56, 56], "patch_size": [14, 14]},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_fields_of_a_config_are_followed(changes, transformers, tmp_path):
    model = made(transformers.Dinov2Model(transformers.Dinov2Config(**(TINY | changes))))
    model.save_pretrained(tmp_path)
    x = torch.randn(2, changes.get("num_channels", 3), 56, 112)
    with torch.no_grad():
        assert_same_tokens(troodon.load(tmp_path), model(x).last_hidden_state, x)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu', but the network's is gelu"),
        ({"hidden_size": 64}, "hidden_size 64, but the tensors have 128"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, but the tensors have 2"),
        ({"patch_size": 7}, "patch_size 7, but the tensors have 14"),
        ({"image_size": 518}, "image_size 518, but positions in the tensors are those of 4 x 4 patches"),
        ({"image_size": [56, 112]}, "image_size .56, 112., but positions"),
        ({"mlp_ratio": 3}, "mlp_ratio 3, but MLPs in the tensors have 512 channels"),
        ({"use_swiglu_ffn": True, "mlp_ratio": 6}, "use_swiglu_ffn True, but MLPs in the tensors are gelu"),
        ({"num_register_tokens": 4}, "num_register_tokens 4, but the tensors have 0"),
        ({"num_attention_heads": 3}, "128 channels are not a multiple of 3 heads"),
        ({"quantization_config": {"bits": 4}}, "not quantized"),
        ({"architectures": ["Dinov2Backbone"], "apply_layernorm": False}, "apply_layernorm False, but features here"),
    ],
)
def test_fields_that_cannot_be_followed_are_refused(changes, said, transformers, tmp_path):
    transformers.Dinov2Model(transformers.Dinov2Config(**TINY)).save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(UsageError, match=said):
        troodon.load(tmp_path)


def test_a_classifier_in_shards_gives_its_backbone(transformers, tmp_path, capsys):
    model = made(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**TINY)))
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    capsys.readouterr()
    with torch.no_grad():
        expected = model.dinov2(images((98, 154))).last_hidden_state
    assert_same_tokens(troodon.load(tmp_path), expected, images((98, 154)))
    assert capsys.readouterr().err == f"{tmp_path}: leaves classifier\n"


def test_names_that_transformers_uses_in_memory_load_too(transformers, tmp_path):
    model = made(transformers.Dinov2Model(transformers.Dinov2Config(**(TINY | {"num_attention_heads": 2}))))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    with torch.no_grad():
        expected = model(images((98, 154))).last_hidden_state
    for path in (tmp_path, tmp_path / "a.pth"):
        assert_same_tokens(troodon.load(path), expected, images((98, 154)))


TIMM = ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2")


@pytest.mark.parametrize("grid", [4, 37])
@pytest.mark.parametrize("size", [(224, 224), (98, 154), (518, 518)])
@pytest.mark.parametrize("name", TIMM)
def test_dinov2_of_timm(name, size, grid, timm, tmp_path):
    model = made(timm.create_model(name, depth=1, dynamic_img_size=True, img_size=14 * grid, num_classes=3))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with torch.no_grad():
        expected = model.forward_features(images(size))
    assert_same_tokens(troodon.load(tmp_path / "a.pth"), expected, images(size))


DINOV3 = {  # as released: S, S+ and H+ (gated, six times as wide), 7B (gated, three times as wide, 128 channels a head)
    "plain": {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
    "gated": {
        "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 768, "use_gated_mlp": True,
        "hidden_act": "silu",
    },
    "wide heads": {
        "hidden_size": 256, "num_attention_heads": 2, "intermediate_size": 768, "use_gated_mlp": True,
        "hidden_act": "silu",
    },
}  # fmt: skip


def dinov3(transformers: ModuleType, kind: str, **changes: Any) -> Any:
    numbers = DINOV3[kind] | {"num_hidden_layers": 2, "num_register_tokens": 4} | changes
    return made(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**numbers)))


@pytest.mark.parametrize("kind", DINOV3)
def test_dinov3_of_transformers(kind, transformers, tmp_path, capsys):
    model = dinov3(transformers, kind)
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    backbone = troodon.load(tmp_path)
    assert "DINOv3's weights have a licence of their own, https://" in capsys.readouterr().err
    assert (backbone.config.positions, backbone.config.norm_eps, backbone.config.patch) == ("rope", 1e-5, 16)
    for size in ((224, 224), (96, 160), (32, 400)):
        with torch.no_grad():
            assert_same_tokens(backbone, model(images(size, 2)).last_hidden_state, images(size, 2))
    masks = torch.rand(2, 60, generator=torch.Generator().manual_seed(3)) < 0.3
    assert_same_gradients(backbone, model, images((96, 160), 2), masks)
    backbone.save(tmp_path / "own")
    own = troodon.load(tmp_path / "own")
    assert torch.equal(own.features(images((64, 48))).cls, backbone.features(images((64, 48))).cls)


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 30.0}, {"layer_norm_eps": 1e-3}, {"query_bias": False, "proj_bias": False}, {"mlp_bias": False},
     {"num_register_tokens": 0}, {"patch_size": 8}, {"pos_embed_rescale": None, "layerscale_value": 0.1}],
    ids=lambda changes: ",".join(changes),
)  # fmt: skip
def test_fields_of_a_config_of_dinov3_are_followed(changes, transformers, tmp_path):
    model = dinov3(transformers, "gated", **changes)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(images((96, 160))).last_hidden_state
    assert_same_tokens(troodon.load(tmp_path), expected, images((96, 160)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new', but the network's is gelu"),
        ({"intermediate_size": 100}, "intermediate_size 100, but the tensors have 512"),
        ({"use_gated_mlp": True}, "use_gated_mlp True, but MLPs in the tensors are gelu"),
    ],
)
def test_fields_of_dinov3_that_cannot_be_followed_are_refused(changes, said, transformers, tmp_path):
    dinov3(transformers, "plain").save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(UsageError, match=said):
        troodon.load(tmp_path)


def test_a_bias_of_keys_which_no_released_weights_have_is_refused(transformers, tmp_path):
    dinov3(transformers, "plain", key_bias=True).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has a bias of keys"):
        troodon.load(tmp_path)


def released(model: Any) -> dict[str, Tensor]:
    """The tensors of a DINOv3 of transformers under the names of the released .pth files."""
    state, gated = {}, model.config.use_gated_mlp
    plain = {"up_proj": "w2" if gated else "fc1", "down_proj": "w3" if gated else "fc2", "gate_proj": "w1"}
    for name, tensor in model.state_dict().items():
        for theirs, ours in {
            "embeddings.register_tokens": "storage_tokens", "embeddings.patch_embeddings.": "patch_embed.proj.",
            "embeddings.": "", "model.layer.": "blocks.", "attention.o_proj": "attn.proj", "layer_scale1.lambda1":
            "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", **plain,
        }.items():  # fmt: skip
            name = name.replace(theirs, ours)
        state[name] = tensor
    for block in range(model.config.num_hidden_layers):
        of = f"blocks.{block}.attention."
        q, k, v = (state.pop(f"{of}{part}_proj.weight") for part in "qkv")
        state[f"blocks.{block}.attn.qkv.weight"] = torch.cat([q, k, v])
        biases = [state.pop(f"{of}{part}_proj.bias", torch.full((len(k),), float("nan"))) for part in "qkv"]
        state[f"blocks.{block}.attn.qkv.bias"] = torch.cat(biases)
        mask = torch.cat([torch.ones(len(q)), torch.zeros(len(k)), torch.ones(len(v))])
        state[f"blocks.{block}.attn.qkv.bias_mask"] = mask
    heads = model.config.num_attention_heads
    quarter = model.config.hidden_size // heads // 4
    state["rope_embed.periods"] = 100.0 ** (torch.arange(quarter) / quarter)
    return state | {"mask_token": state["mask_token"][0]}


@pytest.mark.parametrize("kind", DINOV3)
def test_released_files_of_dinov3(kind, transformers, tmp_path, capsys):
    model = dinov3(transformers, kind)
    torch.save(released(model) | {"local_cls_norm.weight": torch.ones(128)}, tmp_path / "dinov3.pth")
    with torch.no_grad():
        expected = model(images((96, 160))).last_hidden_state
    backbone = troodon.load(tmp_path / "dinov3.pth")
    assert_same_tokens(backbone, expected, images((96, 160)))
    assert "leaves local_cls_norm; DINOv3's weights have a licence of their own" in capsys.readouterr().err
    rounded = released(model) | {"rope_embed.periods": released(model)["rope_embed.periods"].bfloat16()}
    torch.save(rounded, tmp_path / "dinov3_vitl16_pretrain_sat493m.pth")
    satellite = troodon.load(tmp_path / "dinov3_vitl16_pretrain_sat493m.pth")
    assert torch.equal(satellite.vit.rope_embed.periods, rounded["rope_embed.periods"].float())
    assert satellite.preprocessing.mean == (0.43, 0.411, 0.296)


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (256, 256)])
@pytest.mark.parametrize("name", ["small_patch16_dinov3", "small_patch16_dinov3_qkvb", "small_plus_patch16_dinov3"])
def test_dinov3_of_timm(name, size, timm, tmp_path):
    model = made(timm.create_model(f"vit_{name}", depth=2, dynamic_img_size=True))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with torch.no_grad():
        expected = model.forward_features(images(size))
    assert_same_tokens(troodon.load(tmp_path / "a.pth"), expected, images(size))
