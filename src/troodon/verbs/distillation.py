"""The verb `distill`: small networks learn from large ones, any number of students at a time."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Fixed, Positional, Suppress, arg

from troodon import recipes
from troodon.config import UsageError
from troodon.learn.config import PretrainConfig
from troodon.run import say
from troodon.verbs.common import Data, Images, configured, opened, paths_of, quoted, suggest
from troodon.verbs.training import by_path, check_devices, on_several, quick_knn, start_of, written

if TYPE_CHECKING:
    from troodon.learn.distill import Teacher
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
    """Train a smaller network towards a larger frozen one, a run or a backbone; goes on where it stopped.

    Several recipes, by name, are several students of one run: they see the same images, and the teacher looks once for
    all; each gets a run of its own, `out`/NAME. Several teachers are compared by their features. `settings` change all
    recipes. Returns the backbone's folder, or those of all students by name. `dry_run` only tells the plan.
    """
    named = dict(recipe) if isinstance(recipe, Mapping) else {"": recipe}
    configs = {n: configured(r, PretrainConfig(), recipes.distill, settings) for n, r in named.items()}
    check_devices(devices)
    from troodon import dist
    from troodon.images.sources import open_source
    from troodon.learn import distill as training
    from troodon.learn.engine import Task

    ranks = dist.to_start(devices)
    index = open_source(*paths_of(data))
    teachers = [taught(one) for one in paths_of(teacher)]
    tasks = [Task(config, Path(out) / name, probe=quick_knn(index, config)) for name, config in configs.items()]
    training.check(tasks, index, teachers, max(ranks, 1))
    if dry_run:
        _tell_plans(tasks, len(index), teachers, ranks)
    elif ranks > 1:
        by_path(data=data, teacher=teacher)
        with tempfile.TemporaryDirectory(prefix="troodon-") as folder:
            files = [written(config, Path(folder) / f"{name or 'student'}.yaml") for name, config in configs.items()]
            places = ["--teacher", *map(str, paths_of(teacher)), "--data", *map(str, paths_of(data)), "--out", str(out)]
            on_several(["distill", *files, *places], ranks)
    else:
        training.distill(tasks, index, teachers)
    made = {name: task.out / "backbone" for name, task in zip(configs, tasks)}
    return made if isinstance(recipe, Mapping) else made[""]


def taught(teacher: "str | Path | Backbone") -> "Teacher":
    """A teacher from a run, with the heads it was trained with; from other weights, without."""
    from troodon.learn import checkpoint
    from troodon.learn.distill import Teacher

    backbone = opened(teacher)
    if not isinstance(teacher, str | Path) or (run := start_of(teacher)).reuse != "whole":
        return Teacher(backbone, place=str(teacher) if isinstance(teacher, str | Path) else "")
    heads = checkpoint.heads(Path(teacher), run) if run.objective.by_prototypes else None
    return Teacher(backbone, run, heads, str(teacher))


def _tell_plans(tasks: list, images: int, teachers: list, ranks: int) -> None:
    from troodon import dist
    from troodon.learn.plan import plan, timed

    device = dist.device()
    for task in tasks:
        compute = dist.compute_dtype(task.config.compute, device)
        seen = [teacher.vit for teacher in teachers]
        planned = plan(task.config, images, device.type, compute.itemsize, ranks, teachers=seen)
        say((f"  {task.out.name}:\n" if len(tasks) > 1 else "") + timed(planned, device, compute).render())


@dataclass(frozen=True)
class Distill:
    """Train smaller networks towards a larger frozen one; several at a time, from one look of the teacher."""

    students: Positional[Images]
    """Recipes (see `troodon recipes`) or YAML files, one for each student. Options change all of them."""
    teacher: Images
    """A run, whose heads are asked too; or a backbone folder, released weights (.pth), a Hugging Face folder."""
    data: Images
    """Folders, tars, paths inside tars, an index or a selection."""
    out: str
    """The run's folder; of several students, a folder of runs."""
    devices: str = "auto"
    """Devices of this machine to train on, or processes where it has none; auto is all devices."""
    dry_run: bool = False
    """Tell what it would take, and stop."""
    config: Annotated[PretrainConfig, arg(name="")] = PretrainConfig()
    configs: Suppress[Fixed[Any]] = None  # of every student, by name: the command line's work

    def run(self) -> None:
        several = len(self.students) > 1
        configs = self.configs if several else next(iter(self.configs.values()))
        made = distill(configs, self.teacher, self.data, self.out, devices=self.devices, dry_run=self.dry_run)
        if self.dry_run:
            return
        for folder in made.values() if isinstance(made, dict) else [made]:
            print(folder)
            run = quoted(str(folder.parent))
            suggest(
                f"troodon evaluate mine --backbone {run} --data LABELLED --out {run}-scores", f"troodon report {run}"
            )


def by_name(students: tuple[str, ...]) -> dict[str, str]:
    """The students' recipes by what their runs are called. UsageError for two of one name."""
    named: dict[str, str] = {}
    for recipe in students:
        name = Path(recipe).stem
        if name in named:
            raise UsageError(f"two students are called {name}: give one of them another recipe, or another file name")
        named[name] = recipe
    return named
