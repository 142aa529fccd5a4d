"""Weights that people have, as a backbone: a run, a backbone folder, or files of DINOv2, DINOv3, transformers or timm.

files.py reads tensors, layouts.py finds the network among them, described.py reads what stands beside them.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from troodon.config import UsageError
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.described import Described, read_config, read_preprocessing
from troodon.model.files import IMAGES, SHARDS, read_shards, read_tensors
from troodon.model.hub import RELEASED, Named, find, suggestion, tell
from troodon.model.layouts import OURS, Layout, complete, find_network, foreign
from troodon.model.rotary import BASE, periods
from troodon.model.vit import ViT
from troodon.run import read_manifest

LICENCE = "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
NORM_EPS = {False: 1e-6, True: 1e-5}  # of DINOv2, and of DINOv3, which has rotary positions
SATELLITE = ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143))  # mean and deviation of DINOv3's images from above


def load_weights(path: str | Path) -> Backbone:
    """The backbone in a run, a backbone folder, a file of weights, or a folder of Hugging Face or timm; or of a name.

    A line says what of a file is left, and what it is without. UsageError, with the remedy, for anything else.
    """
    place, path = str(path), Path(path)
    if not path.exists():
        if re.match(r"\w+:/+\w", place):
            raise UsageError(f"{place}: an address; download the file first, and give its path")
        if (named := find(place)) is None:
            raise UsageError(f"{place}: no such run, backbone folder or weights{suggestion(place)}")
        return _by_name(named, place)
    if not path.is_dir():
        sight = Preprocessing(mean=SATELLITE[0], std=SATELLITE[1]) if "sat493m" in path.name else Preprocessing()
        return _backbone(read_tensors(path), None, sight, path.stem, path)
    if (path / "backbone.json").exists():
        return Backbone.load(path)
    if (path / "backbone").is_dir():
        return Backbone.load(path / "backbone")
    if (described := read_config(path)) is not None:
        preprocessing = read_preprocessing(path, described)
        return _backbone(read_shards(path), described, preprocessing, path.resolve().name, path)
    raise UsageError(f"{path}: {_no_weights(path)}")


def _by_name(named: Named, place: str) -> Backbone:
    """The network of a name; one that was released resizes positions as it was trained, whoever wrote the file."""
    backbone = replace(load_weights(named.path), name=named.name)
    config = backbone.config
    if place not in RELEASED or config.positions == "rope" or config.registers:
        return backbone
    config = replace(config, position_offset=0.1, position_antialias=False)
    return Backbone.from_state_dict(backbone.vit.state_dict(), config, backbone.preprocessing, name=named.name)


def config_from_weights(state: dict[str, Tensor], *, heads: int, norm_eps: float = 1e-6) -> ViTConfig:
    """The config of the network that these weights, under released names, belong to. They do not tell `heads`."""
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    gated = "blocks.0.mlp.w12.weight" in state
    is_rotary = "pos_embed" not in state
    config = ViTConfig(
        dim=dim,
        depth=1 + max(int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in state) if m),
        heads=heads,
        patch=patch,
        grid=ViTConfig.grid if is_rotary else round((state["pos_embed"].shape[1] - 1) ** 0.5),
        registers=registers,
        mlp="swiglu" if gated else "gelu",
        position_offset=0.0 if registers or is_rotary else 0.1,
        position_antialias=bool(registers) or is_rotary,
        channels=channels,
        norm_eps=norm_eps,
        positions="rope" if is_rotary else "learned",
    )
    second = state.get("blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight")
    width = config.mlp_hidden if second is None else second.shape[1]
    return config if width == config.mlp_hidden else replace(config, mlp_width=width)


def _backbone(
    tensors: dict[str, Tensor], described: Described | None, preprocessing: Preprocessing, name: str, place: Path
) -> Backbone:
    layout = find_network(tensors, place)
    complete(layout, place)
    config = _config(layout, described, place)
    with torch.device("meta"):
        unknown = layout.state.keys() - ViT(config).state_dict().keys()
    if unknown and (what := foreign(unknown)).startswith("its tensors seem"):
        raise UsageError(f"{place}: {what}")
    backbone = Backbone.from_state_dict(layout.state, config, preprocessing, name=name)
    if layout.is_rotary:
        layout.notes.append(f"DINOv3's weights have a licence of their own, {LICENCE}")
    if layout.notes:
        tell(f"{place}: {'; '.join(layout.notes)}")
    return backbone


def _config(layout: Layout, described: Described | None, place: Path) -> ViTConfig:
    """The config of a network, with the rule by which the library that wrote it resizes positions."""
    heads = described.heads if described and described.heads else layout.heads
    if not heads or layout.dim % heads:
        rule = f"{heads} heads" if heads else "64, those of a head"
        raise UsageError(f"{place}: {layout.dim} channels are not a multiple of {rule}; {OURS}")
    if layout.is_rotary and "rope_embed.periods" not in layout.state:
        base = described.rope_base if described else BASE
        layout.state["rope_embed.periods"] = periods(layout.dim // heads // 4, base)
    norm_eps = NORM_EPS[layout.is_rotary] if described is None else described.norm_eps(NORM_EPS[layout.is_rotary])
    config = config_from_weights(layout.state, heads=heads, norm_eps=norm_eps)
    if layout.library != "original" and not layout.is_rotary:  # timm always antialiases, transformers with registers
        antialias = layout.library == "timm" or bool(config.registers)
        config = replace(config, position_offset=0.0, position_antialias=antialias)
    if described and layout.library == "transformers":  # an export of ours says more than transformers reads
        config = replace(config, **described.positions)
    if described:
        described.check(config)
    return config


def _no_weights(folder: Path) -> str:
    """What a folder without a network seems to be, and the remedy."""
    names = sorted(path.name for path in folder.iterdir())
    if (read_manifest(folder) or {}).get("kind") == "run":
        return "a run without a checkpoint, so it has no backbone yet; let it train until one"
    wanted = "neither a run, a backbone folder nor a Hugging Face folder"
    if not names:
        return f"{wanted}, but empty"
    if snapshots := sorted(folder.glob("snapshots/*/config.json")):
        return f"{wanted}, but a cache of the hub; give {snapshots[-1].parent}"
    if any(name.endswith(".distcp") for name in names):
        return f"{wanted}, but a sharded checkpoint: python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
    if "adapter_config.json" in names:
        return f"{wanted}, but an adapter (LoRA) without its network; merge it into its network, and save that"
    if "saved_model.pb" in names:
        return f"{wanted}, but a TensorFlow model; {OURS}"
    if files := [name for name in names if name.endswith((".pth", ".pt", ".bin", ".safetensors"))]:
        lacks = " (without its config.json)" if set(files) & set(SHARDS) else ""
        return f"{wanted}{lacks}; give a file of it: {folder / files[0]}"
    if any(name.lower().endswith(IMAGES) for name in names):
        return f"{wanted}, but a folder of images; give it to --data"
    return f"{wanted}; it holds {', '.join(names[:3])}"
