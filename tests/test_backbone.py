"""A backbone: saved, loaded, and the released weights under their several names."""

import dataclasses
import json
import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import troodon
from troodon.config import UsageError
from troodon.model import inference
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.weights import load_weights

CONFIG = ViTConfig(dim=128, depth=3, heads=2, patch=14, grid=4, registers=2, layer_scale=0.5)
SIGHT = Preprocessing(resize=64, crop=56)


@pytest.fixture
def backbone() -> Backbone:
    return Backbone.random(CONFIG, SIGHT, seed=1)


@pytest.fixture
def images() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((70, 90), (1, 1), (8, 900))]


def test_features_have_their_shapes(backbone, images):
    f = backbone.features(images, blocks=2)
    assert f.cls.shape == (3, 128)
    assert f.patches.shape == (3, 4, 4, 128)
    assert f.registers.shape == (3, 2, 128)
    assert [(c.shape, m.shape) for c, m in f.blocks] == [((3, 128), (3, 128))] * 2
    torch.testing.assert_close(f.blocks[-1][0], f.cls)
    torch.testing.assert_close(f.blocks[-1][1], f.patches.mean((1, 2)))
    wide = backbone.features(torch.randn(2, 3, 28, 70))
    assert wide.patches.shape == (2, 2, 5, 128)


def test_saved_and_loaded_it_is_the_same(backbone, images, tmp_path):
    backbone.save(tmp_path / "b")
    again = Backbone.load(tmp_path / "b")
    assert (again.config, again.preprocessing, again.name) == (CONFIG, SIGHT, "random")
    assert again.fingerprint == backbone.fingerprint
    assert torch.equal(again.features(images).cls, backbone.features(images).cls)
    assert Backbone.random(CONFIG, SIGHT, seed=2).fingerprint != backbone.fingerprint


def test_load_takes_paths_arrays_and_pictures(backbone, images, tmp_path):
    backbone.save(tmp_path / "run" / "backbone")
    loaded = troodon.load(tmp_path / "run")
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    expected = backbone.features(images[:1]).cls
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), images[0], Image.fromarray(images[0])):
        torch.testing.assert_close(loaded.features([given]).cls, expected)
    with pytest.raises(UsageError, match="takes pixels"):
        backbone.features([tmp_path / "a.png"])


def test_preprocessing_resizes_crops_and_normalises(backbone):
    image = np.full((80, 160, 3), 255, np.uint8)
    image[:, :40] = 0  # left quarter: outside the central square
    x = backbone.prepare([image])
    assert x.shape == (1, 3, 56, 56)
    expected = (1 - torch.tensor(SIGHT.mean)) / torch.tensor(SIGHT.std)
    torch.testing.assert_close(x[0], expected[:, None, None].expand(3, 56, 56), atol=0.02, rtol=0)


def test_a_ribbon_is_seen_by_its_middle(backbone):
    ribbon = np.zeros((3, 9001, 3), np.uint8)
    ribbon[:, 4500] = 255
    plain = backbone.prepare([np.zeros((3, 3, 3), np.uint8)])
    x = backbone.prepare([ribbon]) - plain
    assert x.shape == (1, 3, 56, 56)
    assert x[..., 20:36].mean() > 1
    assert x[..., :10].abs().max() < 0.2


def test_original_weights_load(backbone, images, tmp_path):
    vit = Backbone.random(ViTConfig(dim=128, depth=3, heads=2, patch=14, grid=4, position_offset=0.1,
                                    position_antialias=False), Preprocessing(), seed=3)  # fmt: skip
    plain = vit.vit.state_dict()
    torch.save(plain, tmp_path / "plain.pth")
    teacher = {f"backbone.{k.replace('blocks.', 'blocks.0.')}": v for k, v in plain.items()} | {
        "dino_head.x": torch.ones(1)
    }
    torch.save({"teacher": teacher}, tmp_path / "training.pth")
    for name in ("plain.pth", "training.pth"):
        got = load_weights(tmp_path / name)
        assert got.config == vit.config
        assert torch.equal(got.features(images).cls, vit.features(images).cls)


def test_hugging_face_folder_loads(backbone, images, tmp_path):
    state = {}
    for name, tensor in backbone.vit.state_dict().items():
        if ".attn.qkv." in name:
            for part, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[_hugging_face(name.replace("attn.qkv", f"attention.attention.{part}"))] = value.contiguous()
        else:
            state[_hugging_face(name)] = tensor.contiguous()
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "dinov2_with_registers", "num_attention_heads": 2}))
    sight = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    (folder / "preprocessor_config.json").write_text(json.dumps(sight))
    got = load_weights(folder)
    assert got.config.registers == 2
    torch.testing.assert_close(got.features(images).cls, backbone.features(images).cls)


def _hugging_face(name: str) -> str:
    for ours, theirs in (
        ("cls_token", "embeddings.cls_token"), ("mask_token", "embeddings.mask_token"),
        ("register_tokens", "embeddings.register_tokens"), ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("blocks.", "encoder.layer."),
        ("attn.proj", "attention.output.dense"), ("ls1.gamma", "layer_scale1.lambda1"),
        ("ls2.gamma", "layer_scale2.lambda1"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return f"layernorm.{name[5:]}" if name.startswith("norm.") else name


def test_weights_that_do_not_fit_are_refused(backbone, tmp_path):
    backbone.save(tmp_path / "b")
    state = load_file(tmp_path / "b" / "model.safetensors")
    del state["norm.weight"]
    save_file(state, tmp_path / "b" / "model.safetensors")
    with pytest.raises(UsageError, match=r"norm\.weight"):
        Backbone.load(tmp_path / "b")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "no such run"),
        (lambda p: p.mkdir(), "neither a run, a backbone folder nor"),
        (lambda p: p.write_text("x"), "not weights"),
    ],
)
def test_what_is_no_backbone_is_refused_by_name(tmp_path, make, said):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(UsageError, match=f"thing: {said}"):
        troodon.load(path)


def test_other_hugging_face_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UsageError, match="'vit', not dinov2"):
        load_weights(tmp_path)


WIDE = ViTConfig(dim=192, depth=6, heads=3, patch=14, grid=4, registers=2, layer_scale=0.1)


@pytest.mark.parametrize("config", [WIDE, dataclasses.replace(WIDE, mlp="swiglu")])
def test_a_faster_backbone_says_the_same(config, images, tmp_path, monkeypatch):
    plain = Backbone.random(config, SIGHT, seed=1)
    exact = plain.features(images, blocks=2)
    monkeypatch.setattr(inference, "TOKENS_AT_ONCE", 40)  # two images at a time
    for compute, tolerance in (("fp32", 1e-5), ("bf16", 1e-2)):
        quick = plain.optimized(compute)
        got = quick.features(images, blocks=2)
        assert got.patches.shape == exact.patches.shape
        pairs = [(got.cls, exact.cls), (got.patches, exact.patches), (got.registers, exact.registers)]
        pairs += [pair for a, b in zip(got.blocks, exact.blocks, strict=True) for pair in zip(a, b, strict=True)]
        for a, b in pairs:
            assert a.dtype == torch.float32
            assert (a - b).norm() <= tolerance * b.norm()
        sent = pickle.loads(pickle.dumps(quick))  # to another process
        assert torch.equal(sent.features(images).cls, quick.features(images).cls)
        quick.save(tmp_path / compute)
        assert Backbone.load(tmp_path / compute).fingerprint == plain.fingerprint  # it is the same backbone
    assert plain.optimized("auto").compute in (torch.float32, torch.bfloat16)
    with pytest.raises(UsageError, match="unknown compute 'bf61': did you mean 'bf16'"):
        plain.optimized("bf61")


@pytest.mark.parametrize(("slow", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_precision_that_wins_is_chosen(slow, expected, monkeypatch):
    def autocast(device, compute):
        time.sleep(0.03 * (compute == slow))
        return torch.autocast(device.type, compute, enabled=compute != torch.float32)

    monkeypatch.setattr(inference, "autocast", autocast)
    assert inference.fastest_dtype(Backbone.random(CONFIG, SIGHT).vit, (28, 28)) == expected
