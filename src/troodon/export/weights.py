"""Weights as one file under the names of others: timm's, and those of the released .pth files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from troodon.config import UsageError
from troodon.export import names
from troodon.export.network import Network
from troodon.export.parity import Reader
from troodon.model.backbone import Backbone
from troodon.model.config import ViTConfig
from troodon.run import version

SIZES = {384: ("small", 12, 6), 768: ("base", 12, 12), 1024: ("large", 24, 16), 1536: ("giant", 40, 24)}
EXACT = {"position_offset": 0.0, "position_antialias": True}  # how timm resizes positions
RELEASED = {"position_offset": 0.1, "position_antialias": False}  # released weights without registers


def write_timm(backbone: Backbone, file: Path) -> Reader:
    """A .safetensors file for `timm.create_model`, whose line is among the notes; timm reads it back where it imports.

    timm needs torchvision. Without it, our own reader does. UsageError for a norm that timm's network does not have.
    """
    config, state = backbone.config, _state(backbone)
    if config.norm_eps != 1e-6:
        raise UsageError(f"layer norms with eps {config.norm_eps:g}: timm's have 1e-06; --to torch or onnx can")
    save_file(names.timm(state), file)
    model, options = create_model(config)
    line = f"timm.create_model({', '.join([repr(model), *(f'{n}={v!r}' for n, v in options.items())])})"
    rule = _rule(config, EXACT, "timm resizes positions to the exact grid, with antialias")
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the wheel of torchvision does not import beside every torch
        reason = " ".join(str(error).split())[:120]
        notes = {"line": line, "not_by_timm": f"timm does not import here ({reason}): Troodon read its names"}
        read_as = replace(config, **EXACT)
        again = Backbone.from_state_dict(
            names.from_timm(load_file(file), config), read_as, backbone.preprocessing, name=file.name
        )
        return Reader(f"troodon {version()}", Network(again.vit), not rule, rule.get("rule", ""), notes)
    network = timm.create_model(model, **options).eval()
    network.load_state_dict(load_file(file), strict=True)

    def read(images_BCHW: Tensor) -> dict[str, Tensor]:
        tokens_BLD = network.forward_features(images_BCHW)
        cls, registers, patches = tokens_BLD.split(
            [1, config.registers, tokens_BLD.shape[1] - 1 - config.registers], dim=1
        )
        grid = [side // config.patch for side in images_BCHW.shape[2:]]
        return {"cls": cls[:, 0], "patches": patches.unflatten(1, grid), "registers": registers}

    return Reader(f"timm {version('timm')}", read, not rule, rule.get("rule", ""), {"line": line})


def create_model(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """The name and the options of timm's network of the same sizes; options are those that differ from the name's."""
    gated = config.mlp == "swiglu"
    size, depth, heads = SIZES.get(config.dim, ("giant" if gated else "small", 0, 0))
    if gated != (size == "giant"):
        size, depth, heads = ("giant" if gated else "small"), 0, 0
    name = f"vit_{size}_patch14_{'reg4_' if config.registers else ''}dinov2"
    options: dict[str, Any] = {"img_size": config.grid * config.patch, "dynamic_img_size": True}
    dim = {"small": 384, "base": 768, "large": 1024, "giant": 1536}[size]
    different = {
        "patch_size": (config.patch, 14),
        "embed_dim": (config.dim, dim),
        "depth": (config.depth, depth),
        "num_heads": (config.heads, heads),
        "in_chans": (config.channels, 3),
        "reg_tokens": (config.registers, 4 if config.registers else 0),
    }
    options |= {option: ours for option, (ours, named) in different.items() if ours != named}
    width, usual = (2 * config.mlp_hidden, 2.66667 * 2) if gated else (config.mlp_hidden, 4.0)
    if int(config.dim * usual) != width:
        options["mlp_ratio"] = next(
            r for r in (width / config.dim, (width + 0.5) / config.dim) if int(config.dim * r) == width
        )
    return name, options


def write_original(backbone: Backbone, file: Path) -> Reader:
    """A .pth file of weights under the released names; notes say what they leave open, for the reference's code."""
    config = backbone.config
    torch.save(_state(backbone), file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    again = Backbone.from_state_dict(state, config, backbone.preprocessing, name=file.name)
    arguments = {
        "img_size": config.grid * config.patch,
        "patch_size": config.patch,
        "in_chans": config.channels,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": 4,
        "init_values": config.layer_scale,
        "ffn_layer": "mlp" if config.mlp == "gelu" else "swiglufused",
        "block_chunks": 0,
        "num_register_tokens": config.registers,
        "interpolate_antialias": config.position_antialias,
        "interpolate_offset": config.position_offset,
    }
    usual = EXACT if config.registers else RELEASED
    rule = _rule(config, usual, "released weights with registers resize positions exactly and with antialias, others "
                 "with an offset of 0.1 and without; the reference takes this as arguments")  # fmt: skip
    return Reader(f"troodon {version()}", Network(again.vit), notes={"arguments": arguments} | rule)


def _rule(config: ViTConfig, theirs: dict, words: str) -> dict[str, str]:
    """The words of a rule for positions; nothing where it is that of the network."""
    ours = {name: getattr(config, name) for name in theirs}
    return {} if ours == theirs else {"rule": words}


def _state(backbone: Backbone) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.vit.state_dict().items()}
