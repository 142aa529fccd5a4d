"""A trained network as a folder: the one interface between training and use.

    model.safetensors   the weights, under the names of the released ones
    backbone.json       the network's config and its preprocessing
    manifest.json       kind and fingerprint

weights.py reads the weights of others into the same object.
"""

import dataclasses
import hashlib
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

LONGEST = 4  # an image side longer than this many times what the crop needs is cut before resizing: it is never shown


@dataclass(frozen=True)
class Features:
    """Frozen features of B images."""

    cls: Tensor  # (B, D) class token after the last norm
    patches: Tensor  # (B, h, w, D)
    registers: Tensor  # (B, R, D)
    blocks: list[tuple[Tensor, Tensor]]  # class token (B, D) and mean patch (B, D) of the last blocks, earliest first


@dataclass(frozen=True)
class Backbone:
    """A ViT for inference with its preprocessing. `read` decodes the image at a path; `troodon.load` provides it."""

    vit: ViT
    preprocessing: Preprocessing
    name: str
    fingerprint: str
    read: Callable[[str | Path], np.ndarray] | None = None
    compute: torch.dtype = torch.float32
    network: ViT | None = None  # the copy of `vit` that `optimized` made for inference

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
        """The same backbone on a device, without what `optimized` did, which depends on the device."""
        return dataclasses.replace(self, vit=self.vit.to(device), compute=torch.float32, network=None)

    def optimized(self, compute: str = "auto", *, compile: bool = False) -> "Backbone":
        """The same backbone with faster `features`: products in "bf16", "fp32", or the faster of both here ("auto").

        Features in bf16 differ from those in fp32, the default of `features`, by less than a hundredth. `compile` takes
        a minute or more before the first images of each size. UsageError for another `compute`.
        """
        known = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if compute not in ("auto", *known):
            raise nearest("compute", compute, ["auto", *known])
        dtype = (
            inference.fastest_dtype(self.vit, pair(self.preprocessing.crop)) if compute == "auto" else known[compute]
        )
        return dataclasses.replace(self, compute=dtype, network=inference.optimized(self.vit, dtype, compile=compile))

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, C) arrays of any sizes -> (B, C, *crop), resized, cropped and normalised.

        UsageError for an image with another number of channels than the network's.
        """
        for image in images:
            if image.shape[2:] != (self.channels,):
                expected = f"this network takes (height, width, {self.channels})"
                raise UsageError(f"an image of shape {image.shape}: {expected}")
        if len(self.preprocessing.mean) != self.channels:
            counts = f"its preprocessing has {len(self.preprocessing.mean)} means for {self.channels} channels"
            raise UsageError(f"{self.name}: {counts}; give it prepared tensors")
        return torch.stack([_prepare(image, self.preprocessing) for image in images])

    @torch.inference_mode()
    def features(self, images: Tensor | Sequence[str | Path | np.ndarray], *, blocks: int = 1) -> Features:
        """Features of images: paths, uint8 (H, W, C) arrays, PIL images, or a prepared (B, C, H, W) tensor.

        C is the network's number of channels; PIL images become RGB if it is 3, and grey if it is 1. A prepared tensor
        may have any height and width that the patch size divides. `blocks` is the number of last blocks of which
        class and mean patch tokens are returned.
        """
        if not isinstance(images, Tensor):
            images = self.prepare([self._pixels(image) for image in images])
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()  # the copy overlaps with work of the device
        images, width = images.to(self.device, non_blocking=True), images.shape[-1] // self.config.patch
        parts = []
        for per_block in self.tokens(images, blocks):
            means = [(t.cls_BD, t.patches_BPD.mean(1)) for t in per_block]
            parts.append(Features(per_block[-1].cls_BD, per_block[-1].patches_BPD, per_block[-1].registers_BRD, means))
        features = parts[0] if len(parts) == 1 else _concatenated(parts)
        return dataclasses.replace(features, patches=features.patches.unflatten(1, (-1, width)))

    def tokens(self, images_BCHW: Tensor, blocks: int) -> Iterator[list[Tokens]]:
        """Tokens after each of the last blocks, earliest first, of a few images at a time."""
        for minibatch_BCHW in inference.minibatches(images_BCHW, self.vit):
            with torch.inference_mode(), inference.autocast(self.device, self.compute):
                per_block = (self.network or self.vit).last_blocks([minibatch_BCHW], blocks)
            yield [tokens for (tokens,) in per_block]

    def _pixels(self, image: str | Path | np.ndarray) -> np.ndarray:
        if isinstance(image, str | Path):
            if self.read is None:
                raise UsageError(f"{image}: this backbone takes pixels; load it with troodon.load to read paths")
            return self.read(image)
        if hasattr(image, "convert") and self.channels in (1, 3):
            image = image.convert("RGB" if self.channels == 3 else "L")
        pixels = np.asarray(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    def save(self, folder: Path) -> None:
        """Write the folder, whole or not at all. A folder that is there is replaced."""
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in self.vit.state_dict().items()}
        description = {"network": to_dict(self.config), "preprocessing": to_dict(self.preprocessing), "name": self.name}
        with publish(folder, "backbone", _fingerprint(state, description), description) as partial:
            save_file(state, partial / "model.safetensors")
            write_json(partial / "backbone.json", description)

    @staticmethod
    def load(folder: Path) -> "Backbone":
        """Read a backbone folder. UsageError if it is not one, or if this version cannot read it."""
        if not (folder / "backbone.json").exists():
            raise UsageError(f"{folder}: not a backbone folder (it has no backbone.json)")
        description = read_json(folder / "backbone.json")
        try:
            config = ViTConfig(**description["network"])
            numbers: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in description["preprocessing"].items()
            }
            preprocessing = Preprocessing(**numbers)
        except (TypeError, KeyError) as error:
            raise UsageError(f"{folder / 'backbone.json'}: cannot be read by this version: {error}") from None
        return from_state_dict(
            load_file(folder / "model.safetensors"),
            config,
            preprocessing,
            name=description["name"],
            digest=read_json(folder / MANIFEST)["fingerprint"],
        )

    @staticmethod
    def random(config: ViTConfig, preprocessing: Preprocessing, seed: int = 0) -> "Backbone":
        """An untrained network, the baseline of every trained one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit = ViT(config)
            vit.initialize()
        return from_state_dict(vit.state_dict(), config, preprocessing, name="random")


def _concatenated(parts: list[Features]) -> Features:
    per_block = zip(*(f.blocks for f in parts), strict=True)
    return Features(
        torch.cat([f.cls for f in parts]),
        torch.cat([f.patches for f in parts]),
        torch.cat([f.registers for f in parts]),
        [(torch.cat([cls for cls, _ in block]), torch.cat([mean for _, mean in block])) for block in per_block],
    )


def from_state_dict(
    state: dict[str, Tensor], config: ViTConfig, preprocessing: Preprocessing, *, name: str, digest: str | None = None
) -> Backbone:
    """A backbone from weights that fit the config exactly. UsageError, with the names that do not fit, otherwise."""
    with torch.device("meta"):
        vit = ViT(dataclasses.replace(config, drop_path=0.0))
    try:
        vit.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UsageError(f"{name}: weights do not fit the network: {' '.join(str(error).split())}") from None
    description = {"network": to_dict(config), "preprocessing": to_dict(preprocessing), "name": name}
    digest = digest or _fingerprint(state, description)
    return Backbone(vit.requires_grad_(False).eval(), preprocessing, name, digest)


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


def _fingerprint(state: dict[str, Tensor], description: dict) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().contiguous().cpu().numpy().tobytes())
    return fingerprint(description["network"], description["preprocessing"], digest.hexdigest())
