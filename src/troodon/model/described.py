"""What the JSON files beside weights say of a network: config.json and preprocessor_config.json of Hugging Face, timm.

Every field that changes the features is read, or refused with its value; tensors have the last word.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from troodon.config import UsageError
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.files import read_description

TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")


@dataclass(frozen=True)
class Described:
    """What is read of a config.json: the numbers that the weights do not tell."""

    fields: Mapping[str, Any]
    file: Path

    @property
    def heads(self) -> int | None:
        return self.fields.get("num_attention_heads")

    def norm_eps(self, default: float) -> float:
        return self.fields.get("layer_norm_eps", default)

    @property
    def rope_base(self) -> float:
        return self.fields.get("rope_theta", 100.0)

    @property
    def positions(self) -> dict[str, Any]:
        """How positions are resized, if it says so."""
        return {name: v for name, v in self.fields.items() if name in ("position_offset", "position_antialias")}

    @property
    def is_dinov3(self) -> bool:
        return self.fields.get("model_type") == "dinov3_vit"

    def check(self, config: ViTConfig) -> None:
        """UsageError for a field that this network cannot follow, or that says otherwise than the tensors."""
        fields, gated = self.fields, self.fields.get("use_swiglu_ffn", self.fields.get("use_gated_mlp", False))
        expected = {
            "hidden_size": config.dim,
            "num_hidden_layers": config.depth,
            "num_channels": config.channels,
            "num_register_tokens": config.registers,
            "patch_size": config.patch,
            "intermediate_size": config.mlp_hidden,
        }
        for name, number in expected.items():
            if name in fields and set(_sides(fields[name])) != {number}:
                self._refuse(name, f"the tensors have {number}")
        grid = {side // config.patch for side in _sides(fields.get("image_size", config.grid * config.patch))}
        if not self.is_dinov3 and grid != {config.grid}:
            self._refuse("image_size", f"positions in the tensors are those of {config.grid} x {config.grid} patches")
        if "mlp_ratio" in fields and config.mlp_hidden != _hidden(config.dim, fields["mlp_ratio"], gated):
            self._refuse("mlp_ratio", f"MLPs in the tensors have {config.mlp_hidden} channels inside")
        if gated != (config.mlp == "swiglu") and self.fields.get("model_type") in TYPES:
            self._refuse(
                "use_gated_mlp" if self.is_dinov3 else "use_swiglu_ffn", f"MLPs in the tensors are {config.mlp}"
            )
        activation = "silu" if gated and self.is_dinov3 else "gelu"
        if fields.get("hidden_act", activation) != activation and not (gated and not self.is_dinov3):
            self._refuse("hidden_act", f"the network's is {activation}")
        if fields.get("quantization_config"):
            self._refuse("quantization_config", "give weights that are not quantized")
        names = fields.get("architectures") or []
        if fields.get("apply_layernorm", True) is False and any(str(name).endswith("Backbone") for name in names):
            self._refuse("apply_layernorm", "features here are those after the last norm")

    def _refuse(self, name: str, reason: str) -> None:
        raise UsageError(f"{self.file}: {name} {self.fields.get(name)!r}, but {reason}")


def read_config(folder: Path) -> Described | None:
    """The config.json of a folder; None if it has none. UsageError for a network that is not DINOv2's or DINOv3's."""
    file = folder / "config.json"
    if not file.exists():
        return None
    described = Described(read_description(file), file)
    kind = described.fields.get("model_type")
    if "architecture" not in described.fields and kind not in TYPES:  # timm says `architecture`: its tensors tell
        raise UsageError(f"{folder}: a Hugging Face model of type {kind!r}, not dinov2 or dinov3_vit")
    return described


def read_preprocessing(folder: Path, described: Described | None) -> Preprocessing:
    """The preprocessing that files beside the weights describe; that of DINOv2 for what they do not say."""
    default = Preprocessing()
    if (folder / "preprocessor_config.json").exists():
        p = read_description(folder / "preprocessor_config.json")
        crops, size = p.get("do_center_crop", "crop_size" in p), p.get("size")
        crop = _height_width(p.get("crop_size", default.crop) if crops else size or default.crop)
        shorter = size.get("shortest_edge") if isinstance(size, Mapping) else size
        resize = shorter or min(_height_width(size) if size else crop)
        mean, std = p.get("image_mean"), p.get("image_std")
        if p.get("do_normalize", True) is False:
            mean, std = [[number] * len(default.mean) for number in (0.0, 1.0)]
        return _preprocessing(resize if crops else min(crop), crop, mean, std)
    if described is not None and isinstance(given := described.fields.get("pretrained_cfg"), Mapping):
        crop = tuple(given.get("input_size", (3, 224, 224))[1:])
        resize = round(min(crop) / given.get("crop_pct", 1.0))
        return _preprocessing(resize, crop, given.get("mean"), given.get("std"))
    return default


def _preprocessing(
    resize: int, crop: tuple[int, ...], mean: Iterable[float] | None, std: Iterable[float] | None
) -> Preprocessing:
    default, (height, width) = Preprocessing(), crop
    return Preprocessing(
        resize, height if height == width else (height, width), tuple(mean or default.mean), tuple(std or default.std)
    )


def _height_width(size: Any) -> tuple[int, int]:
    """Height and width of a size in any of the forms that these files have."""
    if isinstance(size, Mapping):
        side = size.get("shortest_edge", 224)
        return size.get("height", side), size.get("width", side)
    sides = _sides(size)
    return sides[0], sides[-1]


def _sides(size: Any) -> list[int]:
    return list(size) if isinstance(size, list | tuple) else [size]


def _hidden(dim: int, ratio: float, gated: bool) -> int:
    """Channels inside an MLP, as transformers computes them for DINOv2."""
    hidden = int(dim * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden
