"""One engine for pretraining and distillation: from tasks and an index of images to run folders.

It builds the objects and runs the loop. Several tasks share the images, the crops and the outputs of frozen teachers;
each writes a run of its own, as if it were alone.
"""

import contextlib
import ctypes
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from troodon import dist
from troodon.learn import adapters, best, checkpoint, guard, optim
from troodon.learn.checkpoint import Saver, TrainingProgress
from troodon.learn.clock import Clock
from troodon.learn.config import PretrainConfig
from troodon.learn.folder import open_folder
from troodon.learn.loop import Learner, NotFinite, train
from troodon.learn.losses import Ranks
from troodon.learn.method import Method
from troodon.learn.objective import ANCHOR
from troodon.learn.parallel import build, build_anchor, compiles, first_weights
from troodon.learn.recorder import OpenLog, Probe, Recorder, preprocessing
from troodon.learn.teacher import Build, FrozenTeacher, Teacher, no_teachers
from troodon.model.saved import SavedViT
from troodon.run import Interrupted, current_command, say
from troodon.views.crops import Attack
from troodon.views.image_source import ImageSource
from troodon.views.loader import BATCHES_AHEAD, Loader

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt
SHARED_MEMORY = Path("/dev/shm")  # through which processes hand over crops; small in some containers


@dataclass(frozen=True)
class Task:
    """A network to train: its config, the folder of its run, its first weights, a probe of how good it is, and what to
    do once the folder is there, before the training starts."""

    config: PretrainConfig
    out: Path
    init: SavedViT | None = None
    heads: dict[str, Tensor] | None = None
    probe: Probe | None = None
    before: Callable[[PretrainConfig, Path], None] | None = None
    attack: Attack | None = None  # what attacks pictures, where the crops ask for it
    open_log: OpenLog | None = None  # what opens the places of config.log_to
    began: float | None = None  # when the command began, by `time.monotonic`; now


class NothingLearned(RuntimeError):
    """What was to learn is after the last step as it was before the first; everything is saved."""


class TooManyBroken(RuntimeError):
    """More images cannot be read than `max_broken` allows; everything is saved."""


@dataclass(frozen=True)
class Student:
    """A task in training."""

    task: Task
    learner: Learner
    recorder: Recorder
    first_bits: dict[str, Tensor]  # of each part of its EMA, before the first step

    def load(self, step: int) -> TrainingProgress:
        """Load the state of a checkpoint."""
        folder = self.task.out / "checkpoints" / f"{step:06d}"
        progress = checkpoint.load(folder, self.learner.method, self.learner.optimizer)
        self.recorder.look_back(step)
        if dist.rank() == 0 and best.is_kept(self.recorder.readings, self.task.config.adapt.patience, step):
            self.recorder.saver.restore(folder)
        return progress

    def check_learned(self) -> None:
        """NothingLearned, on every rank, if a part of the result that was to learn has not changed."""
        config, bits = self.task.config, _bits(self.learner.method.ema)
        changed = dist.sum_over_ranks(torch.stack([bits[n] != first for n, first in self.first_bits.items()]).float())
        still = [name for name, ranks in zip(bits, changed.tolist()) if not ranks]
        steps = self.recorder.clock.pace.end
        if config.schedules.backbone_frozen == config.steps:  # only heads were to learn
            still = [name for name in still if name != "backbone"]
        if still:
            frozen = config.schedules.backbone_frozen
            cause = f"schedules.backbone_frozen {frozen:,}" if frozen > config.steps else "schedules.lr, ema_momentum"
            what = f"{', '.join(still)} did not change in {steps:,} steps: see {cause}"
            raise NothingLearned(f"{self.task.out}: {what}")


def run(
    tasks: Sequence[Task], index: ImageSource, teachers: Sequence[Teacher] = (), build_teachers: Build = no_teachers
) -> None:
    """Train until the steps are done, or go on where the runs of the tasks stopped.

    What tasks share, such as crops and the number of steps, is taken from the first. Raises what `pretrain` raises.
    """
    device, config = dist.device(), tasks[0].config
    compute = dist.compute_dtype(config.compute, device)
    if device.type == "cpu":
        _keep_freed_memory()
    if dist.rank() == 0:
        for task in tasks:
            open_folder(task.out, task.config, index, task.init, [teacher.backbone for teacher in teachers])
            if len(tasks) > 1:
                say(f"  {task.out.name}:")
            if task.before is not None:
                task.before(task.config, task.out)
    dist.barrier()
    with build_teachers(config, tasks[0].out, len(index), device, compute) as frozen:
        clock = Clock(config, tasks[0].began)
        loader = _loader(config, index, tasks[0].attack, clock)
        students = [_student(task, loader, clock, frozen, device, compute, many=len(tasks) > 1) for task in tasks]
        progress = _resume(tasks, students, clock)
        if progress.step < clock.pace.end and not _given_up(students):
            _train(students, loader, clock, progress, device)
        for student in students:
            student.check_learned()


def _loader(config: PretrainConfig, index: ImageSource, attack: Attack | None, clock: Clock) -> Loader:
    rank, world_size, device = dist.rank(), dist.world_size(), dist.device()
    threads = config.threads or _share_of_processors(world_size)
    return Loader(
        index, config.crops, config.photometric, config.masks, config.vit.patch, config.batch, config.seed,
        threads=threads, rank=rank, world_size=world_size,
        channels=config.vit.channels, processes=_processes(config, threads, device, world_size), weights=config.weights,
        compiled=compiles(config, device), attack=attack, progress=clock.share_before,
    )  # fmt: skip


def _resume(tasks: Sequence[Task], students: Sequence[Student], clock: Clock) -> TrainingProgress:
    """Load the last step of which every run has a checkpoint."""
    progress = TrainingProgress()
    if step := _common_step(tasks):
        for student in students:
            progress = student.load(step)
        clock.resume(progress.clock)
        if dist.rank() == 0:
            done = progress.step >= clock.pace.end
            say(f"  {'finished' if done else 'going on'} at step {progress.step:,} of {clock.length}")
    return progress


def _train(
    students: Sequence[Student], loader: Loader, clock: Clock, progress: TrainingProgress, device: torch.device
) -> None:
    """Take the steps that are left. After a step that is not finite, the guard decides where to go on."""
    config, first = students[0].task.config, progress.batch

    def broken_share() -> float:
        return loader.broken_share(students[0].recorder.progress.batch + 1 - first)

    with _stop_requests() as requests:
        while True:
            clock.start(progress.step)
            for student in students:
                student.recorder.resume(progress)
                if student.task.init is not None:
                    student.recorder.before_training()
            try:
                with contextlib.closing(loader.batches(progress.batch, device)) as batches:
                    timed = batches
                    for student in students:
                        timed = student.recorder.timed(timed)
                    train(
                        [student.learner for student in students],
                        timed,
                        first_step=progress.step,
                        clock=clock,
                        accumulate=config.parallel.accumulate,
                        stop_requested=lambda: (
                            bool(requests) or broken_share() > config.max_broken or _given_up(students)
                        ),
                    )
                progress = students[0].recorder.progress
                break
            except NotFinite as error:
                progress = _recover(error, students, loader)
                clock.load(progress.clock)
        for student in students:
            student.recorder.finish()
    if (share := max(dist.all_gather_objects(broken_share()))) > config.max_broken:
        what = f"{share:.0%} of the images tried cannot be read, and max_broken is {config.max_broken:g}"
        raise TooManyBroken(f"{what}; stopped at step {progress.step:,}, everything is saved: see quarantine.jsonl")
    if progress.step < clock.pace.end and not _given_up(students):
        raise Interrupted(f"stopped after {progress.step:,} of {clock.length} steps; everything is saved")
    if clock.seconds and dist.rank() == 0:
        for student in students:
            student.recorder.event("time", progress.step, clock.told(progress.step))


def _given_up(students: Sequence[Student]) -> bool:
    """Whether the features of all of them have got worse for so long that they stop."""
    return all(student.recorder.given_up() for student in students)


def _student(
    task: Task, loader: Loader, clock: Clock, frozen: Sequence[FrozenTeacher], device: torch.device,
    compute: torch.dtype, *, many: bool,
) -> Student:  # fmt: skip
    config, widths = task.config, [teacher.network.backbone.config.dim for teacher in frozen]
    weights = first_weights(config, task.init, task.heads, widths)
    student, ema = (build(config, weights, device, compute, widths) for _ in range(2))
    first_bits = _bits(ema)
    if config.schedules.backbone_frozen >= config.steps:  # only heads learn
        student.backbone.requires_grad_(False)
    elif config.adapt.rank:
        adapters.freeze_others(student.backbone)
    if frozen:  # the student sees no masks, so the mask token cannot learn
        student.backbone.mask_token.requires_grad_(False)
    anchor = build_anchor(config, weights, device, compute) if ANCHOR in config.objective.needs else None
    ranks = Ranks(dist.sum_over_ranks, dist.max_over_ranks, dist.all_gather)
    method = Method(config.objective, student, ema, teachers=frozen, anchor=anchor, ranks=ranks, compute=compute)
    optimizer = optim.adamw(student, config.vit.depth, config.optim)
    saver = Saver(task.out, config, preprocessing(config), clock.now)
    label = f"{task.out.name}: " if many else ""
    recorder = Recorder(config, method, optimizer, loader, clock, task.out, saver, task.probe, task.open_log, label)
    learner = Learner(method, optimizer, config.schedules, config.optim, recorder.after_step)
    return Student(task, learner, recorder, first_bits)


def _bits(network: torch.nn.Module) -> dict[str, Tensor]:
    """For each part of a network a number, () int64, from the bits of this rank's weights: another once one changes."""
    bits = {}
    for name, part in network.named_children():
        shards = [p.to_local() if isinstance(p, DTensor) else p for p in part.parameters()]
        sums = [shard.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for shard in shards]
        bits[name] = torch.stack(sums).sum()
    return bits


def _common_step(tasks: Sequence[Task]) -> int:
    """The last step of which every run has a checkpoint; 0 if there is none."""
    steps = [{int(saved.name) for saved in checkpoint.finished(task.out)} for task in tasks]
    return max(set.intersection(*steps), default=0)


def _share_of_processors(world_size: int) -> int:
    """Threads that read images, if the ranks of one machine share its processors."""
    return max(1, min(16, dist.processors() // _ranks_here(world_size)))


def _ranks_here(world_size: int) -> int:
    """Ranks of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def _keep_freed_memory() -> None:
    """glibc returns large blocks to the system, and the next step pays for their pages anew; it keeps them then."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries have no such options
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, -1)


def _processes(config: PretrainConfig, threads: int, device: torch.device, world_size: int) -> int:
    """Processes that read images in place of so many threads: on a GPU, whose steps need the interpreter, if a command
    started this process (the start of a script would run in each of them), and shared memory holds the batches."""
    if config.processes is not None or device.type != "cuda" or not current_command:
        return config.processes or 0
    sizes = [(config.crops.globals, wide, config.crops.locals, narrow) for wide, narrow, _ in config.crops.sizes()]
    pixels = max(a * math.prod(wide) + b * math.prod(narrow) for a, wide, b, narrow in sizes)
    needed = (BATCHES_AHEAD + 2) * config.batch // world_size * config.vit.channels * pixels * _ranks_here(world_size)
    has_room = SHARED_MEMORY.exists() and needed < shutil.disk_usage(SHARED_MEMORY).free
    return threads if has_room else 0


def _recover(error: NotFinite, students: Sequence[Student], loader: Loader) -> TrainingProgress:
    """Where to go on after a step that is not finite, with the methods in that state; raises `error` if nowhere."""
    first, config = students[0].recorder, students[0].task.config
    for student in students:
        student.recorder.settle()
    report = guard.report(error, first.progress.batch, loader, first.run)
    step = _common_step([student.task for student in students]) if config.guard.policy == "rollback" else 0
    progress, decision = guard.decide(config.guard, first.progress, TrainingProgress(step) if step else None)
    if dist.rank() == 0:
        for student in students:
            student.recorder.event("not finite", error.step, f"{report}; {decision}")
    if progress is None:
        raise error
    if step:
        loaded = [student.load(step) for student in students]
        progress = replace(progress, clock=loaded[0].clock)
    return progress


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM requests a stop; a second SIGINT stops the run at once."""
    requests: list[int] = []

    def request(number: int, _: FrameType | None) -> None:
        if requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        requests.append(number)
        say("\n  stopping after this step, and saving; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
