"""A backbone: saved, loaded, and the released weights under their several names."""

import copy
import dataclasses
import io
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
from troodon.pixels import of_array
from troodon.verbs.common import with_range

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
    assert [(b.cls.shape, b.mean.shape) for b in f.blocks] == [((3, 128), (3, 128))] * 2
    torch.testing.assert_close(f.blocks[-1].cls, f.cls)
    torch.testing.assert_close(f.blocks[-1].mean, f.patches.mean((1, 2)))
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
        for a, b in zip(got.blocks, exact.blocks, strict=True):
            pairs += [(a.cls, b.cls), (a.mean, b.mean), (a.patches, b.patches)]
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


# ---- Forms, sizes, blocks and attention


def forms(image: np.ndarray) -> list:
    """One picture as an array, a PIL image, the bytes of a file, and a tensor (C, H, W)."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "png")
    return [image, Image.fromarray(image), data.getvalue(), torch.from_numpy(image).permute(2, 0, 1)]


def test_a_list_mixes_every_form_of_a_picture(backbone, images, tmp_path):
    loaded = with_range(backbone, None)
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    mixed = [tmp_path / "a.png", str(tmp_path / "a.png"), *forms(images[0]), backbone.prepare(images[0])[0]]
    expected = loaded.features([images[0]])
    for f in (loaded.features(mixed), *map(loaded.features, mixed)):
        for got, one in ((f.cls, expected.cls), (f.patches, expected.patches)):
            torch.testing.assert_close(got, one.expand_as(got))
        assert f.rows == list(range(len(f.cls)))
    grey = np.zeros((9, 9), np.uint8)
    one, other = torch.from_numpy(grey)[None], torch.from_numpy(np.stack([grey] * 3))
    assert torch.equal(backbone.features(one).cls, backbone.features(grey).cls)
    assert torch.equal(backbone.features(torch.stack([other, other])).cls, backbone.features([grey, grey]).cls)
    with pytest.raises(UsageError, match=r"image 1 is prepared in another size .*\(28 x 28 and 56 x 56"):
        backbone.features([images[0], torch.zeros(3, 28, 28)])
    with pytest.raises(UsageError, match=r"image 0, a tensor of shape \(1, 3, 56, 56\): in a list"):
        backbone.features([torch.zeros(1, 3, 56, 56)])


def test_many_pictures_are_read_a_few_at_a_time(backbone, images, monkeypatch):
    expected, read, most = backbone.features(images * 3), [], []
    monkeypatch.setattr(inference, "TOKENS_AT_ONCE", 40)  # two images
    monkeypatch.setattr(Backbone, "_values", lambda self, picture: read.append(0) or of_array(picture))
    monkeypatch.setattr(Backbone, "_moved", lambda self, x: most.append((len(x), len(read))) or x)
    torch.testing.assert_close(backbone.features(images * 3).cls, expected.cls)
    assert most == [(2, 2), (2, 4), (2, 6), (2, 8), (1, 9)]


@pytest.mark.parametrize(("size", "grid"), [(28, (2, 2)), ((28, 70), (2, 5)), (84, (6, 6)), ([14, 14], (1, 1))])
def test_size_is_what_the_network_sees(backbone, images, size, grid):
    f = backbone.features(images, size=size)
    assert f.patches.shape == (3, *grid, 128)
    assert torch.equal(backbone.features(backbone.prepare(images, size=size)).cls, f.cls)
    assert backbone.features([], size=size).patches.shape == (0, *grid, 128)
    assert backbone.attention(images, size=size).shape == (3, 2, 3, *grid)


def test_size_scales_the_resize_along(backbone):
    image = np.broadcast_to(np.linspace(0, 255, 640).astype(np.uint8)[:, None], (640, 640, 3))
    small = backbone.prepare(image)
    for size in (112, 224):
        x = backbone.prepare(image, size=size)
        assert x.shape == (1, 3, size, size)
        torch.testing.assert_close(torch.nn.functional.avg_pool2d(x, size // 56), small, atol=0.03, rtol=0)


@pytest.mark.parametrize("size", [0, -14, (28, 28, 28), "28", 2.5, True and (28,)])
def test_what_is_no_size_is_refused(backbone, images, size):
    with pytest.raises(UsageError, match="pixels of a side, or"):
        backbone.features(images, size=size)


def test_a_size_that_does_not_divide_names_the_nearest(backbone, images):
    with pytest.raises(UsageError, match=r"size of 30 x 50 pixels .* patches of 14; the nearest is 28 x 56"):
        backbone.features(images, size=(30, 50))


def test_whole_images_keep_their_aspect(backbone, images):
    pictures = [*images, images[0].swapaxes(0, 1), images[0]]
    f = backbone.features(pictures, keep_aspect=True, blocks=[0, -1])
    # 70 x 90 -> 56 x 72; one pixel -> 56 x 56; 8 x 900: the longer side has four times as much, the shorter one patch
    assert [tuple(p.shape) for p in f.patches] == [(4, 5, 128), (4, 4, 128), (1, 16, 128), (5, 4, 128), (4, 5, 128)]
    assert f.cls.shape == f.mean.shape == (5, 128)
    assert f.rows == list(range(5))
    for i, picture in enumerate(pictures):
        alone = backbone.features([picture], keep_aspect=True, blocks=[0, -1])
        torch.testing.assert_close(alone.patches[0], f.patches[i])
        torch.testing.assert_close(alone.blocks[0].patches[0], f.blocks[0].patches[i])
        torch.testing.assert_close(alone.cls[0], f.cls[i])
        torch.testing.assert_close(f.mean[i], f.patches[i].mean((0, 1)))
    maps = backbone.attention(pictures, keep_aspect=True)
    assert [tuple(m.shape) for m in maps] == [(2, 3, *p.shape[:2]) for p in f.patches]
    torch.testing.assert_close(maps[2], backbone.attention(pictures[2], keep_aspect=True)[0])
    tensors = [torch.randn(3, 28, 70), torch.randn(3, 56, 14)]
    assert [tuple(p.shape[:2]) for p in backbone.features(tensors, keep_aspect=True).patches] == [(2, 5), (4, 1)]
    nothing = backbone.features([], keep_aspect=True)
    assert (nothing.patches, nothing.mean.shape, nothing.blocks[0].mean.shape) == ([], (0, 128), (0, 128))


def test_nothing_of_a_whole_image_is_cut_off(backbone):
    image = np.zeros((64, 640, 3), np.uint8)
    image[:, -20:] = 255
    (x,) = (x for _, x in backbone._batches([image, image * 0], SIGHT, True, "raise"))
    assert x.shape == (2, 3, 28, 224)
    assert (x[0] - x[1])[..., -4:].min() > 1


@pytest.mark.parametrize("norm", [True, False])
def test_blocks_are_chosen_by_number(backbone, images, norm):
    torch.nn.init.uniform_(backbone.vit.norm.weight, 1, 2)
    f = backbone.features(images, blocks=[2, 0, -2], norm=norm)
    x = backbone.prepare(images)
    expected = [tokens for (tokens,) in backbone.vit.after_blocks([x], range(3), norm=norm)]
    assert norm == torch.allclose(expected[1].cls_BD, backbone.features(images, blocks=2).blocks[0].cls, atol=1e-5)
    for block, number in zip(f.blocks, (2, 0, 1), strict=True):
        assert block.patches.shape == (3, 4, 4, 128)
        torch.testing.assert_close(block.patches.flatten(1, 2), expected[number].patches_BPD)
        torch.testing.assert_close(block.cls, expected[number].cls_BD)
        torch.testing.assert_close(block.registers, expected[number].registers_BRD)
        torch.testing.assert_close(block.mean, expected[number].patches_BPD.mean(1))
    torch.testing.assert_close(f.cls, expected[2].cls_BD)
    torch.testing.assert_close(backbone.features(images, blocks=[], norm=norm).cls, f.cls)
    last_two = backbone.features(images, blocks=2, norm=norm)
    assert torch.equal(last_two.blocks[0].patches, f.blocks[2].patches)
    if not norm:
        normed = backbone.vit.norm(f.blocks[1].patches)
        torch.testing.assert_close(normed, backbone.features(images, blocks=[0]).blocks[0].patches)


@pytest.mark.parametrize("blocks", [0, 4, [3], [-4], [0.5], ["1"]])
def test_a_block_that_is_not_there_is_refused(backbone, images, blocks):
    with pytest.raises(UsageError, match=r"this network has (3|the blocks 0 to 2)"):
        backbone.features(images, blocks=blocks)


@pytest.mark.parametrize("block", [-1, 0, 1])
def test_attention_is_that_of_the_network(backbone, images, block, monkeypatch):
    """The attention, with the values, gives what the block's own attention gives for class token and registers."""
    monkeypatch.setattr(inference, "TOKENS_AT_ONCE", 40)
    attention, x = backbone.attention(images, block=block), backbone.prepare(images)
    assert attention.shape == (3, 2, 3, 4, 4)
    seen = []
    attn = backbone.vit.blocks[block].attn
    hook = attn.register_forward_hook(lambda module, given, out: seen.append((*given, out)))
    backbone.vit([x])
    hook.remove()
    ((tokens, _, scale, out),) = seen
    q, k, v = (t.unflatten(0, (3, -1)).transpose(1, 2) for t in attn.qkv(tokens).unflatten(-1, (3, 2, 64)).unbind(1))
    full = (q @ k.transpose(2, 3) / 8).softmax(-1)
    torch.testing.assert_close(scale(attn.proj((full @ v).transpose(1, 2).flatten(2)).flatten(0, 1)), out)
    torch.testing.assert_close(attention.flatten(3), full[:, :, :3, 3:])
    assert (attention.sum((3, 4)) < 1).all()
    assert backbone.attention([]).shape == (0, 2, 3, 4, 4)
    with pytest.raises(UsageError, match="block 3: this network has the blocks 0 to 2"):
        backbone.attention(images, block=3)


# ---- An ordinary object: its precision is told, it goes anywhere, and others learn on it


def test_weights_of_another_precision_give_features_of_it(backbone, images):
    low = copy.deepcopy(backbone)
    low.vit.bfloat16()
    assert (backbone.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    f = low.features(images, blocks=2)
    assert {f.cls.dtype, f.patches.dtype, f.blocks[0].cls.dtype} == {torch.bfloat16}
    assert low.features([]).cls.dtype == torch.bfloat16
    exact = backbone.features(images).cls
    assert (f.cls - exact).norm() < 0.05 * exact.norm()
    assert low.attention(images).dtype == torch.float32
    assert "torch.bfloat16" in repr(low)
    assert len(repr(low)) < 200


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of torch, by its compiler
@pytest.mark.parametrize("compile", [False, True])
def test_a_faster_backbone_is_copied_and_sent(backbone, images, compile):
    quick = backbone.optimized("fp32", compile=compile)
    for other in (pickle.loads(pickle.dumps(quick)), copy.deepcopy(quick)):
        assert other.compute == quick.compute
        assert {p.data_ptr() for p in other.vit.parameters()}.isdisjoint(p.data_ptr() for p in quick.vit.parameters())
        if not compile:
            assert torch.equal(other.features(images).cls, quick.features(images).cls)


def test_a_head_learns_on_features_in_plain_torch(backbone):
    images = [np.full((60, 60, 3), 40 * i, np.uint8) for i in range(6)]
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    f = backbone.features(images, blocks=[0, 1, 2])
    x = torch.cat([block.mean for block in f.blocks], 1)
    head = torch.nn.Linear(x.shape[1], 2)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(head(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    assert all(p.grad is None for p in backbone.vit.parameters())


class Adapted(torch.nn.Module):
    """A layer with an adapter, as packages for low-rank adaptation make it: its weight is that of the layer."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.layer(x) * self.scale


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, mlp="swiglu")])
def test_every_layer_can_have_an_adapter(config, images):
    backbone = Backbone.random(config, SIGHT)
    x, vit = backbone.prepare(images), copy.deepcopy(backbone.vit)
    for module in list(vit.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear | torch.nn.Conv2d) and not isinstance(module, Adapted):
                setattr(module, name, Adapted(child))
    adapters = [m.scale for m in vit.modules() if isinstance(m, Adapted)]
    (tokens,) = vit([x])
    torch.testing.assert_close(tokens.cls_BD, backbone.features(x).cls)
    tokens.cls_BD.square().mul(torch.randn(128)).sum().backward()
    assert len(adapters) == 1 + 3 * 4
    assert all(scale.grad is not None and scale.grad != 0 for scale in adapters)


def test_low_rank_adapters_of_peft_learn(backbone, images):
    peft = pytest.importorskip("peft", reason="peft is not installed", exc_type=ImportError)
    vit, x = copy.deepcopy(backbone.vit), backbone.prepare(images)
    lora = peft.LoraConfig(r=4, target_modules=["qkv", "proj", "fc1", "fc2"])
    model = peft.get_peft_model(vit, lora)
    head, labels = torch.nn.Linear(128, 3), torch.arange(3)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*learnt, *head.parameters()], 1e-2)
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(head(model(x)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    assert all(p.grad.abs().sum() > 0 for p in learnt)
    merged = dataclasses.replace(backbone, vit=model.merge_and_unload())
    assert (merged.features(x).cls - backbone.features(x).cls).norm() > 0.1
    torch.testing.assert_close(merged.features(x).cls, model(x).detach(), rtol=1e-3, atol=1e-3)
