"""Checkpoints: the whole state of a run, readable on any number of ranks, never half written.

    checkpoints/000400/      state after 400 steps; a temporary name until every rank is done
        .metadata  *.distcp  student, average, optimiser, centres
        backbone/            the average's network, for those who use it

What is saved is what `_state` returns, so what is resumed is what was running. Schedules, data and
randomness are functions of the step, which is the folder's name.
"""

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from troodon import dist
from troodon.learn.method import Method
from troodon.model.backbone import of_state
from troodon.model.config import Preprocessing


def save(
    run: Path, step: int, method: Method, optimizer: torch.optim.Optimizer, preprocessing: Preprocessing, keep: int
) -> None:
    """Write the state after `step` steps and its backbone, then drop all but the newest `keep` checkpoints."""
    final, partial = run / "checkpoints" / f"{step:06d}", run / "checkpoints" / f"{step:06d}.partial"
    if final.exists():
        return
    if dist.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    with _alone():
        dcp.save(_state(method, optimizer), checkpoint_id=partial)
    weights = whole(method.average.backbone)
    if dist.rank() == 0:
        backbone = of_state(weights, method.average.backbone.config, preprocessing, name=run.resolve().name)
        backbone.save(partial / "backbone")
        partial.rename(final)
        backbone.save(run / "backbone")
        for old in finished(run)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load(checkpoint: Path, method: Method, optimizer: torch.optim.Optimizer) -> int:
    """Fill `method` and `optimizer` in place; return how many steps had been done."""
    state = _state(method, optimizer)
    with _alone():
        dcp.load(state, checkpoint_id=checkpoint)
    method.student.load_state_dict(state["student"])
    method.average.load_state_dict(state["average"])
    method.centres = state["centres"]
    set_optimizer_state_dict(method.student, optimizer, state["optimizer"])
    return int(checkpoint.name)


def whole(module: torch.nn.Module) -> dict[str, Any]:
    """The weights of a module that may be sharded, whole and on the CPU of rank zero. Every rank must call it."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def finished(run: Path) -> list[Path]:
    """Checkpoints that were completely written, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("*") if p.name.isdigit())


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _state(method: Method, optimizer: torch.optim.Optimizer) -> dict:
    return {
        "student": method.student.state_dict(),
        "average": method.average.state_dict(),
        "centres": dict(method.centres),
        "optimizer": get_optimizer_state_dict(method.student, optimizer),
    }
