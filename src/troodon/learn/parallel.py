"""Building a branch on its device, sharded when there is more than one rank."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from troodon import dist
from troodon.learn.config import PretrainConfig
from troodon.learn.method import Branch


def empty(config: PretrainConfig) -> Branch:
    """A branch on the meta device: its shapes, without memory."""
    with torch.device("meta"):
        return Branch(config.vit, config.dino_head, config.ibot_head if config.objective.heads == "separate" else None)


def first_weights(config: PretrainConfig, backbone: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The whole weights that `config.seed` names, on the CPU; the backbone's given ones in place of its own."""
    branch = empty(config).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        branch.initialize()
    if backbone is not None:
        branch.backbone.load_state_dict(backbone)
    return branch.state_dict()


def build(config: PretrainConfig, weights: dict[str, Any], device: torch.device) -> Branch:
    """A branch with these weights: meta device, shard, materialise, load. The device never holds more than a shard."""
    branch = empty(config)
    if dist.world() > 1:
        mesh = init_device_mesh(device.type, (dist.world(),))
        heads = [part for name, part in branch.named_children() if name != "backbone"]
        for part in (*branch.backbone.blocks, branch.backbone, *heads):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)  # also the roots: no backward frees the average's
    branch.to_empty(device=device)
    set_model_state_dict(branch, weights, options=StateDictOptions(full_state_dict=True))
    return branch
