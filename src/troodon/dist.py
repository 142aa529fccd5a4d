"""Ranks: start and end of a group of processes, and sums over it. One process is a group of one."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@contextlib.contextmanager
def group() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; leave them at the end."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    if device().type == "cuda":
        torch.cuda.set_device(device())
    dist.init_process_group()
    try:
        yield
    finally:
        dist.destroy_process_group()


def total(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks; `x` itself on a single rank."""
    return _reduced(x, dist.ReduceOp.SUM)


def largest(x: Tensor) -> Tensor:
    """The elementwise maximum of `x` over all ranks."""
    return _reduced(x, dist.ReduceOp.MAX)


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def _reduced(x: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    if world() > 1:
        x = x.clone()
        dist.all_reduce(x, how)
    return x
