"""The heads of a run, for another one to go on with or to learn from."""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from troodon.config import UsageError
from troodon.learn import checkpoint
from troodon.learn.config import PretrainConfig
from troodon.learn.parallel import empty


def of_run(run: Path, config: PretrainConfig) -> dict[str, Tensor]:
    """The EMA's heads in the checkpoint of a run's backbone, of that config, unsharded, on the CPU."""
    if not (saved := checkpoint.of_backbone(run) or next(reversed(checkpoint.finished(run)), None)):
        raise UsageError(f"{run}: has no checkpoint to take heads from")
    state = {name: w for name, w in empty(config).state_dict().items() if not name.startswith("backbone.")}
    state = {"average": {name: torch.empty_like(w, device="cpu") for name, w in state.items()}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it may be
        dcp.load(state, checkpoint_id=saved, no_dist=True)
    return state["average"]
