"""Parameter groups: one rule for each parameter, which covers all of them; AdamW and gradient clipping."""

import re
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from troodon.learn.config import OptimConfig
from troodon.learn.schedules import ScheduledValues

UNDECAYED = re.compile(r"\.bias$|norm|gamma")  # biases, LayerNorms, LayerScale


class Factors(NamedTuple):
    """The rule of a parameter: factors of the learning rate and of weight decay, and which schedules it follows."""

    lr: float
    weight_decay: float
    last_layer: bool  # of a head
    backbone: bool


def factors(name: str, depth: int, config: OptimConfig) -> Factors:
    lr = config.layer_decay ** distance(name, depth) * (config.patch_embed if "patch_embed" in name else 1.0)
    decay = 0.0 if UNDECAYED.search(name) else 1.0
    return Factors(lr, decay, "last_layer" in name, name.startswith("backbone."))


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
    return torch.optim.AdamW(listed, lr=0.0, betas=config.betas, fused=True)


def apply(optimizer: torch.optim.Optimizer, scheduled: ScheduledValues) -> None:
    """Set learning rate and weight decay of every group for this step."""
    for group in optimizer.param_groups:
        factors = Factors(*group["factors"])
        frozen = factors.backbone and scheduled.backbone_frozen
        group["lr"] = 0.0 if frozen else factors.lr * (scheduled.last_layer_lr if factors.last_layer else scheduled.lr)
        group["weight_decay"] = factors.weight_decay * scheduled.weight_decay


def clip(student: nn.Module, config: OptimConfig) -> dict[str, Tensor]:
    """Scale gradients to a norm of at most `config.clip`; the norms before that, of all and of each part, () each."""
    norms = {name: _norm(part) for name, part in student.named_children()}
    whole = torch.stack([*norms.values()]).norm()
    for name, part in student.named_children():
        norm = whole if config.clip_over == "whole" else norms[name]
        nn.utils.clip_grads_with_norm_(part.parameters(), config.clip, norm)
    return {"grad_norm": whole} | {f"grad_norm_{name}": norm for name, norm in norms.items()}


def _norm(part: nn.Module) -> Tensor:
    gradients = [p.grad for p in part.parameters() if p.grad is not None]
    if not gradients:  # of a part that is frozen; torch's zero would be on the CPU
        return torch.zeros((), device=next(part.parameters()).device)
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
