"""Distillation: students learn from a larger network that no longer learns (section 5 of
https://arxiv.org/abs/2304.07193). The same engine as pretraining, with another teacher."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

from troodon import dist
from troodon.config import UsageError, differences, to_dict
from troodon.learn import engine
from troodon.learn.config import PretrainConfig
from troodon.learn.engine import Task
from troodon.learn.frozen import frozen_teachers
from troodon.learn.objective import CLS_TARGETS, VISIBLE_TARGETS
from troodon.learn.pretrain import check_common
from troodon.learn.teacher import Teacher
from troodon.views.image_source import ImageSource

OWN = ("vit", "dino_head", "ibot_head", "objective", "optim", "schedules")  # settings that may differ between students


def distill(tasks: Sequence[Task], index: ImageSource, teachers: Sequence[Teacher]) -> None:
    """Train students towards frozen teachers, or go on where their runs stopped. Raises what `pretrain` raises."""
    with dist.process_group():
        check(tasks, index, teachers, dist.world_size())
        engine.run(tasks, index, teachers, functools.partial(frozen_teachers, teachers))


def check(tasks: Sequence[Task], index: ImageSource, teachers: Sequence[Teacher], ranks: int) -> None:
    """UsageError, with the remedy, for students and teachers that do not fit each other."""
    first = tasks[0]
    for task in tasks:
        check_common(task.config, index, task.init, ranks)
        if task.config.reuse != "backbone":
            raise UsageError(f"reuse {task.config.reuse}: a student's heads are new; leave it out")
        ours, theirs = ({k: v for k, v in to_dict(t.config).items() if k not in OWN} for t in (first, task))
        if wrong := differences(ours, theirs):
            raise UsageError(f"students see the same images, but {_name(task)} differs: {'; '.join(wrong)}")
        for teacher in teachers:
            _check_crops(task.config, teacher)
        _check_heads(task.config, teachers)


def _check_crops(config: PretrainConfig, teacher: Teacher) -> None:
    """UsageError unless the teacher can take the student's crops."""
    name, vit = teacher.name, teacher.vit
    if vit.channels != config.vit.channels:
        raise UsageError(f"teacher {name}: sees {vit.channels} channels, and the student {config.vit.channels}")
    both = math.lcm(vit.patch, config.vit.patch)
    for size, _, _ in config.crops.sizes():
        if any(px % vit.patch for px in size):
            near = " ".join(str(max(both, round(px / both) * both)) for px in dict.fromkeys(size))
            problem = f"crops.global_px {' '.join(map(str, dict.fromkeys(size)))} does not divide into its patches of"
            raise UsageError(f"teacher {name}: {problem} {vit.patch}; the nearest that suits both is {near}")


def _check_heads(config: PretrainConfig, teachers: Sequence[Teacher]) -> None:
    """UsageError unless the teachers have the heads that the objective needs."""
    objective = config.objective
    if VISIBLE_TARGETS in objective.needs:
        raise UsageError(
            "objective.terms ibot_visible: a student sees no masks, so ibot compares all patches; leave it out"
        )
    if not objective.prototypes:
        return
    if len(teachers) > 1:
        reason = "several teachers are compared by their features"
        raise UsageError(f"{reason}: set objective.terms to cls_features 1, or use the recipe distill_features")
    (teacher,), name = teachers, teachers[0].name
    if teacher.run is None or teacher.heads is None:
        raise UsageError(
            f"teacher {name}: has no heads (only a run has). Learn them first: troodon pretrain heads --init {name} "
            "--data DATA --out HEADS, then --teacher HEADS; or use the recipe distill_features, which needs none"
        )
    its = teacher.run.objective
    for term in ("dino", "ibot"):
        if objective.weight(term) and not its.weight(term):
            raise UsageError(f"teacher {name}: was trained without {term.upper()}: leave {term} out of objective.terms")
    if objective.heads != its.heads and objective.patch_targets:
        raise UsageError(f"teacher {name}: has {its.heads} heads: set objective.heads to {its.heads}")
    separate = objective.patch_targets and objective.heads == "separate"
    for head in ["dino_head"] * (CLS_TARGETS in objective.needs) + ["ibot_head"] * separate:
        ours, theirs = getattr(config, head).prototypes, getattr(teacher.run, head).prototypes
        if ours != theirs:
            raise UsageError(f"teacher {name}: has {theirs} prototypes: set {head}.prototypes to {theirs}, not {ours}")


def _name(task: Task) -> str:
    return Path(task.out).name
