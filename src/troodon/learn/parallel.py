"""Building networks on their device: recomputation, compilation and sharding, in the order that they need."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from troodon import dist
from troodon.config import UsageError
from troodon.learn.config import ParallelConfig, PretrainConfig
from troodon.learn.method import Branch
from troodon.model.backbone import Backbone
from troodon.model.vit import ViT, regrid

# It warns of in-place operations on what a network returns; there are none.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")

_ops = torch.ops.aten
PRODUCTS = {  # what selective recomputation keeps: the results of products and of attention
    _ops.mm.default,
    _ops.addmm.default,
    _ops.bmm.default,
    _ops._scaled_dot_product_flash_attention.default,
    _ops._scaled_dot_product_efficient_attention.default,
    _ops._scaled_dot_product_cudnn_attention.default,
    _ops._scaled_dot_product_flash_attention_for_cpu.default,
}


def empty(config: PretrainConfig, teachers: Sequence[int] = ()) -> Branch:
    """A branch on the meta device: its shapes, without memory. `teachers`: the channels of those it has maps to."""
    objective = config.objective
    shared = objective.heads == "shared"
    with torch.device("meta"):
        return Branch(
            config.vit,
            config.dino_head if objective.dino_weight or (shared and objective.by_prototypes) else None,
            config.ibot_head if objective.ibot_weight and not shared else None,
            {kind: teachers for kind in objective.compared},
        )


def first_weights(
    config: PretrainConfig,
    init: Backbone | None,
    heads: dict[str, Tensor] | None = None,
    teachers: Sequence[int] = (),
) -> dict[str, Tensor]:
    """The whole weights that `config.seed` names, on the CPU; those of `init` and `heads` in place of their own.

    Positions that were learned on another grid are resized to this one's. UsageError if heads do not fit.
    """
    branch = empty(config, teachers).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        branch.initialize()
    if init is not None:
        branch.backbone.load_state_dict(regrid(init.vit.state_dict(), init.config, config.vit.grid))
    state = branch.state_dict()
    for name, tensor in (heads or {}).items():
        if name not in state or state[name].shape != tensor.shape:
            expected = f"of shape {tuple(state[name].shape)} here" if name in state else "not part of this run"
            raise UsageError(f"heads of init: {name} has shape {tuple(tensor.shape)}, and is {expected}")
        state[name] = tensor
    return state


def build(
    config: PretrainConfig,
    weights: dict[str, Any],
    device: torch.device,
    compute: torch.dtype,
    teachers: Sequence[int] = (),
) -> Branch:
    """A branch with these weights. The device never holds more than a shard of it, and what one block needs."""
    return _placed(empty(config, teachers), config.parallel, weights, device, compute)


def build_anchor(config: PretrainConfig, weights: dict[str, Any], device: torch.device, compute: torch.dtype) -> ViT:
    """A backbone for Gram anchoring, with the weights that a branch of it has."""
    inside = {name.removeprefix("backbone."): w for name, w in weights.items() if name.startswith("backbone.")}
    return _placed(empty(config).backbone, config.parallel, inside, device, compute)


def _placed(module: Any, config: ParallelConfig, weights: dict[str, Any], device: torch.device, compute: torch.dtype):
    """On the meta device: recompute, compile, shard; then materialise and load."""
    backbone = getattr(module, "backbone", module)
    heads = [] if backbone is module else [part for part in module.children() if part is not backbone]
    for block in backbone.blocks:
        prepare(block, config)
    if dist.world() > 1:
        mesh = init_device_mesh(device.type, (dist.world(),))
        low = None if compute == torch.float32 else compute
        reduce = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.reduce]
        # What is outside of the blocks is small, and stays in fp32: so does the sum that runs through them.
        parts = [*((block, low, reduce) for block in backbone.blocks), (backbone, None, reduce)]
        for part, gathered, reduced in [*parts, *((head, low, torch.float32) for head in heads)]:
            precise = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=reduced, cast_forward_inputs=False)
            # Also the roots reshard: no backward pass frees those of networks that do not learn.
            fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=precise)
    module.to_empty(device=device)
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
    return module


def prepare(block: nn.Module, config: ParallelConfig) -> None:
    """Make the backward pass of a block compute again what is not kept, and compile it. Names stay as they are."""
    if config.recompute == "none" and not config.compile:
        return
    forward = block.forward
    if config.recompute == "selective":
        keep = partial(create_selective_checkpoint_contexts, _keep_products)
        forward = _recomputed(forward, context_fn=keep)
    elif config.recompute == "full":
        forward = _recomputed(forward)
    if config.compile:
        forward = torch.compile(forward, dynamic=False)  # few shapes, each worth its own code
    block.forward = forward


def _recomputed(forward: Callable, **how: Any) -> Callable:
    def recomputed(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        # Which sequences a block keeps is drawn before it: there is no randomness inside.
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **how)

    return recomputed


def _keep_products(_: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
