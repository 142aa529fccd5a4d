"""A trained network as a folder: the one door between those that train and those that use.

    model.safetensors   the weights, under the names of the released ones
    backbone.json       the network's numbers and its preprocessing
    manifest.json       kind and fingerprint

`open_weights` also reads the released weights: the original .pth, or a Hugging Face folder.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from troodon.config import UsageError, fingerprint, nearest, pair, to_dict
from troodon.model import inference
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.vit import Tokens, ViT
from troodon.run import MANIFEST, publish, read_json, write_json

# Shape suffixes: B images, C colours, H W pixels, D channels, R registers, h w rows and columns of patches.

LONGEST = 4  # times what the crop's shape needs of a side: the rest is cut before resizing, and never shown anyway
HEAD_CHANNELS = 64  # of every released model


@dataclass(frozen=True)
class Features:
    """Frozen features of B images."""

    cls: Tensor  # (B, D) class token after the last norm
    patches: Tensor  # (B, h, w, D)
    registers: Tensor  # (B, R, D)
    blocks: list[tuple[Tensor, Tensor]]  # of the last blocks, oldest first: class token (B, D), mean patch (B, D)


@dataclass(frozen=True)
class Backbone:
    """A ViT that is used, not trained. `read` turns a path into pixels; whoever loads the backbone lends it."""

    vit: ViT
    preprocessing: Preprocessing
    name: str
    fingerprint: str
    read: Callable[[str | Path], np.ndarray] | None = None
    compute: torch.dtype = torch.float32
    network: ViT | None = None  # what `faster` made of `vit`, which stays what it is

    @property
    def config(self) -> ViTConfig:
        return self.vit.config

    @property
    def channels(self) -> int:
        return self.config.channels

    @property
    def device(self) -> torch.device:
        return self.vit.cls_token.device

    def to(self, device: str | torch.device) -> "Backbone":
        """The same backbone there, as it was before `faster`, which looks at the device."""
        return dataclasses.replace(self, vit=self.vit.to(device), compute=torch.float32, network=None)

    def faster(self, compute: str = "auto", *, compile: bool = False) -> "Backbone":
        """The same backbone, whose `features` take less time: products in "bf16", "fp32", or what wins here ("auto").

        In bf16 features are within a hundredth of those in fp32, which `features` gives otherwise. `compile` takes a
        minute or more before the first images of each size. UsageError for another `compute`.
        """
        known = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if compute not in ("auto", *known):
            raise nearest("compute", compute, ["auto", *known])
        dtype = inference.chosen(self.vit, pair(self.preprocessing.crop)) if compute == "auto" else known[compute]
        return dataclasses.replace(self, compute=dtype, network=inference.faster(self.vit, dtype, compile=compile))

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, C) arrays of any sizes -> (B, C, *crop), resized, cropped and normalised.

        UsageError for an image of other channels than the network's.
        """
        for image in images:
            if image.shape[2:] != (self.channels,):
                said = f"an image of shape {image.shape}: this network takes (height, width, {self.channels})"
                raise UsageError(said)
        if len(self.preprocessing.mean) != self.channels:
            counts = f"its preprocessing has {len(self.preprocessing.mean)} means for {self.channels} channels"
            raise UsageError(f"{self.name}: {counts}; give it prepared tensors")
        return torch.stack([_prepare(image, self.preprocessing) for image in images])

    @torch.inference_mode()
    def features(self, images: Tensor | Sequence[str | Path | np.ndarray], *, blocks: int = 1) -> Features:
        """Features of images: paths, uint8 (H, W, C) arrays, PIL images, or a prepared (B, C, H, W) tensor.

        C is the network's number of channels; PIL images become RGB where it is 3, and grey where it is 1. A prepared
        tensor may have any height and width that patches divide. `blocks` is how many of the last blocks to return
        class and mean patch tokens of.
        """
        if not isinstance(images, Tensor):
            images = self.prepare([self._pixels(image) for image in images])
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()  # the copy goes beside what the device still does
        images, width = images.to(self.device, non_blocking=True), images.shape[-1] // self.config.patch
        found = []
        for per_block in self.tokens(images, blocks):
            means = [(t.cls_BD, t.patches_BPD.mean(1)) for t in per_block]
            found.append(Features(per_block[-1].cls_BD, per_block[-1].patches_BPD, per_block[-1].registers_BRD, means))
        joined = found[0] if len(found) == 1 else _joined(found)
        return dataclasses.replace(joined, patches=joined.patches.unflatten(1, (-1, width)))

    def tokens(self, images_BCHW: Tensor, blocks: int) -> Iterator[list[Tokens]]:
        """Tokens after each of the last blocks, oldest first, of a few images at a time, as `faster` has set it."""
        for piece in inference.pieces(images_BCHW, self.vit):
            with torch.inference_mode(), inference.autocast(self.device, self.compute):
                found = (self.network or self.vit).last_blocks([piece], blocks)
            yield [tokens for (tokens,) in found]

    def _pixels(self, image: str | Path | np.ndarray) -> np.ndarray:
        if isinstance(image, str | Path):
            if self.read is None:
                raise UsageError(f"{image}: this backbone takes pixels; troodon.load gives one that reads paths")
            return self.read(image)
        if hasattr(image, "convert") and self.channels in (1, 3):
            image = image.convert("RGB" if self.channels == 3 else "L")
        pixels = np.asarray(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    def save(self, folder: Path) -> None:
        """Write the folder, whole or not at all; one that is there is replaced."""
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in self.vit.state_dict().items()}
        described = {"network": to_dict(self.config), "preprocessing": to_dict(self.preprocessing), "name": self.name}
        with publish(folder, "backbone", _fingerprint(state, described), described) as partial:
            save_file(state, partial / "model.safetensors")
            write_json(partial / "backbone.json", described)

    @staticmethod
    def load(folder: Path) -> "Backbone":
        """Read a backbone folder. UsageError when it is not one or was written for other code."""
        if not (folder / "backbone.json").exists():
            raise UsageError(f"{folder}: not a backbone folder (it has no backbone.json)")
        described = read_json(folder / "backbone.json")
        try:
            config = ViTConfig(**described["network"])
            numbers: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in described["preprocessing"].items()
            }
            preprocessing = Preprocessing(**numbers)
        except (TypeError, KeyError) as error:
            raise UsageError(f"{folder / 'backbone.json'}: cannot be read by this version: {error}") from None
        return of_state(
            load_file(folder / "model.safetensors"),
            config,
            preprocessing,
            name=described["name"],
            known_as=read_json(folder / MANIFEST)["fingerprint"],
        )

    @staticmethod
    def random(config: ViTConfig, preprocessing: Preprocessing, seed: int = 0) -> "Backbone":
        """An untrained network: what every trained one must beat."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit = ViT(config)
            vit.initialize()
        return of_state(vit.state_dict(), config, preprocessing, name="random")


def _joined(found: list[Features]) -> Features:
    """Of one piece after another."""
    per_block = zip(*(f.blocks for f in found), strict=True)
    return Features(
        torch.cat([f.cls for f in found]),
        torch.cat([f.patches for f in found]),
        torch.cat([f.registers for f in found]),
        [(torch.cat([cls for cls, _ in block]), torch.cat([mean for _, mean in block])) for block in per_block],
    )


def of_state(
    state: dict[str, Tensor], config: ViTConfig, preprocessing: Preprocessing, *, name: str, known_as: str | None = None
) -> Backbone:
    """A backbone from weights that must fit exactly. UsageError, naming what does not, otherwise."""
    with torch.device("meta"):
        vit = ViT(dataclasses.replace(config, drop_path=0.0))
    try:
        vit.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UsageError(f"{name}: weights do not fit the network: {' '.join(str(error).split())}") from None
    described = {"network": to_dict(config), "preprocessing": to_dict(preprocessing), "name": name}
    known_as = known_as or _fingerprint(state, described)
    return Backbone(vit.requires_grad_(False).eval(), preprocessing, name, known_as)


def open_weights(path: Path) -> Backbone:
    """A backbone folder, a run (its backbone), released DINOv2 weights (.pth), or a Hugging Face folder."""
    if path.is_dir():
        if (path / "backbone.json").exists():
            return Backbone.load(path)
        if (path / "backbone").is_dir():
            return Backbone.load(path / "backbone")
        if (path / "config.json").exists():
            return _hugging_face(path)
        raise UsageError(f"{path}: neither a run, a backbone folder nor a Hugging Face folder")
    if path.suffix in (".pth", ".pt") and path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        return _released(state.get("teacher", state), path.stem)
    if path.exists():
        raise UsageError(f"{path}: not weights; expected a folder or a .pth file")
    raise UsageError(f"{path}: no such run, backbone folder or weights")


def config_of(state: dict[str, Tensor], *, heads: int) -> ViTConfig:
    """The network that these weights (released names) belong to; only the number of heads leaves no trace."""
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
    config = config_of(state, heads=state["cls_token"].shape[-1] // HEAD_CHANNELS)
    return of_state(state, config, Preprocessing(), name=name)


HUGGING_FACE = [  # their name -> ours, applied in order; query, key and value are joined besides
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
    described = json.loads((folder / "config.json").read_text())
    if not str(described.get("model_type", "")).startswith("dinov2"):
        raise UsageError(f"{folder}: a Hugging Face model of type {described.get('model_type')!r}, not dinov2")
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for pattern, ours in HUGGING_FACE:
            name = re.sub(pattern, ours, name)
        state[name] = tensor.float()
    for name in [n for n in state if ".attn.query." in n]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("query", "qkv")] = torch.cat(parts)
    state = {n: t for n, t in state.items() if not n.startswith("classifier")}
    config = config_of(state, heads=described["num_attention_heads"])
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
    return of_state(state, config, preprocessing, name=folder.resolve().name)


def _prepare(image_HWC: np.ndarray, p: Preprocessing) -> Tensor:
    crop_h, crop_w = pair(p.crop)
    height, width = image_HWC.shape[:2]
    tallest, widest = max(1, LONGEST * width * crop_h // crop_w), max(1, LONGEST * height * crop_w // crop_h)
    top, left = max(0, height - tallest) // 2, max(0, width - widest) // 2
    image_HWC = image_HWC[top : top + tallest, left : left + widest]
    height, width = image_HWC.shape[:2]
    cover = [side * p.resize / min(crop_h, crop_w) for side in (crop_h, crop_w)]
    scale = max(cover[0] / height, cover[1] / width)
    size = [max(round(cover[0]), round(height * scale)), max(round(cover[1]), round(width * scale))]
    x_CHW = torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)  # a copy: some are read-only
    if size != [height, width]:
        x_CHW = F.interpolate(x_CHW[None], size=size, mode="bicubic", antialias=True)[0]
    top, left = (size[0] - crop_h) // 2, (size[1] - crop_w) // 2
    x_CHW = x_CHW[:, top : top + crop_h, left : left + crop_w].float() / 255.0
    mean, std = (torch.tensor(v)[:, None, None] for v in (p.mean, p.std))
    return (x_CHW - mean) / std


def _fingerprint(state: dict[str, Tensor], described: dict) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().contiguous().cpu().numpy().tobytes())
    return fingerprint(described["network"], described["preprocessing"], digest.hexdigest())
