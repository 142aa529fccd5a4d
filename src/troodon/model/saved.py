"""A trained network as a folder: the one interface between training and use.

    model.safetensors   the weights, under the names of the released ones
    backbone.json       the network's config and its preprocessing
    manifest.json       kind and fingerprint

backbone.py uses it on images; weights.py reads the weights of others.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from troodon.config import UsageError, fingerprint, to_dict
from troodon.model.config import Preprocessing, ViTConfig
from troodon.model.vit import ViT
from troodon.run import MANIFEST, article, publish, read_json, read_manifest, write_json

FILES = ("model.safetensors", "backbone.json", MANIFEST)  # of the folder


@dataclass(frozen=True)
class SavedViT:
    """A ViT with its preprocessing, which can be saved and loaded."""

    vit: ViT
    preprocessing: Preprocessing
    name: str
    fingerprint: str

    @property
    def config(self) -> ViTConfig:
        return self.vit.config

    @property
    def channels(self) -> int:
        return self.config.channels

    @property
    def device(self) -> torch.device:
        return self.vit.cls_token.device

    def save(self, folder: str | Path) -> None:
        """Write the folder, whole or not at all. A backbone that is there is replaced.

        UsageError for a folder that holds anything else, of which nothing is removed.
        """
        _check_replaceable(folder := Path(folder))
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in self.vit.state_dict().items()}
        description = {
            "network": to_dict(self.config), "preprocessing": self.preprocessing.as_dict(), "name": self.name
        }  # fmt: skip
        with publish(folder, "backbone", _fingerprint(state, description), description) as partial:
            save_file(state, partial / "model.safetensors")
            write_json(partial / "backbone.json", description)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a backbone folder. UsageError if it is not one, or if this version cannot read it."""
        folder = Path(folder)
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
        return cls.from_state_dict(
            load_file(folder / "model.safetensors"),
            config,
            preprocessing,
            name=description["name"],
            digest=read_json(folder / MANIFEST)["fingerprint"],
        )

    @classmethod
    def from_state_dict(
        cls,
        state: dict[str, Tensor],
        config: ViTConfig,
        preprocessing: Preprocessing,
        *,
        name: str,
        digest: str | None = None,
    ) -> Self:
        """A network from weights that fit the config exactly. UsageError, with what does not fit, otherwise."""
        with torch.device("meta"):
            vit = ViT(dataclasses.replace(config, drop_path=0.0))
        if wrong := _misfits(state, vit.state_dict()):
            raise UsageError(f"{name}: weights do not fit the network: {'; '.join(wrong)}")
        vit.load_state_dict(state, strict=True, assign=True)
        description = {"network": to_dict(config), "preprocessing": preprocessing.as_dict(), "name": name}
        digest = digest or _fingerprint(state, description)
        return cls(vit.requires_grad_(False).eval(), preprocessing, name, digest)


def _misfits(state: dict[str, Tensor], network: dict[str, Tensor]) -> list[str]:
    """In words, the tensors that are missing, that the network has not, and those of another shape."""
    kinds = {
        "without": [name for name in network if name not in state],
        "with the unknown": [name for name in state if name not in network],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(network[name].shape)}"
            for name in network
            if name in state and state[name].shape != network[name].shape
        ],
    }
    rest = {kind: f" and {len(names) - 3} more" * (len(names) > 3) for kind, names in kinds.items()}
    return [f"{kind} {', '.join(names[:3])}{rest[kind]}" for kind, names in kinds.items() if names]


def _check_replaceable(folder: Path) -> None:
    """UsageError if there is anything at `folder` but a backbone, alone in its folder."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder}: is a file; choose another folder for the backbone")
    names = sorted(path.name for path in folder.iterdir())
    if others := [name for name in names if name not in FILES]:
        raise UsageError(f"{folder}: holds {others[0]}, which is not of a backbone; choose another folder")
    if names and (kind := (read_manifest(folder) or {}).get("kind")) != "backbone":
        holds = article(kind) if kind else f"{names[0]}, but no finished backbone"
        raise UsageError(f"{folder}: holds {holds}; choose another folder")


def _fingerprint(state: dict[str, Tensor], description: dict) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().contiguous().cpu().numpy().tobytes())
    return fingerprint(description["network"], description["preprocessing"], digest.hexdigest())
