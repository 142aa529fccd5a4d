"""Checkpoints: the whole state of a run, readable on any number of ranks, never half written.

    checkpoints/000400/      state after 400 steps; a temporary name until every rank is done
        .metadata  *.distcp  student, average, anchor, optimiser, centres, progress
        run.json             the same progress, the config and the environment, for people
        backbone/            the average's network, for those who use it

What is saved is what `_state` returns, so what is resumed is what was running. Schedules and randomness are functions
of the step, data of the number of the batch. Tensors are copied, and training goes on while the copy is written.
"""

import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from troodon import dist
from troodon.config import UsageError, to_dict
from troodon.learn.config import PretrainConfig
from troodon.learn.method import Method
from troodon.learn.parallel import empty
from troodon.model.backbone import Backbone, of_state
from troodon.model.config import Preprocessing
from troodon.run import environment, manifest, write_json


@dataclass(frozen=True)
class Progress:
    """How far a run has come: `batch` is the next batch's number, which is `step` unless a rescue left some out."""

    step: int = 0  # steps done
    batch: int = 0
    rescues: int = 0  # times that a loss or a gradient was not finite


class Saver:
    """Writes checkpoints of a run beside the training, one at a time, and drops old ones once a new one is whole."""

    def __init__(self, run: Path, config: PretrainConfig, preprocessing: Preprocessing):
        self.run, self.config, self.preprocessing = run, config, preprocessing
        self.group = dist.new_group()  # of its own: its messages must not meet those of the training
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future | None = None
        self.step: int | None = None  # of the last checkpoint that was begun
        if dist.rank() == 0:
            for left in (run / "checkpoints").glob("*.partial"):  # by one that was killed
                shutil.rmtree(left)

    def save(self, progress: Progress, method: Method, optimizer: torch.optim.Optimizer) -> str | None:
        """Begin to write the state; why the one before could not be written, if it could not. On every rank alike."""
        failed, self.step = self.wait(), progress.step
        partial = self.run / "checkpoints" / f"{progress.step:06d}.partial"
        weights = whole(method.average.backbone)
        state = _state(method, optimizer, progress)
        stored = dcp.async_save(state, checkpoint_id=partial, process_group=self.group)
        assert isinstance(stored, Future)
        self.writing = self.thread.submit(self._publish, stored, partial, weights, progress)
        return failed

    def wait(self) -> str | None:
        """Wait until the last checkpoint is whole; on every rank, why it is not if on some it is not."""
        writing, self.writing = self.writing, None
        if writing is None:
            return None
        try:
            writing.result()
            said = None
        except (Exception, CheckpointException) as error:  # the training that made the state is still sound
            said = " ".join(f"{type(error).__name__}: {_cause(error)}".split())
        return next((reason for reason in dist.gather_objects(said) if reason), None)

    def restore(self, checkpoint: Path) -> None:
        """Put the backbone of a checkpoint into the run, should a kill have come between the two."""
        saved = Backbone.load(checkpoint / "backbone")
        if (manifest(self.run / "backbone") or {}).get("fingerprint") != saved.fingerprint:
            saved.save(self.run / "backbone")

    def _publish(self, stored: Future, partial: Path, weights: dict[str, Tensor], progress: Progress) -> None:
        """Once all ranks have written, give the checkpoint its name."""
        try:
            stored.result()
            if dist.rank() == 0:
                self._complete(partial, weights, progress)
        except BaseException:
            if dist.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise

    def _complete(self, partial: Path, weights: dict[str, Tensor], progress: Progress) -> None:
        name, config = self.run.resolve().name, self.config
        backbone = of_state(weights, config.vit, self.preprocessing, name=name)
        backbone.save(partial / "backbone")
        said = {"progress": asdict(progress), "config": to_dict(config), "environment": environment()}
        write_json(partial / "run.json", said | {"images_seen": progress.step * config.batch})
        final = partial.with_suffix("")
        if final.exists():  # after a rollback: the same step, with other images
            shutil.rmtree(final)
        partial.rename(final)
        _flush(final.parent)
        backbone.save(self.run / "backbone")
        for old in finished(self.run)[: -config.keep]:
            if not config.keep_every or int(old.name) % config.keep_every:
                shutil.rmtree(old.rename(old.with_suffix(".partial")))  # never half there under its name


def load(checkpoint: Path, method: Method, optimizer: torch.optim.Optimizer) -> Progress:
    """Fill `method` and `optimizer` in place; return how far the run had come."""
    state = _state(method, optimizer, Progress())
    dcp.load(state, checkpoint_id=checkpoint)
    method.student.load_state_dict(state["student"])
    method.average.load_state_dict(state["average"])
    if method.anchor is not None:
        method.anchor.load_state_dict(state["anchor"])
    method.centres = state["centres"]
    set_optimizer_state_dict(method.student, optimizer, state["optimizer"])
    return Progress(**{name: int(value) for name, value in state["progress"].items()})


def heads(run: Path, config: PretrainConfig) -> dict[str, Tensor]:
    """The average's heads in the last checkpoint of a run of that config, whole, on the CPU."""
    if not (saved := finished(run)):
        raise UsageError(f"{run}: has no checkpoint to take heads from")
    state = {name: w for name, w in empty(config).state_dict().items() if not name.startswith("backbone.")}
    state = {"average": {name: torch.empty_like(w, device="cpu") for name, w in state.items()}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it may be here
        dcp.load(state, checkpoint_id=saved[-1], no_dist=True)
    return state["average"]


def whole(module: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of a module that may be sharded, whole and on the CPU of rank zero. Every rank must call it."""
    # Copies: on the CPU they would be the weights that go on learning.
    state = module.state_dict().items()
    return {name: full.to("cpu", copy=True) for name, w in state if (full := dist.unsharded(w)) is not None}


def finished(run: Path) -> list[Path]:
    """Checkpoints that were completely written, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("*") if p.name.isdigit())


def _state(method: Method, optimizer: torch.optim.Optimizer, progress: Progress) -> dict:
    return {
        "student": method.student.state_dict(),
        "average": method.average.state_dict(),
        **({} if method.anchor is None else {"anchor": method.anchor.state_dict()}),
        "centres": dict(method.centres),
        "optimizer": get_optimizer_state_dict(method.student, optimizer),
        "progress": {name: torch.tensor(value) for name, value in asdict(progress).items()},
    }


def _cause(error: BaseException) -> str:
    """What a rank said first; DCP wraps it."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return str(next((first for first, _ in failures), error))


def _flush(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
