"""Parameter groups: which rule governs each parameter, said once and covering all of them."""

import re
from collections import defaultdict

import torch
from torch import Tensor, nn

from troodon.learn.config import OptimConfig
from troodon.learn.schedules import Knobs

UNDECAYED = re.compile(r"\.bias$|norm|gamma")  # biases, LayerNorms, LayerScale


def factors(name: str, depth: int, config: OptimConfig) -> tuple[float, float, bool]:
    """Factor of the learning rate, factor of the weight decay, and whether it is a head's last layer."""
    lr = config.layer_decay ** distance(name, depth) * (config.patch_embed if "patch_embed" in name else 1.0)
    return lr, 0.0 if UNDECAYED.search(name) else 1.0, "last_layer" in name


def distance(name: str, depth: int) -> int:
    """Blocks between a parameter and the output: 0 for heads and the last norm, depth + 1 for the embeddings."""
    if not name.startswith("backbone.") or name.startswith("backbone.norm."):
        return 0
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    return depth - int(block[1]) if block else depth + 1


def adamw(student: nn.Module, depth: int, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over every parameter of the student, in groups that share their factors."""
    groups = defaultdict(list)
    for name, parameter in student.named_parameters():
        groups[factors(name, depth, config)].append(parameter)
    listed = [{"params": p, "factors": f} for f, p in groups.items()]
    return torch.optim.AdamW(listed, lr=0.0, betas=config.betas, foreach=True)


def apply(optimizer: torch.optim.Optimizer, knobs: Knobs) -> None:
    """Set learning rate and weight decay of every group for this step."""
    for group in optimizer.param_groups:
        lr, weight_decay, last_layer = group["factors"]
        group["lr"] = lr * (knobs.last_layer_lr if last_layer else knobs.lr)
        group["weight_decay"] = weight_decay * knobs.weight_decay


def clip(student: nn.Module, largest: float) -> Tensor:
    """Scale the gradient of each sub-network to a norm of at most `largest`; the norm of all before that, ()."""
    norms = [nn.utils.clip_grad_norm_(part.parameters(), largest) for part in student.children()]
    return torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]).norm()
