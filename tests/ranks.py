"""Run a function on several ranks, as processes that speak gloo: `on_ranks(2, function, *arguments)`."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.multiprocessing


def on_ranks(world: int, function: Callable, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returned on each rank. It and its arguments must be importable and picklable."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (world, folder, function, arguments), nprocs=world)
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(world)]


def _work(rank: int, world: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    for gathering in ("all_gather_tensor", "all_gather_single"):  # older and newer name
        setattr(funcol, gathering, _crashes)
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        torch.save(function(*arguments), f"{folder}/{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _crashes(*_: Any, **__: Any) -> None:
    raise AssertionError("this crashes gloo now and then: see `dist.full_tensor`")
