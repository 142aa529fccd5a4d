"""The same weights under the names of other libraries. Nothing is computed, so the way back loses nothing."""

import re

import torch
from torch import Tensor

from troodon.model.config import ViTConfig

# Ours -> that of files on the Hugging Face hub, applied in order. transformers 5 has other names in memory, and still
# writes and reads these.
HUGGING_FACE = [
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
]
DINOV3 = [  # of transformers
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.", "layer."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.fc1\.", ".mlp.up_proj."),
    (r"\.mlp\.(fc2|w3)\.", ".mlp.down_proj."),
]
TIMM = [(r"^register_tokens$", "reg_token"), (r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2.")]


def hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of Dinov2 and Dinov2WithRegisters, where query, key and value are three layers."""
    renamed = {}
    for name, tensor in _renamed(state, HUGGING_FACE).items():
        if ".attn.qkv." in name:
            for part, values in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = values.contiguous()
        else:
            renamed[name] = tensor
    return renamed


def dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of DINOv3ViT of transformers, where parts are layers, and keys have no bias."""
    renamed = {}
    for name, tensor in _renamed(state, DINOV3).items():
        layer, _, kind = name.rpartition(".")
        if layer.endswith(".attn.qkv"):
            parts = {f"attention.{part}_proj": values for part, values in zip("qkv", tensor.chunk(3), strict=True)}
            parts = parts if kind == "weight" else {p: v for p, v in parts.items() if "k_proj" not in p}
        elif layer.endswith(".mlp.w12"):
            parts = dict(zip(("mlp.gate_proj", "mlp.up_proj"), tensor.chunk(2), strict=True))
        else:
            renamed[name] = tensor
            continue
        block = layer.removesuffix(".attn.qkv").removesuffix(".mlp.w12")
        renamed |= {f"{block}.{part}.{kind}": values.contiguous() for part, values in parts.items()}
    del renamed["rope_embed.periods"]  # computed
    renamed["embeddings.mask_token"] = renamed["embeddings.mask_token"][None]
    renamed.setdefault("embeddings.register_tokens", renamed["embeddings.cls_token"][:, :0].contiguous())
    return renamed


def timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of timm's vit_*_dinov2, which has no mask token.

    With registers, timm has positions of patches alone: that of the class token is added to the token, as it always is.
    """
    renamed = _renamed(state, TIMM)
    del renamed["mask_token"]
    if "reg_token" in renamed:
        positions = renamed["pos_embed"]
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        renamed["pos_embed"] = positions[:, 1:].contiguous()
    return renamed


def from_timm(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The weights of timm's network under our names, with a mask token of zeros."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub("^reg_token$", "register_tokens", name)
        if config.mlp == "swiglu":
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        renamed[name] = tensor
    if config.registers:
        of_class = torch.zeros_like(renamed["cls_token"])
        renamed["pos_embed"] = torch.cat([of_class, renamed["pos_embed"]], dim=1)
    return renamed | {"mask_token": torch.zeros(1, config.dim)}


def _renamed(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, theirs in rules:
            name = re.sub(pattern, theirs, name)
        renamed[name] = tensor
    return renamed
