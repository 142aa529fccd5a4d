"""Ranks: start and end of a group of processes, and sums over it. One process is a group of one."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from troodon.config import UsageError
from troodon.launch import end_with_parent, first_to_fail
from troodon.run import RENDEZVOUS


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The device of this rank."""
    if torch.cuda.is_available():
        # Modulo: some clusters show each process only its own device.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """What "fp32", "bf16" or "auto" mean on a device: auto is bf16 where it multiplies faster with that."""
    if setting != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[setting]
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@contextlib.contextmanager
def group() -> Iterator[None]:
    """Join the ranks that `launch`, torchrun or Slurm started, or be a group of one; leave it at the end."""
    if dist.is_initialized():
        yield
        return
    if device().type == "cuda":
        torch.cuda.set_device(device())
    if folder := os.environ.get(RENDEZVOUS):
        end_with_parent()
        number, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(store=dist.FileStore(f"{folder}/store", ranks), rank=number, world_size=ranks)
    elif "RANK" in os.environ:
        dist.init_process_group()
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    except BaseException:
        first_to_fail()  # before the group ends: then the others fail too, for want of this one
        raise
    finally:
        dist.destroy_process_group()


def total(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks; `x` itself on a single rank."""
    return _reduced(x, dist.ReduceOp.SUM)


def largest(x: Tensor) -> Tensor:
    """The elementwise maximum of `x` over all ranks."""
    return _reduced(x, dist.ReduceOp.MAX)


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks, one rank after another; every rank holds as many.

    For a loss that each rank computes whole: gradients flow to a rank's own rows only, times the number of ranks, so
    that the mean over ranks, which sharding takes, is the gradient of that loss.
    """
    if world() == 1:
        return x
    rows = [torch.empty_like(x, requires_grad=False) for _ in range(world())]
    dist.all_gather(rows, x.detach().contiguous())
    rows[rank()] = own = x.view_as(x)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * world())
    return torch.cat(rows)


def unsharded(x: Tensor) -> Tensor | None:
    """All rows of a tensor that may be sharded, on rank zero, without gradients; None on the others, which call it too.

    `DTensor.full_tensor` gathers in a way that crashes gloo now and then, when it is done again and again: gloo's two
    threads both write the name of what they did last, and both free the one before if it is long (torch 2.13).
    """
    if not isinstance(x, DTensor):
        return x.detach() if rank() == 0 else None
    each = -(-len(x) // world())  # the last ranks may hold fewer, or none
    mine = x.to_local().detach()
    padded = mine.new_zeros(each, *x.shape[1:])
    padded[: len(mine)] = mine
    rows = [torch.empty_like(padded) for _ in range(world())] if rank() == 0 else None
    dist.gather(padded, rows)
    return torch.cat(rows)[: len(x)] if rows else None


def gather_objects(thing: Any) -> list[Any]:
    """`thing` of every rank, in the order of ranks; it must be picklable."""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing)
    return things


def new_group() -> Any:
    """Another group of all ranks, over which a thread may talk beside the training; None on a single rank."""
    return dist.new_group(backend="gloo") if world() > 1 else None


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def to_start(devices: str | int) -> int:
    """How many ranks to start for `devices`, a number or "auto"; 1 inside a group. UsageError for what cannot be."""
    if "RANK" in os.environ or world() > 1:
        return 1
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = (there or 1) if devices == "auto" else int(devices)
    if there and ranks > there:
        raise UsageError(f"devices {ranks}: this machine has {there}")
    return ranks


def _reduced(x: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    if world() > 1:
        x = x.clone()
        dist.all_reduce(x, how)
    return x
