"""The names under which others save a vision transformer, and how they become ours.

Tensors decide, not the names of files. Every tensor of a file becomes a parameter, or is left and named.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from troodon.config import UsageError
from troodon.text import printable

# Parts that libraries put between names: torch.compile, DDP, FSDP, recomputation.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Not of the backbone. `local_cls_norm` is a norm of DINOv3's for class tokens of local crops, in training only.
HEADS = re.compile(r"^(heads?|\w+_head|linear_heads?|classifier|fc|\w+_loss|local_cls_norm)\.")
FOLLOWS = re.compile(r"teacher|ema|average")  # in the name of a network that follows the one that learns

RENAMED = [  # theirs -> ours, applied in order; then parts are joined (`complete`)
    # transformers: names in files, and those that it gives to the same tensors in memory
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.|model\.)?layer\.(\d+)\.", r"blocks.\2."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
    # timm
    (r"^reg_token$", "register_tokens"),
    (r"\.mlp\.fc1_g\.", ".mlp.w1."),
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    # DINOv3; and the trainers of DINOv2, which keep blocks in chunks
    (r"^storage_tokens$", "register_tokens"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
]

OURS = "Troodon runs the ViTs of DINOv2, DINOv3 and DINO"
ARCHITECTURES = (  # part of a name that only they have, what has it, and the remedy
    (r"(^|\.)_?flat_param", "shards of one rank of FSDP", "give the teacher_checkpoint.pth that the trainer writes"),
    (r"(^|\.)lora_", "an adapter (LoRA) without its network", "merge it into its network, and save that"),
    (r"(^|\.)decoder_(blocks|embed|pos_embed)", "a masked autoencoder with its decoder", "save its encoder alone"),
    (r"relative_position_bias_table|layers\.\d+\.blocks\.", "a Swin transformer", OURS),
    (
        r"(^|\.)(text_projection|token_embedding|text_model|vision_model|visual)(\.|$)",
        "a model of images and text",
        OURS,
    ),
    (r"(^|\.)(layer[1-4]\.\d+\.conv1|encoder\.stages\.\d+\.layers)\.", "a ResNet", OURS),
    (r"(^|\.)(stages|downsample_layers)\.\d+\.", "a ConvNeXt", OURS),
    (r"(^|\.)(rel_pos_[hw]|neck\.\d)", "a SAM or a ViTDet", OURS),
    (r"relative_position_index|q_bias$|rope\.freqs", "a BEiT or an EVA", OURS),
    (r"(^|\.)encoder_layer_\d+\.|layernorm_before", "a ViT of torchvision or transformers", OURS),
    (r"(^|\.)(prototypes|last_layer)\.|^(weight|bias)$", "a head without its network", "give the network's own file"),
)


@dataclass
class Layout:
    """A vision transformer as others save it: its tensors under our names, and what there is to say of them."""

    library: Literal["transformers", "timm", "original"]
    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)

    @property
    def dim(self) -> int:
        return self.state["cls_token"].shape[-1]

    @property
    def is_rotary(self) -> bool:
        """Whether its positions are rotary, which transformers and timm do not keep in files."""
        is_known = "rope_embed.periods" in self.state or self.library != "original"
        return "pos_embed" not in self.state and is_known

    @property
    def heads(self) -> int:
        """Attention heads as the published networks have them; only rotary positions tell of them in weights."""
        if "rope_embed.periods" in self.state:
            return self.dim // (4 * len(self.state["rope_embed.periods"]))
        return self.dim // (128 if self.is_rotary and self.dim == 4096 else 64)


def find_network(tensors: dict[str, Tensor], place: object) -> Layout:
    """The vision transformer among the tensors of a file; a teacher or an average, where there are several networks.

    UsageError, with what the tensors seem to be, if there is none.
    """
    named = {WRAPPERS.sub("", printable(name)): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise UsageError(f"{place}: holds a network twice, with and without module.; save one of them")
    found = [m for m in (re.match(r"(.*?)(embeddings\.)?cls_token$", name) for name in named) if m]
    if not found or any("flat_param" in name for name in named):
        raise UsageError(f"{place}: {foreign(named)}")
    prefix = _best([m[1] for m in found], place)
    inside = {name.removeprefix(prefix): t for name, t in named.items() if name.startswith(prefix)}
    own = {name: tensor for name, tensor in inside.items() if not HEADS.match(name)}
    left = [name for name in named if not name.startswith(prefix)]
    left += [prefix + name for name in inside if name not in own]
    is_transformers = f"{prefix}embeddings.cls_token" in named
    layout = Layout("transformers" if is_transformers else "original", {_renamed(n): t for n, t in own.items()})
    if "patch_embed.proj.weight" not in layout.state or "blocks.0.norm1.weight" not in layout.state:
        raise UsageError(f"{place}: {foreign(named)}")
    layout.state = {name: tensor.to(torch.float32, copy=True) for name, tensor in layout.state.items()}
    if "reg_token" in own or ("mask_token" not in own and "blocks.0.ls1.gamma" in own and not is_transformers):
        layout.library = "timm"
    if len(found) > 1:
        layout.notes.append(f"takes {prefix.rstrip('.')}")
    if left:
        layout.notes.append(f"leaves {', '.join(dict.fromkeys(_group(name, prefix) for name in left))}")
    return layout


def foreign(names: Iterable[str]) -> str:
    """What tensors of these names seem to be, and the remedy."""
    for pattern, what, remedy in ARCHITECTURES:
        if any(re.search(pattern, name) for name in names):
            return f"its tensors seem to be {what}; {remedy}"
    some = ", ".join(sorted(names)[:3])
    return f"its tensors ({some}, ...) are not those of a vision transformer that Troodon knows; {OURS}"


def complete(layout: Layout, place: object) -> None:
    """Join what others keep apart, and add what they do without, where zeros or ones give the same numbers."""
    state, dim = layout.state, layout.dim
    blocks = sorted({m[0] for m in (re.match(r"blocks\.\d+\.", name) for name in state) if m})
    for block in blocks:
        _join(state, [f"{block}attn.{part}" for part in ("query", "key", "value")], f"{block}attn.qkv")
        if layout.is_rotary and f"{block}attn.q_bias" in state:
            q, v = (state.pop(f"{block}attn.{part}_bias") for part in "qv")
            state[f"{block}attn.qkv.bias"] = torch.cat([q, torch.zeros(dim), v])
        _mlp(state, f"{block}mlp.")
        _mask_bias(state, f"{block}attn.qkv", dim if layout.is_rotary else 0, place)
    if "mask_token" not in state:
        layout.notes.append("has no mask token, which only training needs: zeros")
    state["mask_token"] = state.get("mask_token", torch.zeros(dim)).reshape(1, dim)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3")
    bare = [n for n in (f"{b}{layer}" for b in blocks for layer in layers) if f"{n}.weight" in state]
    if bare := [n for n in bare if f"{n}.bias" not in state]:
        layout.notes.append(f"has no biases of {', '.join(dict.fromkeys(n.split('.', 2)[2] for n in bare))}: zeros")
        state |= {f"{n}.bias": torch.zeros(len(state[f"{n}.weight"])) for n in bare}
    if not any(".ls1." in name for name in state):
        if dim not in (192, 384, 768, 1024):  # of which the published ones have 64 channels a head
            raise UsageError(f"{place}: a ViT without layer scale of {dim} channels: its number of heads is not known")
        layout.notes.append("has no layer scale, as DINO's first version: ones")
        state |= {f"{block}{ls}.gamma": torch.ones(dim) for block in blocks for ls in ("ls1", "ls2")}
    if "pos_embed" in state and round(state["pos_embed"].shape[1] ** 0.5) ** 2 == state["pos_embed"].shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, dim), state["pos_embed"]], dim=1)  # it is in the class token
    if "register_tokens" in state and not state["register_tokens"].shape[1]:
        del state["register_tokens"]


def _best(prefixes: list[str], place: object) -> str:
    """What stands before the names of the network to take: of a teacher before any other, of a student last."""
    ranked = sorted((0 if FOLLOWS.search(p) else 2 if "student" in p else 1, p) for p in prefixes)
    if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
        names = ", ".join(sorted(p.rstrip(".") or "one without a name" for p in prefixes))
        raise UsageError(f"{place}: holds several networks ({names}); save one of them")
    return ranked[0][1]


def _group(name: str, prefix: str) -> str:
    """The part of a file that a tensor belongs to: the first words in which its name differs from `prefix`."""
    words, theirs = name.split("."), prefix.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(words, theirs)) if a != b), len(theirs))
    return ".".join(words[: shared + 1])


def _renamed(name: str) -> str:
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name


def _join(state: dict[str, Tensor], parts: list[str], whole: str) -> None:
    """Several layers of the same input as one; a part without a bias has one of zeros, if another has any."""
    if not all(f"{part}.weight" in state for part in parts):
        return
    weights = [state.pop(f"{part}.weight") for part in parts]
    biases = [state.pop(f"{part}.bias", None) for part in parts]
    state[f"{whole}.weight"] = torch.cat(weights)
    if any(bias is not None for bias in biases):
        filled = [torch.zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        state[f"{whole}.bias"] = torch.cat(filled)


def _mlp(state: dict[str, Tensor], mlp: str) -> None:
    """The MLP of a block: fc1 and fc2; or w12, which gives the gate and then the value, and w3."""
    if f"{mlp}w2.weight" in state and f"{mlp}w1.weight" not in state:
        renamed = {"w2": "fc1", "w3": "fc2"}
    else:
        _join(state, [f"{mlp}w1", f"{mlp}w2"], f"{mlp}w12")
        first, second = (state.get(f"{mlp}{fc}.weight") for fc in ("fc1", "fc2"))
        is_packed = first is not None and second is not None and len(first) == 2 * second.shape[1]
        renamed = {"fc1": "w12", "fc2": "w3"} if is_packed or f"{mlp}w12.weight" in state else {}
    for old, new in renamed.items():
        for kind in ("weight", "bias"):
            if f"{mlp}{old}.{kind}" in state:
                state[f"{mlp}{new}.{kind}"] = state.pop(f"{mlp}{old}.{kind}")


def _mask_bias(state: dict[str, Tensor], qkv: str, without: int, place: object) -> None:
    """Apply the mask of a bias. UsageError if that of the keys, the `without` numbers in its middle, is not zero."""
    mask, bias = state.pop(f"{qkv}.bias_mask", None), state.get(f"{qkv}.bias")
    if bias is not None and mask is not None:
        state[f"{qkv}.bias"] = bias = torch.where(mask == 0, 0.0, bias * mask)
    if bias is not None and without and bias[without : 2 * without].any():
        raise UsageError(f"{place}: has a bias of keys ({qkv}), which a ViT with rotary positions has not; {OURS}")
