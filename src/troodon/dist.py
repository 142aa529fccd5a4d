"""Ranks: the process group, and collectives over it. One process is a group of one."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from troodon.rendezvous import RENDEZVOUS, claim_first_failure, stop_with_parent

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processors, and in how many; of a container under Linux
PATIENCE = timedelta(minutes=30)  # of ranks that wait for one, as for rank zero's k-NN; NCCL's own is 10 minutes


class Share(NamedTuple):
    """The images of a step that go through a network at once.

    What is drawn for them depends on their places in the step, and not on the rank, or the part of one, that has them.
    """

    seed: int  # of the run
    batch: int  # number of the batch
    size: int  # images of the batch, over all ranks
    images: range  # these images among them

    def chunk(self, count: int) -> list["Share"]:
        """Equal parts of the images."""
        size = len(self.images) // count
        return [self._replace(images=self.images[i * size : (i + 1) * size]) for i in range(count)]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The device of this rank, or of one of several workers on this machine; others are for `devices` to choose."""
    if torch.cuda.is_available():
        # Modulo: some clusters show each process only its own device.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def processors() -> int:
    """Processors that this process may use: those of its affinity, and of the quota of its container."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file; the quota "max"
        quota, period = QUOTA.read_text().split()
        here = min(here, max(1, int(quota) // int(period)))
    return here


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device. A GPU copies it by itself, and neither it nor the host waits."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of "fp32", "bf16" or "auto" on a device: auto is bf16 where matrix products in it are faster."""
    if setting != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[setting]
    on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    is_fast = torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else on_cpu
    return torch.bfloat16 if is_fast else torch.float32


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the ranks that `launch`, torchrun or Slurm started, or form a group of one; leave the group at the end."""
    if dist.is_initialized():
        yield
        return
    if device().type == "cuda":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # masked patches vary in number
        torch.cuda.set_device(device())
    if folder := os.environ.get(RENDEZVOUS):
        stop_with_parent()
        number, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = dist.FileStore(f"{folder}/store", ranks)
        dist.init_process_group(store=store, rank=number, world_size=ranks, timeout=PATIENCE)
    elif "RANK" in os.environ:
        dist.init_process_group(timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    except BaseException:
        claim_first_failure()  # before the group ends: the others wait for this rank, and fail then too
        if world_size() == 1:
            dist.destroy_process_group()  # with others, NCCL would wait here for what they never send
        raise
    dist.destroy_process_group()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks; `x` itself on a single rank."""
    return _all_reduce(x, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    """The elementwise maximum of `x` over all ranks."""
    return _all_reduce(x, dist.ReduceOp.MAX)


def all_gather(x: Tensor) -> Tensor:
    """The rows of all ranks, concatenated in the order of ranks; every rank has the same number of rows.

    For a loss that each rank computes as a whole: gradients flow only to a rank's own rows, times the number of ranks,
    so that their mean over ranks, which sharding takes, is the gradient of that loss.
    """
    if world_size() == 1:
        return x
    rows = [torch.empty_like(x, requires_grad=False) for _ in range(world_size())]
    dist.all_gather(rows, x.detach().contiguous())
    rows[rank()] = local = x.view_as(x)
    if local.requires_grad:
        local.register_hook(lambda gradient: gradient * world_size())
    return torch.cat(rows)


def full_tensor(x: Tensor) -> Tensor | None:
    """All rows of a tensor that may be sharded: on rank zero, without gradients; None on other ranks, which call too.

    Instead of `DTensor.full_tensor`, whose way to gather now and then crashes gloo when it is repeated: gloo's two
    threads both write the name of their last operation, and both free the previous name if it is long (torch 2.13).
    """
    if not isinstance(x, DTensor):
        return x.detach() if rank() == 0 else None
    last = x.device_mesh.ndim - 1  # the devices of a machine, where machines hold replicas
    group, shards = x.device_mesh.get_group(last), x.device_mesh.size(last)
    each = -(-len(x) // shards)  # the last ranks may hold fewer, or none
    local = x.to_local().detach()
    padded = local.new_zeros(each, *x.shape[1:])
    padded[: len(local)] = local
    rows = [torch.empty_like(padded) for _ in range(shards)] if dist.get_rank(group) == 0 else None
    dist.gather(padded, rows, group=group, group_dst=0)
    return torch.cat(rows)[: len(x)] if rows and rank() == 0 else None


def all_gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in the order of ranks; it must be picklable."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def new_group() -> Any:
    """Another process group of all ranks, for a thread beside the training; None on a single rank."""
    return dist.new_group(backend="gloo") if world_size() > 1 else None


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def _all_reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x, operation)
    return x
