"""Distillation: students learn from a larger network that no longer does (section 5 of
https://arxiv.org/abs/2304.07193). The same engine as pretraining; the teacher is another."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from troodon import dist
from troodon.config import UsageError, differences, to_dict
from troodon.images.index import Index
from troodon.learn import engine
from troodon.learn.config import ObjectiveConfig, ParallelConfig, PretrainConfig
from troodon.learn.engine import Task
from troodon.learn.parallel import build, first_weights
from troodon.learn.pretrain import sound
from troodon.learn.teacher import Frozen
from troodon.model.backbone import Backbone
from troodon.model.config import ViTConfig

OWN = ("vit", "dino_head", "ibot_head", "objective", "optim", "schedules")  # what students need not have in common
FEATURES = ObjectiveConfig(dino_weight=0.0, ibot_weight=0.0, cls_weight=1.0)  # of a network that has no heads


@dataclass(frozen=True)
class Teacher:
    """A trained network: its backbone, and of a run its settings and its heads, which it was trained with."""

    backbone: Backbone
    run: PretrainConfig | None = None
    heads: dict[str, Tensor] | None = None
    place: str = ""  # where it lies, as it was given

    @property
    def name(self) -> str:
        return self.place or self.backbone.name

    @property
    def vit(self) -> ViTConfig:
        return self.backbone.config

    def build(self, config: PretrainConfig, device: torch.device, compute: torch.dtype) -> Frozen:
        """The network on its device, sharded over ranks, to be asked about crops of a run with this config."""
        parallel = ParallelConfig(compile=config.parallel.compile)
        of = self.run or PretrainConfig(objective=FEATURES)
        of = dataclasses.replace(of, vit=dataclasses.replace(self.vit, drop_path=0.0), parallel=parallel)
        network = build(of, first_weights(of, self.backbone, self.heads), device, compute)
        if dist.world() == 1 and compute != torch.float32:  # shards are gathered so anyway
            for layer in network.backbone.blocks.modules():
                if isinstance(layer, nn.Linear):  # the same numbers as autocast makes of them, at each step
                    layer.to(compute)
        seen, own = config.photometric, self.backbone.preprocessing
        if (seen.mean, seen.std) == (own.mean, own.std):
            return Frozen(self.backbone.name, network, self.vit)
        mean, std, own_mean, own_std = (
            torch.tensor(v, device=device)[:, None, None] for v in (seen.mean, seen.std, own.mean, own.std)
        )
        return Frozen(self.backbone.name, network, self.vit, std / own_std, (mean - own_mean) / own_std)


def distill(tasks: Sequence[Task], index: Index, teachers: Sequence[Teacher]) -> None:
    """Train students towards frozen teachers, or go on where their runs stopped. Raises what `pretrain` raises."""
    with dist.group():
        check(tasks, index, teachers, dist.world())
        engine.run(tasks, index, teachers)


def check(tasks: Sequence[Task], index: Index, teachers: Sequence[Teacher], ranks: int) -> None:
    """UsageError, with the remedy, for students and teachers that cannot be brought together."""
    first = tasks[0]
    for task in tasks:
        sound(task.config, index, task.init, ranks)
        if task.config.reuse != "backbone":
            raise UsageError(f"reuse {task.config.reuse}: a student's heads are new; leave it out")
        ours, theirs = ({k: v for k, v in to_dict(t.config).items() if k not in OWN} for t in (first, task))
        if wrong := differences(ours, theirs):
            raise UsageError(f"students see the same images, but {_name(task)} differs: {'; '.join(wrong)}")
        for teacher in teachers:
            _matches(task.config, teacher)
        _answers(task.config, teachers)


def _matches(config: PretrainConfig, teacher: Teacher) -> None:
    """UsageError unless the teacher can look at the student's crops."""
    name, vit = teacher.name, teacher.vit
    if vit.channels != config.vit.channels:
        raise UsageError(f"teacher {name}: sees {vit.channels} channels, and the student {config.vit.channels}")
    both = math.lcm(vit.patch, config.vit.patch)
    for size, _, _ in config.crops.sizes():
        if any(px % vit.patch for px in size):
            near = " ".join(str(max(both, round(px / both) * both)) for px in dict.fromkeys(size))
            said = f"crops.global_px {' '.join(map(str, dict.fromkeys(size)))} does not divide into its patches of"
            raise UsageError(f"teacher {name}: {said} {vit.patch}; the nearest that suits both is {near}")


def _answers(config: PretrainConfig, teachers: Sequence[Teacher]) -> None:
    """UsageError unless the teachers have what the objective asks of them."""
    c = config.objective
    if not c.by_prototypes:
        return
    if len(teachers) > 1:
        said = "several teachers are compared by their features"
        raise UsageError(f"{said}: set objective.dino_weight and ibot_weight to 0, or use the recipe distill_features")
    (teacher,), name = teachers, teachers[0].name
    if teacher.run is None or teacher.heads is None:
        raise UsageError(
            f"teacher {name}: has no heads (only a run has). Learn them first: troodon pretrain heads --init {name} "
            "--data DATA --out HEADS, then --teacher HEADS; or use the recipe distill_features, which needs none"
        )
    theirs = teacher.run.objective
    for term in ("dino", "ibot"):
        if getattr(c, f"{term}_weight") and not getattr(theirs, f"{term}_weight"):
            raise UsageError(f"teacher {name}: was trained without {term.upper()}: set objective.{term}_weight to 0")
    if c.heads != theirs.heads and c.ibot_weight:
        raise UsageError(f"teacher {name}: has {theirs.heads} heads: set objective.heads to {theirs.heads}")
    for head in ["dino_head"] * bool(c.dino_weight) + ["ibot_head"] * bool(c.ibot_weight and c.heads == "separate"):
        ours, its = getattr(config, head).prototypes, getattr(teacher.run, head).prototypes
        if ours != its:
            raise UsageError(f"teacher {name}: has {its} prototypes: set {head}.prototypes to {its}, not {ours}")


def _name(task: Task) -> str:
    return Path(task.out).name
