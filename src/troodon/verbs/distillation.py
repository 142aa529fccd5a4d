"""The verb `distill`: small networks learn from large ones, any number of students at a time."""

import contextlib
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Fixed, Positional, Suppress, arg

from troodon import recipes
from troodon.config import UsageError
from troodon.devices import ranks_to_start
from troodon.launch import began_at
from troodon.learn import outcome
from troodon.learn.config import PretrainConfig
from troodon.lock import alone
from troodon.run import say
from troodon.verbs.common import (
    Data,
    Paths,
    as_backbone,
    as_list,
    check_devices,
    config_of_weights,
    is_first,
    launch_ranks,
    open_images,
    range_before,
    require_paths,
    resolve_config,
    suggest_next,
    write_config,
)
from troodon.verbs.plans import before_training, plan_here
from troodon.verbs.training import as_begun, make_probe, record_steps

if TYPE_CHECKING:
    from troodon.learn.teacher import Teacher
    from troodon.model.backbone import Backbone

Recipe = str | PretrainConfig


def distill(
    recipe: Recipe | Mapping[str, Recipe],
    teacher: "str | Path | Backbone | Sequence[str | Path | Backbone]",
    data: Data,
    out: str | Path,
    *,
    settings: dict | None = None,
    devices: str | int = "auto",
    dry_run: bool = False,
) -> Path | dict[str, Path]:
    """Train a smaller network towards a larger frozen one, a run or a backbone, or go on where the run stopped.

    Several recipes, by name, are several students that train together: they see the same images, and the teacher runs
    once for all of them; each student gets its own run, `out`/NAME. Several teachers teach by their features only.
    `settings` changes all recipes. Returns the backbone's folder, or those of all students by name. `dry_run` only
    prints the plan.
    """
    named = dict(recipe) if isinstance(recipe, Mapping) else {"": recipe}
    configs = {n: resolve_config(r, PretrainConfig(), recipes.distill, settings) for n, r in named.items()}
    check_devices(devices)
    with contextlib.nullcontext() if dry_run else alone(Path(out)):
        configs = {name: as_begun(config, Path(out) / name) for name, config in configs.items()}
        _distill(configs, teacher, data, Path(out), devices, dry_run=dry_run)
        for name, config in configs.items() if is_first() and not dry_run else ():
            outcome.tell(Path(out) / name, config)
            record_steps(Path(out) / name, config)
    backbones = {name: Path(out) / name / "backbone" for name in configs}
    return backbones if isinstance(recipe, Mapping) else backbones[""]


def _distill(
    configs: dict[str, PretrainConfig], teacher: Any, data: Data, out: Path, devices: str | int, *, dry_run: bool
) -> None:
    """Train the students, on ranks of this machine where there are several devices; or print their plans."""
    from troodon.images.cache import cached
    from troodon.learn import distill as training
    from troodon.learn import loggers
    from troodon.learn.engine import Task
    from troodon.views.attacks import random_attack

    began, ranks = began_at(), ranks_to_start(devices)
    ranges = {config.range for config in configs.values()}
    if len(ranges) > 1:
        raise UsageError("students that train together see the same images: give all the same range")
    teachers = [open_teacher(t) for t in as_list(teacher)]
    inherited = range_before(out / next(iter(configs)), *(t.backbone for t in teachers))
    index = open_images(data, next(iter(ranges), None), inherited)
    configs = {name: replace(config, range=index.range) for name, config in configs.items()}
    before = before_training(index, [t.vit for t in teachers])
    tasks = [
        Task(
            config,
            out / name,
            probe=make_probe(index, config),
            before=before,
            attack=random_attack,
            open_log=loggers.open_for,
            began=began,
        )
        for name, config in configs.items()
    ]
    for config in configs.values():
        loggers.check(config.log_to)
    training.check(tasks, index, teachers, max(ranks, 1))
    if dry_run:
        _print_plans(tasks, len(index), teachers, ranks)
    elif ranks > 1:
        require_paths(data=data, teacher=teacher)
        with tempfile.TemporaryDirectory(prefix="troodon-") as folder:
            files = [write_config(c, Path(folder) / f"{name or 'student'}.yaml") for name, c in configs.items()]
            places = ["--teacher", *map(str, as_list(teacher)), "--data", *map(str, as_list(data)), "--out", str(out)]
            launch_ranks(["distill", *files, *places], ranks, began)
    else:
        training.distill(tasks, cached(index, tasks[0].config.image_cache_gib), teachers)


def open_teacher(teacher: "str | Path | Backbone") -> "Teacher":
    """The teacher in a run, with the heads it was trained with; from other weights, without heads."""
    from troodon.learn import heads
    from troodon.learn.teacher import Teacher

    backbone = as_backbone(teacher)
    if not isinstance(teacher, str | Path) or (run := config_of_weights(teacher)).reuse != "whole":
        return Teacher(backbone, place=str(teacher) if isinstance(teacher, str | Path) else "")
    own = heads.of_run(Path(teacher), run) if run.objective.prototypes else None
    return Teacher(backbone, run, own, str(teacher))


def _print_plans(tasks: list, images: int, teachers: list, ranks: int) -> None:
    for task in tasks:
        text = plan_here(task.config, images, ranks, [teacher.vit for teacher in teachers])
        say((f"  {task.out.name}:\n" if len(tasks) > 1 else "") + text)


@dataclass(frozen=True)
class Distill:
    """Train smaller networks towards a larger frozen one; several at a time, for one forward pass of the teacher."""

    students: Positional[Paths]
    """Recipes (see `troodon recipes`) or YAML files, one for each student. Options change all of them."""
    teacher: Paths
    """A run, whose heads teach too; or a backbone folder, weights in any file, or a name such as dinov2_vits14."""
    data: Paths
    """Folders, tars, paths inside tars, an index or a selection."""
    out: str
    """The run's folder; for several students, a folder of runs."""
    devices: str = "auto"
    """Devices of this machine to train on, or processes where it has none; auto is all devices."""
    dry_run: bool = False
    """Print what the training would take, and stop."""
    config: Annotated[PretrainConfig, arg(name="")] = PretrainConfig()
    configs: Suppress[Fixed[Any]] = None  # of every student, by name; cli.py sets them

    def run(self) -> None:
        several = len(self.students) > 1
        configs = self.configs if several else next(iter(self.configs.values()))
        backbones = distill(configs, self.teacher, self.data, self.out, devices=self.devices, dry_run=self.dry_run)
        if self.dry_run:
            return
        for folder in backbones.values() if isinstance(backbones, dict) else [backbones]:
            print(folder)
            run = shlex.quote(str(folder.parent))
            suggest_next(
                f"troodon evaluate mine --backbone {run} --data LABELLED --out {run}-scores", f"troodon report {run}"
            )


def recipes_by_name(students: tuple[str, ...]) -> dict[str, str]:
    """The students' recipes by the names of their runs. UsageError for two of one name."""
    named: dict[str, str] = {}
    for recipe in students:
        name = Path(recipe).stem
        if name in named:
            raise UsageError(f"two students are called {name}: give one of them another recipe, or another file name")
        named[name] = recipe
    return named
