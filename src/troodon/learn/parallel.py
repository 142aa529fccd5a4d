"""Building networks on their device: recomputation, compilation and sharding, in the order that they need."""

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # which defines the kernel's operation
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from troodon import dist
from troodon.config import UsageError
from troodon.learn import adapters
from troodon.learn.config import AdaptConfig, PretrainConfig, constant_shapes
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


GRAPHS = 8  # of a block, for each size of crops: with and without gradients, for health and for the anchor


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
    config: PretrainConfig, init: SavedViT | None, heads: dict[str, Tensor] | None = None, teachers: Sequence[int] = ()
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
    config: PretrainConfig, weights: dict[str, Any], device: torch.device, compute: torch.dtype,
    teachers: Sequence[int] = (), is_whole: bool = False,
) -> Network:  # fmt: skip
    """A network with these weights: on each rank whole, or a shard, of which the device never holds more than that and
    one whole block."""
    return _placed(empty(config, teachers), config, weights, device, compute, is_whole)


def build_anchor(config: PretrainConfig, weights: dict[str, Any], device: torch.device, compute: torch.dtype) -> ViT:
    """A backbone for Gram anchoring, with the backbone's weights among these."""
    backbone = {name.removeprefix("backbone."): w for name, w in weights.items() if name.startswith("backbone.")}
    return _placed(empty(config).backbone, config, backbone, device, compute)


def compiles(config: PretrainConfig, device: torch.device) -> bool:
    """Whether blocks are compiled, as `parallel.compile` says."""
    if config.parallel.compile != "auto":
        return config.parallel.compile == "always"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    can_compile = device.type == "cuda" and importlib.util.find_spec("triton") is not None and compiler is not None
    return can_compile and constant_shapes(config, dist.world_size())


def _placed(
    module: Any, config: PretrainConfig, weights: dict[str, Any], device: torch.device, compute: torch.dtype,
    is_whole: bool = False,
) -> Any:  # fmt: skip
    """Set up recomputation, compile and shard on the meta device; then materialise and load."""
    compiled = compiles(config, device)
    if compiled and constant_shapes(config, dist.world_size()):
        _expect_shapes(GRAPHS * len(config.crops.sizes()))
    for block in getattr(module, "backbone", module).blocks:
        prepare(block, config.parallel.recompute, compiled)
    if dist.world_size() > 1 and not is_whole:
        shard(module, config, compute, device.type)
    module.to_empty(device=device)
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
    return module


def shard(module: Any, config: PretrainConfig, compute: torch.dtype, kind: str) -> None:
    """Cut a network, or a backbone alone, over all ranks, whose devices are of this kind: each block for itself, what
    else a backbone has, and each head."""
    backbone = getattr(module, "backbone", module)
    heads = [] if backbone is module else [part for part in module.children() if part is not backbone]
    mesh = mesh_of(kind, torch.distributed.group.WORLD)
    low = None if compute == torch.float32 else compute
    reduce = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.parallel.reduce]
    # Parameters outside of the blocks are few and stay in fp32, and so does the residual stream.
    parts = [*((block, low, reduce) for block in backbone.blocks), (backbone, None, reduce)]
    for part, gathered, reduced in [*parts, *((head, low, torch.float32) for head in heads)]:
        precise = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=reduced, cast_forward_inputs=False)
        # Roots reshard too: networks that do not learn have no backward pass that frees their gathered weights.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=precise)
    for part in (backbone, *heads):
        part.register_forward_hook(_forget_order)


@functools.lru_cache(maxsize=1)
def mesh_of(kind: str, _: Any) -> DeviceMesh:
    """All ranks of this group: shards inside of a machine and replicas across machines, where only gradients travel;
    all are shards where machines have one device each."""
    ranks = dist.world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if 1 < here < ranks and ranks % here == 0:
        return init_device_mesh(kind, (ranks // here, here), mesh_dim_names=("machines", "devices"))
    return init_device_mesh(kind, (ranks,))


def reduce_between_machines(network: nn.Module, is_due: bool) -> None:
    """Whether the next backward pass sums gradients over machines, or leaves sums over the devices of each to later."""
    for part in network.children():
        if isinstance(part, FSDPModule):
            part.set_requires_all_reduce(is_due)


def _forget_order(root: Any, *_: Any) -> None:
    """Without gradients, no backward pass empties the lists in which FSDP2 notes the order of forward passes."""
    if torch.is_grad_enabled():
        return
    for part in root.modules():
        if isinstance(part, FSDPModule):
            state = part._get_fsdp_state()
            state._comm_ctx.post_forward_order.clear()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:  # torch 2.13, 2.11
                if group is not None:
                    group._post_forward_indices.clear()


def _expect_shapes(count: int) -> None:
    """So many graphs of a block are compiled, before the compiler gives up and runs the others as they are."""
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, count)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 64 * count)  # of all blocks


def prepare(block: nn.Module, recompute: str, compiled: bool = False) -> None:
    """Set up recomputation in the backward pass of a block, and compile it. Parameter names do not change."""
    if recompute == "none" and not compiled:
        return
    forward = block.forward
    if recompute == "selective":
        keep = partial(create_selective_checkpoint_contexts, _keep_products)
        forward = _recomputed(forward, context_fn=keep)
    elif recompute == "full":
        forward = _recomputed(forward)
    if compiled:
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
