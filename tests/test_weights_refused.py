"""What is not weights, or not of a network that Troodon runs, is refused in one line: what it is, and the remedy."""

import gzip
import io
import json
import os
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import troodon
from tests.test_weights import TINY, state_of
from troodon.config import UsageError
from troodon.model.config import ViTConfig


def saved(value: object) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


def wrote(data: bytes | str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data.encode())


def named(*names: str) -> Callable[[Path], object]:
    """A file of weights whose tensors have these names."""
    return saved({name: torch.ones(2, 2) for name in names})


def with_names(**extra: torch.Tensor) -> Callable[[Path], object]:
    return lambda path: torch.save(state_of(TINY) | extra, path)


class Net(torch.nn.Module):
    """A network that is saved whole, as a pickle of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def half(write: Callable[[Path], object]) -> Callable[[Path], object]:
    def cut(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def image(kind: str) -> Callable[[Path], object]:
    return lambda path: Image.new("RGB", (8, 8)).save(path, kind)


def arrays(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(3))


def array(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.ones(3))


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("dinov2/readme.txt", "hello")


def tape(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())


def scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but there are files of it
        torch.jit.trace(Net(), torch.ones(1, 2), check_trace=False).save(str(path))


def legacy(value: object) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path, _use_new_zipfile_serialization=False)


def folder(**files: bytes | str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        for name, data in files.items():
            place = path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data if isinstance(data, bytes) else data.encode())
        path.mkdir(exist_ok=True)

    return make


ONNX = b"\x08\x09\x12\x07pytorch\x1a\x032.1"
DINOV2 = json.dumps({"model_type": "dinov2", "num_attention_heads": 2})
WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "nothing": ("a.pth", lambda path: None, "no such run, backbone folder or weights"),
    "an address": ("https://host/a.pth", lambda path: None, "an address; download the file first"),
    "an empty file": ("a.pth", wrote(""), "an empty file; download it again"),
    "zeros": ("a.pth", wrote(bytes(5000)), "nothing but zeros, .*; download it again"),
    "a web page": ("a.pth", wrote("\n<!DOCTYPE html><html>404"), "a web page .*; download it again, from the address"),
    "an answer of a bucket": ("a.pth", wrote('<?xml version="1.0"?><Error>AccessDenied'), "a web page"),
    "a pointer": ("a.pth", wrote("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), "run: git lfs pull"),
    "an annex": ("a.pth", wrote("/annex/objects/SHA256E-s1--0.pth\n"), "run: git annex get"),
    "half of a zip": ("a.pth", half(with_names()), "not whole, the first .* MB of a file; download it again"),
    "half of a pickle": ("a.pth", half(legacy(state_of(TINY))), "not whole, or not a file of torch.*download it again"),
    "half of safetensors": (
        "a.safetensors", half(lambda path: save_file(state_of(TINY), path)), "not whole, .*safetensors.*download it",
    ),
    "a whole network": ("a.pth", saved(Net()), r"holds Python objects \(\S+\) besides tensors.*state_dict\(\)"),
    "a network in a dictionary": ("a.pth", saved({"model": Net()}), r"holds Python objects \(.*state_dict\(\)"),
    "code": ("a.pth", saved({"cls_token": Evil()}), r"holds Python objects \(\w+\.system\) .*could run any code"),
    "old code": ("a.pth", legacy({"cls_token": Evil()}), r"holds Python objects \(\w+\.system\)"),
    "TorchScript": ("a.pt", scripted, "a TorchScript program; save the names and tensors"),
    "ONNX": ("a.onnx", wrote(ONNX), "an ONNX graph; save the names and tensors"),
    "ONNX by content": ("a.bin", wrote(ONNX), "an ONNX graph"),
    "TensorFlow Lite": ("a.bin", wrote(b"\x1c\0\0\0TFL3\0\0"), "a TensorFlow Lite model"),
    "Flax": ("a.msgpack", wrote(b"\x81\xa6params\x81"), "weights of Flax"),
    "HDF5": ("tf_model.h5", wrote(b"\x89HDF\r\n\x1a\n\0\0"), "an HDF5 file, as Keras and TensorFlow write them"),
    "arrays": ("a.npz", arrays, r"NumPy arrays \(.npz\); save the names"),
    "an array": ("a.npy", array, "a NumPy array"),
    "gguf": ("a.gguf", wrote(b"GGUF\3\0\0\0"), "a GGUF file"),
    "an image": ("a.jpg", image("JPEG"), "a JPEG image; give images to features"),
    "another image": ("a.pth", image("PNG"), "a PNG image"),
    "an archive": ("a.zip", archive, "a zip archive; extract it"),
    "a tar": ("a.tar", tape, "a tar archive; extract it"),
    "gzip": ("a.pth.gz", wrote(gzip.compress(b"weights")), "compressed by gzip; extract it"),
    "settings": ("config.yaml", wrote("model: vits14\n"), "a text; give a file of weights"),
    "JSON": ("config.json", wrote("{}"), "a JSON text; give its folder"),
    "a list of tensors": ("a.pth", saved([torch.ones(2)]), "holds no tensors under names"),
    "a tensor": ("a.pth", saved(torch.ones(2)), "holds no tensors under names"),
    "numbers": ("a.pth", saved({"epoch": 1}), "holds no tensors under names"),
    "a ResNet": ("a.pth", named("conv1.weight", "layer1.0.conv1.weight", "fc.weight"), "seem to be a ResNet; Troodon"),
    "a Swin": ("a.pth", named("layers.0.blocks.0.attn.relative_position_bias_table"), "a Swin transformer; Troodon"),
    "CLIP": ("a.pth", named("visual.proj", "token_embedding.weight", "text_projection"), "a model of images and text"),
    "a ConvNeXt": ("a.pth", named("downsample_layers.0.0.weight", "stages.0.0.gamma"), "a ConvNeXt; Troodon runs"),
    "a ViT of torchvision": ("a.pth", named("encoder.layers.encoder_layer_0.ln_1.weight"), "a ViT of torchvision"),
    "SAM": ("a.pth", named("image_encoder.blocks.0.attn.rel_pos_h"), "a SAM or a ViTDet"),
    "a BEiT": (
        "a.pth", with_names(**{"blocks.0.attn.q_bias": torch.ones(2)}), "seem to be a BEiT or an EVA; Troodon",
    ),
    "MAE with its decoder": (
        "a.pth", with_names(decoder_pos_embed=torch.ones(2)), "a masked autoencoder with its decoder; save its encoder",
    ),
    "an adapter": ("a.pth", named("base.blocks.0.attn.qkv.lora_A.weight"), r"an adapter \(LoRA\) .*; merge it"),
    "a linear head": ("a.pth", named("weight", "bias"), "a head without its network; give the network's own file"),
    "a DINO head": ("a.pth", named("dino_head.last_layer.weight_v"), "a head without its network"),
    "shards of FSDP": (
        "a.pth", named("teacher.backbone.cls_token", "teacher.backbone.blocks.0._fsdp_wrapped_module._flat_param"),
        "shards of one rank of FSDP; give the teacher_checkpoint.pth",
    ),
    "something else": ("a.pth", named("alpha", "beta"), r"its tensors \(alpha, beta, ...\) are not those of"),
    "a folder of images": ("d", folder(**{"a.JPG": b"x", "b.jpg": b"x"}), "a folder of images; give it to --data"),
    "an empty folder": ("d", folder(), "neither a run, a backbone folder nor a Hugging Face folder, but empty"),
    "a folder of files": ("d", folder(**{"x.pth": b"", "y.txt": b""}), r"give a file of it: \S*x\.pth"),
    "no config.json": ("d", folder(**{"model.safetensors": b""}), r"without its config\.json.*model\.safetensors"),
    "a cache of the hub": (
        "d", folder(**{"refs/main": "abc", "snapshots/abc/config.json": DINOV2}), r"a cache of the hub; give \S*abc",
    ),
    "a sharded checkpoint": ("d", folder(**{".metadata": b"", "__0_0.distcp": b""}), "format_utils dcp_to_torch"),
    "a TensorFlow model": ("d", folder(**{"saved_model.pb": b""}), "a TensorFlow model"),
    "a folder of an adapter": ("d", folder(**{"adapter_config.json": "{}"}), "an adapter"),
    "only Flax": (
        "d", folder(**{"config.json": DINOV2, "flax_model.msgpack": b""}),
        "has none of model.safetensors, pytorch_model.bin; it holds config.json, flax_model.msgpack",
    ),
    "a shard that is missing": (
        "d",
        folder(**{"config.json": DINOV2, "model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors"}}'}),
        r"1\.safetensors: is missing, and model\.safetensors\.index\.json lists it; download it again",
    ),
    "a broken index": (
        "d", folder(**{"config.json": DINOV2, "pytorch_model.bin.index.json": "<html>"}), "not JSON .*; download it",
    ),
    "another model": ("d", folder(**{"config.json": '{"model_type": "vit"}'}), "type 'vit', not dinov2 or dinov3_vit"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_weights_is_refused_by_its_kind(what, tmp_path, monkeypatch):
    name, make, said = WRONG[what]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    path = name if "://" in name else tmp_path / name
    with pytest.raises(UsageError) as raised:
        troodon.load(path)
    message = str(raised.value)
    assert re.search(said, message), message
    assert message.startswith(str(path))
    assert "\n" not in message
    assert not (tmp_path / "ran").exists()


def test_an_index_may_not_list_what_is_in_no_file(tmp_path):
    (tmp_path / "config.json").write_text(DINOV2)
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="lists b, which is in none of its files; download it again"):
        troodon.load(tmp_path)


@pytest.mark.parametrize("name", ["zip.pth", "pickle.pth", "a.safetensors"])
def test_damaged_files_load_or_are_refused_in_one_line(name, tmp_path):
    state = state_of(ViTConfig(dim=64, depth=1, heads=1, grid=2, patch=4))
    path, draw = tmp_path / name, np.random.default_rng(0)
    if name.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name.startswith("zip"))
    whole, refused = path.read_bytes(), []
    for number in range(60):
        data = np.frombuffer(whole, np.uint8).copy()
        near = len(data) if number % 2 else 3000  # where names are
        data[draw.integers(0, near, 1 + number % 20)] = draw.integers(0, 256, 1 + number % 20)
        if number % 3 == 0:
            data = data[: draw.integers(0, len(data))]
        path.unlink()  # a new file: the one before may be mapped
        path.write_bytes(data.tobytes())
        try:
            troodon.load(path)
        except UsageError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert not any("\n" in message for message in refused)
