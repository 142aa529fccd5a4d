"""Checkpoints: the whole state of a run, readable on any number of ranks, never half written.

    checkpoints/000400/      state after 400 steps; has a temporary name until every rank is done
        .metadata  *.distcp  student, EMA ("average"), anchor, optimiser, centres, progress
        run.json             the same progress, the config and the environment, as text
        backbone/            the backbone of the EMA, for use

The state is what `_state` returns, for saving and for loading. Schedules and randomness are functions of the step, data
of the number of the batch. Tensors are copied, and training goes on while the copy is written.
"""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from troodon import dist
from troodon.config import to_dict
from troodon.learn import adapters
from troodon.learn.config import PretrainConfig
from troodon.learn.method import Method
from troodon.model.config import Preprocessing
from troodon.model.saved import SavedViT
from troodon.run import environment, full_disk, read_json, read_manifest, write_json


@dataclass(frozen=True)
class TrainingProgress:
    """How far a run has come: `batch` is the next batch's number, which equals `step` unless a rescue skipped some."""

    step: int = 0  # steps done
    batch: int = 0
    rescues: int = 0  # times that a loss or a gradient was not finite
    clock: dict | None = None  # of a run that has a time: see Clock.state

    @property
    def counts(self) -> dict[str, int]:
        return {"step": self.step, "batch": self.batch, "rescues": self.rescues}


class Saver:
    """Writes checkpoints of a run in the background, one at a time, and deletes old ones once a new one is complete."""

    def __init__(
        self, run: Path, config: PretrainConfig, preprocessing: Preprocessing, now: Callable[[], float] = time.monotonic
    ):
        self.run, self.config, self.preprocessing = run, config, preprocessing
        self.group = dist.new_group()  # of its own: its messages must not mix with those of the training
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future | None = None
        self.step: int | None = None  # of the last checkpoint that was begun
        self.now, self.took = now, 0.0  # seconds that the last one was written for
        if dist.rank() == 0:
            for partial in (run / "checkpoints").glob("*.partial"):  # of a run that was killed
                shutil.rmtree(partial)

    def save(
        self, progress: TrainingProgress, method: Method, optimizer: torch.optim.Optimizer, kept: bool = True
    ) -> str | None:
        """Begin to write the state; its backbone becomes that of the run if it is `kept`. Returns why the state before
        could not be written, on every rank, or None."""
        failed, self.step, self.begun = self.wait(), progress.step, self.now()
        partial = self.run / "checkpoints" / f"{progress.step:06d}.partial"
        weights = backbone_weights(method)
        state = _state(method, optimizer, progress)
        stored = dcp.async_save(state, checkpoint_id=partial, process_group=self.group)
        assert isinstance(stored, Future)
        self.writing = self.thread.submit(self._publish, stored, partial, weights, progress, kept)
        return failed

    def wait(self) -> str | None:
        """Wait until the last checkpoint is complete. Returns why it is not, on every rank, or None."""
        writing, self.writing = self.writing, None
        if writing is None:
            return None
        try:
            writing.result()
            failure = None
        except (Exception, CheckpointException) as error:  # the training itself is not affected
            failure = full_disk(error) or " ".join(f"{type(error).__name__}: {_cause(error)}".split())
        return next((reason for reason in dist.all_gather_objects(failure) if reason), None)

    def restore(self, checkpoint: Path) -> None:
        """Copy the backbone of a checkpoint into the run, if a kill came between the two."""
        saved = SavedViT.load(checkpoint / "backbone")
        if (read_manifest(self.run / "backbone") or {}).get("fingerprint") != saved.fingerprint:
            saved.save(self.run / "backbone")

    def _publish(
        self, stored: Future, partial: Path, weights: dict[str, Tensor], progress: TrainingProgress, kept: bool
    ) -> None:
        """Give the checkpoint its final name once all ranks have written."""
        try:
            stored.result()
            if dist.rank() == 0:
                self._complete(partial, weights, progress, kept)
            self.took = self.now() - self.begun
        except BaseException:
            if dist.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise

    def backbone(self, weights: dict[str, Tensor]) -> SavedViT:
        """These weights as the backbone of the run, to be saved."""
        name = self.run.resolve().name
        return SavedViT.from_state_dict(weights, self.config.vit, self.preprocessing, name=name)

    def _complete(self, partial: Path, weights: dict[str, Tensor], progress: TrainingProgress, kept: bool) -> None:
        config, backbone = self.config, self.backbone(weights)
        backbone.save(partial / "backbone")
        known = progress.counts | ({"clock": progress.clock} if progress.clock else {})
        text = {"progress": known, "config": to_dict(config), "environment": environment()}
        write_json(partial / "run.json", text | {"images_seen": progress.step * config.batch})
        final = partial.with_suffix("")
        if final.exists():  # after a rollback: the same step, with other images
            shutil.rmtree(final)
        partial.rename(final)
        _flush(final.parent)
        if kept:
            backbone.save(self.run / "backbone")
        spared = of_backbone(self.run)
        for old in finished(self.run)[: -config.keep]:
            if old != spared and (not config.keep_every or int(old.name) % config.keep_every):
                shutil.rmtree(old.rename(old.with_suffix(".partial")))  # never half a checkpoint under a final name


def load(checkpoint: Path, method: Method, optimizer: torch.optim.Optimizer) -> TrainingProgress:
    """Load a checkpoint into `method` and `optimizer`; returns how far the run had come."""
    state = _state(method, optimizer, TrainingProgress())
    dcp.load(state, checkpoint_id=checkpoint)
    method.student.load_state_dict(state["student"])
    method.ema.load_state_dict(state["average"])
    if method.anchor is not None:
        method.anchor.load_state_dict(state["anchor"])
    method.centres = state["centres"]
    set_optimizer_state_dict(method.student, optimizer, state["optimizer"])
    counts = {name: int(value) for name, value in state["progress"].items()}
    return TrainingProgress(**counts, clock=read_json(checkpoint / "run.json")["progress"].get("clock"))


def full_state_dict(module: torch.nn.Module) -> dict[str, Tensor]:
    """The unsharded weights of a module, on the CPU of rank zero. Every rank must call it."""
    # Copies, as on the CPU these would be the weights that go on learning.
    state = module.state_dict().items()
    return {name: full.to("cpu", copy=True) for name, w in state if (full := dist.full_tensor(w)) is not None}


def backbone_weights(method: Method) -> dict[str, Tensor]:
    """The unsharded weights of the EMA's backbone, as those of an ordinary network. Every rank must call it."""
    return adapters.merged(full_state_dict(method.ema.backbone))


def of_backbone(run: Path) -> Path | None:
    """The checkpoint whose backbone is that of the run; None if there is none, as for weights that it began with."""
    of_run, *each = ((read_manifest(folder / "backbone") or {}).get("fingerprint") for folder in (run, *finished(run)))
    return next((saved for saved, one in zip(finished(run), each) if one and one == of_run), None)


def finished(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("*") if p.name.isdigit())


def _state(method: Method, optimizer: torch.optim.Optimizer, progress: TrainingProgress) -> dict:
    return {
        "student": method.student.state_dict(),
        "average": method.ema.state_dict(),  # the EMA; the key of all checkpoints so far
        **({} if method.anchor is None else {"anchor": method.anchor.state_dict()}),
        "centres": dict(method.centres),
        "optimizer": get_optimizer_state_dict(method.student, optimizer),
        "progress": {name: torch.tensor(value) for name, value in progress.counts.items()},
    }


def _cause(error: BaseException) -> str:
    """The first error of a rank; DCP wraps it."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return str(next((failure for failure, _ in failures), error))


def _flush(folder: Path) -> None:
    """Flush the names in a folder to the disk, so that they survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
