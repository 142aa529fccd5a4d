"""Weights that people have: a run, a backbone folder, released DINOv2 weights (.pth), a Hugging Face folder."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from troodon.config import UsageError
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.run import read_manifest

HEAD_CHANNELS = 64  # channels of an attention head, in every released model


def load_weights(path: Path) -> Backbone:
    """A backbone folder, a run (its backbone), released DINOv2 weights (.pth), or a Hugging Face folder."""
    if path.is_dir():
        if (path / "backbone.json").exists():
            return Backbone.load(path)
        if (path / "backbone").is_dir():
            return Backbone.load(path / "backbone")
        if (path / "config.json").exists():
            return _hugging_face(path)
        if (read_manifest(path) or {}).get("kind") == "run":
            raise UsageError(f"{path}: a run without a checkpoint, so it has no backbone yet; let it train until one")
        raise UsageError(f"{path}: neither a run, a backbone folder nor a Hugging Face folder")
    if path.suffix in (".pth", ".pt") and path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        return _released(state.get("teacher", state), path.stem)
    if path.exists():
        raise UsageError(f"{path}: not weights; expected a folder or a .pth file")
    raise UsageError(f"{path}: no such run, backbone folder or weights")


def config_from_weights(state: dict[str, Tensor], *, heads: int) -> ViTConfig:
    """The config of the network that these weights, under released names, belong to. They do not tell `heads`."""
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    return ViTConfig(
        dim=dim,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        heads=heads,
        patch=patch,
        grid=round((state["pos_embed"].shape[1] - 1) ** 0.5),
        registers=registers,
        mlp="swiglu" if "blocks.0.mlp.w12.weight" in state else "gelu",
        position_offset=0.0 if registers else 0.1,
        position_antialias=bool(registers),
        channels=channels,
    )


def _released(state: dict[str, Tensor], name: str) -> Backbone:
    state = {re.sub(r"^(module\.)?(backbone\.)?", "", k): v.float() for k, v in state.items() if "head" not in k}
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}  # blocks in chunks
    if "cls_token" not in state or "pos_embed" not in state:
        raise UsageError(f"{name}: these are not DINOv2 weights (no cls_token and pos_embed)")
    config = config_from_weights(state, heads=state["cls_token"].shape[-1] // HEAD_CHANNELS)
    return Backbone.from_state_dict(state, config, Preprocessing(), name=name)


HUGGING_FACE = [  # their name -> ours, applied in order; query, key and value are concatenated as well
    (r"^(dinov2\w*\.)?embeddings\.(cls_token|mask_token|register_tokens)$", r"\2"),
    (r"^(dinov2\w*\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(dinov2\w*\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(dinov2\w*\.)?encoder\.layer\.(\d+)\.", r"blocks.\2."),
    (r"^(dinov2\w*\.)?layernorm\.", "norm."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
]


def _hugging_face(folder: Path) -> Backbone:
    description = json.loads((folder / "config.json").read_text())
    if not str(description.get("model_type", "")).startswith("dinov2"):
        raise UsageError(f"{folder}: a Hugging Face model of type {description.get('model_type')!r}, not dinov2")
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for pattern, ours in HUGGING_FACE:
            name = re.sub(pattern, ours, name)
        state[name] = tensor.float()
    for name in [n for n in state if ".attn.query." in n]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("query", "qkv")] = torch.cat(parts)
    state = {n: t for n, t in state.items() if not n.startswith("classifier")}
    config = config_from_weights(state, heads=description["num_attention_heads"])
    preprocessing = Preprocessing()
    if (folder / "preprocessor_config.json").exists():
        p = json.loads((folder / "preprocessor_config.json").read_text())
        height, width = (p.get("crop_size", {}).get(side, preprocessing.crop) for side in ("height", "width"))
        preprocessing = Preprocessing(
            resize=p.get("size", {}).get("shortest_edge", preprocessing.resize),
            crop=height if height == width else (height, width),
            mean=tuple(p.get("image_mean", preprocessing.mean)),
            std=tuple(p.get("image_std", preprocessing.std)),
        )
    return Backbone.from_state_dict(state, config, preprocessing, name=folder.resolve().name)
