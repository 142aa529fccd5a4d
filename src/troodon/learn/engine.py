"""One engine for pretraining and distillation: from tasks and an index of images to run folders.

Builds the objects, then the loop. Several tasks share the images, the crops, and what frozen teachers see of them; each
writes a run of its own, as if it had been alone.
"""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from troodon import dist
from troodon.config import UsageError, differences, fingerprint, from_yaml, pair, to_dict, to_yaml
from troodon.images.index import Index
from troodon.learn import checkpoint, guard, optim
from troodon.learn.checkpoint import Progress, Saver
from troodon.learn.config import PretrainConfig
from troodon.learn.loop import Learner, NotFinite, train
from troodon.learn.losses import Ranks
from troodon.learn.method import Method
from troodon.learn.parallel import build, build_anchor, first_weights
from troodon.learn.plan import plan, timed
from troodon.learn.recorder import Probe, Recorder, preprocessing
from troodon.learn.teacher import Frozen, Kept
from troodon.model.backbone import Backbone
from troodon.run import environment, manifest, say, write_bytes, write_json, write_manifest
from troodon.views import sheet
from troodon.views.loader import Loader

if TYPE_CHECKING:
    from troodon.learn.distill import Teacher


class Interrupted(Exception):
    """The run was asked to stop, and has saved everything."""


@dataclass(frozen=True)
class Task:
    """A network to train: its settings, the folder of its run, its first weights, and what reads how good it is."""

    config: PretrainConfig
    out: Path
    init: Backbone | None = None
    heads: dict[str, Tensor] | None = None
    probe: Probe | None = None


@dataclass(frozen=True)
class Student:
    """A task at work."""

    task: Task
    learner: Learner
    recorder: Recorder

    def load(self, step: int) -> Progress:
        """Take up the state of a checkpoint."""
        saved = self.task.out / "checkpoints" / f"{step:06d}"
        progress = checkpoint.load(saved, self.learner.method, self.learner.optimizer)
        if dist.rank() == 0:
            self.recorder.saver.restore(saved)
        return progress


def run(tasks: Sequence[Task], index: Index, teachers: Sequence["Teacher"] = ()) -> None:
    """Train until the steps are done, or go on where the runs of the tasks stopped. What tasks share, such as crops and
    the number of steps, is taken from the first. Raises what `pretrain` raises."""
    device, rank, world = dist.device(), dist.rank(), dist.world()
    shared = tasks[0].config
    compute = dist.compute_dtype(shared.compute, device)
    if rank == 0:
        for task in tasks:
            _open(task, index, teachers)
            if len(tasks) > 1:
                say(f"  {task.out.name}:")
            seen = [teacher.vit for teacher in teachers]
            planned = plan(task.config, len(index), device.type, compute.itemsize, world, teachers=seen)
            say(timed(planned, device, compute).render())
    dist.barrier()

    frozen = [teacher.build(shared, device, compute) for teacher in teachers]
    with _kept(tasks[0], index, frozen):
        _run(tasks, index, frozen, device, compute)


def _run(
    tasks: Sequence[Task], index: Index, frozen: Sequence[Frozen], device: torch.device, compute: torch.dtype
) -> None:
    rank, world, shared = dist.rank(), dist.world(), tasks[0].config
    loader = Loader(
        index, shared.crops, shared.photometric, shared.masks, shared.vit.patch, shared.batch, shared.seed,
        threads=shared.threads or _share_of_processors(world), rank=rank, world=world,
        channels=shared.vit.channels, processes=shared.processes, weights=shared.weights,
        compiled=shared.parallel.compile,
    )  # fmt: skip
    students = [_student(task, loader, frozen, device, compute, many=len(tasks) > 1) for task in tasks]

    progress = Progress()
    if step := _common_step(tasks):
        for student in students:
            progress = student.load(step)
        if rank == 0:
            done = progress.step >= shared.steps
            say(f"  {'finished' if done else 'going on'} at step {progress.step:,} of {shared.steps:,}")
    if progress.step >= shared.steps:
        return
    if rank == 0 and progress.step == 0:
        for task in tasks:
            sheet.draw(loader, task.out / "pictures" / "crops.png")

    with _asked_to_stop() as asked:
        while True:
            for student in students:
                student.recorder.resume(progress)
                if student.task.init is not None:
                    student.recorder.before()
            try:
                with contextlib.closing(loader.batches(progress.batch, device)) as batches:
                    waited = batches
                    for student in students:
                        waited = student.recorder.timed(waited)
                    train(
                        [student.learner for student in students],
                        waited,
                        first_step=progress.step,
                        steps=shared.steps,
                        accumulate=shared.parallel.accumulate,
                        seed=shared.seed,
                        rank=rank,
                        asked_to_stop=lambda: bool(asked),
                    )
                progress = students[0].recorder.progress
                break
            except NotFinite as trouble:
                progress = _rescue(trouble, students, loader)
        for student in students:
            student.recorder.finish()
    if progress.step < shared.steps:
        raise Interrupted(f"stopped after {progress.step:,} of {shared.steps:,} steps; everything is saved")


def _student(
    task: Task, loader: Loader, frozen: Sequence[Frozen], device: torch.device, compute: torch.dtype, *, many: bool
) -> Student:
    config, widths = task.config, [teacher.network.backbone.config.dim for teacher in frozen]
    weights = first_weights(config, task.init, task.heads, widths)
    student, average = (build(config, weights, device, compute, widths) for _ in range(2))
    if config.schedules.backbone_frozen >= config.steps:  # only heads learn
        student.backbone.requires_grad_(False)
    if frozen:  # then no mask is seen, and its token not learnt
        student.backbone.mask_token.requires_grad_(False)
    anchor = build_anchor(config, weights, device, compute) if config.objective.gram_weight else None
    ranks = Ranks(dist.total, dist.largest, dist.gather)
    method = Method(config.objective, student, average, teachers=frozen, anchor=anchor, ranks=ranks, compute=compute)
    optimizer = optim.adamw(student, config.vit.depth, config.optim)
    saver = Saver(task.out, config, preprocessing(config))
    label = f"{task.out.name}: " if many else ""
    recorder = Recorder(config, method, optimizer, loader, task.out, saver, task.probe, label)
    return Student(task, Learner(method, optimizer, config.schedules, config.optim, recorder.after_step), recorder)


@contextlib.contextmanager
def _kept(task: Task, index: Index, frozen: Sequence[Frozen]) -> Iterator[None]:
    """Lend teachers a place to keep what they see, where crops come again; it is gone with the process."""
    crops, home = task.config.crops, task.out / "seen-by-teachers"
    if not frozen or not crops.visits or crops.mixed:
        yield
        return
    if dist.rank() == 0:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
    dist.barrier()
    try:
        for number, teacher in enumerate(frozen):
            height, width = pair(crops.global_px)
            tokens = 1 + height // teacher.vit.patch * (width // teacher.vit.patch)
            numbers = (len(index), crops.visits, 2, tokens, teacher.vit.dim)
            if Kept.fits(home / f"{number}", *numbers):
                teacher.kept = Kept(home / f"{number}", *numbers)
            elif dist.rank() == 0:
                say(f"  {teacher.name}: the disk has no room for what it sees; it looks again each time")
        dist.barrier()
        yield
    finally:
        if dist.rank() == 0:
            shutil.rmtree(home, ignore_errors=True)


def _common_step(tasks: Sequence[Task]) -> int:
    """The last step of which every run has a checkpoint; 0 if there is none."""
    steps = [{int(saved.name) for saved in checkpoint.finished(task.out)} for task in tasks]
    return max(set.intersection(*steps), default=0)


def _share_of_processors(world: int) -> int:
    """Threads to read with, where the ranks of one machine share its processors."""
    return max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))


def _rescue(trouble: NotFinite, students: Sequence[Student], loader: Loader) -> Progress:
    """Where to go on after a step that is not finite, with the methods in that state; raises `trouble` if nowhere."""
    first, config = students[0].recorder, students[0].task.config
    for student in students:
        student.recorder.settle()
    said = guard.report(trouble, first.progress.batch, loader, first.run)
    step = _common_step([student.task for student in students]) if config.guard.policy == "rollback" else 0
    progress, then = guard.where_to(config.guard, first.progress, Progress(step) if step else None)
    if dist.rank() == 0:
        for student in students:
            student.recorder.event("not finite", trouble.step, f"{said}; {then}")
    if progress is None:
        raise trouble
    if step:
        for student in students:
            student.load(step)
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


def _open(task: Task, index: Index, teachers: Sequence["Teacher"]) -> None:
    """Make the run folder, or see that what is in it is this run."""
    out, config, init = task.out, task.config, task.init
    settings = {"config": to_dict(config), "images": len(index), "init": init and init.fingerprint}
    settings |= {"teachers": [teacher.backbone.fingerprint for teacher in teachers]} if teachers else {}
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
        # Settings that an earlier version did not know are as they are by default.
        before = found["settings"] | {"config": to_dict(from_yaml(PretrainConfig(), out / "config.yaml"))}
        if before != settings or found["fingerprint"] != fingerprint(found["settings"], data):
            what = "; ".join(differences(before, settings)) or "other images"
            raise UsageError(f"{out}: a run with other settings ({what}); choose a new --out")
