"""Pretraining: from a config and an index of images to a run folder. Builds the objects, then the loop."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import FrameType

import torch

from troodon import dist
from troodon.config import UsageError, differences, fingerprint, to_dict, to_yaml
from troodon.data import sheet
from troodon.data.index import Index
from troodon.data.loader import Loader
from troodon.learn import checkpoint, optim
from troodon.learn.config import PretrainConfig
from troodon.learn.loop import train
from troodon.learn.losses import Ranks
from troodon.learn.method import Method
from troodon.learn.parallel import build, first_weights
from troodon.learn.plan import plan
from troodon.learn.recorder import Probe, Recorder
from troodon.model.backbone import Backbone
from troodon.run import Metrics, environment, manifest, say, write_bytes, write_json, write_manifest


class Interrupted(Exception):
    """The run was asked to stop, and has saved everything."""


def pretrain(
    config: PretrainConfig, index: Index, out: Path, *, init: Backbone | None = None, probe: Probe | None = None
) -> Path:
    """Train until `config.steps`, or go on where the run in `out` stopped; returns the backbone's folder.

    `init` gives the first weights; `probe` reads how good the average is, as a k-NN accuracy.
    Raises UsageError for what cannot work, before anything is written; Interrupted after SIGINT or SIGTERM,
    when all is saved; FloatingPointError when the loss is not finite.
    """
    check(config, index, init)
    with dist.group():
        return _pretrain(config, index, out, init, probe)


def check(config: PretrainConfig, index: Index, init: Backbone | None) -> None:
    """UsageError for a config that cannot train on these images."""
    for name in ("global_px", "local_px"):
        px, patch = getattr(config.crops, name), config.vit.patch
        if px % patch or px < patch:
            near = max(patch, round(px / patch) * patch)
            raise UsageError(f"crops.{name} {px} does not divide into patches of {patch}; the nearest is {near}")
    if not len(index):
        raise UsageError("no images to train on")
    if init is not None:
        ours, theirs = to_dict(dataclasses.replace(config.vit, drop_path=0.0)), to_dict(init.config)
        if wrong := [d for d in differences(theirs, ours, "vit.") if not d.startswith(("vit.drop", "vit.layer_scale"))]:
            raise UsageError(f"init {init.name}: another network ({'; '.join(wrong)}); set the same numbers")


def compute_dtype(config: PretrainConfig, device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies faster with it."""
    if config.compute != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.compute]
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _pretrain(config: PretrainConfig, index: Index, out: Path, init: Backbone | None, probe: Probe | None) -> Path:
    device, rank = dist.device(), dist.rank()
    compute = compute_dtype(config, device)
    if rank == 0:
        _open(out, config, index, init)
        planned = plan(config, len(index), device, compute, dist.world())
        say(planned.render())
    dist.barrier()

    weights = first_weights(config, None if init is None else init.vit.state_dict())
    student, average = (build(config, weights, device) for _ in range(2))
    method = Method(config.objective, student, average, ranks=Ranks(dist.total, dist.largest), compute=compute)
    optimizer = optim.adamw(student, config.vit.depth, config.optim)
    first_step = 0
    if saved := checkpoint.finished(out):
        first_step = checkpoint.load(saved[-1], method, optimizer)
        if rank == 0:
            done = first_step >= config.steps
            say(f"  {'finished' if done else 'going on'} at step {first_step:,} of {config.steps:,}")
    if rank == 0:
        Metrics(out / "metrics.jsonl").rewind(first_step)
    if first_step >= config.steps:
        return out / "backbone"

    loader = Loader(
        index, config.crops, config.photometric, config.masks, config.vit.patch, config.batch, config.seed,
        threads=config.threads, rank=rank, world=dist.world(),
    )  # fmt: skip
    with _asked_to_stop() as asked:
        recorder = Recorder(
            config, method, optimizer, loader, out, first_step, probe=probe, asked_to_stop=lambda: bool(asked)
        )
        batches = loader.batches(first_step, device)
        if rank == 0 and first_step == 0:
            sheet.draw(first := next(batches), config.photometric, out / "pictures" / "crops.png")
            batches = chain([first], batches)
        try:
            train(
                method,
                recorder.timed(batches),
                optimizer,
                config.schedules,
                first_step=first_step,
                steps=config.steps,
                clip=config.optim.clip,
                seed=config.seed,
                rank=rank,
                after_step=recorder.after_step,
            )
        except FloatingPointError as error:
            Metrics(out / "metrics.jsonl").append({"event": "not finite", "message": str(error)})
            raise
    if recorder.stopped_at is not None:
        raise Interrupted(f"stopped after {recorder.stopped_at:,} of {config.steps:,} steps; everything is saved")
    return out / "backbone"


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
    data = fingerprint(index.column("path"), index.column("length"))
    name = fingerprint(settings, data)
    found = manifest(out)
    if found is None:
        if out.exists() and any(out.iterdir()):
            raise UsageError(f"{out}: is not empty and not a run; choose a new --out")
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / "config.yaml", to_yaml(config).encode())
        write_json(out / "environment.json", environment())
        index.save(out / "images.parquet")
        write_manifest(out, "run", name, settings)
    elif found["kind"] != "run":
        raise UsageError(f"{out}: already holds an artifact of kind {found['kind']}; choose a new --out")
    elif found["fingerprint"] != name:
        what = "; ".join(differences(found["settings"], settings)) or "other images"
        raise UsageError(f"{out}: a run with other settings ({what}); choose a new --out")
