"""Building networks on their device: recomputation, compilation and sharding, in the order that they need."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # which defines the kernel's operation
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from troodon import dist
from troodon.config import UsageError
from troodon.learn import adapters
from troodon.learn.config import AdaptConfig, ParallelConfig, PretrainConfig
from troodon.learn.network import Network
from troodon.learn.objective import CLS_TARGETS
from troodon.model.saved import SavedViT
from troodon.model.vit import ViT, regrid

# FSDP warns of in-place operations on outputs of a network; there are none.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")

_ops = torch.ops.aten
PRODUCTS = {  # selective recomputation keeps the results of products and of attention
    _ops.mm.default,
    _ops.addmm.default,
    _ops.bmm.default,
    _ops._scaled_dot_product_flash_attention.default,
    _ops._scaled_dot_product_efficient_attention.default,
    _ops._scaled_dot_product_cudnn_attention.default,
    _ops._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
}


def empty(config: PretrainConfig, teachers: Sequence[int] = ()) -> Network:
    """A network on the meta device: its shapes, without memory. `teachers`: the channels of those it has maps to."""
    objective = config.objective
    shared = objective.heads == "shared"
    with torch.device("meta"):
        network = Network(
            config.vit,
            config.dino_head if CLS_TARGETS in objective.needs or (shared and objective.prototypes) else None,
            config.ibot_head if objective.patch_targets and not shared else None,
            {kind: teachers for kind in objective.features},
            objective.projector,
        )
        adapters.add(network.backbone, config.adapt.rank)
    return network


def first_weights(
    config: PretrainConfig,
    init: SavedViT | None,
    heads: dict[str, Tensor] | None = None,
    teachers: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Unsharded first weights on the CPU: random by `config.seed`, or those of `init` and `heads` where given.

    Positions that were learned on another grid are resized. UsageError if heads do not fit.
    """
    network = empty(replace(config, adapt=AdaptConfig()), teachers).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network.initialize()
        if init is not None:
            network.backbone.load_state_dict(regrid(init.vit.state_dict(), init.config, config.vit.grid))
        adapters.add(network.backbone, config.adapt.rank)
    state = network.state_dict()
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
) -> Network:
    """A network with these weights. The device never holds more than a shard of it and one whole block."""
    return _placed(empty(config, teachers), config.parallel, weights, device, compute)


def build_anchor(config: PretrainConfig, weights: dict[str, Any], device: torch.device, compute: torch.dtype) -> ViT:
    """A backbone for Gram anchoring, with the backbone's weights among these."""
    backbone = {name.removeprefix("backbone."): w for name, w in weights.items() if name.startswith("backbone.")}
    return _placed(empty(config).backbone, config.parallel, backbone, device, compute)


def _placed(module: Any, config: ParallelConfig, weights: dict[str, Any], device: torch.device, compute: torch.dtype):
    """Set up recomputation, compile and shard on the meta device; then materialise and load."""
    backbone = getattr(module, "backbone", module)
    heads = [] if backbone is module else [part for part in module.children() if part is not backbone]
    for block in backbone.blocks:
        prepare(block, config)
    if dist.world_size() > 1:
        mesh = init_device_mesh(device.type, (dist.world_size(),))
        low = None if compute == torch.float32 else compute
        reduce = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.reduce]
        # Parameters outside of the blocks are few and stay in fp32, and so does the residual stream.
        parts = [*((block, low, reduce) for block in backbone.blocks), (backbone, None, reduce)]
        for part, gathered, reduced in [*parts, *((head, low, torch.float32) for head in heads)]:
            precise = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=reduced, cast_forward_inputs=False)
            # Roots reshard too: networks that do not learn have no backward pass that frees their gathered weights.
            fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=precise)
    module.to_empty(device=device)
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
    return module


def prepare(block: nn.Module, config: ParallelConfig) -> None:
    """Set up recomputation in the backward pass of a block, and compile it. Parameter names do not change."""
    if config.recompute == "none" and not config.compile:
        return
    forward = block.forward
    if config.recompute == "selective":
        keep = partial(create_selective_checkpoint_contexts, _keep_products)
        forward = _recomputed(forward, context_fn=keep)
    elif config.recompute == "full":
        forward = _recomputed(forward)
    if config.compile:
        forward = torch.compile(forward, dynamic=False)  # few shapes: each gets code of its own
    block.forward = forward


def _recomputed(forward: Callable, **how: Any) -> Callable:
    def recomputed(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        # Stochastic depth is drawn before the block: there is no randomness inside.
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **how)

    return recomputed


def _keep_products(_: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
