"""Pretraining: from a config and an index of images to a run folder. Builds the objects, then the loop."""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from torch import Tensor

from troodon import dist
from troodon.config import UsageError, differences, fingerprint, to_dict, to_yaml
from troodon.data import sheet
from troodon.data.index import Index
from troodon.data.loader import Loader
from troodon.data.order import check_weights
from troodon.learn import checkpoint, guard, loggers, optim
from troodon.learn.checkpoint import Progress, Saver
from troodon.learn.config import PretrainConfig, fits
from troodon.learn.loop import NotFinite, train
from troodon.learn.losses import Ranks
from troodon.learn.method import Method
from troodon.learn.parallel import build, build_anchor, first_weights
from troodon.learn.plan import plan, timed
from troodon.learn.recorder import Probe, Recorder, preprocessing
from troodon.model.backbone import Backbone
from troodon.run import environment, manifest, say, write_bytes, write_json, write_manifest


class Interrupted(Exception):
    """The run was asked to stop, and has saved everything."""


def pretrain(
    config: PretrainConfig,
    index: Index,
    out: Path,
    *,
    init: Backbone | None = None,
    heads: dict[str, Tensor] | None = None,
    probe: Probe | None = None,
) -> Path:
    """Train until `config.steps`, or go on where the run in `out` stopped; returns the backbone's folder.

    `init` and `heads` give first weights; `probe` reads how good the average is, as a k-NN accuracy.
    Raises UsageError for what cannot work, before anything is written; Interrupted after SIGINT or SIGTERM,
    when all is saved; NotFinite when `config.guard` has no way on; OSError when the end cannot be saved.
    """
    with dist.group():
        check(config, index, init, dist.world())
        return _pretrain(config, index, out, init, heads, probe)


def check(config: PretrainConfig, index: Index, init: Backbone | None, ranks: int) -> None:
    """UsageError for a config that cannot train on these images, on so many ranks."""
    fits(config, ranks)
    loggers.check(config.log_to)
    if not len(index):
        raise UsageError("no images to train on")
    check_weights(config.weights, index.parts or (len(index),))
    if init is not None:
        same_network(config, init)


def same_network(config: PretrainConfig, init: Backbone) -> None:
    """UsageError, with the differences, for first weights of another network."""
    ours, theirs = to_dict(dataclasses.replace(config.vit, drop_path=0.0)), to_dict(init.config)
    free = ("vit.drop_path", "vit.layer_scale", "vit.grid")  # positions are resized to another grid
    if wrong := [d for d in differences(theirs, ours, "vit.") if not d.startswith(free)]:
        raise UsageError(f"init {init.name}: another network ({'; '.join(wrong)}); set the same numbers")


def _pretrain(
    config: PretrainConfig, index: Index, out: Path, init: Backbone | None, heads: dict | None, probe: Probe | None
) -> Path:
    device, rank, world = dist.device(), dist.rank(), dist.world()
    compute = dist.compute_dtype(config.compute, device)
    weights = first_weights(config, init, heads)
    if rank == 0:
        _open(out, config, index, init)
        planned = plan(config, len(index), device.type, compute.itemsize, world)
        say(timed(planned, device, compute).render())
    dist.barrier()

    student, average = (build(config, weights, device, compute) for _ in range(2))
    anchor = build_anchor(config, weights, device, compute) if config.objective.gram_weight else None
    ranks = Ranks(dist.total, dist.largest, dist.gather)
    method = Method(config.objective, student, average, anchor=anchor, ranks=ranks, compute=compute)
    optimizer = optim.adamw(student, config.vit.depth, config.optim)
    loader = Loader(
        index, config.crops, config.photometric, config.masks, config.vit.patch, config.batch, config.seed,
        threads=config.threads or _share_of_processors(world), rank=rank, world=world,
        channels=config.vit.channels, processes=config.processes, weights=config.weights,
        compiled=config.parallel.compile,
    )  # fmt: skip
    saver = Saver(out, config, preprocessing(config))
    recorder = Recorder(config, method, optimizer, loader, out, saver, probe)

    progress = Progress()
    if saved := checkpoint.finished(out):
        progress = checkpoint.load(saved[-1], method, optimizer)
        if rank == 0:
            done = progress.step >= config.steps
            say(f"  {'finished' if done else 'going on'} at step {progress.step:,} of {config.steps:,}")
            saver.restore(saved[-1])
    if progress.step >= config.steps:
        return out / "backbone"
    if rank == 0 and progress.step == 0:
        sheet.draw(loader, out / "pictures" / "crops.png")

    with _asked_to_stop() as asked:
        while True:
            recorder.resume(progress)
            if init is not None:
                recorder.before()
            try:
                with contextlib.closing(loader.batches(progress.batch, device)) as batches:
                    train(
                        method,
                        recorder.timed(batches),
                        optimizer,
                        config.schedules,
                        config.optim,
                        first_step=progress.step,
                        steps=config.steps,
                        accumulate=config.parallel.accumulate,
                        seed=config.seed,
                        rank=rank,
                        asked_to_stop=lambda: bool(asked),
                        after_step=recorder.after_step,
                    )
                progress = recorder.progress
                break
            except NotFinite as trouble:
                progress = _rescue(trouble, config, recorder, loader)
        recorder.finish()
    if progress.step < config.steps:
        raise Interrupted(f"stopped after {progress.step:,} of {config.steps:,} steps; everything is saved")
    return out / "backbone"


def _share_of_processors(world: int) -> int:
    """Threads to read with, where the ranks of one machine share its processors."""
    return max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))


def _rescue(trouble: NotFinite, config: PretrainConfig, recorder: Recorder, loader: Loader) -> Progress:
    """Where to go on after a step that is not finite, with the method in that state; raises `trouble` if nowhere."""
    recorder.settle()
    said = guard.report(trouble, recorder.progress.batch, loader, recorder.run)
    saved = checkpoint.finished(recorder.run) if config.guard.policy == "rollback" else []
    back = Progress(int(saved[-1].name)) if saved else None
    progress, then = guard.where_to(config.guard, recorder.progress, back)
    if dist.rank() == 0:
        recorder.event("not finite", trouble.step, f"{said}; {then}")
    if progress is None:
        raise trouble
    if saved:
        checkpoint.load(saved[-1], recorder.method, recorder.optimizer)
    return progress


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM asks the run to stop; a second SIGINT stops it at once."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        say("\n  stopping after this step, and saving; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open(out: Path, config: PretrainConfig, index: Index, init: Backbone | None) -> None:
    """Make the run folder, or see that what is in it is this run."""
    settings = {"config": to_dict(config), "images": len(index), "init": init and init.fingerprint}
    data = index.name or fingerprint(index.column("path"), index.column("length"))
    name = fingerprint(settings, data)
    found = manifest(out)
    if found is None:
        if out.exists() and any(out.iterdir()):
            raise UsageError(f"{out}: is not empty and not a run; choose a new --out")
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / "config.yaml", to_yaml(config).encode())
        write_json(out / "environment.json", environment())
        if index.mapped is None:
            index.save(out / "images.parquet")
        write_manifest(out, "run", name, settings)
    elif found["kind"] != "run":
        raise UsageError(f"{out}: already holds an artifact of kind {found['kind']}; choose a new --out")
    elif found["fingerprint"] != name:
        what = "; ".join(differences(found["settings"], settings)) or "other images"
        raise UsageError(f"{out}: a run with other settings ({what}); choose a new --out")
