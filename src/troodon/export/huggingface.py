"""A folder that transformers opens: model.safetensors, config.json and preprocessor_config.json.

File names of tensors are those of the hub, which transformers 4 and 5 read.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from troodon.config import UsageError, range_text
from troodon.export import names
from troodon.export.parity import ExportDiffers, Reader
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.rotary import BASE, periods
from troodon.run import version, write_json

CHANNELS = (1, 3)  # of images that its processor resizes: of four, it takes the last for transparency
LEVELS = 1.0  # of 255: mean difference between images that its processor prepares and ours, where sizes round alike


def write(backbone: Backbone, folder: Path) -> Reader:
    """Write the folder; returns how transformers reads it. UsageError for a network that it does not have."""
    config = backbone.config
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.vit.state_dict().items()}
    is_rotary = config.positions == "rope"
    description = _dinov3(config, state["rope_embed.periods"]) if is_rotary else _description(config)
    if description["model_type"] == "dinov2_with_registers":
        state.setdefault("register_tokens", torch.zeros(1, 0, config.dim))
    theirs = (names.dinov3 if is_rotary else names.hugging_face)(state)
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", description)
    notes: dict[str, Any] = {"model_type": description["model_type"]}
    if reason := _no_processor(backbone.preprocessing, config.channels):
        notes["without_processor"] = reason
    else:
        write_json(folder / "preprocessor_config.json", _processor(backbone.preprocessing, config.channels))
        notes["processor"] = _compare_processor(backbone, folder)
    library, read = f"transformers {version('transformers')}", _reader(folder, config)
    if is_rotary:
        own = torch.equal(
            periods(len(state["rope_embed.periods"]), description["rope_theta"]), state["rope_embed.periods"]
        )
        return Reader(library, read, own, "transformers computes periods of rotary positions in fp32", notes)
    antialias = description["model_type"] == "dinov2_with_registers"
    return Reader(
        library,
        read,
        resizes_alike=config.position_offset == 0 and config.position_antialias == antialias,
        rule=f"transformers resizes positions to the exact grid, {'with' if antialias else 'without'} antialias",
        notes=notes,
    )


def _description(config: ViTConfig) -> dict:
    """config.json. Of the two classes it names one that resizes positions as this network does, if there is one: that
    with registers, of which there may be none, antialiases."""
    registers = config.registers or (config.position_antialias and not config.position_offset)
    gated = config.mlp == "swiglu"
    return {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_ratio": _mlp_ratio(config),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_eps,
        "image_size": config.grid * config.patch,
        "patch_size": config.patch,
        "num_channels": config.channels,
        "qkv_bias": True,
        "layerscale_value": config.layer_scale,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": gated,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        **({"num_register_tokens": config.registers} if registers else {}),
        # transformers does not know these two: for `troodon.load`
        "position_offset": config.position_offset,
        "position_antialias": config.position_antialias,
    }


def _dinov3(config: ViTConfig, own: Tensor) -> dict:
    """config.json of DINOv3ViT, with the longest period of rotary positions."""
    gated = config.mlp == "swiglu"
    is_usual = len(own) == 1 or torch.allclose(own, periods(len(own)), rtol=1e-2)
    base = BASE if is_usual else round(own[-1].item() ** (len(own) / (len(own) - 1)), 4)
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_hidden,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "layer_norm_eps": config.norm_eps,
        "image_size": 224,
        "patch_size": config.patch,
        "num_channels": config.channels,
        "num_register_tokens": config.registers,
        "rope_theta": base,
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
        "layerscale_value": config.layer_scale,
        "drop_path_rate": 0.0,
        "torch_dtype": "float32",
    }


def _mlp_ratio(config: ViTConfig) -> int:
    """The ratio that gives the width of the MLP. UsageError if none does: transformers 5 takes whole numbers."""
    for ratio in range(1, 4 * config.mlp_hidden // config.dim + 2):
        hidden = ratio * config.dim
        if config.mlp_hidden == (hidden if config.mlp == "gelu" else (int(hidden * 2 / 3) + 7) // 8 * 8):
            return ratio
    width = f"an MLP of {config.mlp_hidden} channels"
    raise UsageError(f"{width}: transformers has those of a whole ratio to {config.dim}; --to torch or onnx can")


def _processor(preprocessing: Preprocessing, channels: int) -> dict:
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": preprocessing.crop, "width": preprocessing.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _no_processor(preprocessing: Preprocessing, channels: int) -> str:
    """Why a processor of transformers cannot prepare images as this backbone does; "" where it can."""
    if preprocessing.range is not None:
        values = range_text(preprocessing.range)
        return f"its images have the range {values}, and the processors of transformers take 8 bits"
    if isinstance(preprocessing.crop, tuple):
        return f"its crop of {preprocessing.crop[0]} x {preprocessing.crop[1]} is not square, which they do not cover"
    if channels not in CHANNELS or len(preprocessing.mean) != channels:
        return f"its images have {channels} channels, and the processors of transformers take 1 or 3"
    return ""


def _reader(folder: Path, config: ViTConfig):
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()

    def read(images_BCHW: Tensor) -> dict[str, Tensor]:
        tokens_BLD = model(pixel_values=images_BCHW).last_hidden_state
        cls, registers, patches = tokens_BLD.split(
            [1, config.registers, tokens_BLD.shape[1] - 1 - config.registers], dim=1
        )
        grid = [side // config.patch for side in images_BCHW.shape[2:]]
        return {"cls": cls[:, 0], "patches": patches.unflatten(1, grid), "registers": registers}

    return read


def _compare_processor(backbone: Backbone, folder: Path) -> dict:
    """How far images that its processor prepares are from ours, in levels of 255, on smooth images of noise."""
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
    p, random, rows, notes = backbone.preprocessing, np.random.default_rng(0), [], []
    for height, width in ((240, 320), (333, 500), (160, 96), (64, 64)):
        noise = random.integers(0, 255, (height // 16, width // 16, backbone.channels), dtype=np.uint8)
        bands = [Image.fromarray(noise[..., c]).resize((width, height), 3) for c in range(backbone.channels)]
        picture = bands[0] if len(bands) == 1 else Image.merge("RGB", bands)
        values = np.asarray(picture).reshape(height, width, -1)  # transformers 4 takes no grey images of two dimensions
        theirs, ours = processor(values, return_tensors="pt")["pixel_values"], backbone.prepare(values)
        apart = ((theirs - ours).abs().mean(dim=(0, 2, 3)) * torch.tensor(p.std)).mean().item() * 255
        rows.append({"height": height, "width": width, "mean_difference_of_255": apart})
        longer = p.resize * max(height, width) / min(height, width)
        if int(longer) != round(longer):
            notes.append(f"it rounds the longer side down, to {int(longer)} pixels of {longer:.1f}: {apart:.1f} of 255")
        elif apart > LEVELS:
            raise ExportDiffers(f"its processor prepares {width} x {height} pixels otherwise: by {apart:.1f} of 255")
    return {"images": rows, "notes": [f"Of an image of 333 x 500 pixels, {note}" for note in notes]}
